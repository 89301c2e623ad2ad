"""The slow weights in the model: `slow_weights()`, `sync()`, `reset_slow_weights()` and `SwapSlowWeights`."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, SwapSlowWeights
from tests.comparison import assert_same_bits
from tests.test_keras import resuming
from tests.test_keras.helpers import BACKEND, assert_is_slow_step, data, find_lookahead, mlp, values

ALL_X, ALL_Y = data(136)
X, Y = ALL_X[:96], ALL_Y[:96]
VALIDATION = ALL_X[96:], ALL_Y[96:]
# Compiling every model is slow on TensorFlow and PyTorch, every operation on JAX.
EAGERLY = BACKEND != "jax"


def adam(sync_period=5, slow_step_size=0.3):
    return Lookahead(keras.optimizers.Adam(0.02), sync_period, slow_step_size)


def loss_scaled(sync_period=5):
    return keras.optimizers.LossScaleOptimizer(adam(sync_period), initial_scale=64.0)


def nested(sync_period=5):
    return Lookahead(Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), 3), sync_period)


def compiled(optimizer, run_eagerly=False, **kwargs):
    model = mlp(**kwargs)
    model.compile(optimizer, loss="mse", run_eagerly=run_eagerly)
    return model


def trained(optimizer=None, batches=7, run_eagerly=EAGERLY):
    """Return a model trained up to the middle of a cycle, where fast and slow weights differ, and its `Lookahead`."""
    model = resuming.fit(compiled(optimizer or adam(), run_eagerly), end=batches)
    return model, find_lookahead(model.optimizer)


def gradients(model):
    return [keras.ops.ones(variable.shape) for variable in model.trainable_variables]


def evaluator(like):
    """Return a function from weights to the validation loss of a model with these weights."""
    model = compiled("sgd", like.run_eagerly, dtype=like.layers[0].dtype_policy)

    def loss_with(weights):
        for variable, weight in zip(model.trainable_variables, weights):
            variable.assign(weight)
        return model.evaluate(*VALIDATION, batch_size=8, verbose=0)

    return loss_with


@pytest.mark.parametrize("make", [adam, loss_scaled, nested])
def test_the_block_holds_the_slow_weights_and_the_fast_ones_come_back_bit_for_bit(make):
    model, lookahead = trained(make())
    fast, slow = values(model.trainable_variables), values(lookahead.slow_variables)
    assert any(not np.array_equal(one, other) for one, other in zip(fast, slow))
    before = values(lookahead.variables)
    with lookahead.slow_weights():
        assert_same_bits(model.trainable_variables, slow)
        assert model.evaluate(*VALIDATION, batch_size=8, verbose=0) == evaluator(model)(slow)
    assert_same_bits(model.trainable_variables, fast)
    assert_same_bits(lookahead.variables, before)


@pytest.mark.parametrize("make", [adam, loss_scaled, nested])
def test_training_after_an_evaluation_in_a_block_goes_on_as_if_there_had_been_none(make):
    model, lookahead = trained(make(), run_eagerly=False)
    for stop in (8, 12):
        with lookahead.slow_weights():
            model.evaluate(*VALIDATION, verbose=0)
            model.predict(X, verbose=0)
        resuming.fit(model, begin=stop - (1 if stop == 8 else 4), end=stop)
    other, _ = trained(make(), run_eagerly=False)
    resuming.fit(resuming.fit(other, begin=7, end=8), begin=8)
    assert_same_bits(resuming.state(model), resuming.state(other))


def test_the_fast_weights_come_back_after_an_exception_in_the_block():
    model, lookahead = trained()
    fast = values(model.trainable_variables)

    def fail():
        with lookahead.slow_weights():
            model.trainable_variables[0].assign(np.zeros((4, 8)))
            raise KeyError("in the block")

    with pytest.raises(KeyError, match="in the block"):
        fail()
    assert_same_bits(model.trainable_variables, fast)
    with lookahead.slow_weights():
        assert_same_bits(model.trainable_variables, lookahead.slow_variables)


def test_a_block_in_a_block_changes_nothing():
    model, lookahead = trained()
    fast = values(model.trainable_variables)
    with lookahead.slow_weights():
        with lookahead.slow_weights():
            assert_same_bits(model.trainable_variables, lookahead.slow_variables)
        assert_same_bits(model.trainable_variables, lookahead.slow_variables)
        with pytest.raises(KeyError), lookahead.slow_weights():
            raise KeyError
        assert_same_bits(model.trainable_variables, lookahead.slow_variables)
    assert_same_bits(model.trainable_variables, fast)


def test_weights_loaded_in_the_block_are_replaced_by_the_fast_ones(tmp_path):
    model, lookahead = trained()
    other = mlp(seed=3)
    other.save_weights(tmp_path / "other.weights.h5")
    fast = values(model.trainable_variables)
    with lookahead.slow_weights():
        model.set_weights(other.get_weights())
        assert_same_bits(model.weights, other.weights)
    assert_same_bits(model.trainable_variables, fast)


def continue_from_the_slow_weights(model, lookahead):
    for slow, fast in zip(values(lookahead.slow_variables), model.trainable_variables):
        fast.assign(slow)
    return resuming.state(resuming.fit(model, begin=7))


@pytest.mark.parametrize("make", [adam, loss_scaled])
def test_a_model_saved_in_the_block_has_the_slow_weights_and_trains_on_from_them(tmp_path, make):
    model, lookahead = trained(make())
    fast, slow = values(model.trainable_variables), values(lookahead.slow_variables)
    with lookahead.slow_weights():
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
    assert_same_bits(model.trainable_variables, fast)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded.trainable_variables, slow)
    assert_same_bits(loaded.optimizer.variables, model.optimizer.variables)
    with find_lookahead(loaded.optimizer).slow_weights():
        assert_same_bits(loaded.trainable_variables, slow)
    bare = mlp(seed=3)
    bare.load_weights(tmp_path / "model.weights.h5")
    assert_same_bits(bare.weights, slow)
    expected = continue_from_the_slow_weights(model, lookahead)
    assert_same_bits(resuming.state(resuming.fit(loaded, begin=7)), expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the format is TensorFlow's")
def test_a_tensorflow_checkpoint_made_in_the_block_has_the_slow_weights_and_trains_on_from_them(tmp_path):
    import tensorflow as tf

    model, lookahead = trained()
    fast, slow = values(model.trainable_variables), values(lookahead.slow_variables)
    with lookahead.slow_weights():
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "checkpoint"))
    assert_same_bits(model.trainable_variables, fast)
    loaded = compiled(adam(), run_eagerly=EAGERLY, seed=3)
    loaded.optimizer.build(loaded.trainable_variables)
    tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer).restore(path).assert_existing_objects_matched()
    assert_same_bits(loaded.trainable_variables, slow)
    expected = continue_from_the_slow_weights(model, lookahead)
    assert_same_bits(resuming.state(resuming.fit(loaded, begin=7)), expected)


def test_before_the_first_update_the_block_holds_the_models_own_weights():
    model = compiled(adam())
    model.optimizer.build(model.trainable_variables)
    start = values(model.trainable_variables)
    with model.optimizer.slow_weights():
        assert_same_bits(model.trainable_variables, start)
    assert_same_bits(model.trainable_variables, start)
    model.set_weights(mlp(seed=3).get_weights())
    other = compiled(adam(), seed=3)
    assert_same_bits(resuming.state(resuming.fit(model)), resuming.state(resuming.fit(other)))


def test_switched_off_the_block_the_sync_and_the_reset_change_nothing():
    model, lookahead = trained(adam(sync_period=0))
    before = resuming.state(model)
    with lookahead.slow_weights():
        assert_same_bits(resuming.state(model), before)
    lookahead.sync()
    lookahead.reset_slow_weights()
    assert_same_bits(resuming.state(model), before)
    assert lookahead.slow_variables == []


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (r"apply\(grads\)", lambda lookahead, model: lookahead.apply(gradients(model))),
        (
            r"apply\(grads\)",
            lambda lookahead, model: lookahead.apply_gradients(zip(gradients(model), model.trainable_variables)),
        ),
        (
            r"apply\(grads\)",
            lambda lookahead, model: lookahead.minimize(lambda: keras.ops.mean(model(X)), model.trainable_variables),
        ),
        (r"sync\(\)", lambda lookahead, model: lookahead.sync()),
        (r"reset_slow_weights\(\)", lambda lookahead, model: lookahead.reset_slow_weights()),
        (r"set_weights\(weights\)", lambda lookahead, model: lookahead.set_weights(lookahead.get_weights())),
    ],
)
def test_what_would_move_the_weights_is_refused_in_the_block(name, call):
    model, lookahead = trained()
    before = resuming.state(model)
    message = rf"^`{name}` was called inside a `slow_weights\(\)` block: what it changes"
    with lookahead.slow_weights(), pytest.raises(RuntimeError, match=message):
        call(lookahead, model)
    assert_same_bits(resuming.state(model), before)
    call(lookahead, model)


def test_an_unbuilt_optimizer_has_nothing_to_swap_synchronise_or_reset():
    model = compiled(adam())
    before = values(model.weights)
    model.optimizer.sync()
    model.optimizer.reset_slow_weights()
    with model.optimizer.slow_weights():
        assert_same_bits(model.weights, before)
        ran = True
    assert ran
    assert not model.optimizer.built
    assert_same_bits(model.weights, before)


def test_a_reset_before_the_first_update_captures_nothing_so_that_weights_may_still_be_loaded():
    model, other = compiled(adam()), compiled(adam(), seed=3)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.reset_slow_weights()
    model.set_weights(mlp(seed=3).get_weights())
    assert_same_bits(resuming.state(resuming.fit(model)), resuming.state(resuming.fit(other)))


@pytest.mark.parametrize("batches", [1, 7, 10])
def test_sync_is_the_slow_step_and_a_second_one_changes_nothing(batches):
    model, lookahead = trained(batches=batches)
    fast, slow = values(model.trainable_variables), values(lookahead.slow_variables)
    inner = values(lookahead.inner_optimizer.variables)
    lookahead.sync()
    assert_is_slow_step(values(lookahead.slow_variables), slow, fast, 0.3, model.trainable_variables)
    assert_same_bits(model.trainable_variables, lookahead.slow_variables)
    assert_same_bits(lookahead.inner_optimizer.variables, inner)
    assert int(lookahead.iterations) == batches
    before = resuming.state(model)
    lookahead.sync()
    assert_same_bits(resuming.state(model), before)


def test_sync_on_a_sync_changes_nothing():
    model, lookahead = trained(batches=10)
    before = resuming.state(model)
    lookahead.sync()
    assert_same_bits(resuming.state(model), before)


def test_sync_before_the_first_update_changes_no_weight():
    model = compiled(adam())
    model.optimizer.build(model.trainable_variables)
    start = values(model.trainable_variables)
    model.optimizer.sync()
    assert_same_bits(model.trainable_variables, start)
    assert_same_bits(model.optimizer.slow_variables, start)


def test_the_next_sync_after_a_sync_by_hand_comes_when_it_was_due():
    model, lookahead = trained(batches=7)
    lookahead.sync()
    slow = values(lookahead.slow_variables)
    resuming.fit(model, begin=7, end=9)
    assert_same_bits(lookahead.slow_variables, slow)
    resuming.fit(model, begin=9, end=10)
    assert_same_bits(lookahead.slow_variables, model.trainable_variables)


def test_reset_captures_the_slow_weights_from_the_model():
    model, lookahead = trained()
    new = mlp(seed=3)
    model.set_weights(new.get_weights())
    inner = values(lookahead.inner_optimizer.variables)
    lookahead.reset_slow_weights()
    assert_same_bits(model.trainable_variables, new.trainable_variables)
    assert_same_bits(lookahead.slow_variables, new.trainable_variables)
    assert_same_bits(lookahead.inner_optimizer.variables, inner)
    assert int(lookahead.iterations) == 7
    resuming.fit(model, begin=7, end=8)
    assert_same_bits(lookahead.slow_variables, new.trainable_variables)


class Record(keras.callbacks.Callback):
    """Records the fast and the slow weights of every epoch, before its validation, and the validation loss."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow, self.losses = [], [], []

    def on_test_begin(self, logs=None):
        self.fast.append(values(self.model.trainable_variables))
        self.slow.append(values(find_lookahead(self.model.optimizer).slow_variables))

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs.get("val_loss"))


def fit(model, *callbacks, epochs=3):
    """Train with validation in epochs that end in mid-cycle and return a `Record`."""
    record = Record()
    model.fit(
        X,
        Y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=VALIDATION,
        callbacks=[record, *callbacks],
    )
    return record


RUNS = {
    "float32": lambda: compiled(adam()),
    "mixed_float16": lambda: compiled(loss_scaled(), dtype="mixed_float16"),
    "nested": lambda: compiled(nested()),
}


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_with_the_callback_the_training_is_the_same_bit_for_bit_and_validates_the_slow_weights(make):
    model = make()
    plain = fit(model)
    loss_with = evaluator(model)
    for swap_on_epoch in (False, True):
        swapped = make()
        record = fit(swapped, SwapSlowWeights(swap_on_epoch))
        for epoch in range(3):
            assert_same_bits(record.fast[epoch], plain.fast[epoch])
            assert_same_bits(record.slow[epoch], plain.slow[epoch])
            assert record.losses[epoch] == loss_with(record.slow[epoch])
            assert record.losses[epoch] != plain.losses[epoch]
        assert_same_bits(resuming.state(swapped), resuming.state(model))


def test_the_policy_mixed_float16_makes_a_model_that_the_callback_takes():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(adam())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    record = fit(model, SwapSlowWeights(), epochs=1)
    assert record.losses == [evaluator(model)(record.slow[0])]


def test_evaluate_and_predict_with_the_callback_use_the_slow_weights():
    model, lookahead = trained()
    before = resuming.state(model)
    slow = values(lookahead.slow_variables)
    loss = model.evaluate(*VALIDATION, batch_size=8, verbose=0, callbacks=[SwapSlowWeights()])
    assert loss == evaluator(model)(slow)
    predicted = model.predict(X, verbose=0, callbacks=[SwapSlowWeights()])
    assert_same_bits(resuming.state(model), before)
    with lookahead.slow_weights():
        assert_same_bits([predicted], [model.predict(X, verbose=0)])
    assert not np.array_equal(predicted, model.predict(X, verbose=0))


def test_evaluate_before_any_training_sees_the_models_weights():
    model = compiled(adam())
    start = values(model.weights)
    loss = model.evaluate(*VALIDATION, batch_size=8, verbose=0, callbacks=[SwapSlowWeights()])
    assert loss == evaluator(model)(start)
    model.predict(X, verbose=0, callbacks=[SwapSlowWeights()])
    assert_same_bits(model.weights, start)
    fit(model, SwapSlowWeights(swap_on_epoch=True), epochs=1)
    other = compiled(adam())
    fit(other, epochs=1)
    assert_same_bits(resuming.state(model), resuming.state(other))


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_model_checkpoint_saves_the_slow_weights_of_the_best_epoch(tmp_path, swap_on_epoch):
    model = RUNS["float32"]()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True, monitor="val_loss")
    record = fit(model, SwapSlowWeights(swap_on_epoch), checkpoint)
    best = int(np.argmin(record.losses))
    loaded = keras.saving.load_model(tmp_path / "best.keras")
    assert_same_bits(loaded.trainable_variables, record.slow[best])
    assert loaded.evaluate(*VALIDATION, batch_size=8, verbose=0) == record.losses[best]
    other = RUNS["float32"]()
    fit(other)
    assert_same_bits(resuming.state(model), resuming.state(other))
    fit(loaded, SwapSlowWeights(swap_on_epoch=True), epochs=1)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
@pytest.mark.parametrize("swap_first", [False, True])
def test_early_stopping_restores_the_slow_weights_of_the_best_epoch(swap_on_epoch, swap_first):
    swap = SwapSlowWeights(swap_on_epoch)
    worst = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=1, restore_best_weights=True)
    model = RUNS["float32"]()
    record = fit(model, *([swap, worst] if swap_first else [worst, swap]), epochs=4)
    assert len(record.losses) == 2
    assert worst.best_epoch == 0
    assert_same_bits(model.trainable_variables, record.slow[0])
    lookahead = model.optimizer
    assert_same_bits(lookahead.slow_variables, record.slow[1])
    lookahead.reset_slow_weights()
    with lookahead.slow_weights():
        assert_same_bits(model.trainable_variables, record.slow[0])


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_with_ema_inside_the_model_ends_with_the_ema_as_without_the_callback(swap_on_epoch):
    def make():
        inner = keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.8)
        return compiled(Lookahead(inner, 5))

    model, other = make(), make()
    record = fit(model, SwapSlowWeights(swap_on_epoch), epochs=2)
    plain = fit(other, epochs=2)
    assert_same_bits(record.fast[-1], plain.fast[-1])
    assert_same_bits(resuming.state(model), resuming.state(other))
    assert_same_bits(model.trainable_variables, model.optimizer.inner_optimizer._model_variables_moving_average)
    assert any(not np.array_equal(one, other) for one, other in zip(values(model.trainable_variables), record.fast[-1]))


def test_the_callback_refuses_a_model_without_lookahead():
    model = compiled("adam")
    message = "needs a model compiled with a `lookahead_optim.keras.Lookahead` optimizer. Received: model.optimizer="
    with pytest.raises(ValueError, match=message):
        model.evaluate(*VALIDATION, verbose=0, callbacks=[SwapSlowWeights()])
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, verbose=0, callbacks=[SwapSlowWeights(swap_on_epoch=True)])


class _Interrupt(keras.callbacks.Callback):
    def on_test_batch_begin(self, batch, logs=None):
        raise KeyboardInterrupt


def _interrupted_in_validation():
    x, y = data()
    model = mlp()
    model.compile(Lookahead(keras.optimizers.SGD(0.05), sync_period=4), loss="mse")
    model.fit(x, y, shuffle=False, verbose=0)
    fast = values(model.trainable_variables)
    callbacks = [SwapSlowWeights(), _Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(x, y, callbacks=callbacks, verbose=0)
    assert_same_bits(model.optimizer.slow_variables, model.trainable_variables)
    assert any((one != other).any() for one, other in zip(values(model.trainable_variables), fast))
    return model, callbacks


def test_after_an_interrupted_evaluation_the_next_fit_goes_on_from_the_fast_weights():
    x, y = data()
    straight = mlp()
    straight.compile(Lookahead(keras.optimizers.SGD(0.05), sync_period=4), loss="mse")
    straight.fit(x, y, epochs=3, shuffle=False, verbose=0)
    model, callbacks = _interrupted_in_validation()
    model.fit(x, y, epochs=2, shuffle=False, callbacks=[SwapSlowWeights()], verbose=0)
    assert callbacks
    assert_same_bits(model.trainable_variables, straight.trainable_variables)


def test_ending_a_block_after_training_in_it_keeps_the_trained_weights_and_warns():
    model, callbacks = _interrupted_in_validation()
    optimizer = model.optimizer
    optimizer._iterations.assign_add(1)
    trained = values(model.trainable_variables)
    with pytest.warns(UserWarning, match=r"It keeps the weights that this training gave it"):
        optimizer.finalize_variable_values(model.trainable_variables)
    del callbacks
    assert_same_bits(model.trainable_variables, trained)
