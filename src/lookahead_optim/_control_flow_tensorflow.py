"""How TensorFlow updates weights only when an update is due: eager, in graphs, under XLA and under `tf.distribute`.

An update is due at one step in `sync_period`. It should cost nothing in all other steps. In a graph the step count is a
tensor, which Python's `if` cannot read. TensorFlow has three kinds of control flow, and each is right in one place:

| weights | how they are updated |
|---|---|
| eager | Python's `if` |
| in a function that XLA does not compile, all on one CPU | the `If` operation |
| in any other graph: XLA, several devices, a strategy, TensorFlow 1 | `tf.while_loop` of zero or one rounds |

*No `tf.cond` in functions.* TensorFlow lowers `tf.cond` to a `Switch` and a `Merge` operation for every variable that
it uses. These run at every step, due or not. TensorFlow lowers `tf.while_loop` in the same way. The `If` operation,
made without the attribute that asks for lowering, reads the predicate and calls one of two functions. Its kernel runs
on one device, so all variables must be there.

*No conditional under XLA.* The branches of XLA's conditional have their own buffers. Every variable is copied on the
way in and on the way out, due or not. The state of a loop, however, is updated in place, and a loop of zero rounds does
nothing. Only a variable that the loop reads and does not write is copied. See `_write_back`.

*`merge_call` first, then the control flow.* A strategy runs a step in one thread per replica, and all threads build one
graph. A weight has a component on every device. All components are updated together, in the cross-replica context of
`merge_call`. Inside a function of its own, such as a branch or a body of a loop, `merge_call` is an error. So it must
be outside.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

__all__ = ["Pair", "after", "is_compiled_by_xla", "operations", "update_if_due"]


class Pair(NamedTuple):
    """A slow weight, its fast weight, the fast weight's constraint or `None`, and the slow momentum or `None`."""

    slow: tf.Variable
    fast: tf.Variable
    constraint: Callable[[tf.Tensor], tf.Tensor] | None
    momentum: tf.Variable | None = None

    def variables(self) -> tuple[tf.Variable, ...]:
        """Return the variables, the slow weight first."""
        return (self.slow, self.fast) if self.momentum is None else (self.slow, self.fast, self.momentum)


Update = Callable[[Pair], list[tf.Operation]]


def update_if_due(
    count: tf.Variable,
    is_due: Callable[[tf.Tensor], tf.Tensor | bool],
    pairs: Callable[[], Sequence[Pair]],
    update: Update,
    writes_fast: bool = True,
) -> tf.Tensor | None:
    """If `is_due(count)`, call `update(pair)` for each of `pairs()`.

    Args:
        count: The count that decides.
        is_due: Function of the count that returns whether the update is due.
        pairs: Function that returns the pairs.
        update: Function that assigns to the slow weight and the slow momentum of a pair, and if `writes_fast` to the
            fast weight. It returns the assignments.
        writes_fast: Boolean, whether `update` assigns to the fast weights. Defaults to `True`.

    Returns:
        In a graph, a tensor to wait for, or `None`.
    """
    is_in_scope = tf.distribute.has_strategy()
    # Check first whether the update is due: listing many weights is slower.
    if tf.executing_eagerly() and not is_in_scope and not is_due(tf.convert_to_tensor(count)):
        return None
    listed = pairs()
    if not listed:
        return None
    # Outside of a scope this is the default strategy, also for variables that have another strategy.
    current = tf.distribute.get_strategy()
    strategies = [getattr(pair.slow, "distribute_strategy", current) for pair in listed]
    if not is_in_scope and all(strategy is current for strategy in strategies):
        if tf.executing_eagerly():
            # This is what the default strategy does, without entering its contexts for each weight.
            for pair in listed:
                update(pair)
            return None
        if tf.inside_function() and not is_compiled_by_xla():
            done = _if_operation(is_due(tf.convert_to_tensor(count)), listed, update)
            if done is not None:
                return done

    def in_cross_replica_context(strategy: tf.distribute.Strategy) -> tf.Tensor | None:
        pending = is_due(tf.convert_to_tensor(count))
        if tf.executing_eagerly() or isinstance(pending, bool):
            if pending:
                _update_all(strategy, listed, update)
            return None
        return _loop(pending, strategy, listed, update, writes_fast)

    if is_in_scope and not tf.distribute.in_cross_replica_context():
        # The public `tf.distribute.ReplicaContext.merge_call` is an error where XLA compiles the step of each GPU by
        # itself. No public function says where this is so. This private function calls its argument directly there.
        return tf.__internal__.distribute.interim.maybe_merge_call(in_cross_replica_context, strategies[0])
    return in_cross_replica_context(strategies[0])


def is_compiled_by_xla() -> bool:
    """Return whether the graph under construction is part of a graph that XLA compiles."""
    # No public function says so.
    return tf.__internal__.get_enclosing_xla_context() is not None


def operations(*done: Any) -> list[tf.Operation]:
    """Return the operations in nested lists, for which a graph must wait. `None` stands for nothing."""
    return [operation for operation in tf.nest.flatten(done) if operation is not None]


def after(*done: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context whose operations wait for the operations in `done`, in a graph of TensorFlow 1 too."""
    return tf.control_dependencies([] if tf.executing_eagerly() else operations(*done))


def _update_all(strategy: tf.distribute.Strategy, pairs: Sequence[Pair], update: Update) -> list[tf.Operation]:
    """Update all pairs, on all devices of the strategy; return the assignments, in a graph."""

    def assignments(
        slow: tf.Variable, fast: tf.Variable, momentum: tf.Variable | None = None, *, pair: Pair
    ) -> list[tf.Operation]:
        done = update(pair._replace(slow=slow, fast=fast, momentum=momentum))
        return [] if tf.executing_eagerly() else done

    # The strategy calls `assignments` once per device, with the device's components in place of its distributed
    # variables.
    return [
        strategy.extended.update(slow, functools.partial(assignments, pair=pair), args=tuple(others), group=False)
        for pair in pairs
        for slow, *others in [pair.variables()]
    ]


def _loop(
    pending: tf.Tensor, strategy: tf.distribute.Strategy, pairs: Sequence[Pair], update: Update, writes_fast: bool
) -> tf.Tensor:
    """Update in a loop of one round if `pending`, and of no round otherwise; return a tensor to wait for."""

    def body(is_running: tf.Tensor) -> tuple[tf.Tensor]:
        def update_and_write_back(pair: Pair) -> list[tf.Operation]:
            done = update(pair)
            return [*done, _write_back(pair.fast, is_running, after=done)]

        done = _update_all(strategy, pairs, update if writes_fast else update_and_write_back)
        # In a graph of TensorFlow 1 nothing else makes the assignments run.
        with tf.control_dependencies(tf.nest.flatten(done)):
            return (tf.constant(False),)

    return tf.while_loop(lambda is_running: is_running, body, (pending,))[0]


def _write_back(fast: tf.Variable, is_running: tf.Tensor, after: list[tf.Operation]) -> tf.Operation:
    """Assign its own value to a variable, so that XLA does not copy the variable for the loop.

    In the body of the loop `is_running` is true. The compiler cannot know this. So it keeps the assignment, which
    changes nothing.
    """
    with tf.control_dependencies(after):
        return fast.assign(tf.where(is_running, fast, tf.zeros_like(fast)), read_value=False)


def _if_operation(pending: tf.Tensor | bool, pairs: Sequence[Pair], update: Update) -> tf.Tensor | None:
    """Update if `pending`, by an `If` operation.

    Returns:
        A tensor to wait for, or `None` if not all variables are on one CPU and the operation cannot be used.
    """
    if not _are_on_one_cpu(variable.device for pair in pairs for variable in pair.variables()):
        return None

    @tf.function(autograph=False)
    def updated() -> tf.Tensor:
        for pair in pairs:
            update(pair)
        return tf.constant(False)

    branch = updated.get_concrete_function()
    inputs = branch.captured_inputs
    # A constraint or a step size may have variables of its own.
    if not _are_on_one_cpu(tensor.device for tensor in inputs if tensor.dtype == tf.resource):
        return None
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    other = tf.function(lambda *inputs: tf.constant(False), signature, autograph=False).get_concrete_function()
    return tf.raw_ops.If(cond=pending, input=inputs, Tout=[tf.bool], then_branch=branch, else_branch=other)[0]


def _are_on_one_cpu(devices: Iterable[str]) -> bool:
    found = set(devices)
    return len(found) == 1 and "CPU" in found.pop()
