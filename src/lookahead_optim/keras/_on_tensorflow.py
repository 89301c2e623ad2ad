"""The functions that Keras 3's `Lookahead` needs from its backend, on TensorFlow."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from lookahead_optim import _outer_step_tensorflow
from lookahead_optim._control_flow_tensorflow import is_compiled_by_xla
from lookahead_optim._outer_step_tensorflow import OuterStep, Pair
from lookahead_optim.keras._wrappers import optimizers_in

__all__ = [
    "OuterStep",
    "Tracked",
    "after",
    "beside",
    "capture",
    "check_scope",
    "copy_of",
    "float_of",
    "gradients",
    "mark_captured",
    "mark_synchronized",
    "number_of",
    "read",
    "synchronize",
    "traced",
]

Variable: TypeAlias = keras.Variable | tf.Variable
# The value that decides: a count, or whether the slow weights were captured. A count is no variable if an inner
# optimizer has its own `iterations`.
Scalar: TypeAlias = Variable | tf.Tensor | int
IsDue: TypeAlias = Callable[[tf.Tensor], tf.Tensor | bool]
# A slow weight, its fast weight, and its slow momentum or `None`.
Pairs: TypeAlias = Callable[[], Sequence[tuple[Variable, Variable, Variable | None]]]


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _native_pairs(pairs: Pairs) -> Callable[[], list[Pair]]:
    return lambda: [Pair(_native(slow), _native(fast), fast.constraint, _native(b)) for slow, fast, b in pairs()]


def capture(scalar: Scalar, is_due: IsDue, pairs: Pairs, counts_by_one: bool = False) -> None:
    """If `is_due(scalar)`, set every slow weight of `pairs()` to its fast weight, and its momentum to 0."""
    _outer_step_tensorflow.capture(_native(scalar), is_due, _native_pairs(pairs))


def synchronize(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, step: Callable[[], OuterStep], counts_by_one: bool = False
) -> None:
    """If `is_due(scalar)`, make the outer step of all `pairs()`. In eager execution `step()` is called only then."""
    _outer_step_tensorflow.synchronize(_native(scalar), is_due, _native_pairs(pairs), step)


def mark_captured(captured: Variable, counter: Scalar, is_applied: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to 1 if `is_applied(counter)`."""
    if tf.executing_eagerly():
        if read(captured) != 1 and is_applied(read(counter)):
            captured.assign(1)
    else:
        captured.assign(tf.where(is_applied(read(counter)), tf.ones_like(read(captured)), read(captured)))


def mark_synchronized(captured: Variable, counter: Scalar, is_due: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to 2 if it is not 0 and `is_due(counter)`."""
    if tf.executing_eagerly():
        if is_due(read(counter)) and read(captured):
            captured.assign(2)
    else:
        is_synchronized = is_due(read(counter)) & tf.not_equal(read(captured), 0)
        captured.assign(tf.where(is_synchronized, 2 * tf.ones_like(read(captured)), read(captured)))


def read(scalar: Scalar) -> Any:
    """Return the value of a scalar integer: a variable, a tensor or a number. In eager execution it is an `int`."""
    value = tf.convert_to_tensor(_native(scalar))
    return int(value) if tf.executing_eagerly() else value


def number_of(variable: Variable) -> float | None:
    """Return the value of a scalar variable, or `None` in a graph."""
    return tf.convert_to_tensor(_native(variable)).numpy().item() if tf.executing_eagerly() else None


def traced(variable: Variable) -> tf.Tensor | None:
    """Return the tensor of a scalar variable in a graph, or `None` in eager execution."""
    return None if tf.executing_eagerly() else tf.convert_to_tensor(_native(variable))


def float_of(value: Any) -> Any:
    """Return a scalar as a number, or in a graph as it is."""
    return float(value) if tf.executing_eagerly() or isinstance(value, (int, float)) else tf.convert_to_tensor(value)


def beside(weight: Variable) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which variables are made on the devices of a weight."""
    return tf.distribute.get_strategy().extended.colocate_vars_with(_native(weight))


def after(gradients: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for a step that waits for the gradients.

    In a graph, `fit` asks for a batch and makes a step of it in one function. At the end of a dataset of unknown size
    there is no batch. Operations that do not depend on the batch would still run: the step count, weight decay, a sync.
    Under XLA no wait is needed: a compiled step runs only when it has its batch.
    """
    if tf.executing_eagerly() or is_compiled_by_xla():
        return contextlib.nullcontext()
    with tf.control_dependencies([gradient for gradient in gradients if gradient is not None]):
        ready = tf.no_op()
    return tf.control_dependencies([ready])


def copy_of(variable: Variable) -> tf.Tensor:
    """Return a copy of the variable's value, as a tensor."""
    return tf.identity(_native(variable))


def gradients(loss: Callable[[], Any], variables: Iterable[Variable], grad_loss: Any) -> list[Any]:
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    with tf.GradientTape() as tape:
        value = loss()
    return tape.gradient(value, [_native(variable) for variable in variables], grad_loss)


def _strategy(variable: Variable) -> tf.distribute.Strategy | None:
    # In a strategy of one device, variables are plain variables without this attribute. No public attribute exists.
    return getattr(_native(variable), "_distribute_strategy", None)


def check_scope(optimizers: Iterable[Any], variables: Iterable[Variable]) -> None:
    """Raise `ValueError` if optimizers and their variables belong to different distribution strategies."""
    for variable in variables:
        for optimizer in optimizers:
            # The strategy in whose scope a variable was created, `None` outside of any scope.
            own_variable = getattr(optimizer, "_captured", None)
            theirs = _strategy(variable)
            # With gradient accumulation Keras' public `iterations` is a tensor.
            own = _strategy(optimizer._iterations if own_variable is None else own_variable)
            if theirs is not own:
                places = [f"in the scope of {strategy}" if strategy else "outside of any" for strategy in (theirs, own)]
                raise ValueError(
                    "The model, the inner optimizer and `Lookahead` must be created inside the same "
                    f"`with strategy.scope():` block. Received: the variable {variable.path!r}, created {places[0]}, "
                    f"and the optimizer {optimizer.name!r}, created {places[1]}"
                )


class Tracked:
    """What `tf.train.Checkpoint` sees of a wrapper: its own variables and the inner optimizer.

    Checkpoints match objects by the names of attributes, and match lists by position. Keras tracks a list of all
    variables. In such a list, a bare optimizer's step count and momentum would be restored as slow weights.

    The two methods of TensorFlow's `Trackable` that are used here are private. The public way is assignment to an
    attribute, which Keras uses for itself here. There is no public way to take part in a restoration.
    """

    _captured: Any
    _slow_weights: Any
    _track_trackable: Any

    def _track_own(self, objects: Mapping[str, Any]) -> None:
        for name, tracked in objects.items():
            self._track_trackable(tracked, name)

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        if cached_dependencies:
            # A checkpoint is being restored. It may have no slow weights, and the present slow weights do not belong to
            # its weights.
            for optimizer in optimizers_in(self):
                if isinstance(optimizer, Tracked) and optimizer._captured is not None:
                    optimizer._captured.assign(0)
                    # It may have no slow momentum either.
                    optimizer._slow_weights.clear_momentum()
        return super()._lookup_dependency(name, cached_dependencies)  # type: ignore[misc]
