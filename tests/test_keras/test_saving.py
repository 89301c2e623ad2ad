"""Saving, loading and continuing: in new processes, on other backends; configs, copies and foreign checkpoints."""

import copy
import importlib.util
import pickle

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests import child_processes
from tests.child_processes import finish, kill_when_reached
from tests.comparison import assert_same_bits
from tests.test_keras import resuming
from tests.test_keras.helpers import BACKEND, find_lookahead, mlp, values

OTHERS = sorted({"jax", "tensorflow", "torch"} - {BACKEND})
if not hasattr(keras.optimizers, "MultiOptimizer"):
    # Keras 3.10 compiles its models on PyTorch. That fails in old versions of PyTorch.
    OTHERS = [name for name in OTHERS if name != "torch"]
SAVED_AT = {"momentum": [4, 5, 6, 7], "outer": [6, 7, 8], "accumulated": [5, 6]}
MOVED = ["momentum", "outer"]
RUNS = {name: SAVED_AT.get(name, [6]) for name in resuming.optimizers()}
TIMEOUT = 300
# Compiling every model is slow on TensorFlow and PyTorch, every operation on JAX.
EAGERLY = BACKEND != "jax"


def start(*arguments, backend=BACKEND):
    return child_processes.start(resuming, *arguments, KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory where the runs were saved and resumed, and the final states of runs that never stopped."""
    directory = tmp_path_factory.mktemp("saving")
    killed = start("killed", directory)
    try:
        for name, stops in RUNS.items():
            model = resuming.make_model(name)
            counts = []

            class Save(keras.callbacks.Callback):
                def on_train_batch_end(self, batch, logs=None, name=name, stops=stops, counts=counts):
                    if batch + 1 in stops:
                        self.model.save(directory / f"{name}-{batch + 1}.keras")
                        counts.append(int(self.model.optimizer.iterations))
                        if name == "adam":
                            self.model.save_weights(directory / "adam.weights.h5")
                            if BACKEND == "tensorflow":
                                import tensorflow as tf

                                checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.model.optimizer)
                                checkpoint.save(str(directory / "tensorflow"))

            resuming.write(directory / f"{name}.npz", resuming.fit(model, callbacks=[Save()]))
            assert name == "momentum" or any(count % 4 for count in counts)
        kill_when_reached(killed, directory / "reached", TIMEOUT)
    finally:
        killed.kill()
    children = [start("resumed", directory)]
    for backend in OTHERS:
        if importlib.util.find_spec(backend):
            paths = [
                path
                for name in MOVED
                for path in (directory / f"{name}-{resuming.STOPPED_AT}.keras", directory / f"{name}-{backend}.npz")
            ]
            children.append(start("moved", *paths, backend=backend))
    for child in children:
        finish(child, TIMEOUT)
    return directory


@pytest.mark.parametrize(("name", "stop"), [(name, stop) for name, stops in RUNS.items() for stop in stops])
def test_a_saved_model_resumes_in_a_new_process_bit_for_bit(directory, name, stop):
    resumed = resuming.read(directory / f"{name}-{stop}.npz")
    assert_same_bits(resumed, resuming.read(directory / f"{name}.npz"))


@pytest.mark.parametrize("name", ["momentum", "loss_scaled"])
def test_saving_in_mid_cycle_changes_nothing(directory, name):
    model = resuming.fit(resuming.make_model(name))
    assert_same_bits(resuming.state(model), resuming.read(directory / f"{name}.npz"))


def test_saved_weights_resume_in_a_new_process_bit_for_bit(directory):
    assert_same_bits(resuming.read(directory / "adam.weights.npz"), resuming.read(directory / "adam.npz"))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the format is TensorFlow's")
@pytest.mark.parametrize("when", ["built", "unbuilt"])
def test_a_tensorflow_checkpoint_resumes_in_a_new_process_bit_for_bit(directory, when):
    assert_same_bits(resuming.read(directory / f"tensorflow-{when}.npz"), resuming.read(directory / "adam.npz"))


def test_model_checkpoint_resumes_a_killed_run_bit_for_bit(directory):
    model = resuming.fit(resuming.make_model("loss_scaled"), epochs=3)
    assert int(model.optimizer.iterations) < 3 * resuming.BATCHES
    assert_same_bits(resuming.read(directory / "checkpoint.npz"), resuming.state(model))


def test_backup_and_restore_resumes_a_killed_run_bit_for_bit(directory):
    """Keras restarts the interrupted epoch, the second, from the backup in its middle."""
    model = resuming.fit(resuming.make_model("loss_scaled"))
    resuming.fit(model, end=resuming.SAVED_LAST_AT - resuming.BATCHES)
    assert int(model.optimizer.iterations) % 4
    assert_same_bits(resuming.read(directory / "restored.npz"), resuming.state(model))
    resuming.fit(model, epochs=2)
    assert_same_bits(resuming.read(directory / "backup.npz"), resuming.state(model))


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("backend", OTHERS)
def test_a_model_saved_here_goes_on_on_another_backend(directory, backend, name):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    moved = resuming.read(directory / f"{name}-{backend}.npz")
    stayed = resuming.read(directory / f"{name}.npz")
    assert len(moved) == len(stayed)
    # The model in float16 has three digits.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "momentum" else {"rtol": 1e-2, "atol": 1e-2}
    for one, other in zip(moved, stayed):
        assert (one.shape, one.dtype.kind) == (other.shape, other.dtype.kind)
        assert one.dtype == other.dtype or one.dtype.kind == "i"
        np.testing.assert_allclose(one, other, **tolerance)


def test_loading_needs_the_import_and_says_so(directory):
    message = (directory / "not_imported.txt").read_text()
    assert "Could not locate class 'Lookahead'" in message
    assert "lookahead_optim>Lookahead" in message


@pytest.mark.parametrize("name", ["momentum", "accumulated"])
@pytest.mark.parametrize("way", ["load_weights", "set_weights", "assign"])
def test_loading_into_a_model_that_trained_on_replaces_its_whole_state(tmp_path, name, way):
    """On PyTorch the host remembers the step count, and must read it again."""
    model = resuming.fit(resuming.make_model(name), end=5)
    model.save_weights(tmp_path / "model.weights.h5")
    weights, optimizer_weights = model.get_weights(), model.optimizer.get_weights()
    never_stopped = resuming.state(resuming.fit(model, begin=5))
    resuming.fit(model, end=2)
    if way == "load_weights":
        model.load_weights(tmp_path / "model.weights.h5")
    else:
        model.set_weights(weights)
        if way == "set_weights":
            model.optimizer.set_weights(optimizer_weights)
        else:
            for variable, value in zip(model.optimizer.variables, optimizer_weights):
                variable.assign(value)
    assert_same_bits(resuming.state(resuming.fit(model, begin=5)), never_stopped)


def trained(optimizer, batches=3, **kwargs):
    """Return a model trained on its first batches."""
    model = mlp(**kwargs)
    model.compile(optimizer, loss="mse", run_eagerly=EAGERLY)
    return resuming.fit(model, end=batches)


def test_get_weights_gives_the_variables_in_their_order():
    model = trained(Lookahead(keras.optimizers.Adam(0.02), 4))
    weights = model.optimizer.get_weights()
    assert all(type(weight) is np.ndarray for weight in weights)
    assert_same_bits(weights, model.optimizer.variables)
    assert (weights[0], weights[7]) == (1, 3)
    assert_same_bits(weights[1:5], model.optimizer.slow_variables)
    assert weights[5:7] == [4, 0.5]
    assert_same_bits(weights[7:], model.optimizer.inner_optimizer.variables)


def test_get_weights_gives_copies():
    model = trained(Lookahead(keras.optimizers.Adam(0.02), 4))
    weights = model.optimizer.get_weights()
    before = [weight.copy() for weight in weights]
    resuming.fit(model, begin=3)
    assert_same_bits(weights, before)


def test_set_weights_makes_another_optimizer_go_on_alike():
    one, other = (trained(Lookahead(keras.optimizers.Adam(0.02), 4), batches) for batches in (6, 1))
    other.set_weights(one.get_weights())
    other.optimizer.set_weights(one.optimizer.get_weights())
    assert_same_bits(resuming.state(resuming.fit(one, begin=6)), resuming.state(resuming.fit(other, begin=6)))


def test_set_weights_refuses_a_wrong_number_and_changes_nothing():
    optimizer = trained(Lookahead(keras.optimizers.Adam(0.02), 4)).optimizer
    before = optimizer.get_weights()
    for wrong in (before[:-1], [*before, before[0]], []):
        message = rf"`set_weights\(weights\)` needs {len(before)} arrays.*Received: {len(wrong)}$"
        with pytest.raises(ValueError, match=message):
            optimizer.set_weights([weight + 1 for weight in wrong])
    assert_same_bits(optimizer.variables, before)


def test_set_weights_refuses_a_wrong_shape_and_changes_nothing():
    optimizer = trained(Lookahead(keras.optimizers.Adam(0.02), 4)).optimizer
    before = optimizer.get_weights()
    wrong = [weight + 1 for weight in before]
    wrong[-1] = np.zeros((2, 2), "float32")
    message = r"needs an array of shape \(1,\) for the optimizer variable '.*'\. Received: shape \(2, 2\)$"
    with pytest.raises(ValueError, match=message):
        optimizer.set_weights(wrong)
    assert_same_bits(optimizer.variables, before)


def test_set_weights_of_an_unbuilt_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"`set_weights\(weights\)` needs an optimizer that is built"):
        Lookahead("sgd").set_weights([])


@keras.saving.register_keras_serializable(package="tests")
class Registered(keras.optimizers.Adam):
    def __init__(self, *args, mark=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.mark = mark

    def get_config(self):
        return {**super().get_config(), "mark": self.mark}


class Unregistered(keras.optimizers.SGD):
    pass


def schedule():
    return keras.optimizers.schedules.CosineDecay(0.1, 50, alpha=0.1)


CONFIGURED = {
    "plain": lambda: Lookahead(keras.optimizers.SGD(0.3, momentum=0.5, name="mine"), 7, 0.25, name="wrapper"),
    "off": lambda: Lookahead("adam", 0),
    "nested": lambda: Lookahead(Lookahead(keras.optimizers.Adam(0.3, clipnorm=2.0), 3, 0.1), 7, 0.25),
    "schedule": lambda: Lookahead(keras.optimizers.SGD(schedule(), momentum=0.5), 7, 0.25),
    "decay": lambda: Lookahead("sgd", 7, 0.25, learning_rate=0.3, decay=0.5, clipvalue=0.5),
    "registered": lambda: Lookahead(Registered(0.3, mark=3), 7, 0.25),
    "ema": lambda: Lookahead(keras.optimizers.Adam(0.3, use_ema=True, gradient_accumulation_steps=3), 7, 0.25),
    "loss_scaled": lambda: keras.optimizers.LossScaleOptimizer(Lookahead("sgd", 7, 0.25), initial_scale=64.0),
}


def learning_rates(optimizer):
    """Return the learning rates of the first updates with gradients of one."""
    weight = keras.Variable(np.ones(3, "float32"))
    rates = []
    for _ in range(3):
        rates.append(float(keras.ops.convert_to_numpy(optimizer.learning_rate)))
        optimizer.apply([keras.ops.ones(3)], [weight])
    return rates


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize("way", ["from_config", "keras.saving", "keras.optimizers", "keras.optimizers.get"])
def test_a_config_makes_the_same_optimizer_and_is_left_as_it_is(name, way):
    optimizer = CONFIGURED[name]()
    config = optimizer.get_config()
    if way == "from_config":
        if name == "loss_scaled":
            pytest.skip("Keras' LossScaleOptimizer.from_config changes its argument")
        before = copy.deepcopy(config)
        again = type(optimizer).from_config(config)
        assert config == before
    else:
        serialize, deserialize = {
            "keras.saving": (keras.saving.serialize_keras_object, keras.saving.deserialize_keras_object),
            "keras.optimizers": (keras.optimizers.serialize, keras.optimizers.deserialize),
            "keras.optimizers.get": (keras.optimizers.serialize, keras.optimizers.get),
        }[way]
        again = deserialize(serialize(optimizer))
    assert type(again) is type(optimizer)
    assert again.get_config() == config
    assert again.inner_optimizer is not optimizer.inner_optimizer
    assert type(again.inner_optimizer) is type(optimizer.inner_optimizer)
    assert learning_rates(find_lookahead(again)) == learning_rates(find_lookahead(optimizer))


def test_the_config_is_plain_data_with_the_documented_keys():
    import json

    config = CONFIGURED["plain"]().get_config()
    outer = {"slow_momentum": 0.0, "slow_nesterov": True, "slow_dtype": None}
    assert set(config) == {"name", "optimizer", "sync_period", "slow_step_size", *outer}
    assert {name: config[name] for name in outer} == outer
    assert (config["name"], config["sync_period"], config["slow_step_size"]) == ("wrapper", 7, 0.25)
    assert config["optimizer"]["config"]["name"] == "mine"
    assert json.loads(json.dumps(config)) == config


def test_changing_a_config_that_was_used_does_not_change_the_optimizer():
    config = CONFIGURED["schedule"]().get_config()
    optimizer = Lookahead.from_config(config)
    before = optimizer.get_config()
    config["optimizer"]["config"]["learning_rate"]["config"]["initial_learning_rate"] = 5.0
    assert optimizer.get_config() == before


def test_a_saved_class_is_found_by_its_registered_name_wherever_its_module_lies():
    config = keras.saving.serialize_keras_object(Lookahead("sgd", 7))
    assert config["registered_name"] == "lookahead_optim>Lookahead"
    assert config["class_name"] == "Lookahead"
    config["module"] = "lookahead_optim.no_such_module"
    assert keras.saving.deserialize_keras_object(config).sync_period == 7


def test_an_unregistered_inner_optimizer_comes_back_through_custom_objects(tmp_path):
    objects = {"Unregistered": Unregistered}
    optimizer = Lookahead(Unregistered(0.05, momentum=0.9), 4)
    config = optimizer.get_config()
    before = copy.deepcopy(config)
    assert type(Lookahead.from_config(config, custom_objects=objects).inner_optimizer) is Unregistered
    with keras.saving.custom_object_scope(objects):
        assert type(Lookahead.from_config(config).inner_optimizer) is Unregistered
    assert config == before
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer), objects)
    assert type(again.inner_optimizer) is Unregistered
    model = trained(optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
    assert type(loaded.optimizer.inner_optimizer) is Unregistered
    assert_same_bits(resuming.state(loaded), resuming.state(model))
    with pytest.raises(TypeError, match="Could not locate class 'Unregistered'"):
        Lookahead.from_config(config)


@pytest.mark.parametrize("name", ["registered", "decay", "nested", "off"])
def test_load_model_needs_no_custom_objects(tmp_path, name):
    model = trained(CONFIGURED[name]())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is Lookahead
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_same_bits(resuming.state(loaded), resuming.state(model))
    assert_same_bits(resuming.state(resuming.fit(loaded, begin=3)), resuming.state(resuming.fit(model, begin=3)))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer))}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_new_optimizer_trains_as_the_original(way):
    optimizer = Lookahead(keras.optimizers.Adam(0.02), 4, 0.25)
    again = COPIES[way](optimizer)
    assert again.get_config() == optimizer.get_config()
    assert again.inner_optimizer is not optimizer.inner_optimizer
    assert_same_bits(resuming.state(trained(again, 6)), resuming.state(trained(optimizer, 6)))


@pytest.mark.filterwarnings("ignore:Skipping:UserWarning")
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_trained_optimizer_is_new_as_that_of_a_bare_one(way):
    """Keras copies an optimizer through its file format. It copies state only into an optimizer that is built."""
    bare = trained(keras.optimizers.Adam(0.02)).optimizer
    model = trained(Lookahead(keras.optimizers.Adam(0.02), 4))
    before = resuming.state(model)
    for optimizer in (bare, model.optimizer):
        again = COPIES[way](optimizer)
        assert type(again) is type(optimizer)
        assert not again.built
        assert int(again.iterations) == 0
        assert again.get_config() == optimizer.get_config()
    new = trained(Lookahead(keras.optimizers.Adam(0.02), 4), 6)
    assert_same_bits(resuming.state(trained(again, 6)), resuming.state(new))
    assert_same_bits(resuming.state(model), before)


def slow_start(model):
    """Return the weights from which the next update will start the slow weights; check that it does."""
    start = values(model.trainable_variables)
    resuming.fit(model, end=1)
    assert_same_bits(model.optimizer.slow_variables, start)
    return start


FOREIGN = {
    "adam": lambda: keras.optimizers.Adam(0.02),
    # As many variables as Lookahead has, and of the same shapes.
    "momentum and schedule": lambda: keras.optimizers.SGD(schedule(), momentum=0.9),
}


@pytest.mark.parametrize("inner", FOREIGN)
@pytest.mark.parametrize("trained_before", [0, 1])
def test_after_a_bare_optimizers_checkpoint_the_slow_weights_start_from_its_weights(tmp_path, inner, trained_before):
    saved = trained(FOREIGN[inner](), 5)
    saved.save_weights(tmp_path / "model.weights.h5")
    model = trained(Lookahead(FOREIGN[inner](), 4), trained_before) if trained_before else mlp()
    if not trained_before:
        model.compile(Lookahead(FOREIGN[inner](), 4), loss="mse", run_eagerly=EAGERLY)
        model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="Skipping") as caught:
        model.load_weights(tmp_path / "model.weights.h5")
    messages = [str(warning.message) for warning in caught]
    assert any("The slow weights start anew, from the model's weights." in message for message in messages)
    # The inner optimizer's state is unchanged, and so is its count.
    assert int(model.optimizer.iterations) == trained_before
    assert_same_bits(slow_start(model), saved.trainable_variables)


@pytest.mark.parametrize(("saved_period", "period"), [(0, 4), (4, 0)])
def test_after_a_checkpoint_made_with_the_mechanism_off_the_slow_weights_start_from_its_weights(
    tmp_path, saved_period, period
):
    saved = trained(Lookahead(keras.optimizers.Adam(0.02), saved_period), 5)
    saved.save_weights(tmp_path / "model.weights.h5")
    model = trained(Lookahead(keras.optimizers.Adam(0.02), period), 3)
    with pytest.warns(UserWarning, match="The slow weights start anew, from the model's weights") as caught:
        model.load_weights(tmp_path / "model.weights.h5")
    assert len(caught) == 1
    assert_same_bits(model.trainable_variables, saved.trainable_variables)
    assert_same_bits(model.optimizer.inner_optimizer.variables, saved.optimizer.inner_optimizer.variables)
    if period:
        slow_start(model)
    else:
        saved.compile(saved.optimizer.inner_optimizer, loss="mse", run_eagerly=EAGERLY)
        resuming.fit(saved, begin=5)
        resuming.fit(model, begin=5)
        assert_same_bits(model.weights, saved.weights)


def test_a_lookahead_checkpoint_loads_into_a_bare_model_with_a_warning(tmp_path):
    saved = trained(Lookahead(keras.optimizers.Adam(0.02), 4), 5)
    saved.save_weights(tmp_path / "model.weights.h5")
    model = trained(keras.optimizers.Adam(0.02), 1)
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        model.load_weights(tmp_path / "model.weights.h5")
    assert_same_bits(model.weights, saved.weights)


def test_another_period_keeps_the_state(tmp_path):
    saved = trained(Lookahead(keras.optimizers.Adam(0.02), 4), 5)
    saved.save_weights(tmp_path / "model.weights.h5")
    model = trained(Lookahead(keras.optimizers.Adam(0.02), 6), 1)
    model.load_weights(tmp_path / "model.weights.h5")
    assert model.optimizer.sync_period == 6
    saved.optimizer.sync_period = 6
    assert_same_bits(resuming.state(model), resuming.state(saved))


def test_a_whole_model_pickles_and_goes_on_bit_for_bit():
    model = trained(Lookahead(keras.optimizers.Adam(0.02), 4), 6)
    again = pickle.loads(pickle.dumps(model))
    assert_same_bits(resuming.state(again), resuming.state(model))
    assert_same_bits(resuming.state(resuming.fit(again, begin=6)), resuming.state(resuming.fit(model, begin=6)))
