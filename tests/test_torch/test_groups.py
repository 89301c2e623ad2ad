"""Parameter groups: their own settings, groups that are added later, and parameters that do not always take part."""

import copy

import numpy as np
import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

STEPS = 13


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def slow_weights(optimizer, parameters):
    return [optimizer.state[one]["slow"] for one in parameters]


def train(optimizer, parameters, steps):
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
def test_each_group_has_its_own_settings(foreach):
    settings = [(2, 0.25), (3, 0.125), (5, 0.0), (4, 0.25)]
    fast, expected = (parameters(*[(4,), (2, 3)] * 4) for _ in range(2))
    groups = [{"params": fast[2 * i : 2 * i + 2]} for i in range(4)]
    for group, (sync_period, slow_step_size) in zip(groups[:3], settings):
        group.update(sync_period=sync_period, slow_step_size=slow_step_size)
    optimizer = Lookahead(torch.optim.Adam(groups, 0.05, foreach=foreach), *settings[3])
    hands = [
        ByHand(torch.optim.Adam(expected[2 * i : 2 * i + 2], 0.05, foreach=foreach), *settings[i]) for i in range(4)
    ]
    for step in range(1, STEPS):
        set_gradients(expected, step)
        for hand in hands:
            hand.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)
        assert_same_bits(slow_weights(optimizer, fast), [one for hand in hands for one in hand.slow])
    assert [(group["sync_period"], group["slow_step_size"]) for group in optimizer.param_groups] == settings


def test_group_may_have_one_setting_and_take_the_other_from_the_constructor():
    first, second = parameters((2,), (2,))
    optimizer = Lookahead(
        sgd([{"params": [first], "sync_period": 2}, {"params": [second], "slow_step_size": 0.25}]), 3, 0.125
    )
    assert [group["sync_period"] for group in optimizer.param_groups] == [2, 3]
    assert [group["slow_step_size"] for group in optimizer.param_groups] == [0.125, 0.25]


def test_group_with_sync_period_zero_is_left_to_the_inner_optimizer_and_has_no_slow_weights():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer = Lookahead(sgd([{"params": fast[:1]}, {"params": fast[1:], "sync_period": 0}]), 2, 0.25)
    hand, bare = ByHand(sgd(expected[:1]), 2, 0.25), sgd(expected[1:])
    for step in range(1, STEPS):
        set_gradients(expected, step)
        hand.step()
        bare.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)
        assert "slow" in optimizer.state[fast[0]]
        assert "slow" not in optimizer.state[fast[1]]


def test_slow_step_size_zero_brings_a_group_back_to_its_first_weights():
    (weight,) = parameters((4,))
    start = weight.detach().clone()
    optimizer = Lookahead(sgd([{"params": [weight], "slow_step_size": 0.0}]), 2, 0.5)
    for step in range(1, 7):
        train(optimizer, [weight], [step])
        assert torch.equal(weight, start) == (step % 2 == 0)


@pytest.mark.parametrize("by_inner_optimizer", [False, True], ids=["by_lookahead", "by_inner_optimizer"])
@pytest.mark.parametrize("settings", [{}, {"sync_period": 2, "slow_step_size": 0.125}], ids=["default", "own"])
def test_group_added_in_mid_run_counts_from_zero_and_is_captured_at_its_first_step(by_inner_optimizer, settings):
    fast, expected = (parameters((4,), (3,), (2, 2)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast[:1]), 3, 0.25), ByHand(sgd(expected[:1]), 3, 0.25)
    for step in range(1, 5):
        set_gradients(expected, step)
        hand.step()
        train(optimizer, fast, [step])
    (optimizer.inner_optimizer if by_inner_optimizer else optimizer).add_param_group({"params": fast[1:], **settings})
    with torch.no_grad():
        for one in (fast, expected):
            one[1].fill_(2.0)
            one[2].add_(1.0)
    added = ByHand(sgd(expected[1:]), settings.get("sync_period", 3), settings.get("slow_step_size", 0.25))
    for step in range(5, STEPS):
        set_gradients(expected, step)
        hand.step()
        added.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)
        assert_same_bits(slow_weights(optimizer, fast), hand.slow + added.slow)
        assert [int(group["lookahead_step"]) for group in optimizer.param_groups] == [step, step - 4]


def test_group_added_in_mid_run_has_no_slow_weights_before_its_first_step():
    first, second = parameters((4,), (3,))
    optimizer = Lookahead(sgd([first]), 2)
    train(optimizer, [first], [1])
    optimizer.add_param_group({"params": [second]})
    optimizer.reset_slow_weights()
    optimizer.sync()
    assert "slow" in optimizer.state[first]
    assert "slow" not in optimizer.state[second]


@pytest.mark.parametrize("steps_with_gradient", [{1, 2}, {1, 4, 5}, {2, 3}, set()])
def test_parameter_without_gradient_takes_part_in_the_sync(steps_with_gradient):
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected), 3, 0.25)
    for step in range(1, STEPS):
        for one in (fast, expected):
            set_gradients(one, step)
            if step not in steps_with_gradient:
                one[1].grad = None
        hand.step()
        optimizer.step()
        assert_same_bits(fast, expected)
        assert_same_bits(slow_weights(optimizer, fast), hand.slow)


def test_frozen_parameter_has_no_slow_weight_until_before_its_first_step():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    fast[1].requires_grad_(False)
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected[:1]), 3, 0.25)
    for step in range(1, 6):
        set_gradients(expected, step)
        hand.step()
        train(optimizer, fast[:1], [step])
        assert "slow" not in optimizer.state[fast[1]]
        assert_same_bits(fast, expected)
    with torch.no_grad():
        fast[1].fill_(2.0)
        expected[1].fill_(2.0)
    fast[1].requires_grad_(True)
    unfrozen = ByHand(sgd(expected[1:]), 3, 0.25)
    unfrozen.steps = 5
    for step in range(6, STEPS):
        set_gradients(expected, step)
        hand.step()
        unfrozen.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)
        assert_same_bits(slow_weights(optimizer, fast), hand.slow + unfrozen.slow)


def test_parameter_frozen_at_a_sync_gives_its_slow_weight_up_and_is_captured_again():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer = Lookahead(sgd(fast), 3, 0.25)
    hands = [ByHand(sgd([one]), 3, 0.25) for one in expected]
    for step in range(1, STEPS):
        frozen = 4 < step <= 7
        set_gradients(fast, step)
        set_gradients(expected, step)
        fast[1].requires_grad_(not frozen)
        if step == 8:
            hands[1].slow = [expected[1].detach().clone()]
        if frozen:
            fast[1].grad = None
            hands[1].steps += 1
        else:
            hands[1].step()
        hands[0].step()
        optimizer.step()
        assert_same_bits(fast, expected)
        held = [one for one in fast if "slow" in optimizer.state[one]]
        assert len(held) == (1 if step in (6, 7) else 2)
        assert_same_bits(slow_weights(optimizer, held), (hands[0].slow + hands[1].slow)[: len(held)])


def test_parameter_frozen_in_mid_cycle_takes_part_in_slow_weights_and_sync():
    fast = parameters((4,), (3,))
    optimizer = Lookahead(sgd(fast), 3, 0.25)
    start = [one.detach().clone() for one in fast]
    train(optimizer, fast, [1, 2])
    for one in fast:
        one.requires_grad_(False)
        one.grad = None
    moved = [one.lerp(other.detach(), 0.25) for one, other in zip(start, fast)]
    with optimizer.slow_weights():
        assert_same_bits(fast, start)
    optimizer.sync()
    assert_same_bits(fast, moved)


@pytest.mark.parametrize("replace", ["in_place", "list"])
def test_replaced_parameter_is_captured_and_the_old_one_forgotten(replace):
    fast, (new,) = parameters((4,), (3,)), parameters((3,), seed=5)
    optimizer = Lookahead(torch.optim.SGD(fast, 0.1), 3, 0.25)
    train(optimizer, fast, [1])
    old, group = fast[1], optimizer.param_groups[0]
    start = new.detach().clone()
    if replace == "in_place":
        group["params"][1] = new
    else:
        group["params"] = [fast[0], new]
    train(optimizer, [fast[0], new], [2, 3])
    assert old not in optimizer.state
    by_hand = start.clone()
    for step in (2, 3):
        by_hand -= 0.1 * _gradient_of_second(step)
    assert_same_bits([new], [start.lerp(by_hand, 0.25)])
    assert_same_bits(slow_weights(optimizer, [new]), [new])


def _gradient_of_second(step):
    shapes = parameters((4,), (3,))
    set_gradients(shapes, step)
    return shapes[1].grad


def test_group_switched_off_while_one_as_large_is_added():
    fast, (new,) = parameters((4,)), parameters((3,), seed=5)
    optimizer = Lookahead(sgd(fast), 3, 0.25)
    train(optimizer, fast, [1])
    optimizer.param_groups[0]["sync_period"] = 0
    optimizer.add_param_group({"params": [new]})
    train(optimizer, [*fast, new], [2])
    assert ["slow" in optimizer.state[one] for one in (*fast, new)] == [False, True]


def test_lazy_parameter_is_captured_when_it_has_a_value():
    model = torch.nn.LazyLinear(2)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1), 4)
    optimizer.step()
    model(torch.ones(1, 3)).sum().backward()
    start = model.weight.detach().clone()
    optimizer.step()
    assert_same_bits([optimizer.state[model.weight]["slow"]], [start])


def test_frozen_parameter_with_a_gradient_left_takes_part_as_the_bare_optimizer_moves_it():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected), 3, 0.25)
    for one in (fast, expected):
        set_gradients(one, 0)
        one[1].requires_grad_(False)
    for _ in range(1, STEPS):
        hand.step()
        optimizer.step()
        assert_same_bits(fast, expected)
        assert_same_bits(slow_weights(optimizer, fast), hand.slow)


@pytest.mark.parametrize("before", [0, 2, 5])
@pytest.mark.parametrize("after", [3, 4])
def test_sync_period_changed_in_mid_run_takes_effect(before, after):
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer, bare = Lookahead(sgd(fast), before, 0.25), sgd(expected)
    hand = ByHand(bare, before or STEPS, 0.25)
    for step in range(1, STEPS):
        if step == 6:
            optimizer.param_groups[0]["sync_period"] = after
            slow = hand.slow if before else [one.detach().clone() for one in expected]
            hand.sync_period, hand.slow = after, slow
        set_gradients(expected, step)
        hand.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)
        if before or step >= 6:
            assert_same_bits(slow_weights(optimizer, fast), hand.slow)


def test_slow_step_size_changed_in_mid_run_takes_effect_in_that_group_alone():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer = Lookahead(sgd([{"params": [one]} for one in fast]), 2, 0.25)
    hands = [ByHand(sgd([one]), 2, 0.25) for one in expected]
    for step in range(1, STEPS):
        if step == 6:
            optimizer.param_groups[1]["slow_step_size"] = hands[1].slow_step_size = 0.125
        set_gradients(expected, step)
        for hand in hands:
            hand.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)


def test_group_switched_off_has_no_slow_weights_and_on_again_starts_from_new_ones():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 2, 0.25), ByHand(sgd(expected), 2, 0.25)
    for step in range(1, STEPS):
        if step == 4:
            optimizer.param_groups[0]["sync_period"], hand.sync_period = 0, STEPS
        if step == 8:
            optimizer.param_groups[0]["sync_period"] = hand.sync_period = 3
            hand.slow = [one.detach().clone() for one in expected]
        set_gradients(expected, step)
        hand.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)
        assert ["slow" in optimizer.state[one] for one in fast] == [not 4 <= step < 8] * 2


def test_param_groups_are_the_inner_optimizers_own_list_always():
    fast = parameters((4,), (3,))
    inner = sgd(fast[:1])
    groups = inner.param_groups
    optimizer = Lookahead(inner, 2)
    assert optimizer.param_groups is inner.param_groups is groups
    optimizer.add_param_group({"params": fast[1:]})
    assert optimizer.param_groups is inner.param_groups is groups
    train(optimizer, fast, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is inner.param_groups
    inner.load_state_dict(inner.state_dict())
    assert optimizer.param_groups is inner.param_groups
    optimizer.param_groups = groups
    assert optimizer.param_groups is inner.param_groups is groups
    optimizer.param_groups[0]["lr"] = 0.25
    assert inner.param_groups[0]["lr"] == 0.25


def test_inner_optimizers_own_load_state_dict_leaves_settings_and_count_as_loaded():
    fast, expected = (parameters((4,)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected), 3, 0.25)
    for step in range(1, STEPS):
        if step == 5:
            optimizer.inner_optimizer.load_state_dict(optimizer.inner_optimizer.state_dict())
        set_gradients(expected, step)
        hand.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)


def nested(inner, *settings):
    for setting in settings:
        inner = Lookahead(inner, *setting)
    return inner


def test_names_of_nested_wrappers_do_not_collide():
    fast = parameters((4,), (3,))
    optimizer = nested(sgd(fast), (2, 0.25), (3, 0.5), (4, 0.75))
    (group,) = optimizer.param_groups
    settings = {name: group[name] for name in group if name.startswith(("sync_period", "slow_step_size"))}
    assert settings == {
        "sync_period": 2,
        "slow_step_size": 0.25,
        "sync_period_2": 3,
        "slow_step_size_2": 0.5,
        "sync_period_3": 4,
        "slow_step_size_3": 0.75,
    }
    train(optimizer, fast, [1])
    names = {"momentum_buffer", "slow", "slow_2", "slow_3"}
    assert set(optimizer.state[fast[0]]) == names
    assert [set(entries) for entries in optimizer.state_dict()["state"].values()] == [names] * 2
    assert [group[f"lookahead_step{suffix}"] for suffix in ("", "_2", "_3")] == [1, 1, 1]
    memory = {one.data_ptr() for one in optimizer.state[fast[0]].values()}
    assert len(memory | {fast[0].data_ptr()}) == 5


def test_nested_wrappers_groups_have_their_own_settings_of_both():
    settings = [((2, 0.25), (4, 0.5)), ((3, 0.3), (2, 0.7)), ((3, 0.25), (0, 0.5)), ((0, 0.5), (3, 0.4))]
    fast = parameters(*[(5,)] * 4, dtype=torch.float64)
    oracles = [
        reference.Lookahead(reference.Lookahead(reference.SGD(0.1, 0.5), *inner), *outer).start([one.detach()])
        for one, (inner, outer) in zip(fast, settings)
    ]
    groups = [
        {
            "params": [one],
            "sync_period": inner[0],
            "slow_step_size": inner[1],
            "sync_period_2": outer[0],
            "slow_step_size_2": outer[1],
        }
        for one, (inner, outer) in zip(fast, settings)
    ]
    optimizer = nested(torch.optim.SGD(groups, 0.1, momentum=0.5), (6, 0.5), (6, 0.5))
    for step in range(1, STEPS):
        train(optimizer, fast, [step])
        for one, oracle, (inner, outer) in zip(fast, oracles, settings):
            oracle.apply([one.grad])
            torch.testing.assert_close(one.detach(), torch.from_numpy(oracle.weights[0]), rtol=0, atol=1e-12)
            slow = {name: value for name, value in optimizer.state[one].items() if name.startswith("slow")}
            expected = {"slow": oracle.inner.slow[0]} if inner[0] else {}
            expected.update({"slow_2": oracle.slow[0]} if outer[0] else {})
            assert set(slow) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(slow[name], torch.from_numpy(value), rtol=0, atol=1e-12)


def test_group_added_to_a_nested_wrapper_counts_from_zero_in_both():
    fast = parameters((5,), (5,), dtype=torch.float64)
    optimizer = nested(sgd(fast[:1]), (2, 0.25), (3, 0.5))
    train(optimizer, fast[:1], range(1, 4))
    optimizer.add_param_group({"params": fast[1:], "sync_period_2": 4})
    oracle = reference.Lookahead(reference.Lookahead(reference.SGD(0.1, 0.9), 2, 0.25), 4, 0.5)
    oracle.start([fast[1].detach()])
    for step in range(4, STEPS):
        train(optimizer, fast, [step])
        oracle.apply([fast[1].grad])
        torch.testing.assert_close(fast[1].detach(), torch.from_numpy(oracle.weights[0]), rtol=0, atol=1e-12)
    assert [int(group["lookahead_step_2"]) for group in optimizer.param_groups] == [12, 9]


def test_an_optimizer_that_is_wrapped_again_takes_the_new_settings_and_starts_anew():
    fast, expected = (parameters((4,), (3,)) for _ in range(2))
    inner = sgd(fast)
    train(Lookahead(inner, 2, 0.5), fast, range(1, 6))
    bare = sgd(expected)
    train(Lookahead(bare, 2, 0.5), expected, range(1, 6))
    optimizer, hand = Lookahead(inner, 3, 0.25), ByHand(bare, 3, 0.25)
    assert (optimizer.param_groups[0]["sync_period"], optimizer.param_groups[0]["slow_step_size"]) == (3, 0.25)
    for step in range(6, 15):
        set_gradients(expected, step)
        hand.step()
        train(optimizer, fast, [step])
        assert_same_bits(fast, expected)


def test_whole_slow_step_does_not_overflow():
    one = torch.nn.Parameter(torch.tensor([3e38]))
    optimizer = Lookahead(torch.optim.SGD([one], 1.0), 2, 1.0)
    one.grad = torch.tensor([3e38])
    optimizer.step()
    optimizer.step()
    assert one.item() == pytest.approx(-3e38)


def test_settings_of_a_group_in_other_number_types_are_saved_as_plain_numbers():
    (one,) = parameters((4,))
    groups = [{"params": [one], "sync_period": np.int64(2), "slow_step_size": np.float32(0.25)}]
    optimizer = Lookahead(torch.optim.SGD(groups, 0.1))
    optimizer.param_groups[0]["slow_step_size"] = 1
    group = optimizer.state_dict()["param_groups"][0]
    assert (type(group["sync_period"]), type(group["slow_step_size"])) == (int, float)


@pytest.mark.parametrize(("name", "value"), [("sync_period", -3), ("sync_period", 2.5), ("slow_step_size", -1.0)])
def test_invalid_setting_put_into_a_group_is_refused_at_the_next_step(name, value):
    fast = parameters((4,))
    optimizer = Lookahead(sgd(fast), 2)
    train(optimizer, fast, [1])
    before = fast[0].detach().clone()
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        train(optimizer, fast, [2])
    assert_same_bits(fast, [before])


def test_default_changed_in_mid_run_is_that_of_groups_added_later():
    fast = parameters((4,), (3,))
    optimizer = Lookahead(sgd(fast[:1]), 2)
    optimizer.defaults.update(lr=0.5, sync_period=7)
    optimizer.add_param_group({"params": fast[1:]})
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["sync_period"]) == (0.5, 7)


def test_group_added_as_a_copy_of_another_counts_from_zero_by_itself():
    fast = parameters((4,), (3,))
    optimizer = Lookahead(sgd(fast[:1]), 5)
    train(optimizer, fast, [1, 2])
    optimizer.add_param_group({**optimizer.param_groups[0], "params": fast[1:]})
    train(optimizer, fast, [3])
    assert [int(group["lookahead_step"]) for group in optimizer.param_groups] == [3, 1]


def test_all_groups_switched_off_after_a_load_forget_their_slow_weights():
    fast = parameters((4,))
    optimizer = Lookahead(sgd(fast), 3)
    train(optimizer, fast, [1, 2])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["sync_period"] = 0
    train(optimizer, fast, [3])
    assert "slow" not in optimizer.state[fast[0]]


def test_defaults_that_optimizers_share_are_not_changed():
    shared = {"lr": 0.1, **torch.optim.SGD(parameters((1,)), 0.1).defaults}
    first, second = sgd(parameters((4,))), sgd(parameters((4,)))
    first.defaults = second.defaults = shared
    optimizer = Lookahead(first, 5)
    Lookahead(second, 10)
    assert "sync_period" not in shared
    optimizer.defaults = dict(shared)
    optimizer.add_param_group({"params": parameters((3,))})
    assert optimizer.param_groups[1]["sync_period"] == 5


def test_checkpoint_loaded_into_the_inner_optimizer_has_the_slow_weights_captured_again():
    fast = parameters((4,))
    optimizer = Lookahead(sgd(fast), 3, 0.25)
    bare = copy.deepcopy(sgd(fast).state_dict())
    train(optimizer, fast, [1, 2])
    optimizer.inner_optimizer.load_state_dict(bare)
    start = fast[0].detach().clone()
    train(optimizer, fast, [3])
    assert_same_bits(slow_weights(optimizer, fast), [start])


def test_a_group_that_is_switched_off_after_a_frozen_weight_was_synchronised_starts_anew_when_it_is_on_again():
    """A freeze in one group makes all lists stale. That must not hide that another group's period has changed."""
    first, second = parameters((3,), (3,))
    optimizer = Lookahead(
        torch.optim.SGD([{"params": [first], "sync_period": 2}, {"params": [second], "sync_period": 3}], 0.1)
    )

    def step():
        for weight in (first, second):
            weight.grad = torch.ones_like(weight) if weight.requires_grad else None
        optimizer.step()

    step()
    first.requires_grad_(False)
    step()
    optimizer.param_groups[1]["sync_period"] = 0
    step()
    assert "slow" not in optimizer.state[second]
    optimizer.param_groups[1]["sync_period"] = 1000
    expected = second.detach().clone()
    step()
    assert_same_bits([optimizer.state[second]["slow"]], [expected])


def test_a_group_added_as_a_generator_or_with_names_keeps_its_parameters_with_a_slow_dtype():
    old, *new = parameters((2,), (3,), (4,), (5,))
    optimizer = Lookahead(Lookahead(sgd([old]), 2, slow_dtype=torch.float64), 2, slow_dtype=torch.float64)
    optimizer.add_param_group({"params": (one for one in new)})
    assert list(map(id, optimizer.param_groups[1]["params"])) == list(map(id, new))
    train(optimizer, [old, *new], range(2))
    assert all(slow.dtype == torch.float64 for slow in slow_weights(optimizer, new))

    optimizer = Lookahead(sgd([("old", old)]), 2, slow_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"for a parameter of torch\.float64"):
        optimizer.add_param_group({"params": [("new", parameters((3,), dtype=torch.float64)[0])]})
    optimizer.add_param_group({"params": (pair for pair in [("new", new[0])])})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    with pytest.raises(TypeError, match="ordered"):
        optimizer.add_param_group({"params": set(new[1:])})
