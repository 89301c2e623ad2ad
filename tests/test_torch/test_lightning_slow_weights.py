"""`lookahead_optim.lightning.SlowWeights`: it saves the weights that it scored, and training resumes bit for bit."""

import contextlib
import json
import pickle
import signal

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.child_processes import finish, start
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand
from tests.test_torch.small_task import PERIOD, SIZE, adamw, loss_of, momentum, network

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

from lookahead_optim.lightning import SlowWeights  # noqa: E402
from lookahead_optim.torch import Lookahead  # noqa: E402
from tests.test_torch import lightning_worker as worker  # noqa: E402
from tests.test_torch.lightning_worker import BATCHES, Scored, Several, batch, loaders, trainer, weights_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=.* no last checkpoint|`.fit.ckpt_path=None.` was called"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("one_thread"),
]
TIMEOUT = 120


def by_hand(steps):
    """Train the network of `Scored` by hand. Return the fast and the slow weights."""
    model = network()
    hand = ByHand(adamw(model), PERIOD, SIZE)
    for _ in range(steps):
        hand.optimizer.zero_grad()
        loss_of(model, batch(1)).backward()
        hand.step()
    return weights_of(model), hand.slow


def fast(steps):
    return by_hand(steps)[0]


def slow(steps):
    return by_hand(steps)[1]


def bare(steps):
    """Train the network of `Several` that has a bare optimizer."""
    model = network()
    optimizer = momentum(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(1)).backward()
        optimizer.step()
    return weights_of(model)


def keep(folder, **settings):
    return callbacks.ModelCheckpoint(folder, settings.pop("name", "{step}"), **settings)


def assert_resumes(folder, path, steps):
    """Check that a run of `Scored` that resumes from a checkpoint has its weights, with and without the callback."""
    for use in ([SlowWeights()], []):
        module = Scored()
        trainer(folder, *use, max_epochs=-1, max_steps=steps + 2).fit(module, *loaders(), ckpt_path=path)
        assert_same_bits(module.trained, [fast(steps), fast(steps + 1)])


KEPT = {
    "best": {"monitor": "score", "save_top_k": 2},
    "after_validation": {"monitor": "score", "save_top_k": -1, "save_on_train_epoch_end": False},
    "weights": {"monitor": "score", "save_top_k": -1, "save_weights_only": True},
    "last": {"save_last": True},
    "steps": {"every_n_train_steps": 2, "save_top_k": -1},
    "steps_weights": {"every_n_train_steps": 2, "save_top_k": -1, "save_weights_only": True},
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("interval", [1.0, 3], ids=["epochs", "mid_epoch"])
def test_every_kept_file_has_the_slow_weights_and_resumes(tmp_path, kind, interval):
    module = Scored()
    fit = trainer(tmp_path, SlowWeights(), keep(tmp_path, **KEPT[kind]), max_epochs=3, val_check_interval=interval)
    fit.fit(module, *loaders())
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        saved = torch.load(path, weights_only=True)
        assert_same_bits(saved["state_dict"].values(), slow(saved["global_step"]))
        if "weights" not in kind:
            assert_resumes(tmp_path / "resumed", path, saved["global_step"])


def test_what_is_kept_has_its_score_in_a_new_process(tmp_path):
    recorded = {}
    for make in (Scored, Several):
        module, folder = make(), tmp_path / make.__name__
        best = keep(folder, monitor="score", name="best-{step}")
        weights = keep(
            folder, monitor="score", mode="max", save_top_k=-1, save_weights_only=True, name="weights-{step}"
        )
        fit = trainer(tmp_path, SlowWeights(), best, weights, max_epochs=3, val_check_interval=3)
        fit.fit(module, *loaders())
        assert best.best_model_score == min(module.scores.values())
        fit.save_checkpoint(folder / f"end-step={fit.global_step}.ckpt")
        module.scores[fit.global_step] = fit.validate(module, loaders()[1], verbose=False)[0]["score"]
        recorded[make.__name__] = module.scores
    finish(start(worker, "scored", tmp_path, OMP_NUM_THREADS="1"), TIMEOUT)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores) == 2 * (len(module.scores) + 1)
    for path, received in scores.items():
        name, file = path.split("/")
        expected = recorded[name][int(file.removesuffix(".ckpt").rpartition("=")[2])]
        assert received == [expected, expected], path


def test_validation_is_on_the_slow_weights_and_changes_no_training(tmp_path):
    module = Scored()
    trainer(tmp_path, SlowWeights(), max_epochs=2, val_check_interval=2).fit(module, *loaders())
    assert_same_bits(module.trained, [fast(steps) for steps in range(2 * BATCHES)])
    # Two batches each: in the sanity check before the first step, and after every second step of an epoch.
    assert_same_bits(module.validated[::2], [slow(steps) for steps in (0, 2, 4, 7, 9)])
    assert_same_bits(weights_of(module), slow(2 * BATCHES))


def test_accumulated_gradients_outlast_a_validation(tmp_path):
    module = Scored()
    trainer(tmp_path, SlowWeights(), max_epochs=2, val_check_interval=1, accumulate_grad_batches=2).fit(
        module, *loaders()
    )
    plain = Scored()
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0).fit(plain, *loaders())
    assert_same_bits(module.trained, plain.trained)


def test_early_stopping_leaves_the_model_that_was_scored(tmp_path):
    module = Scored()
    # The second score is never better by so much. It belongs to a step in mid-cycle.
    stop = callbacks.EarlyStopping("score", min_delta=10, patience=1)
    fit = trainer(tmp_path, SlowWeights(), stop, max_epochs=20)
    fit.fit(module, *loaders())
    assert fit.global_step == 2 * BATCHES
    assert_same_bits(weights_of(module), slow(2 * BATCHES))
    (after,) = fit.validate(module, loaders()[1], verbose=False)
    assert after["score"] == module.scores[2 * BATCHES]


def test_after_training_the_weights_in_the_model_are_scored(tmp_path):
    module = Scored()
    best = keep(tmp_path, monitor="score", mode="max")
    fit = trainer(tmp_path, SlowWeights(), best, max_epochs=3)
    fit.fit(module, *loaders())
    validation, last = loaders()[1], module.scores[3 * BATCHES]
    for evaluate in (fit.validate, fit.test):
        assert evaluate(module, validation, verbose=False)[0]["score"] == last
    model = network()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(slow(3 * BATCHES)), model.parameters())
    with torch.no_grad():
        assert_same_bits(fit.predict(module, validation), [model(one[0]) for one in (batch(2), batch(3))])

    assert best.best_model_score > last
    (of_best,) = fit.test(module, validation, ckpt_path="best", verbose=False)
    assert of_best["score"] == best.best_model_score
    assert fit.validate(module, validation, verbose=False)[0]["score"] == best.best_model_score


def test_saved_after_training_it_resumes_from_its_fast_weights(tmp_path):
    module, fit = Scored(), trainer(tmp_path, SlowWeights(), max_epochs=2)
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "end.ckpt")
    fit.save_checkpoint(tmp_path / "again.ckpt")
    assert_same_bits(weights_of(module), slow(2 * BATCHES))
    for name in ("end", "again"):
        path = tmp_path / f"{name}.ckpt"
        assert_same_bits(torch.load(path, weights_only=True)["state_dict"].values(), slow(2 * BATCHES))
        assert_resumes(tmp_path, path, 2 * BATCHES)

    # It has nothing left to train, and also ends with the slow weights.
    module, fit = Scored(), trainer(tmp_path, SlowWeights(), max_epochs=2)
    fit.fit(module, *loaders(), ckpt_path=tmp_path / "end.ckpt")
    assert module.trained == []
    assert_same_bits(weights_of(module), slow(2 * BATCHES))


def test_weights_that_a_program_put_into_the_model_are_saved(tmp_path):
    module, fit = Scored(), trainer(tmp_path, SlowWeights(), max_epochs=2)
    fit.fit(module, *loaders())
    with torch.no_grad():
        module.network[0].bias.add_(1)
    put = weights_of(module)
    fit.save_checkpoint(tmp_path / "put.ckpt")
    assert_same_bits(torch.load(tmp_path / "put.ckpt", weights_only=True)["state_dict"].values(), put)
    assert_same_bits(weights_of(module), put)


def test_a_second_fit_starts_from_the_slow_weights(tmp_path):
    module, fit = Scored(), trainer(tmp_path, SlowWeights(), max_epochs=2)
    fit.fit(module, *loaders())
    module.trained.clear()
    fit.fit_loop.max_epochs = 3
    fit.fit(module, *loaders())
    assert_same_bits(module.trained[0], slow(2 * BATCHES))
    # A new optimizer: the first sync is after three steps.
    assert_same_bits(module.validated[-1], module.trained[3])


class Interrupted(Scored):
    """Raises an exception in the validation of the second epoch, or in its third step."""

    def __init__(self, exception, where):
        super().__init__()
        self.exception, self.where = exception, where

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        if self.exception and self.where == "validation" and self.trainer.global_step == 10:
            raise self.exception

    def training_step(self, batch, index):
        if self.exception and self.where == "training" and self.trainer.global_step == 7:
            raise self.exception
        return super().training_step(batch, index)


@pytest.mark.parametrize("exception", [ValueError("a broken metric"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(("where", "steps"), [("validation", 10), ("training", 7)])
def test_interrupted_run_leaves_the_slow_weights_and_resumes(tmp_path, exception, where, steps):
    handler = signal.getsignal(signal.SIGINT)
    module = Interrupted(exception, where)
    save = callbacks.OnExceptionCheckpoint(tmp_path)
    fit = trainer(tmp_path, SlowWeights(), save, max_epochs=3)
    # Before 2.4 Lightning returns after a Ctrl-C. Later versions ignore a second one.
    with contextlib.suppress(ValueError, SystemExit):
        fit.fit(module, *loaders())
    signal.signal(signal.SIGINT, handler)
    assert (fit.interrupted, fit.global_step) == (True, steps)
    assert_same_bits(weights_of(module), slow(steps))
    fit.save_checkpoint(tmp_path / "by_hand.ckpt")
    for path in (save.ckpt_path, tmp_path / "by_hand.ckpt"):
        assert_same_bits(torch.load(path, weights_only=True)["state_dict"].values(), slow(steps))
        assert_resumes(tmp_path, path, steps)

    module.exception = None
    assert fit.validate(module, loaders()[1], verbose=False)
    assert_same_bits(module.validated[-1], slow(steps))
    module.train().trained.clear()
    trainer(tmp_path, SlowWeights(), max_epochs=1).fit(module, *loaders())
    assert_same_bits(module.trained[0], slow(steps))


def test_of_several_optimizers_the_bare_one_keeps_its_weights(tmp_path):
    module = Several()
    fit = trainer(tmp_path, SlowWeights(), keep(tmp_path, every_n_epochs=1, save_top_k=-1), max_epochs=2)
    fit.fit(module, *loaders())
    assert_same_bits(module.validated[::2], [slow(steps) + bare(steps) for steps in (0, BATCHES, 2 * BATCHES)])
    assert_same_bits(weights_of(module), slow(2 * BATCHES) + bare(2 * BATCHES))

    fit.save_checkpoint(tmp_path / "end.ckpt")
    for path, steps in ((tmp_path / f"step={2 * BATCHES}.ckpt", BATCHES), (tmp_path / "end.ckpt", 2 * BATCHES)):
        resumed = Several()
        trainer(tmp_path, SlowWeights(), max_epochs=3).fit(resumed, *loaders(), ckpt_path=path)
        assert_same_bits(resumed.trained[0], fast(steps) + bare(steps))
        assert_same_bits(weights_of(resumed), slow(3 * BATCHES) + bare(3 * BATCHES))


def test_without_lookahead_training_is_refused_and_validation_is_not(tmp_path):
    class Bare(Scored):
        def configure_optimizers(self):
            return adamw(self.network)

    module, fit = Bare(), trainer(tmp_path, SlowWeights(), max_epochs=1)
    assert fit.validate(module, loaders()[1], verbose=False)
    with pytest.raises(ValueError, match=r"`SlowWeights` needs a `lookahead_optim.torch.Lookahead`.*AdamW"):
        fit.fit(module, *loaders())


def test_an_inner_optimizer_with_evaluation_weights_of_its_own_is_refused(tmp_path):
    class WithMode(torch.optim.SGD):
        def eval(self):
            raise NotImplementedError

    class Module(Scored):
        def configure_optimizers(self):
            return Lookahead(WithMode(self.network.parameters()))

    with pytest.raises(ValueError, match=r"`SlowWeights` needs inner optimizers without `eval\(\)`"):
        trainer(tmp_path, SlowWeights(), max_epochs=1).fit(Module(), *loaders())


def test_a_checkpoint_made_without_the_callback_resumes_with_it(tmp_path):
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(Scored(), *loaders())
    fit.save_checkpoint(tmp_path / "fast.ckpt")
    assert_resumes(tmp_path, tmp_path / "fast.ckpt", BATCHES)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have trained, and the results of each process."""
    folder = tmp_path_factory.mktemp("two_processes")
    finish(start(worker, "two_processes", folder, OMP_NUM_THREADS="1"), TIMEOUT)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", [make.__name__ for make in worker.STRATEGIES])
def test_two_processes_validate_on_the_slow_weights_and_resume(two_processes, kind):
    for result in (one[kind] for one in two_processes[1]):
        # Lightning lets PyTorch save and load shards. That loses fast weights that are not in the model.
        assert result["warned"] == (kind == "Sharded")
        # Both train on the same batch.
        assert_same_bits(result["trained"], [fast(steps) for steps in range(4)])
        assert_same_bits(result["validated"], [slow(steps) for steps in (0, 2, 4)])
        assert_same_bits(result["after"], slow(4))
        assert_same_bits(result["resumed"], [fast(steps) for steps in range(2, 6)])
        assert_same_bits(result["resumed_at_the_end"], [fast(steps) for steps in (4, 5)])


@pytest.mark.parametrize("kind", [make.__name__ for make in worker.STRATEGIES])
def test_two_processes_keep_what_they_scored(two_processes, kind):
    folder, results = two_processes
    for steps, recorded in results[0][kind]["scores"].items():
        path = folder / kind / f"weights-step={steps}.ckpt"
        if path.is_dir():
            shards, path = path, path.with_suffix(".pt")
            dcp_to_torch_save(shards, path)
        kept = Scored()
        kept.load_state_dict(torch.load(path)["state_dict"])
        (score,) = trainer(folder).validate(kept, loaders()[1], verbose=False)
        # Each process has scored half of the data.
        assert score["score"] == pytest.approx(recorded, rel=1e-6)


def test_the_callback_can_be_sent_to_another_process():
    assert isinstance(pickle.loads(pickle.dumps(SlowWeights())), SlowWeights)


def test_the_trainers_of_both_packages_of_lightning_take_it():
    other = pytest.importorskip("pytorch_lightning")
    for package in (lightning, other):
        assert isinstance(SlowWeights(), package.Callback)
        package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[SlowWeights()])
