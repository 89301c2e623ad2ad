"""Two workers in the training loops of other libraries, which normally average gradients. Here they do not.

    python -m tests.test_torch.worker_loops loops DIRECTORY RANK WORLD_SIZE

Writes the weights and the batches of each loop to DIRECTORY/loops-RANK.pt.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from lookahead_optim.torch import Lookahead, average
from tests.test_torch.process_groups import join
from tests.test_torch.small_task import network

TIMEOUT = 120
PERIOD, SIZE, MOMENTUM, BATCH = 3, 0.7, 0.5, 8
LOOPS = ["accelerate", "lightning", "trainer", "keras"]


def inner(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def wrapped(parameters):
    return Lookahead(inner(parameters), PERIOD, SIZE, slow_momentum=MOMENTUM, reduce=average())


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def dataset():
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(*(torch.randn(80, size, generator=generator) for size in (4, 2)))


def in_accelerate(directory):
    from accelerate import Accelerator

    model, batches = network(), []
    accelerator = Accelerator(cpu=True)
    # Not the model, which Accelerate would wrap in DistributedDataParallel.
    optimizer, loader = accelerator.prepare(
        wrapped(model.parameters()), torch.utils.data.DataLoader(dataset(), batch_size=BATCH)
    )
    for x, y in loader:
        batches.append((x, y))
        accelerator.backward(loss_of(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    return model, batches


def in_lightning(directory):
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Workers(DDPStrategy):
        """Starts processes and gives them their data, and does not wrap the model."""

        def configure_ddp(self):
            pass

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.batches = network(), []

        def configure_optimizers(self):
            return wrapped(self.network.parameters())

        def training_step(self, batch, index):
            self.batches.append(tuple(batch))
            return loss_of(self.network, *batch)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=Workers(process_group_backend="gloo"),
        max_epochs=1,
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(dataset(), batch_size=BATCH))
    return module.network, module.batches


def in_trainer(directory):
    import transformers

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.batches = network(), []

        def forward(self, x, labels):
            self.batches.append((x, labels))
            return {"loss": loss_of(self.network, x, labels)}

    class WorkersTrainer(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            # The model stays as it is.
            self.accelerator.prepare_model = lambda model, *_, **__: model

    model = Model()
    arguments = transformers.TrainingArguments(
        str(directory / "trainer"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"x": x, "labels": y} for x, y in dataset()]
    WorkersTrainer(model, arguments, train_dataset=rows, optimizers=(wrapped(model.parameters()), None)).train()
    return model.network, model.batches


def in_keras(directory):
    """Keras' model with the native front end, in a training loop of the user's.

    On PyTorch a model of Keras is a module.
    """
    import keras

    model, start = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)]), network()
    model.build((None, 4))
    model.set_weights([one.detach().t().numpy() for one in start.parameters()])
    batches = list(torch.utils.data.DataLoader(dataset(), batch_size=BATCH))[dist.get_rank() :: 2]
    weights = [variable.value for variable in model.trainable_variables]
    optimizer = wrapped(weights)
    for x, y in batches:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for one, weight in zip(start.parameters(), weights, strict=True):
            one.copy_(weight.t())
    return start, batches


if __name__ == "__main__":
    run, directory, rank, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    # Warnings of the loops' own imports and settings.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Variables that torchrun would set. The process group exists already, so no port is needed.
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    address["KERAS_BACKEND"] = "torch"
    os.environ.update({name: str(value) for name, value in {**numbers, **address}.items()})
    join(run, directory, rank, world_size, TIMEOUT)
    results = {}
    for name in LOOPS:
        model, batches = globals()[f"in_{name}"](directory)
        results[name] = [one.detach() for one in model.parameters()], batches
    torch.save(results, directory / f"{run}-{rank}.pt")
    dist.destroy_process_group()
