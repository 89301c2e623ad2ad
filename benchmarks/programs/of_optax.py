"""Programs of Optax: both forms of this library, and `optax.lookahead`."""

import jax
import jax.numpy as jnp
import keras
import optax

import models
from lookahead_optim.optax import lookahead
from programs.of_keras import jax_program
from timing import Program

INNER = {
    "SGD": lambda: optax.sgd(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "Adam": lambda: optax.adam(1e-3),
}


def versions():
    """Return the packages whose versions matter."""
    return ["optax", "jax"]


def _with_updates(optimizer):
    """Return a step that adds updates to parameters, as nearly all programs do."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, optimizer.init, lambda params: params


def _with_apply_gradients(optimizer):
    return lambda params, state, grads: optimizer.apply_gradients(grads, state, params), optimizer.init, lambda one: one


def _carrying(optimizer):
    """Return a step that takes and returns one more array for each parameter, and leaves it as it is."""
    step, init, to_params = _with_updates(optimizer)

    def carrying(params, state, grads):
        inner_state, carried = state
        params, inner_state = step(params, inner_state, grads)
        # JAX would hand on what it knows to be unchanged.
        return params, (inner_state, jax.lax.optimization_barrier(carried))

    return carrying, lambda params: (init(params), jax.tree.map(jnp.copy, params)), to_params


def _with_pairs(optimizer):
    def pair(params):
        return optax.LookaheadParams(fast=params, slow=jax.tree.map(jnp.copy, params))

    step, init, _ = _with_updates(optimizer)
    return step, init, pair


def optimizers(case):
    """Return functions that make (step, function that makes the state, one that makes the parameters), by name."""
    inner = INNER[case.inner]
    return {
        "bare": lambda: _with_updates(inner()),
        "lookahead-optim": lambda: _with_updates(lookahead(inner(), case.period)),
        "lookahead-optim, apply_gradients": lambda: _with_apply_gradients(lookahead(inner(), case.period)),
        "bare, one more copy carried": lambda: _carrying(inner()),
        "optax": lambda: _with_pairs(optax.lookahead(inner(), case.period, 0.5)),
    }


def step_program(case, make):
    """Return the program of the optimizer's step alone."""
    step, init, to_params = make()
    shape = (case.side, case.side)
    grads = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), case.weights)]
    params = to_params([one + 1 for one in grads])
    jitted = jax.jit(lambda state, grads: step(*state, grads), donate_argnums=0)
    return jax_program(jitted, (params, init(params)), grads)


def training_program(case, make):
    """Return the program of a training loop."""
    step, init, to_params = make()
    model, x, y = models.of_keras(keras, case.model)
    x, y = jnp.asarray(x), jnp.asarray(y)
    params = to_params([variable.value for variable in model.trainable_variables])
    state = params, init(params), [variable.value for variable in model.non_trainable_variables]

    def loss(params, others):
        logits, others = model.stateless_call(getattr(params, "fast", params), others, x, training=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean(), others

    def train(state):
        params, optimizer_state, others = state
        grads, others = jax.grad(loss, has_aux=True)(params, others)
        grads = getattr(grads, "fast", grads)
        return *step(params, optimizer_state, grads), others

    compiled = jax.jit(train, donate_argnums=0).lower(state).compile()

    def run():
        nonlocal state
        state = compiled(state)

    return Program(run, lambda: jax.block_until_ready(state))
