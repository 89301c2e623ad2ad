"""Evaluation on the slow weights, for Keras 2 and Keras 3: the block, and how a callback uses it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Block", "Swapping"]

_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10}


class Block:
    """Keeps the fast weights while the slow weights are in the model.

    Args:
        value_of: Function that returns the value of a variable as a tensor, cast to a dtype if it is given.
        copy_of: Function that returns a copy of the value of a variable, as a tensor.
        are_all: Function that returns whether a tensor of booleans is true everywhere.
    """

    def __init__(
        self, value_of: Callable[..., Any], copy_of: Callable[[Any], Any], are_all: Callable[[Any], Any]
    ) -> None:
        self._value_of, self._copy_of, self._are_all = value_of, copy_of, are_all
        self._pairs: Sequence[Any] = ()
        self._kept: Sequence[Any] | None = None
        self._count = 0
        # Whether a callback has opened the block, and not a `with` statement.
        self.is_of_callback = False
        # The number of steps at which a call, and not a step, made fast and slow weights equal.
        self.made_equal_at: int | None = None
        # The number of steps at which the sync period was set. It is then unknown whether the last of these steps was a
        # sync.
        self.period_set_at: int | None = None
        # The fast weights of a file that was saved in a block: variable and value, by the `id` of the variable.
        self.loaded: dict[int, tuple[Any, Any]] = {}
        # Which file it was: in Keras 3 its number of steps, in Keras 2 TensorFlow's number of the restoration.
        self.loaded_at: int | None = None

    def note_made_equal(self, count: Callable[[], int]) -> None:
        """Note that a call has made fast and slow weights equal. In a compiled function the count has no number."""
        self.loaded = {}
        with contextlib.suppress(Exception):
            self.made_equal_at = count()

    def note_period_set(self, count: Callable[[], int]) -> None:
        """Note that the sync period was set. In a compiled function the count has no number."""
        with contextlib.suppress(Exception):
            self.period_set_at = count()

    @property
    def is_open(self) -> bool:
        return self._kept is not None

    def copies(self, pairs: Sequence[Any]) -> list[Any]:
        """Return copies of the fast weights."""
        return [self._copy_of(fast) for _, fast, *_ in pairs]

    def have(self, pairs: Sequence[Any], values: Sequence[Any]) -> bool:
        """Return whether the fast weights have these values."""
        return all(self.are_equal(fast, value) for (_, fast, *_), value in zip(pairs, values))

    @contextlib.contextmanager
    def run(self, pairs: Sequence[Any], count: int) -> Iterator[None]:
        """Return a context manager that opens a block, and ends it unless it was ended from outside."""
        kept = self.copies(pairs)
        try:
            self.open(pairs, kept, count)
            self.is_of_callback = False
            yield
        finally:
            if self._kept is kept:
                self.end()
                for (_, fast, *_), value in zip(pairs, kept):
                    fast.assign(value)

    def open(self, pairs: Sequence[Any], kept: Sequence[Any], count: int) -> None:
        """Put the slow weights into the model.

        Args:
            pairs: Sequences that begin with a slow variable and its fast variable. If the slow variable is `None`, the
                block only keeps the fast variable.
            kept: Copies of the fast weights.
            count: The number of steps so far.
        """
        self._pairs, self._kept, self._count, self.is_of_callback = pairs, kept, count, True
        for slow, fast, *_ in pairs:
            if slow is not None:
                fast.assign(self._copy_of(slow))

    def end(self) -> None:
        """End the block, and leave the weights that are in the model."""
        self._pairs, self._kept = (), None

    def leave(self, count: int, averages: Mapping[int, Any], is_last: bool) -> None:
        """End a block from outside, as a callback does.

        The fast weights come back, unless the model was trained meanwhile: then the training would be lost. For the
        other arguments see `_settle`.
        """
        if self.is_open and count != self._count:
            self.end()
            warnings.warn(
                "The model was trained with the slow weights in it, as a `slow_weights()` block or an evaluation with "
                "`SwapSlowWeights` had not ended. It keeps the weights that this training gave it.",
                stacklevel=4,
            )
        elif self.is_open:
            self._settle(averages, is_last)

    def _settle(self, averages: Mapping[int, Any], is_last: bool) -> None:
        """End a block in which other callbacks may have put weights into the model.

        The slow weights have displaced the kept weights. The kept weights belong where the slow weights are now. There
        are two such places: the model, and the inner optimizer's `averages`, with which `SwapEMAWeights` exchanges the
        model's weights.

        If the slow weights are in neither place, another callback has put other weights into the model. There are two
        cases:

        - The other callback began before this block, or training will continue from its weights. Then the weights in
          the model stay.
        - The other callback began after this block, and will put the slow weights back. Then the block must stay open
          for one more look, unless this look `is_last`.

        Args:
            averages: The averages, by the `id` of the weight.
            is_last: Whether the block ends in any case.
        """
        entries = self._entries()
        averaged = [entry for entry in entries if id(entry[1]) in averages]
        is_settled = True
        for group in (averaged, [entry for entry in entries if id(entry[1]) not in averages]):
            if all(self.are_equal(shown, fast) for shown, fast, _ in group):
                for _, fast, kept in group:
                    fast.assign(kept)
            elif group is averaged and all(self.are_close(shown, averages[id(fast)], fast) for shown, fast, _ in group):
                for _, fast, kept in group:
                    averages[id(fast)].assign(kept)
            else:
                is_settled = False
        if is_settled or is_last:
            self.end()

    def _entries(self) -> list[tuple[Any, Any, Any]]:
        """Return for each weight: its value that the block shows, its variable, and its value that the block keeps."""
        return [
            (kept if slow is None else slow, fast, kept)
            for (slow, fast, *_), kept in zip(self._pairs, self._kept or ())
        ]

    def is_undisturbed(self) -> bool:
        """Return whether the block is open and nothing else has put weights into the model."""
        return self.is_open and all(self.are_equal(shown, fast) for shown, fast, _ in self._entries())

    def fast_weights(self) -> dict[int, Any]:
        """Return the fast weights that are not in the model, by the `id` of their variable."""
        return {id(fast): kept for (slow, fast, *_), kept in zip(self._pairs, self._kept or ()) if slow is not None}

    def put_back(self, values: Mapping[int, Any], pairs: Sequence[Any]) -> None:
        """Put the fast weights of a file into the model, if the model has all slow weights of the file."""
        found = [(slow, fast) for slow, fast, *_ in pairs if slow is not None]
        if all(id(fast) in values and self.are_equal(slow, fast) for slow, fast in found):
            for _, fast in found:
                fast.assign(values[id(fast)])

    def are_equal(self, one: Any, other: Any) -> bool:
        """Return whether two variables or tensors are equal, in the dtype of the second. NaN equals NaN.

        Nothing is copied to the host.
        """
        one, other = self._value_of(one, other.dtype), self._value_of(other)
        return bool(self._are_all((one == other) | ((one != one) & (other != other))))

    def are_close(self, one: Any, other: Any, beside: Any) -> bool:
        """Return whether two variables are equal, except for rounding in an exchange with a third variable and back.

        On TensorFlow `SwapEMAWeights` exchanges by adding and subtracting, which rounds.
        """
        if self.are_equal(one, other):
            return True
        tolerance = 8 * _EPSILON.get(str(getattr(one.dtype, "name", one.dtype)), 2.0**-7)
        one, other, beside = (self._value_of(variable, other.dtype) for variable in (one, other, beside))
        return bool(self._are_all(abs(one - other) <= tolerance * (abs(one) + abs(other) + abs(beside))))


class Swapping:
    """The methods of a Keras callback that swaps. `_lookahead` returns the model's optimizer, or raises an error.

    In `fit` the slow weights stay in the model from its validation until training continues. So all callbacks find the
    scored weights at the end of the epoch, whatever their order.

    Keras calls the ends of callbacks in the same order as their beginnings. So two callbacks that swap do not nest.
    This callback therefore puts the slow weights into the model at the first batch of an evaluation, when all other
    callbacks have begun. A callback before this callback in the list ends before it, and a callback after it ends after
    it:

    - A callback after it restores the weights that it kept when it began: the fast weights. By then this callback has
      put back what it found, so all is as it was.
    - A callback before it restores these weights first. This callback then sees that the slow weights are gone, and
      leaves the model alone.

    Beside such a callback the slow weights leave the model at the end of the validation. They come back at the end of
    the epoch, for the callbacks after this callback.

    Right after a sync the fast weights equal the slow weights. Then this callback cannot see whether the slow weights
    are gone, and refuses to come second.
    """

    _lookahead: Callable[[], Any]

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        self.swap_on_epoch = swap_on_epoch
        self._is_training = self._began_with_others = False
        # An evaluation has begun, but its first batch has not.
        self._is_due = False
        # The weights that this callback found when a validation began, until its first batch.
        self._found: list[Any] | None = None
        # This callback has put slow weights into the model, and has not taken them out.
        self._has_swapped = False
        # No other callback has put weights into the model for this validation.
        self._is_alone = False
        # The slow weights were validated in this epoch.
        self._is_scored = False

    def set_model(self, model: Any) -> None:
        super().set_model(model)  # type: ignore[misc]
        # A `fit`, `evaluate` or `predict` begins, and no callback has swapped yet. (A validation is part of its `fit`.)
        self._is_training = False
        with contextlib.suppress(ValueError):
            self._began_with_others = self._has_others_after_sync(self._lookahead())

    def _has_others_after_sync(self, optimizer: Any) -> bool:
        """Return whether the last change was a sync or reset, but the model does not have the slow weights."""
        if not optimizer.sync_period:
            return False
        count = optimizer._count()
        block = optimizer._block
        if (count % optimizer.sync_period or count == block.period_set_at) and count != block.made_equal_at:
            return False
        averages = optimizer._averages()
        return not all(
            slow is None or optimizer._block.are_close(slow, fast, averages.get(id(fast), fast))
            for slow, fast, *_ in optimizer._pairs_to_swap()
        )

    def _is_free(self, optimizer: Any) -> bool:
        # An open block belongs to another callback, which will end it.
        return not self._has_swapped and not optimizer._block.is_open and optimizer._has_slow_weights()

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
            self._has_swapped = True
            optimizer._enter_slow_weights()

    def _swap_out(self, is_last: bool = True) -> None:
        if self._has_swapped:
            optimizer = self._lookahead()
            optimizer._leave_slow_weights(is_last)
            self._has_swapped = optimizer._block.is_open

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_training, self._has_swapped = True, False
        # An interrupted evaluation does not reach `on_test_end`.
        self._lookahead()._leave_slow_weights()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._is_scored = False
        # A callback after this callback may still put the slow weights back. It has done so before the first batch.
        self._swap_out(is_last=False)
        # Only now has every callback loaded its files, in `on_train_begin`.
        self._lookahead()._take_loaded_fast_weights()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._swap_out()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.swap_on_epoch or self._is_scored:
            self._check_is_first()
            self._swap_in()

    def on_train_end(self, logs: Any = None) -> None:
        self._swap_out()

    def on_test_begin(self, logs: Any = None) -> None:
        # An interrupted evaluation has not ended.
        self._swap_out()
        self._check_is_first()
        self._is_due, self._found = True, None
        optimizer = self._lookahead()
        if self._is_training and self._is_free(optimizer):
            self._found = optimizer._block.copies(optimizer._pairs_to_swap())

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        # In later batches even asking for the model would cost time: on JAX Keras then takes the model's state out of
        # the step.
        if not self._is_due:
            return
        self._is_due, optimizer = False, self._lookahead()
        self._is_alone = self._found is not None and optimizer._block.have(optimizer._pairs_to_swap(), self._found)
        self._found = None
        self._swap_in()

    def on_test_end(self, logs: Any = None) -> None:
        self._is_due, self._is_scored = False, self._is_training and self._has_swapped
        if not (self._is_scored and self._is_alone and self._lookahead()._block.is_undisturbed()):
            self._swap_out()

    def on_predict_begin(self, logs: Any = None) -> None:
        self.on_test_begin()

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.on_test_batch_begin(batch)

    def on_predict_end(self, logs: Any = None) -> None:
        self.on_test_end()
