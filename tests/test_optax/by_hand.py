"""Lookahead written out: what `lookahead` must do with any transformation, written next to the bare one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests import comparison


class ByHand:
    """Runs a bare transformation and makes the slow step itself after every `sync_period` updates.

    Half-precision parameters take the slow step in float32.
    """

    def __init__(self, optimizer, params, sync_period=6, slow_step_size=0.5, slow_momentum=0.0):
        self.params = self.slow = params
        self.slow_momentum = slow_momentum
        self.reset()
        self.state = optimizer.init(params)
        self.sync_period, self.slow_step_size = sync_period, slow_step_size
        self.update = jax.jit(optax.with_extra_args_support(optimizer).update)
        self.steps = 0

    def apply(self, grads, **extra_args):
        updates, self.state = self.update(grads, self.state, self.params, **extra_args)
        self.params = optax.apply_updates(self.params, updates)
        self.steps += 1
        if self.steps % self.sync_period == 0:
            self.sync()

    def reset(self):
        self.slow, self.b = self.params, jax.tree.map(jnp.zeros_like, self.params)

    def sync(self):
        if self.slow_momentum:
            self.sync_with_momentum()
            return

        def slow_step(slow, fast):
            dtype = jnp.promote_types(fast.dtype, jnp.float32)
            return (slow.astype(dtype) + self.slow_step_size * (fast.astype(dtype) - slow)).astype(fast.dtype)

        self.params = self.slow = jax.tree.map(slow_step, self.slow, self.params)

    def sync_with_momentum(self):
        mu, pseudo_gradients = self.slow_momentum, jax.tree.map(jnp.subtract, self.slow, self.params)
        self.b = jax.tree.map(lambda b, s: mu * b + s, self.b, pseudo_gradients)
        self.params = self.slow = jax.tree.map(
            lambda slow, b, s: slow - self.slow_step_size * (s + mu * b), self.slow, self.b, pseudo_gradients
        )


def make_params(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {"w": jnp.array(rng.normal(size=(3, 4)), dtype), "b": [jnp.array(rng.normal(size=4), dtype)]}


def make_grads(step, params):
    """Return normal random gradients, the same for the same step."""
    rng = np.random.default_rng(1000 + step)
    return jax.tree.map(lambda param: jnp.array(rng.normal(size=param.shape), param.dtype), params)


assert_same_bits = functools.partial(comparison.assert_same_bits, for_each_pair=jax.tree.map)


def assert_close(actual, expected, tolerance=1e-6):
    def close(one, other):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)

    jax.tree.map(close, actual, expected)
