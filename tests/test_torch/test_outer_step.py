"""Slow momentum and slow weights of a wider dtype, where PyTorch differs from the other front ends."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lookahead_optim import _outer_step_torch, _pieces_torch
from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import parameters, set_gradients

NAN = float("nan")
UNIT = 2**-7  # the spacing of bfloat16 from 1 to 2


def moved_by_units(units, slow_step_size, slow_dtype):
    """Return the slow weight, from 1, after cycles of one step that moves the weight by `units` units."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Lookahead(torch.optim.SGD([weight], lr=1.0), 1, slow_step_size, slow_dtype=slow_dtype)
    for move in units:
        weight.grad = torch.full((1,), -move * UNIT, dtype=torch.bfloat16)
        optimizer.step()
    slow = optimizer.state[weight]["slow"]
    assert slow.dtype == (slow_dtype or torch.bfloat16)
    assert torch.equal(weight.detach(), slow.to(torch.bfloat16))
    return slow.item()


@pytest.mark.parametrize(("slow_dtype", "expected"), [(None, 1.0), (torch.float32, 1.25)])
def test_small_moves_add_up_in_slow_weights_of_a_wider_dtype(slow_dtype, expected):
    assert moved_by_units([1] * 64, 0.5, slow_dtype) == expected


def test_moves_are_measured_from_the_restart_point():
    # From the slow weight itself it would be 0.059 units.
    slow = moved_by_units(([1] + [0] * 9) * 20, 0.1, torch.float32)
    assert (slow - 1) / UNIT == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("slow_momentum", [0.0, 0.9])
def test_a_weight_that_does_not_move_leaves_its_wide_slow_weight_alone_bit_for_bit(slow_momentum):
    weight = torch.nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    optimizer = Lookahead(torch.optim.SGD([weight], 0.1), 1, 0.3, slow_momentum=slow_momentum, slow_dtype=torch.float32)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    slow = torch.tensor([1.001, 3.002])
    optimizer.state[weight]["slow"] = slow
    for _ in range(5):
        optimizer.step()
    assert_same_bits([optimizer.state[weight]["slow"]], [torch.tensor([1.001, 3.002])])


def by_hand(slow_step_size, slow_momentum, slow_nesterov, steps, period):
    """Return weights, slow weights and momentum of the mixed model, one weight and one operation after the other."""
    weights = mixed_weights()
    slow = [weight.detach().to(torch.float32, copy=True) for weight in weights]
    momentum = [torch.zeros_like(one) for one in slow]
    optimizer = torch.optim.SGD(weights, 0.5)
    for step in range(steps):
        set_gradients(weights, step)
        optimizer.step()
        if (step + 1) % period == 0:
            for weight, s, b in zip(weights, slow, momentum):
                move = weight.detach().to(s.dtype) - s.to(weight.dtype).to(s.dtype)
                b.mul_(slow_momentum).sub_(move)
                if slow_momentum:
                    s.sub_(slow_step_size * (slow_momentum * b - move if slow_nesterov else b))
                else:
                    s.add_(move, alpha=slow_step_size)
                weight.data.copy_(s)
    return weights, slow, momentum


SHAPES = (40, 3), (5,), (700, 700), ()
MIXED = torch.bfloat16, torch.float32, torch.bfloat16, torch.float16


def mixed_weights():
    return [torch.nn.Parameter(one.detach().to(dtype)) for one, dtype in zip(parameters(*SHAPES), MIXED)]


def train(optimizer, stop, start=0):
    for step in range(start, stop):
        set_gradients([weight for group in optimizer.param_groups for weight in group["params"]], step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(("slow_momentum", "slow_nesterov"), [(0.0, True), (0.9, True), (0.5, False)])
def test_wide_slow_weights_of_a_mixed_model_are_those_by_hand(slow_momentum, slow_nesterov, is_shared):
    weights = mixed_weights()
    if is_shared:
        # Two weights beside each other in one memory: all pseudo-gradients are computed before any restart.
        sizes = [weights[0].numel(), weights[2].numel()]
        memory = torch.cat([weights[0].detach().flatten(), weights[2].detach().flatten()]).split(sizes)
        for weight, part in zip((weights[0], weights[2]), memory):
            weight.data = part.view(weight.shape)
    outer = {"slow_momentum": slow_momentum, "slow_nesterov": slow_nesterov}
    optimizer = train(Lookahead(torch.optim.SGD(weights, 0.5), 3, 0.7, **outer, slow_dtype=torch.float32), 9)
    fast, slow, momentum = by_hand(0.7, slow_momentum, slow_nesterov, 9, 3)
    states = [optimizer.state[weight] for weight in weights]
    # Some weights lie halfway between two numbers of bfloat16. For about one weight in some hundred, operations that
    # round differently give the other number.
    for found, expected in zip([*weights, *(state["slow"] for state in states)], [*fast, *slow]):
        is_close = torch.isclose(found.detach().float(), expected.detach().float(), rtol=1e-5, atol=1e-5)
        assert is_close.float().mean() > 0.98
        torch.testing.assert_close(found.detach().float(), expected.detach().float(), rtol=0, atol=2**-4)
    for state, expected in zip(states if slow_momentum else [], momentum):
        torch.testing.assert_close(state["slow_momentum"], expected, rtol=0, atol=2**-4)
    assert_same_bits([one.detach() for one in weights], [s["slow"].to(w.dtype) for s, w in zip(states, weights)])
    assert all(("slow_momentum" in state) == bool(slow_momentum) for state in states)


@pytest.mark.parametrize("slow_nesterov", [True, False])
def test_weights_in_one_memory_have_the_outer_step_of_weights_apart(slow_nesterov):
    outer = {"slow_momentum": 0.9, "slow_nesterov": slow_nesterov}
    apart, shared = parameters((6,), (6,)), parameters((6,), (6,))
    memory = torch.cat([one.detach() for one in shared])
    for weight, part in zip(shared, memory.split(6)):
        weight.data = part
    for weights in (apart, shared):
        train(Lookahead(torch.optim.SGD(weights, 0.1), 2, 0.7, **outer), 6)
    assert_same_bits(apart, shared)


@pytest.mark.parametrize("slow_nesterov", [True, False])
def test_two_parameters_on_the_same_memory_make_the_outer_step_of_one(slow_nesterov):
    outer = {"slow_momentum": 0.9, "slow_nesterov": slow_nesterov}
    (single,), (one,), (other,) = (parameters((6,)) for _ in range(3))
    other.data = one.data
    alone = Lookahead(torch.optim.SGD([single], 0.2), 2, 0.7, **outer)
    both = Lookahead(torch.optim.SGD([one, other], 0.1), 2, 0.7, **outer)
    for step in range(6):
        set_gradients([single], step)
        one.grad, other.grad = single.grad.clone(), single.grad.clone()
        alone.step()
        both.step()
        torch.testing.assert_close(one, single)
        torch.testing.assert_close(both.state[other]["slow"], alone.state[single]["slow"])


def test_momentum_that_was_moved_to_a_new_parameter_starts_from_0():
    weights = parameters((3,), (3,))
    optimizer = train(Lookahead(torch.optim.SGD(weights, 0.1), 2, slow_momentum=0.5), 4)
    new = torch.nn.Parameter(torch.ones(3))
    optimizer.state[new] = optimizer.state.pop(weights[0])
    optimizer.param_groups[0]["params"][0] = new
    train(optimizer, 5, 4)
    assert not optimizer.state[new]["slow_momentum"].any()
    assert optimizer.state[weights[1]]["slow_momentum"].any()


def test_a_step_size_of_1_is_the_inner_optimizer_bit_for_bit_also_with_wide_slow_weights():
    weights, bare = mixed_weights(), mixed_weights()
    optimizer = Lookahead(torch.optim.SGD(weights, 0.5), 2, 1.0, slow_dtype=torch.float32)
    inner = torch.optim.SGD(bare, 0.5)
    for step in range(7):
        for fast, one in ((weights, optimizer), (bare, inner)):
            set_gradients(fast, step)
            one.step()
        assert_same_bits(weights, bare)


def test_a_block_shows_the_rounded_slow_weights():
    weights = mixed_weights()
    optimizer = train(Lookahead(torch.optim.SGD(weights, 0.5), 3, 0.3, slow_dtype=torch.float32), 4)
    fast = [weight.detach().clone() for weight in weights]
    with optimizer.slow_weights():
        assert_same_bits(weights, [optimizer.state[weight]["slow"].to(weight.dtype) for weight in weights])
    assert_same_bits(weights, fast)


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("at", range(1, 7))
def test_wide_slow_weights_and_momentum_resume_bit_for_bit(at, in_block):
    def make(weights):
        outer = {"slow_momentum": 0.9, "slow_dtype": torch.float32}
        return Lookahead(torch.optim.SGD(weights, 0.5, momentum=0.9), 3, 0.3, **outer)

    weights = mixed_weights()
    optimizer = train(make(weights), at)
    file = io.BytesIO()
    if in_block:
        with optimizer.slow_weights():
            torch.save(([one.detach() for one in weights], optimizer.state_dict()), file)
    else:
        torch.save(([one.detach() for one in weights], optimizer.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others = mixed_weights()
    with torch.no_grad():
        for other, value in zip(others, values):
            other.copy_(value)
    other = make(others)
    other.load_state_dict(state)
    assert_same_bits(others, weights)
    train(optimizer, 9, at)
    train(other, 9, at)
    assert_same_bits(others, weights)
    for one, another in zip(weights, others):
        state, other_state = optimizer.state[one], other.state[another]
        for name in ("slow", "slow_momentum"):
            assert state[name].dtype == torch.float32
            assert_same_bits([other_state[name]], [state[name]])


def test_a_checkpoint_from_before_there_was_momentum_begins_with_none():
    weights = parameters((3,))
    old = copy.deepcopy(train(Lookahead(torch.optim.SGD(weights, 0.1), 3), 4).state_dict())
    for group in old["param_groups"]:
        for name in ("slow_momentum", "slow_nesterov", "lookahead_unsynced"):
            del group[name]
    others = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    other = Lookahead(torch.optim.SGD(others, 0.1), 3, slow_momentum=0.9)
    other.load_state_dict(old)
    assert_same_bits([other.state[others[0]]["slow_momentum"]], [torch.zeros(3)])
    assert other.param_groups[0]["slow_momentum"] == 0.9


def test_a_checkpoint_brings_its_momentum_with_its_settings():
    trained = train(Lookahead(torch.optim.SGD(parameters((3,)), 0.1), 3, slow_momentum=0.5), 4)
    (weight,) = weights = parameters((3,), seed=1)
    plain = Lookahead(torch.optim.SGD(weights, 0.1), 3)
    plain.load_state_dict(trained.state_dict())
    assert plain.param_groups[0]["slow_momentum"] == 0.5
    assert_same_bits(
        [plain.state[weight]["slow_momentum"]], [entry["slow_momentum"] for entry in trained.state.values()]
    )


def test_a_checkpoint_without_momentum_switches_it_off_until_the_group_is_set_again():
    weights = parameters((3,))
    plain = train(Lookahead(torch.optim.SGD(weights, 0.1), 3), 4)
    (other,) = others = [torch.nn.Parameter(weights[0].detach().clone())]
    optimizer = Lookahead(torch.optim.SGD(others, 0.1), 3, slow_momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    (group,) = optimizer.param_groups
    assert group["slow_momentum"] == 0
    assert "slow_momentum" not in optimizer.state[other]
    train(plain, 7, 4)
    train(optimizer, 7, 4)
    assert_same_bits(others, weights)
    group["slow_momentum"] = 0.9
    slow = optimizer.state[other]["slow"]
    train(optimizer, 9, 7)
    # The momentum was 0, so now it is the pseudo-gradient.
    moved = 0.5 * (1 + 0.9) * optimizer.state[other]["slow_momentum"]
    assert moved.all()
    torch.testing.assert_close(optimizer.state[other]["slow"], slow - moved)


@pytest.mark.parametrize("is_saved_wide", [True, False])
def test_a_checkpoint_takes_the_slow_dtype_of_the_optimizer_that_loads_it(is_saved_wide):
    def make(weights, is_wide):
        dtype = torch.float32 if is_wide else None
        return Lookahead(torch.optim.SGD(weights, 0.1), 3, slow_momentum=0.5, slow_dtype=dtype)

    trained = train(make(parameters((3,), dtype=torch.bfloat16), is_saved_wide), 4)
    (weight,) = weights = parameters((3,), dtype=torch.bfloat16, seed=1)
    other = make(weights, not is_saved_wide)
    other.load_state_dict(trained.state_dict())
    train(other, 6, 4)
    state = other.state_dict()["state"][0]
    assert state["slow"].dtype == state["slow_momentum"].dtype == (torch.bfloat16 if is_saved_wide else torch.float32)
    assert_same_bits([weight], [state["slow"].bfloat16()])


def test_momentum_that_is_switched_off_is_dropped_at_the_next_sync():
    (weight,) = parameters((3,))
    optimizer = train(Lookahead(torch.optim.SGD([weight], 0.1), 2, slow_momentum=0.5), 3)
    optimizer.param_groups[0]["slow_momentum"] = 0.0
    assert "slow_momentum" in optimizer.state[weight]
    train(optimizer, 4, 3)
    assert "slow_momentum" not in optimizer.state[weight]
    optimizer.param_groups[0]["sync_period"] = 0
    train(optimizer, 5, 4)
    assert "slow" not in optimizer.state[weight]


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_that_changes_its_dtype_has_slow_weights_at_least_as_wide(at, dtype):
    (weight,) = parameters((3,), dtype=torch.bfloat16)
    optimizer = train(Lookahead(torch.optim.SGD([weight], 0.1), 3, slow_momentum=0.9, slow_dtype=torch.float32), at)
    weight.data, weight.grad = weight.data.to(dtype), None
    train(optimizer, 9, at)
    state = optimizer.state[weight]
    assert state["slow"].dtype == state["slow_momentum"].dtype == torch.promote_types(dtype, torch.float32)
    assert_same_bits([weight], [state["slow"].to(dtype)])


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("slow_momentum", 1.0, ValueError, r"`slow_momentum` must be >= 0 and < 1.*Received: slow_momentum=1\.0"),
        ("slow_momentum", 1.5, ValueError, r"Received: slow_momentum=1\.5"),
        ("slow_momentum", -0.1, ValueError, r"Received: slow_momentum=-0\.1"),
        ("slow_momentum", NAN, ValueError, "Received: slow_momentum=nan"),
        pytest.param("slow_momentum", 10**400, ValueError, "Received: slow_momentum=1000", id="too large a number"),
        ("slow_momentum", "0.9", TypeError, "`slow_momentum` must be a real number.*Received: slow_momentum='0.9'"),
        ("slow_momentum", True, TypeError, "Received: slow_momentum=True of type bool"),
        ("slow_momentum", None, TypeError, "Received: slow_momentum=None"),
        ("slow_nesterov", 1, TypeError, "`slow_nesterov` must be True .* or False.*Received: slow_nesterov=1"),
        ("slow_nesterov", None, TypeError, "Received: slow_nesterov=None"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "group", "added group", "state dict", "step"])
def test_bad_settings_are_refused_and_change_nothing(name, value, error, message, where):
    weights = parameters((3,), (2,))
    optimizer = train(Lookahead(torch.optim.SGD(weights[:1], 0.1), 3, slow_momentum=0.9), 4)
    before = copy.deepcopy((weights, optimizer.state_dict()))
    inner = torch.optim.SGD(weights[1:], 0.1)

    def call():
        if where == "argument":
            Lookahead(inner, **{name: value})
        elif where == "group":
            inner.param_groups[0][name] = value
            Lookahead(inner)
        elif where == "added group":
            optimizer.add_param_group({"params": weights[1:], name: value})
        elif where == "state dict":
            state = copy.deepcopy(optimizer.state_dict())
            state["param_groups"][0][name] = value
            optimizer.load_state_dict(state)
        else:
            optimizer.param_groups[0][name] = value
            optimizer.step()

    with pytest.raises(error, match=message):
        call()
    if where == "step":
        optimizer.param_groups[0][name] = {"slow_momentum": 0.9, "slow_nesterov": True}[name]
    assert "sync_period" not in inner.param_groups[0]
    assert str(optimizer.state_dict()) == str(before[1])
    assert_same_bits(weights, before[0])


@pytest.mark.parametrize(
    ("momentum", "received"),
    [(torch.ones(4), r"shape \(4,\)"), (torch.ones(1, 3), r"shape \(1, 3\)"), (1.0, r"1\.0"), ("x", "'x'")],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_state_dict_with_a_bad_momentum_is_refused_and_changes_nothing(momentum, received, is_nested):
    weights = parameters((2,), (3,))
    optimizer = Lookahead(torch.optim.SGD(weights, 0.1, momentum=0.9), 3, slow_momentum=0.9)
    if is_nested:
        optimizer = Lookahead(optimizer, 2, slow_momentum=0.5)
    train(optimizer, 4)
    before = copy.deepcopy((weights, optimizer.state_dict()))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][1]["slow_momentum"] = momentum
    with pytest.raises(ValueError, match=rf"slow momentum of shape \(3,\) for parameter 1\. Received: {received}"):
        optimizer.load_state_dict(bad)
    assert_same_bits(weights, before[0])
    assert str(optimizer.state_dict()) == str(before[1])


@pytest.mark.parametrize(
    ("dtype", "slow_dtype", "error", "message"),
    [
        (torch.float32, "float32", TypeError, "`slow_dtype` must be a floating point.*Received: slow_dtype='float32'"),
        (torch.float32, torch.int64, TypeError, r"Received: slow_dtype=torch\.int64"),
        (torch.float32, torch.complex64, TypeError, r"Received: slow_dtype=torch\.complex64"),
        (torch.float32, torch.float8_e4m3fn, TypeError, r"at least 16 bits.*Received: slow_dtype=torch\.float8_e4m3fn"),
        (torch.float32, torch.bfloat16, ValueError, r"slow_dtype=torch\.bfloat16 for a parameter of torch\.float32"),
        (torch.float16, torch.bfloat16, ValueError, "must hold all values.*Give a dtype at least as wide, or None"),
        (torch.float64, torch.float32, ValueError, "must hold all values"),
    ],
)
def test_a_slow_dtype_that_is_none_or_too_narrow_is_refused(dtype, slow_dtype, error, message):
    inner = torch.optim.SGD(parameters((3,), dtype=torch.float64), 0.1)
    inner.param_groups[0]["params"][0].data = torch.ones(3, dtype=dtype)
    with pytest.raises(error, match=message):
        Lookahead(inner, slow_dtype=slow_dtype)
    assert "sync_period" not in inner.param_groups[0]
    optimizer = Lookahead(torch.optim.SGD(parameters((3,), dtype=torch.bfloat16), 0.1), slow_dtype=torch.float32)
    if error is ValueError and slow_dtype is torch.float32:
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": parameters((2,), dtype=dtype)})
        assert len(optimizer.param_groups) == 1


def test_complex_weights_have_slow_weights_of_their_own_dtype():
    (weight,) = parameters((3,), dtype=torch.complex64)
    optimizer = train(Lookahead(torch.optim.SGD([weight], 0.1), 2, slow_momentum=0.5, slow_dtype=torch.float64), 5)
    assert optimizer.state[weight]["slow"].dtype == torch.complex64


def test_slow_momentum_is_reset_with_other_moments_and_can_be_assigned():
    (weight,) = parameters((3,))
    optimizer = train(Lookahead(torch.optim.SGD([weight], 0.1, momentum=0.9), 2, slow_momentum=0.5), 3)
    optimizer.state[weight]["slow_momentum"].zero_()
    assert not optimizer.state_dict()["state"][0]["slow_momentum"].any()
    optimizer.state[weight]["slow_momentum"] = torch.ones(3)
    assert sorted(optimizer.state[weight]) == ["momentum_buffer", "slow", "slow_momentum"]
    assert_same_bits([optimizer.state_dict()["state"][0]["slow_momentum"]], [torch.ones(3)])
    del optimizer.state[weight]["slow_momentum"]
    assert "slow_momentum" not in optimizer.state[weight]
    with pytest.raises(TypeError, match="`state\\[parameter\\]\\['slow_momentum'\\]` must be a tensor"):
        optimizer.state[weight]["slow_momentum"] = torch.ones(4)


def test_momentum_explains_a_step_size_above_1():
    Lookahead(torch.optim.SGD(parameters((3,)), 0.1), 2, 1.2, slow_momentum=0.5)
    with pytest.warns(UserWarning, match="over-relaxation"):
        Lookahead(torch.optim.SGD(parameters((3,)), 0.1), 2, 1.2)


LAYOUTS = {
    "transposed": ((6, 5), lambda one: one.t().contiguous().t()),
    "channels last": ((2, 3, 4, 5), lambda one: one.to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
@pytest.mark.parametrize("slow_nesterov", [True, False])
@pytest.mark.parametrize(("shape", "lay_out"), LAYOUTS.values(), ids=LAYOUTS)
def test_weights_that_lie_otherwise_in_memory_make_the_same_outer_step(shape, lay_out, slow_nesterov, dtype):
    outer = {"slow_momentum": 0.9, "slow_nesterov": slow_nesterov}

    def made():
        weights = [torch.nn.Parameter(one.detach().to(dtype)) for one in parameters(shape)]
        return weights, Lookahead(torch.optim.SGD(weights, 0.1), 2, 0.7, **outer)

    (plain, optimizer), (moved, other) = made(), made()
    for step in range(8):
        if step == 3:
            moved[0].data = lay_out(moved[0].detach())
        for weights, one in ((plain, optimizer), (moved, other)):
            set_gradients(weights, step)
            one.step()
    for weight, expected in zip(moved, plain):
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(other.state[weight]["slow_momentum"], optimizer.state[expected]["slow_momentum"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_momentum_in_a_narrow_dtype_moves_all_elements(dtype):
    # PyTorch's fused SGD on the CPU leaves whole vectors of elements where they are.
    weight = torch.nn.Parameter(torch.ones(33, dtype=dtype))
    optimizer = Lookahead(torch.optim.SGD([weight], 0.25), 1, 0.5, slow_momentum=0.5)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # s = 1/4; b = 1/4, then 3/8; d = 3/8, then 7/16.
    assert torch.equal(weight.detach().float(), torch.full((33,), 1 - 0.5 * (3 / 8 + 7 / 16)))


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("outer", [{"slow_momentum": 0.6}, {"slow_dtype": torch.float64}])
def test_the_bare_optimizer_loads_a_checkpoint_where_one_weight_never_had_a_gradient(inner, outer):
    weights = parameters((3,), (2,))
    optimizer = Lookahead(inner(weights, 0.1), 2, 0.7, **outer)
    for step in range(5):
        set_gradients(weights[:1], step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    bare = inner([weight.detach().clone() for weight in weights], 0.1)
    bare.load_state_dict(copy.deepcopy(saved))
    set_gradients(bare.param_groups[0]["params"], 5)
    bare.step()
    # The weight that is not in the file is captured again, in mid-cycle too.
    other = Lookahead(inner(copies, 0.1), 2, 0.7, **outer)
    other.load_state_dict(saved)
    for one in (optimizer, other):
        train(one, 9, 5)
    assert_same_bits(copies, weights)


@pytest.mark.parametrize("name", ["slow", "slow_momentum"])
def test_a_checkpoint_keeps_what_a_weight_without_gradients_cannot_be_captured_with_again(name):
    weights = parameters((3,), (2,))
    optimizer = Lookahead(torch.optim.AdamW(weights, 0.1), 4, slow_momentum=0.6, slow_dtype=torch.float64)
    set_gradients(weights[:1], 0)
    optimizer.step()
    # A slow weight of more digits than its parameter, and a momentum that would make it coast.
    value = weights[1].detach().double() * (1 + 2**-40) if name == "slow" else torch.ones(2, dtype=torch.float64)
    optimizer.state[weights[1]][name] = value
    assert_same_bits([optimizer.state_dict()["state"][1][name]], [value])


@pytest.mark.parametrize("name", ["slow", "slow_momentum"])
def test_a_tensor_that_was_expanded_can_be_assigned(name):
    weights, others = parameters((3,)), parameters((3,))
    for (weight,), value in ((weights, torch.ones(1).expand(3)), (others, torch.ones(3))):
        optimizer = train(Lookahead(torch.optim.SGD([weight], 0.1), 2, 0.7, slow_momentum=0.5), 3)
        optimizer.state[weight][name] = value
        train(optimizer, 6, 3)
    assert_same_bits(weights, others)


@pytest.mark.parametrize("slow_nesterov", [True, False])
@pytest.mark.parametrize(
    ("dtype", "slow_step_size"), [(torch.float16, 1e5), (torch.float16, 1e39), (torch.float32, 1e39)], ids=str
)
def test_a_step_size_that_the_dtype_cannot_hold_makes_the_same_step(dtype, slow_step_size, slow_nesterov):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    optimizer = Lookahead(torch.optim.SGD([weight], 1.0), 2, slow_step_size, slow_momentum=0.5)
    optimizer.param_groups[0]["slow_nesterov"] = slow_nesterov
    # A pseudo-gradient of 0, and the largest momentum that moves a weight by 1 or 3/2.
    moves = torch.tensor([0.0, 4 / slow_step_size], dtype=dtype)
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert_same_bits([weight.detach()], [torch.tensor([1.0, -2.0], dtype=dtype)])
    optimizer.state[weight]["slow_momentum"] = moves.clone()
    for _ in range(2):
        optimizer.step()
    moved = moves.double() * (0.25 if slow_nesterov else 0.5) * slow_step_size
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64) - moved
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("slow_dtype", [None, torch.float64])
def test_an_error_in_a_sync_leaves_no_pseudo_gradients_in_the_parameters(slow_dtype, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    (weight,) = parameters((3,))
    optimizer = Lookahead(torch.optim.SGD([weight], 0.1), 2, slow_momentum=0.5, slow_dtype=slow_dtype)
    train(optimizer, 3)
    slow, momentum = (optimizer.state[weight][name].clone() for name in ("slow", "slow_momentum"))
    monkeypatch.setattr(_outer_step_torch, "_descend", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(optimizer, 4, 3)
    assert_same_bits([weight.detach()], [slow.to(weight.dtype)])
    assert_same_bits([optimizer.state[weight]["slow"], optimizer.state[weight]["slow_momentum"]], [slow, momentum])


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("is_nested", [False, True])
def test_after_a_checkpoint_without_the_count_since_the_last_sync_a_sync_is_made_in_mid_cycle_only(at, is_nested):
    def make(weights):
        optimizer = Lookahead(torch.optim.SGD(weights, 0.1), 3, 0.7, slow_momentum=0.9)
        return Lookahead(optimizer, 6, 0.7, slow_momentum=0.5) if is_nested else optimizer

    weights = parameters((3,))
    optimizer = train(make(weights), at)
    old = copy.deepcopy(optimizer.state_dict())
    names = [name for name in old["param_groups"][0] if name.startswith("lookahead_unsynced")]
    for name in names:
        del old["param_groups"][0][name]
    others = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    other = make(others)
    # A count of its own, not the checkpoint's.
    train(other, 4)
    with torch.no_grad():
        others[0].copy_(weights[0])
    other.load_state_dict(old)
    optimizer.sync()
    other.sync()
    assert_same_bits(others, weights)
    assert all(other.param_groups[0][name] == optimizer.param_groups[0][name] for name in names)


@pytest.mark.parametrize("slow_momentum", [0.0, 0.9])
def test_a_state_dict_that_lost_its_momentum_begins_with_0(slow_momentum):
    weights = parameters((3,), (2,))
    groups = [{"params": weights[:1]}, {"params": weights[1:], "slow_momentum": 0.5}]
    optimizer = train(Lookahead(torch.optim.SGD(groups, 0.1), 3), 4)
    lost = copy.deepcopy(optimizer.state_dict())
    others = parameters((3,), (2,))
    other = Lookahead(
        torch.optim.SGD([{"params": others[:1]}, {"params": others[1:]}], 0.1), 3, slow_momentum=slow_momentum
    )
    other.load_state_dict(lost)
    # This is what `torch.distributed.checkpoint` does if the optimizer has no momentum.
    del lost["state"][1]["slow_momentum"]
    other.load_state_dict(lost)
    assert not other.state[others[1]]["slow_momentum"].any()
    train(other, 7, 4)
    # Older state dicts, and state dicts of the bare optimizer.
    del lost["param_groups"][1]["slow_momentum"]
    other.load_state_dict(lost)
    other.load_state_dict(torch.optim.SGD(groups, 0.1).state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is deprecated")
def test_distributed_checkpoints_with_and_without_momentum_load_as_the_docs_say(tmp_path):
    def make(**outer):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, Lookahead(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 3, **outer)

    def save(name, **outer):
        model, optimizer = make(**outer)
        train(optimizer, 4)
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path / name)
        return model, optimizer

    def load(name, planner=None, **outer):
        model, optimizer = make(**outer)
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=tmp_path / name, planner=planner)
        set_optimizer_state_dict(model, optimizer, state)
        return optimizer.param_groups[0]["slow_momentum"], optimizer.state[model.weight]

    model, optimizer = save("with", slow_momentum=0.5)
    save("without")
    slow_momentum, state = load("with")
    assert slow_momentum == 0.5
    assert not state["slow_momentum"].any()
    _, state = load("with", slow_momentum=0.5)
    assert_same_bits([state["slow_momentum"]], [optimizer.state[model.weight]["slow_momentum"]])
    with pytest.raises(CheckpointException, match="Missing key"):
        load("without", slow_momentum=0.5)
    slow_momentum, _ = load("without", dcp.DefaultLoadPlanner(allow_partial_load=True), slow_momentum=0.5)
    assert slow_momentum == 0


@pytest.mark.parametrize("slow_dtype", [None, torch.float32])
def test_a_slow_dtype_in_a_group_is_refused_and_changes_nothing(slow_dtype):
    weights = parameters((3,), (2,))
    group = {"params": weights[1:], "slow_dtype": torch.float64}
    message = r"`slow_dtype` is an argument of `Lookahead`.*Received: a group with slow_dtype=torch\.float64"
    inner = torch.optim.SGD([dict(group)], 0.1)
    with pytest.raises(TypeError, match=message):
        Lookahead(inner, slow_dtype=slow_dtype)
    assert "sync_period" not in inner.param_groups[0]
    optimizer = Lookahead(torch.optim.SGD(weights[:1], 0.1), slow_dtype=slow_dtype)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize(("name", "kind"), [("slow", "slow weight"), ("slow_momentum", "slow momentum")])
def test_a_state_dict_with_a_slow_weight_or_momentum_of_no_real_dtype_is_refused(name, kind, dtype):
    weights = parameters((2,), (3,))
    optimizer = train(Lookahead(torch.optim.SGD(weights, 0.1, momentum=0.9), 3, slow_momentum=0.9), 4)
    before = copy.deepcopy((weights, optimizer.state_dict()))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][1][name] = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=rf"{kind} of a floating point dtype for parameter 1\. Received: {dtype}"):
        optimizer.load_state_dict(bad)
    assert_same_bits(weights, before[0])
    assert str(optimizer.state_dict()) == str(before[1])


def test_a_step_size_of_1_copies_the_rounded_weight_into_a_wide_slow_weight():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Lookahead(torch.optim.SGD([weight], 1.0), 1, 0.3, slow_dtype=torch.float32)
    weight.grad = torch.full_like(weight, -UNIT)
    optimizer.step()
    assert optimizer.state[weight]["slow"] == 1 + torch.tensor(0.3) * UNIT
    weight.grad = torch.zeros_like(weight)
    optimizer.param_groups[0]["slow_step_size"] = 1.0
    optimizer.step()
    assert optimizer.state[weight]["slow"] == weight == 1


@pytest.mark.parametrize("outer", [{}, {"slow_momentum": 0.9}, {"slow_momentum": 0.9, "slow_dtype": torch.float64}])
@pytest.mark.parametrize(
    ("shape", "lay_out", "is_cut"),
    [
        ((30, 40), lambda one: one.t().contiguous().t(), True),
        ((6, 5, 8, 5), lambda one: one.to(memory_format=torch.channels_last), True),
        ((6, 5, 4, 5, 2), lambda one: one.permute(3, 0, 4, 1, 2).contiguous().permute(1, 3, 4, 0, 2), True),
        ((30, 40), lambda one: torch.cat([one, one], 1)[:, :40], False),
        ((30, 40), lambda one: torch.cat([one, one], 1).t()[:40].t(), False),
    ],
    ids=["transposed", "channels last", "permuted", "with gaps", "transposed with gaps"],
)
def test_large_weights_are_cut_in_the_order_of_their_memory(shape, lay_out, is_cut, outer, monkeypatch):
    largest = 512
    monkeypatch.setattr(_pieces_torch, "_BYTES_PER_THREAD", largest)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (plain,), (moved,) = parameters(shape), parameters(shape)
    moved.data = lay_out(moved.data)
    assert torch.equal(plain, moved)
    assert not moved.is_contiguous()
    optimizers = [Lookahead(torch.optim.SGD([one], 0.1), 2, 0.7, **outer) for one in (plain, moved)]
    for optimizer in optimizers:
        train(optimizer, 7)
    torch.testing.assert_close(moved, plain)
    for name in ("slow", "slow_momentum") if "slow_momentum" in outer else ("slow",):
        torch.testing.assert_close(optimizers[1].state[moved][name], optimizers[0].state[plain][name])
    pieces = _pieces_torch.cut([lay_out(plain.detach())], [moved.detach()], [lay_out(torch.zeros(shape))])
    assert (len(pieces) > 1) == is_cut
    assert max(piece.slow[0].nbytes for piece in pieces) == (largest if is_cut else plain.nbytes)
