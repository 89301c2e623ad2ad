"""Saved models with flipped bits or cut off: an error, no loss, or a documented limit. Loading runs no code."""

import json
import os
import zipfile

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.damage import check
from tests.test_keras import resuming
from tests.test_keras.helpers import mlp, values

COUNT = 60


def bits(model):
    return [np.asarray(value).tobytes() for value in resuming.state(model)]


@pytest.fixture(scope="module")
def saved():
    return resuming.fit(resuming.make_model("momentum"), end=6)


def test_a_damaged_keras_file_is_an_error_or_unharmed(saved, tmp_path):
    saved.save(tmp_path / "saved.keras")
    loaded = {}

    def load(data):
        (tmp_path / "damaged.keras").write_bytes(data)
        loaded["model"] = keras.saving.load_model(tmp_path / "damaged.keras")

    data = (tmp_path / "saved.keras").read_bytes()
    found = check(data, COUNT, load, lambda: True, lambda: bits(loaded["model"]) == bits(saved))
    assert found["cut", "error"] == COUNT // 4
    assert found["flip", "changed"] == 0


def test_a_damaged_weights_file_is_an_error_if_it_is_cut_off_and_a_good_one_loads_afterwards(saved, tmp_path):
    """The format has no checksum. Keras loads weights in place, one after the other."""
    model = resuming.fit(resuming.make_model("momentum"), end=5)
    saved.save_weights(tmp_path / "saved.weights.h5")

    def load(data):
        (tmp_path / "damaged.weights.h5").write_bytes(data)
        model.load_weights(tmp_path / "damaged.weights.h5")

    data = (tmp_path / "saved.weights.h5").read_bytes()
    found = check(data, 2 * COUNT, load, lambda: True, lambda: bits(model) == bits(saved))
    assert found["cut", "error"] == 2 * COUNT // 4
    model.load_weights(tmp_path / "saved.weights.h5")
    assert bits(model) == bits(saved)


@pytest.fixture
def tamper(saved, tmp_path):
    """Return a function that loads a `.keras` file whose config of the optimizer was changed."""
    saved.save(tmp_path / "saved.keras")

    def load(change):
        bad = tmp_path / "bad.keras"
        with zipfile.ZipFile(tmp_path / "saved.keras") as good, zipfile.ZipFile(bad, "w") as out:
            for name in good.namelist():
                content = good.read(name)
                if name == "config.json":
                    config = json.loads(content)
                    change(config["compile_config"]["optimizer"], str(tmp_path / "made"))
                    content = json.dumps(config)
                out.writestr(name, content)
        return keras.saving.load_model(bad)

    return load


def a_call(path):
    return {"module": "os", "class_name": "mkdir", "config": {"path": path}, "registered_name": None}


def optimizer_is_a_call(config, path):
    config.update(a_call(path))


def inner_optimizer_is_a_call(config, path):
    config["config"]["optimizer"] = a_call(path)


def inner_optimizer_is_a_function(config, path):
    config["config"]["optimizer"] = {
        "module": "os",
        "class_name": "function",
        "config": "mkdir",
        "registered_name": None,
    }


def inner_optimizer_is_a_name_of_a_module(config, path):
    config["config"]["optimizer"] = "os.mkdir"


def registered_name_is_a_call(config, path):
    config["config"]["optimizer"] |= {"registered_name": "os>mkdir", "module": "os", "class_name": "mkdir"}


def learning_rate_is_a_lambda(config, path):
    config["config"]["optimizer"]["config"]["learning_rate"] = {"class_name": "__lambda__", "config": {"value": "4wEA"}}


def slow_step_size_is_a_lambda(config, path):
    config["config"]["slow_step_size"] = {"class_name": "__lambda__", "config": {"value": "4wEA"}}


CHANGES = [
    optimizer_is_a_call,
    inner_optimizer_is_a_call,
    inner_optimizer_is_a_function,
    inner_optimizer_is_a_name_of_a_module,
    registered_name_is_a_call,
    learning_rate_is_a_lambda,
    slow_step_size_is_a_lambda,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_whose_optimizer_would_run_code_is_refused(tamper, tmp_path, change):
    assert isinstance(tamper(lambda config, path: None).optimizer, Lookahead)
    with pytest.raises((TypeError, ValueError)):
        tamper(change)
    assert not os.path.exists(tmp_path / "made")


def test_a_lambda_layer_beside_lookahead_is_refused_in_safe_mode(tmp_path):
    layers = [keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(Lookahead(keras.optimizers.SGD(0.1), 4), loss="mse")
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="lambda"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("wrong", [np.ones(3), np.full((1,), "x")], ids=["shape", "dtype"])
def test_own_variables_are_loaded_all_or_none(wrong):
    model = mlp()
    optimizer = Lookahead("sgd")
    optimizer.build(model.trainable_variables)
    store = {}
    optimizer.save_own_variables(store)
    before = values(optimizer.variables)
    damaged = {name: value + 1 for name, value in store.items()}
    # The last entry that is read.
    damaged[list(damaged)[-1]] = wrong
    with pytest.raises(ValueError, match=r"`load_own_variables\(store\)` needs an array"):
        optimizer.load_own_variables(damaged)
    for value, start in zip(values(optimizer.variables), before, strict=True):
        assert value.tobytes() == start.tobytes()
