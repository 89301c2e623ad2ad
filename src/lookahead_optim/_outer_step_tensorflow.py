"""The outer step on TensorFlow variables (pseudo-gradient, slow momentum, slow step, restart), and the capture.

`_outer_step` and `_capture_one` handle one pair. `update_if_due` applies them to all pairs if that is due, with the
control flow that the place needs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import ml_dtypes
import tensorflow as tf

from lookahead_optim._control_flow_tensorflow import Pair, is_compiled_by_xla, update_if_due

__all__ = ["OuterStep", "Pair", "capture", "slow_step", "synchronize"]

# A Python number, or a tensor or variable that a graph reads when it runs.
StepSize: TypeAlias = float | tf.Tensor | tf.Variable


class OuterStep(NamedTuple):
    """The settings of an outer step."""

    slow_step_size: StepSize
    slow_momentum: float = 0.0
    slow_nesterov: bool = True


@tf.autograph.experimental.do_not_convert
def capture(
    count: tf.Variable, is_due: Callable[[tf.Tensor], tf.Tensor | bool], pairs: Callable[[], Sequence[Pair]]
) -> tf.Tensor | None:
    """If `is_due(count)`, set every slow weight of `pairs()` to its fast weight, and its momentum to 0.

    Returns:
        In a graph, a tensor to wait for, or `None`.
    """
    return update_if_due(count, is_due, pairs, _capture_one, writes_fast=False)


@tf.autograph.experimental.do_not_convert
def synchronize(
    count: tf.Variable,
    is_due: Callable[[tf.Tensor], tf.Tensor | bool],
    pairs: Callable[[], Sequence[Pair]],
    step: Callable[[], OuterStep],
    constrain_slow: bool = True,
) -> tf.Tensor | None:
    """If `is_due(count)`, make the outer step of every pair of `pairs()`.

    A constraint is applied to the fast weight, and if `constrain_slow` also to the slow weight. `step()` is called
    once: in eager execution when the outer step is due, and in a graph before.

    Returns:
        In a graph, a tensor to wait for, or `None`.
    """
    step = functools.cache(step)
    if not tf.executing_eagerly():
        step()

    def update(pair: Pair) -> list[tf.Operation]:
        return _outer_step(pair, step(), constrain_slow)

    return update_if_due(count, is_due, pairs, update)


def _capture_one(pair: Pair) -> list[tf.Operation]:
    captured = pair.slow.assign(tf.cast(pair.fast, pair.slow.dtype), read_value=False)
    if pair.momentum is None:
        return [captured]
    return [captured, pair.momentum.assign(tf.zeros_like(pair.momentum), read_value=False)]


def _outer_step(pair: Pair, step: OuterStep, constrain_slow: bool) -> list[tf.Operation]:
    """Make the outer step of one pair; return the assignments.

    With slow momentum b, its factor mu and the slow step size eta, the step is

        s = slow - fast
        b = mu * b + s
        d = s + mu * b with Nesterov's momentum, else b
        slow = slow - eta * d
        fast = slow
    """
    slow, fast, constraint, momentum = pair
    is_plain = momentum is None and slow.dtype == fast.dtype
    if constraint is None and _has_kernel_in_place(pair, step):
        in_place = _interpolate_in_place if is_plain else _descend_in_place
        moved = in_place(pair, step)
        with tf.control_dependencies(moved):
            restarted = fast.assign(slow, read_value=False)
        return [*moved, restarted]
    if is_plain:
        new, moved = slow_step(slow, fast, step.slow_step_size), []
    else:
        new, moved = _descend(pair, step)
    restart = new if constraint is None else constraint(new)
    moved.append(slow.assign(restart if constrain_slow else new, read_value=False))
    return [*moved, fast.assign(tf.cast(restart, fast.dtype), read_value=False)]


def _descend(pair: Pair, step: OuterStep) -> tuple[tf.Tensor, list[tf.Operation]]:
    """Return the new slow weight, and the assignments of the new slow momentum. Both are rounded once to their dtypes.

    The fast weight started from the slow weight rounded to its dtype, so the pseudo-gradient is measured from there.
    Then a slow weight of a wider dtype does not change by a bit if its fast weight did not move.
    """
    slow, fast, _, momentum = pair
    dtype = tf.float32 if slow.dtype.size < 4 else slow.dtype
    start, end, step_size = tf.cast(slow, dtype), tf.cast(fast, dtype), _as_dtype(step.slow_step_size, dtype)
    restart_point = _rounded(start, fast.dtype)
    # Between equal infinities, such as in a mask, the pseudo-gradient is 0.
    pseudo_gradient = tf.where(tf.equal(restart_point, end), tf.zeros_like(end), restart_point - end)
    if momentum is None:
        moved = tf.where(tf.equal(step_size, 1), end, start - step_size * pseudo_gradient)
        return tf.cast(moved, slow.dtype), []
    new_momentum = step.slow_momentum * tf.cast(momentum, dtype) + pseudo_gradient
    direction = pseudo_gradient + step.slow_momentum * new_momentum if step.slow_nesterov else new_momentum
    new = tf.cast(start - step_size * direction, slow.dtype)
    # The momentum is read before it is written.
    with tf.control_dependencies([new]):
        assigned = momentum.assign(tf.cast(new_momentum, momentum.dtype), read_value=False)
    return new, [assigned]


def _descend_in_place(pair: Pair, step: OuterStep) -> list[tf.Operation]:
    """Do the same as `_descend` with one kernel, which moves the slow weight and its momentum."""
    slow, fast, _, momentum = pair
    pseudo_gradient = tf.subtract(slow, fast)
    # One pass finds values that are not finite. Squares that overflow are a false alarm, which is harmless.
    size = tf.nn.l2_loss(pseudo_gradient)

    def usual() -> tf.Operation:
        return tf.raw_ops.ResourceApplyMomentum(
            var=slow.handle,
            accum=momentum.handle,  # type: ignore[union-attr]
            lr=_as_dtype(step.slow_step_size, slow.dtype),
            grad=pseudo_gradient,
            momentum=tf.constant(step.slow_momentum, slow.dtype),
            use_nesterov=step.slow_nesterov,
        )

    def at_the_ends() -> tf.Operation:
        new, assigned = _descend(pair, step)
        return tf.group(*assigned, slow.assign(new, read_value=False))

    if tf.executing_eagerly():
        (usual if math.isfinite(size) else at_the_ends)()
        return []
    return [tf.cond(tf.math.is_finite(size), lambda: _done(usual()), lambda: _done(at_the_ends()))]


def _rounded(value: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Return a value rounded to a narrower dtype, in its own dtype.

    XLA may leave out a conversion to a dtype and back, as XLA may compute more precisely than the program says. XLA
    keeps this operation. But the operation makes numbers 0 that are below the normal numbers of the narrower dtype. In
    float16 such numbers are rounded by hand.
    """
    if dtype == value.dtype:
        return value
    if not is_compiled_by_xla():
        return tf.cast(tf.cast(value, dtype), value.dtype)
    # No public function has the operation.
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    narrow = ml_dtypes.finfo(dtype.as_numpy_dtype)
    rounded = gen_xla_ops.xla_reduce_precision(value, narrow.nexp, narrow.nmant)
    if narrow.nexp == ml_dtypes.finfo(value.dtype.as_numpy_dtype).nexp:
        return rounded
    spacing = float(narrow.smallest_subnormal)
    return tf.where(tf.abs(value) < float(narrow.smallest_normal), tf.round(value / spacing) * spacing, rounded)


def slow_step(slow: tf.Tensor, fast: tf.Tensor, slow_step_size: StepSize) -> tf.Tensor:
    """Return `slow - slow_step_size * (slow - fast)`, rounded once to the dtype of `slow`.

    The formula uses the negative pseudo-gradient, `fast - slow`. So it gives the same bits as TensorFlow Addons'
    formula, except for -0: there a weight that does not move becomes 0.

    The formula is NaN for equal infinities, and infinite for large finite weights of opposite sign. Where the
    pseudo-gradient is infinite or NaN, the slow step is therefore a weighted mean. A step size of 0 gives `slow` and a
    step size of 1 gives `fast`, even if the other weight is NaN.
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
    # `tf.cast` would convert a Python number to float32 first.
    return (tf.constant if isinstance(slow_step_size, float) else tf.cast)(slow_step_size, dtype)


def _has_kernel_in_place(pair: Pair, step: OuterStep) -> bool:
    """Return whether a kernel in place gives the same result as the separate operations.

    The kernel of `_interpolate_in_place` gives the same bits. Kernels round to the variable's dtype, which is too early
    for narrow floats. On other devices than CPUs they may multiply and add at once, which rounds differently. Under XLA
    they save nothing, as XLA makes its own program.
    """
    slow, fast, _, momentum = pair
    copies = momentum is None and isinstance(step.slow_step_size, float) and step.slow_step_size in (0, 1)
    has_kernel = slow.dtype == fast.dtype and slow.dtype in (tf.float32, tf.float64)
    return not copies and has_kernel and "CPU" in slow.device and not is_compiled_by_xla()


def _interpolate_in_place(pair: Pair, step: OuterStep) -> list[tf.Operation]:
    """Do `slow.assign(slow_step(slow, fast, slow_step_size))` with one array less, and the same bits."""
    slow, fast, slow_step_size = pair.slow, pair.fast, step.slow_step_size
    step_size = _as_dtype(slow_step_size, slow.dtype)
    negative_pseudo_gradient = tf.subtract(fast, slow)
    # One pass finds values that are not finite. Squares that overflow are a false alarm: `slow_step` then gives the
    # same bits.
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
        # Adding a product with 0 would make 0 of -0.
        is_usual = is_usual & tf.not_equal(step_size, 0) & tf.not_equal(step_size, 1)
    return [tf.cond(is_usual, lambda: _done(usual()), lambda: _done(at_the_ends()))]


def _done(operation: tf.Operation) -> tf.Tensor:
    with tf.control_dependencies([operation]):
        return tf.constant(True)
