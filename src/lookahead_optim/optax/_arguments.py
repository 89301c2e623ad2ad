"""What `lookahead` and its updates take, and the errors for all else. Nothing is computed before these checks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim._checks import check_slow_step_size, check_sync_period, warn_if_over_relaxed
from lookahead_optim.optax._count import SlowStepSize, SyncPeriod
from lookahead_optim.optax._slow_weights import LookaheadState, first_missing
from lookahead_optim.optax._trees import by_path, has_node_types_of, is_array, shapes

__all__ = ["InnerStates", "as_transformation", "check_update", "checked_slow_step_size", "checked_sync_period"]


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


def checked_slow_step_size(slow_step_size: Any) -> SlowStepSize | optax.Schedule:
    """Return a step size or a schedule, or raise `TypeError` or `ValueError`. Warn of a number above 1.

    Values of arrays are not checked.
    """
    if callable(slow_step_size):
        return slow_step_size
    if not is_array(slow_step_size):
        number = check_slow_step_size(slow_step_size)
        # This function, `lookahead`, its decorator and then the user's line.
        warn_if_over_relaxed(number, stacklevel=4)
        return number
    _check_scalar("slow_step_size", slow_step_size, (np.integer, np.floating), "a real")
    return slow_step_size


def _check_scalar(name: str, value: jax.Array | np.ndarray, kinds: tuple[type, ...], article: str) -> None:
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds) or value.ndim:
        raise TypeError(
            f"`{name}` must be {article} scalar if it is an array. "
            f"Received: an array of dtype {value.dtype} and shape {value.shape}"
        )


def check_update(state: Any, params: Any, is_off: bool) -> None:
    """Raise `ValueError` if an update is not given a state of a `lookahead` and the parameters of that state."""
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


class InnerStates:
    """Which states are those of an inner transformation.

    To find that out from `init` means to trace it, so the structures that it made, or an update, are kept.
    """

    def __init__(self, inner: optax.GradientTransformation) -> None:
        self._init = inner.init
        self._structures: list[Any] = []

    def add(self, inner_state: optax.OptState) -> None:
        """Note that the inner transformation made a state of this structure."""
        structure = jax.tree.structure(inner_state)
        if structure not in self._structures:
            self._structures.append(structure)

    def check(self, state: LookaheadState, params: optax.Params) -> None:
        """Raise `ValueError` if the inner state in a state is that of another transformation."""
        inner_state = state.inner_state
        if jax.tree.structure(inner_state) in self._structures:
            return
        try:
            like = jax.eval_shape(self._init, params if state.slow_params is None else state.slow_params)
        except Exception:  # An `init` that cannot be traced, as it reads values, does not say what it returns.
            return
        if not has_node_types_of(inner_state, like):
            raise ValueError(
                "`state` must be that of a `lookahead` around the same inner transformation, whose state has the "
                f"structure {jax.tree.structure(like)!s:.500}. Call `init` anew for another one. "
                f"Received: state.inner_state={inner_state!r:.500}"
            )
