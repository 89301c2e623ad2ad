"""Programs of Optax: `update` and `apply_gradients` of this library, and `optax.lookahead`."""

import jax
import jax.numpy as jnp
import keras
import optax

import models
from cases import OUTER_STEP
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
    """Return a step that adds updates to parameters, as most programs do."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, optimizer.init, lambda params: params


def _with_apply_gradients(optimizer):
    return lambda params, state, grads: optimizer.apply_gradients(grads, state, params), optimizer.init, lambda one: one


def _carrying(optimizer):
    """Return a step that takes and returns one more array for each parameter, unchanged."""
    step, init, to_params = _with_updates(optimizer)

    def carrying(params, state, grads):
        inner_state, carried = state
        params, inner_state = step(params, inner_state, grads)
        # Without the barrier JAX would see that the arrays are unchanged and not pass them through the step.
        return params, (inner_state, jax.lax.optimization_barrier(carried))

    return carrying, lambda params: (init(params), jax.tree.map(jnp.copy, params)), to_params


def _with_pairs(optimizer):
    def pair(params):
        return optax.LookaheadParams(fast=params, slow=jax.tree.map(jnp.copy, params))

    step, init, _ = _with_updates(optimizer)
    return step, init, pair


def optimizers(case):
    """Return functions by name. Each returns (step, function that makes the state, function that makes parameters)."""
    inner = INNER[case.inner]
    if case.kind == "outer":
        return _outer_optimizers(case)
    return {
        "bare": lambda: _with_updates(inner()),
        "lookahead-optim": lambda: _with_updates(lookahead(inner(), case.period)),
        "lookahead-optim, apply_gradients": lambda: _with_apply_gradients(lookahead(inner(), case.period)),
        "bare, one more copy carried": lambda: _carrying(inner()),
        "optax": lambda: _with_pairs(optax.lookahead(inner(), case.period, 0.5)),
    }


def _outer_optimizers(case):
    """Return the forms of the outer step, with `update` and with `apply_gradients`, and Optax' SGD by hand."""
    inner, wide = INNER[case.inner], {"slow_dtype": "float32"}
    # The cost of a sync for workers, without the communication.
    alone = {**OUTER_STEP, "reduce": lambda pseudo_gradients: pseudo_gradients}
    forms = {"": {}, ", momentum": OUTER_STEP, ", momentum, reduce": alone}
    if case.dtype != "float32":
        forms |= {", float32": wide, ", momentum, float32": {**OUTER_STEP, **wide}}

    def made(form, way):
        return lambda: way(lookahead(inner(), case.period, **form))

    made_optimizers = {"bare": lambda: _with_updates(inner())}
    for ending, way in {"": _with_updates, ", apply_gradients": _with_apply_gradients}.items():
        made_optimizers |= {f"lookahead-optim{name}{ending}": made(form, way) for name, form in forms.items()}
    return {**made_optimizers, "SGD by hand": lambda: _by_hand(inner(), case.period)}


def _by_hand(inner, period):
    """Return a step with Optax' SGD on the pseudo-gradients, written as in training scripts."""
    step, init, to_params = _with_updates(inner)
    rate, momentum = OUTER_STEP.values()
    outer = optax.sgd(rate, momentum, nesterov=True)

    def synchronized(params, slow, outer_state):
        pseudo_gradients = jax.tree.map(jnp.subtract, slow, params)
        updates, outer_state = outer.update(pseudo_gradients, outer_state, slow)
        slow = optax.apply_updates(slow, updates)
        return jax.tree.map(jnp.copy, slow), slow, outer_state

    def by_hand(params, state, grads):
        inner_state, slow, outer_state, count = state
        params, inner_state = step(params, inner_state, grads)
        count += 1
        params, slow, outer_state = jax.lax.cond(
            count % period == 0, synchronized, lambda *state: state, params, slow, outer_state
        )
        return params, (inner_state, slow, outer_state, count)

    def init_all(params):
        slow = jax.tree.map(jnp.copy, params)
        return init(params), slow, outer.init(params), jnp.zeros((), jnp.int32)

    return by_hand, init_all, to_params


def step_program(case, make):
    """Return the program of the optimizer's step alone."""
    step, init, to_params = make()
    shape = (case.side, case.side)
    keys = jax.random.split(jax.random.key(0), case.weights)
    grads = [jax.random.normal(key, shape).astype(case.dtype) for key in keys]
    params = to_params([one + 1 for one in grads])
    jitted = jax.jit(lambda state, grads: step(*state, grads), donate_argnums=0)
    return jax_program(jitted, (params, init(params)), grads)


def training_program(case, make):
    """Return a program that trains in a loop written by hand."""
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
