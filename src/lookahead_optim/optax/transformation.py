"""The gradient transformation: Optax' protocol around the inner transformation.

Where things happen:

- the outer step of a weight: `outer_step` in `_outer_step.py`;
- a plain sync, without momentum and in the weights' own dtype: `_Lookahead.update`, `updates_to_sync` or, for
  `apply_gradients`, `params_after_sync` in `_outer_step.py`;
- a sync with momentum, `outer` or wider slow weights: `_Lookahead.update`, `sync_if_due` in `_conditional.py`;
- capture: `_Lookahead._captured`, `capture_if_stale` in `_slow_weights.py` or `capture_passing_params` in
  `_conditional.py`, where the state's `captured` is 0;
- what is saved: `LookaheadState` in `_slow_weights.py`, `SlowMomentumState` in `_momentum.py`;
- a skipped update: `is_applied` and `completes_step` in `_combinators.py`;
- a frozen weight: all functions of a sync leave a weight alone whose update is `None`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim._checks import check_slow_nesterov, explain_other_names
from lookahead_optim.optax._arguments import (
    States,
    as_outer,
    as_transformation,
    check_inner_state,
    check_outer_alone,
    check_outer_state,
    check_slow_dtype_holds,
    check_slow_dtype_of,
    check_update,
    checked_reduce,
    checked_slow_dtype,
    checked_slow_momentum,
    checked_slow_step_size,
    checked_sync_period,
)
from lookahead_optim.optax._combinators import completes_step, is_applied
from lookahead_optim.optax._conditional import capture_passing_params, changed_if, sync_if_due
from lookahead_optim.optax._count import END, SlowStepSize, SyncPeriod, is_due, is_off, next_count, slow_step_size_at
from lookahead_optim.optax._momentum import SlowMomentumState, begun_anew, initial_momentum, initial_state_of
from lookahead_optim.optax._outer_step import OuterStep, has_momentum, params_after_sync, updates_to_sync
from lookahead_optim.optax._outer_step_of_all import Reduce
from lookahead_optim.optax._slow_weights import (
    IN_PLACE,
    LookaheadState,
    capture_if_stale,
    has_wider,
    initial,
    mark_stale,
)
from lookahead_optim.optax._trees import add_updates, with_axes_of

__all__ = ["LookaheadTransformation", "lookahead"]


class LookaheadTransformation(optax.GradientTransformationExtraArgs):
    """The `optax.GradientTransformationExtraArgs` that `lookahead` returns, with one function more."""

    def __repr__(self) -> str:
        rule = getattr(self.update, "__self__", None)
        # Another function may stand in the place of `update`.
        return repr(rule) if isinstance(rule, _Lookahead) else super().__repr__()

    def apply_gradients(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, LookaheadState]:
        r"""Make a step, and return the new parameters instead of updates to be added.

        The same as `update` and `optax.apply_updates`, but that a sync is exact: the new parameters are the rounded
        $\phi + \alpha (\theta - \phi)$, which no update added to $\theta$ gives in general.

        Args:
            grads: Tree of gradients, as for `update`.
            state: State of this transformation. It can be donated, like the parameters.
            params: Tree of parameters.
            **extra_args: What the inner transformation's `update` takes besides.

        Returns:
            New parameters, with the shapes and dtypes of `params`, and the new state. A jitted function should return
            them in the order in which it takes those that it donates, as XLA reuses buffers by position.

        Raises:
            TypeError: if `update` was replaced by a function that does not return what `update` returns. A function
                around `update`, such as `jax.jit(optimizer.update)`, may stand in its place. It may change gradients,
                but the parameters do not have what it does to the updates afterwards.
            ValueError: as an update of `lookahead`.
        """
        # Handled in `_Lookahead.update`; why, `_ForParams` says.
        _, step = self.update(_ForParams(grads), state, params, **extra_args)
        if not isinstance(step, _Step):
            raise TypeError(
                "`apply_gradients` needs an `update` of `lookahead`, or a function around it, such as "
                f"`jax.jit(optimizer.update)`, that returns what it returns. Received: update={self.update!r:.500}"
            )
        return step.params, step.state


class _ForParams(NamedTuple):
    """Gradients that tell `update` to return a `_Step`.

    Parameters and updates are two results of one step, but Optax remakes transformations from `init` and `update`
    alone, and users put functions such as `jax.jit(optimizer.update)` in the place of `update`. So `apply_gradients`
    goes through `update` too. It says so by the type of a tree, which passes through `jax.jit` and the like.
    """

    grads: optax.Updates


class _Step(NamedTuple):
    """New parameters and state, in the place of the state, where no combinator takes them for updates."""

    params: optax.Params
    state: LookaheadState


# `optax.inject_hyperparams` makes traced arrays of the Python numbers among the arguments, also of defaults. A traced
# factor needs memory for the momentum. As a number of NumPy the default stays what it is: no momentum.
_NO_MOMENTUM = np.float32(0.0)


@explain_other_names("inner")
def lookahead(
    inner: optax.GradientTransformation,
    sync_period: jax.typing.ArrayLike = 6,
    slow_step_size: jax.typing.ArrayLike | optax.Schedule = 0.5,
    *,
    slow_momentum: jax.typing.ArrayLike = _NO_MOMENTUM,
    slow_nesterov: bool = True,
    outer: optax.GradientTransformation | None = None,
    slow_dtype: jax.typing.DTypeLike | None = None,
    reduce: Callable[[optax.Updates], optax.Updates] | None = None,
) -> LookaheadTransformation:
    r"""Lookahead: `k` steps forward, one step back.

    The inner transformation moves the parameters, the *fast* ones $\theta$. After every `sync_period` ($k$) of its
    updates a second copy of them, the *slow* parameters $\phi$, takes a step towards the fast ones, and these restart
    from there:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.

    Parameters and updates are plain trees; the slow parameters live in the state. They are captured immediately before
    the first update, and before the first update after each sync. They take the memory of one more copy of the
    parameters.
    `slow_params` finds them in the state of any optimizer that this transformation is a part of. After a sync they are
    the parameters that the updates result in, bit for bit, also if something behind it in an `optax.chain` has changed
    these updates.

    What counts is an update that is applied. Gradients that `optax.MultiSteps` inside only accumulates, those that
    `optax.apply_if_finite` inside finds not to be finite (also those that it applies in the end, after too many), and
    the adversarial steps of `optax.contrib.sam` do not. Around the `lookahead`, the first two leave its state as it
    is then. Where such a transformation holds for a part of the parameters only, in an `optax.partition`, put a
    `lookahead` around it inside of the `partition`.

    A `lookahead` may be inside another. Both count the updates of the innermost transformation, and all parameters
    restart from those that the outer one has synchronised, the inner one's slow ones too.

    A weight whose update is `None` at a sync is frozen. The sync does not move it, its slow weight starts anew from
    its own value, and its slow momentum from 0. A weight whose update is 0, from `optax.set_to_zero` say, takes part.
    It stays if it has not moved since the last sync and has no slow momentum.

    The way back of a cycle, $s = \phi - \theta$, is the *pseudo-gradient*. With slow momentum ($\mu$) the slow step is
    gradient descent with it, and $b$ starts from 0:

    .. math:: b \leftarrow \mu b + s, \qquad d = s + \mu b, \qquad \phi \leftarrow \phi - \alpha d, \qquad
        \theta \leftarrow \phi.

    That needs one more copy of the parameters, for $b$. With `outer`, any transformation makes the slow step from $s$.

    Args:
        inner: The inner transformation, or an `optax.MultiSteps`. What changes its updates belongs inside:
            `lookahead(optax.chain(...))`.
        sync_period: Integer >= 0, inner updates per slow step ($k$). 0 switches Lookahead off: the transformation then
            is the inner one. 2^31 or more is never due. An array may be traced, and its value is not checked. Defaults
            to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$), or an Optax schedule of the number of syncs so
            far, `step // sync_period`. 1 recovers the inner transformation, without slow momentum. Above 1 there is a
            `UserWarning`, unless there is slow momentum. An array may be traced, and its value is not checked. Defaults
            to 0.5.
        slow_momentum: Float in [0, 1), the factor of the slow momentum ($\mu$), by which steps become
            $1 / (1 - \mu)$ times as long in the long run. An array may be traced, and its value is not checked; it
            needs the memory for $b$ also where it is 0. Defaults to 0, no momentum.
        slow_nesterov: Boolean, whether the momentum is Nesterov's. Otherwise it is heavy ball, $d = b$. Defaults to
            `True`.
        outer: Transformation of the pseudo-gradients, whose updates are added to the slow parameters, in place of
            `slow_step_size`, `slow_momentum` and `slow_nesterov`. `optax.sgd(eta, momentum=mu, nesterov=True)` is what
            these three do. Its schedules count syncs, and `sync` and `reset_slow_params` need it. Defaults to `None`.
        slow_dtype: Dtype of the slow parameters and $b$ for real weights, at least as wide as the dtype of each:
            `"float32"` for parameters in bfloat16, whose slow ones would lose small moves. Then $s$ is measured from
            where the fast weights restarted, the rounded slow ones. `update` returns updates of this dtype, so that
            `optax.apply_updates`, which adds first and rounds then, ends at the rounded slow weights. Defaults to
            `None`, the dtype of each parameter.
        reduce: Function of the tree of pseudo-gradients, in the dtypes of the slow parameters, that returns their mean
            over workers: `functools.partial(jax.lax.pmean, axis_name="workers")` in a `jax.shard_map`, or under a
            `jax.vmap` with that axis name. Only a sync calls it. All workers must start with equal parameters, and make
            the same updates: a worker that skips one waits for others that do not come. Defaults to `None`, one worker.

    Returns:
        An `optax.GradientTransformationExtraArgs` that has `apply_gradients` too.

    Raises:
        TypeError: if an argument has the wrong type, or another implementation's name.
        ValueError: if a number is out of range, or `outer` is given with settings that it replaces; from `init`, if
            `slow_dtype` is narrower than a parameter's; from an update, if it is not given a state of this
            transformation and parameters like those of `init`. Parameters that the state does not have are left alone.

    Example:

    >>> import jax, jax.numpy as jnp, optax
    >>> from lookahead_optim.optax import lookahead, slow_params
    >>> optimizer = lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
    >>> params = {"w": jnp.ones(2)}
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = jax.grad(lambda params: params["w"].sum())(params)
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> [f"{params['w'][0]:.2f}", f"{slow_params(state, params)['w'][0]:.2f}"]
    ['0.45', '0.75']

    References:
        Zhang, Lucas, Hinton and Ba, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`__, 2019, Algorithm 1.

        With slow momentum: Kallusky, Rao, Nandavanam and Shi, `SNOO: Step-K Nesterov Outer Optimizer
        <https://arxiv.org/abs/2510.15830>`__, 2025, and on many workers Douillard et al., `DiLoCo
        <https://arxiv.org/abs/2311.08105>`__, 2023.
    """
    momentum = checked_slow_momentum(slow_momentum)
    transformation = as_outer(outer)
    if transformation is not None:
        check_outer_alone(slow_step_size, momentum, check_slow_nesterov(slow_nesterov))
    rule = _Lookahead(
        as_transformation(inner),
        checked_sync_period(sync_period),
        checked_slow_step_size(slow_step_size, has_momentum(momentum)),
        momentum,
        check_slow_nesterov(slow_nesterov),
        transformation,
        checked_slow_dtype(slow_dtype),
        checked_reduce(reduce),
    )
    return LookaheadTransformation(rule.init, rule.update)


class _Lookahead:
    """The functions of the transformation, with its settings.

    A plain sync only changes the parameters; the slow ones are read from them at the next update. That makes it
    elementwise, so that XLA fuses it into the inner transformation's last operation and needs no buffer for it, and
    whatever the caller's addition rounds the updates to, fast and slow parameters are the same afterwards.

    A sync that changes more than the parameters runs under a conditional, as `_conditional.py` says. The slow ones are
    read from the parameters all the same.
    """

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        sync_period: SyncPeriod,
        slow_step_size: SlowStepSize | optax.Schedule,
        slow_momentum: SlowStepSize,
        slow_nesterov: bool,
        outer: optax.GradientTransformationExtraArgs | None,
        slow_dtype: np.dtype | None,
        reduce: Reduce | None,
    ) -> None:
        self.inner, self.sync_period, self.slow_step_size = inner, sync_period, slow_step_size
        self.slow_momentum, self.slow_nesterov = slow_momentum, slow_nesterov
        self.outer, self.slow_dtype, self.reduce = outer, slow_dtype, reduce
        self.inner_states = States(inner)
        self.outer_states = None if outer is None else States(outer)

    def __repr__(self) -> str:
        settings = f"sync_period={self.sync_period!r}, slow_step_size={self.slow_step_size!r}"
        if self.outer is not None:
            settings = f"sync_period={self.sync_period!r}, outer={self.outer!r}"
        elif has_momentum(self.slow_momentum):
            settings += f", slow_momentum={self.slow_momentum!r}, slow_nesterov={self.slow_nesterov!r}"
        if self.slow_dtype is not None:
            settings += f", slow_dtype={self.slow_dtype.name!r}"
        if self.reduce is not None:
            settings += f", reduce={self.reduce!r}"
        return f"lookahead({self.inner!r}, {settings})"

    def init(self, params: optax.Params) -> LookaheadState:
        check_slow_dtype_holds(self.slow_dtype, params)
        step = jnp.zeros((), jnp.int32)
        inner_state = self.inner.init(params)
        self.inner_states.add(inner_state)
        slow = None if is_off(self.sync_period) else initial(params, self.slow_dtype)
        return LookaheadState(
            inner_state=inner_state,
            slow_params=slow,
            step=step,
            captured=jnp.zeros((), jnp.int32),
            next_slow_step_size=self._next_slow_step_size(step),
            outer_state=None if is_off(self.sync_period) else self._initial_outer_state(slow),
        )

    def _initial_outer_state(self, slow: optax.Params) -> Any:
        if self.outer is not None and self.outer_states is not None:
            outer_state = initial_state_of(self.outer, slow)
            self.outer_states.add(outer_state)
            return outer_state
        if not has_momentum(self.slow_momentum):
            return None
        # Copies, as no buffer can be donated twice.
        settings = jnp.array(self.slow_momentum, float), jnp.array(self.slow_nesterov)
        return SlowMomentumState(initial_momentum(slow), *settings)

    def _next_momentum_state(self, momentum: optax.Params, state: SlowMomentumState) -> SlowMomentumState:
        factor, nesterov = jnp.asarray(self.slow_momentum, float), jnp.asarray(self.slow_nesterov)
        return SlowMomentumState(
            momentum, with_axes_of(state.next_factor, factor), with_axes_of(state.next_nesterov, nesterov)
        )

    def update(
        self,
        updates: optax.Updates | _ForParams,
        state: LookaheadState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates | None, LookaheadState | _Step]:
        check_update(state, params, is_off(self.sync_period))
        check_inner_state(state, self.inner_states, params)
        if not is_off(self.sync_period):
            check_slow_dtype_of(state, params, self.slow_dtype)
            check_outer_state(state, has_momentum(self.slow_momentum), self.outer_states)
        grads = updates.grads if isinstance(updates, _ForParams) else updates
        slow, params = self._captured(state, params)
        inner_updates, is_sync, new_state = self._advance(grads, state, slow, params, extra_args)
        if isinstance(updates, _ForParams):
            fast = add_updates(params, inner_updates)
            return None, _Step(*self._synced(is_sync, new_state, state.step, fast, inner_updates, None))
        return self._synced(is_sync, new_state, state.step, inner_updates, inner_updates, params)

    def _is_plain(self, state: LookaheadState, params: optax.Params) -> bool:
        """Return whether a sync changes nothing but the parameters."""
        is_alone = self.reduce is None
        return is_alone and state.outer_state is None and not has_wider(state.slow_params, params)

    def _captured(self, state: LookaheadState, params: optax.Params) -> tuple[optax.Params, optax.Params]:
        """Return the slow parameters with which the update starts, and the parameters."""
        if is_off(self.sync_period):
            return state.slow_params, params
        if self._is_plain(state, params):
            return capture_if_stale(state, params), params
        return capture_passing_params(state, params)

    def _advance(
        self,
        grads: optax.Updates,
        state: LookaheadState,
        slow: optax.Params,
        params: optax.Params,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, jax.Array, LookaheadState]:
        """Return the inner updates, whether a sync follows them, and the new state before it."""
        updates, inner_state = self.inner.update(grads, state.inner_state, params, **extra_args)
        self.inner_states.add(inner_state)
        is_moved = is_applied(state.inner_state, inner_state)
        is_step = is_moved & completes_step(inner_state)
        step = jnp.where(is_step, next_count(state.step, self.sync_period), state.step)
        is_sync = is_step & is_due(step, self.sync_period)
        # The adversarial steps of `sam` move the parameters and complete no step.
        since_capture = jnp.maximum(jnp.minimum(state.captured, END - 1) + is_step, 1)
        # Slow parameters of workers are not captured from their own parameters: an addition may have rounded these.
        after_sync = 0 if self.reduce is None else IN_PLACE
        captured = jnp.where(is_sync, after_sync, jnp.where(self.sync_period == 0, 0, since_capture))
        # `mark_stale` marks the states of wrappers inside, and `captured` this one's own.
        new_state = LookaheadState(
            inner_state=mark_stale(inner_state, is_sync),
            slow_params=slow,
            step=step,
            captured=jnp.where(is_moved, captured, state.captured).astype(jnp.int32),
            next_slow_step_size=with_axes_of(state.next_slow_step_size, self._next_slow_step_size(step)),
            outer_state=self._outer_state_unless_off(state),
        )
        return updates, is_sync, new_state

    def _outer_state_unless_off(self, state: LookaheadState) -> Any:
        """Return the outer state with which an update begins: where Lookahead is switched off it starts anew."""
        if state.outer_state is None or (isinstance(self.sync_period, int) and self.sync_period > 0):
            return state.outer_state
        is_switched_off = jnp.asarray(self.sync_period) == 0
        return changed_if(
            is_switched_off, lambda one: begun_anew(one, state.slow_params, self.outer), state.outer_state
        )

    def _synced(
        self,
        is_sync: jax.Array,
        state: LookaheadState,
        step_before: jax.Array,
        moving: optax.Updates,
        updates: optax.Updates,
        params: optax.Params | None,
    ) -> tuple[optax.Updates, LookaheadState]:
        """Return what moves, and the state, after a sync if it is due.

        What moves are the fast parameters, or, if `params` are given, the updates that lead from these to the fast
        parameters.
        """
        if is_off(self.sync_period):
            return moving, state
        slow = state.slow_params
        slow_step_size = slow_step_size_at(step_before, self.sync_period, self.slow_step_size)
        if self._is_plain(state, moving if params is None else params):
            if params is None:
                return params_after_sync(is_sync, slow, moving, updates, slow_step_size), state
            return updates_to_sync(is_sync, slow, moving, params, slow_step_size), state
        if self.outer is not None:
            slow, moving, outer_state = sync_if_due(
                is_sync, self.outer, slow, moving, state.outer_state, updates, params, self.reduce
            )
        else:
            outer_step = OuterStep(slow_step_size, self.slow_momentum, self.slow_nesterov)
            momentum = None if state.outer_state is None else state.outer_state.slow_momentum
            slow, moving, momentum = sync_if_due(
                is_sync, outer_step, slow, moving, momentum, updates, params, self.reduce
            )
            outer_state = None if momentum is None else self._next_momentum_state(momentum, state.outer_state)
        return moving, state._replace(slow_params=slow, outer_state=outer_state)

    def _next_slow_step_size(self, step: jax.Array) -> jax.Array:
        if self.outer is not None:
            return jnp.ones((), float)
        # A copy, as no buffer can be donated twice.
        return jnp.array(slow_step_size_at(step, self.sync_period, self.slow_step_size), float)
