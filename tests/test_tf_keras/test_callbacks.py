"""Callbacks that swap beside each other: the training is the same as without them, in any order."""

import itertools

import pytest

from lookahead_optim.tf_keras import Lookahead, SwapSlowWeights
from lookahead_optim.tf_keras._keras import keras
from tests.comparison import assert_same_bits
from tests.test_tf_keras.resuming import compiled, data, state


class OwnAverage(keras.callbacks.Callback):
    """Keeps the weights, puts others in for the validation, and restores the kept weights."""

    def on_test_begin(self, logs=None):
        self.kept = self.model.get_weights()
        self.model.set_weights([0.5 * weight for weight in self.kept])

    def on_test_end(self, logs=None):
        self.model.set_weights(self.kept)


KINDS = {
    "slow": SwapSlowWeights,
    "slow on epochs": lambda: SwapSlowWeights(swap_on_epoch=True),
    "own": OwnAverage,
}
# Two such callbacks of a user spoil the training by themselves.
PAIRS = [pair for pair in itertools.product(KINDS, KINDS) if pair != ("own", "own")]


def trained(*kinds, nested=False):
    optimizer = Lookahead(keras.optimizers.legacy.SGD(0.05, momentum=0.9), 3)
    model = compiled(Lookahead(optimizer, 7) if nested else optimizer)
    x, y = data()
    callbacks = [KINDS[kind]() for kind in kinds]
    history = model.fit(
        x, y, batch_size=8, epochs=3, shuffle=False, validation_data=(x, y), callbacks=callbacks, verbose=0
    )
    return history.history["loss"], state(model)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_training_with_two_callbacks_that_swap_is_the_training_without(kinds, nested):
    if kinds[0] == "own" and kinds[1] != "own" and not nested:
        # Each epoch ends with a sync. There nothing tells whether the user's callback has restored the weights.
        with pytest.raises(RuntimeError, match="`SwapSlowWeights` must come before the other callbacks"):
            trained(*kinds)
        return
    (loss, weights), (right_loss, right) = trained(*kinds, nested=nested), trained(nested=nested)
    assert loss == right_loss
    assert_same_bits(weights, right)


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

    results = []
    for has_ours in (False, True):
        callbacks = [Changes()]
        if has_ours:
            callbacks.insert(ours, SwapSlowWeights())
        model = compiled(Lookahead(keras.optimizers.legacy.SGD(0.05, momentum=0.9), 7))
        x, y = data()
        history = model.fit(
            x, y, batch_size=8, epochs=3, shuffle=False, validation_data=(x, y), callbacks=callbacks, verbose=0
        )
        results.append((history.history["loss"], model.get_weights()))
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])
