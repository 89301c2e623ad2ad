"""Functions for the time between two updates: the slow parameters, a sync by hand, a reset.

They find each `lookahead` in the state of any optimizer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lookahead_optim._checks import warn_if_within_first_cycle
from lookahead_optim.optax._outer_step import outer_step
from lookahead_optim.optax._slow_weights import LookaheadState, first_missing, is_weight, mark_stale
from lookahead_optim.optax._trees import at_paths_of, by_path, is_array, outermost_nodes, shapes

__all__ = ["reset_slow_params", "slow_params", "sync"]


def slow_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Return the slow parameters, to evaluate with.

    Args:
        state: The state of an optimizer that has a `lookahead` at any depth: of `optax.chain`, `masked`, `partition`,
            `inject_hyperparams`, `MultiSteps`, `apply_if_finite`; the `opt_state` of a Flax `nnx.Optimizer`, or a whole
            `TrainState`. Of a `lookahead` inside another, those of the outer one are returned, unless it is switched
            off. `optax.flatten` and `optax.contrib.split_real_and_imaginary` must be inside the `lookahead`.
        params: Tree of the current parameters, as the optimizer gets them.

    Returns:
        A tree like `params`, in new buffers. A parameter that no `lookahead` in `state` has, as it is masked out, is
        that of `params`.

    Raises:
        ValueError: if `state` has no `lookahead`, or one of other parameters.
    """
    return _where_captured(lambda state, slow, param: slow, state, params)


def sync(state: optax.OptState, params: optax.Params) -> tuple[optax.Params, optax.OptState]:
    """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

    There is a `UserWarning` if the slow parameters are still those from before the first update, and the slow step size
    is below 1: after a run shorter than `sync_period`, this call takes back a part of all that was trained. In a
    function that JAX traces, and after `reset_slow_params`, there is none.

    Args:
        state: As for `slow_params`.
        params: Tree of the current parameters.

    Returns:
        The new parameters and the new state.

    Raises:
        ValueError: as `slow_params`.
    """

    def synchronized(state: LookaheadState, slow: Any, param: Any) -> jax.Array:
        return outer_step(slow, param, _scalar(state.next_slow_step_size, param))

    new_params = _where_captured(synchronized, state, params)
    for lookahead_state in outermost_nodes(state, (LookaheadState,)):
        _warn_if_within_first_cycle(lookahead_state)
    return new_params, mark_stale(state, True)


def reset_slow_params(state: optax.OptState, params: optax.Params) -> optax.OptState:
    """Capture the slow parameters again, after restoring the best ones, say.

    Args:
        state: As for `slow_params`.
        params: Tree of the parameters to capture.

    Returns:
        The new state, with a copy of the parameters.

    Raises:
        ValueError: as `slow_params`.
    """
    _check(state, params)

    def copy(slow: Any, param: Any) -> jax.Array:
        return jnp.copy(slow if param is None else param)

    def capture(node: Any) -> Any:
        if not isinstance(node, LookaheadState):
            return node
        return node._replace(
            slow_params=jax.tree.map(copy, node.slow_params, at_paths_of(node.slow_params, params)),
            # Unequal to `step`, now and later, so that it does not look like the capture before the first update.
            captured=jax.tree.map(lambda step: jnp.where(step == 1, 2, 1).astype(jnp.int32), node.step),
        )

    # The outermost only: those inside capture at the next update, as after any sync of an outer one.
    return jax.tree.map(capture, mark_stale(state, True), is_leaf=lambda node: isinstance(node, LookaheadState))


def _check(state: Any, params: Any) -> list[LookaheadState]:
    """Return the outermost states of a `lookahead`, or raise `ValueError` if there is none, or other parameters."""
    found = list(outermost_nodes(state, (LookaheadState,)))
    if not found:
        raise ValueError(
            "`state` must be the state of an optimizer that has a `lookahead_optim.optax.lookahead`. "
            f"Received: state={state!r:.500}"
        )
    for lookahead_state in found:
        missing = first_missing(lookahead_state.slow_params, by_path(params))
        if missing:
            raise ValueError(
                "`params` must be those that the `lookahead` in `state` gets; it has a slow one of shape "
                f"{missing.shape} at {missing.path}. Received: parameters of shapes {shapes(params)!r:.500}"
            )
    return found


def _warn_if_within_first_cycle(state: LookaheadState) -> None:
    """Warn if the slow parameters were captured before the first update, from the state of `sync`."""
    scalars = jax.tree.leaves((state.captured, state.step, state.next_slow_step_size))
    if any(isinstance(scalar, jax.core.Tracer) for scalar in scalars):
        return
    # Several numbers each in states that `jax.vmap` has stacked.
    captured, step, slow_step_size = map(np.asarray, scalars)
    if not captured.any():
        # It is switched off, or there is nothing to do.
        for inside in outermost_nodes(state.inner_state, (LookaheadState,)):
            _warn_if_within_first_cycle(inside)
    # Later captures have another number of updates since than there were in all.
    elif (captured == step).all():
        warn_if_within_first_cycle(int(step.max()), None, float(slow_step_size.max()), stacklevel=3)


def _where_captured(
    function: Callable[[LookaheadState, Any, Any], ArrayLike], state: optax.OptState, params: optax.Params
) -> optax.Params:
    """Return the parameters, or what a function of state, slow parameter and parameter gives where one is captured."""
    found = _check(state, params)
    leaves = by_path(params)
    mapped = {path: jnp.copy(param) if is_array(param) else param for path, param in leaves.items()}

    def visit(lookahead_state: LookaheadState) -> None:
        # Those inside first: what an outer one has captured counts, or what they have if it is switched off.
        for inside in outermost_nodes(lookahead_state.inner_state, (LookaheadState,)):
            visit(inside)
        if first_missing(lookahead_state.slow_params, leaves):
            return  # One that is inside `optax.flatten`, for example, gets other parameters.
        # By path: where parameters are masked out there are none in the state, and those of `nnx` are variables there.
        for path, slow in by_path(lookahead_state.slow_params).items():
            if path in leaves and is_weight(slow):
                param = leaves[path]
                is_captured = _scalar(lookahead_state.captured, param) != 0
                mapped[path] = jnp.where(is_captured, function(lookahead_state, slow, param), mapped[path])

    for lookahead_state in found:
        visit(lookahead_state)
    return jax.tree.unflatten(jax.tree.structure(params), [mapped[path] for path in leaves])


def _scalar(node: Any, param: ArrayLike) -> jax.Array:
    """Return a scalar of the state, with axes that broadcast with a parameter's.

    It is in a node of one leaf, as `nnx` keeps it in a variable. In states that `jax.vmap` has stacked it has the
    leading axes of the parameters.
    """
    (scalar,) = jax.tree.leaves(node)
    return jnp.reshape(scalar, jnp.shape(scalar) + (1,) * (jnp.ndim(param) - jnp.ndim(scalar)))
