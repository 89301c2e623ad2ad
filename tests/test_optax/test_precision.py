"""Rounding in the slow step: low and double precision, complex parameters, long runs, and `optax.lookahead`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_optim._rounded_jax import rounded
from lookahead_optim.optax import lookahead, slow_params, sync
from tests.reference import SGD, Adam, Lookahead
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.whole_steps import FORMS, whole_step

forms = pytest.mark.parametrize("form", FORMS)

SYNC_PERIOD, STEPS = 7, 1001
SYNCS = np.arange(SYNC_PERIOD - 1, STEPS, SYNC_PERIOD)
SLOW_STEP_SIZE = float(np.float32(0.3))


def normal_like(key, params):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(one, leaf.shape, leaf.dtype) for one, leaf in zip(keys, leaves)])


@functools.cache
def trajectory(form, kind):
    """Return the slow parameters before every step, the bare optimizer's step from there, and both after it.

    The last two are the fast and the slow parameters. There is a tuple of these values for each parameter.
    """
    inner = INNER[kind]
    optimizer = lookahead(inner, SYNC_PERIOD, SLOW_STEP_SIZE)
    step = whole_step(optimizer, form)

    def scanned(carry, key):
        params, state = carry
        grads = normal_like(key, params)
        updates, _ = inner.update(grads, state.inner_state, params)
        fast, slow = optax.apply_updates(params, updates), slow_params(state, params)
        params, state = step(params, state, grads)
        return (params, state), (slow, fast, params, slow_params(state, params))

    @jax.jit
    def run(params):
        return jax.lax.scan(scanned, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), STEPS))[1]

    return list(zip(*(map(np.asarray, jax.tree.leaves(part)) for part in run(start(kind)))))


def start(kind):
    rng = np.random.default_rng(0)
    if kind == "bfloat16":
        return {"w": jnp.array(rng.normal(size=20), jnp.bfloat16)}
    if kind == "float16":
        return {"w": jnp.array(rng.normal(size=20), jnp.float16)}
    scales = {"large": 1e8, "usual": 1.0, "small": 1e-8}
    return {name: jnp.array(scale * rng.normal(size=20), jnp.float32) for name, scale in scales.items()}


INNER = {
    "bfloat16": optax.adam(0.01, eps=1e-3, mu_dtype=jnp.float32),
    "float16": optax.adam(0.01, eps=1e-3, mu_dtype=jnp.float32),
    # Updates of about 4: the spacing of float32 is 8 near 1e8. Products with powers of two are exact. So the sums have
    # the same bits, whether or not a compiler fuses the products with the additions that follow.
    "float32": optax.sgd(4.0, momentum=0.5),
}
kinds = pytest.mark.parametrize("kind", INNER)


def spacing(values, dtype):
    info = jnp.finfo(dtype)
    return np.maximum(2.0 ** (np.frexp(values)[1] - 1 - info.nmant), float(info.smallest_subnormal))


@kinds
@forms
def test_fast_and_slow_parameters_are_the_same_after_each_of_143_syncs_and_apart_between(form, kind):
    for slow, fast, params, after in trajectory(form, kind):
        assert_same_bits(params[SYNCS], after[SYNCS])
        assert_same_bits(after[:-1], slow[1:])
        between = np.delete(np.arange(STEPS), SYNCS)
        assert_same_bits(params[between], fast[between])
        assert_same_bits(after[between], slow[between])
        assert np.all(np.any(params[between] != after[between], axis=1))


@kinds
@forms
def test_a_sync_is_off_by_no_more_than_one_rounding_of_each_number_it_computes(form, kind):
    for slow, fast, params, _ in trajectory(form, kind):
        dtype = params.dtype
        before, slow, fast, params = (one.astype("float64") for one in (params[SYNCS - 1], slow, fast, params))
        slow, fast, params = slow[SYNCS], fast[SYNCS], params[SYNCS]
        product = SLOW_STEP_SIZE * (fast - slow)
        target = slow + product
        # The rounding to the dtype, and the roundings of the float32 difference and product.
        roundings = SLOW_STEP_SIZE * spacing(fast - slow, "float32") + spacing(product, "float32")
        roundings += spacing(target, dtype)
        if form == "update":
            # The difference to the parameters before, and the sum of both.
            roundings += spacing(target - before, dtype) + spacing(target, dtype)
        assert np.all(np.abs(params - target) <= 0.50001 * roundings)


@kinds
def test_apply_gradients_gives_the_formula_in_float32_rounded_once(kind):
    for slow, fast, params, _ in trajectory("apply_gradients", kind):
        slow, fast = (one[SYNCS].astype("float32") for one in (slow, fast))
        difference = fast - slow
        # XLA may fuse multiplication and addition; the product is exact in double precision.
        fused = slow + np.multiply(SLOW_STEP_SIZE, difference, dtype="float64")
        plain = slow + np.float32(SLOW_STEP_SIZE) * difference
        is_fused, is_plain = (params[SYNCS] == one.astype("float32").astype(params.dtype) for one in (fused, plain))
        assert np.all(is_fused | is_plain)


MIXED = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
HALF_PRECISION_INNER = {
    "adam": optax.adam(0.05, eps=1e-3, mu_dtype=jnp.float32),
    "momentum": optax.sgd(0.05, momentum=0.9, accumulator_dtype=jnp.float32),
    "sgd": optax.sgd(0.05),
}


@pytest.mark.parametrize("name", HALF_PRECISION_INNER)
@forms
def test_half_precision_parameters_beside_float32_ones_go_as_by_hand(form, name):
    inner = HALF_PRECISION_INNER[name]
    params = {key: jnp.array(np.random.default_rng(1).normal(size=9), dtype) for key, dtype in MIXED.items()}
    optimizer = lookahead(inner, 4, 0.3)
    by_hand, state, step = ByHand(inner, params, 4, 0.3), optimizer.init(params), jax.jit(whole_step(optimizer, form))
    for index in range(4):
        grads = make_grads(index, params)
        params, state = step(params, state, grads)
        by_hand.apply(grads)
    for key, dtype in MIXED.items():
        assert params[key].dtype == state.slow_params[key].dtype == dtype
        roundings = 1 if form == "update" or dtype == jnp.float32 else 0
        scale = np.maximum(
            *(np.abs(np.asarray(one, "float64")) for one in (by_hand.params[key], state.slow_params[key]))
        )
        error = np.abs(np.asarray(params[key], "float64") - np.asarray(by_hand.params[key], "float64"))
        assert np.all(error <= roundings * spacing(scale, dtype))
    assert jax.tree.map(jnp.result_type, state.inner_state) == jax.tree.map(jnp.result_type, by_hand.state)


ORACLES = {
    "momentum": (optax.sgd(0.1, momentum=0.9), lambda: SGD(0.1, momentum=0.9)),
    "adam": (optax.adam(0.1), lambda: Adam(0.1, epsilon=1e-8, pytorch=True)),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ORACLES)
@forms
def test_float64_parameters_follow_the_oracle_to_float64_rounding(form, name, traced):
    inner, make_oracle = ORACLES[name]
    value = np.float32(0.3) if traced else 0.3
    with jax.enable_x64(True):
        params = make_params(dtype="float64")
        oracle = Lookahead(make_oracle(), 5, float(value)).start(jax.tree.leaves(params))

        @jax.jit
        def step(params, state, grads, slow_step_size):
            return whole_step(lookahead(inner, 5, slow_step_size if traced else value), form)(params, state, grads)

        state = lookahead(inner, 5, value).init(params)
        for index in range(23):
            grads = make_grads(index, params)
            params, state = step(params, state, grads, jnp.asarray(value))
            oracle.apply(jax.tree.leaves(grads))
        assert_close(jax.tree.leaves(params), oracle.weights, 1e-14)
        assert_close(jax.tree.leaves(slow_params(state, params)), oracle.slow, 1e-14)
        oracle.sync()
        params, _ = sync(state, params)
        assert_close(jax.tree.leaves(params), oracle.weights, 1e-14)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}


def complex_like(make, dtype, *arguments):
    real, imaginary = make(*arguments), make(*arguments)
    return jax.tree.map(lambda one, other: (one + 1j * other[..., ::-1]).astype(dtype), real, imaginary)


def real_and_imaginary(tree):
    return [part(leaf) for leaf in jax.tree.leaves(tree) for part in (np.real, np.imag)]


COMPLEX_INNER = {
    "sgd": (optax.sgd(0.1, momentum=0.9), lambda: SGD(0.1, momentum=0.9)),
    "adam_of_both_parts": (optax.contrib.split_real_and_imaginary(optax.adam(0.1)), ORACLES["adam"][1]),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("complex64", 1e-5), ("complex128", 1e-14)])
@pytest.mark.parametrize("name", COMPLEX_INNER)
@forms
def test_complex_parameters_follow_the_oracle_in_both_parts(form, name, dtype, tolerance):
    inner, make_oracle = COMPLEX_INNER[name]
    with jax.enable_x64(dtype == "complex128"):
        params = complex_like(make_params, dtype)
        optimizer = lookahead(inner, 5, 0.3)
        oracle = Lookahead(make_oracle(), 5, 0.3).start(real_and_imaginary(params))
        state, step = optimizer.init(params), jax.jit(whole_step(optimizer, form))
        for index in range(13):
            grads = complex_like(make_grads, dtype, index, make_params())
            params, state = step(params, state, grads)
            oracle.apply(real_and_imaginary(grads))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state.slow_params))} == {jnp.dtype(dtype)}
        assert_close(real_and_imaginary(params), oracle.weights, tolerance)
        assert_close(real_and_imaginary(slow_params(state, params)), oracle.slow, tolerance)
        oracle.sync()
        assert_close(real_and_imaginary(sync(state, params)[0]), oracle.weights, tolerance)


@forms
def test_adam_of_complex_moduli_goes_as_by_hand(form):
    params = complex_like(make_params, "complex64")
    optimizer, by_hand = lookahead(optax.adam(0.1), 4, 0.3), ByHand(optax.adam(0.1), params, 4, 0.3)
    state, step = optimizer.init(params), jax.jit(whole_step(optimizer, form))
    for index in range(10):
        grads = complex_like(make_grads, "complex64", index, make_params())
        params, state = step(params, state, grads)
        by_hand.apply(grads)
    assert_close(params, by_hand.params)
    assert_close(slow_params(state, params), by_hand.slow)


AGREEING = [
    ("sgd", optax.sgd(0.05), 5, 0.5),
    ("sgd", optax.sgd(0.05), 1, 0.3),
    ("momentum", optax.sgd(0.02, momentum=0.9), 6, 0.8),
    ("nesterov", optax.sgd(0.02, momentum=0.9, nesterov=True), 20, 0.2),
    ("adam", optax.adam(0.01), 10, 0.5),
    ("adam", optax.adam(0.01), 7, 1.5),
]


@pytest.mark.parametrize(("name", "inner", "sync_period", "slow_step_size"), AGREEING)
@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1")
def test_a_noisy_regression_goes_as_with_optax_lookahead_for_1000_steps(name, inner, sync_period, slow_step_size):
    """Only `optax.lookahead` needs pairs of parameters, `optax.LookaheadParams`."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        inputs = jnp.array(rng.normal(size=(256, 4)))
        labels = jnp.array(inputs @ rng.normal(size=4) + 0.5 * rng.normal(size=256))
        batches = jnp.array(rng.integers(256, size=(1000, 8)))
        params = {"w": jnp.array(rng.normal(size=4)), "b": jnp.zeros(())}
        ours = lookahead(inner, sync_period, slow_step_size)
        theirs = optax.lookahead(inner, sync_period, slow_step_size)

        @jax.grad
        def gradient(params, batch):
            return jnp.mean((inputs[batch] @ params["w"] + params["b"] - labels[batch]) ** 2)

        def our_step(carry, batch):
            params, state = carry
            updates, state = ours.update(gradient(params, batch), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, slow_params(state, params))

        def their_step(carry, batch):
            pair, state = carry
            updates, state = theirs.update(gradient(pair.fast, batch), state, pair)
            pair = optax.apply_updates(pair, updates)
            return (pair, state), tuple(pair)

        @jax.jit
        def run(params):
            pair = optax.LookaheadParams.init_synced(params)
            return (
                jax.lax.scan(our_step, (params, ours.init(params)), batches)[1],
                jax.lax.scan(their_step, (pair, theirs.init(pair)), batches)[1],
            )

        actual, expected = run(params)
        assert_close(actual, expected, 1e-12)
        assert actual[0]["w"].shape == (1000, 4)


@forms
@pytest.mark.parametrize("traced", [False, True])
def test_slow_step_size_1_is_the_bare_optimizer_bit_for_bit(form, traced):
    params = bare = make_params()
    inner = optax.adam(0.1)

    optimizer = lookahead(inner, 3, jnp.array(1.0) if traced else 1.0)
    # Within one function the compiler may fuse the last product of the bare updates into the addition.
    in_parts = traced and form == "update"
    step, bare_step = (
        with_jitted_update(one) if in_parts else jax.jit(whole_step(one, form if one is optimizer else "update"))
        for one in (optimizer, inner)
    )
    bare_state, state = inner.init(params), optimizer.init(params)
    for index in range(10):
        grads = make_grads(index, params)
        params, state = step(params, state, grads)
        bare, bare_state = bare_step(bare, bare_state, grads)
        assert_same_bits(params, bare)
    assert_same_bits(state.inner_state, bare_state)
    assert_same_bits(sync(state, params)[0], bare)


def with_jitted_update(optimizer):
    update = jax.jit(optimizer.update)

    def step(params, state, grads):
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("slow_step_size", [0.3, 1.0, np.array(0.3), np.array(1)])
@pytest.mark.parametrize("form", FORMS)
def test_an_infinite_parameter_without_gradient_stays_what_it_is(form, slow_step_size):
    params = jnp.array([-np.inf, np.inf, 0.0])
    optimizer = lookahead(optax.sgd(0.1), 2, slow_step_size)
    state = optimizer.init(params)
    for _ in range(4):
        params, state = whole_step(optimizer, form)(params, state, jnp.zeros(3))
    np.testing.assert_array_equal(params, [-np.inf, np.inf, 0.0])
    np.testing.assert_array_equal(sync(state, params)[0], [-np.inf, np.inf, 0.0])


@pytest.mark.parametrize("slow_step_size", [1.0, np.array(1.0)])
@pytest.mark.parametrize("form", FORMS)
def test_slow_step_size_1_is_the_bare_optimizer_where_a_parameter_overflows(form, slow_step_size):
    params, grads = jnp.array([1.0, 3e38]), jnp.array([-np.inf, -3e38])
    optimizer = lookahead(optax.sgd(1.0), 1, slow_step_size)
    params, _ = whole_step(optimizer, form)(params, optimizer.init(params), grads)
    np.testing.assert_array_equal(params, [np.inf, np.inf])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slow_step_size_0_with_apply_gradients_returns_to_the_start_bit_for_bit(dtype):
    params = start = make_params(dtype=dtype)
    optimizer = lookahead(optax.adam(0.1), 3, 0.0)
    state, step = optimizer.init(params), jax.jit(whole_step(optimizer, "apply_gradients"))
    for index in range(12):
        params, state = step(params, state, make_grads(index, params))
        if (index + 1) % 3:
            assert not np.array_equal(params["w"], start["w"])
            assert_same_bits(sync(state, params)[0], start)
        else:
            assert_same_bits(params, start)


LARGE = ["float32", "bfloat16", "float16", "float8_e5m2", "complex64"]


def far_apart(dtype):
    """Return slow and fast weights of both signs, so large that their differences overflow or nearly overflow."""
    large = 0.875 * float(jnp.finfo(dtype).max)
    slow, fast = np.array([large, -large, large, 1.0]), np.array([-large, large, large / 2, -1.0])
    if dtype == "complex64":
        slow, fast = slow + 1j * slow[::-1], fast + 1j * fast[::-1]
    return jnp.array(slow, dtype), jnp.array(fast, dtype)


def synced_from(slow, fast, slow_step_size, form, traced, jitted):
    """Return the parameters after a sync between the given slow and fast parameters."""

    def run(slow, fast, slow_step_size):
        optimizer = lookahead(optax.sgd(0.0), 2, slow_step_size)
        zeros = jnp.zeros_like(slow)
        _, state = whole_step(optimizer, "apply_gradients")(slow, optimizer.init(slow), zeros)
        if form == "sync":
            return sync(state, fast)[0]
        return whole_step(optimizer, form)(fast, state, zeros)[0]

    if traced:
        return (jax.jit(run) if jitted else run)(slow, fast, jnp.asarray(slow_step_size))
    return (jax.jit(run, static_argnums=2) if jitted else run)(slow, fast, slow_step_size)


@pytest.mark.parametrize(("traced", "jitted"), [(False, False), (True, True)])
@pytest.mark.parametrize("slow_step_size", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("form", ["apply_gradients", "sync"])
def test_a_sync_of_large_weights_of_opposite_sign_does_not_overflow(form, dtype, slow_step_size, traced, jitted):
    slow, fast = far_apart(dtype)
    actual = synced_from(slow, fast, slow_step_size, form, traced, jitted)
    wide = "complex128" if dtype == "complex64" else "float64"
    expected = (1 - slow_step_size) * np.asarray(slow, wide) + slow_step_size * np.asarray(fast, wide)
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(actual, wide), expected, tolerance, tolerance * np.abs(expected).max())
    if slow_step_size in (0, 1):
        assert_same_bits(actual, fast if slow_step_size else slow)


@pytest.mark.parametrize(("traced", "jitted"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", LARGE)
def test_an_update_goes_as_far_as_it_can_between_large_numbers_of_opposite_sign(dtype, traced, jitted):
    """No finite update leads from a number near the end of the range to its negative."""
    slow, fast = far_apart(dtype)
    actual = synced_from(slow, fast, 0.0, "update", traced, jitted)
    wide = "complex128" if dtype == "complex64" else "float64"
    largest = float(jnp.finfo(dtype).max)
    way = np.asarray(slow, wide) - np.asarray(fast, wide)
    way = np.clip(way.real, -largest, largest) + (1j * np.clip(way.imag, -largest, largest) if way.imag.any() else 0)
    np.testing.assert_allclose(np.asarray(actual, wide), np.asarray(fast, wide) + way, 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("slow_step_size", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["apply_gradients", "sync"])
def test_a_sync_of_numbers_that_are_not_finite_is_the_weighted_mean_or_one_of_both_ends(form, slow_step_size, traced):
    cases = [(-np.inf, -np.inf), (np.inf, np.inf), (1.0, np.inf), (np.inf, 1.0), (-np.inf, np.inf), (1.0, np.nan)]
    slow, fast = (jnp.array(one, "float32") for one in zip(*cases))
    mean = [-np.inf, np.inf, np.inf, np.inf, np.nan, np.nan]
    expected = {0.0: slow, 0.5: mean, 1.0: fast}[slow_step_size]
    np.testing.assert_array_equal(synced_from(slow, fast, slow_step_size, form, traced, True), expected)


@forms
@pytest.mark.parametrize("slow_step_size", [0.0, 0.3, 1.0])
def test_infinite_weights_leave_the_derivatives_of_the_others_alone(form, slow_step_size):
    def last(slow_step_size, fast, mask):
        slow = jnp.array([1.0, mask, 3e38])
        fast = jnp.stack([fast, mask, jnp.float32(-3e38 if form == "apply_gradients" else 3e38)])
        return synced_from(slow, fast, slow_step_size, form, False, False)[0]

    args = jnp.float32(slow_step_size), jnp.float32(3.0), jnp.float32(-jnp.inf)
    by_slow_step_size, by_fast = jax.jit(jax.grad(last, argnums=(0, 1)))(*args)
    np.testing.assert_allclose((by_slow_step_size, by_fast), (2.0, slow_step_size), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_without_a_conversion_is_that_of_the_conversion(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000) * 10.0 ** rng.integers(-12, 6, 2000)
    # Halfway between two numbers, at both ends of the range, and NaN.
    ends = [0.0, -0.0, 65504, 65519, 65520, 2**-14, 2**-14 * (1 - 2**-12), 2**-24, 1.5 * 2**-24, 2**-25, np.inf, np.nan]
    values = np.concatenate([values, ends]).astype("float32")
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).astype("float32")
    np.testing.assert_array_equal(jax.jit(lambda values: rounded(values, dtype))(values), expected)
