"""The state of `lookahead`, and what moves it apart from an update."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim.optax._interpolation import is_weight

__all__ = [
    "END",
    "LookaheadState",
    "at_paths_of",
    "by_path",
    "fits",
    "missing",
    "nodes",
    "progress",
    "replaced",
    "restart",
    "shapes",
]

# The largest count. Optax' own counts stay there.
END = np.int32(2**31 - 1)


class LookaheadState(NamedTuple):
    """State of the transformation that `lookahead` returns. Read the slow parameters with `slow_params`.

    Attributes:
        inner_state: State of the inner transformation.
        slow_params: Tree like the parameters, with their shapes, dtypes and shardings: the slow parameters where
            `captured` is 1. `None` for what is no number, and if Lookahead is switched off.
        step: int32 scalar, the number of updates of the inner transformation. After 2^31 - 1 it goes back by one cycle.
        captured: int32 scalar. 0 before the first update and right after a sync: the slow parameters are the parameters
            themselves then, and `slow_params` is set to them at the next update. Otherwise 1. (Not a boolean, as some
            wrappers do arithmetic on states.)
        next_slow_step_size: float scalar, the slow step size of the next sync.
    """

    inner_state: optax.OptState
    slow_params: optax.Params
    step: jax.Array
    captured: jax.Array
    next_slow_step_size: jax.Array


_LINE_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


def nodes(tree: Any, kinds: tuple[type, ...]) -> Iterator[Any]:
    """Yield the outermost nodes of a tree that are of certain types."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return (leaf for leaf in leaves if isinstance(leaf, kinds))


def progress(before: optax.OptState, after: optax.OptState) -> tuple[jax.Array, jax.Array]:
    """Return whether the updates between two states move the parameters, and whether they complete a step.

    Both hold for all transformations but those known here: `optax.MultiSteps` accumulates, `optax.apply_if_finite`
    rejects (what it accepts after too many errors is not told apart), and `optax.contrib.sam` makes adversarial steps.
    """
    is_applied, is_counted = jnp.array(True), jnp.array(True)
    kinds = (optax.MultiStepsState, optax.ApplyIfFiniteState, optax.contrib.SAMState)
    for old, new in zip(nodes(before, kinds), nodes(after, kinds)):
        if isinstance(new, optax.MultiStepsState):
            is_at_end = (old.gradient_step == END) & (new.mini_step == 0) & (old.mini_step != 0)
            is_applied &= (new.gradient_step != old.gradient_step) | is_at_end
        elif isinstance(new, optax.ApplyIfFiniteState):
            is_applied &= new.last_finite
        else:
            is_counted &= new.steps_since_sync == 0
        applied, counted = progress(tuple(old), tuple(new))
        is_applied, is_counted = is_applied & applied, is_counted & counted
    return is_applied, is_applied & is_counted


def restart(state: optax.OptState, is_moved: Any, function: Callable[[LookaheadState], Any] = lambda node: node) -> Any:
    """Return a state that fits parameters which something else than an update has moved, if `is_moved`.

    `function` is applied to the outermost `LookaheadState`s of the result.
    """

    def restarted(node: Any) -> Any:
        if isinstance(node, LookaheadState):
            captured = jax.tree.map(lambda captured: jnp.where(is_moved, 0, captured), node.captured)
            return function(node._replace(inner_state=restart(node.inner_state, is_moved), captured=captured))
        if isinstance(node, _LINE_SEARCHES):
            # For `optax.value_and_grad_from_state`: value and gradient are those of other parameters.
            return node._replace(value=jax.tree.map(lambda value: jnp.where(is_moved, jnp.inf, value), node.value))
        return node

    kinds = (LookaheadState, *_LINE_SEARCHES)
    return jax.tree.map(restarted, state, is_leaf=lambda node: isinstance(node, kinds))


def fits(state: Any, like: Any) -> bool:
    """Return whether a state has the node types of another.

    `None` fits all: it is the moment of a gradient `None`, and the slow parameters of a `lookahead` that is off.
    """
    if state is None or like is None:
        return True
    # A leaf is flattened to `None`, a node to children and what else it holds: the keys of a `dict`.
    one, other = map(jax.tree_util.default_registry.flatten_one_level, (state, like))
    if one is None or other is None:
        return one is other
    children, others = list(one[0]), list(other[0])
    same = type(state) is type(like) and len(children) == len(others)
    return same and not (type(like) is dict and one[1] != other[1]) and all(map(fits, children, others))


def by_path(tree: Any) -> dict[Any, Any]:
    """Return the leaves of a tree by their paths."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def missing(slow: Any, leaves: dict[Any, Any]) -> tuple[str, tuple[int, ...]] | None:
    """Return path and shape of a slow parameter that has no parameter of its shape among leaves by path, or `None`.

    What is no weight may be missing, as programs filter such leaves or not.
    """
    for path, one in by_path(slow).items():
        if np.shape(leaves[path]) != jnp.shape(one) if path in leaves else is_weight(one):
            return jax.tree_util.keystr(path) or "the root", jnp.shape(one)
    return None


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in by_path(tree).items()}


def at_paths_of(like: Any, tree: Any) -> Any:
    """Return a tree like the first, with the leaves of the second at the same paths, or `None` where it has none."""
    if jax.tree.structure(tree) == jax.tree.structure(like):  # type: ignore[operator]
        return tree
    leaves = by_path(tree)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(path), like)


def replaced(tree: Any, new: Any) -> Any:
    """Return the first tree, with the leaves of the second instead of its own at the same paths."""
    if jax.tree.structure(tree) == jax.tree.structure(new):  # type: ignore[operator]
        return new
    leaves = by_path(new)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)
