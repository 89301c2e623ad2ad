"""The slow weights of one wrapper and their momentum: which weights have a slow weight, capture, and sync.

Nothing is cached here. Lists of weights are made when a capture or a sync is due, so that no list can be stale.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from lookahead_optim.keras._backend import backend
from lookahead_optim.keras._state import to_numpy
from lookahead_optim.keras._wrappers import optimizers_in

__all__ = ["Pair", "SlowWeights"]

# The value of `captured` after a sync with momentum. A second sync would move the weights again.
_SYNCHRONIZED = 2


class Pair(NamedTuple):
    """A slow weight, its fast weight, and its slow momentum or `None`."""

    slow: keras.Variable
    fast: keras.Variable
    momentum: keras.Variable | None


class SlowWeights:
    """The slow weights of one wrapper: variables that the wrapper made and tracks.

    `captured` is a variable of its own. It is 1 from the first applied update on. `forget`, or restoring a checkpoint
    without slow weights, sets it to 0. With momentum it is 2 from a sync until the next applied update. It is saved
    with the slow weights. The step count cannot replace it: users assign to the step count, and checkpoints of bare
    optimizers have one.
    """

    def __init__(self, inner_optimizer: keras.optimizers.Optimizer, has_momentum: bool, dtype: str | None) -> None:
        # The inner optimizer and not the wrapper: a reference to the wrapper would keep it alive until the next run of
        # the cyclic garbage collector.
        self._inner_optimizer = inner_optimizer
        self._has_momentum, self._dtype = has_momentum, dtype
        self.captured: keras.Variable | None = None
        # In the order of the weights, with `None` for a weight without a slow weight.
        self.slow_or_none: list[keras.Variable | None] = []
        self.momentum_or_none: list[keras.Variable | None] = []
        self.fast: list[keras.Variable] = []

    def create_captured(self, wrapper: keras.optimizers.Optimizer) -> None:
        """Make the variable that says whether the slow weights were captured."""
        self.captured = wrapper.add_variable(
            (), "zeros", dtype="int", aggregation="only_first_replica", name=f"{self.label()}_captured"
        )

    def create(self, wrapper: keras.optimizers.Optimizer, weights: list[keras.Variable]) -> None:
        """Make a slow weight for each weight, except for a weight that Keras overwrites with its gradient."""
        self.fast = weights
        self.slow_or_none = self._create_like(wrapper, weights, f"{self.label()}_slow")
        self.momentum_or_none = [None] * len(weights)
        if self._has_momentum:
            self.momentum_or_none = self._create_like(wrapper, weights, f"{self.label()}_slow_momentum")

    def _create_like(
        self, wrapper: keras.optimizers.Optimizer, weights: list[keras.Variable], name: str
    ) -> list[keras.Variable | None]:
        if self._dtype is None:
            return wrapper.add_optimizer_variables(weights, name)
        created: list[keras.Variable | None] = []
        for weight in weights:
            # This does the work of `add_optimizer_variables`, which takes no dtype. The layout is private there too.
            settings = {"layout": getattr(weight, "_layout", None), "name": f"{weight.path.replace('/', '_')}_{name}"}
            if getattr(weight, "overwrite_with_gradient", False):
                created.append(None)
            else:
                with backend.beside(weight):
                    created.append(wrapper.add_variable(weight.shape, "zeros", self._dtype, **settings))
        return created

    def label(self) -> str:
        """Return a name for variables. Two wrappers in one optimizer have different names."""
        inside = optimizers_in(self._inner_optimizer)
        return "_".join(optimizer.name for optimizer in inside if not hasattr(optimizer, "optimizers"))

    @property
    def slow(self) -> list[keras.Variable]:
        """The slow weights, in the order of the weights that have a slow weight."""
        return [slow for slow in self.slow_or_none if slow is not None]

    @property
    def momentum(self) -> list[keras.Variable]:
        """The slow momentum, in the order of the slow weights, or an empty list."""
        return [momentum for momentum in self.momentum_or_none if momentum is not None]

    def named(self) -> dict[str, keras.Variable]:
        """Return the slow weights and the momentum by the names under which they are saved."""
        slow = {f"slow_{index}": slow for index, slow in enumerate(self.slow)}
        return slow | {f"slow_momentum_{index}": momentum for index, momentum in enumerate(self.momentum)}

    def pairs(self) -> list[Pair]:
        """Return the pair of every weight that has a slow weight."""
        rows = zip(self.slow_or_none, self.fast, self.momentum_or_none)
        return [Pair(slow, fast, momentum) for slow, fast, momentum in rows if slow is not None]

    def _inside(self) -> Iterator["SlowWeights"]:
        """Yield the slow weights of all wrappers inside this wrapper."""
        for optimizer in optimizers_in(self._inner_optimizer):
            found = getattr(optimizer, "_slow_weights", None)
            if isinstance(found, SlowWeights):
                yield found

    def _pairs_inside(self) -> list[Pair]:
        """Return the pairs of all wrappers inside this wrapper, without momentum.

        Their momentum is kept when their slow weights are captured again.
        """
        return [pair._replace(momentum=None) for inside in self._inside() for pair in inside.pairs()]

    def clear_momentum(self) -> None:
        """Set the momentum to 0."""
        for momentum in self.momentum:
            momentum.assign(keras.ops.zeros(momentum.shape, momentum.dtype))

    def is_captured(self) -> bool:
        """Return whether the slow weights were captured. This waits for the device."""
        return self.captured is not None and bool(to_numpy(self.captured))

    def forget(self) -> None:
        """Let the next update capture again."""
        if self.captured is not None:
            self.captured.assign(0)

    def capture_if_due(self, is_due: Callable[[Any], Any]) -> None:
        """In a step and before its update, capture if `is_due(captured)`.

        A capture is due if no update was applied yet, or none since `forget`. Calls that only accumulate gradients also
        capture. The last of these captures counts.
        """
        backend.capture(self.captured, is_due, self.pairs)

    def synchronize_if_due(
        self, counter: Any, is_due: Callable[[Any], Any], step: Callable[[], Any], counts_by_one: bool
    ) -> None:
        """In a step and after its update, make the outer step if `is_due(counter)`.

        A frozen weight is not moved. Its slow weight is captured again from it. Otherwise the slow weight would pull it
        back when it is trained again. The slow weights of wrappers inside this wrapper are captured again for the same
        reason.

        Args:
            counter: The count after the update, a variable, a tensor or a number.
            is_due: Function of the count that returns whether a sync is due.
            step: Function that returns the settings, an `OuterStep` of the backend.
            counts_by_one: Whether an update raises the count by 1. Only PyTorch's backend uses it, to know a count
                without waiting for the device.
        """

        def trained() -> list[Pair]:
            return [pair for pair in self.pairs() if pair.fast.trainable]

        def others() -> list[Pair]:
            return [pair for pair in self.pairs() if not pair.fast.trainable] + self._pairs_inside()

        backend.synchronize(counter, is_due, trained, step, counts_by_one)
        backend.capture(counter, is_due, others, counts_by_one)
        self._mark_synchronized(counter, is_due, counts_by_one)

    def synchronize(self, step: Callable[[], Any]) -> None:
        """Make the outer step now, for frozen weights too. Momentum does not move weights again after a sync."""
        if self._show_fast_unless_captured() and to_numpy(self.captured) != _SYNCHRONIZED:
            backend.synchronize(self.captured, _always, self.pairs, step)
            backend.capture(self.captured, _always, self._pairs_inside)
            self._mark_synchronized(self.captured, _always)

    def reset(self) -> None:
        """Capture again, in wrappers inside too. If nothing was captured yet, the first update will capture."""
        for slow_weights in (self, *self._inside()):
            if slow_weights.is_captured():
                backend.capture(slow_weights.captured, _always, slow_weights.pairs)
        self._mark_synchronized(self.captured, _always)

    def _mark_synchronized(self, counter: Any, is_due: Callable[[Any], Any], counts_by_one: bool = False) -> None:
        """Note a sync for slow weights with momentum, in wrappers inside too."""
        for slow_weights in (self, *self._inside()):
            if slow_weights.momentum:
                backend.mark_synchronized(slow_weights.captured, counter, is_due, counts_by_one)

    def to_swap(self) -> Sequence[tuple[keras.Variable | None, keras.Variable]]:
        """Return pairs for a block to swap: a slow weight, or `None` if it is not captured, and its fast weight."""
        if self._show_fast_unless_captured():
            return list(zip(self.slow_or_none, self.fast))
        return [(None, fast) for fast in self.fast]

    def _show_fast_unless_captured(self) -> bool:
        """Set the slow weights to the fast weights unless they were captured; return whether they were.

        This is for programs that read the slow weights. It is no capture: the next step captures.
        """
        is_captured = self.is_captured()
        if self.slow and not is_captured:
            backend.capture(self.captured, _always, self.pairs)
        return is_captured


def _always(count: Any) -> bool:
    return True
