"""A sync in Triton, as a design to compare with: each weight is read once and written once."""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(slow_pointer, fast_pointer, elements, size, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < elements
    slow = tl.load(slow_pointer + offsets, mask=is_inside)
    fast = tl.load(fast_pointer + offsets, mask=is_inside).to(tl.float32)
    start = slow.to(tl.float32)
    # The interpolation of PyTorch for step sizes below one half.
    moved = (start + size * (fast - start)).to(slow.dtype)
    tl.store(slow_pointer + offsets, moved, mask=is_inside)
    tl.store(fast_pointer + offsets, moved, mask=is_inside)


def sync(slow, fast, size, block=4096):
    """Make the sync of one weight."""
    with torch.cuda.device_of(slow):
        _kernel[(triton.cdiv(slow.numel(), block),)](slow, fast, slow.numel(), size, BLOCK=block, num_warps=8)
