"""The `Lookahead` optimizer: PyTorch's protocol around the inner optimizer and the slow weights.

Where things happen:

- a sync: `step`, `_end_step`, and `SlowWeights.synchronize` in `_slow_weights.py`. The arithmetic is in `_interpolate`
  and `_descend` of `_outer_step_torch.py`. For a large weight on a GPU it is in the kernel of `_outer_step_triton.py`;
- capture: `_begin_step` and `SlowWeights.capture_new`, for each trained parameter that has no slow weight;
- slow weights are dropped: by `SlowWeights.drop_frozen`, by `_complete_groups` if the group is new, and by
  `SlowWeights.capture` if the group has no sync period;
- what is saved: `state_dict`, and `with_slow_weights` in `_checkpoint.py`;
- a skipped step: `step` is not called, so nothing happens;
- a frozen weight: `_end_step` and `SlowWeights.drop_frozen`. `_takes_part` says which weights are frozen.
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
# The newest wrapper of each inner optimizer, as long as both exist.
_wrapper_of: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()


class Lookahead(Optimizer):
    r"""Lookahead: `k` steps forward, one step back.

    The inner optimizer moves the parameters. These are the *fast* weights $\theta$. A second copy of them is kept, the
    *slow* weights $\phi$. After every `sync_period` ($k$) steps of the inner optimizer a *sync* moves the slow weights
    towards the fast weights. The fast weights then restart from the slow weights:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.

    The difference $s = \phi - \theta$ at a sync is the *pseudo-gradient*. Without momentum, a sync is a step of
    gradient descent with $s$. With `slow_momentum` ($\mu$) it is gradient descent with momentum $b$, as in SNOO and,
    with one worker, DiLoCo:

    .. math:: b \leftarrow \mu b + s, \qquad \phi \leftarrow \phi - \alpha (s + \mu b), \qquad \theta \leftarrow \phi.

    The momentum $b$ starts from 0. If `slow_nesterov` is `False`, the slow step is $\alpha b$ instead of
    $\alpha (s + \mu b)$.

    The slow weights are captured from the parameters immediately before the first step. A step that a
    `torch.amp.GradScaler` skips does not count. At a sync every parameter takes part, with or without a gradient. A
    parameter that is frozen at a sync is the exception: it has no gradient, and its `requires_grad` is `False`. It
    loses its slow weight. After it is unfrozen, its slow weight is captured again before its next step. The slow
    weights take the memory of one more copy of the parameters that are not frozen. Slow momentum takes the memory of
    another copy.

    `param_groups` is the inner optimizer's own list. Each group holds the settings `sync_period`, `slow_step_size`,
    `slow_momentum` and `slow_nesterov`, so that groups can differ. Each group also holds two step counts,
    `lookahead_step` and `lookahead_unsynced`. `state[parameter]` holds the inner optimizer's entries and two more:
    `"slow"`, a copy of the slow weight, and with momentum `"slow_momentum"`. Both have the parameter's shape, device
    and sharding. Their dtype is the parameter's or `slow_dtype`. Checkpoints are made and loaded as for any
    `torch.optim.Optimizer`. A checkpoint of the bare inner optimizer can be loaded too. The slow weights are then
    captured again.

    A `Lookahead` may be inside another `Lookahead`. Both count the steps of the innermost optimizer. At a sync of the
    outer wrapper all weights restart from the outer wrapper's slow weights, and so do the slow weights of the inner
    wrapper. The outer wrapper's names in groups and state end in `_2`. An optimizer that already had a wrapper can be
    wrapped again. It takes the new settings.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer` that is not `differentiable`. Its groups may have
            their own `sync_period`, `slow_step_size`, `slow_momentum` and `slow_nesterov`.
        sync_period: Integer >= 0, the number of inner steps per sync ($k$). 0 switches Lookahead off: the wrapper then
            behaves as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$): the part of the way to the fast weights that
            the slow weights move at a sync. 1, without slow momentum, gives the inner optimizer. Above 1, without slow
            momentum, there is a `UserWarning`. Defaults to 0.5.
        slow_momentum: Float in [0, 1), the factor of the slow momentum ($\mu$). In the long run it makes slow steps
            $1 / (1 - \mu)$ times as long. Defaults to 0, no momentum.
        slow_nesterov: Boolean, whether the slow momentum is Nesterov's. `False` gives heavy ball. Without slow momentum
            it has no effect. Defaults to `True`.
        slow_dtype: Floating point `torch.dtype` of the slow weights and the slow momentum. It must be at least as wide
            as the dtype of each parameter. Use `torch.float32` for a model in bfloat16: slow weights in bfloat16 would
            lose small moves. The fast weights restart from the slow weights rounded to their own dtype, and the
            pseudo-gradient is measured from there. Defaults to `None`, the dtype of each parameter.
        reduce: Callable for training with several workers. It is given a list of tensors, the pseudo-gradients of all
            parameters in a sync, and changes them in place. For a `DTensor` it is given this process' shard.
            `average()` returns a callable that takes the mean over processes. It is called once for each sync, in all
            processes at the same step. If it returns `None` or `True`, the sync continues. If it returns `False`, the
            cycle is abandoned: the parameters restart from the slow weights, and slow weights and momentum do not
            change. Defaults to `None`, one worker.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range, if the inner optimizer is `differentiable`, or if the inner optimizer
            has a `Lookahead` inside a wrapper of another kind.

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
        <https://arxiv.org/abs/1907.08610>`__, 2019, Algorithm 1.

        Slow momentum: Kallusky, Rao, Nandavanam and Shi, `SNOO: Step-K Nesterov Outer Optimizer
        <https://arxiv.org/abs/2510.15830>`__, 2025; Douillard et al., `DiLoCo
        <https://arxiv.org/abs/2311.08105>`__, 2023, Algorithm 1.
    """

    inner_optimizer: Optimizer
    _names: Names
    # These two objects are never replaced: tools copy an optimizer's attributes into an object of their own.
    _slow_weights: SlowWeights
    _blocks: Blocks
    _reduce: Reduce | None
    # Whether settings and counts were compared with the other processes.
    _is_compared: bool
    # The indices of the groups that had a sync period when this worker was last compared with the others.
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
        # Remove the entries that an earlier wrapper of the same optimizer left.
        for group in optimizer.param_groups:
            if names.lookahead_step in group:
                for name in names:
                    group.pop(name, None)
        for entries in optimizer.state.values():
            if isinstance(entries, dict):
                entries.pop(names.slow, None)
                entries.pop(names.slow_momentum, None)
        optimizer.defaults = {**optimizer.defaults, **settings}
        # The base class' constructor is not called. It would make new parameter groups and a new state, but a wrapper
        # uses the inner optimizer's. The constructor also makes the dictionaries of hooks. `__setstate__` makes these,
        # as for an unpickled optimizer.
        slow_weights = SlowWeights(names.slow, names.slow_momentum, slow_dtype)
        own = {"_names": names, "_slow_weights": slow_weights, "_reduce": reduce}
        self.__setstate__({"inner_optimizer": optimizer, **own})
        self._complete_groups()
        for group in self.param_groups:
            warn_if_over_relaxed(group[names.slow_step_size], group[names.slow_momentum], stacklevel=3)
        _wrapper_of[optimizer] = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # These belong to the inner optimizer. The properties set them there.
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
        """Return an attribute that only the inner optimizer has, such as `train` and `eval` of `schedulefree`."""
        if name in _GROUP_ENTRIES:
            raise AttributeError(
                f"`Lookahead` has no attribute `{name}`: it is a setting of each group, in `optimizer.param_groups`."
            )
        # Private names are not passed on, as tools use them to ask what an optimizer does by itself. For example, a
        # `GradScaler` leaves scaled gradients and found infinities to an optimizer with `_step_supports_amp_scaling`.
        # Without that attribute the scaler does not call `step` when it finds infinities, so that a skipped step counts
        # nowhere.
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
        # An attribute that is read from the inner optimizer is also set there.
        super().__setattr__(name, value) if is_own or not hasattr(inner, name) else setattr(inner, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__} ({self.inner_optimizer!r})"

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults for parameter groups, with the settings of this wrapper."""
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
        """A live view of the inner optimizer's state, with a copy of each slow weight as the entry `"slow"`."""
        inner, slow, view = self.inner_optimizer.state, self._slow_weights, self.__dict__.get("_state")
        # Return the same object while it shows the optimizer's current state. A view that a program kept still shows
        # the state for which it was made.
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
        """Check the groups, and complete groups that lack settings: new groups, and groups from a checkpoint.

        The inner optimizer may have received such a group by itself. The parameters of a completed group lose their
        slow weights.
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
            # The fast weights restart, even if `reduce` fails.
            self._note_synced(own_groups)
            return self._reduce(pseudo_gradients)  # type: ignore[misc]

        self._slow_weights.synchronize(groups, self._names, followers, None if self._reduce is None else reduce)
        self._note_synced(own_groups)

    def _compare_workers(self) -> None:
        """Compare settings and weights with the other workers, before the first step and after changes that need it."""
        active = [index for index, _ in self._active_groups()]
        # A program that has switched Lookahead off may have no process group.
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
        # Workers are compared first: in the other comparison only some processes learn of a difference.
        self._compare_workers()
        # Two groups of workers may have different settings.
        has_own_group = isinstance(self._reduce, Average) and self._reduce.process_group is not None
        if not self._is_compared and not has_own_group:
            check_equal_on_all_ranks(self.param_groups, self._names)
            self._is_compared = True
        self._slow_weights.capture_new(self._active_groups(), self._names)

    @torch.compiler.disable
    def _end_step(self) -> None:
        count = self._names.lookahead_step
        if not all(count in group for group in self.param_groups):
            # The inner optimizer got a group during its step.
            self._complete_groups()
        # Every call of `step` counts. A program that accumulates gradients does not call it. A `GradScaler` that has
        # found infinities does not call it either; `__getattr__` says why.
        for group in self.param_groups:
            # Assign the counts, as `ZeroRedundancyOptimizer` and users copy groups.
            group[count] += 1
            group[self._names.lookahead_unsynced] += 1
        due = self._due_groups()
        for _, group in due:
            self._slow_weights.drop_frozen(group)
        if due:
            self._synchronize(due)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Let the inner optimizer make one step. After every `sync_period` steps, make a sync.

        Args:
            closure: Function that evaluates the model again and returns the loss, for inner optimizers that take a
                closure. A step counts once, however often the inner optimizer calls the closure.
            **kwargs: Other arguments of the inner optimizer's `step`.

        Returns:
            The result of the inner optimizer's `step`, which is the loss if there is a `closure`.

        Raises:
            TypeError, ValueError: if a group has an invalid setting or count.
            RuntimeError: inside a `slow_weights()` block; in the capture of a CUDA graph; at a sync, if a parameter has
                changed its shape; after loading a state dict that was saved in a block, if the gradients were computed
                with the slow weights; at the first step, if `average()` finds that workers do not start alike; at a
                sync, if `reduce` fails.
        """
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is not None:
                args, kwargs = result
        # A block in another thread waits until this step ends.
        with self._blocks.lock:
            if len(args) > 1:
                # The closure computes new gradients, so gradients of the slow weights do no harm.
                self._blocks.loaded.settle()
            self._begin_step()
            loss = self.inner_optimizer.step(*args[1:], **kwargs)
            self._end_step()
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return loss

    def _patch_step_function(self) -> None:
        """Do not wrap `step`, which runs this optimizer's own hooks.

        The base class would wrap `step` in a function that runs the hooks again, for subclasses too. That function
        would also run the hooks for all optimizers, which the inner optimizer's `step` runs. No public method switches
        this off.
        """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does.

        Args:
            set_to_none: Boolean, whether gradients become `None` instead of 0. Defaults to `True`.
        """
        # The `zero_grad` of some optimizers takes no argument.
        self.inner_optimizer.zero_grad() if set_to_none else self.inner_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Its step count starts at 0.

        Args:
            param_group: Dictionary with `"params"` and settings. It may have its own `sync_period`, `slow_step_size`,
                `slow_momentum` and `slow_nesterov`.

        Raises:
            TypeError, ValueError: if a setting is invalid, if the group has a `slow_dtype` (a setting of the whole
                wrapper), or if the inner optimizer does not accept the group.
        """
        if isinstance(param_group, dict):
            for name in (self._names.lookahead_step, self._names.lookahead_unsynced):
                param_group.pop(name, None)
            check_group(param_group, self._names)
            params = param_group.get("params")
            # The inner optimizer raises the error for a set.
            if params is not None and not isinstance(params, set):
                # A generator gives its parameters only once.
                param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
                _check_slow_dtype(self._slow_weights.dtype, [param_group])
        self.inner_optimizer.add_param_group(param_group)
        self._groups_of_workers = None
        self._complete_groups()
        added = self.param_groups[-1]
        warn_if_over_relaxed(added[self._names.slow_step_size], added[self._names.slow_momentum], stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with the slow weights in it.

        Each parameter that has a slow weight has an entry `"slow"`, and with slow momentum an entry `"slow_momentum"`.
        The groups have the settings and the step counts. Inside a `slow_weights()` block the parameters are the slow
        weights. There each parameter also has its fast weight, `"lookahead_fast"`, from which training resumes.

        As always in PyTorch, the tensors are the optimizer's own. Copy them to keep them.

        Returns:
            Dictionary with `"state"` and `"param_groups"`.
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
        """Load a state dict of this optimizer, or of the bare inner optimizer.

        Slow weights that the state dict lacks are captured again.

        A state dict may have been saved in a `slow_weights()` block, together with the model. The model then holds the
        slow weights. Parameters that hold their slow weights get the fast weights back: now, or before the next forward
        pass if the model is loaded later.

        Args:
            state_dict: Dictionary, as from `state_dict`. Its slow weights are copied.

        Raises:
            TypeError, ValueError: if the state dict has another number of groups or parameters, a slow weight of
                another shape, an invalid setting, or the state of another inner optimizer. The optimizer is unchanged
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
        """Move the state to shared memory, and the inner optimizer's state if it can do that (`torch.optim.Adagrad`).

        The slow weights are captured now, so load weights before. Each process counts its own steps.
        """
        self._complete_groups()
        self._slow_weights.capture_new(self._active_groups(), self._names)
        for mapping in (self._slow_weights.by_parameter, self._slow_weights.momentum):
            for tensor in mapping.values():
                tensor.share_memory_()
        if hasattr(self.inner_optimizer, "share_memory"):
            self.inner_optimizer.share_memory()

    def sync(self) -> None:
        """Make a sync now, for the end of a run that does not end on a sync. A second call changes nothing.

        Parameters that became frozen after the last sync take part. A group with slow momentum, or with `reduce`, is
        left alone if it has made no step since its last sync.

        There is a `UserWarning` for a group in its first cycle, if its slow step size is below 1 and it has no slow
        momentum. Its slow weights are still the weights with which training began, so the sync takes back a part of the
        training.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or if a parameter has changed its shape.
        """
        with self._blocks.lock:
            self._blocks.check_none_is_open("sync()")
            self._complete_groups()
            self._blocks.loaded.settle()
            names, groups = self._names, self._active_groups()
            # Without a step since the last sync, momentum would still move the weights, and workers have nothing to
            # average.
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
        """Capture the slow weights from the parameters again, for example after you restored the best weights.

        Slow momentum starts from 0 again. The next sync comes when it was due before.

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
        """Return a context manager that puts the slow weights into the parameters, for an evaluation or an export.

        At the end of the block the fast weights are back, bit for bit, also after an exception. Until then a copy of
        the fast weights takes the memory of one more set of parameters. A block inside a block changes nothing.
        Training inside a block raises an error.

        A checkpoint that is saved inside a block has the slow weights in the model and both in the optimizer. Training
        resumes from it bit for bit; see `load_state_dict`. `model.state_dict()` and `torch.export.export` do not copy
        the tensors that they take. If you take them inside a block, they hold the fast weights after the block. A
        `copy.deepcopy` or a pickle of the optimizer itself, made inside a block, has only the slow weights.

        If one thread opens a block while another thread makes a step, the block begins when the step has ended.

        Raises:
            RuntimeError: if a parameter has changed its shape, before the block or inside it.
        """
        self._complete_groups()
        with self._blocks.block(self._slow_weights, self.param_groups), gathered_anew(self._slow_weights.by_parameter):
            yield


def _wrappers(optimizer: Optimizer) -> Iterator[Lookahead]:
    """Yield the `Lookahead` that `optimizer` is, then the `Lookahead` inside it, and so on."""
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
    # PyTorch can store numbers of 8 bits, but cannot compute with them.
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
    """Raise an error if Lookahead cannot wrap `optimizer`."""
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
