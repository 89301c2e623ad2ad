"""What could differ on a GPU: `fit` in mixed precision, files, and on PyTorch waits of the host."""

import warnings

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.device import DEVICE, ON_CPU
from tests.test_keras.helpers import BACKEND, data, find_lookahead, mlp, train, values

pytestmark = pytest.mark.gpu

PERIOD = 3


def adam():
    return keras.optimizers.Adam(0.02)


def test_weights_are_on_the_device():
    value = mlp().trainable_variables[0].value
    if BACKEND == "torch":
        assert value.device.type == ("cpu" if ON_CPU else DEVICE)
    if BACKEND == "jax":
        assert (value.device.platform == "cpu") == ON_CPU


def test_fit_moves_the_slow_weights_at_syncs_alone_and_restarts_there():
    x, y = data()
    recorder = train(mlp(), Lookahead(adam(), PERIOD), x, y)
    for step, (fast, slow) in enumerate(zip(recorder.fast, recorder.slow), start=1):
        if step % PERIOD == 0:
            assert_same_bits(fast, slow)
        elif step > 1:
            assert_same_bits(slow, recorder.slow[step - 2])


def test_fit_in_half_precision_with_a_loss_scale_that_overflows_counts_no_skipped_step():
    x, y = data()
    model = mlp(dtype="mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(Lookahead(adam(), PERIOD), initial_scale=2.0**20)
    recorder = train(model, optimizer, x, y)
    assert 0 < int(find_lookahead(optimizer).inner_optimizer.iterations) < len(recorder.fast)
    assert all(np.isfinite(one).all() for one in values(model.variables))


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_run_goes_on_from_a_file_bit_for_bit(tmp_path, suffix):
    x, y = data()
    model = mlp()
    train(model, Lookahead(adam(), PERIOD), x[:40], y[:40])
    path = tmp_path / f"model{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    if suffix == ".keras":
        resumed = keras.saving.load_model(path)
    else:
        resumed = mlp(seed=1)
        resumed.compile(Lookahead(adam(), PERIOD), loss="mse")
        resumed.optimizer.build(resumed.trainable_variables)
        resumed.load_weights(path)
    for one in (model, resumed):
        one.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same_bits(values(resumed.trainable_variables), values(model.trainable_variables))
    assert_same_bits(values(resumed.optimizer.slow_variables), values(model.optimizer.slow_variables))


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
def test_the_host_waits_for_the_device_no_more_often_than_with_the_bare_optimizer():
    import torch

    def waits(optimizer):
        variables = mlp().trainable_variables
        grads = [torch.ones_like(variable.value) for variable in variables]
        optimizer.build(variables)
        optimizer.apply(grads, variables)
        if not ON_CPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2 * PERIOD):
                    optimizer.apply(grads, variables)
        finally:
            if not ON_CPU:
                torch.cuda.set_sync_debug_mode("default")
        return [str(one.message) for one in caught if "synchroniz" in str(one.message)]

    assert len(waits(Lookahead(adam(), PERIOD))) == len(waits(adam()))
