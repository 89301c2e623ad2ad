"""Sensitivity to the learning rate as a number: how much of a ladder of learning rates is good enough.

The area, on the logarithmic axis of learning rates, where a training ends within x of the best: bare against wrapped,
for every other experiment that has a ladder. It is computed from their results alone, so it must be the last to run.
"""

import functools
import json
import sys

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from common import BARE, FOLDER, SLOW, command, in_words, markdown

# The tasks. Scores have the shape (other settings, learning rates, seeds), and higher is better.


def task(group, name, rates, within, unit, bare, wrapped):
    """Return a task: what it is called, its learning rates, x with its unit, and the scores of both sides."""
    bare, wrapped = np.array(bare, "float64"), np.array(wrapped, "float64")
    return {"group": group, "name": name, "rates": rates, "within": within, "unit": unit} | {
        side: np.where(np.isnan(scores), -np.inf, scores) for side, scores in (("bare", bare), ("wrapped", wrapped))
    }


def of_digits(results):
    """Return the tasks of `digits`, whose other setting is the momentum."""
    for case, found in results["inner"].items():
        scores = found["bare"]["bare, test"], found["wrapped"]["slow, test"]
        yield task(
            "digits",
            f"{case}, Lookahead(5, 0.5)",
            results["rates"],
            2,
            "points",
            *(np.swapaxes(s, 0, 1) for s in scores),
        )


def of_label_noise(results):
    """Return the tasks of `label_noise`: over the momentum, too, and with cosine decay at momentum 0.9."""
    scores = {one["name"]: np.array(one["tuning"]["test"]) for one in results["contenders"]}
    (cosine,) = (one["values"] for one in results["contenders"] if one["name"] == "cosine")
    at = [one["momentum"] for one in cosine].index(0.9)
    for index, noise in enumerate(results["noises"]):
        sides = scores["constant"][index], scores["Lookahead(6, 0.5)"][index]
        yield task("label noise", f"{noise:.0%}, constant, Lookahead(6, 0.5)", results["rates"], 2, "points", *sides)
        sides = scores["cosine"][index][[at]], scores["Lookahead, tuned, cosine"][index][[0]]
        yield task("label noise", f"{noise:.0%}, cosine, Lookahead(6, 0.5)", results["rates"], 2, "points", *sides)


def of_characters(results):
    """Return the tasks of `characters`."""
    for schedule in ("constant", "decayed"):
        last = {name: -np.array(results[schedule][name], "float64")[None, :, :, -1] for name in ("bare", "slow")}
        yield task("characters", f"{schedule}, Lookahead(5, 0.5)", results["rates"], 0.1, "nats", *last.values())


def of_batch_sizes(results):
    """Return the tasks of `batch_sizes`, whose ladders have one seed."""
    found = {
        (one["optimizer"], one["batch"]): -np.array(one["tuning"], "float64")[None, :, None] for one in results["runs"]
    }
    for batch, rates in results["ladders"].items():
        for name in dict.fromkeys(name for name, _ in found if name != "AdamW"):
            sides = found["AdamW", int(batch)], found[name, int(batch)]
            yield task("batch sizes", f"{batch} pieces, {name}", rates, 0.1, "nats", *sides)


def of_bfloat16(results):
    """Return the tasks of `bfloat16` in float32, whose ladders have one seed."""
    found = {
        one["optimizer"]: -np.array(one["tuning"], "float64")[None, :, None]
        for one in results["runs"]
        if one["dtypes"] == "float32"
    }
    for name in dict.fromkeys(found):
        if name != "AdamW":
            yield task("batches of 8, longer", name, results["rates"], 0.1, "nats", found["AdamW"], found[name])


def of_adversarial(results):
    """Return the tasks of `adversarial` with Lookahead on both players.

    Scores are logarithms of distances, each a mean over the last quarter of a run.
    """
    ends = {
        (one["way"], weights, one["rate"]): np.array(curves, "float64")[:, -len(curves[0]) // 4 :].mean(axis=1)
        for one in results["tuning"]
        for weights, curves in one["curves"].items()
    }
    for way in ("k = 5", "k = 50", "k = 500", "k = 2000", "k = 5 in k = 500"):
        sides = (("bare", "bare"), (way, "slow"))
        scores = ([[-np.log(ends[(*side, rate)]) for rate in results["rates"]]] for side in sides)
        yield task("adversarial", way, results["rates"], 0.25, "of ln distance", *scores)


SOURCES = {
    "digits": of_digits,
    "label_noise": of_label_noise,
    "characters": of_characters,
    "batch_sizes": of_batch_sizes,
    "bfloat16": of_bfloat16,
    "adversarial": of_adversarial,
}


# The measure.


def share(rates, scores, bar):
    """Return the part of a ladder where scores reach a bar, interpolated linearly in the logarithm of the rate.

    Args:
        rates: Learning rates, ascending.
        scores: Array of shape (..., settings, rates); a mean is taken over the settings.
        bar: Array of shape (...).

    Returns:
        Array of shape (...), from 0 to 1.
    """
    bar = np.asarray(bar)[..., None, None]
    high, low = (function(scores[..., :-1], scores[..., 1:]) for function in (np.maximum, np.minimum))
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(low >= bar, 1.0, np.where(high < bar, 0.0, (high - bar) / (high - low)))
    weights = np.diff(np.log(rates))
    return (inside @ (weights / weights.sum())).mean(axis=-1)


def shares(one, seeds):
    """Return, for arrays of seeds of shape (..., seeds), the shares of both sides by what they are compared with.

    Within x of the best of the same side, and within x of the best of both.
    """
    means = {side: np.moveaxis(one[side][:, :, seeds].mean(axis=-1), (0, 1), (-2, -1)) for side in ("bare", "wrapped")}
    best = {side: values.max(axis=(-2, -1)) for side, values in means.items()}
    of_both = np.maximum(best["bare"], best["wrapped"])
    found = {}
    for side, values in means.items():
        found["own", side] = share(one["rates"], values, best[side] - one["within"])
        found["both", side] = share(one["rates"], values, of_both - one["within"])
    for best in ("own", "both"):
        found[best, "difference"] = found[best, "wrapped"] - found[best, "bare"]
    return found


def measured(one):
    """Return all shares of a task with their 95% intervals, by bootstrap over seeds, and what its ladder cuts off."""
    seeds = np.arange(one["bare"].shape[-1])
    result = {name: one[name] for name in ("group", "name", "within", "unit")} | {"seeds": len(seeds)}
    result["ladder"] = [one["rates"][0], one["rates"][-1], len(one["rates"])]
    for key, value in shares(one, seeds).items():
        ends = None, None
        if len(seeds) > 1:
            of_resampled = functools.partial(_of_resampled, one, key)
            settings = {"method": "percentile", "rng": np.random.default_rng(0), "n_resamples": 2000}
            interval = scipy.stats.bootstrap((seeds,), of_resampled, **settings).confidence_interval
            ends = round(float(interval.low), 4), round(float(interval.high), 4)
        result[", ".join(key)] = [round(float(value), 4), *ends]
    for side in ("bare", "wrapped"):
        means = one[side].mean(axis=-1)
        good = (means >= means.max() - one["within"]).any(axis=0)
        result[f"cut, {side}"] = [bool(good[0]), bool(good[-1])]
    return result


def _of_resampled(one, key, seeds, axis):
    return shares(one, np.moveaxis(seeds, axis, -1))[key]


def run(quick):
    """Return the results of the experiment, from the committed results of others; it takes no longer than `quick`."""
    found = []
    for name, tasks in SOURCES.items():
        path = FOLDER / "results" / f"{name}.json"
        if path.exists():
            found += [measured(one) for one in tasks(json.loads(path.read_text())["results"])]
    return found


def of_differences(results, best):
    """Return how many tasks have a larger share wrapped, a smaller one, an interval with 0, and one seed."""
    ends = [one[f"{best}, difference"][1:] for one in results if one["seeds"] > 1]
    larger, smaller = sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)
    return larger, smaller, len(ends) - larger - smaller, len(results) - len(ends)


def tables(results):
    """Return the tables of the experiment's page."""
    rows, counts = [], []
    for one in results:
        cells = []
        for best in ("own", "both"):
            cells += [f"{one[f'{best}, {side}'][0]:.0%}" for side in ("bare", "wrapped")]
            difference = 100 * np.array(one[f"{best}, difference"], "float64")
            cells.append(f"{difference[0]:+.0f}" if one["seeds"] == 1 else in_words(difference, 0))
        names = {(False, False): "-", (True, False): "low", (False, True): "high", (True, True): "both"}
        cut = " / ".join(names[tuple(one[f"cut, {side}"])] for side in ("bare", "wrapped"))
        low, high, number = one["ladder"]
        about = f"{one['within']:g} {one['unit']}", f"{low:g} to {high:g} ({number})", one["seeds"]
        rows.append([f"{one['group']}: {one['name']}", *about, *cells, cut])
    for best, what in (("own", "best of the same side"), ("both", "best of both sides")):
        counts.append([what, *of_differences(results, best)])
    columns = "bare", "wrapped", "difference"
    headings = [f"{column}, {best} best" for best in ("own", "common") for column in columns]
    return {
        "shares": markdown(["task", "x", "ladder", "seeds", *headings, "good at an end"], rows),
        "counts": markdown(
            ["within x of the", "larger wrapped", "smaller wrapped", "no difference", "one seed"], counts
        ),
    }


def plots(results):
    """Return the figure of the experiment's page: a pair of bars for each task."""
    figure = Figure(figsize=(10, 1 + 0.32 * len(results)), layout="constrained")
    at = np.arange(len(results))[::-1]
    for axes, best, what in zip(figure.subplots(1, 2, sharey=True), ("own", "both"), ("the same side", "both sides")):
        for side, color, shift in (("bare", BARE, 0.19), ("wrapped", SLOW, -0.19)):
            value, low, high = np.array([one[f"{best}, {side}"] for one in results], "float64").T
            ends = [np.nan_to_num(np.maximum(value - low, 0)), np.nan_to_num(np.maximum(high - value, 0))]
            axes.barh(at + shift, value, 0.36, xerr=ends, color=color, label=side, error_kw={"linewidth": 1})
        axes.set(xlim=(0, 1), xlabel="part of the ladder", title=f"within x of the best of {what}")
        axes.grid(axis="y", visible=False)
    figure.axes[0].set_yticks(at, [f"{one['group']}: {one['name']}" for one in results], fontsize=7)
    figure.axes[0].legend(loc="lower right")
    return {"shares": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["numpy", "scipy"])
