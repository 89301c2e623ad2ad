"""The state that an outer step has of its own: slow momentum, or the state of a transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lookahead_optim.optax._slow_weights import weights_of

__all__ = ["SlowMomentumState", "begun_anew", "initial_momentum", "initial_state_of"]


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


def initial_momentum(slow: optax.Params) -> optax.Params:
    """Return the momentum before the first sync."""
    return jax.tree.map(jnp.zeros_like, weights_of(slow))


def initial_state_of(outer: optax.GradientTransformationExtraArgs, slow: optax.Params) -> Any:
    """Return the state of a transformation before the first sync.

    It may keep what it gets, and gets a copy, as no buffer can be donated twice.
    """
    return outer.init(jax.tree.map(jnp.copy, weights_of(slow)))


def begun_anew(outer_state: Any, slow: optax.Params, outer: optax.GradientTransformationExtraArgs | None) -> Any:
    """Return the outer state before the first sync, in the place of one."""
    if isinstance(outer_state, SlowMomentumState):
        return outer_state._replace(slow_momentum=jax.tree.map(jnp.zeros_like, outer_state.slow_momentum))
    if outer_state is None or outer is None:
        return outer_state
    return jax.tree.unflatten(jax.tree.structure(outer_state), jax.tree.leaves(initial_state_of(outer, slow)))
