"""Saving, loading and continuing with Keras 2: in new processes, in every format with optimizer state, bit for bit."""

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras
from tests import child_processes
from tests.child_processes import finish, kill_when_reached
from tests.comparison import assert_same_bits
from tests.test_tf_keras import resuming
from tests.test_tf_keras.resuming import (
    CASES,
    FORMATS,
    OPTIMIZERS,
    STOPS,
    SYNC_PERIOD,
    compiled,
    fit,
    slow_of,
    state,
    values,
)

# Keras 2.15 on Python 3.11.
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange:DeprecationWarning")

TIMEOUT = 100
legacy = keras.optimizers.legacy


def differ(actual, expected):
    return any(np.any(one != other) for one, other in zip(actual, expected))


def start(*arguments):
    return child_processes.start(resuming, *arguments, TF_CPP_MIN_LOG_LEVEL="3")


class SaveAt(keras.callbacks.Callback):
    def __init__(self, name, directory):
        super().__init__()
        self.name, self.directory = name, directory

    def save(self, stop):
        for form in FORMATS:
            if (self.name, stop, form) in CASES:
                resuming.save(self.model, self.directory / f"{self.name}-{stop}", form)
        if self.name == "momentum" and stop in STOPS["momentum"]:
            self.manager.save()

    def on_train_begin(self, logs=None):
        if self.name == "momentum":
            checkpoint = resuming.checkpoint_of(self.model)
            self.manager = tf.train.CheckpointManager(checkpoint, str(self.directory / "manager"), max_to_keep=2)
        self.save(0)

    def on_train_batch_end(self, batch, logs=None):
        self.save(batch + 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory where the runs were saved and resumed, and the final states of runs that never stopped."""
    directory = tmp_path_factory.mktemp("saving")
    killed = start("killed", directory)
    try:
        for name, make in OPTIMIZERS.items():
            model = fit(compiled(make()), callbacks=[SaveAt(name, directory)])
            resuming.write(directory / f"{name}.npz", model)
        kill_when_reached(killed, directory / "reached", TIMEOUT)
    finally:
        killed.kill()
        killed.communicate()
    finish(start("resumed", directory), TIMEOUT)
    return directory


@pytest.mark.parametrize(("name", "stop", "form"), CASES)
def test_a_run_resumed_in_a_new_process_is_bit_for_bit_the_one_that_never_stopped(directory, name, stop, form):
    resumed = resuming.read(directory / f"{name}-{stop}-{form}.npz")
    assert_same_bits(resumed, resuming.read(directory / f"{name}.npz"))


@pytest.mark.parametrize("number", [0, 1], ids=["last but one", "latest"])
def test_a_checkpoint_manager_resumes_bit_for_bit(directory, number):
    assert_same_bits(resuming.read(directory / f"manager-{number}.npz"), resuming.read(directory / "momentum.npz"))


def test_backup_and_restore_resumes_a_killed_run_bit_for_bit(directory):
    model = fit(compiled(resuming.adam()), epochs=resuming.EPOCHS)
    assert (directory / "resumed_epochs").read_text().split() == ["2", "3"]
    assert 2 * resuming.BATCHES % SYNC_PERIOD, "the epoch must end in mid-cycle"
    assert_same_bits(resuming.read(directory / "backup.npz"), state(model))


@pytest.mark.parametrize("name", ["momentum", "nested"])
def test_saving_in_mid_cycle_changes_nothing(directory, name):
    assert_same_bits(state(fit(compiled(OPTIMIZERS[name]()))), resuming.read(directory / f"{name}.npz"))


@pytest.mark.parametrize("extension", ["keras", "saved_model"])
@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Lookahead(inner, 3)], ids=["bare", "wrapped"])
def test_load_model_on_a_format_without_legacy_optimizer_state_starts_the_optimizer_anew(tmp_path, extension, wrap):
    """`.keras`, and SavedModel for `load_model`. They keep only the config of a legacy optimizer, wrapped or not."""
    model = fit(compiled(wrap(legacy.Adam(0.02))), end=4)
    model.save(tmp_path / f"model.{extension}", save_format="tf" if extension == "saved_model" else None)
    loaded = keras.models.load_model(tmp_path / f"model.{extension}")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert int(loaded.optimizer.iterations) == 0
    fresh = compiled(wrap(legacy.Adam(0.02)))
    fresh.set_weights(model.get_weights())
    assert_same_bits(state(fit(loaded, begin=4)), state(fit(fresh, begin=4)))


def test_a_nested_wrapper_resumes_from_h5_bit_for_bit(tmp_path):
    model = fit(compiled(resuming.nested()), end=5)
    resuming.save(model, tmp_path / "model", "h5")
    resumed = resuming.resume("nested", tmp_path / "model", 5, "h5")
    assert_same_bits(state(resumed), state(fit(model, begin=5)))


@pytest.mark.parametrize("way", ["weights", "checkpoint", "set_weights"])
def test_loading_into_a_model_that_trained_on_replaces_its_whole_state(tmp_path, way):
    model = fit(compiled(resuming.nested()), end=5)
    model.save_weights(tmp_path / "weights")
    resuming.checkpoint_of(model).write(str(tmp_path / "checkpoint"))
    weights, optimizer_weights = model.get_weights(), model.optimizer.get_weights()
    never_stopped = state(fit(model, begin=5))
    fit(model, end=2)
    if way == "weights":
        model.load_weights(tmp_path / "weights").assert_consumed()
    elif way == "checkpoint":
        resuming.checkpoint_of(model).read(str(tmp_path / "checkpoint")).assert_consumed()
    else:
        model.set_weights(weights)
        model.optimizer.set_weights(optimizer_weights)
    assert_same_bits(state(fit(model, begin=5)), never_stopped)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", ["weights", "checkpoint"])
def test_slow_weights_sync_and_reset_act_after_a_restoration_before_the_first_step(tmp_path, form, name):
    def restored():
        other = compiled(OPTIMIZERS[name](), seed=3)
        if form == "weights":
            other.load_weights(tmp_path / "weights")
        else:
            resuming.checkpoint_of(other).read(str(tmp_path / "checkpoint"))
        return other

    model = fit(compiled(OPTIMIZERS[name]()), end=4)
    model.save_weights(tmp_path / "weights")
    resuming.checkpoint_of(model).write(str(tmp_path / "checkpoint"))
    other = restored()
    for one in (model, other):
        with one.optimizer.slow_weights():
            one.slow = one.get_weights()
        one.optimizer.sync()
    assert_same_bits(other.slow, model.slow)
    assert_same_bits(other.weights, model.weights)
    other = restored()
    other.set_weights([weight + 1 for weight in other.get_weights()])
    other.optimizer.reset_slow_weights()
    assert_same_bits(slow_of(other), other.trainable_variables)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", ["weights", "checkpoint_unbuilt"])
def test_after_a_restoration_the_weights_are_in_the_order_of_a_new_optimizer_and_hdf5_files_resume(
    tmp_path, form, name
):
    model = fit(compiled(OPTIMIZERS[name]()), end=4)
    resuming.save(model, tmp_path / "model", form)
    other, path = compiled(OPTIMIZERS[name](), seed=3), f"{tmp_path}/model.{form}"
    other.load_weights(path) if form == "weights" else resuming.checkpoint_of(other).read(path)
    for one in (model, other):
        fit(one, begin=4, end=5)
    assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())
    resuming.save(other, tmp_path / "again", "h5")
    again = keras.models.load_model(tmp_path / "again.h5")
    assert_same_bits(state(fit(again, begin=5)), state(fit(model, begin=5)))


@pytest.mark.parametrize("setting", ["Nadam", "Ftrl", "Adagrad", "Adadelta", "Adamax"])
def test_the_order_after_a_restoration_is_that_of_every_inner_optimizer(tmp_path, setting):
    def make(seed):
        return compiled(Lookahead(getattr(legacy, setting)(0.02), 3), seed=seed)

    model = fit(make(0), end=4)
    model.save_weights(tmp_path / "weights")
    other = make(3)
    other.load_weights(tmp_path / "weights")
    for one in (model, other):
        fit(one, begin=4, end=5)
    assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())


def test_another_period_keeps_the_state(tmp_path):
    model = fit(compiled(Lookahead(legacy.Adam(0.02), 3)), end=4)
    model.save_weights(tmp_path / "weights")
    other = fit(compiled(Lookahead(legacy.Adam(0.02), 5), seed=3), end=1)
    other.load_weights(tmp_path / "weights").assert_consumed()
    assert_same_bits(state(other), state(model))


def loss_scaled(seed=0):
    inner = Lookahead(legacy.Adam(0.02), SYNC_PERIOD)
    scaler = keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=64.0, dynamic_growth_steps=3)
    return compiled(scaler, seed=seed)


@pytest.mark.parametrize("skipped", [False, True], ids=["", "after a skipped step"])
@pytest.mark.parametrize("form", ["h5", "weights", "checkpoint_built", "checkpoint_unbuilt"])
def test_a_loss_scaled_run_resumes_bit_for_bit(tmp_path, form, skipped):
    model = loss_scaled()
    if skipped:
        model.train_on_batch(resuming.data(8)[0], np.full((8, 1), np.inf))
    resuming.save(fit(model, end=4), tmp_path / "model", form)
    path = f"{tmp_path}/model.{form}"
    if form == "h5":
        other = keras.models.load_model(path)
    else:
        other = loss_scaled(seed=3)
        if form == "checkpoint_built":
            resuming.build(other)
        status = other.load_weights(path) if form == "weights" else resuming.checkpoint_of(other).read(path)
    for one in (model, other):
        fit(one, begin=4)
    if form != "h5":
        status.assert_consumed()
    assert_same_bits(state(other), state(model))
    assert_same_bits(other.optimizer.get_weights()[-1:], [np.int64(10)])
    # HDF5 files do not have the scale.
    assert form == "h5" or float(other.optimizer.loss_scale) == float(model.optimizer.loss_scale) == 512.0 / 2**skipped


@pytest.mark.parametrize("form", ["set_weights", "weights", "checkpoint_unbuilt"])
def test_a_state_counted_by_iterations_goes_on_in_mid_cycle_under_a_loss_scaler(tmp_path, form):
    """TensorFlow Addons writes such a state."""
    model = fit(compiled(Lookahead(legacy.Adam(0.02), SYNC_PERIOD)), end=4)
    other, path = loss_scaled(seed=3), f"{tmp_path}/model.{form}"
    if form == "set_weights":
        resuming.build(other)
        other.set_weights(model.get_weights())
        other.optimizer.set_weights(model.optimizer.get_weights())
    else:
        resuming.save(model, tmp_path / "model", form)
        status = other.load_weights(path) if form == "weights" else resuming.checkpoint_of(other).read(path)
    for one in (model, other):
        fit(one, begin=4)
    if form != "set_weights":
        status.expect_partial()
    assert_same_bits(slow_of(other, other.optimizer.inner_optimizer), slow_of(model))
    assert_same_bits(other.trainable_variables, model.trainable_variables)


BUILT = pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])


@BUILT
@pytest.mark.parametrize("make", [lambda: legacy.SGD(0.05, momentum=0.9), lambda: legacy.Adam(0.02)])
def test_a_bare_optimizers_slots_load_into_the_inner_one_and_the_slow_weights_start_from_its_weights(
    tmp_path, make, built
):
    saved = fit(compiled(make()), end=5)
    path = resuming.checkpoint_of(saved).write(str(tmp_path / "checkpoint"))
    model = compiled(Lookahead(make(), 3), seed=3)
    if built:
        resuming.build(model)
    inner = model.optimizer.inner_optimizer
    tf.train.Checkpoint(model=model, optimizer=inner).read(path).expect_partial()
    resuming.build(model)
    for slot in saved.optimizer.get_slot_names():
        for one, other in zip(model.trainable_variables, saved.trainable_variables):
            assert_same_bits([inner.get_slot(one, slot)], [saved.optimizer.get_slot(other, slot)])
    loaded = values(saved.trainable_variables)
    assert_same_bits(model.trainable_variables, loaded)
    fit(model, begin=5, end=6)
    assert_same_bits(slow_of(model), loaded)
    if isinstance(inner, legacy.SGD):
        fit(saved, begin=5, end=6)
        assert_same_bits(model.trainable_variables, saved.trainable_variables)


@BUILT
@pytest.mark.parametrize("form", ["h5", "weights", "checkpoint_built"])
def test_after_loading_a_file_with_a_bare_optimizer_the_slow_weights_start_from_its_weights(tmp_path, form, built):
    saved = fit(compiled(legacy.Adam(0.02)), end=4)
    resuming.save(saved, tmp_path / "model", form)
    model = compiled(Lookahead(legacy.Adam(0.02), 3), seed=3)
    if built:
        resuming.build(model)
    if form == "checkpoint_built":
        status = resuming.checkpoint_of(model).read(f"{tmp_path}/model.{form}")
    else:
        status = model.load_weights(f"{tmp_path}/model.{form}")
    if status is not None:
        status.expect_partial()
    assert_same_bits(model.trainable_variables, saved.trainable_variables)
    fit(model, begin=4, end=5)
    assert_same_bits(slow_of(model), saved.trainable_variables)


def test_an_exported_program_of_steps_trains_as_the_one_it_came_from(tmp_path):
    module = tf.Module()
    module.variable = tf.Variable([1.0, -2.0])
    module.optimizer = Lookahead(legacy.SGD(0.1, momentum=0.5), 2, 0.25)

    @tf.function(input_signature=[])
    def step():
        module.optimizer.apply_gradients([(3.0 * module.variable, module.variable)])
        return module.variable.read_value()

    module.step = step
    step()
    tf.saved_model.save(module, str(tmp_path))
    exported = tf.saved_model.load(str(tmp_path))
    for _ in range(5):
        np.testing.assert_array_equal(exported.step(), step())
