"""The slow weights' arithmetic on TensorFlow variables: eager, in graphs, under XLA and under `tf.distribute`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

__all__ = ["Pair", "capture", "slow_step", "synchronize"]


class Pair(NamedTuple):
    """A slow weight, its fast one, and the latter's constraint if it has one."""

    slow: Any
    fast: Any
    constraint: Callable[[Any], Any] | None


@tf.autograph.experimental.do_not_convert
def _when(
    steps: Any, due: Callable[[Any], Any], pairs: Callable[[], Sequence[Pair]], update: Callable[..., list[Any]]
) -> Any:
    """Call `update(slow, fast, constraint, true)` for each of `pairs()` if `due(steps)`; return a tensor to wait for.

    Inside a function that XLA does not compile this is a conditional if one CPU has all weights, and in every other
    graph a loop of zero or one rounds: XLA copies every variable around a conditional, but updates the state of a loop
    in place. `true` is always true, which the compiler of a loop cannot know.
    """

    def update_all(strategy: Any, true: Any) -> list[Any]:
        return [
            strategy.extended.update(slow, update, args=(fast, constraint, true), group=False)
            for slow, fast, constraint in found
        ]

    def in_cross_replica_context(strategy: Any) -> Any:
        pending = due(tf.convert_to_tensor(steps))
        if tf.executing_eagerly() or isinstance(pending, bool):
            if pending:
                update_all(strategy, True)
            return None

        def body(true: Any) -> Any:
            # In a graph of TensorFlow 1 nothing else makes the assignments run.
            with tf.control_dependencies(tf.nest.flatten(update_all(strategy, true))):
                return (tf.constant(False),)

        return tf.while_loop(lambda pending: pending, body, (pending,))[0]

    in_scope = tf.distribute.has_strategy()
    # To list many weights takes longer than to see that nothing is due.
    if tf.executing_eagerly() and not in_scope and not due(tf.convert_to_tensor(steps)):
        return None
    found = pairs()
    if not found:
        return None
    default = tf.distribute.get_strategy()
    strategies = [getattr(slow, "distribute_strategy", default) for slow, _, _ in found]
    if in_scope and not tf.distribute.in_cross_replica_context():
        return tf.__internal__.distribute.interim.maybe_merge_call(in_cross_replica_context, strategies[0])
    if not in_scope and all(one is default for one in strategies):
        # What the default strategy would do, without its contexts for each weight.
        def update_each() -> None:
            for slow, fast, constraint in found:
                update(slow, fast, constraint, True)

        if tf.executing_eagerly():
            return update_each()
        if tf.inside_function() and tf.__internal__.get_enclosing_xla_context() is None:
            done = _conditional(due(tf.convert_to_tensor(steps)), found, update_each)
            if done is not None:
                return done
    return in_cross_replica_context(strategies[0])


def _conditional(pending: Any, pairs: Sequence[Pair], update: Callable[[], None]) -> Any:
    """Call `update` if `pending`; return a tensor to wait for, or None if not all variables are on one CPU.

    `tf.cond` and `tf.while_loop` pass every weight through operations of its own at each step, pending or not. This
    does not, but runs on one device.
    """
    if not _on_one_cpu(one.device for slow, fast, _ in pairs for one in (slow, fast)):
        return None

    @tf.function(autograph=False)
    def updated() -> Any:
        update()
        return tf.constant(False)

    branch = updated.get_concrete_function()
    inputs = branch.captured_inputs
    # A constraint or a step size may have variables of its own.
    if not _on_one_cpu(one.device for one in inputs if one.dtype == tf.resource):
        return None
    signature = [tf.TensorSpec(one.shape, one.dtype) for one in inputs]
    other = tf.function(lambda *inputs: tf.constant(False), signature, autograph=False).get_concrete_function()
    return tf.raw_ops.If(cond=pending, input=inputs, Tout=[tf.bool], then_branch=branch, else_branch=other)[0]


def _on_one_cpu(devices: Iterable[str]) -> bool:
    found = set(devices)
    return len(found) == 1 and "CPU" in found.pop()


@tf.autograph.experimental.do_not_convert
def capture(steps: Any, due: Callable[[Any], Any], pairs: Callable[[], Sequence[Pair]]) -> Any:
    """Set every slow weight of `pairs()` to its fast one if `due(steps)`."""

    def update(slow: Any, fast: Any, constraint: Any, true: Any) -> list[Any]:
        if true is True:
            slow.assign(fast, read_value=False)
            return []
        old = tf.identity(slow)
        captured = slow.assign(fast, read_value=False)
        # XLA copies a variable that the loop reads but does not write.
        return [captured, fast.assign(tf.where(true, fast, old), read_value=False)]

    return _when(steps, due, pairs, update)


def slow_step(slow: Any, fast: Any, slow_step_size: Any) -> Any:
    """Return `slow + slow_step_size * (fast - slow)`, rounded once to the dtype of `slow`.

    Where the difference is infinite, this is NaN for equal infinities and infinite for large finite weights. There the
    step is a weighted mean. A step size of 0 gives `slow` and one of 1 gives `fast`, also if the other one is NaN.
    """
    dtype = tf.float32 if slow.dtype.size < 4 else slow.dtype
    start, end, step_size = tf.cast(slow, dtype), tf.cast(fast, dtype), _as_dtype(slow_step_size, dtype)
    difference = end - start
    mean = tf.where(tf.equal(start, end), start, (1 - step_size) * start + step_size * end)
    moved = tf.where(tf.math.is_finite(difference), start + step_size * difference, mean)
    moved = tf.where(tf.equal(step_size, 0), start, tf.where(tf.equal(step_size, 1), end, moved))
    return tf.cast(moved, slow.dtype)


def _as_dtype(slow_step_size: Any, dtype: Any) -> Any:
    # `tf.cast` would take a Python number through float32.
    return (tf.constant if isinstance(slow_step_size, float) else tf.cast)(slow_step_size, dtype)


def _slow_step_in_place(slow: Any, fast: Any, slow_step_size: Any) -> list[Any]:
    """Do `slow.assign(slow_step(slow, fast, ...))` with an array less, and the same bits, zeros' signs included.

    On other devices than CPUs this kernel may multiply and add at once, which rounds otherwise.
    """
    step_size = _as_dtype(slow_step_size, slow.dtype)
    difference = tf.subtract(fast, slow)
    # One pass finds what is not finite. Squares that overflow are a false alarm, and `slow_step` gives the same bits.
    size = tf.nn.l2_loss(difference)

    def usual() -> Any:
        return tf.raw_ops.ResourceApplyGradientDescent(var=slow.handle, alpha=-step_size, delta=difference)

    def at_the_ends() -> Any:
        return slow.assign(slow_step(slow, fast, slow_step_size), read_value=False)

    is_number = isinstance(slow_step_size, float)
    if tf.executing_eagerly():
        is_usual = math.isfinite(size) and (is_number or float(step_size) != 1)
        (usual if is_usual else at_the_ends)()
        return []
    is_usual = tf.math.is_finite(size)
    if not is_number:
        is_usual = is_usual & tf.not_equal(step_size, 1)
    return [tf.cond(is_usual, lambda: _done(usual()), lambda: _done(at_the_ends()))]


def _done(operation: Any) -> Any:
    with tf.control_dependencies([operation]):
        return tf.constant(True)


@tf.autograph.experimental.do_not_convert
def synchronize(
    steps: Any,
    due: Callable[[Any], Any],
    pairs: Callable[[], Sequence[Pair]],
    slow_step_size: Any,
    constrain_slow: bool = True,
) -> Any:
    """Move the slow weights of `pairs()` towards the fast ones and restart these from there, if `due(steps)`."""

    def update(slow: Any, fast: Any, constraint: Any, true: Any) -> list[Any]:
        if isinstance(slow_step_size, float) and slow_step_size in (0, 1):
            new = tf.identity(fast if slow_step_size else slow)
        elif (
            constraint is None
            and slow.dtype in (tf.float32, tf.float64)
            and "CPU" in slow.device
            and tf.__internal__.get_enclosing_xla_context() is None
        ):
            moved = _slow_step_in_place(slow, fast, slow_step_size)
            with tf.control_dependencies(moved):
                restarted = fast.assign(slow, read_value=False)
            return [] if tf.executing_eagerly() else [*moved, restarted]
        else:
            new = slow_step(slow, fast, slow_step_size)
        constrained = new if constraint is None else constraint(new)
        values = (constrained if constrain_slow else new), constrained
        done = [one.assign(value, read_value=False) for one, value in zip((slow, fast), values)]
        return [] if tf.executing_eagerly() else done

    return _when(steps, due, pairs, update)
