"""Every step compared with the bare inner optimizer and the slow step by hand, and the slow weights on demand."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras
from tests import reference
from tests.comparison import assert_same_bits

legacy = keras.optimizers.legacy
SETTINGS = {
    "sgd": lambda: legacy.SGD(0.1),
    "momentum": lambda: legacy.SGD(0.05, momentum=0.9),
    "nesterov": lambda: legacy.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: legacy.Adam(0.05, epsilon=1e-3),
    "amsgrad": lambda: legacy.Adam(0.05, epsilon=1e-3, amsgrad=True),
    "rmsprop": lambda: legacy.RMSprop(0.02, epsilon=1e-3),
    "rmsprop_centered": lambda: legacy.RMSprop(0.02, momentum=0.9, epsilon=1e-3, centered=True),
    "adagrad": lambda: legacy.Adagrad(0.1, epsilon=1e-3),
    "adadelta": lambda: legacy.Adadelta(1.0, epsilon=1e-3),
    "adamax": lambda: legacy.Adamax(0.05, epsilon=1e-3),
    "nadam": lambda: legacy.Nadam(0.05, epsilon=1e-3),
    "ftrl": lambda: legacy.Ftrl(0.2, l1_regularization_strength=0.01, l2_regularization_strength=0.01),
}
RATES = {
    "exponential": lambda: legacy.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9),
    "piecewise": lambda: legacy.Adam(keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.1, 0.05, 0.01])),
    "decay": lambda: legacy.RMSprop(0.1, decay=0.3),
    "callable": lambda: legacy.SGD(lambda: 0.05),
}
MODES = ["eager", "function", "xla"]
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SHAPES = [(3, 4), (5,), ()]
SYNC_PERIOD, SLOW_STEP_SIZE = 3, 0.4


def values(variables):
    return [np.array(one.numpy() if hasattr(one, "numpy") else one) for one in variables]


def assert_same_on_xla(actual, expected):
    for one, other in zip(values(actual), values(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=4 * EPSILON["float32"], atol=EPSILON["float32"])


def assert_slow_step(new, slow, fast, slow_step_size, deviation=0.0):
    for one, start, end in zip(new, slow, fast):
        start, end = start.astype("float64"), end.astype("float64")
        expected = start + slow_step_size * (end - start)
        bound = 2 * EPSILON[one.dtype.name] * (np.abs(start) + np.abs(end)) + deviation
        assert np.all(np.abs(one.astype("float64") - expected) <= bound)


def slots(lookahead, variables):
    return [lookahead.get_slot(variable, "slow") for variable in variables]


def make_step(mode, optimizer, variables):
    """Return a function of the list of gradients that makes one step on the variables."""

    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables))

    return step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")


def assert_lookahead(make_inner, start, steps, mode="eager", constraint=None, assert_same=assert_same_bits):
    """Train twice on the lists of gradients `steps`, with `Lookahead` and bare; compare after every step.

    After a sync the bare run gets the fast weights of the other run, but not its state.
    """
    variables, bare_variables = ([tf.Variable(value, constraint=constraint) for value in start] for _ in range(2))
    lookahead, bare = Lookahead(make_inner(), SYNC_PERIOD, SLOW_STEP_SIZE), make_inner()
    step, bare_step = make_step(mode, lookahead, variables), make_step(mode, bare, bare_variables)
    slow = values(start)
    for t, gradients in enumerate(steps, 1):
        step(gradients)
        bare_step(gradients)
        if t % SYNC_PERIOD:
            assert_same(variables, bare_variables)
            assert_same_bits(slots(lookahead, variables), slow)
            continue
        new = values(slots(lookahead, variables))
        deviation = 0 if assert_same is assert_same_bits else 2 * EPSILON["float32"]
        assert_slow_step(new, slow, values(bare_variables), SLOW_STEP_SIZE, deviation)
        assert any(np.any(one != other) for one, other in zip(new, values(bare_variables)))
        slow = new
        for variable, bare_variable, one in zip(variables, bare_variables, new):
            bare_variable.assign(one if constraint is None else constraint(tf.constant(one)))
            np.testing.assert_array_equal(variable, bare_variable)
    assert lookahead.iterations.numpy() == bare.iterations.numpy() == len(steps)
    assert_same(lookahead.inner_optimizer.weights, bare.weights[1:])


def normal(rng, shape, dtype="float32"):
    return tf.constant(rng.normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("setting", "mode"),
    # XLA has no AMSGrad.
    [(setting, mode) for setting in SETTINGS for mode in MODES if (setting, mode) != ("amsgrad", "xla")],
)
def test_between_syncs_bare_bit_for_bit_and_at_syncs_the_slow_step(setting, mode):
    rng = np.random.default_rng(0)
    start = [normal(rng, shape) for shape in SHAPES]
    steps = [[normal(rng, shape) for shape in SHAPES] for _ in range(2 * SYNC_PERIOD + 1)]
    # In a larger program XLA may fuse other multiplications and additions. On some processors it does so for Nadam.
    assert_same = assert_same_on_xla if (setting, mode) == ("nadam", "xla") else assert_same_bits
    assert_lookahead(SETTINGS[setting], start, steps, mode, assert_same=assert_same)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("rate", RATES)
def test_schedules_and_decay_count_as_in_the_bare_optimizer(rate, mode):
    rng = np.random.default_rng(1)
    steps = [[normal(rng, (5,))] for _ in range(2 * SYNC_PERIOD + 1)]
    assert_lookahead(RATES[rate], [normal(rng, (5,))], steps, mode)


@pytest.mark.parametrize(
    ("setting", "mode"),
    [*((setting, "eager") for setting in SETTINGS), ("sgd", "function"), ("adam", "function"), ("ftrl", "function")],
)
def test_sparse_gradients_with_duplicate_indices(setting, mode):
    rng = np.random.default_rng(2)
    start = [normal(rng, (6, 3)), normal(rng, (4,))]
    indices = [[0, 2, 0], [5, 5, 5], [1, 2, 3], [4, 0, 4], [3, 3, 1], [2, 2, 0], [0, 5, 5]]
    steps = [
        [tf.IndexedSlices(normal(rng, (3, 3)), tf.constant(rows), tf.constant([6, 3])), normal(rng, (4,))]
        for rows in indices
    ]
    assert_lookahead(SETTINGS[setting], start, steps, mode)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_plain_sgd_with_an_embedding_is_the_oracle(mode):
    table = np.random.default_rng(3).normal(size=(5, 2))
    embedding = keras.layers.Embedding(5, 2)
    embedding.build(())
    embedding.set_weights([table])
    optimizer = Lookahead(legacy.SGD(0.1), 2, 0.5)
    oracle = reference.Lookahead(reference.SGD(0.1), 2, 0.5).start([table])

    def step(tokens):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(embedding(tokens))) / 2
        gradients = tape.gradient(loss, embedding.trainable_variables)
        assert isinstance(gradients[0], tf.IndexedSlices)
        optimizer.apply_gradients(zip(gradients, embedding.trainable_variables))

    step = step if mode == "eager" else tf.function(step)
    for tokens in ([0, 1, 1], [1, 1, 4], [3, 0, 0], [2, 2, 2], [4, 4, 0]):
        counts = np.bincount(tokens, minlength=5)[:, None]
        step(tf.constant(tokens))
        oracle.apply([counts * oracle.weights[0]])
        np.testing.assert_allclose(embedding.embeddings, oracle.weights[0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(optimizer.get_slot(embedding.embeddings, "slow"), oracle.slow[0], rtol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("setting", ["momentum", "rmsprop"])
@pytest.mark.parametrize("dtype", EPSILON)
def test_every_dtype(dtype, setting, mode):
    rng = np.random.default_rng(4)
    start = [normal(rng, shape, dtype) for shape in SHAPES]
    steps = [[normal(rng, shape, dtype) for shape in SHAPES] for _ in range(2 * SYNC_PERIOD + 1)]
    assert_lookahead(SETTINGS[setting], start, steps, mode)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sync_in_half_precision_rounds_once(dtype, mode):
    rng = np.random.default_rng(6)
    start, gradient = normal(rng, (500,), dtype), normal(rng, (500,), dtype)
    variable = tf.Variable(start)
    optimizer = Lookahead(legacy.SGD(0.5), 1, SLOW_STEP_SIZE)
    make_step(mode, optimizer, [variable])([gradient])
    fast = tf.Variable(start)
    legacy.SGD(0.5).apply_gradients([(gradient, fast)])
    slow, fast = tf.cast(start, "float32"), tf.cast(fast, "float32")
    assert_same_bits([variable], [tf.cast(slow + SLOW_STEP_SIZE * (fast - slow), dtype)])


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize("setting", ["sgd", "momentum"])
def test_sparse_gradients_of_other_dtypes(setting, dtype):
    rng = np.random.default_rng(7)
    steps = [
        [tf.IndexedSlices(normal(rng, (3, 2), dtype), tf.constant(rows), tf.constant([4, 2]))]
        for rows in ([0, 2, 0], [3, 3, 3], [1, 2, 0], [2, 2, 1])
    ]
    assert_lookahead(SETTINGS[setting], [normal(rng, (4, 2), dtype)], steps)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_dtypes_mix_in_one_optimizer(mode):
    rng = np.random.default_rng(5)
    start = [normal(rng, (4,), dtype) for dtype in EPSILON]
    steps = [[normal(rng, (4,), dtype) for dtype in EPSILON] for _ in range(2 * SYNC_PERIOD + 1)]
    assert_lookahead(SETTINGS["momentum"], start, steps, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("without", [[2, 3], [3, 4, 5, 6, 7], [6]], ids=str)
def test_a_weight_without_gradient_takes_part_in_the_sync(without, mode):
    rng = np.random.default_rng(6)
    start = [normal(rng, (4,)), normal(rng, (2, 3))]
    steps = [[normal(rng, (4,)), None if t in without else normal(rng, (2, 3))] for t in range(1, 2 * SYNC_PERIOD + 2)]
    assert_lookahead(SETTINGS["momentum"], start, steps, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", ["sgd", "adam"])
def test_a_constraint_holds_for_the_fast_weight_after_a_sync_too_and_not_for_the_slow_one(setting, mode):
    rng = np.random.default_rng(7)
    constraint = keras.constraints.UnitNorm(axis=0)
    start = [constraint(normal(rng, (3, 2)))]
    steps = [[normal(rng, (3, 2)) * 5] for _ in range(2 * SYNC_PERIOD + 1)]
    variable = tf.Variable(start[0], constraint=constraint)
    optimizer = Lookahead(SETTINGS[setting](), SYNC_PERIOD, SLOW_STEP_SIZE)
    step = make_step(mode, optimizer, [variable])
    for t, gradients in enumerate(steps, 1):
        step(gradients)
        np.testing.assert_allclose(np.linalg.norm(variable, axis=0), 1, rtol=1e-5)
        if t % SYNC_PERIOD == 0:
            slow = optimizer.get_slot(variable, "slow").numpy()
            norm = np.linalg.norm(slow, axis=0)
            assert np.all(norm < 0.9999)
            np.testing.assert_allclose(variable, slow / norm, rtol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("setting", ["sgd", "adam"])
def test_the_step_with_a_constraint_is_the_bare_one(setting, mode):
    rng = np.random.default_rng(8)
    start = [tf.abs(normal(rng, shape)) for shape in SHAPES]
    steps = [[normal(rng, shape) * 5 for shape in SHAPES] for _ in range(2 * SYNC_PERIOD + 1)]
    assert_lookahead(SETTINGS[setting], start, steps, mode, keras.constraints.NonNeg())


def ones(*variables):
    return [(tf.ones_like(variable), variable) for variable in variables]


def test_slow_weights_are_those_at_the_first_step_and_not_before():
    variable = tf.Variable([1.0, 2.0])
    optimizer = Lookahead(legacy.SGD(0.125), 2, 0.5)

    @tf.function
    def step():
        optimizer.apply_gradients(ones(variable))

    step.get_concrete_function()
    np.testing.assert_array_equal(optimizer.get_slot(variable, "slow"), [1, 2])
    variable.assign([3.0, 4.0])
    step()
    np.testing.assert_array_equal(optimizer.get_slot(variable, "slow"), [3, 4])
    np.testing.assert_array_equal(variable, [2.875, 3.875])
    variable.assign([5.0, 6.0])
    step()
    np.testing.assert_array_equal(variable, [3 + 0.5 * 1.875, 4 + 0.5 * 1.875])


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_slots_made_early_are_captured_again_at_the_first_step(mode):
    variable = tf.Variable([1.0, 2.0])
    optimizer = Lookahead(Lookahead(legacy.SGD(0.125), 3, 0.5), 2, 0.5)
    optimizer._create_all_weights([variable])
    variable.assign([3.0, 4.0])
    make_step(mode, optimizer, [variable])([tf.ones(2)])
    for one in (optimizer, optimizer.inner_optimizer):
        np.testing.assert_array_equal(one.get_slot(variable, "slow"), [3, 4])


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_new_variables_in_a_later_step_start_from_their_value_then(mode):
    old, new = tf.Variable([1.0]), tf.Variable([2.0])
    optimizer = Lookahead(legacy.SGD(0.125), 3, 0.5)
    step = make_step(mode, optimizer, [old])
    step([tf.ones(1)])
    new.assign([4.0])
    step_both = make_step(mode, optimizer, [old, new])
    step_both([tf.ones(1), tf.ones(1)])
    np.testing.assert_array_equal(values(slots(optimizer, [old, new])), [[1], [4]])
    step_both([tf.ones(1), tf.ones(1)])
    expected = [[1 - 0.5 * 3 * 0.125], [4 - 0.5 * 2 * 0.125]]
    np.testing.assert_array_equal(values([old, new]), expected)
    np.testing.assert_array_equal(values(slots(optimizer, [old, new])), expected)


@pytest.mark.parametrize(
    ("periods", "mode"),
    [
        *((periods, "eager") for periods in [(2, 3), (3, 2), (2, 2), (2, 3, 4), (0, 3), (3, 0)]),
        *((periods, "function") for periods in [(2, 2), (2, 3, 4), (3, 0)]),
        ((3, 2), "xla"),
    ],
    ids=str,
)
def test_nested_wrappers_are_the_oracle(periods, mode):
    rng = np.random.default_rng(9)
    start = [rng.normal(size=shape) for shape in SHAPES]
    optimizer, oracle = legacy.SGD(0.125, momentum=0.5), reference.SGD(0.125, momentum=0.5)
    levels = []
    for period, slow_step_size in zip(periods, (0.5, 0.8, 0.3)):
        optimizer = Lookahead(optimizer, period, slow_step_size)
        oracle = reference.Lookahead(oracle, period, slow_step_size)
        levels += [(optimizer, oracle)] if period else []
    oracle.start(start)
    variables = [tf.Variable(value) for value in start]
    step = make_step(mode, optimizer, variables)
    for _ in range(13):
        gradients = [rng.normal(size=shape) for shape in SHAPES]
        step([tf.constant(gradient) for gradient in gradients])
        oracle.apply(gradients)
        for one, other in levels:
            for variable, expected, slow in zip(variables, other.weights, other.slow):
                np.testing.assert_allclose(variable, expected, rtol=1e-13, atol=1e-14)
                np.testing.assert_allclose(one.get_slot(variable, "slow"), slow, rtol=1e-13, atol=1e-14)
    assert optimizer.iterations.numpy() == optimizer.inner_optimizer.iterations.numpy() == 13


def test_closed_form_of_two_nested_wrappers():
    variable = tf.Variable(1.0, dtype="float64")
    optimizer = Lookahead(Lookahead(legacy.SGD(lambda: tf.constant(0.1, "float64")), 5, 0.5), 30, 0.5)
    for _ in range(30):
        optimizer.apply_gradients([(variable.value(), variable)])
    assert variable.numpy() == pytest.approx(0.6264665547901707, rel=1e-12)


def test_closed_form_of_constant_gradients():
    variable = tf.Variable(1.0)
    optimizer = Lookahead(legacy.SGD(0.1), 5, 0.5)
    seen = []
    for _ in range(10):
        optimizer.apply_gradients(ones(variable))
        seen.append(variable.numpy())
    np.testing.assert_allclose(seen, [0.9, 0.8, 0.7, 0.6, 0.75, 0.65, 0.55, 0.45, 0.35, 0.5], rtol=1e-6)


def trained(steps=4, sync_period=3, wrap=lambda lookahead: lookahead):
    """Return variables and an optimizer in mid-cycle, where fast and slow weights differ, and the bare optimizer."""
    rng = np.random.default_rng(10)
    variables = [tf.Variable(normal(rng, shape)) for shape in SHAPES]
    optimizer = wrap(Lookahead(legacy.SGD(0.05, momentum=0.9), sync_period, SLOW_STEP_SIZE))
    for _ in range(steps):
        optimizer.apply_gradients([(normal(rng, shape), one) for shape, one in zip(SHAPES, variables)])
    return variables, optimizer


def nest(lookahead):
    return Lookahead(lookahead, 8, 0.3)


def state(variables, optimizer):
    return [*values(variables), *optimizer.get_weights()]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("wrap", [lambda one: one, nest], ids=["single", "nested"])
def test_sync_is_a_slow_step_now_and_a_second_one_changes_nothing(wrap, traced):
    variables, optimizer = trained(wrap=wrap)
    fast, slow = values(variables), values(slots(optimizer, variables))
    assert np.any(fast[0] != slow[0])
    momentum, count = optimizer.get_weights()[-len(SHAPES) :], optimizer.iterations.numpy()
    sync = tf.function(optimizer.sync) if traced else optimizer.sync
    sync()
    alpha = 0.3 if wrap is nest else SLOW_STEP_SIZE
    assert_slow_step(values(variables), slow, fast, alpha)
    level = optimizer
    while isinstance(level, Lookahead):
        assert_same_bits(slots(level, variables), variables)
        level = level.inner_optimizer
    assert_same_bits(optimizer.get_weights()[-len(SHAPES) :], momentum)
    assert optimizer.iterations.numpy() == count
    after = state(variables, optimizer)
    sync()
    assert_same_bits(state(variables, optimizer), after)


def test_after_a_sync_on_demand_the_next_one_comes_when_it_would_have():
    variables, optimizer = trained(steps=4)
    optimizer.sync()
    start = values(variables)
    for t in (5, 6):
        optimizer.apply_gradients(ones(*variables))
        assert all(np.array_equal(*pair) for pair in zip(slots(optimizer, variables), variables)) == (t == 6)
        if t == 5:
            assert_same_bits(slots(optimizer, variables), start)


@pytest.mark.parametrize("wrap", [lambda one: one, nest], ids=["single", "nested"])
def test_reset_captures_the_weights_as_they_are(wrap):
    variables, optimizer = trained(wrap=wrap)
    best = [np.full_like(value, 7) for value in values(variables)]
    for variable, value in zip(variables, best):
        variable.assign(value)
    before = optimizer.get_weights()
    optimizer.reset_slow_weights()
    assert_same_bits(variables, best)
    level = optimizer
    while isinstance(level, Lookahead):
        assert_same_bits(slots(level, variables), best)
        level = level.inner_optimizer
    assert_same_bits(optimizer.get_weights()[-len(SHAPES) :], before[-len(SHAPES) :])
    assert optimizer.get_weights()[0] == before[0]


@pytest.mark.parametrize("wrap", [lambda one: one, nest], ids=["single", "nested"])
def test_the_block_holds_the_slow_weights_and_the_fast_ones_come_back_bit_for_bit(wrap):
    variables, optimizer = trained(wrap=wrap)
    before, slow = state(variables, optimizer), values(slots(optimizer, variables))
    assert np.any(values(variables)[0] != slow[0])
    with optimizer.slow_weights():
        assert_same_bits(variables, slow)
    assert_same_bits(state(variables, optimizer), before)


def test_training_after_a_block_goes_on_as_if_there_had_been_none():
    results = []
    for block in (True, False):
        variables, optimizer = trained()
        step = make_step("function", optimizer, variables)
        for t in range(5):
            if block:
                with optimizer.slow_weights():
                    assert_same_bits(variables, slots(optimizer, variables))
            step([tf.ones(shape) * t for shape in SHAPES])
        results.append(state(variables, optimizer))
    assert_same_bits(*results)


def test_the_fast_weights_come_back_after_an_exception_in_the_block():
    variables, optimizer = trained()
    before = state(variables, optimizer)

    def fail():
        with optimizer.slow_weights():
            variables[0].assign(tf.zeros_like(variables[0]))
            raise KeyError("in the block")

    with pytest.raises(KeyError, match="in the block"):
        fail()
    assert_same_bits(state(variables, optimizer), before)
    optimizer.apply_gradients(ones(*variables))
    assert optimizer.iterations.numpy() == 5


def test_a_block_in_a_block_changes_nothing():
    variables, optimizer = trained()
    before, slow = state(variables, optimizer), values(slots(optimizer, variables))
    with optimizer.slow_weights():
        with optimizer.slow_weights():
            assert_same_bits(variables, slow)
        assert_same_bits(variables, slow)
        with pytest.raises(KeyError), optimizer.slow_weights():
            raise KeyError
        assert_same_bits(variables, slow)
    assert_same_bits(state(variables, optimizer), before)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda one, variables: one.apply_gradients(ones(*variables)), r"apply_gradients\(grads_and_vars\)"),
        (
            lambda one, variables: one.minimize(lambda: tf.reduce_sum(variables[0]), variables[:1]),
            r"apply_gradients\(grads_and_vars\)",
        ),
        (lambda one, variables: make_step("function", one, variables)([tf.ones(s) for s in SHAPES]), "apply_gradients"),
        (lambda one, variables: one.sync(), r"sync\(\)"),
        (lambda one, variables: one.reset_slow_weights(), r"reset_slow_weights\(\)"),
    ],
    ids=["apply_gradients", "minimize", "function", "sync", "reset_slow_weights"],
)
def test_what_would_move_the_weights_is_refused_in_the_block(call, name):
    variables, optimizer = trained()
    before = state(variables, optimizer)
    with (
        optimizer.slow_weights(),
        pytest.raises(RuntimeError, match=rf"`{name}.* was called inside a `slow_weights\(\)` block.*after the block"),
    ):
        call(optimizer, variables)
    assert_same_bits(state(variables, optimizer), before)
    call(optimizer, variables)


def test_before_the_first_step_the_block_the_sync_and_the_reset_keep_loaded_weights():
    variable = tf.Variable([1.0, 2.0])
    optimizer = Lookahead(legacy.SGD(0.1), 3)
    optimizer._create_all_weights([variable])
    for value, call in ([3.0, 4.0], optimizer.sync), ([5.0, 6.0], optimizer.reset_slow_weights):
        variable.assign(value)
        with optimizer.slow_weights():
            np.testing.assert_array_equal(variable, value)
        call()
        np.testing.assert_array_equal(variable, value)
        np.testing.assert_array_equal(optimizer.get_slot(variable, "slow"), value)


def test_without_any_step_or_switched_off_there_is_nothing_to_change():
    variables, optimizer = trained(sync_period=0)
    before = state(variables, optimizer)
    for one in (optimizer, Lookahead("sgd")):
        one.sync()
        one.reset_slow_weights()
        with one.slow_weights():
            assert_same_bits(state(variables, optimizer), before)
    assert_same_bits(state(variables, optimizer), before)


def test_frozen_weights_stay_after_a_reset():
    frozen, trained = tf.Variable([1.0, 2.0]), tf.Variable([3.0])
    optimizer = Lookahead(legacy.SGD(0.1), 2)
    optimizer.apply_gradients([(tf.constant([1.0, 1.0]), frozen), (tf.constant([1.0]), trained)])
    frozen.assign([9.0, 9.0])
    optimizer.reset_slow_weights()
    for _ in range(5):
        optimizer.apply_gradients([(tf.constant([1.0]), trained)])
    assert_same_bits([frozen], [np.array([9.0, 9.0], "float32")])


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: Lookahead(one, 100)], ids=["single", "inner"])
def test_a_period_set_after_the_first_steps_takes_the_weights_as_they_are_then(wrap):
    switched = Lookahead(legacy.SGD(0.1), 0)
    optimizer, variable = wrap(switched), tf.Variable([1.0])
    path = []
    for t in range(5):
        if t == 2:
            switched.sync_period = 2
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])
        path.append(float(variable[0]))
    # The third step begins at .8. The fourth step is followed by a sync.
    np.testing.assert_allclose(path, [0.9, 0.8, 0.7, 0.7, 0.6], rtol=1e-6)


def test_a_model_that_is_gone_is_not_kept():
    optimizer = Lookahead(legacy.SGD(0.1), 2)
    variable, other = tf.Variable([1.0]), tf.Variable([2.0])
    for one in (variable, other):
        optimizer.apply_gradients([(tf.constant([1.0]), one)])
    reference_to_it = weakref.ref(variable)
    del variable, one
    gc.collect()
    assert reference_to_it() is None
    optimizer.apply_gradients([(tf.constant([1.0]), other)])
    optimizer.sync()
    assert_same_bits([other], slots(optimizer, [other]))
