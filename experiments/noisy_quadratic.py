"""The noisy quadratic: the variance that stays, and the expected loss over time at the same final risk.

The loss is a (x - c)^2 / 2 with c ~ N(0, s^2), drawn anew at each step. Measured with the Optax front end, over many
replicas at once, against the closed forms of the paper (section 3.1 and proposition 2).
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track
from scipy.optimize import brentq

from common import BARE, FAST, SLOW, command, markdown
from lookahead_optim.optax import lookahead, slow_params

# Of the second part: curvatures, and noise of variance 1 / curvature, so that all directions' gradients are as noisy.
CURVATURES = 1 / np.arange(1, 101)
NOISE = 1 / np.sqrt(CURVATURES)
START = 10.0
PERIOD = 5


# Closed forms. `rate` is the inner learning rate times the curvature, r = 1 - rate.


def variance_sgd(rate, noise=1.0):
    """Return the stationary variance of SGD."""
    return rate**2 * noise**2 / (1 - (1 - rate) ** 2)


def variance_slow(rate, period, step_size):
    """Return the stationary variance of the slow weights divided by the variance of SGD."""
    power = (1 - rate) ** period
    return step_size * (1 + power) / (2 - step_size * (1 - power))


def variance_fast(rate, period, step_size, steps):
    """Return the variance of the fast weights, `steps` steps after a sync, divided by the variance of SGD."""
    power = (1 - rate) ** (2 * steps)
    return power * variance_slow(rate, period, step_size) + 1 - power


def final_risk(learning_rate, period, step_size):
    """Return the expected loss of the slow weights that stays; a period of 1 and a step size of 1 is SGD."""
    rate = learning_rate * CURVATURES
    return float(np.sum(CURVATURES * variance_sgd(rate, NOISE) * variance_slow(rate, period, step_size)) / 2)


def expected_losses(learning_rate, period, step_size, cycles):
    """Return the expected loss of the slow weights at the start and after each cycle."""
    rate = learning_rate * CURVATURES
    power = (1 - rate) ** period
    shrink = 1 - step_size + step_size * power
    added = step_size**2 * variance_sgd(rate, NOISE) * (1 - power**2)
    cycle = np.arange(cycles + 1)[:, None]
    means = shrink**cycle * START
    variances = added * (1 - shrink ** (2 * cycle)) / (1 - shrink**2)
    return np.sum(CURVATURES * (means**2 + variances), axis=1) / 2


# Measured with the library.


@functools.partial(jax.jit, static_argnames=("period", "burn_in", "cycles"))
def measure_variances(key, rate, step_size, period, burn_in, cycles, start):
    """Return the mean squares, over replicas and cycles, of slow weights after a sync and fast ones just before it."""
    optimizer = lookahead(optax.sgd(rate), period, step_size)

    def step(carry, key):
        x, state = carry
        updates, state = optimizer.update(x - jax.random.normal(key, x.shape), state, x)
        return (optax.apply_updates(x, updates), state), None

    def cycle(carry, key):
        keys = jax.random.split(key, period)
        carry, _ = jax.lax.scan(step, carry, keys[:-1])
        fast = jnp.mean(carry[0] ** 2)
        carry, _ = step(carry, keys[-1])
        return carry, (jnp.mean(slow_params(carry[1], carry[0]) ** 2), fast)

    carry = start, optimizer.init(start)
    keys = jax.random.split(key, burn_in + cycles)
    carry, _ = jax.lax.scan(cycle, carry, keys[:burn_in])
    _, (slow, fast) = jax.lax.scan(cycle, carry, keys[burn_in:])
    return jnp.mean(slow), jnp.mean(fast)


@functools.partial(jax.jit, static_argnames=("period", "cycles"))
def measure_losses(key, learning_rate, step_size, period, cycles, start):
    """Return the mean loss of the slow weights at the start and after each cycle."""
    optimizer = lookahead(optax.sgd(learning_rate), period, step_size)

    def loss(x):
        return jnp.mean(jnp.sum(CURVATURES * x**2, axis=-1)) / 2

    def step(carry, key):
        x, state = carry
        gradients = CURVATURES * (x - NOISE * jax.random.normal(key, x.shape))
        updates, state = optimizer.update(gradients, state, x)
        return (optax.apply_updates(x, updates), state), None

    def cycle(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, loss(slow_params(carry[1], carry[0]))

    keys = jax.random.split(key, cycles * period).reshape(cycles, period)
    _, losses = jax.lax.scan(cycle, (start, optimizer.init(start)), keys)
    return jnp.concatenate([loss(start)[None], losses])


def variances(quick):
    """Return measured variances and closed forms over a grid."""
    rates, periods, step_sizes = (
        ((0.1, 0.5), (5,), (0.5,)) if quick else ((0.1, 0.3, 0.5, 0.9), (1, 5, 20), (0.2, 0.5, 0.8))
    )
    replicas, cycles = (2000, 30) if quick else (10_000, 100)
    settings = [(rate, period, alpha) for rate in rates for period in periods for alpha in step_sizes]
    # A period and a step size of 1 are SGD, whose variance is the other closed form.
    settings += [(rate, 1, 1.0) for rate in rates]
    found = []
    for number, (rate, period, alpha) in enumerate(track(settings, "Stationary variances")):
        # The variance forgets its start by this factor in each cycle.
        forgets = (1 - alpha + alpha * (1 - rate) ** period) ** 2
        burn_in = int(np.ceil(np.log(1e-4) / np.log(forgets))) + 1
        # Cycles as far apart as the weights stay alike add little; more of them make up for that.
        draws = int(cycles / (1 - np.sqrt(forgets)))
        key = jax.random.key(number, impl="rbg")
        start = jnp.zeros(replicas)
        slow, fast = measure_variances(key, rate, alpha, period, burn_in, draws, start)
        found.append(
            {
                "rate": rate,
                "period": period,
                "step_size": alpha,
                "slow": float(slow) / variance_sgd(rate),
                "fast": float(fast) / variance_sgd(rate),
                "slow_expected": variance_slow(rate, period, alpha),
                "fast_expected": variance_fast(rate, period, alpha, period - 1),
            }
        )
    return found


def steps_to_settle(losses, risk, period):
    """Return the updates until the expected loss is within 10% of the final risk."""
    settled = np.flatnonzero(losses <= 1.1 * risk)
    return int(settled[0]) * period if len(settled) else None


def matched_rate(risk, period, step_size):
    """Return the inner learning rate for which Lookahead's final risk is this one, or None."""
    # A cycle is stable up to here if k is odd: the fast weights may overshoot by more than SGD's may.
    highest = 0.999 * (1 + (2 / step_size - 1) ** (1 / period))
    if final_risk(highest, period, step_size) < risk:
        return None
    return brentq(lambda rate: final_risk(rate, period, step_size) - risk, 1e-6, highest)


def settling_times(quick):
    """Return, for learning rates of SGD, the time to settle of SGD and of Lookahead with the same final risk."""
    found = []
    for rate in np.geomspace(0.02, 1.0, 5 if quick else 25):
        risk = final_risk(rate, 1, 1.0)
        row = {"risk": risk, "sgd": steps_to_settle(expected_losses(rate, 1, 1.0, 60_000), risk, 1), "lookahead": {}}
        for alpha in (0.2, 0.5, 0.8):
            inner = matched_rate(risk, PERIOD, alpha)
            losses = expected_losses(inner, PERIOD, alpha, 12_000) if inner else None
            row["lookahead"][str(alpha)] = steps_to_settle(losses, risk, PERIOD) if inner else None
        found.append(row)
    return found


def matched_curves(quick):
    """Return expected and measured losses over time, of SGD and of Lookahead with the same final risk."""
    replicas, updates = (50, 200) if quick else (400, 1500)
    base = 0.1
    risk = final_risk(base, 1, 1.0)
    found = {"risk": risk, "replicas": replicas, "curves": {}}
    settings = {"SGD": (base, 1, 1.0)}
    settings |= {
        f"Lookahead, α = {alpha}": (matched_rate(risk, PERIOD, alpha), PERIOD, alpha) for alpha in (0.2, 0.5, 0.8)
    }
    for name, (rate, period, alpha) in track(settings.items(), "Losses over time"):
        start = jnp.full((replicas, len(CURVATURES)), START)
        key = jax.random.key(7, impl="rbg")
        measured = measure_losses(key, rate, alpha, period, updates // period, start)
        found["curves"][name] = {
            "learning_rate": rate,
            "updates": np.arange(0, updates + 1, PERIOD).tolist(),
            "measured": np.asarray(measured)[:: PERIOD // period].round(4).tolist(),
            "expected": expected_losses(rate, period, alpha, updates // period)[:: PERIOD // period].round(4).tolist(),
        }
    return found


def run(quick):
    """Return the results of the experiment; all of it is computed in float64."""
    with jax.enable_x64(True):
        return {"variances": variances(quick), "settling": settling_times(quick), "curves": matched_curves(quick)}


def tables(results):
    """Return the tables of the experiment's page."""
    rows = [
        [
            f"{one['rate']:g}",
            one["period"],
            f"{one['step_size']:g}",
            *(f"{one[key]:.4f}" for key in ("slow_expected", "slow", "fast_expected", "fast")),
        ]
        for one in results["variances"]
    ]
    deviation = {
        kind: max(abs(one[kind] / one[f"{kind}_expected"] - 1) for one in results["variances"])
        for kind in ("slow", "fast")
    }
    curves = results["curves"]["curves"]
    off = {name: max(abs(a / b - 1) for a, b in zip(one["measured"], one["expected"])) for name, one in curves.items()}
    settling = [
        [f"{row['risk']:.2f}", row["sgd"], *(("-" if value is None else value) for value in row["lookahead"].values())]
        for row in results["settling"][:: max(1, len(results["settling"]) // 6)]
    ]
    return {
        "variances": markdown(
            ["γa", "k", "α", "slow, closed form", "slow, measured", "fast, closed form", "fast, measured"], rows
        ),
        "deviations": f"Largest relative deviation over the grid: slow weights {deviation['slow']:.2%}, fast weights "
        f"{deviation['fast']:.2%}.\n",
        "curves": markdown(
            ["", "inner learning rate", "largest deviation of the measured loss"],
            [[name, f"{one['learning_rate']:.4f}", f"{off[name]:.1%}"] for name, one in curves.items()],
        ),
        "settling": markdown(
            ["final risk", "SGD", *(f"Lookahead, α = {alpha}" for alpha in results["settling"][0]["lookahead"])],
            settling,
        ),
    }


def plots(results):
    """Return the figures of the experiment's page."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = [BARE, FAST, SLOW, "#009E73"]
    for (name, one), color in zip(results["curves"]["curves"].items(), colors):
        left.semilogy(one["updates"], one["expected"], color=color, linewidth=1, label=name)
        left.semilogy(one["updates"][::10], one["measured"][::10], ".", color=color, markersize=4)
    left.axhline(results["curves"]["risk"], color="0.5", linestyle=":", linewidth=1)
    left.set(xlabel="updates", ylabel="expected loss", title="At the same final risk: lines expected, dots measured")
    left.legend()
    risks = [row["risk"] for row in results["settling"]]
    right.loglog(risks, [row["sgd"] for row in results["settling"]], color=BARE, label="SGD")
    for alpha, color in zip(results["settling"][0]["lookahead"], colors[1:]):
        values = [row["lookahead"][alpha] or np.nan for row in results["settling"]]
        right.loglog(risks, values, color=color, label=f"Lookahead, α = {alpha}")
    right.set(xlabel="final risk", ylabel="updates until within 10% of it", title=f"k = {PERIOD}, inner rate matched")
    right.legend()
    return {
        "losses": figure,
        "variances": _variance_plot([one for one in results["variances"] if one["step_size"] < 1]),
    }


def _variance_plot(found):
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    rates = sorted({one["rate"] for one in found})
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates):
        for kind, color in (("slow", SLOW), ("fast", FAST)):
            for alpha, marker in zip(sorted({one["step_size"] for one in found}), "os^"):
                line = [one for one in found if (one["rate"], one["step_size"]) == (rate, alpha)]
                label = f"{kind}, α = {alpha:g}"
                axes.plot(
                    *zip(*((str(one["period"]), one[f"{kind}_expected"]) for one in line)), color=color, linewidth=1
                )
                axes.plot(*zip(*((str(one["period"]), one[kind]) for one in line)), marker, color=color, label=label)
        axes.set(title=f"γa = {rate:g}", xlabel="k", ylim=(0, 1.08))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    figure.axes[0].set_ylabel("variance divided by SGD's")
    return figure


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "numpy"])
