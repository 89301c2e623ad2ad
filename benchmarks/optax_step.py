"""What Lookahead adds to an optimizer step in Optax: both forms of this library and `optax.lookahead`, over bare.

All are measured in turn within one process, one whole cycle at a time, jitted with donated parameters and state. JAX
allocates and frees temporary buffers at every step, which costs more in page faults than in arithmetic with some
allocators: compare runs with another one in LD_PRELOAD, tcmalloc for example.
"""

import os
import platform
import statistics
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import in_turn, limit, ratios, summary

from lookahead_optim.optax import lookahead

SHAPES = {"10 of 1024 x 1024": (10, 1024), "400 of 32 x 32": (400, 32)}
INNER = {"SGD": (optax.sgd, 3), "Adam": (optax.adam, 7)}  # name: (function, arrays that a bare step reads and writes)


def make_params(shape):
    count, side = SHAPES[shape]
    return [jax.random.normal(key, (side, side)) for key in jax.random.split(jax.random.key(0), count)]


def with_updates(optimizer):
    """Return a step that adds updates to parameters, as nearly all programs do."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def forms(inner, period):
    """Return step, function that makes the state, and function that makes the parameters, by name; bare comes first."""
    ours, theirs = lookahead(inner, period), optax.lookahead(inner, period, 0.5)

    def with_apply_gradients(params, state, grads):
        return ours.apply_gradients(grads, state, params)

    def pair(params):
        return optax.LookaheadParams(fast=params, slow=jax.tree.map(jnp.copy, params))

    return {
        "bare": (with_updates(inner), inner.init, lambda params: params),
        "updates": (with_updates(ours), ours.init, lambda params: params),
        "apply_gradients": (with_apply_gradients, ours.init, lambda params: params),
        "optax.lookahead": (with_updates(theirs), theirs.init, pair),
    }


def make_step(shape, step, init, to_params):
    """Return a function that makes one step, one that waits for all, and bytes: held during a step, and temporary."""
    params, grads = to_params(make_params(shape)), make_params(shape)
    state = init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    def run():
        nonlocal params, state
        params, state = compiled(params, state, grads)

    return run, lambda: jax.block_until_ready((params, state)), held, memory.temp_size_in_bytes


def main(
    periods: Annotated[str, typer.Option(help="Sync periods, separated by commas.")] = "5,6",
    cycles: Annotated[int, typer.Option(min=4, help="Cycles to measure; the table shows medians over them.")] = 60,
) -> None:
    """Measure what Lookahead adds to an optimizer step in Optax, as a ratio to the bare inner transformation."""
    device = jax.devices()[0]
    machine = device.device_kind if device.platform == "gpu" else f"{platform.machine()}, {os.cpu_count()} cores"
    preloaded = [Path(library).name for library in os.environ.get("LD_PRELOAD", "").split()]
    table = Table(
        title=f"Optimizer step, float32 parameters, Optax {optax.__version__}, JAX {jax.__version__}: over a bare one",
        caption=f"Medians of {cycles} cycles; in brackets the quartiles. Memory in copies of the parameters, more than "
        f"bare; of it temporary. {machine}, allocator: {', '.join(preloaded) or 'the system default'}",
    )
    for name in ("parameters", "inner", "period", "bare, ms", "limit", "form", "over bare", "memory", "temporary"):
        table.add_column(name, justify="left" if name in ("parameters", "inner", "form") else "right")
    cases = [(shape, inner, int(period)) for shape in SHAPES for inner in INNER for period in periods.split(",")]
    for shape, inner, period in track(cases, description="Measuring", console=Console(stderr=True)):
        optimizer, arrays = INNER[inner]
        named = forms(optimizer(1e-3), period)
        runs, waits, held, temporary = zip(*(make_step(shape, *form) for form in named.values()))
        bare, *wrapped = in_turn(list(zip(runs, waits)), period, cycles)
        copy = sum(param.nbytes for param in make_params(shape))
        bare_ms = f"{statistics.median(bare) / period * 1e3:.2f}"
        case = (shape, inner, str(period), bare_ms, f"{limit(arrays, period):.2f}")
        for index, (form, times) in enumerate(zip(list(named)[1:], wrapped), 1):
            row_temporary = (temporary[index] - temporary[0]) / copy
            row_held = (held[index] - held[0]) / copy + row_temporary
            table.add_row(*case, form, summary(ratios(times, bare)), f"{row_held:.2f}", f"{row_temporary:.2f}")
            case = ("",) * len(case)
        table.add_section()
    Console(width=None if Console().is_terminal else 150).print(table)


if __name__ == "__main__":
    typer.run(main)
