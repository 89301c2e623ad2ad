"""Lists of slow and fast weights of PyTorch, cut so that the CPU finds in its cache what an outer step needs twice."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Piece", "cut", "is_large_on_gpu"]

# An outer step goes over the slow weights twice. On the CPU a `foreach` operation is a loop over its weights. So both
# operations are made on as many weights as one core's cache holds, before the next weights.
_BYTES_PER_THREAD = 2**18
# From here on a GPU needs longer for a weight than the host to launch a kernel for it alone.
_BYTES_OF_LARGE = 2**24

_PLAIN = (Tensor, torch.nn.Parameter)


class Piece(NamedTuple):
    """Slow weights and their fast ones, in one order. All are on the CPU, or all on one other device."""

    slow: list[Tensor]
    fast: list[Tensor]


def cut(slow: list[Tensor], fast: list[Tensor]) -> list[Piece]:
    """Cut lists of slow and fast weights into pieces for `outer_step`.

    On the CPU several small weights make one piece, and a large weight makes several, which are views of it, if it is
    contiguous. On other devices a large weight makes a piece, if a kernel can take it, and all others of one device
    and dtype make one, as their `foreach` operations ask for.
    """
    if not all(fast_weight.is_cpu for fast_weight in fast):
        by_kind: dict[object, Piece] = defaultdict(lambda: Piece([], []))
        for slow_weight, fast_weight in zip(slow, fast):
            is_alone = is_large_on_gpu(slow_weight, fast_weight)
            kind = by_kind[id(fast_weight) if is_alone else (fast_weight.device, fast_weight.dtype)]
            kind.slow.append(slow_weight)
            kind.fast.append(fast_weight)
        return list(by_kind.values())
    pieces, size, limit = [Piece([], [])], 0, _BYTES_PER_THREAD * torch.get_num_threads()
    for slow_weight, fast_weight in zip(slow, fast):
        for slow_part, fast_part in _parts(slow_weight, fast_weight, limit):
            if size >= limit:
                pieces.append(Piece([], []))
                size = 0
            pieces[-1].slow.append(slow_part)
            pieces[-1].fast.append(fast_part)
            size += slow_part.nbytes
    return pieces if fast else []


def is_large_on_gpu(slow: Tensor, fast: Tensor) -> bool:
    """Return whether a weight lies on a GPU, is large there, and can be taken by a kernel that goes through memory."""
    return (
        fast.is_cuda
        and fast.nbytes >= _BYTES_OF_LARGE
        and type(fast) in _PLAIN
        and fast.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (slow.dtype, slow.device, slow.stride()) == (fast.dtype, fast.device, fast.stride())
        and (fast.is_contiguous() or (fast.dim() == 4 and fast.is_contiguous(memory_format=torch.channels_last)))
    )


def _parts(slow: Tensor, fast: Tensor, limit: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return a slow weight and its fast one, both in parts if they are larger than a piece."""
    is_plain = type(fast) in _PLAIN and fast.is_contiguous() and slow.is_contiguous()
    if slow.nbytes <= limit or not is_plain:
        return [(slow, fast)]
    elements = limit // slow.element_size()
    return zip(slow.view(-1).split(elements), fast.view(-1).split(elements))
