"""The model that callbacks keep is the model that was scored, and training resumes from it bit for bit."""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import SwapSlowWeights
from lookahead_optim.tf_keras._keras import keras
from tests import child_processes
from tests.comparison import assert_same_bits
from tests.test_tf_keras import kept, resuming
from tests.test_tf_keras.resuming import mlp, values

TIMEOUT = 300
# All orders of the four, with an early stop. Without it the best weights would be the last epoch's.
ORDERS = [
    *(("min", order) for order in itertools.permutations(["weights", "stopping", "backup", "swap"])),
    *(("max", order) for order in itertools.permutations(["model", "stopping", "swap"])),
]


def start(command, *arguments):
    return child_processes.start(kept, command, *arguments, TF_CPP_MIN_LOG_LEVEL="3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the results of one training for each of `ORDERS`, with the score of the kept file in a new process."""
    directory = tmp_path_factory.mktemp("kept")
    model, plain = kept.make_model(), kept.LastBatch()
    resuming.build(model)
    weights, state = model.get_weights(), model.optimizer.get_weights()
    plain_losses = kept.fit(model, [plain])
    found = {}
    for mode, order in ORDERS:
        model.set_weights(weights)
        model.optimizer.set_weights(state)
        # Keras' `BackupAndRestore` deletes this at the end, but its `fit` needs it.
        model._training_state = None
        path = directory / mode / "-".join(order)
        path.mkdir(parents=True)
        last = kept.LastBatch()
        losses = kept.fit(model, [last, *kept.callbacks(order, path, mode)])
        found[mode, order] = {"losses": losses, "last": last, "end": values(model.trainable_variables)}
    child_processes.finish(start("scores", directory), TIMEOUT)
    for name, score in json.loads((directory / "scores.json").read_text()).items():
        mode, order = name.split("/")[:2]
        found[mode, tuple(order.split("-"))]["score"] = score
    return found, plain, plain_losses


@pytest.mark.parametrize(("mode", "order"), ORDERS, ids=lambda one: one if isinstance(one, str) else "-".join(one))
def test_whatever_the_order_of_callbacks_the_scored_weights_are_kept_and_training_is_as_without(runs, mode, order):
    found, plain, plain_losses = runs
    run = found[mode, order]
    losses, last = run["losses"], run["last"]
    best = (np.argmin if mode == "min" else np.argmax)(losses)
    assert (len(losses), best) == ((2, 0) if mode == "min" else (kept.EPOCHS, kept.EPOCHS - 1))
    assert losses[0] != plain_losses[0]
    # The best checkpoint.
    assert run["score"] == losses[best]
    # `EarlyStopping(restore_best_weights=True)`. In TensorFlow 2.15 it restores only if it stops the training.
    restores = mode == "min" or not tf.__version__.startswith("2.15.")
    assert_same_bits(run["end"], last.slow[best] if restores else last.fast[-1])
    assert_same_bits(last.states, plain.states[: len(losses)])


KILLED = ["backup-stopping-swap-weights", "weights-swap-backup-stopping"]


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory):
    """Return the directory of trainings that died in mid-epoch and were resumed, each in its own process."""
    directory = tmp_path_factory.mktemp("resumed")
    processes = [start("killed", directory, order) for order in KILLED]
    for process in processes:
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 9, output[-3000:]
    child_processes.finish(start("resumed", directory), TIMEOUT)
    return directory


@pytest.mark.parametrize("order", KILLED)
def test_backup_and_restore_resumes_bit_for_bit_from_a_backup_with_the_slow_weights_in_the_model(resumed_runs, order):
    directory = resumed_runs / order
    straight, last = kept.make_model(), kept.LastBatch()
    losses = kept.fit(straight, [last, *kept.callbacks(["swap", "stopping"], directory, "max")])
    assert json.loads((directory / "losses.json").read_text()) == losses[kept.KILLED_IN :]
    assert_same_bits(resuming.read(directory / "last.npz"), last.states[-1])
    assert_same_bits(resuming.read(directory / "end.npz"), resuming.state(straight))


class Look(keras.callbacks.Callback):
    """Keeps the weights at the end of every epoch, at its first batch, and at the end of the training."""

    def __init__(self):
        super().__init__()
        self.ends, self.begins = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(values(self.model.trainable_variables))

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.begins.append(values(self.model.trainable_variables))

    def on_train_end(self, logs=None):
        self.begins.append(values(self.model.trainable_variables))


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_all_callbacks_see_the_slow_weights_from_a_validation_until_training_goes_on(swap_on_epoch):
    model, last, looks = kept.make_model(), kept.LastBatch(), [Look(), Look()]
    # Only the second and the fourth epoch are validated.
    kept.fit(model, [last, looks[0], SwapSlowWeights(swap_on_epoch), looks[1]], 4, validation_freq=2)
    for before_or_after, look in enumerate(looks):
        for epoch in range(4):
            is_slow = epoch in (1, 3) or (swap_on_epoch and before_or_after == 1)
            assert_same_bits(look.ends[epoch], (last.slow if is_slow else last.fast)[epoch])
    assert_same_bits(looks[1].begins[1:], last.fast)
    # Before any callback ends the training.
    assert_same_bits(looks[0].begins[-1], last.fast[3])
    assert_same_bits(model.trainable_variables, last.fast[3])


class Change(keras.callbacks.Callback):
    """Puts other weights into the model at the end of the first epoch, for good."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.model.set_weights(self.weights)


@pytest.mark.parametrize("is_first", [True, False])
def test_training_goes_on_from_weights_that_a_callback_puts_into_the_model_at_the_end_of_an_epoch(is_first):
    model, look, new = kept.make_model(), Look(), mlp(seed=3).get_weights()
    callbacks = [Change(new), SwapSlowWeights()]
    kept.fit(model, [*(callbacks if is_first else callbacks[::-1]), look], 2)
    assert_same_bits(look.begins[1], new)


def stopped(directory, make=kept.adam, forms=("weights",)):
    """Return a model in mid-cycle, saved with the slow weights in it, and how its training would continue."""
    model, last = kept.make_model(make), kept.LastBatch()
    kept.fit(model, [last], 2)
    with kept.lookahead_of(model).slow_weights():
        for form in forms:
            resuming.save(model, directory / "stopped", form)
    kept.fit(model, [last], 3, initial_epoch=2)
    return model, last


def load(directory, form, make=kept.adam):
    path = directory / "stopped"
    if form == "h5":
        return keras.models.load_model(f"{path}.h5")
    model = kept.make_model(make, seed=3)
    if form == "saved_model":
        model.load_weights(f"{path}.saved_model/variables/variables").assert_existing_objects_matched()
    elif form == "weights":
        model.load_weights(f"{path}.weights").assert_consumed()
    else:
        resuming.checkpoint_of(model).read(f"{path}.{form}").assert_consumed()
    return model


def resume(model, callbacks=()):
    """Train the third epoch and return the state at its end."""
    last = kept.LastBatch()
    kept.fit(model, [last, *callbacks], 3, initial_epoch=2)
    return last.states[0]


@pytest.mark.parametrize(
    ("make", "forms"),
    [
        (kept.adam, ["h5", "weights", "checkpoint_built", "saved_model"]),
        (kept.loss_scaled, ["h5", "weights"]),
        (kept.nested, ["h5", "weights"]),
    ],
)
def test_a_file_saved_in_a_block_has_the_slow_weights_and_resumes_with_the_callback_bit_for_bit(tmp_path, make, forms):
    model, last = stopped(tmp_path, make, forms)
    for form in forms:
        loaded = load(tmp_path, form, make)
        assert_same_bits(loaded.trainable_variables, last.slow[1])
        # None of this is training: it uses the slow weights, and does not move the fast weights.
        with kept.lookahead_of(loaded).slow_weights():
            assert_same_bits(loaded.trainable_variables, last.slow[1])
        assert kept.score(loaded) == loaded.evaluate(
            *kept.VALIDATION, batch_size=8, callbacks=[SwapSlowWeights()], verbose=0
        )
        assert_same_bits(loaded.trainable_variables, last.slow[1])
        if form != "saved_model":
            # Saved again, it is the same file.
            resuming.save(loaded, tmp_path / "stopped", form)
            loaded = load(tmp_path, form, make)
        assert_same_bits(resume(loaded, [SwapSlowWeights()]), last.states[2])
        assert_same_bits(loaded.trainable_variables, model.trainable_variables)


def load_a_file_without(model, directory):
    model.load_weights(directory / "plain").assert_consumed()


def set_state(model, directory):
    model.optimizer.set_weights(model.optimizer.get_weights()[: -len(model.trainable_variables)])


def set_weights(model, directory):
    model.set_weights(mlp(seed=5).get_weights())


def train_up_to_a_sync(model, directory):
    # Fast and slow weights are equal then, as they are after loading.
    x, y = kept.data(8)
    while int(model.optimizer.iterations) % kept.SYNC_PERIOD:
        model.train_on_batch(x, y)


ENDED_BY = {
    "a file without fast weights": load_a_file_without,
    "its state set": set_state,
    "other weights": set_weights,
    "a sync by hand": lambda model, directory: model.optimizer.sync(),
    "a reset": lambda model, directory: model.optimizer.reset_slow_weights(),
    "training without the callback": train_up_to_a_sync,
}


@pytest.mark.parametrize("end", ENDED_BY.values(), ids=ENDED_BY)
def test_fast_weights_of_a_file_are_not_put_over_what_came_after_it(tmp_path, end):
    stopped(tmp_path)
    model = kept.make_model()
    kept.fit(model, epochs=1)
    # The step is compiled: no code of ours runs when it is made again.
    train_up_to_a_sync(model, tmp_path)
    model.save_weights(tmp_path / "plain")
    model.load_weights(tmp_path / "stopped.weights").assert_consumed()
    end(model, tmp_path)
    weights, look = values(model.trainable_variables), Look()
    kept.fit(model, [SwapSlowWeights(), look], 1)
    assert_same_bits(look.begins[0], weights)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def test_a_fit_that_was_interrupted_at_the_end_of_an_epoch_goes_on_bit_for_bit(tmp_path):
    _, last = stopped(tmp_path)
    model = kept.make_model()
    with pytest.raises(KeyboardInterrupt):
        kept.fit(model, [SwapSlowWeights(), Interrupt()])
    assert_same_bits(model.trainable_variables, last.slow[1])
    assert_same_bits(resume(model, [SwapSlowWeights()]), last.states[2])


def test_a_loop_that_calls_the_callbacks_itself_has_the_slow_weights_between_two_epochs():
    model = kept.make_model()
    kept.fit(model, epochs=1)
    fast, slow = values(model.trainable_variables), resuming.slow_of(model)
    callbacks = keras.callbacks.CallbackList([SwapSlowWeights()], model=model)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(1)
    model.evaluate(*kept.VALIDATION, callbacks=callbacks, verbose=0)
    callbacks.on_epoch_end(1)
    assert_same_bits(model.trainable_variables, slow)
    callbacks.on_train_end()
    assert_same_bits(model.trainable_variables, fast)


def test_state_and_slots_have_the_fast_weights_only_in_a_block():
    model = kept.make_model()
    kept.fit(model, [SwapSlowWeights()], 1)
    optimizer, names = model.optimizer, ["slow"]
    assert optimizer.get_slot_names() == names
    count, fast = len(optimizer.get_weights()), values(model.trainable_variables)
    with optimizer.slow_weights():
        assert optimizer.get_slot_names() == [*names, "fast"]
        assert_same_bits([optimizer.get_slot(one, "fast") for one in model.trainable_variables], fast)
        assert_same_bits(optimizer.get_weights()[count:], fast)
        with pytest.raises(
            RuntimeError, match=r"`set_weights\(weights\)` was called inside a `slow_weights\(\)` block"
        ):
            optimizer.set_weights(optimizer.get_weights())
    assert optimizer.get_slot_names() == names
    assert len(optimizer.get_weights()) == count
    with pytest.raises(KeyError):
        optimizer.get_slot(model.trainable_variables[0], "fast")


def test_the_callback_names_the_front_end_of_keras_3_for_its_models():
    keras_3 = pytest.importorskip("keras", "3")
    model = keras_3.Sequential([keras_3.Input((4,)), keras_3.layers.Dense(1)])
    model.compile("sgd", "mse")
    for call in (model.fit, model.evaluate):
        with pytest.raises(TypeError, match=r"For Keras 3 there is `lookahead_optim.keras.SwapSlowWeights`\."):
            call(*kept.data(8), callbacks=[SwapSlowWeights()], verbose=0)
