"""What is due in one step: a capture before its update, a sync after it."""

from typing import Any

import keras
import numpy as np

__all__ = ["Due"]


class Due:
    """What is due in one step.

    Args:
        period: The sync period, an integer > 0. In a compiled step it is a scalar tensor, and may be 0.
        before: The count before the update, a number or a scalar tensor.
        calls_per_update: How much the count rises with an update.
    """

    def __init__(self, period: Any, before: Any, calls_per_update: int) -> None:
        self._period, self._before, self._calls = period, before, calls_per_update
        # In eager execution a comparison with 0 would cost an operation.
        self._is_on = True if isinstance(period, int) else period > 0

    def capture(self, captured: Any) -> Any:
        """Return whether slow weights must be captured before the update, because none are captured."""
        return self._if_on(captured == 0)

    def mark(self, count: Any) -> Any:
        """Return whether an update was applied, so that the slow weights count as captured."""
        return self._if_on(count // self._calls > self._before // self._calls)

    def sync(self, count: Any) -> Any:
        """Return whether the count has crossed a multiple of the period."""
        return self._if_on(self._cycles(count) > self._cycles(self._before))

    def syncs(self) -> Any:
        """Return the number of syncs before the update, assuming that the period never changed."""
        return self._cycles(self._before)

    def _cycles(self, count: Any) -> Any:
        """Return how many multiples of the period a count has crossed."""
        period = self._period
        if isinstance(period, int):
            # The count never gets that large, and JAX cannot divide by such a number.
            if not isinstance(count, int) and period > np.iinfo(keras.backend.standardize_dtype(count.dtype)).max:
                return 0
        else:
            period = keras.ops.cast(keras.ops.maximum(period, 1), count.dtype)
        return count // self._calls // period

    def _if_on(self, condition: Any) -> Any:
        return condition if self._is_on is True else condition & self._is_on
