"""The gradient transformation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim.optax._interpolation import interpolate, is_array, is_one, is_weight, slow_update
from lookahead_optim.optax._state import LookaheadState, progress, restart, shapes

__all__ = ["LookaheadTransformation", "lookahead"]


class LookaheadTransformation(optax.GradientTransformationExtraArgs):
    """The `optax.GradientTransformationExtraArgs` that `lookahead` returns, with one function more."""

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
        """
        return self.update.__self__.apply_gradients(grads, state, params, **extra_args)


def lookahead(
    inner: optax.GradientTransformation,
    sync_period: jax.typing.ArrayLike = 6,
    slow_step_size: jax.typing.ArrayLike | optax.Schedule = 0.5,
) -> LookaheadTransformation:
    r"""Lookahead: `k` steps forward, one step back.

    The inner transformation moves the parameters, the *fast* ones $\theta$. After every `sync_period` ($k$) of its
    updates a second copy of them, the *slow* parameters $\phi$, takes a step towards the fast ones, and these restart
    from there:

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.$$

    Parameters and updates are plain trees; the slow parameters live in the state. They are captured immediately before
    the first update and take the memory of one more copy of the parameters. `slow_params` finds them in the state of
    any optimizer that this transformation is a part of. After a sync they are the parameters that the updates result
    in, bit for bit, also if something behind it in an `optax.chain` has changed these updates.

    What counts is an update that is applied. Gradients that `optax.MultiSteps` inside only accumulates, those that
    `optax.apply_if_finite` inside finds not to be finite (also those that it applies in the end, after too many), and
    the adversarial steps of `optax.contrib.sam` do not. Where such a transformation holds for a part of the parameters
    only, in an `optax.partition`, put the `lookahead` into that too, around it.

    A `lookahead` may be inside another. Both count the updates of the innermost transformation, and all parameters
    restart from those that the outer one has synchronised, the inner one's slow ones too.

    Args:
        inner: The inner transformation, or an `optax.MultiSteps`. What changes its updates belongs inside:
            `lookahead(optax.chain(...))`.
        sync_period: Integer >= 0, inner updates per slow step ($k$). 0 switches Lookahead off: the transformation then
            is the inner one. An array may be traced, and its value is not checked. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$), or an Optax schedule of the number of syncs
            so far, `step // sync_period`. 1 recovers the inner transformation. An array may be traced, and its value
            is not checked. Defaults to 0.5.

    Returns:
        An `optax.GradientTransformationExtraArgs` that has `apply_gradients` too.

    Raises:
        TypeError: if `inner`, `sync_period` or `slow_step_size` has the wrong type.
        ValueError: if a number is out of range, or, from an update, if it is not given parameters like those of `init`.

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
        Zhang, Lucas, Hinton and Ba, [Lookahead Optimizer: k steps forward, 1 step
        back](https://arxiv.org/abs/1907.08610), 2019, Algorithm 1.
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be an `optax.GradientTransformation`, such as `optax.adam(1e-3)`, or an `optax.MultiSteps`. "
            f"Received: inner={inner!r} of type {type(inner).__name__}"
        )
    if is_array(sync_period):
        _check_scalar("sync_period", sync_period, (np.integer,), "an integer")
    else:
        sync_period = check_sync_period(sync_period)
    if is_array(slow_step_size):
        _check_scalar("slow_step_size", slow_step_size, (np.integer, np.floating), "a real")
    elif not callable(slow_step_size):
        slow_step_size = check_slow_step_size(slow_step_size)
    rule = _Lookahead(optax.with_extra_args_support(inner), sync_period, slow_step_size)
    return LookaheadTransformation(rule.init, rule.update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lookahead:
    """The functions of the transformation, with its settings.

    A sync only changes the parameters; the slow ones are read from them at the next update. That makes it
    elementwise, so that XLA fuses it into the inner transformation's last operation and needs no buffer for it, and
    whatever the caller's addition rounds the updates to, fast and slow parameters are the same afterwards.
    """

    inner: optax.GradientTransformationExtraArgs
    sync_period: Any
    slow_step_size: Any

    def init(self, params: optax.Params) -> LookaheadState:
        step = jnp.zeros((), jnp.int32)
        return LookaheadState(
            inner_state=self.inner.init(params),
            # Copies, here and of the step size, as a buffer cannot be donated twice.
            slow_params=None if self._is_off() else jax.tree.map(jnp.copy, params),
            step=step,
            captured=jnp.zeros((), jnp.int32),
            next_slow_step_size=jnp.array(self._slow_step_size_at(step), float),
        )

    def update(
        self, updates: optax.Updates, state: LookaheadState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LookaheadState]:
        updates, is_sync, new_state = self._advance(updates, state, params, extra_args)
        slow_step_size = self._slow_step_size_at(state.step)
        if self._is_off() or is_one(slow_step_size):
            return updates, new_state

        def at_sync(slow: Any, param: Any, update: Any) -> Any:
            if update is None or not is_weight(param):
                return update
            update = jnp.asarray(update)
            return jnp.where(is_sync, slow_update(slow, jnp.asarray(param), update, slow_step_size), update)

        return jax.tree.map(at_sync, new_state.slow_params, params, updates), new_state

    def apply_gradients(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, LookaheadState]:
        updates, is_sync, new_state = self._advance(grads, state, params, extra_args)
        slow_step_size = self._slow_step_size_at(state.step)
        if self._is_off() or is_one(slow_step_size):
            return optax.apply_updates(params, updates), new_state

        def apply(slow: Any, param: Any, update: Any) -> Any:
            if update is None:
                return param
            fast = jnp.asarray(param + update).astype(jnp.result_type(param))
            return jnp.where(is_sync, interpolate(slow, fast, slow_step_size), fast) if is_weight(param) else fast

        return jax.tree.map(apply, new_state.slow_params, params, updates), new_state

    def _advance(
        self, updates: optax.Updates, state: LookaheadState, params: optax.Params | None, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, jax.Array, LookaheadState]:
        """Return the inner updates, whether they end a cycle, and the new state."""
        if params is None:
            raise ValueError(
                "`params` must be given to the update of a `lookahead`, which moves them: "
                "`update(updates, state, params)`. Received: params=None"
            )
        slow = state.slow_params
        if not self._is_off():
            _check_like(slow, params)
            # In this order: with `_capture` where the predicate is false, XLA copies all slow parameters at every step.
            slow = jax.lax.cond(state.captured == 0, _capture, _keep, slow, params)
        updates, inner_state = self.inner.update(updates, state.inner_state, params, **extra_args)
        is_applied, is_counted = progress(state.inner_state, inner_state)
        step = jnp.where(is_counted, optax.safe_increment(state.step), state.step)
        is_sync = is_counted & (step % self._cycle() == 0) & (self.sync_period > 0)
        captured = jnp.where(is_sync | (self.sync_period == 0), 0, 1)
        new_state = LookaheadState(
            inner_state=restart(inner_state, is_sync),
            slow_params=slow,
            step=step,
            captured=jnp.where(is_applied, captured, state.captured).astype(jnp.int32),
            next_slow_step_size=jnp.array(self._slow_step_size_at(step), float),
        )
        return updates, is_sync, new_state

    def _is_off(self) -> bool:
        return not is_array(self.sync_period) and self.sync_period == 0

    def _cycle(self) -> Any:
        return jnp.maximum(self.sync_period, 1)

    def _slow_step_size_at(self, step: jax.Array) -> Any:
        return self.slow_step_size(step // self._cycle()) if callable(self.slow_step_size) else self.slow_step_size


# Branches of a conditional: as functions of the module they are traced and compiled once outside of `jit` too.
def _keep(slow: Any, params: Any) -> Any:
    return slow


def _capture(slow: Any, params: Any) -> Any:
    return jax.tree.map(lambda slow, param: jnp.asarray(param, slow.dtype), slow, params)


def _check_scalar(name: str, value: Any, kinds: tuple[type, ...], article: str) -> None:
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds) or value.ndim:
        raise TypeError(
            f"`{name}` must be {article} scalar if it is an array. "
            f"Received: an array of dtype {value.dtype} and shape {value.shape}"
        )


def _check_like(slow: Any, params: Any) -> None:
    same = jax.tree.structure(slow) == jax.tree.structure(params)  # type: ignore[operator]
    if not same or any(jnp.shape(one) != jnp.shape(two) for one, two in zip(*map(jax.tree.leaves, (slow, params)))):
        raise ValueError(
            "`params` must be like those that the state was initialised with, which have the paths and shapes "
            f"{shapes(slow)!r:.500}. Received: {shapes(params)!r:.500}"
        )
