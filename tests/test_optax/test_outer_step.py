"""Slow momentum, transformations of pseudo-gradients, and slow parameters of a wider dtype."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_optim.optax import LookaheadState, SlowMomentumState, lookahead, reset_slow_params, slow_params, sync
from tests.reference import SGD, Lookahead
from tests.test_optax.by_hand import assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.whole_steps import FORMS, whole_step

PERIOD, ETA, MU = 3, 0.7, 0.6
INNER = optax.adam(0.05)
forms = pytest.mark.parametrize("form", FORMS)


def train(optimizer, params, steps, state=None, form="update", grads=make_grads):
    """Return parameters and state after the given steps. The step numbers determine the gradients."""
    state = optimizer.init(params) if state is None else state
    step = jitted(optimizer, form)
    for number in steps:
        params, state = step(params, state, grads(number, params))
    return params, state


@functools.cache
def jitted(optimizer, form):
    return jax.jit(whole_step(optimizer, form))


MOMENTUM = lookahead(INNER, PERIOD, ETA, slow_momentum=MU)
NESTEROV = optax.sgd(ETA, momentum=MU, nesterov=True)
OUTER = lookahead(INNER, PERIOD, outer=NESTEROV)


@forms
@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_as_the_outer_transformation_gives_the_bits_of_the_numbers(form, nesterov):
    sgd = optax.sgd(ETA, momentum=MU, nesterov=nesterov)
    numbers = lookahead(INNER, PERIOD, ETA, slow_momentum=MU, slow_nesterov=nesterov)
    outer = lookahead(INNER, PERIOD, outer=sgd)
    params, state = other_params, other_state = train(numbers, make_params(), [])
    other_state = outer.init(other_params)
    for number in range(2 * PERIOD + 2):
        params, state = train(numbers, params, [number], state, form)
        other_params, other_state = train(outer, other_params, [number], other_state, form)
        assert_same_bits(params, other_params)
        assert_same_bits(slow_params(state, params), slow_params(other_state, other_params))
        momentum = optax.tree_utils.tree_get(state, "slow_momentum")
        assert_same_bits(momentum, optax.tree_utils.tree_get(other_state.outer_state, "trace"))
    synced, synced_state = sync(state, params)
    other_synced, other_synced_state = sync(other_state, other_params, outer=sgd)
    assert_same_bits(synced, other_synced)
    assert_same_bits(synced_state.outer_state.slow_momentum, other_synced_state.outer_state[0].trace)
    assert not np.array_equal(synced["w"], params["w"])


@forms
def test_the_outer_step_is_that_of_a_loop_with_a_conditional(form):
    @jax.jit
    def by_hand(carry, grads):
        params, inner_state, slow, outer_state, step = carry
        updates, inner_state = INNER.update(grads, inner_state, params)
        params = optax.apply_updates(params, updates)

        def outer_step(params, slow, outer_state):
            pseudo_gradients = jax.tree.map(jnp.subtract, slow, params)
            moves, outer_state = NESTEROV.update(pseudo_gradients, outer_state, slow)
            slow = optax.apply_updates(slow, moves)
            return slow, slow, outer_state

        params, slow, outer_state = jax.lax.cond(
            step % PERIOD == PERIOD - 1, outer_step, lambda *same: same, params, slow, outer_state
        )
        return params, inner_state, slow, outer_state, step + 1

    params = make_params()
    carry = params, INNER.init(params), params, NESTEROV.init(params), 0
    state = MOMENTUM.init(params)
    for number in range(10):
        carry = by_hand(carry, make_grads(number, params))
        params, state = train(MOMENTUM, params, [number], state, form)
        assert_close((params, slow_params(state, params)), (carry[0], carry[2]))


@pytest.mark.parametrize("transform", ["jit", "eager", "scan", "vmap"])
@forms
def test_momentum_is_the_oracles_under_transformations_of_jax(form, transform):
    step = whole_step(lookahead(optax.sgd(0.1), PERIOD, ETA, slow_momentum=MU), form)
    init = lookahead(optax.sgd(0.1), PERIOD, ETA, slow_momentum=MU).init
    oracle = Lookahead(SGD(0.1), PERIOD, ETA, MU).start(jax.tree.leaves(make_params()))
    all_grads = [make_grads(number, make_params()) for number in range(10)]
    for grads in all_grads:
        oracle.apply(jax.tree.leaves(grads))
    carry = make_params(), init(make_params())
    if transform == "scan":
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_grads)
        carry, _ = jax.jit(
            lambda carry: jax.lax.scan(lambda carry, grads: (step(*carry, grads), None), carry, stacked)
        )(carry)
    else:
        pair = transform == "vmap"
        if pair:
            carry = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), carry)
        run = {"jit": jax.jit, "eager": lambda step: step, "vmap": lambda step: jax.jit(jax.vmap(step))}[transform](
            step
        )
        for grads in all_grads:
            carry = run(*carry, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), grads) if pair else grads)
        if pair:
            for function in (slow_params, sync):
                assert_same_bits(function(carry[1], carry[0]), jax.vmap(function)(carry[1], carry[0]))
            carry = jax.tree.map(lambda leaf: leaf[1], carry)
    params, state = carry
    assert_close(jax.tree.leaves(params), oracle.weights)
    assert_close(jax.tree.leaves(slow_params(state, params)), oracle.slow)
    assert_close(jax.tree.leaves(state.outer_state.slow_momentum), oracle.b)


def test_a_member_of_an_ensemble_has_a_momentum_factor_of_its_own():
    factors = [0.0, 0.5, 0.9]

    @jax.jit
    @jax.vmap
    def run(slow_momentum):
        params, optimizer = make_params(), lookahead(optax.sgd(0.1), PERIOD, ETA, slow_momentum=slow_momentum)
        state = optimizer.init(params)
        for number in range(7):
            params, state = whole_step(optimizer)(params, state, make_grads(number, params))
        return params

    stacked = run(jnp.array(factors))
    for index, factor in enumerate(factors):
        expected, _ = train(lookahead(optax.sgd(0.1), PERIOD, ETA, slow_momentum=factor), make_params(), range(7))
        assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], stacked), expected)


@pytest.mark.parametrize("slow_step_size", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("slow_momentum", [0.0, 0.5])
@forms
def test_derivatives_by_the_settings_are_those_of_the_formula(form, slow_step_size, slow_momentum):
    # x -> r^2 x in a cycle, with r = 1 - 0.2 * 2.
    def ours(slow_step_size, slow_momentum, start):
        optimizer = lookahead(optax.sgd(0.2), 2, slow_step_size, slow_momentum=slow_momentum)
        params, state = {"x": start}, optimizer.init({"x": start})
        for _ in range(6):
            params, state = whole_step(optimizer, form)(params, state, {"x": 2.0 * params["x"]})
        return params["x"]

    def formula(slow_step_size, slow_momentum, start):
        slow, b = start, 0.0
        for _ in range(3):
            s = slow - 0.6**2 * slow
            b = slow_momentum * b + s
            slow = slow - slow_step_size * (s + slow_momentum * b)
        return slow

    with jax.enable_x64(True):
        args = tuple(jnp.array(one, "float64") for one in (slow_step_size, slow_momentum, 1.5))
        actual, expected = (jax.jit(jax.value_and_grad(one, argnums=(0, 1, 2)))(*args) for one in (ours, formula))
        np.testing.assert_allclose(np.array(actual[1]), np.array(expected[1]), rtol=1e-12)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)


def complex_like(tree):
    return jax.tree.map(lambda leaf: (leaf + 1j * leaf[..., ::-1]).astype("complex64"), tree)


@forms
def test_complex_parameters_have_momentum_in_both_parts(form):
    optimizer = lookahead(optax.sgd(0.1), 2, ETA, slow_momentum=MU, slow_dtype="float32")
    params, state = train(
        optimizer,
        complex_like(make_params()),
        range(5),
        form=form,
        grads=lambda n, _: complex_like(make_grads(n, make_params())),
    )
    oracle = Lookahead(SGD(0.1), 2, ETA, MU).start(jax.tree.leaves(make_params()))
    for number in range(5):
        oracle.apply(jax.tree.leaves(make_grads(number, make_params())))
    assert (
        params["w"].dtype == state.slow_params["w"].dtype == state.outer_state.slow_momentum["w"].dtype == "complex64"
    )
    assert_close([np.real(leaf) for leaf in jax.tree.leaves(params)], oracle.weights)


# The state without momentum.


def test_momentum_0_has_no_state_and_the_program_of_the_default():
    params = make_params()
    default, zero = lookahead(INNER, PERIOD), lookahead(INNER, PERIOD, slow_momentum=0.0, slow_nesterov=False)
    state = default.init(params)
    assert state.outer_state is None
    assert jax.tree.structure(state) == jax.tree.structure(zero.init(params))
    for form in FORMS:
        programs = [jax.make_jaxpr(whole_step(one, form))(params, state, params) for one in (default, zero)]
        assert str(programs[0]) == str(programs[1])
    # With float32 weights, float32 is no wider dtype.
    assert jax.tree.structure(lookahead(INNER, slow_dtype="float32").init(params)) == jax.tree.structure(state)


def test_injected_settings_have_no_momentum_unless_it_is_given():
    params = make_params()
    injected = optax.inject_hyperparams(lookahead)
    state = injected(INNER, sync_period=2, slow_step_size=0.5).init(params)
    assert set(state.hyperparams) == {"sync_period", "slow_step_size"}
    assert state.inner_state.outer_state is None
    optimizer = injected(INNER, sync_period=2, slow_step_size=0.5, slow_momentum=0.0, slow_dtype="float32")
    state = optimizer.init(params)
    plain, _ = train(lookahead(INNER, 2), params, range(6), form="update")
    assert_close(train(optimizer, params, range(6), state)[0], plain)
    state.hyperparams["slow_momentum"] = jnp.asarray(0.5, "float32")
    expected, _ = train(lookahead(INNER, 2, slow_momentum=0.5), params, range(6))
    assert_close(train(optimizer, params, range(6), state)[0], expected)


@pytest.mark.parametrize("slow_step_size", [0.0, 0.3, 1.0])
@forms
def test_a_traced_factor_of_0_gives_the_bits_of_the_plain_step(form, slow_step_size):
    traced = lookahead(INNER, PERIOD, jnp.array(slow_step_size), slow_momentum=jnp.array(0.0))
    plain = lookahead(INNER, PERIOD, jnp.array(slow_step_size))
    (params, _), (expected, _) = (
        (lambda params, state: (params, state))(*run_in_parts(one, form)) for one in (traced, plain)
    )
    assert_same_bits(params, expected)


def run_in_parts(optimizer, form, params=None):
    """Train with additions outside of `jit`, so that the compiler fuses nothing into them."""
    params = make_params() if params is None else params
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number in range(7):
        if form == "apply_gradients":
            params, state = optimizer.apply_gradients(make_grads(number, params), state, params)
        else:
            updates, state = update(make_grads(number, params), state, params)
            params = optax.apply_updates(params, updates)
    return params, state


# Cost.


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


SETTINGS_OF_COST = {
    "momentum": ("float32", {"slow_momentum": 0.9}),
    "heavy ball": ("float32", {"slow_momentum": 0.9, "slow_nesterov": False}),
    "half precision": ("bfloat16", {"slow_momentum": 0.9}),
    "wide": ("bfloat16", {"slow_dtype": "float32"}),
    "wide momentum": ("bfloat16", {"slow_dtype": "float32", "slow_momentum": 0.9}),
    "outer": ("float32", {"outer": NESTEROV}),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("inner", [optax.sgd(0.1), INNER], ids=["sgd", "adam"])
@pytest.mark.parametrize("kind", SETTINGS_OF_COST)
def test_a_compiled_step_copies_no_weight_between_syncs_and_updates_all_in_place(kind, inner, traced):
    dtype, settings = SETTINGS_OF_COST[kind]
    weight = jax.ShapeDtypeStruct((512, 512), dtype)
    params = {str(index): weight for index in range(4)}
    state = jax.eval_shape(lookahead(inner, 6, **settings).init, params)

    def step(params, state, grads, period):
        optimizer = lookahead(inner, period if traced else 6, **settings)
        return optimizer.apply_gradients(grads, state, params)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, 6).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # A transformation gets all pseudo-gradients at once, at a sync.
    temporary = size(params) if kind == "outer" else 2 * 512 * 512 * 4 if kind.startswith("wide") else 0
    if kind == "half precision" and jax.__version_info__ >= (0, 12):
        # This XLA keeps fast and slow weights in float32, for one weight at a time.
        temporary = 2 * 512 * 512 * 4
    assert memory.temp_size_in_bytes < temporary + 2**16
    assert size((params, state)) - memory.alias_size_in_bytes < 32
    assert " conditional(" in text
    between_syncs = text[text.index("\nENTRY") :]
    assert "512,512" in between_syncs
    assert not [line for line in between_syncs.splitlines() if "512,512" in line and " copy(" in line]


def test_the_state_takes_two_copies_of_the_parameters_and_five_scalars():
    params = make_params()
    bare = INNER.init(params)
    assert size(MOMENTUM.init(params)) == size(bare) + 2 * size(params) + 4 * 4 + 1


def test_donated_states_share_no_buffer():
    keeping = optax.GradientTransformation(
        lambda params: params, lambda updates, kept, params: (optax.tree.scale(-0.5, updates), kept)
    )
    wide_slow = lookahead(INNER, PERIOD, slow_momentum=MU, slow_dtype="float32")
    for optimizer in (MOMENTUM, OUTER, lookahead(INNER, PERIOD, outer=keeping), wide_slow):
        params = make_params(dtype="bfloat16" if optimizer is wide_slow else "float32")
        state, step = optimizer.init(params), jax.jit(whole_step(optimizer), donate_argnums=(0, 1))
        eager = whole_step(optimizer)
        expected, expected_state = make_copy((params, state))
        for number in range(7):
            grads = make_grads(number, params)
            old = params
            params, state = step(params, state, grads)
            assert old["w"].is_deleted()
            expected, expected_state = eager(expected, expected_state, grads)
            assert_close(jax.tree.map(wide, params), jax.tree.map(wide, expected), 2e-2)


def wide(leaf):
    return np.asarray(leaf, "float64")


def make_copy(tree):
    return jax.tree.map(jnp.copy, tree)


# Steps that count or do not.


@pytest.mark.parametrize("side", ["inside", "around"])
def test_apply_if_finite_guards_the_momentum(side):
    inside = side == "inside"
    settings = {"sync_period": 2, "slow_step_size": ETA, "slow_momentum": MU}
    inner = optax.sgd(0.1)
    optimizer = (
        lookahead(optax.apply_if_finite(inner, 9), **settings)
        if inside
        else optax.apply_if_finite(lookahead(inner, **settings), 9)
    )
    params, state = train(optimizer, make_params(), range(3))
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    skipped, skipped_state = jitted(optimizer, "update")(params, state, bad)
    assert_same_bits(skipped, params)
    momentum = functools.partial(optax.tree_utils.tree_get, key="slow_momentum")
    assert_same_bits(momentum(skipped_state), momentum(state))
    assert_same_bits(train(optimizer, skipped, [3], skipped_state)[0], train(optimizer, params, [3], state)[0])


def test_without_a_guard_a_pseudo_gradient_that_is_no_number_stays_until_a_reset():
    optimizer = lookahead(optax.sgd(0.1), 2, ETA, slow_momentum=MU)
    good, state = train(optimizer, make_params(), range(2))
    params, state = train(
        optimizer, good, range(2), state, grads=lambda *_: jax.tree.map(lambda leaf: leaf * jnp.nan, good)
    )
    params, state = train(optimizer, good, range(2, 4), state)
    assert np.isnan(params["w"]).all()
    state = reset_slow_params(state, good)
    params, state = train(optimizer, good, range(4), state)
    assert np.isfinite(params["w"]).all()


@pytest.mark.parametrize("side", ["inside", "around"])
def test_micro_steps_leave_the_momentum_alone(side):
    inner = optax.sgd(0.1)
    settings = {"sync_period": 2, "slow_step_size": ETA, "slow_momentum": MU}
    if side == "inside":
        optimizer = lookahead(optax.MultiSteps(inner, 2), **settings)
    else:
        optimizer = optax.MultiSteps(lookahead(inner, **settings), 2).gradient_transformation()
    params, _ = train(optimizer, make_params(), [0, 0, 1, 1, 2, 2, 3, 3, 4])
    expected, _ = train(lookahead(inner, **settings), make_params(), range(4))
    assert_close(params, expected)


def apply(params, updates):
    return jax.tree.map(
        lambda param, update: param if update is None else param + update,
        params,
        updates,
        is_leaf=lambda one: one is None,
    )


@pytest.mark.parametrize("outer", [None, NESTEROV], ids=["numbers", "outer"])
@forms
def test_a_frozen_weight_is_not_moved_and_starts_with_no_momentum(form, outer):
    settings = {"outer": outer} if outer else {"slow_step_size": ETA, "slow_momentum": MU}
    optimizer = lookahead(optax.sgd(0.1), 2, **settings)
    params, state = train(optimizer, {"a": jnp.ones(2), "b": jnp.ones(2)}, range(3))
    before = params
    grads = {"a": jnp.ones(2), "b": None}
    if form == "update":
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = apply(params, updates)
    else:
        params, state = jax.jit(optimizer.apply_gradients)(grads, state, params)
    assert state.captured == 0
    assert_same_bits(params["b"], before["b"])
    assert not np.array_equal(params["a"], before["a"])
    if outer is None:
        np.testing.assert_array_equal(state.outer_state.slow_momentum["b"], 0.0)
        assert np.all(state.outer_state.slow_momentum["a"] != 0.0)


@pytest.mark.parametrize("kind", ["numbers", "outer"])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_second_sync_does_nothing_also_after_a_resume(kind, steps):
    optimizer, outer = (MOMENTUM, None) if kind == "numbers" else (OUTER, NESTEROV)
    params, state = train(optimizer, make_params(), range(steps))
    once = sync(state, params, outer=outer)
    assert np.array_equal(once[0]["w"], params["w"]) == (steps == 3)
    twice = sync(pickle.loads(pickle.dumps(jax.tree.map(np.array, once[1]))), once[0], outer=outer)
    assert_same_bits(twice, once)
    assert_same_bits(jax.jit(functools.partial(sync, outer=outer))(once[1], once[0]), once)


@pytest.mark.parametrize("kind", ["numbers", "outer"])
def test_sync_and_reset_reach_through_combinators(kind):
    optimizer, outer = (MOMENTUM, None) if kind == "numbers" else (OUTER, NESTEROV)
    around = optax.chain(optax.identity(), optax.masked(optimizer, {"w": True, "b": [False]}))
    params, state = train(around, make_params(), range(2))
    alone, alone_state = train(
        optimizer, {"w": make_params()["w"]}, range(2), grads=lambda n, _: {"w": make_grads(n, make_params())["w"]}
    )
    synced, state = sync(state, params, outer=outer)
    expected, alone_state = sync(alone_state, alone, outer=outer)
    assert_close(synced["w"], expected["w"])
    assert_same_bits(synced["b"], params["b"])
    found = optax.tree_utils.tree_get_all_with_path(state, "slow_momentum" if kind == "numbers" else "trace")
    (momentum,) = [one["w"] for _, one in found]
    assert_close(momentum, jax.tree.leaves(alone_state.outer_state)[0])
    reset = reset_slow_params(state, synced, outer=outer)
    ((_, momentum),) = optax.tree_utils.tree_get_all_with_path(reset, "slow_momentum" if kind == "numbers" else "trace")
    np.testing.assert_array_equal(momentum["w"], 0.0)


@pytest.mark.parametrize("outer_period", [5, 0])
def test_sync_and_reset_of_nested_lookaheads_change_the_momentum_of_the_outer_one_that_is_on(outer_period):
    optimizer = lookahead(lookahead(optax.sgd(0.1), 2, ETA, slow_momentum=MU), outer_period, ETA, slow_momentum=MU)
    params, state = train(optimizer, make_params(), range(3))
    changed, kept = (state, state.inner_state) if outer_period else (state.inner_state, state)
    _, synced = sync(state, params)
    reset = reset_slow_params(state, params)
    for after in (synced, reset):
        now, other = (after, after.inner_state) if outer_period else (after.inner_state, after)
        assert (
            not np.array_equal(now.outer_state.slow_momentum["w"], changed.outer_state.slow_momentum["w"])
            or after is reset
        )
        assert_same_bits(other.outer_state, kept.outer_state)
        if after is reset:
            np.testing.assert_array_equal(now.outer_state.slow_momentum["w"], 0.0)


def test_a_schedule_of_the_outer_transformation_counts_syncs():
    schedule = optax.piecewise_constant_schedule(0.7, {1: 0.5})
    outer = lookahead(optax.sgd(0.1), 2, outer=optax.sgd(schedule, momentum=MU, nesterov=True))
    numbers = lookahead(optax.sgd(0.1), 2, schedule, slow_momentum=MU)
    assert_close(train(outer, make_params(), range(8))[0], train(numbers, make_params(), range(8))[0])
    _, state = train(outer, make_params(), range(8))
    assert optax.tree_utils.tree_get(state.outer_state, "count") == 4


def test_a_transformation_of_all_weights_gets_all_pseudo_gradients():
    clipped = lookahead(optax.sgd(1.0), 1, outer=optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0)))
    params, _ = train(clipped, make_params(), [0])
    moved = jax.tree.map(jnp.subtract, params, make_params())
    assert float(optax.tree_utils.tree_norm(moved)) == pytest.approx(1.0)


def test_infinite_weights_of_a_mask_stay():
    params = {"w": jnp.array([1.0, -jnp.inf])}
    grads = {"w": jnp.array([1.0, 0.0])}
    for optimizer in (lookahead(optax.sgd(0.1), 2, slow_momentum=MU), lookahead(optax.sgd(0.1), 2, outer=NESTEROV)):
        for form in FORMS:
            trained, _ = train(optimizer, params, range(6), form=form, grads=lambda *_: grads)
            assert np.isfinite(trained["w"][0])
            assert trained["w"][1] == -np.inf


# Slow parameters of a wider dtype.


@pytest.mark.parametrize(("slow_dtype", "expected"), [(None, 1.0), ("float32", 1.25)])
@forms
def test_moves_of_one_unit_of_bfloat16_add_up_in_float32(form, slow_dtype, expected):
    optimizer = lookahead(optax.sgd(1.0), 1, 0.5, slow_dtype=slow_dtype)
    _, state = train(
        optimizer, jnp.ones(1, "bfloat16"), range(64), form=form, grads=lambda *_: jnp.full(1, -(2.0**-7), "bfloat16")
    )
    assert float(state.slow_params[0]) == expected or slow_dtype is None
    assert float(slow_params(state, jnp.ones(1, "bfloat16"))[0]) in (1.0, expected)


MIXED = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


def mixed_params():
    return {name: jnp.array(np.random.default_rng(1).normal(size=9), dtype) for name, dtype in MIXED.items()}


WIDE = {
    "plain": {"slow_step_size": 0.3},
    "momentum": {"slow_step_size": ETA, "slow_momentum": MU},
    "outer": {"outer": NESTEROV},
}


@pytest.mark.parametrize("kind", WIDE)
@forms
def test_fast_weights_are_the_rounded_slow_ones_after_a_sync_bit_for_bit(form, kind):
    optimizer = lookahead(optax.sgd(0.05), PERIOD, slow_dtype="float32", **WIDE[kind])
    params = mixed_params()
    state = optimizer.init(params)
    for number in range(1, 4 * PERIOD + 1):
        before = state
        params, state = train(optimizer, params, [number], state, form)
        assert {name: leaf.dtype for name, leaf in params.items()} == MIXED
        assert {leaf.dtype for leaf in jax.tree.leaves(state.slow_params)} == {jnp.dtype("float32")}
        if number % PERIOD == 0:
            assert_same_bits(
                {name: slow.astype(MIXED[name]) for name, slow in state.slow_params.items() if name != "float32"},
                {name: param for name, param in params.items() if name != "float32"},
            )
            assert not np.array_equal(state.slow_params["bfloat16"], wide(params["bfloat16"]))
        elif number % PERIOD > 1:
            assert_same_bits(state.slow_params, before.slow_params)


@pytest.mark.parametrize("kind", WIDE)
def test_wide_slow_weights_are_those_of_the_formula_from_the_restart_point(kind):
    eta, mu = (0.3, 0.0) if kind == "plain" else (ETA, MU)
    inner = optax.sgd(0.05)
    optimizer = lookahead(inner, PERIOD, slow_dtype="float32", **WIDE[kind])
    params = fast = mixed_params()
    slow = {name: wide(param) for name, param in params.items()}
    b = {name: np.zeros(9) for name in params}
    state, inner_state = optimizer.init(params), inner.init(params)
    for number in range(1, 3 * PERIOD + 1):
        grads = make_grads(number, params)
        params, state = optimizer.apply_gradients(grads, state, params)
        updates, inner_state = inner.update(grads, inner_state, fast)
        fast = optax.apply_updates(fast, updates)
        if number % PERIOD == 0:
            for name, dtype in MIXED.items():
                pseudo_gradient = wide(jnp.asarray(slow[name], dtype)) - wide(fast[name])
                b[name] = mu * b[name] + pseudo_gradient
                slow[name] = slow[name] - eta * (pseudo_gradient + mu * b[name])
                if dtype != jnp.float32:
                    assert_close(state.slow_params[name], slow[name])
            # Both continue from the same numbers.
            fast = params


@pytest.mark.parametrize("settings", [{"slow_step_size": 0.3}, {"outer": optax.sgd(0.3)}], ids=["numbers", "outer"])
@forms
def test_a_weight_that_does_not_move_leaves_its_wide_slow_weight_alone(form, settings):
    optimizer = lookahead(optax.sgd(1.0), 2, slow_dtype="float32", **settings)
    params, state = train(optimizer, mixed_params(), range(4), form=form)
    slow = state.slow_params["bfloat16"]
    assert not np.array_equal(slow, wide(params["bfloat16"]))
    params, state = train(
        optimizer, params, range(7), state, form, lambda _, params: jax.tree.map(jnp.zeros_like, params)
    )
    assert_same_bits(state.slow_params["bfloat16"], slow)
    params, state = sync(state, params, outer=settings.get("outer"))
    assert_same_bits(state.slow_params["bfloat16"], slow)


def test_updates_have_the_wider_dtype_and_end_at_the_rounded_slow_weights():
    optimizer = lookahead(optax.sgd(0.05), 1, 0.3, slow_dtype="float32")
    params = mixed_params()
    updates, state = optimizer.update(make_grads(0, params), optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    ends = optax.apply_updates(params, updates)
    for name in ("bfloat16", "float16"):
        assert_same_bits(ends[name], state.slow_params[name].astype(MIXED[name]))


def test_a_step_size_of_1_copies_to_wide_slow_weights():
    optimizer = lookahead(optax.sgd(0.05), 7, 1.0, slow_dtype="float32")
    params, state = run_in_parts(optimizer, "apply_gradients", mixed_params())
    assert state.captured == 0
    assert_same_bits(params, run_in_parts(optax.sgd(0.05), "update", mixed_params())[0])
    for name in ("bfloat16", "float16"):
        assert_same_bits(state.slow_params[name], params[name].astype("float32"))


def test_moved_and_reset_parameters_are_captured_in_the_wider_dtype():
    optimizer = lookahead(optax.sgd(0.05), 2, 0.3, slow_dtype="float32", slow_momentum=MU)
    params, state = train(optimizer, mixed_params(), range(2))
    # Something else moves one weight after the sync.
    params["bfloat16"] = params["bfloat16"].at[0].add(1.0)
    slow = state.slow_params["bfloat16"]
    _, moved = train(optimizer, params, [2], state)
    assert moved.slow_params["bfloat16"][0] == params["bfloat16"][0].astype("float32")
    assert_same_bits(moved.slow_params["bfloat16"][1:], slow[1:])
    reset = reset_slow_params(moved, params)
    assert_same_bits(reset.slow_params, jax.tree.map(lambda leaf: leaf.astype("float32"), params))
    assert_same_bits(slow_params(reset, params), params)
    np.testing.assert_array_equal(reset.outer_state.slow_momentum["bfloat16"], 0.0)


def test_sync_by_hand_is_as_one_that_is_due():
    settings = {"slow_step_size": ETA, "slow_momentum": MU, "slow_dtype": "float32"}
    due, never = (lookahead(optax.sgd(0.05), period, **settings) for period in (3, 100))
    params, state = train(due, mixed_params(), range(3), form="apply_gradients")
    other, other_state = sync(*train(never, mixed_params(), range(3), form="apply_gradients")[::-1])
    assert_same_bits(other, params)
    assert_same_bits(other_state.outer_state.slow_momentum, state.outer_state.slow_momentum)
    # XLA rounds a sum and a product only once if it fuses them.
    assert_close(other_state.slow_params["bfloat16"], state.slow_params["bfloat16"])


def test_float64_slow_weights_of_float32_parameters():
    optimizer = lookahead(optax.sgd(0.05), 2, 0.3, slow_dtype="float64", slow_momentum=MU)
    with pytest.raises(ValueError, match=r"`slow_dtype` must be a dtype that JAX has: .*Received: slow_dtype=float64"):
        optimizer.init(make_params())
    with jax.enable_x64(True):
        params, state = train(optimizer, make_params(), range(4))
        assert state.slow_params["w"].dtype == state.outer_state.slow_momentum["w"].dtype == "float64"
        assert params["w"].dtype == "float32"
        assert_same_bits(state.slow_params["w"].astype("float32"), params["w"])


# Errors.


@pytest.mark.parametrize(
    ("slow_dtype", "dtype"), [("bfloat16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16")]
)
def test_a_dtype_that_cannot_hold_the_weights_is_refused_at_init(slow_dtype, dtype):
    message = rf"`slow_dtype` must hold all values .*Received: slow_dtype={slow_dtype} for a weight of {dtype}"
    with pytest.raises(ValueError, match=message):
        lookahead(INNER, slow_dtype=slow_dtype).init({"w": jnp.ones(2, dtype), "i": jnp.arange(2)})


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"slow_step_size": 0.7}, r"slow_step_size=0\.7"),
        ({"slow_momentum": 0.9}, r"slow_momentum=0\.9"),
        ({"slow_nesterov": False}, r"slow_nesterov=False"),
        ({"slow_step_size": optax.constant_schedule(0.5)}, r"slow_step_size=<function"),
        ({"slow_momentum": jnp.array(0.0)}, r"slow_momentum="),
    ],
)
def test_outer_with_settings_that_it_replaces_is_refused(settings, received):
    with pytest.raises(ValueError, match=rf"`outer` stands in the place of .*Received: {received}.* beside outer"):
        lookahead(INNER, outer=NESTEROV, **settings)


def test_outer_may_be_injected_around_with_its_step_size_left_alone():
    injected = optax.inject_hyperparams(lookahead, static_args="slow_step_size")
    optimizer = injected(INNER, sync_period=PERIOD, outer=NESTEROV)
    assert_close(train(optimizer, make_params(), range(5))[0], train(OUTER, make_params(), range(5))[0])


PLAIN = lookahead(INNER, PERIOD)
KINDS = {"plain": PLAIN, "momentum": MOMENTUM, "outer": OUTER, "other outer": lookahead(INNER, PERIOD, outer=INNER)}


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("of", KINDS)
def test_a_state_of_another_outer_step_is_refused_and_goes_on_by_the_remedy(of, to):
    params, state = train(KINDS[of], make_params(), range(4))
    optimizer = KINDS[to]
    if of == to:
        train(optimizer, params, [4], state)
        return
    message = r"(?s)`state` must be that of a `lookahead` with the same outer step.*_replace\(outer_state=.*Received: "
    for step in (optimizer.update, optimizer.apply_gradients, jax.jit(optimizer.update)):
        with pytest.raises(ValueError, match=message):
            step(make_grads(4, params), state, params)
    slow = slow_params(state, params)
    state = state._replace(outer_state=optimizer.init(params).outer_state)
    params, state = train(optimizer, params, [4], state)
    assert_same_bits(slow_params(state, params), slow)


def test_a_state_of_another_slow_dtype_is_refused_and_goes_on_by_the_remedy():
    params, state = train(lookahead(INNER, PERIOD), mixed_params(), range(4))
    optimizer = lookahead(INNER, PERIOD, slow_dtype="float32")
    with pytest.raises(ValueError, match=r"`state` must have slow parameters of `slow_dtype`.*with slow parameters of"):
        optimizer.update(params, state, params)
    state = optimizer.init(params)._replace(inner_state=state.inner_state, step=state.step)
    params, state = train(optimizer, params, [4, 5], state)
    assert state.step == 6


@pytest.mark.parametrize("function", [sync, reset_slow_params])
def test_sync_and_reset_need_the_outer_transformation_and_no_other(function):
    params, state = train(OUTER, make_params(), range(4))
    with pytest.raises(
        ValueError, match=r"`outer` must be the transformation .*Received: outer=None with a state with"
    ):
        function(state, params)
    with pytest.raises(TypeError, match=r"`outer` must be an `optax.GradientTransformation`.*Received: outer=0\.7"):
        function(state, params, outer=0.7)
    if function is sync:
        with pytest.raises(ValueError, match=r"`outer` must be the transformation .*whose state has"):
            function(state, params, outer=optax.adam(0.1))
    params, state = train(MOMENTUM, make_params(), range(4))
    with pytest.raises(ValueError, match=r"`outer` must be the transformation .*with a state without that of one"):
        function(state, params, outer=NESTEROV)


def test_a_state_that_was_pickled_without_an_outer_state_loads():
    params, state = train(PLAIN, make_params(), range(4))
    older = pickle.loads(pickle.dumps(jax.tree.map(np.array, state))).__class__(*tuple(state)[:5])
    assert isinstance(older, LookaheadState)
    assert_same_bits(train(PLAIN, params, range(4, 8), older), train(PLAIN, params, range(4, 8), state))


def test_the_state_of_the_momentum_names_the_public_module():
    pickled = pickle.dumps(jax.tree.map(np.asarray, MOMENTUM.init(make_params())))
    assert b"lookahead_optim.optax." not in pickled
    assert isinstance(pickle.loads(pickled).outer_state, SlowMomentumState)


def test_switched_off_there_is_no_outer_state():
    assert lookahead(INNER, 0, slow_momentum=MU).init(make_params()).outer_state is None


OF_PERIODS = {
    "settings": lambda period: lookahead(optax.sgd(0.1), period, 0.7, slow_momentum=0.9),
    "outer": lambda period: lookahead(optax.sgd(0.1), period, outer=optax.sgd(0.7, momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("make", OF_PERIODS.values(), ids=OF_PERIODS)
def test_a_period_of_0_drops_the_momentum(make, is_traced):
    # Five steps with period 2, three with 0, six with 4: syncs after steps 2, 4 and 12. At the last sync s = b = 1.
    params = {"w": jnp.ones(1)}
    state = make(2).init(params)
    for period, gradients in ((2, range(1, 6)), (0, range(1, 4)), (4, range(1, 7))):
        optimizer = make(jnp.asarray(period) if is_traced else period)
        for gradient in gradients:
            grads = {"w": jnp.full(1, float(gradient))}
            params, state = optimizer.apply_gradients(grads, state, params)
        if not period:
            momentum = jax.tree.leaves(state.outer_state)[0]
            assert float(momentum[0]) == 0
    at_4 = 1 - 0.7 * (0.3 + 0.9 * 0.3) - 0.7 * (0.7 + 0.9 * (0.9 * 0.3 + 0.7))
    at_12 = at_4 - 0.1 * (5 + 1 + 2 + 3) - 0.7 * (1 + 0.9)
    assert float(params["w"][0]) == pytest.approx(at_12 - 0.1 * (5 + 6), abs=1e-5)


def test_an_outer_transformation_may_return_its_state_in_another_dtype():
    # If its momentum factor is an array, `optax.sgd` makes float32 of the momentum of a weight in bfloat16.
    outer = optax.inject_hyperparams(optax.sgd)(0.7, momentum=0.9)
    params = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(3)}
    optimizer = lookahead(optax.sgd(0.1), 2, outer=outer)
    state = optimizer.init(params)
    step = jax.jit(lambda params, state: optimizer.apply_gradients(jax.tree.map(jnp.ones_like, params), state, params))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for _ in range(4):
        params, state = step(params, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == dtypes
    # s = 0.2 in each cycle; b = 0.2, then 0.38.
    np.testing.assert_allclose(params["v"], 1 - 0.7 * 0.58, rtol=1e-6)
    np.testing.assert_allclose(params["w"].astype(jnp.float32), 1 - 0.7 * 0.58, rtol=2e-2)


def test_no_early_sync_warns_with_momentum(recwarn):
    params, state = train(MOMENTUM, make_params(), range(2))
    sync(state, params)
    lookahead(INNER, 3, 1.5, slow_momentum=0.5)
    assert [one for one in recwarn if one.category is UserWarning] == []


def test_repr_has_the_settings_of_the_outer_step():
    assert repr(MOMENTUM).endswith("sync_period=3, slow_step_size=0.7, slow_momentum=0.6, slow_nesterov=True)")
    assert repr(lookahead(INNER, outer=NESTEROV, slow_dtype=jnp.float32)).endswith(
        f"outer={NESTEROV_REPR}, slow_dtype='float32')"
    )


NESTEROV_REPR = repr(optax.with_extra_args_support(NESTEROV))


def test_inner_moments_can_be_reset_at_a_sync():
    """The recipe in the docs."""
    params, state = train(MOMENTUM, make_params(), range(PERIOD))
    assert state.captured == 0
    reset = state._replace(inner_state=INNER.init(params))
    after, _ = train(MOMENTUM, params, [9], reset)
    updates, _ = INNER.update(make_grads(9, params), INNER.init(params), params)
    assert_close(after, optax.apply_updates(params, updates))
