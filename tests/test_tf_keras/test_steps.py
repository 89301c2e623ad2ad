"""Which steps count, which weights a sync moves, when slow weights are captured, and syncs of extreme numbers."""

import copy

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras
from tests.comparison import assert_same_bits
from tests.test_tf_keras import resuming
from tests.test_tf_keras.resuming import compiled, fit, slow_of, values

legacy = keras.optimizers.legacy


def ones(*variables):
    return [(tf.ones_like(variable), variable) for variable in variables]


def make_step(mode, optimizer, variables):
    def step():
        optimizer.apply_gradients(ones(*variables))

    return step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")


# Steps that fail.


@pytest.mark.parametrize("loss_scaled", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_step_that_fails_at_the_end_of_a_dataset_does_nothing(nested, loss_scaled):
    """A dataset of unknown size ends in each epoch with a step that fails because it has no data."""

    def run(known):
        x, y = np.ones((80, 4), "float32"), np.ones((80, 1), "float32")
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
        dataset = dataset if known else dataset.filter(lambda *batch: True)
        optimizer = Lookahead(legacy.SGD(0.01), sync_period=6)
        optimizer = Lookahead(optimizer, 4) if nested else optimizer
        if loss_scaled:
            optimizer = keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=4.0)
        model = compiled(optimizer)
        model.fit(dataset, epochs=4, verbose=0)
        return [*model.get_weights(), *optimizer.get_weights()], int(optimizer.iterations)

    (expected, count), (found, found_count) = run(known=True), run(known=False)
    assert found_count == count == 20
    assert_same_bits(found, expected)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_step_whose_gradients_fail_changes_nothing(at):
    variable = tf.Variable([1.0, 2.0])
    optimizer = Lookahead(legacy.SGD(0.125, momentum=0.5), 3, 0.5)

    @tf.function
    def step(fails):
        checked = tf.debugging.Assert(tf.logical_not(fails), ["no data"])
        with tf.control_dependencies([checked]):
            gradient = tf.ones_like(variable)
        optimizer.apply_gradients([(gradient, variable)])

    for _ in range(at):
        step(tf.constant(False))
    before = [variable.numpy(), *optimizer.get_weights()]
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(True))
    assert_same_bits([variable, *optimizer.get_weights()][: len(before)], before or [variable])
    assert int(optimizer.iterations) == at
    if not at:
        variable.assign([5.0, 6.0])
        step(tf.constant(False))
        assert_same_bits([optimizer.get_slot(variable, "slow")], [np.array([5.0, 6.0], "float32")])


# Frozen weights.


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
def test_a_weight_that_is_not_trained_any_more_is_not_moved_and_its_slow_weight_starts_from_it(mode):
    frozen, trained = tf.Variable([1.0, 2.0]), tf.Variable([3.0])
    optimizer = Lookahead(Lookahead(legacy.SGD(0.125), 3, 0.5), 4, 0.25)
    step = make_step(mode, optimizer, [frozen, trained])
    step()
    step()
    fast = values([frozen])
    assert np.any(fast[0] != optimizer.get_slot(frozen, "slow").numpy())
    step = make_step(mode, optimizer, [trained])
    for _ in range(4):
        step()
        assert_same_bits([frozen], fast)
    for one in (optimizer, optimizer.inner_optimizer):
        assert_same_bits([one.get_slot(frozen, "slow")], fast)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_a_frozen_weight_starts_anew_also_where_as_many_are_listed_as_were_trained(mode):
    frozen, trained, unused = tf.Variable([1.0, 2.0]), tf.Variable([3.0]), tf.Variable([4.0])
    optimizer = Lookahead(legacy.SGD(0.125), 3, 0.5)
    step = make_step(mode, optimizer, [frozen, trained])
    step()
    step()
    fast = values([frozen])
    gradient = tf.constant([1.0])

    def step_without():
        optimizer.apply_gradients([(gradient, trained), (None, unused)])

    (step_without if mode == "eager" else tf.function(step_without))()
    assert_same_bits([frozen], fast)
    assert_same_bits([optimizer.get_slot(frozen, "slow")], fast)


@pytest.mark.parametrize("part", ["model", "layer"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_frozen_model_is_evaluated_and_synchronised_by_what_was_captured(part, run_eagerly):
    model = fit(compiled(Lookahead(legacy.SGD(0.05), 3), run_eagerly=run_eagerly), end=4)
    weights, slow, fast = model.trainable_weights, slow_of(model), model.get_weights()
    (model if part == "model" else model.layers[0]).trainable = False
    with model.optimizer.slow_weights():
        assert_same_bits(weights, slow)
    assert_same_bits(weights, fast)
    if part == "layer":
        model.compile(model.optimizer, loss="mse", run_eagerly=run_eagerly)
        fit(model, begin=4, end=6)
        assert_same_bits(model.layers[0].get_weights(), fast[:2])
        assert np.any(model.layers[1].get_weights()[0] != fast[2])
        model.layers[0].set_weights([one + 1 for one in fast[:2]])
        fit(model, begin=6, end=9)
        assert_same_bits(model.layers[0].get_weights(), [one + 1 for one in fast[:2]])
    else:
        model.optimizer.sync()
        for one, start, end in zip(weights, slow, fast):
            np.testing.assert_allclose(one, start + 0.5 * (end - start), rtol=1e-6, atol=1e-7)


def test_a_model_that_another_step_trains_is_not_moved_by_its_sync():
    one, other = tf.Variable(1.0), tf.Variable(1.0)
    optimizer = Lookahead(legacy.SGD(0.125), 2, 0.5)
    path = []
    for _ in range(2):
        for variable in (one, other):
            optimizer.apply_gradients(ones(variable))
            path.append((float(one), float(other)))
    assert path == [(0.875, 1), (0.875, 0.9375), (0.75, 0.9375), (0.75, 0.875)]


@pytest.mark.parametrize("outer", [lambda one: one, lambda one: Lookahead(one, 100)], ids=["single", "nested"])
def test_a_weight_without_gradient_under_a_loss_scaler_takes_part(outer):
    one, other = tf.Variable(1.0), tf.Variable(1.0)
    inner = outer(Lookahead(legacy.SGD(0.125), 2, 0.5))
    optimizer = keras.mixed_precision.LossScaleOptimizer(inner, dynamic=False, initial_scale=1.0)
    optimizer.apply_gradients(ones(one, other))
    optimizer.apply_gradients([(tf.constant(1.0), one), (None, other)])
    assert (float(one), float(other)) == (0.875, 0.9375)


# When slow weights are captured.


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("count", [0, 4, 100])
def test_a_count_assigned_before_the_first_step_leaves_the_capture_to_it(mode, count):
    variable = tf.Variable([1.0])
    optimizer = Lookahead(legacy.SGD(0.125), 1, 0.5)
    optimizer._create_all_weights([variable])
    variable.assign([5.0])
    optimizer.iterations.assign(count)
    make_step(mode, optimizer, [variable])()
    assert_same_bits([variable], [np.array([5 - 0.125 / 2], "float32")])
    assert int(optimizer.iterations) == count + 1


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_count_assigned_in_mid_cycle_moves_the_next_sync_and_no_weight(mode, count):
    variable = tf.Variable([1.0])
    optimizer = Lookahead(legacy.SGD(0.125), 3, 0.5)
    step = make_step(mode, optimizer, [variable])
    step()
    step()
    optimizer.iterations.assign(count)
    steps = 3 - count % 3
    for _ in range(steps):
        assert_same_bits([optimizer.get_slot(variable, "slow")], [np.array([1.0], "float32")])
        step()
    assert_same_bits([variable], [np.array([1 - 0.125 * (2 + steps) / 2], "float32")])


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_a_count_set_to_zero_in_mid_cycle_captures_no_slow_weight_of_a_nested_wrapper(mode):
    variable = tf.Variable([1.0])
    optimizer = Lookahead(Lookahead(legacy.SGD(0.125), 4), 4)
    make_step(mode, optimizer, [variable])()
    optimizer.iterations.assign(0)
    make_step(mode, optimizer, [variable])()
    for one in (optimizer, optimizer.inner_optimizer):
        assert_same_bits([one.get_slot(variable, "slow")], [np.array([1.0], "float32")])


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_a_period_switched_off_and_on_captures_anew(mode):
    variable = tf.Variable([1.0])
    optimizer = Lookahead(legacy.SGD(0.125), 2, 0.5)
    for period, times in ((2, 1), (0, 2), (2, 1)):
        optimizer.sync_period = period
        step = make_step(mode, optimizer, [variable])
        for _ in range(times):
            step()
    # The fourth update ends the cycle that begins after three, with a sync.
    assert_same_bits([variable], [np.array([1 - 0.125 * 3.5], "float32")])


def test_a_copy_has_a_state_of_its_own():
    variable = tf.Variable([1.0])
    optimizer = Lookahead(legacy.SGD(0.125), 2, 0.5)
    optimizer._create_all_weights([variable])
    twin = copy.deepcopy(optimizer)
    optimizer.apply_gradients(ones(variable))
    variable.assign([5.0])
    twin.apply_gradients(ones(variable))
    assert (float(twin.get_slot(variable, "slow")[0]), float(optimizer.get_slot(variable, "slow")[0])) == (5, 1)
    assert (int(twin.iterations), int(optimizer.iterations)) == (1, 1)


def test_whether_slow_weights_are_captured_is_not_in_checkpoints_which_are_those_of_the_original(tmp_path):
    model = fit(compiled(Lookahead(legacy.SGD(0.05), 3)), end=4)
    resuming.save(model, tmp_path / "model", "weights")
    names = [name for name, _ in tf.train.list_variables(f"{tmp_path}/model.weights")]
    assert not [name for name in names if "captured" in name]


def loss_scaled(optimizer):
    return keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=4.0)


@pytest.mark.parametrize("outer", [lambda one: one, loss_scaled], ids=["single", "loss_scaled"])
def test_to_read_the_count_makes_no_variable_but_keras_own(outer):
    inner = Lookahead(Lookahead(legacy.SGD(0.125), 3), 2)
    assert int(outer(inner).iterations) == int(inner.iterations) == int(inner.inner_optimizer.iterations) == 0
    assert [one.name for one in inner.weights] == [inner.iterations.name]
    assert inner._applied_steps is None
    assert inner._capture_state is None


@pytest.mark.parametrize("aggregates", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_a_first_step_that_a_loss_scaler_skips_is_not_counted_as_applied(traced, aggregates, tmp_path):
    def made():
        inner, variable = Lookahead(legacy.SGD(0.125), 2, 0.5), tf.Variable(1.0)
        optimizer = loss_scaled(inner)

        def step(gradient):
            optimizer.apply_gradients([(gradient, variable)], experimental_aggregate_gradients=aggregates)

        return optimizer, variable, tf.function(step) if traced else step

    optimizer, variable, step = made()
    step(tf.constant(np.nan))
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, variable=variable).write(f"{tmp_path}/skipped")
    path = []
    for _ in range(2):
        step(tf.constant(1.0))
        path.append(float(variable))
    assert path == [0.875, 0.875]
    assert [int(optimizer.iterations), int(optimizer.get_weights()[-1])] == [3, 2]
    if aggregates:
        optimizer, variable, step = made()
        tf.train.Checkpoint(optimizer=optimizer, variable=variable).read(checkpoint)
        for expected in path:
            step(tf.constant(1.0))
            assert float(variable) == expected


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_that_has_not_stepped_takes_every_call_and_does_nothing(wrapped):
    variable = tf.Variable(1.0)
    optimizer = Lookahead(legacy.SGD(0.125), 2, 0.5)
    optimizer = Lookahead(optimizer, 4) if wrapped else optimizer
    optimizer.sync()
    optimizer.reset_slow_weights()
    with optimizer.slow_weights():
        assert float(variable) == 1
    assert optimizer.weights == []
    optimizer.apply_gradients(ones(variable))
    assert (float(variable), float(optimizer.get_slot(variable, "slow"))) == (0.875, 1)


def test_a_reset_of_a_wrapper_that_is_switched_off_resets_the_one_inside():
    variable = tf.Variable(1.0)
    inner = Lookahead(legacy.SGD(0.125), 3)
    optimizer = Lookahead(inner, 0)
    optimizer.apply_gradients(ones(variable))
    variable.assign(5.0)
    optimizer.reset_slow_weights()
    assert float(inner.get_slot(variable, "slow")) == 5


def test_a_sync_of_a_wrapper_that_was_just_switched_on_restarts_the_one_inside():
    variable = tf.Variable(1.0)
    inner = Lookahead(legacy.SGD(0.125), 3)
    optimizer = Lookahead(inner, 0)
    optimizer.apply_gradients(ones(variable))
    optimizer.sync_period = 3
    optimizer.sync()
    assert float(variable) == float(inner.get_slot(variable, "slow")) == 0.875


def test_a_filtered_variable_keeps_what_the_inner_optimizer_made_of_it_in_that_cycle():
    one, other = tf.Variable(1.0), tf.Variable(1.0)
    optimizer = Lookahead(legacy.SGD(0.125), 2, 0.5)
    optimizer.apply_gradients(ones(one, other))
    optimizer.apply_gradients(ones(one))
    assert [float(variable) for variable in (one, other)] == [0.875, 0.875]
    assert float(optimizer.get_slot(other, "slow")) == 0.875
    # The next cycle is one like any other.
    optimizer.apply_gradients(ones(one, other))
    optimizer.apply_gradients(ones(one, other))
    assert [float(variable) for variable in (one, other)] == [0.75, 0.75]


# Extreme numbers.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("step_size", [0.0, 0.5, 1.0, "0", "0.5", "1"])
def test_equal_infinities_stay_and_large_weights_do_not_overflow(step_size, constrained, mode, dtype):
    largest = float(np.finfo(tf.as_dtype(dtype).as_numpy_dtype).max) if dtype != "bfloat16" else 3.38e38
    slow = [np.inf, -np.inf, largest, -largest, 1.0, 2.0, np.inf]
    fast = [np.inf, -np.inf, -largest, largest, 3.0, 2.0, 0.0]
    variable = tf.Variable(slow, dtype=dtype, constraint=(lambda weight: weight) if constrained else None)
    a = float(step_size)
    optimizer = Lookahead(legacy.SGD(0.0), 2, tf.Variable(a) if isinstance(step_size, str) else a)

    def step():
        optimizer.apply_gradients([(tf.zeros_like(variable), variable)])

    step = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    step()
    variable.assign(tf.constant(fast, dtype))
    step()
    expected = {0: slow, 1: fast, 0.5: [np.inf, -np.inf, 0.0, 0.0, 2.0, 2.0, np.inf]}[a]
    for one in (variable, optimizer.get_slot(variable, "slow")):
        assert_same_bits([one], [tf.constant(expected, dtype)])


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
def test_a_weight_at_the_ends_leaves_the_others_bits_alone(mode):
    rng = np.random.default_rng(0)
    slow, fast = rng.normal(size=(2, 1000)).astype("float32")
    results = []
    for mask in (False, True):
        variable = tf.Variable(slow)
        optimizer = Lookahead(legacy.SGD(0.0), 2, 0.3)
        step = make_step(mode, optimizer, [variable])
        if mask:
            variable.assign(np.where(np.arange(1000) == 7, -np.inf, slow))
        step()
        variable.assign(np.where(np.arange(1000) == 7, -np.inf, fast) if mask else fast)
        step()
        results.append(np.delete(variable.numpy(), 7))
    assert_same_bits(*([one] for one in results))
