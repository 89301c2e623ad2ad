"""The slow parameters, found in the state of any optimizer that has a `lookahead`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lookahead_optim.optax._interpolation import interpolate, is_array, is_weight
from lookahead_optim.optax._state import LookaheadState, at_paths_of, by_path, missing, nodes, restart, shapes

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

    Args:
        state: As for `slow_params`.
        params: Tree of the current parameters.

    Returns:
        The new parameters and the new state.

    Raises:
        ValueError: as `slow_params`.
    """

    def synchronized(state: LookaheadState, slow: Any, param: Any) -> Any:
        return interpolate(slow, param, _scalar(state.next_slow_step_size, param))

    return _where_captured(synchronized, state, params), restart(state, True)


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
    slow_params(state, params)  # for its errors

    def copy(slow: Any, param: Any) -> jax.Array:
        return jnp.copy(slow if param is None else param)

    def capture(node: LookaheadState) -> LookaheadState:
        return node._replace(
            slow_params=jax.tree.map(copy, node.slow_params, at_paths_of(node.slow_params, params)),
            captured=jax.tree.map(jnp.ones_like, node.captured),
        )

    return restart(state, True, capture)


def _scalar(node: Any, param: Any) -> Any:
    """Return a scalar of the state, with axes that broadcast with a parameter's.

    It is in a node of one leaf, as `nnx` keeps it in a variable. In states that `jax.vmap` has stacked it has the
    leading axes of the parameters.
    """
    (scalar,) = jax.tree.leaves(node)
    return jnp.reshape(scalar, jnp.shape(scalar) + (1,) * (jnp.ndim(param) - jnp.ndim(scalar)))


def _where_captured(function: Callable[[LookaheadState, Any, Any], Any], state: optax.OptState, params: Any) -> Any:
    """Return the parameters, or what a function of state, slow parameter and parameter gives where one is captured."""
    found = list(nodes(state, (LookaheadState,)))
    if not found:
        raise ValueError(
            "`state` must be the state of an optimizer that has a `lookahead_optim.optax.lookahead`. "
            f"Received: state={state!r:.500}"
        )
    leaves = by_path(params)
    mapped = {path: jnp.copy(param) if is_array(param) else param for path, param in leaves.items()}

    def visit(one: LookaheadState, is_inside: bool) -> None:
        lacking = missing(one.slow_params, leaves)
        if lacking and not is_inside:
            raise ValueError(
                "`params` must be those that the `lookahead` in `state` gets; it has a slow one of shape "
                f"{lacking[1]} at {lacking[0]}. Received: parameters of shapes {shapes(params)!r:.500}"
            )
        # Those inside first: what an outer one has captured counts, or what they have if it is switched off.
        for inside in nodes(one.inner_state, (LookaheadState,)):
            visit(inside, True)
        # By path: where parameters are masked out there are none in the state, and those of `nnx` are variables there.
        for path, slow in by_path(one.slow_params).items() if not lacking else ():
            if path in leaves and is_weight(slow):
                param = leaves[path]
                is_captured = _scalar(one.captured, param) != 0
                mapped[path] = jnp.where(is_captured, function(one, slow, param), mapped[path])

    for one in found:
        visit(one, False)
    return jax.tree.unflatten(jax.tree.structure(params), [mapped[path] for path in leaves])
