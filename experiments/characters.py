"""A character language model on Python's own source: Adam bare and in Lookahead, over learning rates.

A small transformer learns the standard library's source text, which is on every machine that has Python. Measured with
the PyTorch front end: validation loss of the bare weights, and of fast and slow ones, at a constant and at a decayed
learning rate.
"""

import functools
import itertools
import math
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from common import BARE, FAST, SLOW, command, in_processes, in_words, markdown, paired
from lookahead_optim.torch import Lookahead
from source_text import CHARACTERS, described, load

CONTEXT, BATCH, WIDTH = 64, 32, 64
PERIOD, STEP_SIZE = 5, 0.5
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)


class Transformer(nn.Module):
    """A decoder-only transformer of two layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, len(CHARACTERS))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text):
        """Return logits of shape (batch, length, characters) for integers of shape (batch, length)."""
        x = self.embed(text) + self.position
        return self.out(self.norm(self.layers(x, mask=self.mask, is_causal=True)))


def batch(text, generator, size):
    """Return random pieces of text, and the same a character later."""
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
    pieces = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def loss_of(model, inputs, targets):
    """Return the mean cross-entropy, in nats a character."""
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model, text):
    """Return the loss on the same 512 pieces each time."""
    return float(loss_of(model, *batch(text, torch.Generator().manual_seed(0), 512)))


@functools.cache
def texts():
    """Return training and validation text as tensors."""
    return [torch.from_numpy(text) for text in load()[:2]]


def train(steps, task):
    """Train a new model; return validation losses at six steps of the run, by the weights evaluated, and the steps."""
    decayed, rate, seed, wrapped = task
    # Two processes share the cores.
    torch.set_num_threads(1)
    training, validation = texts()
    torch.manual_seed(seed)
    model = Transformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    if wrapped:
        optimizer = Lookahead(optimizer, PERIOD, STEP_SIZE)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2 if decayed else 1.0
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    curves = {"fast": [], "slow": []} if wrapped else {"bare": []}
    at = []
    # A few steps after a sync, so that fast and slow weights differ.
    ends = [round(steps * part / 6) // PERIOD * PERIOD - 2 for part in range(1, 7)]
    for step in range(1, ends[-1] + 1):
        optimizer.zero_grad()
        loss_of(model, *batch(training, generator, BATCH)).backward()
        optimizer.step()
        decay.step()
        if step in ends:
            at.append(step)
            curves["fast" if wrapped else "bare"].append(validate(model, validation))
            if wrapped:
                with optimizer.slow_weights():
                    curves["slow"].append(validate(model, validation))
    return {name: [round(one, 4) for one in curve] for name, curve in curves.items()}, at


def run(quick):
    """Return the results of the experiment."""
    *both, digest = load()
    rates, seeds, steps = ((4e-3,), 1, 36) if quick else (RATES, 5, 300)
    results = {
        "text": described(*both, digest),
        "rates": rates,
        "seeds": seeds,
        "constant": {"bare": [], "fast": [], "slow": []},
        "decayed": {"bare": [], "fast": [], "slow": []},
    }
    tasks = list(itertools.product((False, True), rates, range(seeds), (False, True)))
    found = in_processes(functools.partial(train, steps), tasks)
    for (decayed, _, seed, _), (curves, results["steps"]) in zip(tasks, found):
        kind = results["decayed" if decayed else "constant"]
        for name, curve in curves.items():
            if seed == 0:
                kind[name].append([])
            kind[name][-1].append(curve)
    return results


def spread(values):
    """Return mean and standard deviation over seeds in words."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def at_the_best_rate(losses):
    """Return a loss for each seed, at the learning rate with the lowest mean of the other seeds.

    Args:
        losses: Array of shape (rates, seeds).
    """
    if losses.shape[1] == 1:
        return losses.min(axis=0)
    others = losses.sum(axis=1, keepdims=True) - losses
    return np.take_along_axis(losses, others.argmin(axis=0, keepdims=True), axis=0)[0]


def tables(results):
    """Return the tables of the experiment's page."""
    rows, differences = [], []
    for schedule in ("constant", "decayed"):
        # (rates, seeds, times)
        last = {name: np.array(curves)[:, :, -1] for name, curves in results[schedule].items()}
        for index, rate in enumerate(results["rates"]):
            rows.append([schedule, f"{rate:g}", *(spread(last[name][index]) for name in ("bare", "fast", "slow"))])
        best = {name: at_the_best_rate(losses) for name, losses in last.items()}
        rows.append([schedule, "the best", *(spread(best[name]) for name in ("bare", "fast", "slow"))])
        differences.append([schedule, *(in_words(paired(best[name], best["bare"]), 3) for name in ("fast", "slow"))])
    text = results["text"]
    return {
        "losses": markdown(["schedule", "learning rate", "bare", "Lookahead, fast", "Lookahead, slow"], rows),
        "differences": markdown(["schedule, each at its best rate", "fast minus bare", "slow minus bare"], differences),
        "text": f"{text['training']:,} characters for training, {text['validation']:,} for validation (digest "
        f"{text['sha256']}), {results['seeds']} seeds, {results['steps'][-1]} steps.\n",
    }


def plots(results):
    """Return the figures of the experiment's page."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = {"bare": ("Adam", BARE), "fast": ("Lookahead, fast", FAST), "slow": ("Lookahead, slow", SLOW)}
    for axes, schedule in ((left, "constant"), (middle, "decayed")):
        for name, (label, color) in names.items():
            last = np.array(results[schedule][name])[:, :, -1]
            error = last.std(axis=1, ddof=1) if last.shape[1] > 1 else None
            axes.errorbar(results["rates"], last.mean(axis=1), error, color=color, label=label, capsize=2, linewidth=1)
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats a character)", title=schedule)
    left.legend()
    index = len(results["rates"]) // 2
    for name, (label, color) in names.items():
        curves = np.array(results["constant"][name])[index]
        right.plot(results["steps"], curves.mean(axis=0), ".-", color=color, label=label, linewidth=1)
    right.set(xlabel="steps", ylabel="validation loss", title=f"constant learning rate {results['rates'][index]:g}")
    return {"losses": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch", "numpy"])
