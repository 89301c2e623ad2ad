"""`lookahead` inside and around the combinators and wrappers of Optax, in short trainings with real gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from lookahead_optim.optax import LookaheadState, lookahead, reset_slow_params, slow_params, sync
from tests import reference
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.training_runs import (
    SLOW_STEP_SIZE,
    SYNC_PERIOD,
    assert_as_by_hand,
    by_hand,
    gradient,
    make_batch,
    stepper,
)

MOMENTUM = optax.sgd(0.1, momentum=0.5)


def wrapped(inner=MOMENTUM, sync_period=SYNC_PERIOD, slow_step_size=SLOW_STEP_SIZE):
    return lookahead(inner, sync_period, slow_step_size)


def run(optimizer, steps, params=None, state=None, gradients=None):
    """Train; yield the number of each step, and the parameters and state after it."""
    params = make_params() if params is None else params
    state = optimizer.init(params) if state is None else state
    step = stepper(optimizer)
    for number in range(1, steps + 1):
        grads = gradients(params, number) if gradients else gradient(params, make_batch(number))
        params, state = step(grads, state, params)
        yield number, params, state


def last_of(optimizer, steps, **options):
    *_, (_, params, state) = run(optimizer, steps, **options)
    return params, state


# Around and inside: the same as the bare transformation and a slow step.


@pytest.mark.parametrize(
    ("optimizer", "bare"),
    [
        pytest.param(
            optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), wrapped()),
            optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), MOMENTUM),
            id="behind_others_in_chain",
        ),
        pytest.param(
            wrapped(optax.chain(optax.clip_by_global_norm(0.5), MOMENTUM, optax.keep_params_nonnegative())),
            optax.chain(optax.clip_by_global_norm(0.5), MOMENTUM, optax.keep_params_nonnegative()),
            id="around_chain",
        ),
        pytest.param(wrapped(optax.flatten(optax.adam(0.1))), optax.adam(0.1), id="around_flatten"),
        pytest.param(
            wrapped(optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.2, 8), momentum=0.5)),
            optax.sgd(optax.cosine_decay_schedule(0.2, 8), momentum=0.5),
            id="around_inject_hyperparams",
        ),
        pytest.param(
            optax.inject_hyperparams(lookahead)(MOMENTUM, SYNC_PERIOD, SLOW_STEP_SIZE),
            MOMENTUM,
            id="in_inject_hyperparams",
        ),
        pytest.param(optax.apply_if_finite(wrapped(), 3), MOMENTUM, id="in_apply_if_finite"),
        pytest.param(wrapped(optax.apply_if_finite(MOMENTUM, 3)), MOMENTUM, id="around_apply_if_finite"),
        pytest.param(
            wrapped(optax.masked(optax.sgd(0.1), {"w": True, "b": False})),
            optax.masked(optax.sgd(0.1), {"w": True, "b": False}),
            id="around_masked",
        ),
        pytest.param(
            wrapped(optax.partition({"a": optax.adam(0.1), "z": MOMENTUM}, {"w": "a", "b": "z"})),
            optax.partition({"a": optax.adam(0.1), "z": MOMENTUM}, {"w": "a", "b": "z"}),
            id="around_partition",
        ),
        pytest.param(
            wrapped(contrib.mechanize(optax.sgd(0.1), s_init=0.1)),
            contrib.mechanize(optax.sgd(0.1), s_init=0.1),
            id="around_mechanize",
        ),
        pytest.param(
            wrapped(contrib.schedule_free(optax.sgd(0.1), 0.1)),
            contrib.schedule_free(optax.sgd(0.1), 0.1),
            id="around_schedule_free",
        ),
    ],
)
def test_lookahead_beside_or_around_is_the_bare_transformation_and_a_slow_step(optimizer, bare):
    assert_as_by_hand(optimizer, by_hand(bare))


@pytest.mark.parametrize("period", [2, 3])
def test_slow_step_size_may_follow_the_count_of_syncs(period):
    sizes = [0.5, 0.25, 0.75, 0.0]
    optimizer = wrapped(MOMENTUM, period, lambda syncs: jnp.array(sizes)[syncs])
    hand = by_hand(MOMENTUM, period)
    params, step = hand.params, stepper(optimizer)
    state = optimizer.init(params)
    for number in range(1, 3 * period + 2):
        hand.slow_step_size = sizes[(number - 1) // period]
        hand.apply(gradient(hand.params, make_batch(number)))
        params, state = step(gradient(params, make_batch(number)), state, params)
        assert_close(params, hand.params)
        assert_close(slow_params(state, params), hand.slow)


@pytest.mark.parametrize(
    "behind",
    [optax.scale(0.7), optax.add_decayed_weights(0.05), optax.keep_params_nonnegative(), optax.clip(0.05)],
    ids=["scale", "add_decayed_weights", "keep_params_nonnegative", "clip"],
)
def test_after_a_sync_slow_are_the_parameters_that_a_transformation_behind_in_chain_leads_to(behind):
    first = jax.tree.map(jnp.abs, make_params())
    change = jax.jit(behind.update)
    bare = jax.jit(MOMENTUM.update)
    params = slow = first
    state, change_state = MOMENTUM.init(first), behind.init(first)
    for number, actual, actual_state in run(optax.chain(wrapped(), behind), 2 * SYNC_PERIOD + 1, first):
        updates, state = bare(gradient(params, make_batch(number)), state)
        if number % SYNC_PERIOD == 0:
            fast = optax.apply_updates(params, updates)
            updates = jax.tree.map(lambda one, fast, param: one + 0.25 * (fast - one) - param, slow, fast, params)
        updates, change_state = change(updates, change_state, params)
        params = optax.apply_updates(params, updates)
        if number % SYNC_PERIOD == 0:
            slow = params
            assert_same_bits(slow_params(actual_state, actual), actual)
        assert_close(actual, params)
        assert_close(slow_params(actual_state, actual), slow)


# Masks, labels.


@pytest.mark.parametrize(
    "mask",
    [{"w": True, "b": [False]}, {"w": True, "b": False}, lambda params: jax.tree.map(lambda one: one.ndim > 1, params)],
    ids=["tree", "prefix", "function"],
)
def test_masked_out_parameters_have_no_lookahead(mask):
    # Masked parameters take the gradients as updates. Here these are scaled before the mask.
    optimizer = optax.chain(optax.scale(-0.1), optax.masked(wrapped(optax.scale(1.5)), mask))
    hand_w, hand_b = by_hand(optax.sgd(0.15)), by_hand(optax.sgd(0.1), sync_period=100)
    for number, params, state in run(optimizer, 2 * SYNC_PERIOD + 1):
        grads = gradient({"w": hand_w.params["w"], "b": hand_b.params["b"]}, make_batch(number))
        hand_w.apply(grads)
        hand_b.apply(grads)
        assert_close(params, {"w": hand_w.params["w"], "b": hand_b.params["b"]})
        slow = slow_params(state, params)
        assert_close(slow["w"], hand_w.slow["w"])
        assert_same_bits(slow["b"], params["b"])


@pytest.mark.parametrize(
    ("for_w", "for_b"),
    [((SYNC_PERIOD, 0.25), None), ((2, 0.5), (3, 0.25)), (None, (3, 0.25))],
    ids=["first_only", "two", "second_only"],
)
def test_every_label_of_a_partition_has_its_own_lookahead_or_none(for_w, for_b):
    def made(settings):
        return wrapped(MOMENTUM, *settings) if settings else MOMENTUM

    optimizer = optax.partition({"one": made(for_w), "other": made(for_b)}, {"w": "one", "b": "other"})
    hand_w, hand_b = (by_hand(MOMENTUM, *(settings or (100,))) for settings in (for_w, for_b))
    for number, params, state in run(optimizer, 7):
        grads = gradient({"w": hand_w.params["w"], "b": hand_b.params["b"]}, make_batch(number))
        for hand in (hand_w, hand_b):
            hand.apply(grads)
        assert_close(params, {"w": hand_w.params["w"], "b": hand_b.params["b"]})
        slow = slow_params(state, params)
        assert_close(slow["w"], hand_w.slow["w"] if for_w else params["w"])
        assert_close(slow["b"], hand_b.slow["b"] if for_b else params["b"])


@pytest.mark.parametrize("way", ["freeze_behind", "freeze_inside", "selective_transform", "selective_inside"])
def test_frozen_parameter_keeps_its_bits_and_the_others_have_lookahead(way):
    frozen = {"w": False, "b": [True]}
    optimizer = {
        "freeze_behind": lambda: optax.chain(wrapped(), optax.transforms.freeze(frozen)),
        "freeze_inside": lambda: wrapped(optax.chain(MOMENTUM, optax.transforms.freeze(frozen))),
        "selective_transform": lambda: optax.transforms.selective_transform(wrapped(), freeze_mask=frozen),
        "selective_inside": lambda: wrapped(optax.transforms.selective_transform(MOMENTUM, freeze_mask=frozen)),
    }[way]()
    hand = by_hand(optax.chain(MOMENTUM, optax.transforms.freeze(frozen)))
    params, state = assert_as_by_hand(optimizer, hand)
    assert_same_bits(params["b"], make_params()["b"])
    assert_same_bits(slow_params(state, params)["b"], params["b"])


# Steps that do not count.


@pytest.mark.parametrize("way", ["inside", "inside_as_object", "around"])
def test_micro_steps_of_gradient_accumulation_do_not_count(way):
    micro = 2
    multi_steps = optax.MultiSteps(wrapped() if way == "around" else MOMENTUM, micro)
    optimizer = {
        "inside": lambda: wrapped(multi_steps.gradient_transformation()),
        "inside_as_object": lambda: wrapped(multi_steps),
        "around": multi_steps.gradient_transformation,
    }[way]()
    hand = by_hand(MOMENTUM)
    for number, params, state in run(optimizer, micro * (2 * SYNC_PERIOD + 1)):
        if number % micro == 0:
            pair = [gradient(hand.params, make_batch(one)) for one in (number - 1, number)]
            hand.apply(jax.tree.map(lambda one, other: (one + other) / 2, *pair))
        assert_close(params, hand.params)
        assert_close(slow_params(state, params), hand.slow)


BAD_STEPS = {1, 3, 4, 8}


def gradient_of_bad_batches(params, number):
    """Return real gradients. The gradients of some batches are not finite, as an input is NaN."""
    inputs, targets = make_batch(number)
    if number in BAD_STEPS:
        inputs = inputs.at[0, 0].set(jnp.nan)
    return gradient(params, (inputs, targets))


@pytest.mark.parametrize("side", ["inside", "around"])
@pytest.mark.parametrize("wrapper", ["apply_if_finite", "multi_steps"])
def test_steps_that_are_skipped_for_a_gradient_that_is_no_number_do_not_count(wrapper, side):
    def skipping(inner):
        if wrapper == "apply_if_finite":
            return optax.apply_if_finite(inner, 5)
        skip = optax.MultiSteps(inner, 1, should_skip_update_fn=optax.skip_not_finite)
        return skip.gradient_transformation()

    optimizer = wrapped(skipping(MOMENTUM)) if side == "inside" else skipping(wrapped())
    hand = by_hand(MOMENTUM)
    for number, params, state in run(optimizer, 12, gradients=gradient_of_bad_batches):
        if number not in BAD_STEPS:
            hand.apply(gradient(hand.params, make_batch(number)))
        assert_close(params, hand.params)
        assert_close(slow_params(state, params), hand.slow)
    assert optax.tree_utils.tree_get(state, "step") == 8


def test_parameters_loaded_after_a_skipped_first_step_are_the_slow_ones():
    optimizer = wrapped(optax.apply_if_finite(MOMENTUM, 5))
    _, state = last_of(optimizer, 1, gradients=gradient_of_bad_batches)
    loaded = make_params(seed=1)
    params, state = last_of(optimizer, 2, params=loaded, state=state)
    assert_same_bits(slow_params(state, params), loaded)


@pytest.mark.parametrize("form", ["update", "apply_gradients"])
def test_gradient_that_is_no_number_leaves_the_slow_parameters_alone_until_a_sync(form):
    optimizer = wrapped(sync_period=5)
    params, state = last_of(optimizer, 6)
    slow, step = slow_params(state, params), stepper(optimizer, form)
    for _ in range(2):
        bad = gradient_of_bad_batches(params, min(BAD_STEPS))
        params, state = step(bad, state, params)
        assert not any(jnp.isfinite(one).any() for one in params["b"])
        assert_same_bits(slow_params(state, params), slow)
    assert all(jnp.isfinite(one).all() for one in jax.tree.leaves(slow))


# Hyperparameters that change.


def settings_by_hand(settings, steps):
    """Train with momentum and a slow step by hand, with a period and a step size for each step."""
    hand = by_hand(MOMENTUM, sync_period=10**6)
    slow = hand.params
    for number in range(1, steps + 1):
        period, slow_step_size = settings(number)
        hand.apply(gradient(hand.params, make_batch(number)))
        if period and number % period == 0:
            hand.slow, hand.slow_step_size = slow, slow_step_size
            hand.sync()
        if period == 0 or number % period == 0:
            slow = hand.params
        yield hand.params, slow


def test_injected_schedules_set_period_and_slow_step_size():
    def period(count):
        return jnp.where(count < 4, 2, 3)

    def slow_step_size(count):
        return 0.25 + count / 16

    optimizer = optax.inject_hyperparams(lookahead)(MOMENTUM, period, slow_step_size)
    expected = settings_by_hand(lambda number: (2 if number <= 4 else 3, 0.25 + (number - 1) / 16), 10)
    for (_, params, state), (fast, slow) in zip(run(optimizer, 10), expected):
        assert_close(params, fast)
        assert_close(slow_params(state, params), slow)


def test_injected_values_may_be_changed_by_hand_and_lookahead_switched_off_and_on():
    optimizer = optax.inject_hyperparams(lookahead)(MOMENTUM, 3, 0.25)
    changes = {5: (2, 0.25), 9: (0, 0.25), 12: (3, 0.75)}
    in_force = [(3, 0.25)]

    def settings(number):
        in_force.append(changes.get(number, in_force[-1]))
        return in_force[-1]

    params, step = make_params(), stepper(optimizer)
    state = optimizer.init(params)
    for number, (fast, slow) in enumerate(settings_by_hand(settings, 16), 1):
        if number in changes:
            period, slow_step_size = changes[number]
            state.hyperparams["sync_period"] = jnp.asarray(period)
            state.hyperparams["slow_step_size"] = jnp.asarray(slow_step_size)
        params, state = step(gradient(params, make_batch(number)), state, params)
        assert_close(params, fast)
        assert_close(slow_params(state, params), slow)


# Layouts.


def test_lookahead_inside_flatten_trains_as_outside_but_its_slow_parameters_have_no_tree():
    hand = by_hand(optax.adam(0.1))
    for number, params, state in run(optax.flatten(wrapped(optax.adam(0.1))), 7):  # noqa: B007
        hand.apply(gradient(hand.params, make_batch(number)))
        assert_close(params, hand.params)
    for function in (slow_params, sync, reset_slow_params):
        with pytest.raises(ValueError, match="must be those that the `lookahead` in `state` gets"):
            function(state, params)
    flat = jnp.concatenate([one.ravel() for one in jax.tree.leaves(params)])
    assert_close(slow_params(state, flat), jnp.concatenate([one.ravel() for one in jax.tree.leaves(hand.slow)]))


@pytest.mark.parametrize("side", ["inside", "around"])
def test_real_and_imaginary_parts_may_be_split_inside_or_around(side):
    rng = np.random.default_rng(0)
    targets = jnp.array(rng.normal(size=(4, 2)) @ [1, 1j], "complex64")
    first = {"z": jnp.zeros(4, "complex64"), "x": jnp.ones(4)}

    @jax.jit
    def gradients(params):
        grads = jax.grad(lambda params: jnp.sum(jnp.abs(params["z"] * params["x"] - targets) ** 2))(params)
        return jax.tree.map(jnp.conj, grads)

    split = contrib.split_real_and_imaginary
    inner = optax.adam(0.1)
    optimizer = wrapped(split(inner)) if side == "inside" else split(wrapped(inner))
    hand = ByHand(split(inner), first, SYNC_PERIOD, SLOW_STEP_SIZE)
    for _, params, state in run(optimizer, 7, first, gradients=lambda params, _: gradients(params)):
        hand.apply(gradients(hand.params))
        assert_close(params, hand.params)
        if side == "inside":
            assert_close(slow_params(state, params), hand.slow)


# Wrappers of `optax.contrib` around `lookahead`.


def test_plateau_behind_scales_the_updates_of_lookahead_and_the_slow_parameters_follow():
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)
    optimizer = optax.chain(wrapped(), plateau)
    params = expected = slow = make_params()
    state, inner_state, scale_state = optimizer.init(params), MOMENTUM.init(params), plateau.init(params)
    step = stepper(optimizer)
    for number in range(1, 8):
        params, state = step(gradient(params, make_batch(number)), state, params, value=jnp.array(1.0))
        updates, inner_state = MOMENTUM.update(gradient(expected, make_batch(number)), inner_state)
        if number % SYNC_PERIOD == 0:
            fast = optax.apply_updates(expected, updates)
            updates = jax.tree.map(lambda one, fast, old: one + 0.25 * (fast - one) - old, slow, fast, expected)
        updates, scale_state = plateau.update(updates, scale_state, value=jnp.array(1.0))
        expected = optax.apply_updates(expected, updates)
        slow = expected if number % SYNC_PERIOD == 0 else slow
        assert_close(params, expected)
        assert_close(slow_params(state, params), slow)
    assert scale_state.scale < 0.5


@pytest.mark.parametrize(
    "wrap",
    [lambda inner: contrib.schedule_free(inner, 0.1), lambda inner: contrib.mechanize(inner, s_init=0.1)],
    ids=["schedule_free", "mechanize"],
)
def test_wrappers_that_move_other_parameters_than_they_pass_run_around_lookahead(wrap):
    """No slow step by hand exists: these wrappers take the difference to the slow parameters for an inner update."""
    bare, _ = last_of(wrap(optax.sgd(0.1)), SYNC_PERIOD - 1)
    before, _ = last_of(wrap(wrapped(optax.sgd(0.1))), SYNC_PERIOD - 1)
    assert_close(before, bare)
    params, state = last_of(wrap(wrapped(optax.sgd(0.1))), 2 * SYNC_PERIOD + 1)
    assert all(jnp.isfinite(one).all() for one in jax.tree.leaves((params, slow_params(state, params))))
    assert_close(*(last_of(wrap(one), 4)[0] for one in (wrapped(optax.sgd(0.1), 2, 1.0), optax.sgd(0.1))))


# Lookahead in lookahead.


def assert_as_oracle(params, state, oracle, tolerance=1e-5):
    structure = jax.tree.structure(params)
    assert_close(params, jax.tree.unflatten(structure, oracle.weights), tolerance)
    assert_close(slow_params(state, params), jax.tree.unflatten(structure, oracle.slow), tolerance)


def nested(inner_period, outer_period):
    optimizer = wrapped(wrapped(MOMENTUM, inner_period, 0.25), outer_period, 0.5)
    inner = reference.Lookahead(reference.SGD(0.1, momentum=0.5), inner_period, 0.25)
    return optimizer, reference.Lookahead(inner, outer_period, 0.5).start(jax.tree.leaves(make_params()))


def oracle_gradient(oracle, number):
    params = jax.tree.unflatten(jax.tree.structure(make_params()), [jnp.float32(one) for one in oracle.weights])
    return jax.tree.leaves(gradient(params, make_batch(number)))


@pytest.mark.parametrize("periods", [(2, 6), (3, 2), (2, 3)])
def test_inner_slow_parameters_restart_from_an_outer_sync(periods):
    optimizer, oracle = nested(*periods)
    for number, params, state in run(optimizer, 2 * periods[0] * periods[1] + 1):
        oracle.apply(oracle_gradient(oracle, number))
        assert_as_oracle(params, state, oracle)
        inner_slow = jax.tree.unflatten(jax.tree.structure(params), oracle.inner.slow)
        assert_close(slow_params(state.inner_state, params), inner_slow, 1e-5)


@pytest.mark.parametrize("periods", [(3, 6), (3, 2)])
def test_nested_lookahead_goes_on_as_by_hand_after_a_sync_by_call_or_a_reset(periods):
    optimizer, oracle = nested(*periods)
    params, step = make_params(), stepper(optimizer)
    state = optimizer.init(params)
    for number in range(1, 15):
        oracle.apply(oracle_gradient(oracle, number))
        params, state = step(gradient(params, make_batch(number)), state, params)
        if number == 4:
            oracle.sync()
            params, state = sync(state, params)
            assert_same_bits(slow_params(state, params), params)
        if number == 8:
            oracle.restart(oracle.weights)
            state = reset_slow_params(state, params)
        assert_as_oracle(params, state, oracle)


@pytest.mark.parametrize("outer_period", [0, jnp.array(0)], ids=["number", "array"])
@pytest.mark.parametrize("first_period", [0, 4])
def test_where_the_outer_lookahead_is_off_the_inner_one_has_the_slow_parameters(first_period, outer_period):
    def optimizer(period):
        return wrapped(wrapped(MOMENTUM, 3, 0.25), period, 0.5)

    state = optimizer(first_period or outer_period).init(make_params())
    hand, params, step = by_hand(MOMENTUM, 3), make_params(), stepper(optimizer(outer_period))
    for number in range(1, 9):
        hand.apply(gradient(hand.params, make_batch(number)))
        params, state = step(gradient(params, make_batch(number)), state, params)
        if number == 5:
            params, state = sync(state, params)
            hand.sync()
        assert_close(params, hand.params)
        assert_close(slow_params(state, params), hand.slow)


@pytest.mark.parametrize("form", ["update", "apply_gradients"])
def test_an_inner_lookahead_may_be_switched_off_and_on_again(form):
    oracle = nested(2, 6)[1]
    params, state = make_params(), nested(2, 6)[0].init(make_params())
    for number in range(1, 13):
        # A new optimizer at each step, as after loading.
        oracle.inner.sync_period = period = 0 if 3 <= number <= 8 else 2
        if number == 9:
            oracle.inner.restart(oracle.weights)
        oracle.apply(oracle_gradient(oracle, number))
        params, state = stepper(nested(period, 6)[0], form)(gradient(params, make_batch(number)), state, params)
        assert_as_oracle(params, state, oracle)


# `sync`, `reset_slow_params` and the tools for trees, through combinators.

THROUGH = {
    "alone": lambda one: one,
    "chain": lambda one: optax.chain(optax.identity(), one, optax.identity()),
    "masked": lambda one: optax.masked(one, True),
    "partition": lambda one: optax.partition({"all": one}, {"w": "all", "b": "all"}),
    "multi_steps": lambda one: optax.MultiSteps(one, 1).gradient_transformation(),
    "apply_if_finite": lambda one: optax.apply_if_finite(one, 3),
}


@pytest.mark.parametrize("way", THROUGH)
def test_sync_and_reset_by_call_reach_through_combinators(way):
    optimizer, hand = THROUGH[way](wrapped()), by_hand(MOMENTUM)
    params, step = hand.params, stepper(optimizer)
    state = optimizer.init(params)
    for number in range(1, 10):
        hand.apply(gradient(hand.params, make_batch(number)))
        params, state = step(gradient(params, make_batch(number)), state, params)
        if number == 4:
            hand.sync()
            params, state = sync(state, params)
            again, _ = sync(state, params)
            assert_same_bits(again, params)
        if number == 8:
            hand.slow = hand.params
            state = reset_slow_params(state, params)
        assert_close(params, hand.params)
        assert_close(slow_params(state, params), hand.slow)


def test_sync_and_reset_by_call_leave_masked_out_parameters_alone():
    optimizer = optax.masked(wrapped(), {"w": True, "b": False})
    params, state = last_of(optimizer, SYNC_PERIOD + 1)
    slow = slow_params(state, params)
    synced, synced_state = sync(state, params)
    assert_close(synced["w"], 0.75 * slow["w"] + 0.25 * params["w"])
    assert_same_bits(synced["b"], params["b"])
    next_params, next_state = last_of(optimizer, 1, params=synced, state=synced_state)
    assert_same_bits(slow_params(next_state, next_params), {"w": synced["w"], "b": next_params["b"]})
    first = make_params()
    assert_same_bits(slow_params(reset_slow_params(state, first), params), {"w": first["w"], "b": params["b"]})


def lookahead_state(tree):
    (found,) = [
        one
        for one in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LookaheadState))
        if isinstance(one, LookaheadState)
    ]
    return found


@pytest.mark.parametrize("way", ["alone", "chain", "multi_steps", "apply_if_finite"])
def test_tree_map_params_maps_slow_parameters_and_moments_only(way):
    optimizer = THROUGH[way](wrapped(optax.adam(0.1)))
    _, state = last_of(optimizer, 2)
    doubled = optax.tree_map_params(optimizer, lambda one: 2 * one, state)
    before, after = lookahead_state(state), lookahead_state(doubled)
    assert_same_bits(after.slow_params, jax.tree.map(lambda one: 2 * one, before.slow_params))
    assert_same_bits(after.inner_state[0].mu, jax.tree.map(lambda one: 2 * one, before.inner_state[0].mu))
    assert_same_bits(after.inner_state[0].count, before.inner_state[0].count)
    assert_same_bits(after[2:], before[2:])
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


@pytest.mark.parametrize("way", THROUGH)
def test_tree_get_and_tree_set_find_the_entries_of_the_state(way):
    optimizer = THROUGH[way](wrapped(sync_period=4, slow_step_size=0.25))
    params, state = last_of(optimizer, 5)
    get = optax.tree_utils.tree_get
    assert get(state, "step") == 5
    assert get(state, "captured") == 1
    assert get(state, "next_slow_step_size") == 0.25
    assert_same_bits(jax.tree.leaves(get(state, "slow_params")), jax.tree.leaves(slow_params(state, params)))
    changed = optax.tree_utils.tree_set(state, next_slow_step_size=jnp.float32(1.0))
    assert_same_bits(sync(changed, params)[0], params)


def test_a_reset_reaches_a_lookahead_that_sees_other_parameters():
    optimizer = lookahead(optax.flatten(lookahead(optax.sgd(0.1), 2)), 4)
    params = make_params()
    updates, state = optimizer.update(make_grads(0, params), optimizer.init(params), params)
    best = make_params(seed=7)
    state = reset_slow_params(state, best)
    assert_same_bits(slow_params(state, best), best)
    oracle = reference.Lookahead(reference.Lookahead(reference.SGD(0.1), 1), 3).start(jax.tree.leaves(best))
    for number in (1, 2, 3):
        grads = make_grads(number, best)
        updates, state = optimizer.update(grads, state, best)
        best = optax.apply_updates(best, updates)
        # The inner `lookahead` syncs at steps 2 and 4 in all.
        oracle.inner.sync_period = 1 if number in (1, 3) else 0
        oracle.apply(jax.tree.leaves(grads))
    assert_close(jax.tree.leaves(best), oracle.weights)
