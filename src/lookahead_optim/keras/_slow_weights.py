"""The slow weights of one wrapper: which weights have one, where it lies, capture, and who takes part in a sync.

Nothing is cached here: lists of weights are made when a capture or a sync is due, so that nothing can be stale.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from lookahead_optim.keras._backend import backend
from lookahead_optim.keras._state import to_numpy
from lookahead_optim.keras._wrappers import optimizers_in

__all__ = ["Pair", "SlowWeights"]


class Pair(NamedTuple):
    """A slow weight and its fast one, both `keras.Variable`."""

    slow: keras.Variable
    fast: keras.Variable


class SlowWeights:
    """The slow weights of one wrapper. They are variables that the wrapper made, and tracks.

    *Captured* is a variable of its own: 1 from the first applied update on, until `forget` or a restored checkpoint
    without slow weights sets it to 0. It is saved with the slow weights. The step count cannot say it: users assign to
    it, and checkpoints of bare optimizers have one.
    """

    def __init__(self, inner_optimizer: keras.optimizers.Optimizer) -> None:
        # Not the wrapper: it would be kept alive until the next run of the cyclic garbage collector.
        self._inner_optimizer = inner_optimizer
        self.captured: keras.Variable | None = None
        # In the order of the weights, with None for a weight that has no slow one.
        self.slow_or_none: list[keras.Variable | None] = []
        self.fast: list[keras.Variable] = []

    def create_captured(self, wrapper: keras.optimizers.Optimizer) -> None:
        """Make the variable that says whether the slow weights were captured."""
        self.captured = wrapper.add_variable(
            (), "zeros", dtype="int", aggregation="only_first_replica", name=f"{self.label()}_captured"
        )

    def create(self, wrapper: keras.optimizers.Optimizer, weights: list[keras.Variable]) -> None:
        """Make a slow weight for each weight. A weight that Keras overwrites with its gradient has none."""
        self.fast = weights
        self.slow_or_none = wrapper.add_optimizer_variables(weights, f"{self.label()}_slow")

    def label(self) -> str:
        """Return a name for variables that two wrappers in one optimizer do not share."""
        inside = optimizers_in(self._inner_optimizer)
        return "_".join(optimizer.name for optimizer in inside if not hasattr(optimizer, "optimizers"))

    @property
    def slow(self) -> list[keras.Variable]:
        """The slow weights, in the order of the weights that have one."""
        return [slow for slow in self.slow_or_none if slow is not None]

    def named(self) -> dict[str, keras.Variable]:
        """Return the slow weights by the names under which they are saved."""
        return {f"slow_{index}": slow for index, slow in enumerate(self.slow)}

    def pairs(self) -> list[Pair]:
        """Return the pair of every weight that has a slow one."""
        return [Pair(slow, fast) for slow, fast in zip(self.slow_or_none, self.fast) if slow is not None]

    def _inside(self) -> Iterator["SlowWeights"]:
        """Yield the slow weights of all wrappers inside this one."""
        for optimizer in optimizers_in(self._inner_optimizer):
            found = getattr(optimizer, "_slow_weights", None)
            if isinstance(found, SlowWeights):
                yield found

    def _pairs_inside(self) -> list[Pair]:
        return [pair for inside in self._inside() for pair in inside.pairs()]

    def is_captured(self) -> bool:
        """Return whether the slow weights were captured. This waits for the device."""
        return self.captured is not None and bool(to_numpy(self.captured))

    def forget(self) -> None:
        """Have the next update capture anew."""
        if self.captured is not None:
            self.captured.assign(0)

    def capture_if_due(self, is_due: Callable[[Any], Any]) -> None:
        """Capture, in a step and before its update, if `is_due(captured)`: if no update was applied yet, or none since
        `forget`.

        Calls that only accumulate gradients capture, too. The last of them is the one that counts.
        """
        backend.capture(self.captured, is_due, self.pairs)

    def synchronize_if_due(
        self, counter: Any, is_due: Callable[[Any], Any], slow_step_size: Any, counts_by_one: bool
    ) -> None:
        """Make the outer step, in a step and after its update, if `is_due(counter)`.

        A frozen weight is not moved. Its slow weight starts anew from it, so as not to draw it back when it is trained
        again. Nor may the slow weights of wrappers inside this one draw any weight back: they start anew, too.

        Only PyTorch's backend uses `counts_by_one`, to know a count without waiting for the device.
        """

        def trained() -> list[Pair]:
            return [pair for pair in self.pairs() if pair.fast.trainable]

        def others() -> list[Pair]:
            return [pair for pair in self.pairs() if not pair.fast.trainable] + self._pairs_inside()

        backend.synchronize(counter, is_due, trained, slow_step_size, counts_by_one)
        backend.capture(counter, is_due, others, counts_by_one)

    def synchronize(self, slow_step_size: Any) -> None:
        """Make the outer step now, for frozen weights too."""
        if self._show_fast_unless_captured():
            backend.synchronize(self.captured, _always, self.pairs, slow_step_size)
            backend.capture(self.captured, _always, self._pairs_inside)

    def reset(self) -> None:
        """Capture anew, as wrappers inside do. What was not captured yet will be, by the first update."""
        for slow_weights in (self, *self._inside()):
            if slow_weights.is_captured():
                backend.capture(slow_weights.captured, _always, slow_weights.pairs)

    def to_swap(self) -> Sequence[tuple[keras.Variable | None, keras.Variable]]:
        """Return what a block swaps: each weight and before it its slow weight, or None if that is not captured."""
        if self._show_fast_unless_captured():
            return list(zip(self.slow_or_none, self.fast))
        return [(None, fast) for fast in self.fast]

    def _show_fast_unless_captured(self) -> bool:
        """Set the slow weights to the fast ones unless they were captured; return whether they were.

        This is for who looks at them. It is no capture: the next step makes one.
        """
        is_captured = self.is_captured()
        if self.slow and not is_captured:
            backend.capture(self.captured, _always, self.pairs)
        return is_captured


def _always(count: Any) -> bool:
    return True
