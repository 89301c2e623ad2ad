"""The outer step on JAX arrays: pseudo-gradient, slow step, restart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Values", "capture", "outer_step"]


class Values(NamedTuple):
    """A slow weight and its fast one, both arrays."""

    slow: jax.Array
    fast: jax.Array


def capture(values: Values) -> Values:
    """Return the weights after a capture."""
    # Without the copy two variables would share a buffer, which cannot be donated twice.
    return Values(jnp.copy(values.fast), values.fast)


def outer_step(
    values: Values, slow_step_size: float | jax.Array, constraint: Callable[[jax.Array], Any] | None
) -> Values:
    """Return the weights after an outer step. A constraint holds in both.

    With s = slow - fast, the pseudo-gradient, this is slow = slow - slow_step_size * s, then fast = slow.
    """
    slow = _slow_step(*values, slow_step_size)
    if constraint is not None:
        slow = jnp.asarray(constraint(slow))
    # A copy for the restart, as at a capture.
    return Values(slow, jnp.copy(slow))


def _slow_step(slow: jax.Array, fast: jax.Array, slow_step_size: float | jax.Array) -> jax.Array:
    """Return the new slow weight, rounded once to its dtype.

    The pseudo-gradient is taken with its sign turned, as `fast - slow`. That is TensorFlow Addons' formula to the last
    bit: only at -0 the two differ, where a weight that stays becomes 0.

    Where the pseudo-gradient is infinite or NaN, the formula is NaN for equal infinities, and infinite for large finite
    weights of opposite sign. There the slow step is a weighted mean. A step size of 0 gives `slow` and one of 1 gives
    `fast`, also if the other one is NaN.
    """
    if isinstance(slow_step_size, float) and slow_step_size in (0, 1):
        return fast if slow_step_size else slow
    dtype = jnp.promote_types(slow.dtype, jnp.float32)
    start, end = slow.astype(dtype), fast.astype(dtype)
    if isinstance(slow_step_size, jax.Array):
        slow_step_size = slow_step_size.astype(dtype)
    negative_pseudo_gradient = end - start
    mean = jnp.where(start == end, start, (1 - slow_step_size) * start + slow_step_size * end)
    is_usual = jnp.isfinite(negative_pseudo_gradient)
    moved = jnp.where(is_usual, start + slow_step_size * negative_pseudo_gradient, mean)
    if isinstance(slow_step_size, jax.Array):
        moved = jnp.where(slow_step_size == 0, start, jnp.where(slow_step_size == 1, end, moved))
    return moved.astype(slow.dtype)
