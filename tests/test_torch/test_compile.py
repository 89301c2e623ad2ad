"""`torch.compile` of the optimizer step and of whole training steps, and the refusal of CUDA graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

# What `torch.compile` imports emits it, for the bare optimizer too.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

SHAPES = (3, 4), (5,)
SYNC_PERIOD = 3
STEPS = 4 * SYNC_PERIOD + 1


@pytest.fixture(autouse=True)
def _new_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sgd(weights):
    return torch.optim.SGD(weights, 0.1, momentum=0.9, foreach=True)


def adam(weights):
    return torch.optim.Adam(weights, 0.05, foreach=True)


def nested(weights):
    return Lookahead(sgd(weights), 2, 0.25)


class NestedByHand(ByHand):
    """A `ByHand` around another: all weights restart from the outer slow weights."""

    def __init__(self, inner, sync_period, slow_step_size):
        super().__init__(inner.optimizer, sync_period, slow_step_size)
        self.inner = inner

    def after_step(self):
        self.inner.after_step()
        super().after_step()
        if self.steps % self.sync_period == 0:
            for one, other in zip(self.inner.slow, self.slow):
                one.copy_(other)


def by_hand(inner, weights):
    if inner is nested:
        return NestedByHand(ByHand(sgd(weights), 2, 0.25), SYNC_PERIOD, 0.25)
    return ByHand(inner(weights), SYNC_PERIOD, 0.25)


def train(step, weights, after_step=lambda: None, counter=None):
    """Make steps. With a `counter`, fail if a step is compiled after the first cycles."""
    compiled = []
    for index in range(STEPS):
        set_gradients(weights, index)
        # Nested wrappers meet for the first time at step 6.
        with torch._dynamo.config.patch(error_on_recompile=counter is not None and index >= 2 * SYNC_PERIOD):
            step()
        after_step()
        compiled.append(counter.frame_count if counter else 0)
    if counter:
        assert compiled[0] > 0
        assert compiled[-1] == compiled[SYNC_PERIOD - 1]


@pytest.mark.parametrize("inner", [sgd, adam, nested])
@pytest.mark.parametrize(("backend", "how"), [("eager", "method"), ("aot_eager", "function")])
def test_a_compiled_step_is_compiled_in_the_first_cycle_alone_and_gives_the_weights_of_the_bare_one(
    inner, backend, how
):
    expected = parameters(*SHAPES)
    reference = by_hand(inner, expected)
    train(torch.compile(lambda: reference.optimizer.step(), backend=backend), expected, reference.after_step)

    torch._dynamo.reset()
    weights = parameters(*SHAPES)
    optimizer = Lookahead(inner(weights), SYNC_PERIOD, 0.25)
    counter = CompileCounterWithBackend(backend)
    step = optimizer.step if how == "method" else lambda: optimizer.step()
    train(torch.compile(step, backend=counter), weights, counter=counter)
    assert int(optimizer.param_groups[0]["lookahead_step"]) == STEPS
    assert_same_bits(weights, expected)
    name = "slow_2" if inner is nested else "slow"
    assert_same_bits([optimizer.state[one][name] for one in weights], reference.slow)


def test_a_step_compiled_by_inductor_gives_the_weights_of_the_bare_one():
    expected = parameters(*SHAPES)
    reference = by_hand(adam, expected)
    train(torch.compile(lambda: reference.optimizer.step()), expected, reference.after_step)

    torch._dynamo.reset()
    weights = parameters(*SHAPES)
    optimizer = Lookahead(adam(weights), SYNC_PERIOD, 0.25)
    counter = CompileCounterWithBackend("inductor")
    train(torch.compile(optimizer.step, backend=counter), weights, counter=counter)
    assert_same_bits(weights, expected)
    assert_same_bits([entry["slow"] for entry in optimizer.state.values()], reference.slow)


@pytest.mark.parametrize("inner", [sgd, adam, nested])
def test_a_compiled_training_step_gives_the_weights_of_the_bare_one(inner):
    def run(step_of, counter=None):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        step, after_step = step_of(list(model.parameters()))
        generator = torch.Generator().manual_seed(0)

        def training_step(x, y):
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            step()
            model.zero_grad()

        training_step = torch.compile(training_step, backend=counter or "aot_eager")
        for index in range(STEPS):
            x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)
            with torch._dynamo.config.patch(error_on_recompile=counter is not None and index >= 2 * SYNC_PERIOD):
                training_step(x, y)
            after_step()
        return list(model.parameters())

    def wrapped(weights):
        return Lookahead(inner(weights), SYNC_PERIOD, 0.25).step, lambda: None

    def bare(weights):
        reference = by_hand(inner, weights)
        return (lambda: reference.optimizer.step()), reference.after_step

    counter = CompileCounterWithBackend("aot_eager")
    weights = run(wrapped, counter)
    assert counter.frame_count > 0
    assert_same_bits(weights, run(bare))


def test_eager_and_compiled_steps_mix():
    expected, weights = parameters(*SHAPES), parameters(*SHAPES)
    reference, optimizer = by_hand(sgd, expected), Lookahead(sgd(weights), SYNC_PERIOD, 0.25)
    compiled = torch.compile(optimizer.step, backend="eager")
    for index in range(STEPS):
        for one in (weights, expected):
            set_gradients(one, index)
        compiled() if index % 2 else optimizer.step()
        reference.step()
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("inner", [sgd, adam])
def test_what_is_compiled_is_the_graph_of_the_bare_step(inner):
    def operations(optimizer, weights):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        step = torch.compile(optimizer.step, backend=counter)
        for index in range(STEPS):
            set_gradients(weights, index)
            step()
        # The second count makes one more graph of the same operations, in which the count is no constant.
        return {
            tuple(str(one.target) for one in graph.graph.nodes if one.op == "call_function") for graph in counter.graphs
        }

    weights = parameters(*SHAPES)
    expected = operations(inner(weights), weights)
    assert any("_foreach_" in name for graph in expected for name in graph)
    weights = parameters(*SHAPES)
    assert operations(Lookahead(inner(weights), SYNC_PERIOD), weights) == expected


def test_a_step_in_the_capture_of_a_cuda_graph_is_refused_and_changes_nothing(monkeypatch):
    weights, expected = parameters(*SHAPES), parameters(*SHAPES)
    optimizer = Lookahead(sgd(weights), SYNC_PERIOD)
    for one in (weights, expected):
        set_gradients(one, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            optimizer.step()
    assert_same_bits(weights, expected)
    assert len(optimizer.state) == 0
    assert int(optimizer.param_groups[0]["lookahead_step"]) == 0
    optimizer.step()
    assert int(optimizer.param_groups[0]["lookahead_step"]) == 1


@pytest.mark.parametrize(("initialized", "capturing"), [(True, False), (False, True)])
def test_a_step_outside_of_a_capture_is_not_refused(monkeypatch, initialized, capturing):
    optimizer = Lookahead(sgd(parameters(*SHAPES)), SYNC_PERIOD)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        optimizer.step()
    assert int(optimizer.param_groups[0]["lookahead_step"]) == 1
