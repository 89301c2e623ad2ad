"""The outer step of all weights together: transformations may mix weights, and workers wait for each other once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lookahead_optim._rounded_jax import rounded
from lookahead_optim.optax._outer_step import OuterStep, descended, pseudo_gradient
from lookahead_optim.optax._trees import add_updates

__all__ = ["Outer", "Reduce", "outer_step_of_all", "pseudo_gradients_of_all"]

# The outer step: its settings, or the transformation in their place.
Outer: TypeAlias = OuterStep | optax.GradientTransformationExtraArgs
# A function that returns the mean over workers of a tree of pseudo-gradients.
Reduce: TypeAlias = Callable[[optax.Updates], optax.Updates]


def pseudo_gradients_of_all(
    slow: list[jax.Array], fast: Sequence[jax.Array | None], structure: Any, reduce: Reduce | None
) -> Any:
    """Return the tree of pseudo-gradients in the slow weights' dtypes, or their means over workers."""

    def way_back(slow: jax.Array, fast: jax.Array | None) -> jax.Array:
        if fast is None:
            return jnp.zeros_like(slow)
        return pseudo_gradient(rounded(slow, fast.dtype), fast.astype(slow.dtype))

    pseudo_gradients = structure.unflatten(list(map(way_back, slow, fast)))
    return pseudo_gradients if reduce is None else reduce(pseudo_gradients)


def outer_step_of_all(
    outer: Outer,
    slow: list[jax.Array],
    fast: Sequence[jax.Array | None],
    outer_state: Any,
    structure: Any,
    reduce: Reduce | None = None,
) -> tuple[list[jax.Array], Any]:
    """Return the slow weights and the outer state after an outer step.

    A transformation gets the pseudo-gradients in the slow weights' dtypes. For a frozen weight the fast weight is
    `None`, and its pseudo-gradient is 0. The transformation's updates are added to the slow weights.

    Args:
        outer: The settings of the outer step, or a transformation.
        slow: List of slow weights, in the order of the leaves of `structure`.
        fast: List of fast weights in the same order, `None` for a frozen weight.
        outer_state: The state of the transformation. With settings it is the list of the momentum, or `None`.
        structure: The structure of the weights' tree.
        reduce: Function that returns the mean of the pseudo-gradients over workers, or `None`.
    """
    weights = structure.unflatten(slow)
    pseudo_gradients = pseudo_gradients_of_all(slow, fast, structure, reduce)
    if isinstance(outer, OuterStep):
        all_momentum = [None] * len(slow) if outer_state is None else outer_state
        rows = zip(slow, structure.flatten_up_to(pseudo_gradients), all_momentum)
        found = [descended(*row, outer) for row in rows]
        return [one for one, _ in found], None if outer_state is None else [momentum for _, momentum in found]
    moves, new_state = outer.update(pseudo_gradients, outer_state, weights)
    # A transformation may return another dtype than it was given. A compiled step cannot.
    new_state = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), new_state, outer_state)
    return structure.flatten_up_to(add_updates(weights, moves)), new_state
