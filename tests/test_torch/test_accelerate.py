"""In Accelerate: `prepare`, accumulation, clipping, mixed precision, saving and loading the state, the slow weights."""

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand
from tests.test_torch.small_task import PERIOD, SIZE, adamw, loss_of, momentum, network

accelerate = pytest.importorskip("accelerate")
state = pytest.importorskip("accelerate.state")
wrapper = pytest.importorskip("accelerate.optimizer")

BATCHES = 5


def forget():
    """Forget Accelerate's settings of the process, as if the process were new."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def _no_settings_left():
    forget()
    yield
    forget()


def loader():
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(16 * BATCHES, size, generator=generator) for size in (4, 2)]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=16)


def prepared(accelerator, inner=adamw):
    model = network()
    optimizer = Lookahead(inner(model), PERIOD, SIZE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
    return accelerator.prepare(model, optimizer, loader(), scheduler)


def train(accelerator, model, optimizer, loader, scheduler, clip=None):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def by_hand(inner=adamw, epochs=1, accumulate=1, clip=None, autocast=False):
    """The same training by hand. Return the network and the `ByHand`."""
    model = network()
    hand = ByHand(inner(model), PERIOD, SIZE)
    scheduler = torch.optim.lr_scheduler.StepLR(hand.optimizer, step_size=2, gamma=0.7)
    for _ in range(epochs):
        for index, batch in enumerate(loader(), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                prediction = model(batch[0])
            loss = torch.nn.functional.mse_loss(prediction.float(), batch[1])
            (loss / accumulate).backward()
            if index % accumulate and index != BATCHES:
                continue
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            hand.step()
            scheduler.step()
            hand.optimizer.zero_grad()
    return model, hand


def slow_weights(optimizer):
    return [optimizer.state[one]["slow"] for group in optimizer.param_groups for one in group["params"]]


@pytest.mark.parametrize("inner", [adamw, momentum])
@pytest.mark.parametrize(
    ("arguments", "clip", "hand_arguments"),
    [
        ({}, None, {}),
        ({}, 0.1, {"clip": 0.1}),
        ({"gradient_accumulation_steps": 2}, None, {"accumulate": 2}),
        ({"gradient_accumulation_steps": 2}, 0.1, {"accumulate": 2, "clip": 0.1}),
        ({"mixed_precision": "bf16"}, None, {"autocast": True}),
    ],
    ids=["plain", "clipping", "accumulation", "both", "bfloat16"],
)
def test_training_is_the_plain_loop(inner, arguments, clip, hand_arguments):
    accelerator = accelerate.Accelerator(cpu=True, **arguments)
    model, optimizer, batches, scheduler = prepared(accelerator, inner)
    for _ in range(2):
        train(accelerator, model, optimizer, batches, scheduler, clip)
    expected, hand = by_hand(inner, epochs=2, **hand_arguments)
    assert optimizer.param_groups[0]["lookahead_step"] == hand.steps
    assert_same_bits(model.parameters(), expected.parameters())
    assert_same_bits(slow_weights(optimizer), hand.slow)


@pytest.mark.parametrize("inner", [adamw, momentum])
def test_resumed_in_mid_cycle_is_the_run_that_never_stopped(tmp_path, inner):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(accelerator, inner)
    # Step 5 is two steps after a sync and one step before the next sync.
    train(accelerator, model, optimizer, batches, scheduler)
    accelerator.save_state(tmp_path)

    forget()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(accelerator, inner)
    accelerator.load_state(tmp_path)
    train(accelerator, model, optimizer, batches, scheduler)
    expected, hand = by_hand(inner, epochs=2)
    assert_same_bits(model.parameters(), expected.parameters())
    assert_same_bits(slow_weights(optimizer), hand.slow)


def test_resumed_in_mid_epoch_is_the_run_that_never_stopped(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(accelerator)
    for index, batch in enumerate(batches, 1):
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if index == 4:
            accelerator.save_state(tmp_path)
            break

    forget()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(accelerator)
    accelerator.load_state(tmp_path)
    train(accelerator, model, optimizer, accelerator.skip_first_batches(batches, 4), scheduler)
    train(accelerator, model, optimizer, batches, scheduler)
    expected, hand = by_hand(epochs=2)
    assert_same_bits(model.parameters(), expected.parameters())
    assert_same_bits(slow_weights(optimizer), hand.slow)


def test_optimizer_prepared_in_mid_cycle_goes_on():
    model = network()
    optimizer = Lookahead(adamw(model), PERIOD, SIZE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
    for batch in loader():
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator = accelerate.Accelerator(cpu=True)
    train(accelerator, *accelerator.prepare(model, optimizer, loader(), scheduler))
    expected, hand = by_hand(epochs=2)
    assert_same_bits(model.parameters(), expected.parameters())
    assert_same_bits(slow_weights(optimizer), hand.slow)


def test_weights_loaded_after_prepare_are_the_first_slow_weights():
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, _ = prepared(accelerator)
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(2.0)
    accelerator.backward(loss_of(model, next(iter(batches))))
    optimizer.step()
    assert_same_bits(slow_weights(optimizer), [torch.full_like(one, 2.0) for one in model.parameters()])


def test_evaluation_is_on_the_slow_weights_and_changes_nothing():
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(accelerator)
    train(accelerator, model, optimizer, batches, scheduler)
    expected, hand = by_hand()
    lookahead = optimizer.optimizer
    assert isinstance(lookahead, Lookahead)
    with lookahead.slow_weights():
        assert_same_bits(model.parameters(), hand.slow)
        with pytest.raises(RuntimeError, match="inside a `slow_weights"):
            optimizer.step()
    assert_same_bits(model.parameters(), expected.parameters())


def test_model_saved_in_a_slow_weights_block_has_the_slow_weights(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(accelerator)
    train(accelerator, model, optimizer, batches, scheduler)
    with optimizer.optimizer.slow_weights():
        accelerator.save_model(model, tmp_path, safe_serialization=False)
    (file,) = tmp_path.glob("*.bin")
    assert_same_bits(torch.load(file, weights_only=True).values(), by_hand()[1].slow)


def test_step_that_the_scaler_skips_does_not_count():
    accelerate.Accelerator(cpu=True)
    model, bare = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = wrapper.AcceleratedOptimizer(Lookahead(momentum(model), PERIOD, SIZE), scaler=scaler)
    hand = ByHand(momentum(bare), PERIOD, SIZE)
    for step, batch in enumerate([*loader(), *loader()]):
        overflow = step in (0, 4)
        scaler.scale(loss_of(model, batch) * (float("inf") if overflow else 1.0)).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == overflow
        optimizer.zero_grad()
        if not overflow:
            loss_of(bare, batch).backward()
            hand.step()
            hand.optimizer.zero_grad()
    assert optimizer.param_groups[0]["lookahead_step"] == hand.steps == 8
    assert_same_bits(model.parameters(), bare.parameters())
    assert_same_bits(slow_weights(optimizer), hand.slow)
