"""The `Lookahead` optimizer."""

import contextlib
import itertools
import numbers
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim._torch import move
from lookahead_optim.torch import _foreach
from lookahead_optim.torch._fsdp import gathered_anew
from lookahead_optim.torch._state import State

__all__ = ["Lookahead"]


class _Names(NamedTuple):
    """What a wrapper calls its entries in groups and state."""

    sync_period: str
    slow_step_size: str
    lookahead_step: str
    slow: str


class Lookahead(Optimizer):
    r"""Lookahead: `k` steps forward, one step back.

    Wraps an optimizer, which moves the parameters, the *fast* weights $\theta$. After every `sync_period` ($k$) of
    its steps a second copy of them, the *slow* weights $\phi$, takes a step towards the fast ones, and these restart
    from there:

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.$$

    The slow weights are captured from the parameters immediately before their first step. Steps that a
    `torch.amp.GradScaler` skips do not count. At a sync every parameter takes part, with or without a gradient, but
    one that is frozen then (without a gradient, and `requires_grad` is `False`) gives its slow weight up: it is
    captured again before its first step after it is unfrozen. State takes one copy of the other parameters.

    `param_groups` is the inner optimizer's own list. `sync_period` and `slow_step_size` are in the groups, so that they
    can differ between them, and a group's step count, `lookahead_step`, too. `state[parameter]` has the inner
    optimizer's entries and `"slow"`, the slow weight: a tensor of the parameter's shape, dtype, device and sharding.
    Checkpoints are those of any `torch.optim.Optimizer`. One of the bare inner optimizer can be loaded too: the slow
    weights are then captured again.

    A `Lookahead` may be inside another. Both count the steps of the innermost optimizer, and all weights restart from
    those that the outer one has synchronised, the inner one's slow weights too. The outer one's names in groups and
    state end in `_2`. An optimizer that was wrapped before can be wrapped again, and takes the new settings.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer` that is not `differentiable`. Its groups may have
            a `sync_period` and `slow_step_size` of their own.
        sync_period: Integer >= 0, inner steps per slow step ($k$). 0 switches Lookahead off: the wrapper then
            behaves as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$). 1 recovers the inner optimizer.
            Defaults to 0.5.

    Raises:
        TypeError: if `optimizer`, `sync_period` or `slow_step_size` has the wrong type.
        ValueError: if a value is out of range, or the inner optimizer is `differentiable` or has a `Lookahead` inside a
            wrapper of another kind.

    Example:

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), sync_period=5, slow_step_size=0.5)
    >>> for _ in range(5):
    ...     loss = model(torch.ones(8, 3)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> torch.equal(optimizer.state[model.weight]["slow"], model.weight)
    True
    >>> with optimizer.slow_weights():
    ...     prediction = model(torch.ones(1, 3))

    References:
        Zhang, Lucas, Hinton and Ba, [Lookahead Optimizer: k steps forward, 1 step
        back](https://arxiv.org/abs/1907.08610), 2019, Algorithm 1.
    """

    inner_optimizer: Optimizer
    _names: _Names
    _slow: dict[Tensor, dict[str, Tensor]]
    # What follows is only ever changed in place, as tools copy an optimizer's attributes into an object of theirs.
    _members: list[Tensor]
    _waiting: list[Tensor]
    _plans: dict[int, _foreach.Plan]
    _blocks: list[str]

    def __init__(self, optimizer: Optimizer, sync_period: int = 6, slow_step_size: float = 0.5) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "`optimizer` must be an instance of `torch.optim.Optimizer`, made with the parameters to optimize. "
                f"Received: optimizer={optimizer!r} of type {type(optimizer).__name__}"
            )
        if any(settings.get("differentiable") for settings in (optimizer.defaults, *optimizer.param_groups)):
            raise ValueError(
                "`optimizer` must not be differentiable, as the slow step is not. Pass `differentiable=False` to it. "
                f"Received: optimizer={type(optimizer).__name__}(..., differentiable=True)"
            )
        if not isinstance(optimizer, Lookahead) and any(isinstance(one, Lookahead) for one in vars(optimizer).values()):
            raise ValueError(
                "`optimizer` must not have a `Lookahead` inside a wrapper of another kind, which it could not restart. "
                "Put one directly around the other. "
                f"Received: optimizer={type(optimizer).__name__}(...) around a Lookahead"
            )
        level = 1 + sum(1 for _ in _chain(optimizer))
        names = _Names(*(name if level == 1 else f"{name}_{level}" for name in _Names._fields))
        settings = {
            names.sync_period: check_sync_period(sync_period),
            names.slow_step_size: check_slow_step_size(slow_step_size),
        }
        for group in optimizer.param_groups:
            if names.lookahead_step not in group:
                _check_group(group, names)
        for group in optimizer.param_groups:
            # Left by another wrapper of the same optimizer.
            if names.lookahead_step in group:
                for name in names:
                    group.pop(name, None)
        for entries in optimizer.state.values():
            entries.pop(names.slow, None)
        optimizer.defaults = {**optimizer.defaults, **settings}
        # The base class' constructor would make groups of its own. This is how it restores an optimizer without it.
        self.__setstate__({"inner_optimizer": optimizer, "_names": names, "_slow": {}})
        self._adopt_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        inner = self.inner_optimizer
        self._members, self._waiting, self._plans = [], [], {}
        self._blocks = inner._blocks if isinstance(inner, Lookahead) else []
        for group in self.param_groups:
            if self._names.lookahead_step in group:
                # PyTorch sends tensors to other processes in shared memory.
                group[self._names.lookahead_step] = group[self._names.lookahead_step].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("inner_optimizer", "_names", "_slow")}

    def __repr__(self) -> str:
        return f"{type(self).__name__} ({self.inner_optimizer!r})"

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's own defaults for parameter groups, with `sync_period` and `slow_step_size`."""
        return self.inner_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        own = {name: self.defaults[name] for name in (self._names.sync_period, self._names.slow_step_size)}
        self.inner_optimizer.defaults = {**own, **defaults}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's own list of parameter groups."""
        return self.inner_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.inner_optimizer.param_groups = param_groups

    @property  # type: ignore[override]
    def state(self) -> State:
        """A live view: for each parameter the inner optimizer's entries and `"slow"`, the slow weight."""
        return State(self.inner_optimizer.state, self._slow, self._names.slow, self._changed)

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        entries = {parameter: dict(entry) for parameter, entry in state.items()}
        self.state.clear()
        self.state.update(entries)

    def _changed(self) -> None:
        """Forget what was derived from the slow weights."""
        self._members.clear()
        self._plans.clear()

    def _adopt_groups(self) -> None:
        """Check groups and complete those that the inner optimizer has got by itself, or from a checkpoint."""
        names = self._names
        for group in self.param_groups:
            period = group.setdefault(names.sync_period, self.defaults[names.sync_period])
            step_size = group.setdefault(names.slow_step_size, self.defaults[names.slow_step_size])
            if type(period) is not int or period < 0:
                group[names.sync_period] = check_sync_period(period)
            if type(step_size) is not float or not 0 <= step_size < float("inf"):
                group[names.slow_step_size] = check_slow_step_size(step_size)
            if names.lookahead_step not in group:
                for parameter in group["params"]:
                    if parameter in self._slow:
                        self.state.forget(parameter)
            # A tensor, as `torch.compile` would compile a step anew for every value of a number.
            count = group.get(names.lookahead_step, 0)
            if type(count) is not Tensor or not count.is_cpu:
                group[names.lookahead_step] = torch.as_tensor(count, dtype=torch.int64, device="cpu")

    def _active_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group[self._names.sync_period]]

    def _capture_new(self) -> None:
        """Capture the slow weights of parameters that are new, or not frozen any more."""
        members = list(itertools.chain.from_iterable(group["params"] for group in self._active_groups()))
        if (
            len(members) != len(self._members)
            or (self._slow and not members)
            or not all(map(operator.is_, members, self._members))
            or any(one.requires_grad or one.grad is not None for one in self._waiting)
        ):
            self._capture(members)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, members: list[Tensor]) -> None:
        known = set(members)
        for parameter in [one for one in self._slow if one not in known]:
            self.state.forget(parameter)
        for parameter in members:
            if parameter not in self._slow and _takes_part(parameter):
                self._slow[parameter] = {self._names.slow: parameter.detach().clone()}
        self._changed()
        self._members.extend(members)
        self._waiting[:] = [one for one in members if one not in self._slow]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _pairs(self, groups: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the fast weights that have slow ones, and these, of a `DTensor` this process' shard.

        The slow weights follow the fast ones in device and dtype.
        """
        name = self._names.slow
        parameters = dict.fromkeys(one for group in groups for one in group["params"] if one in self._slow)
        pairs = [(one, self._slow[one][name]) for one in parameters]
        for fast, slow in pairs:
            if fast.shape != slow.shape:
                raise RuntimeError(
                    f"A parameter of shape {tuple(fast.shape)} has a slow weight of shape {tuple(slow.shape)}, as its "
                    "data was replaced. Call `optimizer.reset_slow_weights()` after that."
                )
        for fast, slow in pairs:
            if (fast.dtype, fast.device) != (slow.dtype, slow.device):
                self._slow[fast][name] = slow.to(fast.device, fast.dtype)
                self._changed()
        return _foreach.local(list(parameters)), _foreach.local([self._slow[one][name] for one in parameters])

    def _plan(self, index: int, group: dict[str, Any]) -> _foreach.Plan:
        """Return the pairs of a group for `foreach` operations: those of its last sync, if they still hold."""
        parameters = group["params"]
        plan = self._plans.get(index)
        if plan is None or not plan.holds(parameters):
            fast, slow = self._pairs([group])
            plan = _foreach.make_plan(fast, slow)
            # Not if some have no slow weight, or have shards.
            if len(fast) == len(parameters) and all(map(operator.is_, fast, parameters)):
                self._plans[index] = plan
        return plan

    @torch.no_grad()
    def _synchronize(self, due: list[tuple[int, dict[str, Any]]]) -> None:
        # What can fail comes first.
        plans = [self._plan(index, group) for index, group in due]
        restarts = [inner._pairs([group for _, group in due]) for inner in _chain(self.inner_optimizer)]
        step_sizes = [group[self._names.slow_step_size] for _, group in due]
        pieces = [(step_size, *piece) for step_size, plan in zip(step_sizes, plans) for piece in plan.pieces]
        # Weights that share memory must all have been read before one of them is written.
        for together in [pieces] if _foreach.share_memory(plans) else [[one] for one in pieces]:
            for step_size, fast, slow in together:
                move(slow, fast, step_size)
            for _, fast, slow in together:
                torch._foreach_copy_(fast, slow)
        for fast, slow in restarts:
            _foreach.copy(slow, fast)

    @torch.compiler.disable
    def _begin_step(self) -> None:
        self._check_not_in_slow_weights("step()")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "`Lookahead.step()` cannot be captured in a CUDA graph: a replay would not count its steps, so that it "
                "would never synchronise, or always. Capture forward and backward pass, and step outside."
            )
        self._adopt_groups()
        self._capture_new()

    @torch.compiler.disable
    def _end_step(self) -> None:
        names, due = self._names, []
        for index, group in enumerate(self.param_groups):
            # Not in place: `ZeroRedundancyOptimizer` and users copy groups.
            count = group[names.lookahead_step] = group[names.lookahead_step] + 1
            period = group[names.sync_period]
            if period and int(count) % period == 0:
                due.append((index, group))
                if not all(one.requires_grad for one in group["params"]):
                    for parameter in group["params"]:
                        if parameter in self._slow and not _takes_part(parameter):
                            self.state.forget(parameter)
        if due:
            self._synchronize(due)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the inner optimizer make one step and, after every `sync_period` of them, synchronise.

        Args:
            closure: Function that evaluates the model again and returns the loss, for inner optimizers that take one.
                A step counts once, however often they call it.

        Returns:
            What the inner optimizer returns: the loss if there is a `closure`.

        Raises:
            RuntimeError: inside a `slow_weights()` block, in the capture of a CUDA graph, or at a sync if a parameter
                has changed its shape.
        """
        self._begin_step()
        loss = self.inner_optimizer.step() if closure is None else self.inner_optimizer.step(closure)
        self._end_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        self.inner_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may have a `sync_period` and `slow_step_size` of its own. Its count starts at 0.

        Raises:
            TypeError, ValueError: if these are invalid, or the inner optimizer does not accept the group.
        """
        if isinstance(param_group, dict):
            param_group.pop(self._names.lookahead_step, None)
            _check_group(param_group, self._names)
        self.inner_optimizer.add_param_group(param_group)
        self._adopt_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with `"slow"` for each parameter that has a slow weight.

        As always in PyTorch, the tensors are the optimizer's own: copy them to keep them.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._adopt_groups()
        state_dict = self.inner_optimizer.state_dict()
        name = self._names.lookahead_step
        groups = [{**saved, name: int(saved[name])} for saved in state_dict["param_groups"]]
        state = dict(state_dict["state"])
        for group, saved in zip(self.param_groups, groups):
            for parameter, index in zip(group["params"], saved["params"]):
                if parameter in self._slow:
                    state[index] = {**state.get(index, {}), **self._slow[parameter]}
        state_dict = {**state_dict, "state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the bare inner one: slow weights it lacks are captured again.

        Args:
            state_dict: Dictionary, as from `state_dict`. Its slow weights are copied.

        Raises:
            TypeError, ValueError: if it does not fit: in the number of groups, of their parameters, the shape of a slow
                weight, or with an invalid setting. The optimizer is as before then.
            RuntimeError: inside a `slow_weights()` block.
        """
        self._check_not_in_slow_weights("load_state_dict(state_dict)")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        saved_groups, groups, names = state_dict["param_groups"], self.param_groups, self._names
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
            raise ValueError(
                "`state_dict` must have the optimizer's groups, with "
                f"{[len(group['params']) for group in groups]} parameters. Received: groups with "
                f"{[len(group['params']) for group in saved_groups]} parameters"
            )
        for group in saved_groups:
            _check_group(group, names)
        state, slow_weights = dict(state_dict["state"]), {}
        for group, saved in zip(groups, saved_groups):
            for parameter, index in zip(group["params"], saved["params"]):
                entries = state.get(index, {})
                slow = entries.get(names.slow)
                if slow is not None:
                    if not isinstance(slow, Tensor) or slow.shape != parameter.shape:
                        received = f"shape {tuple(slow.shape)}" if isinstance(slow, Tensor) else repr(slow)
                        raise ValueError(
                            f"`state_dict` must have a slow weight of shape {tuple(parameter.shape)} for parameter "
                            f"{index}. Received: {received}"
                        )
                    slow_weights[parameter] = slow.detach().to(parameter.device, parameter.dtype, copy=True)
                # An inner optimizer may take any entry at all for a sign that its own are there.
                entries = {key: value for key, value in entries.items() if not self._is_slow(key)}
                if entries:
                    state[index] = entries
                else:
                    state.pop(index, None)
        kept = [{name: group[name] for name in (names.sync_period, names.slow_step_size)} for group in groups]
        self.inner_optimizer.load_state_dict({**state_dict, "state": state})
        for group, settings in zip(self.param_groups, kept):
            group.update({**settings, **group})
        self._adopt_groups()
        self._slow.clear()
        self._changed()
        for parameter, slow in slow_weights.items():
            self._slow[parameter] = {names.slow: slow}
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _is_slow(self, name: str) -> bool:
        """Return whether a saved entry is a slow weight: this wrapper's or, in the innermost one, any wrapper's."""
        if isinstance(self.inner_optimizer, Lookahead):
            return name == self._names.slow
        return isinstance(name, str) and re.fullmatch(r"slow(_\d+)?", name) is not None

    def share_memory(self) -> None:
        """Move the state to shared memory, that of the inner optimizer if it can do that (`torch.optim.Adagrad`).

        The slow weights are captured now, so weights must be loaded before. Each process counts its own steps.
        """
        self._adopt_groups()
        self._capture_new()
        for entry in self._slow.values():
            entry[self._names.slow].share_memory_()
        if hasattr(self.inner_optimizer, "share_memory"):
            self.inner_optimizer.share_memory()

    def sync(self) -> None:
        """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or if a parameter has changed its shape.
        """
        self._check_not_in_slow_weights("sync()")
        self._adopt_groups()
        groups = enumerate(self.param_groups)
        self._synchronize([(index, group) for index, group in groups if group[self._names.sync_period]])

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the parameters again, after restoring the best weights, say.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        self._check_not_in_slow_weights("reset_slow_weights()")
        for optimizer in _chain(self):
            optimizer._adopt_groups()
            stepped = [group for group in optimizer._active_groups() if group[optimizer._names.lookahead_step]]
            optimizer._slow.clear()
            optimizer._capture([one for group in stepped for one in group["params"]])

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Context manager that runs a block, an evaluation or an export, with the slow weights in the parameters.

        The fast weights come back bit for bit, whatever happens in the block; until then a copy of them takes the
        memory of one more set of parameters. A block inside a block changes nothing; training in one is refused. A copy
        of model and optimizer made in a block has the slow weights alone.

        Raises:
            RuntimeError: if a parameter has changed its shape, before the block or in it.
        """
        if self._names.slow in self._blocks:
            yield
            return
        self._adopt_groups()
        fast_weights, slow_weights = self._pairs(self._active_groups())
        kept = [fast.detach().clone() for fast in fast_weights]
        self._blocks.append(self._names.slow)
        try:
            _foreach.copy(fast_weights, slow_weights)
            with gathered_anew(self._slow):
                yield
        finally:
            self._blocks.remove(self._names.slow)
            fitting = [(fast, value) for fast, value in zip(fast_weights, kept) if fast.shape == value.shape]
            _foreach.copy([fast for fast, _ in fitting], [value for _, value in fitting])
            if len(fitting) < len(kept):
                raise RuntimeError(
                    "A parameter changed its shape inside a `slow_weights()` block, so that its fast weights did not "
                    "come back; those of the others did. Change shapes outside of the block."
                )

    def _check_not_in_slow_weights(self, caller: str) -> None:
        if self._blocks:
            raise RuntimeError(
                f"`{caller}` was called inside a `slow_weights()` block, at whose end the fast weights come back. Call "
                "it after the block."
            )


def _chain(optimizer: Optimizer) -> Iterator[Lookahead]:
    """Yield the `Lookahead` that `optimizer` is, the one inside it, and so on."""
    while isinstance(optimizer, Lookahead):
        yield optimizer
        optimizer = optimizer.inner_optimizer


def _check_group(group: dict[str, Any], names: _Names) -> None:
    """Raise an error if a group has an invalid setting or count of its own."""
    check_sync_period(group.get(names.sync_period, 0))
    check_slow_step_size(group.get(names.slow_step_size, 0.0))
    count = group.get(names.lookahead_step, 0)
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
        raise ValueError(f"`{names.lookahead_step}` must be an integer >= 0, the number of steps. Received: {count!r}")


def _takes_part(parameter: Tensor) -> bool:
    return (parameter.requires_grad or parameter.grad is not None) and not is_lazy(parameter)
