"""The `Lookahead` optimizer."""

import contextlib
import dataclasses
import numbers
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim.torch import _foreach
from lookahead_optim.torch._fsdp import gathered_anew
from lookahead_optim.torch._ranks import check_equal_on_all_ranks
from lookahead_optim.torch._slow_weights import SlowWeights, check_shape
from lookahead_optim.torch._state_view import State

__all__ = ["Lookahead"]


_OF_THE_INNER_OPTIMIZER = ("defaults", "param_groups", "state")
_OWN_SETTING = r"(sync_period|slow_step_size|lookahead_step)(_\d+)?"
# That of an int64, in which other tools may keep it.
_LARGEST_COUNT = 2**63


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
    optimizer's entries and `"slow"`, a copy of the slow weight: a tensor of the parameter's shape, dtype, device and
    sharding. Checkpoints are those of any `torch.optim.Optimizer`. One of the bare inner optimizer can be loaded too:
    the slow weights are then captured again.

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
    # These objects stay the same, as tools copy an optimizer's attributes into an object of theirs.
    _slow: SlowWeights
    _blocks: list["_Block"]
    _lock: Any
    # With the settings of other processes, since the optimizer was made or loaded.
    _is_compared: bool

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
            if isinstance(entries, dict):
                entries.pop(names.slow, None)
        optimizer.defaults = {**optimizer.defaults, **settings}
        # The base class' constructor would make groups of its own. This is how it restores an optimizer without it.
        self.__setstate__({"inner_optimizer": optimizer, "_names": names, "_slow": SlowWeights(names.slow)})
        self._adopt_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # These belong to the inner optimizer, where their properties put them.
        others = {name: value for name, value in state.items() if name not in _OF_THE_INNER_OPTIMIZER}
        super().__setstate__(others)
        if "inner_optimizer" in others:
            self._is_compared = False
            inner = self.inner_optimizer
            if isinstance(inner, Lookahead):
                self._blocks, self._lock = inner._blocks, inner._lock
            else:
                self._blocks, self._lock = [], threading.RLock()
        for name in _OF_THE_INNER_OPTIMIZER:
            if name in state:
                setattr(self, name, state[name])

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("inner_optimizer", "_names", "_slow")}

    def __getattr__(self, name: str) -> Any:
        """Return what only the inner optimizer has: `train` and `eval` of `schedulefree`, for example."""
        # Not what begins with an underscore: tools ask there for what the wrapper itself would have to do.
        if name in _Names._fields:
            raise AttributeError(
                f"`Lookahead` has no attribute `{name}`: it is a setting of each group, in `optimizer.param_groups`."
            )
        if name.startswith("_") or "inner_optimizer" not in self.__dict__:
            object.__getattribute__(self, name)  # raises Python's own error
        return getattr(self.inner_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _Names._fields:
            raise AttributeError(
                f"`{name}` is a setting of each group: set it in `optimizer.param_groups`. Received: {name}={value!r}"
            )
        inner = self.__dict__.get("inner_optimizer")
        is_own = inner is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        # What is read from the inner optimizer is set there, too.
        super().__setattr__(name, value) if is_own or not hasattr(inner, name) else setattr(inner, name, value)

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
        """A live view: for each parameter the inner optimizer's entries and a copy of the slow weight, `"slow"`."""
        inner, slow, view = self.inner_optimizer.state, self._slow, self.__dict__.get("_state")
        # The same object as long as it shows the optimizer's state. One that was kept shows the state of its time.
        if view is None or view.inner is not inner or view.slow_by_parameter is not slow.by_parameter:
            view = self.__dict__["_state"] = State(inner, slow)
        return view

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        if not (isinstance(state, State) and state.slow.name == self._slow.name):
            given = state
            inner: defaultdict[Any, Any] = defaultdict(dict)
            has_slow = any(isinstance(entries, Mapping) and self._slow.name in entries for entries in given.values())
            if isinstance(given, defaultdict) and not has_slow:
                inner = given
            state = State(inner, self._slow, {})
            if inner is not given:
                state.update(given)
        self.inner_optimizer.state = state.inner  # type: ignore[assignment]
        self._slow.replace(state.slow_by_parameter)

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
                    self._slow.forget(parameter)
                group[names.lookahead_step] = 0
            count = group[names.lookahead_step]
            if type(count) is not int or not 0 <= count < _LARGEST_COUNT:
                group[names.lookahead_step] = _check_count(count, names.lookahead_step)

    def _active_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group[self._names.sync_period]]

    def _is_due(self, group: dict[str, Any], count: int) -> bool:
        period = group[self._names.sync_period]
        return bool(period) and count % period == 0

    @torch.no_grad()
    def _synchronize(self, due: list[tuple[int, dict[str, Any]]]) -> None:
        # What can fail comes first.
        plans = [self._slow.plan(index, group) for index, group in due]
        restarts = [inner._slow.pairs(due) for inner in _chain(self.inner_optimizer)]
        self._slow.synchronize(plans, [group[self._names.slow_step_size] for _, group in due])
        for slow, fast in restarts:
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
        name = self._names.lookahead_step
        due = [(index, group) for index, group in enumerate(self.param_groups) if self._is_due(group, group[name] + 1)]
        if due:
            for optimizer in _chain(self):
                optimizer._slow.check_shapes(due)
        if not self._is_compared:
            check_equal_on_all_ranks(self.param_groups, self._names)
            self._is_compared = True
        self._slow.capture_new(self._active_groups(), name)

    @torch.compiler.disable
    def _end_step(self) -> None:
        name, due = self._names.lookahead_step, []
        if not all(name in group for group in self.param_groups):
            # The inner optimizer got a group in its step.
            self._adopt_groups()
        for index, group in enumerate(self.param_groups):
            # Not in place: `ZeroRedundancyOptimizer` and users copy groups.
            group[name] += 1
            if self._is_due(group, group[name]):
                due.append((index, group))
                if not all(one.requires_grad for one in group["params"]):
                    self._slow.drop_frozen(group["params"])
        if due:
            self._synchronize(due)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Let the inner optimizer make one step and, after every `sync_period` of them, synchronise.

        Args:
            closure: Function that evaluates the model again and returns the loss, for inner optimizers that take one.
                A step counts once, however often they call it.
            **kwargs: What the inner optimizer's `step` takes besides.

        Returns:
            What the inner optimizer returns: the loss if there is a `closure`.

        Raises:
            TypeError, ValueError: if a group has an invalid setting or count.
            RuntimeError: inside a `slow_weights()` block, in the capture of a CUDA graph, or at a sync if a parameter
                has changed its shape.
        """
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is not None:
                args, kwargs = result
        # A block in another thread waits for the end of the step.
        with self._lock:
            self._begin_step()
            loss = self.inner_optimizer.step(*args[1:], **kwargs)
            self._end_step()
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return loss

    # The base class would wrap `step` in a function that calls hooks. It calls those that are registered for all
    # optimizers, too, which the inner optimizer's `step` does already: each of them is to run once.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        # Some optimizers take no argument.
        self.inner_optimizer.zero_grad() if set_to_none else self.inner_optimizer.zero_grad(set_to_none)

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
        groups = [dict(saved) for saved in state_dict["param_groups"]]
        state = dict(state_dict["state"])
        for group, saved in zip(self.param_groups, groups):
            indices = dict(zip(group["params"], saved["params"]))
            keeps_state = any(isinstance(one, Mapping) and one for one in map(state.get, indices.values()))
            for parameter, index in indices.items():
                slow = self._slow.by_parameter.get(parameter)
                # Most inner optimizers refuse an entry in which nothing is theirs. They make none for a parameter that
                # has had no gradient, and its slow weight is captured again from where the parameter still is.
                entries = state.get(index, {})
                is_plain = keeps_state and not self._blocks and isinstance(entries, Mapping) and not entries
                if slow is None or not isinstance(entries, Mapping) or (is_plain and _are_same(slow, parameter)):
                    continue
                state[index] = {**entries, self._names.slow: slow}
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
                weight, with an invalid setting, or as it is that of another inner optimizer. The optimizer is as before
                then.
            RuntimeError: inside a `slow_weights()` block.
        """
        self._check_not_in_slow_weights("load_state_dict(state_dict)")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        state, slow_weights = self._check_state_dict(state_dict)
        names = self._names
        kept = [
            {name: group[name] for name in (names.sync_period, names.slow_step_size)} for group in self.param_groups
        ]
        before, settings_before = dict(vars(self.inner_optimizer)), [set(group) for group in self.param_groups]
        try:
            self.inner_optimizer.load_state_dict({**state_dict, "state": state})
            self._check_loaded_groups(settings_before)
        except Exception as error:
            vars(self.inner_optimizer).clear()
            vars(self.inner_optimizer).update(before)
            if isinstance(self.inner_optimizer, Lookahead) and isinstance(error, (TypeError, ValueError)):
                raise
            name = type(self.inner_optimizer).__name__
            raise ValueError(
                f"`state_dict` must come from a `Lookahead` around a {name}, or from that optimizer alone. "
                f"Received: one that it cannot load ({type(error).__name__}: {error})"
            ) from error
        for group, settings in zip(self.param_groups, kept):
            group.update({**settings, **group})
        self._adopt_groups()
        self._slow.load(slow_weights)
        self._is_compared = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> tuple[dict[Any, Any], dict[Tensor, Tensor]]:
        """Return the inner optimizer's state and the slow weights in a state dict, or raise an error."""
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
                if not isinstance(entries, Mapping):
                    continue
                slow = entries.get(names.slow)
                if slow is not None:
                    check_shape(slow, parameter, index)
                    slow = slow.to_dense() if slow.layout is not torch.strided else slow
                    # In the dtype in which it was saved: the parameters may get it back before they are trained.
                    slow_weights[parameter] = slow.detach().to(parameter.device, copy=True)
                # An inner optimizer may take any entry at all for a sign that its own are there.
                entries = {key: value for key, value in entries.items() if not self._is_slow(key)}
                if entries:
                    state[index] = entries
                else:
                    state.pop(index, None)
        return state, slow_weights

    def _check_loaded_groups(self, settings_before: list[set[str]]) -> None:
        """Raise an error if a loaded group lacks a setting: it is that of another class, whose next step would fail."""
        for group, before in zip(self.param_groups, settings_before):
            needed = before & set(self.defaults) - set(group)
            missing = sorted(name for name in needed if not re.fullmatch(_OWN_SETTING, name))
            if missing:
                raise ValueError(f"its groups have no {missing}")

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
        self._slow.capture_new(self._active_groups(), self._names.lookahead_step)
        for slow in self._slow.by_parameter.values():
            slow.share_memory_()
        if hasattr(self.inner_optimizer, "share_memory"):
            self.inner_optimizer.share_memory()

    def sync(self) -> None:
        """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or if a parameter has changed its shape.
        """
        with self._lock:
            self._check_not_in_slow_weights("sync()")
            self._adopt_groups()
            groups = enumerate(self.param_groups)
            self._synchronize([(index, group) for index, group in groups if group[self._names.sync_period]])

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the parameters again, after restoring the best weights, say.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        with self._lock:
            self._check_not_in_slow_weights("reset_slow_weights()")
            for optimizer in _chain(self):
                optimizer._adopt_groups()
                name = optimizer._names.lookahead_step
                stepped = [group for group in optimizer._active_groups() if group[name]]
                optimizer._slow.replace({})
                optimizer._slow.capture([one for group in stepped for one in group["params"]], set())

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Context manager that runs a block, an evaluation or an export, with the slow weights in the parameters.

        The fast weights come back bit for bit, whatever happens in the block; until then a copy of them takes the
        memory of one more set of parameters. A block inside a block changes nothing; training in one is refused. A copy
        of model and optimizer made in a block has the slow weights alone.

        A block that one thread opens while another one makes a step begins when the step has ended.

        Raises:
            RuntimeError: if a parameter has changed its shape, before the block or in it.
        """
        block = _Block(self._names.slow)
        with self._lock:
            if any(one.name == block.name for one in self._blocks):
                self._blocks.append(block)
            else:
                self._swap_in(block)
        try:
            with gathered_anew(self._slow.by_parameter):
                yield
        finally:
            with self._lock:
                self._swap_out(block)

    def _swap_in(self, block: "_Block") -> None:
        """Put the slow weights into the parameters, and what these were into the block."""
        self._adopt_groups()
        self._slow.check_shapes(enumerate(self.param_groups))
        parameters = dict.fromkeys(one for group in self.param_groups for one in group["params"] if not is_lazy(one))
        block.fast = _foreach.local(list(parameters))
        block.kept = [fast.detach().clone() for fast in block.fast]
        pairs = [(one, slow) for one in parameters if (slow := self._slow.by_parameter.get(one)) is not None]
        self._blocks.append(block)
        try:
            # Rounded, if the parameters have another dtype now; the slow weights themselves keep their own.
            _foreach.copy(_foreach.local([one for one, _ in pairs]), _foreach.local([slow for _, slow in pairs]))
        except BaseException:
            self._swap_out(block)
            raise

    def _swap_out(self, block: "_Block") -> None:
        """Put back what a block keeps, or leave that to a block which began later and has not ended yet."""
        later = self._blocks[self._blocks.index(block) + 1 :]
        self._blocks.remove(block)
        if not block.kept:
            return
        if later:
            heir = next((one for one in later if one.kept), later[0])
            heir.fast, heir.kept = block.fast, block.kept
            return
        fitting = [(fast, value) for fast, value in zip(block.fast, block.kept) if fast.shape == value.shape]
        _foreach.copy([fast for fast, _ in fitting], [value for _, value in fitting])
        if len(fitting) < len(block.kept):
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


@dataclasses.dataclass(eq=False)
class _Block:
    """A `slow_weights()` block that is open, and the fast weights that it puts back; none inside another one."""

    name: str
    fast: list[Tensor] = dataclasses.field(default_factory=list)
    kept: list[Tensor] = dataclasses.field(default_factory=list)


def _chain(optimizer: Optimizer) -> Iterator[Lookahead]:
    """Yield the `Lookahead` that `optimizer` is, the one inside it, and so on."""
    while isinstance(optimizer, Lookahead):
        yield optimizer
        optimizer = optimizer.inner_optimizer


def _check_group(group: dict[str, Any], names: _Names) -> None:
    """Raise an error if a group has an invalid setting or count of its own."""
    check_sync_period(group.get(names.sync_period, 0))
    check_slow_step_size(group.get(names.slow_step_size, 0.0))
    _check_count(group.get(names.lookahead_step, 0), names.lookahead_step)


def _check_count(count: Any, name: str) -> int:
    """Return a count of steps as an `int`, or raise an error."""
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 0 <= int(count) < _LARGEST_COUNT:
        raise ValueError(f"`{name}` must be an integer >= 0, the number of steps. Received: {count!r}")
    return int(count)


def _are_same(slow: Tensor, parameter: Tensor) -> bool:
    (slow,), (fast,) = _foreach.local([slow]), _foreach.local([parameter])
    return slow.dtype == fast.dtype and slow.device == fast.device and torch.equal(slow, fast)
