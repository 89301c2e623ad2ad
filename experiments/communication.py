"""Bytes and time of communication: DistributedDataParallel against workers that average once in k steps.

Real processes on this machine over gloo. The bytes are those that the kernel wrote for a process (`wchar` of
/proc/self/io), most of them to sockets. On paper, to thousands of workers, with the bytes and messages of ring
reductions and of trees (recursive halving and doubling; Thakur, Rabenseifner and Gropp, 2005).
"""

import math
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, bytes_sent, command, markdown, written
from lookahead_optim.torch import Lookahead, average

PERIODS = (1, 10, 100)
# Weights of the model on paper, in float32: bytes; and of the network between workers, bytes and seconds.
ON_PAPER = 4 * 10**9
NETWORKS = {"in a data centre, 100 Gbit/s, 10 us": (12.5e9, 1e-5), "between sites, 1 Gbit/s, 20 ms": (0.125e9, 2e-2)}
SIZES = [2**power for power in range(1, 13)]


def seconds(workers, size, bandwidth, latency, form="ring"):
    """Return how long a reduction takes whose messages wait for nothing but the network."""
    messages = 2 * (workers - 1) if form == "ring" else 2 * math.ceil(math.log2(workers))
    return messages * latency + bytes_sent(workers, size) / bandwidth


def make(period, width):
    """Return a model, and a function that makes one step with a batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if period is None else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    if period:
        optimizer = Lookahead(optimizer, period, 0.7, slow_momentum=0.9, reduce=average())

    def step(x):
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def train(rank, workers, folder, width, rounds, results):
    """Train in one of several processes in each way in turn, and put bytes and seconds a step into a queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=workers)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(rank))
    ways = {period: make(period, width) for period in (None, *PERIODS)}
    counts = {period: [] for period in ways}
    # The first round captures, compares and allocates.
    for _ in range(1 + rounds):
        for period, (_, step) in ways.items():
            dist.barrier()
            sent, start = written(), time.perf_counter()
            for _ in range(max(PERIODS)):
                step(x)
            counts[period].append([(written() - sent) / max(PERIODS), (time.perf_counter() - start) / max(PERIODS)])
    for period, (model, _) in ways.items():
        sent, took = zip(*counts[period][1:])
        size = sum(parameter.nbytes for parameter in model.parameters())
        found = {"workers": workers, "rank": rank, "period": period, "size": size}
        results.put({**found, "bytes": max(sent), "seconds": min(took)})
    dist.barrier()
    dist.destroy_process_group()


def measure(workers, width, rounds):
    """Return what each process measured in each way."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, workers, Path(folder), width, rounds, results) for rank in range(workers)]
        processes = [context.Process(target=train, args=one, daemon=True) for one in arguments]
        for process in processes:
            process.start()
        found = [results.get(timeout=300) for _ in range(workers * (1 + len(PERIODS)))]
        for process in processes:
            process.join(60)
    return found


def run(quick):
    """Return the results of the experiment."""
    width, rounds = (64, 1) if quick else (512, 3)
    return [one for workers in ((2,) if quick else (1, 2, 4)) for one in measure(workers, width, rounds)]


def way(period):
    """Return what a way to train is called."""
    return "DDP" if period is None else f"k = {period}"


def tables(results):
    """Return the tables of the experiment's page."""
    rows = []
    for workers in sorted({one["workers"] for one in results}):
        for period in (None, *PERIODS):
            same = [one for one in results if (one["workers"], one["period"]) == (workers, period)]
            sent, took = (max(one[name] for one in same) for name in ("bytes", "seconds"))
            expected = bytes_sent(workers, same[0]["size"]) / (period or 1)
            rows.append([workers, way(period), f"{sent / 1e6:.4f}", f"{expected / 1e6:.4f}", f"{1e3 * took:.1f}"])
    paper = []
    for network, (bandwidth, latency) in NETWORKS.items():
        for workers in (8, 64, 1024):
            times = [seconds(workers, ON_PAPER, bandwidth, latency, form) for form in ("ring", "tree")]
            cells = [f"{one:.3g}" for one in (*times, min(times) / 10, min(times) / 100, min(times) / 500)]
            paper.append([network, workers, *cells])
    heading = ["network", "workers", "DDP, ring, s a step", "DDP, tree", *(f"best, k = {k}" for k in (10, 100, 500))]
    return {
        "measured": markdown(["workers", "", "MB sent a step", "closed form", "ms a step"], rows),
        "on_paper": markdown(heading, paper),
    }


def plots(results):
    """Return the figures of the experiment's page."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    for axes, (network, (bandwidth, latency)) in zip(figure.subplots(1, 2), NETWORKS.items()):
        for period, color in zip((1, 10, 100, 500), (BARE, FAST, SLOW, "#009E73")):
            label = "DDP" if period == 1 else f"k = {period}"
            for form, style in (("ring", "-"), ("tree", "--")):
                times = [seconds(size, ON_PAPER, bandwidth, latency, form) / period for size in SIZES]
                axes.loglog(SIZES, times, style, color=color, label=f"{label}, {form}")
        axes.set(title=network, xlabel="workers", ylabel="seconds of communication a step")
    figure.axes[0].legend(fontsize=7, ncols=2)
    return {"time": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch"])
