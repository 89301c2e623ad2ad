"""What Lookahead adds to an optimizer step in PyTorch: wrapped over bare, for this library and for its peers.

All are measured in turn within one process, one whole cycle at a time. Peers that are not installed are left out. They
differ in cadence: timm's first sync only captures the slow weights, and torch_optimizer syncs at steps 1, k + 1, ....
"""

import importlib.metadata
import importlib.util
import os
import platform
import statistics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import in_turn, limit, ratios, summary

from lookahead_optim.torch import Lookahead

SHAPES = {"10 of 1024 x 1024": (10, 1024), "400 of 32 x 32": (400, 32)}
INNER = {  # name: (class, settings, arrays that a bare step reads and writes)
    "SGD": (torch.optim.SGD, {}, 3),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}, 7),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}, 7),
}


def timm_lookahead():
    # The module alone: the package needs torchvision, of which there is no build for every PyTorch.
    path = importlib.metadata.distribution("timm").locate_file("timm/optim/lookahead.py")
    spec = importlib.util.spec_from_file_location("timm_lookahead", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


def pytorch_optimizer_lookahead():
    import pytorch_optimizer

    return pytorch_optimizer.Lookahead


def torch_optimizer_lookahead():
    import torch_optimizer

    return torch_optimizer.Lookahead


def peers():
    """Return the installed peers: a function of optimizer and period for each, by name and version."""
    found = {}
    loaders = {
        "timm": timm_lookahead,
        "pytorch_optimizer": pytorch_optimizer_lookahead,
        "torch_optimizer": torch_optimizer_lookahead,
    }
    for name, load in loaders.items():
        try:
            version, peer = importlib.metadata.version(name), load()
        except ImportError:  # PackageNotFoundError is one.
            continue
        found[f"{name} {version}"] = lambda optimizer, period, peer=peer: peer(optimizer, k=period, alpha=0.5)
    return found


def make_step(shape, inner, device, wrap):
    """Return a function that makes a step of a wrapped optimizer, and one that waits for all of them."""
    count, side = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(side, side, device=device, generator=generator)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.randn(side, side, device=device, generator=generator)
    optimizer, settings, _ = INNER[inner]
    wrapped = wrap(optimizer(weights, lr=1e-3, **settings))
    return wrapped.step, torch.cuda.synchronize if device == "cuda" else lambda: None


def main(
    periods: Annotated[str, typer.Option(help="Sync periods, separated by commas.")] = "5,6",
    cycles: Annotated[int, typer.Option(min=4, help="Cycles to measure; the table shows medians over them.")] = 60,
) -> None:
    """Measure what Lookahead adds to an optimizer step in PyTorch, as a ratio to the bare inner optimizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    others = peers()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    table = Table(
        title=f"Optimizer step, float32 weights, PyTorch {torch.__version__}: a wrapped step over a bare one",
        caption=f"Medians of {cycles} cycles; in brackets the quartiles. {machine}, {torch.get_num_threads()} threads",
    )
    for column in ("weights", "inner", "period", "bare, ms", "limit", "lookahead-optim", *others):
        table.add_column(column, justify="left" if column in ("weights", "inner") else "right")
    cases = [(shape, inner, int(period)) for shape in SHAPES for inner in INNER for period in periods.split(",")]
    for shape, inner, period in track(cases, description="Measuring", console=Console(stderr=True)):
        wraps = [
            lambda optimizer: optimizer,
            lambda optimizer, period=period: Lookahead(optimizer, period),
            *(lambda optimizer, period=period, peer=peer: peer(optimizer, period) for peer in others.values()),
        ]
        bare, *wrapped = in_turn([make_step(shape, inner, device, wrap) for wrap in wraps], period, cycles)
        table.add_row(
            shape,
            inner,
            str(period),
            f"{statistics.median(bare) / period * 1e3:.2f}",
            f"{limit(INNER[inner][2], period):.2f}",
            *(summary(ratios(times, bare)) for times in wrapped),
        )
    Console(width=None if Console().is_terminal else 180).print(table)


if __name__ == "__main__":
    typer.run(main)
