"""PyTorch: the bandwidth of a sync alone, divided by the bandwidth of a copy of the same size.

A sync must read two arrays and write two. A copy reads one array and writes one.
"""

import statistics
import time

import torch

from lookahead_optim.torch import Lookahead
from on_device.shapes import GIB, MIB, count, summary, transformer

SIZE = 0.25
REPEATS = 20


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {"1 GiB, large": (4096, GIB), "1 GiB, small": (256, GIB), "8 GiB, large": (4096, 8 * GIB)}
    if device == "cpu":
        sizes = {"large": (32, MIB // 8), "small": (16, MIB // 16)}
    return {
        f"{name}, {dtype}".replace("torch.", ""): lambda name=name, dtype=dtype: sync(
            transformer(*sizes[name], dtype.itemsize), dtype, device
        )
        for name in sizes
        for dtype in (torch.float32, torch.bfloat16)
    }


def timed(function, device):
    """Return the seconds that the device needs to run a function, and the seconds that the host needs to launch it."""
    on_device, on_host = [], []
    for _ in range(REPEATS + 3):
        if device == "cpu":
            start = time.perf_counter()
            function()
            on_device.append(time.perf_counter() - start)
            on_host.append(on_device[-1])
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # Keep the device busy until the host has launched everything.
        torch.cuda._sleep(40_000_000)
        begin = time.perf_counter()
        start.record()
        function()
        end.record()
        on_host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        on_device.append(start.elapsed_time(end) / 1000)
    return on_device[3:], on_host[3:]


def bandwidth_of_a_copy(size, device):
    """Return the bandwidth of a copy of `size` bytes: bytes read and written per second."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), device)[0])


def fraction(shapes, dtype, seconds, bandwidth):
    """Return the bandwidth of a sync, which must move four arrays, divided by the bandwidth of a copy."""
    must_move = 4 * count(shapes) * dtype.itemsize
    return summary([must_move / one / bandwidth for one in seconds])


def sync(shapes, dtype, device):
    """Return times of the library's own sync, and its bandwidth divided by a copy's."""
    bandwidth = bandwidth_of_a_copy(count(shapes) * dtype.itemsize, device)
    weights = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    optimizer = Lookahead(torch.optim.SGD(weights, 1e-3), 1000, SIZE)
    weights[0].grad = torch.randn_like(weights[0])
    optimizer.step()
    weights[0].grad = None
    on_device, on_host = timed(optimizer.sync, device)
    return {
        "weights": len(shapes),
        "copy, bytes a second": bandwidth,
        "sync, seconds on the device": summary(on_device),
        "sync, seconds on the host": summary(on_host),
        "sync, fraction of the copy": fraction(shapes, dtype, on_device, bandwidth),
    }
