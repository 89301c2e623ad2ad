"""Training in other precisions than float32, with loss scaling where Keras uses it."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, assert_lookahead_in_fit, data, find_lookahead, mlp

MODES = {"compiled": {"jit_compile": True}, "eager": {"run_eagerly": True}}
if BACKEND == "tensorflow":
    MODES["graph"] = {"jit_compile": False}
if BACKEND == "torch":
    del MODES["compiled"]
# Without `jax.jit` these take minutes.
if BACKEND == "jax":
    del MODES["eager"]
EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def adam():
    return keras.optimizers.Adam(0.05)


def accumulating():
    return keras.optimizers.Adam(0.05, gradient_accumulation_steps=2)


def overflowing_data(batches, overflows):
    """Batches of eight rows. In the batches in `overflows` the targets make float16 gradients infinite."""
    x, y = data(8 * batches)
    y *= 0.1
    for batch in overflows:
        y[8 * batch : 8 * batch + 8] = 1e6
    return x, y


@EVERY_MODE
def test_steps_that_overflow_in_mixed_float16_do_not_count(mode):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = overflowing_data(10, [0, 4, 7])
    # Skipped are the first step, a step right after a sync, and a step at which a sync would be next.
    counts = [0, 1, 2, 3, 3, 4, 5, 5, 6, 7]
    model, record, _ = assert_lookahead_in_fit(mlp, adam, x, y, counts=counts, **mode)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert float(model.optimizer.dynamic_scale) == 2.0**15 / 2**3
    for step in (0, 4, 7):
        assert_same_bits(record.fast[step], mlp().trainable_variables if step == 0 else record.fast[step - 1])
    for step in (4, 7):
        assert_same_bits(record.slow[step], record.slow[step - 1])
    assert_same_bits(record.slow[1], mlp().trainable_variables)


def test_overflow_between_accumulated_gradients_does_not_count():
    keras.config.set_dtype_policy("mixed_float16")
    x, y = overflowing_data(11, [1, 6])
    # Applied after the second, fourth, ... finite batch: the batches 2, 4, 7, 9.
    counts = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert_lookahead_in_fit(mlp, accumulating, x, y, counts=counts, sync_period=2)


def test_slow_weights_of_a_mixed_float16_model_are_float32():
    keras.config.set_dtype_policy("mixed_float16")
    model, _, _ = assert_lookahead_in_fit(mlp, adam, *overflowing_data(4, []))
    slow = find_lookahead(model.optimizer).slow_variables
    assert [keras.backend.standardize_dtype(one.dtype) for one in slow] == ["float32"] * 4


@EVERY_MODE
@pytest.mark.parametrize(("policy", "dtype"), [("mixed_bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_bfloat16(policy, dtype, mode):
    keras.config.set_dtype_policy(policy)
    model, _, _ = assert_lookahead_in_fit(mlp, adam, *data(56), slow_step_size=0.3, **mode)
    assert [keras.backend.standardize_dtype(one.dtype) for one in model.optimizer.slow_variables] == [dtype] * 4


@pytest.fixture
def _float64():
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    keras.config.set_dtype_policy("float64")
    yield
    if BACKEND == "jax":
        jax.config.update("jax_enable_x64", False)


@EVERY_MODE
@pytest.mark.usefixtures("_float64")
def test_float64_slow_weights_have_full_precision(mode):
    x, y = data(56)
    # 0.3 has another value in float32, off by 1e-8: too much for `assert_is_slow_step`.
    model, record, _ = assert_lookahead_in_fit(
        mlp, adam, x.astype("float64"), y.astype("float64"), slow_step_size=0.3, **mode
    )
    assert [keras.backend.standardize_dtype(one.dtype) for one in model.optimizer.slow_variables] == ["float64"] * 4
    kernel = record.slow[-1][0]
    assert np.any(kernel != kernel.astype("float32"))


def test_swap_ema_weights_finds_the_ema_inside_the_loss_scaler():
    models = []
    for wrap in (lambda inner: inner, lambda inner: Lookahead(inner, sync_period=1_000)):
        model = mlp()
        optimizer = wrap(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5))
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0), loss="mse")
        x, y = data()
        swap = keras.callbacks.SwapEMAWeights()
        history = model.fit(x, y, validation_data=(x, y), epochs=2, shuffle=False, callbacks=[swap], verbose=0)
        models.append((model, history.history["val_loss"]))
    (bare, bare_losses), (wrapped, wrapped_losses) = models
    assert wrapped_losses == bare_losses
    assert_same_bits(wrapped.trainable_variables, bare.trainable_variables)
