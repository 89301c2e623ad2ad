"""The bilinear game x y: where simultaneous gradient descent in Lookahead converges, over period and step size.

Bare, the game diverges at every learning rate. Measured with the PyTorch front end, in float64, against the closed form
|1 - alpha + alpha (1 + i gamma)^k| for a cycle. That Lookahead can make such games converge is the claim of Chavdarova
et al. 2021, arXiv 2006.14567.
"""

import math
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track

from common import BARE, FAST, SLOW, command, markdown
from lookahead_optim.torch import Lookahead

LEARNING_RATE = 0.1


def rate(period, step_size):
    """Return the factor by which the distance from the equilibrium grows in a step."""
    return abs(1 - step_size + step_size * (1 + LEARNING_RATE * 1j) ** period) ** (1 / period)


def play(period, step_size, steps):
    """Return the players' weights at the start and after each step, an array of shape (steps + 1, 2)."""
    x, y = (torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(2))
    optimizer = Lookahead(torch.optim.SGD([x, y], lr=LEARNING_RATE), period, step_size)
    path = [(x.item(), y.item())]
    for _ in range(steps):
        # x makes x y small, y makes it large, each from the other's last weight.
        x.grad, y.grad = y.detach().clone(), -x.detach()
        optimizer.step()
        path.append((x.item(), y.item()))
    return np.array(path)


def run(quick):
    """Return the results of the experiment."""
    periods = (1, 5, 60) if quick else (1, 2, 3, 5, 8, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 70, 80)
    step_sizes = (0.5,) if quick else np.linspace(0.1, 1, 10).round(1).tolist()
    cycles = 4
    grid = []
    for period in track(periods, "Games"):
        for step_size in step_sizes:
            path = play(period, step_size, cycles * period)
            grown = np.linalg.norm(path[-1]) / np.linalg.norm(path[0])
            grid.append(
                {"period": period, "step_size": step_size, "rate": rate(period, step_size),
                 "measured": float(grown ** (1 / (cycles * period)))}
            )  # fmt: skip
    steps = 60 if quick else 300
    paths = {
        "bare": play(0, 1.0, steps).round(5).tolist(),
        "k = 5": play(5, 0.5, steps).round(5).tolist(),
        "k = 20": play(20, 0.5, steps).round(5).tolist(),
        "k = 60": play(60, 0.5, steps).round(5).tolist(),
    }
    return {"grid": grid, "paths": paths}


def converges(value):
    """Say whether a game with this rate converges."""
    return "converges" if value < 1 else "diverges"


def tables(results):
    """Return the tables of the experiment's page."""
    grid = results["grid"]
    rows = [
        [one["period"], f"{one['rate']:.10f}", f"{one['measured']:.10f}", converges(one["measured"])]
        for one in grid
        if one["step_size"] == 0.5
    ]
    deviation = max(abs(one["measured"] - one["rate"]) for one in grid)
    agree = sum(converges(one["measured"]) == converges(one["rate"]) for one in grid)
    best = min(grid, key=lambda one: one["measured"])
    return {
        "rates": markdown(["k", "closed form", "measured", ""], rows),
        "deviation": f"Largest deviation from the closed form in {len(grid)} settings: {deviation:.1e}. Both agree on "
        f"convergence in {agree} of them. The fastest setting is k = {best['period']}, "
        f"α = {best['step_size']:g}, at {best['measured']:.4f} a step. Without Lookahead the factor is "
        f"{math.hypot(1, LEARNING_RATE):.6f}.\n",
    }


def plots(results):
    """Return the figures of the experiment's page."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, path), color in zip(results["paths"].items(), (BARE, SLOW, "#009E73", FAST)):
        path = np.array(path)
        inside = np.abs(path).max(axis=1) < 6
        left.plot(*path[: len(path) if inside.all() else inside.argmin()].T, color=color, linewidth=1, label=name)
    left.plot(0, 0, "k+", markersize=8)
    left.plot(1, 1, "k.", markersize=6)
    left.set(xlabel="x", ylabel="y", title="Paths from (1, 1), α = 0.5", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    left.legend(loc="lower right")
    grid = results["grid"]
    periods, sizes = (np.arange(1, max(one["period"] for one in grid) + 1), np.linspace(0.05, 1, 96))
    closed = np.array([[rate(int(period), size) ** period for period in periods] for size in sizes])
    shown = right.pcolormesh(
        periods, sizes, np.log(closed), cmap="RdBu_r", vmin=-1, vmax=1, shading="nearest", rasterized=True
    )
    right.contour(periods, sizes, closed, levels=[1], colors="k", linewidths=1)
    for good, marker in ((True, "o"), (False, "x")):
        points = [(one["period"], one["step_size"]) for one in grid if (one["measured"] < 1) == good]
        if points:
            right.plot(*zip(*points), marker, color="k", markersize=3, label="measured: " + converges(0 if good else 2))
    right.set(xlabel="k", ylabel="α", title="Log of the growth in a cycle; the line is 1")
    right.grid(False)
    right.legend(loc="upper right", fontsize=7)
    figure.colorbar(shown, ax=right)
    return {"game": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch", "numpy"])
