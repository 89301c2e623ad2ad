"""The `Lookahead` optimizer: PyTorch's protocol around the inner optimizer and the slow weights.

Where things happen:

- a sync: `step`, `_end_step`, `SlowWeights.synchronize` in `_slow_weights.py`, and the arithmetic in `_interpolate` and
  `_descend` of `_outer_step_torch.py`, or for a large weight on a GPU in the kernel of `_outer_step_triton.py`;
- capture: `_begin_step`, `SlowWeights.capture_new`, for each parameter that has no slow weight and is trained. Slow
  weights are dropped by `SlowWeights.drop_frozen`, `_complete_groups` (of a new group) and `SlowWeights.capture` (of a
  parameter without a sync period);
- what is saved: `state_dict`, `with_slow_weights` in `_checkpoint.py`;
- a skipped step: no call of `step`, so that nothing happens;
- a frozen weight: `_end_step`, `SlowWeights.drop_frozen`. `_takes_part` says which is frozen.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from lookahead_optim._checks import (
    check_slow_momentum,
    check_slow_nesterov,
    check_slow_step_size,
    check_sync_period,
    explain_other_names,
    warn_if_over_relaxed,
    warn_if_within_first_cycle,
)
from lookahead_optim.torch._blocks import Blocks
from lookahead_optim.torch._checkpoint import load_inner, split, with_slow_weights
from lookahead_optim.torch._fsdp import gathered_anew
from lookahead_optim.torch._ranks import check_equal_on_all_ranks
from lookahead_optim.torch._settings import NONE_UNSYNCED, Group, Names, check_group, complete_group
from lookahead_optim.torch._slow_weights import SlowWeights
from lookahead_optim.torch._state_view import State
from lookahead_optim.torch._workers import Average, Reduce, description

__all__ = ["Lookahead"]

_OF_THE_INNER_OPTIMIZER = ("defaults", "param_groups", "state")
_GROUP_ENTRIES = ("sync_period", "slow_step_size", "slow_momentum", "slow_nesterov", "lookahead_step")
# The last wrapper of each inner optimizer, as long as both live.
_wrapper_of: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()


class Lookahead(Optimizer):
    r"""Lookahead: `k` steps forward, one step back.

    Wraps an optimizer, which moves the parameters, the *fast* weights $\theta$. After every `sync_period` ($k$) of
    its steps a second copy of them, the *slow* weights $\phi$, takes a step towards the fast ones, and these restart
    from there:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.

    That is gradient descent of the slow weights on the *pseudo-gradient* $s = \phi - \theta$. With `slow_momentum`
    ($\mu$) it is gradient descent with momentum $b$, as in SNOO and, on one worker, DiLoCo:

    .. math:: b \leftarrow \mu b + s, \qquad \phi \leftarrow \phi - \alpha (s + \mu b), \qquad \theta \leftarrow \phi,

    with $b$ in the place of $s + \mu b$ if not `slow_nesterov`.

    The slow weights are captured from the parameters immediately before their first step. Steps that a
    `torch.amp.GradScaler` skips do not count. When a step synchronises, every parameter takes part, with or without a
    gradient, but one that is frozen then (without a gradient, and `requires_grad` is `False`) loses its slow weight:
    it is captured again before its first step after it is unfrozen. The slow weights need the memory of one more copy
    of the parameters that are not frozen, and slow momentum of another one.

    `param_groups` is the inner optimizer's own list. `sync_period`, `slow_step_size`, `slow_momentum` and
    `slow_nesterov` are in the groups, so that they can differ between them, and a group's step counts, `lookahead_step`
    and `lookahead_unsynced`, too. `state[parameter]` has the inner optimizer's entries, `"slow"`, a copy of the slow
    weight, and with momentum `"slow_momentum"`: tensors of the parameter's shape, device and sharding, and of its dtype
    or `slow_dtype`. Checkpoints are those of any `torch.optim.Optimizer`. A checkpoint of the bare inner optimizer can
    be loaded too: the slow weights are then captured again.

    A `Lookahead` may be inside another. Both count the steps of the innermost optimizer, and all weights restart from
    those that the outer one has synchronised, the inner one's slow weights too. The outer one's names in groups and
    state end in `_2`. An optimizer that was wrapped before can be wrapped again, and takes the new settings.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer` that is not `differentiable`. Its groups may have
            a `sync_period`, `slow_step_size`, `slow_momentum` and `slow_nesterov` of their own.
        sync_period: Integer >= 0, inner steps per slow step ($k$). 0 switches Lookahead off: the wrapper then
            behaves as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$). 1 without momentum recovers the inner
            optimizer. Defaults to 0.5.
        slow_momentum: Float in [0, 1), the factor of the slow momentum ($\mu$), by which steps become $1 / (1 - \mu)$
            times as long in the long run. Defaults to 0, no momentum.
        slow_nesterov: Boolean, whether the momentum is Nesterov's. Otherwise it is heavy ball. Defaults to `True`.
        slow_dtype: Floating point `torch.dtype` of slow weights and slow momentum, at least as wide as the dtype of
            each parameter: `torch.float32` for a model in bfloat16, whose slow weights would lose small moves. Then
            the pseudo-gradient is measured from where the fast weight restarted, the rounded slow weight. Defaults to
            `None`, the dtype of each parameter.
        reduce: Callable that is given the pseudo-gradients of all parameters in a sync, a list of tensors (of a
            `DTensor` the shards of this process), and changes them in place: `average()` for the mean over processes.
            It is called once for each sync, in all processes at the same step. If it returns `False`, the cycle is
            abandoned: the parameters restart from the slow weights, and these and the momentum stay. `None` and `True`
            go on. Defaults to `None`, one worker.

    Raises:
        TypeError: if an argument has the wrong type.
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
        Zhang, Lucas, Hinton and Ba, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`__, 2019, Algorithm 1. Slow momentum: `SNOO
        <https://arxiv.org/abs/2510.15830>`__, 2025, and Douillard et al., `DiLoCo
        <https://arxiv.org/abs/2311.08105>`__, 2023, Algorithm 1.
    """

    inner_optimizer: Optimizer
    _names: Names
    # These two objects are never replaced, as tools copy an optimizer's attributes into an object of theirs.
    _slow_weights: SlowWeights
    _blocks: Blocks
    _reduce: Reduce | None
    # Whether settings and counts were compared with other processes.
    _is_compared: bool
    # The indices of the groups that had a sync period when all was compared with other workers.
    _groups_of_workers: list[int] | None

    @explain_other_names("optimizer")
    def __init__(
        self,
        optimizer: Optimizer,
        sync_period: int = 6,
        slow_step_size: float = 0.5,
        *,
        slow_momentum: float = 0.0,
        slow_nesterov: bool = True,
        slow_dtype: torch.dtype | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        _check_inner_optimizer(optimizer)
        names = Names.at_level(1 + sum(1 for _ in _wrappers(optimizer)))
        settings = {
            names.sync_period: check_sync_period(sync_period),
            names.slow_step_size: check_slow_step_size(slow_step_size),
            names.slow_momentum: check_slow_momentum(slow_momentum),
            names.slow_nesterov: check_slow_nesterov(slow_nesterov),
        }
        _check_slow_dtype(slow_dtype, optimizer.param_groups)
        if reduce is not None and not callable(reduce):
            raise TypeError(
                "`reduce` must be a callable that changes a list of tensors in place, such as "
                "`lookahead_optim.torch.average()`, or None. "
                f"Received: reduce={reduce!r} of type {type(reduce).__name__}"
            )
        for group in optimizer.param_groups:
            if names.lookahead_step not in group:
                check_group(group, names)
        other = _wrapper_of.get(optimizer, lambda: None)()
        if other is not None:
            warnings.warn(
                "Another `Lookahead` is around this optimizer already. It must not make steps any more: both would "
                "count in the same groups. Use the new wrapper alone, or wrap that wrapper. "
                f"Received: optimizer={type(optimizer).__name__}(...), which has a wrapper",
                stacklevel=3,
            )
        # What another wrapper of the same optimizer has left.
        for group in optimizer.param_groups:
            if names.lookahead_step in group:
                for name in names:
                    group.pop(name, None)
        for entries in optimizer.state.values():
            if isinstance(entries, dict):
                entries.pop(names.slow, None)
                entries.pop(names.slow_momentum, None)
        optimizer.defaults = {**optimizer.defaults, **settings}
        # The base class' constructor is not called. It would make parameter groups and a state of its own, while those
        # of a wrapper are the inner optimizer's. What is left of it, the dictionaries of hooks, is what `__setstate__`
        # makes for an optimizer that was read from a file.
        slow_weights = SlowWeights(names.slow, names.slow_momentum, slow_dtype)
        own = {"_names": names, "_slow_weights": slow_weights, "_reduce": reduce}
        self.__setstate__({"inner_optimizer": optimizer, **own})
        self._complete_groups()
        for group in self.param_groups:
            warn_if_over_relaxed(group[names.slow_step_size], group[names.slow_momentum], stacklevel=3)
        _wrapper_of[optimizer] = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # These belong to the inner optimizer, where their properties put them.
        others = {name: value for name, value in state.items() if name not in _OF_THE_INNER_OPTIMIZER}
        super().__setstate__(others)
        if "inner_optimizer" in others:
            self._is_compared, self._groups_of_workers = False, None
            inner = self.inner_optimizer
            self._blocks = inner._blocks if isinstance(inner, Lookahead) else Blocks()
        for name in _OF_THE_INNER_OPTIMIZER:
            if name in state:
                setattr(self, name, state[name])

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("inner_optimizer", "_names", "_slow_weights", "_reduce")}

    def __getattr__(self, name: str) -> Any:
        """Return what only the inner optimizer has: `train` and `eval` of `schedulefree`, for example."""
        if name in _GROUP_ENTRIES:
            raise AttributeError(
                f"`Lookahead` has no attribute `{name}`: it is a setting of each group, in `optimizer.param_groups`."
            )
        # Not what begins with an underscore, where tools ask what an optimizer does by itself. For example, a
        # `GradScaler` leaves scaled gradients and found infinities to an optimizer with `_step_supports_amp_scaling`.
        # Without it, the scaler calls no `step` at all when it finds infinities, so that a skipped step counts nowhere.
        if name.startswith("_") or "inner_optimizer" not in self.__dict__:
            object.__getattribute__(self, name)  # raises Python's own error
        return getattr(self.inner_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GROUP_ENTRIES:
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
        """The inner optimizer's own defaults for parameter groups, with the settings of this wrapper."""
        return self.inner_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        own = {name: self.defaults[name] for name in self._names.settings}
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
        """A live view, for each parameter the inner optimizer's entries and a copy of the slow weight, `"slow"`."""
        inner, slow, view = self.inner_optimizer.state, self._slow_weights, self.__dict__.get("_state")
        # The same object as long as it shows the optimizer's state. One that was kept shows the state of its time.
        if view is None or view.inner is not inner or view.slow_by_parameter is not slow.by_parameter:
            view = self.__dict__["_state"] = State(inner, slow, slow.by_parameter, slow.momentum)
        return view

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        if not (isinstance(state, State) and state.slow_weights.name == self._slow_weights.name):
            state = State.of(state, self._slow_weights)
        self.inner_optimizer.state = state.inner  # type: ignore[assignment]
        self._slow_weights.replace(state.slow_by_parameter, state.momentum_by_parameter)

    def _complete_groups(self) -> None:
        """Check groups and complete those that the inner optimizer has got by itself, or from a checkpoint.

        The parameters of such a group lose their slow weights, if they have any.
        """
        for group in self.param_groups:
            if complete_group(group, self._names, self.defaults):
                for parameter in group["params"]:
                    self._slow_weights.forget(parameter)

    def _active_groups(self) -> list[tuple[int, Group]]:
        period = self._names.sync_period
        return [(index, group) for index, group in enumerate(self.param_groups) if group[period]]

    def _due_groups(self, steps_ahead: int = 0) -> list[tuple[int, Group]]:
        period, count = self._names.sync_period, self._names.lookahead_step
        active = self._active_groups()
        return [(index, group) for index, group in active if (group[count] + steps_ahead) % group[period] == 0]

    def _synchronize(self, groups: list[tuple[int, Group]]) -> None:
        followers = [(wrapper._slow_weights, wrapper._names) for wrapper in _wrappers(self.inner_optimizer)]
        self._compare_workers()
        own_groups = [group for _, group in groups]

        def reduce(pseudo_gradients: list[Tensor]) -> bool | None:
            # Whatever comes of it, the fast weights restart.
            self._note_synced(own_groups)
            return self._reduce(pseudo_gradients)  # type: ignore[misc]

        self._slow_weights.synchronize(groups, self._names, followers, None if self._reduce is None else reduce)
        self._note_synced(own_groups)

    def _compare_workers(self) -> None:
        """Compare all with other workers: before the first step, and after what may have made them differ."""
        active = [index for index, _ in self._active_groups()]
        # A program that has switched Lookahead off need not have made a group of processes.
        is_off = not active and not (distributed.is_available() and distributed.is_initialized())
        if isinstance(self._reduce, Average) and self._groups_of_workers != active and not is_off:
            self._reduce.compare(description(self.param_groups, self._names, self._slow_weights))
            self._groups_of_workers = active

    def _note_synced(self, groups: list[Group]) -> None:
        for wrapper in _wrappers(self):
            for group in groups:
                group[wrapper._names.lookahead_unsynced] = NONE_UNSYNCED

    @torch.compiler.disable
    def _begin_step(self) -> None:
        self._blocks.check_none_is_open("step()")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "`Lookahead.step()` cannot be captured in a CUDA graph: a replay would not count its steps, so that it "
                "would never synchronise, or always. Capture forward and backward pass, and step outside."
            )
        self._complete_groups()
        self._blocks.loaded.settle_before_step()
        for index, group in self._due_groups(steps_ahead=1):
            for wrapper in _wrappers(self):
                wrapper._slow_weights.check_shapes(index, group)
        # With the workers first: of the other comparison only some processes learn.
        self._compare_workers()
        # Groups of workers may have settings of their own.
        has_own_group = isinstance(self._reduce, Average) and self._reduce.process_group is not None
        if not self._is_compared and not has_own_group:
            check_equal_on_all_ranks(self.param_groups, self._names)
            self._is_compared = True
        self._slow_weights.capture_new(self._active_groups(), self._names)

    @torch.compiler.disable
    def _end_step(self) -> None:
        count = self._names.lookahead_step
        if not all(count in group for group in self.param_groups):
            # The inner optimizer got a group in its step.
            self._complete_groups()
        # Every call of `step` counts. Who accumulates gradients does not call it. Nor does a `GradScaler` that has
        # found infinities; `__getattr__` says why.
        for group in self.param_groups:
            # Not in place: `ZeroRedundancyOptimizer` and users copy groups.
            group[count] += 1
            group[self._names.lookahead_unsynced] += 1
        due = self._due_groups()
        for _, group in due:
            self._slow_weights.drop_frozen(group)
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
            RuntimeError: inside a `slow_weights()` block, in the capture of a CUDA graph, at a sync if a parameter has
                changed its shape, or after loading a state dict that was saved in a block, if the gradients were
                computed with the slow weights. At the first step if `average()` finds that workers do not start alike,
                and at a sync if `reduce` fails.
        """
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is not None:
                args, kwargs = result
        # A block in another thread waits for the end of the step.
        with self._blocks.lock:
            if len(args) > 1:
                # The closure computes the gradients anew.
                self._blocks.loaded.settle()
            self._begin_step()
            loss = self.inner_optimizer.step(*args[1:], **kwargs)
            self._end_step()
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return loss

    def _patch_step_function(self) -> None:
        """Leave `step` as it is, which runs this optimizer's own hooks.

        The base class would wrap it, that of subclasses too, in a function that runs the hooks again, together with
        those for all optimizers, which the inner optimizer's `step` runs. No public method switches that off.
        """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        # Some optimizers take no argument.
        self.inner_optimizer.zero_grad() if set_to_none else self.inner_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Its count starts at 0.

        It may have a `sync_period`, `slow_step_size`, `slow_momentum` and `slow_nesterov` of its own.

        Raises:
            TypeError, ValueError: if these are invalid, the group has a `slow_dtype`, which no group has of its own, or
                the inner optimizer does not accept the group.
        """
        if isinstance(param_group, dict):
            for name in (self._names.lookahead_step, self._names.lookahead_unsynced):
                param_group.pop(name, None)
            check_group(param_group, self._names)
            params = param_group.get("params")
            # The inner optimizer refuses a set.
            if params is not None and not isinstance(params, set):
                # As a generator gives its parameters once.
                param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
                _check_slow_dtype(self._slow_weights.dtype, [param_group])
        self.inner_optimizer.add_param_group(param_group)
        self._groups_of_workers = None
        self._complete_groups()
        added = self.param_groups[-1]
        warn_if_over_relaxed(added[self._names.slow_step_size], added[self._names.slow_momentum], stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with `"slow"` for each parameter that has a slow weight.

        Its groups have the settings and the step counts, and with slow momentum a parameter has `"slow_momentum"`. In a
        `slow_weights()` block, in which the parameters are the slow weights, it also has the fast weight of each,
        `"lookahead_fast"`, with which training goes on.

        As always in PyTorch, the tensors are the optimizer's own: copy them to keep them.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        with self._blocks.lock:
            self._complete_groups()
            state_dict = with_slow_weights(
                self.inner_optimizer.state_dict(), self.param_groups, self._slow_weights, self._blocks.fast_weights()
            )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the bare inner one: slow weights it lacks are captured again.

        If it was saved in a `slow_weights()` block, parameters that hold their slow weights, as the model was saved in
        the block too, get the fast weights: now, or before the next forward pass if the model is loaded later.

        Args:
            state_dict: Dictionary, as from `state_dict`. Its slow weights are copied.

        Raises:
            TypeError, ValueError: if it does not fit: in the number of groups, of their parameters, the shape of a slow
                weight, with an invalid setting, or as it is that of another inner optimizer. The optimizer is as before
                then.
            RuntimeError: inside a `slow_weights()` block.
        """
        self._blocks.check_none_is_open("load_state_dict(state_dict)")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        is_innermost = not isinstance(self.inner_optimizer, Lookahead)
        with self._blocks.lock:
            self._complete_groups()
            inner_state_dict, loaded = split(state_dict, self.param_groups, self._names, is_innermost)
            inner_slow_weights = [wrapper._slow_weights for wrapper in _wrappers(self.inner_optimizer)]
            load_inner(inner_state_dict, self.inner_optimizer, inner_slow_weights, self._names)
            self._complete_groups()
            self._slow_weights.load(loaded.slow, loaded.momentum)
            self._slow_weights.complete_momentum(self.param_groups, self._names)
            if loaded.fast or is_innermost:
                self._blocks.loaded.load(loaded.fast, [self._slow_weights, *inner_slow_weights])
        self._is_compared, self._groups_of_workers = False, None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def share_memory(self) -> None:
        """Move the state to shared memory, that of the inner optimizer if it can do that (`torch.optim.Adagrad`).

        The slow weights are captured now, so weights must be loaded before. Each process counts its own steps.
        """
        self._complete_groups()
        self._slow_weights.capture_new(self._active_groups(), self._names)
        for mapping in (self._slow_weights.by_parameter, self._slow_weights.momentum):
            for tensor in mapping.values():
                tensor.share_memory_()
        if hasattr(self.inner_optimizer, "share_memory"):
            self.inner_optimizer.share_memory()

    def sync(self) -> None:
        """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

        A warning tells of a group in its first cycle: its slow weights are still where training began. A group with
        slow momentum, or of workers, that has made no step since its last sync is left alone.

        Parameters that became frozen after the last sync take part.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or if a parameter has changed its shape.
        """
        with self._blocks.lock:
            self._blocks.check_none_is_open("sync()")
            self._complete_groups()
            self._blocks.loaded.settle()
            names, groups = self._names, self._active_groups()
            # Without a step since the last sync, momentum would move the weights on, and workers have nothing to say.
            groups = [
                (index, group)
                for index, group in groups
                if group[names.lookahead_unsynced] > NONE_UNSYNCED
                or not (group[names.slow_momentum] or self._reduce is not None)
            ]
            for _, group in groups:
                if not group[names.slow_momentum]:
                    settings = (group[names.sync_period], group[names.slow_step_size])
                    warn_if_within_first_cycle(group[names.lookahead_step], *settings, stacklevel=2)
            if groups:
                self._synchronize(groups)

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the parameters again, after restoring the best weights, say.

        Slow momentum starts from 0 again.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        with self._blocks.lock:
            self._blocks.check_none_is_open("reset_slow_weights()")
            self._blocks.loaded.forget()
            for wrapper in _wrappers(self):
                wrapper._complete_groups()
                stepped = [group for _, group in wrapper._active_groups() if group[wrapper._names.lookahead_step]]
                wrapper._slow_weights.replace({}, {})
                wrapper._slow_weights.capture([parameter for group in stepped for parameter in group["params"]], set())
                wrapper._slow_weights.complete_momentum(stepped, wrapper._names)
            self._note_synced(self.param_groups)
            self._groups_of_workers = None

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Context manager that runs a block, an evaluation or an export, with the slow weights in the parameters.

        The fast weights come back bit for bit, whatever happens in the block; until then a copy of them takes the
        memory of one more set of parameters. A block inside a block changes nothing; training in one is refused.

        What is saved in a block has the slow weights in the model and both in the optimizer, so that it resumes bit for
        bit; see `load_state_dict`. Tensors that are taken in a block without a copy, as `model.state_dict()` and
        `torch.export.export` take them, hold the fast weights after it. A `copy.deepcopy` or a pickle of
        the optimizer itself made in a block has the slow weights alone.

        A block that one thread opens while another one makes a step begins when the step has ended.

        Raises:
            RuntimeError: if a parameter has changed its shape, before the block or in it.
        """
        self._complete_groups()
        with self._blocks.block(self._slow_weights, self.param_groups), gathered_anew(self._slow_weights.by_parameter):
            yield


def _wrappers(optimizer: Optimizer) -> Iterator[Lookahead]:
    """Yield the `Lookahead` that `optimizer` is, the one inside it, and so on."""
    while isinstance(optimizer, Lookahead):
        yield optimizer
        optimizer = optimizer.inner_optimizer


def _check_slow_dtype(slow_dtype: object, groups: list[Group]) -> None:
    """Raise an error if slow weights cannot have a dtype."""
    for group in groups:
        if "slow_dtype" in group:
            raise TypeError(
                "`slow_dtype` is an argument of `Lookahead`, for all parameters, and no setting of a group. "
                f"Received: a group with slow_dtype={group['slow_dtype']!r}"
            )
    if slow_dtype is None:
        return
    # PyTorch stores numbers of 8 bits, and does not compute with them.
    if not isinstance(slow_dtype, torch.dtype) or not slow_dtype.is_floating_point or slow_dtype.itemsize < 2:
        raise TypeError(
            "`slow_dtype` must be a floating point `torch.dtype` of at least 16 bits, or None for the dtype of each "
            "parameter. "
            f"Received: slow_dtype={slow_dtype!r} of type {type(slow_dtype).__name__}"
        )
    for group in groups:
        for parameter in group["params"]:
            # A group that is added may have pairs of a name and a parameter.
            parameter = parameter[1] if isinstance(parameter, tuple) else parameter
            dtype = getattr(parameter, "dtype", slow_dtype)
            if dtype.is_floating_point and torch.promote_types(dtype, slow_dtype) != slow_dtype:
                raise ValueError(
                    "`slow_dtype` must hold all values of the parameters' dtypes, or the slow weights would lose what "
                    "the fast ones have. Give a dtype at least as wide, or None. "
                    f"Received: slow_dtype={slow_dtype} for a parameter of {dtype}"
                )


def _check_inner_optimizer(optimizer: object) -> None:
    """Raise an error if `optimizer` is none that Lookahead can wrap."""
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
    inside = () if isinstance(optimizer, Lookahead) else vars(optimizer).values()
    if any(isinstance(value, Lookahead) for value in inside):
        raise ValueError(
            "`optimizer` must not have a `Lookahead` inside a wrapper of another kind, which it could not restart. "
            "Put one directly around the other. "
            f"Received: optimizer={type(optimizer).__name__}(...) around a Lookahead"
        )
