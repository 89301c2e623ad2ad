"""Damaged files, files that would run code, and runs that are killed while they save."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras._keras import keras
from tests.child_processes import start
from tests.comparison import assert_same_bits
from tests.test_tf_keras import killed_training, resuming
from tests.test_tf_keras.resuming import compiled, fit, state, values

FORMATS = ["h5", "weights", "checkpoint_unbuilt", "saved_model"]


def load(path, form):
    """Return the model of a file, or raise the error of TensorFlow or Keras."""
    if form == "h5":
        return keras.models.load_model(f"{path}.h5")
    model = compiled(resuming.momentum(), seed=3)
    if form == "checkpoint_unbuilt":
        resuming.checkpoint_of(model).read(f"{path}.{form}").expect_partial()
    else:
        model.load_weights(
            f"{path}.{form}" + ("/variables/variables" if form == "saved_model" else "")
        ).expect_partial()
    return model


def data_file(path, form):
    """Return the file that has the arrays."""
    if form == "h5":
        return Path(f"{path}.h5")
    prefix = f"{path}.{form}/variables/variables" if form == "saved_model" else f"{path}.{form}"
    return Path(f"{prefix}.data-00000-of-00001")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error(form, part, tmp_path):
    resuming.save(fit(compiled(resuming.momentum()), end=4), tmp_path / "model", form)
    file = data_file(tmp_path / "model", form)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises((OSError, tf.errors.OpError, IndexError, ValueError, KeyError)):
        load(tmp_path / "model", form)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "h5"])
def test_a_flipped_bit_in_the_arrays_of_a_checkpoint_is_an_error(form, tmp_path):
    """Each tensor has a checksum. `.h5` files have none: there a flipped bit gives another number."""
    model = fit(compiled(resuming.momentum()), end=4)
    resuming.save(model, tmp_path / "model", form)
    file, expected = data_file(tmp_path / "model", form), state(model)
    content, generator = file.read_bytes(), random.Random(0)
    errors = 0
    for _ in range(12):
        place, damaged = generator.randrange(len(content)), bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(bytes(damaged))
        try:
            loaded = load(tmp_path / "model", form)
            if form == "weights":
                resuming.build(loaded)
        except (tf.errors.OpError, IndexError, ValueError):
            errors += 1
        else:
            # The bit is in the description of Python objects, or in padding.
            resuming.build(loaded)
            assert_same_bits(loaded.get_weights(), expected[:4])
    assert errors >= 3


def test_loading_an_h5_file_runs_no_code_of_the_optimizers_config(tmp_path):
    """The config names classes that Keras knows or that are registered.

    It has no code, and Keras does not import by name.
    """
    import json

    import h5py

    resuming.save(fit(compiled(resuming.momentum()), end=4), tmp_path / "model", "h5")
    with h5py.File(tmp_path / "model.h5", "a") as file:
        config = json.loads(file.attrs["training_config"])
        inner = config["optimizer_config"]["config"]["optimizer"]
        inner["class_name"], inner["config"] = "os>system", {"command": f"touch {tmp_path}/ran"}
        file.attrs["training_config"] = json.dumps(config)
    with pytest.raises((ValueError, TypeError), match=r"system|Unknown|optimizer"):
        keras.models.load_model(tmp_path / "model.h5")
    assert not (tmp_path / "ran").exists()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_that_is_killed_at_any_time_resumes_bit_for_bit(form, tmp_path):
    """SIGKILL at random times. The last run ends by itself."""
    generator, kills = random.Random(form), 0
    while not (tmp_path / "last.npz").exists():
        process = start(killed_training, tmp_path, form, options=["-W", "ignore"], TF_CPP_MIN_LOG_LEVEL="3")
        if kills < 2:
            before = len(list(tmp_path.glob("*.done")))
            end = time.monotonic() + 60
            # At a moment in which it trains or saves, not while it imports.
            while len(list(tmp_path.glob("*.done"))) == before and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            kills += process.returncode == -signal.SIGKILL
        else:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output[-3000:]
    assert_same_bits(resuming.read(tmp_path / "last.npz"), state(fit(compiled(resuming.momentum()))))


def test_values_of_a_flipped_h5_file_are_those_of_the_file(tmp_path):
    """A documented limit: HDF5 files of Keras 2 have no checksums."""
    import h5py

    model = fit(compiled(resuming.momentum()), end=4)
    resuming.save(model, tmp_path / "model", "h5")
    with h5py.File(tmp_path / "model.h5", "a") as file:
        # The first weight is the count.
        name = file["optimizer_weights"].attrs["weight_names"][1]
        slow = file["optimizer_weights"][name if isinstance(name, str) else name.decode()]
        slow[...] = np.asarray(slow) + 1
    loaded = keras.models.load_model(tmp_path / "model.h5")
    (one, *_), (other, *_) = ([one.optimizer.get_slot(one.weights[0], "slow")] for one in (loaded, model))
    np.testing.assert_allclose(values([one])[0], values([other])[0] + 1, rtol=1e-6)
