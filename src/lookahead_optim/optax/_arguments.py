"""Checks of the arguments of `lookahead` and of its updates. Nothing is computed before these checks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim._checks import (
    check_slow_momentum,
    check_slow_step_size,
    check_sync_period,
    warn_if_over_relaxed,
)
from lookahead_optim.optax._count import SlowStepSize, SyncPeriod
from lookahead_optim.optax._momentum import SlowMomentumState
from lookahead_optim.optax._outer_step_of_all import Reduce
from lookahead_optim.optax._slow_weights import LookaheadState, first_missing, takes_slow_dtype, weights_of
from lookahead_optim.optax._trees import by_path, has_node_types_of, is_array, shapes

__all__ = [
    "States",
    "as_outer",
    "as_transformation",
    "check_inner_state",
    "check_outer_alone",
    "check_outer_state",
    "check_slow_dtype_holds",
    "check_slow_dtype_of",
    "check_update",
    "checked_reduce",
    "checked_slow_dtype",
    "checked_slow_momentum",
    "checked_slow_step_size",
    "checked_sync_period",
]


def as_outer(outer: Any) -> optax.GradientTransformationExtraArgs | None:
    """Return the transformation that makes the outer step, or `None`, or raise `TypeError`."""
    if outer is not None and not isinstance(outer, optax.GradientTransformation):
        raise TypeError(
            "`outer` must be an `optax.GradientTransformation`, such as `optax.sgd(0.7, momentum=0.9, nesterov=True)`, "
            f"or None. Received: outer={outer!r} of type {type(outer).__name__}"
        )
    return None if outer is None else optax.with_extra_args_support(outer)


def as_transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Return an inner transformation that takes extra arguments, or raise `TypeError`."""
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be an `optax.GradientTransformation`, such as `optax.adam(1e-3)`, or an `optax.MultiSteps`. "
            f"Received: inner={inner!r} of type {type(inner).__name__}"
        )
    return optax.with_extra_args_support(inner)


def checked_sync_period(sync_period: Any) -> SyncPeriod:
    """Return a period, or raise `TypeError` or `ValueError`. Values of arrays are not checked."""
    if not is_array(sync_period):
        return check_sync_period(sync_period)
    _check_scalar("sync_period", sync_period, (np.integer,), "an integer")
    return sync_period


def checked_slow_step_size(slow_step_size: Any, has_momentum: bool) -> SlowStepSize | optax.Schedule:
    """Return a step size or a schedule, or raise `TypeError` or `ValueError`. Warn if a number is above 1.

    Values of arrays are not checked.
    """
    if callable(slow_step_size):
        return slow_step_size
    if not is_array(slow_step_size):
        number = check_slow_step_size(slow_step_size)
        # The levels are this function, `lookahead`, its decorator, and then the user's line.
        warn_if_over_relaxed(number, float(has_momentum), stacklevel=4)
        return number
    _check_scalar("slow_step_size", slow_step_size, (np.integer, np.floating), "a real")
    return slow_step_size


def checked_slow_momentum(slow_momentum: Any) -> SlowStepSize:
    """Return a momentum factor, or raise `TypeError` or `ValueError`. Values of arrays are not checked."""
    if not is_array(slow_momentum):
        return check_slow_momentum(slow_momentum)
    _check_scalar("slow_momentum", slow_momentum, (np.integer, np.floating), "a real")
    return slow_momentum


def checked_slow_dtype(slow_dtype: Any) -> np.dtype | None:
    """Return a dtype of slow weights, or raise `TypeError`."""
    if slow_dtype is None:
        return None
    try:
        dtype = jnp.dtype(slow_dtype)
    except TypeError:
        dtype = None
    # For NumPy `float` and `bool` are dtypes, but they mean other dtypes than in JAX.
    if (
        dtype is None
        or any(slow_dtype is one for one in (bool, int, float, complex))
        or not jnp.issubdtype(dtype, jnp.floating)
    ):
        raise TypeError(
            "`slow_dtype` must be a dtype of real numbers, such as 'float32', or None for the dtype of each weight. "
            f"Received: slow_dtype={slow_dtype!r} of type {type(slow_dtype).__name__}"
        )
    return dtype


def checked_reduce(reduce: Any) -> Reduce | None:
    """Return the function that averages over workers, or `None`, or raise `TypeError`."""
    if reduce is not None and not callable(reduce):
        raise TypeError(
            "`reduce` must be a function of a tree of pseudo-gradients that returns their mean over workers, such as "
            "`functools.partial(jax.lax.pmean, axis_name='workers')`, or None. "
            f"Received: reduce={reduce!r} of type {type(reduce).__name__}"
        )
    return reduce


def check_slow_dtype_holds(slow_dtype: np.dtype | None, params: optax.Params) -> None:
    """Raise `ValueError` if a dtype of slow weights is less precise than a parameter, or if JAX does not have it."""
    if slow_dtype is None:
        return
    if jax.dtypes.canonicalize_dtype(slow_dtype) != slow_dtype:
        raise ValueError(
            "`slow_dtype` must be a dtype that JAX has: for 'float64' call `jax.config.update('jax_enable_x64', True)` "
            f"first. Received: slow_dtype={slow_dtype}"
        )
    for leaf in jax.tree.leaves(params):
        if takes_slow_dtype(leaf):
            has, wants = jnp.finfo(slow_dtype), jnp.finfo(jnp.result_type(leaf))
            if has.nmant < wants.nmant or has.maxexp < wants.maxexp or has.minexp > wants.minexp:
                raise ValueError(
                    "`slow_dtype` must hold all values of the weights' dtypes, or the slow weights would lose what the "
                    "fast ones have. Give a dtype at least as wide, or None. "
                    f"Received: slow_dtype={slow_dtype} for a weight of {wants.dtype}"
                )


def check_outer_alone(slow_step_size: Any, slow_momentum: Any, slow_nesterov: bool) -> None:
    """Raise `ValueError` if settings of the outer step are given together with a transformation that makes it."""
    settings = {
        "slow_step_size": (slow_step_size, 0.5),
        "slow_momentum": (slow_momentum, 0.0),
        "slow_nesterov": (slow_nesterov, True),
    }
    given = {
        name: value
        for name, (value, default) in settings.items()
        if is_array(value) or callable(value) or value != default
    }
    if given:
        received = ", ".join(f"{name}={value!r:.100}" for name, value in given.items())
        raise ValueError(
            "`outer` stands in the place of `slow_step_size`, `slow_momentum` and `slow_nesterov`: leave these out, "
            "and give `outer` such settings, as in `outer=optax.sgd(0.7, momentum=0.9, nesterov=True)`. Under "
            "`optax.inject_hyperparams`, which gives every setting, pass it `static_args='slow_step_size'`. "
            f"Received: {received} beside outer"
        )


def _check_scalar(name: str, value: jax.Array | np.ndarray, kinds: tuple[type, ...], article: str) -> None:
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds) or value.ndim:
        raise TypeError(
            f"`{name}` must be {article} scalar if it is an array. "
            f"Received: an array of dtype {value.dtype} and shape {value.shape}"
        )


def check_update(state: Any, params: Any, is_off: bool) -> None:
    """Raise `ValueError` unless an update gets a state of a `lookahead` and the parameters of that state."""
    if params is None:
        raise ValueError(
            "`params` must be given to the update of a `lookahead`, which moves them: "
            "`update(updates, state, params)`. Received: params=None"
        )
    if hasattr(state, "opt_state"):
        raise ValueError(
            "`state` must be the `opt_state` of a Flax `TrainState` or `nnx.Optimizer`, not the whole: pass "
            f"`state.opt_state`. Received: state={state!r:.500} of type {type(state).__name__}"
        )
    if not isinstance(state, LookaheadState):
        raise ValueError(
            "`state` must be a `lookahead_optim.optax.LookaheadState`, as `init` returns it. For a state of the "
            "bare inner transformation pass `init(params)._replace(inner_state=state)`. "
            f"Received: state={state!r:.500} of type {type(state).__name__}"
        )
    if is_off:
        return
    if state.slow_params is None and jax.tree.leaves(params):
        raise ValueError(
            "`state` must have slow parameters, and one that was made with sync_period=0 has none. "
            "To go on, pass `init(params)._replace(inner_state=state.inner_state, step=state.step)`. "
            "Received: state.slow_params=None"
        )
    if first_missing(state.slow_params, by_path(params)):
        raise ValueError(
            "`params` must be like those that the state was initialised with, which have the paths and shapes "
            f"{shapes(state.slow_params)!r:.500}. Received: {shapes(params)!r:.500}"
        )


class States:
    """The structures of the states of a transformation.

    To get such a structure from `init`, `init` must be traced. So structures that `init` or an update made are kept.
    """

    def __init__(self, transformation: optax.GradientTransformation) -> None:
        self._init = transformation.init
        self._structures: list[Any] = []

    def add(self, state: optax.OptState) -> None:
        """Note that the transformation made a state of this structure."""
        structure = jax.tree.structure(state)
        if structure not in self._structures:
            self._structures.append(structure)

    def other_than(self, state: optax.OptState, params: optax.Params) -> Any:
        """Return the structure that a state should have, or `None` if its structure is right or cannot be checked."""
        if jax.tree.structure(state) in self._structures:
            return None
        try:
            like = jax.eval_shape(self._init, params)
        except Exception:  # An `init` that reads values cannot be traced, so its structure is unknown.
            return None
        return None if has_node_types_of(state, like) else jax.tree.structure(like)


def check_inner_state(state: LookaheadState, inner_states: States, params: optax.Params) -> None:
    """Raise `ValueError` if the inner state in a state belongs to another transformation."""
    like = inner_states.other_than(state.inner_state, params if state.slow_params is None else state.slow_params)
    if like is not None:
        raise ValueError(
            "`state` must be that of a `lookahead` around the same inner transformation, whose state has the "
            f"structure {like!s:.500}. Call `init` anew for another one. "
            f"Received: state.inner_state={state.inner_state!r:.500}"
        )


def check_outer_state(state: LookaheadState, has_momentum: bool, outer_states: States | None) -> None:
    """Raise `ValueError` if the outer state in a state belongs to a `lookahead` with another outer step.

    `outer_states` are the known states of `outer`, or `None` without `outer`.
    """
    if outer_states is not None:
        is_right = state.outer_state is not None
        is_right &= outer_states.other_than(state.outer_state, weights_of(state.slow_params)) is None
    else:
        is_right = isinstance(state.outer_state, SlowMomentumState) if has_momentum else state.outer_state is None
    if not is_right:
        raise ValueError(
            "`state` must be that of a `lookahead` with the same outer step: with slow momentum, with this `outer`, or "
            "with none of both. To go on with another outer step, which starts anew, pass "
            "`state._replace(outer_state=init(params).outer_state)`. "
            f"Received: state.outer_state={state.outer_state!r:.500}"
        )


def check_slow_dtype_of(state: LookaheadState, params: optax.Params, slow_dtype: np.dtype | None) -> None:
    """Raise `ValueError` if `slow_dtype` is given and the slow weights have another dtype."""
    if slow_dtype is None:
        return
    leaves = by_path(params)
    for path, slow in by_path(state.slow_params).items():
        if path in leaves and takes_slow_dtype(leaves[path]) and jnp.result_type(slow) != slow_dtype:
            raise ValueError(
                "`state` must have slow parameters of `slow_dtype`. To go on from a state that has others, pass "
                "`init(params)._replace(inner_state=state.inner_state, step=state.step)`. "
                f"Received: slow_dtype={slow_dtype} with slow parameters of {jnp.result_type(slow)}"
            )
