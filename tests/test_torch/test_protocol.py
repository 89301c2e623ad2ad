"""The contract of `torch.optim.Optimizer`: state, groups, hooks, copies, pickles, checkpoints and shared memory."""

import copy
import io
import pickle
import time
from collections import defaultdict

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

SHAPES = (3, 4), (5,)
TIMEOUT = 240


def sgd(weights, **kwargs):
    return torch.optim.SGD(weights, 0.1, momentum=0.9, **kwargs)


def adam(weights, **kwargs):
    return torch.optim.Adam(weights, 0.05, amsgrad=True, **kwargs)


def adagrad(weights):
    return torch.optim.Adagrad(weights, 0.1)


def lbfgs(weights):
    return torch.optim.LBFGS(weights, 0.1, max_iter=3)


def wrapped(inner=sgd, sync_period=3, slow_step_size=0.25):
    return Lookahead(inner(parameters(*SHAPES)), sync_period, slow_step_size)


def nested(inner=sgd):
    return Lookahead(wrapped(inner, 2), 3, 0.25)


def by_hand(inner=sgd, sync_period=3, slow_step_size=0.25):
    return ByHand(inner(parameters(*SHAPES)), sync_period, slow_step_size)


def weights(optimizer):
    return [one for group in optimizer.param_groups for one in group["params"]]


def train(optimizer, stop, start=0):
    """Make the steps from `start` to `stop`, with gradients that depend on the weights too."""
    for step in range(start, stop):
        fast = optimizer.parameters if isinstance(optimizer, ByHand) else weights(optimizer)

        def closure(fast=fast, step=step):
            set_gradients(fast, step)
            for one in fast:
                one.grad += one.detach() / 8
            return sum(float(one.detach().square().sum()) for one in fast)

        optimizer.step(closure)
    return optimizer


def saved(optimizer):
    """Return the state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(actual, expected):
    """Check everything except the parameters themselves, bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert sorted(actual, key=str) == sorted(expected, key=str)
        for key in actual:
            assert_same_state(actual[key], expected[key])
    elif isinstance(actual, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_same_state(one, other)
    elif torch.is_tensor(actual):
        assert_same_bits([actual], [expected])
    else:
        assert actual == expected


def assert_same(actual, expected):
    assert_same_bits(weights(actual), weights(expected))
    assert_same_state(actual.state_dict(), expected.state_dict())


def test_it_is_an_optimizer_with_the_defaults_of_the_inner_one_and_its_own():
    inner = sgd(parameters(*SHAPES))
    optimizer = Lookahead(inner, 3, 0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.inner_optimizer is inner
    assert optimizer.defaults == {**inner.defaults, "sync_period": 3, "slow_step_size": 0.25}
    assert optimizer.param_groups is inner.param_groups
    assert (optimizer.param_groups[0]["sync_period"], optimizer.param_groups[0]["slow_step_size"]) == (3, 0.25)


def test_repr_shows_the_inner_optimizer_and_the_settings():
    text = repr(wrapped())
    assert text.startswith("Lookahead (SGD (")
    assert "sync_period: 3" in text
    assert "slow_step_size: 0.25" in text
    assert repr(nested()).startswith("Lookahead (Lookahead (SGD (")
    assert "sync_period_2: 3" in repr(nested())


def test_state_reads_as_a_mapping_of_the_inner_entries_and_the_slow_weight():
    optimizer = wrapped(adam)
    first, second = weights(optimizer)
    assert (len(optimizer.state), first in optimizer.state, bool(optimizer.state)) == (0, False, False)
    start = [one.detach().clone() for one in (first, second)]
    view = optimizer.state
    train(optimizer, 2)
    assert len(view) == len(optimizer.state) == 2
    assert list(view) == [first, second]
    assert first in view
    assert torch.zeros(1) not in view
    assert [key for key, _ in view.items()] == [first, second]
    for one, at_start, (_, entry) in zip((first, second), start, view.items()):
        inner = optimizer.inner_optimizer.state[one]
        assert sorted(entry) == sorted([*inner, "slow"])
        assert_same_bits([entry["slow"]], [at_start])
        assert all(entry[name] is inner[name] for name in inner)
        assert "slow" not in inner


def test_state_of_a_parameter_without_a_gradient_has_the_slow_weight_alone():
    optimizer = wrapped()
    first, second = weights(optimizer)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert (len(optimizer.state), second in optimizer.state) == (2, True)
    assert list(optimizer.state) == [first, second]
    assert list(optimizer.state[second]) == ["slow"]


@pytest.mark.parametrize("make", [wrapped, nested])
def test_entries_can_be_replaced_through_the_state(make):
    optimizer, other = train(make(adam), 4), train(make(adam), 4)
    slow = [[one for one in entry.values() if torch.is_tensor(one)] for entry in optimizer.state.values()]
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if torch.is_tensor(value):
                entry[name] = value.to(torch.float64).to("cpu", copy=True).to(value.dtype)
    for before, entry in zip(slow, optimizer.state.values()):
        assert not {id(one) for one in before} & {id(one) for one in entry.values()}
    assert_same(train(optimizer, 9, 4), train(other, 9, 4))


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("name", ["slow", "momentum_buffer"])
def test_an_assigned_entry_is_the_one_that_the_next_steps_use(name, at):
    optimizer = train(wrapped(), at)
    first = weights(optimizer)[0]
    value = torch.full_like(first, 7.0)
    optimizer.state[first][name] = value
    assert optimizer.state_dict()["state"][0][name] is value
    reference = train(by_hand(), at)
    if name == "slow":
        reference.slow[0] = value.clone()
    else:
        reference.optimizer.state[reference.parameters[0]][name] = value.clone()
    assert_same_bits(weights(train(optimizer, 11, at)), train(reference, 11, at).parameters)


@pytest.mark.parametrize("at", [2, 4])
def test_a_whole_entry_can_be_assigned(at):
    optimizer, reference = train(wrapped(), at), train(by_hand(), at)
    first, second = weights(optimizer)
    optimizer.state[first] = {"momentum_buffer": torch.ones_like(first), "slow": torch.zeros_like(first)}
    optimizer.state[second] = {"momentum_buffer": torch.ones_like(second)}
    assert "slow" not in optimizer.inner_optimizer.state[first]
    assert "slow" not in optimizer.state[second]
    for one in reference.parameters:
        reference.optimizer.state[one]["momentum_buffer"].fill_(1)
    reference.slow[0].zero_()
    reference.slow[1] = second.detach().clone()
    assert_same_bits(weights(train(optimizer, 11, at)), train(reference, 11, at).parameters)


@pytest.mark.parametrize("at", [2, 4])
def test_a_deleted_entry_starts_again_from_the_parameter(at):
    optimizer, reference = train(wrapped(), at), train(by_hand(), at)
    first = weights(optimizer)[0]
    del optimizer.state[first]
    assert first not in optimizer.state
    assert len(optimizer.state) == 1
    assert 0 not in optimizer.state_dict()["state"]
    del reference.optimizer.state[reference.parameters[0]]
    reference.slow[0] = reference.parameters[0].detach().clone()
    assert_same_bits(weights(train(optimizer, 11, at)), train(reference, 11, at).parameters)


@pytest.mark.parametrize("at", [2, 4])
def test_a_deleted_slow_weight_is_captured_again(at):
    optimizer, reference = train(wrapped(), at), train(by_hand(), at)
    first = weights(optimizer)[0]
    del optimizer.state[first]["slow"]
    assert list(optimizer.state[first]) == ["momentum_buffer"]
    reference.slow[0] = reference.parameters[0].detach().clone()
    assert_same_bits(weights(train(optimizer, 11, at)), train(reference, 11, at).parameters)


def test_a_slow_weight_assigned_before_the_first_step_is_captured_anew_and_not_given_to_the_inner_optimizer():
    optimizer, reference = wrapped(adam), by_hand(adam)
    for one in weights(optimizer):
        optimizer.state[one]["slow"] = torch.zeros_like(one)
        assert not optimizer.inner_optimizer.state[one]
    assert_same_bits(weights(train(optimizer, 8)), train(reference, 8).parameters)


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("empty", [lambda: defaultdict(dict), dict])
def test_an_empty_state_assigned_resets_it(empty, at):
    optimizer, reference = train(wrapped(adam), at), train(by_hand(adam), at)
    optimizer.state = empty()
    assert len(optimizer.state) == len(optimizer.inner_optimizer.state) == 0
    assert optimizer.state_dict()["state"] == {}
    reference.optimizer.state.clear()
    reference.slow = [one.detach().clone() for one in reference.parameters]
    assert_same_bits(weights(train(optimizer, 11, at)), train(reference, 11, at).parameters)


@pytest.mark.parametrize("at", [2, 4])
def test_an_entry_moves_to_a_parameter_that_replaces_another_whose_slow_weight_is_captured_from_itself(at):
    optimizer, reference = train(wrapped(), at), train(by_hand(), at)
    (group,) = optimizer.param_groups
    entry = optimizer.state.get(group["params"][0])
    del optimizer.state[group["params"][0]]
    group["params"][0] = torch.nn.Parameter(group["params"][0].detach().clone())
    optimizer.state[group["params"][0]] = entry
    reference.slow[0] = reference.parameters[0].detach().clone()
    assert_same_bits(weights(train(optimizer, 11, at)), train(reference, 11, at).parameters)


def test_get_and_pop_of_a_parameter_without_an_entry_return_the_default_and_make_none():
    optimizer = wrapped()
    first = weights(optimizer)[0]
    assert optimizer.state.get(first) is None
    assert optimizer.state.get(first, 1) == 1
    assert optimizer.state.pop(first, None) is None
    assert len(optimizer.state) == len(optimizer.inner_optimizer.state) == 0


@pytest.mark.parametrize("at", [2, 4])
def test_a_state_can_be_cleared_and_put_back(at):
    optimizer, other = train(wrapped(adam), at), train(wrapped(adam), at)
    kept = {one: dict(entry) for one, entry in optimizer.state.items()}
    optimizer.state.clear()
    assert len(optimizer.state) == 0
    optimizer.state = kept
    assert_same(train(optimizer, 11, at), train(other, 11, at))


@pytest.mark.parametrize("at", [2, 4])
def test_the_state_can_be_assigned_to_itself(at):
    optimizer, other = train(wrapped(adam), at), train(wrapped(adam), at)
    optimizer.state = optimizer.state
    assert_same(train(optimizer, 11, at), train(other, 11, at))


@pytest.mark.parametrize("make", [wrapped, nested])
def test_zero_grad(make):
    optimizer = make()
    set_gradients(weights(optimizer), 0)
    optimizer.zero_grad(set_to_none=False)
    assert_same_bits([one.grad for one in weights(optimizer)], [torch.zeros(shape) for shape in SHAPES])
    optimizer.zero_grad()
    assert [one.grad for one in weights(optimizer)] == [None, None]
    set_gradients(weights(optimizer), 0)
    optimizer.zero_grad(set_to_none=True)
    assert [one.grad for one in weights(optimizer)] == [None, None]


@pytest.mark.parametrize("inner", [sgd, lbfgs])
def test_step_returns_the_loss_of_its_closure(inner):
    (weight,) = parameters((3,), dtype=torch.float64)
    optimizer = Lookahead(inner([weight]), 2)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    expected = weight.detach().square().sum()
    assert torch.equal(optimizer.step(closure).detach(), expected)
    assert optimizer.step(closure=closure) < expected
    if inner is sgd:
        assert optimizer.step() is None


def test_a_closure_that_an_inner_optimizer_calls_several_times_counts_once():
    optimizer, reference, calls = wrapped(lbfgs), by_hand(lbfgs), []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    train(optimizer, 7)
    train(reference, 7)
    assert len(calls) == int(optimizer.param_groups[0]["lookahead_step"]) == 7
    assert_same_bits(weights(optimizer), reference.parameters)


@pytest.mark.parametrize("make", [wrapped, nested])
@pytest.mark.parametrize("at", range(4))
def test_an_error_in_a_closure_leaves_count_weights_and_state_as_they_were(make, at):
    optimizer = train(make(), at)
    count = saved(optimizer)["param_groups"]
    fast = [one.detach().clone() for one in weights(optimizer)]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same_state(saved(optimizer)["param_groups"], count)
    assert_same_bits(weights(optimizer), fast)
    assert_same(train(optimizer, 7, at), train(make(), 7))


def test_step_hooks_see_the_wrapper_and_are_removable():
    optimizer, seen = wrapped(), []
    handles = [
        optimizer.register_step_pre_hook(lambda *call: seen.append(("pre", *call))),
        optimizer.register_step_post_hook(lambda *call: seen.append(("post", *call))),
    ]
    optimizer.step()
    assert seen == [("pre", optimizer, (optimizer,), {}), ("post", optimizer, (optimizer,), {})]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 2


def test_a_step_post_hook_sees_the_synchronised_weights_and_a_pre_hook_comes_before_the_capture():
    optimizer, seen = wrapped(sync_period=1), []
    first = weights(optimizer)[0]
    optimizer.register_step_pre_hook(lambda *_: seen.append(len(optimizer.state)))
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.equal(optimizer.state[first]["slow"], first)))
    train(optimizer, 1)
    assert seen == [0, True]


def test_a_step_pre_hook_may_change_the_arguments():
    optimizer = wrapped()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: "changed"), kwargs))
    assert optimizer.step() == "changed"
    assert optimizer.step(lambda: "given") == "changed"


def test_hooks_of_the_inner_optimizer_still_fire():
    inner, seen = sgd(parameters(*SHAPES)), []
    inner.register_step_pre_hook(lambda *call: seen.append(("pre", *call)))
    inner.register_step_post_hook(lambda *call: seen.append(("post", *call)))
    inner.register_state_dict_post_hook(lambda optimizer, state_dict: {**state_dict, "of inner": 1})
    inner.register_load_state_dict_pre_hook(lambda optimizer, state_dict: seen.append(state_dict.pop("of inner")))
    optimizer = Lookahead(inner)
    optimizer.step()
    assert seen == [("pre", inner, (inner,), {}), ("post", inner, (inner,), {})]
    assert optimizer.state_dict()["of inner"] == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[2:] == [1]


@pytest.mark.parametrize("make", [wrapped, nested])
def test_global_step_hooks_fire_once_for_a_step(make):
    optimizer, seen = make(), []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(("pre", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(("post", optimizer))),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    inner = optimizer.inner_optimizer
    while isinstance(inner, Lookahead):
        inner = inner.inner_optimizer
    assert seen == [("pre", inner), ("post", inner)]


def test_state_dict_hooks():
    optimizer, seen = train(wrapped(), 1), []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda optimizer: seen.append(optimizer)),
        optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: {**state_dict, "extra": 1}),
        optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: state_dict.update(last=len(state_dict))),
        optimizer.register_state_dict_post_hook(lambda *_: seen.append("first"), prepend=True),
        optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"), prepend=True),
    ]
    state_dict = optimizer.state_dict()
    assert seen == ["before", optimizer, "first"]
    assert (state_dict["extra"], state_dict["last"]) == (1, 3)
    assert "slow" in state_dict["state"][0]
    for handle in handles:
        handle.remove()
    assert sorted(optimizer.state_dict()) == ["param_groups", "state"]
    assert len(seen) == 3


def test_load_state_dict_hooks():
    source, optimizer, seen = train(wrapped(), 2), wrapped(), []
    given = source.state_dict()

    def reset_count(optimizer, state_dict):
        seen.append("reset")
        return {**state_dict, "param_groups": [{**one, "lookahead_step": 0} for one in state_dict["param_groups"]]}

    handles = [
        optimizer.register_load_state_dict_pre_hook(reset_count),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda one: seen.append(len(one.state))),
        optimizer.register_load_state_dict_post_hook(lambda _: seen.append("first"), prepend=True),
    ]
    optimizer.load_state_dict(given)
    assert seen == ["before", "reset", "first", 2]
    assert int(optimizer.param_groups[0]["lookahead_step"]) == 0
    assert given["param_groups"][0]["lookahead_step"] == 2
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(given)
    assert int(optimizer.param_groups[0]["lookahead_step"]) == 2
    assert len(seen) == 4


def test_hooks_added_through_the_wrapper_of_a_wrapper_see_the_outer_one():
    optimizer, seen = nested(), []
    optimizer.register_state_dict_pre_hook(seen.append)
    optimizer.inner_optimizer.register_state_dict_pre_hook(seen.append)
    optimizer.state_dict()
    assert seen == [optimizer, optimizer.inner_optimizer]


def deep_copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


def model_step(model, optimizer, step):
    set_gradients(list(model.parameters()), step)
    for one in model.parameters():
        one.grad += one.detach() / 8
    optimizer.step()


@pytest.mark.parametrize("duplicate", [deep_copied, pickled])
@pytest.mark.parametrize("inner", [sgd, adam])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_copies_of_model_and_optimizer_train_on_independently_and_bit_for_bit(duplicate, inner, level, at):
    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = inner(model.parameters())
        for sync_period in (3, 2)[:level]:
            optimizer = Lookahead(optimizer, sync_period)
        return model, optimizer

    model, optimizer = fresh()
    for step in range(at):
        model_step(model, optimizer, step)
    other_model, other = duplicate(model, optimizer)
    assert [id(one) for one in weights(other)] == [id(one) for one in other_model.parameters()]
    assert_same(other, optimizer)
    kept = saved(optimizer)
    for step in range(at, at + 7):
        model_step(other_model, other, step)
    assert_same_state(saved(optimizer), kept)
    for step in range(at, at + 7):
        model_step(model, optimizer, step)
    assert_same(other, optimizer)


@pytest.mark.parametrize("make", [wrapped, nested])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(make, duplicate):
    optimizer = train(make(adam), 4)
    other = duplicate(optimizer)
    assert not {id(one) for one in weights(other)} & {id(one) for one in weights(optimizer)}
    kept = saved(optimizer)
    train(other, 11, 4)
    assert_same_state(saved(optimizer), kept)
    assert_same(other, train(optimizer, 11, 4))


def test_a_copy_has_hooks_of_its_own():
    optimizer, seen = wrapped(), []
    other = copy.deepcopy(optimizer)
    other.register_step_pre_hook(lambda *_: seen.append("copy"))
    optimizer.step()
    assert seen == []
    other.step()
    assert seen == ["copy"]


def plain(value):
    if isinstance(value, (dict, list, tuple)):
        return type(value) in (dict, list, tuple) and all(map(plain, value.values() if type(value) is dict else value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.parametrize("make", [wrapped, nested])
def test_a_state_dict_has_the_standard_form_of_plain_containers_numbers_and_tensors(make):
    optimizer = train(make(adam), 2)
    state_dict = optimizer.state_dict()
    bare = train(by_hand(adam), 2).optimizer.state_dict()
    names = ["", "_2"] if make is nested else [""]
    assert plain(state_dict)
    assert sorted(state_dict) == ["param_groups", "state"]
    assert list(state_dict["state"]) == [0, 1]
    for index, entry in state_dict["state"].items():
        assert sorted(entry) == sorted([*bare["state"][index], *(f"slow{one}" for one in names)])
        assert all(entry[f"slow{one}"].shape == SHAPES[index] for one in names)
    (group,) = state_dict["param_groups"]
    own = [
        f"{one}{suffix}"
        for one in (
            "sync_period",
            "slow_step_size",
            "slow_momentum",
            "slow_nesterov",
            "lookahead_step",
            "lookahead_unsynced",
        )
        for suffix in names
    ]
    assert sorted(group) == sorted([*bare["param_groups"][0], *own])
    assert all(type(group[f"lookahead_step{one}"]) is int for one in names)
    assert group["params"] == [0, 1]


def test_making_a_state_dict_changes_nothing():
    optimizer = train(wrapped(adam), 2)
    for _ in range(2):
        optimizer.state_dict()
        assert all("slow" not in entry for entry in optimizer.inner_optimizer.state.values())
        assert type(optimizer.param_groups[0]["lookahead_step"]) is int
    assert_same(train(optimizer, 7, 2), train(wrapped(adam), 7))


@pytest.mark.parametrize(("inner", "level"), [(sgd, 1), (sgd, 2), (adam, 1), (adam, 2), (lbfgs, 1)])
@pytest.mark.parametrize("at", range(8))
def test_resuming_from_a_saved_state_dict_is_bit_for_bit(inner, level, at):
    def make(slow_step_size=0.25, sync_period=3):
        optimizer = wrapped(inner, sync_period, slow_step_size)
        return optimizer if level == 1 else Lookahead(optimizer, 2, slow_step_size)

    optimizer = train(make(), at)
    resumed = make(0.9, 5)
    resumed.load_state_dict(saved(optimizer))
    with torch.no_grad():
        for one, other in zip(weights(resumed), weights(optimizer)):
            one.copy_(other)
    assert_same(resumed, optimizer)
    assert_same(train(resumed, 15, at), train(optimizer, 15, at))
    assert_same(optimizer, train(make(), 15))


@pytest.mark.parametrize("make", [wrapped, nested])
def test_a_loaded_slow_weight_is_no_state_of_the_inner_optimizer(make):
    def step(optimizer, index):
        first, second = weights(optimizer)
        set_gradients([first, second], index)
        # The second parameter gets its first gradient after the load.
        second.grad = second.grad if index >= 2 else None
        optimizer.step()

    optimizer, resumed = make(adam), make(adam)
    for index in range(2):
        step(optimizer, index)
    resumed.load_state_dict(saved(optimizer))
    with torch.no_grad():
        for one, other in zip(weights(resumed), weights(optimizer)):
            one.copy_(other)
    innermost = resumed.inner_optimizer if make is wrapped else resumed.inner_optimizer.inner_optimizer
    assert [sorted(entry) for entry in innermost.state.values()] == [
        ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]
    ]
    for index in range(2, 8):
        step(optimizer, index)
        step(resumed, index)
    assert_same(resumed, optimizer)


def test_loading_a_state_dict_copies_its_slow_weights_and_leaves_it_as_it_was():
    optimizer, source = wrapped(), train(wrapped(), 2)
    state_dict, kept = source.state_dict(), saved(source)
    optimizer.load_state_dict(state_dict)
    train(optimizer, 6)
    for index, entry in kept["state"].items():
        assert_same_bits([state_dict["state"][index]["slow"]], [entry["slow"]])
    assert_same_state(state_dict["param_groups"], kept["param_groups"])


@pytest.mark.parametrize("inner", [sgd, adam])
@pytest.mark.parametrize("at", [0, 4])
def test_a_checkpoint_of_the_bare_inner_optimizer_loads_and_slow_weights_start_from_the_parameters(inner, at):
    bare = inner(parameters(*SHAPES))
    train(bare, 4)
    optimizer = train(wrapped(inner, 7), at)
    optimizer.param_groups[0]["sync_period"] = 3
    optimizer.load_state_dict(saved(bare))
    assert all("slow" not in entry for entry in optimizer.state.values())
    (group,) = optimizer.param_groups
    assert (group["sync_period"], group["slow_step_size"], int(group["lookahead_step"])) == (3, 0.25, 0)
    with torch.no_grad():
        for one, other in zip(weights(optimizer), weights(bare)):
            one.copy_(other)
    reference = ByHand(bare, 3, 0.25)
    assert_same_bits(weights(train(optimizer, 11, 4)), train(reference, 11, 4).parameters)


def test_a_checkpoint_of_one_level_loads_into_two():
    source = train(wrapped(sync_period=2), 3)
    optimizer = nested()
    optimizer.load_state_dict(saved(source))
    assert sorted(optimizer.state[weights(optimizer)[0]]) == ["momentum_buffer", "slow"]
    assert {name: int(optimizer.param_groups[0][name]) for name in ("lookahead_step", "lookahead_step_2")} == {
        "lookahead_step": 3,
        "lookahead_step_2": 0,
    }
    assert optimizer.param_groups[0]["sync_period_2"] == 3


@pytest.mark.parametrize("on_inner", [False, True])
def test_groups_state_and_schedulers_are_live_after_a_load(on_inner):
    source, optimizer = train(wrapped(), 2), wrapped()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.inner_optimizer if on_inner else optimizer, 1, 0.5)
    optimizer.load_state_dict(saved(source))
    assert optimizer.param_groups is optimizer.inner_optimizer.param_groups
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.inner_optimizer.param_groups[0]["lr"] == 0.05
    first = weights(optimizer)[0]
    assert optimizer.state[first]["momentum_buffer"] is optimizer.inner_optimizer.state[first]["momentum_buffer"]
    optimizer.param_groups[0]["lr"] = 0.0
    fast = first.detach().clone()
    set_gradients(weights(optimizer), 0)
    optimizer.param_groups[0]["sync_period"] = 0
    optimizer.step()
    assert_same_bits([first], [fast])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda one: one["param_groups"].append(one["param_groups"][0]), "groups"),
        (lambda one: one["param_groups"][0]["params"].append(2), "parameters"),
        (lambda one: one["param_groups"][0].update(sync_period=-1), "sync_period=-1"),
        (lambda one: one["state"][1].update(slow=torch.zeros(7)), r"shape \(5,\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(change, match):
    state_dict = saved(train(wrapped(), 5))
    change(state_dict)
    optimizer = train(wrapped(), 2)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state_dict)
    assert_same(train(optimizer, 7, 2), train(wrapped(), 7))


def spawn(worker, *arguments, processes):
    context = torch.multiprocessing.spawn(worker, arguments, processes, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def shared(optimizer):
    for one in weights(optimizer):
        one.share_memory_()
    optimizer.share_memory()
    return optimizer


@pytest.mark.parametrize("inner", [sgd, adagrad])
def test_share_memory_captures_the_slow_weights_and_shares_all_that_can_be(inner):
    optimizer = wrapped(inner)
    optimizer.share_memory()
    names = ["slow"] if inner is sgd else ["slow", "sum"]
    for one in weights(optimizer):
        assert_same_bits([optimizer.state[one]["slow"]], [one])
    for entries in optimizer.state_dict()["state"].values():
        assert [entries[name].is_shared() for name in names] == [True] * len(names)


def train_shared(rank, alone, together, counts):
    torch.set_num_threads(1)
    for index, optimizer in enumerate((alone[rank], together)):
        train(optimizer, 7)
        counts[rank, index] = optimizer.state_dict()["param_groups"][0]["lookahead_step"]


@pytest.fixture(scope="module")
def trained_in_processes():
    """Optimizers that two processes have trained, one optimizer each and one together; their start, and all counts."""
    alone, together = [shared(wrapped(sgd)), shared(wrapped(adagrad))], shared(wrapped(sgd))
    counts = torch.zeros(2, 2, dtype=torch.int64).share_memory_()
    before = [entry["slow"].clone() for entry in together.state.values()]
    spawn(train_shared, alone, together, counts, processes=2)
    return alone, together, before, counts


@pytest.mark.parametrize(("rank", "inner"), [(0, sgd), (1, adagrad)])
def test_slow_weights_in_shared_memory_are_the_parent_s_too(trained_in_processes, rank, inner):
    optimizer, reference = trained_in_processes[0][rank], train(by_hand(inner), 7)
    assert_same_bits(weights(optimizer), reference.parameters)
    assert_same_bits([entry["slow"] for entry in optimizer.state.values()], reference.slow)
    if inner is adagrad:
        sums = [entry["sum"] for entry in reference.optimizer.state.values()]
        assert_same_bits([entry["sum"] for entry in optimizer.state.values()], sums)


def test_processes_that_train_a_shared_model_both_move_its_slow_weights(trained_in_processes):
    _, together, before, _ = trained_in_processes
    for entry, slow in zip(together.state_dict()["state"].values(), before):
        assert entry["slow"].is_shared()
        assert entry["slow"].isfinite().all()
        assert not torch.equal(entry["slow"], slow)


def test_processes_that_train_a_shared_model_count_their_own_steps(trained_in_processes):
    alone, together, _, counts = trained_in_processes
    assert counts.tolist() == [[7, 7], [7, 7]]
    assert [int(one.param_groups[0]["lookahead_step"]) for one in (*alone, together)] == [0, 0, 0]


def test_a_nested_checkpoint_loads_into_one_wrapper():
    first, second = parameters((4,), (3,))
    saved = Lookahead(Lookahead(torch.optim.Adam([first, second], 0.1), 2), 3)
    first.grad = torch.ones(4)
    saved.step()
    optimizer = Lookahead(torch.optim.Adam([first, second], 0.1), 2)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert "slow_2" not in optimizer.state[first]
    second.grad = torch.ones(3)
    optimizer.step()


def test_slow_weights_that_another_wrapper_left_are_not_taken_for_those_of_the_new_one():
    (one,) = parameters((4,))
    bare, saved = torch.optim.SGD([one], 0.1), Lookahead(torch.optim.SGD([one], 0.1), 2)
    one.grad = torch.ones(4)
    saved.step()
    bare.load_state_dict(saved.state_dict())
    optimizer = Lookahead(bare, 2)
    start = one.detach().clone()
    optimizer.step()
    assert_same_bits([optimizer.state[one]["slow"], optimizer.state_dict()["state"][0]["slow"]], [start, start])


def test_an_entry_of_the_state_can_be_popped_and_cleared():
    optimizer = train(wrapped(), 2)
    first, second = weights(optimizer)
    kept = optimizer.state_dict()["state"][0]["slow"]
    assert_same_bits([optimizer.state[first].pop("slow")], [kept])
    assert optimizer.state[first].pop("slow", None) is None
    optimizer.state[second].clear()
    assert dict(optimizer.state[second]) == {}
    assert list(optimizer.state[first]) == ["momentum_buffer"]


def test_state_setdefault_and_copies_of_entries_are_those_of_dictionaries():
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 2)
    assert dict(optimizer.state.setdefault(one, {"a": 1})) == {"a": 1}
    assert dict(optimizer.state.setdefault(one, {"b": 2})) == {"a": 1}
    copied = copy.deepcopy(optimizer.state[one])
    assert (type(copied), copied) == (dict, {"a": 1})


def test_parameters_of_a_tensor_subclass_without_memory_of_its_own():
    from torch.testing._internal.two_tensor import TwoTensor

    one, plain = torch.nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4))), torch.nn.Parameter(torch.ones(4))
    for weight in (one, plain):
        optimizer = Lookahead(torch.optim.SGD([weight], 0.1), 2)
        for _ in range(5):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert_same_bits([one.a, one.b], [plain, plain])
