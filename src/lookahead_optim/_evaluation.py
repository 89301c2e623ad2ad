"""Evaluation on the slow weights, for the two Keras: the block, and what a callback does with it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Block", "Swapping"]

_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10}


class Block:
    """Sets the fast weights aside while the slow ones are in the model.

    Args:
        value_of: Returns the value of a variable as a tensor.
        copy_of: Returns the value of a variable as a tensor of its own.
        are_all: Returns whether a tensor of booleans is true everywhere.
    """

    def __init__(
        self, value_of: Callable[[Any], Any], copy_of: Callable[[Any], Any], are_all: Callable[[Any], Any]
    ) -> None:
        self._value_of, self._copy_of, self._are_all = value_of, copy_of, are_all
        self._put_back: Callable[[], None] | None = None
        self._count = 0
        self._pairs: Sequence[Any] = ()
        self._kept: Sequence[Any] = ()
        # The number of steps at which a call, and no step, made fast and slow weights equal.
        self.made_equal_at: int | None = None

    def note_made_equal(self, count: Callable[[], int]) -> None:
        """Note that a call has made fast and slow weights equal. In a function that is compiled it has no number."""
        with contextlib.suppress(Exception):
            self.made_equal_at = count()

    @property
    def is_open(self) -> bool:
        return self._put_back is not None

    @contextlib.contextmanager
    def run(self, pairs: Sequence[Any], count: int) -> Iterator[None]:
        """Run a block. `pairs` begin with slow and fast variable, `count` is the number of steps so far.

        In place of a slow variable there may be None: the block then only keeps the fast one.
        """
        kept = [self._copy_of(fast) for _, fast, *_ in pairs]

        def put_back() -> None:
            self.keep()
            for (_, fast, *_), value in zip(pairs, kept):
                fast.assign(value)

        self._put_back, self._count, self._pairs, self._kept = put_back, count, pairs, kept
        try:
            for slow, fast, *_ in pairs:
                if slow is not None:
                    fast.assign(self._copy_of(slow))
            yield
        finally:
            if self._put_back is put_back:
                put_back()

    def keep(self) -> None:
        """End a block from outside, with the weights that are in the model."""
        self._put_back, self._pairs, self._kept = None, (), ()

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

    def settle(self, averages: Mapping[int, Any], is_last: bool) -> bool:
        """End a block in which others may have put weights into the model; return whether it has ended.

        What the slow weights have displaced belongs where they are now: in the model, or in the inner optimizer's
        `averages` (by the `id` of the weight), with which `SwapEMAWeights` exchanges the model's weights. If they are
        in neither, another callback has put other weights into the model. Either they are what it kept when it began,
        before this block: then they stay. Or it began after this block, and will put back the slow weights: then the
        block must stay open, for one more look, unless this one `is_last`.
        """
        if self._put_back is None:
            return True
        entries = [(slow, fast, kept) for (slow, fast, *_), kept in zip(self._pairs, self._kept)]
        averaged = [entry for entry in entries if id(entry[1]) in averages]
        is_settled = True
        for group in (averaged, [entry for entry in entries if id(entry[1]) not in averages]):
            if all(self.are_equal(kept if slow is None else slow, fast) for slow, fast, kept in group):
                for _, fast, kept in group:
                    fast.assign(kept)
            elif group is averaged and all(self.are_close(slow, averages[id(fast)], fast) for slow, fast, _ in group):
                for _, fast, kept in group:
                    averages[id(fast)].assign(kept)
            else:
                is_settled = False
        if is_settled or is_last:
            self.keep()
        return not self.is_open

    def are_equal(self, one: Any, other: Any) -> bool:
        """Return whether two variables or tensors are equal, NaN to NaN too. Nothing is copied to the host."""
        one, other = self._value_of(one), self._value_of(other)
        return bool(self._are_all((one == other) | ((one != one) & (other != other))))

    def are_close(self, one: Any, other: Any, beside: Any) -> bool:
        """Return whether two variables are equal but for an exchange with a third one, or back.

        On TensorFlow `SwapEMAWeights` adds and subtracts, which rounds.
        """
        if self.are_equal(one, other):
            return True
        tolerance = 8 * _EPSILON.get(str(getattr(one.dtype, "name", one.dtype)), 2.0**-7)
        one, other, beside = map(self._value_of, (one, other, beside))
        return bool(self._are_all(abs(one - other) <= tolerance * (abs(one) + abs(other) + abs(beside))))


class Swapping:
    """The methods of a Keras callback that swaps; `_lookahead` returns the model's optimizer, or raises.

    Keras calls the ends of callbacks in the order of their beginnings, so that two that swap do not nest. This one
    therefore puts the slow weights into the model at the first batch of an evaluation, when all others have begun.
    Those before it in the list then end before it, and those after it end after it:

    - a callback after it restores the weights that it kept when it began, the fast ones, after this one has put back
      what it found: all is as it was;
    - a callback before it does so first. This one sees that the slow weights are gone, and leaves the model alone.

    It cannot see that where the fast weights are equal to the slow ones, after a sync: then it refuses to be second.
    """

    _lookahead: Callable[[], Any]

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        self.swap_on_epoch = swap_on_epoch
        self._block: contextlib.AbstractContextManager[None] | None = None
        self._is_training = self._began_with_others = False
        if swap_on_epoch:
            # A method of the class would be called in every batch of all trainings. Keras 2 then waits for the device.
            self.on_train_batch_begin = self._on_first_batch

    def _averages(self) -> dict[int, Any]:
        """Return the moving averages that other callbacks may exchange with weights, by the `id` of the weight."""
        return {}

    def set_model(self, model: Any) -> None:
        super().set_model(model)  # type: ignore[misc]
        # A `fit`, `evaluate` or `predict` begins; a validation is part of its `fit`. No callback has swapped yet.
        self._is_training = False
        with contextlib.suppress(ValueError):
            self._began_with_others = self._has_others_after_sync(self._lookahead())

    def _has_others_after_sync(self, optimizer: Any) -> bool:
        """Return whether the last change was a sync or a reset, but the model has other weights than the slow ones."""
        if not optimizer.sync_period:
            return False
        count = optimizer._count()
        if count % optimizer.sync_period and count != optimizer._block.made_equal_at:
            return False
        averages = self._averages()
        return not all(
            slow is None or optimizer._block.are_close(slow, fast, averages.get(id(fast), fast))
            for slow, fast, *_ in optimizer._pairs_to_swap()
        )

    def _is_free(self, optimizer: Any) -> bool:
        # A block that is open is another callback's, which will end it.
        return self._block is None and not optimizer._block.is_open and optimizer._has_slow_weights()

    def _check_is_first(self) -> None:
        optimizer = self._lookahead()
        if not self._is_free(optimizer) or (self._began_with_others and not self._is_training):
            return
        if self._has_others_after_sync(optimizer):
            raise RuntimeError(
                "`SwapSlowWeights` must come before the other callbacks in `callbacks` that put weights into the model "
                "for an evaluation. Received: a model that has just been synchronised, and has other weights. If a "
                "callback has changed them for good, call `reset_slow_weights()` there."
            )

    def _swap_in(self) -> None:
        optimizer = self._lookahead()
        if self._is_free(optimizer):
            block = optimizer.slow_weights()
            block.__enter__()
            self._block = block

    def _swap_out(self, is_last: bool = True) -> None:
        if self._block is not None and self._lookahead()._block.settle(self._averages(), is_last):
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_training = True
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)
        # An interrupted evaluation does not reach `on_test_end`.
        self._lookahead()._leave_slow_weights()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # A callback after this one may put the slow weights back. At the first batch it has.
        self._swap_out(is_last=False)

    def _on_first_batch(self, batch: int, logs: Any = None) -> None:
        self._swap_out()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.swap_on_epoch:
            self._check_is_first()
            self._swap_in()

    def on_train_end(self, logs: Any = None) -> None:
        self._swap_out()

    def on_test_begin(self, logs: Any = None) -> None:
        # An evaluation that was interrupted has not ended.
        self._swap_out()
        self._check_is_first()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._swap_in()

    def on_test_end(self, logs: Any = None) -> None:
        self._swap_out()

    def on_predict_begin(self, logs: Any = None) -> None:
        self.on_test_begin()

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._swap_in()

    def on_predict_end(self, logs: Any = None) -> None:
        self._swap_out()
