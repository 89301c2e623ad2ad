"""The outer step on TensorFlow variables: pseudo-gradient, slow step, restart; and the capture of slow weights.

`_outer_step` and `_capture_one` say what is done to one pair. `update_if_due` does it to all pairs, if it is due, by
the control flow that the place asks for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import tensorflow as tf

from lookahead_optim._control_flow_tensorflow import Pair, is_compiled_by_xla, update_if_due

__all__ = ["Pair", "capture", "slow_step", "synchronize"]

# A Python number, or a tensor or variable that a graph reads when it runs.
StepSize: TypeAlias = float | tf.Tensor | tf.Variable


@tf.autograph.experimental.do_not_convert
def capture(
    count: tf.Variable, is_due: Callable[[tf.Tensor], tf.Tensor | bool], pairs: Callable[[], Sequence[Pair]]
) -> tf.Tensor | None:
    """Set every slow weight of `pairs()` to its fast one if `is_due(count)`; return a tensor to wait for."""
    return update_if_due(count, is_due, pairs, _capture_one, writes_fast=False)


@tf.autograph.experimental.do_not_convert
def synchronize(
    count: tf.Variable,
    is_due: Callable[[tf.Tensor], tf.Tensor | bool],
    pairs: Callable[[], Sequence[Pair]],
    slow_step_size: StepSize,
    constrain_slow: bool = True,
) -> tf.Tensor | None:
    """Make the outer step of every pair of `pairs()` if `is_due(count)`; return a tensor to wait for.

    A constraint is applied to the fast weight, and if `constrain_slow` to the slow one.
    """
    update = functools.partial(_outer_step, slow_step_size=slow_step_size, constrain_slow=constrain_slow)
    return update_if_due(count, is_due, pairs, update)


def _capture_one(pair: Pair) -> list[tf.Operation]:
    return [pair.slow.assign(pair.fast, read_value=False)]


def _outer_step(pair: Pair, slow_step_size: StepSize, constrain_slow: bool) -> list[tf.Operation]:
    """Make the slow step of one pair and restart its fast weight from there; return the assignments."""
    slow, fast, constraint = pair
    if constraint is None and _has_kernel_in_place(slow, slow_step_size):
        moved = _slow_step_in_place(slow, fast, slow_step_size)
        with tf.control_dependencies(moved):
            restarted = fast.assign(slow, read_value=False)
        return [*moved, restarted]
    new = slow_step(slow, fast, slow_step_size)
    restart = new if constraint is None else constraint(new)
    moved = slow.assign(restart if constrain_slow else new, read_value=False)
    return [moved, fast.assign(restart, read_value=False)]


def slow_step(slow: tf.Tensor, fast: tf.Tensor, slow_step_size: StepSize) -> tf.Tensor:
    """Return `slow - slow_step_size * (slow - fast)`, rounded once to the dtype of `slow`.

    The pseudo-gradient is taken with its sign turned, as `fast - slow`. That is TensorFlow Addons' formula to the last
    bit: only at -0 the two differ, where a weight that stays becomes 0.

    Where the pseudo-gradient is infinite or NaN, the formula is NaN for equal infinities and infinite for large finite
    weights. There the slow step is a weighted mean. A step size of 0 gives `slow` and one of 1 gives `fast`, also if
    the other one is NaN.
    """
    is_number = isinstance(slow_step_size, float)
    if is_number and slow_step_size in (0, 1):
        return tf.identity(fast if slow_step_size else slow)
    dtype = tf.float32 if slow.dtype.size < 4 else slow.dtype
    start, end, step_size = tf.cast(slow, dtype), tf.cast(fast, dtype), _as_dtype(slow_step_size, dtype)
    negative_pseudo_gradient = end - start
    mean = tf.where(tf.equal(start, end), start, (1 - step_size) * start + step_size * end)
    is_usual = tf.math.is_finite(negative_pseudo_gradient)
    moved = tf.where(is_usual, start + step_size * negative_pseudo_gradient, mean)
    if not is_number:
        moved = tf.where(tf.equal(step_size, 0), start, tf.where(tf.equal(step_size, 1), end, moved))
    return tf.cast(moved, slow.dtype)


def _as_dtype(slow_step_size: StepSize, dtype: tf.DType) -> tf.Tensor:
    # `tf.cast` would take a Python number through float32.
    return (tf.constant if isinstance(slow_step_size, float) else tf.cast)(slow_step_size, dtype)


def _has_kernel_in_place(slow: tf.Variable, slow_step_size: StepSize) -> bool:
    """Return whether `_slow_step_in_place` gives the bits of `slow_step`.

    Its kernel rounds to the variable's dtype, which for narrow floats is too early. On other devices than CPUs it may
    multiply and add at once, which rounds otherwise. XLA makes a program of its own, in which it saves nothing.
    """
    copies = isinstance(slow_step_size, float) and slow_step_size in (0, 1)
    is_wide = slow.dtype in (tf.float32, tf.float64)
    return not copies and is_wide and "CPU" in slow.device and not is_compiled_by_xla()


def _slow_step_in_place(slow: tf.Variable, fast: tf.Variable, slow_step_size: StepSize) -> list[tf.Operation]:
    """Do `slow.assign(slow_step(slow, fast, slow_step_size))` with an array less, and the same bits."""
    step_size = _as_dtype(slow_step_size, slow.dtype)
    negative_pseudo_gradient = tf.subtract(fast, slow)
    # One pass finds what is not finite. Squares that overflow are a false alarm, and `slow_step` gives the same bits.
    size = tf.nn.l2_loss(negative_pseudo_gradient)

    def usual() -> tf.Operation:
        return tf.raw_ops.ResourceApplyGradientDescent(
            var=slow.handle, alpha=-step_size, delta=negative_pseudo_gradient
        )

    def at_the_ends() -> tf.Operation:
        return slow.assign(slow_step(slow, fast, slow_step_size), read_value=False)

    is_number = isinstance(slow_step_size, float)
    if tf.executing_eagerly():
        is_usual = math.isfinite(size) and (is_number or float(step_size) not in (0, 1))
        (usual if is_usual else at_the_ends)()
        return []
    is_usual = tf.math.is_finite(size)
    if not is_number:
        # Adding 0 times something would make 0 of -0.
        is_usual = is_usual & tf.not_equal(step_size, 0) & tf.not_equal(step_size, 1)
    return [tf.cond(is_usual, lambda: _done(usual()), lambda: _done(at_the_ends()))]


def _done(operation: tf.Operation) -> tf.Tensor:
    with tf.control_dependencies([operation]):
        return tf.constant(True)
