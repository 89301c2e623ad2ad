"""The outer step: pseudo-gradient, momentum, slow step, restart.

`outer_step` makes it for one weight. The functions for trees make the plain outer step, without momentum and in the
weights' own dtype, for all weights if it is due. One function is for parameters, the other for updates that are still
to be added.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lookahead_optim._rounded_jax import rounded
from lookahead_optim.optax._count import SlowStepSize
from lookahead_optim.optax._slow_weights import is_weight
from lookahead_optim.optax._trees import map_at_paths_of

__all__ = [
    "OuterStep",
    "descended",
    "has_momentum",
    "is_one",
    "outer_step",
    "params_after_sync",
    "pseudo_gradient",
    "update_to",
    "updates_to_sync",
]


class OuterStep(NamedTuple):
    """The settings of an outer step. Arrays may be traced."""

    slow_step_size: SlowStepSize
    slow_momentum: SlowStepSize = 0.0
    slow_nesterov: bool | jax.Array = True


def outer_step(
    slow: ArrayLike, fast: ArrayLike, momentum: jax.Array | None, step: OuterStep
) -> tuple[jax.Array, jax.Array | None]:
    """Return a slow weight and its momentum after an outer step. The fast weight restarts from the slow weight.

    With slow momentum b, its factor mu and the slow step size eta, the step is

        s = slow - fast
        b = mu * b + s
        d = s + mu * b with Nesterov's momentum, else b
        slow = slow - eta * d

    Here s is measured from the restart point: the slow weight rounded to the fast weight's dtype. Half precision is
    computed in float32 and rounded once. Without momentum d is s, and b is `None`.
    """
    slow, fast = jnp.asarray(slow), jnp.asarray(fast)
    if momentum is None and is_one(step.slow_step_size):
        return fast.astype(slow.dtype), None
    if jnp.iscomplexobj(slow):
        values = (slow, fast) if momentum is None else (slow, fast, momentum)
        return _by_parts(lambda slow, fast, momentum=None: outer_step(slow, fast, momentum, step), *values)
    wide_slow = _wide(slow)
    start = wide_slow if slow.dtype == fast.dtype else rounded(wide_slow, fast.dtype)
    end = fast.astype(wide_slow.dtype)
    if momentum is None:
        new_slow = _slow_step(wide_slow, end, _finite_pseudo_gradient(start, end), step.slow_step_size)
        return new_slow.astype(slow.dtype), None
    new_slow, momentum = _descend(wide_slow, start, end, momentum, step)
    return new_slow.astype(slow.dtype), momentum


def _descend(
    slow: jax.Array, start: jax.Array, end: jax.Array, momentum: jax.Array, step: OuterStep
) -> tuple[jax.Array, jax.Array]:
    """Return slow - eta * d and b."""
    slow_step_size, slow_momentum, _ = step
    new_momentum = _next_momentum(pseudo_gradient(start, end), momentum, step)
    # The pseudo-gradient is computed again, from values that XLA takes for other values. Otherwise XLA would keep it in
    # an array as large as the weight, for two loops that write two arrays. Now each loop subtracts, and writes to the
    # array that it replaces.
    start, end = jax.lax.optimization_barrier((start, end))
    s = pseudo_gradient(start, end)
    d = _direction(s, new_momentum, step)
    new_slow = slow - slow_step_size * d
    if not isinstance(slow_momentum, float):
        # A traced factor of 0 gives the bits of the plain step. Then d - s is 0, but its derivative is not.
        plain = _slow_step(slow, end, _finite_pseudo_gradient(start, end), slow_step_size)
        new_slow = jnp.where(slow_momentum == 0, plain - slow_step_size * (d - s), new_slow)
    return new_slow, new_momentum


def descended(
    slow: jax.Array, pseudo_gradient: jax.Array, momentum: jax.Array | None, step: OuterStep
) -> tuple[jax.Array, jax.Array | None]:
    """Return a slow weight and its momentum after an outer step with a given pseudo-gradient, a mean over workers."""
    d = s = _wide(pseudo_gradient)
    if momentum is not None:
        momentum = _next_momentum(s, momentum, step)
        d = _direction(s, momentum, step)
    return jnp.asarray(_wide(slow) - step.slow_step_size * d).astype(slow.dtype), momentum


def _next_momentum(s: jax.Array, momentum: jax.Array, step: OuterStep) -> jax.Array:
    """Return b = mu * b + s, rounded as it is saved.

    Without the rounding XLA would keep both, the rounded and the exact b, in arrays as large as the weight.
    """
    return jnp.asarray(step.slow_momentum * _wide(momentum) + s).astype(momentum.dtype)


def _direction(s: jax.Array, momentum: jax.Array, step: OuterStep) -> jax.Array:
    """Return d = s + mu * b with Nesterov's momentum, else b."""
    momentum = _wide(momentum)
    nesterov = s + step.slow_momentum * momentum
    if isinstance(step.slow_nesterov, bool):
        return nesterov if step.slow_nesterov else momentum
    return jnp.where(step.slow_nesterov, nesterov, momentum)


def pseudo_gradient(start: jax.Array, end: jax.Array) -> jax.Array:
    """Return the way back to the restart point. Between equal infinities, such as in a mask, it is 0."""
    way = start - end
    return jnp.where(jnp.isnan(way) & (start == end), 0, way)


def _finite_pseudo_gradient(start: jax.Array, end: jax.Array) -> jax.Array:
    """Return the pseudo-gradient, or 0 where it is not finite.

    The sign changes last. The bits are the same as of `start - end`. But XLA rounds a sum and a product only once if it
    fuses them, and `end` is the result of a sum. With `start - end`, a run on several devices differs more often by a
    rounding from a run on one device.
    """
    way = end - start
    return -jnp.where(jnp.isfinite(way), way, 0)


def _slow_step(slow: jax.Array, fast: jax.Array, pseudo_gradient: jax.Array, slow_step_size: SlowStepSize) -> jax.Array:
    """Return slow - slow_step_size * pseudo_gradient, also for a step size of 1 and at the ends of the dtype's range.

    Step sizes may be traced, so every case is computed and one is selected. In every case the derivative with respect
    to the step size is the derivative of the formula.
    """
    stepped = slow - slow_step_size * pseudo_gradient
    # In general slow - (slow - fast) is not `fast`. This sum is `fast`, as 0 is added.
    stepped_by_one = fast + (1 - slow_step_size) * pseudo_gradient
    # The difference of large numbers of opposite sign overflows. Their weighted mean does not, so it is used there, and
    # for infinite weights too. All other numbers are replaced by zeros, to keep infinities (in a mask, for example) out
    # of the derivatives: `where` multiplies the derivative of what it does not select by 0, and 0 times infinity is
    # NaN.
    overflows = ~(jnp.isfinite(fast - slow) | (slow == fast) | (slow_step_size == 0))
    slow, fast = jnp.where(overflows, slow, 0), jnp.where(overflows, fast, 0)
    mean = (1 - slow_step_size) * slow + slow_step_size * fast
    return jnp.where(slow_step_size == 1, stepped_by_one, jnp.where(overflows, mean, stepped))


def is_one(slow_step_size: SlowStepSize) -> bool:
    """Return whether a slow step size is known to be 1. A plain outer step then changes no parameter."""
    return isinstance(slow_step_size, float) and slow_step_size == 1


def has_momentum(slow_momentum: SlowStepSize) -> bool:
    """Return whether there is slow momentum: whether its factor is not known to be 0."""
    return not (isinstance(slow_momentum, float) and slow_momentum == 0)


def params_after_sync(
    is_sync: jax.Array, slow: optax.Params, fast: optax.Params, updates: optax.Updates, slow_step_size: SlowStepSize
) -> optax.Params:
    """Return the parameters after the outer step if it is due, and otherwise the fast weights.

    On the CPU XLA takes the choice out of the loop over the elements. On a GPU it does not, so the slow weights are
    read at every step. A conditional would cost more there, as XLA copies all parameters before it.

    A weight whose update is `None` is frozen: it is not moved, and the next capture takes its own value.
    """

    def restart(slow: ArrayLike, fast: ArrayLike, update: ArrayLike | None) -> ArrayLike:
        if update is None or not is_weight(slow):
            return fast
        return jnp.where(is_sync, outer_step(slow, fast, None, OuterStep(slow_step_size))[0], fast)

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
    """Return the update from a parameter to the restart point, in place of the update to the fast weight."""
    if jnp.iscomplexobj(param):
        return _by_parts(
            lambda slow, update, param: _update_to_sync(slow, update, param, slow_step_size), slow, update, param
        )
    fast = (param + update).astype(param.dtype)
    end, _ = outer_step(slow, fast, None, OuterStep(slow_step_size))
    way = _update_between(param, end, update.dtype)
    # For a step size of 1 this is the update itself, bit for bit, with the same derivative by the step size.
    pseudo_gradient = _finite_pseudo_gradient(_wide(slow), _wide(fast))
    unchanged = update + ((1 - slow_step_size) * pseudo_gradient).astype(update.dtype)
    return jnp.where(slow_step_size == 1, unchanged, way)


def update_to(end: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
    """Return the update from a parameter to a restart point, in the dtype of the update that leads to `fast`.

    If the outer step leaves the fast weight as it is, this is the update itself, bit for bit, with the derivatives of
    the restart point.
    """
    if jnp.iscomplexobj(param):
        return _by_parts(update_to, end, update, param)
    fast = (param + update).astype(param.dtype)
    unchanged = update + pseudo_gradient(end, fast).astype(update.dtype)
    return jnp.where(end == fast, unchanged, _update_between(param, end, update.dtype))


def _update_between(start: jax.Array, end: jax.Array, dtype: Any) -> jax.Array:
    """Return the difference of two parameters as an update of a dtype, computed in at least that dtype."""
    wide = jnp.promote_types(_wide(start).dtype, _wide(jnp.zeros((), dtype)).dtype)
    start, end = start.astype(wide), end.astype(wide)
    # Equal infinities, such as in a mask among the parameters, have no difference. Nothing moves them.
    way = jnp.where(jnp.isinf(end) & (end == start), 0, end - start)
    # No finite update leads from a large number to a large number of opposite sign. The largest update goes as far as
    # possible.
    largest = min(float(jnp.finfo(one).max) for one in (dtype, way.dtype))
    way = jnp.where(jnp.isfinite(end), jnp.clip(way, -largest, largest), way)
    return way.astype(dtype)


def _by_parts(function: Callable[..., Any], *values: ArrayLike) -> Any:
    """Apply a function to the real and to the imaginary parts of complex numbers, and join the results."""
    real, imaginary = (function(*map(part, values)) for part in (jnp.real, jnp.imag))
    return jax.tree.map(jax.lax.complex, real, imaginary)


def _wide(value: ArrayLike) -> jax.Array:
    """Return an array in at least single precision."""
    value = jnp.asarray(value)
    return value.astype(jnp.float32) if jnp.finfo(value.dtype).bits < 32 else value
