"""A deterministic quadratic: convergence rate against condition number, for heavy ball bare and in Lookahead.

Measured with the PyTorch front end, in float64, against the spectral radius of the map that a cycle is (the paper's
section 3.2). Learning rates are tuned on both sides, and in one of the cases momentum too.
"""

import math
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track
from scipy.optimize import minimize

from common import BARE, SLOW, command, markdown
from lookahead_optim.torch import Lookahead

STEP_SIZE = 0.5
MODES = {"heavy ball": 0, "Lookahead, k = 5": 5, "Lookahead, k = 20": 20}
MOMENTA = {"momentum 0.9": 0.9, "momentum 0.99": 0.99, "momentum tuned": None}


def curvatures(condition, count=33):
    """Return curvatures between 1 / condition and 1; convergence is as slow as in the slowest of them."""
    return np.geomspace(1 / condition, 1, count)


def rates(learning_rate, momentum, period, eigenvalues):
    """Return the factor by which the error shrinks in a step, in each direction: spectral radius ^ (1 / period)."""
    # v <- momentum v + curvature x, then x <- x - learning_rate v; columns are x and v.
    one = np.ones_like(eigenvalues)
    step = np.array(
        [[one - learning_rate * eigenvalues, -learning_rate * momentum * one], [eigenvalues, momentum * one]]
    ).transpose(2, 0, 1)
    if period:
        step = np.diag([STEP_SIZE, 1]) @ np.linalg.matrix_power(step, period) + np.diag([1 - STEP_SIZE, 0])
    half = (step[:, 0, 0] + step[:, 1, 1]) / 2
    determinant = step[:, 0, 0] * step[:, 1, 1] - step[:, 0, 1] * step[:, 1, 0]
    inside = half**2 - determinant
    radius = np.where(inside >= 0, np.abs(half) + np.sqrt(np.abs(inside)), np.sqrt(np.abs(determinant)))
    return radius ** (1 / max(period, 1))


def tuned(momentum, period, condition):
    """Return the learning rate and momentum of the best worst-case rate, and that rate."""

    def worst(settings, count):
        learning_rate = math.exp(settings[0])
        beta = momentum if momentum is not None else 1 - math.exp(settings[1])
        if not 0 <= beta < 1:
            return 2.0
        with np.errstate(all="ignore"):
            found = rates(learning_rate, beta, period, curvatures(condition, count)).max()
        return found if np.isfinite(found) else 2.0

    starts = [
        (math.log(rate), math.log(1 - beta))
        for rate in np.geomspace(1e-3, 4, 80)
        for beta in ([momentum] if momentum is not None else 1 - np.geomspace(0.003, 0.95, 32))
    ]
    # The worst case has many valleys; the best of several descents is taken.
    starts = sorted(starts, key=lambda settings: worst(settings, 65))[:8]
    options = {"xatol": 1e-6, "fatol": 1e-12, "maxiter": 400}
    found = [minimize(worst, start, (500,), method="Nelder-Mead", options=options).x for start in starts]
    best = min([*found, *starts], key=lambda settings: worst(settings, 500))
    beta = momentum if momentum is not None else 1 - math.exp(best[1])
    return math.exp(best[0]), beta, worst(best, 500)


def measured_rate(learning_rate, momentum, period, condition, rate, most):
    """Return the factor by which the error shrinks in a step, over a long run of the library."""
    eigenvalues = torch.tensor(curvatures(condition, 500))
    x = torch.nn.Parameter(torch.ones_like(eigenvalues))
    inner = torch.optim.SGD([x], lr=learning_rate, momentum=momentum)
    optimizer = Lookahead(inner, period, STEP_SIZE) if period else inner
    # From the loss of 60 powers of e to that of 600, as far as that takes no more steps than these.
    decay = -math.log(rate)
    cycle = max(period, 1)
    last = min(most, int(600 / decay)) // cycle * cycle
    # The error oscillates: its largest value over some cycles says how far it has come.
    window = 20 * cycle
    first = max(last // 10 // cycle * cycle, window)
    largest = {first: 0.0, last: 0.0}
    for step in range(1, last + 1):
        x.grad = eigenvalues * x.detach()
        optimizer.step()
        for end in largest:
            if end - window < step <= end and step % cycle == 0:
                largest[end] = max(largest[end], float(x.detach().abs().max()))
    return (largest[last] / largest[first]) ** (1 / (last - first))


def run(quick):
    """Return the results of the experiment."""
    conditions = [10.0, 100.0] if quick else np.geomspace(3, 3000, 13).round(2).tolist()
    cases = [(label, condition, mode) for label in MOMENTA for condition in conditions for mode in MODES]
    found = []
    for label, condition, mode in track(cases, "Rates"):
        learning_rate, momentum, rate = tuned(MOMENTA[label], MODES[mode], condition)
        most = 4000 if quick else 20_000
        found.append(
            {
                "case": label,
                "condition": condition,
                "mode": mode,
                "learning_rate": learning_rate,
                "momentum": momentum,
                "rate": float(rate),
                "measured": measured_rate(learning_rate, momentum, MODES[mode], condition, rate, most),
            }
        )
    return found


def folds(rate):
    """Return the powers of e by which the error shrinks in a step, in words."""
    return f"{-math.log(rate):.5f}"


def tables(results):
    """Return the tables of the experiment's page."""
    shown = sorted({one["condition"] for one in results})
    shown = shown[:: max(1, len(shown) // 4)]
    rows = []
    for label in MOMENTA:
        for condition in shown:
            chosen = {one["mode"]: one for one in results if (one["case"], one["condition"]) == (label, condition)}
            cells = [f"{folds(chosen[mode]['rate'])}, {folds(chosen[mode]['measured'])}" for mode in MODES]
            rows.append([label, f"{condition:g}", *cells])
    deviation = max(abs(math.log(one["measured"]) / math.log(one["rate"]) - 1) for one in results)
    return {
        "rates": markdown(["case", "condition number", *(f"{mode}: closed form, measured" for mode in MODES)], rows),
        "deviation": f"Largest relative deviation of a measured -log(rate) from the closed form: {deviation:.2%}.\n",
    }


def plots(results):
    """Return the figures of the experiment's page."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    for axes, label in zip(figure.subplots(1, len(MOMENTA), sharey=True), MOMENTA):
        for mode, color in zip(MODES, (BARE, SLOW, "#009E73")):
            line = [one for one in results if (one["case"], one["mode"]) == (label, mode)]
            conditions = [one["condition"] for one in line]
            axes.loglog(conditions, [-math.log(one["rate"]) for one in line], color=color, linewidth=1, label=mode)
            axes.loglog(conditions, [-math.log(one["measured"]) for one in line], ".", color=color)
        axes.set(title=label, xlabel="condition number")
    figure.axes[0].set_ylabel("-log(rate): higher is better")
    figure.axes[0].legend()
    return {"rates": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch", "numpy", "scipy"])
