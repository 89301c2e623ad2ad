"""What could differ on a GPU: rounding in compiled steps, dtypes, files between devices, and transfers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_optim.optax import lookahead, slow_params
from tests.device import ON_CPU
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.whole_steps import FORMS, whole_step

pytestmark = pytest.mark.gpu

PERIOD = 3
INNER = {"momentum": lambda: optax.sgd(0.05, 0.9), "adamw": lambda: optax.adamw(0.05, eps=1e-3)}
# Of float32 the rounding of a few operations; in half precision a sync may round to the other side.
TOLERANCES = {"float32": 1e-6, "float16": 2e-2, "bfloat16": 1e-1, "float64": 1e-14}


@pytest.fixture(params=[*FORMS, "apply_gradients, in place"])
def form(request, monkeypatch):
    """Return a form of the step. On the CPU the conditional outer step of GPUs runs too."""
    if "in place" in request.param:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return request.param.split(",")[0]


inners = pytest.mark.parametrize("inner", INNER)


def as_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), tree)


def test_arrays_are_on_the_device():
    assert (jnp.ones(1).device.platform == "cpu") == ON_CPU


@pytest.mark.parametrize("dtype", TOLERANCES)
@inners
def test_parameters_are_those_of_the_bare_optimizer_and_a_slow_step_by_hand(form, inner, dtype):
    with jax.enable_x64(dtype == "float64"):
        optimizer = lookahead(INNER[inner](), PERIOD, 0.25)
        step = jax.jit(whole_step(optimizer, form))
        params = make_params(dtype=dtype)
        state, reference = optimizer.init(params), ByHand(INNER[inner](), params, PERIOD, 0.25)
        for index in range(3 * PERIOD):
            grads = make_grads(index, params)
            params, state = step(params, state, grads)
            reference.apply(grads)
            assert_close(as_float64(params), as_float64(reference.params), TOLERANCES[dtype])
            if (index + 1) % PERIOD == 0:
                assert_same_bits(slow_params(state, params), params)


@pytest.mark.parametrize("position", [0, 2, 3, 4])
@inners
def test_a_run_goes_on_from_the_cpu_and_back_bit_for_bit(form, inner, position):
    optimizer = lookahead(INNER[inner](), PERIOD, 0.25)
    step = jax.jit(whole_step(optimizer, form))
    params = make_params()
    state = optimizer.init(params)
    for index in range(position):
        params, state = step(params, state, make_grads(index, params))
    on_host = jax.device_put((params, state), jax.devices("cpu")[0])
    resumed = jax.device_put(jax.tree.map(np.asarray, on_host), jax.devices()[0])
    run = params, state
    for index in range(position, position + 7):
        grads = make_grads(index, run[0])
        run, resumed = step(*run, grads), step(*resumed, grads)
    assert_same_bits(resumed, run)


def test_nothing_is_moved_between_host_and_device_in_steps_with_syncs(form):
    optimizer = lookahead(optax.adam(0.05), PERIOD)
    step = jax.jit(whole_step(optimizer, form))
    params = make_params()
    state, grads = optimizer.init(params), make_grads(0, params)
    # What the constructor and the first trace make of numbers is moved once.
    params, state = step(params, state, grads)
    with jax.transfer_guard("disallow"):
        for _ in range(20):
            params, state = step(params, state, grads)


@pytest.mark.parametrize("size", [0.5, 0.25])
def test_both_ways_of_the_outer_step_are_the_same_bit_for_bit(monkeypatch, size):
    def run(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        optimizer = lookahead(optax.sgd(0.125), PERIOD, size)
        step = jax.jit(whole_step(optimizer, "apply_gradients"))
        params = {**make_params(), "frozen": jnp.ones(2), "integer": jnp.arange(3)}
        state = optimizer.init(params)
        trajectory = []
        for index in range(3 * PERIOD):
            grads = {**make_grads(index, make_params()), "frozen": None, "integer": None}
            params, state = step(params, state, grads)
            trajectory.append((params, slow_params(state, params)))
        return trajectory

    assert_same_bits(run("gpu"), run("cpu"))


def test_the_outer_step_of_gpus_copies_no_weight_between_syncs(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    optimizer = lookahead(optax.adam(0.1), PERIOD)
    params = {name: jnp.ones((256, 256)) for name in "abcdef"}
    state = optimizer.init(params)
    step = jax.jit(whole_step(optimizer, "apply_gradients"), donate_argnums=(0, 1))
    compiled = step.lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["a"].nbytes
    # The captures, in a conditional of their own.
    assert compiled.as_text().count(" conditional(") == 2
    assert len(re.findall(r"= f32\[256,256\]\S* copy\(", compiled.as_text())) == len(params)
