"""Trees: nodes of a type, leaves at the paths of another tree, types of nodes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "add_updates",
    "at_paths_of",
    "by_path",
    "children",
    "has_node_types_of",
    "is_array",
    "is_number",
    "map_at_paths_of",
    "outermost_nodes",
    "replaced",
    "shapes",
    "with_axes_of",
    "with_leaves",
]

Path = tuple[Any, ...]  # of keys, whose type depends on the kind of node


def is_array(leaf: object) -> TypeGuard[jax.Array | np.ndarray]:
    return isinstance(leaf, (jax.Array, np.ndarray))


def is_number(leaf: object) -> bool:
    """Return whether a leaf is an array or a number. Models in Equinox have functions among their leaves."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)) or hasattr(leaf, "__jax_array__")


def outermost_nodes(tree: Any, kinds: tuple[type, ...]) -> Iterator[Any]:
    """Yield the nodes of certain types that are inside no other node of these types."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return (node for node in nodes if isinstance(node, kinds))


def with_axes_of(like: jax.Array, value: jax.Array) -> jax.Array:
    """Return `value`. In a `jax.shard_map`, let it vary over the mesh axes over which `like` varies.

    In a loop, the state that enters a step must have the same types as the state that leaves it. A type says over which
    axes a value varies. A constant varies over none.
    """
    return jnp.where(True, value, like)


def by_path(tree: Any) -> dict[Path, Any]:
    """Return the leaves of a tree by their paths."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the leaves of a tree by their paths, written as in an expression."""
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in by_path(tree).items()}


def at_paths_of(like: Any, tree: Any) -> Any:
    """Return a tree like `like`, with the leaves of `tree` at the same paths, or `None` where `tree` has no leaf."""
    if jax.tree.structure(tree) == jax.tree.structure(like):  # type: ignore[operator]
        return tree
    leaves = by_path(tree)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(path), like)


def map_at_paths_of(function: Callable[..., Any], like: Any, tree: Any, *others: Any) -> Any:
    """Return `tree`, changed at the paths at which `like` has leaves.

    The new leaves are what the function returns for the leaves of `like`, `tree` and `others`.
    """
    return replaced(tree, jax.tree.map(function, like, *(at_paths_of(like, given) for given in (tree, *others))))


def replaced(tree: Any, new: Any) -> Any:
    """Return `tree`, with the leaves of `new` at the paths at which `new` has leaves."""
    if jax.tree.structure(tree) == jax.tree.structure(new):  # type: ignore[operator]
        return new
    return with_leaves(tree, by_path(new))


def with_leaves(tree: Any, leaves: Mapping[Path, Any]) -> Any:
    """Return a tree with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def add_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Return the result of `optax.apply_updates`. An update `None` leaves its parameter as it is."""

    def add(param: Any, update: Any) -> Any:
        return param if update is None else jnp.asarray(param + update).astype(jnp.result_type(param))

    return jax.tree.map(add, params, updates)


def has_node_types_of(tree: Any, like: Any) -> bool:
    """Return whether two trees have nodes of the same types, with as many children and, in a `dict`, the same keys.

    `None` on either side matches any node: it is the moment of a gradient `None`, or the slow weights of a `lookahead`
    that is off. Only the keys of a `dict` are compared. Other data of nodes, such as the static fields of a model, may
    differ. The transformation that has such data knows what it takes.
    """
    if tree is None or like is None:
        return True
    nodes, other_nodes = children(tree), children(like)
    if nodes is None or other_nodes is None:
        return nodes is other_nodes
    return (
        type(tree) is type(like)
        and len(nodes) == len(other_nodes)
        and not (type(tree) is dict and tree.keys() != like.keys())
        and all(map(has_node_types_of, nodes, other_nodes))
    )


def children(tree: Any) -> list[Any] | None:
    """Return the children of a node, or `None` for a leaf."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
    return None if len(nodes) == 1 and nodes[0] is tree else nodes
