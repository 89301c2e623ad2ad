"""A run that is stopped anywhere and resumed in a new process ends bit for bit like a run that never stopped."""

import pytest
import torch

from tests import child_processes
from tests.child_processes import finish, kill_when_reached
from tests.test_torch import stopped_runs
from tests.test_torch.by_hand import ByHand
from tests.test_torch.stopped_runs import FIRST, RUNS, SAVED_AFTER, STEPS, Run

TIMEOUT = 120
pytestmark = pytest.mark.usefixtures("one_thread")


def start(command, directory):
    return child_processes.start(stopped_runs, command, directory, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, one_thread):
    """The directory where the runs were saved and resumed, and the final states of runs that never stopped."""
    directory = tmp_path_factory.mktemp("resume")
    killed = start("killed", directory)
    try:
        for name, make in RUNS.items():
            run = Run(make)
            for step in SAVED_AFTER:
                run.train(step).save(directory / f"{name}-{step}.pt")
                run.save_in_block(directory / f"{name}-{step}.block")
            run.train().save(directory / f"{name}.result")
        Run(stopped_runs.bare_adam, torch.float64).train(6).save(directory / "bare.pt")
        kill_when_reached(killed, directory / "reached", TIMEOUT)
    finally:
        killed.kill()
    finish(start("resumed", directory), TIMEOUT)
    return directory


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_state(actual, expected):
    """Compare nested state. Tensors are compared bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same_state(actual[key], expected[key])
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_same_state(one, other)
    elif isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("step", SAVED_AFTER)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_in_a_new_process_bit_for_bit(directory, name, step):
    resumed, never_stopped = read(directory / f"{name}-{step}.result"), read(directory / f"{name}.result")
    assert resumed["steps"] == STEPS
    assert_same_state(resumed, never_stopped)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("step", SAVED_AFTER)
@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_in_a_block_resumes_bit_for_bit_whatever_is_loaded_first(directory, name, step, first):
    assert_same_state(read(directory / f"{name}-{step}.{first}"), read(directory / f"{name}.result"))


@pytest.mark.parametrize("step", SAVED_AFTER)
@pytest.mark.parametrize("name", RUNS)
def test_the_model_saved_in_a_block_is_the_model_that_was_scored_there(directory, name, step):
    saved = read(directory / f"{name}-{step}.block")
    assert torch.equal(read(directory / f"{name}-{step}.score"), saved["score"])
    if step % 12 in (1, 2, 5):
        # Between syncs of any group the scored model is a different model.
        assert not torch.equal(saved["score"], Run(RUNS[name]).train(step).score())


@pytest.mark.parametrize("name", RUNS)
def test_saving_changes_nothing(directory, name):
    assert_same_state(Run(RUNS[name]).train().state(), read(directory / f"{name}.result"))


@pytest.mark.parametrize("name", RUNS)
def test_loading_into_an_optimizer_that_trained_on_replaces_its_whole_state(directory, name):
    run = Run(RUNS[name]).train().load(directory / f"{name}-5.pt")
    assert_same_state(run.train().state(), read(directory / f"{name}.result"))


def test_a_killed_run_resumes_from_its_last_checkpoint_bit_for_bit(directory):
    assert read(directory / "resumed_from.result") == stopped_runs.KILLED_IN - 1
    assert (stopped_runs.KILLED_IN - 1) % 4
    assert_same_state(read(directory / "checkpoint.result"), Run(stopped_runs.momentum).train().state())


def test_slow_weights_start_from_the_fast_ones_of_a_checkpoint_of_the_bare_optimizer(directory):
    loaded = list(read(directory / "bare.pt")["model"].values())
    slow = read(directory / "bare_first_step.result")["optimizer"]["state"]
    assert all(torch.equal(slow[index]["slow"], one) for index, one in enumerate(loaded))


def test_a_checkpoint_of_the_bare_optimizer_goes_on_as_one_that_is_wrapped_from_there(directory):
    run = Run(stopped_runs.bare_adam, torch.float64).load(directory / "bare.pt")
    by_hand = ByHand(run.optimizer, 4)
    while run.steps < STEPS:
        run.step()
        by_hand.after_step()
    resumed = read(directory / "bare.result")
    torch.testing.assert_close(list(resumed["model"].values()), list(run.model.state_dict().values()))
    state = resumed["optimizer"]["state"]
    torch.testing.assert_close([state[index]["slow"] for index in range(len(by_hand.slow))], by_hand.slow)
    assert resumed["optimizer"]["param_groups"][0]["lookahead_step"] == by_hand.steps
