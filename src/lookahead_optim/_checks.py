"""Checks that several front ends make, and the messages that they raise."""

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "OVER_RELAXATION",
    "check_outside_block",
    "check_slow_momentum",
    "check_slow_nesterov",
    "check_slow_step_size",
    "check_sync_period",
    "explain_other_names",
    "warn_if_over_relaxed",
    "warn_if_within_first_cycle",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Names of the arguments in other implementations: the paper's code, timm, pytorch_optimizer, torch_optimizer, Optax,
# PaddlePaddle, keras-lookahead, Ranger, Ranger21, torchft's DiLoCo, MuLoCo and programs that were written after these.
_PERIODS = (
    "inner_step",
    "inner_steps",
    "k",
    "k_steps",
    "la_k",
    "la_steps",
    "lookahead_k",
    "lookahead_merge_time",
    "lookahead_mergetime",
    "lookahead_steps",
    "sync_every",
    "sync_interval",
    "sync_steps",
)
_STEP_SIZES = (
    "alpha",
    "la_alpha",
    "lookahead_alpha",
    "lookahead_blending_alpha",
    "outer_lr",
    "slow_lr",
    "slow_step",
)
_MOMENTA = ("momentum_outer", "outer_momentum")
_INNER_OPTIMIZERS = ("base_opt", "base_optimizer", "fast_optimizer", "inner", "inner_optimizer", "opt", "optimizer")


def explain_other_names(
    inner: str, error: type[Exception] = TypeError
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator for an `__init__` or a function that makes a `Lookahead`.

    The decorated function raises `error` for a keyword that is another implementation's name of an argument. Without
    it, Python would only say that the keyword is unknown, or that an argument is missing. The signature stays as it is.

    Args:
        inner: Name of the argument for the inner optimizer.
        error: Type of the error: the type that the framework raises for unknown keywords. Defaults to `TypeError`.
    """
    names = {**dict.fromkeys(_PERIODS, "sync_period"), **dict.fromkeys(_STEP_SIZES, "slow_step_size")}
    names |= {name: inner for name in _INNER_OPTIMIZERS if name != inner}

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        if "slow_momentum" in inspect.signature(function).parameters:
            names.update(dict.fromkeys(_MOMENTA, "slow_momentum"))

        @functools.wraps(function)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            wrong = {name: value for name, value in kwargs.items() if name in names}
            if wrong:
                wanted = " and ".join(f"`{names[name]}` for `{name}`" for name in wrong)
                received = ", ".join(f"{name}={value!r:.100}" for name, value in wrong.items())
                raise error(f"Write {wanted}: the arguments of Lookahead have these names here. Received: {received}")
            return function(*args, **kwargs)

        return checked

    return decorate


def check_sync_period(sync_period: Any) -> int:
    """Return `sync_period` as an `int` >= 0, or raise `TypeError` or `ValueError`."""
    if isinstance(sync_period, bool) or not isinstance(sync_period, numbers.Integral):
        raise TypeError(
            "`sync_period` must be an integer, the number of fast steps per slow step (0 switches Lookahead off). "
            f"Received: sync_period={sync_period!r} of type {type(sync_period).__name__}"
        )
    if sync_period < 0:
        raise ValueError(
            "`sync_period` must be 0 (Lookahead switched off) or a positive number of fast steps. "
            f"Received: sync_period={sync_period!r}"
        )
    return int(sync_period)


def check_slow_step_size(slow_step_size: Any) -> float:
    """Return `slow_step_size` as a finite `float` >= 0, or raise `TypeError` or `ValueError`."""
    if isinstance(slow_step_size, bool) or not isinstance(slow_step_size, numbers.Real):
        raise TypeError(
            "`slow_step_size` must be a real number, the fraction of the way that the slow weights go. "
            f"Received: slow_step_size={slow_step_size!r} of type {type(slow_step_size).__name__}"
        )
    try:
        value = float(slow_step_size)
    except OverflowError:
        value = math.inf
    if not 0 <= value < math.inf:
        raise ValueError(
            "`slow_step_size` must be finite and >= 0, usually 0.5 to 0.8. "
            f"Received: slow_step_size={slow_step_size!r:.100}"
        )
    return value


def check_slow_momentum(slow_momentum: Any) -> float:
    """Return `slow_momentum` as a `float` in [0, 1), or raise `TypeError` or `ValueError`."""
    if isinstance(slow_momentum, bool) or not isinstance(slow_momentum, numbers.Real):
        raise TypeError(
            "`slow_momentum` must be a real number, the factor of the momentum on the pseudo-gradient (0 for none). "
            f"Received: slow_momentum={slow_momentum!r} of type {type(slow_momentum).__name__}"
        )
    try:
        value = float(slow_momentum)
    except OverflowError:
        value = math.inf
    if not 0 <= value < 1:
        raise ValueError(
            "`slow_momentum` must be >= 0 and < 1, usually 0.4 to 0.9: at 1 the momentum would never decay. "
            f"Received: slow_momentum={slow_momentum!r:.100}"
        )
    return value


def check_slow_nesterov(slow_nesterov: Any) -> bool:
    """Return `slow_nesterov`, a `bool`, or raise `TypeError`."""
    if not isinstance(slow_nesterov, bool):
        raise TypeError(
            "`slow_nesterov` must be True (Nesterov's momentum) or False (heavy ball). "
            f"Received: slow_nesterov={slow_nesterov!r} of type {type(slow_nesterov).__name__}"
        )
    return slow_nesterov


def check_outside_block(is_open: bool, caller: str) -> None:
    """Raise `RuntimeError` if a `slow_weights()` block is open, in which `caller` must not be called."""
    if is_open:
        raise RuntimeError(
            f"`{caller}` was called inside a `slow_weights()` block: what it changes would be lost when the block "
            "ends. Call it after the block."
        )


# The beginning of the warning, for filters.
OVER_RELAXATION = "`slow_step_size` above 1"


def warn_if_over_relaxed(slow_step_size: float, slow_momentum: float = 0.0, *, stacklevel: int) -> None:
    """Warn of a slow step size above 1, with `UserWarning`. With slow momentum there is no warning.

    On a quadratic the inner optimizer multiplies the error by a factor r in each cycle. If each of the k updates
    multiplies the error by c, r is c^k. The slow weights move `slow_step_size` of the way from error 1 to error r. So a
    cycle multiplies their error by 1 - slow_step_size (1 - r), which is -1 at slow_step_size = 2 / (1 - r).

    Args:
        slow_step_size: A number that was checked.
        slow_momentum: The factor of the slow momentum, a number that was checked.
        stacklevel: As if the caller called `warnings.warn`. In an `__init__` with `explain_other_names` it is 3, as the
            decorator adds a call before the user's line.
    """
    if slow_step_size > 1 and not slow_momentum:
        warnings.warn(
            "`slow_step_size` above 1 takes the slow weights beyond the fast ones (over-relaxation). On a quadratic, "
            "where the inner optimizer multiplies the error by r in a cycle, Lookahead converges only below "
            "2 / (1 - r). From 2 on it cannot converge where the inner optimizer reaches the minimum in a cycle "
            f"(r = 0). Usual are 0.5 to 0.8. Received: slow_step_size={slow_step_size!r}",
            stacklevel=stacklevel + 1,
        )


def warn_if_within_first_cycle(
    updates: int, sync_period: int | None, slow_step_size: float, *, stacklevel: int
) -> None:
    """Warn, with `UserWarning`, of a `sync()` that moves the weights back towards where training began.

    Args:
        updates: The number of updates that were applied so far.
        sync_period: The period. `None` if the caller knows only that the first cycle has not ended.
        slow_step_size: The slow step size. From 1 on nothing is taken back, and there is no warning.
        stacklevel: As in `warn_if_over_relaxed`.
    """
    is_within = updates > 0 and (sync_period is None or updates < sync_period)
    if is_within and slow_step_size < 1:
        period = "" if sync_period is None else f" with sync_period={sync_period}"
        warnings.warn(
            f"`sync()` in the first cycle takes back {1 - slow_step_size:.3g} of what training has moved the weights, "
            "as the slow weights are still where it began. For so short a run leave `sync()` out, or choose a shorter "
            f"`sync_period`. Received: sync() after {updates} update(s){period}",
            stacklevel=stacklevel + 1,
        )
