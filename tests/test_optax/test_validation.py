"""Refused arguments and their messages; and what holds before the first step, after a reset, with period 0."""

import functools
import inspect
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_optim.optax import (
    LookaheadState,
    LookaheadTransformation,
    lookahead,
    reset_slow_params,
    slow_params,
    sync,
)
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.whole_steps import whole_step

NAN, INF = float("nan"), float("inf")
INNER = optax.adam(0.1)


class Torch:
    """An optimizer object of another library."""

    def step(self):
        raise NotImplementedError

    def __repr__(self):
        return "Torch()"


BAD_SETTINGS = [
    ("sync_period", 2.5, TypeError, r"`sync_period` must be an integer.*Received: sync_period=2\.5 of type float"),
    ("sync_period", 6.0, TypeError, r"Received: sync_period=6\.0 of type float"),
    ("sync_period", np.float32(6), TypeError, r"Received: sync_period=.*6\.0.* of type float32"),
    ("sync_period", True, TypeError, r"Received: sync_period=True of type bool"),
    ("sync_period", np.bool_(True), TypeError, r"Received: sync_period=.*True.* of type bool"),
    ("sync_period", "6", TypeError, r"Received: sync_period='6' of type str"),
    ("sync_period", None, TypeError, r"Received: sync_period=None of type NoneType"),
    ("sync_period", NAN, TypeError, r"Received: sync_period=nan of type float"),
    ("sync_period", [6], TypeError, r"Received: sync_period=\[6\] of type list"),
    ("sync_period", optax.constant_schedule(6), TypeError, r"must be an integer.*sync_period=<function.*type function"),
    ("sync_period", -1, ValueError, r"`sync_period` must be 0 .* or a positive.*Received: sync_period=-1"),
    ("sync_period", np.int64(-2), ValueError, r"Received: sync_period=.*-2"),
    ("slow_step_size", "0.5", TypeError, r"`slow_step_size` must be a real number.*Received: slow_step_size='0\.5'"),
    ("slow_step_size", True, TypeError, r"Received: slow_step_size=True of type bool"),
    ("slow_step_size", None, TypeError, r"Received: slow_step_size=None of type NoneType"),
    ("slow_step_size", 1j, TypeError, r"Received: slow_step_size=1j of type complex"),
    ("slow_step_size", [0.5], TypeError, r"Received: slow_step_size=\[0\.5\] of type list"),
    ("slow_step_size", -0.1, ValueError, r"`slow_step_size` must be finite and >= 0.*Received: slow_step_size=-0\.1"),
    ("slow_step_size", np.float32(-3), ValueError, r"Received: slow_step_size=.*-3\.0"),
    ("slow_step_size", NAN, ValueError, r"Received: slow_step_size=nan"),
    ("slow_step_size", np.float64("nan"), ValueError, r"Received: slow_step_size=.*nan"),
    ("slow_step_size", INF, ValueError, r"Received: slow_step_size=inf"),
    ("slow_step_size", -INF, ValueError, r"Received: slow_step_size=-inf"),
    ("sync_period", np.array(2.5), TypeError, r"an integer scalar.*dtype float64 and shape \(\)"),
    ("sync_period", jnp.array([3, 4]), TypeError, r"Received: an array of dtype int32 and shape \(2,\)"),
    ("slow_step_size", jnp.ones(3), TypeError, r"scalar.*dtype float32 and shape \(3,\)"),
    ("slow_step_size", np.array(True), TypeError, r"a real scalar.*dtype bool and shape \(\)"),
    ("slow_step_size", jnp.array(1j), TypeError, r"a real scalar.*dtype complex64 and shape \(\)"),
    (
        "slow_momentum",
        "0.9",
        TypeError,
        r"`slow_momentum` must be a real number.*Received: slow_momentum='0\.9' of type",
    ),
    ("slow_momentum", True, TypeError, r"Received: slow_momentum=True of type bool"),
    ("slow_momentum", None, TypeError, r"Received: slow_momentum=None of type NoneType"),
    ("slow_momentum", optax.constant_schedule(0.5), TypeError, r"Received: slow_momentum=<function"),
    ("slow_momentum", jnp.ones(3), TypeError, r"must be a real scalar.*dtype float32 and shape \(3,\)"),
    ("slow_momentum", 1.0, ValueError, r"`slow_momentum` must be >= 0 and < 1.*Received: slow_momentum=1\.0"),
    ("slow_momentum", -0.1, ValueError, r"Received: slow_momentum=-0\.1"),
    ("slow_momentum", NAN, ValueError, r"Received: slow_momentum=nan"),
    (
        "slow_nesterov",
        1,
        TypeError,
        r"`slow_nesterov` must be True .* or False .*Received: slow_nesterov=1 of type int",
    ),
    ("slow_nesterov", None, TypeError, r"Received: slow_nesterov=None of type NoneType"),
    ("slow_nesterov", np.bool_(True), TypeError, r"Received: slow_nesterov=.*True.*"),
    (
        "slow_dtype",
        "int32",
        TypeError,
        r"`slow_dtype` must be a dtype of real numbers.*Received: slow_dtype='int32' of",
    ),
    ("slow_dtype", "complex64", TypeError, r"Received: slow_dtype='complex64' of type str"),
    ("slow_dtype", "float33", TypeError, r"Received: slow_dtype='float33' of type str"),
    ("slow_dtype", float, TypeError, r"Received: slow_dtype=<class 'float'> of type type"),
    ("slow_dtype", 32, TypeError, r"Received: slow_dtype=32 of type int"),
    (
        "outer",
        optax.sgd,
        TypeError,
        r"`outer` must be an `optax.GradientTransformation`.*outer=<function sgd .* function",
    ),
    ("outer", 0.7, TypeError, r"Received: outer=0\.7 of type float"),
    ("inner", Torch(), TypeError, r"`inner` must be an `optax.GradientTransformation`, such as .*inner=Torch\(\) of"),
    ("inner", optax.adam, TypeError, r"Received: inner=<function adam .* of type function"),
    ("inner", optax.GradientTransformation, TypeError, r"Received: inner=<class .* of type type"),
    ("inner", "adam", TypeError, r"Received: inner='adam' of type str"),
    ("inner", None, TypeError, r"Received: inner=None of type NoneType"),
    ("inner", 0.1, TypeError, r"Received: inner=0\.1 of type float"),
    ("inner", (INNER.init, INNER.update), TypeError, r"Received: inner=\(<function .* of type tuple"),
    (
        "inner",
        optax.LookaheadParams(1.0, 2.0),
        TypeError,
        r"Received: inner=LookaheadParams\(.* of type LookaheadParams",
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_SETTINGS)
def test_a_bad_argument_is_refused_with_its_name_and_what_was_received(name, value, error, message):
    with pytest.raises(error, match=rf"(?s){message}") as refused:
        lookahead(**{"inner": INNER, name: value})
    assert str(refused.value).startswith(f"`{name}` must be")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"k": 5}, "`sync_period` for `k`"),
        ({"alpha": 0.5}, "`slow_step_size` for `alpha`"),
        ({"la_steps": 5, "la_alpha": 0.5}, "`sync_period` for `la_steps` and `slow_step_size` for `la_alpha`"),
    ],
)
def test_names_of_other_implementations_are_explained(arguments, names):
    received = ", ".join(f"{name}={value}" for name, value in arguments.items())
    with pytest.raises(TypeError, match=rf"^Write {names}: the arguments .*Received: {received}$"):
        lookahead(INNER, **arguments)


@pytest.mark.parametrize("name", ["fast_optimizer", "base_optimizer", "inner_optimizer", "optimizer"])
def test_so_are_names_of_the_inner_transformation(name):
    with pytest.raises(TypeError, match=rf"^Write `inner` for `{name}`: .*Received: {name}=GradientTransformation"):
        lookahead(**{name: INNER}, sync_period=5)


@pytest.mark.parametrize(("arguments", "name"), [({"momentum": 0.9}, "momentum"), ({"inner": INNER}, "inner")])
def test_other_words_are_what_python_says_of_them(arguments, name):
    with pytest.raises(TypeError, match=rf"lookahead\(\) got .* argument '{name}'"):
        lookahead(INNER, **arguments)
    with pytest.raises(TypeError, match=r"lookahead\(\) missing 1 required positional argument: 'inner'"):
        lookahead()


def test_the_signature_is_that_of_the_function():
    parameters = inspect.signature(lookahead).parameters
    assert list(parameters)[:3] == ["inner", "sync_period", "slow_step_size"]
    by_keyword = [name for name, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY]
    assert by_keyword == ["slow_momentum", "slow_nesterov", "outer", "slow_dtype", "reduce"]


def test_a_step_size_above_1_warns_at_the_line_that_makes_the_optimizer_and_nowhere_else():
    with pytest.warns(UserWarning, match=r"`slow_step_size` above 1 .*below 2 / \(1 - r\).*size=1.5") as warned:
        optimizer = lookahead(INNER, 3, 1.5)
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, state = train(optimizer, make_params(), range(4))
        sync(state, params)
        for unchecked in (np.array(1.5), jnp.array(1.5), optax.constant_schedule(1.5)):
            lookahead(INNER, 3, unchecked)
        jax.jit(lambda size: lookahead(INNER, 3, size).init(make_params()))(1.5)
        injected = optax.inject_hyperparams(lookahead)(INNER, sync_period=3, slow_step_size=0.5)
        injected.init(make_params())


def test_repr_has_the_settings_and_the_inner_transformation():
    optimizer = lookahead(INNER, 5, 0.3)
    assert repr(optimizer) == f"lookahead({INNER!r}, sync_period=5, slow_step_size=0.3)"
    assert repr(lookahead(optimizer)) == f"lookahead({optimizer!r}, sync_period=6, slow_step_size=0.5)"
    replaced = optimizer._replace(update=jax.jit(optimizer.update))
    assert repr(replaced).startswith("LookaheadTransformation(init=<bound method")


@functools.cache
def jitted(optimizer):
    return jax.jit(optimizer.update)


def train(optimizer, params, steps, state=None):
    """Make the given steps. The step numbers determine the gradients."""
    state = optimizer.init(params) if state is None else state
    for step in steps:
        updates, state = jitted(optimizer)(make_grads(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def by_hand(params, steps, sync_period=3, slow_step_size=0.5):
    expected = ByHand(INNER, params, sync_period, slow_step_size)
    for step in steps:
        expected.apply(make_grads(step, params))
    return expected


OPTIMIZER = lookahead(INNER, 3)
OTHER = {"w": jnp.full((3, 4), 7.0), "b": [jnp.full(4, 8.0)]}


@pytest.mark.parametrize("sync_period", [3, np.int8(3), np.uint64(3), np.array(3), jnp.array(3)])
@pytest.mark.parametrize("slow_step_size", [0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_integers_and_floats_may_be_of_numpy_and_jax(sync_period, slow_step_size):
    params, state = train(lookahead(optax.sgd(0.1), sync_period, slow_step_size), jnp.ones(2), [])
    update = jax.jit(lookahead(optax.sgd(0.1), sync_period, slow_step_size).update)
    for expected in [0.9, 0.8, 0.85, 0.75]:
        updates, state = update(jnp.ones(2), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("sync_period", -1), ("slow_step_size", -0.5)])
def test_arrays_and_traced_numbers_are_not_checked(name, value):
    def first_step(value):
        params, optimizer = make_params(), lookahead(INNER, **{name: value})
        return optimizer.update(make_grads(0, params), optimizer.init(params), params)[1]

    for state in (jax.jit(first_step)(value), first_step(np.array(value)), first_step(jnp.array(value))):
        assert state.step == 1


@pytest.mark.parametrize("sync_period", [3, 0])
def test_an_update_without_params_is_refused_and_changes_nothing(sync_period):
    optimizer = lookahead(INNER, sync_period)
    params, state = train(optimizer, make_params(), range(2))
    before = jax.tree.map(np.array, state)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(ValueError, match=r"`params` must be given to the update.*Received: params=None"):
            update(params, state)
    with pytest.raises(ValueError, match=r"`params` must be given to the update.*Received: params=None"):
        optimizer.apply_gradients(params, state, None)
    assert_same_bits(state, before)


WITHOUT_LOOKAHEAD = {
    "adam": lambda params: INNER.init(params),
    "optax_lookahead": lambda params: optax.lookahead(INNER, 3, 0.5).init(optax.LookaheadParams.init_synced(params)),
    "none": lambda params: None,
    "params": lambda params: params,
}
OTHER_PARAMS = {
    "fewer": ({"w": jnp.ones((3, 4))}, r"shape \(4,\) at \['b'\]\[0\]\. Received: parameters of shapes .*\(3, 4\)"),
    "list": ([jnp.ones((3, 4)), jnp.ones(4)], r"Received: parameters of shapes .*\[0\].*\(3, 4\)"),
    "broadcast": ({"w": jnp.ones((1, 4)), "b": [jnp.ones(4)]}, r"shape \(3, 4\) at \['w'\]\. Received: .*\(1, 4\)"),
    "scalar": ({"w": jnp.ones((3, 4)), "b": [1.0]}, r"shape \(4,\) at .*\['b'\]\[0\].: \(\)"),
    "pair": (optax.LookaheadParams(OTHER, OTHER), r"Received: parameters of shapes .*\.fast\['w'\]"),
    "none": (None, r"Received: parameters of shapes \{\}"),
}
functions = pytest.mark.parametrize("function", [slow_params, sync, reset_slow_params])


@functions
@pytest.mark.parametrize("kind", WITHOUT_LOOKAHEAD)
def test_a_state_without_a_lookahead_is_refused(function, kind):
    params = make_params()
    message = (
        r"(?s)`state` must be the state of an optimizer that has a `lookahead_optim\.optax\.lookahead`.*Received: "
    )
    with pytest.raises(ValueError, match=message) as refused:
        function(WITHOUT_LOOKAHEAD[kind](params), params)
    assert len(str(refused.value)) < 1000


@functions
@pytest.mark.parametrize("kind", OTHER_PARAMS)
def test_params_of_another_structure_or_shape_are_refused(function, kind):
    params, message = OTHER_PARAMS[kind]
    with pytest.raises(
        ValueError, match=rf"(?s)`params` must be those that the `lookahead` in `state` gets.*{message}"
    ):
        function(OPTIMIZER.init(make_params()), params)


@pytest.mark.parametrize("kind", OTHER_PARAMS)
@pytest.mark.parametrize("form", ["update", "apply_gradients"])
def test_a_step_with_params_of_another_structure_or_shape_is_refused(form, kind):
    params, _ = OTHER_PARAMS[kind]
    state = OPTIMIZER.init(make_params())
    with pytest.raises(ValueError, match=r"(?s)`params` must be (like those that|given to) .*Received: "):
        getattr(OPTIMIZER, form)(params, state, params)


def test_period_0_is_the_bare_optimizer_bit_for_bit_without_slow_weights():
    off = lookahead(INNER, 0)
    params, state = train(off, make_params(), range(5))
    bare, bare_state = train(INNER, make_params(), range(5))
    assert_same_bits((params, state.inner_state), (bare, bare_state))
    assert state.slow_params is None
    size, bare_size = (sum(leaf.size for leaf in jax.tree.leaves(one)) for one in (state, bare_state))
    assert size - bare_size == 3
    grads = make_grads(5, params)
    updates, _ = INNER.update(grads, bare_state, bare)
    assert_same_bits(off.apply_gradients(grads, state, params)[0], optax.apply_updates(bare, updates))


@pytest.mark.parametrize("sync_period", [0, np.array(0)])
def test_with_period_0_there_is_nothing_to_synchronize_or_reset(sync_period):
    off = lookahead(INNER, sync_period)
    params, state = train(off, make_params(), range(5))
    assert_same_bits(slow_params(state, params), params)
    synced, state = sync(state, params)
    assert_same_bits(synced, params)
    state = reset_slow_params(state, synced)
    assert_same_bits(train(off, synced, range(5, 9), state)[0], train(INNER, make_params(), range(9))[0])


def test_a_traced_period_0_gives_the_numbers_of_the_bare_optimizer():
    @jax.jit
    def step(params, state, grads, sync_period):
        updates, state = lookahead(INNER, sync_period).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = make_params(), OPTIMIZER.init(make_params())
    for index in range(5):
        params, state = step(params, state, make_grads(index, params), 0)
        assert_same_bits(slow_params(state, params), params)
    np.testing.assert_allclose(params["w"], train(INNER, make_params(), range(5))[0]["w"], rtol=2e-6)
    assert step._cache_size() == 1


def skipped_step(around):
    """Return an optimizer, and the gradients of a first step that it skips."""
    nan = jax.tree.map(lambda param: jnp.full_like(param, jnp.nan), make_params())
    zeros = jax.tree.map(jnp.zeros_like, make_params())
    every_2 = optax.MultiSteps(INNER, 2)
    return {
        "finite_inside": lambda: (lookahead(optax.apply_if_finite(INNER, 9), 3), nan),
        "finite_around": lambda: (optax.apply_if_finite(OPTIMIZER, 9), nan),
        "multi_steps_inside": lambda: (lookahead(every_2, 3), zeros),
        "multi_steps_around": lambda: (optax.MultiSteps(OPTIMIZER, 2).gradient_transformation(), zeros),
    }[around]()


@pytest.mark.parametrize("around", ["finite_inside", "finite_around", "multi_steps_inside", "multi_steps_around"])
def test_weights_loaded_after_a_skipped_first_step_are_the_ones_captured(around):
    optimizer, first = skipped_step(around)
    params, state = make_params(), optimizer.init(make_params())
    updates, state = optimizer.update(first, state, params)
    assert_same_bits(optax.apply_updates(params, updates), params)
    assert_same_bits(slow_params(state, params), params)
    assert_same_bits(slow_params(state, OTHER), OTHER)
    assert_same_bits(sync(state, OTHER)[0], OTHER)

    grads = make_grads(0, params)
    updates, state = optimizer.update(grads, state, OTHER)
    params = optax.apply_updates(OTHER, updates)
    assert optax.tree_utils.tree_get(state, "step") == 1
    assert not np.array_equal(params["w"], OTHER["w"])
    assert_same_bits(slow_params(state, params), OTHER)
    expected = jax.tree.map(lambda slow, fast: slow + 0.5 * (fast - slow), OTHER, params)
    assert_same_bits(sync(state, params)[0], expected)


def test_weights_loaded_between_init_and_the_first_update_are_the_ones_captured():
    state = OPTIMIZER.init(make_params())
    assert_same_bits(slow_params(state, OTHER), OTHER)
    params, state = train(OPTIMIZER, OTHER, range(2), state)
    assert_same_bits(slow_params(state, params), OTHER)
    params, state = train(OPTIMIZER, params, range(2, 8), state)
    expected = by_hand(OTHER, range(8))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), params, expected.params)


def test_weights_loaded_right_after_a_sync_are_captured_too():
    params, state = train(OPTIMIZER, make_params(), range(3))
    params, state = train(OPTIMIZER, OTHER, [3], state)
    assert_same_bits(slow_params(state, params), OTHER)


def test_a_sync_before_the_first_step_changes_nothing():
    state = OPTIMIZER.init(make_params())
    params, synced = sync(state, make_params())
    assert_same_bits((params, synced), (make_params(), state))


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_second_sync_changes_nothing_and_no_sync_changes_the_count(steps):
    params, state = train(OPTIMIZER, make_params(), range(steps))
    once = sync(state, params)
    twice = sync(once[1], once[0])
    assert_same_bits(twice, once)
    assert once[1].step == steps
    expected = by_hand(make_params(), range(steps))
    if steps % 3:
        expected.sync()
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-6), once[0], expected.params)
    assert_same_bits(slow_params(once[1], once[0]), once[0])


@pytest.mark.parametrize("transform", [lambda run: run, jax.vmap, lambda run: jax.jit(run)], ids=["", "vmap", "jit"])
@pytest.mark.parametrize("inner", [INNER, OPTIMIZER], ids=["adam", "nested"])
def test_a_sync_that_halves_a_short_training_warns(inner, transform):
    optimizer = lookahead(inner, 6)

    @transform
    def run(params):
        return train(optimizer, params, range(4))

    params = make_params()
    if transform is jax.vmap:
        params = jax.tree.map(lambda one: jnp.stack([one, one]), params)
    params, state = run(params)
    message = r"`sync\(\)` in the first cycle takes back 0.5 of .*Received: sync\(\) after 4 update\(s\)$"
    with pytest.warns(UserWarning, match=message) as warned:
        params, state = sync(state, params)
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync(state, params)


SYNCS_WITHOUT_WARNING = {
    "no update": (lookahead(INNER, 6), 0),
    "at a sync": (lookahead(INNER, 6), 6),
    "in the second cycle": (lookahead(INNER, 6), 7),
    "in the third cycle": (lookahead(INNER, 6), 17),
    "period 1": (lookahead(INNER, 1), 4),
    "off": (lookahead(INNER, 0), 4),
    "step size 1": (lookahead(INNER, 6, 1.0), 4),
    "the inner one of an outer one that is off": (lookahead(lookahead(INNER, 3), 0), 4),
    "accumulating": (lookahead(optax.MultiSteps(INNER, 2), 2), 5),
}


@pytest.mark.parametrize("kind", SYNCS_WITHOUT_WARNING)
def test_any_other_sync_does_not_warn(kind):
    optimizer, steps = SYNCS_WITHOUT_WARNING[kind]
    params, state = train(optimizer, make_params(), range(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync(state, params)


@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("more", [0, 1, 3])
def test_a_sync_after_a_reset_does_not_warn(steps, more):
    optimizer = lookahead(INNER, 6)
    params, state = train(optimizer, make_params(), range(steps))
    state = reset_slow_params(state, params)
    params, state = train(optimizer, params, range(steps, steps + more), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync(state, params)


def test_a_sync_that_is_traced_does_not_warn():
    params, state = train(lookahead(INNER, 6), make_params(), range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(sync)(state, params)


@pytest.mark.parametrize(
    ("inner", "steps"), [(OPTIMIZER, 2), (optax.MultiSteps(INNER, 2), 6)], ids=["of an outer one that is off", "micro"]
)
def test_what_counts_for_a_sync_are_updates_that_were_applied(inner, steps):
    optimizer = lookahead(inner, 0 if inner is OPTIMIZER else 4)
    params, state = train(optimizer, make_params(), range(steps))
    with pytest.warns(UserWarning, match=rf"after {steps if inner is OPTIMIZER else steps // 2} update"):
        sync(state, params)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_reset_captures_the_params_that_are_given(steps):
    params, state = train(OPTIMIZER, make_params(), range(steps))
    reset = reset_slow_params(state, OTHER)
    assert_same_bits(slow_params(reset, params), OTHER)
    assert_same_bits((reset.step, reset.inner_state), (state.step, state.inner_state))
    assert_same_bits(sync(reset, params)[0], jax.tree.map(lambda one, two: one + 0.5 * (two - one), OTHER, params))
    params, state = train(OPTIMIZER, params, [9], reset)
    assert_same_bits(slow_params(state, params), OTHER)
    assert state.step == steps + 1


def test_it_is_a_gradient_transformation_like_others():
    assert isinstance(OPTIMIZER, LookaheadTransformation)
    assert isinstance(OPTIMIZER, optax.GradientTransformationExtraArgs)
    init, update = OPTIMIZER
    assert (init, update) == (OPTIMIZER.init, OPTIMIZER.update)
    assert isinstance(init(make_params()), LookaheadState)


@pytest.mark.parametrize(
    "remake", [lambda one: jax.tree.map(lambda leaf: leaf, one), lambda one: LookaheadTransformation(*tuple(one))]
)
def test_it_survives_the_way_through_a_tree_or_a_tuple(remake):
    remade = remake(OPTIMIZER)
    assert type(remade) is LookaheadTransformation
    params, state = train(OPTIMIZER, make_params(), range(2))
    grads = make_grads(2, params)
    for name, arguments in [("update", (grads, state, params)), ("apply_gradients", (grads, state, params))]:
        assert_same_bits(getattr(remade, name)(*arguments), getattr(OPTIMIZER, name)(*arguments))


def clipped_before(update):
    return lambda updates, state, params: update(
        jax.tree.map(lambda leaf: jnp.clip(leaf, -9, 9), updates), state, params
    )


UPDATES_AROUND = {
    "jitted": jax.jit,
    "jitted_and_donating": lambda update: jax.jit(update, donate_argnums=1),
    "jitted_twice": lambda update: jax.jit(jax.jit(update)),
    "checkpointed": jax.checkpoint,
    "partial": functools.partial,
    "clipped_before": clipped_before,
}


@pytest.mark.parametrize("sync_period", [2, 0, np.array(2)])
@pytest.mark.parametrize("around", UPDATES_AROUND)
def test_apply_gradients_goes_through_what_stands_in_the_place_of_update(around, sync_period):
    # All numbers are exact except for one addition each, so every compiler rounds them in the same way.
    optimizer = lookahead(optax.sgd(0.5), sync_period, 0.5)
    calls = []

    def update(*args):
        calls.append(args)
        return optimizer.update(*args)

    replaced = optimizer._replace(update=UPDATES_AROUND[around](update))
    assert type(replaced) is LookaheadTransformation
    params = expected = make_params()
    state, expected_state = replaced.init(params), optimizer.init(params)
    for step in range(5):
        grads = make_grads(step, params)
        params, state = replaced.apply_gradients(grads, state, params)
        expected, expected_state = optimizer.apply_gradients(grads, expected_state, expected)
        assert_same_bits((params, state), (expected, expected_state))
    assert calls


BEHIND = optax.chain(OPTIMIZER, optax.scale(0.5))
OTHER_UPDATES = {
    "sgd": LookaheadTransformation(*optax.sgd(0.1)),
    "identity": LookaheadTransformation(*optax.identity()),
    "chain": LookaheadTransformation(BEHIND.init, BEHIND.update),
}


@pytest.mark.parametrize("kind", OTHER_UPDATES)
def test_apply_gradients_refuses_another_function_in_the_place_of_update(kind):
    params, other = make_params(), OTHER_UPDATES[kind]
    with pytest.raises(
        TypeError, match=r"(?s)`apply_gradients` needs an `update` of `lookahead`, .*Received: update=<f"
    ):
        other.apply_gradients(params, other.init(params), params)


# States of another kind.


def restored_as(state):
    """Return a state as a format restores it that does not know its type."""
    return {"inner_state": list(state.inner_state), **{name: getattr(state, name) for name in state._fields[1:]}}


OTHER_STATES = {
    "bare": (lambda params: INNER.init(params), r"of type tuple"),
    "bare_sgd": (lambda params: optax.sgd(0.1).init(params), r"of type tuple"),
    "chain_around": (lambda params: optax.chain(OPTIMIZER, optax.scale(1.0)).init(params), r"of type tuple"),
    "optax_lookahead": (WITHOUT_LOOKAHEAD["optax_lookahead"], r"of type LookaheadState"),
    "restored": (lambda params: restored_as(OPTIMIZER.init(params)), r"of type dict"),
    "params": (lambda params: params, r"of type dict"),
    "none": (lambda params: None, r"Received: state=None of type NoneType"),
}


def steps_of(optimizer):
    return [optimizer.update, jax.jit(optimizer.update), optimizer.apply_gradients, jax.jit(optimizer.apply_gradients)]


@pytest.mark.parametrize("sync_period", [3, 0, jnp.array(3)])
@pytest.mark.parametrize("kind", OTHER_STATES)
def test_a_step_with_another_kind_of_state_is_refused_with_the_remedy(kind, sync_period):
    params, (make_state, received) = make_params(), OTHER_STATES[kind]
    optimizer = lookahead(INNER, sync_period)
    message = (
        rf"(?s)`state` must be a `lookahead_optim\.optax\.LookaheadState`.*_replace\(inner_state=state\).*{received}"
    )
    for step in steps_of(optimizer):
        with pytest.raises(ValueError, match=message) as refused:
            step(make_grads(0, params), make_state(params), params)
        assert len(str(refused.value)) < 1000


OTHER_INNER = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "sgd": optax.sgd(0.1),
    "lion": optax.lion(0.1),
    "adamw": optax.adamw(0.1),
    "chain": optax.chain(optax.clip(1.0), INNER),
    "lookahead": OPTIMIZER,
    "multi_steps": optax.MultiSteps(INNER, 2).gradient_transformation(),
    "masked": optax.masked(INNER, True),
}


@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("sync_period", [3, 0])
@pytest.mark.parametrize("kind", OTHER_INNER)
def test_a_state_around_another_inner_transformation_is_refused(kind, sync_period, initialised):
    params = make_params()
    for inner, other in [(INNER, OTHER_INNER[kind]), (OTHER_INNER[kind], INNER)]:
        optimizer = lookahead(inner, sync_period)
        right = lookahead(inner, sync_period).init(params)
        if initialised:
            optimizer.init(params)
        state = lookahead(other, sync_period).init(params)
        for step in steps_of(optimizer):
            with pytest.raises(
                ValueError, match=r"(?s)`state` must be that of a `lookahead` around the same inner .*Rec"
            ):
                step(make_grads(0, params), state, params)
            step(make_grads(0, params), right, params)


def test_a_bare_state_goes_on_with_lookahead_by_the_remedy_of_the_message():
    params, bare_state = train(INNER, make_params(), range(4))
    expected = ByHand(INNER, params, 3)
    expected.state = bare_state
    state = OPTIMIZER.init(params)._replace(inner_state=bare_state)
    for step in range(4, 11):
        expected.apply(make_grads(step, params))
        params, state = train(OPTIMIZER, params, [step], state)
        assert_close((params, slow_params(state, params)), (expected.params, expected.slow))


def test_a_pickled_state_names_the_public_module_and_goes_on():
    params, state = train(OPTIMIZER, make_params(), range(4))
    pickled = pickle.dumps(jax.tree.map(np.asarray, state))
    assert b"lookahead_optim.optax" in pickled
    assert b"lookahead_optim.optax." not in pickled
    assert_same_bits(
        train(OPTIMIZER, params, range(4, 8), pickle.loads(pickled)), train(OPTIMIZER, params, range(4, 8), state)
    )


@pytest.mark.parametrize("sync_period", [3, np.array(3)])
def test_a_state_without_slow_weights_is_refused_with_the_remedy_and_goes_on_by_it(sync_period):
    params, state = train(lookahead(INNER, 0), make_params(), range(4))
    optimizer = lookahead(INNER, sync_period)
    for step in steps_of(optimizer):
        with pytest.raises(ValueError, match=r"`state` must have slow parameters, .*step=state\.step\)`\. Received: "):
            step(make_grads(4, params), state, params)
    state = optimizer.init(params)._replace(inner_state=state.inner_state, step=state.step)
    first = params
    params, state = train(optimizer, params, [4], state)
    assert_same_bits(slow_params(state, params), first)
    params, state = train(optimizer, params, [5], state)
    assert (state.step, state.captured) == (6, 0)


def test_a_state_with_slow_weights_may_be_used_with_lookahead_switched_off_and_on_again():
    params, state = train(OPTIMIZER, make_params(), range(4))
    params, state = train(lookahead(INNER, 0), params, range(4, 6), state)
    assert_same_bits(slow_params(state, params), params)
    first = params
    params, state = train(OPTIMIZER, params, [6], state)
    assert_same_bits(slow_params(state, params), first)


def test_an_inner_state_that_only_takes_shape_in_the_first_update_is_accepted():
    def init(params):
        del params

    def update(updates, state, params=None):
        return updates, {"count": jnp.int32(1) if state is None else state["count"] + 1}

    optimizer = lookahead(optax.chain(optax.GradientTransformation(init, update), optax.scale(-0.1)), 3)
    state = train(optimizer, make_params(), range(4))[1]
    assert state.inner_state[0]["count"] == 4


def test_an_inner_init_that_reads_values_is_not_asked_for_its_structure():
    def init(params):
        return {"norm": float(jnp.linalg.norm(params["w"]))}

    def update(updates, state, params=None):
        return updates, state

    inner = optax.GradientTransformation(init, update)
    state = lookahead(inner, 3).init(make_params())
    assert train(lookahead(inner, 3), make_params(), range(2), state)[1].step == 2


# Ends of the count.

END = 2**31 - 1


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("sync_period", [1, 2, 3, 7, 1000, 2**30, END])
def test_at_the_end_of_int32_the_count_goes_back_by_a_cycle_and_syncs_stay_due(sync_period, traced):
    sizes = []

    def slow_step_size(syncs):
        sizes.append(syncs)
        return 0.5

    optimizer = lookahead(optax.sgd(0.1), jnp.array(sync_period) if traced else sync_period, slow_step_size)
    params = jnp.zeros(1)
    state = optimizer.init(params)._replace(step=jnp.int32(END - 9))
    for count in range(END - 8, END + 12):
        _, state = optimizer.update(jnp.ones(1), state, params)
        assert (int(state.captured) == 0) == (count % sync_period == 0)
        assert 0 < state.step <= END
        assert state.step.dtype == "int32"
        assert int(state.step) % sync_period == count % sync_period
    assert all(abs(syncs - END // sync_period) <= 9 // sync_period + 1 for syncs in sizes[1:])


@pytest.mark.parametrize("sync_period", [2**31, np.array(2**31), np.uint64(2**63), 10**30])
@pytest.mark.parametrize("form", ["update", "apply_gradients"])
def test_a_period_beyond_int32_is_never_due(form, sync_period):
    optimizer = lookahead(optax.sgd(0.1), sync_period, optax.constant_schedule(0.5))
    params = jnp.zeros(1)
    state = optimizer.init(params)._replace(step=jnp.int32(END - 3))
    step = {"update": whole_step(optimizer), "apply_gradients": whole_step(optimizer, "apply_gradients")}[form]
    for number in range(1, 7):
        params, state = jax.jit(step)(params, state, jnp.ones(1))
        np.testing.assert_allclose(params, -0.1 * number, rtol=1e-6)
        assert_same_bits(slow_params(state, params), jnp.zeros(1))
    np.testing.assert_allclose(sync(state, params)[0], -0.3, rtol=1e-6)


def test_at_the_end_of_int32_steps_of_accumulated_gradients_still_count():
    optimizer = lookahead(optax.MultiSteps(optax.sgd(0.1), 2), 3)
    params = jnp.zeros(1)
    state = optimizer.init(params)
    state = state._replace(inner_state=state.inner_state._replace(gradient_step=jnp.int32(END - 1)))
    steps = []
    for _ in range(8):
        _, state = optimizer.update(jnp.ones(1), state, params)
        steps.append(int(state.step))
    assert steps == [0, 1, 1, 2, 2, 3, 3, 4]
