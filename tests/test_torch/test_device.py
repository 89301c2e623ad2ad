"""What could differ on a GPU: implementations of the inner step, dtypes, moves between devices, and waits.

The same tests run on the CPU, with its implementations.
"""

import contextlib
import copy
import io
import sys
import types

import pytest
import torch

import cuda_graph
from lookahead_optim import _outer_step_torch
from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.device import DEVICE, ON_CPU
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

pytestmark = pytest.mark.gpu

SHAPES = [(64, 32), (5,), (), (1000, 3)]
# The smallest step size with which PyTorch's interpolation rounds like `ByHand`.
PERIOD, SIZE = 3, 0.25


def sgd(weights, **options):
    return torch.optim.SGD(weights, 0.05, momentum=0.9, **options)


def adamw(weights, **options):
    # An epsilon that is not zero in half precision.
    return torch.optim.AdamW(weights, 0.05, eps=1e-3, **options)


def implementations(inner):
    options = [{"foreach": True}, {"fused": True}, {"foreach": False}]
    return options + ([] if ON_CPU or inner is sgd else [{"capturable": True}, {"capturable": True, "fused": True}])


CASES = [(inner, options) for inner in (sgd, adamw) for options in implementations(inner)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def slow_of(optimizer):
    return [optimizer.state[one]["slow"] for group in optimizer.param_groups for one in group["params"]]


def weights_of(optimizer):
    return [one for group in optimizer.param_groups for one in group["params"]]


def train(optimizer, steps, start=0, after_step=lambda: None):
    for step in range(start, start + steps):
        set_gradients(weights_of(optimizer), step)
        optimizer.step()
        after_step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "options"), CASES)
def test_weights_are_those_of_the_bare_optimizer_and_a_slow_step_by_hand_bit_for_bit(inner, options, dtype):
    optimizer = Lookahead(inner(parameters(*SHAPES, dtype=dtype, device=DEVICE), **options), PERIOD, SIZE)
    reference = ByHand(inner(parameters(*SHAPES, dtype=dtype, device=DEVICE), **options), PERIOD, SIZE)
    for step in range(3 * PERIOD + 1):
        for one in (optimizer, reference):
            set_gradients(weights_of(one) if one is optimizer else one.parameters, step)
            one.step()
        assert_same_bits(weights_of(optimizer), reference.parameters)
        assert_same_bits(slow_of(optimizer), reference.slow)
    assert {one.device.type for one in slow_of(optimizer)} == {DEVICE}


@pytest.mark.parametrize(("inner", "options"), CASES)
def test_steps_that_a_grad_scaler_skips_as_gradients_overflow_do_not_count(inner, options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(DEVICE)
    twin = copy.deepcopy(model)
    optimizer = Lookahead(inner(model.parameters(), **options), PERIOD, SIZE)
    reference = ByHand(inner(twin.parameters(), **options), PERIOD, SIZE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24, growth_interval=4)
    x, y = torch.randn(8, 16, device=DEVICE), torch.randn(8, 4, device=DEVICE)
    skipped = 0
    for _ in range(24):
        scale = scaler.get_scale()
        for network in (model, twin):
            network.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                loss = torch.nn.functional.mse_loss(network(x), y)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if all(one.grad.isfinite().all() for one in reference.parameters):
            for one in reference.parameters:
                one.grad /= scale
            reference.step()
        else:
            skipped += 1
        assert optimizer.param_groups[0]["lookahead_step"] == reference.steps
        assert_same_bits(list(model.parameters()), reference.parameters)
    assert 2 < skipped < 12
    assert_same_bits(slow_of(optimizer), reference.slow)


@pytest.mark.parametrize("position", [0, 2, 3, 4])
@pytest.mark.parametrize(("inner", "options"), CASES)
def test_a_run_goes_on_from_a_file_on_the_cpu_and_back_bit_for_bit(inner, options, position):
    def make(device):
        return Lookahead(inner(parameters(*SHAPES, seed=9, device=device), **options), PERIOD, SIZE)

    def move(source, target):
        file = io.BytesIO()
        torch.save({"weights": [one.detach() for one in weights_of(source)], "optimizer": source.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True, map_location=weights_of(target)[0].device)
        with torch.no_grad():
            for one, other in zip(weights_of(target), saved["weights"]):
                one.copy_(other)
        target.load_state_dict(saved["optimizer"])
        return target

    run = Lookahead(inner(parameters(*SHAPES, device=DEVICE), **options), PERIOD, SIZE)
    train(run, position)
    # `capturable` is only for devices, so the optimizer on the CPU cannot step. It can hold a state.
    resumed = move(move(run, make("cpu")), make(DEVICE))
    train(run, 7, position)
    train(resumed, 7, position)
    assert_same_bits(weights_of(resumed), weights_of(run))
    assert_same_bits(slow_of(resumed), slow_of(run))


@pytest.mark.parametrize("position", [0, 2, 3, 4])
def test_a_run_started_on_the_device_is_continued_on_the_cpu(position):
    runs = []
    for devices in (("cpu", "cpu"), (DEVICE, "cpu")):
        run = Lookahead(sgd(parameters(*SHAPES, device=devices[0])), PERIOD, SIZE)
        train(run, position)
        state = copy.deepcopy(run.state_dict())
        resumed = Lookahead(sgd([torch.nn.Parameter(one.detach().to(devices[1])) for one in weights_of(run)]), 5, 0.5)
        resumed.load_state_dict(state)
        train(resumed, 7, position)
        runs.append(resumed)
        assert {one.device.type for one in slow_of(resumed)} == {"cpu"}
    for one, other in zip(weights_of(runs[1]), weights_of(runs[0])):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_a_model_may_be_moved_to_the_device_after_the_optimizer_was_made_and_after_steps(position):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1), PERIOD, SIZE)
    reference = ByHand(torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1), PERIOD, SIZE)

    def train_reference(steps, start):
        for step in range(start, start + steps):
            set_gradients(reference.parameters, step)
            reference.step()

    train(optimizer, position)
    train_reference(position, 0)
    model.to(DEVICE)
    train(optimizer, 7, position)
    train_reference(7, position)
    assert {one.device.type for one in slow_of(optimizer)} == {DEVICE}
    for one, other in zip([*model.parameters(), *slow_of(optimizer)], [*reference.parameters, *reference.slow]):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_block_shows_the_slow_weights_and_gives_the_fast_ones_back_bit_for_bit(dtype, steps):
    optimizer = Lookahead(adamw(parameters(*SHAPES, dtype=dtype, device=DEVICE)), PERIOD, SIZE)
    train(optimizer, steps)
    fast = [one.detach().clone() for one in weights_of(optimizer)]
    with optimizer.slow_weights():
        assert_same_bits(weights_of(optimizer), slow_of(optimizer))
    assert_same_bits(weights_of(optimizer), fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_very_large_weights_that_were_there_at_the_start_go_through_a_sync(dtype):
    largest = torch.finfo(dtype).max
    start = torch.tensor([float("inf"), -float("inf"), largest, 1.0], dtype=dtype, device=DEVICE)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Lookahead(torch.optim.SGD([weight], 1.0), 1, 0.5)
    weight.grad = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype, device=DEVICE)
    optimizer.step()
    with torch.no_grad():
        weight[2] = -largest
    weight.grad.zero_()
    optimizer.step()
    expected = torch.tensor([float("inf"), -float("inf"), 0.0, 0.5], dtype=dtype)
    assert_same_bits(weight.detach().cpu() + 0, expected)


@pytest.mark.parametrize("size", [0.0, 0.25, 0.3, 0.5, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1")
def test_a_sync_of_large_weights_is_the_interpolation_of_pytorch_bit_for_bit(dtype, size):
    # On a GPU some of these weights have a kernel of this package.
    shapes = [(2300, 2001), (128, 64, 33, 35), (5,), (2048, 4097)]
    weights = [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=DEVICE)) for shape in shapes]
    weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
    slow = [one.detach().clone() for one in weights]
    optimizer = Lookahead(torch.optim.SGD(weights, 0.1), 1, size)
    for one in weights:
        one.grad = torch.randn_like(one)
    bare = [torch.nn.Parameter(one.clone()) for one in slow]
    for one, other in zip(bare, weights):
        one.grad = other.grad
    torch.optim.SGD(bare, 0.1).step()
    fast = [one.detach() for one in bare]
    optimizer.step()
    expected = [
        torch.lerp(one, other, size) if size not in (0, 1) else (one, other)[int(size)]
        for one, other in zip(slow, fast)
    ]
    assert_same_bits(weights, expected)
    assert_same_bits(slow_of(optimizer), expected)


def test_a_large_weight_and_a_view_of_it_go_through_a_sync_as_two_small_ones():
    def sync(rows):
        values = torch.arange(rows * 4096.0, device=DEVICE).reshape(rows, 4096)
        weights = [torch.nn.Parameter(values), torch.nn.Parameter(values[1:])]
        optimizer = Lookahead(torch.optim.SGD(weights, 1.0), 2, 0.5)
        optimizer.step()
        with torch.no_grad():
            values.mul_(3)
        optimizer.step()
        return [one.detach()[:3] for one in weights]

    assert_same_bits(sync(2048), sync(8))


@contextlib.contextmanager
def no_waits():
    """Raise an error if the host waits for the device."""
    if ON_CPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("inner", "options"), CASES)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_host_does_not_wait_for_the_device_in_steps_syncs_and_blocks(inner, options, groups):
    weights = parameters(*SHAPES, device=DEVICE)
    set_gradients(weights, 0)
    halves = [{"params": weights[:2], "sync_period": 2}, {"params": weights[2:]}]
    optimizer = Lookahead(inner(weights if groups == 1 else halves, **options), PERIOD, SIZE)
    with no_waits():
        for _ in range(20):
            optimizer.step()
        optimizer.sync()
        with optimizer.slow_weights():
            pass
        optimizer.reset_slow_weights()
        optimizer.step()
        optimizer.state_dict()


@pytest.mark.skipif(ON_CPU, reason="the CPU has no graphs to capture")
def test_a_step_cannot_be_captured_in_a_graph():
    optimizer = Lookahead(adamw(parameters(*SHAPES, device=DEVICE), capturable=True), PERIOD, SIZE)
    train(optimizer, 1)
    with (
        pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    train(optimizer, 2, 1)
    assert_same_bits(slow_of(optimizer), weights_of(optimizer))


def test_the_example_with_a_cuda_graph_ends_as_the_same_run_without(capsys):
    runs = [cuda_graph.train(DEVICE, 30, use_graph=use_graph) for use_graph in (not ON_CPU, False)]
    assert [run.param_groups[0]["lookahead_step"] for run in runs] == [30, 30]
    assert_same_bits(weights_of(runs[0]), weights_of(runs[1]))
    assert_same_bits(slow_of(runs[0]), slow_of(runs[1]))


def test_without_triton_large_weights_go_through_the_operations_of_pytorch(monkeypatch):
    monkeypatch.setattr(_outer_step_torch, "is_large_on_gpu", lambda slow, fast: True)
    for kernel in (None, lambda slow, fast, size: False):
        monkeypatch.setattr(_outer_step_torch, "_kernel", lambda kernel=kernel: kernel)
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=DEVICE))
        optimizer = Lookahead(torch.optim.SGD([weight], 1.0), 1, 0.5)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert weight.tolist() == [0.5, 1.5]


def test_a_backward_pass_sees_that_the_kernel_has_changed_a_weight(monkeypatch):
    def run(slow, fast, size):
        # Like a kernel that PyTorch does not know.
        fast.data.mul_(0.5)

    monkeypatch.setitem(sys.modules, "lookahead_optim._outer_step_triton", types.SimpleNamespace(outer_step=run))
    _outer_step_torch._kernel.cache_clear()
    try:
        slow, fast = torch.ones(2), torch.nn.Parameter(torch.ones(2))
        output = (fast**2).sum()
        assert _outer_step_torch._kernel()(slow, fast, 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()
    finally:
        _outer_step_torch._kernel.cache_clear()


def test_a_kernel_that_does_not_compile_is_tried_once(monkeypatch):
    tries = []

    def fails(slow, fast, size):
        tries.append(size)
        raise RuntimeError("no C compiler")

    monkeypatch.setitem(sys.modules, "lookahead_optim._outer_step_triton", types.SimpleNamespace(outer_step=fails))
    _outer_step_torch._kernel.cache_clear()
    try:
        kernel = _outer_step_torch._kernel()
        with pytest.warns(UserWarning, match=r"operations of PyTorch, .* RuntimeError: no C compiler"):
            assert not kernel(None, None, 0.5)
        assert not kernel(None, None, 0.5)
        assert tries == [0.5]
    finally:
        _outer_step_torch._kernel.cache_clear()
