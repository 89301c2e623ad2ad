"""The slow weights of one wrapper: which parameters have a slow weight, capture, memory layout, and sync."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lookahead_optim._outer_step_torch import (
    OuterStep,
    ask_is_large,
    form_pseudo_gradients,
    is_large,
    outer_step,
    outer_step_reduced,
    outer_step_unshared,
)
from lookahead_optim._pieces_torch import Piece, cut
from lookahead_optim.torch._fsdp import local
from lookahead_optim.torch._settings import Group, Names
from lookahead_optim.torch._workers import Reduce

__all__ = ["SlowWeights"]


class SlowWeights:
    """The slow weights and the slow momentum by parameter, and the cached lists for a sync.

    Groups are given together with their index in `param_groups`.

    Attributes:
        name: The name of a slow weight in the entries of `Lookahead.state` and of state dicts.
        momentum_name: The name of a slow momentum in the same entries.
        dtype: The dtype of slow weights and momentum, if it is wider than the parameter's dtype. `None` for the
            parameter's dtype.
        by_parameter: The slow weights. Each has its parameter's shape.
        momentum: The slow momentum of the parameters with a slow weight, in groups that have momentum.
        captured: The parameters in the groups whose slow weight was captured or loaded. Any other parameter is captured
            from its own value, even if its state has a slow weight. In that case a program has moved the entry from
            another parameter, and padded or cut it like a moment.
    """

    def __init__(self, name: str, momentum_name: str, dtype: torch.dtype | None) -> None:
        self.name, self.momentum_name, self.dtype = name, momentum_name, dtype
        self.by_parameter: dict[Tensor, Tensor] = {}
        self.momentum: dict[Tensor, Tensor] = {}
        self.captured: dict[Tensor, None] = {}
        self._is_careful = False
        # Answers of `ask_is_large` about captured weights. They wait until the next sync, so that a capture does not
        # wait for a GPU.
        self._are_large: list[Callable[[], bool]] = []
        self._lists: dict[int, _Lists] = {}

    def __getstate__(self) -> dict[str, Any]:
        names = ("name", "momentum_name", "dtype", "by_parameter", "momentum")
        return {**{name: getattr(self, name) for name in names}, "captured": list(self.captured)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"], state["momentum_name"], state["dtype"])  # type: ignore[misc]
        self.captured.update(dict.fromkeys(state["captured"]))
        self.replace(state["by_parameter"], state["momentum"])

    def forget(self, parameter: Tensor) -> None:
        """Drop the slow weight and the slow momentum of a parameter, if it has them."""
        self.by_parameter.pop(parameter, None)
        self.momentum.pop(parameter, None)
        self._lists.clear()

    def assign(self, parameter: Tensor, slow: object, by_parameter: dict[Tensor, Tensor]) -> None:
        """Take a slow weight that was put into a parameter's state.

        The slow weight of a new parameter is ignored, as the parameter will be captured. Before the first capture all
        parameters are new, and slow weights are taken.
        """
        if not isinstance(slow, Tensor):
            raise TypeError(
                f"`state[parameter][{self.name!r}]` must be a tensor, the slow weight. Received: {slow!r} of type "
                f"{type(slow).__name__}"
            )
        if parameter not in self.captured and self.captured:
            return
        slow = slow.to_dense() if slow.layout is not torch.strided else slow
        by_parameter[parameter] = slow.detach().clone() if slow.is_set_to(parameter) else _with_own_memory(slow)
        self._is_careful |= is_large(local([slow]))
        self._lists.clear()

    def assign_momentum(self, parameter: Tensor, value: object, momentum: dict[Tensor, Tensor]) -> None:
        """Take a slow momentum that was put into a parameter's state."""
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            raise TypeError(
                f"`state[parameter][{self.momentum_name!r}]` must be a tensor of the parameter's shape, the slow "
                f"momentum. Received: {value!r:.200} of type {type(value).__name__}"
            )
        momentum[parameter] = _with_own_memory(value)
        self.changed()

    def changed(self) -> None:
        """Note that slow weights were added, removed or assigned."""
        self._lists.clear()

    def replace(self, by_parameter: dict[Tensor, Tensor], momentum: dict[Tensor, Tensor]) -> None:
        """Replace all slow weights and all slow momentum at once."""
        self.by_parameter, self.momentum = by_parameter, momentum
        self._is_careful = is_large(local(list(by_parameter.values())))
        self._are_large.clear()
        self._lists.clear()

    def load(self, by_parameter: dict[Tensor, Tensor], momentum: dict[Tensor, Tensor]) -> None:
        """Take the slow weights and the slow momentum of a checkpoint."""
        self.captured.update(dict.fromkeys(by_parameter))
        self.replace(by_parameter, momentum)

    def capture_new(self, groups: Sequence[tuple[int, Group]], names: Names) -> None:
        """Capture the slow weights of parameters that have none and take part, immediately before a step.

        A parameter has no slow weight in these cases: the parameter or its group is new, it was frozen at a sync, the
        period was 0, after a reset, or a checkpoint had none.

        Args:
            groups: The groups that have a sync period. The slow weights of all other parameters are dropped.
            names: The names of the wrapper's entries in groups.
        """
        if not self._is_up_to_date(groups):
            parameters = [parameter for _, group in groups for parameter in group["params"]]
            stepped = {parameter for _, group in groups if group[names.lookahead_step] for parameter in group["params"]}
            self.capture(parameters, stepped)
            self.complete_momentum([group for _, group in groups], names)
            self._lists = {index: self._new_lists(group) for index, group in groups}

    def _is_up_to_date(self, groups: Sequence[tuple[int, Group]]) -> bool:
        """Return whether no parameter can need a capture. This check is faster than looking at every parameter."""
        if not groups:
            return not self.by_parameter
        lists = [self._lists.get(index) for index, _ in groups]
        return len(lists) == len(self._lists) and all(
            known is not None and not known.is_stale(group["params"]) for known, (_, group) in zip(lists, groups)
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, parameters: list[Tensor], stepped: set[Tensor]) -> None:
        """Capture the slow weights of all `parameters` that take part and have none.

        Slow weights of parameters that are not in `parameters` are dropped.

        Before an optimizer has captured anything, a tool that restores it may put slow weights into its state. Such a
        slow weight is kept if its parameter is in `stepped`, the parameters of groups that have made steps.
        """
        known = set(parameters)
        for mapping in (self.by_parameter, self.momentum, self.captured):
            for parameter in [parameter for parameter in mapping if parameter not in known]:
                del mapping[parameter]
        new = []
        for parameter in parameters:
            keeps_slow = parameter in self.by_parameter and (parameter in self.captured or parameter in stepped)
            if not keeps_slow and _takes_part(parameter):
                self.by_parameter[parameter] = parameter.detach().to(self.dtype_of(parameter), copy=True)
                self.momentum.pop(parameter, None)
                new.append(parameter)
            if parameter in self.by_parameter:
                self.captured[parameter] = None
        self._are_large.append(ask_is_large(local(new)))
        self._lists.clear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def complete_momentum(self, groups: Sequence[Group], names: Names) -> None:
        """Add a slow momentum of 0 for slow weights that have none, in groups with momentum."""
        for group in groups:
            for parameter in group["params"] if group[names.slow_momentum] else ():
                if parameter in self.by_parameter and parameter not in self.momentum:
                    self.momentum[parameter] = torch.zeros_like(self.by_parameter[parameter])
                    self._lists.clear()

    def _drop_momentum(self, groups: Sequence[Group], names: Names) -> None:
        """Drop the slow momentum in groups without momentum."""
        for group in groups:
            for parameter in group["params"] if self.momentum and not group[names.slow_momentum] else ():
                if self.momentum.pop(parameter, None) is not None:
                    self._lists.clear()

    def drop_frozen(self, group: Group) -> None:
        """Drop the slow weights of parameters that are frozen when a sync is due: the sync must not move them."""
        if all(parameter.requires_grad for parameter in group["params"]):
            return
        for parameter in group["params"]:
            if parameter in self.by_parameter and not _takes_part(parameter):
                self.forget(parameter)

    def check_shapes(self, index: int, group: Group) -> None:
        """Raise `RuntimeError` if a parameter of a group and its slow weight have different shapes."""
        lists = self._lists.get(index)
        if lists is not None and lists.has_known_shapes() and not lists.is_stale(group["params"]):
            return
        for parameter in group["params"]:
            slow = self.by_parameter.get(parameter)
            if slow is not None and slow.shape != parameter.shape:
                raise RuntimeError(
                    f"A parameter of shape {tuple(parameter.shape)} has a slow weight of shape "
                    f"{tuple(slow.shape)}, as its data was replaced. Call `optimizer.reset_slow_weights()` after that."
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def synchronize(
        self,
        groups: list[tuple[int, Group]],
        names: Names,
        followers: list[tuple["SlowWeights", Names]],
        reduce: Reduce | None = None,
    ) -> None:
        """Make the outer step in some groups.

        Args:
            groups: The groups that are due, with their indices.
            names: The names of the wrapper's entries in groups.
            followers: The slow weights and the names of each wrapper inside this wrapper. Their slow weights restart
                together with the fast weights. Otherwise they would pull the fast weights back at their own next sync.
            reduce: Callable that averages the pseudo-gradients over workers.

        Raises:
            RuntimeError: if a parameter has changed its shape. Nothing is changed then. Also if `reduce` fails, or
                returns anything but `None`, `True` or `False`. The fast weights have restarted from the slow weights
                then, and nothing else is changed.
        """
        owners = [(self, names), *followers]
        for owner, own_names in owners:
            owner.complete_momentum([group for _, group in groups], own_names)
            owner._drop_momentum([group for _, group in groups], own_names)
        all_lists = [(owner, owner._lists_of(index, group)) for owner, _ in owners for index, group in groups]
        to_lay_out = [(owner, lists) for owner, lists in all_lists if lists.has_moved()]
        for owner in dict.fromkeys(owner for owner, _ in to_lay_out):
            for index, group in groups:
                owner.check_shapes(index, group)
        for owner, lists in to_lay_out:
            slow = [owner._at(member) for member in lists.members]
            lists.lay_out(slow, [owner.momentum[member] for member in lists.members if member in owner.momentum])
        while self._are_large:
            self._is_careful |= self._are_large.pop()()
        own = [lists for _, lists in all_lists[: len(groups)]]
        steps = [_outer_step_of(group, names) for (_, group), lists in zip(groups, own) for _ in lists.pieces]
        pieces = [piece for lists in own for piece in lists.pieces]
        storages = [storage for lists in own for storage in lists.storages]
        is_shared = len(set(storages)) < len(storages)
        of_followers = [lists for _, lists in all_lists[len(groups) :]]
        if reduce is not None:
            try:
                _reduced_outer_step(own, [_outer_step_of(group, names) for _, group in groups], reduce, is_shared)
            except BaseException:
                _restart_followers(of_followers)
                raise
        elif is_shared:
            # Some fast weights share memory, so all are read before any is written.
            self._is_careful = outer_step(pieces, steps, self._is_careful)
        else:
            for piece, step in zip(pieces, steps):
                self._is_careful = outer_step_unshared(piece, step, self._is_careful)
        _restart_followers(of_followers)
        for _, lists in all_lists:
            lists.let_go()

    def _lists_of(self, index: int, group: Group) -> "_Lists":
        """Return the lists of a group, and make new lists if needed.

        Only `capture_new` keeps lists, for all groups at once.
        """
        lists = self._lists.get(index)
        return self._new_lists(group) if lists is None or lists.is_stale(group["params"]) else lists

    def _new_lists(self, group: Group) -> "_Lists":
        return _Lists(group["params"], self.by_parameter)

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's slow weight.

        For a parameter that is not floating point it is the parameter's own.
        """
        if self.dtype is None or not parameter.is_floating_point():
            return parameter.dtype
        return torch.promote_types(self.dtype, parameter.dtype)

    def _at(self, parameter: Tensor) -> Tensor:
        """Return the slow weight of a parameter, moved to the parameter's device and cast to its slow dtype.

        The momentum of the parameter is moved and cast too.
        """
        slow, dtype = self.by_parameter[parameter], self.dtype_of(parameter)
        if (dtype, parameter.device) != (slow.dtype, slow.device):
            slow = self.by_parameter[parameter] = slow.to(parameter.device, dtype)
        momentum = self.momentum.get(parameter)
        if momentum is not None and (dtype, parameter.device) != (momentum.dtype, momentum.device):
            self.momentum[parameter] = momentum.to(parameter.device, dtype)
        return slow


class _Lists:
    """Cached lists of a group's weights, for `foreach` operations.

    Making the lists costs more than checking that they are still valid.

    Before each step, lists are stale in two cases: the group has other parameters than before, or a parameter without a
    slow weight may get one now. A capture then makes new lists. At a sync, lists are also stale if a weight lies
    elsewhere in memory. The same parameters and slow weights are then laid out again. All lists are stale after a slow
    weight is added, removed or assigned from outside.

    Attributes:
        members: The parameters that have a slow weight, each once.
        pieces: Their slow weights, fast weights and momentum. For a `DTensor` these are this process' shards.
        whole: The same weights, not cut.
        storages: The memory in which the fast weights lie.
    """

    def __init__(self, parameters: list[Tensor], slow_by_parameter: dict[Tensor, Tensor]) -> None:
        self._parameters = list(parameters)
        self._without_slow = [parameter for parameter in parameters if parameter not in slow_by_parameter]
        self.members = [parameter for parameter in dict.fromkeys(parameters) if parameter in slow_by_parameter]
        self.pieces: list[Piece] = []
        self.whole = Piece([], [], [])
        self.storages: list[int] = []
        # The slow weights, and the momentum.
        self._state: list[Tensor] = []
        self._places: _Places | None = None

    def is_stale(self, parameters: list[Tensor]) -> bool:
        """Return whether the group has other parameters now, or a parameter without a slow weight may get one."""
        return (
            len(parameters) != len(self._parameters)
            or not all(map(operator.is_, parameters, self._parameters))
            or any(parameter.requires_grad or parameter.grad is not None for parameter in self._without_slow)
        )

    def has_moved(self) -> bool:
        """Return whether a weight has another address, shape or dtype than in the lists, or there are no lists yet."""
        return self._places is None or self._places != _places(self.members, self._state)

    def has_known_shapes(self) -> bool:
        """Return whether all parameters have the shapes of the last sync, which are the shapes of the slow weights."""
        return self._places is not None and self._places.shapes == [member.shape for member in self.members]

    def lay_out(self, slow: list[Tensor], momentum: list[Tensor]) -> None:
        """Make the lists from the slow weights of the members and, if there is any, their momentum."""
        fast, self._state = local(self.members), [*slow, *momentum]
        self.whole = Piece(local(slow), fast, local(momentum))
        self.pieces = cut(*self.whole[:3])
        # Some kinds of tensors have no memory of their own.
        self.storages = [weight.untyped_storage().data_ptr() if weight.data_ptr() else id(weight) for weight in fast]
        # A `DTensor` does not tell where its shard is, so its lists are made at each sync.
        self._places = _places(fast, self._state) if all(map(operator.is_, fast, self.members)) else None

    def let_go(self) -> None:
        """Drop lists that cannot be reused. They would keep memory alive that the weights have left."""
        if self._places is None:
            self.pieces, self.whole, self.storages, self._state = [], Piece([], [], []), [], []


class _Places(NamedTuple):
    """The addresses of weights, and the layout of the fast weights. `p.data = ...` can change any of these."""

    state_pointers: list[int]
    pointers: list[int]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


def _restart_followers(all_lists: list[_Lists]) -> None:
    """Restart the slow weights of the wrappers inside from the fast weights."""
    for lists in all_lists:
        for piece in lists.pieces:
            torch._foreach_copy_(piece.slow, piece.fast)


def _reduced_outer_step(all_lists: list[_Lists], steps: list[OuterStep], reduce: Reduce, is_shared: bool) -> None:
    """Make the outer step with pseudo-gradients that `reduce` has averaged.

    The pseudo-gradients are written into the memory of the fast weights, as a model may leave no memory for another
    copy of its weights. The restart overwrites the fast weights anyway. If `reduce` fails, only the slow weights are
    left to restart from.
    """
    # Detached, as `reduce` may work in another thread, where gradients are switched on.
    pseudo_gradients = [[weight.detach() for weight in lists.whole.fast] for lists in all_lists]
    if is_shared:
        # Fast weights that share memory have room for only one pseudo-gradient.
        pseudo_gradients = [[torch.empty_like(weight) for weight in weights] for weights in pseudo_gradients]
    try:
        for lists, out in zip(all_lists, pseudo_gradients):
            if is_shared:
                form_pseudo_gradients(lists.whole.slow, lists.whole.fast, out)
            else:
                for piece in lists.pieces:
                    form_pseudo_gradients(piece.slow, piece.fast, piece.fast)
        if not _call(reduce, [one for out in pseudo_gradients for one in out]):
            return
        for lists, out, step in zip(all_lists, pseudo_gradients, steps):
            for piece in cut(lists.whole.slow, out, lists.whole.momentum) if is_shared else lists.pieces:
                outer_step_reduced(piece, step)
    finally:
        for lists in all_lists:
            for piece in lists.pieces:
                torch._foreach_copy_(piece.fast, piece.slow)


def _call(reduce: Reduce, pseudo_gradients: list[Tensor]) -> bool:
    """Let `reduce` change the pseudo-gradients, and return whether the cycle continues."""
    given = list(pseudo_gradients)
    try:
        goes_on = reduce(pseudo_gradients)
        if len(pseudo_gradients) != len(given) or not all(map(operator.is_, pseudo_gradients, given)):
            raise TypeError(
                "`reduce` must change the tensors of its list in place, for example with "
                "`pseudo_gradients[0].copy_(mean)`. Received: a list that has other tensors after the call"
            )
        if not (goes_on is None or isinstance(goes_on, bool)):
            raise TypeError(
                "`reduce` must return None or True to go on, or False to abandon the cycle. "
                f"Received: {goes_on!r:.200} of type {type(goes_on).__name__}"
            )
    except Exception as error:
        raise RuntimeError(
            "`reduce` failed at a sync. Slow weights, slow momentum and the inner optimizer's state are as before the "
            "sync. The parameters are the slow weights: the steps since the last sync are lost. Another worker may "
            "have synchronised all the same. Load the last checkpoint in all of them if one may have."
        ) from error
    return goes_on is not False


def _outer_step_of(group: Group, names: Names) -> OuterStep:
    return OuterStep(group[names.slow_step_size], group[names.slow_momentum], group[names.slow_nesterov])


def _places(fast: list[Tensor], state: list[Tensor]) -> _Places:
    return _Places(
        [weight.data_ptr() for weight in state],
        [weight.data_ptr() for weight in fast],
        [weight.shape for weight in fast],
        [weight.stride() for weight in fast],
        [weight.dtype for weight in fast],
    )


def _with_own_memory(weight: Tensor) -> Tensor:
    """Return a tensor that can be changed in place. A tensor that `expand` has made is copied."""
    is_expanded = any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride()))
    return weight.detach().clone(memory_format=torch.contiguous_format) if is_expanded else weight


def _takes_part(parameter: Tensor) -> bool:
    """Return whether a parameter may move: it is not frozen, and it is materialized."""
    return (parameter.requires_grad or parameter.grad is not None) and not is_lazy(parameter)
