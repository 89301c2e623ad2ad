"""What PyTorch's front ends share: lists of weights, cut so that the CPU finds in its cache what it needs twice."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Piece", "cut"]

# Of the slow weights, and of as many fast ones: what one core's cache holds.
_BYTES_PER_THREAD = 2**18

Piece = tuple[list[Tensor], list[Tensor]]


def cut(fast: list[Tensor], slow: list[Tensor]) -> Iterator[Piece]:
    """Cut lists of fast and slow weights into pieces for `foreach` operations.

    On the CPU such an operation is a loop, and there are two in a sync. Small weights make one piece together and large
    ones several each, so that the second operation reads what the first one left in the cache.
    """
    if not all(one.is_cpu for one in fast):
        groups = Optimizer._group_tensors_by_device_and_dtype([fast, slow])  # type: ignore[list-item]
        yield from (tuple(tensors) for tensors, _ in groups.values())  # type: ignore[misc]
        return
    limit = _BYTES_PER_THREAD * torch.get_num_threads()
    piece: Piece = [], []
    size = 0
    for weight in zip(fast, slow):
        for part in _parts(*weight, limit):
            for tensors, tensor in zip(piece, part):
                tensors.append(tensor)
            size += part[1].nbytes
            if size >= limit:
                yield piece
                piece, size = ([], []), 0
    if size:
        yield piece


def _parts(fast: Tensor, slow: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return a weight, or views of its parts if it has more bytes than `limit` and can be cut."""
    simple = type(fast) in (Tensor, torch.nn.Parameter) and fast.is_contiguous() and slow.is_contiguous()
    if slow.nbytes <= limit or not simple:
        return iter([(fast, slow)])
    length = limit // slow.element_size()
    return zip(fast.view(-1).split(length), slow.view(-1).split(length))
