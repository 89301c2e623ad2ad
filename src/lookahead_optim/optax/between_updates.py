"""Functions for use between two updates: read the slow weights, make a sync by hand, reset.

They find every `lookahead` in the state of any optimizer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lookahead_optim._checks import warn_if_within_first_cycle
from lookahead_optim.optax._arguments import as_outer, checked_reduce
from lookahead_optim.optax._momentum import SlowMomentumState, begun_anew
from lookahead_optim.optax._outer_step import OuterStep, descended, outer_step
from lookahead_optim.optax._outer_step_of_all import Reduce, outer_step_of_all, pseudo_gradients_of_all
from lookahead_optim.optax._slow_weights import LookaheadState, first_missing, mark_stale, weights_of
from lookahead_optim.optax._trees import at_paths_of, by_path, is_array, outermost_nodes, shapes, with_leaves

__all__ = ["reset_slow_params", "slow_params", "sync"]


class _Weight(NamedTuple):
    """A weight, and its path in the tree of the slow weights and in the tree of the parameters."""

    path: Any
    slow: jax.Array
    param: ArrayLike


def slow_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Return the slow weights, for example to evaluate with.

    Args:
        state: The state of an optimizer that has a `lookahead` at any depth: in `optax.chain`, `masked`, `partition`,
            `inject_hyperparams`, `MultiSteps` or `apply_if_finite`. Also the `opt_state` of a Flax `nnx.Optimizer`, or
            a whole `TrainState`. If a `lookahead` is inside another `lookahead`, the slow weights of the outer
            `lookahead` are returned, unless that is switched off. `optax.flatten` and
            `optax.contrib.split_real_and_imaginary` must be inside the `lookahead`.
        params: Tree of the current parameters, as the optimizer gets them.

    Returns:
        A tree like `params`, with the parameters' shapes and dtypes, in new buffers. Slow weights of a wider dtype are
        rounded. A parameter without a slow weight, for example a masked parameter, is returned as in `params`.

    Raises:
        ValueError: if `state` has no `lookahead`, or a `lookahead` of other parameters.
    """
    found = _check(state, params)
    leaves = by_path(params)
    mapped = _copies(leaves)

    def visit(lookahead_state: LookaheadState) -> None:
        # States inside come first: the slow weights of an outer `lookahead` replace theirs, unless it is switched off.
        for inside in outermost_nodes(lookahead_state.inner_state, (LookaheadState,)):
            visit(inside)
        for path, slow, param in _weights(lookahead_state, leaves):
            is_captured = _scalar(lookahead_state.captured, param) != 0
            mapped[path] = jnp.where(is_captured, slow.astype(jnp.result_type(param)), mapped[path])

    for lookahead_state in found:
        visit(lookahead_state)
    return jax.tree.unflatten(jax.tree.structure(params), [mapped[path] for path in leaves])


def sync(
    state: optax.OptState,
    params: optax.Params,
    *,
    outer: optax.GradientTransformation | None = None,
    reduce: Callable[[optax.Updates], optax.Updates] | None = None,
) -> tuple[optax.Params, optax.OptState]:
    """Make a sync now, for the end of a run that does not end on a sync.

    Without an update since the last sync it changes nothing. So a second call changes nothing, also with slow momentum,
    and also in a run that was resumed.

    There is a `UserWarning` if all of this holds: the slow weights are still the weights with which training began, the
    slow step size is below 1, and there is no slow momentum. The sync then takes back a part of the training. In a
    function that JAX traces, and after `reset_slow_params`, there is no warning.

    Args:
        state: As for `slow_params`.
        params: Tree of the current parameters.
        outer: The transformation that `lookahead` was given as `outer`, if any. The state has the numbers of the other
            settings, but no functions. Defaults to `None`.
        reduce: The function that `lookahead` was given as `reduce`, if any. All workers must then call `sync`. Defaults
            to `None`.

    Returns:
        The new parameters and the new state.

    Raises:
        TypeError: if `outer` is no transformation.
        ValueError: as `slow_params`, or if `outer` is needed and missing, or does not fit the state.
    """
    found = _check(state, params)
    transformation, reduce = as_outer(outer), checked_reduce(reduce)
    _check_outer(state, transformation)
    leaves = by_path(params)
    mapped = _copies(leaves)

    def synchronize(node: LookaheadState, captured_around: list[Any]) -> LookaheadState:
        """Return a state after the sync, and put its parameters into `mapped`."""
        # States inside come first, as the results of an outer `lookahead` replace theirs.
        around = [*captured_around, node.captured]
        node = node._replace(inner_state=_map_lookaheads(lambda inside: synchronize(inside, around), node.inner_state))

        def own(new: jax.Array, old: jax.Array) -> jax.Array:
            is_own = _scalar(node.captured, old) > 0
            for captured in captured_around:
                is_own &= _scalar(captured, old) == 0
            return jnp.where(is_own, new, old)

        weights = _weights(node, leaves)
        new_slow, outer_state = _outer_step(node, weights, transformation, reduce)
        wider = {}
        for (path, slow, param), new in zip(weights, new_slow):
            dtype = jnp.result_type(param)
            mapped[path] = jnp.where(_scalar(node.captured, param) > 0, new.astype(dtype), mapped[path])
            if slow.dtype != dtype:
                wider[path] = own(new, slow)
        return node._replace(
            slow_params=with_leaves(node.slow_params, wider),
            outer_state=jax.tree.map(own, outer_state, node.outer_state),
        )

    for lookahead_state in found:
        _warn_if_within_first_cycle(lookahead_state)
    new_state = _map_lookaheads(lambda node: synchronize(node, []), state)
    new_params = jax.tree.unflatten(jax.tree.structure(params), [mapped[path] for path in leaves])
    return new_params, mark_stale(new_state, True)


def reset_slow_params(
    state: optax.OptState, params: optax.Params, *, outer: optax.GradientTransformation | None = None
) -> optax.OptState:
    """Capture the slow weights from the parameters again, for example after you restored the best parameters.

    Slow momentum starts from 0 again. The next sync comes when it was due before.

    Args:
        state: As for `slow_params`.
        params: Tree of the parameters to capture.
        outer: The transformation that `lookahead` was given as `outer`, if any. Its state starts again. Defaults to
            `None`.

    Returns:
        The new state, with a copy of the parameters.

    Raises:
        TypeError: if `outer` is no transformation.
        ValueError: as `sync`.
    """
    _check(state, params)
    transformation = as_outer(outer)
    _check_outer(state, transformation)

    def copy(slow: Any, param: Any) -> jax.Array:
        return jnp.copy(slow) if param is None else jnp.array(param, jnp.result_type(slow))

    def capture(node: LookaheadState) -> LookaheadState:
        if node.slow_params is None:
            return node._replace(inner_state=_map_lookaheads(capture, node.inner_state))
        slow = jax.tree.map(copy, node.slow_params, at_paths_of(node.slow_params, params))
        return node._replace(
            slow_params=slow,
            # Different from `step`, now and later. If they were equal, this would look like the capture before the
            # first update.
            captured=jax.tree.map(lambda step: jnp.where(step == 1, 2, 1).astype(jnp.int32), node.step),
            outer_state=begun_anew(node.outer_state, slow, transformation),
        )

    # Only the outermost `lookahead` that is on captures here. All inside capture at the next update, as after any sync
    # of an outer `lookahead`.
    return _map_lookaheads(capture, mark_stale(state, True))


def _check(state: Any, params: Any) -> list[LookaheadState]:
    """Return the outermost states of a `lookahead`.

    Raises:
        ValueError: if there is no such state, or if it has other parameters.
    """
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


def _check_outer(state: Any, outer: optax.GradientTransformationExtraArgs | None) -> None:
    """Raise `ValueError` if `outer` is needed and missing, or given and not needed."""
    is_needed = False
    nodes = list(outermost_nodes(state, (LookaheadState,)))
    while nodes:
        node = nodes.pop()
        is_needed |= not (node.outer_state is None or isinstance(node.outer_state, SlowMomentumState))
        nodes += outermost_nodes(node.inner_state, (LookaheadState,))
    if is_needed != (outer is not None):
        raise ValueError(
            "`outer` must be the transformation that was given to `lookahead` as `outer`, and is left out if none was. "
            f"Received: outer={outer!r} with a state {'with' if is_needed else 'without'} that of one"
        )


def _map_lookaheads(function: Callable[[LookaheadState], LookaheadState], tree: Any) -> Any:
    """Return a tree in which a function has replaced the outermost states of a `lookahead`."""

    def visit(node: Any) -> Any:
        return function(node) if isinstance(node, LookaheadState) else node

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, LookaheadState))


def _weights(state: LookaheadState, leaves: Mapping[Any, Any]) -> list[_Weight]:
    """Return the weights of a state in the order of their leaves. Return none if the state has other parameters.

    Weights are found by path: a state has no leaves for masked parameters, and `nnx` keeps variables there. A
    `lookahead` inside `optax.flatten`, for example, has other parameters.
    """
    if first_missing(state.slow_params, leaves):
        return []
    slow_weights = by_path(weights_of(state.slow_params))
    return [_Weight(path, jnp.asarray(slow), leaves[path]) for path, slow in slow_weights.items()]


def _outer_step(
    state: LookaheadState,
    weights: list[_Weight],
    outer: optax.GradientTransformationExtraArgs | None,
    reduce: Reduce | None,
) -> tuple[list[jax.Array], Any]:
    """Return the slow weights and the outer state after an outer step."""
    outer_state, tree = state.outer_state, weights_of(state.slow_params)
    slow, fast = [one.slow for one in weights], [jnp.asarray(one.param) for one in weights]
    if outer_state is None or isinstance(outer_state, SlowMomentumState):
        momentum = {} if outer_state is None else by_path(outer_state.slow_momentum)
        moved = {}
        means: list[Any] = [None] * len(weights)
        if reduce is not None and weights:
            means = jax.tree.leaves(pseudo_gradients_of_all(slow, fast, jax.tree.structure(tree), reduce))
        for (path, slow_weight, param), mean in zip(weights, means):
            step = OuterStep(_scalar(state.next_slow_step_size, param))
            if outer_state is not None:
                scalars = outer_state.next_factor, outer_state.next_nesterov
                step = step._replace(**dict(zip(step._fields[1:], (_scalar(one, param) for one in scalars))))
            b = momentum.get(path)
            is_alone = mean is None
            moved[path] = outer_step(slow_weight, param, b, step) if is_alone else descended(slow_weight, mean, b, step)
        if outer_state is not None:
            new_momentum = with_leaves(outer_state.slow_momentum, {path: one for path, (_, one) in moved.items()})
            outer_state = outer_state._replace(slow_momentum=new_momentum)
        return [new_slow for new_slow, _ in moved.values()], outer_state
    if not weights or outer is None:
        return slow, outer_state
    # `nnx` has variables in the place of the leaves. The transformation does not know these.
    leaves, structure = jax.tree.flatten(outer_state)
    like: Any = jax.tree.structure(jax.eval_shape(outer.init, tree))
    if len(leaves) != like.num_leaves:
        raise ValueError(
            "`outer` must be the transformation that was given to `lookahead` as `outer`, whose state has "
            f"{len(leaves)} leaves. Received: outer={outer!r}, whose state has {like.num_leaves}"
        )
    new_slow, new_state = outer_step_of_all(
        outer, slow, fast, jax.tree.unflatten(like, leaves), jax.tree.structure(tree), reduce
    )
    return new_slow, jax.tree.unflatten(structure, jax.tree.leaves(new_state))


def _copies(leaves: Mapping[Any, Any]) -> dict[Any, Any]:
    return {path: jnp.copy(param) if is_array(param) else param for path, param in leaves.items()}


def _warn_if_within_first_cycle(state: LookaheadState) -> None:
    """Warn if the slow weights were captured before the first update. The warning points at the caller of `sync`."""
    scalars = jax.tree.leaves((state.captured, state.step, state.next_slow_step_size))
    if any(isinstance(scalar, jax.core.Tracer) for scalar in scalars):
        return
    # In states that `jax.vmap` has stacked, each of these has several numbers.
    captured, step, slow_step_size = map(np.asarray, scalars)
    if not captured.any():
        # It is switched off, or there is nothing to do.
        for inside in outermost_nodes(state.inner_state, (LookaheadState,)):
            _warn_if_within_first_cycle(inside)
    # After a later capture, the number of updates since the capture is smaller than the number of all updates.
    elif (captured == step).all() and state.outer_state is None:
        warn_if_within_first_cycle(int(step.max()), None, float(slow_step_size.max()), stacklevel=3)


def _scalar(node: Any, param: ArrayLike) -> jax.Array:
    """Return a scalar of the state, with axes that broadcast with a parameter's axes.

    `nnx` keeps the scalar in a variable, a node with one leaf. In states that `jax.vmap` has stacked, the scalar has
    the leading axes of the parameters.
    """
    (scalar,) = jax.tree.leaves(node)
    return jnp.reshape(scalar, jnp.shape(scalar) + (1,) * (jnp.ndim(param) - jnp.ndim(scalar)))
