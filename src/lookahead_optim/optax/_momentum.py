"""The outer step's own state: slow momentum, or the state of a transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lookahead_optim.optax._slow_weights import weights_of

__all__ = ["SlowMomentumState", "begun_anew", "initial_momentum", "initial_state_of"]


class SlowMomentumState(NamedTuple):
    """State of slow momentum, the `outer_state` of a `LookaheadState`.

    Attributes:
        slow_momentum: The momentum on the pseudo-gradients: a tree like the slow weights, with their shapes, dtypes and
            shardings. A leaf that is no weight is `None`.
        next_factor: float scalar, the factor of the momentum at the next sync. The function `sync` needs it, as it has
            no settings.
        next_nesterov: bool scalar, whether the momentum is Nesterov's at the next sync.
    """

    slow_momentum: optax.Params
    next_factor: jax.Array
    next_nesterov: jax.Array


# The module that pickles name.
SlowMomentumState.__module__ = "lookahead_optim.optax"


def initial_momentum(slow: optax.Params) -> optax.Params:
    """Return the momentum before the first sync."""
    return jax.tree.map(jnp.zeros_like, weights_of(slow))


def initial_state_of(outer: optax.GradientTransformationExtraArgs, slow: optax.Params) -> Any:
    """Return the state of a transformation before the first sync.

    The transformation may keep the arrays that it gets. So it gets copies, as no buffer can be donated twice.
    """
    return outer.init(jax.tree.map(jnp.copy, weights_of(slow)))


def begun_anew(outer_state: Any, slow: optax.Params, outer: optax.GradientTransformationExtraArgs | None) -> Any:
    """Return the outer state as it is before the first sync, with the structure of `outer_state`."""
    if isinstance(outer_state, SlowMomentumState):
        return outer_state._replace(slow_momentum=jax.tree.map(jnp.zeros_like, outer_state.slow_momentum))
    if outer_state is None or outer is None:
        return outer_state
    return jax.tree.unflatten(jax.tree.structure(outer_state), jax.tree.leaves(initial_state_of(outer, slow)))
