"""In Lightning: `Trainer.fit`, its checkpoints, accumulation, clipping, validation, manual optimization, and Fabric."""

import contextlib

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand
from tests.test_torch.small_task import PERIOD, SIZE, adamw, loss_of, momentum, network, step_lr

pl = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]

BATCHES = 5


def batches(count=BATCHES):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)) for _ in range(count)]


def loader(count=BATCHES):
    # Lightning takes a list for several loaders.
    return torch.utils.data.DataLoader(batches(count), batch_size=None)


class Module(pl.LightningModule):
    def __init__(self, inner=adamw, scheduler=None):
        super().__init__()
        self.network, self.inner, self.scheduler = network(), inner, scheduler

    def training_step(self, batch, index):
        return loss_of(self.network, batch)

    def configure_optimizers(self):
        optimizer = Lookahead(self.inner(self.network), PERIOD, SIZE)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(folder, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **arguments},
    )


def with_callbacks(*them):
    return {"enable_checkpointing": True, "callbacks": list(them)}


def by_hand(inner=adamw, scheduler=None, epochs=1, accumulate=1, clip=None):
    """The same training by hand. Return the network and the `ByHand`."""
    model = network()
    optimizer = inner(model)
    hand, schedule = ByHand(optimizer, PERIOD, SIZE), scheduler and scheduler(optimizer)
    for _ in range(epochs):
        for index, batch in enumerate(batches(), 1):
            (loss_of(model, batch) / accumulate).backward()
            if index % accumulate and index != BATCHES:
                continue
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            hand.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()
    return model, hand


def slow_weights(optimizer):
    return [optimizer.state[one]["slow"] for group in optimizer.param_groups for one in group["params"]]


@pytest.mark.parametrize("inner", [adamw, momentum])
@pytest.mark.parametrize("scheduler", [None, step_lr], ids=["no_scheduler", "scheduler"])
def test_fit_is_the_plain_loop(tmp_path, inner, scheduler):
    module, fit = Module(inner, scheduler), trainer(tmp_path, max_epochs=2)
    fit.fit(module, loader())
    model, hand = by_hand(inner, scheduler, epochs=2)
    assert hand.steps == fit.global_step == 10
    assert_same_bits(module.network.parameters(), model.parameters())
    assert_same_bits(slow_weights(fit.optimizers[0]), hand.slow)


@pytest.mark.parametrize(
    ("arguments", "hand_arguments"),
    [
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"accumulate": 2, "clip": 0.1}),
    ],
    ids=["accumulation", "clipping", "both"],
)
def test_fit_with_accumulation_or_clipping_is_the_plain_loop(tmp_path, arguments, hand_arguments):
    module, fit = Module(momentum), trainer(tmp_path, max_epochs=2, **arguments)
    fit.fit(module, loader())
    model, hand = by_hand(momentum, epochs=2, **hand_arguments)
    assert fit.optimizers[0].param_groups[0]["lookahead_step"] == hand.steps
    assert_same_bits(module.network.parameters(), model.parameters())
    assert_same_bits(slow_weights(fit.optimizers[0]), hand.slow)


def test_fit_in_bfloat16_is_the_plain_loop_under_autocast(tmp_path):
    module, fit = Module(momentum), trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    fit.fit(module, loader())
    model = network()
    hand = ByHand(momentum(model), PERIOD, SIZE)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        hand.step()
        hand.optimizer.zero_grad()
    assert_same_bits(module.network.parameters(), model.parameters())
    assert_same_bits(slow_weights(fit.optimizers[0]), hand.slow)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("inner", [adamw, momentum])
@pytest.mark.parametrize("weights_only", [None, True])
def test_resumed_in_mid_cycle_is_the_run_that_never_stopped(tmp_path, inner, weights_only):
    def run(epochs, checkpoint=None):
        module, keep = Module(inner, step_lr), callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, max_epochs=epochs, **with_callbacks(keep))
        fit.fit(module, loader(), ckpt_path=checkpoint, weights_only=weights_only)
        return list(module.network.parameters()), slow_weights(fit.optimizers[0])

    # The first epoch ends at step 5, two steps after a sync and one step before the next sync.
    run(epochs=1)
    fast, slow = run(epochs=3, checkpoint=tmp_path / "epoch=0.ckpt")
    whole = Module(inner, step_lr)
    trainer(tmp_path, max_epochs=3).fit(whole, loader())
    assert_same_bits(fast, whole.network.parameters())
    assert_same_bits(slow, by_hand(inner, step_lr, epochs=3)[1].slow)


def test_checkpoint_has_what_plain_pytorch_loads(tmp_path):
    module, fit = Module(), trainer(tmp_path, max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "here.ckpt")
    saved = torch.load(tmp_path / "here.ckpt", weights_only=True)
    (state,) = saved["optimizer_states"]
    optimizer = Lookahead(adamw(network()), PERIOD, SIZE)
    optimizer.load_state_dict(state)
    assert state["param_groups"][0]["lookahead_step"] == BATCHES
    assert_same_bits(slow_weights(optimizer), by_hand()[1].slow)


def test_checkpoint_of_the_bare_optimizer_starts_a_new_cycle_from_its_weights(tmp_path):
    class Bare(Module):
        def configure_optimizers(self):
            return self.inner(self.network)

    bare, fit = Bare(), trainer(tmp_path, max_epochs=1)
    fit.fit(bare, loader())
    fit.save_checkpoint(tmp_path / "bare.ckpt")
    loaded = [one.detach().clone() for one in bare.network.parameters()]
    module, fit = Module(), trainer(tmp_path, max_steps=BATCHES + 1)
    fit.fit(module, loader(), ckpt_path=tmp_path / "bare.ckpt")
    assert fit.optimizers[0].param_groups[0]["lookahead_step"] == 1
    assert_same_bits(slow_weights(fit.optimizers[0]), loaded)


class SlowWeights(callbacks.Callback):
    """Validates on the slow weights, as a user writes it."""

    def __init__(self):
        self.blocks = contextlib.ExitStack()

    def on_validation_start(self, trainer, module):
        for optimizer in trainer.optimizers:
            self.blocks.enter_context(optimizer.slow_weights())

    def on_validation_end(self, trainer, module):
        self.blocks.close()

    def on_exception(self, trainer, module, exception):
        self.blocks.close()


class Validated(Module):
    """Records the weights with which it is validated, and the weights right after."""

    def __init__(self, inner=adamw):
        super().__init__(inner)
        self.validated, self.afterwards = [], []

    def weights(self):
        return [one.detach().clone() for one in self.network.parameters()]

    def validation_step(self, batch, index):
        self.validated.append(self.weights())

    def on_train_epoch_end(self):
        self.afterwards.append(self.weights())


class ValidatedInHook(Validated):
    def validation_step(self, batch, index):
        with self.optimizers().slow_weights():
            super().validation_step(batch, index)


@pytest.mark.parametrize("way", ["callback", "hook"])
def test_validation_is_on_the_slow_weights_and_changes_nothing(tmp_path, way):
    keep = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, use = (Validated(), [SlowWeights(), keep]) if way == "callback" else (ValidatedInHook(), [keep])
    fit = trainer(tmp_path, max_epochs=2, **with_callbacks(*use))
    fit.fit(module, loader(), loader(1))
    # Before the first step, in Lightning's sanity check, they are the initial weights.
    expected = [list(network().parameters()), *(by_hand(epochs=epochs)[1].slow for epochs in (1, 2))]
    for actual, slow in zip(module.validated, expected, strict=True):
        assert_same_bits(actual, slow)
    for epochs, actual in enumerate(module.afterwards, 1):
        fast = list(by_hand(epochs=epochs)[0].parameters())
        assert_same_bits(actual, fast)
        saved = torch.load(tmp_path / f"epoch={epochs - 1}.ckpt", weights_only=True)
        assert_same_bits(saved["state_dict"].values(), fast)


@pytest.mark.parametrize("way", ["callback", "hook"])
def test_interrupted_validation_gives_the_fast_weights_back(tmp_path, way):
    class Failing(Module):
        def validation_step(self, batch, index):
            with self.optimizers().slow_weights() if way == "hook" else contextlib.nullcontext():
                raise ValueError("a broken metric")

    module, use = Failing(), [SlowWeights()] if way == "callback" else []
    fit = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, **with_callbacks(*use))
    with pytest.raises(ValueError, match="a broken metric"):
        fit.fit(module, loader(), loader(1))
    assert_same_bits(module.network.parameters(), by_hand()[0].parameters())


def test_training_in_a_slow_weights_block_of_lightnings_wrapper_is_refused(tmp_path):
    class Wrong(Module):
        automatic_optimization = False

        def training_step(self, batch, index):
            self.manual_backward(loss_of(self.network, batch))
            with self.optimizers().slow_weights():
                self.optimizers().step()

    with pytest.raises(RuntimeError, match="inside a `slow_weights"):
        trainer(tmp_path, max_steps=1).fit(Wrong(), loader())


def generator_loss(generator, critic, batch):
    return -critic(generator(batch[0])).mean()


def critic_loss(generator, critic, batch):
    return (critic(generator(batch[0]).detach()) - critic(batch[1])).mean() + critic(batch[1]).square().mean()


def adversaries():
    torch.manual_seed(2)
    return torch.nn.Linear(4, 2), torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


class Adversarial(pl.LightningModule):
    """Two optimizers with different periods: the critic makes two steps for each step of the generator."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.generator, self.critic = adversaries()

    def configure_optimizers(self):
        return Lookahead(momentum(self.generator), 2, SIZE), Lookahead(adamw(self.critic), PERIOD, SIZE)

    def training_step(self, batch, index):
        generator, critic = self.optimizers()
        for optimizer, own_loss, count in ((critic, critic_loss, 2), (generator, generator_loss, 1)):
            for _ in range(count):
                with optimizer.toggle_model():
                    optimizer.zero_grad()
                    self.manual_backward(own_loss(self.generator, self.critic, batch))
                    optimizer.step()


def adversarial_by_hand(epochs):
    generator, critic = adversaries()
    hands = [ByHand(momentum(generator), 2, SIZE), ByHand(adamw(critic), PERIOD, SIZE)]
    for batch in batches() * epochs:
        for hand, own_loss, count in ((hands[1], critic_loss, 2), (hands[0], generator_loss, 1)):
            for _ in range(count):
                hand.optimizer.zero_grad()
                own_loss(generator, critic, batch).backward()
                hand.step()
    return generator, critic, hands


def test_two_optimizers_in_manual_optimization_keep_periods_of_their_own(tmp_path):
    module, fit = Adversarial(), trainer(tmp_path, max_epochs=2)
    fit.fit(module, loader())
    generator, critic, hands = adversarial_by_hand(2)
    assert [one.param_groups[0]["lookahead_step"] for one in fit.optimizers] == [10, 20]
    assert_same_bits(module.generator.parameters(), generator.parameters())
    assert_same_bits(module.critic.parameters(), critic.parameters())
    for optimizer, hand in zip(fit.optimizers, hands):
        assert_same_bits(slow_weights(optimizer), hand.slow)


def test_two_optimizers_resumed_in_mid_cycle_are_the_run_that_never_stopped(tmp_path):
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Adversarial(), loader())
    first.save_checkpoint(tmp_path / "here.ckpt")
    resumed = Adversarial()
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "here.ckpt")
    generator, critic, _ = adversarial_by_hand(2)
    assert_same_bits(resumed.generator.parameters(), generator.parameters())
    assert_same_bits(resumed.critic.parameters(), critic.parameters())


def fabric():
    return pl.Fabric(accelerator="cpu", devices=1)


def fabric_steps(fabric, model, optimizer, steps):
    for batch in steps:
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()


def test_fabric_resumed_in_mid_cycle_is_the_plain_loop(tmp_path):
    launched = fabric()
    first = network()
    model, optimizer = launched.setup(first, Lookahead(adamw(first), PERIOD, SIZE))
    fabric_steps(launched, model, optimizer, batches())
    launched.save(tmp_path / "here.ckpt", {"model": model, "optimizer": optimizer})

    second = network()
    model, optimizer = launched.setup(second, Lookahead(adamw(second), PERIOD, SIZE))
    launched.load(tmp_path / "here.ckpt", {"model": model, "optimizer": optimizer})
    fabric_steps(launched, model, optimizer, batches())
    expected, hand = by_hand(epochs=2, clip=0.1)
    assert_same_bits(second.parameters(), expected.parameters())
    assert_same_bits(slow_weights(optimizer), hand.slow)
    with optimizer.slow_weights():
        assert_same_bits(second.parameters(), hand.slow)
    assert_same_bits(second.parameters(), expected.parameters())


def test_training_in_a_slow_weights_block_of_fabrics_wrapper_is_refused():
    model = network()
    wrapped, optimizer = fabric().setup(model, Lookahead(momentum(model), PERIOD, SIZE))
    fabric_steps(fabric(), wrapped, optimizer, batches(1))
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match="inside a `slow_weights"):
        optimizer.step()
