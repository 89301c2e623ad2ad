"""Training with `fit`: every mode of `fit`, and everything that the inner optimizer does beside its update."""

import contextlib
import functools

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import (
    BACKEND,
    Recorder,
    assert_lookahead_in_fit,
    data,
    differ,
    mlp,
    train,
    values,
)

# `jit_compile=True` is torch.compile on PyTorch, which takes seconds per model: one small test below.
MODES = {
    "compiled": {"jit_compile": True},
    "not_compiled": {"jit_compile": False},
    "eager": {"run_eagerly": True},
}
if BACKEND == "torch":
    del MODES["compiled"]
EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
TRACED = {
    name: mode for name, mode in MODES.items() if name == "compiled" or (name == "not_compiled" and BACKEND != "jax")
}
# Not XLA on TensorFlow, where it takes seconds for each model.
QUICK = list(TRACED.values())[-1]
EVERY_TRACED_MODE = pytest.mark.parametrize("mode", TRACED.values(), ids=TRACED)
not_on_torch = pytest.mark.skipif(BACKEND == "torch", reason="the PyTorch backend has no steps_per_execution")


def adam():
    return keras.optimizers.Adam(0.05)


def momentum():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def output(y_true, y_pred):
    return keras.ops.mean(y_pred)


def one_weight():
    """A model whose output for the input 1 is its only weight, 1.0. The gradient of `output` is 1."""
    return keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="weight")]
    )


ONES = np.ones((10, 1), "float32")
CLOSED_FORM = [0.9, 0.8, 0.7, 0.6, 0.75, 0.65, 0.55, 0.45, 0.35, 0.5]


@EVERY_MODE
def test_fit_gives_the_closed_form(mode):
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 5, 0.5)
    record = train(one_weight(), optimizer, ONES, ONES, batch_size=1, loss=output, **mode)
    np.testing.assert_allclose(np.ravel(record.fast), CLOSED_FORM, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(record.slow), [1.0] * 4 + [0.75] * 5 + [0.5], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(BACKEND != "torch", reason="on the other backends this is a mode of every test")
@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras 3.10 fails in old versions of PyTorch"
)
def test_fit_under_torch_compile_gives_the_closed_form():
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 5, 0.5)
    record = train(one_weight(), optimizer, ONES, ONES, batch_size=1, loss=output, jit_compile=True)
    np.testing.assert_allclose(np.ravel(record.fast), CLOSED_FORM, rtol=1e-6)


@EVERY_MODE
def test_fit_is_the_bare_optimizer_until_the_first_sync(mode):
    x, y = data(64)
    model, bare_model = mlp(), mlp()
    record = train(model, Lookahead(adam(), sync_period=9), x, y, **mode)
    bare = train(bare_model, adam(), x, y, **mode)
    assert len(record.fast) == 8
    for fast, expected in zip(record.fast, bare.fast):
        assert_same_bits(fast, expected)
    assert_same_bits(model.optimizer.inner_optimizer.variables, bare_model.optimizer.variables)
    assert_same_bits(model.optimizer.slow_variables, mlp().trainable_variables)


@EVERY_MODE
@pytest.mark.parametrize(("make_optimizer", "slow_step_size"), [(adam, 0.5), (momentum, 0.8)])
def test_fit_syncs_and_otherwise_is_the_bare_optimizer(mode, make_optimizer, slow_step_size):
    assert_lookahead_in_fit(mlp, make_optimizer, *data(64), slow_step_size=slow_step_size, **mode)


def test_count_and_slow_weights_go_on_over_epochs_and_fits():
    x, y = data(40)
    model = mlp()
    record = train(model, Lookahead(adam(), 3), x, y, epochs=2)
    again = Recorder()
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[again])
    assert record.counts + again.counts == list(range(1, 16))
    whole = train(mlp(), Lookahead(adam(), 3), np.tile(x, (3, 1)), np.tile(y, (3, 1)))
    for step, fast, slow in zip(range(15), record.fast + again.fast, record.slow + again.slow):
        assert_same_bits(fast, whole.fast[step])
        assert_same_bits(slow, whole.slow[step])


@not_on_torch
@pytest.mark.parametrize("jit_compile", [True, False])
def test_steps_per_execution_changes_nothing(jit_compile):
    x, y = data(96)
    model, one_by_one = mlp(), mlp()
    record = train(model, Lookahead(adam(), 3), x, y, steps_per_execution=4, jit_compile=jit_compile)
    expected = train(one_by_one, Lookahead(adam(), 3), x, y, jit_compile=jit_compile)
    assert record.counts == [4, 8, 12]
    for index, step in enumerate([3, 7, 11]):
        assert_same_bits(record.fast[index], expected.fast[step])
        assert_same_bits(record.slow[index], expected.slow[step])
    assert_same_bits(model.optimizer.variables, one_by_one.optimizer.variables)


SGD, ADAM, ADAMW = (
    functools.partial(keras.optimizers.SGD, learning_rate=0.1, momentum=0.9),
    functools.partial(keras.optimizers.Adam, learning_rate=0.05),
    functools.partial(keras.optimizers.AdamW, learning_rate=0.05),
)
FEATURES = {
    "clipnorm": (SGD, {"clipnorm": 0.05}),
    "clipvalue": (SGD, {"clipvalue": 0.01}),
    "global_clipnorm": (SGD, {"global_clipnorm": 0.05}),
    "weight_decay": (ADAMW, {"weight_decay": 0.2}),
    "amsgrad": (ADAM, {"amsgrad": True}),
    "schedule": (ADAM, {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5)}),
    "ema": (ADAM, {"use_ema": True, "ema_momentum": 0.7}),
    "ema_overwrite": (ADAM, {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 4}),
    "loss_scale_factor": (SGD, {"loss_scale_factor": 3.0}),
}


@functools.cache
def weights_without_features(optimizer_class):
    model = mlp()
    train(model, Lookahead(optimizer_class(), 3), *data(64))
    return values(model.trainable_variables)


@pytest.mark.parametrize(("optimizer_class", "feature"), FEATURES.values(), ids=FEATURES)
def test_inner_optimizer_keeps_its_own_features(optimizer_class, feature):
    x, y = data(64)

    def make_optimizer():
        return optimizer_class(**feature)

    model, _, _ = assert_lookahead_in_fit(mlp, make_optimizer, x, y)
    assert differ(model.trainable_variables, weights_without_features(optimizer_class))


def averaged():
    return keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.7)


@EVERY_TRACED_MODE
def test_accumulated_gradients_count_once(mode):
    def make_optimizer():
        return keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)

    x, y = data(14 * 8)
    counts = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert_lookahead_in_fit(mlp, make_optimizer, x, y, counts=counts, **mode)


def test_fit_ends_with_the_ema_of_the_inner_optimizer():
    x, y = data(56)
    model, record, _ = assert_lookahead_in_fit(mlp, averaged, x, y)
    assert_same_bits(model.trainable_variables, model.optimizer.inner_optimizer._model_variables_moving_average)
    assert differ(model.trainable_variables, record.fast[-1])


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swap_ema_weights_finds_the_ema_inside_lookahead(swap_on_epoch):
    def callbacks():
        return [keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)]

    x, y = data(40)
    fit = {"validation_data": data(16, seed=1)}
    model, _, _ = assert_lookahead_in_fit(mlp, averaged, x, y, epochs=2, callbacks=callbacks, fit=fit)
    seen = model.history.history["val_loss"]
    train(mlp_on_fast := mlp(), Lookahead(averaged(), 3), x, y, epochs=2, fit=fit)
    assert all(one != other for one, other in zip(seen, mlp_on_fast.history.history["val_loss"]))
    assert_same_bits(model.trainable_variables, model.optimizer.inner_optimizer._model_variables_moving_average)


def decaying(exclude_on=None):
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.5)
    if exclude_on == "inner":
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer = Lookahead(optimizer, 3)
    if exclude_on == "wrapper":
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def test_exclusion_from_weight_decay_on_the_wrapper_is_that_of_the_inner_optimizer():
    x, y = data(56)
    on_wrapper, on_inner, nowhere = (
        train(mlp(bias_initializer="ones"), decaying(exclude_on), x, y) for exclude_on in ("wrapper", "inner", None)
    )
    assert_same_bits(on_wrapper.fast[-1], on_inner.fast[-1])
    assert differ(on_wrapper.fast[0][1:2], nowhere.fast[0][1:2])
    assert_same_bits(on_wrapper.fast[0][0::2], nowhere.fast[0][0::2])


def test_exclusion_from_weight_decay_by_variable():
    x, y = data(8)
    model, optimizer = mlp(bias_initializer="ones"), decaying()
    optimizer.exclude_from_weight_decay(var_list=[model.trainable_variables[1]])
    excluded = train(model, optimizer, x, y).fast[0]
    plain = train(mlp(bias_initializer="ones"), decaying(), x, y).fast[0]
    assert differ(excluded[1:2], plain[1:2])
    assert_same_bits([excluded[0], *excluded[2:]], [plain[0], *plain[2:]])


@EVERY_TRACED_MODE
def test_constraint_holds_in_both_copies_after_a_sync(mode):
    def make_model():
        return mlp(kernel_constraint=keras.constraints.UnitNorm(axis=0))

    def far():
        return keras.optimizers.Adam(0.5)

    x, y = data(56)
    _, record, bare = assert_lookahead_in_fit(make_model, far, x, y, **mode)
    for slow in record.slow[2:6:3]:
        np.testing.assert_allclose(np.linalg.norm(slow[0], axis=0), 1, rtol=1e-5)
    middle = (bare.fast[5][0] + record.slow[4][0]) / 2
    assert np.all(np.linalg.norm(middle, axis=0) < 0.999)


def test_layer_frozen_before_compile_takes_no_part():
    def make_model():
        model = mlp()
        model.layers[0].trainable = False
        return model

    model, _, _ = assert_lookahead_in_fit(make_model, adam, *data(56))
    assert len(model.optimizer.slow_variables) == 2
    assert_same_bits(model.layers[0].weights, mlp().layers[0].weights)


def test_weights_that_the_loss_does_not_reach_are_left_alone():
    def make_model():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        return keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(2)(inputs)])

    x, y = data(56)
    # JAX gives zeros for gradients there.
    warned = contextlib.nullcontext() if BACKEND == "jax" else pytest.warns(UserWarning, match="Gradients do not exist")
    with warned:
        model, _, _ = assert_lookahead_in_fit(make_model, momentum, x, y, loss=["mse", None])
    assert len(model.optimizer.slow_variables) == 4
    assert_same_bits(model.layers[-1].weights, make_model().layers[-1].weights)


def embedding():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(9, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
    )


@pytest.mark.parametrize(("optimizer_class", "clipnorm"), [(keras.optimizers.SGD, None), (keras.optimizers.Adam, 0.05)])
@EVERY_TRACED_MODE
def test_embedding_is_synchronised_in_rows_without_gradient_too(mode, optimizer_class, clipnorm):
    rng = np.random.default_rng(0)
    # The last batches, and so the sync steps too, do not use the rows 6 to 8.
    x = np.concatenate([rng.integers(0, 9, (16, 3)), rng.integers(0, 6, (40, 3))]).astype("int32")
    y = rng.normal(size=(56, 1)).astype("float32")
    _, record, _ = assert_lookahead_in_fit(
        embedding, lambda: optimizer_class(0.1, clipnorm=clipnorm), x, y, sync_period=4, **mode
    )
    assert np.all(np.any(record.fast[3][0][6:] != record.fast[2][0][6:], axis=1))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="sparse gradients exist in TensorFlow alone")
def test_gradients_of_an_embedding_are_sparse():
    import tensorflow as tf

    model = embedding()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(np.zeros((2, 3), "int32")))
    assert isinstance(tape.gradient(loss, model.trainable_variables[0].value), tf.IndexedSlices)


def test_learning_rate_scheduler_reaches_the_inner_optimizer():
    def callbacks():
        return [keras.callbacks.LearningRateScheduler(lambda epoch, learning_rate: learning_rate * 0.5)]

    model, _, _ = assert_lookahead_in_fit(mlp, momentum, *data(24), epochs=3, callbacks=callbacks)
    assert float(model.optimizer.inner_optimizer.learning_rate) == np.float32(0.1) / 8
    assert model.history.history["learning_rate"] == [float(np.float32(0.1) / 2**n) for n in (1, 2, 3)]


def test_reduce_lr_on_plateau_reaches_the_inner_optimizer():
    def callbacks():
        return [keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=100.0)]

    model, _, _ = assert_lookahead_in_fit(mlp, momentum, *data(24), epochs=4, callbacks=callbacks)
    assert float(model.optimizer.inner_optimizer.learning_rate) == np.float32(0.1) / 8


def test_training_goes_on_from_the_best_weights_after_reset_slow_weights():
    x, y = data(32)
    model, optimizer = mlp(), Lookahead(adam(), 3)
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=2, restore_best_weights=True)
    explosion = keras.callbacks.LearningRateScheduler(lambda epoch, _: 0.05 if epoch < 2 else 9.0)
    train(model, optimizer, x, y, epochs=9, callbacks=lambda: [stopping, explosion])
    assert (stopping.best_epoch, stopping.stopped_epoch) == (1, 3)
    best = values(model.trainable_variables)
    assert differ(optimizer.slow_variables, best)
    optimizer.reset_slow_weights()
    assert_same_bits(optimizer.slow_variables, best)
    optimizer.learning_rate = 0.05
    again = Recorder()
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[again])
    assert again.counts == [17, 18, 19, 20]
    assert_same_bits(again.slow[0], best)
    assert_same_bits(again.slow[1], again.fast[1])
    # Of two steps of about 0.05, Lookahead takes half.
    for one, start in zip(again.slow[1], best):
        assert 0 < np.abs(one - start).max() < 0.2


@pytest.mark.parametrize("when", ["after_compile", "after_build", "before_the_first_step"])
@pytest.mark.filterwarnings("ignore:Skipping the state of optimizer", "ignore:Skipping variable loading for optimizer")
def test_slow_weights_start_from_pretrained_weights(when, tmp_path):
    x, y = data(56)
    path = tmp_path / "pretrained.weights.h5"
    pretrained = mlp(seed=1)
    pretrained.save_weights(path)
    model, optimizer = mlp(seed=2), Lookahead(adam(), 3)
    if when == "after_build":
        optimizer.build(model.trainable_variables)
    model.compile(optimizer, loss="mse", **QUICK)
    record = Recorder()
    callbacks = [record]
    if when == "before_the_first_step":
        callbacks.append(
            keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: batch or model.load_weights(path))
        )
    else:
        model.load_weights(path)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    assert_same_bits(record.slow[0], pretrained.trainable_variables)
    expected = train(mlp(seed=1), Lookahead(adam(), 3), x, y, **QUICK)
    assert_same_bits(record.fast[-1], expected.fast[-1])
    assert_same_bits(record.slow[-1], expected.slow[-1])
