"""Timing of several programs in turn, and its summary."""

import statistics
import time


def in_turn(runs, steps, cycles, warm_up=3):
    """Time `steps` steps of each run in turn, `cycles` times.

    `runs` are pairs of functions: one makes a step, one waits for all of them. Returns, for each run, a list of seconds
    per cycle.
    """

    def time_cycle(step, wait):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return time.perf_counter() - start

    for _ in range(warm_up):
        for run in runs:
            time_cycle(*run)
    return list(zip(*[[time_cycle(*run) for run in runs] for _ in range(cycles)]))


def ratios(times, bare):
    """Return each cycle's time over that of the bare optimizer in the same turn."""
    return [one / other for one, other in zip(times, bare)]


def summary(values):
    """Return the median and, in brackets, the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} - {high:.2f})"


def limit(arrays, period):
    """Return the ratio if a sync did nothing but read two arrays and write two, a bare step moving `arrays` of them."""
    return 1 + 4 / (arrays * period)
