"""A training that saves after each batch in one format, and resumes from there; test_damaged_files.py kills it.

python -m tests.test_tf_keras.killed_training DIRECTORY FORMAT
"""

import sys
from pathlib import Path

from tests.test_tf_keras import resuming


def main(directory, form):
    directory = Path(directory)
    model, begin = resuming.compiled(resuming.momentum()), 0
    done = sorted(int(path.stem) for path in directory.glob("*.done"))
    if done:
        begin = done[-1]
        path = directory / str(begin)
        if form == "h5":
            model = resuming.keras.models.load_model(f"{path}.h5")
        elif form == "weights":
            model.load_weights(f"{path}.weights")
        elif form == "saved_model":
            model.load_weights(f"{path}.saved_model/variables/variables")
        else:
            resuming.checkpoint_of(model).read(f"{path}.{form}")
    for batch in range(begin, resuming.BATCHES):
        resuming.fit(model, begin=batch, end=batch + 1)
        resuming.save(model, directory / str(batch + 1), form)
        # A file is complete when its mark exists.
        (directory / f"{batch + 1}.done").touch()
    resuming.write(directory / "last.npz", model)


if __name__ == "__main__":
    main(*sys.argv[1:])
