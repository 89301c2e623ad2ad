"""The slow weights: which leaves have a slow weight, where it is kept, how it is captured, and when it is stale.

Slow weights are stale if `captured` in their state is 0. Nothing else marks them as stale.
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
    """State of the transformation that `lookahead` returns. Read the slow weights with `slow_params`.

    Attributes:
        inner_state: State of the inner transformation.
        slow_params: Tree like the parameters, with their shapes and shardings. Its dtypes are the parameters' or
            `slow_dtype`. It holds the slow weights if `captured` is not 0. A leaf that is no number is `None`. The
            whole is `None` if Lookahead is switched off.
        step: int32 scalar, the number of applied updates of the inner transformation. After 2^31 - 1 it goes back by
            one cycle.
        captured: int32 scalar. It is 0 from `init` or a sync until the next applied update. The slow weights are then
            the parameters themselves, and the next update copies them to `slow_params`. Otherwise it is the number of
            applied updates since the capture. After `reset_slow_params` or an adversarial step it is larger than that
            number. With workers it is -1 from a sync until the next applied update, as `slow_params` then stays valid.
        next_slow_step_size: float scalar, the slow step size of the next sync. The function `sync` needs it, as it has
            no settings. 1 with `outer`, which has its own step size.
        outer_state: With slow momentum a `SlowMomentumState`, with `outer` the state of that transformation. `None`
            otherwise, and if Lookahead is switched off.
    """

    inner_state: optax.OptState
    slow_params: optax.Params
    step: jax.Array
    captured: jax.Array
    next_slow_step_size: jax.Array
    # The default is for pickles from versions without this field.
    outer_state: Any = None


# The value of `captured` after a sync of workers.
IN_PLACE = -1

# The module that pickles name. So pickles load even if the class moves to another file.
LookaheadState.__module__ = "lookahead_optim.optax"


def is_weight(slow: ArrayLike) -> bool:
    """Return whether a leaf of the slow weights takes part in the outer step: numbers that are not integers."""
    return jnp.issubdtype(jnp.result_type(slow), jnp.inexact)


def weights_of(slow: optax.Params) -> optax.Params:
    """Return the slow weights that take part in the outer step, and `None` for all others."""
    return jax.tree.map(lambda leaf: leaf if is_weight(leaf) else None, slow)


def initial(params: optax.Params, slow_dtype: np.dtype | None = None) -> optax.Params:
    """Return memory for the slow weights, filled with copies of the parameters.

    Copies, as no buffer can be donated twice.
    """

    def copy(leaf: Any) -> jax.Array | None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros_like(leaf, slow_dtype if takes_slow_dtype(leaf) else None)
        if not is_number(leaf):
            return None
        # A cast to a wider dtype makes a copy too.
        return jnp.array(leaf, slow_dtype) if slow_dtype is not None and takes_slow_dtype(leaf) else jnp.copy(leaf)

    return jax.tree.map(copy, params)


def takes_slow_dtype(leaf: Any) -> bool:
    """Return whether a leaf of the parameters is a real weight.

    Complex weights have slow weights of their own dtype.
    """
    return (is_number(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)) and jnp.issubdtype(
        jnp.result_type(leaf), jnp.floating
    )


def has_wider(slow: optax.Params, params: optax.Params) -> bool:
    """Return whether any slow weight has a wider dtype than its fast weight."""
    leaves = by_path(params)
    weights = {path: one for path, one in by_path(slow).items() if is_weight(one)}
    return any(jnp.result_type(one) != jnp.result_type(leaves[path]) for path, one in weights.items())


def capture_if_stale(state: LookaheadState, params: optax.Params) -> optax.Params:
    """Return the slow weights with which the next update starts.

    The order of the branches matters: if the predicate is false where `_capture` is not taken, XLA copies all slow
    weights at every step. A selection in place of the conditional would read and write them at every step.
    """
    slow = state.slow_params
    return jax.lax.cond(state.captured == 0, _capture, _keep, slow, at_paths_of(slow, params))


# The branches are functions of the module, so that outside of `jit` they are also traced and compiled only once.
def _capture(slow: optax.Params, params: optax.Params) -> optax.Params:
    return jax.tree.map(captured_from, slow, params)


def captured_from(slow: jax.Array, param: ArrayLike | None) -> jax.Array:
    """Return the slow weight that is captured from a parameter.

    If a slow weight of a wider dtype still rounds to the parameter, it has more digits, so it is kept. This is the case
    after a sync, unless something else has moved the parameter.
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
    """If `is_moved_otherwise`, mark the slow weights in the state of any optimizer as stale.

    Parameters are "moved otherwise" if a sync or the user has moved them, and not an inner update. `nnx` keeps a scalar
    of a state in a node of its own.
    """

    def mark(node: Any) -> Any:
        if not isinstance(node, LookaheadState):
            return node
        captured = jax.tree.map(lambda captured: jnp.where(is_moved_otherwise, 0, captured), node.captured)
        return node._replace(inner_state=mark_stale(node.inner_state, is_moved_otherwise), captured=captured)

    state = jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, LookaheadState))
    return restarted_line_searches(state, is_moved_otherwise)


class Missing(NamedTuple):
    """A slow weight without a parameter."""

    path: str
    shape: tuple[int, ...]


def first_missing(slow: optax.Params, params_by_path: Mapping[Any, Any]) -> Missing | None:
    """Return the first slow weight without a parameter of its shape, or `None`.

    A leaf that is no weight may be missing: some programs filter such leaves, others do not.
    """
    for path, leaf in by_path(slow).items():
        is_there = path in params_by_path
        if np.shape(params_by_path[path]) != jnp.shape(leaf) if is_there else is_weight(leaf):
            return Missing(jax.tree_util.keystr(path) or "the root", jnp.shape(leaf))
    return None
