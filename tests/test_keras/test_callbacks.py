"""Callbacks that put other weights into the model for an evaluation, beside `SwapSlowWeights`."""

import itertools

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, SwapSlowWeights
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, data, differ, values


class UserSwap(keras.callbacks.Callback):
    """Keeps the weights, sets others, and puts the kept weights back."""

    def __init__(self, on_epoch=False):
        super().__init__()
        self.on_epoch, self.kept = on_epoch, None

    def swap_in(self):
        self.kept = self.model.get_weights()
        self.model.set_weights([np.full_like(weight, 0.25) for weight in self.kept])

    def swap_out(self):
        if self.kept is not None:
            self.model.set_weights(self.kept)
            self.kept = None

    def on_test_begin(self, logs=None):
        self.swap_in()

    def on_test_end(self, logs=None):
        self.swap_out()

    on_predict_begin, on_predict_end = on_test_begin, on_test_end

    def on_epoch_end(self, epoch, logs=None):
        if self.on_epoch:
            self.swap_in()

    def on_epoch_begin(self, epoch, logs=None):
        self.swap_out()


def make(callback):
    return {
        "ours": SwapSlowWeights,
        "ours, epoch": lambda: SwapSlowWeights(swap_on_epoch=True),
        "ema": keras.callbacks.SwapEMAWeights,
        "ema, epoch": lambda: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        "user": UserSwap,
        "user, epoch": lambda: UserSwap(on_epoch=True),
    }[callback]()


def train(callbacks=(), use_ema=True, batches=7, epochs=3, **kwargs):
    """Return a model after a training with validations, and the training losses."""
    x, y = data(8 * batches)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    inner = keras.optimizers.SGD(0.02, momentum=0.5, use_ema=use_ema, ema_momentum=0.9)
    kwargs |= {"jit_compile": False} if BACKEND == "tensorflow" else {}
    model.compile(Lookahead(inner, sync_period=5), loss="mse", **kwargs)
    history = model.fit(x, y, 8, epochs, validation_data=(x, y), callbacks=list(callbacks), shuffle=False, verbose=0)
    return model, history.history["loss"]


def state(model):
    return values([*model.weights, *model.optimizer.variables])


def assert_trains_as_without(callbacks, exact, **kwargs):
    model, losses = train(map(make, callbacks), **kwargs)
    # `SwapEMAWeights(swap_on_epoch=True)` leaves the average in the model, and itself, at the end of the training.
    alone = [callback for callback in callbacks if callback.startswith("ema")]
    other, expected = train(map(make, alone), **kwargs)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, right in zip(state(model), state(other), strict=True):
        if exact:
            assert one.tobytes() == right.tobytes()
        np.testing.assert_allclose(one, right, rtol=1e-5, atol=1e-6)


# As many batches as a cycle: fast and slow weights are equal at the end of each epoch.
BATCHES = [7, 5]
BESIDE_AVERAGES = [
    *itertools.permutations(["ours", "ema"]),
    *itertools.permutations(["ours, epoch", "ema"]),
    *itertools.permutations(["ours", "ema, epoch"]),
    *itertools.permutations(["ours, epoch", "ema, epoch"]),
    ("ours", "ours"),
    *itertools.permutations(["ours", "ours, epoch"]),
    ("ours", "ema", "ours"),
    ("ema", "ours", "ours, epoch"),
]
BESIDE_A_USERS_OWN = [
    *itertools.permutations(["ours", "user"]),
    *itertools.permutations(["ours, epoch", "user"]),
    *itertools.permutations(["ours", "user, epoch"]),
    *itertools.permutations(["ours, epoch", "user, epoch"]),
    ("ours", "user", "ours"),
]


def comes_after_another(callbacks):
    """Return whether a callback of this package is not before all others."""
    return "ours" in " ".join(itertools.dropwhile(lambda name: name.startswith("ours"), callbacks))


def allowed(combinations):
    """Return the combinations, with the numbers of batches for which they are not refused."""
    return [
        (callbacks, batches)
        for callbacks, batches in itertools.product(combinations, BATCHES)
        if batches != 5 or not comes_after_another(callbacks)
    ]


@pytest.mark.parametrize(("callbacks", "batches"), allowed(BESIDE_AVERAGES), ids=str)
def test_training_is_as_without_it_beside_averages_and_its_like(callbacks, batches):
    # TensorFlow exchanges averages by addition and subtraction.
    exact = BACKEND != "tensorflow" or not any("ema" in callback for callback in callbacks)
    assert_trains_as_without(callbacks, exact, batches=batches)


@pytest.mark.parametrize(("callbacks", "batches"), allowed(BESIDE_A_USERS_OWN), ids=str)
def test_training_is_as_without_it_beside_callbacks_that_keep_and_restore(callbacks, batches):
    # After the last epoch some of these would end with weights that the user's callback keeps.
    epochs = UntilLastEpoch(2)
    model, losses = train([*map(make, callbacks), epochs], use_ema=False, batches=batches)
    other, expected = train([again := UntilLastEpoch(2)], use_ema=False, batches=batches)
    np.testing.assert_array_equal(losses, expected)
    assert_same_bits(epochs.state, again.state)
    assert_same_bits(model.optimizer.variables, other.optimizer.variables)


class UntilLastEpoch(keras.callbacks.Callback):
    """Records the state after the last batch of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.is_last = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.is_last:
            self.state = state(self.model)


class AtEnd(keras.callbacks.Callback):
    """Compares the weights in the model with the slow weights at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.are_slow = []

    def on_epoch_end(self, epoch, logs=None):
        self.are_slow.append(not differ(self.model.trainable_variables, self.model.optimizer.slow_variables))


@pytest.mark.parametrize("callbacks", [("ours", "user"), ("ours", "ema"), ("user", "ours"), ("ema", "ours")], ids=str)
def test_callbacks_after_it_find_the_slow_weights_at_the_end_of_an_epoch_beside_others_too(callbacks):
    at_end = AtEnd()
    train([*map(make, callbacks), at_end])
    assert at_end.are_slow == [True] * 3


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("method", ["evaluate", "predict"])
@pytest.mark.parametrize("callbacks", [("user", "ours"), ("ema", "ours"), ("ours", "ema"), ("ours", "ours")], ids=str)
def test_an_evaluation_leaves_the_model_as_without_it(callbacks, method, batches):
    arguments = data(8) if method == "evaluate" else data(8)[:1]
    model, _ = train(batches=batches, epochs=1)
    other, _ = train(batches=batches, epochs=1)
    # `fit` has put the average into the model. Set other fast weights.
    for one in (model, other):
        one.set_weights([weight + 1 for weight in one.get_weights()])
    getattr(model, method)(*arguments, callbacks=list(map(make, callbacks)), verbose=0)
    # `SwapEMAWeights` does not put the weights back after `predict`.
    others = [make(callback) for callback in callbacks if callback != "ours"]
    getattr(other, method)(*arguments, callbacks=others, verbose=0)
    for one, right in zip(state(model), state(other), strict=True):
        np.testing.assert_allclose(one, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
@pytest.mark.parametrize("callbacks", list(itertools.permutations(["ours", "user"])), ids=str)
def test_an_evaluation_beside_a_callback_that_keeps_and_restores_changes_nothing(callbacks, method):
    model, _ = train(use_ema=False)
    before = state(model)
    arguments = data(8) if method == "evaluate" else data(8)[:1]
    getattr(model, method)(*arguments, callbacks=list(map(make, callbacks)), verbose=0)
    assert_same_bits(state(model), before)


REFUSED = [callbacks for callbacks in BESIDE_AVERAGES + BESIDE_A_USERS_OWN if comes_after_another(callbacks)]
FIRST = "`SwapSlowWeights` must come before the other callbacks in `callbacks`"


@pytest.mark.parametrize("callbacks", REFUSED, ids=str)
def test_where_fast_and_slow_weights_are_equal_it_refuses_to_be_second_before_anything_is_lost(callbacks):
    """This is at the end of each epoch.

    There nothing tells whether the other callback has put the fast weights back.
    """
    use_ema = any("ema" in callback for callback in callbacks)
    made = list(map(make, callbacks))
    models = []
    with pytest.raises(RuntimeError, match=FIRST):
        train([Keep(models), *made], use_ema=use_ema, batches=5)
    other, _ = train(use_ema=use_ema, batches=5, epochs=1)
    optimizer, right = models[0].optimizer, other.optimizer.slow_variables
    # The fast weights are the weights of the last sync, and the other callback has them too.
    assert_same_bits(optimizer.slow_variables, right)
    kept = [one.kept for one in made if isinstance(one, UserSwap)]
    if kept:
        assert_same_bits(kept[0], right)
    else:
        for average, slow in zip(values(optimizer._model_variables_moving_average), values(right), strict=True):
            np.testing.assert_allclose(average, slow, rtol=1e-6, atol=1e-6 * (BACKEND == "tensorflow"))
    with optimizer.slow_weights():
        assert_same_bits(models[0].trainable_variables, right)


class Keep(keras.callbacks.Callback):
    """Keeps the model for use after an error."""

    def __init__(self, models):
        super().__init__()
        self.models = models

    def on_train_begin(self, logs=None):
        self.models.append(self.model)


def test_weights_that_were_set_by_hand_after_a_sync_come_back_after_an_evaluation():
    model, _ = train(use_ema=False, batches=5)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    before = state(model)
    model.evaluate(*data(8), callbacks=[SwapSlowWeights()], verbose=0)
    assert_same_bits(state(model), before)


@pytest.mark.parametrize("batches", BATCHES)
def test_the_slow_weights_are_what_is_evaluated(batches):
    model, _ = train(use_ema=False, batches=batches)
    with model.optimizer.slow_weights():
        expected = model.evaluate(*data(8), verbose=0)
    assert model.evaluate(*data(8), callbacks=[SwapSlowWeights()], verbose=0) == expected
    assert model.evaluate(*data(8), callbacks=[SwapSlowWeights(), UserSwap()], verbose=0) == expected
    second = [UserSwap(), SwapSlowWeights()]
    if batches == 7:
        assert model.evaluate(*data(8), callbacks=second, verbose=0) == expected
    else:
        with pytest.raises(RuntimeError, match=FIRST):
            model.evaluate(*data(8), callbacks=second, verbose=0)


@pytest.mark.parametrize("call", ["sync", "reset_slow_weights"])
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_after_a_sync_or_a_reset_by_hand_it_refuses_to_be_second_too(method, call):
    model, _ = train(use_ema=False)
    optimizer = model.optimizer
    model.fit(*data(8), batch_size=8, verbose=0)
    assert int(optimizer.iterations) % optimizer.sync_period
    getattr(optimizer, call)()
    arguments = data(8) if method == "evaluate" else data(8)[:1]
    before = state(model)
    with pytest.raises(RuntimeError, match=FIRST):
        getattr(model, method)(*arguments, callbacks=[make("user"), make("ours")], verbose=0)
    model.fit(*data(8), batch_size=8, verbose=0)
    assert len(before) == len(state(model))
    before = state(model)
    getattr(model, method)(*arguments, callbacks=[make("user"), make("ours")], verbose=0)
    assert_same_bits(state(model), before)


CALLS = {
    "sync": lambda model: model.optimizer.sync(),
    "reset": lambda model: model.optimizer.reset_slow_weights(),
    "set": lambda model: model.optimizer.set_weights(model.optimizer.get_weights()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ours", [0, 1])
def test_a_callback_may_change_the_optimizer_at_the_end_of_an_epoch(call, ours):
    class Changes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            CALLS[call](self.model)

    callbacks = [Changes()]
    callbacks.insert(ours, SwapSlowWeights())
    (model, losses), (right, right_losses) = train(callbacks, use_ema=False), train([Changes()], use_ema=False)
    assert losses == right_losses
    assert_same_bits(state(model), state(right))


def test_weights_that_a_callback_loads_at_the_end_of_an_epoch_are_captured_by_its_reset():
    class Loads(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.set_weights([np.full_like(weight, 0.25) for weight in self.model.get_weights()])
            self.model.optimizer.reset_slow_weights()

    results = [train([*more, Loads()], use_ema=False) for more in ([], [SwapSlowWeights()])]
    assert results[0][1] == results[1][1]
    assert_same_bits(*(state(model) for model, _ in results))
