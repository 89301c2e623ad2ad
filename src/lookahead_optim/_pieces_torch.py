"""Lists of PyTorch weights, cut into pieces that fit into a CPU's cache."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Piece", "cut", "is_large_on_gpu", "is_wide"]

# An outer step reads the slow weights twice, and more often with momentum. On the CPU a `foreach` operation is a loop
# over its weights. So all operations are made on as many weights as one core's cache holds, before the next weights.
_BYTES_PER_THREAD = 2**18
# The size from which a GPU needs longer for a weight than the host needs to launch a kernel.
_BYTES_OF_LARGE = 2**24
# Some operations take memory for all weights of a piece.
_BYTES_OF_PIECE = 2**27

_PLAIN = (Tensor, torch.nn.Parameter)


class Piece(NamedTuple):
    """Slow weights, their fast weights and their slow momentum, in the same order.

    All are on the CPU, or all are on one other device. Without slow momentum its list is empty. `fits_kernels` says
    whether a kernel that goes through memory can take all of them together.
    """

    slow: list[Tensor]
    fast: list[Tensor]
    momentum: list[Tensor]
    fits_kernels: bool = False


def cut(slow: list[Tensor], fast: list[Tensor], momentum: Sequence[Tensor] = ()) -> list[Piece]:
    """Cut lists of slow weights, fast weights and slow momentum into pieces for `outer_step`.

    On the CPU several small weights make one piece. A large weight without gaps in memory makes several pieces, which
    are views of it. On other devices a large weight makes one piece. All other weights of one device and dtype make
    pieces of 128 MiB, as a `foreach` operation takes them together.

    Args:
        slow: List of slow weights.
        fast: List of their fast weights, in the same order.
        momentum: Their slow momentum, or nothing. Defaults to nothing.
    """
    # Each row is a slow weight, its fast weight, and its momentum if there is any.
    rows = list(zip(slow, fast, momentum) if momentum else zip(slow, fast))
    if not all(fast_weight.is_cpu for fast_weight in fast):
        by_kind: dict[object, Piece] = defaultdict(_empty)
        sizes: Counter[object] = Counter()
        for row in rows:
            slow_weight, fast_weight = row[:2]
            is_alone = fast_weight.is_cuda and fast_weight.nbytes >= _BYTES_OF_LARGE
            kind = id(fast_weight) if is_alone else (fast_weight.device, fast_weight.dtype, slow_weight.dtype)
            _append(by_kind[kind, sizes[kind] // _BYTES_OF_PIECE], row)
            sizes[kind] += slow_weight.nbytes
        return [piece._replace(fits_kernels=_fits_kernels(piece)) for piece in by_kind.values()]
    pieces, size, limit = [_empty()], 0, _BYTES_PER_THREAD * torch.get_num_threads()
    for row in rows:
        for part in _parts(row, limit):
            slow_part, fast_part = part[:2]
            if size >= limit or (pieces[-1].slow and is_wide(pieces[-1]) != (slow_part.dtype != fast_part.dtype)):
                pieces.append(_empty())
                size = 0
            _append(pieces[-1], part)
            size += slow_part.nbytes
    return [piece._replace(fits_kernels=_fits_kernels(piece)) for piece in pieces] if fast else []


def is_large_on_gpu(slow: Tensor, fast: Tensor) -> bool:
    """Return whether a weight is on a GPU, is large, and fits a kernel that goes through memory."""
    return (
        fast.is_cuda
        and fast.nbytes >= _BYTES_OF_LARGE
        and type(fast) in _PLAIN
        and fast.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (slow.dtype, slow.device, slow.stride()) == (fast.dtype, fast.device, fast.stride())
        and _has_no_gaps(fast)
    )


def _has_no_gaps(weight: Tensor) -> bool:
    """Return whether a weight fills its memory: it is contiguous, perhaps in another order of its dimensions."""
    if weight.is_contiguous():
        return True
    elements = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape)):
        if size != 1 and stride != elements:
            return False
        elements *= size
    return True


def _fits_kernels(piece: Piece) -> bool:
    """Return whether slow weights, fast weights and momentum have the same memory layout, without gaps.

    PyTorch's fused SGD on the CPU leaves out elements of narrower dtypes than float32 (PyTorch 2.13).
    """
    return all(
        type(fast) in _PLAIN
        and slow.dtype in (torch.float32, torch.float64)
        and (slow.is_cpu or slow.is_cuda)
        and slow.stride() == fast.stride() == momentum.stride()
        and _has_no_gaps(fast)
        for slow, fast, momentum in zip(piece.slow, piece.fast, piece.momentum)
    )


def _empty() -> Piece:
    return Piece([], [], [])


def _append(piece: Piece, row: Sequence[Tensor]) -> None:
    for weights, weight in zip((piece.slow, piece.fast, piece.momentum), row):
        weights.append(weight)


def is_wide(piece: Piece) -> bool:
    """Return whether the slow weights of a piece have another dtype than the fast weights. It is the same for all."""
    return bool(piece.slow) and piece.slow[0].dtype != piece.fast[0].dtype


def _parts(row: Sequence[Tensor], limit: int) -> Iterable[Sequence[Tensor]]:
    """Return a slow weight, its fast weight and its momentum, cut into parts if they are larger than a piece."""
    slow, fast = row[:2]
    if slow.nbytes <= limit or type(fast) not in _PLAIN or not _lie_alike(row):
        return [row]
    elements = limit // slow.element_size()
    # The parts follow the order of the memory.
    return zip(*(weight.as_strided((weight.numel(),), (1,)).split(elements) for weight in row))


def _lie_alike(row: Sequence[Tensor]) -> bool:
    """Return whether weights of one shape have the same order in memory, without gaps."""
    return all(weight.is_contiguous() for weight in row) or (
        len({weight.stride() for weight in row}) == 1 and _has_no_gaps(row[0])
    )
