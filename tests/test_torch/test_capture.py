"""When the slow weights are captured, and how they follow parameters that move to another dtype or device."""

import re

import pytest
import torch

from lookahead_optim import _pieces_torch
from lookahead_optim.torch import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def slow_weights(optimizer):
    return [optimizer.state[one]["slow"] for group in optimizer.param_groups for one in group["params"]]


def has_slow_weights(optimizer):
    return any("slow" in entries for entries in optimizer.state_dict()["state"].values())


def assert_trains_as_by_hand(optimizer, hand, steps):
    fast = [one for group in optimizer.param_groups for one in group["params"]]
    assert_same_bits(fast, hand.parameters)
    for step in steps:
        set_gradients(fast, step)
        set_gradients(hand.parameters, step)
        hand.step()
        optimizer.step()
        assert_same_bits(fast, hand.parameters)
        assert_same_bits(slow_weights(optimizer), hand.slow)


def twins(sync_period=3, make=sgd):
    """Return a model under Lookahead and its optimizer, and the same by hand."""
    module, expected = model(), model()
    return module, Lookahead(make(module.parameters()), sync_period, 0.25), expected, make(expected.parameters())


@pytest.mark.parametrize("make", [sgd, torch.optim.Adam], ids=["sgd", "adam"])
def test_weights_loaded_between_construction_and_first_step_count(make):
    module, optimizer, expected, bare = twins(make=make)
    for one in (module, expected):
        one.load_state_dict(model(seed=1).state_dict())
    assert_trains_as_by_hand(optimizer, ByHand(bare, 3, 0.25), range(1, 8))


def test_weights_loaded_in_a_hook_before_the_first_step_count():
    module, optimizer, expected, bare = twins()

    def load(*_):
        module.load_state_dict(model(seed=1).state_dict())

    handle = optimizer.register_step_pre_hook(load)
    expected.load_state_dict(model(seed=1).state_dict())
    hand = ByHand(bare, 3, 0.25)
    set_gradients(hand.parameters, 1)
    hand.step()
    set_gradients(list(module.parameters()), 1)
    optimizer.step()
    handle.remove()
    assert_trains_as_by_hand(optimizer, hand, range(2, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [sgd, torch.optim.Adam], ids=["sgd", "adam"])
def test_model_moved_to_another_dtype_before_the_first_step(make, dtype):
    module, optimizer, expected, bare = twins(make=make)
    module.to(dtype)
    expected.to(dtype)
    assert_trains_as_by_hand(optimizer, ByHand(bare, 3, 0.25), range(1, 8))
    assert {one.dtype for one in slow_weights(optimizer)} == {dtype}


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.bfloat16,), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("steps_before", [1, 2, 3])
def test_model_moved_to_another_dtype_in_mid_run_takes_its_slow_weights_along(dtypes, steps_before):
    module, optimizer, expected, bare = twins(make=plain_sgd)
    hand = ByHand(bare, 3, 0.25)
    fast = list(module.parameters())
    assert_trains_as_by_hand(optimizer, hand, range(1, steps_before + 1))
    for dtype in dtypes:
        module.to(dtype)
        expected.to(dtype)
        hand.slow = [one.to(dtype) for one in hand.slow]
        for step in range(hand.steps + 1, hand.steps + 6):
            set_gradients(fast, step)
            set_gradients(hand.parameters, step)
            hand.step()
            optimizer.step()
            assert_same_bits(fast, hand.parameters)
            if step % 3 == 0:
                assert_same_bits(slow_weights(optimizer), hand.slow)


def test_slow_weights_in_a_block_follow_a_model_moved_to_another_dtype():
    module, optimizer, _, _ = twins(make=plain_sgd)
    start = [one.detach().double() for one in module.parameters()]
    set_gradients(list(module.parameters()), 1)
    optimizer.step()
    module.double()
    fast = [one.detach().clone() for one in module.parameters()]
    with optimizer.slow_weights():
        assert_same_bits(module.parameters(), start)
    assert_same_bits(module.parameters(), fast)


@pytest.fixture
def parameters_are_kept_on_conversion():
    """Without this, `Module.to("meta")` would make new parameters, which no optimizer has."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("parameters_are_kept_on_conversion")
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_model_moved_to_another_device_takes_its_slow_weights_along(steps_before):
    module, optimizer, _, _ = twins(make=plain_sgd)

    def step():
        optimizer.zero_grad()
        inputs = torch.ones(5, 3, device=module[0].weight.device)
        module(inputs).sum().backward()
        optimizer.step()

    for _ in range(steps_before):
        step()
    module.to("meta")
    for _ in range(3):
        step()
    assert {one.device.type for one in [*slow_weights(optimizer), *module.parameters()]} == {"meta"}
    assert [one.shape for one in slow_weights(optimizer)] == [one.shape for one in module.parameters()]
    assert optimizer.param_groups[0]["lookahead_step"] == steps_before + 3


REPLACEMENTS = {
    "longer": lambda data: torch.linspace(0.0, 1.0, 5),
    "one_for_all": lambda data: torch.zeros(1),
    "turned": lambda data: data.t().clone(),
    "one_more_dimension": lambda data: data.clone().unsqueeze(0),
    "flat_in_place": lambda data: data.view(-1),
}
replaced = pytest.mark.parametrize("kind", REPLACEMENTS)
split_or_not = pytest.mark.parametrize("split", [False, True], ids=["one_group", "three_groups"])
steps_before = pytest.mark.parametrize("steps", [2, 5], ids=["before_a_sync", "after_a_sync"])


def copies(tensors):
    return [one.detach().clone() for one in tensors]


def slow_copies(optimizer, fast):
    return copies(value for one in fast for name, value in optimizer.state[one].items() if name.startswith("slow"))


def with_replaced_shape(kind, steps, split, nested=False):
    """Return weights and optimizer before a step with a sync. The second of three weights has a new shape."""
    fast = parameters((4,), (2, 3), (2,))
    optimizer = Lookahead(plain_sgd([{"params": [one]} for one in fast] if split else fast), 3, 0.25)
    if nested:
        optimizer = Lookahead(optimizer, 3, 0.25)
    for step in range(1, steps + 1):
        set_gradients(fast, step)
        optimizer.step()
    fast[1].data = REPLACEMENTS[kind](fast[1].data)
    set_gradients(fast, steps + 1)
    return fast, optimizer, copies(fast), slow_copies(optimizer, fast)


def refused(fast):
    message = f"A parameter of shape {tuple(fast[1].shape)} has a slow weight of shape (2, 3), as its data was replaced"
    return pytest.raises(RuntimeError, match=re.escape(message) + r".*`optimizer\.reset_slow_weights\(\)` after that")


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@split_or_not
@steps_before
@replaced
def test_sync_with_a_replaced_shape_is_refused_before_anything_changes(kind, steps, split, nested):
    fast, optimizer, weights, slow = with_replaced_shape(kind, steps, split, nested)
    with refused(fast):
        optimizer.sync()
    assert_same_bits(fast, weights)
    assert_same_bits(slow_copies(optimizer, fast), slow)


@split_or_not
@steps_before
@replaced
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_step_that_syncs_with_a_replaced_shape_is_refused_before_anything_changes(kind, steps, split, nested):
    fast, optimizer, weights, slow = with_replaced_shape(kind, steps, split, nested)
    count = optimizer.param_groups[0]["lookahead_step"]
    with refused(fast):
        optimizer.step()
    assert optimizer.param_groups[0]["lookahead_step"] == count
    assert_same_bits(fast, weights)
    assert_same_bits(slow_copies(optimizer, fast), slow)


@split_or_not
@steps_before
@replaced
def test_slow_weights_with_a_replaced_shape_is_refused_before_anything_changes(kind, steps, split):
    fast, optimizer, weights, slow = with_replaced_shape(kind, steps, split)
    with refused(fast), optimizer.slow_weights():
        pytest.fail("the block ran")
    assert_same_bits(fast, weights)
    assert_same_bits(slow_copies(optimizer, fast), slow)
    optimizer.reset_slow_weights()
    optimizer.step()


@split_or_not
@steps_before
@replaced
@pytest.mark.parametrize("refused_first", [False, True])
def test_reset_mends_a_replaced_shape(kind, steps, split, refused_first):
    fast, optimizer, weights, _ = with_replaced_shape(kind, steps, split)
    if refused_first:
        with refused(fast):
            optimizer.sync()
    optimizer.reset_slow_weights()
    hand = ByHand(plain_sgd([torch.nn.Parameter(one) for one in weights]), 3, 0.25)
    hand.steps = steps
    assert_trains_as_by_hand(optimizer, hand, range(steps + 1, steps + 7))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_parameter_moved_to_other_memory_of_the_same_shape_goes_on(steps):
    fast, expected = (parameters((4,), (2, 3)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected), 3, 0.25)
    assert_trains_as_by_hand(optimizer, hand, range(1, steps + 1))
    fast[1].data = fast[1].data.t().clone().t()
    assert_trains_as_by_hand(optimizer, hand, range(steps + 1, steps + 8))


def test_large_parameter_that_changes_its_layout_in_place_goes_on(monkeypatch):
    monkeypatch.setattr(_pieces_torch, "_BYTES_PER_THREAD", 16)
    fast, expected = (parameters((40, 40)) for _ in range(2))
    optimizer, hand = Lookahead(plain_sgd(fast), 3, 0.25), ByHand(plain_sgd(expected), 3, 0.25)
    assert_trains_as_by_hand(optimizer, hand, range(1, 5))
    for weight in (*fast, *expected):
        weight.data, weight.grad = weight.data.t(), None
    assert_trains_as_by_hand(optimizer, hand, range(5, 12))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_parameter_that_changes_its_dtype_at_the_same_address_goes_on(steps):
    memory = torch.empty(8)
    memory.copy_(parameters((8,))[0].data)
    weight, (expected,) = torch.nn.Parameter(memory), parameters((8,))
    optimizer, hand = Lookahead(plain_sgd([weight]), 3, 0.25), ByHand(plain_sgd([expected]), 3, 0.25)
    assert_trains_as_by_hand(optimizer, hand, range(1, steps + 1))
    weight.grad = expected.grad = None
    half = memory.bfloat16()
    weight.data = memory.view(torch.bfloat16)[:8]
    weight.data.copy_(half)
    expected.data = expected.data.bfloat16()
    hand.slow = [one.bfloat16() for one in hand.slow]
    for step in range(steps + 1, steps + 8):
        set_gradients([weight], step)
        set_gradients([expected], step)
        hand.step()
        optimizer.step()
        assert_same_bits([weight], [expected])


@pytest.mark.parametrize("how", ["deleted", "popped", "emptied", "cleared"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_parameter_whose_state_is_deleted_is_captured_again(how, steps):
    fast, expected = (parameters((4,), (2, 3)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected), 3, 0.25)
    assert_trains_as_by_hand(optimizer, hand, range(1, steps + 1))
    for one in (fast, expected):
        one[1].data.fill_(2.0)
    if how == "deleted":
        del optimizer.state[fast[1]]
    elif how == "popped":
        optimizer.state.pop(fast[1])
    elif how == "emptied":
        optimizer.state[fast[1]] = {}
    else:
        optimizer.state.clear()
        del hand.optimizer.state[expected[0]]
        hand.slow[0] = expected[0].detach().clone()
    del hand.optimizer.state[expected[1]]
    hand.slow[1] = expected[1].detach().clone()
    assert_trains_as_by_hand(optimizer, hand, range(steps + 1, steps + 8))


@pytest.mark.parametrize("how", ["entry", "entries"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_slow_weight_set_in_the_state_counts(how, steps):
    fast, expected = (parameters((4,), (2, 3)) for _ in range(2))
    optimizer, hand = Lookahead(sgd(fast), 3, 0.25), ByHand(sgd(expected), 3, 0.25)
    assert_trains_as_by_hand(optimizer, hand, range(1, steps + 1))
    new = torch.full((2, 3), 2.0)
    if how == "entry":
        optimizer.state[fast[1]]["slow"] = new.clone()
    else:
        optimizer.state[fast[1]] = {**optimizer.state[fast[1]], "slow": new.clone()}
    hand.slow[1] = new
    assert_trains_as_by_hand(optimizer, hand, range(steps + 1, steps + 8))


@pytest.mark.parametrize("steps_before", [1, 2, 3, 4])
def test_reset_captures_the_slow_weights_again_and_keeps_the_count(steps_before):
    module, optimizer, expected, bare = twins()
    hand = ByHand(bare, 3, 0.25)
    assert_trains_as_by_hand(optimizer, hand, range(1, steps_before + 1))
    for one in (module, expected):
        one.load_state_dict(model(seed=1).state_dict())
    optimizer.reset_slow_weights()
    assert_same_bits(slow_weights(optimizer), module.parameters())
    hand.slow = copies(expected.parameters())
    assert_trains_as_by_hand(optimizer, hand, range(steps_before + 1, steps_before + 8))


def test_reset_before_the_first_step_does_not_capture():
    module, optimizer, expected, bare = twins()
    optimizer.reset_slow_weights()
    assert not has_slow_weights(optimizer)
    for one in (module, expected):
        one.load_state_dict(model(seed=1).state_dict())
    assert_trains_as_by_hand(optimizer, ByHand(bare, 3, 0.25), range(1, 8))


def test_sync_and_slow_weights_before_the_first_step_change_nothing_and_do_not_capture():
    module, optimizer, expected, bare = twins()
    optimizer.sync()
    with optimizer.slow_weights():
        assert_same_bits(module.parameters(), expected.parameters())
    optimizer.sync()
    assert_same_bits(module.parameters(), expected.parameters())
    assert not has_slow_weights(optimizer)
    assert optimizer.param_groups[0]["lookahead_step"] == 0
    for one in (module, expected):
        one.load_state_dict(model(seed=1).state_dict())
    assert_trains_as_by_hand(optimizer, ByHand(bare, 3, 0.25), range(1, 8))


def test_reset_of_a_nested_wrapper_captures_the_slow_weights_of_all():
    (weight,) = parameters((4,), dtype=torch.float64)
    optimizer = Lookahead(Lookahead(plain_sgd([weight]), 2, 0.25), 3, 0.5)
    for step in (1, 2, 3, 4, 5):
        set_gradients([weight], step)
        optimizer.step()
    with torch.no_grad():
        weight.fill_(2.0)
    optimizer.reset_slow_weights()
    oracle = reference.Lookahead(reference.Lookahead(reference.SGD(0.1), 2, 0.25), 3, 0.5).start([weight.detach()])
    oracle.t = oracle.inner.t = 5
    for step in range(6, 14):
        set_gradients([weight], step)
        oracle.apply([weight.grad])
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.from_numpy(oracle.weights[0]), rtol=0, atol=1e-12)


def train(optimizer, weights, steps):
    for step in range(steps):
        set_gradients(weights, step)
        optimizer.step()


@pytest.mark.parametrize("moved", ["parameter", "slow weight"])
def test_a_sync_after_a_move_writes_the_slow_weights_of_the_state(moved):
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 2, 0.25)
    train(optimizer, [one], 2)
    if moved == "parameter":
        kept = one.data
        one.data = kept.bfloat16()
        with optimizer.slow_weights():
            pass
        one.data = kept
    else:
        for entries in optimizer.state.values():
            entries["slow"].data = entries["slow"].data.double()
    train(optimizer, [one], 2)
    assert_same_bits([optimizer.state[one]["slow"]], [one])


def test_a_move_noticed_in_inference_mode_does_not_end_the_training():
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 2, 0.25)
    train(optimizer, [one], 1)
    one.data, one.grad = one.data.double(), None
    with torch.inference_mode(), optimizer.slow_weights():
        pass
    train(optimizer, [one], 1)
    assert_same_bits([optimizer.state[one]["slow"]], [one])
