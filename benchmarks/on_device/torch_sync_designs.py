"""PyTorch: the bandwidth of designs of a sync, divided by the bandwidth of a copy of the same size."""

import time

import torch

from on_device.shapes import GIB, MIB, count, summary, transformer
from on_device.torch_syncs import SIZE, bandwidth_of_a_copy, fraction, timed


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {"1 GiB, large": (4096, GIB)} if device != "cpu" else {"large": (32, MIB // 8)}
    return {
        f"{name}, {dtype}".replace("torch.", ""): lambda name=name, dtype=dtype: designs(
            transformer(*sizes[name], dtype.itemsize), dtype, device
        )
        for name in sizes
        for dtype in (torch.float32, torch.bfloat16)
    }


def designs(shapes, dtype, device):
    """Return the fraction of a copy's bandwidth for each design, and whether its results are right bit for bit."""
    generator = torch.Generator(device).manual_seed(0)

    def weights():
        return [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes]

    bandwidth = bandwidth_of_a_copy(count(shapes) * dtype.itemsize, device)
    slow, fast = weights(), weights()
    few = slice(0, 12)
    found = {}
    for name, make in DESIGNS.items():
        try:
            start = time.perf_counter()
            # First check the results, on copies of some weights.
            one, other = [x.clone() for x in slow[few]], [x.clone() for x in fast[few]]
            expected = [torch.lerp(x, y, SIZE) for x, y in zip(one, other)]
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
        # Draw the fast weights again. After some designs they equal the slow weights, which could help caches.
        for weight in fast:
            weight.normal_()
    return found


def foreach(slow, fast):
    def step():
        torch._foreach_lerp_(slow, fast, SIZE)
        torch._foreach_copy_(fast, slow)

    return step


def cut(slow, fast, size):
    """Return pairs of lists of views of contiguous weights, of at most `size` bytes in each list."""
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


def kernel(block, warps):
    """Return a design that runs the library's kernel with this block size and this number of warps."""

    def make(slow, fast):
        from lookahead_optim import _outer_step_triton as module

        def step():
            for one, other in zip(slow, fast):
                blocks = module.triton.cdiv(one.numel(), block)
                module._kernel[(blocks,)](one, other, one.numel(), SIZE, True, BLOCK=block, num_warps=warps)

        return step

    return make


def in_place_of_the_fast(slow, fast):
    """Interpolate into the fast weights, then copy them into the slow weights. This rounds differently."""

    def step():
        torch._foreach_lerp_(fast, slow, 1 - SIZE)
        torch._foreach_copy_(slow, fast)

    return step


BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8))
DESIGNS = {
    "foreach, whole": foreach,
    **{f"foreach, pieces of {size} MiB": foreach_in_pieces(size * MIB) for size in (8, 16, 32)},
    **{f"one by one, pieces of {size} MiB": one_by_one_in_pieces(size * MIB) for size in (4, 8, 12, 16, 32, 1024)},
    "lerp into the fast weights, whole": in_place_of_the_fast,
    "compiled, whole list": compiled,
    "compiled, one by one": compiled_one_by_one,
    **{f"kernel, blocks of {block}, {warps} warps": kernel(block, warps) for block, warps in BLOCKS},
}
