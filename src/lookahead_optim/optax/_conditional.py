"""Capture and outer step under a conditional, for weights that have more state than plain weights.

XLA updates donated buffers in place, and needs no array as large as a weight between syncs, only if three rules hold:

- No output of `lax.cond` may be an input. XLA takes an output that both branches return unchanged out of the
  conditional. Such an array is an input of the conditional, and also of the operation that updates it later. XLA then
  copies the array before the conditional, at every step. Behind `optimization_barrier` no output is an input, so all
  arrays pass through both branches.
- An operation that reads the parameters before the inner update must also come before it in XLA's schedule. XLA
  schedules a capture that only reads the parameters later, and copies all parameters to keep them until then. So the
  parameters pass through the capture.
- Each large weight has its own conditional, and XLA updates the weight as soon as its gradient is there. One
  conditional for all weights would need all updates at the same time. Small weights share a conditional. A
  transformation may mix weights, for example in a norm of all weights, and workers wait for each other only once. Both
  need one conditional for all weights.

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

# The number of elements from which a weight has its own conditional.
_LARGE = 2**16


def changed_if(predicate: jax.Array, change: Callable[..., Any], values: Any, *read: Any) -> Any:
    """Return `change(values, *read)` if a predicate holds, and otherwise `values`. Both have the same types."""
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
    """Return the slow weights with which the next update starts, and the parameters for all later operations."""

    def capture(values: Any) -> Any:
        slow, params = values
        # A copy, as two results of a step cannot share a donated buffer.
        return jax.tree.map(lambda slow, param: jnp.copy(captured_from(slow, param)), slow, params), params

    slow = state.slow_params
    slow, passed = changed_if(state.captured == 0, capture, (slow, at_paths_of(slow, params)))
    return slow, replaced(params, passed)


class _Values(NamedTuple):
    """What a sync changes of one weight. `moving` is the fast weight, or the update that leads to it."""

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
        is_sync: Whether the outer step is due.
        outer: The settings, or a transformation.
        slow: The slow weights.
        moving: The fast weights. If `params` are given: the updates that lead to the fast weights.
        outer_state: With settings the momentum of all weights or `None`, otherwise the state of the transformation.
        updates: The inner updates. A weight whose update is `None` is frozen: it is not moved, and its momentum is 0.
        params: The parameters before the update, or `None`.
        reduce: Function that returns the mean of the pseudo-gradients over workers, or `None`.

    Returns:
        The new `slow`, `moving` and `outer_state`. With one worker, `slow` changes only for slow weights of a wider
        dtype than the parameters. All other slow weights are captured from the parameters at the next update. So they
        equal the parameters bit for bit, however an addition of the updates rounds.
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
                # The momentum of a frozen weight starts from 0 again.
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
    """Return an update in the dtype of its slow weight, if that is wider than the parameter.

    The sum of parameter and update is then rounded only once, to the restart point.
    """
    if moving is None or param is None or slow.dtype == param.dtype:
        return moving
    is_wider = jnp.finfo(moving.dtype).bits >= jnp.finfo(slow.dtype).bits
    return moving if is_wider else moving.astype(slow.dtype)


def _groups(weights: list[jax.Array]) -> list[list[int]]:
    """Return lists of the indices of weights that share a conditional."""
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
    """Return the values after the fast weight restarts from the new slow weight.

    A slow weight that is no wider than the fast weight is captured from the fast weight later, unless `is_kept`.
    """
    if fast is None:
        own = values.moving if param is None else param
        return values._replace(slow=own.astype(values.slow.dtype)) if is_kept else values
    end = new_slow.astype(fast.dtype)
    moving = end if param is None else update_to(end, values.moving, param)
    is_kept |= new_slow.dtype != fast.dtype
    return values._replace(slow=new_slow if is_kept else values.slow, moving=moving)


def _strong(leaf: Any) -> jax.Array:
    """Return an array without weak type, so that both branches return the same type."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(leaf.dtype)
