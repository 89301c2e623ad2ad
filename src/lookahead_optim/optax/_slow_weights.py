"""The slow weights: which leaves have one, where they lie, how they are captured, and when they are stale.

Stale are those of a state whose `captured` is 0. Nothing else says so.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lookahead_optim._rounded_jax import rounded
from lookahead_optim.optax._combinators import restarted_line_searches
from lookahead_optim.optax._trees import at_paths_of, by_path, is_number

__all__ = [
    "IN_PLACE",
    "LookaheadState",
    "Missing",
    "capture_if_stale",
    "captured_from",
    "first_missing",
    "has_wider",
    "initial",
    "is_weight",
    "mark_stale",
    "takes_slow_dtype",
    "weights_of",
]


class LookaheadState(NamedTuple):
    """State of the transformation that `lookahead` returns. Read the slow parameters with `slow_params`.

    Attributes:
        inner_state: State of the inner transformation.
        slow_params: Tree like the parameters, with their shapes and shardings, and their dtypes or `slow_dtype`: the
            slow parameters where `captured` is not 0. `None` for what is no number, and if Lookahead is switched off.
        step: int32 scalar, the number of applied updates of the inner transformation. After 2^31 - 1 it goes back by
            one cycle.
        captured: int32 scalar. 0 from `init` or a sync until the next applied update: the slow parameters are the
            parameters themselves then, and `slow_params` is set to them at the next update. Otherwise the number of
            applied updates since they were captured, and after `reset_slow_params` or an adversarial step more. With
            workers it is -1 from a sync until the next applied update, as the slow parameters stay in place then.
        next_slow_step_size: float scalar, the slow step size of the next sync, for `sync`, which has no settings. 1
            with `outer`, which has its own.
        outer_state: With slow momentum a `SlowMomentumState`, with `outer` the state of that transformation. `None`
            otherwise, and if Lookahead is switched off.
    """

    inner_state: optax.OptState
    slow_params: optax.Params
    step: jax.Array
    captured: jax.Array
    next_slow_step_size: jax.Array
    # The default is for pickles that were written before this field was there.
    outer_state: Any = None


# The value of `captured` after a sync of workers.
IN_PLACE = -1

# The module that pickles name, so that they load whatever file defines the class.
LookaheadState.__module__ = "lookahead_optim.optax"


def is_weight(slow: ArrayLike) -> bool:
    """Return whether a leaf of the slow parameters takes part in the outer step: numbers that are not integers."""
    return jnp.issubdtype(jnp.result_type(slow), jnp.inexact)


def weights_of(slow: optax.Params) -> optax.Params:
    """Return the slow parameters that take part in the outer step, and `None` in place of others."""
    return jax.tree.map(lambda leaf: leaf if is_weight(leaf) else None, slow)


def initial(params: optax.Params, slow_dtype: np.dtype | None = None) -> optax.Params:
    """Return room for the slow parameters, which holds the parameters. Copies, as no buffer can be donated twice."""

    def copy(leaf: Any) -> jax.Array | None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros_like(leaf, slow_dtype if takes_slow_dtype(leaf) else None)
        if not is_number(leaf):
            return None
        # A wider dtype makes a copy, too.
        return jnp.array(leaf, slow_dtype) if slow_dtype is not None and takes_slow_dtype(leaf) else jnp.copy(leaf)

    return jax.tree.map(copy, params)


def takes_slow_dtype(leaf: Any) -> bool:
    """Return whether a leaf of the parameters is a real weight. Complex ones have slow weights of their own dtype."""
    return (is_number(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)) and jnp.issubdtype(
        jnp.result_type(leaf), jnp.floating
    )


def has_wider(slow: optax.Params, params: optax.Params) -> bool:
    """Return whether any slow weight has another dtype than its fast one, which is wider then."""
    leaves = by_path(params)
    weights = {path: one for path, one in by_path(slow).items() if is_weight(one)}
    return any(jnp.result_type(one) != jnp.result_type(leaves[path]) for path, one in weights.items())


def capture_if_stale(state: LookaheadState, params: optax.Params) -> optax.Params:
    """Return the slow parameters with which the next update starts.

    The branches are in this order as XLA copies all slow parameters at every step if the predicate is false where
    `_capture` is not taken. A selection in place of the conditional would read and write them at every step.
    """
    slow = state.slow_params
    return jax.lax.cond(state.captured == 0, _capture, _keep, slow, at_paths_of(slow, params))


# Branches of a conditional: as functions of the module they are traced and compiled once outside of `jit` too.
def _capture(slow: optax.Params, params: optax.Params) -> optax.Params:
    return jax.tree.map(captured_from, slow, params)


def captured_from(slow: jax.Array, param: ArrayLike | None) -> jax.Array:
    """Return the slow weight that is captured from a parameter.

    A slow weight of a wider dtype that still rounds to the parameter has more digits of it: it stays. After a sync that
    is so unless something else has moved the parameter.
    """
    if param is None:
        return slow
    param = jnp.asarray(param)
    if is_weight(slow) and slow.dtype != param.dtype:
        captured = param.astype(slow.dtype)
        return jnp.where(rounded(slow, param.dtype) == captured, slow, captured)
    return jnp.asarray(param, slow.dtype)


def _keep(slow: optax.Params, params: optax.Params) -> optax.Params:
    return slow


def mark_stale(state: optax.OptState, is_moved_otherwise: ArrayLike) -> optax.OptState:
    """Mark the state of any optimizer as stale, if something else than an inner update has moved the parameters.

    That is a sync or the user. A scalar of a state may be in a node of its own, as `nnx` has it.
    """

    def mark(node: Any) -> Any:
        if not isinstance(node, LookaheadState):
            return node
        captured = jax.tree.map(lambda captured: jnp.where(is_moved_otherwise, 0, captured), node.captured)
        return node._replace(inner_state=mark_stale(node.inner_state, is_moved_otherwise), captured=captured)

    state = jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, LookaheadState))
    return restarted_line_searches(state, is_moved_otherwise)


class Missing(NamedTuple):
    """A slow parameter without a parameter."""

    path: str
    shape: tuple[int, ...]


def first_missing(slow: optax.Params, params_by_path: Mapping[Any, Any]) -> Missing | None:
    """Return the first slow parameter without a parameter of its shape, if there is one.

    What is no weight may be missing, as programs filter such leaves or not.
    """
    for path, leaf in by_path(slow).items():
        is_there = path in params_by_path
        if np.shape(params_by_path[path]) != jnp.shape(leaf) if is_there else is_weight(leaf):
            return Missing(jax.tree_util.keystr(path) or "the root", jnp.shape(leaf))
    return None
