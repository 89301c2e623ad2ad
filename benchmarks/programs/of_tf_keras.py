"""Programs of Keras 2: `tf_keras`, or the Keras of TensorFlow 2.15 together with TensorFlow Addons."""

import importlib
import importlib.util

import numpy as np
import tensorflow as tf

import models
from lookahead_optim.tf_keras import Lookahead
from programs.tensorflow_graphs import loop_program, operations
from timing import Program

keras = importlib.import_module("tf_keras") if importlib.util.find_spec("tf_keras") else tf.keras
INNER = {
    "SGD": lambda: keras.optimizers.legacy.SGD(1e-3),
    "momentum": lambda: keras.optimizers.legacy.SGD(1e-3, momentum=0.9),
    "Adam": lambda: keras.optimizers.legacy.Adam(1e-3),
}


def versions():
    """Return the packages whose versions matter."""
    return ["tensorflow", "keras" if keras is getattr(tf, "keras", None) else "tf_keras", "tensorflow_addons"]


def optimizers(case):
    """Return functions that make the optimizers to compare, by name. The bare optimizer comes first."""
    made = {"bare": INNER[case.inner], "lookahead-optim": lambda: Lookahead(INNER[case.inner](), case.period)}
    # For the sparse gradients of embeddings TensorFlow Addons raises a KeyError, if SGD without momentum is inside.
    fails = case.model == "transformer" and case.inner == "SGD"
    if importlib.util.find_spec("tensorflow_addons") and not fails:
        import tensorflow_addons

        addons = tensorflow_addons.optimizers.Lookahead
        made["tensorflow_addons"] = lambda: addons(INNER[case.inner](), case.period, 0.5)
    return made


def step_program(case, make):
    """Return the program of the optimizer's step alone."""
    rng = np.random.default_rng(0)
    shape = (case.weights, case.side, case.side)
    weights = [tf.Variable(value) for value in rng.normal(size=shape).astype("float32")]
    gradients = [tf.constant(value) for value in rng.normal(size=shape).astype("float32")]
    optimizer = make()

    @tf.function
    def step():
        optimizer.apply_gradients(zip(gradients, weights))

    return Program(step, lambda: float(weights[0][0, 0]), lambda: operations(step))


def training_program(case, make):
    """Return a program that trains by `fit`, two cycles in a call, or in a loop written by hand."""
    if case.loop == "by hand":
        return loop_program(keras, case, make(), {})
    return models.fit_program(keras, case, make())
