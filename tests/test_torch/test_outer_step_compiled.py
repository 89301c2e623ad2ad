"""`torch.compile` with slow momentum: nothing is compiled after the first cycle."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import set_gradients

# What `torch.compile` imports emits it, for the bare optimizer too.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

PERIOD, CYCLES = 3, 3
OUTER = [
    {"slow_momentum": 0.9},
    {"slow_momentum": 0.5, "slow_nesterov": False},
    {"slow_momentum": 0.9, "slow_dtype": torch.float32},
]


@pytest.fixture(autouse=True)
def _new_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def start(outer, inner):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "slow_dtype" in outer else torch.float32
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)
    return model, Lookahead(inner(model.parameters()), PERIOD, 0.7, **outer)


def sgd(weights):
    return torch.optim.SGD(weights, 0.1, momentum=0.9, foreach=True)


def adam(weights):
    return torch.optim.Adam(weights, 0.05, foreach=True)


def train(training_step, counter):
    """Make steps, and return how many graphs were compiled after each."""
    compiled = []
    for index in range(CYCLES * PERIOD + 1):
        with torch._dynamo.config.patch(error_on_recompile=index >= PERIOD):
            training_step(index)
        compiled.append(counter.frame_count)
    return compiled


def assert_only_the_first_cycle_compiles(compiled):
    assert compiled[0] > 0
    assert compiled[-1] == compiled[PERIOD - 1]


def assert_equal_states(optimizer, other):
    for group, expected in zip(optimizer.param_groups, other.param_groups):
        for one, another in zip(group["params"], expected["params"]):
            assert_same_bits([one], [another])
            assert_same_bits(optimizer.state[one], other.state[another])
            assert "slow_momentum" in optimizer.state[one]


@pytest.mark.parametrize("inner", [sgd, adam])
@pytest.mark.parametrize("outer", OUTER, ids=["nesterov", "heavy ball", "wide"])
def test_a_compiled_step_with_momentum_is_compiled_in_the_first_cycle_alone(outer, inner):
    model, optimizer = start(outer, inner)
    _, other = start(outer, inner)
    counter = CompileCounterWithBackend("aot_eager")
    compiled_step = torch.compile(optimizer.step, backend=counter)
    # The inner step of the other optimizer is compiled alone.
    other.inner_optimizer.step = torch.compile(other.inner_optimizer.step, backend="aot_eager")

    def training_step(index):
        set_gradients(list(model.parameters()), index)
        compiled_step()

    assert_only_the_first_cycle_compiles(train(training_step, counter))
    for index in range(CYCLES * PERIOD + 1):
        set_gradients(other.param_groups[0]["params"], index)
        other.step()
    assert_equal_states(optimizer, other)


@pytest.mark.parametrize("outer", OUTER, ids=["nesterov", "heavy ball", "wide"])
def test_a_compiled_model_with_momentum_is_compiled_in_the_first_cycle_alone(outer):
    model, optimizer = start(outer, sgd)
    counter = CompileCounterWithBackend("aot_eager")
    compiled_model = torch.compile(model, backend=counter)
    inputs = torch.randn(8, 6).to(model[0].weight.dtype)

    def training_step(index):
        optimizer.zero_grad()
        (compiled_model(inputs) - index).square().mean().backward()
        optimizer.step()

    assert_only_the_first_cycle_compiles(train(training_step, counter))
    assert optimizer.param_groups[0]["lookahead_step"] == CYCLES * PERIOD + 1
    assert all(entries["slow_momentum"].any() for entries in optimizer.state.values())
    # Nothing is compiled in a block on the slow weights either.
    with optimizer.slow_weights(), torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled_model(inputs), copy.deepcopy(model)(inputs))
