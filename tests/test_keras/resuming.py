"""The training runs of test_saving.py, and the processes in which it stops and resumes them.

python -m tests.test_keras.resuming killed DIRECTORY         trains and waits to be killed in mid-epoch
python -m tests.test_keras.resuming resumed DIRECTORY        resumes all runs that were saved there
python -m tests.test_keras.resuming moved FILE RESULT ...    resumes files that another backend may have written
"""

import sys
import time
from pathlib import Path

import keras
import numpy as np

BATCH = 8
BATCHES = 12
STOPPED_AT = 6
SAVED_LAST_AT = 18
KILLED_AT = 19


def optimizers():
    """Return functions that make the optimizers of the runs, all with a sync every fourth update, by name."""
    from lookahead_optim.keras import Lookahead

    def momentum():
        return Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), 4)

    def adam():
        return Lookahead(keras.optimizers.Adam(0.02), 4, slow_step_size=0.8)

    def outer():
        # Around a model in float16.
        settings = {"slow_momentum": 0.9, "slow_dtype": "float32"}
        return Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), 4, 0.7, **settings)

    def nested():
        return Lookahead(Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), 3), 4)

    def loss_scaled():
        inner = Lookahead(keras.optimizers.Adam(0.02), 4)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10, dynamic_growth_steps=3)

    def multi():
        biases = {".*bias": keras.optimizers.Adam(0.02)}
        both = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.05, momentum=0.9), biases)
        return Lookahead(keras.optimizers.MultiOptimizer(both), 4)

    def accumulated():
        learning_rate = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.7)
        inner = keras.optimizers.SGD(learning_rate, momentum=0.9, gradient_accumulation_steps=2)
        return Lookahead(inner, 2)

    made = [momentum, adam, outer, nested, loss_scaled, accumulated]
    if hasattr(keras.optimizers, "MultiOptimizer"):
        made.append(multi)
    return {make.__name__: make for make in made}


def make_model(name):
    """Return the compiled model of a run."""
    from tests.test_keras.helpers import mlp

    model = mlp(dtype={"loss_scaled": "mixed_float16", "outer": "float16"}.get(name, "float32"))
    model.compile(optimizers()[name](), loss="mse")
    return model


def fit(model, begin=0, end=None, callbacks=(), epochs=1):
    """Train on the batches from `begin` to `end`."""
    from tests.test_keras.helpers import data

    x, y = data(BATCH * BATCHES)
    rows = slice(BATCH * begin, None if end is None else BATCH * end)
    model.fit(x[rows], y[rows], batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def state(model):
    """Return the values of all weights and optimizer variables."""
    from tests.test_keras.helpers import values

    return values([*model.weights, *model.optimizer.variables])


def write(path, model):
    np.savez(path, **{str(index): value for index, value in enumerate(state(model))})


def read(path):
    """Return the state that `write` wrote."""
    with np.load(path) as file:
        return [file[str(index)] for index in range(len(file.files))]


class Wait(keras.callbacks.Callback):
    """Waits to be killed in batch number `KILLED_AT`, counted over all epochs."""

    def __init__(self, directory):
        super().__init__()
        self.directory, self.seen = directory, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == KILLED_AT:
            (self.directory / "reached").touch()
            time.sleep(120)
            sys.exit("not killed")


def killed(directory):
    directory = Path(directory)
    fit(
        make_model("loss_scaled"),
        epochs=3,
        callbacks=[
            keras.callbacks.BackupAndRestore(directory / "backup", save_freq=6),
            keras.callbacks.ModelCheckpoint(directory / "checkpoint.keras", save_freq=SAVED_LAST_AT),
            Wait(directory),
        ],
    )


def resumed(directory):
    directory = Path(directory)
    try:
        keras.saving.load_model(next(directory.glob("momentum-*.keras")))
    except TypeError as error:
        (directory / "not_imported.txt").write_text(str(error))
    import lookahead_optim.keras  # noqa: F401

    for path in sorted(directory.glob("*-*.keras")):
        model = keras.saving.load_model(path)
        write(path.with_suffix(".npz"), fit(model, begin=int(path.stem.split("-")[1])))

    model = make_model("adam")
    model.optimizer.build(model.trainable_variables)
    model.load_weights(directory / "adam.weights.h5")
    write(directory / "adam.weights.npz", fit(model, begin=STOPPED_AT))

    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        for when in ("built", "unbuilt"):
            model = make_model("adam")
            if when == "built":
                model.optimizer.build(model.trainable_variables)
            checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
            status = checkpoint.restore(str(directory / "tensorflow-1"))
            fit(model, begin=STOPPED_AT)
            status.assert_consumed()
            write(directory / f"tensorflow-{when}.npz", model)

    model = keras.saving.load_model(directory / "checkpoint.keras")
    write(directory / "checkpoint.npz", fit(fit(model, begin=SAVED_LAST_AT - BATCHES)))

    model = make_model("loss_scaled")
    backup = keras.callbacks.BackupAndRestore(directory / "backup", save_freq=6)
    look = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: write(directory / "restored.npz", model))
    write(directory / "backup.npz", fit(model, epochs=3, callbacks=[backup, look]))


def moved(*paths):
    import lookahead_optim.keras  # noqa: F401

    for path, result in zip(paths[::2], paths[1::2]):
        write(result, fit(keras.saving.load_model(path), begin=STOPPED_AT))


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("error", "Skipping", UserWarning)
    {"killed": killed, "resumed": resumed, "moved": moved}[sys.argv[1]](*sys.argv[2:])
