"""PyTorch: what the host launches in a step and in a sync, and whether the host waits for the GPU."""

import collections
import warnings

import torch

from on_device.torch_optimizers import INNER, PERIOD, WRAPPERS


def cases(device):
    """Return the cases, functions without arguments by name."""
    inner = dict(INNER)
    if device != "cpu":
        inner["AdamW, capturable"] = lambda weights: torch.optim.AdamW(weights, 1e-3, capturable=True)
    return {name: lambda make=make: profile(make, device) for name, make in inner.items()} | {
        "GradScaler": lambda: grad_scaler(device)
    }


def weights_on(device):
    weights = [torch.nn.Parameter(torch.randn(64, 32, device=device)) for _ in range(50 if device != "cpu" else 3)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def profile(make, device):
    """Return calls of the CUDA runtime in steps between syncs and in a step with a sync, with Lookahead and bare."""
    found = {}
    for name, wrap in WRAPPERS.items():
        optimizer = wrap(make(weights_on(device)))
        for _ in range(2 * PERIOD):
            optimizer.step()
        found[name] = {
            kind: calls_of(optimizer.step, steps)
            for kind, steps in {f"{PERIOD - 1} steps": PERIOD - 1, "the step with a sync": 1}.items()
        }
    return found


def calls_of(step, steps):
    """Return how often each function of the CUDA runtime was called, and how many kernels and copies ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        # The profiler itself waits at its end.
    counts = collections.Counter()
    for event in profiler.events():
        if event.name.startswith("cu"):
            counts[event.name] += 1
        elif event.device_type != torch.autograd.DeviceType.CPU:
            counts["copies and sets" if event.name.startswith("Mem") else "kernels"] += 1
    return dict(counts)


def grad_scaler(device):
    """Return how often the host waits in each step of a `GradScaler`, with Lookahead and bare."""
    found = {}
    for name, wrap in WRAPPERS.items():
        weights = weights_on(device)
        optimizer = wrap(INNER["AdamW, foreach"](weights))
        scaler = torch.amp.GradScaler(device)
        scaler.scale(torch.zeros((), device=device))
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("warn")
        waits = []
        for _ in range(2 * PERIOD):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scaler.step(optimizer)
                scaler.update()
            waits.append(sum("synchroniz" in str(one.message) for one in caught))
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
        found[name] = {"waits in each step": waits}
    return found
