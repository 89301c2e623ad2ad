"""Keras 2 training loops: each step is the bare inner optimizer's, and each sync the slow step, bit for bit."""

import numpy as np
import pytest

from lookahead_optim.tf_keras import Lookahead, SwapSlowWeights
from lookahead_optim.tf_keras._keras import keras
from tests.comparison import assert_same_bits
from tests.test_tf_keras import resuming
from tests.test_tf_keras.resuming import compiled, data, mlp, slow_of, state, values

# Keras 2.15 on Python 3.11.
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange:DeprecationWarning")

legacy = keras.optimizers.legacy
LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer
MODES = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
X, Y = data(80)
VALIDATION = data(40, seed=1)


@pytest.fixture(autouse=True)
def _float32():
    yield
    keras.mixed_precision.set_global_policy("float32")


def adam():
    return legacy.Adam(0.02)


def momentum():
    return legacy.SGD(0.05, momentum=0.9)


def unscaled(optimizer):
    return optimizer.inner_optimizer if hasattr(optimizer, "loss_scale") else optimizer


class Recorder(keras.callbacks.Callback):
    """Records the fast weights, the slow weights and the step count after every batch of `fit`.

    `resets` maps the number of a batch, from 0, to the weights that the model gets after it was recorded.
    """

    def __init__(self, resets=None):
        super().__init__()
        self.resets = resets or {}
        self.fast, self.slow, self.counts = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        model, optimizer = self.model, unscaled(self.model.optimizer)
        self.fast.append(values(model.trainable_variables))
        for variable, value in zip(model.trainable_variables, self.resets.get(len(self.fast) - 1, [])):
            variable.assign(value)
        self.slow.append(slow_of(model, optimizer) if "slow" in optimizer.get_slot_names() else None)
        self.counts.append(int(optimizer.iterations))


def train(model, optimizer, x=X, y=Y, resets=None, callbacks=list, epochs=1, validation_data=None, **compile_args):
    """Compile, fit on batches of eight in their order, and return the `Recorder`."""
    model.compile(optimizer, loss="mse", **compile_args)
    recorder = Recorder(resets)
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=validation_data,
        validation_batch_size=32,
        callbacks=[recorder, *callbacks()],
    )
    return recorder


def assert_slow_step(new, slow, fast, slow_step_size, dtype="float32"):
    """Check slow + slow_step_size (fast - slow) to the rounding of the dtype."""
    for one, start, end in zip(new, slow, fast):
        start, end = start.astype("float64"), end.astype("float64")
        scale = np.abs(start) + np.abs(end)
        error = np.abs(one.astype("float64") - (start + slow_step_size * (end - start)))
        assert np.all(error <= 2 * np.finfo(dtype).eps * scale)


def assert_lookahead(make, make_model=mlp, wrap=lambda optimizer: optimizer, counts=None, alpha=0.3, **kwargs):
    """Check every step of a `fit` with `Lookahead` against the bare inner optimizer, bit for bit.

    The bare optimizer is trained on the same batches. After each sync its weights, not its state, are set to the slow
    weights. `counts` are the applied steps expected after each batch, by default one each.
    """
    model, bare_model = make_model(), make_model()
    slow = values(model.trainable_variables)
    wrapped = train(model, wrap(Lookahead(make(), 3, alpha)), **kwargs)
    if counts is None:
        counts = list(range(1, len(wrapped.fast) + 1))
        assert wrapped.counts == counts
    syncs = [step for step, count in enumerate(counts) if count % 3 == 0 and count != [0, *counts][step]]
    assert len(syncs) >= 2
    bare = train(bare_model, wrap(make()), resets={step: wrapped.slow[step] for step in syncs}, **kwargs)
    for step, count in enumerate(counts):
        if step in syncs:
            assert_same_bits(wrapped.fast[step], wrapped.slow[step])
            assert_slow_step(wrapped.slow[step], slow, bare.fast[step], alpha)
            slow = wrapped.slow[step]
        else:
            assert_same_bits(wrapped.fast[step], bare.fast[step])
            if count:
                assert_same_bits(wrapped.slow[step], slow)
    bare_optimizer = unscaled(bare_model.optimizer)
    inner = unscaled(model.optimizer).inner_optimizer
    for name in bare_optimizer.get_slot_names():
        for one, other in zip(model.trainable_variables, bare_model.trainable_variables):
            assert_same_bits([inner.get_slot(one, name)], [bare_optimizer.get_slot(other, name)])
    return model, wrapped


@EVERY_MODE
@pytest.mark.parametrize("make", [momentum, adam])
def test_every_step_of_fit_is_the_bare_optimizers_and_every_third_a_slow_step(make, mode):
    assert_lookahead(make, **mode)


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
def test_train_on_batch_is_fit(run_eagerly):
    model, other = compiled(Lookahead(adam(), 3), run_eagerly=run_eagerly), compiled(Lookahead(adam(), 3))
    for first in range(0, 80, 8):
        model.train_on_batch(X[first : first + 8], Y[first : first + 8])
    train(other, Lookahead(adam(), 3), run_eagerly=run_eagerly)
    assert_same_bits(state(model), state(other))


def test_several_steps_per_execution_are_single_steps():
    models = [mlp(), mlp()]
    for model, steps in zip(models, (1, 4)):
        train(model, Lookahead(adam(), 3), steps_per_execution=steps)
    assert int(models[0].optimizer.iterations) == 10
    assert_same_bits(state(models[0]), state(models[1]))


def loss_scaled(optimizer):
    return LossScaleOptimizer(optimizer, dynamic=False, initial_scale=64.0)


SCALED = pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, loss_scaled], ids=["", "loss_scaled"])


@SCALED
def test_learning_rate_scheduler_sets_the_rate_of_the_inner_optimizer(wrap):
    def callbacks():
        return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.05 * 0.5**epoch)]

    model, _ = assert_lookahead(momentum, wrap=wrap, epochs=3, callbacks=callbacks)
    assert float(unscaled(model.optimizer).inner_optimizer.learning_rate) == np.float32(0.0125)


@SCALED
def test_reduce_lr_on_plateau_lowers_the_rate_of_the_inner_optimizer(wrap):
    def callbacks():
        return [keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=100.0)]

    model, _ = assert_lookahead(momentum, wrap=wrap, epochs=3, callbacks=callbacks)
    assert float(unscaled(model.optimizer).inner_optimizer.learning_rate) == np.float32(0.0125)


def test_a_schedule_counts_the_steps():
    assert_lookahead(lambda: legacy.SGD(keras.optimizers.schedules.PiecewiseConstantDecay([2, 7], [0.1, 0.02, 0.05])))


def overflowing(*batches):
    y = 0.1 * Y
    for batch in batches:
        y[8 * batch : 8 * batch + 8] = np.inf
    return y


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=["graph", "eager"])
def test_steps_that_a_dynamic_loss_scaler_skips_do_not_count(mode):
    # Skipped are the first step, a step right after a sync, and a step at which a sync would be next.
    model, record = assert_lookahead(
        momentum,
        wrap=lambda optimizer: LossScaleOptimizer(optimizer, initial_scale=64.0, dynamic_growth_steps=100),
        y=overflowing(0, 4, 7),
        counts=[0, 1, 2, 3, 3, 4, 5, 5, 6, 7],
        **mode,
    )
    assert float(model.optimizer.loss_scale) == 64.0 / 2**3
    for step in (4, 7):
        assert_same_bits(record.fast[step], record.fast[step - 1])
        assert_same_bits(record.slow[step], record.slow[step - 1])


def test_a_fixed_loss_scale_changes_nothing_but_rounding():
    model, _ = assert_lookahead(momentum, wrap=loss_scaled)
    other = mlp()
    train(other, Lookahead(momentum(), 3, 0.3))
    assert_same_bits(model.weights, other.weights)


def test_after_skipped_first_steps_the_slow_weights_are_those_before_the_first_applied_one():
    model = compiled(LossScaleOptimizer(Lookahead(momentum(), 3)))
    start = values(model.trainable_variables)
    model.train_on_batch(X[:8], np.full((8, 1), np.inf))
    assert_same_bits(model.trainable_variables, start)
    model.set_weights(mlp(seed=3).get_weights())
    model.train_on_batch(X[:8], Y[:8])
    assert_same_bits(slow_of(model, unscaled(model.optimizer)), mlp(seed=3).trainable_variables)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_policies_keep_float32_slow_weights(policy):
    keras.mixed_precision.set_global_policy(policy)
    # So small that no gradient overflows.
    model, record = assert_lookahead(adam, y=0.1 * Y)
    assert isinstance(model.optimizer, LossScaleOptimizer) == (policy == "mixed_float16")
    assert {slow.dtype for slow in record.slow[-1]} == {np.dtype("float32")}


@pytest.mark.parametrize("mode", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_an_embedding_trains_with_plain_sgd_and_rows_without_gradient_sync_too(mode):
    rng = np.random.default_rng(0)
    ids = rng.integers(7, size=(80, 3))
    ids[:, 1] = ids[:, 0]

    def make_model():
        keras.utils.set_random_seed(0)
        layers = [keras.Input((3,), dtype="int64"), keras.layers.Embedding(9, 2), keras.layers.Flatten()]
        return keras.Sequential([*layers, keras.layers.Dense(1)])

    _, record = assert_lookahead(lambda: legacy.SGD(0.3), make_model, x=ids, **mode)
    start = make_model().trainable_variables[0].numpy()
    assert np.any(record.slow[-1][0][:7] != start[:7])
    assert_same_bits([record.slow[-1][0][7:]], [start[7:]])


@pytest.mark.parametrize("make", [lambda: legacy.SGD(0.2, momentum=0.9), lambda: legacy.Adam(0.03)])
def test_a_classification_is_learnt(make):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype("float32")
    y = (x[:, 0] * x[:, 1] > 0).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(Lookahead(make(), 5), loss=loss, metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)])
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=16, epochs=20, verbose=0)
    after = model.evaluate(x, y, verbose=0)
    assert after[0] < 0.5 * before[0]
    assert after[1] > 0.9 > before[1]


@pytest.mark.parametrize("form", ["config", "serialized"])
def test_an_optimizer_made_by_keras_from_a_config_trains_alike(form):
    """Keras 2's `compile` itself takes no dictionary."""
    optimizer = Lookahead(momentum(), 3, 0.3)
    config = {"class_name": "Addons>Lookahead", "config": optimizer.get_config()}
    model, other = mlp(), mlp()
    train(model, keras.optimizers.get(config if form == "config" else keras.optimizers.serialize(optimizer)))
    train(other, optimizer)
    assert model.optimizer.get_config() == optimizer.get_config()
    assert_same_bits(state(model), state(other))


def with_batch_norm(seed=0):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((4,)), *layers])


def test_a_block_evaluates_the_slow_weights_and_leaves_batch_norms_statistics_and_the_training_as_they_were():
    model, plain = with_batch_norm(), with_batch_norm()
    train(model, Lookahead(adam(), 4), X[:40], Y[:40])
    train(plain, Lookahead(adam(), 4), X[:40], Y[:40])
    fast, slow = values(model.trainable_variables), slow_of(model)
    moving = values(model.non_trainable_variables)
    with model.optimizer.slow_weights():
        assert_same_bits(model.trainable_variables, slow)
        loss, predicted = model.evaluate(*VALIDATION, verbose=0), model.predict(X, verbose=0)
    assert_same_bits(model.trainable_variables, fast)
    assert_same_bits(model.non_trainable_variables, moving)
    assert loss != model.evaluate(*VALIDATION, verbose=0)
    expected = with_batch_norm(seed=3)
    expected.compile(loss="mse")
    for variable, value in zip(expected.trainable_variables + expected.non_trainable_variables, slow + moving):
        variable.assign(value)
    assert loss == expected.evaluate(*VALIDATION, verbose=0)
    assert_same_bits([predicted], [expected.predict(X, verbose=0)])
    for one in (model, plain):
        one.fit(X[40:], Y[40:], batch_size=8, shuffle=False, verbose=0)
    assert_same_bits(state(model), state(plain))


SWAPPED = {
    "float32": lambda: Lookahead(adam(), 4, 0.3),
    "loss_scaled": lambda: LossScaleOptimizer(Lookahead(adam(), 4, 0.3), initial_scale=64.0),
    "nested": lambda: Lookahead(Lookahead(momentum(), 3), 4),
}


class EpochRecorder(keras.callbacks.Callback):
    """Records the fast and the slow weights of every epoch, before its validation, and the validation loss."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow, self.losses = [], [], []

    def on_test_begin(self, logs=None):
        self.fast.append(values(self.model.trainable_variables))
        self.slow.append(slow_of(self.model, unscaled(self.model.optimizer)))

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["val_loss"])


def fit_with(optimizer, *callbacks, epochs=3):
    """Train with validation in epochs that end in mid-cycle, and return the model and an `EpochRecorder`."""
    record = EpochRecorder()
    model = mlp()
    train(model, optimizer, callbacks=lambda: [record, *callbacks], epochs=epochs, validation_data=VALIDATION)
    return model, record


def loss_with(weights):
    model = compiled("sgd")
    model.set_weights(weights)
    return model.evaluate(*VALIDATION, verbose=0)


def full_state(model):
    return model.get_weights() + slow_of(model, unscaled(model.optimizer)) + model.optimizer.get_weights()


@pytest.mark.parametrize("make", SWAPPED.values(), ids=SWAPPED)
def test_with_the_callback_training_is_the_same_bit_for_bit_and_validates_the_slow_weights(make):
    plain, expected = fit_with(make(), epochs=2)
    for swap_on_epoch in (False, True):
        swapped, record = fit_with(make(), SwapSlowWeights(swap_on_epoch), epochs=2)
        for epoch in range(2):
            assert_same_bits(record.fast[epoch], expected.fast[epoch])
            assert_same_bits(record.slow[epoch], expected.slow[epoch])
        assert record.losses == [loss_with(slow) for slow in record.slow]
        assert record.losses[0] != expected.losses[0]
        assert_same_bits(full_state(swapped), full_state(plain))


def test_evaluate_and_predict_with_the_callback_use_the_slow_weights():
    model, record = fit_with(Lookahead(adam(), 4), epochs=1)
    loss = model.evaluate(*VALIDATION, verbose=0, callbacks=[SwapSlowWeights()])
    assert loss == loss_with(record.slow[0]) != loss_with(record.fast[0])
    predicted = model.predict(X, verbose=0, callbacks=[SwapSlowWeights()])
    assert_same_bits(model.trainable_variables, record.fast[0])
    assert not np.array_equal(predicted, model.predict(X, verbose=0))
    with model.optimizer.slow_weights():
        assert_same_bits([predicted], [model.predict(X, verbose=0)])


def test_evaluate_before_any_training_sees_the_models_weights():
    model = compiled(Lookahead(adam(), 4))
    start = values(model.weights)
    assert model.evaluate(*VALIDATION, verbose=0, callbacks=[SwapSlowWeights()]) == loss_with(start)
    assert_same_bits(model.weights, start)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_model_checkpoint_saves_the_slow_weights_of_the_best_epoch(tmp_path, swap_on_epoch):
    checkpoint = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "best"), save_best_only=True, save_weights_only=True, monitor="val_loss"
    )
    model, record = fit_with(Lookahead(adam(), 4), SwapSlowWeights(swap_on_epoch), checkpoint)
    loaded = mlp(seed=3)
    loaded.load_weights(tmp_path / "best").expect_partial()
    assert_same_bits(loaded.trainable_variables, record.slow[int(np.argmin(record.losses))])
    assert_same_bits(model.trainable_variables, record.fast[-1])


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_early_stopping_restores_the_slow_weights_of_the_best_epoch(swap_on_epoch):
    worst = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=1, restore_best_weights=True)
    model, record = fit_with(Lookahead(adam(), 4), SwapSlowWeights(swap_on_epoch), worst, epochs=4)
    assert worst.best_epoch == 0
    assert len(record.losses) == 2
    assert_same_bits(model.trainable_variables, record.slow[0])


def test_the_callback_refuses_a_model_without_lookahead():
    model = compiled(adam())
    message = "needs a model compiled with a `lookahead_optim.tf_keras.Lookahead` optimizer. Received: model.optimizer="
    with pytest.raises(ValueError, match=message):
        model.evaluate(*VALIDATION, verbose=0, callbacks=[SwapSlowWeights()])
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, verbose=0, callbacks=[SwapSlowWeights(swap_on_epoch=True)])


def test_after_an_interrupted_evaluation_the_next_fit_goes_on_from_the_fast_weights():
    class Interrupt(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            raise KeyboardInterrupt

    models = [resuming.fit(compiled(Lookahead(momentum(), 4)), end=5) for _ in range(2)]
    callbacks = [SwapSlowWeights(), Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        models[0].evaluate(*VALIDATION, callbacks=callbacks, verbose=0)
    resuming.fit(models[0], begin=5, callbacks=[SwapSlowWeights()])
    resuming.fit(models[1], begin=5)
    assert_same_bits(state(models[0]), state(models[1]))
