"""The outer step: pseudo-gradient, slow step, restart.

`outer_step` makes it for one weight. The functions for trees make it for all weights if it is due: one for parameters,
one for updates that are still to be added to them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lookahead_optim.optax._count import SlowStepSize
from lookahead_optim.optax._slow_weights import is_weight
from lookahead_optim.optax._trees import map_at_paths_of

__all__ = ["is_one", "outer_step", "params_after_sync", "updates_to_sync"]


def outer_step(slow: ArrayLike, fast: ArrayLike, slow_step_size: SlowStepSize) -> jax.Array:
    """Return the slow weight after an outer step, which the fast weight restarts from, in the fast weight's dtype."""
    fast = jnp.asarray(fast)
    if is_one(slow_step_size):
        return fast
    if jnp.iscomplexobj(fast):
        return _by_parts(outer_step, slow, fast, slow_step_size=slow_step_size)
    wide_slow, wide_fast = _wide(slow), _wide(fast)
    pseudo_gradient = _pseudo_gradient(wide_slow, wide_fast)
    new_slow = _slow_step(wide_slow, wide_fast, pseudo_gradient, slow_step_size)
    return new_slow.astype(fast.dtype)  # where the fast weight restarts


def _pseudo_gradient(slow: jax.Array, fast: jax.Array) -> jax.Array:
    """Return slow - fast, or 0 where that is not finite.

    The sign changes last. The bits of `slow - fast` are the same, but XLA rounds sums and products once where it fuses
    them, and `fast` ends in a sum: with `slow - fast` runs on several devices more often differ from those on one by
    a rounding.
    """
    way = fast - slow
    return -jnp.where(jnp.isfinite(way), way, 0)


def _slow_step(slow: jax.Array, fast: jax.Array, pseudo_gradient: jax.Array, slow_step_size: SlowStepSize) -> jax.Array:
    """Return slow - slow_step_size * pseudo_gradient, also for a step size of 1 and at the ends of the dtype's range.

    Step sizes may be traced, so each case is computed and one is selected. The derivatives by the step size are those
    of the formula in every case.
    """
    stepped = slow - slow_step_size * pseudo_gradient
    # slow - (slow - fast) is not `fast` in general. This is, as 0 is added to it.
    stepped_by_one = fast + (1 - slow_step_size) * pseudo_gradient
    # The difference of large numbers of opposite sign overflows, their weighted mean does not. It is taken for infinite
    # weights too. The zeros in place of all other numbers keep infinities (of a mask, say) out of the derivatives:
    # the derivative of what `where` does not select is multiplied by 0, and 0 times infinity is NaN.
    overflows = ~(jnp.isfinite(fast - slow) | (slow == fast) | (slow_step_size == 0))
    slow, fast = jnp.where(overflows, slow, 0), jnp.where(overflows, fast, 0)
    mean = (1 - slow_step_size) * slow + slow_step_size * fast
    return jnp.where(slow_step_size == 1, stepped_by_one, jnp.where(overflows, mean, stepped))


def is_one(slow_step_size: SlowStepSize) -> bool:
    """Return whether a slow step size is known to be 1: then an outer step changes no parameter."""
    return isinstance(slow_step_size, float) and slow_step_size == 1


def params_after_sync(
    is_sync: jax.Array, slow: optax.Params, fast: optax.Params, updates: optax.Updates, slow_step_size: SlowStepSize
) -> optax.Params:
    """Return the parameters after the outer step, if it is due, or else the fast ones.

    On the CPU XLA takes the choice out of the loop over the elements. On a GPU it does not, so that the slow parameters
    are read at every step. That is still less than what a conditional costs there: before it XLA copies all parameters.

    A weight whose update is `None` is frozen: it is not moved, and the next capture takes its own value.
    """

    def restart(slow: ArrayLike, fast: ArrayLike, update: ArrayLike | None) -> ArrayLike:
        if update is None or not is_weight(slow):
            return fast
        return jnp.where(is_sync, outer_step(slow, fast, slow_step_size), fast)

    return fast if is_one(slow_step_size) else map_at_paths_of(restart, slow, fast, updates)


def updates_to_sync(
    is_sync: jax.Array, slow: optax.Params, updates: optax.Updates, params: optax.Params, slow_step_size: SlowStepSize
) -> optax.Updates:
    """Return updates that lead to the same parameters, up to the rounding of the update and of the sum."""

    def restart(slow: ArrayLike, update: ArrayLike | None, param: ArrayLike) -> ArrayLike | None:
        if update is None or not is_weight(slow):
            return update
        update = jnp.asarray(update)
        return jnp.where(is_sync, _update_to_sync(slow, update, jnp.asarray(param), slow_step_size), update)

    return updates if is_one(slow_step_size) else map_at_paths_of(restart, slow, updates, params)


def _update_to_sync(slow: ArrayLike, update: jax.Array, param: jax.Array, slow_step_size: SlowStepSize) -> jax.Array:
    """Return the update from a parameter to where the outer step brings it, in place of the one to the fast weight."""
    if jnp.iscomplexobj(param):
        return _by_parts(_update_to_sync, slow, update, param, slow_step_size=slow_step_size)
    fast = (param + update).astype(param.dtype)
    end, start = _wide(outer_step(slow, fast, slow_step_size)), _wide(param)
    # Equal infinities, such as those of a mask among the parameters, have no difference. Nothing moves them.
    way = jnp.where(jnp.isinf(end) & (end == start), 0, end - start)
    # No finite update leads from a large number to one of opposite sign. The largest goes as far as one can.
    largest = min(float(jnp.finfo(dtype).max) for dtype in (update.dtype, way.dtype))
    way = jnp.where(jnp.isfinite(end), jnp.clip(way, -largest, largest), way)
    # For a step size of 1 the update itself, bit for bit, with the same derivative by the step size.
    pseudo_gradient = _pseudo_gradient(_wide(slow), _wide(fast))
    unchanged = update + ((1 - slow_step_size) * pseudo_gradient).astype(update.dtype)
    return jnp.where(slow_step_size == 1, unchanged, way.astype(update.dtype))


def _by_parts(function: Callable[..., jax.Array], *values: ArrayLike, slow_step_size: SlowStepSize) -> jax.Array:
    """Return what a function makes of the real and of the imaginary parts of complex numbers."""
    real, imaginary = (function(*map(part, values), slow_step_size=slow_step_size) for part in (jnp.real, jnp.imag))
    return jax.lax.complex(real, imaginary)


def _wide(value: ArrayLike) -> jax.Array:
    """Return an array in at least single precision."""
    value = jnp.asarray(value)
    return value.astype(jnp.float32) if jnp.finfo(value.dtype).bits < 32 else value
