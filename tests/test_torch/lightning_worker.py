"""The modules of test_lightning_slow_weights.py, and the processes in which their checkpoints are scored.

python -m tests.test_torch.lightning_worker COMMAND DIRECTORY

scored           scores every checkpoint in the directory, and writes scores.json
two_processes    trains in two processes, replicated and sharded, in one go and resumed
"""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch.distributed.fsdp import fully_shard

from lookahead_optim.lightning import SlowWeights
from lookahead_optim.torch import Lookahead
from tests.test_torch.small_task import PERIOD, SIZE, adamw, loss_of, momentum, network

# An epoch of so many steps ends in mid-cycle.
BATCHES = 5


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)


def loaders():
    """Return two loaders, for training and for validation.

    The loader for training has one batch, as Lightning does not resume the order of batches in mid-epoch.
    """
    return [torch.utils.data.DataLoader(one, batch_size=None) for one in ([batch(1)] * BATCHES, [batch(2), batch(3)])]


def weights_of(model):
    """Return copies of the weights, of all shards."""
    weights = [weight.detach() for weight in model.parameters()]
    return [weight.full_tensor() if hasattr(weight, "full_tensor") else weight.clone() for weight in weights]


class Scored(lightning.LightningModule):
    """Has a score, the loss of the validation, and records the weights with which it is trained and validated."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.trained, self.validated, self.scores = [], [], {}

    def configure_optimizers(self):
        return Lookahead(adamw(self.network), PERIOD, SIZE)

    def training_step(self, batch, index):
        self.trained.append(weights_of(self.network))
        return loss_of(self.network, batch)

    def validation_step(self, batch, index):
        self.validated.append(weights_of(self.network))
        self.log("score", loss_of(self.network, batch), sync_dist=True)

    def on_validation_end(self):
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.scores[self.trainer.global_step] = self.trainer.callback_metrics["score"].item()

    def test_step(self, batch, index):
        self.log("score", loss_of(self.network, batch))

    def predict_step(self, batch, index):
        return self.network(batch[0])


class Several(Scored):
    """Two networks, one of them with a bare optimizer, in manual optimization."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = network()

    def configure_optimizers(self):
        return momentum(self.other), Lookahead(adamw(self.network), PERIOD, SIZE)

    def training_step(self, batch, index):
        self.trained.append(weights_of(self))
        for optimizer, model in zip(self.optimizers(), (self.other, self.network)):
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(loss_of(model, batch))
                optimizer.step()

    def validation_step(self, batch, index):
        self.validated.append(weights_of(self))
        self.log("score", loss_of(self.network, batch) + loss_of(self.other, batch))


MODULES = {one.__name__: one for one in (Scored, Several)}


def trainer(folder, *callbacks, **arguments):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in callbacks),
        default_root_dir=folder,
        callbacks=list(callbacks),
        **arguments,
    )


def scored(directory):
    """Score each checkpoint after loading it in Lightning's two ways. Its folder has the name of its module."""
    scores = {}
    for path in sorted(directory.rglob("*.ckpt")):
        make = MODULES[path.parent.name]
        ways = [
            trainer(directory, SlowWeights()).validate(make(), loaders()[1], ckpt_path=path, verbose=False),
            trainer(directory).validate(make.load_from_checkpoint(path), loaders()[1], verbose=False),
        ]
        scores[str(path.relative_to(directory))] = [way[0]["score"] for way in ways]
    (directory / "scores.json").write_text(json.dumps(scores))


class Sharded(Scored):
    def configure_model(self):
        for one in (self.network[0], self.network[2], self.network):
            fully_shard(one, mesh=self.device_mesh["data_parallel"])


def sharding():
    # Not in the oldest versions of Lightning.
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


# How it trains in two processes. Older versions of PyTorch have no FSDP2 for the CPU.
STRATEGIES = {Scored: lambda: "ddp"}
if hasattr(torch.cpu.Stream, "record_event"):
    STRATEGIES[Sharded] = sharding


def two_processes(directory):
    results = {}
    for make, strategy in STRATEGIES.items():
        folder = directory / make.__name__

        def fit(epochs, make=make, strategy=strategy, folder=folder, **arguments):
            # The first two epochs, of two steps each, end in mid-cycle.
            keep = ModelCheckpoint(folder, "{step}", save_top_k=-1)
            weights = ModelCheckpoint(folder, "weights-{step}", monitor="score", save_top_k=-1, save_weights_only=True)
            settings = {"max_epochs": epochs, "limit_train_batches": 2, "strategy": strategy(), "devices": 2}
            module, fitted = make(), trainer(directory, SlowWeights(), keep, weights, **settings)
            fitted.fit(module, *loaders(), **arguments)
            return fitted, module

        with warnings.catch_warnings(record=True) as caught:
            fitted, module = fit(2)
        fitted.save_checkpoint(folder / "end.ckpt")
        results[make.__name__] = {
            "warned": any("`SlowWeights` leaves the fast weights" in str(one.message) for one in caught),
            "trained": module.trained,
            "validated": module.validated,
            "scores": module.scores,
            "after": weights_of(module),
            "resumed": fit(3, ckpt_path=folder / "step=2.ckpt")[1].trained,
            "resumed_at_the_end": fit(3, ckpt_path=folder / "end.ckpt")[1].trained,
        }
    torch.save(results, directory / f"{fitted.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    {"scored": scored, "two_processes": two_processes}[sys.argv[1]](Path(sys.argv[2]))
