"""Every optimizer of Keras as inner optimizer: unchanged between syncs, and the oracle's step at syncs."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, RectifiedAdam
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, values

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "amsgrad": lambda: keras.optimizers.Adam(0.05, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.05, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "adamax": lambda: keras.optimizers.Adamax(0.05),
    "nadam": lambda: keras.optimizers.Nadam(0.05),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
    "rectified_adam": lambda: RectifiedAdam(0.05, weight_decay=0.1, total_steps=9),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.05),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "muon": lambda: keras.optimizers.Muon(0.05),
    "schedule_free_adamw": lambda: keras.optimizers.ScheduleFreeAdamW(0.05, weight_decay=0.1),
}
if not hasattr(keras.optimizers, "ScheduleFreeAdamW"):
    # A Keras without Muon, or whose Muon does not take TensorFlow's variables.
    del OPTIMIZERS["schedule_free_adamw"], OPTIMIZERS["muon"]
MODES = {"tensorflow": ["eager", "graph", "xla"], "jax": ["eager", "jit"], "torch": ["eager"]}[BACKEND]
SHAPES = [(6, 4), (5,), (3, 2, 2)]
SYNC_PERIOD, SLOW_STEP_SIZE = 3, 0.4


def make_step(mode, optimizer, variables):
    """Return a function of the gradients that makes one step on the variables."""
    optimizer.build(variables)
    if mode == "eager":
        return lambda gradients: optimizer.apply(gradients, variables)
    if mode == "jit":
        import jax

        apply = jax.jit(optimizer.stateless_apply)

        def step(gradients):
            state = [variable.value for variable in optimizer.variables]
            weights, state = apply(state, gradients, [variable.value for variable in variables])
            for variable, value in zip(variables + optimizer.variables, weights + state):
                variable.assign(value)

        return step
    import tensorflow as tf

    return tf.function(lambda gradients: optimizer.apply(gradients, variables), jit_compile=mode == "xla")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_between_syncs_bare_bit_for_bit_and_at_syncs_the_oracles_step(name, mode):
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape).astype("float32") for shape in SHAPES]
    variables, bare_variables = ([keras.Variable(weight) for weight in start] for _ in range(2))
    lookahead, bare = Lookahead(OPTIMIZERS[name](), SYNC_PERIOD, SLOW_STEP_SIZE), OPTIMIZERS[name]()
    step, bare_step = make_step(mode, lookahead, variables), make_step(mode, bare, bare_variables)
    slow = [weight.astype("float64") for weight in start]
    for t in range(1, 3 * SYNC_PERIOD + 2):
        gradients = [keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32")) for shape in SHAPES]
        step(gradients)
        bare_step(gradients)
        if t % SYNC_PERIOD:
            assert_same_bits(variables, bare_variables)
            continue
        slow = [one + SLOW_STEP_SIZE * (fast - one) for one, fast in zip(slow, values(bare_variables))]
        for variable, expected in zip(values(variables), slow):
            np.testing.assert_allclose(variable, expected, rtol=1e-6, atol=1e-7)
        assert_same_bits(lookahead.slow_variables, variables)
        slow = [one.astype("float64") for one in values(variables)]
        for bare_variable, value in zip(bare_variables, values(variables)):
            bare_variable.assign(value)
    assert_same_bits(lookahead.inner_optimizer.variables, bare.variables)
