"""The slow step of one parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["interpolate", "is_array", "is_number", "is_one", "is_weight", "slow_update"]


def is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def is_number(leaf: Any) -> bool:
    """Return whether a leaf is an array or a number. Models in Equinox have functions among their leaves."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)) or hasattr(leaf, "__jax_array__")


def is_weight(slow: Any) -> bool:
    """Return whether a leaf of the slow parameters takes part in the slow step: numbers that are not integers."""
    return jnp.issubdtype(jnp.result_type(slow), jnp.inexact)


def is_one(slow_step_size: Any) -> bool:
    """Return whether a slow step size is known to be 1."""
    return isinstance(slow_step_size, float) and slow_step_size == 1


def interpolate(slow: Any, fast: Any, slow_step_size: Any) -> jax.Array:
    """Return slow + slow_step_size (fast - slow), in at least single precision, rounded once."""
    fast = jnp.asarray(fast)
    if is_one(slow_step_size):
        return fast
    if jnp.iscomplexobj(fast):
        return _by_parts(interpolate, slow, fast, slow_step_size=slow_step_size)
    slow, dtype, fast = _wide(slow), fast.dtype, _wide(fast)
    difference = _finite(fast - slow)
    moved = slow + slow_step_size * difference
    # That is not exactly `fast` for a step size of 1; this is, with the same derivative by it.
    back = fast - (1 - slow_step_size) * difference
    # Large numbers of opposite sign: their difference overflows, their mean does not. The zeros in place of all other
    # numbers keep the infinities of a mask, say, out of the derivatives.
    overflows = ~(jnp.isfinite(fast - slow) | (slow == fast) | (slow_step_size == 0))
    slow, fast = jnp.where(overflows, slow, 0), jnp.where(overflows, fast, 0)
    mean = (1 - slow_step_size) * slow + slow_step_size * fast
    return jnp.where(slow_step_size == 1, back, jnp.where(overflows, mean, moved)).astype(dtype)


def slow_update(slow: Any, param: jax.Array, update: jax.Array, slow_step_size: Any) -> jax.Array:
    """Return the update that brings a parameter, instead of to `param + update`, to where the slow step brings it."""
    if jnp.iscomplexobj(param):
        return _by_parts(slow_update, slow, param, update, slow_step_size=slow_step_size)
    fast = (param + update).astype(param.dtype)
    target, start = _wide(interpolate(slow, fast, slow_step_size)), _wide(param)
    # 0 also for equal infinities, such as those of a mask among the parameters.
    to_target = jnp.where(jnp.isinf(target) & (target == start), 0, target - start)
    # From a large number to one of opposite sign no update leads: then as far as one does.
    farthest = min(float(jnp.finfo(dtype).max) for dtype in (update.dtype, to_target.dtype))
    to_target = jnp.where(jnp.isfinite(target), jnp.clip(to_target, -farthest, farthest), to_target)
    # The same update for a step size of 1, with the same derivative by it.
    unchanged = update - ((1 - slow_step_size) * _finite(_wide(fast) - _wide(slow))).astype(update.dtype)
    return jnp.where(slow_step_size == 1, unchanged, to_target.astype(update.dtype))


def _by_parts(function: Callable[..., jax.Array], *values: Any, **settings: Any) -> jax.Array:
    """Return what a function makes of the real and of the imaginary parts of complex numbers."""
    return jax.lax.complex(*(function(*map(part, values), **settings) for part in (jnp.real, jnp.imag)))


def _wide(value: Any) -> jax.Array:
    """Return an array in at least single precision."""
    value = jnp.asarray(value)
    return value.astype(jnp.float32) if jnp.finfo(value.dtype).bits < 32 else value


def _finite(difference: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(difference), difference, 0)
