"""The run time of the state machines of random operations: bounded in the tests, `FUZZ_SECONDS` in `make fuzz`.

A machine is a `hypothesis.stateful.RuleBasedStateMachine` whose rules are made with `operation`, which counts them.
"""

import collections
import functools
import os
import time

import hypothesis
from hypothesis import stateful

__all__ = ["operation", "run"]

_counts: collections.Counter[str] = collections.Counter()


def operation(**arguments):
    """Return a decorator like `hypothesis.stateful.rule` that also counts the rule."""

    def decorate(function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            _counts[function.__name__] += 1
            return function(*args, **kwargs)

        return stateful.rule(**arguments)(counted)

    return decorate


def run(machine, examples, steps):
    """Run a machine: `examples` times, up to `steps` operations each, always the same operations.

    If `FUZZ_SECONDS` is set, run it that long instead, with other operations in each round, and print their number.
    """
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    seconds = float(os.environ.get("FUZZ_SECONDS", 0))
    if not seconds:
        stateful.run_state_machine_as_test(machine, settings=settings)
        return
    settings = hypothesis.settings(settings, derandomize=False, print_blob=True)
    _counts.clear()
    seed = start = int(os.environ.get("FUZZ_SEED", time.time()))
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            stateful.run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
            seed += 1
    finally:
        print(f"\n{machine.__name__}: {_counts.total()} operations, seeds {start} to {seed}: {dict(_counts)}")
