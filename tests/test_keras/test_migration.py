"""Checkpoints that `tfa.optimizers.Lookahead` wrote, continued in Keras 3."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from lookahead_optim.migrate import load_checkpoint

RECORDINGS = Path(__file__).parent.parent / "test_tf_keras" / "recordings"
MODELS = json.loads((RECORDINGS / "index.json").read_text())["models"]
DATA = np.load(RECORDINGS / "model_data.npz")
SAME = [name for name in MODELS if name not in ("nadam", "rmsprop")]
FILES = [(name, kind) for name in SAME for kind in ("h5", "checkpoint")] + [("adam", "weights")]


def compiled_model(name):
    entry = MODELS[name]
    inner = getattr(keras.optimizers, entry["inner"]["class_name"])(**entry["inner"]["config"])
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="prediction"),
        ]
    )
    model.compile(Lookahead(inner, **entry["wrapper"]), "mse")
    return model


def path_of(name, kind):
    return RECORDINGS / name / MODELS[name]["files"][kind]


def flat(arrays):
    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(one)) for one in arrays])


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_training_goes_on_as_it_would_have_with_tensorflow_addons(name, kind):
    if kind != "h5" and keras.config.backend() != "tensorflow":
        pytest.skip("TensorFlow reads its own checkpoints.")
    model, entry = compiled_model(name), MODELS[name]
    load_checkpoint(path_of(name, kind), model)
    continuation = np.load(RECORDINGS / name / "continuation.npz")
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == entry["stopped_after"]
    batches = list(zip(DATA["x"], DATA["y"]))[entry["stopped_after"] :]
    for (x, y), fast, slow in zip(batches, continuation["fast"], continuation["slow"], strict=True):
        model.train_on_batch(x, y)
        np.testing.assert_allclose(flat(model.weights), fast, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(flat(model.optimizer.slow_variables), slow, rtol=2e-5, atol=2e-6)


def assert_refused(error, message, path, model):
    before = [keras.ops.convert_to_numpy(one) for one in model.weights]
    with pytest.raises(error, match=message):
        load_checkpoint(path, model)
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize("name", ["nadam", "rmsprop"])
def test_inner_optimizers_that_compute_something_else_in_keras_3_are_refused(name):
    assert_refused(
        ValueError, "computes the same in Keras 2 and 3.*Received", path_of(name, "h5"), compiled_model(name)
    )


@pytest.mark.parametrize(
    ("name", "of_model", "message"),
    [
        ("adam", "sgd_momentum", r"an inner optimizer like that of `model`, SGD.*Received.*\['m', 'v'\]"),
        ("adam", "amsgrad", r"with the options of that of `model`: 'vhat' is missing in"),
        ("amsgrad", "adam", r"'vhat' is only in the checkpoint"),
        ("sgd", "sgd_momentum", r"'momentum' is missing in the checkpoint"),
    ],
)
def test_checkpoint_of_another_inner_optimizer_is_refused(name, of_model, message):
    assert_refused(ValueError, message, path_of(name, "h5"), compiled_model(of_model))


def test_other_models_and_files_are_refused():
    model, path = compiled_model("adam"), path_of("adam", "h5")
    without_state = path_of("adam", "weights_h5")
    assert_refused(ValueError, "a file that `model.save` wrote, with its optimizer.*Received", without_state, model)
    model.compile("adam", "mse")
    assert_refused(TypeError, "compiled with a `lookahead_optim.keras.Lookahead`.*Received", path, model)
    wider = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(1)])
    wider.compile(Lookahead("adam"), "mse")
    assert_refused(ValueError, r"weights of the model's shapes.*\(4, 5\).*Received.*\(4, 3\)", path, wider)
    if keras.config.backend() == "tensorflow":
        checkpoint = path_of("adam", "checkpoint")
        assert_refused(ValueError, r"weights of the model's shapes.*\(4, 5\).*Received.*\(4, 3\)", checkpoint, wider)
