"""The slow weights' arithmetic on the TensorFlow backend."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from lookahead_optim import _outer_step_tensorflow as _tensorflow
from lookahead_optim.keras._configure import optimizers_in

__all__ = ["Tracked", "after", "capture", "check_scope", "copy_of", "gradients", "mark_captured", "read", "synchronize"]


def _native(variable):
    return variable.value if isinstance(variable, keras.Variable) else variable


def _native_pairs(pairs):
    return lambda: [_tensorflow.Pair(_native(slow), _native(fast), fast.constraint) for slow, fast in pairs()]


def capture(iterations, due, pairs, stepped=False):
    """Set every slow weight of `pairs()` to its fast one if `due(iterations)`."""
    _tensorflow.capture(iterations, due, _native_pairs(pairs))


def synchronize(iterations, due, pairs, slow_step_size, stepped=False):
    """Move the slow weights of `pairs()` towards the fast ones and restart these from there, if `due(iterations)`."""
    _tensorflow.synchronize(iterations, due, _native_pairs(pairs), slow_step_size)


def mark_captured(captured, iterations, steps):
    """Set `captured` to one if an update was applied, which is one of `steps` calls."""
    if steps == 1:
        captured.assign(1)
    else:
        captured.assign(tf.where(read(iterations) % steps == 0, tf.ones_like(read(captured)), read(captured)))


def read(variable):
    """Return the value of a scalar integer."""
    return tf.convert_to_tensor(_native(variable))


def after(gradients):
    """Return a context manager for a step that waits for the gradients.

    In a graph, `fit` asks for a batch and makes a step of it in one function. At the end of a dataset of unknown size
    there is no batch, and what does not depend on it would run all the same: the step count, weight decay, a sync. XLA
    needs no such care: a compiled step runs when it has its batch.
    """
    if tf.executing_eagerly() or tf.__internal__.get_enclosing_xla_context() is not None:
        return contextlib.nullcontext()
    with tf.control_dependencies([one for one in gradients if one is not None]):
        ready = tf.no_op()
    return tf.control_dependencies([ready])


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
            own_variable = getattr(one, "_captured", None)
            theirs = _strategy(variable)
            own = _strategy(one._iterations if own_variable is None else own_variable)
            if theirs is not own:
                places = [f"in the scope of {strategy}" if strategy else "outside of any" for strategy in (theirs, own)]
                raise ValueError(
                    "The model, the inner optimizer and `Lookahead` must be created inside the same "
                    f"`with strategy.scope():` block. Received: the variable {variable.path!r}, created {places[0]}, "
                    f"and the optimizer {one.name!r}, created {places[1]}"
                )


class Tracked:
    """What `tf.train.Checkpoint` sees of a wrapper: its own variables and the inner optimizer.

    Checkpoints match objects by the names of attributes, and lists by position. Keras tracks a list of all variables,
    where a bare optimizer's step count and momentum would be restored as slow weights.
    """

    _captured: Any
    _track_trackable: Any

    def _track_own(self, objects):
        for name, one in objects.items():
            self._track_trackable(one, name)

    def _lookup_dependency(self, name, cached_dependencies=None):
        if cached_dependencies:
            # A checkpoint is being restored. It may be without slow weights, and those here are not of its weights.
            for one in optimizers_in(self):
                if isinstance(one, Tracked) and one._captured is not None:
                    one._captured.assign(0)
        return super()._lookup_dependency(name, cached_dependencies)  # type: ignore[misc]
