"""The gradient transformation: Optax' protocol around the inner transformation.

Where things happen:

- a sync: `_Lookahead.update`, `updates_to_sync` or, for `apply_gradients`, `params_after_sync` in `_outer_step.py`;
- capture: `_Lookahead._advance`, `capture_if_stale` in `_slow_weights.py`, where the state's `captured` is 0;
- what is saved: `LookaheadState` in `_slow_weights.py`;
- a skipped update: `is_applied` and `completes_step` in `_combinators.py`;
- a frozen weight: both functions of a sync leave a weight alone whose update is `None`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lookahead_optim._checks import explain_other_names
from lookahead_optim.optax._arguments import (
    InnerStates,
    as_transformation,
    check_update,
    checked_slow_step_size,
    checked_sync_period,
)
from lookahead_optim.optax._combinators import completes_step, is_applied
from lookahead_optim.optax._count import END, SlowStepSize, SyncPeriod, is_due, is_off, next_count, slow_step_size_at
from lookahead_optim.optax._outer_step import params_after_sync, updates_to_sync
from lookahead_optim.optax._slow_weights import LookaheadState, capture_if_stale, initial, mark_stale
from lookahead_optim.optax._trees import add_updates

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


@explain_other_names("inner")
def lookahead(
    inner: optax.GradientTransformation,
    sync_period: jax.typing.ArrayLike = 6,
    slow_step_size: jax.typing.ArrayLike | optax.Schedule = 0.5,
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

    A weight whose update is `None` at a sync is frozen. The sync does not move it, and its slow weight starts anew from
    its own value. A weight whose update is 0, from `optax.set_to_zero` say, takes part. It stays if it has
    not moved since the last sync.

    Args:
        inner: The inner transformation, or an `optax.MultiSteps`. What changes its updates belongs inside:
            `lookahead(optax.chain(...))`.
        sync_period: Integer >= 0, inner updates per slow step ($k$). 0 switches Lookahead off: the transformation then
            is the inner one. 2^31 or more is never due. An array may be traced, and its value is not checked. Defaults
            to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$), or an Optax schedule of the number of syncs
            so far, `step // sync_period`. (The other front ends take numbers only.) 1 recovers the inner
            transformation. Above 1 there is a `UserWarning`. An array may be traced, and its value is not checked.
            Defaults to 0.5.

    Returns:
        An `optax.GradientTransformationExtraArgs` that has `apply_gradients` too.

    Raises:
        TypeError: if `inner`, `sync_period` or `slow_step_size` has the wrong type, or an argument another
            implementation's name.
        ValueError: if a number is out of range, or, from an update, if it is not given a state of this transformation
            and parameters like those of `init`. Parameters that the state does not have are left alone.

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
    """
    rule = _Lookahead(
        as_transformation(inner), checked_sync_period(sync_period), checked_slow_step_size(slow_step_size)
    )
    return LookaheadTransformation(rule.init, rule.update)


class _Lookahead:
    """The functions of the transformation, with its settings.

    A sync only changes the parameters; the slow ones are read from them at the next update. That makes it
    elementwise, so that XLA fuses it into the inner transformation's last operation and needs no buffer for it, and
    whatever the caller's addition rounds the updates to, fast and slow parameters are the same afterwards.
    """

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        sync_period: SyncPeriod,
        slow_step_size: SlowStepSize | optax.Schedule,
    ) -> None:
        self.inner, self.sync_period, self.slow_step_size = inner, sync_period, slow_step_size
        self.inner_states = InnerStates(inner)

    def __repr__(self) -> str:
        return f"lookahead({self.inner!r}, sync_period={self.sync_period!r}, slow_step_size={self.slow_step_size!r})"

    def init(self, params: optax.Params) -> LookaheadState:
        step = jnp.zeros((), jnp.int32)
        inner_state = self.inner.init(params)
        self.inner_states.add(inner_state)
        return LookaheadState(
            inner_state=inner_state,
            slow_params=None if is_off(self.sync_period) else initial(params),
            step=step,
            captured=jnp.zeros((), jnp.int32),
            next_slow_step_size=self._next_slow_step_size(step),
        )

    def update(
        self,
        updates: optax.Updates | _ForParams,
        state: LookaheadState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates | None, LookaheadState | _Step]:
        check_update(state, params, is_off(self.sync_period))
        self.inner_states.check(state, params)
        grads = updates.grads if isinstance(updates, _ForParams) else updates
        inner_updates, is_sync, new_state = self._advance(grads, state, params, extra_args)
        slow_step_size = slow_step_size_at(state.step, self.sync_period, self.slow_step_size)
        slow = new_state.slow_params
        if isinstance(updates, _ForParams):
            fast = add_updates(params, inner_updates)
            if not is_off(self.sync_period):
                fast = params_after_sync(is_sync, slow, fast, inner_updates, slow_step_size)
            return None, _Step(fast, new_state)
        if not is_off(self.sync_period):
            inner_updates = updates_to_sync(is_sync, slow, inner_updates, params, slow_step_size)
        return inner_updates, new_state

    def _advance(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, jax.Array, LookaheadState]:
        """Return the inner updates, whether a sync follows them, and the new state."""
        slow = state.slow_params if is_off(self.sync_period) else capture_if_stale(state, params)
        updates, inner_state = self.inner.update(grads, state.inner_state, params, **extra_args)
        self.inner_states.add(inner_state)
        is_moved = is_applied(state.inner_state, inner_state)
        is_step = is_moved & completes_step(inner_state)
        step = jnp.where(is_step, next_count(state.step, self.sync_period), state.step)
        is_sync = is_step & is_due(step, self.sync_period)
        # The adversarial steps of `sam` move the parameters and complete no step.
        since_capture = jnp.maximum(jnp.minimum(state.captured, END - 1) + is_step, 1)
        captured = jnp.where(is_sync | (self.sync_period == 0), 0, since_capture)
        # `mark_stale` marks the states of wrappers inside, and `captured` this one's own.
        new_state = LookaheadState(
            inner_state=mark_stale(inner_state, is_sync),
            slow_params=slow,
            step=step,
            captured=jnp.where(is_moved, captured, state.captured).astype(jnp.int32),
            next_slow_step_size=self._next_slow_step_size(step),
        )
        return updates, is_sync, new_state

    def _next_slow_step_size(self, step: jax.Array) -> jax.Array:
        # A copy, as no buffer can be donated twice.
        return jnp.array(slow_step_size_at(step, self.sync_period, self.slow_step_size), float)
