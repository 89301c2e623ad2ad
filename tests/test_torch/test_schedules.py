"""Around the optimizer: learning rate schedulers, loss scaling, clipping, accumulation and weight averaging."""

import copy
import inspect
import io

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

SHAPES = (3, 4), (5,)
STEPS = 20

SCHEDULERS = {
    "ChainedScheduler": lambda one: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(one, 0.5, 3), lr_scheduler.ExponentialLR(one, 0.9)], optimizer=one
    ),
    "ConstantLR": lambda one: lr_scheduler.ConstantLR(one, 0.5, 4),
    "CosineAnnealingLR": lambda one: lr_scheduler.CosineAnnealingLR(one, 12, 0.01),
    "CosineAnnealingWarmRestarts": lambda one: lr_scheduler.CosineAnnealingWarmRestarts(one, 3, 2),
    "CyclicLR": lambda one: lr_scheduler.CyclicLR(one, 0.01, 0.2, 3, cycle_momentum=True),
    "ExponentialLR": lambda one: lr_scheduler.ExponentialLR(one, 0.9),
    "LambdaLR": lambda one: lr_scheduler.LambdaLR(one, lambda epoch: 0.9 ** (epoch % 5)),
    "LinearLR": lambda one: lr_scheduler.LinearLR(one, 0.1, 1.0, 10),
    "MultiStepLR": lambda one: lr_scheduler.MultiStepLR(one, [2, 5, 11], 0.5),
    "MultiplicativeLR": lambda one: lr_scheduler.MultiplicativeLR(one, lambda epoch: 0.95),
    "OneCycleLR": lambda one: lr_scheduler.OneCycleLR(one, 0.2, STEPS + 1, cycle_momentum=True),
    "PolynomialLR": lambda one: lr_scheduler.PolynomialLR(one, 15, 2.0),
    "ReduceLROnPlateau": lambda one: lr_scheduler.ReduceLROnPlateau(one, patience=1, factor=0.5),
    "SequentialLR": lambda one: lr_scheduler.SequentialLR(
        one, [lr_scheduler.LinearLR(one, 0.1, 1.0, 5), lr_scheduler.StepLR(one, 4)], [6]
    ),
    "StepLR": lambda one: lr_scheduler.StepLR(one, 3, 0.5),
    "SWALR": lambda one: swa_utils.SWALR(one, 0.03, 6),
}
MOMENTUM = "CyclicLR", "OneCycleLR"


def sgd(weights):
    first, second = weights
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.05}], 0.1, momentum=0.9)


def adam(weights, **kwargs):
    return torch.optim.Adam(weights, 0.05, **kwargs)


def pair(inner=sgd, sync_period=3):
    """Return an optimizer and the same optimizer by hand, each with its own parameters."""
    return (
        Lookahead(inner(parameters(*SHAPES)), sync_period, 0.25),
        ByHand(inner(parameters(*SHAPES)), sync_period, 0.25),
    )


def weights(optimizer):
    return [one for group in optimizer.param_groups for one in group["params"]]


def scheduled(optimizer, scheduler, start=0, stop=STEPS):
    """Train with a scheduler. Return the learning rates and momenta of each step."""
    seen = []
    inner = getattr(optimizer, "optimizer", optimizer)
    for step in range(start, stop):
        set_gradients(weights(inner), step)
        seen.append([(group["lr"], group.get("momentum"), group.get("betas")) for group in inner.param_groups])
        optimizer.step()
        scheduler.step(*([1.0 / (1 + step % 4)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return seen


def test_every_scheduler_is_tested():
    modules = lr_scheduler, swa_utils
    classes = {
        name
        for module in modules
        for name, one in inspect.getmembers(module, inspect.isclass)
        if not name.startswith("_")
        and one.__module__ == module.__name__
        and issubclass(one, lr_scheduler.LRScheduler)
        and one is not lr_scheduler.LRScheduler
    }
    assert sorted(classes) == sorted(SCHEDULERS)


@pytest.mark.parametrize("level", ["wrapper", "inner optimizer", "wrapper of a wrapper"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_the_wrapper_as_it_drives_the_inner_optimizer(name, level):
    optimizer, reference = pair()
    if level == "wrapper of a wrapper":
        optimizer = Lookahead(optimizer, 0)
    scheduler = SCHEDULERS[name](optimizer.inner_optimizer if level == "inner optimizer" else optimizer)
    expected = scheduled(reference, SCHEDULERS[name](reference.optimizer))
    assert len({rates[0][:1] for rates in expected}) > 1
    assert (len({rates[0][1] for rates in expected}) > 1) == (name in MOMENTUM)
    assert scheduled(optimizer, scheduler) == expected
    assert_same_bits(weights(optimizer), reference.parameters)


@pytest.mark.parametrize("name", MOMENTUM)
def test_a_scheduler_cycles_the_first_beta_of_adam(name):
    optimizer, reference = pair(adam)
    expected = scheduled(reference, SCHEDULERS[name](reference.optimizer))
    assert len({betas for ((_, _, betas),) in expected}) > 1
    assert scheduled(optimizer, SCHEDULERS[name](optimizer)) == expected
    assert_same_bits(weights(optimizer), reference.parameters)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_optimizer_and_scheduler_resume_together_in_mid_cycle(name):
    stop = 7
    optimizer, never_stopped = pair()[0], pair()[0]
    scheduler = SCHEDULERS[name](optimizer)
    expected = scheduled(never_stopped, SCHEDULERS[name](never_stopped))
    rates = scheduled(optimizer, scheduler, stop=stop)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict(), weights(optimizer)), file)
    file.seek(0)
    # In PyTorch 2.6 the state of `SWALR` has a function.
    only = name != "SWALR" or not callable(scheduler.state_dict().get("anneal_func"))
    optimizer_state, scheduler_state, saved = torch.load(file, weights_only=only)

    resumed = pair()[0]
    scheduler = SCHEDULERS[name](resumed)
    resumed.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    with torch.no_grad():
        for one, other in zip(weights(resumed), saved):
            one.copy_(other)
    assert rates + scheduled(resumed, scheduler, start=stop) == expected
    assert_same_bits(weights(resumed), weights(never_stopped))


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_optimizer_and_scheduler_are_copied_together(name):
    optimizer, other = pair()[0], pair()[0]
    scheduler = SCHEDULERS[name](optimizer)
    seen = scheduled(optimizer, scheduler, stop=7)
    optimizer, scheduler = copy.deepcopy((optimizer, scheduler))
    assert seen + scheduled(optimizer, scheduler, start=7) == scheduled(other, SCHEDULERS[name](other))
    assert_same_bits(weights(optimizer), weights(other))


# Gradients are +-factor, so that they overflow where scale * factor reaches 2^128.
FACTORS = 4, 1, 1, 2, 8, 8, 1, 1, 1, 4, 1, 4, 1, 2, 2, 1


def sgd_momentum(weights, **kwargs):
    return torch.optim.SGD(weights, 0.125, momentum=0.5, **kwargs)


def overflow_loss(weights, factor):
    return factor * sum((one * ((-1.0) ** torch.arange(one.numel())).view_as(one)).sum() for one in weights)


def everything(optimizer):
    """Return copies of weights, state and step count."""
    state = [one for entry in optimizer.state.values() for one in entry.values()]
    counts = [group["lookahead_step"] for group in optimizer.param_groups]
    return [one.detach().clone() for one in (*weights(optimizer), *state, *map(torch.as_tensor, counts))]


@pytest.mark.parametrize("inner", [sgd_momentum, adam])
@pytest.mark.parametrize("option", ["foreach", "fused", None])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("unscale", [False, True])
def test_steps_that_a_grad_scaler_skips_change_nothing_and_do_not_count(inner, option, level, unscale):
    options = {option: True} if option else {"foreach": False}
    optimizer = Lookahead(inner(parameters(*SHAPES), **options), 3, 0.25)
    reference = ByHand(inner(parameters(*SHAPES), **options), 3, 0.25)
    if level == 2:
        optimizer = Lookahead(optimizer, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)
    skipped = []
    for step, factor in enumerate(FACTORS):
        optimizer.zero_grad()
        overflows = scaler.get_scale() * factor >= 2.0**128
        before = everything(optimizer)
        scaler.scale(overflow_loss(weights(optimizer), factor)).backward()
        assert weights(optimizer)[0].grad.isinf().all() == overflows
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights(optimizer), 4.0)
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            skipped.append(step)
            assert_same_bits(everything(optimizer), before)
        else:
            reference.optimizer.zero_grad()
            overflow_loss(reference.parameters, factor).backward()
            if unscale:
                torch.nn.utils.clip_grad_norm_(reference.parameters, 4.0)
            reference.step()
        assert int(optimizer.param_groups[0]["lookahead_step"]) == step + 1 - len(skipped) == reference.steps
        assert_same_bits(weights(optimizer), reference.parameters)
    assert skipped[0] == 0
    assert 2 < len(skipped) < len(FACTORS) - 6
    assert_same_bits([entry["slow"] for entry in optimizer.state.values()], reference.slow)


def mlp(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)


def mean_squared_error(model, step):
    x, y = batch(step)
    return torch.nn.functional.mse_loss(model(x).float(), y)


def run(update, optimizer_of, inner, steps=STEPS):
    """Train a model with `update(model, optimizer, step)`. Return it with its optimizer."""
    model = mlp()
    optimizer = optimizer_of(inner(model.parameters()), 3, 0.25)
    for step in range(steps):
        for one in model.parameters():
            one.grad = None
        update(model, optimizer, step)
    return model, optimizer


def autocast(model, optimizer, step):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mean_squared_error(model, step)
    loss.backward()
    optimizer.step()


def clipped(model, optimizer, step):
    mean_squared_error(model, step).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm > 0.05
    optimizer.step()


def clipped_by_value(model, optimizer, step):
    mean_squared_error(model, step).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    optimizer.step()


def accumulated(model, optimizer, step):
    for micro_step in range(4):
        (mean_squared_error(model, 4 * step + micro_step) / 4).backward()
    optimizer.step()


@pytest.mark.parametrize("update", [autocast, clipped, clipped_by_value, accumulated])
@pytest.mark.parametrize("inner", [sgd_momentum, adam])
def test_training_loops_give_the_weights_of_lookahead_by_hand(update, inner):
    model, optimizer = run(update, Lookahead, inner)
    expected, reference = run(update, ByHand, inner)
    assert int(optimizer.param_groups[0]["lookahead_step"]) == reference.steps == STEPS
    assert_same_bits(model.parameters(), expected.parameters())
    assert_same_bits([entry["slow"] for entry in optimizer.state.values()], reference.slow)
    assert all(one.dtype == torch.float32 for entry in optimizer.state.values() for one in entry.values())


@pytest.mark.parametrize("average", ["SWA", "EMA"])
def test_an_averaged_model_beside_it_averages_the_synchronised_weights(average):
    averaged = []
    for optimizer_of in (Lookahead, ByHand):
        trajectory = []

        def update(model, optimizer, step, trajectory=trajectory):
            if step == 0:
                multi_avg_fn = swa_utils.get_ema_multi_avg_fn(0.9) if average == "EMA" else None
                trajectory.append(swa_utils.AveragedModel(model, multi_avg_fn=multi_avg_fn))
            clipped(model, optimizer, step)
            trajectory[0].update_parameters(model)
            trajectory.append([one.detach().double() for one in model.parameters()])

        run(update, optimizer_of, adam)
        averaged_model, *fast = trajectory
        averaged.append(averaged_model)
    assert_same_bits(averaged[0].parameters(), averaged[1].parameters())
    rates = [0.1 * 0.9 ** (STEPS - step - 1) if step else 0.9 ** (STEPS - 1) for step in range(STEPS)]
    for index, one in enumerate(averaged[0].parameters()):
        factors = rates if average == "EMA" else [1 / STEPS] * STEPS
        mean = sum(factor * weight[index] for factor, weight in zip(factors, fast))
        torch.testing.assert_close(one.detach().double(), mean, rtol=1e-5, atol=1e-6)
