"""Checks that several front ends make, with the messages that they raise."""

import math
import numbers
from typing import Any

__all__ = ["check_outside_block", "check_slow_step_size", "check_sync_period"]


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


def check_outside_block(is_open: bool, caller: str) -> None:
    """Raise `RuntimeError` if a `slow_weights()` block is open, in which `caller` must not be called."""
    if is_open:
        raise RuntimeError(
            f"`{caller}` was called inside a `slow_weights()` block, at whose end the fast weights come back. Call "
            "it after the block."
        )
