"""Trainings whose callbacks keep models, and the processes that score, kill and resume them; see test_kept.py.

python -m tests.test_tf_keras.kept scores DIRECTORY            scores every file that was kept there
python -m tests.test_tf_keras.kept killed DIRECTORY ORDER      trains and dies in mid-epoch
python -m tests.test_tf_keras.kept resumed DIRECTORY           resumes every training that died there
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from lookahead_optim.tf_keras import Lookahead, SwapSlowWeights
from lookahead_optim.tf_keras._keras import keras
from tests.test_tf_keras import resuming
from tests.test_tf_keras.resuming import data, mlp, slow_of, values

legacy = keras.optimizers.legacy
# Every epoch ends in mid-cycle, where fast and slow weights differ.
BATCHES, SYNC_PERIOD, EPOCHS, KILLED_IN = 7, 5, 4, 2
# From another task than the training: the loss on this data rises in every epoch.
VALIDATION = data(40, seed=1)


def adam():
    return Lookahead(legacy.Adam(0.02), SYNC_PERIOD)


def loss_scaled():
    return keras.mixed_precision.LossScaleOptimizer(adam(), initial_scale=64.0)


def nested():
    return Lookahead(Lookahead(legacy.SGD(0.05, momentum=0.9), 3), SYNC_PERIOD)


def make_model(optimizer=adam, seed=0):
    model = mlp(seed)
    model.compile(optimizer(), loss="mse")
    return model


def lookahead_of(model):
    optimizer = model.optimizer
    return optimizer if isinstance(optimizer, Lookahead) else optimizer.inner_optimizer


def callbacks(order, directory, mode="min"):
    """Return callbacks by their names.

    "min" stops after the second epoch, as the first is the best; "max" never stops.
    """
    best = {"monitor": "val_loss", "mode": mode, "save_best_only": True}
    made = {
        "model": lambda: keras.callbacks.ModelCheckpoint(str(directory / "best.h5"), **best),
        "weights": lambda: keras.callbacks.ModelCheckpoint(str(directory / "best"), save_weights_only=True, **best),
        "stopping": lambda: keras.callbacks.EarlyStopping("val_loss", mode=mode, restore_best_weights=True, patience=1),
        "backup": lambda: keras.callbacks.BackupAndRestore(str(directory / "backup")),
        "swap": SwapSlowWeights,
    }
    return [made[name]() for name in order]


def fit(model, callbacks=(), epochs=EPOCHS, **kwargs):
    """Train with validation and return the validation losses."""
    x, y = data(8 * BATCHES)
    kwargs = {"validation_data": VALIDATION, "shuffle": False, "verbose": 0, **kwargs}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file", UserWarning)
        history = model.fit(x, y, batch_size=8, epochs=epochs, callbacks=list(callbacks), **kwargs)
    return history.history.get("val_loss")


def score(model):
    return model.evaluate(*VALIDATION, batch_size=8, verbose=0)


class LastBatch(keras.callbacks.Callback):
    """Keeps the state, the fast and the slow weights after the last batch of every epoch."""

    def __init__(self):
        super().__init__()
        self.states, self.fast, self.slow = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        if batch == BATCHES - 1:
            self.states.append(resuming.state(self.model))
            self.fast.append(values(self.model.trainable_variables))
            self.slow.append(slow_of(self.model, lookahead_of(self.model)))


class Die(keras.callbacks.Callback):
    """Ends the process in the middle of an epoch, without cleaning up."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (KILLED_IN, 2):
            os._exit(9)


def scores(directory):
    # For a program that has only the weights, and another optimizer. Keras refuses an optimizer of its newer kind.
    model = mlp(seed=3)
    model.compile(legacy.SGD(), loss="mse")
    found = {}
    for path in sorted(directory.rglob("best.*")):
        if path.suffix == ".h5":
            found[str(path.relative_to(directory))] = score(keras.models.load_model(path))
        elif path.suffix == ".index":
            model.load_weights(path.with_suffix("")).expect_partial()
            found[str(path.relative_to(directory))] = score(model)
    (directory / "scores.json").write_text(json.dumps(found))


def killed(directory, order):
    fit(make_model(), [*callbacks(order.split("-"), directory / order, "max"), Die()])
    sys.exit("not killed")


def resumed(directory):
    for path in sorted(directory.iterdir()):
        model, last = make_model(seed=3), LastBatch()
        losses = fit(model, [*callbacks(path.name.split("-"), path, "max"), last])
        np.savez(path / "last.npz", **{str(index): value for index, value in enumerate(last.states[-1])})
        resuming.write(path / "end.npz", model)
        (path / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    {"scores": scores, "killed": killed, "resumed": resumed}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
