"""What Keras 3's `Lookahead` needs of its backend, on JAX: eager, and stateless under `jax.jit`."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import keras

from lookahead_optim.keras import _outer_step_jax
from lookahead_optim.keras._outer_step_jax import Values

__all__ = [
    "Tracked",
    "after",
    "capture",
    "check_scope",
    "copy_of",
    "gradients",
    "mark_captured",
    "number_of",
    "read",
    "synchronize",
    "traced",
]

# What decides: a count, or whether the slow weights were captured. A count is no variable where an inner optimizer has
# an `iterations` of its own.
Scalar: TypeAlias = keras.Variable | jax.Array | int
IsDue: TypeAlias = Callable[[jax.Array], jax.Array]
# Pairs of a slow weight and its fast one.
Pairs: TypeAlias = Callable[[], Sequence[tuple[keras.Variable, keras.Variable]]]


def _update_if_due(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, update: Callable[[Values, keras.Variable], Values]
) -> None:
    """Assign `update(values, fast)` to each pair of `pairs()` if `is_due(scalar)`.

    Eagerly this is Python's `if`. In a traced step it is `lax.cond`, which all other steps should not pay for. Two
    barriers see to that. Without them `lax.cond` takes every output that both branches hand on unchanged, such as the
    fast weights of a capture, out of the conditional. Such a weight goes into the conditional and past it to the inner
    optimizer, which updates it: XLA then copies it before, at every step. Behind `optimization_barrier` no output is an
    input, so that all weights pass through both branches, and donated buffers are updated in place.
    """
    pending = is_due(read(scalar))
    is_traced = isinstance(pending, jax.core.Tracer)
    if not (is_traced or pending):
        return
    found = pairs()
    values = [Values(slow.value, fast.value) for slow, fast in found]
    if not values:
        return

    def update_all(values: list[Values]) -> list[Values]:
        return [update(pair_values, fast) for pair_values, (_, fast) in zip(values, found)]

    if is_traced:
        barrier = jax.lax.optimization_barrier
        values = jax.lax.cond(pending, lambda values: update_all(barrier(values)), barrier, values)
    else:
        values = update_all(values)
    for (slow, fast), new in zip(found, values):
        slow.assign(new.slow)
        fast.assign(new.fast)


def capture(scalar: Scalar, is_due: IsDue, pairs: Pairs, counts_by_one: bool = False) -> None:
    """Set every slow weight of `pairs()` to its fast one if `is_due(scalar)`."""
    _update_if_due(scalar, is_due, pairs, lambda values, fast: _outer_step_jax.capture(values))


def synchronize(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, slow_step_size: float | jax.Array, counts_by_one: bool = False
) -> None:
    """Make the outer step of all `pairs()` if `is_due(scalar)`."""

    def update(values: Values, fast: keras.Variable) -> Values:
        return _outer_step_jax.outer_step(values, slow_step_size, fast.constraint)

    _update_if_due(scalar, is_due, pairs, update)


def mark_captured(captured: keras.Variable, counter: Scalar, is_applied: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to one if `is_applied(counter)`."""
    captured.assign(jnp.where(is_applied(read(counter)), 1, captured.value))


def read(scalar: Scalar) -> jax.Array:
    """Return the value of a scalar integer: a variable, an array or a number."""
    return jnp.asarray(scalar.value if isinstance(scalar, keras.Variable) else scalar)


def number_of(variable: keras.Variable) -> float | None:
    """Return the value of a scalar variable, or None if it has none: in a traced step, in `fit`, after a donation."""
    # Private: in `fit` Keras takes the values out of the variables, and no public attribute says so.
    if variable._value is None or traced(variable) is not None or variable.value.is_deleted():
        return None
    return variable.value.item()


def traced(variable: keras.Variable) -> jax.Array | None:
    """Return the array of a scalar variable in a traced step, or None elsewhere."""
    return variable.value if isinstance(variable.value, jax.core.Tracer) else None


def after(gradients: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for a step that follows the gradients, as every step does in JAX."""
    return contextlib.nullcontext()


def copy_of(variable: keras.Variable) -> jax.Array:
    """Return the variable's value as an array of its own."""
    return jnp.copy(variable.value)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that knows which variables were assigned to, batch statistics for example."""

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
    """JAX has no scope to check: a Keras distribution gives its layout to every variable."""


class Tracked:
    """JAX has no checkpoints that match objects by their attributes."""

    def _track_own(self, objects: Mapping[str, Any]) -> None:
        pass
