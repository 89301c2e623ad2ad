"""The outer step of one large weight on a GPU, in one kernel: it reads and writes both weights once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["outer_step"]

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(slow_pointer, fast_pointer, elements, slow_step_size, IS_BELOW_HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    # A weight may have more elements than int32 can count.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < elements
    slow = tl.load(slow_pointer + offsets, mask=is_inside)
    start = slow.to(tl.float32)
    end = tl.load(fast_pointer + offsets, mask=is_inside).to(tl.float32)
    # The formulas of `torch.lerp`, so that the results are the same bit for bit.
    if IS_BELOW_HALF:  # noqa: SIM108
        moved = start + slow_step_size * (end - start)
    else:
        moved = end - (end - start) * (1 - slow_step_size)
    moved = moved.to(slow.dtype)
    tl.store(slow_pointer + offsets, moved, mask=is_inside)
    tl.store(fast_pointer + offsets, moved, mask=is_inside)


def outer_step(slow: Tensor, fast: Tensor, slow_step_size: float) -> None:
    """Move a slow weight, and restart its fast weight from it.

    Args:
        slow: The slow weight, float32, bfloat16 or float16, on a GPU.
        fast: The fast weight, of the same shape, dtype and device. Both weights have the same memory layout, without
            gaps.
        slow_step_size: The slow step size.
    """
    # PyTorch interpolates such weights in float32, and also compares the step size with 0.5 in float32.
    is_below_half = float(torch.tensor(slow_step_size, dtype=torch.float32)) < 0.5
    with torch.cuda.device_of(slow):
        blocks = triton.cdiv(slow.numel(), _BLOCK)
        _kernel[(blocks,)](slow, fast, slow.numel(), slow_step_size, is_below_half, BLOCK=_BLOCK, num_warps=8)
