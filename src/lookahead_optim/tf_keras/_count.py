"""The step count that a wrapper shares with its inner optimizer, and the count of applied steps."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from lookahead_optim.tf_keras._keras import keras

__all__ = ["Counting", "has_crossed", "to_int"]


def to_int(value: Any) -> int:
    """Return the value of an integer tensor or variable, in eager execution."""
    return int(tf.convert_to_tensor(value))


def has_crossed(before: Any, period: int) -> Callable[[Any], Any]:
    """Return a function of the count: whether a step from the count `before` has crossed a multiple of the period.

    A step that the inner optimizer did not count crosses none. A step that it counted twice still finds its sync.
    """

    def crossed(count: Any) -> Any:
        if tf.executing_eagerly():
            return to_int(count) // period > to_int(before) // period
        return tf.greater(count // period, before // period)

    return crossed


class Counting(keras.optimizers.legacy.Optimizer):
    """An optimizer that counts with the same variable as the optimizer inside it, `_optimizer`.

    As in every optimizer of Keras 2, this variable is made when `iterations` is first read, or by the first step.
    Reading makes no other variable.
    """

    _optimizer: Any
    _iterations: Any = None
    _weights: list[Any]
    # The count in this optimizer's `_weights`, or in the `_weights` of a `Lookahead` around it. It is `None` if an
    # averaging wrapper around has put its own count in place of `_iterations`.
    _listed_count: Any = None
    # The count of applied steps, under a `LossScaleOptimizer`. The scaler adds the steps that it skips to `iterations`.
    _applied_steps: Any = None
    # The value of `iterations` when it was made, before any step was skipped. `None` if it was not made here or was
    # restored.
    _first_count: int | None = None

    @property
    def iterations(self) -> Any:
        """int64 variable, the number of steps, including the steps that a `LossScaleOptimizer` around has skipped.

        The inner optimizer shares this variable. If it has made steps already, it keeps its count and its schedule.
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
        """Give this optimizer's step count to the inner optimizer, in place of the inner optimizer's own."""
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
        """Let the inner optimizer count with the variable that an averaging wrapper around has put here."""
        if self._listed_count is not None and self._listed_count is not self._iterations:
            self._weights = [weight for weight in self._weights if weight is not self._listed_count]
            self._listed_count = None
        if self._iterations is not None:
            self._share_count()

    def _is_in_loss_scaler(self) -> bool:
        # A `LossScaleOptimizer` does not report the steps that it skips. It sets this attribute of the optimizer inside
        # it.
        return getattr(self, "_is_wrapped_by_loss_scale_optimizer", False)

    def _create_applied_steps(self) -> None:
        """Make the count of applied steps if it is needed, and give it to the wrapper inside."""
        if self._applied_steps is None and self._is_in_loss_scaler():
            iterations = self.iterations

            def initial_value(shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
                count = self._first_count
                if count is None:
                    # In a checkpoint without this count, `iterations` was the count.
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
        """The number of applied steps, which the period counts."""
        return self.iterations if self._applied_steps is None else self._applied_steps
