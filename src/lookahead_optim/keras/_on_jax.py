"""The slow weights' arithmetic on JAX: eager, and stateless under `jax.jit`."""

import contextlib

import jax
import jax.numpy as jnp
import keras

__all__ = ["Tracked", "after", "capture", "check_scope", "copy_of", "gradients", "mark_captured", "read", "synchronize"]


def _when(counter, due, pairs, update):
    """Assign `update(slow, fast, constraint)`, a new `(slow, fast)`, to each of `pairs()` if `due(counter)`.

    The barriers make all weights pass through both branches of the conditional. Without them JAX hands on the ones
    that a branch leaves alone from outside, and XLA then copies these before the inner optimizer updates them.
    """

    def update_all(values):
        return [update(slow, fast, variable.constraint) for (slow, fast), (_, variable) in zip(values, pairs)]

    pending = due(read(counter))
    traced = isinstance(pending, jax.core.Tracer)
    if not (traced or pending):
        return
    pairs = pairs()
    values = [(slow.value, fast.value) for slow, fast in pairs]
    if not values:
        return
    if traced:
        barrier = jax.lax.optimization_barrier
        values = jax.lax.cond(pending, lambda values: update_all(barrier(values)), barrier, values)
    else:
        values = update_all(values)
    for variables, new in zip(pairs, values):
        for variable, value in zip(variables, new):
            variable.assign(value)


def capture(counter, due, pairs, stepped=False):
    """Set every slow weight of `pairs()` to its fast one if `due(counter)`."""
    # Without the copy two variables would share a buffer, which cannot be donated twice.
    _when(counter, due, pairs, lambda slow, fast, constraint: (jnp.copy(fast), fast))


def synchronize(counter, due, pairs, slow_step_size, stepped=False):
    """Move the slow weights of `pairs()` towards the fast ones and restart these from there, if `due(counter)`."""

    def update(slow, fast, constraint):
        if slow_step_size == 1:
            new = fast
        elif slow_step_size == 0:
            new = slow
        else:
            dtype = jnp.promote_types(slow.dtype, jnp.float32)
            start, end = slow.astype(dtype), fast.astype(dtype)
            difference = end - start
            # Not finite for equal infinities, and for large weights of opposite sign.
            otherwise = jnp.where(start == end, start, (1 - slow_step_size) * start + slow_step_size * end)
            moved = jnp.where(jnp.isfinite(difference), start + slow_step_size * difference, otherwise)
            new = moved.astype(slow.dtype)
        if constraint is not None:
            new = jnp.asarray(constraint(new))
        return jnp.copy(new), new

    _when(counter, due, pairs, update)


def mark_captured(captured, counter, is_applied, stepped):
    """Set `captured` to one if `is_applied(counter)`."""
    captured.assign(jnp.where(is_applied(read(counter)), 1, captured.value))


def read(counter):
    """Return the value of a scalar integer: a variable, an array or a number."""
    return jnp.asarray(counter.value if isinstance(counter, keras.Variable) else counter)


def after(gradients):
    """Return a context manager for a step that follows the gradients, as every step does in JAX."""
    return contextlib.nullcontext()


def copy_of(variable):
    """Return the variable's value as an array of its own."""
    return jnp.copy(variable.value)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that knows which variables were assigned to, batch statistics for example."""

    def __init__(self, state_mapping):
        super().__init__(state_mapping)
        self.assigned = {}

    def add_update(self, update):
        variable, _ = update
        self.assigned[id(variable)] = variable
        super().add_update(update)


def gradients(loss, variables, grad_loss):
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    assigned: list[keras.Variable] = []

    def stateless_loss(values):
        with _RecordingScope(list(zip(variables, values))) as scope:
            value = jnp.asarray(loss())
        assigned[:] = scope.assigned.values()
        return value, [scope.get_current_value(variable) for variable in assigned]

    value, pullback, updates = jax.vjp(stateless_loss, [variable.value for variable in variables], has_aux=True)
    (grads,) = pullback(jnp.ones_like(value) if grad_loss is None else jnp.asarray(grad_loss, value.dtype))
    for variable, update in zip(assigned, updates):
        variable.assign(update)
    return grads


def check_scope(optimizers, variables):
    """JAX has no scope to check: a Keras distribution gives its layout to every variable."""


class Tracked:
    """JAX has no checkpoints that match objects by their attributes."""

    def _track_own(self, objects):
        pass
