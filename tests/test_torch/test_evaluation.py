"""The slow weights in the model: `slow_weights()`, `sync()` and `reset_slow_weights()`."""

import copy
import json

import numpy as np
import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

SHAPES = (3, 4), (5,)


def sgd(weights):
    return torch.optim.SGD(weights, 0.1, momentum=0.9)


def adam(weights):
    return torch.optim.Adam(weights, 0.05)


def wrapped(inner=sgd, sync_period=3, slow_step_size=0.25, dtype=torch.float32):
    return Lookahead(inner(parameters(*SHAPES, dtype=dtype)), sync_period, slow_step_size)


def nested(inner=sgd):
    return Lookahead(wrapped(inner, 2), 3, 0.25)


def half_precision(inner=sgd):
    return wrapped(inner, dtype=torch.bfloat16)


def weights(optimizer):
    return [one for group in optimizer.param_groups for one in group["params"]]


def values(tensors):
    return [one.detach().clone() for one in tensors]


def slow(optimizer, name="slow"):
    return values(optimizer.state[one][name] for one in weights(optimizer))


def everything(optimizer):
    """Return copies of weights, state and step counts."""
    state = [one for entry in optimizer.state.values() for one in entry.values()]
    groups = [one for group in optimizer.state_dict()["param_groups"] for name, one in group.items() if "step" in name]
    return values([*weights(optimizer), *state, *map(torch.as_tensor, groups)])


def train(optimizer, stop, start=0):
    fast = optimizer.parameters if isinstance(optimizer, ByHand) else weights(optimizer)
    for step in range(start, stop):
        set_gradients(fast, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", [wrapped, nested, half_precision])
@pytest.mark.parametrize("inner", [sgd, adam])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_block_holds_the_slow_weights_and_the_fast_ones_come_back_bit_for_bit(make, inner, steps):
    optimizer = train(make(inner), steps)
    before, expected = everything(optimizer), slow(optimizer, "slow_2" if make is nested else "slow")
    if steps != 3:
        assert not torch.equal(weights(optimizer)[0], expected[0])
    with optimizer.slow_weights() as target:
        assert target is None
        assert_same_bits(weights(optimizer), expected)
    assert_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_the_slow_weights_in_the_block_are_those_of_lookahead_by_hand(steps):
    by_hand = train(ByHand(adam(parameters(*SHAPES)), 3, 0.25), steps)
    optimizer = train(wrapped(adam), steps)
    with optimizer.slow_weights():
        assert_same_bits(weights(optimizer), by_hand.slow)
    assert_same_bits(weights(optimizer), by_hand.parameters)


def test_a_block_of_each_level_holds_its_own_slow_weights():
    optimizer = train(nested(), 5)
    inner, fast = optimizer.inner_optimizer, values(weights(optimizer))
    assert not torch.equal(slow(optimizer, "slow")[0], slow(optimizer, "slow_2")[0])
    with inner.slow_weights():
        assert_same_bits(weights(optimizer), slow(optimizer, "slow"))
    with optimizer.slow_weights():
        assert_same_bits(weights(optimizer), slow(optimizer, "slow_2"))
        with inner.slow_weights():
            assert_same_bits(weights(optimizer), slow(optimizer, "slow"))
        assert_same_bits(weights(optimizer), slow(optimizer, "slow_2"))
    assert_same_bits(weights(optimizer), fast)


def test_no_level_trains_in_the_block_of_another():
    optimizer = train(nested(), 5)
    inner = optimizer.inner_optimizer
    for one, other in ((optimizer, inner), (inner, optimizer)):
        with one.slow_weights(), pytest.raises(RuntimeError, match=r"`step\(\)` was called inside"):
            other.step()
    train(optimizer, 6, 5)


@pytest.mark.parametrize("shape", [(7,), (3, 1, 1)])
def test_a_shape_changed_in_the_block_is_an_error_after_which_the_other_weights_are_back(shape):
    optimizer = train(wrapped(), 2)
    first, *others = weights(optimizer)
    data, fast = first.data, values(others)
    with pytest.raises(RuntimeError, match="changed its shape inside a `slow_weights"), optimizer.slow_weights():
        first.data = torch.zeros(shape)
    assert_same_bits(others, fast)
    first.data = data
    train(optimizer, 3, 2)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, Stop])
def test_the_fast_weights_come_back_after_an_exception_in_the_block(error):
    optimizer = train(wrapped(), 2)
    before, raised = everything(optimizer), error()
    with pytest.raises(error) as caught, optimizer.slow_weights():  # noqa: PT012
        assert not torch.equal(weights(optimizer)[0], before[0])
        raise raised
    assert caught.value is raised
    assert_same_bits(everything(optimizer), before)
    train(optimizer, 3, 2)


def test_the_fast_weights_come_back_after_a_return_or_a_break_out_of_the_block():
    optimizer = train(wrapped(), 2)
    before = everything(optimizer)

    def evaluate():
        with optimizer.slow_weights():
            return values(weights(optimizer))

    assert_same_bits(evaluate(), slow(optimizer))
    assert_same_bits(everything(optimizer), before)
    for _ in range(2):
        with optimizer.slow_weights():
            break
    assert_same_bits(everything(optimizer), before)


def test_the_fast_weights_come_back_when_a_suspended_block_is_closed():
    optimizer = train(wrapped(), 2)
    before = everything(optimizer)

    def evaluations():
        with optimizer.slow_weights():
            yield

    suspended = evaluations()
    next(suspended)
    assert_same_bits(weights(optimizer), slow(optimizer))
    suspended.close()
    assert_same_bits(everything(optimizer), before)


def test_it_works_as_a_decorator():
    optimizer = train(wrapped(), 2)
    before = everything(optimizer)
    evaluate = optimizer.slow_weights()(lambda: values(weights(optimizer)))
    for _ in range(2):
        assert_same_bits(evaluate(), slow(optimizer))
        assert_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("around", [False, True])
def test_the_block_works_with_every_grad_mode_and_training_goes_on(mode, around):
    optimizer, other = train(wrapped(), 2), train(wrapped(), 6)
    contexts = [mode(), optimizer.slow_weights()] if around else [optimizer.slow_weights(), mode()]
    fast, expected = values(weights(optimizer)), slow(optimizer)
    with contexts[0], contexts[1]:
        assert_same_bits(weights(optimizer), expected)
        (weights(optimizer)[0] * 2).sum()
    assert_same_bits(weights(optimizer), fast)
    assert not any(one.is_inference() for one in weights(optimizer))
    assert all(one.requires_grad and one.is_leaf for one in weights(optimizer))
    assert_same_bits(everything(train(optimizer, 6, 2)), everything(other))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_block_leaves_grad_mode_alone_and_gradients_can_be_taken_in_it(mode):
    optimizer = train(wrapped(), 2)
    first = weights(optimizer)[0]
    with mode():
        enabled = torch.is_grad_enabled()
        with optimizer.slow_weights():
            assert torch.is_grad_enabled() == enabled
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(first.square().sum(), first)
            assert_same_bits([gradient], [2 * slow(optimizer)[0]])
        assert torch.is_grad_enabled() == enabled


def test_backward_in_the_block_accumulates_gradients_at_the_slow_weights():
    optimizer = train(wrapped(), 2)
    optimizer.zero_grad()
    with optimizer.slow_weights():
        sum(one.square().sum() for one in weights(optimizer)).backward()
    assert_same_bits([one.grad for one in weights(optimizer)], [2 * one for one in slow(optimizer)])


def test_weights_overwritten_in_the_block_are_put_back_and_the_slow_ones_stay():
    optimizer = train(wrapped(), 2)
    before = everything(optimizer)
    with optimizer.slow_weights(), torch.no_grad():
        for one in weights(optimizer):
            one.fill_(float("nan"))
    assert_same_bits(everything(optimizer), before)


def test_nan_and_infinity_come_back_bit_for_bit():
    optimizer = train(wrapped(), 2)
    first = weights(optimizer)[0]
    with torch.no_grad():
        first[0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    bits = first.detach().view(torch.int32).clone()
    with optimizer.slow_weights():
        assert first.isfinite().all()
    assert_same_bits([first.detach().view(torch.int32)], [bits])


def test_a_block_in_a_block_changes_nothing():
    optimizer = train(wrapped(), 2)
    before, expected = everything(optimizer), slow(optimizer)
    with optimizer.slow_weights():
        with optimizer.slow_weights():
            assert_same_bits(weights(optimizer), expected)
        assert_same_bits(weights(optimizer), expected)
        with pytest.raises(ZeroDivisionError), optimizer.slow_weights():
            1 / 0  # noqa: B018
        assert_same_bits(weights(optimizer), expected)
        with pytest.raises(RuntimeError, match="slow_weights"):
            optimizer.step()
    assert_same_bits(everything(optimizer), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda one: one.step(),
        lambda one: one.sync(),
        lambda one: one.reset_slow_weights(),
        lambda one: one.load_state_dict(one.state_dict()),
    ],
)
@pytest.mark.parametrize("make", [wrapped, nested])
def test_what_would_be_lost_at_the_end_of_the_block_is_refused_in_it(call, make):
    optimizer = train(make(), 2)
    before = everything(optimizer)
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=r"was called inside a `slow_weights\(\)` block"):
        call(optimizer)
    assert_same_bits(everything(optimizer), before)
    call(optimizer)


def test_before_the_first_step_the_block_changes_nothing():
    optimizer = wrapped()
    before = values(weights(optimizer))
    with optimizer.slow_weights():
        assert_same_bits(weights(optimizer), before)
    assert_same_bits(weights(optimizer), before)
    assert len(optimizer.state) == 0
    with torch.no_grad():
        weights(optimizer)[0].fill_(1)
    train(optimizer, 1)
    assert_same_bits(slow(optimizer)[:1], [torch.ones(SHAPES[0])])


def test_with_a_period_of_0_the_block_changes_nothing():
    optimizer = train(wrapped(sync_period=0), 4)
    before = everything(optimizer)
    with optimizer.slow_weights():
        assert_same_bits(everything(optimizer), before)
    assert_same_bits(everything(optimizer), before)


def test_frozen_parameters_keep_their_weights_in_the_block():
    optimizer = wrapped()
    first, second = weights(optimizer)
    second.requires_grad_(False)
    for step in range(2):
        set_gradients([first], step)
        optimizer.step()
    expected, fast, frozen = optimizer.state[first]["slow"].clone(), first.detach().clone(), second.clone()
    with optimizer.slow_weights():
        assert_same_bits([first, second], [expected, frozen])
    assert_same_bits([first, second], [fast, frozen])


def test_parameters_that_are_frozen_or_unfrozen_in_the_block_get_their_fast_weights_back():
    optimizer = train(wrapped(), 2)
    first, second = weights(optimizer)
    optimizer.zero_grad()
    second.requires_grad_(False)
    fast = values([first, second])
    with optimizer.slow_weights():
        assert_same_bits([first, second], slow(optimizer))
        first.requires_grad_(False)
        second.requires_grad_(True)
    assert_same_bits([first, second], fast)


@pytest.mark.parametrize("make", [wrapped, nested])
@pytest.mark.parametrize("inner", [sgd, adam])
def test_training_after_a_block_goes_on_as_if_there_had_been_none(make, inner):
    optimizer = make(inner)
    for step in range(10):
        train(optimizer, step + 1, step)
        with optimizer.slow_weights():
            sum(one.square().sum() for one in weights(optimizer)).backward()
    assert_same_bits(everything(optimizer), everything(train(make(inner), 10)))


def model_with_batch_norm():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


def trained_model(steps=2):
    model = model_with_batch_norm()
    optimizer = Lookahead(sgd(model.parameters()), 3, 0.25)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_the_block_leaves_the_buffers_of_batch_normalisation_alone():
    model, optimizer = trained_model()
    buffers = values(model.buffers())
    assert (buffers[0] != 0).any()
    model.eval()
    with optimizer.slow_weights():
        assert_same_bits(model.buffers(), buffers)
        expected = model_with_batch_norm().eval()
        expected.load_state_dict({**dict(expected.named_parameters()), **dict(model.named_buffers())})
        x = torch.randn(5, 3)
        assert_same_bits([model(x)], [expected(x)])
    assert_same_bits(model.buffers(), buffers)


def test_a_model_saved_in_the_block_has_the_slow_weights(tmp_path):
    model, optimizer = trained_model()
    fast = values(model.parameters())
    with optimizer.slow_weights():
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    assert_same_bits(model.parameters(), fast)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    names = [name for name, _ in model.named_parameters()]
    assert_same_bits([saved["model"][name] for name in names], slow(optimizer))
    assert_same_bits([entry["slow"] for entry in saved["optimizer"]["state"].values()], slow(optimizer))
    assert_same_bits(
        [entry["slow"] for entry in saved["optimizer"]["state"].values()], model_with_batch_norm().parameters()
    )
    assert_same_bits([entry["lookahead_fast"] for entry in saved["optimizer"]["state"].values()], fast)
    assert not any("lookahead_fast" in entry for entry in optimizer.state_dict()["state"].values())


def state_of_block(optimizer):
    with optimizer.slow_weights():
        return copy.deepcopy((weights(optimizer), optimizer.state_dict()))


def saved_in_block(model, optimizer):
    """Return copies of both state dicts, made in a block."""
    with optimizer.slow_weights():
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def assign(optimizer, others):
    with torch.no_grad():
        for parameter, other in zip(weights(optimizer), others):
            parameter.copy_(other)


@pytest.mark.parametrize("outer", [False, True])
def test_each_level_saves_the_fast_weights_in_a_block_of_any_level(outer):
    optimizer = train(nested(), 4)
    fast, expected = values(weights(optimizer)), values(weights(train(nested(), 9)))
    with optimizer.slow_weights() if outer else optimizer.inner_optimizer.slow_weights():
        shown, state = copy.deepcopy((weights(optimizer), optimizer.state_dict()))
        inner_state = optimizer.inner_optimizer.state_dict()
        assert_same_bits([entry["lookahead_fast"] for entry in inner_state["state"].values()], fast)
    other = nested()
    assign(other, shown)
    other.load_state_dict(state)
    assert_same_bits(weights(other), fast)
    assert_same_bits(weights(train(other, 9, 4)), expected)


def test_fast_weights_are_loaded_only_into_parameters_that_hold_the_slow_ones():
    shown, state = state_of_block(train(wrapped(), 4))
    other = wrapped()
    started = [one + 1 for one in shown]
    assign(other, started[:1] + shown[1:])
    other.load_state_dict(state)
    assert_same_bits(weights(other)[:1], started[:1])
    assert_same_bits(weights(other)[1:], [state["state"][1]["lookahead_fast"]])


def test_a_block_or_a_sync_after_the_load_finds_the_fast_weights():
    optimizer = train(wrapped(), 4)
    fast, (shown, state) = values(weights(optimizer)), state_of_block(optimizer)
    for use in (lambda other: other.sync(), lambda other: other.slow_weights().__enter__()):
        other = wrapped()
        other.load_state_dict(state)
        assign(other, shown)
        assert_same_bits([entry["lookahead_fast"] for entry in other.state_dict()["state"].values()], fast)
        use(other)
        expected = train(wrapped(), 4)
        use(expected)
        assert_same_bits(weights(other), weights(expected))


def test_after_a_reset_nothing_of_the_loaded_fast_weights_is_left():
    shown, state = state_of_block(train(wrapped(), 4))
    other = wrapped()
    other.load_state_dict(state)
    assign(other, shown)
    other.reset_slow_weights()
    train(other, 5, 4)
    assert_same_bits(slow(other), shown)


def test_gradients_computed_with_the_slow_weights_are_refused_at_the_first_step():
    shown, state = state_of_block(train(wrapped(), 4))
    other = wrapped()
    other.load_state_dict(state)
    assign(other, shown)
    set_gradients(weights(other), 4)
    with pytest.raises(RuntimeError, match="Load the model before the optimizer"):
        other.step()
    assert_same_bits(weights(other), shown)
    assert other.param_groups[0]["lookahead_step"] == 4


def new_model():
    """Return a model with weights that no other model has, and its optimizer."""
    model, optimizer = trained_model(steps=0)
    assign(optimizer, [one + 1 for one in weights(optimizer)])
    return model, optimizer


def test_the_loaded_fast_weights_wait_for_a_forward_pass_of_their_own_model():
    model, optimizer = trained_model()
    fast = values(model.parameters())
    saved = saved_in_block(model, optimizer)
    other, other_optimizer = new_model()
    other_optimizer.load_state_dict(saved[1])
    torch.nn.Linear(2, 2)(torch.ones(1, 2))
    other.load_state_dict(saved[0])
    other(torch.ones(4, 3))
    assert_same_bits(other.parameters(), fast)
    # Values that are loaded later are not changed.
    other.load_state_dict(saved[0])
    other(torch.ones(4, 3))
    assert_same_bits([saved[0][name] for name, _ in other.named_parameters()], other.parameters())


@pytest.mark.parametrize("kind", ["dummy pass", "other weights first"])
def test_a_forward_pass_before_the_model_is_loaded_does_not_end_the_waiting(kind):
    model, optimizer = trained_model()
    fast = values(model.parameters())
    saved = saved_in_block(model, optimizer)
    other, other_optimizer = new_model()
    other_optimizer.load_state_dict(saved[1])
    other(torch.ones(4, 3))
    if kind == "other weights first":
        other.load_state_dict(trained_model(steps=1)[0].state_dict())
        other(torch.ones(4, 3))
    other.load_state_dict(saved[0])
    other(torch.ones(4, 3))
    assert_same_bits(other.parameters(), fast)


def test_a_model_that_is_loaded_again_is_noticed_at_the_first_step():
    model, optimizer = trained_model()
    saved = saved_in_block(model, optimizer)
    other, other_optimizer = new_model()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    other(torch.ones(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="Load the model before the optimizer"):
        other_optimizer.step()


def test_weights_that_equal_the_slow_ones_before_the_model_is_loaded_are_noticed_at_the_first_step():
    # The same seed, and no sync yet: the new model has the slow weights, as if it had been loaded.
    model, optimizer = trained_model()
    saved = saved_in_block(model, optimizer)
    other, other_optimizer = trained_model(steps=0)
    other_optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    other(torch.ones(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="Load the model before the optimizer"):
        other_optimizer.step()


def test_there_is_no_hook_where_the_parameters_have_their_fast_weights():
    model, optimizer = trained_model()
    saved = saved_in_block(model, optimizer)
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = len(hooks)
    other, other_optimizer = new_model()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert len(hooks) == before
    other.eval()
    torch.testing.assert_close(
        torch.compile(other, backend="eager", fullgraph=True)(torch.ones(4, 3)), other(torch.ones(4, 3))
    )


def test_a_step_with_a_closure_takes_no_old_gradients_and_finds_the_fast_weights():
    optimizer = train(wrapped(), 4)
    fast, (shown, state) = values(weights(optimizer)), state_of_block(optimizer)
    other = train(wrapped(), 2)
    other.load_state_dict(state)
    assign(other, shown)
    seen = []

    def closure():
        seen.extend(values(weights(other)))
        set_gradients(weights(other), 4)

    other.step(closure)
    assert_same_bits(seen, fast)
    assert_same_bits(weights(other), weights(train(optimizer, 5, 4)))


def test_an_outer_wrapper_that_is_off_leaves_the_fast_weights_of_the_inner_one():
    def make():
        return Lookahead(wrapped(), 0)

    optimizer = train(make(), 4)
    fast = values(weights(optimizer))
    with optimizer.inner_optimizer.slow_weights():
        shown, state = copy.deepcopy((weights(optimizer), optimizer.state_dict()))
    other = make()
    other.load_state_dict(state)
    assign(other, shown)
    set_gradients(weights(other), 4)
    with pytest.raises(RuntimeError, match="Load the model before the optimizer"):
        other.step()
    other.zero_grad()
    with other.slow_weights():
        pass
    assert_same_bits(weights(other), fast)


def test_an_entry_called_fast_is_the_inner_optimizers():
    class Fast(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["fast"] = torch.full_like(parameter, 7.0)

    optimizer = train(Lookahead(Fast(parameters(*SHAPES), 0.1), 5), 5)
    before, state = values(weights(optimizer)), copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert_same_bits(weights(optimizer), before)
    assert all((optimizer.state[weight]["fast"] == 7).all() for weight in weights(optimizer))


def test_a_dropped_optimizer_leaves_no_hook():
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = len(hooks)
    other = wrapped()
    other.load_state_dict(state_of_block(train(wrapped(), 4))[1])
    assert len(hooks) == before + 1
    del other
    torch.nn.Linear(2, 2)(torch.ones(1, 2))
    assert len(hooks) == before


@pytest.mark.parametrize("fast", [torch.ones(3), 1.0])
def test_a_fast_weight_that_does_not_fit_is_refused(fast):
    optimizer = train(wrapped(), 4)
    _, state = state_of_block(optimizer)
    state["state"][0]["lookahead_fast"] = fast
    before = everything(optimizer)
    with pytest.raises(ValueError, match="fast weight of shape"):
        optimizer.load_state_dict(state)
    assert_same_bits(everything(optimizer), before)


def test_a_copy_made_in_the_block_is_outside_of_it():
    model, optimizer = trained_model()
    with optimizer.slow_weights():
        other_model, other = copy.deepcopy((model, optimizer))
    assert_same_bits(other_model.parameters(), slow(optimizer))
    assert_same_bits(slow(other), slow(optimizer))
    train(other, 3, 2)


def oracle_of(optimizer, sync_period=3, slow_step_size=0.25):
    oracle = reference.Lookahead(reference.SGD(0.1, momentum=0.9), sync_period, slow_step_size)
    return oracle.start([one.detach().numpy() for one in weights(optimizer)])


def train_both(optimizer, oracle, stop, start=0):
    for step in range(start, stop):
        set_gradients(weights(optimizer), step)
        oracle.apply([one.grad.numpy() for one in weights(optimizer)])
        optimizer.step()


def assert_agree(optimizer, oracle):
    for one, other, expected, expected_slow in zip(weights(optimizer), slow(optimizer), oracle.weights, oracle.slow):
        np.testing.assert_allclose(one.detach().numpy(), expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(other.numpy(), expected_slow, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("sync_period", [1, 3, 100])
def test_sync_makes_a_slow_step_now_and_leaves_the_count_alone(at, sync_period):
    optimizer = wrapped(sync_period=sync_period, dtype=torch.float64)
    oracle = oracle_of(optimizer, sync_period)
    train_both(optimizer, oracle, at)
    optimizer.sync()
    oracle.sync()
    assert int(optimizer.param_groups[0]["lookahead_step"]) == at
    assert_agree(optimizer, oracle)
    assert_same_bits(weights(optimizer), slow(optimizer))
    train_both(optimizer, oracle, 10, at)
    assert_agree(optimizer, oracle)


@pytest.mark.parametrize("make", [wrapped, nested, half_precision])
@pytest.mark.parametrize("inner", [sgd, adam])
def test_a_second_sync_changes_nothing(make, inner):
    optimizer = train(make(inner), 4)
    fast = values(weights(optimizer))
    optimizer.sync()
    assert not torch.equal(weights(optimizer)[0], fast[0])
    before = everything(optimizer)
    optimizer.sync()
    assert_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("sync_period", [0, 3])
def test_sync_before_the_first_step_or_with_a_period_of_0_changes_nothing(sync_period):
    optimizer = train(wrapped(sync_period=sync_period), 2 if sync_period == 0 else 0)
    before = everything(optimizer)
    optimizer.sync()
    assert_same_bits(everything(optimizer), before)


def test_sync_uses_the_step_size_of_each_group():
    weights = parameters(*SHAPES, (2, 2), dtype=torch.float64)
    settings = [{}, {"slow_step_size": 0.75, "sync_period": 5}, {"sync_period": 0}]
    optimizer = Lookahead(sgd([{"params": [one], **own} for one, own in zip(weights, settings)]), 3, 0.25)
    start = values(weights)
    train(optimizer, 2)
    fast = values(weights)
    optimizer.sync()
    expected = [start[0] + 0.25 * (fast[0] - start[0]), start[1] + 0.75 * (fast[1] - start[1])]
    for one, other in zip(weights, expected):
        torch.testing.assert_close(one.detach(), other, rtol=1e-14, atol=1e-15)
    assert_same_bits(weights[2:], fast[2:])


def test_sync_of_nested_wrappers_restarts_all_weights_from_the_outer_slow_ones():
    optimizer = Lookahead(Lookahead(sgd(parameters(*SHAPES, dtype=torch.float64)), 2, 0.5), 3, 0.25)
    inner = reference.Lookahead(reference.SGD(0.1, momentum=0.9), 2, 0.5)
    oracle = reference.Lookahead(inner, 3, 0.25).start([one.detach().numpy() for one in weights(optimizer)])
    train_both(optimizer, oracle, 5)
    optimizer.sync()
    oracle.sync()
    for name in ("slow", "slow_2"):
        assert_same_bits(slow(optimizer, name), weights(optimizer))
    train_both(optimizer, oracle, 11, 5)
    for one, first, second, *expected in zip(
        weights(optimizer), slow(optimizer, "slow"), slow(optimizer, "slow_2"), oracle.weights, inner.slow, oracle.slow
    ):
        for actual, value in zip((one.detach(), first, second), expected):
            np.testing.assert_allclose(actual.numpy(), value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_reset_captures_the_slow_weights_from_the_parameters_again(at):
    optimizer, by_hand = train(wrapped(), at), train(ByHand(sgd(parameters(*SHAPES)), 3, 0.25), at)
    with torch.no_grad():
        for one in (*weights(optimizer), *by_hand.parameters):
            one.mul_(0.5)
    optimizer.reset_slow_weights()
    by_hand.slow = values(by_hand.parameters)
    assert_same_bits(slow(optimizer), weights(optimizer))
    assert int(optimizer.param_groups[0]["lookahead_step"]) == at
    assert_same_bits(weights(train(optimizer, 10, at)), train(by_hand, 10, at).parameters)
    assert_same_bits(slow(optimizer), by_hand.slow)


def test_reset_before_the_first_step_captures_nothing_yet():
    optimizer = wrapped()
    optimizer.reset_slow_weights()
    assert len(optimizer.state) == 0
    with torch.no_grad():
        weights(optimizer)[0].fill_(1)
    train(optimizer, 1)
    assert_same_bits(slow(optimizer)[:1], [torch.ones(SHAPES[0])])


def test_reset_of_nested_wrappers_captures_on_both_levels():
    optimizer = train(nested(), 5)
    optimizer.reset_slow_weights()
    for name in ("slow", "slow_2"):
        assert_same_bits(slow(optimizer, name), weights(optimizer))
    tensors = [tensor.data_ptr() for one in weights(optimizer) for tensor in (one, *optimizer.state[one].values())]
    assert len(set(tensors)) == len(tensors)


@pytest.mark.parametrize("at", [2, 4])
def test_reset_after_the_data_of_a_parameter_was_replaced_takes_its_new_shape(at):
    optimizer = train(wrapped(lambda weights: torch.optim.SGD(weights, 0.1)), at)
    first = weights(optimizer)[0]
    optimizer.zero_grad()
    first.data = torch.ones(2, 2)
    for call in (optimizer.sync, optimizer.slow_weights().__enter__):
        with pytest.raises(RuntimeError, match=r"shape \(2, 2\) has a slow weight of shape \(3, 4\)"):
            call()
    optimizer.reset_slow_weights()
    assert_same_bits(slow(optimizer)[:1], [torch.ones(2, 2)])
    train(optimizer, at + 3, at)


SIZE, COUNT = 2**16, 3


def allocations(function, folder):
    """Return the sizes that `function` allocates on the CPU and, as negative numbers, releases.

    Small sizes are left out.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    return [size for size in sizes if abs(size) >= 1024]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [1, 2])
def test_it_takes_the_memory_of_one_copy_of_the_parameters_and_a_sync_takes_none(dtype, level, tmp_path):
    weights = parameters(*[(SIZE,)] * COUNT, dtype=dtype)
    optimizer = torch.optim.SGD(weights, 0.1, foreach=False)
    for _ in range(level):
        optimizer = Lookahead(optimizer, 3)
    set_gradients(weights, 0)
    bytes_of_one = SIZE * dtype.itemsize
    assert allocations(lambda: weights[0] * 2, tmp_path) == [bytes_of_one, -bytes_of_one]
    assert allocations(optimizer.step, tmp_path) == [bytes_of_one] * COUNT * level
    for _ in range(5):
        assert allocations(optimizer.step, tmp_path) == []
    optimizer.step()
    assert allocations(optimizer.sync, tmp_path) == []


def test_momentum_takes_one_more_copy_and_a_sync_with_it_takes_none(tmp_path):
    weights = parameters(*[(SIZE,)] * COUNT)
    optimizer = Lookahead(torch.optim.SGD(weights, 0.1, foreach=False), 3, slow_momentum=0.9)
    set_gradients(weights, 0)
    assert allocations(optimizer.step, tmp_path) == [4 * SIZE] * COUNT * 2
    for _ in range(5):
        assert allocations(optimizer.step, tmp_path) == []
    optimizer.step()
    assert allocations(optimizer.sync, tmp_path) == []


def test_a_block_takes_the_memory_of_one_more_copy_and_gives_it_back(tmp_path):
    weights = parameters(*[(SIZE,)] * COUNT)
    optimizer = Lookahead(torch.optim.SGD(weights, 0.1, foreach=False), 3)
    train(optimizer, 2)

    def block():
        with optimizer.slow_weights():
            pass

    assert sorted(allocations(block, tmp_path)) == [-4 * SIZE] * COUNT + [4 * SIZE] * COUNT


@pytest.mark.parametrize("sync_period", [0, 3])
def test_no_memory_is_taken_before_the_first_step_or_with_a_period_of_0(sync_period, tmp_path):
    weights = parameters(*[(SIZE,)] * COUNT)
    made = []
    assert allocations(lambda: made.append(Lookahead(torch.optim.SGD(weights, 0.1), sync_period)), tmp_path) == []
    if sync_period == 0:
        set_gradients(weights, 0)
        for _ in range(3):
            assert allocations(made[0].step, tmp_path) == []


def test_a_block_of_the_inner_wrapper_inside_one_of_the_outer_shows_the_inner_slow_weights():
    (weight,) = parameters((3,))
    inner = Lookahead(torch.optim.SGD([weight], 0.1), 100)
    outer = Lookahead(inner, 100)
    weight.grad = torch.ones(3)
    outer.step()
    start = outer.state[weight]["slow_2"].clone()
    inner.reset_slow_weights()
    shown = weight.detach().clone()
    outer.step()
    fast = weight.detach().clone()
    with inner.slow_weights():
        assert_same_bits([weight.detach()], [shown])
        with outer.slow_weights():
            assert_same_bits([weight.detach()], [start])
            with inner.slow_weights():
                assert_same_bits([weight.detach()], [shown])
            assert_same_bits([weight.detach()], [start])
        assert_same_bits([weight.detach()], [shown])
    assert_same_bits([weight.detach()], [fast])
