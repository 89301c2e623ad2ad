"""Checks of the settings of `RectifiedAdam` and `AdamW`, for Keras 2 and Keras 3."""

import math
import numbers
import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["check_flag", "check_keywords", "check_patterns", "check_setting", "check_total_steps", "check_warm_up"]

# Below a threshold of 4 the rectification is the root of a negative number.
_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta_1": (">= 0 and < 1, usually 0.9", lambda value: value < 1),
    "beta_2": (">= 0 and < 1, usually 0.999", lambda value: value < 1),
    "sma_threshold": (">= 4, usually 5", lambda value: value >= 4),
    "warmup_proportion": (">= 0 and <= 1, the part of `total_steps` that warms up", lambda value: value <= 1),
}


def check_setting(name: str, value: Any) -> float:
    """Return a setting as a finite `float` >= 0 in its range, or raise `TypeError` or `ValueError`."""
    rule, is_in_range = _RULES.get(name, (">= 0", lambda value: True))
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf or not is_in_range(float(value)):
        raise (ValueError if is_number else TypeError)(
            f"`{name}` must be a finite number {rule}. Received: {name}={value!r} of type {type(value).__name__}"
        )
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return a setting as a `bool`, or raise `TypeError`."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(
            f"`{name}` must be `True` or `False`. Received: {name}={value!r} of type {type(value).__name__}"
        )
    return bool(value)


def check_keywords(keywords: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` if a clipping or a decay is no finite number >= 0."""
    for name in ("clipnorm", "clipvalue", "global_clipnorm", "decay", "weight_decay"):
        if keywords.get(name) is not None:
            check_setting(name, keywords[name])


def check_patterns(name: str, patterns: Any) -> list[str] | None:
    """Return regular expressions as a list, or `None`, or raise `TypeError` or `ValueError`."""
    if patterns is None:
        return None
    given: list[Any] = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [None]
    for pattern in given:
        if not isinstance(pattern, str):
            raise TypeError(
                f"`{name}` must be a list of regular expressions, such as `['bias', 'norm']`. "
                f"Received: {name}={patterns!r}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` must be a list of regular expressions in the form of Python's `re`. `re.escape` makes one "
                f"of a name. Received: {name}={patterns!r}, where {pattern!r} has an error: {error}"
            ) from error
    return given


def check_total_steps(total_steps: Any) -> int:
    """Return `total_steps` as an `int` >= 0, or raise `TypeError` or `ValueError`."""
    is_integer = isinstance(total_steps, numbers.Integral) and not isinstance(total_steps, bool)
    if not is_integer or total_steps < 0:
        raise (ValueError if is_integer else TypeError)(
            "`total_steps` must be an integer >= 0, the steps of the whole training (0: no warm-up and no decay). "
            f"Received: total_steps={total_steps!r} of type {type(total_steps).__name__}"
        )
    return int(total_steps)


def check_warm_up(total_steps: int, min_lr: Any, learning_rate: Any) -> None:
    """Raise `ValueError` if the learning rate would rise after the warm-up, where it must fall."""
    are_numbers = isinstance(min_lr, numbers.Real) and isinstance(learning_rate, numbers.Real)
    if total_steps and are_numbers and min_lr > learning_rate:
        raise ValueError(
            "`min_lr` must be at most `learning_rate`, from which the rate falls to it until `total_steps`. Received: "
            f"min_lr={min_lr!r}, learning_rate={learning_rate!r}, total_steps={total_steps!r}"
        )
