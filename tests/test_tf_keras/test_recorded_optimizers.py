"""`RectifiedAdam` and `AdamW` do what TensorFlow Addons' did, step by step, and read the same files.

Bare and inside `Lookahead`. `record_original.py` made the recordings, and describes their format.
"""

import json
import platform

import numpy as np
import pytest

from lookahead_optim.tf_keras._keras import keras
from tests.test_tf_keras.recorded import (
    OPTIMIZERS,
    WAYS,
    check_training_goes_on,
    check_training_starts_anew,
    check_trajectory,
    make_optimizer,
)

INDEX = json.loads((OPTIMIZERS / "index.json").read_text())
TRAJECTORIES, MODELS = np.load(OPTIMIZERS / "trajectories.npz"), INDEX["models"]
# Another processor may round `pow` differently. The rectification magnifies this.
EXACT = {"AdamW": 0, "RectifiedAdam": 0} if platform.machine() == "x86_64" else {"AdamW": 4, "RectifiedAdam": 64}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("entry", INDEX["trajectories"], ids=lambda entry: entry["name"])
def test_trajectory_is_the_originals(entry, graph):
    units = 16 if entry["dtype"] == "float16" else EXACT[entry["inner"]["class_name"]]
    check_trajectory(entry, TRAJECTORIES, units, graph)


@pytest.mark.parametrize(("kind", "load"), WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_where_the_original_left_off(name, kind, load):
    check_training_goes_on(OPTIMIZERS / name, MODELS[name], kind, load)


@pytest.mark.parametrize("name", MODELS)
def test_files_without_the_optimizers_state_start_anew_as_with_the_original(name):
    check_training_starts_anew(OPTIMIZERS / name, MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_the_originals(name):
    config = json.loads((OPTIMIZERS / name / "optimizer.json").read_text())
    actual = keras.optimizers.serialize(make_optimizer(MODELS[name]))
    assert actual["registered_name"] == config["registered_name"]
    if MODELS[name]["wrapper"]:
        actual, config = actual["config"]["optimizer"], config["config"]["optimizer"]
    assert actual["registered_name"] == config["registered_name"] == f"Addons>{MODELS[name]['inner']['class_name']}"
    numbers = {key: pytest.approx(value) if type(value) is float else value for key, value in config["config"].items()}
    assert actual["config"] == numbers
