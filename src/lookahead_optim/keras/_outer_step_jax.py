"""The outer step on JAX arrays: pseudo-gradient, slow momentum, slow step, restart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_optim._rounded_jax import rounded

__all__ = ["OuterStep", "Values", "capture", "outer_step"]


class Values(NamedTuple):
    """Arrays: a slow weight, its fast weight, and its slow momentum or `None`."""

    slow: jax.Array
    fast: jax.Array
    momentum: jax.Array | None


class OuterStep(NamedTuple):
    """The settings of an outer step. In a traced step the step size may be an array."""

    slow_step_size: float | jax.Array
    slow_momentum: float = 0.0
    slow_nesterov: bool = True


def capture(values: Values) -> Values:
    """Return the weights after a capture. Slow momentum starts from 0."""
    slow, fast, momentum = values
    # Without the copy two variables would share a buffer, which cannot be donated twice.
    return Values(jnp.copy(fast.astype(slow.dtype)), fast, None if momentum is None else jnp.zeros_like(momentum))


def outer_step(values: Values, step: OuterStep, constraint: Callable[[jax.Array], Any] | None) -> Values:
    """Return the weights after an outer step. A constraint is applied to the slow and to the fast weight.

    With slow momentum b, its factor mu and the slow step size eta, the step is

        s = slow - fast
        b = mu * b + s
        d = s + mu * b with Nesterov's momentum, else b
        slow = slow - eta * d
        fast = slow
    """
    slow, fast, momentum = values
    if momentum is None and slow.dtype == fast.dtype:
        slow = _interpolate(slow, fast, step.slow_step_size)
    else:
        slow, momentum = _descend(values, step)
    if constraint is not None:
        slow = jnp.asarray(constraint(slow))
    # A copy for the restart, for the same reason as at a capture.
    return Values(slow, jnp.copy(slow.astype(fast.dtype)), momentum)


def _descend(values: Values, step: OuterStep) -> tuple[jax.Array, jax.Array | None]:
    """Return the new slow weight and the new slow momentum, each rounded once to its dtype.

    The fast weight started from the slow weight rounded to its dtype, so the pseudo-gradient is measured from there.
    Then a slow weight of a wider dtype does not change by a bit if its fast weight did not move.
    """
    slow, fast, momentum = values
    dtype = jnp.promote_types(slow.dtype, jnp.float32)
    start, end = slow.astype(dtype), fast.astype(dtype)
    pseudo_gradient = _pseudo_gradient(rounded(start, fast.dtype), end)
    slow_step_size = _as_dtype(step.slow_step_size, dtype)
    if momentum is None:
        moved = jnp.where(slow_step_size == 1, end, start - slow_step_size * pseudo_gradient)
        return moved.astype(slow.dtype), None
    new_momentum = step.slow_momentum * momentum.astype(dtype) + pseudo_gradient
    if momentum.dtype == dtype:
        # The pseudo-gradient has two users, so XLA would keep it in an array of its own. Behind the barrier XLA does
        # not notice that it computes the same values twice. It then reads two arrays once more, and neither writes nor
        # reads the extra array.
        new_momentum, slow, fast = jax.lax.optimization_barrier((new_momentum, slow, fast))
        start, end = slow.astype(dtype), fast.astype(dtype)
        pseudo_gradient = _pseudo_gradient(rounded(start, fast.dtype), end)
    direction = pseudo_gradient + step.slow_momentum * new_momentum if step.slow_nesterov else new_momentum
    moved = start - slow_step_size * direction
    return moved.astype(slow.dtype), new_momentum.astype(momentum.dtype)


def _pseudo_gradient(start: jax.Array, end: jax.Array) -> jax.Array:
    """Return the way back to the restart point. Between equal infinities, such as in a mask, it is 0."""
    way = start - end
    return jnp.where(jnp.isnan(way) & (start == end), 0, way)


def _as_dtype(slow_step_size: float | jax.Array, dtype: jnp.dtype) -> float | jax.Array:
    return slow_step_size.astype(dtype) if isinstance(slow_step_size, jax.Array) else slow_step_size


def _interpolate(slow: jax.Array, fast: jax.Array, slow_step_size: float | jax.Array) -> jax.Array:
    """Return the new slow weight, rounded once to its dtype. Without momentum the outer step is an interpolation.

    The formula uses the negative pseudo-gradient, `fast - slow`. So it gives the same bits as TensorFlow Addons'
    formula, except for -0: there a weight that does not move becomes 0.

    The formula is NaN for equal infinities, and infinite for large finite weights of opposite sign. Where the
    pseudo-gradient is infinite or NaN, the slow step is therefore a weighted mean. A step size of 0 gives `slow` and a
    step size of 1 gives `fast`, even if the other weight is NaN.
    """
    if isinstance(slow_step_size, float) and slow_step_size in (0, 1):
        return fast if slow_step_size else slow
    dtype = jnp.promote_types(slow.dtype, jnp.float32)
    start, end = slow.astype(dtype), fast.astype(dtype)
    slow_step_size = _as_dtype(slow_step_size, dtype)
    negative_pseudo_gradient = end - start
    mean = jnp.where(start == end, start, (1 - slow_step_size) * start + slow_step_size * end)
    is_usual = jnp.isfinite(negative_pseudo_gradient)
    moved = jnp.where(is_usual, start + slow_step_size * negative_pseudo_gradient, mean)
    if isinstance(slow_step_size, jax.Array):
        moved = jnp.where(slow_step_size == 0, start, jnp.where(slow_step_size == 1, end, moved))
    return moved.astype(slow.dtype)
