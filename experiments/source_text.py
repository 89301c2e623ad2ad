"""The text that the character models learn: the source of Python's standard library, as integers."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def load():
    """Return training and validation text as integers, and the text's digest; every tenth file is for validation."""
    numbers = np.full(256, -1)
    numbers[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(len(CHARACTERS))
    parts = [[], []]
    for index, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\t", "    ")
        found = numbers[np.frombuffer(text.encode("ascii", "ignore"), np.uint8)]
        parts[index % 10 == 0].append(found[found >= 0])
    training, validation = map(np.concatenate, parts)
    digest = hashlib.sha256(training.tobytes() + validation.tobytes()).hexdigest()[:16]
    return training, validation, digest


def described(training, validation, digest):
    """Return what a file of results says about the text."""
    return {"training": len(training), "validation": len(validation), "sha256": digest}
