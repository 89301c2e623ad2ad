"""The `Lookahead` optimizer."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim.torch import _foreach
from lookahead_optim.torch._fsdp import gathered_anew
from lookahead_optim.torch._state import State

__all__ = ["Lookahead"]


class Lookahead(Optimizer):
    r"""Lookahead: `k` steps forward, one step back.

    Wraps an optimizer, which moves the parameters, the *fast* weights $\theta$. After every `sync_period` ($k$) of
    its steps a second copy of them, the *slow* weights $\phi$, takes a step towards the fast ones, and these restart
    from there:

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.$$

    The slow weights are captured from the parameters immediately before their first step, those of a frozen parameter
    before the first one after it is unfrozen. Steps that a `torch.amp.GradScaler` skips do not count. At a sync every
    parameter takes part that is not frozen then, with or without a gradient. State takes one copy of the parameters.

    `param_groups` is the inner optimizer's own list. `sync_period` and `slow_step_size` are in the groups, so that they
    can differ between them, and a group's step count, `lookahead_step`, too. `state[parameter]` has the inner
    optimizer's entries and `"slow"`, the slow weight: a tensor of the parameter's shape, dtype, device and sharding.
    Checkpoints are those of any `torch.optim.Optimizer`. One of the bare inner optimizer can be loaded too: the slow
    weights are then captured again.

    A `Lookahead` may be inside another. Both count the steps of the innermost optimizer, and all weights restart from
    those that the outer one has synchronised, the inner one's slow weights too. The outer one's names in groups and
    state end in `_2`.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer` that is not `differentiable`. Its groups may have
            a `sync_period` and `slow_step_size` of their own.
        sync_period: Integer >= 0, inner steps per slow step ($k$). 0 switches Lookahead off: the wrapper then
            behaves as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$). 1 recovers the inner optimizer.
            Defaults to 0.5.

    Raises:
        TypeError: if `optimizer`, `sync_period` or `slow_step_size` has the wrong type.
        ValueError: if a value is out of range, or the inner optimizer is `differentiable`.

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
    _slow: dict[Tensor, dict[str, Tensor]]
    _suffix: str
    _plans: dict[int, _foreach.Plan]
    _blocks: list[None]

    def __init__(self, optimizer: Optimizer, sync_period: int = 6, slow_step_size: float = 0.5) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "`optimizer` must be an instance of `torch.optim.Optimizer`, made with the parameters to optimize. "
                f"Received: optimizer={optimizer!r} of type {type(optimizer).__name__}"
            )
        if optimizer.defaults.get("differentiable"):
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
        suffix = f"_{level}" if level > 1 else ""
        settings = {
            f"sync_period{suffix}": check_sync_period(sync_period),
            f"slow_step_size{suffix}": check_slow_step_size(slow_step_size),
        }
        for group in optimizer.param_groups:
            # Left by another wrapper of the same optimizer.
            if group.pop(f"lookahead_step{suffix}", None) is not None:
                for name in settings:
                    group.pop(name, None)
        _check_groups(optimizer.param_groups, suffix)
        # The base class' constructor would make groups of its own. This is how it restores an optimizer without it.
        self.__setstate__(
            {
                "inner_optimizer": optimizer,
                "defaults": {**optimizer.defaults, **settings},
                "_slow": {},
                "_suffix": suffix,
            }
        )
        self._adopt_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        # A list, as tools that copy an optimizer's attributes into an object of theirs then share it.
        self._blocks = []
        name = f"lookahead_step{self._suffix}"
        for group in self.param_groups:
            if name in group:
                # PyTorch sends tensors to other processes in shared memory.
                group[name] = group[name].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("inner_optimizer", "defaults", "_slow", "_suffix")}

    def __repr__(self) -> str:
        return f"{type(self).__name__} ({self.inner_optimizer!r})"

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
        return State(self.inner_optimizer.state, self._slow, f"slow{self._suffix}", self._plans.clear)

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        entries = {parameter: dict(entry) for parameter, entry in state.items()}
        self.state.clear()
        self.state.update(entries)

    def _adopt_groups(self) -> None:
        """Complete groups that the inner optimizer has got by itself, or from a checkpoint."""
        for group in self.param_groups:
            for name in (f"sync_period{self._suffix}", f"slow_step_size{self._suffix}"):
                group.setdefault(name, self.defaults[name])
            # A tensor, as `torch.compile` would compile a step anew for every value of a number.
            name = f"lookahead_step{self._suffix}"
            group[name] = torch.as_tensor(group.get(name, 0), dtype=torch.int64, device="cpu")

    def _is_active(self, group: dict[str, Any]) -> bool:
        return bool(group[f"sync_period{self._suffix}"])

    def _is_due(self, group: dict[str, Any]) -> bool:
        period = group[f"sync_period{self._suffix}"]
        return bool(period) and int(group[f"lookahead_step{self._suffix}"]) % period == 0

    def _active_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if self._is_active(group)]

    def _capture(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for parameter in group["params"]:
                if parameter not in self._slow and _takes_part(parameter):
                    self._slow[parameter] = {f"slow{self._suffix}": parameter.detach().clone()}

    def _pairs(self, groups: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the fast and slow weights that take part in a sync, of a `DTensor` this process' shard.

        The slow weights follow the fast ones in device and dtype.
        """
        name = f"slow{self._suffix}"
        pairs = [
            (one, entry[name])
            for group in groups
            for one in dict.fromkeys(group["params"])
            if (entry := self._slow.get(one)) is not None and (one.requires_grad or one.grad is not None)
        ]
        fast, slow = [one for one, _ in pairs], [one for _, one in pairs]
        if not _foreach.alike(fast, slow):
            for one, other in pairs:
                if one.shape != other.shape:
                    raise RuntimeError(
                        f"A parameter of shape {tuple(one.shape)} has a slow weight of shape {tuple(other.shape)}, as "
                        "its data was replaced. Call `optimizer.reset_slow_weights()` after that."
                    )
            slow = [other.to(one.device, one.dtype) for one, other in pairs]
            for one, other in zip(fast, slow):
                self._slow[one][name] = other
        with torch.no_grad():
            return _foreach.local(fast), _foreach.local(slow)

    def _plan(self, index: int, group: dict[str, Any]) -> _foreach.Plan:
        """Return the pairs of a group for `foreach` operations: those of its last sync, if they still hold."""
        parameters = group["params"]
        plan = self._plans.pop(index, None)
        if plan is not None and plan.holds(parameters):
            self._plans[index] = plan
            return plan
        fast, slow = self._pairs([group])
        plan = _foreach.make_plan(fast, slow)
        # Not if some do not take part, or have shards.
        if len(fast) == len(parameters) and all(one is other for one, other in zip(fast, parameters)):
            self._plans[index] = plan
        return plan

    @torch.no_grad()
    def _synchronize(self, is_due: Callable[[dict[str, Any]], bool]) -> None:
        due = [(index, group) for index, group in enumerate(self.param_groups) if is_due(group)]
        # What can fail comes first.
        plans = [self._plan(index, group) for index, group in due]
        restarts = [inner._pairs([group for _, group in due]) for inner in _chain(self.inner_optimizer)]
        step_sizes = [group[f"slow_step_size{self._suffix}"] for _, group in due]
        batches = [(step_size, *batch) for step_size, plan in zip(step_sizes, plans) for batch in plan.batches]
        # Weights that share memory must all have been read before one of them is written.
        for together in [batches] if _foreach.share_memory(plans) else [[one] for one in batches]:
            for step_size, fast, slow in together:
                torch._foreach_lerp_(slow, fast, step_size)
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
        groups = self._active_groups()
        if len(self._slow) != sum(len(group["params"]) for group in groups):
            for group in self.param_groups:
                if not self._is_active(group):
                    for parameter in group["params"]:
                        self.state.forget(parameter)
            self._capture(groups)

    @torch.compiler.disable
    def _end_step(self) -> None:
        for group in self.param_groups:
            # Not in place: `ZeroRedundancyOptimizer` and users copy groups.
            group[f"lookahead_step{self._suffix}"] = group[f"lookahead_step{self._suffix}"] + 1
        self._synchronize(self._is_due)

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
            _check_groups([param_group], self._suffix)
            param_group.pop(f"lookahead_step{self._suffix}", None)
        self.inner_optimizer.add_param_group(param_group)
        self._adopt_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with `"slow"` for each parameter that has a slow weight.

        As always in PyTorch, the tensors are the optimizer's own: copy them to keep them.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.inner_optimizer.state_dict()
        state, groups = dict(state_dict["state"]), []
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            name = f"lookahead_step{self._suffix}"
            groups.append({**saved, name: int(saved.get(name, 0))})
            for parameter, index in zip(group["params"], saved["params"]):
                if parameter in self._slow:
                    state[index] = {**state.get(index, {}), **self._slow[parameter]}
        state_dict = {**state_dict, "state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the bare inner one: slow weights it lacks are captured again.

        Args:
            state_dict: Dictionary, as from `state_dict`. Its slow weights are copied.

        Raises:
            ValueError: if it does not fit: in the number of groups, of their parameters, the shape of a slow weight, or
                with an invalid setting. The optimizer is as before then.
            RuntimeError: inside a `slow_weights()` block.
        """
        self._check_not_in_slow_weights("load_state_dict(state_dict)")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        saved_groups, groups = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
            raise ValueError(
                "`state_dict` must have the optimizer's groups, with "
                f"{[len(group['params']) for group in groups]} parameters. Received: groups with "
                f"{[len(group['params']) for group in saved_groups]} parameters"
            )
        _check_groups(saved_groups, self._suffix)
        name = f"slow{self._suffix}"
        state, slow_weights = dict(state_dict["state"]), {}
        for group, saved in zip(groups, saved_groups):
            for parameter, index in zip(group["params"], saved["params"]):
                if name not in state.get(index, {}):
                    continue
                slow = state[index][name]
                if slow.shape != parameter.shape:
                    raise ValueError(
                        f"`state_dict` must have a slow weight of shape {tuple(parameter.shape)} for parameter "
                        f"{index}. Received: shape {tuple(slow.shape)}"
                    )
                slow_weights[parameter] = slow
                # An inner optimizer may take any entry at all for a sign that its own are there.
                state[index] = {key: value for key, value in state[index].items() if key != name}
                if not state[index]:
                    del state[index]
        settings = [
            {key: group[key] for key in (f"sync_period{self._suffix}", f"slow_step_size{self._suffix}")}
            for group in groups
        ]
        self.inner_optimizer.load_state_dict({**state_dict, "state": state})
        for group, kept in zip(self.param_groups, settings):
            group.update({**kept, **group})
        self._adopt_groups()
        self._forget_slow_weights()
        for parameter, slow in slow_weights.items():
            self._slow[parameter] = {name: slow.detach().to(parameter.device, parameter.dtype, copy=True)}
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def share_memory(self) -> None:
        """Move the state to shared memory, that of the inner optimizer if it can do that (`torch.optim.Adagrad`).

        The slow weights are captured now, so weights must be loaded before. Each process counts its own steps.
        """
        self._adopt_groups()
        self._capture(self._active_groups())
        for entry in self._slow.values():
            entry[f"slow{self._suffix}"].share_memory_()
        if hasattr(self.inner_optimizer, "share_memory"):
            self.inner_optimizer.share_memory()

    def sync(self) -> None:
        """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or if a parameter has changed its shape.
        """
        self._check_not_in_slow_weights("sync()")
        self._adopt_groups()
        self._synchronize(self._is_active)

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the parameters again, after restoring the best weights, say.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        self._check_not_in_slow_weights("reset_slow_weights()")
        for optimizer in _chain(self):
            optimizer._adopt_groups()
            optimizer._forget_slow_weights()
            optimizer._capture([group for group in optimizer._active_groups() if optimizer._has_stepped(group)])

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Context manager that runs a block, an evaluation or an export, with the slow weights in the parameters.

        The fast weights come back bit for bit, whatever happens in the block; until then a copy of them takes the
        memory of one more set of parameters. A block inside a block changes nothing; training in one is refused.

        Raises:
            RuntimeError: if a parameter has changed its shape.
        """
        if self._blocks:
            yield
            return
        self._adopt_groups()
        fast_weights, slow_weights = self._pairs(self._active_groups())
        kept = [fast.detach().clone() for fast in fast_weights]
        self._blocks.append(None)
        try:
            _foreach.copy(fast_weights, slow_weights)
            with gathered_anew(self._slow):
                yield
        finally:
            _foreach.copy(fast_weights, kept)
            self._blocks.clear()

    def _forget_slow_weights(self) -> None:
        self._slow.clear()
        self._plans.clear()

    def _has_stepped(self, group: dict[str, Any]) -> bool:
        return bool(group[f"lookahead_step{self._suffix}"])

    def _check_not_in_slow_weights(self, caller: str) -> None:
        if any(optimizer._blocks for optimizer in _chain(self)):
            raise RuntimeError(
                f"`{caller}` was called inside a `slow_weights()` block, at whose end the fast weights come back. Call "
                "it after the block."
            )


def _chain(optimizer: Optimizer) -> Iterator[Lookahead]:
    """Yield the `Lookahead` that `optimizer` is, the one inside it, and so on."""
    while isinstance(optimizer, Lookahead):
        yield optimizer
        optimizer = optimizer.inner_optimizer


def _check_groups(groups: Iterable[dict[str, Any]], suffix: str) -> None:
    """Raise an error if a group has an invalid setting of its own."""
    for group in groups:
        check_sync_period(group.get(f"sync_period{suffix}", 0))
        check_slow_step_size(group.get(f"slow_step_size{suffix}", 0.0))


def _takes_part(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None
