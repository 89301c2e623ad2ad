"""Lists of weights of PyTorch, cut so that the CPU finds in its cache what an outer step needs more than once."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Piece", "cut", "is_large_on_gpu", "is_wide"]

# An outer step goes over the slow weights twice, and more often with momentum. On the CPU a `foreach` operation is a
# loop over its weights. So all operations are made on as many weights as one core's cache holds, before the next
# weights.
_BYTES_PER_THREAD = 2**18
# From here on a GPU needs longer for a weight than the host to launch a kernel for it alone.
_BYTES_OF_LARGE = 2**24
# Some operations take memory for all weights of a piece.
_BYTES_OF_PIECE = 2**27

_PLAIN = (Tensor, torch.nn.Parameter)


class Piece(NamedTuple):
    """Slow weights, their fast ones and their slow momentum, in one order.

    All are on the CPU, or all on one other device. Without slow momentum its list is empty. `fits_kernels` says whether
    kernels that go through memory can take all of them together.
    """

    slow: list[Tensor]
    fast: list[Tensor]
    momentum: list[Tensor]
    fits_kernels: bool = False


def cut(slow: list[Tensor], fast: list[Tensor], momentum: Sequence[Tensor] = ()) -> list[Piece]:
    """Cut lists of slow weights, fast weights and, if there is any, slow momentum into pieces for `outer_step`.

    On the CPU several small weights make one piece, and a large weight makes several, which are views of it, if it lies
    in memory without gaps. On other devices a large weight makes a piece, and all others of one device and dtype make
    pieces of 128 MiB, as their `foreach` operations ask for.
    """
    # Each row is a slow weight, its fast one, and its momentum if there is any.
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
    """Return whether a weight lies on a GPU, is large there, and can be taken by a kernel that goes through memory."""
    return (
        fast.is_cuda
        and fast.nbytes >= _BYTES_OF_LARGE
        and type(fast) in _PLAIN
        and fast.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (slow.dtype, slow.device, slow.stride()) == (fast.dtype, fast.device, fast.stride())
        and _has_no_gaps(fast)
    )


def _has_no_gaps(weight: Tensor) -> bool:
    """Return whether a weight fills its memory: it is contiguous, or would be with its dimensions in another order."""
    if weight.is_contiguous():
        return True
    elements = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape)):
        if size != 1 and stride != elements:
            return False
        elements *= size
    return True


def _fits_kernels(piece: Piece) -> bool:
    """Return whether weights lie in memory as their slow weights and momentum do, without gaps.

    PyTorch's fused SGD on the CPU leaves out elements of narrower dtypes than these (2.13).
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
    """Return whether slow weights have another dtype than their fast ones: in a piece, all have or none has."""
    return bool(piece.slow) and piece.slow[0].dtype != piece.fast[0].dtype


def _parts(row: Sequence[Tensor], limit: int) -> Iterable[Sequence[Tensor]]:
    """Return a slow weight, its fast one and its momentum, all in parts if they are larger than a piece."""
    slow, fast = row[:2]
    if slow.nbytes <= limit or type(fast) not in _PLAIN or not _lie_alike(row):
        return [row]
    elements = limit // slow.element_size()
    # In the order of the memory.
    return zip(*(weight.as_strided((weight.numel(),), (1,)).split(elements) for weight in row))


def _lie_alike(row: Sequence[Tensor]) -> bool:
    """Return whether weights of one shape lie in memory in one order, without gaps."""
    return all(weight.is_contiguous() for weight in row) or (
        len({weight.stride() for weight in row}) == 1 and _has_no_gaps(row[0])
    )
