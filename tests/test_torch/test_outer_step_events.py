"""What happens to slow momentum when settings, weights or groups change, at every position of a cycle.

Against the oracle of `tests/reference.py`, in float64.
"""

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import parameters, set_gradients

LR, PERIOD, ETA = 0.1, 4, 0.7
SHAPES = (3, 4), (5,), ()

at_every_position = pytest.mark.parametrize("position", range(1, 2 * PERIOD + 1))
with_each_momentum = pytest.mark.parametrize(
    "outer", [{"slow_momentum": 0.9}, {"slow_momentum": 0.5, "slow_nesterov": False}], ids=["nesterov", "heavy ball"]
)


class Run:
    """An optimizer and its oracle. They make the same steps and are compared after each."""

    def __init__(self, weights, outer, lr=LR, optimizer=None):
        self.weights = weights
        self.optimizer = optimizer or Lookahead(torch.optim.SGD(weights, lr), PERIOD, ETA, **outer)
        self.oracle = reference.Lookahead(reference.SGD(lr), PERIOD, ETA, **outer)
        self.oracle.start([weight.detach() for weight in weights])
        self.steps = 0

    def train(self, steps, missing=(), frozen=()):
        """Make steps. The weights of these indices have no gradient. Some of them may be frozen."""
        for _ in range(steps):
            self.steps += 1
            set_gradients(self.weights, self.steps)
            for index in (*missing, *frozen):
                self.weights[index].grad = None
            for index in frozen:
                # At a sync this weight has neither a pseudo-gradient nor a momentum.
                self.oracle.slow[index] = self.oracle.weights[index].copy()
                self.oracle.b[index] = self.oracle.b[index] * 0
            self.oracle.apply([weight.grad for weight in self.weights])
            self.optimizer.step()
            self.compare()

    def compare(self):
        for weight, expected in zip(self.weights, self.oracle.weights):
            torch.testing.assert_close(weight.detach(), torch.as_tensor(expected), rtol=0, atol=1e-12)
        for weight, slow, b in zip(self.weights, self.oracle.slow, self.oracle.b):
            state = self.optimizer.state[weight]
            if self.oracle.sync_period and weight.requires_grad:
                torch.testing.assert_close(state["slow"], torch.as_tensor(slow), rtol=0, atol=1e-12)
                torch.testing.assert_close(state["slow_momentum"], torch.as_tensor(b), rtol=0, atol=1e-12)


@pytest.fixture
def run_of():
    return lambda outer: Run(parameters(*SHAPES, dtype=torch.float64), outer)


@at_every_position
@with_each_momentum
def test_period_0_drops_the_momentum_and_a_new_period_begins_with_none(run_of, outer, position):
    run = run_of(outer)
    (group,) = run.optimizer.param_groups
    run.train(position)
    group["sync_period"] = run.oracle.sync_period = 0
    run.train(2)
    assert not any(name.startswith("slow") for state in run.optimizer.state.values() for name in state)
    group["sync_period"] = run.oracle.sync_period = PERIOD
    run.oracle.reset()
    run.train(2 * PERIOD + 1)


@at_every_position
@with_each_momentum
@pytest.mark.parametrize("period", [1, 3, 7])
def test_another_period_on_the_way_keeps_the_momentum(run_of, outer, position, period):
    run = run_of(outer)
    run.train(position)
    run.optimizer.param_groups[0]["sync_period"] = run.oracle.sync_period = period
    run.train(2 * period + 1)


@at_every_position
@with_each_momentum
def test_settings_that_are_changed_on_the_way_hold_from_the_next_sync(run_of, outer, position):
    run = run_of(outer)
    run.train(position)
    run.optimizer.param_groups[0].update(slow_step_size=0.3, slow_momentum=0.4, slow_nesterov=False)
    run.oracle.slow_step_size, run.oracle.slow_momentum, run.oracle.slow_nesterov = 0.3, 0.4, False
    run.train(2 * PERIOD)


@at_every_position
@with_each_momentum
@pytest.mark.parametrize("steps", range(PERIOD, 2 * PERIOD))
def test_a_weight_that_was_frozen_at_a_sync_begins_with_no_momentum(run_of, outer, position, steps):
    run = run_of(outer)
    run.train(position)
    run.weights[1].requires_grad_(False)
    run.train(steps, frozen=[1])
    assert "slow" not in run.optimizer.state[run.weights[1]]
    run.weights[1].requires_grad_(True)
    run.train(2 * PERIOD)


@at_every_position
@with_each_momentum
def test_a_weight_without_gradients_coasts(run_of, outer, position):
    run = run_of(outer)
    run.train(position)
    before = run.weights[1].detach().clone()
    run.train(PERIOD + 1, missing=[1])
    assert not torch.equal(run.weights[1], before)


@at_every_position
@with_each_momentum
def test_a_group_that_is_added_has_a_count_and_a_momentum_of_its_own(run_of, outer, position):
    run = run_of(outer)
    run.train(position)
    added = parameters((2, 2), (3,), seed=1, dtype=torch.float64)
    run.optimizer.add_param_group({"params": added})
    # The oracle of the new group begins now. Both oracles share the optimizer. The second oracle makes its step.
    other = Run(added, outer, optimizer=run.optimizer)
    for step in range(2 * PERIOD + 1):
        for one in (run, other):
            set_gradients(one.weights, 100 + step)
            one.oracle.apply([weight.grad for weight in one.weights])
        run.optimizer.step()
        run.compare()
        other.compare()
    assert all("slow_momentum" in run.optimizer.state[weight] for weight in added)


@at_every_position
@with_each_momentum
def test_a_block_shows_the_slow_weights_and_leaves_the_momentum_alone(run_of, outer, position):
    run = run_of(outer)
    run.train(position)
    fast = [weight.detach().clone() for weight in run.weights]
    with run.optimizer.slow_weights():
        for weight, slow in zip(run.weights, run.oracle.slow):
            torch.testing.assert_close(weight.detach(), torch.as_tensor(slow), rtol=0, atol=1e-12)
    assert_same_bits(run.weights, fast)
    run.train(PERIOD)


def by_hand(weights, outer, dtypes, steps):
    """Return slow weights and momentum, in float32, of weights that make so many steps in each of these dtypes.

    The results are the implementation's up to roundings of float32.
    """
    slow = [weight.detach().float() for weight in weights]
    momentum = [torch.zeros_like(one) for one in slow]
    mu, count = outer["slow_momentum"], 0
    for dtype in dtypes:
        for weight in weights:
            weight.data, weight.grad = weight.data.to(dtype), None
        for _ in range(steps):
            count += 1
            set_gradients(weights, count)
            for weight, s, b in zip(weights, slow, momentum):
                weight.data.add_(weight.grad, alpha=-LR)
                if count % PERIOD == 0:
                    # Measured from the slow weight, rounded to the present dtype of the weight.
                    move = weight.data.float() - s.to(dtype).float()
                    b.mul_(mu).sub_(move)
                    if outer.get("slow_nesterov", True):
                        s.add_(move, alpha=ETA).add_(b, alpha=-ETA * mu)
                    else:
                        s.add_(b, alpha=-ETA)
                    weight.data.copy_(s)
    return slow, momentum


@with_each_momentum
@pytest.mark.parametrize("steps", range(1, PERIOD + 2))
def test_a_model_that_goes_to_float32_and_back_keeps_its_wide_slow_weights_and_momentum(outer, steps):
    dtypes = torch.bfloat16, torch.float32, torch.bfloat16
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    weights = list(module.parameters())
    expected = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer = Lookahead(torch.optim.SGD(weights, LR), PERIOD, ETA, **outer, slow_dtype=torch.float32)
    count = 0
    for dtype in dtypes:
        module.to(dtype)
        for _ in range(steps):
            count += 1
            set_gradients(weights, count)
            optimizer.step()
    slow, momentum = by_hand(expected, outer, dtypes, steps)
    for weight, one, expected_slow, b in zip(weights, expected, slow, momentum):
        state = optimizer.state[weight]
        assert state["slow"].dtype == state["slow_momentum"].dtype == torch.float32
        for found, wanted in ((state["slow"], expected_slow), (state["slow_momentum"], b), (weight, one)):
            difference = (found.detach().float() - wanted.detach().float()).abs()
            # If a weight lies halfway between two numbers of bfloat16, operations that round differently may give the
            # other number.
            assert (difference > 1e-5).sum() <= 1
            assert difference.max() < 2**-6


def test_an_outer_sync_restarts_all_inner_slow_weights_where_one_inner_momentum_was_deleted():
    weights = [torch.nn.Parameter(torch.full((2,), float(value))) for value in (1, 2, 3)]
    inner = Lookahead(torch.optim.SGD(weights, 0.1), 10, 0.5, slow_momentum=0.5)
    outer = Lookahead(inner, 10, 0.5, slow_momentum=0.5)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        outer.step()
    del inner.state[weights[0]]["slow_momentum"]
    outer.sync()
    for weight in weights:
        assert torch.equal(outer.state[weight]["slow"], weight.detach())
