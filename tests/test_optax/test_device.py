"""What could differ on a GPU: rounding in compiled steps, dtypes, files between devices, and transfers."""

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
# In float32 the rounding of a few operations. In half precision a sync may round to the other side.
TOLERANCES = {"float32": 1e-6, "float16": 2e-2, "bfloat16": 1e-1, "float64": 1e-14}
forms = pytest.mark.parametrize("form", FORMS)
inners = pytest.mark.parametrize("inner", INNER)


def as_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), tree)


def test_arrays_are_on_the_device():
    assert (jnp.ones(1).device.platform == "cpu") == ON_CPU


@pytest.mark.parametrize("dtype", TOLERANCES)
@inners
@forms
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
@forms
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


@forms
def test_nothing_is_moved_between_host_and_device_in_steps_with_syncs(form):
    optimizer = lookahead(optax.adam(0.05), PERIOD)
    step = jax.jit(whole_step(optimizer, form))
    params = make_params()
    state, grads = optimizer.init(params), make_grads(0, params)
    # Numbers that the constructor and the first trace convert are moved once.
    params, state = step(params, state, grads)
    with jax.transfer_guard("disallow"):
        for _ in range(20):
            params, state = step(params, state, grads)
