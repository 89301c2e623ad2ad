"""Slow momentum on the noisy quadratic, against SGD, heavy ball and plain Lookahead at the same final risk.

Mean and covariance of slow weight and momentum follow an exact recursion from sync to sync. From it come the loss that
stays, the learning rate with which a given loss stays, and the updates until the loss has settled, for settings of
others and for the best of equally many settings of each kind. The Optax front end is measured against the recursion.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track
from scipy.optimize import brentq

from common import BARE, FAST, SLOW, command, in_processes, markdown
from lookahead_optim.optax import lookahead, slow_params
from noisy_quadratic import CURVATURES, NOISE, START, variance_sgd

# Curvatures and variances of the noise. The second problem is there to see whether what is found holds elsewhere.
PROBLEMS = {"1/i": (CURVATURES, NOISE**2), "geometric": (np.geomspace(1, 1e-2, 100), np.ones(100))}
# Inner momentum, sync period, slow step size, slow momentum, and whether this is Nesterov's.
SGD = 0.0, 1, 1.0, 0.0, True
WAYS = {
    "SGD": SGD,
    "heavy ball, 0.9": (0.9, 1, 1.0, 0.0, True),
    "Lookahead, 0.5, k = 5": (0.0, 5, 0.5, 0.0, True),
    "0.68/0.37/28 (SNOO)": (0.0, 28, 0.68, 0.37, True),
    "0.7/0.6/30 (MuLoCo)": (0.0, 30, 0.7, 0.6, True),
    "0.7/0.9/30 (DiLoCo)": (0.0, 30, 0.7, 0.9, True),
    "1/0.5/30": (0.0, 30, 1.0, 0.5, True),
}
# The settings that are tried of each kind: thirty of each.
PERIODS, MOMENTA = (2, 6, 20, 60, 200, 600), (0.3, 0.6, 0.9, 0.95, 0.98)
# The memory of a momentum is 1 / (1 - momentum) updates.
MEMORIES = [float(memory) for memory in np.geomspace(1.5, 10_000, 30)]
KINDS = {
    "heavy ball": [(1 - 1 / memory, 1, 1.0, 0.0, True) for memory in MEMORIES],
    # A cycle of one update with slow momentum is SGD with Nesterov's momentum.
    "Nesterov": [(0.0, 1, 1.0, 1 - 1 / memory, True) for memory in MEMORIES],
    "Lookahead": [(0.0, k, step_size, 0.0, True) for k in PERIODS for step_size in (0.05, 0.1, 0.2, 0.5, 0.8)],
    "slow momentum": [(0.0, k, 0.7, momentum, True) for k in PERIODS for momentum in MOMENTA],
    "slow heavy ball": [(0.0, k, 0.7, momentum, False) for k in PERIODS for momentum in MOMENTA],
}
WORKERS = 1, 4
COLORS = dict(zip(WAYS, (BARE, "0.4", FAST, "#009E73", SLOW, "#CC79A7", "#E69F00")))


# The recursion.


def cycle(way, learning_rate, problem="1/i"):
    """Return what a cycle does to a weight and its momentum z: z <- matrix z + direction e, with e of this variance.

    Returns:
        Arrays with a first axis for directions of the loss: matrices, directions, variances.
    """
    inner, period, eta, mu, nesterov = way
    curvatures, noise = PROBLEMS[problem]
    rate = learning_rate * curvatures
    one = np.ones_like(rate)
    if inner:
        # v <- inner v + a (x - c), x <- x - learning_rate v. The noise is c.
        matrix = [1 - rate, -learning_rate * inner * one], [curvatures, inner * one]
        direction, variance = [rate, -curvatures], noise
    else:
        # The fast weight ends at r x + e, so that s = (1 - r) x - e.
        r = (1 - rate) ** period
        by_s, by_momentum = (eta * (1 + mu), eta * mu**2) if nesterov else (eta, eta * mu)
        matrix = [1 - by_s * (1 - r), -by_momentum * one], [1 - r, mu * one]
        direction, variance = [by_s * one, -one], variance_sgd(rate, np.sqrt(noise)) * (1 - r**2)
    return np.moveaxis(np.array(matrix), 2, 0), np.array(direction).T, variance


def stationary(matrix, direction, variance):
    """Return the covariances that stay, the solutions of C = matrix C matrix' + variance direction direction'."""
    added = variance[:, None, None] * direction[:, :, None] * direction[:, None, :]
    kronecker = np.einsum("dij,dkl->dikjl", matrix, matrix).reshape(-1, 4, 4)
    return np.linalg.solve(np.eye(4) - kronecker, added.reshape(-1, 4, 1)).reshape(-1, 2, 2)


def risk(way, learning_rate, problem="1/i"):
    """Return the expected loss that remains with one worker, infinite if the means do not converge."""
    with np.errstate(over="ignore"):
        found = cycle(way, learning_rate, problem)
    trace, determinant = np.trace(found[0], axis1=1, axis2=2), np.linalg.det(found[0])
    # Whether both eigenvalues of a matrix are within the unit circle.
    if not np.all((determinant < 1) & (np.abs(trace) < 1 + determinant)):
        return np.inf
    return float(PROBLEMS[problem][0] @ stationary(*found)[:, 0, 0] / 2)


def expected_losses(way, learning_rate, cycles, workers=1, problem="1/i"):
    """Return the expected loss after each number of cycles in a range, from START and momentum 0."""
    matrix, direction, variance = cycle(way, learning_rate, problem)
    stays = stationary(matrix, direction, variance)
    # First rows of powers of the matrix, of shape (cycles, directions, 2). After n cycles the covariance is the
    # difference of what stays and of matrix^n (what stays) matrix'^n.
    rows, power = np.linalg.matrix_power(matrix, cycles.start)[None, :, 0], np.linalg.matrix_power(matrix, cycles.step)
    while len(rows) < len(cycles):
        rows = np.concatenate([rows, np.einsum("ndi,dij->ndj", rows, power)])
        power = power @ power
    rows = rows[: len(cycles)]
    variances = stays[:, 0, 0] - np.sum(rows * np.einsum("ndi,dij->ndj", rows, stays), axis=2)
    return ((rows[:, :, 0] * START) ** 2 + variances / workers) @ PROBLEMS[problem][0] / 2


def matched_rate(way, wanted, problem="1/i"):
    """Return the learning rate with which this loss stays, with one worker.

    As all variances are divided by the number of workers, it is the rate for as many times less loss with them, too.
    """
    return float(np.exp(brentq(lambda rate: np.log(min(risk(way, np.exp(rate), problem), 1e6) / wanted), -16, 1.386)))


def settled(way, learning_rate, wanted, updates, workers=1, problem="1/i"):
    """Return the updates from which on the expected loss stays within 10% of the final one, None if there are more."""
    losses = functools.partial(expected_losses, way, learning_rate, workers=workers, problem=problem)
    # The last loss above is looked for in large steps first.
    cycles = range(updates // way[1] + 1)
    for step in (max(1, len(cycles) // 500), 1):
        tried = cycles[::step]
        above = np.flatnonzero(losses(tried) > 1.1 * wanted / workers)
        if above[-1] == len(tried) - 1:
            return None
        cycles = range(tried[above[-1]], tried[above[-1] + 1] + 1)
    return cycles[1] * way[1]


# What is computed, and measured.


def settling(task):
    """Return, for the final risk of a learning rate of SGD, the updates of all ways, and the best of each kind."""
    problem, sgd_rate, few = task
    wanted = risk(SGD, sgd_rate, problem)
    rates = {name: matched_rate(way, wanted, problem) for name, way in WAYS.items()}
    kinds = {kind: ways[:: 9 if few else 1] for kind, ways in KINDS.items()}
    tried = {kind: [(way, matched_rate(way, wanted, problem)) for way in ways] for kind, ways in kinds.items()}
    # Others may take four times as long as SGD with one worker.
    longest = 4 * settled(SGD, sgd_rate, wanted, int(20 / sgd_rate / PROBLEMS[problem][0].min()), 1, problem)
    found = []
    for workers in WORKERS:
        of = functools.partial(settled, wanted=wanted, updates=longest, workers=workers, problem=problem)
        row = {"problem": problem, "workers": workers, "sgd_rate": round(sgd_rate, 4), "risk": wanted / workers}
        row["ways"] = {name: of(way, rates[name]) for name, way in WAYS.items()}
        row["best"] = {}
        for kind, ways in tried.items():
            times = [of(way, rate) or np.inf for way, rate in ways]
            row["best"][kind] = [int(min(times)), *ways[int(np.argmin(times))][0]]
        found.append(row)
    return found


@functools.partial(jax.jit, static_argnames=("way", "cycles", "workers"))
def measure_losses(key, learning_rate, start, way, cycles, workers):
    """Return the mean loss of the slow weights, from a start of shape (workers, replicas, directions)."""
    inner, period, eta, mu, nesterov = way
    mean = functools.partial(jax.lax.pmean, axis_name="workers")
    momentum = {"slow_momentum": mu, "slow_nesterov": nesterov} if mu else {}
    optimizer = lookahead(optax.sgd(learning_rate, inner or None), period, eta, reduce=mean, **momentum)

    @functools.partial(jax.vmap, axis_name="workers")
    def step(x, state, noise):
        updates, state = optimizer.update(CURVATURES * (x - NOISE * noise), state, x)
        return optax.apply_updates(x, updates), state

    def one_cycle(carry, keys):
        carry, _ = jax.lax.scan(
            lambda carry, key: (step(*carry, jax.random.normal(key, start.shape)), None), carry, keys
        )
        slow = jax.vmap(slow_params)(carry[1], carry[0])[0]
        return carry, jnp.mean(jnp.sum(CURVATURES * slow**2, axis=-1)) / 2

    keys = jax.random.split(key, cycles * period).reshape(cycles, period)
    return jax.lax.scan(one_cycle, (start, jax.vmap(optimizer.init)(start)), keys)[1]


def curves(quick):
    """Return expected and measured losses over time, of all ways with the same final risk."""
    replicas, updates = (50, 180) if quick else (400, 1500)
    wanted = risk(SGD, 0.25)
    names = list(WAYS)[1::3] if quick else list(WAYS)
    found = []
    for workers, name in track(list(itertools.product(WORKERS, names)), "Losses over time"):
        way = WAYS[name]
        rate, cycles = matched_rate(way, wanted), updates // way[1]
        start = jnp.full((workers, replicas // workers, len(CURVATURES)), START)
        measured = measure_losses(jax.random.key(7, impl="rbg"), rate, start, way, cycles, workers)
        shown = slice(30 // way[1] - 1, None, 30 // way[1])
        one = {"way": name, "workers": workers, "learning_rate": round(rate, 5), "risk": round(wanted / workers, 5)}
        one["updates"] = (np.arange(1, cycles + 1) * way[1])[shown].tolist()
        one["measured"] = np.asarray(measured)[shown].round(4).tolist()
        one["expected"] = expected_losses(way, rate, range(1, cycles + 1), workers)[shown].round(4).tolist()
        found.append(one)
    return found


def run(quick):
    """Return the results of the experiment; all of it is computed in float64."""
    with jax.enable_x64(True):
        found = curves(quick)
    rates = (0.05, 0.2) if quick else np.geomspace(0.02, 1.0, 7)
    tasks = [(problem, float(rate), quick) for problem in PROBLEMS for rate in rates]
    rows = map(settling, tasks) if quick else in_processes(settling, tasks)
    return {"curves": found, "settling": list(itertools.chain(*rows)), "tried": len(KINDS["heavy ball"])}


def described(kind, way):
    """Return the settings that were tried, in words."""
    inner, period, eta, mu, _ = way
    if kind in {"heavy ball", "Nesterov"}:
        return f"{inner or mu:.4f}"
    return f"k {period}, " + (f"α {eta:g}" if kind == "Lookahead" else f"μ {mu:g}")


def changes(rows):
    """Return, for each way and each best of a kind, the updates divided by those of SGD, one for each row."""
    found = {name: [(row["ways"][name] or np.nan) / row["ways"]["SGD"] for row in rows] for name in list(WAYS)[1:]}
    for kind in KINDS:
        found[f"{kind}, best"] = [row["best"][kind][0] / row["ways"]["SGD"] for row in rows]
    return found


def groups(results):
    """Return rows by problem and number of workers."""
    keys = itertools.product(PROBLEMS, WORKERS)
    return {key: [row for row in results["settling"] if (row["problem"], row["workers"]) == key] for key in keys}


def tables(results):
    """Return the tables of the experiment's page."""
    shown = groups(results)
    times, best, ranges = [], [], {}
    for (problem, workers), rows in shown.items():
        for row in rows[:: max(1, len(rows) // 4)]:
            if problem == "1/i":
                times.append([workers, f"{row['risk']:.3f}", *(one or "-" for one in row["ways"].values())])
            if workers == 1:
                cells = [f"{one[0]} ({described(kind, one[1:])})" for kind, one in row["best"].items()]
                best.append([problem, f"{row['risk']:.3f}", row["ways"]["SGD"], *cells])
        for name, values in changes(rows).items():
            worst = "not settled" if np.isnan(values).any() else f"{max(values) - 1:+.0%}"
            ranges.setdefault(name, [name]).append(f"{np.nanmin(values) - 1:+.0%} to {worst}")
    deviations = [
        [
            one["way"],
            one["workers"],
            f"{one['learning_rate']:.4f}",
            f"{max(abs(a / b - 1) for a, b in zip(one['measured'], one['expected'])):.2%}",
        ]
        for one in results["curves"]
    ]
    headings = [f"{problem}, {workers} worker{'s' if workers > 1 else ''}" for problem, workers in shown]
    return {
        "curves": markdown(["", "workers", "inner learning rate", "largest deviation of the loss"], deviations),
        "settling": markdown(["workers", "final risk", *WAYS], times),
        "best": markdown(["problem", "final risk", "SGD", *KINDS], best),
        "changes": markdown(["updates, against SGD", *headings], list(ranges.values())),
    }


def plots(results):
    """Return the figures of the experiment's page."""
    losses = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, workers in zip(losses.subplots(1, 2, sharey=True), WORKERS):
        for one in (one for one in results["curves"] if one["workers"] == workers):
            color = COLORS[one["way"]]
            axes.loglog(one["updates"], one["expected"], color=color, linewidth=1, label=one["way"])
            axes.loglog(one["updates"], one["measured"], ".", color=color, markersize=3)
        axes.axhline(one["risk"], color="0.5", linestyle=":", linewidth=1)
        axes.set(xlabel="updates", title=f"{workers} worker{'s' if workers > 1 else ''}: lines expected, dots measured")
    losses.axes[0].set_ylabel("expected loss")
    losses.axes[0].legend(fontsize=7)
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    colors = {
        **COLORS,
        **{f"{kind}, best": color for kind, color in zip(KINDS, ("0.4", "#009E73", FAST, SLOW, "#E69F00"))},
    }
    for (problem, workers), rows in groups(results).items():
        for name, values in changes(rows).items():
            axes = panels[list(PROBLEMS).index(problem)][int(name.endswith("best"))]
            label = name if workers == 1 else None
            style = {"color": colors[name], "linestyle": "-" if workers == 1 else ":", "linewidth": 1}
            axes.loglog([row["risk"] for row in rows], values, label=label, **style)
    for row, problem in zip(panels, PROBLEMS):
        for axes, what in zip(row, ("fixed settings", f"best of {results['tried']} settings")):
            axes.axhline(1, color=BARE, linewidth=1)
            axes.set(xlabel="final risk", title=f"curvatures {problem}, {what}", ylim=(0.3, 4))
            axes.set_yticks([0.3, 0.5, 0.7, 1, 1.5, 2, 3], ["0.3", "0.5", "0.7", "1", "1.5", "2", "3"], minor=False)
            axes.minorticks_off()
            axes.legend(fontsize=7)
        row[0].set_ylabel("updates to settle, divided by SGD's")
    return {"losses": losses, "settling": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "numpy", "scipy"])
