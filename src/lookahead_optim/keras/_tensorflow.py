"""The slow weights' arithmetic on TensorFlow: eager, in graphs, under XLA and under `tf.distribute`."""

import keras
import tensorflow as tf

__all__ = ["capture", "check_scope", "copy_of", "gradients", "increment", "synchronize"]


def _native(variable):
    return variable.value if isinstance(variable, keras.Variable) else variable


def _when(iterations, due, pairs, update):
    """Call `update(slow, fast, constraint, true)` for every pair if `due(iterations)`.

    Inside a graph this is a loop of zero or one rounds: XLA copies every variable around a conditional, but updates
    the state of a loop in place. `true` is always true, which the compiler cannot know.
    """

    def update_all(strategy, true):
        for slow, fast in pairs:
            arguments = (_native(fast), fast.constraint, true)
            strategy.extended.update(_native(slow), update, args=arguments, group=False)

    def in_cross_replica_context(strategy):
        pending = due(tf.convert_to_tensor(iterations))
        if tf.executing_eagerly() or isinstance(pending, bool):
            if pending:
                update_all(strategy, True)
            return

        def body(true):
            update_all(strategy, true)
            return (tf.constant(False),)

        tf.while_loop(lambda pending: pending, body, (pending,))

    if not pairs:
        return
    strategy = getattr(_native(pairs[0][0]), "distribute_strategy", tf.distribute.get_strategy())
    if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
        tf.__internal__.distribute.interim.maybe_merge_call(in_cross_replica_context, strategy)
    else:
        in_cross_replica_context(strategy)


def capture(iterations, due, pairs):
    """Set every slow weight to its fast one if `due(iterations)`."""

    def update(slow, fast, constraint, true):
        old = tf.identity(slow)
        slow.assign(fast)
        if not tf.executing_eagerly():
            # XLA copies a variable that the loop reads but does not write.
            fast.assign(tf.where(true, fast, old))

    _when(iterations, due, pairs, update)


def synchronize(iterations, due, pairs, slow_step_size):
    """Move the slow weights towards the fast ones and restart these from there, if `due(iterations)`."""

    def update(slow, fast, constraint, true):
        if slow_step_size == 1:
            new = tf.identity(fast)
        else:
            dtype = tf.float32 if slow.dtype.size < 4 else slow.dtype
            start = tf.cast(slow, dtype)
            new = tf.cast(start + tf.constant(slow_step_size, dtype) * (tf.cast(fast, dtype) - start), slow.dtype)
        if constraint is not None:
            new = constraint(new)
        slow.assign(new)
        fast.assign(new)

    _when(iterations, due, pairs, update)


def increment(iterations):
    """Add one to the step count."""
    iterations.assign_add(1)


def copy_of(variable):
    """Return the variable's value as a tensor of its own."""
    return tf.identity(_native(variable))


def gradients(loss, variables, grad_loss):
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    with tf.GradientTape() as tape:
        value = loss()
    return tape.gradient(value, [_native(variable) for variable in variables], grad_loss)


def _strategy(variable):
    return getattr(_native(variable), "_distribute_strategy", None)


def check_scope(optimizers, variables):
    """Raise `ValueError` if optimizers and their variables belong to different distribution strategies."""
    for variable in variables:
        for one in optimizers:
            # The strategy in whose scope a variable was created, None outside of any.
            theirs, own = _strategy(variable), _strategy(one._iterations)
            if theirs is not own:
                places = [f"in the scope of {strategy}" if strategy else "outside of any" for strategy in (theirs, own)]
                raise ValueError(
                    "The model, the inner optimizer and `Lookahead` must be created inside the same "
                    f"`with strategy.scope():` block. Received: the variable {variable.path!r}, created {places[0]}, "
                    f"and the optimizer {one.name!r}, created {places[1]}"
                )
