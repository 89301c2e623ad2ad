"""Label noise on scanned digits: Lookahead against what one would use instead, with as many tries for each.

The network, split and batches of `digits`, with none to half of the training labels replaced by random ones. The
contenders are SGD with momentum at a constant rate and with cosine decay, both with Lookahead and with an exponential
moving average (EMA) of the weights, early stopping, an average over the end of the training (SWA), label smoothing and
schedule-free SGD. Each has a second setting beside the learning rate, is tuned over the same number of settings with
seeds of its own, and is trained with fresh seeds at the chosen setting. With the Optax front end, all runs of a
contender at once.
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
from digits import BATCH, TRAINING, initial, load, logits
from lookahead_optim.optax import lookahead, slow_params

NOISES = (0.0, 0.1, 0.3, 0.5)
# Effective learning rates: the learning rate divided by 1 - momentum.
RATES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# What a run has where its contender does not say otherwise, and without tuning. With momentum 0.9 a learning rate of
# 0.1; 1 is the default of `schedulefree`, whose `b1` takes the place of the momentum.
DEFAULTS = {
    "rate": 1.0,
    "momentum": 0.9,
    "period": 6,
    "step_size": 0.5,
    "decay": 0.99,
    "start": 0.75,
    "smoothing": 0.1,
    "b1": 0.9,
}
MOMENTA = [{"momentum": one} for one in (0.0, 0.5, 0.9, 0.95)]
OUTER = [{"period": k, "step_size": alpha} for k, alpha in ((6, 0.5), (6, 0.2), (20, 0.2), (40, 0.2))]
DECAYS = [{"decay": one} for one in (0.9, 0.97, 0.99, 0.997)]
# The values of each contender's second setting. The default is among them.
CONTENDERS = {
    "constant": MOMENTA,
    "constant, early stopping": MOMENTA,
    "cosine": MOMENTA,
    "Lookahead(6, 0.5)": MOMENTA,
    "Lookahead, tuned": OUTER,
    "Lookahead, tuned, cosine": OUTER,
    "EMA": DECAYS,
    "EMA, cosine": DECAYS,
    "SWA": [{"start": one} for one in (0.1, 0.25, 0.5, 0.75)],
    "label smoothing": [{"smoothing": one} for one in (0.1, 0.3, 0.6, 0.8)],
    "schedule-free": [{"b1": one} for one in (0.2, 0.5, 0.8, 0.9)],
}
FIRST_TUNING_SEED = 1000
# How a setting is chosen: by validation images with clean labels, with noisy ones, or not at all.
LABELS = ("clean", "noisy", "default")
TRIES = (1, 4, 16)
# Differences for a table: to the bare optimizer, then of Lookahead to what one would use instead.
PAIRS = [
    *((name, "constant") for name in CONTENDERS if name != "constant"),
    *(("Lookahead, tuned", name) for name in CONTENDERS if "Lookahead" not in name and name != "constant"),
    *(("Lookahead(6, 0.5)", name) for name in ("EMA", "SWA", "cosine")),
    *(("Lookahead, tuned, cosine", name) for name in ("cosine", "EMA, cosine", "EMA")),
]
UNTUNED_PAIRS = [
    *((name, "constant") for name in CONTENDERS if name not in ("constant", "Lookahead, tuned")),
    *(("Lookahead(6, 0.5)", name) for name in ("EMA", "SWA", "cosine")),
]
STYLES = {
    "constant": (BARE, "-"),
    "constant, early stopping": (BARE, ":"),
    "cosine": (BARE, "--"),
    "Lookahead(6, 0.5)": (FAST, "-"),
    "Lookahead, tuned": (SLOW, "-"),
    "Lookahead, tuned, cosine": (SLOW, "--"),
    "EMA": ("#009E73", "-"),
    "EMA, cosine": ("#009E73", "--"),
    "SWA": ("#CC79A7", "-"),
    "label smoothing": ("0.4", "-"),
    "schedule-free": ("#E69F00", "-"),
}
# So many runs are compiled and trained at once.
TOGETHER = 48


def averaged(inner, weight):
    """Return a transformation whose state holds an average of the weights after each update.

    Args:
        inner: The transformation that trains.
        weight: A function of the number of averaged weights, from 0, that returns the weight of the new ones.
    """

    def init(params):
        return inner.init(params), params, jnp.zeros((), "int32")

    def update(gradients, state, params):
        inner_state, average, count = state
        updates, inner_state = inner.update(gradients, inner_state, params)
        # The first weights replace the average, as in `torch.optim.swa_utils` and Keras.
        new_weight = jnp.where(count == 0, 1.0, weight(count))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: old + new_weight * (new - old), average, new)
        return updates, (inner_state, average, count + 1)

    return optax.GradientTransformation(init, update)


def optimizer(name, setting, steps):
    """Return a contender's transformation, and a function of its state and parameters: the weights to evaluate."""
    rate, momentum = setting["rate"], setting["momentum"]
    if name == "schedule-free":
        return optax.contrib.schedule_free_sgd(rate, b1=setting["b1"]), optax.contrib.schedule_free_eval_params
    schedule = optax.cosine_decay_schedule(1.0, steps) if "cosine" in name else lambda count: 1.0
    inner = optax.chain(optax.trace(momentum), optax.scale_by_schedule(schedule), optax.scale(-rate * (1 - momentum)))
    if "Lookahead" in name:
        return lookahead(inner, setting["period"], setting["step_size"]), slow_params
    if "EMA" in name:
        return averaged(inner, lambda count: 1 - setting["decay"]), lambda state, params: state[1]
    if name == "SWA":
        start = jnp.round(setting["start"] * steps)
        return averaged(inner, lambda count: 1 / jnp.maximum(count + 1 - start, 1)), lambda state, params: state[1]
    return inner, lambda state, params: params


def loss(params, x, y, smoothing):
    """Return the mean cross-entropy with smoothed labels."""
    labels = optax.smooth_labels(jax.nn.one_hot(y, 10), smoothing)
    return optax.softmax_cross_entropy(logits(params, x), labels).mean()


def replace(labels, key, share):
    """Return labels of which a share is replaced by random ones, some of them right by chance."""
    which_key, label_key = jax.random.split(key)
    replaced = jax.random.permutation(which_key, len(labels)) < jnp.round(share * len(labels))
    return jnp.where(replaced, jax.random.randint(label_key, labels.shape, 0, 10), labels)


@functools.partial(jax.jit, static_argnames=("name", "epochs"))
def train(settings, data, *, name, epochs):
    """Train one network for each row of settings.

    Args:
        settings: Arrays of shape (runs,): `seed`, `noise` and the names of `DEFAULTS`.
        data: Training, validation and test images with labels.
        name: The contender.
        epochs: Epochs of each run.

    Returns:
        Accuracies in % of shape (runs, epochs, 3): in validation with clean labels, in validation with as much noise as
        in training, and in test.
    """
    (x, y), (x_valid, y_valid), (x_test, y_test) = data
    steps = epochs * (TRAINING // BATCH)

    def one(setting):
        init_key, noise_key, order_key = jax.random.split(jax.random.key(setting["seed"]), 3)
        labels = replace(y, noise_key, setting["noise"])
        # There is one set of noisy labels for validation, not one for each seed.
        noisy = replace(y_valid, jax.random.key(1000), setting["noise"])
        smoothing = setting["smoothing"] if name == "label smoothing" else 0.0
        rule, evaluated = optimizer(name, setting, steps)

        def step(carried, batch):
            params, state = carried
            gradients = jax.grad(loss)(params, x[batch], labels[batch], smoothing)
            updates, state = rule.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carried, key):
            order = jax.random.permutation(key, TRAINING).reshape(-1, BATCH)
            carried, _ = jax.lax.scan(step, carried, order)
            weights = evaluated(carried[1], carried[0])
            valid, test = (logits(weights, images).argmax(-1) for images in (x_valid, x_test))
            hits = (valid == y_valid, valid == noisy, test == y_test)
            return carried, 100 * jnp.stack([jnp.mean(one) for one in hits])

        params = initial(init_key)
        return jax.lax.scan(epoch, (params, rule.init(params)), jax.random.split(order_key, epochs))[1]

    return jax.vmap(one)(settings)


def trained(name, epochs, runs):
    """Return test accuracies of some runs, and accuracies in validation and test by the labels for validation.

    With early stopping they are those of the best epoch in validation, else those of the end. Shapes are (runs,).
    """
    padded = runs + runs[:1] * (-len(runs) % TOGETHER)
    columns = {key: np.array([run[key] for run in padded]) for key in padded[0]}
    columns = {key: column.astype("int32" if column.dtype == int else "float32") for key, column in columns.items()}
    data, curves = load(), []
    for first in range(0, len(padded), TOGETHER):
        part = {key: column[first : first + TOGETHER] for key, column in columns.items()}
        curves += [*np.asarray(train(part, data, name=name, epochs=epochs))]
    curves, found = np.array(curves[: len(runs)]), {}
    for column, labels in enumerate(("clean", "noisy")):
        epoch = curves[:, :, column].argmax(axis=1) if "early stopping" in name else epochs - 1
        at = curves[np.arange(len(runs)), epoch]
        found[labels] = {"validation": at[:, column], "test": at[:, 2]}
    return found


def tuned(epochs, rates, tuning_seeds, seeds, name):
    """Return a contender's accuracies over all its settings, and with fresh seeds at the chosen ones."""
    values = CONTENDERS[name]
    settings = [{**DEFAULTS, **value, "rate": rate} for value in values for rate in rates]
    product = itertools.product(NOISES, settings, range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds))
    found = trained(name, epochs, [{**setting, "noise": noise, "seed": seed} for noise, setting, seed in product])
    shape = len(NOISES), len(values), len(rates), tuning_seeds
    result = {
        "name": name,
        "values": values,
        "tuning": {part: found["clean"][part].reshape(shape).round(2).tolist() for part in ("validation", "test")},
    }
    for labels in LABELS:
        at = [DEFAULTS] * len(NOISES)
        if labels != "default":
            means = found[labels]["validation"].reshape(len(NOISES), -1, tuning_seeds).mean(axis=-1)
            at = [settings[index] for index in means.argmax(axis=1)]
        runs = [{**one, "noise": noise, "seed": seed} for one, noise in zip(at, NOISES) for seed in range(seeds)]
        accuracies = trained(name, epochs, runs)["noisy" if labels == "noisy" else "clean"]["test"]
        result[labels] = [
            {"rate": one["rate"], **{key: one[key] for key in values[0]}, "test": test.round(2).tolist()}
            for one, test in zip(at, accuracies.reshape(len(NOISES), seeds))
        ]
    return result


def run(quick):
    """Return the results of the experiment."""
    # Two processes share the cores.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    names = ("constant, early stopping", "Lookahead, tuned") if quick else tuple(CONTENDERS)
    epochs, rates, tuning_seeds, seeds = (2, (0.5, 1.0), 1, 2) if quick else (30, RATES, 3, 20)
    return {
        "noises": NOISES,
        "rates": rates,
        "epochs": epochs,
        "tuning_seeds": tuning_seeds,
        "seeds": seeds,
        "contenders": in_processes(functools.partial(tuned, epochs, rates, tuning_seeds, seeds), names),
    }


def fresh(one, labels="clean"):
    """Return test accuracies with fresh seeds, of shape (noises, seeds), with the settings of one of `LABELS`."""
    return np.array([at["test"] for at in one[labels]])


def expected(validation, test, tries):
    """Return the expected test accuracy of the best in validation among so many settings, drawn with replacement."""
    at = np.arange(len(validation) + 1) / len(validation)
    return float(np.diff(at**tries) @ np.asarray(test)[np.argsort(validation)])


def expected_of(one, noise, tries):
    """Return the expected test accuracy of a contender of which so many settings are tried."""
    means = (np.array(one["tuning"][part][noise]).mean(axis=-1).ravel() for part in ("validation", "test"))
    return expected(*means, tries)


def tables(results):
    """Return the tables of the experiment's page."""
    by_name = {one["name"]: one for one in results["contenders"]}
    noises = range(len(results["noises"]))
    heading = [f"{noise:.0%} noise" for noise in results["noises"]]

    def table(title, cell):
        return markdown([title, *heading], [[name, *(cell(name, noise) for noise in noises)] for name in by_name])

    def ranked(labels):
        means = {name: fresh(one, labels).mean(axis=1) for name, one in by_name.items()}

        def cell(name, noise):
            rank = 1 + sum(other[noise] > means[name][noise] for other in means.values())
            return f"{means[name][noise]:.1f} ± {fresh(by_name[name], labels)[noise].std(ddof=1):.1f} ({rank})"

        return table("test accuracy in % (rank)", cell)

    def differences(pairs, labels):
        rows = []
        for pair in pairs:
            if by_name.keys() >= {*pair}:
                both = zip(*(fresh(by_name[name], labels) for name in pair))
                rows.append([" - ".join(pair), *(in_words(paired(*values)) for values in both)])
        return markdown(["difference", *heading], rows)

    def chosen(name, noise):
        return ", ".join(f"{value:g}" for key, value in by_name[name]["clean"][noise].items() if key != "test")

    def cost(name, noise):
        of_tries = [expected_of(by_name[name], noise, tries) for tries in TRIES]
        return " / ".join(f"{one:.1f}" for one in (fresh(by_name[name], "default")[noise].mean(), *of_tries))

    return {
        "ranks": ranked("clean"),
        "noisy": ranked("noisy"),
        "pairs": differences(PAIRS, "clean"),
        "untuned": differences(UNTUNED_PAIRS, "default"),
        "chosen": table("effective rate, second setting", chosen),
        "cost": table(f"default / expected of {', '.join(map(str, TRIES))} tries", cost),
    }


def plots(results):
    """Return the picture of the page: accuracy over learning rates, and over the number of settings tried."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, len(results["noises"]), sharey="col")
    for noise, (over_rates, over_tries) in enumerate(panels.T):
        highest = max(fresh(one)[noise].mean() for one in results["contenders"])
        for one in results["contenders"]:
            style = dict(zip(("color", "linestyle"), STYLES[one["name"]]), label=one["name"], linewidth=1.2)
            default = next(index for index, value in enumerate(one["values"]) if {**DEFAULTS, **value} == DEFAULTS)
            over_rates.semilogx(results["rates"], np.mean(one["tuning"]["test"][noise][default], axis=-1), **style)
            tries = np.arange(1, len(one["values"]) * len(results["rates"]) + 1)
            over_tries.semilogx(tries, [expected_of(one, noise, count) for count in tries], **style)
        over_rates.set(title=f"{results['noises'][noise]:.0%} label noise", xlabel="effective learning rate")
        over_tries.set(xlabel="settings tried", ylim=(highest - (6 if noise == 0 else 14), highest + 1))
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy (%): higher is better")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return {"accuracies": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "scikit-learn", "numpy"])
