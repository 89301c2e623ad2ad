"""The model that callbacks keep is the model that was scored, and training resumes from it bit for bit."""

import itertools
import json

import keras
import numpy as np
import pytest

from lookahead_optim.keras import SwapSlowWeights
from tests import child_processes
from tests.comparison import assert_same_bits
from tests.test_keras import kept, resuming
from tests.test_keras.helpers import BACKEND, differ, find_lookahead, mlp, values

TIMEOUT = 300
# All orders of the four, with an early stop. Without it the best weights would be the last epoch's.
ORDERS = [
    *(("min", order) for order in itertools.permutations(["weights", "stopping", "backup", "swap"])),
    *(("max", order) for order in itertools.permutations(["model", "stopping", "swap"])),
]


def start(command, *arguments):
    return child_processes.start(kept, command, *arguments, KERAS_BACKEND=BACKEND, TF_CPP_MIN_LOG_LEVEL="3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the results of one training for each of `ORDERS`, with the score of the kept file in a new process."""
    directory = tmp_path_factory.mktemp("kept")
    model, plain = kept.make_model(), kept.LastBatch()
    weights, state = model.get_weights(), model.optimizer.get_weights()
    plain_losses = kept.fit(model, [plain])
    found = {}
    for mode, order in ORDERS:
        model.set_weights(weights)
        model.optimizer.set_weights(state)
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
    # `EarlyStopping(restore_best_weights=True)`.
    assert_same_bits(run["end"], last.slow[best])
    assert_same_bits(last.states, plain.states[: len(losses)])


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


KILLED = ["backup-stopping-swap-weights", "weights-swap-backup-stopping"]


@pytest.mark.parametrize("order", KILLED)
def test_backup_and_restore_resumes_bit_for_bit_from_a_backup_with_the_slow_weights_in_the_model(resumed_runs, order):
    directory = resumed_runs / order
    straight, last = kept.make_model(), kept.LastBatch()
    losses = kept.fit(straight, [last, *kept.callbacks(["swap", "stopping"], directory, "max")])
    assert json.loads((directory / "losses.json").read_text()) == losses[kept.KILLED_IN :]
    assert_same_bits(resuming.read(directory / "last.npz"), last.states[-1])
    assert_same_bits(resuming.read(directory / "end.npz"), resuming.state(straight))


class Look(keras.callbacks.Callback):
    """Keeps the weights at the end of every epoch and at the first batch."""

    def __init__(self):
        super().__init__()
        self.ends, self.begins = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(values(self.model.trainable_variables))

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
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
    assert_same_bits(looks[1].begins[1:], last.fast[:3])
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


def stopped(directory, make=kept.adam, **compile_args):
    """Return a model in mid-cycle, saved with the slow weights in it, and how its training would continue."""
    model, last = kept.make_model(make, **compile_args), kept.LastBatch()
    kept.fit(model, [last], 2)
    with find_lookahead(model.optimizer).slow_weights():
        model.save(directory / "model.keras")
        model.save_weights(directory / "model.weights.h5")
    kept.fit(model, [last], 3, initial_epoch=2)
    return model, last


def resume(model, callbacks=(), **kwargs):
    """Train the third epoch and return the state at its end."""
    last = kept.LastBatch()
    kept.fit(model, [last, *callbacks], 3, initial_epoch=2, **kwargs)
    return last.states[0]


@pytest.mark.parametrize("make", [kept.adam, kept.loss_scaled, kept.nested])
@pytest.mark.parametrize("form", ["model.keras", "model.weights.h5"])
def test_a_file_saved_in_a_block_has_the_slow_weights_and_resumes_with_the_callback_bit_for_bit(tmp_path, form, make):
    model, last = stopped(tmp_path, make)
    if form == "model.keras":
        loaded = keras.saving.load_model(tmp_path / form)
    else:
        loaded = kept.make_model(make)
        loaded.load_weights(tmp_path / form)
    assert_same_bits(loaded.trainable_variables, last.slow[1])
    # None of this is training: it uses the slow weights, and does not move the fast weights.
    with find_lookahead(loaded.optimizer).slow_weights():
        assert_same_bits(loaded.trainable_variables, last.slow[1])
    assert kept.score(loaded) == loaded.evaluate(
        *kept.VALIDATION, batch_size=8, callbacks=[SwapSlowWeights()], verbose=0
    )
    assert_same_bits(loaded.trainable_variables, last.slow[1])
    # Saved again, it is the same file.
    loaded.save_weights(tmp_path / "again.weights.h5")
    loaded.load_weights(tmp_path / "again.weights.h5")
    assert_same_bits(resume(loaded, [SwapSlowWeights()]), last.states[2])
    assert_same_bits(loaded.trainable_variables, model.trainable_variables)


def load_a_file_without(model, directory):
    model.load_weights(directory / "plain.weights.h5")


def set_state(model, directory):
    model.optimizer.set_weights(model.optimizer.get_weights())


def set_weights(model, directory):
    model.set_weights(mlp(seed=5).get_weights())


def train_up_to_a_sync(model, directory):
    x, y = kept.data(8)
    # Fast and slow weights are equal then, as they are after loading.
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
    model.save_weights(tmp_path / "plain.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    end(model, tmp_path)
    weights, look = values(model.trainable_variables), Look()
    kept.fit(model, [SwapSlowWeights(), look], 1)
    assert_same_bits(look.begins[0], weights)


def test_training_without_the_callback_starts_from_the_slow_weights_of_the_file(tmp_path):
    _, last = stopped(tmp_path)
    model, other = (keras.saving.load_model(tmp_path / "model.keras") for _ in range(2))
    look = Look()
    state = resume(model, [look])
    assert_same_bits(look.begins[0], last.slow[1])
    assert differ(state, last.states[2])
    find_lookahead(other.optimizer)._block.loaded = {}
    assert_same_bits(resume(other, [SwapSlowWeights()]), state)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_fit_that_was_interrupted_at_the_end_of_an_epoch_goes_on_bit_for_bit(tmp_path, is_saved):
    _, last = stopped(tmp_path)
    model = kept.make_model()
    with pytest.raises(KeyboardInterrupt):
        kept.fit(model, [SwapSlowWeights(), Interrupt()])
    # On JAX Keras ends a training that was interrupted.
    assert_same_bits(model.trainable_variables, (last.fast if BACKEND == "jax" else last.slow)[1])
    if is_saved:
        model.save(tmp_path / "interrupted.keras")
        model = keras.saving.load_model(tmp_path / "interrupted.keras")
    assert_same_bits(resume(model, [SwapSlowWeights()]), last.states[2])


@pytest.mark.parametrize("missing", ["fast_1", "fast_count"])
def test_a_file_that_lacks_a_part_of_the_fast_weights_is_another_optimizers(tmp_path, missing):
    model = kept.make_model()
    kept.fit(model, epochs=1)
    store = {}
    with model.optimizer.slow_weights():
        model.optimizer.save_own_variables(store)
    assert {name for name in store if name.startswith("fast")} == {"fast_count", *(f"fast_{i}" for i in range(4))}
    del store[missing]
    before = resuming.state(model)
    with pytest.warns(UserWarning, match="as what was saved is another optimizer's state"):
        model.optimizer.load_own_variables(store)
    del before[len(model.weights)]
    after = resuming.state(model)
    # The slow weights are captured again.
    assert after.pop(len(model.weights)) == 0
    assert_same_bits(after, before)


def test_a_file_that_was_saved_outside_of_a_block_has_no_fast_weights():
    model = kept.make_model()
    kept.fit(model, [SwapSlowWeights()], 1)
    store = {}
    model.optimizer.save_own_variables(store)
    assert set(store) == {"captured", *(f"slow_{index}" for index in range(4))}


def test_the_callback_names_the_front_end_of_keras_2_for_its_models():
    tf_keras = pytest.importorskip("tf_keras")
    model = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for call in (model.fit, model.evaluate):
        with pytest.raises(TypeError, match=r"For Keras 2 there is `lookahead_optim.tf_keras.SwapSlowWeights`\."):
            call(*kept.data(8), callbacks=[SwapSlowWeights()], verbose=0)
