"""Training in several processes equals training in one: replicated, on shards, and from checkpoints made by others."""

import pytest
import torch

from tests.child_processes import run_together
from tests.comparison import assert_same_bits
from tests.test_torch import distributed_worker as worker
from tests.test_torch.by_hand import ByHand
from tests.test_torch.distributed_worker import (
    CHECKPOINTED,
    OPTIMIZERS,
    REPLICATED,
    SAVED_AFTER,
    STEPS,
    TIMEOUT,
    ZERO_REDUNDANCY,
)

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch has no FSDP2 for the CPU"
)

TRAINED = [*(("data_parallel", name) for name in REPLICATED), *(("fully_sharded", name) for name in OPTIMIZERS)]
# One Lookahead, without momentum.
SINGLE = [name for name, (_, settings) in OPTIMIZERS.items() if len(settings) == 1 and name != "outer"]


def run_worker(directory, run, world_size):
    """Start processes that work together, and return what each process wrote."""
    run_together(worker, run, directory, world_size, TIMEOUT)
    return [torch.load(directory / f"{run}-{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(directory):
    """The results of each of two processes."""
    return run_worker(directory, "two", 2)


@pytest.fixture(scope="module")
def loaded(directory, two):
    """The results of one process, and of each of three, with the checkpoints of two processes."""
    return {1: [worker.load(directory)], 3: run_worker(directory, "load", 3)}


class ByHands:
    """One Lookahead, or one Lookahead inside another, by hand: on the whole batch in one process."""

    def __init__(self, name):
        make, settings = OPTIMIZERS[name]
        self.model = worker.make_model()
        self.optimizer = make(self.model.parameters())
        self.levels = [ByHand(self.optimizer, *one) for one in settings]

    def step(self, step):
        worker.backward(self.model, step)
        self.optimizer.step()
        for index, level in enumerate(self.levels):
            level.after_step()
            if level.steps % level.sync_period == 0:
                for inner in self.levels[:index]:
                    inner.slow = [one.clone() for one in level.slow]

    def history(self):
        history = []
        for step in range(STEPS):
            self.step(step)
            weights = [self.model.parameters(), *(level.slow for level in self.levels)]
            history.append(
                {name: list(map(worker.whole, one)) for name, one in zip(("fast", "slow", "slow_2"), weights)}
            )
        return history


@pytest.fixture(scope="module")
def in_one_process():
    histories = {name: ByHands(name).history() for name in OPTIMIZERS if name != "outer"}
    model = worker.make_model()
    # Other tests compare it with the oracle.
    return {**histories, "outer": worker.train(model, worker.make_optimizer("outer", model.parameters()))}


def output(weights):
    """Return the output of the model with given weights for the first batch."""
    model = worker.make_model()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(weights), model.parameters())
    with torch.no_grad():
        return model(worker.batch(0)[0])


def assert_close(actual, expected):
    # In float64. A difference in the last bits of a gradient grows in training.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "name"), TRAINED)
def test_training_in_two_processes_is_training_in_one(two, in_one_process, kind, name):
    for result in two:
        assert_close(result[kind][name]["history"], in_one_process[name])


@pytest.mark.parametrize(("kind", "name"), TRAINED)
def test_all_processes_have_the_same_fast_and_slow_weights(two, kind, name):
    one, other = (result[kind][name]["history"] for result in two)
    assert_same_bits(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_slow_weight_is_sharded_as_its_parameter(two, name):
    assert all(result["fully_sharded"][name]["alike"] for result in two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_on_shards_needs_no_communication(two, name):
    assert [result["fully_sharded"][name]["communication"] for result in two] == [0, 0]


@pytest.mark.parametrize("name", SINGLE)
def test_a_sync_takes_the_slow_step_on_the_shards(two, name):
    _, [(sync_period, slow_step_size)] = OPTIMIZERS[name]
    for result in two:
        for step, (before, moved, slow, fast) in enumerate(result["fully_sharded"][name]["steps"], 1):
            if step % sync_period == 0:
                assert_same_bits(slow, [torch.lerp(one, other, slow_step_size) for one, other in zip(before, moved)])
                assert_same_bits(fast, slow)
            else:
                assert_same_bits(slow, before)
                assert_same_bits(fast, moved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_evaluation_on_sharded_slow_weights_is_that_of_one_process(two, in_one_process, name):
    outermost = "slow_2" if name == "nested" else "slow"
    expected = [output(weights[outermost]) for weights in in_one_process[name]]
    for result in two:
        assert_close(result["fully_sharded"][name]["evaluations"], expected)
        assert result["fully_sharded"][name]["came_back"]


def test_an_evaluation_neither_uses_nor_leaves_weights_that_fsdp_keeps_gathered(two, in_one_process):
    expected = in_one_process["momentum"]
    for result in two:
        assert_close(result["gathered"]["evaluations"], [output(weights["slow"]) for weights in expected])
        assert_close(result["gathered"]["history"], expected)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_sharded_run_is_saved_in_mid_cycle_and_goes_on_as_one_process(two, in_one_process, name):
    assert all(SAVED_AFTER % sync_period for sync_period, *_ in OPTIMIZERS[name][1])
    assert_close(two[0]["saved"][name]["history"], in_one_process[name][SAVED_AFTER:])


@pytest.mark.parametrize("kind", ["sharded", "flat", "full", "block"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_state_dict_of_a_sharded_optimizer_resumes_bit_for_bit(two, kind, name):
    for result in two:
        saved = result["saved"][name]
        assert_same_optimizer(saved[kind]["loaded"], saved["saved"])
        assert_same_bits(saved[kind]["history"], saved["history"])


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_full_state_dict_of_a_block_is_refused_by_sharded_parameters(two, name):
    # PyTorch gives the fast weights only to the first process.
    assert "Make full state dicts outside of it" in two[0]["saved"][name]["full in a block"]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", ["sharded", "flat", "block"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_distributed_checkpoint_loads_in_another_number_of_processes(two, loaded, world_size, kind, name):
    one, other = (result["saved"][name]["saved"] for result in two)
    state = {key: join(one["state"][key], other["state"][key]) for key in one["state"]}
    for result in loaded[world_size]:
        assert_same_optimizer(result[name][kind]["loaded"], {"state": state, "groups": one["groups"]})
        assert_close(result[name][kind]["history"], two[0]["saved"][name]["history"])


def join(*shards):
    """Return the tensor that was cut along its first dimension. A number is not cut."""
    return torch.cat(shards) if shards[0].dim() else shards[0]


def assert_same_optimizer(actual, expected):
    assert_same_bits(actual["state"], expected["state"])
    assert any(key.endswith(" slow") for key in actual["state"])
    for one, other in zip(actual["groups"], expected["groups"], strict=True):
        counts = [int(value) for key, value in one.items() if key.startswith("lookahead_step")]
        assert counts
        assert set(counts) == {SAVED_AFTER}
        # A loaded pair may be a list.
        one, other = ({**group, "betas": list(group.get("betas", []))} for group in (one, other))
        assert one == other


@pytest.mark.parametrize(("form", "name"), ZERO_REDUNDANCY)
def test_training_with_zero_redundancy_is_training_in_one_process(two, in_one_process, form, name):
    one, other = (result["zero_redundancy"][form, name]["history"] for result in two)
    assert_same_bits(one, other)
    assert_close(one, [weights["fast"] for weights in in_one_process[name]])


@pytest.mark.parametrize(("form", "name"), ZERO_REDUNDANCY)
def test_consolidated_state_has_the_slow_weights_and_resumes_bit_for_bit(two, in_one_process, form, name):
    for result in two:
        result = result["zero_redundancy"][form, name]
        assert result["count"] == SAVED_AFTER
        assert_close(result["slow"], in_one_process[name][SAVED_AFTER - 1]["slow"])
        assert_same_bits(result["resumed"], result["history"][SAVED_AFTER:])


@pytest.mark.parametrize("difference", ["period", "step size", "count"])
def test_processes_whose_settings_differ_are_told_so_at_the_first_step(two, difference):
    outcomes = [one["unequal"][difference] for one in two]
    refused = [outcome for outcome in outcomes if outcome[0]]
    # The first process leaves its settings, and the other process compares.
    assert len(refused) == 1
    (error, has_moved) = refused[0]
    assert not has_moved
    assert "All processes must have the same `sync_period`, `slow_step_size` and number of steps" in error
    assert "on rank 0" in error
    assert "on rank 1" in error


@pytest.mark.parametrize("difference", ["nothing", "period and shape"])
def test_processes_with_equal_settings_or_other_parameters_train(two, difference):
    assert [one["unequal"][difference] for one in two] == [(None, True)] * 2
