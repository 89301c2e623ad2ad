"""Optax: memory with Lookahead and bare, in copies of the weights. Each program has its own process.

python -m on_device.jax_memory DEVICE INNER NAME    prints the bytes of one program
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from on_device.shapes import GIB, MIB, count, transformer

PERIOD = 6
NAMES = ("bare", "lookahead-optim", "lookahead-optim, apply_gradients", "optax")


def shapes_on(device):
    return transformer(4096, GIB) if device != "cpu" else transformer(16, MIB // 16)


def cases(device):
    """Return the cases, functions without arguments by name."""
    return {
        inner: lambda inner=inner: memory(inner, device)
        for inner in ("SGD", "Adam")
        if device != "cpu" or inner == "SGD"
    }


def memory(inner, device):
    """Return the memory that each program holds and its peak, in copies of the weights."""

    def run(name):
        command = [sys.executable, "-m", "on_device.jax_memory", device, inner, name]
        folder = Path(__file__).parent.parent
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        return json.loads(done.stdout.splitlines()[-1])

    copy = 4 * count(shapes_on(device))
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(NAMES, pool.map(run, NAMES)))
    return {
        f"{name}: {key}": value / copy if isinstance(value, int) else value
        for name, values in found.items()
        for key, value in values.items()
    }


def measure(device, inner, name):
    """Return the bytes that one program holds after its cycles, and the peak."""
    import jax

    from cases import Case
    from programs import of_optax

    step, init, to_params = of_optax.optimizers(Case("step", "Optax", inner, period=PERIOD))[name]()
    make = jax.jit(lambda: [jax.random.normal(jax.random.key(0), shape) for shape in shapes_on(device)])
    grads = jax.block_until_ready(make())
    state = jax.jit(lambda grads: (params := to_params([grad + 1 for grad in grads]), init(params)))(grads)
    jitted = jax.jit(lambda state, grads: step(*state, grads), donate_argnums=0)
    compiled = jitted.lower(state, grads).compile()
    for _ in range(3 * PERIOD + 1):
        state = compiled(state, grads)
        jax.block_until_ready(state)
    stats = jax.devices()[0].memory_stats() or {}
    planned = compiled.memory_analysis()
    return {
        "held": stats.get("bytes_in_use", 0),
        "peak": stats.get("peak_bytes_in_use", 0),
        "temporary, as planned": planned.temp_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
