"""Optax: optimizer step time divided by the bare step's, and whether the host waits for the GPU."""

import random
import time

import jax

from cases import Case
from on_device.shapes import GIB, MIB, summary, transformer
from programs import of_optax
from timing import Program, in_turn, ratios

PERIOD = 6
NEVER = 10**6


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {"1 GiB, large": transformer(4096, GIB), "100 x 32²": [(32, 32)] * 100}
    if device == "cpu":
        sizes = {"small": transformer(16, MIB // 16)}
    made = {}
    for size, shapes in sizes.items():
        for inner in ("SGD", "Adam") if "large" in size else ("SGD",):
            made[f"{size}, {inner}"] = lambda shapes=shapes, inner=inner: steps(shapes, inner, device)
    return made


def steps(shapes, inner, device):
    """Return times of programs with a sync at every sixth step, and of programs without a sync."""
    made = {}
    for period in (PERIOD, NEVER):
        for name, make in of_optax.optimizers(Case("step", "Optax", inner, period=period)).items():
            if period == PERIOD or name.startswith("lookahead-optim"):
                made[name if period == PERIOD else f"{name}, no sync"] = make()
    return measure(made, shapes, device)


def measure(made, shapes, device):
    """Return times by name.

    Args:
        made: Triples (step, function that makes the state, function that makes the parameters), by name.
        shapes: Shapes of the parameters.
        device: "cuda" or "cpu".
    """
    programs = {}
    grads = [jax.random.normal(key, one) for key, one in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes)]
    for name, (step, init, to_params) in made.items():
        params = to_params([grad + 1 for grad in grads])
        jitted = jax.jit(lambda state, grads, step=step: step(*state, grads), donate_argnums=0)
        state = params, init(params)
        programs[name] = jitted.lower(state, grads).compile(), state, grads
        del state, params
    return measure_steps(programs, cycles=3 if device == "cpu" else 20)


def measure_steps(programs, cycles):
    """Return times and facts about the compiled program, by name.

    Args:
        programs: Triples (compiled step, its state, its other argument), by name.
        cycles: Number of cycles to time.
    """
    found = {}
    stepping = {name: Stepping(*program) for name, program in programs.items()}
    times = in_turn({n: Program(p.step, p.wait) for n, p in stepping.items()}, PERIOD, cycles, random.Random(0))
    for name, program in stepping.items():
        cost, text = program.compiled.cost_analysis(), program.compiled.as_text()
        found[name] = {
            "seconds": summary(times[name]),
            "ratio": summary(ratios(times[name], times["bare"])),
            "share of a step after which the host continues": summary(
                [program.dispatch(PERIOD) for _ in range(cycles)]
            ),
            "gigabytes, as planned": (cost[0] if isinstance(cost, list) else cost).get("bytes accessed", 0) / 1e9,
            "in the program": {
                one: text.count(f" {one}(") for one in ("conditional", "while", "fusion", "copy", "call")
            },
            "commands in graphs": text.count("command_buffer"),
        }
    return found


class Stepping:
    """A compiled function of (state, gradients), with its state."""

    def __init__(self, compiled, state, grads):
        self.compiled, self.state, self.grads = compiled, state, grads

    def step(self):
        self.state = self.compiled(self.state, self.grads)

    def wait(self):
        jax.block_until_ready(self.state)

    def dispatch(self, calls):
        """Return the time until the host has dispatched some calls, divided by the time until the calls are done."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            self.step()
        given = time.perf_counter()
        self.wait()
        return (given - start) / (time.perf_counter() - start)
