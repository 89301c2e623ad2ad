"""Programs to measure, timing in turn, ratios, and the limit from memory traffic."""

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
        wait: Function that waits until all steps are done.
        size: Function that returns the number of operations in the compiled graph. None if there is no graph.
        bytes_planned: Bytes that the compiler plans to hold during a step, and the temporary part of these bytes.
        steps: Number of steps in a call of `step`.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any] = lambda: None
    size: Callable[[], int] | None = None
    bytes_planned: tuple[int, int] | None = None
    steps: int = 1


def timed(program: Program, calls: int) -> float:
    """Return the seconds that some calls of a program take."""
    start = time.perf_counter()
    for _ in range(calls):
        program.step()
    program.wait()
    return time.perf_counter() - start


def in_turn(
    programs: Mapping[str, Program], calls: int, cycles: int, rng: random.Random, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time programs in turn, in cycles of `calls` calls. Return seconds per step: for each program, a number per cycle.

    Each turn has its own random order from `rng`, as the caches depend on the program that ran before.
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
    """Return each cycle's time divided by the time of the bare optimizer's cycle in the same turn."""
    return [one / other for one, other in zip(times, bare)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def limit(arrays: int, period: int, fused: bool = False) -> float:
    """Return the lower bound of a ratio from memory traffic.

    A bare step moves `arrays` arrays. A separate sync reads two arrays and writes two. A sync that is fused into the
    inner optimizer's last update moves two arrays more than the update: it reads and writes the slow weights.
    """
    return 1 + (2 if fused else 4) / (arrays * period)
