"""Designs in JAX."""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from programs import of_optax
from programs.of_optax import INNER, step_program, versions

__all__ = ["optimizers", "step_program", "versions"]


def moved(fast, slow):
    return jax.tree.map(lambda one, other: other + 0.5 * (one - other), fast, slow)


def conditional(due, slow, update):
    fast, state = update()

    def sync():
        new = moved(fast, slow)
        return new, new

    return *jax.lax.cond(due, sync, lambda: (fast, slow)), state


def in_one_branch(due, slow, update):
    def update_and_sync():
        fast, state = update()
        new = moved(fast, slow)
        return new, new, state

    def update_alone():
        fast, state = update()
        return fast, slow, state

    return jax.lax.cond(due, update_and_sync, update_alone)


def choice(due, slow, update):
    fast, state = update()
    new = moved(fast, slow)
    chosen = (jax.tree.map(lambda one, other: jnp.where(due, one, other), new, old) for old in (fast, slow))
    return *chosen, state


def loop(due, slow, update):
    fast, state = update()

    def body(carried):
        new = moved(*carried[1:])
        return jnp.zeros_like(due), new, new

    _, fast, slow = jax.lax.while_loop(lambda carried: carried[0], body, (due, fast, slow))
    return fast, slow, state


def flat_conditional(due, slow, update):
    fast, state = update()

    def sync():
        flat, unravel = ravel_pytree(fast)
        new = slow + 0.5 * (flat - slow)
        return unravel(new), new

    return *jax.lax.cond(due, sync, lambda: (fast, slow)), state


def flat_choice(due, slow, update):
    fast, state = update()
    flat, unravel = ravel_pytree(fast)
    new = jnp.where(due, slow + 0.5 * (flat - slow), slow)
    return jax.tree.map(lambda one, other: jnp.where(due, one, other), unravel(new), fast), new, state


def copied(params):
    return jax.tree.map(jnp.copy, params)


# Names, designs, and what makes slow weights of parameters.
DESIGNS = {
    "conditional sync after the update": (conditional, copied),
    "update and sync in one branch, update in the other": (in_one_branch, copied),
    "choice between two results": (choice, copied),
    "loop of zero or one rounds": (loop, copied),
    "slow weights in one array, conditional": (flat_conditional, lambda params: ravel_pytree(params)[0]),
    "slow weights in one array, choice": (flat_choice, lambda params: ravel_pytree(params)[0]),
}


def designed(inner, period, design, to_slow):
    """Return a step, a function that makes its state of parameters, and one that makes the parameters."""

    def step(params, state, grads):
        inner_state, count, slow = state

        def update():
            updates, new_state = inner.update(grads, inner_state, params)
            return optax.apply_updates(params, updates), new_state

        count += 1
        params, slow, inner_state = design(count % period == 0, slow, update)
        return params, (inner_state, count, slow)

    return step, lambda params: (inner.init(params), jnp.zeros((), jnp.int32), to_slow(params)), lambda params: params


def optimizers(case):
    """Return functions that make (step, function that makes the state, one that makes the parameters), by name."""
    made = {name: make for name, make in of_optax.optimizers(case).items() if name != "optax"}
    for name, design in DESIGNS.items():
        made[name] = lambda design=design: designed(INNER[case.inner](), case.period, *design)
    return made
