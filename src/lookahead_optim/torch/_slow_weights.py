"""The slow weights of one wrapper: which parameters have one, their capture, where they lie, and their sync.

Lists of parameters and slow weights are kept from sync to sync, as making them takes longer than checking them. One
`_Layout` holds those of a group. It is stale if the group has other parameters than when it was made, if a parameter is
no longer frozen, or, which only a sync has to know, if a parameter lies elsewhere in memory. All layouts are dropped
when a slow weight comes, goes or is replaced.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lookahead_optim._outer_step_torch import Piece, cut, is_large, outer_step

__all__ = ["Group", "SlowWeights", "local"]

Group: TypeAlias = dict[str, Any]


class SlowWeights:
    """The slow weights by parameter, and what is derived from them.

    Groups are given with their index in `param_groups`.

    Attributes:
        name: The name of a slow weight in the entries of `Lookahead.state` and of state dicts.
        by_parameter: The slow weights. Each has its parameter's shape.
        captured: The parameters that were captured, as far as they are still in the groups. Another one is captured
            from its own value, even if a slow weight was put into its state: a program has moved the entry from one
            parameter to another, and padded or cut it like a moment.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_parameter: dict[Tensor, Tensor] = {}
        self.captured: dict[Tensor, None] = {}
        self._is_careful = False
        self._layouts: dict[int, _Layout] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "by_parameter": self.by_parameter, "captured": list(self.captured)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])  # type: ignore[misc]
        self.captured.update(dict.fromkeys(state["captured"]))
        self.replace(state["by_parameter"])

    # The next two take the mapping in which they work: a `State` that was kept, and that is not the optimizer's any
    # more, has one of its own.

    def forget(self, parameter: Tensor, by_parameter: dict[Tensor, Tensor] | None = None) -> None:
        """Drop the slow weight of a parameter, if there is one."""
        (self.by_parameter if by_parameter is None else by_parameter).pop(parameter, None)
        self._layouts.clear()

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
        self._is_careful |= is_large(local([slow]))
        self._layouts.clear()

    def replace(self, by_parameter: dict[Tensor, Tensor]) -> None:
        """Take other slow weights, all at once."""
        self.by_parameter = by_parameter
        self._is_careful = is_large(local(list(by_parameter.values())))
        self._layouts.clear()

    def load(self, by_parameter: dict[Tensor, Tensor]) -> None:
        """Take the slow weights of a checkpoint."""
        self.captured.update(dict.fromkeys(by_parameter))
        self.replace(by_parameter)

    def capture_new(self, groups: Sequence[tuple[int, Group]], count: str) -> None:
        """Capture the slow weights of parameters that are new, or no longer frozen, immediately before a step.

        Args:
            groups: The groups that have a sync period. The slow weights of all other parameters are dropped.
            count: The name of a group's number of steps.
        """
        layouts = [self._layouts.get(index) for index, _ in groups]
        if (
            len(layouts) != len(self._layouts)
            or (self.by_parameter and not groups)
            or any(layout is None or layout.is_stale(group["params"]) for layout, (_, group) in zip(layouts, groups))
        ):
            members = [parameter for _, group in groups for parameter in group["params"]]
            stepped = {parameter for _, group in groups if group[count] for parameter in group["params"]}
            self.capture(members, stepped)
            self._layouts = {index: self._layout(group) for index, group in groups}

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, members: list[Tensor], stepped: set[Tensor]) -> None:
        """Capture the slow weights of those `members` that take part and have none, and drop all of other parameters.

        A slow weight that was put into the state of an optimizer before it captured any is kept for parameters in
        `stepped`, the groups that have made steps: tools restore an optimizer so.
        """
        known = set(members)
        for mapping in (self.by_parameter, self.captured):
            for parameter in [parameter for parameter in mapping if parameter not in known]:
                del mapping[parameter]
        new = []
        for parameter in members:
            is_restored = parameter in self.by_parameter and (parameter in self.captured or parameter in stepped)
            if not is_restored and _takes_part(parameter):
                self.by_parameter[parameter] = parameter.detach().clone()
                new.append(parameter)
            if parameter in self.by_parameter:
                self.captured[parameter] = None
        self._is_careful |= is_large(local(new))
        self._layouts.clear()

    def drop_frozen(self, group: Group) -> None:
        """Drop the slow weights of parameters that are frozen, at a sync: these must not be moved."""
        if all(parameter.requires_grad for parameter in group["params"]):
            return
        for parameter in group["params"]:
            if parameter in self.by_parameter and not _takes_part(parameter):
                self.forget(parameter)

    def check_shapes(self, index: int, group: Group) -> None:
        """Raise `RuntimeError` if a parameter of a group has another shape than its slow weight."""
        layout = self._layouts.get(index)
        if layout is not None and layout.has_its_shapes() and not layout.is_stale(group["params"]):
            return
        for parameter in group["params"]:
            slow = self.by_parameter.get(parameter)
            if slow is not None and slow.shape != parameter.shape:
                raise RuntimeError(
                    f"A parameter of shape {tuple(parameter.shape)} has a slow weight of shape "
                    f"{tuple(slow.shape)}, as its data was replaced. Call `optimizer.reset_slow_weights()` after that."
                )

    @torch.no_grad()
    def synchronize(self, groups: list[tuple[int, Group]], step_size: str, followers: list["SlowWeights"]) -> None:
        """Make the outer step in some groups.

        Args:
            groups: The groups that are due.
            step_size: The name of a group's slow step size.
            followers: The slow weights of the wrappers inside this one, which restart with the fast weights. Otherwise
                they would draw these back at their own next sync.

        Raises:
            RuntimeError: if a parameter has changed its shape. Nothing is changed then.
        """
        layouts = [self._laid_out(index, group) for index, group in groups]
        inner_layouts = [inner._laid_out(index, group) for inner in followers for index, group in groups]
        step_sizes = [group[step_size] for (_, group), layout in zip(groups, layouts) for _ in layout.pieces]
        pieces = [piece for layout in layouts for piece in layout.pieces]
        storages = [storage for layout in layouts for storage in layout.storages]
        if len(set(storages)) < len(storages):
            # Some fast weights share memory.
            self._is_careful |= outer_step(pieces, step_sizes, self._is_careful)
        else:
            for piece, slow_step_size in zip(pieces, step_sizes):
                self._is_careful |= outer_step([piece], [slow_step_size], self._is_careful)
        for layout in inner_layouts:
            for piece in layout.pieces:
                torch._foreach_copy_(piece.slow, piece.fast)

    def _layout(self, group: Group) -> "_Layout":
        parameters = group["params"]
        return _Layout(parameters, [parameter for parameter in parameters if parameter not in self.by_parameter])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _laid_out(self, index: int, group: Group) -> "_Layout":
        """Return the lists of a group for a sync, in which the slow weights have their parameters' dtype and device."""
        layout = self._layouts.get(index)
        if layout is None or layout.is_stale(group["params"]):
            layout = self._layouts[index] = self._layout(group)
        if layout.has_moved():
            self.check_shapes(index, group)
            for parameter in layout.members:
                slow = self.by_parameter[parameter]
                if (parameter.dtype, parameter.device) != (slow.dtype, slow.device):
                    self.by_parameter[parameter] = slow.to(parameter.device, parameter.dtype)
            layout.place([self.by_parameter[parameter] for parameter in layout.members])
        return layout


class _Layout:
    """A group's weights as lists for `foreach` operations.

    Attributes:
        members: The parameters that have a slow weight, each once.
        pieces: Their slow and fast weights. Of a `DTensor` these are this process' shards.
        storages: The memory in which the fast weights lie.
    """

    def __init__(self, parameters: list[Tensor], frozen: list[Tensor]) -> None:
        self._parameters, self._frozen = list(parameters), frozen
        self.members = list(dict.fromkeys(parameters))
        if frozen:
            without = set(frozen)
            self.members = [parameter for parameter in self.members if parameter not in without]
        self.pieces: list[Piece] = []
        self.storages: list[int] = []
        self._places: _Places | None = None

    def is_stale(self, parameters: list[Tensor]) -> bool:
        """Return whether the group has other parameters now, or one that is no longer frozen."""
        return (
            len(parameters) != len(self._parameters)
            or not all(map(operator.is_, parameters, self._parameters))
            or any(parameter.requires_grad or parameter.grad is not None for parameter in self._frozen)
        )

    def has_moved(self) -> bool:
        """Return whether a parameter is not where and what it was when the lists were made, or there are none yet."""
        return self._places is None or self._places != _places(self.members)

    def has_its_shapes(self) -> bool:
        """Return whether all parameters have the shapes of their slow weights; a sync is not needed to know that."""
        return self._places is not None and self._places.shapes == [member.shape for member in self.members]

    def place(self, slow: list[Tensor]) -> None:
        """Make the lists, with the slow weights of the members."""
        fast = local(self.members)
        self.pieces = cut(local(slow), fast)
        # Some kinds of tensors have no memory of their own.
        self.storages = [weight.untyped_storage().data_ptr() if weight.data_ptr() else id(weight) for weight in fast]
        # Nothing tells where the shards of a `DTensor` are but a look at them.
        self._places = _places(fast) if all(map(operator.is_, fast, self.members)) else None


class _Places(NamedTuple):
    """Where weights lie, and what they are there: `p.data = ...` can change any of that."""

    pointers: list[int]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


def _places(weights: list[Tensor]) -> _Places:
    return _Places(
        [weight.data_ptr() for weight in weights],
        [weight.shape for weight in weights],
        [weight.stride() for weight in weights],
        [weight.dtype for weight in weights],
    )


def _takes_part(parameter: Tensor) -> bool:
    """Return whether a parameter may move: it is not frozen and is there."""
    return (parameter.requires_grad or parameter.grad is not None) and not is_lazy(parameter)


def local(weights: list[Tensor]) -> list[Tensor]:
    """Return this process' shards of weights, as not all `foreach` operations take a `DTensor`."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
