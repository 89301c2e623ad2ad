"""Seeded damage to files: bits flipped, ends cut off."""

import collections
import random

__all__ = ["check", "damaged"]


def damaged(data, count, seed=0):
    """Yield `count` damaged copies of bytes, each with the kind of damage: "cut" or "flip"."""
    rng = random.Random(seed)
    for index in range(count):
        if index % 4 == 0:
            yield "cut", data[: rng.randrange(len(data))]
        else:
            copy = bytearray(data)
            copy[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            yield "flip", bytes(copy)


def check(data, count, load, is_as_before, is_as_saved):
    """Load damaged copies, and return how often each result came, by the kind of damage.

    `load(data)` loads, or raises. After an error everything must be as it was before.
    """
    outcomes = collections.Counter()
    for kind, copy in damaged(data, count):
        try:
            load(copy)
        except Exception:
            assert is_as_before(), kind
            outcomes[kind, "error"] += 1
        else:
            outcomes[kind, "unharmed" if is_as_saved() else "changed"] += 1
    return outcomes
