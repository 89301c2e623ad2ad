"""`slow_weights()` blocks: they put the slow weights into the parameters, and the fast weights back at the end.

A block keeps a copy of the fast weights. Two other ways need no copy, but both break what a block promises:

- Exchange the values of slow and fast weights. If a program then writes to a parameter in a block, it writes to the
  slow weight, and the slow weight is lost. Also, a parameter cannot hold a slow weight of a wider dtype.
- Exchange the memory (`parameter.data = slow`). CUDA graphs, FSDP2 and processes that share the memory would continue
  to use the old memory.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lookahead_optim._checks import check_outside_block
from lookahead_optim.torch._fast_weights import LoadedFastWeights
from lookahead_optim.torch._fsdp import local
from lookahead_optim.torch._settings import Group
from lookahead_optim.torch._slow_weights import SlowWeights

__all__ = ["Blocks"]


class Blocks:
    """The open blocks of an optimizer. All wrappers of the optimizer share this object.

    Blocks of several threads may overlap in any order. The first block keeps the fast weights. If the first block ends
    first, it hands the fast weights to a block that is still open.

    Attributes:
        loaded: The fast weights of a checkpoint that was made in a block, until the parameters have them.
        lock: Held while slow weights are read or written: by a step, a sync, a state dict, and the start and end of a
            block.
    """

    def __init__(self) -> None:
        self.loaded = LoadedFastWeights()
        self.lock = threading.RLock()
        self._open: list[_Block] = []

    def is_any_open(self) -> bool:
        """Return whether the parameters may hold slow weights."""
        return bool(self._open)

    def fast_weights(self) -> Mapping[Tensor, Tensor]:
        """Return the fast weights of parameters that may hold slow weights: in a block, or after a load."""
        return next((block.kept for block in self._open if block.kept), self.loaded.by_parameter)

    def check_none_is_open(self, caller: str) -> None:
        """Raise `RuntimeError` inside a block."""
        check_outside_block(self.is_any_open(), caller)

    @contextlib.contextmanager
    def block(self, slow_weights: SlowWeights, groups: list[Group]) -> Iterator[None]:
        """Return a context manager for a block on slow weights.

        A block directly inside another block of the same wrapper changes nothing.
        """
        block = _Block(slow_weights.name)
        with self.lock:
            self.loaded.settle()
            is_shown = bool(self._open) and self._open[-1].name == slow_weights.name
            self._open.append(block)
            try:
                if not is_shown:
                    block.swap_in(slow_weights, groups)
            except BaseException:
                self._close(block)
                raise
        try:
            yield
        finally:
            with self.lock:
                self._close(block)

    def _close(self, block: "_Block") -> None:
        later = self._open[self._open.index(block) + 1 :]
        self._open.remove(block)
        if later and block.kept:
            heir = next((other for other in later if other.kept), later[0])
            heir.kept = block.kept
        else:
            block.swap_out()


class _Block:
    """A block, and the fast weights that it puts back.

    Attributes:
        name: The wrapper's name for its slow weights. It distinguishes the wrappers of one optimizer.
        kept: The values of all parameters before the block. Empty if the block puts nothing back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def swap_in(self, slow_weights: SlowWeights, groups: list[Group]) -> None:
        for index, group in enumerate(groups):
            slow_weights.check_shapes(index, group)
        parameters = list(dict.fromkeys(parameter for group in groups for parameter in group["params"]))
        self.kept = {parameter: parameter.detach().clone() for parameter in parameters if not is_lazy(parameter)}
        members = [parameter for parameter in parameters if parameter in slow_weights.by_parameter]
        if members:
            # The values are rounded if the parameters have another dtype. The slow weights themselves keep their dtype.
            shown = [slow_weights.by_parameter[parameter] for parameter in members]
            torch._foreach_copy_(local(members), local(shown))

    @torch.no_grad()
    def swap_out(self) -> None:
        pairs = zip(local(list(self.kept)), local(list(self.kept.values())))
        fitting = [(parameter, kept) for parameter, kept in pairs if parameter.shape == kept.shape]
        if fitting:
            torch._foreach_copy_([parameter for parameter, _ in fitting], [kept for _, kept in fitting])
        if len(fitting) < len(self.kept):
            raise RuntimeError(
                "A parameter changed its shape inside a `slow_weights()` block, so that its fast weights did not "
                "come back; those of the others did. Change shapes outside of the block."
            )
