"""PyTorch: a sync with slow weights in the host's pinned memory. The library does not have this design.

Pieces of slow weights are copied to the GPU, make their step and are copied back, on several streams at the same time.
"""

import statistics

import torch

from on_device.shapes import GIB, MIB, count, summary, transformer
from on_device.torch_syncs import SIZE, bandwidth_of_a_copy, fraction, timed


def cases(device):
    """Return the cases, functions without arguments by name."""
    shapes = transformer(4096, GIB) if device != "cpu" else transformer(32, MIB // 8)
    return {f"pieces of {size} MiB": lambda size=size: offloaded(shapes, size * MIB, device) for size in (16, 64)}


def offloaded(shapes, size, device):
    """Return the time of a sync, and the bandwidth of copies between host and device."""
    fast = [torch.randn(shape, device=device).view(-1) for shape in shapes]
    on_gpu = device != "cpu"
    slow = [torch.empty(one.shape, pin_memory=on_gpu).copy_(one) for one in fast]
    elements = size // 4
    pieces = [pair for one, other in zip(slow, fast) for pair in zip(one.split(elements), other.split(elements))]
    expected = [torch.lerp(one.to(device), other, SIZE) for one, other in pieces[:4]]
    rooms = [torch.empty(elements, device=device) for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in rooms] if on_gpu else [None] * 3

    def step():
        current = torch.cuda.current_stream() if on_gpu else None
        for index, (one, other) in enumerate(pieces):
            room, stream = rooms[index % 3][: other.numel()], streams[index % 3]
            if on_gpu:
                stream.wait_stream(current)
            with torch.cuda.stream(stream):
                room.copy_(one, non_blocking=True)
                room.lerp_(other, SIZE)
                other.copy_(room)
                one.copy_(room, non_blocking=True)
        for stream in streams if on_gpu else ():
            current.wait_stream(stream)

    step()
    if on_gpu:
        torch.cuda.synchronize()
    is_equal = all(torch.equal(other, one) for (_, other), one in zip(pieces, expected))
    is_equal &= all(torch.equal(one.to(device), other) for one, other in pieces[:4])
    host, room = slow[0], torch.empty_like(fast[0])
    to_device = host.nbytes / statistics.median(timed(lambda: room.copy_(host, non_blocking=True), device)[0])
    to_host = host.nbytes / statistics.median(timed(lambda: host.copy_(room, non_blocking=True), device)[0])
    seconds = timed(step, device)[0]
    bandwidth = bandwidth_of_a_copy(4 * count(shapes), device)
    return {
        "bytes of the weights": 4 * count(shapes),
        "bytes a second to the device": to_device,
        "bytes a second to the host": to_host,
        "sync, seconds": summary(seconds),
        "sync, fraction of the copy on the device": fraction(shapes, torch.float32, seconds, bandwidth),
        "equal bits": is_equal,
    }
