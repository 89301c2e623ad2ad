"""Checkpoints that `tfa.optimizers.Lookahead` wrote, continued in Keras 3."""

import contextlib
import importlib.util
import json
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, RectifiedAdam
from lookahead_optim.migrate import load_checkpoint

RECORDINGS = Path(__file__).parent.parent / "test_tf_keras" / "recordings"
MODELS = json.loads((RECORDINGS / "index.json").read_text())["models"]
WITH_OWN = json.loads((RECORDINGS / "optimizers" / "index.json").read_text())["models"]
MODELS |= {f"optimizers/{name}": entry for name, entry in WITH_OWN.items() if entry["wrapper"]}
DATA = np.load(RECORDINGS / "model_data.npz")
SAME = [name for name in MODELS if name not in ("nadam", "rmsprop")]
FILES = [(name, kind) for name in SAME for kind in ("h5", "checkpoint")]
FILES += [(name, kind) for name in SAME for kind in ("weights", "saved_model") if kind in MODELS[name]["files"]]


def compiled_model(name):
    entry = MODELS[name]
    config, inner_class = dict(entry["inner"]["config"]), entry["inner"]["class_name"]
    if inner_class == "AdamW":
        config["weight_decay"] /= config["learning_rate"]
    inner = (RectifiedAdam if inner_class == "RectifiedAdam" else getattr(keras.optimizers, inner_class))(**config)
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


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="One backend is enough.")
@pytest.mark.parametrize("kind", ["h5", "checkpoint"])
@pytest.mark.parametrize("is_in_block", [False, True])
def test_a_loss_scaled_run_of_keras_2_goes_on(kind, is_in_block, tmp_path):
    tf, keras_2 = pytest.importorskip("tensorflow"), pytest.importorskip("tf_keras")
    from lookahead_optim.tf_keras import Lookahead as Lookahead2

    layers = [("hidden", 3), ("prediction", 1)]
    old = keras_2.Sequential([keras_2.Input((4,)), *(keras_2.layers.Dense(size, name=name) for name, size in layers)])
    inner = Lookahead2(keras_2.optimizers.legacy.Adam(0.01), 3)
    old.compile(keras_2.mixed_precision.LossScaleOptimizer(inner, initial_scale=64.0), "mse")
    batches = list(zip(DATA["x"], DATA["y"]))
    # Keras 2 counts skipped steps for the inner optimizer. A whole cycle of skipped steps does not move the next sync.
    for _ in range(3):
        old.train_on_batch(batches[0][0], np.full_like(batches[0][1], np.inf))
    for x, y in batches[:4]:
        old.train_on_batch(x, y)
    with warnings.catch_warnings(), inner.slow_weights() if is_in_block else contextlib.nullcontext():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file", UserWarning)
        old.save(tmp_path / "old.h5")
        tf.train.Checkpoint(model=old, optimizer=old.optimizer).write(str(tmp_path / "old"))

    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(size, name=name) for name, size in layers)])
    lookahead = Lookahead(keras.optimizers.Adam(0.01), 3)
    model.compile(keras.optimizers.LossScaleOptimizer(lookahead, initial_scale=64.0), "mse")
    load_checkpoint(tmp_path / ("old.h5" if kind == "h5" else "old"), model)
    assert [int(one.iterations) for one in (lookahead, lookahead.inner_optimizer)] == [7, 7]
    for x, y in batches[4:]:
        for one in (old, model):
            one.train_on_batch(x, y)
        np.testing.assert_allclose(flat(model.weights), flat(old.weights), rtol=2e-5, atol=2e-6)


def assert_refused(error, message, path, model):
    model.optimizer.build(model.trainable_variables)

    def everything():
        return [keras.ops.convert_to_numpy(one) for one in model.weights + model.optimizer.variables]

    before = everything()
    with pytest.raises(error, match=message):
        load_checkpoint(path, model)
    for one, other in zip(everything(), before, strict=True):
        np.testing.assert_array_equal(one, other)


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


@pytest.mark.parametrize("option", [{"use_ema": True}, {"gradient_accumulation_steps": 2}])
def test_inner_optimizers_with_state_that_keras_2_does_not_keep_are_refused(option):
    model = compiled_model("adam")
    model.compile(Lookahead(keras.optimizers.Adam(0.05, **option)), "mse")
    assert_refused(ValueError, f"without `{next(iter(option))}`.*Received", path_of("adam", "h5"), model)


def test_layers_of_layers_are_refused():
    part = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)])
    model = keras.Sequential([keras.Input((4,)), part])
    model.compile(Lookahead("adam"), "mse")
    message = f"not layers of layers.*Received: the layer '{part.name}' of type Sequential"
    assert_refused(ValueError, message, path_of("adam", "h5"), model)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow reads its own checkpoints.")
@pytest.mark.parametrize("path", ["missing", "model.keras"])
def test_a_path_that_is_no_checkpoint_is_refused(path, tmp_path):
    model = compiled_model("adam")
    if path.endswith("keras"):
        model.save(tmp_path / path)
    assert_refused(ValueError, "`path` must be an `.h5` file, a checkpoint's prefix", tmp_path / path, model)


needs_keras_2 = pytest.mark.skipif(
    keras.config.backend() != "tensorflow" or not importlib.util.find_spec("tf_keras"), reason="One backend is enough."
)


def old_model(layers):
    """Return a model of Keras 2, trained with Lookahead for four batches."""
    import tf_keras

    import lookahead_optim.tf_keras

    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential([tf_keras.Input(DATA["x"].shape[2:]), *layers(tf_keras)])
    model.compile(lookahead_optim.tf_keras.Lookahead(tf_keras.optimizers.legacy.Adam(0.01), 3), "mse")
    return train(model, 0, 4)


def new_model(layers):
    model = keras.Sequential([keras.Input(DATA["x"].shape[2:]), *layers(keras)])
    model.compile(Lookahead(keras.optimizers.Adam(0.01), 3), "mse")
    return model


def train(model, start, stop=None):
    for x, y in list(zip(DATA["x"], DATA["y"]))[start:stop]:
        model.train_on_batch(x, y)
    return model


def save_h5(model, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file", UserWarning)
        model.save(path)


def frozen(layer):
    layer.trainable = False
    return layer


ARCHITECTURES = {
    # A bias before this layer would only have gradients of rounding errors.
    "batch norm": lambda keras: [
        keras.layers.Dense(4, use_bias=False),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ],
    "frozen": lambda keras: [keras.layers.Dense(4), frozen(keras.layers.Dense(4)), keras.layers.Dense(1)],
    "recurrent": lambda keras: [keras.layers.Reshape((2, 2)), keras.layers.GRU(3), keras.layers.Dense(1)],
}


@needs_keras_2
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["h5", "checkpoint"])
def test_other_layers_go_on_too(name, kind, tmp_path):
    import tensorflow as tf

    old, model = old_model(ARCHITECTURES[name]), new_model(ARCHITECTURES[name])
    save_h5(old, tmp_path / "old.h5")
    tf.train.Checkpoint(model=old, optimizer=old.optimizer).write(str(tmp_path / "old"))
    if (name, kind) == ("recurrent", "checkpoint"):
        assert_refused(ValueError, "a variable for each of the model's weights.*/cell/", tmp_path / "old", model)
        return
    load_checkpoint(tmp_path / ("old.h5" if kind == "h5" else "old"), model)
    np.testing.assert_array_equal(flat(model.weights), flat(old.weights))
    np.testing.assert_allclose(flat(train(model, 4).weights), flat(train(old, 4).weights), rtol=2e-5, atol=2e-6)


@needs_keras_2
@pytest.mark.parametrize("kind", ["h5", "checkpoint"])
def test_two_wrappers_are_refused(kind, tmp_path):
    import tensorflow as tf
    import tf_keras

    import lookahead_optim.tf_keras as keras2

    old, model = old_model(lambda keras: [keras.layers.Dense(1)]), new_model(lambda keras: [keras.layers.Dense(1)])
    inner = keras2.Lookahead(tf_keras.optimizers.legacy.Adam(0.01), 2)
    old.compile(keras2.Lookahead(inner, 3), "mse")
    train(old, 0, 4)
    save_h5(old, tmp_path / "old.h5")
    tf.train.Checkpoint(model=old, optimizer=old.optimizer).write(str(tmp_path / "old"))
    path = tmp_path / ("old.h5" if kind == "h5" else "old")
    assert_refused(ValueError, "'slow' arrays of the shapes of the model's trainable variables", path, model)
