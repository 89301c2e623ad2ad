"""The functions that Keras 3's `Lookahead` needs from its backend, on JAX: eager, and stateless under `jax.jit`."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import keras

from lookahead_optim.keras import _outer_step_jax
from lookahead_optim.keras._outer_step_jax import OuterStep, Values

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

# The value that decides: a count, or whether the slow weights were captured. A count is no variable if an inner
# optimizer has its own `iterations`.
Scalar: TypeAlias = keras.Variable | jax.Array | int
IsDue: TypeAlias = Callable[[jax.Array], jax.Array]
# A slow weight, its fast weight, and its slow momentum or `None`.
Pairs: TypeAlias = Callable[[], Sequence[tuple[keras.Variable, keras.Variable, keras.Variable | None]]]


def _update_if_due(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, update: Callable[[list[tuple[Values, keras.Variable]]], list[Values]]
) -> None:
    """If `is_due(scalar)`, assign the result of `update` to all `pairs()`.

    `update` gets the values of each pair, together with its fast variable.

    In eager execution this is Python's `if`. In a traced step it is `lax.cond`, which should cost nothing in all other
    steps. Two barriers make sure of that. Without the barriers, `lax.cond` takes an output that both branches return
    unchanged, such as the fast weights of a capture, out of the conditional. Such a weight is an input of the
    conditional, and past the conditional it is an input of the inner optimizer, which updates it. XLA then copies the
    weight before the conditional, at every step. Behind `optimization_barrier` no output is an input, so all weights
    pass through both branches, and donated buffers are updated in place.
    """
    pending = is_due(read(scalar))
    is_traced = isinstance(pending, jax.core.Tracer)
    if not (is_traced or pending):
        return
    found = pairs()
    values = [Values(slow.value, fast.value, None if b is None else b.value) for slow, fast, b in found]
    if not values:
        return

    def update_all(values: list[Values]) -> list[Values]:
        return update([(pair_values, fast) for pair_values, (_, fast, _) in zip(values, found)])

    if is_traced:
        barrier = jax.lax.optimization_barrier
        values = jax.lax.cond(pending, lambda values: update_all(barrier(values)), barrier, values)
    else:
        values = update_all(values)
    for (slow, fast, momentum), new in zip(found, values):
        slow.assign(new.slow)
        fast.assign(new.fast)
        if momentum is not None:
            momentum.assign(new.momentum)


def capture(scalar: Scalar, is_due: IsDue, pairs: Pairs, counts_by_one: bool = False) -> None:
    """If `is_due(scalar)`, set every slow weight of `pairs()` to its fast weight, and its momentum to 0."""
    _update_if_due(scalar, is_due, pairs, lambda found: [_outer_step_jax.capture(values) for values, _ in found])


def synchronize(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, step: Callable[[], OuterStep], counts_by_one: bool = False
) -> None:
    """If `is_due(scalar)`, make the outer step of all `pairs()`. `step()` is called only then."""

    def update(found: list[tuple[Values, keras.Variable]]) -> list[Values]:
        settings = step()
        return [_outer_step_jax.outer_step(values, settings, fast.constraint) for values, fast in found]

    _update_if_due(scalar, is_due, pairs, update)


def mark_captured(captured: keras.Variable, counter: Scalar, is_applied: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to 1 if `is_applied(counter)`."""
    captured.assign(jnp.where(is_applied(read(counter)), 1, captured.value))


def mark_synchronized(captured: keras.Variable, counter: Scalar, is_due: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to 2 if it is not 0 and `is_due(counter)`."""
    captured.assign(jnp.where(is_due(read(counter)) & (captured.value != 0), 2, captured.value))


def read(scalar: Scalar) -> jax.Array:
    """Return the value of a scalar integer: a variable, an array or a number."""
    return jnp.asarray(scalar.value if isinstance(scalar, keras.Variable) else scalar)


def number_of(variable: keras.Variable) -> float | None:
    """Return the value of a scalar variable, or `None` if it has none: in a traced step, in `fit`, after a donation."""
    # Private: in `fit` Keras takes the values out of the variables, and no public attribute says so.
    if variable._value is None or traced(variable) is not None or variable.value.is_deleted():
        return None
    return variable.value.item()


def traced(variable: keras.Variable) -> jax.Array | None:
    """Return the array of a scalar variable in a traced step, or `None` elsewhere."""
    return variable.value if isinstance(variable.value, jax.core.Tracer) else None


def float_of(value: Any) -> float | jax.Array:
    """Return a scalar as a number, or in a traced step as it is."""
    return value if isinstance(value, jax.core.Tracer) else float(value)


def beside(weight: keras.Variable) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that does nothing. In JAX the layout of a variable says where it is."""
    return contextlib.nullcontext()


def after(gradients: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that does nothing. In JAX every step follows the gradients."""
    return contextlib.nullcontext()


def copy_of(variable: keras.Variable) -> jax.Array:
    """Return a copy of the variable's value, as an array."""
    return jnp.copy(variable.value)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that records which variables were assigned, for example batch statistics."""

    def __init__(self, state_mapping: Sequence[tuple[keras.Variable, jax.Array]]) -> None:
        super().__init__(state_mapping)
        self.assigned: dict[int, keras.Variable] = {}

    def add_update(self, update: tuple[keras.Variable, jax.Array]) -> None:
        variable, _ = update
        self.assigned[id(variable)] = variable
        super().add_update(update)


def gradients(loss: Callable[[], Any], variables: Sequence[keras.Variable], grad_loss: Any) -> Sequence[jax.Array]:
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    assigned: list[keras.Variable] = []

    def stateless_loss(values: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        with _RecordingScope(list(zip(variables, values))) as scope:
            value = jnp.asarray(loss())
        assigned[:] = scope.assigned.values()
        return value, [scope.get_current_value(variable) for variable in assigned]

    value, pullback, updates = jax.vjp(stateless_loss, [variable.value for variable in variables], has_aux=True)
    (grads,) = pullback(jnp.ones_like(value) if grad_loss is None else jnp.asarray(grad_loss, value.dtype))
    for variable, update in zip(assigned, updates):
        variable.assign(update)
    return grads


def check_scope(optimizers: Iterable[Any], variables: Iterable[Any]) -> None:
    """Do nothing. JAX has no scope to check: a Keras distribution gives its layout to every variable."""


class Tracked:
    """Does nothing. JAX has no checkpoints that match objects by their attributes."""

    def _track_own(self, objects: Mapping[str, Any]) -> None:
        pass
