"""Optax: a step over the bare one, whether its dispatch waits for the GPU, and other designs of capture and restart."""

import random
import time

import jax
import jax.numpy as jnp
import optax

from cases import Case
from on_device.shapes import GIB, MIB, summary, transformer
from programs import of_optax
from timing import Program, in_turn, ratios

PERIOD = 6
NEVER = 10**6
SLOW_STEP_SIZE = 0.5


def cases(device):
    """Return the cases."""
    sizes = {"1 GiB, large": transformer(4096, GIB), "400 x 32²": [(32, 32)] * 400}
    if device == "cpu":
        sizes = {"small": transformer(16, MIB // 16)}
    made = {}
    for size, shapes in sizes.items():
        for inner in ("SGD", "Adam"):
            made[f"{size}, {inner}"] = lambda shapes=shapes, inner=inner: steps(shapes, inner, device)
        for inner in ("SGD", "Adam"):
            made[f"designs: {size}, {inner}"] = lambda shapes=shapes, inner=inner: compare(shapes, inner, device)
    return made


def steps(shapes, inner, device):
    """Return what a step costs over the bare one: with a sync every sixth time, and never."""
    made = {}
    for period in (PERIOD, NEVER):
        for name, make in of_optax.optimizers(Case("step", "Optax", inner, period=period)).items():
            if period == PERIOD or name.startswith("lookahead-optim"):
                made[name if period == PERIOD else f"{name}, no sync"] = make()
    return measure(made, shapes, device)


def compare(shapes, inner, device):
    """Return times of the designs."""
    make = of_optax.INNER[inner]
    return measure({"bare": of_optax._with_updates(make()), **designs(make)}, shapes, device)


def measure(made, shapes, device):
    """Return times of (step, function that makes the state, function that makes the parameters), by name."""
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
    """Return times of (compiled step, its state, its other argument), by name, and what was compiled."""
    found = {}
    stepping = {name: Stepping(*program) for name, program in programs.items()}
    times = in_turn({n: Program(p.step, p.wait) for n, p in stepping.items()}, PERIOD, cycles, random.Random(0))
    for name, program in stepping.items():
        cost, text = program.compiled.cost_analysis(), program.compiled.as_text()
        found[name] = {
            "seconds": summary(times[name]),
            "ratio": summary(ratios(times[name], times["bare"])),
            "share of the time until the host goes on": summary([program.dispatch(PERIOD) for _ in range(cycles)]),
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
        """Return the time until the host has dispatched some calls, as a share of the time until they are done."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            self.step()
        given = time.perf_counter()
        self.wait()
        return (given - start) / (time.perf_counter() - start)


# Designs: the mechanism alone. Their state is the inner one, the slow parameters, the count, and whether they were
# captured. All end with the parameters of `apply_gradients`.


def designs(make):
    """Return (step, function that makes the state, function that makes the parameters) of the designs, by name."""

    def of(design):
        optimizer = make()

        def init(params):
            return optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0), jnp.int32(0)

        return design(optimizer), init, lambda params: params

    return {name: of(design) for name, design in DESIGNS.items()}


def _outer(slow, fast):
    return slow + SLOW_STEP_SIZE * (fast - slow)


def _design(capture, restart):
    def make(optimizer):
        def step(params, state, grads):
            inner, slow, count, captured = state
            slow = capture(captured == 0, slow, params)
            updates, inner = optimizer.update(grads, inner, params)
            fast = optax.apply_updates(params, updates)
            count = count + 1
            is_due = count % PERIOD == 0
            params, slow = restart(is_due, slow, fast)
            return params, (inner, slow, count, jnp.where(is_due, 0, 1))

        return step

    return make


def capture_by_conditional(is_stale, slow, params):
    return jax.lax.cond(is_stale, lambda slow, params: params, lambda slow, params: slow, slow, params)


def capture_by_choice(is_stale, slow, params):
    return jax.tree.map(lambda slow, param: jnp.where(is_stale, param, slow), slow, params)


def no_capture(is_stale, slow, params):
    return slow


def restart_by_choice(is_due, slow, fast):
    return jax.tree.map(lambda slow, fast: jnp.where(is_due, _outer(slow, fast), fast), slow, fast), slow


def restart_by_conditional(is_due, slow, fast):
    def outer(slow, fast):
        return jax.tree.map(_outer, slow, fast)

    return jax.lax.cond(is_due, outer, lambda slow, fast: fast, slow, fast), slow


def restart_both_by_choice(is_due, slow, fast):
    params = jax.tree.map(lambda slow, fast: jnp.where(is_due, _outer(slow, fast), fast), slow, fast)
    return params, jax.tree.map(lambda slow, param: jnp.where(is_due, param, slow), slow, params)


def restart_both_by_conditional(is_due, slow, fast):
    def outer(slow, fast):
        new = jax.tree.map(_outer, slow, fast)
        return new, jax.tree.map(jnp.copy, new)

    return jax.lax.cond(is_due, outer, lambda slow, fast: (fast, slow), slow, fast)


def restart_both_by_loop(is_due, slow, fast):
    def outer(carry):
        slow, fast, _ = carry
        new = jax.tree.map(_outer, slow, fast)
        return new, new, False

    slow, fast, _ = jax.lax.while_loop(lambda carry: carry[2], outer, (slow, fast, is_due))
    return fast, slow


DESIGNS = {
    "conditional, choice": _design(capture_by_conditional, restart_by_choice),
    "conditional, conditional": _design(capture_by_conditional, restart_by_conditional),
    "choice, choice": _design(capture_by_choice, restart_by_choice),
    "no capture, both by choice": _design(no_capture, restart_both_by_choice),
    "no capture, both by conditional": _design(no_capture, restart_both_by_conditional),
    "no capture, both by loop": _design(no_capture, restart_both_by_loop),
    "no capture, no sync": _design(no_capture, lambda is_due, slow, fast: (fast, slow)),
}
