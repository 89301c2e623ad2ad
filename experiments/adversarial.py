"""Lookahead-minmax on scanned digits: a small GAN, with Adam bare, with both players in Lookahead, and with EMA.

Generator and discriminator are trained in turn, with one learning rate for both. Quality is the Fréchet distance
between held-out and generated images, in features of a small classifier of the digits. The method is that of
Chavdarova et al. 2021, arXiv 2006.14567. With the Optax front end.
"""

import functools
import itertools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, command, in_processes, in_words, markdown, paired
from digits import initial, load, logits
from lookahead_optim.optax import lookahead, slow_params

NOISE, WIDTH, BATCH, GENERATED = 16, 64, 32, 2000
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
SEEDS_TO_TUNE, SEEDS = (0, 1, 2, 3, 4), (10, 11, 12, 13, 14, 15, 16, 17)
DECAYS = {"EMA 0.99": 0.99, "EMA 0.999": 0.999}
# Sync periods from the inside out, and what is synchronised: both players together, each by an optimizer of its own, or
# the generator alone.
WAYS = {
    "bare": ((), "both"),
    "k = 5": ((5,), "both"),
    "k = 50": ((50,), "both"),
    "k = 500": ((500,), "both"),
    "k = 2000": ((2000,), "both"),
    "k = 5 in k = 500": ((5, 500), "both"),
    "k = 5, two optimizers": ((5,), "each"),
    "k = 500, generator alone": ((500,), "generator"),
}
# Ways whose steps are timed: without a sync, with the most, with few, and nested.
TIMED = ("bare", "k = 5", "k = 500", "k = 5 in k = 500")
# Quality is measured so many times in a run, and compared in the mean over the last quarter. Most runs have a sync
# then, so that the fast weights are those of a step before.
TIMES = 20
LAST = TIMES // 4


# --- The distance


def frechet(x, y):
    """Return the Fréchet distance between Gaussians fitted to two samples, arrays of shape (samples, features)."""
    (mean_x, covariance_x), (mean_y, covariance_y) = ((one.mean(0), np.cov(one, rowvar=False)) for one in (x, y))
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    return float(np.sum((mean_x - mean_y) ** 2) + np.trace(covariance_x + covariance_y - 2 * root))


@jax.jit
def features(classifier, images):
    """Return the last hidden layer of the classifier before its ReLU, of shape (images, 32)."""
    return logits(classifier[:-1], images)


@functools.cache
def real():
    """Return the training images, a classifier trained on them, and what it says of held-out images.

    These are its features, its accuracy in %, and the distances of two other samples: the training images themselves,
    and images from a Gaussian in the space of pixels, which an adversarial training should surpass.
    """
    (x, y), (x_valid, y_valid), (x_test, y_test) = load()
    held_out, labels = np.concatenate([x_valid, x_test]), np.concatenate([y_valid, y_test])
    optimizer = optax.adam(1e-3)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def step(carried, _):
        params, state = carried
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=500)[0][0]

    classifier = train(initial(jax.random.key(0)))
    of_held_out = np.asarray(features(classifier, held_out), "float64")
    pixels = np.random.default_rng(0).multivariate_normal(x.mean(0), np.cov(x, rowvar=False), GENERATED).clip(0, 1)
    return {
        "images": x,
        "classifier": classifier,
        "features": of_held_out,
        "accuracy": 100 * float(jnp.mean(logits(classifier, held_out).argmax(-1) == labels)),
        "of_training_images": frechet(np.asarray(features(classifier, x), "float64"), of_held_out),
        "of_gaussian": frechet(np.asarray(features(classifier, pixels.astype("float32")), "float64"), of_held_out),
    }


def distance(generator):
    """Return the distance between images of a generator and held-out ones. `None` stands for one that is not finite."""
    found = real()
    images = generated(generator, jax.random.normal(jax.random.key(1), (GENERATED, NOISE)))
    of_generated = np.asarray(features(found["classifier"], images), "float64")
    return round(frechet(of_generated, found["features"]), 2) if np.isfinite(of_generated).all() else None


# --- The players


def network(key, sizes):
    """Return the weights of a new network."""
    return [
        {"w": jax.random.normal(key, (inputs, outputs)) * np.sqrt(2 / inputs), "b": jnp.zeros(outputs)}
        for key, inputs, outputs in zip(jax.random.split(key, len(sizes) - 1), sizes, sizes[1:])
    ]


def outputs(params, x):
    """Return the outputs of a network."""
    for layer in params[:-1]:
        x = jax.nn.leaky_relu(x @ layer["w"] + layer["b"], 0.2)
    return x @ params[-1]["w"] + params[-1]["b"]


@jax.jit
def generated(generator, noise):
    """Return images of shape (images, 64)."""
    return jax.nn.sigmoid(outputs(generator, noise))


def new_players(seed):
    """Return the weights of both players."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "generator": network(keys[0], (NOISE, WIDTH, WIDTH, 64)),
        "discriminator": network(keys[1], (64, WIDTH, WIDTH, 1)),
    }


# --- Training


def wrapped(optimizer, periods):
    """Return an optimizer in a Lookahead for each period."""
    for period in periods:
        optimizer = lookahead(optimizer, period, 0.5)
    return optimizer


@functools.cache
def compiled(way):
    """Return a compiled function that makes some steps with both players, and one that begins."""
    periods, what = WAYS[way]
    # A Lookahead around nothing is given the moves of both players, and synchronises both after them (Algorithm 1).
    joint = wrapped(optax.identity(), periods if what == "both" else ())

    def optimizers(rate):
        adam = optax.adam(rate, b1=0.5)
        of_each = {"discriminator": what == "each", "generator": what in ("each", "generator")}
        return {player: wrapped(adam, periods if is_wrapped else ()) for player, is_wrapped in of_each.items()}

    @jax.jit
    def begin(rate, seed):
        players = new_players(seed)
        states = {player: one.init(players[player]) for player, one in optimizers(rate).items()}
        return players, states, joint.init(players), dict.fromkeys(DECAYS, players["generator"])

    @jax.jit
    def train(rate, carried, images, key, first, end):
        def moved(player, players, states, loss):
            gradients = jax.grad(lambda params: loss({**players, player: params}))(players[player])
            updates, state = optimizers(rate)[player].update(gradients, states[player], players[player])
            return {**players, player: optax.apply_updates(players[player], updates)}, {**states, player: state}

        def step(index, carried):
            before, states, state, averages = carried
            keys = jax.random.split(jax.random.fold_in(key, index), 3)
            batch = images[jax.random.randint(keys[0], (BATCH,), 0, len(images))]
            fake = generated(before["generator"], jax.random.normal(keys[1], (BATCH, NOISE)))
            noise = jax.random.normal(keys[2], (BATCH, NOISE))

            def loss_of_discriminator(players):
                right = outputs(players["discriminator"], batch), -outputs(players["discriminator"], fake)
                return sum(jnp.mean(jax.nn.softplus(-one)) for one in right)

            def loss_of_generator(players):
                answers = outputs(players["discriminator"], generated(players["generator"], noise))
                return jnp.mean(jax.nn.softplus(-answers))

            players, states = moved("discriminator", before, states, loss_of_discriminator)
            players, states = moved("generator", players, states, loss_of_generator)
            updates, state = joint.update(optax.tree.sub(players, before), state, before)
            players = optax.apply_updates(before, updates)
            averages = {
                name: optax.incremental_update(players["generator"], averages[name], 1 - decay)
                for name, decay in DECAYS.items()
            }
            return players, states, state, averages

        return jax.lax.fori_loop(first, end, step, carried)

    return begin, train


def curves(way, rate, steps, seed):
    """Return distances at equal distances of time, by the weights of the generator that are evaluated."""
    begin, train = compiled(way)
    images, key = jnp.asarray(real()["images"]), jax.random.key(1000 + seed)
    carried, found = begin(rate, seed), {}
    for part in range(TIMES):
        first, end = part * steps // TIMES, (part + 1) * steps // TIMES
        before_sync = train(rate, carried, images, key, first, end - 1)
        carried = train(rate, before_sync, images, key, end - 1, end)
        players, states, state, averages = carried
        periods, what = WAYS[way]
        if not periods:
            own = {"bare": players["generator"]}
        elif what == "both":
            own = {"fast": before_sync[0]["generator"], "slow": slow_params(state, players)["generator"]}
        else:
            slow = slow_params(states["generator"], players["generator"])
            own = {"fast": before_sync[0]["generator"], "slow": slow}
        for weights, generator in {**own, **averages}.items():
            found.setdefault(weights, []).append(distance(generator))
    return found


def trained(steps, seeds, task):
    """Return a way and a learning rate with its curves, one for each seed."""
    way, rate = task
    found = [curves(way, rate, steps, seed) for seed in seeds]
    return {"way": way, "rate": rate, "curves": {weights: [one[weights] for one in found] for weights in found[0]}}


def seconds(ways, steps, turns):
    """Return the seconds of each turn of so many steps, for each way; in each turn all ways have theirs one by one."""
    images, key, rate = jnp.asarray(real()["images"]), jax.random.key(0), 1e-3
    carried, found = {}, {way: [] for way in ways}
    for turn in range(-1, turns):
        for way in ways:
            begin, train = compiled(way)
            start = time.perf_counter()
            carried[way] = train(rate, carried.get(way) or begin(rate, 0), images, key, 0, steps)
            jax.block_until_ready(carried[way])
            # The first turn compiles.
            if turn >= 0:
                found[way].append(round(time.perf_counter() - start, 5))
    return found


def best_rates(tuning):
    """Return the ways with the learning rates that are best for any weights of theirs, each once."""
    weights_of = {one["way"]: list(one["curves"]) for one in tuning}
    found = [(way, best_rate(tuning, way, weights)) for way, of_way in weights_of.items() for weights in of_way]
    return list(dict.fromkeys(found))


def run(quick):
    """Return the results of the experiment."""
    # Two processes share the cores.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    steps, ways, rates, seeds_to_tune, seeds = 10_000, WAYS, RATES, SEEDS_TO_TUNE, SEEDS
    if quick:
        steps, ways, rates, seeds_to_tune, seeds = 200, ("bare", "k = 5"), RATES[2:3], (0,), (10, 11)
    each = (lambda function, tasks: list(map(function, tasks))) if quick else in_processes
    timed = {
        "steps": min(steps, 500),
        "of_turns": seconds(TIMED[: 2 if quick else None], min(steps, 500), 2 if quick else 15),
    }
    tuning = each(functools.partial(trained, steps, seeds_to_tune), list(itertools.product(ways, rates)))
    runs = each(functools.partial(trained, steps, seeds), best_rates(tuning))
    references = {name: round(real()[name], 3) for name in ("accuracy", "of_training_images", "of_gaussian")}
    settings = {"steps": steps, "rates": rates, "seeds_to_tune": seeds_to_tune, "seeds": seeds}
    return {**settings, **references, "seconds": timed, "tuning": tuning, "runs": runs}


def at_end(curves):
    """Return the mean over the last quarter of each curve. It is infinite where a distance was not finite."""
    values = np.array(curves, "float64")[..., -LAST:].mean(axis=-1)
    return np.where(np.isnan(values), np.inf, values)


def best_rate(tuning, way, weights):
    """Return the learning rate of a way that is best with the seeds to tune."""
    runs = [one for one in tuning if one["way"] == way]
    return min(runs, key=lambda one: at_end(one["curves"][weights]).mean())["rate"]


def chosen(results, way, weights):
    """Return the best learning rate, and the curves of the other seeds at that rate."""
    rate = best_rate(results["tuning"], way, weights)
    (found,) = [one for one in results["runs"] if (one["way"], one["rate"]) == (way, rate)]
    return rate, found["curves"][weights]


def failed(results, way, weights):
    """Return how many runs at any learning rate end no better than a Gaussian in the space of pixels, and of how many.

    Distances that are not finite count, too.
    """
    ends = np.concatenate([at_end(one["curves"][weights]) for one in results["tuning"] if one["way"] == way])
    return int(np.sum(ends >= results["of_gaussian"])), len(ends)


def ways_and_weights(results):
    """Return all ways to train that were run, each with all weights that were evaluated."""
    found = {one["way"]: list(one["curves"]) for one in results["runs"]}
    return [(way, weights) for way, of_way in found.items() for weights in of_way]


def end(results, way, weights):
    """Return the distance at the end for each seed, at its learning rate."""
    return at_end(chosen(results, way, weights)[1])


def times(results):
    """Return rows with the seconds of a training for each way that was timed, and their ratio to bare, by turns."""
    of_turns = {way: np.array(one) for way, one in results["seconds"]["of_turns"].items()}
    rows = []
    for way, one in of_turns.items():
        low, ratio, high = np.quantile(one / of_turns["bare"], (0.25, 0.5, 0.75))
        whole = np.median(one) / results["seconds"]["steps"] * results["steps"]
        rows.append([way, f"{whole:.1f}", "" if way == "bare" else f"{ratio:.2f} ({low:.2f} to {high:.2f})"])
    return rows


def tables(results):
    """Return the tables of the experiment's page."""
    rows, over_rates = [], []
    bare, average = (end(results, "bare", weights) for weights in ("bare", "EMA 0.999"))
    for way, weights in ways_and_weights(results):
        rate, curves = chosen(results, way, weights)
        ends, best = at_end(curves), np.array(curves, "float64").min(axis=-1)
        if way == "bare" or weights != "EMA 0.99":
            row = [way, "fast" if weights == "bare" else weights, f"{rate:g}"]
            row += [f"{ends.mean():.2f} ± {ends.std(ddof=1):.2f}"]
            row += ["" if np.array_equal(ends, one) else in_words(paired(ends, one)) for one in (bare, average)]
            rows.append([*row, f"{best.mean():.2f}", "{} of {}".format(*failed(results, way, weights))])
        if weights in ("bare", "slow") or way == "bare":
            runs = [one for one in results["tuning"] if one["way"] == way]
            means = [at_end(one["curves"][weights]).mean() for one in runs]
            over_rates.append([way, "fast" if weights == "bare" else weights, *(f"{one:.2f}" for one in means)])
    order = {}
    if "k = 5, two optimizers" in {one["way"] for one in results["runs"]}:
        difference = paired(end(results, "k = 5, two optimizers", "slow"), end(results, "k = 5", "slow"))
        order["order"] = f"Two optimizers minus one sync for both, slow weights, k = 5: {in_words(difference)}.\n"
    return {
        **order,
        "tuned": markdown(
            ["", "weights", "rate", "distance", "minus bare", "minus EMA 0.999", "best in training", "failed"], rows
        ),
        "rates": markdown(["", "weights", *(f"{rate:g}" for rate in results["rates"])], over_rates),
        "seconds": markdown(["", "seconds of a training", "divided by bare"], times(results)),
        "references": f"The classifier is right on {results['accuracy']:.1f}% of the held-out images. The distance is "
        f"{results['of_training_images']:.2f} for the training images themselves, and {results['of_gaussian']:.2f} for "
        "images from a Gaussian in the space of pixels.\n",
    }


def plots(results):
    """Return the figure of the experiment's page."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = {
        ("bare", "bare"): (BARE, "-"),
        ("bare", "EMA 0.999"): (BARE, ":"),
        ("k = 5", "slow"): (FAST, "-"),
        ("k = 50", "slow"): (SLOW, "-"),
        ("k = 500", "slow"): ("#009E73", "-"),
        ("k = 500", "EMA 0.999"): ("#009E73", ":"),
        ("k = 5 in k = 500", "slow"): ("0.2", "-"),
        ("k = 500, generator alone", "slow"): ("0.6", "-"),
    }
    steps = np.arange(1, TIMES + 1) * results["steps"] / TIMES
    for (way, weights), (color, style) in shown.items():
        if (way, weights) not in ways_and_weights(results):
            continue
        label = way if weights == "bare" else f"{way}, {weights}"
        _, curves = chosen(results, way, weights)
        left.semilogy(steps, np.mean(curves, axis=0), style, color=color, linewidth=1.2, label=label)
        runs = [one for one in results["tuning"] if one["way"] == way]
        ends = [at_end(one["curves"][weights]).mean() for one in runs]
        right.loglog([one["rate"] for one in runs], ends, style, color=color, linewidth=1.2, marker=".")
    left.set(xlabel="steps", ylabel="Fréchet distance", title="at the best learning rate: lower is better")
    right.set(xlabel="learning rate", title="mean over the last quarter of the training")
    right.axhline(results["of_gaussian"], color="0.5", linestyle="--", linewidth=0.8)
    left.legend(fontsize=7)
    return {"distances": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "scikit-learn", "scipy", "numpy"])
