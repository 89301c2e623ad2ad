"""CIFAR-10 and CIFAR-100 with ResNet-18, the paper's own task, for those who have the data and a GPU.

Reads the "python version" of the data as its authors distribute it, unpacked (`cifar-10-batches-py`,
`cifar-100-python`). The settings follow the paper: 200 epochs, batches of 128, crops and flips, SGD with momentum 0.9,
the learning rate divided by 5 at epochs 60, 120 and 160, and Lookahead(5, 0.8); the outer step has options. This
repository has no results of it.
"""

import datetime
import importlib.metadata
import json
import pickle
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

from common import BARE, FAST, SLOW
from lookahead_optim.torch import Lookahead

MILESTONES, FACTOR = (60, 120, 160), 0.2
FILES = {
    "cifar-10-batches-py": ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"], b"labels", 10),
    "cifar-100-python": (["train"], ["test"], b"fine_labels", 100),
}


class _ArraysOnly(pickle.Unpickler):
    """Loads the arrays, lists and numbers of which CIFAR's files consist; another pickle could run any code."""

    def find_class(self, module, name):
        arrays = module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype", "scalar"}
        # Python 3 writes the bytes of an array with it.
        if not arrays and (module, name) != ("_codecs", "encode"):
            raise pickle.UnpicklingError(f"A CIFAR file holds arrays only. Received: {module}.{name}")
        return super().find_class(module, name)


def load(folder):
    """Return the data in a folder.

    Args:
        folder: The unpacked folder, whose name says which of the two it is.

    Returns:
        Training and test images, uint8 tensors of shape (images, 3, 32, 32), each with its labels; then the number
        of classes.

    Raises:
        ValueError: if the folder has another name, lacks a file, or a file has other shapes.
    """
    folder = Path(folder)
    if folder.name not in FILES:
        raise ValueError(f"`folder` must be named one of {sorted(FILES)}. Received: folder={str(folder)!r}")
    training, test, key, classes = FILES[folder.name]
    parts = []
    for names in (training, test):
        images, labels = [], []
        for name in names:
            path = folder / name
            if not path.is_file():
                raise ValueError(
                    f"`folder` must have the files of CIFAR's python version. {path} is missing; unpack it."
                )
            with path.open("rb") as file:
                content = _ArraysOnly(file, encoding="bytes").load()
            images.append(np.asarray(content[b"data"]))
            labels.extend(content[key])
        images = np.concatenate(images)
        if images.ndim != 2 or images.shape[1] != 3072 or images.dtype != np.uint8 or len(images) != len(labels):
            raise ValueError(
                "CIFAR's files hold uint8 images of shape (images, 3072) and as many labels. "
                f"Received: {images.dtype} of shape {images.shape} and {len(labels)} labels in {folder}"
            )
        parts.append((torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels)))
    return *parts, classes


def augment(images, generator):
    """Return images, cropped at random from ones padded by 4, and flipped at random; (images, 3, 32, 32)."""
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    count = len(images)
    top, left = torch.randint(9, (2, count, 1), generator=generator).to(images.device)
    rows = top + torch.arange(32, device=images.device)
    columns = left + torch.arange(32, device=images.device)
    flipped = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    # With channels last, PyTorch 2.13 wrote out of bounds on a processor without AVX-512: in the backward pass of a
    # 1 x 1 convolution of stride 2 and fewer than 8 input channels.
    return moved.contiguous()


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        around = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.around = nn.Identity() if same else nn.Sequential(*around)

    def forward(self, x):
        """Return features of shape (images, outputs, height / stride, width / stride)."""
        return torch.relu(self.body(x) + self.around(x))


def resnet18(classes, width=64):
    """Return ResNet-18 as it is used on images of 32 x 32: a first convolution of 3 x 3, and no pooling after it."""
    layers, inputs = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(Block(inputs, width * 2**stage, stride))
            inputs = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the accuracy in % of a model in evaluation mode."""
    model.eval()
    right = sum(int((model(part).argmax(1) == of).sum()) for part, of in zip(images.split(500), labels.split(500)))
    model.train()
    return 100 * right / len(labels)


@torch.no_grad()
def with_slow_statistics(model, optimizer, images, labels, normalise):
    """Return the accuracy of the slow weights, with BatchNorm statistics of their own; the model stays as it was."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with optimizer.slow_weights():
        parts = (normalise(part) for part in images[0].split(500)[:20])
        torch.optim.swa_utils.update_bn(parts, model)
        found = accuracy(model, normalise(images[1]), labels)
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    return found


def hold_out(data, count):
    """Return data with the last images of training in place of the test ones, and the rest of training."""
    (images, labels), _, classes = data
    return (images[:-count], labels[:-count]), (images[-count:], labels[-count:]), classes


def train(data, *, lookahead, rate, weight_decay, seed, epochs, device, width=64):
    """Train ResNet-18; return test accuracies in % after each epoch, by the weights evaluated.

    `lookahead` has the arguments of `Lookahead`. Without any, SGD is bare.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (images, labels), (test_images, test_labels), classes = data
    images, labels, test_images, test_labels = (one.to(device) for one in (images, labels, test_images, test_labels))
    pixels = images.float() / 255
    mean, deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    del pixels

    def normalise(part):
        return (part.float() / 255 - mean) / deviation

    model = resnet18(classes, width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay)
    if lookahead:
        optimizer = Lookahead(optimizer, **lookahead)
    milestones = [round(one * epochs / 200) for one in MILESTONES]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, FACTOR)
    curves = {"fast": [], "slow": []} if lookahead else {"bare": []}
    for _ in track(range(epochs), f"{'Lookahead' if lookahead else 'SGD'}, {rate:g}, seed {seed}"):
        for chosen in torch.randperm(len(images), generator=generator).split(128):
            optimizer.zero_grad()
            part = augment(normalise(images[chosen.to(device)]), generator)
            nn.functional.cross_entropy(model(part), labels[chosen.to(device)]).backward()
            optimizer.step()
        scheduler.step()
        curves["fast" if lookahead else "bare"].append(accuracy(model, normalise(test_images), test_labels))
        if lookahead:
            slow = with_slow_statistics(model, optimizer, (images, test_images), test_labels, normalise)
            curves["slow"].append(slow)
    return curves


def plot(content):
    """Return the figure of a file of results: the mean accuracy over seeds after each epoch, a panel for each rate."""
    rates = sorted({one["rate"] for one in content["results"]})
    figure = Figure(figsize=(4 * len(rates), 3.4), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates):
        for name, color in (("bare", BARE), ("fast", FAST), ("slow", SLOW)):
            curves = [
                one["curves"][name] for one in content["results"] if one["rate"] == rate and name in one["curves"]
            ]
            if curves:
                axes.plot(range(1, content["epochs"] + 1), np.mean(curves, axis=0), color=color, label=name)
        axes.set(title=f"learning rate {rate:g}", xlabel="epoch", ylabel=f"accuracy on {content['accuracy']} (%)")
        axes.legend()
    return figure


def main(
    data: Annotated[Path, typer.Argument(help="The unpacked folder, cifar-10-batches-py or cifar-100-python.")],
    rates: Annotated[str, typer.Option(help="Learning rates to try, on both sides.")] = "0.03,0.05,0.1,0.2",
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", min=0)] = 1e-3,
    seeds: Annotated[int, typer.Option(help="Runs of each kind.", min=1)] = 3,
    validation: Annotated[
        int, typer.Option(help="Training images to hold out, and to evaluate in place of the test images.", min=0)
    ] = 0,
    epochs: Annotated[int, typer.Option(help="Epochs of each run; the schedule is stretched to them.", min=1)] = 200,
    sync_period: Annotated[int, typer.Option(help="Steps from sync to sync.", min=1)] = 5,
    slow_step_size: Annotated[float, typer.Option(help="Slow step size.", min=0)] = 0.8,
    slow_momentum: Annotated[float, typer.Option(help="Momentum of the outer step, in [0, 1).", min=0)] = 0.0,
    slow_nesterov: Annotated[bool, typer.Option(help="Whether this momentum is Nesterov's, or heavy ball.")] = True,
    width: Annotated[int, typer.Option(help="Channels of the first stage; 64 is ResNet-18.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="Device of PyTorch.")] = "cuda" if torch.cuda.is_available() else "cpu",
    output: Annotated[Path, typer.Option(help="The JSON file of results.")] = Path("cifar.json"),
) -> None:
    loaded = hold_out(load(data), validation) if validation else load(data)
    results = []
    outer = {
        "sync_period": sync_period,
        "slow_step_size": slow_step_size,
        "slow_momentum": slow_momentum,
        "slow_nesterov": slow_nesterov,
    }
    for rate in map(float, rates.split(",")):
        for lookahead in ({}, outer):
            for seed in range(seeds):
                settings = {"lookahead": lookahead, "rate": rate, "weight_decay": weight_decay, "seed": seed}
                curves = train(loaded, **settings, epochs=epochs, device=device, width=width)
                results.append({**settings, "curves": curves})
                # A long run that is stopped keeps what it has.
                content = {
                    "experiment": f"cifar, {data.name}",
                    "date": datetime.date.today().isoformat(),
                    "versions": {one: importlib.metadata.version(one) for one in ("lookahead-optim", "torch")},
                    "device": device,
                    "epochs": epochs,
                    "width": width,
                    "accuracy": f"{validation} held-out images" if validation else "test images",
                    "results": results,
                }
                output.write_text(json.dumps(content) + "\n")
                plot(content).savefig(output.with_suffix(".svg"), metadata={"Date": None})
                last = ", ".join(f"{name} {curve[-1]:.2f}" for name, curve in curves.items())
                typer.echo(f"learning rate {rate:g}, seed {seed}: {last}")


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)
