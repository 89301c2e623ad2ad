"""Evaluation on the slow weights, for the two Keras: the block, and what a callback does with it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Block", "Swapping"]

_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10}


def _epsilon(variable: Any) -> float:
    return _EPSILON.get(str(getattr(variable.dtype, "name", variable.dtype)), 2.0**-7)


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


def _is_close(one: np.ndarray, other: np.ndarray, scale: np.ndarray, epsilon: float) -> bool:
    one, other, scale = (np.asarray(array, "float64") for array in (one, other, scale))
    with np.errstate(invalid="ignore"):
        close = np.abs(one - other) <= 8 * epsilon * (np.abs(one) + np.abs(other) + np.abs(scale))
    return bool(np.all(close | (one == other) | (np.isnan(one) & np.isnan(other))))


class Block:
    """Sets the fast weights aside while the slow ones are in the model."""

    def __init__(self, to_numpy: Callable[[Any], Any] = np.asarray) -> None:
        self._to_numpy = to_numpy
        self._put_back: Callable[[], None] | None = None
        self._count = 0
        self._pairs: Sequence[Any] = ()
        self._kept: Sequence[Any] = ()
        self._marked: dict[int, np.ndarray] = {}
        self._copy_of: Callable[[Any], Any] = np.asarray

    @property
    def is_open(self) -> bool:
        return self._put_back is not None

    @contextlib.contextmanager
    def run(self, pairs: Sequence[Any], copy_of: Callable[[Any], Any], count: int) -> Iterator[None]:
        """Run a block. `pairs` begin with slow and fast variable, `count` is the number of steps so far.

        In place of a slow variable there may be None: the block then only keeps the fast one.
        """
        kept = [copy_of(fast) for _, fast, *_ in pairs]

        def put_back() -> None:
            self.keep()
            for (_, fast, *_), value in zip(pairs, kept):
                fast.assign(value)

        self._put_back, self._count, self._pairs, self._kept, self._copy_of = put_back, count, pairs, kept, copy_of
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
        self._put_back, self._pairs, self._kept, self._marked = None, (), (), {}

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

    def _value(self, variable: Any) -> np.ndarray:
        return np.asarray(self._to_numpy(self._copy_of(variable)))

    def _put_in(self, index: int) -> np.ndarray:
        """Return what the block has put into the model for a pair."""
        slow, _, *_ = self._pairs[index]
        if index in self._marked:
            return self._marked[index]
        return np.asarray(self._to_numpy(self._kept[index])) if slow is None else self._value(slow)

    def mark(self, sync_period: int) -> None:
        """Make the slow weights in the model tell from fast ones that are equal to them.

        If the block has displaced neither, another callback is using the model, and will put the fast weights back.
        After a sync these would look like slow weights that nobody has touched. One element is changed by less than
        what it is measured to.
        """
        if self._count % sync_period or self._put_back is None:
            return
        values = [np.asarray(self._to_numpy(one)) for one in self._kept]
        if all(_same_bits(value, self._put_in(index)) for index, value in enumerate(values)):
            return
        for index, (slow, fast, *_) in enumerate(self._pairs):
            value = np.array(self._put_in(index))
            finite = np.where(np.isfinite(value), np.abs(np.asarray(value, "float64")), -1).ravel()
            if slow is None or not finite.size or finite.max() < 0:
                continue
            element, epsilon = finite.argmax(), _epsilon(fast)
            # More than what Keras' exchange of weights by addition and subtraction may be off.
            step = (16 if epsilon < 2.0**-20 else 2) * epsilon
            value.ravel()[element] = value.ravel()[element] * (1 - step) if finite[element] else step
            fast.assign(value)
            self._marked[index] = self._value(fast)
            return

    def settle(self, averages: Mapping[int, Any], last: bool) -> bool:
        """End a block in which others may have put weights into the model; return whether it could be ended.

        Keras calls the ends of callbacks in the order of their beginnings, so that two that swap do not nest. What
        the slow weights have displaced belongs where they are now: in the model, or in the inner optimizer's
        `averages` (by the `id` of the weight), with which `SwapEMAWeights` exchanges the model's weights. If they are
        in neither, another callback keeps them, and puts them into the model after this: the block stays open. Or it
        began before this block, and has put its own weights back, which stay: so it is if this call is the `last`.
        """
        if self._put_back is None:
            return True
        places = self._places(averages)
        if None in places:
            if last:
                self.keep()
            return last
        for (_, fast, *_), kept, place in zip(self._pairs, self._kept, places):
            (fast if place == "model" else averages[id(fast)]).assign(kept)
        self.keep()
        return True

    def is_displaced(self, averages: Mapping[int, Any]) -> bool:
        """Return whether the slow weights are neither in the model nor in the `averages`."""
        return self._put_back is not None and None in self._places(averages)

    def _places(self, averages: Mapping[int, Any]) -> list[str | None]:
        """Return where the weights are that the block has put into the model: "model", "averages" or None, for each.

        Those with an average are in one place, and the others too.
        """
        averaged = [index for index, (_, fast, *_) in enumerate(self._pairs) if id(fast) in averages]
        others = [index for index in range(len(self._pairs)) if index not in averaged]
        places: list[str | None] = [None] * len(self._pairs)
        for group in (averaged, others):
            place = None
            if all(_same_bits(self._value(self._pairs[index][1]), self._put_in(index)) for index in group):
                place = "model"
            elif group is averaged and all(self._is_average(index, averages) for index in group):
                place = "averages"
            for index in group:
                places[index] = place
        return places

    def _is_average(self, index: int, averages: Mapping[int, Any]) -> bool:
        # On TensorFlow the exchange rounds.
        fast = self._pairs[index][1]
        average = self._value(averages[id(fast)])
        return _is_close(average, self._put_in(index), self._value(fast), _epsilon(fast))


class Swapping:
    """The methods of a Keras callback that swaps; `_lookahead` returns the model's optimizer, or raises."""

    _lookahead: Callable[[], Any]

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        self.swap_on_epoch = swap_on_epoch
        self._block: contextlib.AbstractContextManager | None = None
        self._is_pending = self._is_training = False

    def _averages(self) -> dict[int, Any]:
        """Return the moving averages that other callbacks may exchange with weights, by the `id` of the weight."""
        return {}

    def set_model(self, model: Any) -> None:
        super().set_model(model)  # type: ignore[misc]
        # A `fit`, `evaluate` or `predict` begins; a validation is part of its `fit`.
        self._is_training = False

    def _swap_in(self) -> None:
        self._swap_out()
        optimizer = self._lookahead()
        # A block that is open is another callback's, which will end it.
        if self._block is not None or optimizer._block.is_open or not optimizer._has_slow_weights():
            return
        block = optimizer.slow_weights()
        block.__enter__()
        self._block = block
        if optimizer.sync_period:
            optimizer._block.mark(optimizer.sync_period)

    def _swap_out(self, last: bool = False) -> None:
        """Put the fast weights back. If it must be left open where, the next hook asks again, and for the last time."""
        if self._block is None:
            return
        last = last or self._is_pending
        self._is_pending = not self._lookahead()._block.settle(self._averages(), last)
        if not self._is_pending:
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def _check_nothing_displaced(self, batch: int) -> None:
        """Refuse an evaluation after which no hook could put the fast weights back."""
        if batch or self._block is None or self._is_training:
            return
        if self._lookahead()._block.is_displaced(self._averages()):
            block, self._block = self._block, None
            block.__exit__(None, None, None)
            raise RuntimeError(
                "`SwapSlowWeights` must come after the other callbacks in `callbacks` that put weights into the model "
                "for an evaluation. Received: one after it, which would leave the slow weights in the model. The fast "
                "weights are in it again."
            )

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_training, self._is_pending = True, False
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)
        # An interrupted evaluation does not reach `on_test_end`.
        self._lookahead()._leave_slow_weights()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._swap_out()
        if self._is_pending:
            # A method of the class would be called, and in Keras 2 wait for the device, in every batch.
            self.on_train_batch_begin = self._end_pending

    def _end_pending(self, batch: int, logs: Any = None) -> None:
        self._swap_out()
        del self.on_train_batch_begin

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._swap_out()
        if self.swap_on_epoch:
            self._swap_in()

    def on_train_end(self, logs: Any = None) -> None:
        self._swap_out(last=True)

    def on_test_begin(self, logs: Any = None) -> None:
        self._swap_in()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._check_nothing_displaced(batch)

    def on_test_end(self, logs: Any = None) -> None:
        self._swap_out(last=not self._is_training)

    def on_predict_begin(self, logs: Any = None) -> None:
        self._swap_in()

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._check_nothing_displaced(batch)

    def on_predict_end(self, logs: Any = None) -> None:
        self._swap_out(last=not self._is_training)
