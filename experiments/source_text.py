"""The text that the character models learn: the source of Python's standard library, as integers."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def load():
    """Return training and validation text as integers, and the text's digest; every tenth file is for validation."""
    numbers = {character: number for number, character in enumerate(CHARACTERS)}
    parts = [[], []]
    for index, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\t", "    ")
        parts[index % 10 == 0].extend(numbers[one] for one in text if one in numbers)
    training, validation = (np.array(part, dtype=np.int64) for part in parts)
    digest = hashlib.sha256(training.tobytes() + validation.tobytes()).hexdigest()[:16]
    return training, validation, digest


def described(training, validation, digest):
    """Return what a file of results says about the text."""
    return {"training": len(training), "validation": len(validation), "sha256": digest}
