"""Evaluation on the slow weights, for the two Keras: the block, and what a callback does with it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["Block", "Swapping"]


class Block:
    """Sets the fast weights aside while the slow ones are in the model."""

    def __init__(self, to_numpy: Callable[[Any], Any] = np.asarray) -> None:
        self._to_numpy = to_numpy
        self._put_back: Callable[[], None] | None = None
        self._count = 0

    @property
    def is_open(self) -> bool:
        return self._put_back is not None

    @contextlib.contextmanager
    def run(self, pairs: Sequence[Any], copy_of: Callable[[Any], Any], count: int) -> Iterator[None]:
        """Run a block. `pairs` begin with slow and fast variable, `count` is the number of steps so far."""
        fast_weights = [copy_of(fast) for _, fast, *_ in pairs]

        def put_back() -> None:
            self._put_back = None
            for (_, fast, *_), value in zip(pairs, fast_weights):
                fast.assign(value)

        self._put_back, self._count = put_back, count
        try:
            for slow, fast, *_ in pairs:
                if slow is not None:
                    fast.assign(copy_of(slow))
            yield
        finally:
            if self._put_back is put_back:
                put_back()

    def keep(self) -> None:
        """End a block from outside, with the weights that are in the model."""
        self._put_back = None

    def leave(self, count: int) -> None:
        """End a block from outside, such as that of an evaluation that was interrupted.

        The fast weights come back, unless the model was trained meanwhile: then these would be lost.
        """
        if self._put_back is None:
            return
        if count == self._count:
            self._put_back()
        else:
            self.keep()
            warnings.warn(
                "The model was trained with the slow weights in it, as a `slow_weights()` block or an evaluation with "
                "`SwapSlowWeights` had not ended. It keeps the weights that this training gave it.",
                stacklevel=4,
            )


class Swapping:
    """The methods of a Keras callback that swaps; `_lookahead` returns the model's optimizer, or raises."""

    _lookahead: Callable[[], Any]

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        self.swap_on_epoch = swap_on_epoch
        self._block: contextlib.AbstractContextManager | None = None

    def _swap_in(self) -> None:
        optimizer = self._lookahead()
        if self._block is not None or not optimizer._has_slow_weights():
            return
        block = optimizer.slow_weights()
        block.__enter__()
        self._block = block

    def _swap_out(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def on_train_begin(self, logs: Any = None) -> None:
        self._swap_out()
        # An interrupted evaluation does not reach `on_test_end`.
        self._lookahead()._leave_slow_weights()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._swap_out()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.swap_on_epoch:
            self._swap_in()

    def on_train_end(self, logs: Any = None) -> None:
        self._swap_out()

    def on_test_begin(self, logs: Any = None) -> None:
        self._swap_in()

    def on_test_end(self, logs: Any = None) -> None:
        self._swap_out()

    def on_predict_begin(self, logs: Any = None) -> None:
        self._swap_in()

    def on_predict_end(self, logs: Any = None) -> None:
        self._swap_out()
