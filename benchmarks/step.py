"""What Lookahead adds to an optimizer step in Keras: the ratio of wrapped to bare, on every backend.

Ten float32 weights of 1024 x 1024, bare and wrapped measured in turn within one process, one whole cycle at a time.
Keras fixes its backend per process, so each mode runs in a process of its own.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import in_turn, limit, ratios, summary

MODES = {
    "TensorFlow graph": "tensorflow",
    "TensorFlow XLA": "tensorflow",
    "JAX jit": "jax",
    "PyTorch": "torch",
}
INNER = {"SGD": ("SGD", 3), "Adam": ("Adam", 7)}  # name: (class, arrays that a bare step reads and writes)
WEIGHTS, SIDE = 10, 1024


def make_step(mode, inner, period):
    """Return a function that makes one optimizer step and one that waits for it; period None is the bare optimizer."""
    import keras
    import numpy as np

    from lookahead_optim.keras import Lookahead

    rng = np.random.default_rng(0)
    weights = [keras.Variable(rng.normal(size=(SIDE, SIDE)), dtype="float32") for _ in range(WEIGHTS)]
    gradients = [keras.ops.convert_to_tensor(rng.normal(size=(SIDE, SIDE)).astype("float32")) for _ in weights]
    optimizer = getattr(keras.optimizers, INNER[inner][0])(1e-3)
    if period is not None:
        optimizer = Lookahead(optimizer, period)
    optimizer.build(weights)

    if mode == "JAX jit":
        import jax

        update = jax.jit(
            lambda state, gradients: optimizer.stateless_apply(state[1], gradients, state[0]), donate_argnums=0
        )
        state = [weight.value for weight in weights], [variable.value for variable in optimizer.variables]

        def step():
            nonlocal state
            state = update(state, gradients)

        return step, lambda: jax.block_until_ready(state)
    if mode == "PyTorch":
        import torch

        def step():
            with torch.no_grad():
                optimizer.apply(gradients, weights)

        return step, lambda: torch.cuda.synchronize() if torch.cuda.is_available() else None
    import tensorflow as tf

    graph = tf.function(lambda: optimizer.apply(gradients, weights), jit_compile=mode == "TensorFlow XLA")
    return graph, lambda: weights[0].numpy()


def measure(mode, inner, period, cycles):
    """Return seconds per step of the bare optimizer, and the ratio of wrapped to bare in each cycle."""
    bare, wrapped = in_turn([make_step(mode, inner, None), make_step(mode, inner, period)], period, cycles)
    return {"bare": [time / period for time in bare], "ratio": ratios(wrapped, bare)}


def in_own_process(mode, inner, period, cycles):
    """Run `measure` in a process of its own."""
    call = f"import json, step; print(json.dumps(step.measure({mode!r}, {inner!r}, {period}, {cycles})))"
    environment = {**os.environ, "KERAS_BACKEND": MODES[mode], "TF_CPP_MIN_LOG_LEVEL": "3"}
    folder = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", call], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main(
    period: Annotated[int, typer.Option(min=1, help="Sync period.")] = 6,
    cycles: Annotated[int, typer.Option(min=4, help="Cycles to measure; the table shows medians over them.")] = 60,
) -> None:
    """Measure what Lookahead adds to an optimizer step, as a ratio to the bare inner optimizer."""
    console = Console()
    table = Table(
        title=f"Optimizer step, {WEIGHTS} float32 weights of {SIDE} x {SIDE}, sync period {period}",
        caption=f"Medians of {cycles} cycles; in brackets the quartiles. {platform.machine()}, {os.cpu_count()} cores",
    )
    for column in ("mode", "inner", "bare, ms", "wrapped / bare", "limit"):
        table.add_column(column, justify="left" if column in ("mode", "inner") else "right")
    cases = [(mode, inner) for mode in MODES for inner in INNER]
    for mode, inner in track(cases, description="Measuring", console=Console(stderr=True)):
        result = in_own_process(mode, inner, period, cycles)
        bare = statistics.median(result["bare"]) * 1e3
        table.add_row(mode, inner, f"{bare:.2f}", summary(result["ratio"]), f"{limit(INNER[inner][1], period):.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
