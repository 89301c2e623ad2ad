"""PyTorch: a sync alone, as a fraction of the bandwidth that a copy of the same size reaches; and other designs of it.

A sync must read and write two arrays each. A copy of as many bytes reads one and writes one.
"""

import statistics
import time

import torch

from lookahead_optim.torch import Lookahead
from on_device.shapes import GIB, MIB, count, summary, transformer

SIZE = 0.25
REPEATS = 20


def cases(device):
    """Return the cases."""
    sizes = {"1 GiB, large": (4096, GIB), "1 GiB, small": (256, GIB), "8 GiB, large": (4096, 8 * GIB)}
    if device == "cpu":
        sizes = {"large": (32, MIB // 8), "small": (16, MIB // 16)}
    made = {
        f"{name}, {dtype}".replace("torch.", ""): lambda name=name, dtype=dtype: sync(
            transformer(*sizes[name], dtype.itemsize), dtype, device
        )
        for name in sizes
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name in list(sizes)[:2]:
        for dtype in (torch.float32, torch.bfloat16):
            made[f"designs: {name}, {dtype}".replace("torch.", "")] = lambda name=name, dtype=dtype: designs(
                transformer(*sizes[name], dtype.itemsize), dtype, device
            )
    return made


def timed(function, device):
    """Return the seconds that the device needs for a function, and the host to give it to the device."""
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
        # The device is kept busy until the host has given it everything.
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
    """Return the bytes a second that a copy of `size` bytes reads and writes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), device)[0])


def fraction(shapes, dtype, seconds, bandwidth):
    """Return times of a sync as fractions of a copy's bandwidth, counted by the four arrays that must move."""
    must_move = 4 * count(shapes) * dtype.itemsize
    return summary([must_move / one / bandwidth for one in seconds])


def sync(shapes, dtype, device):
    """Return what the library's own sync reaches."""
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


def designs(shapes, dtype, device):
    """Return what other ways to write a sync reach, and whether their results are the same bit for bit."""
    generator = torch.Generator(device).manual_seed(0)

    def weights():
        return [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes]

    bandwidth = bandwidth_of_a_copy(count(shapes) * dtype.itemsize, device)
    slow, fast = weights(), weights()
    few = slice(0, 12)
    expected = [torch.lerp(one, other, SIZE) for one, other in zip(slow[few], fast[few])]
    found = {}
    for name, make in DESIGNS.items():
        if len(shapes) > 100 and name in FOR_FEW:
            continue
        try:
            start = time.perf_counter()
            # First on copies of some weights, to see whether the results are right.
            one, other = [x.clone() for x in slow[few]], [x.clone() for x in fast[few]]
            make(one, other)()
            is_equal = all(torch.equal(x, y) for x, y in zip(one, expected))
            is_equal &= all(torch.equal(x, y) for x, y in zip(other, expected))
            function = make(slow, fast)
            function()
            first = time.perf_counter() - start
            on_device, on_host = timed(function, device)
            found[name] = {
                "fraction of the copy": fraction(shapes, dtype, on_device, bandwidth),
                "seconds on the host": summary(on_host),
                "seconds of the first call": first,
                "equal bits": is_equal,
            }
        except Exception as error:
            found[name] = {"does not run": f"{type(error).__name__}: {str(error)[:300]}"}
        # As before: some designs bring fast and slow weights together, where caches and compression could help.
        for weight in fast:
            weight.normal_()
    return found


def foreach(slow, fast):
    def step():
        torch._foreach_lerp_(slow, fast, SIZE)
        torch._foreach_copy_(fast, slow)

    return step


def cut(slow, fast, size):
    """Return lists of views of contiguous weights, each list of at most `size` bytes if weights can be cut."""
    pieces, room = [], 0
    for one, other in zip(slow, fast):
        elements = max(1, size // one.element_size())
        for part, other_part in zip(one.view(-1).split(elements), other.view(-1).split(elements)):
            if not pieces or room < part.nbytes:
                pieces.append(([], []))
                room = size
            pieces[-1][0].append(part)
            pieces[-1][1].append(other_part)
            room -= part.nbytes
    return pieces


def foreach_in_pieces(size):
    def make(slow, fast):
        pieces = cut(slow, fast, size)

        def step():
            for one, other in pieces:
                torch._foreach_lerp_(one, other, SIZE)
                torch._foreach_copy_(other, one)

        return step

    return make


def one_by_one_in_pieces(size):
    def make(slow, fast):
        pairs = [pair for piece in cut(slow, fast, size) for pair in zip(*piece)]

        def step():
            for one, other in pairs:
                one.lerp_(other, SIZE)
                other.copy_(one)

        return step

    return make


def compiled(slow, fast):
    def pair(slow, fast):
        torch._foreach_lerp_(slow, fast, SIZE)
        torch._foreach_copy_(fast, slow)

    function = torch.compile(pair)
    return lambda: function(slow, fast)


def compiled_one_by_one(slow, fast):
    def pair(slow, fast):
        new = torch.lerp(slow, fast, SIZE)
        slow.copy_(new)
        fast.copy_(new)

    function = torch.compile(pair, dynamic=True)

    def step():
        for one, other in zip(slow, fast):
            function(one.view(-1), other.view(-1))

    return step


def triton_kernel(slow, fast):
    """Return a sync by a kernel that reads and writes each weight once."""
    from on_device.triton_sync import sync

    def step():
        for one, other in zip(slow, fast):
            sync(one, other, SIZE)

    return step


def in_place_of_the_fast(slow, fast):
    """Interpolate from the other end, into the fast weights, then copy: not the same rounding."""

    def step():
        torch._foreach_lerp_(fast, slow, 1 - SIZE)
        torch._foreach_copy_(slow, fast)

    return step


DESIGNS = {
    "foreach, whole": foreach,
    **{f"foreach, pieces of {size} MiB": foreach_in_pieces(size * MIB) for size in (8, 16, 32)},
    **{f"one by one, pieces of {size} MiB": one_by_one_in_pieces(size * MIB) for size in (4, 8, 12, 16, 32, 1024)},
    "lerp into the fast weights, whole": in_place_of_the_fast,
    "compiled, whole list": compiled,
    "compiled, one by one": compiled_one_by_one,
    "Triton, one by one": triton_kernel,
}
FOR_FEW = ("compiled, whole list",)
