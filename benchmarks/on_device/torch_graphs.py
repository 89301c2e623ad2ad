"""PyTorch: Lookahead around CUDA graphs, and compiled optimizer steps."""

import random
import time

import torch

import cuda_graph
from lookahead_optim.torch import Lookahead
from on_device.shapes import summary
from programs.of_torch import wait
from timing import Program, in_turn, ratios

PERIOD = 6


def cases(device):
    """Return the cases, functions without arguments by name."""
    made = {"the example": lambda: example(device), "a graph around forward, backward and step": lambda: graphs(device)}
    inner = {"AdamW, fused": {"fused": True}}
    if device != "cpu":
        inner |= {"AdamW": {}, "AdamW, capturable": {"capturable": True}}
    return made | {f"compiled step: {name}": lambda kw=kw: compiled(kw, device) for name, kw in inner.items()}


def example(device):
    """Return the largest difference between a run in a graph and the same run without a graph."""
    in_graph, plain = (cuda_graph.train(device, 30, use_graph=use_graph) for use_graph in (device != "cpu", False))
    pairs = list(zip(in_graph.state_dict()["state"].values(), plain.state_dict()["state"].values()))
    return {
        "largest difference of slow weights": max(float((x["slow"] - y["slow"]).abs().max()) for x, y in pairs),
        "counts": [one.param_groups[0]["lookahead_step"] for one in (in_graph, plain)],
    }


def graphs(device):
    """Return times of a training step in a graph and without a graph, with Lookahead and bare."""
    programs = {}
    for name in ("bare, eager", "lookahead-optim, eager", "bare", "lookahead-optim"):
        step = cuda_graph.make_step(
            device, PERIOD if "lookahead" in name else None, use_graph=device != "cpu" and "eager" not in name
        )[0]
        programs[name] = Program(step, wait)
    times = in_turn(programs, PERIOD, 3 if device == "cpu" else 50, random.Random(0))
    return {
        **{f"{name}, seconds": summary(times[name]) for name in times},
        "in a graph, ratio": summary(ratios(times["lookahead-optim"], times["bare"])),
        "eager, ratio": summary(ratios(times["lookahead-optim, eager"], times["bare, eager"])),
    }


def compiled(options, device):
    """Return times of a compiled step, how often it was compiled, and the number of graph breaks."""
    found, programs = {}, {}
    for name in ("bare", "lookahead-optim", "bare, not compiled", "lookahead-optim, not compiled"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        weights = [torch.nn.Parameter(torch.randn(256, 64, device=device)) for _ in range(50 if device != "cpu" else 3)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        inner = torch.optim.AdamW(weights, 1e-3, **options)
        optimizer = Lookahead(inner, PERIOD) if name.startswith("lookahead") else inner
        step = optimizer.step if "not" in name else torch.compile(optimizer.step)
        start = time.perf_counter()
        step()
        wait()
        found[f"{name}: seconds of the first call"] = time.perf_counter() - start
        programs[name] = Program(step, wait)
        frames = []
        for _ in range(2 * PERIOD):
            step()
            frames.append(torch._dynamo.utils.counters["frames"]["ok"])
        found[f"{name}: frames compiled after each step"] = frames
        found[f"{name}: graph breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    times = in_turn(programs, PERIOD, 3 if device == "cpu" else 50, random.Random(0))
    return {
        **found,
        **{f"{name}, seconds": summary(times[name]) for name in times},
        "compiled, ratio": summary(ratios(times["lookahead-optim"], times["bare"])),
        "not compiled, ratio": summary(ratios(times["lookahead-optim, not compiled"], times["bare, not compiled"])),
    }
