"""The slow step of one parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["interpolate", "is_array", "is_one", "is_weight", "slow_update"]


def is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def is_weight(param: Any) -> bool:
    """Return whether a leaf takes part in the slow step: numbers that are not integers."""
    return jnp.issubdtype(jnp.result_type(param), jnp.inexact)


def is_one(slow_step_size: Any) -> bool:
    """Return whether a slow step size is known to be 1."""
    return isinstance(slow_step_size, float) and slow_step_size == 1


def interpolate(slow: Any, fast: Any, slow_step_size: Any) -> jax.Array:
    """Return slow + slow_step_size (fast - slow), in at least single precision, rounded once."""
    fast = jnp.asarray(fast)
    if is_one(slow_step_size):
        return fast
    wide_slow, wide_fast = _wide(slow), _wide(fast)
    difference = _difference(wide_fast, wide_slow)
    moved = wide_slow + slow_step_size * difference
    # That is not exactly `fast` for a step size of 1; this is, with the same derivative by it.
    back = wide_fast - (1 - slow_step_size) * _finite(difference)
    return jnp.where(slow_step_size == 1, back, moved).astype(fast.dtype)


def slow_update(slow: Any, param: jax.Array, update: jax.Array, slow_step_size: Any) -> jax.Array:
    """Return the update that brings a parameter, instead of to `param + update`, to where the slow step brings it."""
    fast = (param + update).astype(param.dtype)
    to_target = _difference(_wide(interpolate(slow, fast, slow_step_size)), _wide(param))
    # The same update for a step size of 1, with the same derivative by it.
    unchanged = update - ((1 - slow_step_size) * _finite(_difference(_wide(fast), _wide(slow)))).astype(update.dtype)
    return jnp.where(slow_step_size == 1, unchanged, to_target.astype(update.dtype))


def _wide(value: Any) -> jax.Array:
    """Return an array in at least single precision."""
    value = jnp.asarray(value)
    return value.astype(jnp.float32) if jnp.finfo(value.dtype).bits < 32 else value


def _difference(one: jax.Array, other: jax.Array) -> jax.Array:
    # 0 also for equal infinities, such as those of a mask among the parameters.
    return jnp.where(jnp.isinf(one) & (one == other), 0, one - other)


def _finite(difference: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(difference), difference, 0)
