"""Fast and slow weights on a loss surface: the picture on the first page of the docs, drawn by the library.

SGD on a long, narrow valley with noisy gradients, in Lookahead, with the PyTorch front end.
"""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, command
from lookahead_optim.torch import Lookahead

START = (-2.6, 1.6)


def loss(x, y):
    """Return the loss at a place, for floats, arrays and tensors."""
    return 0.06 * x**2 + 1.1 * (y - 0.35 * x - 0.08 * x**2) ** 2


def path(period, steps):
    """Return the weights and the slow weights at the start and after each step, arrays of shape (steps + 1, 2)."""
    weights = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = Lookahead(torch.optim.SGD([weights], lr=0.75), sync_period=period, slow_step_size=0.5)
    noise = torch.Generator().manual_seed(3)
    fast, slow = [weights.tolist()], [weights.tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*weights).backward()
        weights.grad += 0.35 * torch.randn(2, generator=noise, dtype=torch.float64)
        optimizer.step()
        fast.append(weights.tolist())
        if period:
            slow.append(optimizer.state[weights]["slow"].tolist())
    return np.round(fast, 4), np.round(slow, 4)


def run(quick):
    """Return the results of the experiment."""
    steps = 12 if quick else 30
    fast, slow = path(6, steps)
    return {"bare": path(0, steps)[0].tolist(), "fast": fast.tolist(), "slow": slow.tolist(), "period": 6}


def tables(results):
    """There is none."""
    return {}


def plots(results):
    """Return the picture."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(-3.2, 2.6, 200), np.linspace(-1.9, 2.3, 200))
    axes.contourf(x, y, np.sqrt(loss(x, y)), levels=14, cmap="Greys_r", alpha=0.55)
    bare, fast, slow = (np.array(results[name]) for name in ("bare", "fast", "slow"))
    period = results["period"]
    axes.plot(*bare.T, color=BARE, linewidth=0.9, alpha=0.8, label="SGD without Lookahead")
    for start in range(0, len(fast) - 1, period):
        # The last fast weights of a cycle, before the sync, follow from the slow step, half of the way to them.
        end = slow[start] + 2 * (slow[min(start + period, len(slow) - 1)] - slow[start])
        inside = fast[start : start + period]
        line = np.vstack([inside, end]) if start + period < len(slow) else inside
        axes.plot(*line.T, ".-", color=FAST, markersize=4, linewidth=1, label="fast weights" if not start else None)
    syncs = slow[::period]
    axes.plot(*syncs.T, "o-", color=SLOW, markersize=6, linewidth=2, label="slow weights")
    axes.plot(*START, "k*", markersize=9, label="start")
    axes.plot(0, 0, "k+", markersize=9, label="minimum")
    axes.set(xticks=[], yticks=[], xlim=(-3.2, 2.6), ylim=(-1.9, 2.3))
    axes.grid(False)
    axes.legend(loc="upper right")
    return {"paths": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch", "numpy"])
