"""The training runs of test_saving.py, and the processes in which it stops and resumes them.

python -m tests.test_tf_keras.resuming killed DIRECTORY     trains and waits to be killed in mid-epoch
python -m tests.test_tf_keras.resuming resumed DIRECTORY    resumes all runs that were saved there
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras

BATCH = 8
BATCHES = 10
SYNC_PERIOD = 3
EPOCHS = 4
FORMATS = ["h5", "saved_model", "weights", "checkpoint_built", "checkpoint_unbuilt"]


def momentum():
    return Lookahead(keras.optimizers.legacy.SGD(0.05, momentum=0.9), SYNC_PERIOD)


def adam():
    return Lookahead(keras.optimizers.legacy.Adam(0.02, amsgrad=True), SYNC_PERIOD, slow_step_size=0.8)


def rmsprop():
    inner = keras.optimizers.legacy.RMSprop(0.02, momentum=0.5, centered=True, decay=0.1)
    return Lookahead(inner, SYNC_PERIOD, slow_step_size=0.3)


def nested():
    inner = keras.optimizers.legacy.SGD(keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.7), momentum=0.9)
    return Lookahead(Lookahead(inner, 2), SYNC_PERIOD)


OPTIMIZERS = {make.__name__: make for make in (momentum, adam, rmsprop, nested)}
# Every position in a cycle, and before the first step; for `nested` in the middle of both cycles.
STOPS = {"momentum": [0, 3, 4, 5], "adam": [4], "rmsprop": [5], "nested": [5]}
CASES = [(name, stop, form) for name, stops in STOPS.items() for stop in stops for form in FORMATS]


def data(rows=BATCH * BATCHES, columns=4, seed=0):
    """Return float32 `x` of shape (rows, columns) and `y` of shape (rows, 1), a noisy linear task."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    y = x @ rng.normal(size=(columns, 1)) + 0.1 * rng.normal(size=(rows, 1))
    return x.astype("float32"), y.astype("float32")


def mlp(seed=0, **kwargs):
    """Return a built two-layer network with the same weights for the same seed."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="tanh", **kwargs), keras.layers.Dense(1, **kwargs)]
    )


def compiled(optimizer, seed=0, **kwargs):
    model = mlp(seed)
    model.compile(optimizer, loss="mse", **kwargs)
    return model


def fit(model, begin=0, end=None, callbacks=(), epochs=1):
    """Train on the batches from `begin` to `end`."""
    x, y = data()
    rows = slice(BATCH * begin, None if end is None else BATCH * end)
    if len(x[rows]):
        model.fit(
            x[rows], y[rows], batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
        )
    return model


def values(variables):
    """Return copies of the variables' values as NumPy arrays."""
    return [np.array(variable) for variable in variables]


def slow_of(model, lookahead=None):
    """Return the slow weights of a model in the order of its trainable weights."""
    lookahead = lookahead or model.optimizer
    return values(lookahead.get_slot(variable, "slow") for variable in model.trainable_variables)


def state(model):
    """Return all weights, step counts and slots. Loaded state has another order in `optimizer.get_weights()`."""
    arrays, optimizer = model.get_weights(), model.optimizer
    while optimizer is not None:
        arrays.append(np.array(optimizer.iterations))
        for slot in sorted(optimizer.get_slot_names()):
            arrays += values(optimizer.get_slot(variable, slot) for variable in model.trainable_variables)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return arrays


def write(path, model):
    np.savez(path, **{str(index): array for index, array in enumerate(state(model))})


def read(path):
    """Return the state that `write` wrote."""
    with np.load(path) as file:
        return [file[str(index)] for index in range(len(file.files))]


def checkpoint_of(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def save(model, path, form):
    """Save a model in one of the formats."""
    if form == "h5":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file", UserWarning)
            model.save(f"{path}.h5")
    elif form == "saved_model":
        model.save(f"{path}.saved_model", save_format="tf")
    elif form == "weights":
        model.save_weights(f"{path}.weights")
    else:
        checkpoint_of(model).write(f"{path}.{form}")


def build(model):
    """Create all variables of a model's optimizer before its first step."""
    model.optimizer._create_all_weights(model.trainable_variables)


def resume(name, path, stop, form):
    """Return the model of a run, loaded and trained to the end."""
    if form == "h5":
        return fit(keras.models.load_model(f"{path}.h5"), begin=stop)
    model = compiled(OPTIMIZERS[name](), seed=3)
    if form.startswith("checkpoint"):
        if form == "checkpoint_built":
            build(model)
        status = checkpoint_of(model).read(f"{path}.{form}")
    elif form == "saved_model":
        # `load_model` restores no optimizer's slots from this format.
        status = model.load_weights(f"{path}.saved_model/variables/variables")
    else:
        status = model.load_weights(f"{path}.weights")
    fit(model, begin=stop)
    if stop:
        status.assert_existing_objects_matched() if form == "saved_model" else status.assert_consumed()
    else:
        status.expect_partial()
    return model


class Wait(keras.callbacks.Callback):
    """Waits, in the middle of the third epoch, to be killed."""

    def __init__(self, directory):
        super().__init__()
        self.directory, self.epoch = directory, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (2, 4):
            (self.directory / "reached").touch()
            time.sleep(120)
            sys.exit("not killed")


def backup(directory):
    return keras.callbacks.BackupAndRestore(str(directory / "backup"))


def killed(directory):
    fit(compiled(adam()), epochs=EPOCHS, callbacks=[backup(directory), Wait(directory)])


def resumed(directory):
    for name, stop, form in CASES:
        write(directory / f"{name}-{stop}-{form}.npz", resume(name, directory / f"{name}-{stop}", stop, form))

    for number, stop in enumerate(STOPS["momentum"][-2:]):
        model = compiled(momentum(), seed=3)
        manager = tf.train.CheckpointManager(checkpoint_of(model), str(directory / "manager"), max_to_keep=2)
        if number == 0:
            manager.checkpoint.restore(manager.checkpoints[0])
        else:
            manager.restore_or_initialize()
        write(directory / f"manager-{number}.npz", fit(model, begin=stop))

    model = compiled(adam(), seed=3)
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: (directory / "resumed_epochs").open("a").write(f"{epoch}\n")
    )
    write(directory / "backup.npz", fit(model, epochs=EPOCHS, callbacks=[backup(directory), look]))


if __name__ == "__main__":
    {"killed": killed, "resumed": resumed}[sys.argv[1]](Path(sys.argv[2]))
