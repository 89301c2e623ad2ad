"""Every optimizer of `torch.optim`, and every kind of parameter: compared with a bare run and a slow step by hand."""

import inspect
import re

import pytest
import torch

from lookahead_optim import _pieces_torch
from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

# A product with a power of two is exact. So lerp is slow + a (fast - slow) bit for bit, however it is computed.
SYNC_PERIOD, SLOW_STEP_SIZE = 3, 0.25
STEPS = 3 * SYNC_PERIOD + 1
SHAPES = [(6, 4), (5,), (3, 2, 2)]
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.05}),
    "amsgrad": ("Adam", {"lr": 0.05, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
    "nadam": ("NAdam", {"lr": 0.05}),
    "radam": ("RAdam", {"lr": 0.05}),
    "adamax": ("Adamax", {"lr": 0.05}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    "adafactor": ("Adafactor", {"lr": 0.05}),
    "asgd": ("ASGD", {"lr": 0.1, "t0": 2}),
    "rmsprop": ("RMSprop", {"lr": 0.05, "momentum": 0.5, "centered": True}),
    "rprop": ("Rprop", {"lr": 0.05}),
    "sparse_adam": ("SparseAdam", {"lr": 0.05}),
    "muon": ("Muon", {"lr": 0.05}),
    "lbfgs": ("LBFGS", {"lr": 0.5, "max_iter": 4}),
}
OPTIMIZERS = {name: case for name, case in OPTIMIZERS.items() if hasattr(torch.optim, case[0])}


def maker(name, **options):
    """Return a function that makes the optimizer `name` for given parameters."""
    class_name, arguments = OPTIMIZERS[name]
    return lambda parameters: getattr(torch.optim, class_name)(parameters, **arguments, **options)


def shapes(name):
    return [(6, 4), (5, 3)] if name == "muon" else SHAPES


def set_sparse_gradients(parameters, step):
    set_gradients(parameters, step)
    for one in parameters:
        one.grad = one.grad.to_sparse(1)


def take_step(name, optimizer, parameters, step):
    """Make one step: LBFGS with a closure, whose loss has its minimum at 1, all others with random gradients."""
    if name != "lbfgs":
        (set_sparse_gradients if name == "sparse_adam" else set_gradients)(parameters, step)
        return optimizer.step()
    calls = []

    def closure():
        calls.append(step)
        for one in parameters:
            one.grad = None
        loss = sum((one - 1).abs().square().sum() + (one[0] - one[-1]).abs().square().sum() for one in parameters)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) > 1
    return loss.detach()


def random_step(optimizer, parameters, step):
    return take_step("", optimizer, parameters, step)


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits([actual[key]], [value])
        elif not isinstance(value, list):
            assert actual[key] == value


def assert_as_by_hand(make_parameters, make_optimizer, take_step=None, steps=STEPS):
    """Compare after every step. If the bare optimizer raises an error, expect the same error and return `False`."""
    take_step = take_step or random_step
    fast, expected = make_parameters(), make_parameters()
    optimizer = Lookahead(make_optimizer(fast), SYNC_PERIOD, SLOW_STEP_SIZE)
    hand = ByHand(make_optimizer(expected), SYNC_PERIOD, SLOW_STEP_SIZE)
    assert_same_bits(fast, expected)
    for step in range(1, steps + 1):
        try:
            loss = take_step(hand, expected, step)
        except (AssertionError, RuntimeError) as refusal:
            with pytest.raises(type(refusal), match=re.escape(str(refusal))):
                take_step(optimizer, fast, step)
            assert optimizer.param_groups[0]["lookahead_step"] == 0
            return False
        assert take_step(optimizer, fast, step) == loss
        assert_same_bits(fast, expected)
        assert_same_bits([optimizer.state[one]["slow"] for one in fast], hand.slow)
        if step % SYNC_PERIOD == 0:
            assert_same_bits([optimizer.state[one]["slow"] for one in fast], fast)
    for one, other in zip(fast, expected):
        assert_same_state(optimizer.inner_optimizer.state[one], hand.optimizer.state[other])
    return True


def test_every_optimizer_of_torch_is_listed():
    shipped = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert shipped == {class_name for class_name, _ in OPTIMIZERS.values()}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("dtype", FLOATING + COMPLEX, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bit_for_bit_the_bare_optimizer_and_the_slow_step_in_every_dtype_it_supports(name, dtype):
    def make_parameters():
        return parameters(*shapes(name), dtype=dtype)

    if name == "sparse_adam" and dtype in COMPLEX:
        pytest.skip("SparseAdam's constructor refuses complex parameters")
    supported = assert_as_by_hand(make_parameters, maker(name), lambda *arguments: take_step(name, *arguments))
    assert supported or (name in ("adafactor", "muon") and dtype in COMPLEX)


VARIANTS = [
    (name, option, value)
    for name, (class_name, _) in OPTIMIZERS.items()
    for option, value in [("foreach", True), ("foreach", False), ("fused", True), ("capturable", True)]
    if option in inspect.signature(getattr(torch.optim, class_name)).parameters
]


@pytest.mark.parametrize(("name", "option", "value"), VARIANTS)
def test_bit_for_bit_in_every_implementation_or_the_bare_optimizers_error(name, option, value):
    supported = assert_as_by_hand(lambda: parameters(*SHAPES), maker(name, **{option: value}))
    assert supported or option == "capturable"


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"sparse_adam", "lbfgs"}))
def test_learning_rate_may_be_a_tensor_that_changes(name):
    class_name, arguments = OPTIMIZERS[name]

    def make(parameters):
        return getattr(torch.optim, class_name)(parameters, **{**arguments, "lr": torch.tensor(arguments["lr"])})

    def step_at_a_new_rate(optimizer, parameters, step):
        getattr(optimizer, "optimizer", optimizer).param_groups[0]["lr"].mul_(0.75)
        return take_step(name, optimizer, parameters, step)

    assert assert_as_by_hand(lambda: parameters(*shapes(name)), make, step_at_a_new_rate)


def test_step_of_lbfgs_counts_once_and_changing_weights_at_a_sync_leaves_its_history():
    (weight,) = parameters((4,))
    optimizer = Lookahead(maker("lbfgs")([weight]), SYNC_PERIOD, SLOW_STEP_SIZE)
    for step in range(1, 5):
        take_step("lbfgs", optimizer, [weight], step)
        assert optimizer.param_groups[0]["lookahead_step"] == step
        assert optimizer.state[weight]["func_evals"] > step
        assert torch.equal(optimizer.state[weight]["slow"], weight) == (step == SYNC_PERIOD)


@pytest.mark.parametrize("slow_step_size", [0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1")
def test_any_slow_step_size_to_a_rounding_and_fast_and_slow_the_same_bits_after_a_sync(dtype, slow_step_size):
    fast, expected = (parameters((400,), (7, 3), dtype=dtype) for _ in range(2))
    optimizer = Lookahead(torch.optim.Adam(fast, 0.05), SYNC_PERIOD, slow_step_size)
    hand = ByHand(torch.optim.Adam(expected, 0.05), SYNC_PERIOD, slow_step_size)
    epsilon = torch.finfo(dtype).eps
    for step in range(1, STEPS + 1):
        for one in (fast, expected):
            set_gradients(one, step)
        hand.step()
        optimizer.step()
        if step < SYNC_PERIOD:
            assert_same_bits(fast, expected)
        for one, other in zip(fast, expected):
            torch.testing.assert_close(one, other, rtol=4 * step * epsilon, atol=4 * step * epsilon)
        if step % SYNC_PERIOD == 0:
            assert_same_bits([optimizer.state[one]["slow"] for one in fast], fast)


def test_slow_step_size_one_is_the_bare_optimizer_bit_for_bit():
    fast, expected = (parameters(*SHAPES) for _ in range(2))
    optimizer, bare = Lookahead(torch.optim.Adam(fast), SYNC_PERIOD, 1.0), torch.optim.Adam(expected)
    for step in range(1, STEPS + 1):
        random_step(bare, expected, step)
        random_step(optimizer, fast, step)
        assert_same_bits(fast, expected)


@pytest.mark.parametrize("slow_step_size", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_slow_step_is_rounded_once(dtype, slow_step_size):
    def half_ulps_off(value):
        ulp = torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor()
        return ((value.double() - exact).abs() / (ulp / 2)).max()

    generator = torch.Generator().manual_seed(0)
    slow, change = (torch.rand(10_000, generator=generator).to(dtype) for _ in range(2))
    fast = slow + change
    exact = slow.double() + slow_step_size * (fast.double() - slow.double())
    weight = torch.nn.Parameter(slow.clone())
    optimizer = Lookahead(torch.optim.SGD([weight], lr=1.0), 1, slow_step_size)
    weight.grad = -change
    optimizer.step()
    assert half_ulps_off(weight.detach()) < 1.002
    assert half_ulps_off(slow + slow_step_size * (fast - slow)) > 1.2 or slow_step_size == 0.5


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("foreach", [False, True])
def test_mixed_dtypes_in_one_group(name, foreach):
    dtypes = [torch.float32, torch.bfloat16, torch.complex64, torch.float64, torch.float32, torch.float16]

    def make_parameters():
        return [one for seed, dtype in enumerate(dtypes) for one in parameters((5, 3), seed=seed, dtype=dtype)]

    assert assert_as_by_hand(make_parameters, maker(name, foreach=foreach))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "rmsprop", "adagrad"])
def test_parameters_without_dimensions_and_without_elements(name):
    assert assert_as_by_hand(lambda: parameters((), (0,), (3,), (0, 4), ()), maker(name))


def test_parameters_without_elements_alone():
    assert assert_as_by_hand(lambda: parameters((0,)), maker("adam"))


def large_and_small():
    """Return parameters of several layouts and dtypes, most of which have more than 8 KiB."""
    shapes = (70, 101), (3,), (2, 2), (101, 70), (5, 16, 9, 9), (4099,), (70, 101)
    dtypes = [torch.float32, *[torch.bfloat16] * 2, *[torch.float32] * 3, torch.float64]
    made = [parameters(shape, seed=seed, dtype=dtype)[0] for seed, (shape, dtype) in enumerate(zip(shapes, dtypes))]
    made[3].data = made[3].data.t()
    made[4].data = made[4].data.contiguous(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_larger_than_the_cache_are_synchronised_in_parts(name, monkeypatch):
    monkeypatch.setattr(_pieces_torch, "_BYTES_PER_THREAD", 2**13 // torch.get_num_threads())
    fast = large_and_small()
    slow = [one.detach().clone() for one in fast]
    cut = [one for piece in _pieces_torch.cut(slow, fast) for one in piece.slow]
    assert sum(one.numel() for one in cut) == sum(one.numel() for one in fast)
    # Also for tensors whose memory is not in the order of their elements.
    assert max(one.nbytes for one in cut) <= 2**13
    assert assert_as_by_hand(large_and_small, maker(name))


def views_of_one_buffer(*slices, split=False):
    """Return a buffer, and its slices as parameters in one group. With `split`, each slice has a group of its own."""
    (buffer,) = parameters((20,))
    views = [torch.nn.Parameter(buffer.detach()[one]) for one in slices]
    return buffer.detach(), views, [{"params": [one]} for one in views] if split else views


@pytest.mark.parametrize("split", [False, True], ids=["one_group", "two_groups"])
@pytest.mark.parametrize(
    "slices",
    [
        (slice(0, 8), slice(8, 20)),
        (slice(0, 20, 2), slice(1, 20, 2)),
        (slice(0, 12), slice(6, 20)),
        (slice(0, 20), slice(0, 20)),
        (slice(0, 20), slice(5, 6), slice(0, 19, 3)),
    ],
    ids=["halves", "interleaved", "overlapping", "same", "nested"],
)
@pytest.mark.parametrize("bytes_per_thread", [2**18, 16])
def test_parameters_that_share_memory_are_synchronised_as_their_memory_would_be(
    slices, split, bytes_per_thread, monkeypatch
):
    monkeypatch.setattr(_pieces_torch, "_BYTES_PER_THREAD", bytes_per_thread)
    buffer, fast, groups = views_of_one_buffer(*slices, split=split)
    expected_buffer, expected, expected_groups = views_of_one_buffer(*slices, split=split)
    optimizer = Lookahead(torch.optim.SGD(groups, 0.1, momentum=0.9), SYNC_PERIOD, SLOW_STEP_SIZE)
    hand = ByHand(torch.optim.SGD(expected_groups, 0.1, momentum=0.9), SYNC_PERIOD, SLOW_STEP_SIZE)
    hand.parameters, hand.slow = [expected_buffer], [expected_buffer.clone()]
    for step in range(1, STEPS + 1):
        random_step(hand, expected, step)
        random_step(optimizer, fast, step)
        assert_same_bits([buffer], [expected_buffer])
        slow = [hand.slow[0][one] for one in slices]
        assert_same_bits([optimizer.state[one]["slow"] for one in fast], slow)


def assert_module_as_by_hand(make_module, make_optimizer, inputs):
    torch.manual_seed(0)
    module = make_module()
    torch.manual_seed(0)
    expected = make_module()
    optimizer = Lookahead(make_optimizer(module.parameters()), SYNC_PERIOD, SLOW_STEP_SIZE)
    hand = ByHand(make_optimizer(expected.parameters()), SYNC_PERIOD, SLOW_STEP_SIZE)
    for _ in range(STEPS):
        for one, step, zero_grad in (
            (module, optimizer.step, optimizer.zero_grad),
            (expected, hand.step, hand.optimizer.zero_grad),
        ):
            zero_grad()
            one(inputs).square().mean().backward()
            step()
        assert_same_bits(module.parameters(), expected.parameters())
        assert_same_bits([optimizer.state[one]["slow"] for one in module.parameters()], hand.slow)
    return module, optimizer


def test_tied_parameter_takes_one_slow_step():
    def make_module():
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
        module[2].weight = module[0].weight
        return module

    module, optimizer = assert_module_as_by_hand(make_module, maker("adam"), torch.ones(2, 4))
    assert len(optimizer.state) == len(list(module.parameters())) == 3


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_parameter_listed_twice_takes_one_slow_step():
    fast, expected = (parameters((5,)) * 2 for _ in range(2))
    optimizer = Lookahead(maker("sgd")(fast), SYNC_PERIOD, SLOW_STEP_SIZE)
    hand = ByHand(maker("sgd")(expected), SYNC_PERIOD, SLOW_STEP_SIZE)
    hand.parameters, hand.slow = hand.parameters[:1], hand.slow[:1]
    for step in range(1, STEPS + 1):
        random_step(hand, expected, step)
        random_step(optimizer, fast, step)
        assert_same_bits(fast, expected)


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("foreach", [False, True])
def test_non_contiguous_parameters_keep_their_layout(name, foreach):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
            self.turned = torch.nn.Parameter(torch.randn(6, 4).t())
            self.apart = torch.nn.Parameter(torch.randn(6, 4)[:, ::2])

        def forward(self, inputs):
            return self.convolution(inputs).sum(dim=1) + self.turned.square().mean() + self.apart.square().mean()

    module, optimizer = assert_module_as_by_hand(Model, maker(name, foreach=foreach), torch.randn(2, 4, 5, 5))
    turned, apart, weight, bias = module.parameters()
    assert [one.is_contiguous() for one in (turned, apart, weight, bias)] == [False, False, False, True]
    for one in (turned, weight, bias):
        assert optimizer.state[one]["slow"].stride() == one.stride()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize(
    ("name", "sparse", "width"),
    [
        ("sgd", True, 4),
        ("sgd", False, 4),
        ("adam", False, 1),
        ("sparse_adam", True, 4),
        ("sparse_adam", True, 1),
        ("adagrad", True, 4),
    ],
)
def test_embedding_with_rows_drawn_several_times_or_never(name, sparse, width):
    options = {"sgd": {"weight_decay": 0.0}, "adagrad": {"lr_decay": 0.0}}.get(name, {})
    class_name, arguments = OPTIMIZERS[name]

    def make(parameters):
        return getattr(torch.optim, class_name)(parameters, **{**arguments, **options})

    indices = torch.tensor([[0, 3, 3], [7, 0, 3]])
    module, optimizer = assert_module_as_by_hand(lambda: torch.nn.Embedding(10, width, sparse=sparse), make, indices)
    assert module.weight.grad.is_sparse == sparse
    slow = optimizer.state[module.weight]["slow"]
    assert torch.equal(slow[1], module.weight[1])
    assert not torch.equal(slow[3], module.weight[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        [(3,), (600, 600), (5, 5), (1200, 500), (7,)],
        [(512, 512), (512, 512), (1,), (1024, 512), (2,)],
        [(100, 300)] * 25 + [(900, 400), (4,)],
        [(700, 800)],
    ],
    ids=["large_between_small", "exactly_a_mebibyte", "many_of_medium_size", "one_large"],
)
def test_large_parameters_together_with_small_ones(sizes, dtype):
    assert assert_as_by_hand(lambda: parameters(*sizes, dtype=dtype), maker("sgd"), steps=2 * SYNC_PERIOD + 1)
