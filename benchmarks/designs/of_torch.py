"""Designs in PyTorch."""

import torch
from programs import of_torch
from programs.of_torch import inner_optimizer, step_program, versions

from lookahead_optim import _torch

__all__ = ["optimizers", "step_program", "versions"]


class Designed:
    """An optimizer that calls `sync(fast, slow)`, lists of weights, at the end of a cycle."""

    def __init__(self, inner, period, sync, flat):
        self.inner, self.period, self.sync, self.count = inner, period, sync, 0
        self.fast = [weight for group in inner.param_groups for weight in group["params"]]
        if flat:
            array = torch.cat([weight.detach().flatten() for weight in self.fast])
            parts = array.split([weight.numel() for weight in self.fast])
            self.slow = [part.view_as(weight) for part, weight in zip(parts, self.fast)]
        else:
            self.slow = [weight.detach().clone() for weight in self.fast]

    def step(self):
        self.inner.step()
        self.count += 1
        if self.count % self.period == 0:
            with torch.no_grad():
                self.sync(self.fast, self.slow)


def whole(fast, slow):
    torch._foreach_lerp_(slow, fast, 0.5)
    torch._foreach_copy_(fast, slow)


def in_pieces(size):
    """Return a sync in pieces of so many bytes; weights that are larger are cut."""

    def sync(fast, slow):
        kept, _torch._BYTES_PER_THREAD = _torch._BYTES_PER_THREAD, size // torch.get_num_threads()
        for piece in _torch.cut(fast, slow):
            whole(*piece)
        _torch._BYTES_PER_THREAD = kept

    return sync


def in_groups(fast, slow):
    """Synchronise weights of 1 MiB together at a time, larger ones whole."""
    start = size = 0
    for end, weight in enumerate(slow, 1):
        size += weight.nbytes
        if size >= 2**20 or end == len(slow):
            whole(fast[start:end], slow[start:end])
            start, size = end, 0


def one_by_one(fast, slow):
    for one, other in zip(fast, slow):
        other.add_(one - other, alpha=0.5)
        one.copy_(other)


# Names, syncs, and whether all slow weights are in one array.
DESIGNS = {
    "whole lists": (whole, False),
    "groups of 1 MiB, larger weights whole": (in_groups, False),
    "pieces of 128 KiB": (in_pieces(2**17), False),
    "pieces of 512 KiB": (in_pieces(2**19), False),
    "pieces of 2 MiB": (in_pieces(2**21), False),
    "subtract, add, copy, one weight after the other": (one_by_one, False),
    "slow weights in one array, whole lists": (whole, True),
}


def optimizers(case):
    """Return functions of the weights that make the optimizers to compare, by name; the bare one comes first."""
    made = {name: of_torch.optimizers(case)[name] for name in ("bare", "lookahead-optim")}
    for name, design in DESIGNS.items():
        made[name] = lambda weights, design=design: Designed(inner_optimizer(case, weights), case.period, *design)
    return made
