"""A program to measure, the timing of several in turn, and the limit."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass
class Program:
    """A training program, bare or wrapped.

    Args:
        step: Function that makes `steps` steps.
        wait: Function that waits for all of them.
        size: Function that returns the number of operations in the compiled graph, or None where there is none.
        bytes_planned: What the compiler plans to hold during a step, and how much of that is temporary.
        steps: Steps that a call of `step` makes.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any] = lambda: None
    size: Callable[[], int] | None = None
    bytes_planned: tuple[int, int] | None = None
    steps: int = 1


def timed(program: Program, calls: int) -> float:
    """Return the seconds that calls of a program take."""
    start = time.perf_counter()
    for _ in range(calls):
        program.step()
    program.wait()
    return time.perf_counter() - start


def in_turn(
    programs: Mapping[str, Program], calls: int, cycles: int, rng: random.Random, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time cycles of `calls` calls, of each program in turn; return seconds per step, one number for each cycle.

    Each turn has an order of its own, by `rng`, as what ran before leaves its mark in the caches.
    """
    for _ in range(warm_up):
        for program in programs.values():
            timed(program, calls)
    times: dict[str, list[float]] = {name: [] for name in programs}
    order = list(programs.items())
    for _ in range(cycles):
        rng.shuffle(order)
        for name, program in order:
            times[name].append(timed(program, calls) / calls / program.steps)
    return times


def ratios(times: list[float], bare: list[float]) -> list[float]:
    """Return each cycle's time over that of the bare optimizer in the same turn."""
    return [one / other for one, other in zip(times, bare)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def limit(arrays: int, period: int, fused: bool = False) -> float:
    """Return the ratio if bytes moved were all that counts, a bare step moving `arrays` arrays.

    A separate sync reads two arrays and writes two. One that is fused into the inner optimizer's last update reads one
    more than that, the slow weights, and writes one more.
    """
    return 1 + (2 if fused else 4) / (arrays * period)
