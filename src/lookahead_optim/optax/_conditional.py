"""Capture and outer step under a conditional, for weights that have more state than the plain ones.

XLA updates donated buffers in place, without an array as large as a weight between syncs, only if these rules hold:

- `lax.cond` takes every output that both branches hand on unchanged out of the conditional. Such an array goes into the
  conditional and past it to what updates it, and XLA copies it before, at every step. Behind `optimization_barrier` no
  output is an input, so that all arrays pass through both branches.
- Whatever reads the parameters before the inner update must come before it in XLA's schedule, too. XLA schedules a
  capture that only reads them later, and copies all parameters to keep them until then. So they pass through the
  capture.
- One conditional for all weights needs all updates at once. So each large weight has its own, and XLA updates it as
  soon as its gradient is there. Small ones share one. A transformation may mix weights, in a norm of all say, and
  workers wait for each other once: these have one conditional.

Outside of a traced function the conditional is Python's `if`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lookahead_optim.optax._outer_step import OuterStep, outer_step, update_to
from lookahead_optim.optax._outer_step_of_all import Outer, Reduce, outer_step_of_all
from lookahead_optim.optax._slow_weights import LookaheadState, captured_from, weights_of
from lookahead_optim.optax._trees import at_paths_of, replaced

__all__ = ["capture_passing_params", "changed_if", "sync_if_due"]

# The number of elements from which a weight has a conditional of its own.
_LARGE = 2**16


def changed_if(predicate: jax.Array, change: Callable[..., Any], values: Any, *read: Any) -> Any:
    """Return `change(values, *read)`, of the same types, if a predicate holds, or else the values."""
    if not isinstance(predicate, jax.core.Tracer):
        return change(values, *read) if predicate else values
    barrier = jax.lax.optimization_barrier
    return jax.lax.cond(
        predicate,
        lambda values, *read: change(barrier(values), *read),
        lambda values, *read: barrier(values),
        values,
        *read,
    )


def capture_passing_params(state: LookaheadState, params: optax.Params) -> tuple[optax.Params, optax.Params]:
    """Return the slow parameters with which the next update starts, and the parameters, for all that comes after."""

    def capture(values: Any) -> Any:
        slow, params = values
        # A copy of what is captured, as two results of a step cannot share a buffer that is donated.
        return jax.tree.map(lambda slow, param: jnp.copy(captured_from(slow, param)), slow, params), params

    slow = state.slow_params
    slow, passed = changed_if(state.captured == 0, capture, (slow, at_paths_of(slow, params)))
    return slow, replaced(params, passed)


class _Values(NamedTuple):
    """What a sync changes of one weight. The moving value is the fast weight, or the update that leads to it."""

    slow: jax.Array
    moving: jax.Array
    momentum: jax.Array | None


def sync_if_due(
    is_sync: jax.Array,
    outer: Outer,
    slow: optax.Params,
    moving: optax.Updates,
    outer_state: Any,
    updates: optax.Updates,
    params: optax.Params | None,
    reduce: Reduce | None = None,
) -> tuple[optax.Params, optax.Updates, Any]:
    """Make the outer step if it is due.

    Args:
        is_sync: Whether it is due.
        outer: The settings, with which `outer_state` is the momentum or `None`, or a transformation.
        slow: The slow parameters.
        moving: The fast parameters, or, if `params` are given, the updates that lead to them.
        outer_state: The momentum of all weights, or the state of the transformation.
        updates: The inner updates. A weight whose update is `None` is frozen: it is not moved, and its momentum is 0.
        params: The parameters before the update, or `None`.
        reduce: What makes the mean of the pseudo-gradients over workers, or `None`.

    Returns:
        The new `slow`, `moving` and `outer_state`. With one worker only weights of a wider dtype than the parameters
        are changed in `slow`. The others are captured from the parameters at the next update, and are equal to them bit
        for bit whatever an addition of the updates rounds.
    """
    weights = weights_of(slow)
    structure: Any = jax.tree.structure(weights)

    def leaves_of(tree: Any) -> list[Any]:
        return [None if leaf is None else _strong(leaf) for leaf in structure.flatten_up_to(at_paths_of(weights, tree))]

    are_moved = [leaf is not None for leaf in leaves_of(updates)]
    all_slow, all_moving = leaves_of(weights), leaves_of(moving)
    all_params = [None] * len(all_slow) if params is None else leaves_of(params)
    all_moving = list(map(_in_wide_dtype, all_moving, all_slow, all_params))
    all_momentum = [None] * len(all_slow)
    if isinstance(outer, OuterStep) and outer_state is not None:
        all_momentum = leaves_of(outer_state)
    if isinstance(outer, OuterStep) and reduce is None:
        values = list(map(_Values, all_slow, all_moving, all_momentum))
        for group in _groups(all_slow):

            def step(values: list[_Values], params: list[Any], group: list[int] = group) -> list[_Values]:
                moved = [are_moved[index] for index in group]
                return [_step(outer, *one) for one in zip(values, params, moved)]

            changed = changed_if(
                is_sync, step, [values[index] for index in group], [all_params[index] for index in group]
            )
            for index, value in zip(group, changed):
                values[index] = value
        if outer_state is not None:
            outer_state = structure.unflatten([value.momentum for value in values])
    else:

        def step_of_all(values: Any, params: list[Any]) -> Any:
            values, outer_state = values
            fast = [_fast(*one) if is_moved else None for *one, is_moved in zip(values, params, are_moved)]
            new_slow, outer_state = outer_step_of_all(
                outer, [one.slow for one in values], fast, outer_state, structure, reduce
            )
            if isinstance(outer, OuterStep) and outer_state is not None:
                # Of a frozen weight it starts anew.
                outer_state = [b if is_moved else jnp.zeros_like(b) for b, is_moved in zip(outer_state, are_moved)]
            are_kept = [reduce is not None] * len(fast)
            return [_restart(*one) for one in zip(values, new_slow, fast, params, are_kept)], outer_state

        values = [_Values(*one, None) for one in zip(all_slow, all_moving)]
        has_momentum = isinstance(outer, OuterStep) and outer_state is not None
        values, outer_state = changed_if(
            is_sync, step_of_all, (values, all_momentum if has_momentum else outer_state), all_params
        )
        if has_momentum:
            outer_state = structure.unflatten(outer_state)
    return (
        replaced(slow, structure.unflatten([value.slow for value in values])),
        replaced(moving, structure.unflatten([value.moving for value in values])),
        outer_state,
    )


def _in_wide_dtype(moving: jax.Array | None, slow: jax.Array, param: jax.Array | None) -> jax.Array | None:
    """Return an update in the dtype of a slow weight that is wider than the parameter.

    With it the sum of both is rounded only once, to the restart point.
    """
    if moving is None or param is None or slow.dtype == param.dtype:
        return moving
    is_wider = jnp.finfo(moving.dtype).bits >= jnp.finfo(slow.dtype).bits
    return moving if is_wider else moving.astype(slow.dtype)


def _groups(weights: list[jax.Array]) -> list[list[int]]:
    """Return which weights share a conditional."""
    large = [[index] for index, weight in enumerate(weights) if weight.size >= _LARGE]
    small = [index for index, weight in enumerate(weights) if weight.size < _LARGE]
    return [*large, small] if small else large


def _step(outer: OuterStep, values: _Values, param: jax.Array | None, is_moved: bool) -> _Values:
    if not is_moved:
        return values._replace(momentum=None if values.momentum is None else jnp.zeros_like(values.momentum))
    fast = _fast(values, param)
    new_slow, momentum = outer_step(values.slow, fast, values.momentum, outer)
    return _restart(values, new_slow, fast, param)._replace(momentum=momentum)


def _fast(values: _Values, param: jax.Array | None) -> jax.Array:
    return values.moving if param is None else (param + values.moving).astype(param.dtype)


def _restart(
    values: _Values, new_slow: jax.Array, fast: jax.Array | None, param: jax.Array | None, is_kept: bool = False
) -> _Values:
    """Return the values for a restart of the fast weight from the new slow one.

    A slow weight that is no wider than the fast one is captured from that later, unless it `is_kept`.
    """
    if fast is None:
        own = values.moving if param is None else param
        return values._replace(slow=own.astype(values.slow.dtype)) if is_kept else values
    end = new_slow.astype(fast.dtype)
    moving = end if param is None else update_to(end, values.moving, param)
    is_kept |= new_slow.dtype != fast.dtype
    return values._replace(slow=new_slow if is_kept else values.slow, moving=moving)


def _strong(leaf: Any) -> jax.Array:
    """Return an array without weak type, which both branches then return."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(leaf.dtype)
