"""The slow weights' arithmetic on the TensorFlow backend."""

import keras
import tensorflow as tf

from lookahead_optim import _tensorflow

__all__ = ["capture", "check_scope", "copy_of", "gradients", "increment", "synchronize"]


def _native(variable):
    return variable.value if isinstance(variable, keras.Variable) else variable


def _native_pairs(pairs):
    return lambda: [_tensorflow.Pair(_native(slow), _native(fast), fast.constraint) for slow, fast in pairs()]


def capture(iterations, due, pairs):
    """Set every slow weight of `pairs()` to its fast one if `due(iterations)`."""
    _tensorflow.capture(iterations, due, _native_pairs(pairs))


def synchronize(iterations, due, pairs, slow_step_size):
    """Move the slow weights of `pairs()` towards the fast ones and restart these from there, if `due(iterations)`."""
    _tensorflow.synchronize(iterations, due, _native_pairs(pairs), slow_step_size)


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
