"""A training that saves after each epoch in three formats, and resumes from one of them; test_kills.py kills it.

python -m tests.test_keras.killed_training DIRECTORY FORMAT      FORMAT: none, keras, weights or backup
"""

import os
import shutil
import sys
from pathlib import Path

import keras

from tests.test_keras import resuming
from tests.test_keras.helpers import data

EPOCHS, BATCHES = 40, 3


def fit(model, first_epoch=0, callbacks=()):
    """Train up to the last epoch. An epoch has three updates. A sync comes after every fourth update."""
    x, y = data(resuming.BATCH * BATCHES)
    rest = {"epochs": EPOCHS, "initial_epoch": first_epoch, "shuffle": False, "verbose": 0}
    model.fit(x, y, batch_size=resuming.BATCH, callbacks=list(callbacks), **rest)
    return model


class Save(keras.callbacks.Callback):
    """Reports which epoch ended, and then saves.

    A process that waits for the report kills this process during a save.
    """

    def __init__(self, directory, source):
        super().__init__()
        self.directory, self.source = directory, source

    def on_train_begin(self, logs=None):
        count = int(self.model.optimizer.iterations)
        (self.directory / f"resumed-{self.source}.txt").write_text(str(count))
        # Without the epoch in the backup, see below.
        self.model._initial_epoch = count // BATCHES

    def on_epoch_end(self, epoch, logs=None):
        self.write("epoch.txt", lambda path: path.write_text(str(epoch + 1)))
        self.write("run.keras", self.model.save)
        self.write("run.weights.h5", self.model.save_weights)

    def write(self, name, save):
        partial = self.directory / f"partial-{name}"
        save(partial)
        os.replace(partial, self.directory / name)


def main(directory, source):
    directory = Path(directory)
    if source == "keras":
        import lookahead_optim.keras  # noqa: F401

        model = keras.saving.load_model(directory / "run.keras")
    else:
        model = resuming.make_model("outer")
    if source == "weights":
        model.optimizer.build(model.trainable_variables)
        model.load_weights(directory / "run.weights.h5")
    if source == "backup":
        # `BackupAndRestore` writes weights and epoch one after the other, both in place. If the process is killed
        # there, the epoch is empty or behind by one. The count in the weights is right.
        (directory / "backup" / "training_metadata.json").unlink(missing_ok=True)
    else:
        shutil.rmtree(directory / "backup", ignore_errors=True)
    backup = keras.callbacks.BackupAndRestore(directory / "backup", double_checkpoint=True, delete_checkpoint=False)
    first_epoch = int(model.optimizer.iterations) // BATCHES
    fit(model, first_epoch, [backup, Save(directory, source)])
    resuming.write(directory / "result.npz", model)


if __name__ == "__main__":
    main(*sys.argv[1:])
