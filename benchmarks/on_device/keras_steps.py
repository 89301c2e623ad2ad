"""Keras on JAX or PyTorch: optimizer step time divided by the bare step's."""

import random

import keras

from cases import Case
from on_device.shapes import summary
from programs import of_keras
from timing import in_turn, ratios

PERIOD = 6
MODES = {"jax": "Keras, JAX", "torch": "Keras, PyTorch"}


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {"4 x 4096²": (4, 4096), "400 x 32²": (400, 32)} if device != "cpu" else {"4 x 32²": (4, 32)}
    return {
        f"{size}, {inner}": lambda size=size, inner=inner: steps(*sizes[size], inner, device)
        for size in sizes
        for inner in ("SGD", "Adam")
    }


def steps(weights, side, inner, device):
    """Return step times divided by the bare step's in the same turn."""
    case = Case("step", MODES[keras.config.backend()], inner, weights, side, period=PERIOD)
    programs = {name: of_keras.step_program(case, make) for name, make in of_keras.optimizers(case).items()}
    times = in_turn(programs, PERIOD, 3 if device == "cpu" else 20, random.Random(0))
    return {
        "bare, seconds": summary(times["bare"]),
        "lookahead-optim": summary(ratios(times["lookahead-optim"], times["bare"])),
    }
