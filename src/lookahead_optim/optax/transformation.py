"""The gradient transformation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim.optax._interpolation import interpolate, is_array, is_number, is_one, is_weight, slow_update
from lookahead_optim.optax._state import (
    END,
    LookaheadState,
    at_paths_of,
    by_path,
    fits,
    missing,
    progress,
    replaced,
    restart,
    shapes,
)

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
            is the inner one. 2^31 or more is never due. An array may be traced, and its value is not checked. Defaults
            to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$), or an Optax schedule of the number of syncs
            so far, `step // sync_period`. 1 recovers the inner transformation. An array may be traced, and its value
            is not checked. Defaults to 0.5.

    Returns:
        An `optax.GradientTransformationExtraArgs` that has `apply_gradients` too.

    Raises:
        TypeError: if `inner`, `sync_period` or `slow_step_size` has the wrong type.
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
    # Of states that the inner transformation made, as to find out which it makes means to trace its `init`.
    known_structures: list[Any] = dataclasses.field(default_factory=list)

    def init(self, params: optax.Params) -> LookaheadState:
        step = jnp.zeros((), jnp.int32)
        inner_state = self.inner.init(params)
        self._know(inner_state)
        return LookaheadState(
            inner_state=inner_state,
            # Copies, here and of the step size, as a buffer cannot be donated twice.
            slow_params=None if self._is_off() else jax.tree.map(_copy, params),
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
            if update is None or not is_weight(slow):
                return update
            update = jnp.asarray(update)
            return jnp.where(is_sync, slow_update(slow, jnp.asarray(param), update, slow_step_size), update)

        return self._where_slow(at_sync, new_state.slow_params, params, updates), new_state

    def apply_gradients(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, LookaheadState]:
        updates, is_sync, new_state = self._advance(grads, state, params, extra_args)
        slow_step_size = self._slow_step_size_at(state.step)

        def apply(param: Any, update: Any) -> Any:
            return param if update is None else jnp.asarray(param + update).astype(jnp.result_type(param))

        fast = jax.tree.map(apply, params, updates)
        if self._is_off() or is_one(slow_step_size):
            return fast, new_state

        def at_sync(slow: Any, update: Any, fast: Any) -> Any:
            if update is None or not is_weight(slow):
                return fast
            return jnp.where(is_sync, interpolate(slow, fast, slow_step_size), fast)

        return self._where_slow(at_sync, new_state.slow_params, updates, fast), new_state

    def _where_slow(self, function: Callable[..., Any], slow: optax.Params, *trees: Any) -> Any:
        """Return the last tree, with what a function makes of the leaves of all where there is a slow parameter."""
        moved = jax.tree.map(function, slow, *(at_paths_of(slow, tree) for tree in trees))
        return replaced(trees[-1], moved)

    def _advance(
        self, updates: optax.Updates, state: LookaheadState, params: optax.Params | None, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, jax.Array, LookaheadState]:
        """Return the inner updates, whether they end a cycle, and the new state."""
        if params is None:
            raise ValueError(
                "`params` must be given to the update of a `lookahead`, which moves them: "
                "`update(updates, state, params)`. Received: params=None"
            )
        self._check(state, params)
        slow = state.slow_params
        if not self._is_off():
            # In this order: with `_capture` where the predicate is false, XLA copies all slow parameters at every step.
            slow = jax.lax.cond(state.captured == 0, _capture, _keep, slow, at_paths_of(slow, params))
        updates, inner_state = self.inner.update(updates, state.inner_state, params, **extra_args)
        self._know(inner_state)
        is_applied, is_counted = progress(state.inner_state, inner_state)
        step = jnp.where(is_counted, self._next(state.step), state.step)
        is_sync = is_counted & self._is_due(step)
        captured = jnp.where(is_sync | (self.sync_period == 0), 0, 1)
        new_state = LookaheadState(
            inner_state=restart(inner_state, is_sync),
            slow_params=slow,
            step=step,
            captured=jnp.where(is_applied, captured, state.captured).astype(jnp.int32),
            next_slow_step_size=jnp.array(self._slow_step_size_at(step), float),
        )
        return updates, is_sync, new_state

    def _check(self, state: Any, params: optax.Params) -> None:
        """Raise `ValueError` if a state is none of this transformation, or of other parameters."""
        if not isinstance(state, LookaheadState):
            raise ValueError(
                "`state` must be a `lookahead_optim.optax.LookaheadState`, as `init` returns it. For a state of the "
                "bare inner transformation pass `init(params)._replace(inner_state=state)`. "
                f"Received: state={state!r:.500} of type {type(state).__name__}"
            )
        slow = state.slow_params
        if not self._is_off():
            if slow is None and jax.tree.leaves(params):
                raise ValueError(
                    "`state` must have slow parameters, and one that was made with sync_period=0 has none. "
                    "To go on, pass `init(params)._replace(inner_state=state.inner_state, step=state.step)`. "
                    "Received: state.slow_params=None"
                )
            if missing(slow, by_path(params)):
                raise ValueError(
                    "`params` must be like those that the state was initialised with, which have the paths and shapes "
                    f"{shapes(slow)!r:.500}. Received: {shapes(params)!r:.500}"
                )
        if jax.tree.structure(state.inner_state) not in self.known_structures:
            try:
                like = jax.eval_shape(self.inner.init, params if slow is None else slow)
            except Exception:  # An `init` that cannot be traced, as it reads values, does not say what it returns.
                like = state.inner_state
            if not fits(state.inner_state, like):
                raise ValueError(
                    "`state` must be that of a `lookahead` around the same inner transformation, whose state has the "
                    f"structure {jax.tree.structure(like)!s:.500}. Call `init` anew for another one. "
                    f"Received: state.inner_state={state.inner_state!r:.500}"
                )

    def _know(self, inner_state: optax.OptState) -> None:
        structure = jax.tree.structure(inner_state)
        if structure not in self.known_structures:
            self.known_structures.append(structure)

    def _is_off(self) -> bool:
        return not is_array(self.sync_period) and self.sync_period == 0

    def _is_due(self, step: jax.Array) -> jax.Array:
        return (step % self._cycle() == 0) & (self.sync_period > 0) & (self.sync_period <= END)

    def _next(self, step: jax.Array) -> jax.Array:
        # From the end of int32 a whole cycle back, which keeps the phase.
        return jnp.where(step < END, step + 1, END - (self._cycle() - 1)).astype(step.dtype)

    def _cycle(self) -> Any:
        if isinstance(self.sync_period, jax.Array):
            return jnp.maximum(self.sync_period, 1)
        return min(max(int(self.sync_period), 1), int(END))

    def _slow_step_size_at(self, step: jax.Array) -> Any:
        return self.slow_step_size(step // self._cycle()) if callable(self.slow_step_size) else self.slow_step_size


# Branches of a conditional: as functions of the module they are traced and compiled once outside of `jit` too.
def _keep(slow: Any, params: Any) -> Any:
    return slow


def _capture(slow: Any, params: Any) -> Any:
    return jax.tree.map(lambda slow, param: slow if param is None else jnp.asarray(param, slow.dtype), slow, params)


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros_like(leaf)
    return jnp.copy(leaf) if is_number(leaf) else None


def _check_scalar(name: str, value: Any, kinds: tuple[type, ...], article: str) -> None:
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds) or value.ndim:
        raise TypeError(
            f"`{name}` must be {article} scalar if it is an array. "
            f"Received: an array of dtype {value.dtype} and shape {value.shape}"
        )
