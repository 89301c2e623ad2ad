"""A small least-squares task with the parameters of `make_params`, and training compared with `ByHand`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim.optax import slow_params
from tests.test_optax.by_hand import ByHand, assert_close, make_params

SYNC_PERIOD, SLOW_STEP_SIZE = 3, 0.25


def make_batch(step, size=8):
    rng = np.random.default_rng(2000 + step)
    inputs = rng.normal(size=(size, 3))
    targets = inputs @ np.arange(-6, 6).reshape(3, 4) / 3 + 0.5 * rng.normal(size=(size, 4))
    return jnp.array(inputs, "float32"), jnp.array(targets, "float32")


@jax.jit
def loss(params, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ params["w"] + params["b"][0] - targets) ** 2)


gradient = jax.jit(jax.grad(loss))


def by_hand(optimizer, sync_period=SYNC_PERIOD, slow_step_size=SLOW_STEP_SIZE):
    return ByHand(optimizer, make_params(), sync_period, slow_step_size)


def stepper(optimizer, form="update", **fixed_args):
    """Return a function of gradients, state and parameters that makes a step in one of the two forms."""
    if form == "apply_gradients":
        return jax.jit(functools.partial(optimizer.apply_gradients, **fixed_args))
    update = jax.jit(functools.partial(optimizer.update, **fixed_args))

    def step(grads, state, params, **extra_args):
        updates, state = update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


def gradients_of_batch(params, number):
    return gradient(params, make_batch(number)), {}


def assert_as_by_hand(optimizer, hand, steps=7, tolerance=1e-6, gradients=gradients_of_batch, step=None):
    """Compare fast and slow parameters after every step. Return the last parameters and state.

    `gradients(params, number)` returns the gradients at a step, and extra arguments.
    """
    params, step = hand.params, step or stepper(optimizer)
    state = optimizer.init(params)
    for number in range(1, steps + 1):
        grads, extra_args = gradients(params, number)
        params, state = step(grads, state, params, **extra_args)
        grads, extra_args = gradients(hand.params, number)
        hand.apply(grads, **extra_args)
        assert_close(params, hand.params, tolerance)
        assert_close(slow_params(state, params), hand.slow, tolerance)
    return params, state
