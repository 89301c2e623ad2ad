"""Gradients that are not finite: their effect on slow momentum, and the guards that the docs name."""

import contextlib
import math

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import parameters, set_gradients

LR, PERIOD, ETA, MU = 0.1, 3, 0.7, 0.9
SHAPES = (3, 2), (4,)

not_finite = pytest.mark.parametrize("value", [math.inf, math.nan])
at_every_position = pytest.mark.parametrize("bad", range(1, 2 * PERIOD + 1))


def lookahead(weights):
    return Lookahead(torch.optim.SGD(weights, LR, momentum=0.9), PERIOD, ETA, slow_momentum=MU)


def states(optimizer):
    return [optimizer.state[weight] for group in optimizer.param_groups for weight in group["params"]]


def with_scaler(optimizer, weights):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)

    def step():
        # The result of `backward` of a scaled loss.
        scaler.scale(torch.zeros(()))
        for weight in weights:
            weight.grad *= scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()

    return step


def with_clipping(optimizer, weights):
    def step():
        with contextlib.suppress(RuntimeError):
            torch.nn.utils.clip_grad_norm_(weights, math.inf, error_if_nonfinite=True)
            optimizer.step()

    return step


@not_finite
@at_every_position
@pytest.mark.parametrize("guarded", [with_scaler, with_clipping])
def test_a_guarded_step_changes_nothing(guarded, bad, value):
    weights, expected = parameters(*SHAPES), parameters(*SHAPES)
    optimizer, other = lookahead(weights), lookahead(expected)
    step = guarded(optimizer, weights)
    for count in range(1, 3 * PERIOD + 2):
        set_gradients(weights, count)
        if count == bad:
            weights[1].grad[2] = value
        step()
        if count != bad:
            set_gradients(expected, count)
            other.step()
    assert optimizer.param_groups[0]["lookahead_step"] == 3 * PERIOD
    assert all(state["slow_momentum"].isfinite().all() for state in states(optimizer))
    assert_same_bits(weights, expected)
    assert_same_bits(states(optimizer), states(other))


@not_finite
@at_every_position
def test_without_a_guard_momentum_is_spoiled_for_good_until_a_reset(bad, value):
    weights = parameters(*SHAPES, dtype=torch.float64)
    optimizer = Lookahead(torch.optim.SGD(weights, LR), PERIOD, ETA, slow_momentum=MU)

    def train(start, stop):
        for count in range(start, stop):
            set_gradients(weights, count)
            if count == bad:
                weights[1].grad[2] = value
            optimizer.step()

    def load_finite_weights():
        with torch.no_grad():
            for weight, finite in zip(weights, parameters(*SHAPES, dtype=torch.float64)):
                weight.copy_(finite)

    train(1, 2 * PERIOD + 1)
    assert not states(optimizer)[1]["slow_momentum"][2].isfinite()
    assert states(optimizer)[0]["slow_momentum"].isfinite().all()
    # Finite weights are not enough, as the slow weight and the momentum stay.
    load_finite_weights()
    train(2 * PERIOD + 1, 4 * PERIOD + 1)
    assert not states(optimizer)[1]["slow_momentum"][2].isfinite()
    assert not weights[1][2].isfinite()

    load_finite_weights()
    optimizer.reset_slow_weights()
    oracle = reference.Lookahead(reference.SGD(LR), PERIOD, ETA, MU).start([weight.detach() for weight in weights])
    for count in range(20, 20 + 3 * PERIOD):
        set_gradients(weights, count)
        oracle.apply([weight.grad for weight in weights])
        optimizer.step()
    for weight, state, fast, b in zip(weights, states(optimizer), oracle.weights, oracle.b):
        torch.testing.assert_close(weight.detach(), torch.as_tensor(fast), rtol=0, atol=1e-12)
        torch.testing.assert_close(state["slow_momentum"], torch.as_tensor(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "outer"),
    [
        (torch.float32, {"slow_momentum": MU}),
        (torch.float32, {"slow_momentum": MU, "slow_nesterov": False}),
        (torch.bfloat16, {"slow_momentum": MU}),
        (torch.bfloat16, {"slow_dtype": torch.float32}),
        (torch.bfloat16, {"slow_momentum": MU, "slow_dtype": torch.float32}),
    ],
    ids=str,
)
def test_infinite_weights_that_do_not_move_stay_and_have_no_momentum(dtype, outer, is_shared):
    """A mask has such -inf. All other weights make the same steps as without a mask beside them."""
    value = torch.tensor([-math.inf, 1.0, math.inf, -2.0], dtype=dtype)
    masked, finite = (torch.nn.Parameter(one) for one in (value.clone(), value.nan_to_num(0.0, 0.0, 0.0)))
    for weight in (masked, finite):
        weights = [weight, torch.nn.Parameter(torch.zeros(1, dtype=dtype))]
        if is_shared:
            memory = torch.cat([one.detach() for one in weights])
            weights[0].data, weights[1].data = memory[:-1], memory[-1:]
        optimizer = Lookahead(torch.optim.SGD(weights, LR), PERIOD, ETA, **outer)
        for _ in range(3 * PERIOD):
            weight.grad = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=dtype)
            optimizer.step()
        if "slow_momentum" in outer:
            assert not optimizer.state[weight]["slow_momentum"][[0, 2]].any()
    assert_same_bits([masked.detach()[[0, 2]]], [value[[0, 2]]])
    assert_same_bits([masked.detach()[[1, 3]]], [finite.detach()[[1, 3]]])
