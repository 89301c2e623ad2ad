"""Programs of TensorFlow Addons' users do the same with this package's optimizers.

The results of the original are recorded. Where TensorFlow Addons is installed, the programs also run with it again.
"""

import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lookahead_optim.tf_keras
from lookahead_optim.tf_keras._keras import keras
from tests.child_processes import finish, start
from tests.comparison import assert_same_bits
from tests.test_tf_keras import programs
from tests.test_tf_keras.recorded import OPTIMIZERS, assert_within

OURS = SimpleNamespace(
    keras=keras, **{name: getattr(lookahead_optim.tf_keras, name) for name in ("Lookahead", "RectifiedAdam", "AdamW")}
)
INSIDE = partial(programs.clipped_with_plateau_and_hdf5, clips_inside=True)
RUNS = [pytest.param(name, program, id=name) for name, program in programs.PROGRAMS.items()]
RUNS += [pytest.param("clipped_with_plateau_and_hdf5", INSIDE, id="clipped_inside_with_plateau_and_hdf5")]
# Keras 2.16 and later warn that HDF5 is old.
pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")


@pytest.mark.parametrize(("name", "program"), RUNS)
def test_a_program_does_what_the_original_did(name, program, tmp_path):
    actual = program(OURS, tmp_path)
    with np.load(OPTIMIZERS / "programs" / f"{name}.npz") as recorded:
        assert actual.keys() == set(recorded)
        for key in recorded:
            # A matrix product of another version of TensorFlow may round differently.
            assert_within(actual[key], recorded[key], 64)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The folder of the arrays of each program of the original, which ran in its own process."""
    directory = tmp_path_factory.mktemp("originals")
    finish(start(programs, directory, options=("-W", "ignore"), TF_CPP_MIN_LOG_LEVEL="3"), 300)
    return directory


@pytest.mark.skipif(importlib.util.find_spec("tensorflow_addons") is None, reason="TensorFlow Addons is not installed")
@pytest.mark.parametrize(("name", "program"), RUNS)
def test_a_program_does_what_the_original_does_bit_for_bit(name, program, originals, tmp_path):
    with np.load(Path(originals) / f"{name}.npz") as expected:
        assert_same_bits(dict(program(OURS, tmp_path)), dict(expected))
