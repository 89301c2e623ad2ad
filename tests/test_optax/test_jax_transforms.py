"""`lookahead` under `jit`, with donated buffers, `scan`, `vmap`, `grad` and `eval_shape`, and without any of these."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_optim.optax import lookahead, reset_slow_params, slow_params, sync
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.whole_steps import FORMS, snapshot, whole_step

STEPS = 7


def decaying(syncs):
    return 0.9 / (1 + syncs)


HYPERPARAMETERS = {
    "numbers": lambda: (3, 0.5),
    "numpy": lambda: (np.array(3), np.array(0.5)),
    "strongly_typed": lambda: (jnp.int32(3), jnp.float32(0.5)),
    "weakly_typed": lambda: (jnp.array(3), jnp.array(0.5)),
    "schedule": lambda: (3, decaying),
    "optax_schedule": lambda: (jnp.array(3), optax.linear_schedule(0.9, 0.1, 4)),
}
INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
}


def by_hand(inner, sync_period, slow_step_size, params, steps):
    """Yield a `ByHand` after each step."""
    hand = ByHand(inner, params, int(sync_period))
    for number in range(steps):
        syncs = hand.steps // hand.sync_period
        hand.slow_step_size = float(slow_step_size(syncs) if callable(slow_step_size) else slow_step_size)
        hand.apply(make_grads(number, params))
        yield hand


class Compilations(list):
    """Records what XLA compiles meanwhile."""

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self.listen)

    def listen(self, event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            self.append(kwargs)


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
@pytest.mark.parametrize("form", FORMS)
def test_step_is_compiled_once_from_an_eager_and_a_jitted_init(form, hyperparameters):
    settings = HYPERPARAMETERS[hyperparameters]()
    optimizer = lookahead(INNER["momentum"](), *settings)
    step = jax.jit(whole_step(optimizer, form))
    for init in (optimizer.init, jax.jit(optimizer.init)):
        params = make_params()
        state = init(params)
        for number, hand in enumerate(by_hand(INNER["momentum"](), *settings, params, STEPS)):
            params, state = step(params, state, make_grads(number, params))
            assert_close(params, hand.params)
            assert_close(slow_params(state, params), hand.slow)
    assert step._cache_size() == 1


@pytest.mark.parametrize("form", FORMS)
def test_step_is_compiled_once_for_all_values_of_traced_hyperparameters(form):
    @jax.jit
    def step(params, state, grads, *settings):
        return whole_step(lookahead(INNER["momentum"](), *settings), form)(params, state, grads)

    for settings in ((3, 0.5), (2, 0.8), (4, 1.0)):
        params = make_params()
        state = lookahead(INNER["momentum"](), *settings).init(params)
        for number, hand in enumerate(by_hand(INNER["momentum"](), *settings, params, STEPS)):
            params, state = step(params, state, make_grads(number, params), *settings)
            assert_close(params, hand.params)
            assert_close(slow_params(state, params), hand.slow)
    assert step._cache_size() == 1


@pytest.mark.parametrize("jitted", [False, True])
def test_sync_reset_and_slow_params_leave_the_step_compiled_once(jitted):
    optimizer = lookahead(INNER["momentum"](), 3, 0.25)
    functions = [sync, reset_slow_params, slow_params]
    # New functions, as JAX shares compiled programs between all copies of a function.
    sync_, reset, slow = [jax.jit(functools.partial(one)) for one in functions] if jitted else functions
    step = jax.jit(whole_step(optimizer))
    hand = ByHand(INNER["momentum"](), make_params(), 3, 0.25)
    params, state = hand.params, optimizer.init(hand.params)
    for number in range(12):
        params, state = step(params, state, make_grads(number, params))
        hand.apply(make_grads(number, params))
        if number in (1, 6):
            params, state = sync_(state, params)
            hand.sync()
        if number in (4, 6):
            state = reset(state, params)
            hand.slow = hand.params
        assert_close(params, hand.params)
        assert_close(slow(state, params), hand.slow)
    assert step._cache_size() == 1
    if jitted:
        assert [one._cache_size() for one in (sync_, reset, slow)] == [1, 1, 1]


@pytest.mark.parametrize("hyperparameters", ["numbers", "schedule"])
@pytest.mark.parametrize("form", FORMS)
def test_eager_steps_compile_nothing_new_in_later_cycles(form, hyperparameters):
    settings = HYPERPARAMETERS[hyperparameters]()
    optimizer = lookahead(INNER["adam"](), *settings)
    params = make_params()
    state = optimizer.init(params)
    step = whole_step(optimizer, form)
    all_grads = [make_grads(number, params) for number in range(4 * 3)]
    compilations = Compilations()
    for number, hand in enumerate(by_hand(INNER["adam"](), *settings, params, 4 * 3)):
        if number < 2 * 3:
            params, state = step(params, state, all_grads[number])
            slow = slow_params(state, params)
        else:
            with compilations:
                params, state = step(params, state, all_grads[number])
                slow = slow_params(state, params)
        assert_close(params, hand.params)
        assert_close(slow, hand.slow)
    assert compilations == []
    with compilations:
        jax.jit(lambda params: params["w"] + 2)(params)
    assert len(compilations) == 1


def pointers(*trees):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trees)]


def assert_nothing_shared(*trees):
    assert len(set(pointers(*trees))) == len(pointers(*trees))


DONATED = {
    "adam": lambda: lookahead(INNER["adam"](), 3, 0.5),
    "nested": lambda: lookahead(lookahead(INNER["momentum"](), 2, 0.5), 3, 0.5),
}


@pytest.mark.parametrize(("params_first", "jitted"), [(True, False), (False, True)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DONATED)
def test_params_and_state_can_be_donated(name, form, params_first, jitted):
    optimizer = DONATED[name]()
    functions = [optimizer.init, slow_params, sync, reset_slow_params]
    init, slow_params_, sync_, reset = [jax.jit(function) for function in functions] if jitted else functions
    step = whole_step(optimizer, form)

    def state_first(state, params, grads):
        return step(params, state, grads)[::-1]

    donating = jax.jit(step if params_first else state_first, donate_argnums=(0, 1))
    params = make_params() | {"integers": jnp.arange(4)}
    state, kept = init(params), []
    undonated, other_state = jax.tree.map(jnp.copy, (params, state))
    plain = jax.jit(step)
    for number in range(STEPS):
        # Right after `init`, in mid-cycle and after a sync.
        slow = slow_params_(state, params)
        assert_nothing_shared(params, state, slow, undonated)
        kept.append((slow, snapshot(slow)))
        if number in (2, 5):
            params, state = sync_(state, params)
            undonated, other_state = sync(other_state, undonated)
        if number in (4, 5):
            state = reset(state, params)
            other_state = reset_slow_params(other_state, undonated)
        assert_nothing_shared(params, state, slow)
        old_params, grads = params, make_grads(number, params)
        if params_first:
            params, state = donating(params, state, grads)
        else:
            state, params = donating(state, params, grads)
        undonated, other_state = plain(undonated, other_state, grads)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old_params))
        assert_close(params, undonated)
        assert_close(slow_params(state, params), slow_params(other_state, undonated))
    for slow, expected in kept:
        assert_same_bits(slow, expected)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("params_first", "traced"), [(True, False), (False, True)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INNER)
def test_compiled_step_needs_no_buffer_as_large_as_a_weight_and_captures_in_a_conditional(
    name, form, params_first, traced
):
    weight = jax.ShapeDtypeStruct((256, 256), "float32")
    params = {str(index): weight for index in range(10)}
    state = jax.eval_shape(lookahead(INNER[name](), 6, 0.5).init, params)
    settings = (6, 0.5)

    def step(params, state, grads, *traced_settings):
        return whole_step(lookahead(INNER[name](), *(traced_settings or settings)), form)(params, state, grads)

    def state_first(state, params, grads, *traced_settings):
        return step(params, state, grads, *traced_settings)[::-1]

    args = (params, state) if params_first else (state, params)
    jitted = jax.jit(step if params_first else state_first, donate_argnums=(0, 1))
    compiled = jitted.lower(*args, params, *(settings if traced else ())).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size(weight)
    # All but, maybe, some of the scalars are updated in place.
    assert size(args) - memory.alias_size_in_bytes < 32
    # A selection instead would read and write the slow parameters at every step.
    assert " conditional(" in compiled.as_text()


@pytest.mark.parametrize("name", INNER)
def test_state_takes_one_copy_of_the_parameters_and_three_scalars(name):
    params = make_params()
    params["half"] = jnp.ones(5, "bfloat16")
    bare = INNER[name]().init(params)
    assert size(lookahead(INNER[name]()).init(params)) == size(bare) + size(params) + 3 * 4


@pytest.mark.parametrize(
    ("loop", "hyperparameters"), [("scan", "numbers"), ("scan", "weakly_typed"), ("fori_loop", "schedule")]
)
@pytest.mark.parametrize("form", FORMS)
def test_steps_in_a_loop_of_lax_are_those_outside(form, loop, hyperparameters):
    settings = HYPERPARAMETERS[hyperparameters]()
    optimizer = lookahead(INNER["adam"](), *settings)
    params = make_params()
    step = whole_step(optimizer, form)
    all_grads = jax.tree.map(lambda *grads: jnp.stack(grads), *[make_grads(one, params) for one in range(STEPS)])

    def scanned(carry, grads):
        carry = step(*carry, grads)
        return carry, (carry[0], slow_params(carry[1], carry[0]))

    def body(number, carry):
        return step(*carry, jax.tree.map(lambda grads: grads[number], all_grads))

    *_, hand = hands = [(hand.params, hand.slow) for hand in by_hand(INNER["adam"](), *settings, params, STEPS)]
    carry = params, optimizer.init(params)
    if loop == "scan":
        (params, state), trace = jax.lax.scan(scanned, carry, all_grads)
        assert_close(trace, jax.tree.map(lambda *leaves: jnp.stack(leaves), *hands))
    else:
        params, state = jax.lax.fori_loop(0, STEPS, body, carry)
    assert_close((params, slow_params(state, params)), hand)


def test_an_array_for_a_setting_survives_the_donation_of_states():
    slow_step_size = jnp.float32(0.5)
    optimizer = optax.apply_if_finite(lookahead(lookahead(optax.sgd(0.1), 2, slow_step_size), 4, slow_step_size), 3)
    params = make_params()
    step = jax.jit(whole_step(optimizer), donate_argnums=(0, 1))
    for _ in range(2):
        params, state = step(params, optimizer.init(params), make_grads(0, params))
    jax.jit(sync, donate_argnums=(0, 1))(state, params)
    assert slow_step_size == 0.5


def test_slow_params_and_sync_of_stacked_states_are_those_of_each():
    optimizers = [lookahead(optax.sgd(0.1), jnp.array(period)) for period in (2, 3, 1, 5)]
    runs = []
    for optimizer in optimizers:
        params = make_params()
        state = optimizer.init(params)
        for number in range(3):
            params, state = whole_step(optimizer)(params, state, make_grads(number, params))
        runs.append((state, params))
    states, all_params = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in zip(*runs))
    for function in (slow_params, lambda state, params: sync(state, params)[0]):
        assert_same_bits(function(states, all_params), jax.vmap(function)(states, all_params))


@pytest.mark.parametrize("form", FORMS)
def test_members_of_an_ensemble_with_hyperparameters_of_their_own_are_separate_runs(form):
    settings = list(itertools.product((0, 1, 3), (0.0, 0.3, 1.0)))
    sync_periods, slow_step_sizes = (jnp.array(one) for one in zip(*settings))
    members = [make_params(seed) for seed in range(len(settings))]

    def optimizer(*settings):
        return lookahead(INNER["adam"](), *settings)

    @jax.jit
    @jax.vmap
    def init(params, *settings):
        return optimizer(*settings).init(params)

    @jax.jit
    @jax.vmap
    def step(params, state, grads, *settings):
        params, state = whole_step(optimizer(*settings), form)(params, state, grads)
        return params, state, slow_params(state, params), sync(state, params)[0]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    ensemble = stack(members)
    state = init(ensemble, sync_periods, slow_step_sizes)
    hands = [
        ByHand(INNER["adam"](), params, period or 10**6, size) for params, (period, size) in zip(members, settings)
    ]
    for number in range(STEPS):
        all_grads = [make_grads(10 * number + index, params) for index, params in enumerate(members)]
        ensemble, state, slow, synced = step(ensemble, state, stack(all_grads), sync_periods, slow_step_sizes)
        for hand, grads in zip(hands, all_grads):
            hand.apply(grads)
        # A member that is switched off has no slow parameters.
        assert_close(ensemble, stack([hand.params for hand in hands]))
        assert_close(slow, stack([hand.slow if period else hand.params for hand, (period, _) in zip(hands, settings)]))
        for index, (period, slow_step_size) in enumerate(settings):
            if not period:
                expected = hands[index].params
            else:
                expected = jax.tree.map(
                    lambda slow, fast, slow_step_size=slow_step_size: slow + slow_step_size * (fast - slow),
                    hands[index].slow,
                    hands[index].params,
                )
            assert_close(jax.tree.map(lambda stacked, index=index: stacked[index], synced), expected)


@pytest.mark.parametrize("slow_step_size", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_by_the_hyperparameters_are_those_of_the_closed_form(form, slow_step_size):
    # x -> r x with r = 1 - learning_rate curvature, and after two steps x -> (1 - alpha + alpha r^2) x.
    curvature, start, learning_rate = 2.0, 1.5, 0.2

    def last(learning_rate, slow_step_size, start):
        step = whole_step(lookahead(optax.sgd(learning_rate), 2, slow_step_size), form)
        params = {"x": start}
        state = lookahead(optax.sgd(learning_rate), 2, slow_step_size).init(params)
        for _ in range(5):
            params, state = step(params, state, {"x": curvature * params["x"]})
        return params["x"]

    rate = 1 - learning_rate * curvature
    cycle = 1 - slow_step_size + slow_step_size * rate**2
    by_rate = start * (cycle**2 + 2 * cycle * 2 * slow_step_size * rate * rate)
    by_slow_step_size = start * 2 * cycle * (rate**2 - 1) * rate
    with jax.enable_x64(True):
        args = tuple(jnp.array(one, "float64") for one in (learning_rate, slow_step_size, start))
        value, derivatives = jax.jit(jax.value_and_grad(last, argnums=(0, 1, 2)))(*args)
        assert value.dtype == "float64"
        np.testing.assert_allclose(value, start * cycle**2 * rate, rtol=1e-12)
        np.testing.assert_allclose(derivatives[0], -curvature * by_rate, rtol=1e-12)
        np.testing.assert_allclose(derivatives[2], cycle**2 * rate, rtol=1e-12)
        np.testing.assert_allclose(derivatives[1], by_slow_step_size, rtol=1e-12)


def signature(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
@pytest.mark.parametrize("form", FORMS)
def test_eval_shape_gives_the_types_of_the_arrays_which_no_step_changes(form, hyperparameters):
    optimizer = lookahead(INNER["adam"](), *HYPERPARAMETERS[hyperparameters]())
    params = make_params() | {"half": jnp.ones(3, "bfloat16"), "scalar": jnp.ones(())}
    step = whole_step(optimizer, form)
    state = jax.eval_shape(optimizer.init, params)
    assert signature(state) == signature(optimizer.init(params))
    for function in (step, lambda params, state, grads: sync(state, params)):
        assert signature(jax.eval_shape(function, params, state, params)) == signature((params, state))
    assert signature(jax.eval_shape(reset_slow_params, state, params)) == signature(state)
    assert signature(jax.eval_shape(slow_params, state, params)) == signature(params)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_init_takes_shapes_and_dtypes_instead_of_parameters(name, nested):
    optimizer = lookahead(lookahead(INNER[name](), 2) if nested else INNER[name](), 3)
    params = make_params() | {"half": jnp.ones(3, "bfloat16"), "scalar": jnp.ones(())}
    state = optimizer.init(jax.eval_shape(lambda: params))
    assert signature(state) == signature(optimizer.init(params))
    other, step = optimizer.init(params), whole_step(optimizer)
    (params, state), (expected, other) = (step(params, one, params) for one in (state, other))
    assert_same_bits((params, state), (expected, other))


def test_init_of_shapes_with_shardings_has_them():
    mesh = jax.make_mesh((4,), ("axis",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("axis"))
    state = lookahead(optax.adam(0.1)).init({"w": jax.ShapeDtypeStruct((8, 2), "float32", sharding=sharding)})
    assert state.slow_params["w"].sharding == state.inner_state[0].mu["w"].sharding == sharding
