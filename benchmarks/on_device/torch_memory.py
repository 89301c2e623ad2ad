"""PyTorch: memory with Lookahead and bare, in copies of the weights."""

import torch

from on_device.shapes import GIB, count, transformer
from on_device.torch_optimizers import INNER, PERIOD, WRAPPERS


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {"large": (4096, GIB), "small": (256, GIB // 4)}
    if device == "cpu":
        sizes = {"large": (32, 1), "small": (16, 1)}
    return {
        f"{inner}, {size}, {dtype}".replace("torch.", ""): lambda inner=inner, size=size, dtype=dtype: memory(
            INNER[inner], transformer(*sizes[size], dtype.itemsize), dtype, device
        )
        for inner in INNER
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16)
    }


def memory(make, shapes, dtype, device):
    """Return memory in copies of the weights: held, the peak of a cycle, and what a sync and a block add."""
    copy = count(shapes) * dtype.itemsize
    found = {"weights": len(shapes), "bytes of the weights": copy}
    if device == "cpu":
        allocated = peak = lambda: 0
        reset = lambda: None  # noqa: E731
    else:
        allocated, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
        reset = torch.cuda.reset_peak_memory_stats
    for name, wrap in WRAPPERS.items():
        start = allocated()
        weights = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = wrap(make(weights))
        reset()
        optimizer.step()
        found[f"{name}: peak of the first step"] = (peak() - start) / copy
        for _ in range(PERIOD):
            optimizer.step()
        reset()
        for _ in range(2 * PERIOD):
            optimizer.step()
        held = allocated()
        found[f"{name}: held"] = (held - start) / copy
        found[f"{name}: peak of a cycle"] = (peak() - start) / copy
        if name != "bare":
            optimizer.step()
            reset()
            optimizer.sync()
            found["a sync adds"] = (peak() - held) / copy
            reset()
            with optimizer.slow_weights():
                found["a block holds"] = (allocated() - held) / copy
            found["a block adds at its peak"] = (peak() - held) / copy
        del weights, weight, optimizer
    return found
