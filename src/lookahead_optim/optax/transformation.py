"""The gradient transformation: Optax' protocol around the inner transformation.

Where things happen:

- the outer step of a weight: `outer_step` in `_outer_step.py`;
- a plain sync, without momentum and in the weights' own dtype: `_Lookahead.update`, and `updates_to_sync` in
  `_outer_step.py`, or for `apply_gradients` `params_after_sync`;
- a sync with momentum, `outer` or wider slow weights: `_Lookahead.update`, and `sync_if_due` in `_conditional.py`;
- capture: `_Lookahead._captured`, and `capture_if_stale` in `_slow_weights.py` or `capture_passing_params` in
  `_conditional.py`, if the state's `captured` is 0;
- what is saved: `LookaheadState` in `_slow_weights.py`, `SlowMomentumState` in `_momentum.py`;
- a skipped update: `is_applied` and `completes_step` in `_combinators.py`;
- a frozen weight: its update is `None`, and all functions of a sync leave it alone.
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
    """The `optax.GradientTransformationExtraArgs` that `lookahead` returns. It also has `apply_gradients`."""

    def __repr__(self) -> str:
        rule = getattr(self.update, "__self__", None)
        # A user may have put another function in the place of `update`.
        return repr(rule) if isinstance(rule, _Lookahead) else super().__repr__()

    def apply_gradients(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, LookaheadState]:
        r"""Make a step, and return the new parameters instead of updates.

        This does the same as `update` and `optax.apply_updates`, except that a sync is exact. The new parameters are
        the rounded $\phi + \alpha (\theta - \phi)$. In general no update that is added to $\theta$ gives these.

        Args:
            grads: Tree of gradients, as for `update`.
            state: State of this transformation. It can be donated, and so can the parameters.
            params: Tree of parameters.
            **extra_args: Other arguments of the inner transformation's `update`.

        Returns:
            The new parameters, with the shapes and dtypes of `params`, and the new state. If a jitted function donates
            its arguments, it should return the new values in the order of these arguments, as XLA reuses buffers by
            position.

        Raises:
            TypeError: if `update` was replaced by a function that does not return what `update` returns. A function
                around `update`, such as `jax.jit(optimizer.update)`, may take its place. The function may change
                gradients. Its changes of the updates afterwards do not reach the parameters.
            ValueError: as an update of `lookahead`.
        """
        # `_Lookahead.update` handles this. `_ForParams` says why.
        _, step = self.update(_ForParams(grads), state, params, **extra_args)
        if not isinstance(step, _Step):
            raise TypeError(
                "`apply_gradients` needs an `update` of `lookahead`, or a function around it, such as "
                f"`jax.jit(optimizer.update)`, that returns what it returns. Received: update={self.update!r:.500}"
            )
        return step.params, step.state


class _ForParams(NamedTuple):
    """Gradients that tell `update` to return a `_Step`.

    Parameters and updates are two results of one step. But Optax rebuilds transformations from `init` and `update`
    alone, and users put functions such as `jax.jit(optimizer.update)` in the place of `update`. So `apply_gradients`
    calls `update` too. It tells `update` so by the type of a tree, which passes through `jax.jit` and similar
    functions.
    """

    grads: optax.Updates


class _Step(NamedTuple):
    """New parameters and state, in the place of the state. There no combinator takes the parameters for updates."""

    params: optax.Params
    state: LookaheadState


# `optax.inject_hyperparams` makes traced arrays of arguments that are Python numbers, also of defaults. A traced factor
# needs memory for the momentum. It leaves NumPy's numbers alone, so the default still means no momentum.
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

    The inner transformation moves the parameters. These are the *fast* weights $\theta$. A second copy of them is kept
    in the state, the *slow* weights $\phi$. After every `sync_period` ($k$) updates of the inner transformation a
    *sync* moves the slow weights towards the fast weights. The fast weights then restart from the slow weights:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.

    The difference $s = \phi - \theta$ at a sync is the *pseudo-gradient*. Without momentum, a sync is a step of
    gradient descent with $s$. With `slow_momentum` ($\mu$) it is gradient descent with momentum $b$, as in SNOO and,
    with one worker, DiLoCo:

    .. math:: b \leftarrow \mu b + s, \qquad \phi \leftarrow \phi - \alpha (s + \mu b), \qquad \theta \leftarrow \phi.

    The momentum $b$ starts from 0. If `slow_nesterov` is `False`, the slow step is $\alpha b$ instead of
    $\alpha (s + \mu b)$. With `outer`, any Optax transformation makes the slow step from $s$.

    Parameters and updates are plain trees, as for any transformation. Read the slow weights with `slow_params`. It
    finds them in the state of any optimizer that contains this transformation. The slow weights are captured from the
    parameters immediately before the first update, and again before the first update after each sync. After a sync they
    equal the parameters to which the updates lead, bit for bit. This also holds if a transformation behind the
    `lookahead`, in an `optax.chain`, has changed the updates. The slow weights take the memory of one more copy of the
    parameters. Slow momentum takes the memory of another copy.

    Only applied updates count. These do not count:

    - gradients that `optax.MultiSteps` inside only accumulates;
    - gradients that `optax.apply_if_finite` inside finds not to be finite, even if it applies them in the end, after
      too many errors;
    - the adversarial steps of `optax.contrib.sam`.

    If `optax.MultiSteps` or `optax.apply_if_finite` is around the `lookahead`, it leaves the state of the `lookahead`
    alone for such gradients. If such a transformation holds only for a part of the parameters, in an
    `optax.partition`, put a `lookahead` around it inside the `partition`.

    A weight whose update is `None` at a sync is frozen. The sync does not move it. Its slow weight is captured again
    from it, and its slow momentum becomes 0. A weight whose update is 0, for example from `optax.set_to_zero`, takes
    part. It stays where it is if it has not moved since the last sync and has no slow momentum.

    A `lookahead` may be inside another `lookahead`. Both count the updates of the innermost transformation. At a sync
    of the outer wrapper all weights restart from the outer wrapper's slow weights, and so do the slow weights of the
    inner wrapper.

    Args:
        inner: The inner transformation, or an `optax.MultiSteps`. Transformations that change its updates belong
            inside: `lookahead(optax.chain(...))`.
        sync_period: Integer >= 0, the number of inner updates per sync ($k$). 0 switches Lookahead off: the
            transformation then behaves as the inner transformation. A period of 2^31 or more is never due. An array may
            be traced, and its value is not checked. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$): the part of the way to the fast weights that
            the slow weights move at a sync. 1, without slow momentum, gives the inner transformation. Above 1, without
            slow momentum, there is a `UserWarning`. It may also be an Optax schedule, a function of the number of syncs
            so far, `step // sync_period`. An array may be traced, and its value is not checked. Defaults to 0.5.
        slow_momentum: Float in [0, 1), the factor of the slow momentum ($\mu$). In the long run it makes slow steps
            $1 / (1 - \mu)$ times as long. An array may be traced, and its value is not checked. An array needs the
            memory for $b$ even if it is 0. Defaults to 0, no momentum.
        slow_nesterov: Boolean, whether the slow momentum is Nesterov's. `False` gives heavy ball. Without slow momentum
            it has no effect. Defaults to `True`.
        outer: Transformation of the pseudo-gradients, in place of `slow_step_size`, `slow_momentum` and
            `slow_nesterov`. Its updates are added to the slow weights. These three settings do the same as
            `optax.sgd(eta, momentum=mu, nesterov=True)`. Schedules in `outer` count syncs. `sync` and
            `reset_slow_params` need `outer` too. Defaults to `None`.
        slow_dtype: Dtype of the slow weights and the slow momentum, for real weights. It must be at least as wide as
            the dtype of each parameter. Use `"float32"` for parameters in bfloat16: slow weights in bfloat16 would lose
            small moves. The fast weights restart from the slow weights rounded to their own dtype, and the
            pseudo-gradient is measured from there. `update` then returns updates of this dtype. `optax.apply_updates`
            adds first and rounds afterwards, so it ends at the rounded slow weights. Defaults to `None`, the dtype of
            each parameter.
        reduce: Function for training with several workers. It is given the tree of pseudo-gradients, in the dtypes of
            the slow weights, and returns their mean over workers. For example, use
            `functools.partial(jax.lax.pmean, axis_name="workers")` in a `jax.shard_map`, or under a `jax.vmap` with
            that axis name. Only a sync calls it. All workers must start with equal parameters and make the same
            updates. If a worker skips an update, it later waits for workers that do not come. Defaults to `None`, one
            worker.

    Returns:
        An `optax.GradientTransformationExtraArgs` that also has `apply_gradients`.

    Raises:
        TypeError: if an argument has the wrong type, or another implementation's name.
        ValueError: if a number is out of range, or if `outer` is given together with settings that it replaces. `init`
            raises it if `slow_dtype` is narrower than the dtype of a parameter. An update raises it for a state of
            another transformation, or for parameters unlike the parameters of `init`. (Parameters that the state does
            not have are left alone.)

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

        Slow momentum: Kallusky, Rao, Nandavanam and Shi, `SNOO: Step-K Nesterov Outer Optimizer
        <https://arxiv.org/abs/2510.15830>`__, 2025; Douillard et al., `DiLoCo
        <https://arxiv.org/abs/2311.08105>`__, 2023, Algorithm 1.
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

    A plain sync changes only the parameters. The slow weights are read from the parameters at the next update. So a
    plain sync is elementwise: XLA fuses it into the inner transformation's last operation and needs no buffer for it.
    And fast and slow weights are the same after a sync, however the caller's addition rounds the parameters.

    A sync that changes more than the parameters runs under a conditional; see `_conditional.py`. It also reads the slow
    weights from the parameters.
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
        """Return whether a sync changes only the parameters."""
        is_alone = self.reduce is None
        return is_alone and state.outer_state is None and not has_wider(state.slow_params, params)

    def _captured(self, state: LookaheadState, params: optax.Params) -> tuple[optax.Params, optax.Params]:
        """Return the slow weights with which the update starts, and the parameters."""
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
        """Return the inner updates, whether a sync follows them, and the new state before the sync."""
        updates, inner_state = self.inner.update(grads, state.inner_state, params, **extra_args)
        self.inner_states.add(inner_state)
        is_moved = is_applied(state.inner_state, inner_state)
        is_step = is_moved & completes_step(inner_state)
        step = jnp.where(is_step, next_count(state.step, self.sync_period), state.step)
        is_sync = is_step & is_due(step, self.sync_period)
        # The adversarial steps of `sam` move the parameters but complete no step.
        since_capture = jnp.maximum(jnp.minimum(state.captured, END - 1) + is_step, 1)
        # With workers the slow weights are not captured from the parameters, as an addition may have rounded these.
        after_sync = 0 if self.reduce is None else IN_PLACE
        captured = jnp.where(is_sync, after_sync, jnp.where(self.sync_period == 0, 0, since_capture))
        # `mark_stale` marks the states of wrappers inside. `captured` marks the state of this wrapper.
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
        """Return the outer state with which an update begins. It starts again if Lookahead is switched off."""
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
        """Return the moving tree and the state, after a sync if it is due.

        The moving tree `moving` holds the fast weights. If `params` are given, it holds the updates that lead from
        `params` to the fast weights.
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
