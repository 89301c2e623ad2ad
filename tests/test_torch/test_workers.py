"""Several workers: real processes whose pseudo-gradients are averaged, against the oracle; and what `reduce` may do."""

import copy
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lookahead_optim.torch import Lookahead, average
from tests import reference
from tests.child_processes import ROOT, kill_when_reached, run_together, start
from tests.comparison import assert_same_bits
from tests.test_torch import worker_loops
from tests.test_torch import worker_processes as worker
from tests.test_torch.by_hand import parameters, set_gradients
from tests.test_torch.worker_processes import (
    CURVATURES,
    DIFFERENCES,
    KILLED_AFTER,
    LEARNING_RATE,
    OPTIMA,
    OUTER,
    PERIOD,
    SETTINGS,
    STEP,
    STEPS,
    SYNCED_AFTER,
    TIMEOUT,
    WIDE_DTYPES,
)

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def start_workers(directory, run, world_size):
    """Start processes that work together, and return what each process wrote."""
    run_together(worker, run, directory, world_size, TIMEOUT)
    return [torch.load(directory / f"{run}-{rank}.pt") for rank in range(world_size)]


class Workers:
    """Inner optimizers of the oracle, one for each worker.

    The mean of their pseudo-gradients is the slow weight minus the mean of their weights. This optimizer's weights are
    that mean.
    """

    def __init__(self, inner):
        self.inner = inner

    def start(self, weights):
        for one in self.inner:
            one.start(weights)

    def restart(self, weights):
        for one in self.inner:
            one.restart(weights)

    def apply(self, gradients):
        for one, its_gradients in zip(self.inner, gradients):
            one.apply(its_gradients)

    @property
    def weights(self):
        return [np.mean(weights, axis=0) for weights in zip(*(one.weights for one in self.inner))]


def oracle(name, size, weights):
    slow_step_size, settings = SETTINGS[name]
    settings = {key: value for key, value in settings.items() if key != "slow_dtype"}
    workers = Workers([reference.SGD(LEARNING_RATE, 0.9) for _ in range(size)])
    return reference.Lookahead(workers, PERIOD, slow_step_size, **settings).start(weights)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def results(directory):
    """The results of each of two workers, and of each of four."""
    return {2: start_workers(directory, "two", 2), 4: start_workers(directory, "four", 4)}


@pytest.mark.parametrize("name", ["plain", "nesterov", "heavy_ball"])
@pytest.mark.parametrize("size", [2, 4])
def test_workers_take_the_outer_step_with_the_mean_of_their_pseudo_gradients(results, size, name):
    expected = oracle(name, size, [one.detach().numpy() for one in worker.make_parameters()])
    for step in range(1, STEPS + 1):
        expected.apply([worker.gradients(one, step) for one in range(size)])
        if step == SYNCED_AFTER:
            expected.sync()
        for rank, result in enumerate(results[size]):
            found = result["trained"][name][step - 1]
            for key, value in (("fast", expected.inner.inner[rank].weights), ("slow", expected.slow)):
                for one, other in zip(found[key], value):
                    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [2, 4])
def test_all_workers_have_the_same_slow_weights_and_momentum_bit_for_bit(results, size):
    first, *others = (result["trained"] for result in results[size])
    for name in first:
        for other in others:
            for one, another in zip(first[name], other[name]):
                for key in one.keys() - {"fast", "moved"}:
                    assert_same_bits(another[key], one[key])
        # Between syncs each worker has its own fast weights.
        assert not torch.equal(first[name][PERIOD]["fast"][0], others[0][name][PERIOD]["fast"][0])


def test_wide_slow_weights_take_the_mean_that_was_computed_in_float32(results):
    eta, settings = SETTINGS["wide"]
    mu = settings["slow_momentum"]
    slow = [one.float() for one in worker.clones(worker.make_parameters(WIDE_DTYPES))]
    momentum = [torch.zeros_like(one) for one in slow]
    for index, found in enumerate(zip(*(result["trained"]["wide"] for result in results[2]))):
        if (index + 1) % PERIOD == 0 or index + 1 == SYNCED_AFTER:
            for number, dtype in enumerate(WIDE_DTYPES):
                moves = [slow[number].to(dtype) - one["moved"][number] for one in found]
                mean = ((moves[0].float() + moves[1].float()) / 2).to(dtype).float()
                momentum[number] = mu * momentum[number] + mean
                slow[number] = slow[number] - eta * (mean + mu * momentum[number])
        for one in found:
            assert [weight.dtype for weight in one["fast"]] == WIDE_DTYPES
            for key, expected in (("slow", slow), ("slow_momentum", momentum)):
                torch.testing.assert_close(one[key], expected, rtol=1e-5, atol=1e-6)
            if (index + 1) % PERIOD == 0:
                assert_same_bits(one["fast"], [weight.to(dtype) for weight, dtype in zip(one["slow"], WIDE_DTYPES)])
        slow, momentum = worker.clones(found[0]["slow"]), worker.clones(found[0]["slow_momentum"])


def test_two_workers_settle_where_their_cycles_cancel(results):
    moved = [1 - (1 - STEP * curvature) ** 5 for curvature in CURVATURES]
    expected = sum(q * c for q, c in zip(moved, OPTIMA)) / sum(moved)
    for result in results[2]:
        assert len(result["fixed"]) == len(OUTER)
        for value in result["fixed"]:
            assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_workers_that_synchronise_after_each_step_are_data_parallel(results, momentum):
    for result in results[2]:
        ddp, workers = result["data_parallel"][momentum]
        torch.testing.assert_close(workers, ddp, rtol=1e-12, atol=1e-14)


NAMED = {
    "count": "`lookahead_step` of group 1 is 0 in process 0 of the group and 7 in process 1",
    "period": "`sync_period` of group 1 is 3 in process 0 of the group and 4 in process 1",
    "step size": "`slow_step_size` of group 1 is 0.5 in process 0 of the group and 0.7 in process 1",
    "momentum": "`slow_momentum` of group 1 is 0.5 in process 0 of the group and 0.7 in process 1",
    "nesterov": "`slow_nesterov` of group 1 is True in process 0 of the group and False in process 1",
    "shape": "the shape of parameter 0 of group 1 is (4,) in process 0 of the group and (5,) in process 1",
    "dtype": "the dtype of parameter 0 of group 1 is torch.float64 in process 0 of the group and torch.float32 in",
    "weight": "the checksum of the slow weight of parameter 0 of group 1 is ",
    "loaded": "the checksum of the slow weight of parameter 0 of group 1 is ",
    "parameters": "the number of parameters of group 1 is 2 in process 0 of the group and 1 in process 1",
    "groups": "the number of groups is 2 in process 0 of the group and 1 in process 1",
    "loaded momentum": "the checksum of the slow momentum of parameter 0 of group 1 is ",
    "unsynced": "`lookahead_unsynced` of group 1 is 2 in process 0 of the group and 3 in process 1",
    "off": "`sync_period` of group 0 is 3 in process 0 of the group and 0 in process 1",
    "permuted": "the checksum of the slow weight of parameter 0 of group 1 is ",
    "frozen": "`requires_grad` of parameter 0 of group 1 is True in process 0 of the group and False in process 1",
    "slow dtype": "`slow_dtype` is None in process 0 of the group and torch.float64 in process 1",
}


@pytest.mark.parametrize("difference", NAMED)
def test_workers_that_start_differently_are_all_told_so_and_nothing_is_changed(results, difference):
    for result in results[2]:
        outcome = result["started"][difference]
        assert "All workers must start alike" in outcome["error"]
        assert f"Received: {NAMED[difference]}" in outcome["error"]
        (weights, state), (weights_after, state_after) = outcome["before"], outcome["after"]
        assert_same_bits(weights_after, weights)
        assert_same_bits(state_after["state"], state["state"])
        assert state_after["param_groups"] == state["param_groups"]


@pytest.mark.parametrize("difference", sorted(set(DIFFERENCES) - set(NAMED)))
def test_workers_that_start_alike_train(results, difference):
    for result in results[2]:
        outcome = result["started"][difference]
        assert outcome["error"] is None
        assert not torch.equal(outcome["after"][0][0], outcome["before"][0][0])


def test_workers_train_once_they_have_the_weights_of_the_first(results):
    assert all(result["started"]["weight"]["moved"] for result in results[2])


def test_workers_are_compared_once_and_again_after_loading(results):
    for result in results[2]:
        assert result["calls"] == [{"compared": 1, "reduced": 3}] * 2


@pytest.mark.parametrize(("size", "bucket"), [(2, 2**25), (2, 64), (4, 64)])
def test_the_mean_is_that_of_all_workers_for_each_kind_of_tensor(results, size, bucket):
    of_workers = [worker.to_average(rank) for rank in range(size)]
    for result in results[size]:
        assert_same_bits(result["averaged"][bucket], results[size][0]["averaged"][bucket])
        for found, *ones in zip(result["averaged"][bucket], *of_workers, strict=True):
            wide = torch.promote_types(found.dtype, torch.float32)
            expected = torch.stack([one.to(wide) for one in ones]).mean(dim=0).to(found.dtype)
            # One unit in the last place: means may be summed in another order.
            torch.testing.assert_close(found, expected)
            if found.dtype in (torch.float16, torch.bfloat16):
                assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", worker.KINDS)
def test_a_sync_takes_no_memory_of_the_size_of_the_weights(results, kind):
    for result in results[2]:
        weights, (first, second, *others) = result["memory"][kind]
        # The first step captures slow weights and momentum. For the first kind the memory is new.
        assert first > 2 * weights or kind != "float32"
        # A tensor that cannot be sent as it lies in memory is copied, a bucket at a time. gloo keeps up to four of
        # them.
        copies = 0 if kind == "float32" else 4
        assert max(second, *others) < copies * worker.SMALL_BUCKET + 12e6 < weights / 2


def test_what_may_make_workers_differ_after_the_start_is_compared_in_the_next_step(results):
    for result in results[2]:
        for change in worker.CHANGES:
            number = "0 of group 1" if change == "added" else "0 of group 0"
            expected = f"Received: the checksum of the slow weight of parameter {number} is "
            assert expected in result["changed"][change], change


def test_a_process_outside_of_the_group_is_told_so_and_groups_have_settings_of_their_own(results):
    (_, *first), (error, *second) = (result["in_groups"] for result in results[2])
    assert error.count("`average(process_group)` must be given a group that has this process in it") == 2
    for weights, alone in (first, second):
        torch.testing.assert_close(weights, alone, rtol=1e-14, atol=1e-15)
    assert not torch.equal(first[0][0], second[0][0])


def test_the_bytes_that_are_sent_are_those_of_ddp_divided_by_the_period(results):
    for result in results[2]:
        sent, size = result["sent"]
        # Two workers send their weights once in a ring.
        for period, count in sent.items():
            assert count == pytest.approx(20 * size / (period or 1), rel=0.05)


# Two replicas, each sharded over two processes


@torch.no_grad()
def outer_step(models, slow, momentum, eta, mu):
    """Make the outer step of several models by hand. `slow` and `momentum`, lists of tensors, are changed too."""
    for index, fast in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        s = slow[index] - sum(fast) / len(fast)
        momentum[index] = mu * momentum[index] + s
        slow[index] = slow[index] - eta * (s + mu * momentum[index])
        for one in fast:
            one.copy_(slow[index])


def trained_by_hand(models, inner, slow, momentum, steps):
    """Train a model for each worker, with its inner optimizer and its data. Yield after each step."""
    for step in steps:
        for rank, (model, optimizer) in enumerate(zip(models, inner)):
            optimizer.zero_grad()
            worker.loss_of(model, rank, step).backward()
            optimizer.step()
        if (step + 1) % PERIOD == 0:
            outer_step(models, slow, momentum, eta=0.7, mu=0.9)
        yield step


@pytest.fixture
def replicas(results):
    if results[4][0]["replicas"] is None:
        pytest.skip("this PyTorch has no FSDP2 for the CPU")
    return [result["replicas"] for result in results[4]]


def test_replicas_that_are_sharded_train_as_workers_in_one_process(replicas):
    models = [worker.linear_model() for _ in range(2)]
    inner = [torch.optim.Adam(model.parameters(), 0.05) for model in models]
    slow = worker.clones(models[0].parameters())
    momentum = [torch.zeros_like(one) for one in slow]
    for step in trained_by_hand(models, inner, slow, momentum, range(STEPS)):
        for result in replicas:
            found = result["history"][step]
            expected = list(models[result["replica"]].parameters())
            torch.testing.assert_close(found["fast"], worker.clones(expected), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found["slow"], slow, rtol=1e-9, atol=1e-11)


def test_replicas_that_are_sharded_resume_in_mid_cycle_bit_for_bit(replicas):
    assert KILLED_AFTER % PERIOD
    for result in replicas:
        assert_same_bits(result["resumed"], result["history"][KILLED_AFTER:])


# Another number of workers


@pytest.fixture(scope="module", params=[1, 3])
def another_number(directory, results, request):
    return start_workers(directory, "another_number", request.param)


@pytest.mark.parametrize("begin", worker.LOADED_BY_OTHERS)
def test_another_number_of_workers_trains_on_from_the_checkpoint_of_one(directory, another_number, begin):
    saved = torch.load(directory / "uninterrupted" / f"{begin}-0" / "plain")
    models, inner = [], []
    for _ in another_number:
        model = worker.linear_model()
        optimizer = Lookahead(torch.optim.AdamW(model.parameters(), 0.05), PERIOD, 0.7, slow_momentum=0.9)
        model.load_state_dict(saved["model"])
        # PyTorch does not copy the moments.
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        models.append(model)
        inner.append(optimizer.inner_optimizer)
    slow, momentum = ([optimizer.state[one][key] for one in model.parameters()] for key in ("slow", "slow_momentum"))
    for step in trained_by_hand(models, inner, slow, momentum, range(begin, begin + 2 * PERIOD)):
        for model, histories in zip(models, another_number):
            found = histories[begin][step + 1]
            torch.testing.assert_close(found["fast"], worker.clones(model.parameters()), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found["slow"], slow, rtol=1e-9, atol=1e-11)


# One worker is killed


def assert_ends_as_uninterrupted(results, resumed):
    for result, history in zip(results[2], resumed, strict=True):
        assert KILLED_AFTER + 1 in history
        assert 1 not in history
        assert_same_bits({step: result["uninterrupted"][step] for step in history}, history)


@pytest.fixture(scope="module")
def resumed(directory):
    """The results of each of two workers with the checkpoints of two workers, one of which was killed in mid-cycle."""
    with (directory / "output.txt").open("w") as output:
        children = [start(worker, "killed", directory, rank, 2, output=output, **ENVIRONMENT) for rank in range(2)]
    try:
        kill_when_reached(children[1], directory / "reached", TIMEOUT)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return start_workers(directory, "resumed", 2)


@pytest.mark.parametrize("form", worker.FORMS)
def test_workers_of_which_one_was_killed_resume_from_their_checkpoints_bit_for_bit(results, resumed, form):
    assert_ends_as_uninterrupted(results, [histories[form] for histories in resumed])


@pytest.mark.skipif(worker.FORMS == ["plain"], reason="PyTorch 2.6 may hang when restarted processes end")
def test_torchrun_starts_workers_again_of_which_one_was_killed(results, directory):
    # torchrun's shared store keeps the addresses of dead processes, where gloo would look for them.
    new_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # `python -m torch.distributed.run` is `torchrun`.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["--monitor-interval=0.1", "-m", worker.__name__, "torchrun", str(directory)]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **new_store},
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (directory / "torchrun-killed").exists()
    assert_ends_as_uninterrupted(results, [torch.load(directory / f"torchrun-{rank}.pt") for rank in range(2)])


# What `reduce` may do, in one process

ETA, MU = 0.7, 0.5


class Reduce:
    """Scales the pseudo-gradients, and then returns or raises the next result."""

    def __init__(self, *outcomes, scale=1.0):
        self.outcomes, self.scale, self.given = list(outcomes), scale, []

    def __call__(self, pseudo_gradients):
        assert not any(one.requires_grad for one in pseudo_gradients)
        self.given.append(worker.clones(pseudo_gradients))
        for one in pseudo_gradients:
            one.mul_(self.scale)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def make(reduce, weights=None, period=3, **settings):
    weights = parameters((3, 2), (4,)) if weights is None else weights
    inner = torch.optim.SGD(weights, LEARNING_RATE, momentum=0.9)
    return weights, Lookahead(inner, period, ETA, slow_momentum=MU, **settings, reduce=reduce)


class Abandoning:
    """The outer step of one worker by hand, in float64. Some syncs fail: only the fast weights restart."""

    def __init__(self, weights, period=3, scale=1.0):
        self.fast = [one.detach().double().numpy().copy() for one in weights]
        self.velocity = [np.zeros_like(one) for one in self.fast]
        self.slow = [one.copy() for one in self.fast]
        self.b = [np.zeros_like(one) for one in self.fast]
        self.period, self.scale, self.t = period, scale, 0

    def step(self, gradients, fails=False):
        self.t += 1
        for index, gradient in enumerate(gradients):
            self.velocity[index] = 0.9 * self.velocity[index] + gradient.double().numpy()
            self.fast[index] = self.fast[index] - LEARNING_RATE * self.velocity[index]
        if self.t % self.period == 0:
            for index, slow in enumerate(self.slow):
                s = self.scale * (slow - self.fast[index])
                if not fails:
                    self.b[index] = MU * self.b[index] + s
                    self.slow[index] = slow - ETA * (s + MU * self.b[index])
                self.fast[index] = self.slow[index].copy()


def assert_equal_to_hand(weights, optimizer, hand):
    for index, one in enumerate(weights):
        np.testing.assert_allclose(one.detach().numpy(), hand.fast[index], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(optimizer.state[one]["slow"].numpy(), hand.slow[index], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(optimizer.state[one]["slow_momentum"].numpy(), hand.b[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("returned", [None, True])
def test_reduce_is_given_the_pseudo_gradients_once_a_sync_and_changes_them(returned):
    reduce = Reduce(returned, scale=0.5)
    weights, optimizer = make(reduce)
    hand = Abandoning(weights, scale=0.5)
    for step in range(8):
        set_gradients(weights, step)
        hand.step([one.grad for one in weights])
        optimizer.step()
        assert len(reduce.given) == (step + 1) // 3
        assert_equal_to_hand(weights, optimizer, hand)
    assert [one.shape for one in reduce.given[0]] == [one.shape for one in weights]


FAILURES = {
    "abandoned": (False, None),
    "raised": (ConnectionError("a peer is gone"), RuntimeError),
    "returned a number": (1, RuntimeError),
    "returned a tensor": (torch.tensor(False), RuntimeError),
    "returned tensors": ([torch.zeros(2)], RuntimeError),
    "returned a bool of NumPy": (np.False_, RuntimeError),
    "interrupted": (KeyboardInterrupt(), KeyboardInterrupt),
}


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_sync_that_failed_training_resumes_from_the_slow_weights(failure, is_shared):
    outcome, error = FAILURES[failure]
    weights = parameters((3, 2), (4,))
    if is_shared:
        whole = torch.cat([one.detach().reshape(-1) for one in weights])
        weights = [torch.nn.Parameter(whole[:6].view(3, 2)), torch.nn.Parameter(whole[6:])]
    weights, optimizer = make(Reduce(None, outcome, scale=2.0), weights)
    hand = Abandoning(weights, scale=2.0)
    for step in range(1, 12):
        set_gradients(weights, step)
        hand.step([one.grad for one in weights], fails=step == 6)
        if step == 6 and error is not None:
            slow, momentum = ([optimizer.state[one][name] for one in weights] for name in ("slow", "slow_momentum"))
            with pytest.raises(error) as raised:
                optimizer.step()
            if error is RuntimeError:
                assert "`reduce` failed at a sync. Slow weights, slow momentum" in str(raised.value)
                is_cause = isinstance(outcome, Exception)
                assert raised.value.__cause__ is outcome if is_cause else type(raised.value.__cause__) is TypeError
            for name, expected in (("slow", slow), ("slow_momentum", momentum)):
                assert_same_bits([optimizer.state[one][name] for one in weights], expected)
        else:
            optimizer.step()
        if step == 6:
            assert_same_bits(worker.clones(weights), [optimizer.state[one]["slow"] for one in weights])
            # No step was made since, so momentum does not move the weights.
            optimizer.sync()
        assert_equal_to_hand(weights, optimizer, hand)
        assert [group["lookahead_step"] for group in optimizer.param_groups] == [step]


def test_what_reduce_returned_is_named():
    weights, optimizer = make(Reduce(1), period=1)
    set_gradients(weights, 0)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    message = "`reduce` must return None or True to go on, or False to abandon the cycle. Received: 1 of type int"
    assert message in str(raised.value.__cause__)


@pytest.mark.parametrize("momentum", [0.0, MU])
def test_a_sync_by_hand_reduces_if_steps_were_made_since_the_last_one(momentum):
    reduce = Reduce()
    weights = parameters((3, 2), (4,))
    optimizer = Lookahead(torch.optim.SGD(weights, LEARNING_RATE), 3, ETA, slow_momentum=momentum, reduce=reduce)
    counts = []
    for step in range(5):
        optimizer.sync()
        counts.append(len(reduce.given))
        set_gradients(weights, step)
        optimizer.step()
        if step == 2:
            optimizer.sync()
            counts.append(len(reduce.given))
    assert counts == [0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("is_longer", [False, True])
def test_a_reduce_that_puts_other_tensors_into_its_list_is_told_so(is_longer):
    def reduce(pseudo_gradients):
        pseudo_gradients[0:1] = [pseudo_gradients[0] / 2] * (1 + is_longer)

    weights, optimizer = make(reduce, period=1)
    set_gradients(weights, 0)
    with pytest.raises(RuntimeError, match="`reduce` failed") as raised:
        optimizer.step()
    assert "`reduce` must change the tensors of its list in place" in str(raised.value.__cause__)


@pytest.mark.parametrize("reduce", [average, torch.distributed.all_reduce, lambda: None], ids=["average", "dist", "no"])
def test_a_callable_that_is_no_reduce_fails_at_the_first_sync_with_its_own_error(reduce):
    weights, optimizer = make(reduce, period=1)
    set_gradients(weights, 0)
    with pytest.raises(RuntimeError, match="`reduce` failed at a sync"):
        optimizer.step()


@pytest.mark.parametrize("value", ["mean", 1, True, torch.zeros(1)])
def test_reduce_must_be_callable(value):
    weights = parameters((2,))
    inner = torch.optim.SGD(weights, 0.1)
    groups = copy.deepcopy(inner.state_dict())
    with pytest.raises(TypeError, match=re.escape("`reduce` must be a callable that changes a list of tensors")):
        Lookahead(inner, reduce=value)
    assert inner.state_dict() == groups


def test_an_average_without_processes_is_told_so_by_pytorch():
    assert not dist.is_initialized()
    weights, optimizer = make(average())
    set_gradients(weights, 0)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        optimizer.step()


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_pseudo_gradients_are_in_the_place_of_the_fast_weights_if_these_share_no_memory(is_shared):
    places = []
    weights = parameters((3, 2), (6,))
    if is_shared:
        weights[1] = torch.nn.Parameter(weights[0].detach().view(6))
    weights, optimizer = make(lambda given: places.extend(one.data_ptr() for one in given), weights, period=1)
    set_gradients(weights, 0)
    optimizer.step()
    assert (places == [one.data_ptr() for one in weights]) == (not is_shared)
    assert torch.equal(weights[0].flatten(), weights[1].flatten()) == is_shared


def test_groups_are_reduced_when_they_are_due_and_frozen_parameters_are_not():
    reduce = Reduce()
    weights = parameters((2,), (3,), (4,), (5,))
    weights[3].requires_grad_(False)
    periods = [2, 0, 3]
    groups = [{"params": one, "sync_period": k} for one, k in zip((weights[:1], weights[1:2], weights[2:]), periods)]
    _, optimizer = make(reduce, groups)
    for step in range(1, 7):
        set_gradients(weights[:3], step)
        optimizer.step()
    assert [[len(one) for one in given] for given in reduce.given] == [[2], [4], [2], [2, 4]]


def test_of_nested_wrappers_each_reduces_and_the_inner_one_restarts_after_a_failure():
    inner_reduce, outer_reduce = Reduce(), Reduce(OSError("gone"))
    weights = parameters((3,))
    inner = Lookahead(torch.optim.SGD(weights, 0.1), 2, reduce=inner_reduce)
    optimizer = Lookahead(inner, 3, 0.7, slow_momentum=0.5, reduce=outer_reduce)
    for step in range(1, 7):
        set_gradients(weights, step)
        if step == 3:
            start = optimizer.state[weights[0]]["slow_2"].clone()
            with pytest.raises(RuntimeError, match="`reduce` failed"):
                optimizer.step()
            for one in (weights[0].detach(), *(optimizer.state[weights[0]][name] for name in ("slow", "slow_2"))):
                assert_same_bits(one, start)
        else:
            optimizer.step()
    assert (len(inner_reduce.given), len(outer_reduce.given)) == (3, 2)
    assert_same_bits(optimizer.state[weights[0]]["slow"], optimizer.state[weights[0]]["slow_2"])


def scaled(pseudo_gradients):
    for one in pseudo_gradients:
        one.mul_(0.5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_an_optimizer_reduces_in_the_same_way(copied):
    weights, optimizer = make(scaled)
    for step in range(4):
        set_gradients(weights, step)
        optimizer.step()
    other = copied(optimizer)
    copies = other.param_groups[0]["params"]
    for step in range(4, 8):
        for one, its_optimizer in ((weights, optimizer), (copies, other)):
            set_gradients(one, step)
            its_optimizer.step()
    assert_same_bits(worker.clones(copies), worker.clones(weights))


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_that_averages_trains_as_with_a_reduce_that_does_nothing(alone):
    weights, optimizer = make(average())
    others, other = make(lambda _: None)
    for step in range(7):
        for one, its_optimizer in ((weights, optimizer), (others, other)):
            set_gradients(one, step)
            its_optimizer.step()
    assert_same_bits(worker.clones(weights), worker.clones(others))


def test_a_process_group_is_kept_by_a_deep_copy_and_cannot_be_pickled(alone):
    _, optimizer = make(average(dist.group.WORLD))
    assert copy.deepcopy(optimizer)._reduce is optimizer._reduce
    with pytest.raises((TypeError, RuntimeError), match="ickle"):
        pickle.dumps(optimizer)
    _, optimizer = make(average())
    assert pickle.loads(pickle.dumps(optimizer))._reduce.process_group is None


def test_a_state_dict_has_nothing_of_reduce():
    (weights, optimizer), (others, other) = make(scaled), make(None)
    for one, its_optimizer in ((weights, optimizer), (others, other)):
        set_gradients(one, 0)
        its_optimizer.step()
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert_same_bits(optimizer.state_dict()["state"], other.state_dict()["state"])


# In the training loops of other libraries


@pytest.fixture(scope="module")
def loops(directory):
    """The weights and the batches of each of two workers in each loop."""
    for name in ("accelerate", "lightning", "transformers", "keras"):
        pytest.importorskip(name)
    run_together(worker_loops, "loops", directory, 2, TIMEOUT)
    return [torch.load(directory / f"loops-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", worker_loops.LOOPS)
def test_workers_in_the_loops_of_others_train_apart_between_syncs(loops, name):
    batches = [result[name][1] for result in loops]
    assert not torch.equal(batches[0][0][0], batches[1][0][0])
    models = [worker_loops.network() for _ in range(2)]
    inner = [worker_loops.inner(model.parameters()) for model in models]
    slow = worker.clones(models[0].parameters())
    momentum = [torch.zeros_like(one) for one in slow]
    for step, of_workers in enumerate(zip(*batches, strict=True), 1):
        for model, optimizer, (x, y) in zip(models, inner, of_workers):
            optimizer.zero_grad()
            worker_loops.loss_of(model, x, y).backward()
            optimizer.step()
        if step % worker_loops.PERIOD == 0:
            outer_step(models, slow, momentum, worker_loops.SIZE, worker_loops.MOMENTUM)
    assert step == 5
    for result, model in zip(loops, models):
        torch.testing.assert_close(result[name][0], worker.clones(model.parameters()))
    assert not torch.equal(loops[0][name][0][0], loops[1][name][0][0])
