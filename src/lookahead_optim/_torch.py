"""What PyTorch's front ends share: lists of weights, cut so that the CPU finds in its cache what it needs twice."""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Piece", "cut", "is_cut", "move"]

# Of the slow weights, and of as many fast ones: what one core's cache holds.
_BYTES_PER_THREAD = 2**18

# Fast weights, and their slow ones.
Piece: TypeAlias = tuple[list[Tensor], list[Tensor]]


def cut(fast: list[Tensor], slow: list[Tensor]) -> Iterator[Piece]:
    """Cut lists of fast and slow weights into pieces for `foreach` operations.

    On the CPU such an operation is a loop, and there are two in a sync. Small weights make one piece together and large
    ones several each, so that the second operation reads what the first one left in the cache.
    """
    if not all(one.is_cpu for one in fast):
        groups = Optimizer._group_tensors_by_device_and_dtype([fast, slow])  # type: ignore[list-item]
        yield from (tuple(tensors) for tensors, _ in groups.values())  # type: ignore[misc]
        return
    piece: Piece = [], []
    size, limit = 0, _limit()
    for weight in zip(fast, slow):
        for part, slow_part in zip(*map(_parts, weight)) if is_cut(*weight) else [weight]:
            piece[0].append(part)
            piece[1].append(slow_part)
            size += slow_part.nbytes
            if size >= limit:
                yield piece
                piece, size = ([], []), 0
    if size:
        yield piece


def is_cut(fast: Tensor, slow: Tensor) -> bool:
    """Return whether a weight is cut: it is larger than a piece, and is laid out as its elements are numbered."""
    return (
        slow.nbytes > _limit()
        and type(fast) in (Tensor, torch.nn.Parameter)
        and fast.is_cpu
        and fast.is_contiguous()
        and slow.is_contiguous()
    )


def move(slow: list[Tensor], fast: list[Tensor], slow_step_size: float) -> None:
    """Move slow weights towards the fast ones."""
    if slow_step_size == 1:
        # The difference of two large weights of opposite sign can overflow.
        torch._foreach_copy_(slow, fast)
    else:
        torch._foreach_lerp_(slow, fast, slow_step_size)


def _limit() -> int:
    """Return the bytes of a piece."""
    return _BYTES_PER_THREAD * torch.get_num_threads()


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(_limit() // tensor.element_size())
