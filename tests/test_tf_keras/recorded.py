"""The recordings of TensorFlow Addons, and functions that run them again with this package's optimizers.

`record_original.py` made the recordings, and describes their format.
"""

import copy
import json
from pathlib import Path

import numpy as np
import tensorflow as tf

import lookahead_optim.tf_keras
from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras

RECORDINGS = Path(__file__).parent / "recordings"
OPTIMIZERS = RECORDINGS / "optimizers"
INPUTS = np.load(RECORDINGS / "trajectories.npz")
MODEL_DATA = np.load(RECORDINGS / "model_data.npz")


def make_optimizer(entry):
    name = entry["inner"]["class_name"]
    inner_class = getattr(lookahead_optim.tf_keras, name, None) or getattr(keras.optimizers.legacy, name)
    inner = inner_class.from_config(copy.deepcopy(entry["inner"]["config"]))
    return inner if entry["wrapper"] is None else Lookahead(inner, **entry["wrapper"])


def flat(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def deviation(actual, expected):
    """Return the largest deviation, in units in the last place of the expected dtype.

    A number below 0.001 (0.1 in float16) has the unit of 0.001 (0.1).
    """
    expected = np.asarray(expected)
    floor = 0.1 if expected.dtype == "float16" else 1e-3
    spacing = np.spacing(np.maximum(np.abs(expected), expected.dtype.type(floor)))
    return np.max(np.abs(np.asarray(actual, "float64") - np.asarray(expected, "float64")) / spacing)


def assert_within(actual, expected, units):
    assert deviation(actual, expected) <= units


def check_trajectory(entry, trajectories, units, graph=False):
    """Make the steps of an entry of `trajectories`, and compare every weight and all state with the recording.

    Returns the largest deviation of a weight.
    """
    name, optimizer, inputs = entry["name"], make_optimizer(entry), f"inputs/{entry['inputs']}"
    count = sum(key.startswith(f"{inputs}/weight/") for key in INPUTS)
    variables = [tf.Variable(INPUTS[f"{inputs}/weight/{index}"], name=f"weight_{index}") for index in range(count)]

    def apply(gradients):
        optimizer.apply_gradients(zip(gradients, variables))

    step = tf.function(apply) if graph else apply
    kinds = ["fast"] if entry["wrapper"] is None else ["fast", "slow"]
    recorded, states = {kind: trajectories[f"{name}/{kind}"] for kind in kinds}, trajectories[f"{name}/state"]
    largest = 0.0
    for number in range(len(recorded["fast"])):
        gradients = []
        for index, variable in enumerate(variables):
            key = f"{inputs}/gradient/{index}"
            if index in entry["sparse"]:
                values, indices = (tf.constant(INPUTS[f"{key}/{part}"][number]) for part in ("values", "indices"))
                gradients.append(tf.IndexedSlices(values, indices, tf.constant(variable.shape.as_list())))
            else:
                gradients.append(tf.constant(INPUTS[key][number]))
        step(gradients)
        for kind in kinds:
            now = variables if kind == "fast" else [optimizer.get_slot(variable, "slow") for variable in variables]
            largest = max(largest, deviation(flat([one.numpy() for one in now]), recorded[kind][number]))
            assert largest <= units, (number, kind)
        if number + 1 in entry["state_steps"]:
            state = optimizer.get_weights()
            assert [list(one.shape) for one in state] == [shape for _, shape, _ in entry["state"]]
            assert [str(one.dtype) for one in state] == [dtype for _, _, dtype in entry["state"]]
            assert_within(flat(state), states[entry["state_steps"].index(number + 1)], 4 * units)
    return largest


def small_model(entry, optimizer=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="prediction"),
        ],
        name="small",
    )
    model.compile(optimizer or make_optimizer(entry), "mse")
    return model


def from_h5(entry, path):
    return keras.models.load_model(path)


def from_weights(entry, path):
    model = small_model(entry)
    model.load_weights(path).expect_partial()
    return model


def from_checkpoint(entry, path):
    model = small_model(entry)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(path)).expect_partial()
    return model


def from_config_and_checkpoint(entry, path):
    config = json.loads((path.parent / "optimizer.json").read_text())
    model = small_model(entry, keras.optimizers.deserialize(config))
    assert type(model.optimizer) is type(make_optimizer(entry))
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(path)).expect_partial()
    return model


# The kinds of files from which the original continues with the optimizer's state.
WAYS = [
    ("h5", from_h5),
    ("checkpoint", from_checkpoint),
    ("checkpoint", from_config_and_checkpoint),
    ("weights", from_weights),
    ("saved_model_weights", from_weights),
]


def check_training_goes_on(folder, entry, kind, load):
    """Load a file of the original, and compare the further steps with the original's."""
    continuation = np.load(folder / "continuation.npz")
    model = load(entry, folder / entry["files"][kind])
    wrapped = entry["wrapper"] is not None
    for number, (x, y) in enumerate(zip(MODEL_DATA["x"], MODEL_DATA["y"])):
        if number < entry["stopped_after"]:
            continue
        model.train_on_batch(x, y)
        index = number - entry["stopped_after"]
        if index == 0:
            assert int(model.optimizer.iterations) == entry["stopped_after"] + 1
        # A matrix product of another version of TensorFlow may round differently.
        assert_within(flat(model.get_weights()), continuation["fast"][index], 64)
        if wrapped:
            slow = flat([model.optimizer.get_slot(variable, "slow").numpy() for variable in model.trainable_variables])
            assert_within(slow, continuation["slow"][index], 64)


def check_training_starts_anew(folder, entry):
    """Load the files without an optimizer's state, and compare the further steps with the original's."""
    expected = np.load(folder / "continuation_without_state.npz")
    with_weights = small_model(entry)
    with_weights.load_weights(folder / entry["files"]["weights_h5"])
    for model in (with_weights, keras.models.load_model(folder / entry["files"]["saved_model"])):
        batches = (MODEL_DATA[name][entry["stopped_after"] :] for name in "xy")
        for x, y, fast in zip(*batches, expected["fast"], strict=True):
            model.train_on_batch(x, y)
            assert_within(flat(model.get_weights()), fast, 64)
