"""Optax: designs of capture and restart. Each is the mechanism alone, without checks.

The state of a design is the inner state, the slow parameters, the count, and whether they were captured. All designs
end with the parameters of `apply_gradients`.
"""

import jax
import jax.numpy as jnp
import optax

from on_device.jax_steps import PERIOD, measure
from on_device.shapes import GIB, MIB, transformer
from programs import of_optax

SLOW_STEP_SIZE = 0.5


def cases(device):
    """Return the cases, functions without arguments by name."""
    shapes = transformer(4096, GIB) if device != "cpu" else transformer(16, MIB // 16)
    return {inner: lambda inner=inner: compare(shapes, inner, device) for inner in ("SGD", "Adam")}


def compare(shapes, inner, device):
    """Return times of the designs and of the bare step."""
    make = of_optax.INNER[inner]
    return measure({"bare": of_optax._with_updates(make()), **designs(make)}, shapes, device)


def designs(make):
    """Return (step, function that makes the state, function that makes the parameters), by name of the design."""

    def of(design):
        optimizer = make()

        def init(params):
            return optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0), jnp.int32(0)

        return design(optimizer), init, lambda params: params

    return {name: of(design) for name, design in DESIGNS.items()}


def _outer(slow, fast):
    return slow + SLOW_STEP_SIZE * (fast - slow)


def _design(capture, restart):
    def make(optimizer):
        def step(params, state, grads):
            inner, slow, count, captured = state
            slow, params = capture(captured == 0, slow, params)
            updates, inner = optimizer.update(grads, inner, params)
            fast = optax.apply_updates(params, updates)
            count = count + 1
            is_due = count % PERIOD == 0
            params, slow = restart(is_due, slow, fast)
            return params, (inner, slow, count, jnp.where(is_due, 0, 1))

        return step

    return make


def capture_by_conditional(is_stale, slow, params):
    return jax.lax.cond(is_stale, lambda slow, params: params, lambda slow, params: slow, slow, params), params


def capture_by_conditional_of_all(is_stale, slow, params):
    """Capture in a conditional that also passes the parameters through."""
    barrier = jax.lax.optimization_barrier

    def capture(slow, params):
        slow, params = barrier((slow, params))
        return jax.tree.map(jnp.copy, params), params

    return jax.lax.cond(is_stale, capture, lambda slow, params: barrier((slow, params)), slow, params)


def capture_by_choice(is_stale, slow, params):
    return jax.tree.map(lambda slow, param: jnp.where(is_stale, param, slow), slow, params), params


def no_capture(is_stale, slow, params):
    return slow, params


def restart_by_choice(is_due, slow, fast):
    return jax.tree.map(lambda slow, fast: jnp.where(is_due, _outer(slow, fast), fast), slow, fast), slow


def restart_by_conditional(is_due, slow, fast):
    def outer(slow, fast):
        return jax.tree.map(_outer, slow, fast)

    return jax.lax.cond(is_due, outer, lambda slow, fast: fast, slow, fast), slow


def restart_both_by_choice(is_due, slow, fast):
    params = jax.tree.map(lambda slow, fast: jnp.where(is_due, _outer(slow, fast), fast), slow, fast)
    return params, jax.tree.map(lambda slow, param: jnp.where(is_due, param, slow), slow, params)


def restart_both_by_conditional(is_due, slow, fast):
    def outer(slow, fast):
        new = jax.tree.map(_outer, slow, fast)
        return new, jax.tree.map(jnp.copy, new)

    return jax.lax.cond(is_due, outer, lambda slow, fast: (fast, slow), slow, fast)


def restart_both_by_loop(is_due, slow, fast):
    def outer(carry):
        slow, fast, _ = carry
        new = jax.tree.map(_outer, slow, fast)
        return new, new, False

    slow, fast, _ = jax.lax.while_loop(lambda carry: carry[2], outer, (slow, fast, is_due))
    return fast, slow


DESIGNS = {
    "conditional, choice": _design(capture_by_conditional, restart_by_choice),
    "conditional, conditional": _design(capture_by_conditional, restart_by_conditional),
    "conditional of all, conditional": _design(capture_by_conditional_of_all, restart_by_conditional),
    "choice, choice": _design(capture_by_choice, restart_by_choice),
    "no capture, both by choice": _design(no_capture, restart_both_by_choice),
    "no capture, both by conditional": _design(no_capture, restart_both_by_conditional),
    "no capture, both by loop": _design(no_capture, restart_both_by_loop),
    "no capture, no sync": _design(no_capture, lambda is_due, slow, fast: (fast, slow)),
}
