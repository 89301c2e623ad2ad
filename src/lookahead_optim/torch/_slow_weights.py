"""The slow weights of one wrapper: which parameters have one, their capture, where they lie, and the slow step."""

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lookahead_optim._outer_step_torch import is_large, move
from lookahead_optim.torch import _foreach

__all__ = ["SlowWeights", "check_shape"]


class SlowWeights:
    """The slow weights by parameter, and what is derived from them.

    Attributes:
        name: The name of a slow weight in the entries of `Lookahead.state` and of state dicts.
        by_parameter: The slow weights.
        captured: The parameters that were captured, as far as they are still in the groups. Another one is captured
            from its own value, even if a slow weight was put into its state: a program has moved the entry from one
            parameter to another, and padded or cut it like a moment.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_parameter: dict[Tensor, Tensor] = {}
        self.captured: dict[Tensor, None] = {}
        self._is_large = False
        self._changed()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "by_parameter": self.by_parameter, "captured": list(self.captured)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])  # type: ignore[misc]
        self.captured.update(dict.fromkeys(state["captured"]))
        self.replace(state["by_parameter"])

    def _changed(self) -> None:
        """Forget what is derived from the slow weights, as one came, went or was replaced."""
        self._members: list[Tensor] = []
        self._waiting: list[Tensor] = []
        self._plans: dict[int, _foreach.Plan] = {}

    # Each of the next three takes the mapping in which it works: a `State` that was kept, and that is not the
    # optimizer's any more, has one of its own.

    def forget(self, parameter: Tensor, by_parameter: dict[Tensor, Tensor] | None = None) -> None:
        """Drop the slow weight of a parameter, if there is one."""
        (self.by_parameter if by_parameter is None else by_parameter).pop(parameter, None)
        self._changed()

    def assign(self, parameter: Tensor, slow: Any, by_parameter: dict[Tensor, Tensor]) -> None:
        """Take a slow weight that was put into a parameter's state, unless the parameter is a new one."""
        if not isinstance(slow, Tensor):
            raise TypeError(
                f"`state[parameter][{self.name!r}]` must be a tensor, the slow weight. Received: {slow!r} of type "
                f"{type(slow).__name__}"
            )
        if parameter not in self.captured and self.captured:
            return
        slow = slow.to_dense() if slow.layout is not torch.strided else slow
        if slow.is_set_to(parameter):
            slow = slow.detach().clone()
        by_parameter[parameter] = slow
        self._is_large |= is_large(_foreach.local([slow]))
        self._changed()

    @staticmethod
    def copy_for(parameter: Tensor, slow: Tensor) -> Tensor:
        """Return a copy of a slow weight, on the device and in the dtype of its parameter."""
        return slow.detach().to(parameter.device, parameter.dtype, copy=True)

    def replace(self, by_parameter: dict[Tensor, Tensor]) -> None:
        """Take other slow weights, all at once."""
        self.by_parameter = by_parameter
        self._is_large = is_large(_foreach.local(list(by_parameter.values())))
        self._changed()

    def load(self, by_parameter: dict[Tensor, Tensor]) -> None:
        """Take the slow weights of a checkpoint."""
        self.captured.update(dict.fromkeys(by_parameter))
        self.replace(by_parameter)

    def capture_new(self, groups: Sequence[dict[str, Any]], count: str) -> None:
        """Capture the slow weights of parameters that are new, or not frozen any more, before a step."""
        members = list(itertools.chain.from_iterable(group["params"] for group in groups))
        if (
            len(members) != len(self._members)
            or (self.by_parameter and not members)
            or not all(map(operator.is_, members, self._members))
            or any(one.requires_grad or one.grad is not None for one in self._waiting)
        ):
            stepped = {one for group in groups if group[count] for one in group["params"]}
            self.capture(members, stepped)

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, members: list[Tensor], stepped: set[Tensor]) -> None:
        """Capture the slow weights of those `members` that take part and have none, and drop all of other parameters.

        A slow weight that was put into the state of an optimizer before it captured any is kept for parameters in
        `stepped`, the groups that have made steps: tools restore an optimizer so.
        """
        known = set(members)
        for mapping in (self.by_parameter, self.captured):
            for parameter in [one for one in mapping if one not in known]:
                del mapping[parameter]
        new = []
        for parameter in members:
            is_restored = parameter in self.by_parameter and (parameter in self.captured or parameter in stepped)
            if not is_restored and _takes_part(parameter):
                self.by_parameter[parameter] = parameter.detach().clone()
                new.append(parameter)
            if parameter in self.by_parameter:
                self.captured[parameter] = None
        self._is_large |= is_large(_foreach.local(new))
        self._changed()
        self._members.extend(members)
        self._waiting.extend(one for one in members if one not in self.by_parameter)

    def drop_frozen(self, parameters: Iterable[Tensor]) -> None:
        """Drop the slow weights of parameters that are frozen, at a sync: these must not be moved."""
        for parameter in parameters:
            if parameter in self.by_parameter and not _takes_part(parameter):
                self.forget(parameter)

    def check_shapes(self, groups: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Raise an error if a parameter has another shape than its slow weight. Groups come with their indices."""
        for index, group in groups:
            plan = self._plans.get(index)
            if plan is not None and plan.places[1] == [parameter.shape for parameter in group["params"]]:
                continue
            for parameter in group["params"]:
                slow = self.by_parameter.get(parameter)
                if slow is not None and slow.shape != parameter.shape:
                    raise RuntimeError(
                        f"A parameter of shape {tuple(parameter.shape)} has a slow weight of shape "
                        f"{tuple(slow.shape)}, as its data was replaced. Call `optimizer.reset_slow_weights()` after "
                        "that."
                    )

    @torch.inference_mode(False)
    @torch.no_grad()
    def pairs(self, groups: list[tuple[int, dict[str, Any]]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return slow weights and their fast ones, of a `DTensor` this process' shard.

        For a sync: the slow weights follow the fast ones in device and dtype, for good.
        """
        self.check_shapes(groups)
        parameters = dict.fromkeys(one for _, group in groups for one in group["params"] if one in self.by_parameter)
        for fast in parameters:
            slow = self.by_parameter[fast]
            if (fast.dtype, fast.device) != (slow.dtype, slow.device):
                self.by_parameter[fast] = slow.to(fast.device, fast.dtype)
                self._changed()
        return _foreach.local([self.by_parameter[one] for one in parameters]), _foreach.local(list(parameters))

    def plan(self, index: int, group: dict[str, Any]) -> _foreach.Plan:
        """Return a group's lists for `foreach` operations: those of its last sync, if they are still valid.

        Building them takes longer than checking them.
        """
        parameters = group["params"]
        plan = self._plans.get(index)
        if plan is None or not plan.holds(parameters):
            slow, fast = self.pairs([(index, group)])
            plan = _foreach.make_plan(slow, fast)
            # Not if some have no slow weight, or have shards.
            if len(fast) == len(parameters) and all(map(operator.is_, fast, parameters)):
                self._plans[index] = plan
        return plan

    @torch.no_grad()
    def synchronize(self, plans: list[_foreach.Plan], step_sizes: list[float]) -> None:
        """Make the slow step, and restart the fast weights from there."""
        pieces = [(step_size, *piece) for step_size, plan in zip(step_sizes, plans) for piece in plan.pieces]
        # Weights that share memory must all have been read before one of them is written.
        for together in [pieces] if _foreach.share_memory(plans) else [[one] for one in pieces]:
            for step_size, slow, fast in together:
                self._is_large |= move(slow, fast, step_size, self._is_large)
            for _, slow, fast in together:
                torch._foreach_copy_(fast, slow)


def _takes_part(parameter: Tensor) -> bool:
    """Return whether a parameter may move: it is not frozen and is there."""
    return (parameter.requires_grad or parameter.grad is not None) and not is_lazy(parameter)


def check_shape(slow: Any, parameter: Tensor, index: Any) -> None:
    """Raise an error if a saved slow weight does not fit its parameter."""
    if not isinstance(slow, Tensor) or slow.shape != parameter.shape:
        received = f"shape {tuple(slow.shape)}" if isinstance(slow, Tensor) else repr(slow)
        raise ValueError(
            f"`state_dict` must have a slow weight of shape {tuple(parameter.shape)} for parameter {index}. "
            f"Received: {received}"
        )
