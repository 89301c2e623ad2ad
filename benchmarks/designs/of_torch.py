"""Designs in PyTorch."""

import torch

from lookahead_optim import _outer_step_torch as _torch
from programs import of_torch
from programs.of_torch import inner_optimizer, step_program, versions

__all__ = ["optimizers", "step_program", "versions"]


class Designed:
    """An optimizer that calls `sync(fast, slow)`, lists of weights, at the end of a cycle."""

    def __init__(self, inner, period, sync, flat):
        self.period, self.sync, self.count = period, sync, 0
        self.update = inner.step
        self.fast = [weight for group in inner.param_groups for weight in group["params"]]
        if flat:
            array = torch.cat([weight.detach().flatten() for weight in self.fast])
            parts = array.split([weight.numel() for weight in self.fast])
            self.slow = [part.view_as(weight) for part, weight in zip(parts, self.fast)]
        else:
            self.slow = [weight.detach().clone() for weight in self.fast]

    def step(self):
        self.count += 1
        if self.count % self.period:
            self.update()
        else:
            self.last_update()

    def last_update(self):
        self.update()
        with torch.no_grad():
            self.sync(self.fast, self.slow)


class Compiled(Designed):
    """One whose inner step is compiled."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.update = torch.compile(self.update)

    @torch.compiler.disable
    def step(self):
        super().step()


class SyncCompiled(Compiled):
    """One whose sync is compiled too, to a program of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sync = torch.compile(self.sync)


class CompiledTogether(Compiled):
    """One whose last update and sync are one compiled program."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.last_update = torch.compile(super().last_update)


def whole(fast, slow):
    torch._foreach_lerp_(slow, fast, 0.5)
    torch._foreach_copy_(fast, slow)


def in_pieces(size):
    """Return a sync in pieces of so many bytes; weights that are larger are cut."""

    def sync(fast, slow):
        kept, _torch._BYTES_PER_THREAD = _torch._BYTES_PER_THREAD, size // torch.get_num_threads()
        for slow_piece, fast_piece in _torch.cut(slow, fast):
            whole(fast_piece, slow_piece)
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


# Names, kinds, syncs, and whether all slow weights are in one array.
DESIGNS = {
    "whole lists": (Designed, whole, False),
    "groups of 1 MiB, larger weights whole": (Designed, in_groups, False),
    "pieces of 128 KiB": (Designed, in_pieces(2**17), False),
    "pieces of 512 KiB": (Designed, in_pieces(2**19), False),
    "pieces of 2 MiB": (Designed, in_pieces(2**21), False),
    "subtract, add, copy, one weight after the other": (Designed, one_by_one, False),
    "slow weights in one array, whole lists": (Designed, whole, True),
}
COMPILED = {
    "sync as it is, whole lists": (Compiled, whole, False),
    "sync as it is, pieces of 512 KiB": (Compiled, in_pieces(2**19), False),
    "sync as it is, slow weights in one array": (Compiled, whole, True),
    "sync compiled": (SyncCompiled, whole, False),
    "last update and sync compiled together": (CompiledTogether, whole, False),
}


def optimizers(case):
    """Return functions of the weights that make the optimizers to compare, by name; the bare one comes first."""
    made = {name: of_torch.optimizers(case)[name] for name in ("bare", "lookahead-optim")}
    chosen = COMPILED if case.mode.endswith("compiled") else DESIGNS
    for name, (kind, sync, flat) in chosen.items():
        made[name] = lambda weights, kind=kind, sync=sync, flat=flat: kind(
            inner_optimizer(case, weights), case.period, sync, flat
        )
    return made
