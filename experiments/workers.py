"""Several workers on a character model: loss against bytes, with local steps, with and without slow momentum.

One, two and four workers with AdamW inside share the pieces of each batch, so that all runs see the same text. They are
simulated on one device by `vmap`; once, real processes make the same steps over `jax.distributed`. With the Optax front
end.
"""

import functools
import itertools
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, bytes_sent, command, in_processes, in_words, markdown, paired, written
from lookahead_optim.optax import lookahead, slow_params
from source_text import described, load
from transformer import CONTEXT, initial_params, loss_of, starts_of_pieces

WORKERS, PERIODS, BATCH = (1, 2, 4), (1, 10, 50), 32
# Slow step size and slow momentum. With the first, a sync takes the mean of the workers' weights.
OUTER = {"mean": (1.0, 0.0), "momentum 0.6": (0.7, 0.6), "momentum 0.9": (0.7, 0.9)}
# The learning rate is looked for by factors of two from here.
FIRST_RATE = 4e-3
SEEDS, SEED_TO_TUNE = (0, 1, 2), 100
# The loss is measured so many times in a run, each time right after a sync.
TIMES = 8


def way(workers, period, outer):
    """Return a way to train, for the file of results."""
    return {"workers": workers, "period": period, "outer": outer}


def ways(workers=WORKERS, periods=PERIODS, outers=tuple(OUTER)):
    """Return all ways to train. The first is AdamW alone: one worker, whose slow weights copy its weights.

    Several workers that sync after every step are there with the mean alone, to tell what a period does from what the
    workers' own moments do.
    """
    bare = way(1, 1, "mean")
    several = [one for one in itertools.product(workers, periods, outers) if one[1] > 1 and one[::2] != (1, "mean")]
    each_step = [(one, 1, "mean") for one in workers if one > 1 and 1 in periods]
    return [bare, *itertools.starmap(way, each_step + several)]


def optimizer(one, rate, steps):
    """Return the optimizer of a way, with a learning rate that decays to 0."""
    eta, mu = OUTER[one["outer"]]
    inner = optax.adamw(lambda count: rate * (1 + jnp.cos(jnp.pi * count / steps)) / 2)
    momentum = {"slow_momentum": mu} if mu else {}
    mean = functools.partial(jax.lax.pmean, axis_name="workers")
    return lookahead(inner, one["period"], eta, reduce=mean, **momentum)


def train_worker(one, rate, steps, params, state, text, starts):
    """Make a step for each row of `starts` in one of several workers; return parameters and state."""
    rule = optimizer(one, rate, steps)

    def step(carried, starts):
        params, state = carried
        gradients = jax.grad(loss_of)(params, text, starts)
        return rule.apply_gradients(gradients, state, params), None

    return jax.lax.scan(step, (params, state), starts)[0]


@functools.cache
def compiled(workers, period, outer, steps):
    """Return compiled functions of all workers: to begin, to make some steps, and the loss of the slow weights."""
    one = way(workers, period, outer)

    @jax.jit
    def begin(params, rate):
        replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * workers), params)
        return replicas, jax.vmap(optimizer(one, rate, steps).init)(replicas)

    @jax.jit
    def train(rate, params, state, text, starts):
        worker = functools.partial(train_worker, one, rate, steps)
        return jax.vmap(worker, in_axes=(0, 0, None, 1), axis_name="workers")(params, state, text, starts)

    @jax.jit
    def loss(params, state, text, starts):
        # The slow weights are the same in all workers.
        slow = jax.tree.map(lambda leaf: leaf[0], jax.vmap(slow_params)(state, params))
        return loss_of(slow, text, starts)

    return begin, train, loss


def shared(starts, workers):
    """Split the pieces of each batch between workers: from (steps, batch) to (steps, workers, pieces of each)."""
    return starts.reshape(len(starts), workers, -1)


def losses(one, rate, seed, steps):
    """Return validation losses of a training, at equal distances, the last one at its end."""
    training, validation, _ = load()
    begin, train, loss = compiled(one["workers"], one["period"], one["outer"], steps)
    starts = shared(starts_of_pieces(training, (steps, BATCH), seed), one["workers"])
    same = starts_of_pieces(validation, 256, 0)
    training, validation = jnp.asarray(training, "int8"), jnp.asarray(validation, "int8")
    params, state = begin(initial_params(seed), rate)
    found = []
    for part in np.split(starts, TIMES):
        params, state = train(rate, params, state, training, part)
        found.append(round(float(loss(params, state, validation, same)), 4))
    return found


def search(loss_at, rate):
    """Return losses by learning rate: by factors of two, until the best rate has a worse one on both sides."""
    found = {rate: loss_at(rate)}
    while True:
        best = min(found, key=found.get)
        missing = [one for one in (2 * best, best / 2) if one not in found]
        if not missing:
            return dict(sorted(found.items()))
        found[missing[0]] = loss_at(missing[0])


def tuned(steps, seeds, one):
    """Return a way with the losses at the learning rates tried with one seed, and at the best rate with other seeds."""

    def loss_at(rate):
        loss = losses(one, rate, SEED_TO_TUNE, steps)[-1]
        return math.inf if math.isnan(loss) else loss

    tuning = search(loss_at, FIRST_RATE)
    rate = min(tuning, key=tuning.get)
    return {**one, "tuning": tuning, "rate": rate, "curves": [losses(one, rate, seed, steps) for seed in seeds]}


# --- The same steps in real processes


def start_in_float64(workers, one, steps):
    """Return the learning rate, the state of all workers, the text and the pieces of a training in float64."""
    training, _, _ = load()
    rate = 4e-3
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), initial_params(0))
    begin, _, _ = compiled(workers, one["period"], one["outer"], steps)
    starts = shared(starts_of_pieces(training, (steps, BATCH), 0), workers)
    return rate, begin(params, rate), jnp.asarray(training, "int8"), starts


def train_in_process(rank, workers, port, one, steps, path):
    """Train as one of several processes; write its state half-way and at the end, and the bytes of a sync."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=workers, process_id=rank)
    rate, carried, text, starts = start_in_float64(workers, one, steps)
    mesh = jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,))
    by_worker = NamedSharding(mesh, PartitionSpec("workers"))

    def of_all(leaf):
        """Return an array of all processes, of which this one has the part of its worker."""
        return jax.make_array_from_process_local_data(by_worker, np.asarray(leaf[rank : rank + 1]))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("workers"), out_specs=PartitionSpec("workers"))
    def train_each(params, state, starts):
        params, state, starts = jax.tree.map(lambda leaf: leaf[0], (params, state, starts))
        carried = train_worker(one, rate, steps, params, state, text, starts)
        return jax.tree.map(lambda leaf: leaf[None], carried)

    carried, found = jax.tree.map(of_all, carried), []
    pieces = [of_all(np.swapaxes(part, 0, 1)) for part in np.split(starts, 2)]
    for of_each in pieces:
        before = written()
        carried = jax.block_until_ready(train_each(*carried, of_each))
        sent = written() - before
        found.extend(np.asarray(leaf.addressable_data(0)[0], "float64") for leaf in jax.tree.leaves(carried))
    np.savez(path, *found, sent=sent / (steps / 2 / one["period"]))


def compare_with_processes(workers, steps):
    """Return the largest difference between real processes and simulated ones, in float64, and the bytes of a sync."""
    one = way(workers, 5, "momentum 0.6")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.npz" for rank in range(workers)]
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=train_in_process, args=(rank, workers, port, one, steps, path), daemon=True)
            for rank, path in enumerate(paths)
        ]
        for process in processes:
            process.start()
        simulated = []
        with jax.enable_x64(True):
            rate, carried, text, starts = start_in_float64(workers, one, steps)
            _, train, _ = compiled(workers, one["period"], one["outer"], steps)
            for part in np.split(starts, 2):
                carried = train(rate, *carried, text, part)
                simulated.extend(map(np.asarray, jax.tree.leaves(carried)))
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * workers
        largest, sent = 0.0, []
        for rank, path in enumerate(paths):
            with np.load(path) as file:
                sent.append(float(file["sent"]))
                real = [file[f"arr_{index}"] for index in range(len(simulated))]
            largest = max(largest, *(float(np.abs(leaf - all_[rank]).max()) for leaf, all_ in zip(real, simulated)))
    size = 8 * sum(leaf.size for leaf in jax.tree.leaves(initial_params(0)))
    return {
        **one,
        "steps": steps,
        "difference": largest,
        "bytes_of_a_sync": max(sent),
        "bytes_expected": bytes_sent(workers, size),
    }


def run(quick):
    """Return the results of the experiment."""
    # Two processes share the cores.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    few = {"workers": (2,), "periods": (10,), "outers": ("momentum 0.6",)}
    steps, seeds, which = (16, (0,), few) if quick else (400, SEEDS, {})
    *texts, digest = load()
    return {
        "text": described(*texts, digest),
        "steps": steps,
        "seeds": seeds,
        "size": 4 * sum(leaf.size for leaf in jax.tree.leaves(initial_params(0))),
        "processes": compare_with_processes(2, 20 if quick else 50),
        # New processes take longer than a few steps.
        "ways": list((map if quick else in_processes)(functools.partial(tuned, steps, seeds), ways(**which))),
    }


def is_bare(one):
    """Return whether a way is AdamW alone. With the learning rate of its group it is data-parallel AdamW, too."""
    return (one["workers"], one["outer"]) == (1, "mean")


def end(one):
    """Return the losses at the end, one for each seed."""
    return np.array(one["curves"])[:, -1]


def sent(results, one, workers):
    """Return the bytes that one of several workers sends in a training."""
    return bytes_sent(workers, results["size"]) * results["steps"] / one["period"]


def tables(results):
    """Return the tables of the experiment's page."""
    (bare,) = filter(is_bare, results["ways"])
    most = max(one["workers"] for one in results["ways"])

    def cells(one):
        spread = f" ± {end(one).std(ddof=1):.3f}" if len(end(one)) > 1 else ""
        return f"{end(one).mean():.3f}{spread} ({one['rate']:g})"

    rows = [["AdamW, data-parallel", f"{sent(results, bare, most) / 1e6:.1f}", *[cells(bare)] * len(WORKERS)]]
    for outer, period in itertools.product(OUTER, PERIODS):
        same = [one for one in results["ways"] if (one["period"], one["outer"]) == (period, outer) and not is_bare(one)]
        if same:
            found = {one["workers"]: cells(one) for one in same}
            megabytes = f"{sent(results, same[0], most) / 1e6:.1f}"
            rows.append([f"k = {period}, {outer}", megabytes, *(found.get(workers, "-") for workers in WORKERS)])
    ends = {(one["outer"], one["period"]): end(one) for one in results["ways"] if one["workers"] == most}
    ends |= {("AdamW", period): end(bare) for period in PERIODS}
    pairs = [("mean", "AdamW"), *((outer, "mean") for outer in OUTER if outer != "mean")]

    def difference(one, other):
        return in_words(paired(ends[one], ends[other]), 3) if one in ends and other in ends else "-"

    differences = [
        [period, *(difference((one, period), (other, period)) for one, other in pairs)] for period in PERIODS
    ]
    processes, text = results["processes"], results["text"]
    return {
        "losses": markdown(["", f"MB sent by one of {most}", *(f"{one} workers" for one in WORKERS)], rows).replace(
            "1 workers", "1 worker"
        ),
        "differences": markdown(["k", *(f"{one} minus {other}" for one, other in pairs)], differences),
        "text": f"{text['training']:,} characters for training, {text['validation']:,} for validation (digest "
        f"{text['sha256']}), {results['steps']} steps, {len(results['seeds'])} seeds.\n",
        "processes": f"{processes['workers']} processes, {processes['steps']} steps, k = {processes['period']}, "
        f"{processes['outer']}: parameters and state differ by at most {processes['difference']:.0e}. A sync sent "
        f"{processes['bytes_of_a_sync'] / 1e6:.3f} MB from each process, {processes['bytes_expected'] / 1e6:.3f} MB by "
        "the closed form.\n",
    }


def plots(results):
    """Return the figures of the experiment's page: losses of the most workers over text, and over bytes."""
    (bare,) = filter(is_bare, results["ways"])
    most = max(one["workers"] for one in results["ways"])
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown = [bare, *(one for one in results["ways"] if one["workers"] == most)]
    styles = dict(zip(OUTER, ("-", "--", ":")))
    colors = dict(zip(PERIODS, (FAST, SLOW, "#009E73")))
    parts = np.arange(1, TIMES + 1) / TIMES
    for one in shown:
        label = "AdamW, data-parallel" if one is bare else f"k = {one['period']}, {one['outer']}"
        style = {"color": BARE} if one is bare else {"color": colors.get(one["period"]), "ls": styles[one["outer"]]}
        curve = np.mean(one["curves"], axis=0)
        left.plot(parts * results["steps"] * BATCH * CONTEXT / 1e6, curve, label=label, linewidth=1, **style)
        right.semilogx(parts * sent(results, one, most) / 1e6, curve, linewidth=1, **style)
    left.set(xlabel="million characters of text", ylabel="validation loss (nats a character)", title=f"{most} workers")
    right.set(xlabel="MB sent by a worker", title="the same: lower and further left is better")
    left.legend(fontsize=7)
    return {"losses": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "flax"])
