"""Programs of Keras 3, on its three backends."""

import keras
import numpy as np

import models
from cases import OUTER_STEP
from lookahead_optim.keras import Lookahead
from timing import Program

INNER = {
    "SGD": lambda: keras.optimizers.SGD(1e-3),
    "momentum": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-3),
}


def versions():
    """Return the packages whose versions matter."""
    return ["keras", keras.config.backend()]


def optimizers(case):
    """Return functions that make the optimizers to compare, by name. The bare optimizer comes first."""
    forms = {"lookahead-optim": {}}
    if case.kind == "outer":
        forms["lookahead-optim, momentum"] = OUTER_STEP
        if case.dtype != "float32":
            forms["lookahead-optim, float32"] = {"slow_dtype": "float32"}
            forms["lookahead-optim, momentum, float32"] = {**OUTER_STEP, "slow_dtype": "float32"}

    def made(form):
        return lambda: Lookahead(INNER[case.inner](), case.period, **form)

    return {"bare": INNER[case.inner], **{name: made(form) for name, form in forms.items()}}


def step_program(case, make):
    """Return the program of the optimizer's step alone."""
    rng = np.random.default_rng(0)
    shape = (case.weights, case.side, case.side)
    weights = [keras.Variable(value, dtype=case.dtype) for value in rng.normal(size=shape).astype("float32")]
    gradients = [keras.ops.cast(value, case.dtype) for value in rng.normal(size=shape).astype("float32")]
    optimizer = make()
    optimizer.build(weights)

    if keras.config.backend() == "jax":
        return _jax_program(optimizer, weights, gradients)

    if keras.config.backend() == "torch":
        import torch

        def step():
            with torch.no_grad():
                optimizer.apply(gradients, weights)

        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        return Program(step, wait)
    import tensorflow as tf

    from programs.tensorflow_graphs import operations

    def apply():
        optimizer.apply(gradients, weights)

    def wait():
        return float(weights[0].value[0, 0])

    if case.mode.endswith("eager"):
        return Program(apply, wait)
    traced = tf.function(apply, jit_compile=case.mode.endswith("XLA"))
    return Program(traced, wait, lambda: operations(traced))


def _jax_program(optimizer, weights, gradients):
    import jax

    state = [weight.value for weight in weights], [variable.value for variable in optimizer.variables]
    jitted = jax.jit(
        lambda state, gradients: optimizer.stateless_apply(state[1], gradients, state[0]), donate_argnums=0
    )
    return jax_program(jitted, state, gradients)


def jax_program(jitted, state, gradients):
    """Return the program of a jitted function `(state, gradients) -> state`. The weights come first in the state."""
    import jax

    compiled = jitted.lower(state, gradients).compile()

    def step():
        nonlocal state
        state = compiled(state, gradients)

    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        step,
        lambda: jax.block_until_ready(state),
        lambda: compiled.as_text().count(" = "),
        (held + memory.temp_size_in_bytes, memory.temp_size_in_bytes),
    )


def training_program(case, make):
    """Return a program that trains by `fit`, two cycles in a call, or in a loop written by hand."""
    if case.loop == "by hand":
        return {"tensorflow": _tensorflow_loop, "jax": _jax_loop, "torch": _torch_loop}[keras.config.backend()](
            case, make
        )
    if keras.config.backend() != "tensorflow":
        return models.fit_program(keras, case, make())
    # By default Keras would use XLA in every mode of TensorFlow.
    options = {"jit_compile": case.mode.endswith("XLA")}
    return models.fit_program(keras, case, make(), **options)


def _tensorflow_loop(case, make):
    from programs.tensorflow_graphs import loop_program

    options = None if case.mode.endswith("eager") else {"jit_compile": case.mode.endswith("XLA")}
    return loop_program(keras, case, make(), options)


def _jax_loop(case, make):
    import jax

    model, x, y = models.of_keras(keras, case.model)
    optimizer = make()
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trained, others):
        logits, others = model.stateless_call(trained, others, x, training=True)
        return loss_of(y, logits), others

    def train(state):
        trained, others, variables = state
        grads, others = jax.grad(loss, has_aux=True)(trained, others)
        trained, variables = optimizer.stateless_apply(variables, grads, trained)
        return trained, others, variables

    lists = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    state = tuple([variable.value for variable in variables] for variables in lists)
    compiled = jax.jit(train, donate_argnums=0).lower(state).compile()

    def step():
        nonlocal state
        state = compiled(state)

    return Program(step, lambda: jax.block_until_ready(state))


def _torch_loop(case, make):
    import torch

    model, x, y = models.of_keras(keras, case.model)
    optimizer = make()
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)

    def step():
        model.zero_grad()
        loss_of(y, model(x, training=True)).backward()
        with torch.no_grad():
            optimizer.apply([variable.value.grad for variable in model.trainable_variables], model.trainable_variables)

    return Program(step, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
