"""A run that is stopped anywhere, saved by Orbax or as bytes and resumed, ends like a run that never stopped."""

import pickle

import equinox
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_optim.optax import slow_params
from tests import child_processes
from tests.child_processes import finish, kill_when_reached
from tests.test_optax import orbax_worker
from tests.test_optax.by_hand import assert_same_bits
from tests.test_optax.orbax_worker import KILLED_IN, OPTIMIZERS, SAVED_AFTER, STEPS

TIMEOUT = 90


def start(command, directory, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return child_processes.start(orbax_worker, command, directory, options=["-W", "error"], XLA_FLAGS=flags)


@pytest.fixture(scope="module")
def saved():
    """The runs at every position at which they are saved, and at their end."""
    runs, saved = orbax_worker.start_all(), {}
    for position in (*SAVED_AFTER, STEPS):
        saved[position] = runs = orbax_worker.train_all(runs, position)
    return saved


@pytest.fixture(scope="module")
def directory(tmp_path_factory, saved):
    """The directory where this process or a killed process saved the runs, and new processes resumed them."""
    directory = tmp_path_factory.mktemp("orbax")
    killed = start("killed", directory)
    try:
        for position in SAVED_AFTER:
            orbax_worker.write(directory / f"saved-{position}", saved[position])
        sharded = orbax_worker.train_sharded(*orbax_worker.start_sharded(), range(6))
        orbax_worker.write(directory / "sharded", sharded)
        kill_when_reached(killed, directory / "reached", TIMEOUT)
    finally:
        killed.kill()
    finish(start("resumed", directory), TIMEOUT)
    return directory


@pytest.mark.parametrize("position", SAVED_AFTER)
def test_runs_resume_in_a_new_process_bit_for_bit(directory, saved, position):
    resumed = orbax_worker.read(directory / f"resumed-{position}", saved[STEPS])
    for name in OPTIMIZERS:
        assert resumed[name]["steps"] == STEPS
        assert_same_bits(resumed[name], saved[STEPS][name])


def test_the_runs_are_saved_before_the_first_step_within_a_cycle_and_right_after_a_sync(saved):
    assert [int(saved[position]["adam"]["state"].captured) for position in SAVED_AFTER] == [0, 1, 2, 3, 0]
    assert not np.array_equal(saved[3]["adam"]["state"].slow_params["w"], saved[3]["adam"]["params"]["w"])


def test_a_run_killed_in_the_middle_of_a_save_resumes_from_its_last_whole_checkpoint_bit_for_bit(directory, saved):
    (unfinished,) = (directory / "manager").glob(f"{KILLED_IN}*/**/notes.txt")
    assert unfinished.read_text() == "half of"
    resumed = orbax_worker.read(directory / "resumed-killed", {"from": np.array(0), "run": saved[STEPS]["adam"]})
    assert resumed["from"] == KILLED_IN - 1
    assert resumed["run"]["state"].step == STEPS
    assert_same_bits(resumed["run"], saved[STEPS]["adam"])


@pytest.mark.parametrize("devices", [2, 1])
def test_a_run_saved_from_four_devices_goes_on_with_the_same_numbers_on_fewer(directory, devices):
    # To rounding: for another number of devices XLA compiles another program, which may round differently.
    finish(start("resharded", directory, devices), TIMEOUT)
    params, state = orbax_worker.train_sharded(*orbax_worker.start_sharded(), range(15))
    assert {len(leaf.addressable_shards) for leaf in jax.tree.leaves((params, state.slow_params))} == {4}
    with np.load(directory / f"resharded-{devices}.npz") as file:
        resumed = [file[name] for name in file if name.startswith("arr_")]
        assert set(file["devices"]) == {devices}
        assert np.all(file["alike"])
    assert state.slow_params["b"].dtype == state.outer_state.slow_momentum["b"].dtype == "float32"
    assert params["b"].dtype == "bfloat16"
    for leaf, expected in zip(resumed, jax.tree.leaves((params, state, slow_params(state, params))), strict=True):
        tolerance = 16 * jnp.finfo(expected.dtype).eps if jnp.issubdtype(expected.dtype, jnp.floating) else 0
        np.testing.assert_allclose(leaf, np.asarray(expected, leaf.dtype), rtol=tolerance, atol=tolerance)


def msgpack(path, run, like):
    path.write_bytes(flax.serialization.to_bytes(run))
    return flax.serialization.from_bytes(like, path.read_bytes())


def pickled(path, run, like):
    path.write_bytes(pickle.dumps(run))
    return pickle.loads(path.read_bytes())


def savez(path, run, like):
    with path.open("wb") as file:
        np.savez(file, *orbax_worker.saved_leaves(run))
    with np.load(path) as file:
        saved = jax.tree.unflatten(jax.tree.structure(like), list(file.values()))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), saved, like)


def equinox_leaves(path, run, like):
    equinox.tree_serialise_leaves(path, run)
    return equinox.tree_deserialise_leaves(path, like)


@pytest.mark.parametrize("write_and_read", [msgpack, pickled, savez, equinox_leaves])
@pytest.mark.parametrize("position", [0, 3, 4])
def test_runs_resume_from_a_file_bit_for_bit(saved, tmp_path, position, write_and_read):
    for name in OPTIMIZERS:
        read = write_and_read(tmp_path / "file", saved[position][name], orbax_worker.start(name))
        assert jax.tree.structure(read) == jax.tree.structure(saved[position][name])
        assert_same_bits(read, saved[position][name])
        assert_same_bits(orbax_worker.train(name, read), saved[STEPS][name])
