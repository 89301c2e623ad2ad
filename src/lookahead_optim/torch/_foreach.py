"""Lists of slow and fast weights, as `foreach` operations take them."""

from typing import NamedTuple

import torch
from torch import Tensor

from lookahead_optim._outer_step_torch import Piece, cut, is_cut

__all__ = ["Plan", "copy", "local", "make_plan", "share_memory"]


class Plan(NamedTuple):
    """Cached lists for a group's sync, and what they depend on."""

    pieces: list[Piece]
    storages: list[int]
    places: tuple[list[int], list[torch.Size], list[torch.dtype]]
    slow: list[Tensor]
    pointers: list[int]
    # Their pieces are views, which are right for the layout that they had.
    contiguous: list[Tensor]

    def holds(self, parameters: list[Tensor]) -> bool:
        """Return whether all parameters, and their slow weights, are where and what they were."""
        return (
            self.places == places(parameters)
            and self.pointers == [one.data_ptr() for one in self.slow]
            and all(one.is_contiguous() for one in self.contiguous)
        )


def make_plan(slow: list[Tensor], fast: list[Tensor]) -> Plan:
    """Return the plan to synchronise lists of weights."""
    return Plan(
        pieces=list(cut(slow, fast)),
        # Some kinds of tensors have no memory of their own.
        storages=[one.untyped_storage().data_ptr() if one.data_ptr() else id(one) for one in fast],
        places=places(fast),
        slow=slow,
        pointers=[one.data_ptr() for one in slow],
        contiguous=[one for pair in zip(slow, fast) if is_cut(*pair) for one in pair],
    )


def places(tensors: list[Tensor]) -> tuple[list[int], list[torch.Size], list[torch.dtype]]:
    """Return where the tensors are, and what they are there."""
    return [one.data_ptr() for one in tensors], [one.shape for one in tensors], [one.dtype for one in tensors]


def share_memory(plans: list[Plan]) -> bool:
    """Return whether any fast weights share memory."""
    storages = [storage for plan in plans for storage in plan.storages]
    return len(set(storages)) < len(storages)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this process' shards of weights, as not all `foreach` operations take a `DTensor`."""
    return [one.to_local() if hasattr(one, "to_local") else one for one in tensors]


@torch.no_grad()
def copy(destinations: list[Tensor], sources: list[Tensor]) -> None:
    """Copy `sources` into `destinations`, whatever their devices and dtypes."""
    if destinations:
        torch._foreach_copy_(destinations, sources)
