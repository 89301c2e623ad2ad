"""The outer step with momentum on quadratics: its noise and its rate, measured and from the closed forms.

SGD in Lookahead, with the PyTorch front end, in float64. The learning rate times the curvature is 0.1.
"""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, command, markdown
from lookahead_optim.torch import Lookahead

STEP = 0.1
MOMENTA = 0.0, 0.2, 0.4, 0.6, 0.8, 0.9
# Slow step size, sync period, and whether the momentum is Nesterov's.
SETTINGS = (0.5, 6, True), (0.7, 30, True), (1.0, 30, True), (0.7, 30, False)


def variance(step_size, period, nesterov, momentum):
    """Return the stationary variance of the slow weights, divided by that of bare SGD, from the closed form."""
    eta, mu, r = step_size, momentum, (1 - STEP) ** period
    p = 1 - eta * (1 - r)
    if not nesterov:
        return eta * (1 + r) * (1 + mu) / ((1 - mu) * (2 + 2 * mu - eta * (1 - r)))
    above = eta * (1 + r) * ((1 + 2 * mu + 2 * mu**2) * (1 + mu * p) - 2 * mu * (1 + mu) ** 2 * p)
    return above / ((1 - mu * p) * (1 + p * (1 + 2 * mu)))


def rate(step_size, period, nesterov, momentum):
    """Return the factor by which a cycle brings slow weight and momentum nearer to 0, from the closed form.

    It is the larger modulus of the two eigenvalues of a cycle, whose sum and product are `trace` and `determinant`.
    """
    p = 1 - step_size * (1 - (1 - STEP) ** period)
    trace = (1 + momentum) * p if nesterov else momentum + p
    determinant = momentum * p if nesterov else momentum
    root = np.sqrt(complex(trace**2 - 4 * determinant))
    return max(abs(trace + root), abs(trace - root)) / 2


def lookahead(weights, step_size, period, nesterov, momentum):
    """Return the optimizer of a setting."""
    inner = torch.optim.SGD([weights], lr=STEP)
    return Lookahead(inner, period, step_size, slow_momentum=momentum, slow_nesterov=nesterov)


def measured_variance(setting, momentum, replicas, cycles):
    """Return the mean square of the slow weights, divided by that of bare SGD, where noise moves the minimum."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(replicas, dtype=torch.float64))
    optimizer, squares = lookahead(weights, *setting, momentum), []
    for _ in range(cycles):
        for _ in range(setting[1]):
            weights.grad = weights.detach() - torch.randn(replicas, dtype=torch.float64)
            optimizer.step()
        squares.append(weights.detach().square().mean())
    of_sgd = STEP**2 / (1 - (1 - STEP) ** 2)
    return float(torch.stack(squares[cycles // 2 :]).mean() / of_sgd)


def measured_rate(setting, momentum):
    """Return the larger modulus of the eigenvalues of a cycle, which is a linear map of slow weight and momentum."""
    weights = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    optimizer = lookahead(weights, *setting, momentum)

    def cycle(gradient):
        for _ in range(setting[1]):
            weights.grad = gradient(weights.detach())
            optimizer.step()

    # A cycle without a gradient captures the slow weights and moves nothing. Then the two elements begin with slow
    # weight 1 and momentum 0, and the other way round.
    cycle(torch.zeros_like)
    if not momentum:
        cycle(torch.clone)
        return abs(float(weights.detach()[0]))
    optimizer.state[weights]["slow_momentum"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cycle(torch.clone)
    state = optimizer.state[weights]
    return float(np.abs(np.linalg.eigvals(torch.stack([state["slow"], state["slow_momentum"]]).numpy())).max())


def run(quick):
    """Return the results of the experiment."""
    replicas, cycles = (20_000, 60) if quick else (40_000, 120)
    momenta = MOMENTA[::3] if quick else MOMENTA
    return [
        {
            "slow_step_size": setting[0],
            "sync_period": setting[1],
            "slow_nesterov": setting[2],
            "slow_momentum": momentum,
            "variance": round(measured_variance(setting, momentum, replicas, cycles), 6),
            "variance_expected": variance(*setting, momentum),
            "rate": measured_rate(setting, momentum),
            "rate_expected": rate(*setting, momentum),
        }
        for setting in SETTINGS
        for momentum in momenta
    ]


def tables(results):
    """Return the tables of the experiment's page."""
    variances = max(abs(one["variance"] / one["variance_expected"] - 1) for one in results)
    rates = max(abs(one["rate"] - one["rate_expected"]) for one in results)
    return {
        "all": markdown(
            ["η", "k", "momentum", "μ", "variance, closed form", "measured", "rate, closed form", "measured"],
            [
                [
                    f"{one['slow_step_size']:g}",
                    one["sync_period"],
                    "Nesterov" if one["slow_nesterov"] else "heavy ball",
                    f"{one['slow_momentum']:g}",
                    *(f"{one[key]:.4f}" for key in ("variance_expected", "variance", "rate_expected", "rate")),
                ]
                for one in results
            ],
        ),
        "deviations": f"Largest relative deviation of a variance: {variances:.1%}. Largest difference of a rate: "
        f"{rates:.0e}.\n",
    }


def plots(results):
    """Return the picture of the page on the outer step."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = np.linspace(0, 0.95, 191)
    for setting, color, style in zip(SETTINGS, (BARE, SLOW, "#009E73", FAST), ("-", "-", "-", "--")):
        step_size, period, nesterov = setting
        label = f"η = {step_size:g}, k = {period}" + ("" if nesterov else ", heavy ball")
        names = "slow_step_size", "sync_period", "slow_nesterov"
        points = [one for one in results if tuple(one[name] for name in names) == setting]
        for axes, closed, key in ((left, variance, "variance"), (right, rate, "rate")):
            axes.plot(lines, [closed(*setting, mu) for mu in lines], style, color=color, linewidth=1, label=label)
            axes.plot([one["slow_momentum"] for one in points], [one[key] for one in points], "o", color=color, ms=4)
    left.axhline(1, color="0.5", linestyle=":", linewidth=1)
    left.set(
        xlabel="slow momentum μ", ylabel="variance divided by SGD's", ylim=(0, 4.5), title="Noise: lower is better"
    )
    right.set(xlabel="slow momentum μ", ylabel="factor of a cycle", ylim=(0, 1), title="Rate: lower is better")
    left.legend()
    return {"noise_and_rate": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch", "numpy"])
