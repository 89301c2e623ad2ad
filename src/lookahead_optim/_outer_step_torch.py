"""What PyTorch's front ends share: lists of weights, cut so that the CPU finds in its cache what it needs twice."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Piece", "cut", "is_cut", "is_large", "move", "move_unwatched"]

# Of the slow weights, and of as many fast ones: what one core's cache holds.
_BYTES_PER_THREAD = 2**18

_DTYPES_WITH_A_NORM = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128

_ONE = torch.ones((), device="cpu")

# Slow weights, and their fast ones. All are on the CPU, or all on one other device.
Piece: TypeAlias = tuple[list[Tensor], list[Tensor]]


def cut(slow: list[Tensor], fast: list[Tensor]) -> Iterator[Piece]:
    """Cut lists of slow and fast weights into pieces for `foreach` operations.

    On the CPU such an operation is a loop, and there are two in a sync. Small weights make one piece together and large
    ones several each, so that the second operation reads what the first one left in the cache.
    """
    if not all(one.is_cpu for one in fast):
        groups = Optimizer._group_tensors_by_device_and_dtype([slow, fast])  # type: ignore[list-item]
        yield from (tuple(tensors) for tensors, _ in groups.values())  # type: ignore[misc]
        return
    piece: Piece = [], []
    size, limit = 0, _limit()
    for weight in zip(slow, fast):
        for slow_part, part in zip(*map(_parts, weight)) if is_cut(*weight) else [weight]:
            piece[0].append(slow_part)
            piece[1].append(part)
            size += slow_part.nbytes
            if size >= limit:
                yield piece
                piece, size = ([], []), 0
    if size:
        yield piece


def is_cut(slow: Tensor, fast: Tensor) -> bool:
    """Return whether a weight is cut: it is larger than a piece, and is laid out as its elements are numbered."""
    return (
        slow.nbytes > _limit()
        and type(fast) in (Tensor, torch.nn.Parameter)
        and fast.is_cpu
        and fast.is_contiguous()
        and slow.is_contiguous()
    )


def move(slow: list[Tensor], fast: list[Tensor], slow_step_size: float, is_careful: bool) -> bool:
    """Move slow weights towards the fast ones; return whether the next move must be careful.

    The difference of two large weights of opposite sign overflows, and the difference of equal infinities is no
    number. A careful move replaces what such a difference makes. It takes several times as long, so it is made only for
    weights that `is_large` has found, and from the first move on that left weights which are not finite. Before that
    all slow weights were finite, so that what went wrong is where a fast weight is infinite. Other devices than the CPU
    would have to be waited for, so there infinities are found at the capture only.
    """
    if slow_step_size == 1:
        torch._foreach_copy_(slow, fast)
    elif slow_step_size == 0:
        return False
    elif is_careful or _is_beyond(slow_step_size, slow):
        for slow_one, fast_one in zip(slow, fast):
            _move_carefully(slow_one, fast_one, slow_step_size)
    else:
        torch._foreach_lerp_(slow, fast, slow_step_size)
    if is_careful or not slow[0].is_cpu or _are_finite(slow):
        return False
    for slow_one, fast_one in zip(slow, fast):
        slow_one.copy_(torch.where(fast_one.isinf(), fast_one, slow_one))
    return True


def move_unwatched(slow: list[Tensor], fast: list[Tensor], slow_step_size: float) -> None:
    """Move slow weights towards the fast ones, where nobody has noted whether they need care: ask them each time."""
    move(slow, fast, slow_step_size, is_careful=slow[0].is_cpu and is_large(slow))


def _move_carefully(slow: Tensor, fast: Tensor, slow_step_size: float) -> None:
    wide_slow, wide_fast = (one.to(torch.promote_types(one.dtype, torch.float64)) for one in (slow, fast))
    mixed = torch.where(
        wide_slow == wide_fast, wide_slow, (1 - slow_step_size) * wide_slow + slow_step_size * wide_fast
    ).to(slow.dtype)
    if not _is_beyond(slow_step_size, [slow]):
        moved = torch.lerp(slow, fast, slow_step_size)
        mixed = torch.where(moved.isfinite(), moved, mixed)
    slow.copy_(mixed)


def _is_beyond(slow_step_size: float, weights: list[Tensor]) -> bool:
    """Return whether a step size is no number of the dtype of any weight: PyTorch's operations refuse it then."""
    # 1e4 is one in every dtype.
    return slow_step_size > 1e4 and any(slow_step_size > torch.finfo(one.dtype).max for one in weights)


def is_large(weights: Iterable[Tensor]) -> bool:
    """Return whether a difference of any of these weights could overflow, or not be a number."""
    return any(
        not float(torch.linalg.vector_norm(weight.detach(), torch.inf)) <= torch.finfo(weight.dtype).max / 4
        for weight in weights
        if weight.numel() and not weight.is_meta and weight.dtype in _DTYPES_WITH_A_NORM
    )


def _are_finite(weights: list[Tensor]) -> bool:
    """Return whether all elements are finite.

    The operation is the one of `torch.amp.GradScaler`. No public operation of PyTorch answers for a whole list, and one
    question for each small weight takes longer than the whole slow step.
    """
    found = torch.zeros((), device="cpu")
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(weights, found, _ONE)
    except (NotImplementedError, RuntimeError):
        # Complex weights, and some kinds of tensors.
        return all(bool(one.isfinite().all()) for one in weights)
    return not found


def _limit() -> int:
    """Return the bytes of a piece."""
    return _BYTES_PER_THREAD * torch.get_num_threads()


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(_limit() // tensor.element_size())
