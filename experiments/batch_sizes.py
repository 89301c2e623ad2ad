"""Bigger batches: what slow weights are worth on a character model when the same text comes in larger batches.

AdamW, Lookahead and three settings of slow momentum, at batches of 1, 4 and 16 times the smallest. A run of each seed
sees the same pieces of text in the same order, so that batches of 16 times the size make 16 times fewer steps. Each
optimizer has the best of as many learning rates at each batch size. With the Optax front end.
"""

import functools
import itertools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, command, in_processes, in_words, markdown, paired
from lookahead_optim.optax import lookahead, slow_params
from source_text import described, load
from transformer import CONTEXT, initial_params, loss_of, starts_of_pieces

# Sync period, slow step size and slow momentum: of the paper on Lookahead, of SNOO, of MuLoCo and of DiLoCo.
OUTER = {
    "Lookahead(6, 0.5)": (6, 0.5, 0.0),
    "slow momentum 0.37": (28, 0.68, 0.37),
    "slow momentum 0.6": (30, 0.7, 0.6),
    "slow momentum 0.9": (30, 0.7, 0.9),
}
OPTIMIZERS = ("AdamW", *OUTER)
# Pieces in a batch, with the lowest learning rate to try: a larger batch needs a higher one.
LOWEST = {2: 2.5e-4, 8: 5e-4, 32: 1e-3}
LADDERS = {batch: tuple(rate * 2**power for power in range(6)) for batch, rate in LOWEST.items()}
PIECES = 240 * 32
SEEDS, SEED_TO_TUNE = (0, 1, 2, 3, 4), 100

load_once = functools.cache(load)


def optimizer(name, rate, steps):
    """Return an optimizer, whose learning rate decays to 0, and a function of its state and parameters to evaluate."""
    inner = optax.adamw(lambda count: rate * (1 + jnp.cos(jnp.pi * count / steps)) / 2)
    if name not in OUTER:
        return inner, lambda state, params: params
    period, eta, mu = OUTER[name]
    return lookahead(inner, period, eta, **({"slow_momentum": mu} if mu else {})), slow_params


@functools.cache
def compiled(name, steps):
    """Return a compiled function that trains a model and returns its validation loss, at the end."""

    @jax.jit
    def train(rate, params, training, starts, validation, held_out):
        rule, evaluated = optimizer(name, rate, steps)

        def step(carried, starts):
            params, state = carried
            gradients = jax.grad(loss_of)(params, training, starts)
            updates, state = rule.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, rule.init(params)), starts)
        return loss_of(evaluated(state, params), validation, held_out)

    return train


def batches(text, pieces, batch, seed):
    """Return where the pieces of each batch start, of shape (steps, batch); their order depends on the seed alone."""
    return starts_of_pieces(text, pieces, seed).reshape(-1, batch)


def loss(name, batch, rate, seed, pieces):
    """Return the validation loss of a training, of the slow weights where there are any."""
    training, validation, _ = load_once()
    starts = batches(training, pieces, batch, seed)
    train = compiled(name, len(starts))
    texts = jnp.asarray(training, "int8"), starts, jnp.asarray(validation, "int8")
    return round(float(train(rate, initial_params(seed), *texts, starts_of_pieces(validation, 512, 0))), 4)


def tuned(pieces, ladders, seeds, one):
    """Return the losses of an optimizer at all rates with one seed, and at the best rate with other seeds."""
    name, batch = one
    tuning = [loss(name, batch, rate, SEED_TO_TUNE, pieces) for rate in ladders[batch]]
    rate = ladders[batch][int(np.nanargmin(tuning))]
    losses = [loss(name, batch, rate, seed, pieces) for seed in seeds]
    return {"optimizer": name, "batch": batch, "tuning": tuning, "rate": rate, "losses": losses}


def run(quick):
    """Return the results of the experiment."""
    # Two processes share the cores.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    pieces, ladders, seeds, names = PIECES, LADDERS, SEEDS, OPTIMIZERS
    if quick:
        pieces, ladders, seeds, names = 512, {8: (4e-3,)}, (0,), ("AdamW", "slow momentum 0.6")
    *texts, digest = load()
    return {
        "text": described(*texts, digest),
        "pieces": pieces,
        "ladders": {str(batch): rates for batch, rates in ladders.items()},
        "seeds": seeds,
        "runs": in_processes(functools.partial(tuned, pieces, ladders, seeds), list(itertools.product(names, ladders))),
    }


def by_optimizer(results):
    """Return runs by optimizer, each a dictionary by batch size."""
    found = {}
    for one in results["runs"]:
        found.setdefault(one["optimizer"], {})[one["batch"]] = one
    return found


def against_adamw(found, name, batch):
    """Return the loss of an optimizer minus the loss of AdamW at a batch size, one for each seed."""
    return np.subtract(found[name][batch]["losses"], found["AdamW"][batch]["losses"])


def tables(results):
    """Return the tables of the experiment's page."""
    found, sizes = by_optimizer(results), [int(batch) for batch in results["ladders"]]
    losses, differences = [], []
    for name, runs in found.items():
        cells = []
        for batch in sizes:
            values = runs[batch]["losses"]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread} ({runs[batch]['rate']:g})")
        losses.append([name, *cells])
        if name != "AdamW":
            each = [against_adamw(found, name, batch) for batch in sizes]
            change = paired(each[-1], each[0])
            differences.append([name, *(in_words(paired(one, 0 * one), 3) for one in each), in_words(change, 3)])
    heading = [f"{batch} pieces a batch" for batch in sizes]
    steps = results["pieces"] // sizes[-1]
    syncs = ", ".join(f"{steps // OUTER[name][0]} for {name}" for name in found if name in OUTER)
    text, rates = results["text"], results["ladders"]
    return {
        "losses": markdown(["loss (learning rate)", *heading], losses),
        "differences": markdown(
            ["loss minus the loss of AdamW", *heading, f"change from {sizes[0]} to {sizes[-1]} pieces"], differences
        ),
        "text": f"{text['training']:,} characters for training, {text['validation']:,} for validation (digest "
        f"{text['sha256']}). Each run sees {results['pieces'] * CONTEXT:,} characters, in "
        f"{', '.join(str(results['pieces'] // batch) for batch in sizes)} steps. The largest batch has so many syncs: "
        f"{syncs}. Tuning: {len(rates[str(sizes[0])])} learning rates with one seed for each optimizer and batch size, "
        f"then {len(results['seeds'])} other seeds at the best one.\n",
    }


def plots(results):
    """Return the figures of the experiment's page: loss over batch size, and differences to AdamW."""
    found, sizes = by_optimizer(results), [int(batch) for batch in results["ladders"]]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = dict(zip(OPTIMIZERS, ((BARE, "-"), (FAST, "-"), (SLOW, ":"), (SLOW, "-"), (SLOW, "--"))))
    for name, runs in found.items():
        color, style = styles[name]
        means = [np.mean(runs[batch]["losses"]) for batch in sizes]
        left.plot(sizes, means, marker=".", linestyle=style, color=color, label=name, linewidth=1)
        if name != "AdamW":
            each = [against_adamw(found, name, batch) for batch in sizes]
            mean, low, high = np.transpose([paired(one, 0 * one) for one in each])
            ends = [np.nan_to_num(mean - low), np.nan_to_num(high - mean)]
            right.errorbar(sizes, mean, ends, linestyle=style, color=color, capsize=2, linewidth=1)
    right.axhline(0, color=BARE, linewidth=1)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="pieces of 64 characters in a batch")
        axes.set_xticks(sizes, [str(batch) for batch in sizes])
        axes.minorticks_off()
    left.set(ylabel="validation loss (nats a character)", title="at the best learning rate")
    right.set(ylabel="loss minus the loss of AdamW", title="paired over seeds: below 0 is better than AdamW")
    left.legend(fontsize=7)
    return {"losses": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "flax"])
