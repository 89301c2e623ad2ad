"""Robustness on scanned digits: accuracy over the inner optimizer's settings and over Lookahead's, bare and wrapped.

The paper's figures on robustness, on a task that ships with scikit-learn: SGD with momentum over a grid of learning
rate and momentum, then period and step size, with clean labels and with 30% of the training labels replaced by
random ones, at a constant learning rate and with cosine decay. Settings are chosen on validation images, the same way
on both sides; what is reported is the accuracy on test images. With the Optax front end, all settings and seeds of a
grid at once.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common import BARE, SLOW, command, in_words, markdown, paired
from lookahead_optim.optax import lookahead, slow_params

BATCH = 64
TRAINING, VALIDATION = 1024, 360
LAYERS = (64, 64, 32, 10)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MOMENTA = (0.0, 0.5, 0.9, 0.95)
PERIODS = (2, 5, 10, 20, 50)
STEP_SIZES = (0.2, 0.5, 0.8)
NOISES = {"clean labels": 0.0, "30% label noise": 0.3}
SCHEDULES = ("constant", "decayed")


def load():
    """Return images of shape (images, 64) with values from 0 to 1, and labels: training, validation, test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    x, x_test, y, y_test = train_test_split(
        images, labels, train_size=TRAINING + VALIDATION, stratify=labels, random_state=0
    )
    x_train, x_valid, y_train, y_valid = train_test_split(x, y, train_size=TRAINING, stratify=y, random_state=0)
    return (x_train, y_train), (x_valid, y_valid), (x_test, y_test)


def initial(key):
    """Return the weights of a new network."""
    keys = jax.random.split(key, len(LAYERS) - 1)
    return [
        {"w": jax.random.normal(key, (inputs, outputs)) * np.sqrt(2 / inputs), "b": jnp.zeros(outputs)}
        for key, inputs, outputs in zip(keys, LAYERS, LAYERS[1:])
    ]


def logits(params, x):
    """Return the network's outputs, of shape (images, 10)."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params, x, y):
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@functools.partial(jax.jit, static_argnames=("period", "epochs", "decayed"))
def train(settings, data, noise, *, period, epochs, decayed):
    """Train one network for each row of settings.

    Args:
        settings: Arrays of shape (runs,): `rate`, `momentum`, `step_size` and `seed`.
        data: Training, validation and test images with labels.
        noise: Share of the training labels to replace.
        period: Sync period; 0 is the bare inner optimizer.
        epochs: Epochs of each run.
        decayed: Whether the learning rate falls to zero as a cosine.

    Returns:
        Accuracies in %, arrays of shape (runs, 2) of validation and test, by the weights evaluated; and whether the run
        ended with finite weights.
    """
    (x, y), *held_out = data
    steps = epochs * (TRAINING // BATCH)

    def one(rate, momentum, step_size, seed):
        key = jax.random.key(seed)
        init_key, noise_key, label_key, order_key = jax.random.split(key, 4)
        replaced = jax.random.permutation(noise_key, TRAINING) < jnp.round(noise * TRAINING)
        labels = jnp.where(replaced, jax.random.randint(label_key, (TRAINING,), 0, 10), y)
        schedule = optax.cosine_decay_schedule(1.0, steps) if decayed else lambda count: 1.0
        inner = optax.chain(optax.trace(momentum), optax.scale_by_schedule(schedule), optax.scale(-1.0 * rate))
        optimizer = lookahead(inner, period, step_size) if period else inner
        orders = jax.vmap(lambda key: jax.random.permutation(key, TRAINING))(jax.random.split(order_key, epochs))

        def step(carry, batch):
            params, state = carry
            gradients = jax.grad(loss)(params, x[batch], labels[batch])
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = initial(init_key)
        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), orders.reshape(steps, BATCH))

        def accuracies(params):
            return jnp.stack([100 * jnp.mean(logits(params, x).argmax(-1) == y) for x, y in held_out])

        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
        if not period:
            return {"bare": accuracies(params)}, finite
        return {"fast": accuracies(params), "slow": accuracies(slow_params(state, params))}, finite

    return jax.vmap(one)(*(settings[name] for name in ("rate", "momentum", "step_size", "seed")))


def grid(seeds, **values):
    """Return the settings of a grid as arrays of shape (runs,), seeds varying fastest."""
    names = [*values, "seed"]
    product = np.array(np.meshgrid(*values.values(), np.arange(seeds), indexing="ij")).reshape(len(names), -1)
    found = dict(zip(names, product.astype("float32")))
    return {**found, "seed": found["seed"].astype("int32")}


def accuracies(found, shape):
    """Return accuracies as nested lists of shape (*grid, seeds) by weights and set, and the number of diverged runs."""
    by_weights, finite = found
    result = {
        f"{weights}, {part}": np.asarray(values)[:, column].reshape(shape).round(2).tolist()
        for weights, values in by_weights.items()
        for column, part in enumerate(("validation", "test"))
    }
    return {**result, "diverged": int(np.sum(~np.asarray(finite)))}


def run(quick):
    """Return the results of the experiment."""
    data = load()
    # Runs that end a step after a sync with k = 5, where fast and slow weights differ.
    seeds, epochs = (2, 2) if quick else (5, 31)
    rates, momenta = ((0.05, 0.2), (0.0, 0.9)) if quick else (RATES, MOMENTA)
    # The quick form has as many runs in both parts, so that the second compiles nothing anew.
    periods, step_sizes = ((5,), (0.5, 0.8)) if quick else (PERIODS, STEP_SIZES)
    cases = [(noise, schedule) for noise in NOISES for schedule in SCHEDULES][:: 3 if quick else 1]
    results = {
        "seeds": seeds,
        "epochs": epochs,
        "rates": rates,
        "momenta": momenta,
        "periods": periods,
        "step_sizes": step_sizes,
        "inner": {},
        "outer": {},
    }
    # First over the inner optimizer's settings, at one setting of Lookahead's; then the other way round.
    for noise, schedule in track(cases, "Learning rate x momentum"):
        settings = grid(seeds, rate=rates, momentum=momenta, step_size=[0.5])
        case = results["inner"][f"{noise}, {schedule}"] = {}
        for period in (0, 5):
            found = train(settings, data, NOISES[noise], period=period, epochs=epochs, decayed=schedule == "decayed")
            case["wrapped" if period else "bare"] = accuracies(found, (len(rates), len(momenta), seeds))
    for noise, schedule in track(cases, "Period x step size"):
        settings = grid(seeds, step_size=step_sizes, rate=rates, momentum=[0.9])
        results["outer"][f"{noise}, {schedule}"] = {
            str(period): accuracies(
                train(settings, data, NOISES[noise], period=period, epochs=epochs, decayed=schedule == "decayed"),
                (len(step_sizes), len(rates), seeds),
            )
            for period in periods
        }
    return results


def chosen(found, weights):
    """Return the index of the settings that are best in validation, and their test accuracies, one for each seed."""
    validation = np.array(found[f"{weights}, validation"]).mean(axis=-1)
    index = np.unravel_index(validation.argmax(), validation.shape)
    return index, np.array(found[f"{weights}, test"])[index]


def spread(values):
    """Return mean and standard deviation over seeds in words."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def tables(results):
    """Return the tables of the experiment's page."""
    measures = ("median", "within 2 of best", "diverged")
    tuned, robust = [], []
    for case, found in results["inner"].items():
        cells, settings, accuracies_of = [], [], {}
        for kind, weights in (("bare", "bare"), ("wrapped", "fast"), ("wrapped", "slow")):
            (rate, momentum), test = chosen(found[kind], weights)
            accuracies_of[weights] = test
            cells.append(spread(test))
            settings.append(f"{results['rates'][rate]:g}, {results['momenta'][momentum]:g}")
        difference = in_words(paired(accuracies_of["slow"], accuracies_of["bare"]), digits=1)
        tuned.append([case, *(f"{cell} ({setting})" for cell, setting in zip(cells, settings)), difference])
        row = [case]
        for kind, weights in (("bare", "bare"), ("wrapped", "slow")):
            means = np.array(found[kind][f"{weights}, test"]).mean(axis=-1)
            row += [f"{np.median(means):.1f}", f"{np.mean(means >= means.max() - 2):.0%}", found[kind]["diverged"]]
        robust.append(row)
    outer = []
    for case, found in results["outer"].items():
        for period, one in found.items():
            cells = []
            for index in range(len(results["step_sizes"])):
                part = {name: np.array(one[name])[index] for name in ("slow, validation", "slow, test")}
                (rate,), test = chosen(part, "slow")
                cells.append(f"{spread(test)} ({results['rates'][rate]:g})")
            outer.append([case, period, *cells])
    return {
        "tuned": markdown(
            [
                "test accuracy in % (learning rate, momentum)",
                "bare",
                "Lookahead, fast",
                "Lookahead, slow",
                "slow minus bare",
            ],
            tuned,
        ),
        "robust": markdown(
            ["over the whole grid", *(f"{kind}: {what}" for kind in ("bare", "slow") for what in measures)], robust
        ),
        "outer": markdown(
            [
                "test accuracy in %, slow weights (learning rate)",
                "k",
                *(f"α = {one:g}" for one in results["step_sizes"]),
            ],
            outer,
        ),
    }


def plots(results):
    """Return the figures of the experiment's page."""
    rates = results["rates"]
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (case, found) in zip(panels.flat, results["inner"].items()):
        for kind, weights, color in (("bare", "bare", BARE), ("wrapped", "slow", SLOW)):
            means = np.array(found[kind][f"{weights}, test"]).mean(axis=-1)
            for index, style in zip(range(means.shape[1]), ("-", "--", "-.", ":")):
                label = f"{'bare' if kind == 'bare' else 'Lookahead, slow'}, momentum {results['momenta'][index]:g}"
                axes.semilogx(rates, means[:, index], style, color=color, linewidth=1.2, label=label)
        axes.set(title=case, ylim=(60 if "noise" in case else 85, 100))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("test accuracy (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    grids = Figure(figsize=(10, 3), layout="constrained")
    for axes, (case, found) in zip(grids.subplots(1, 4), results["outer"].items()):
        values = np.array(
            [
                [
                    chosen({name: np.array(one[name])[index] for name in ("slow, validation", "slow, test")}, "slow")[
                        1
                    ].mean()
                    for one in found.values()
                ]
                for index in range(len(results["step_sizes"]))
            ]
        )
        # Light enough for the numbers on it.
        axes.imshow(values, cmap="Blues", vmin=values.min() - 0.5, vmax=values.max() + 2, aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(found)), found)
        axes.set_yticks(range(len(results["step_sizes"])), [f"{one:g}" for one in results["step_sizes"]])
        axes.set(title=case, xlabel="k", ylabel="α")
        axes.title.set_fontsize(8)
        axes.grid(False)
    return {"inner": figure, "outer": grids}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "scikit-learn", "numpy"])
