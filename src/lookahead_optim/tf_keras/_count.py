"""The step count, which a wrapper shares with its inner optimizer, and beside it the count of applied steps."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from lookahead_optim.tf_keras._keras import keras

__all__ = ["Counting", "has_crossed", "to_int"]


def to_int(value: Any) -> int:
    """Return the value of an integer tensor or variable, eagerly."""
    return int(tf.convert_to_tensor(value))


def has_crossed(before: Any, period: int) -> Callable[[Any], Any]:
    """Return a function of the count: whether a step led from `before` over a multiple of the period.

    A step that the inner optimizer did not count leads over none. One that it counted twice does not leap over a sync.
    """

    def crossed(count: Any) -> Any:
        if tf.executing_eagerly():
            return to_int(count) // period > to_int(before) // period
        return tf.greater(count // period, before // period)

    return crossed


class Counting(keras.optimizers.legacy.Optimizer):
    """An optimizer that counts by the same variable as the one inside it, `_optimizer`.

    As in every optimizer of Keras 2, this variable is made when `iterations` is first read, or by the first step.
    Reading makes no other variable.
    """

    _optimizer: Any
    _iterations: Any = None
    _weights: list[Any]
    # The count that this one has in its `_weights`, or a `Lookahead` around it. None if an averaging wrapper around has
    # put its own in place of `_iterations`.
    _listed_count: Any = None
    # Under a `LossScaleOptimizer`, which adds the steps that it skips to `iterations`.
    _applied_steps: Any = None
    # What `iterations` was when it was made, before any step was skipped; None if it was not made here, or restored.
    _first_count: int | None = None

    @property
    def iterations(self) -> Any:
        """Variable, int64: the number of steps, those that a `LossScaleOptimizer` around skipped included.

        It is the inner optimizer's, too: one that has made steps keeps its count and its schedule.
        """
        if self._iterations is None:
            inner, count = self._optimizer, None
            while count is None and inner is not None:
                count, inner = inner._iterations, getattr(inner, "_optimizer", None)
            if count is None:
                keras.optimizers.legacy.Optimizer.iterations.fget(self)
            else:
                self._iterations = self._track_trackable(count, "iter", overwrite=True)
                self._handle_deferred_dependencies("iter", count)
                self._weights.append(count)
            if tf.executing_eagerly():
                self._first_count = to_int(self._iterations)
            self._listed_count = self._iterations
            self._share_count()
        return self._iterations

    @iterations.setter
    def iterations(self, variable: Any) -> None:
        keras.optimizers.legacy.Optimizer.iterations.fset(self, variable)
        self._listed_count = variable
        self._share_count()

    def _share_count(self) -> None:
        """Give the inner optimizer this one's step count in place of its own."""
        inner, count = self._optimizer, self._iterations
        former, inner._iterations = inner._iterations, count
        if former is not None and former is not count:
            inner._weights = [weight for weight in inner._weights if weight is not former]
            if inner._lookup_dependency("iter") is former:
                inner._track_trackable(count, "iter", overwrite=True)
        if isinstance(inner, Counting):
            inner._listed_count = self._listed_count
            inner._share_count()

    def _take_count_of_wrapper_around(self) -> None:
        """Let the inner optimizer count by the variable that an averaging wrapper around has put here."""
        if self._listed_count is not None and self._listed_count is not self._iterations:
            self._weights = [weight for weight in self._weights if weight is not self._listed_count]
            self._listed_count = None
        if self._iterations is not None:
            self._share_count()

    def _is_in_loss_scaler(self) -> bool:
        # A `LossScaleOptimizer` tells nobody of the steps that it skips, and sets this attribute of what it wraps.
        return getattr(self, "_is_wrapped_by_loss_scale_optimizer", False)

    def _create_applied_steps(self) -> None:
        """Make the count of applied steps if there is to be one, and give it to the wrapper inside."""
        if self._applied_steps is None and self._is_in_loss_scaler():
            iterations = self.iterations

            def initial_value(shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
                count = self._first_count
                if count is None:
                    # A checkpoint without this count has been counted by `iterations`.
                    count = to_int(iterations) if tf.executing_eagerly() else 0
                return tf.constant(count, dtype)

            self._applied_steps = self._scalar("lookahead_step", initial_value)
        if isinstance(self._optimizer, Counting):
            self._optimizer._applied_steps = self._applied_steps

    def _scalar(self, name: str, initializer: Any) -> Any:
        with tf.init_scope(), self._distribution_strategy_scope():
            return self.add_weight(
                name,
                shape=[],
                dtype=tf.int64,
                initializer=initializer,
                trainable=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )

    @property
    def _steps(self) -> Any:
        """The number of steps that were applied, by which the period is counted."""
        return self.iterations if self._applied_steps is None else self._applied_steps
