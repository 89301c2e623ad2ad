"""PyTorch: optimizer step time divided by the bare step's, for this library and its peers."""

import importlib.metadata
import random

import torch

from cases import Case
from on_device.shapes import GIB, MIB, summary, transformer
from programs import of_torch
from timing import Program, in_turn, ratios

INNER = {
    "SGD, foreach": ("PyTorch, foreach", "SGD"),
    "AdamW, foreach": ("PyTorch, foreach", "Adam"),
    "AdamW, fused": ("PyTorch, fused", "Adam"),
}


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {
        "1 GiB, large": transformer(4096, GIB),
        "GPT-2 small": [(50257, 768), (1024, 768), *transformer(768, 12 * 12 * 768 * 768 * 4)],
        "400 x 32²": [(32, 32)] * 400,
    }
    if device == "cpu":
        sizes = {"small": transformer(16, MIB // 16)}
    return {
        f"{size}, {inner}, period {period}": lambda size=size, inner=inner, period=period: ratios_of(
            sizes[size], inner, period, device
        )
        for period in (6, 5, 30)
        for size in sizes
        for inner in INNER
    }


def ratios_of(shapes, inner, period, device):
    """Return step times divided by the bare step's in the same turn."""
    mode, optimizer = INNER[inner]
    case = Case("step", mode, optimizer, period=period)
    programs, optimizers = {}, of_torch.optimizers(case)
    optimizers.pop("torch_optimizer", None)
    generator = torch.Generator(device).manual_seed(0)
    for name, make in optimizers.items():
        weights = [torch.nn.Parameter(torch.randn(one, device=device, generator=generator)) for one in shapes]
        for weight in weights:
            weight.grad = torch.randn(weight.shape, device=device, generator=generator)
        programs[name] = Program(make(weights).step, of_torch.wait)
    times = in_turn(programs, period, 3 if device == "cpu" else max(5, 120 // period), random.Random(0))
    return {
        "bare, seconds": summary(times["bare"]),
        **{name: summary(ratios(times[name], times["bare"])) for name in programs if name != "bare"},
        "versions": {name: importlib.metadata.version(name) for name in programs if name in of_torch.PEERS},
    }
