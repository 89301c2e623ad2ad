"""The state of an outer step, and the outer step of all weights together: by a transformation, or with workers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lookahead_optim._rounded_jax import rounded
from lookahead_optim.optax._outer_step import OuterStep, descended, pseudo_gradient
from lookahead_optim.optax._slow_weights import weights_of
from lookahead_optim.optax._trees import add_updates

__all__ = [
    "Outer",
    "Reduce",
    "SlowMomentumState",
    "initial_momentum",
    "initial_state_of",
    "outer_step_of_all",
    "pseudo_gradients_of_all",
]


class SlowMomentumState(NamedTuple):
    """State of slow momentum, the `outer_state` of a `LookaheadState`.

    Attributes:
        slow_momentum: Tree like the slow parameters, with their shapes, dtypes and shardings: the momentum on the
            pseudo-gradients. `None` for what is no weight.
        next_factor: float scalar, the factor of the momentum at the next sync, for `sync`, which has no settings.
        next_nesterov: bool scalar, whether it is Nesterov's momentum then.
    """

    slow_momentum: optax.Params
    next_factor: jax.Array
    next_nesterov: jax.Array


# The module that pickles name.
SlowMomentumState.__module__ = "lookahead_optim.optax"

# What makes the outer step: the settings, or the transformation that stands in their place.
Outer: TypeAlias = OuterStep | optax.GradientTransformationExtraArgs
# Returns the mean over workers of a tree of pseudo-gradients.
Reduce: TypeAlias = Callable[[optax.Updates], optax.Updates]


def initial_momentum(slow: optax.Params) -> optax.Params:
    """Return the momentum before the first sync."""
    return jax.tree.map(jnp.zeros_like, weights_of(slow))


def initial_state_of(outer: optax.GradientTransformationExtraArgs, slow: optax.Params) -> Any:
    """Return the state of a transformation before the first sync.

    It may keep what it gets, and gets a copy, as no buffer can be donated twice.
    """
    return outer.init(jax.tree.map(jnp.copy, weights_of(slow)))


def pseudo_gradients_of_all(
    slow: list[jax.Array], fast: Sequence[jax.Array | None], structure: Any, reduce: Reduce | None
) -> Any:
    """Return the tree of pseudo-gradients, in the slow weights' dtypes, or of their means over workers."""

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

    A transformation gets the pseudo-gradients in the slow weights' dtypes, and 0 for a frozen weight, whose fast one is
    `None`. Its updates are added to the slow weights. With settings in its place the outer state is the momentum, a
    list, or `None`. Lists are in the order of the leaves of `structure`, the weights' tree.
    """

    weights = structure.unflatten(slow)
    pseudo_gradients = pseudo_gradients_of_all(slow, fast, structure, reduce)
    if isinstance(outer, OuterStep):
        all_momentum = [None] * len(slow) if outer_state is None else outer_state
        rows = zip(slow, structure.flatten_up_to(pseudo_gradients), all_momentum)
        found = [descended(*row, outer) for row in rows]
        return [one for one, _ in found], None if outer_state is None else [momentum for _, momentum in found]
    moves, outer_state = outer.update(pseudo_gradients, outer_state, weights)
    return structure.flatten_up_to(add_updates(weights, moves)), outer_state
