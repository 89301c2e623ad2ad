"""`captured` is a state of its own. What counts as a step, settings and names belong to the inner optimizer."""

import gc
import weakref

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, SwapSlowWeights
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, data, train, values

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow only")


def make_model(optimizer, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="a"), keras.layers.Dense(1, name="b")])
    model.compile(optimizer, loss=keras.losses.MeanSquaredError())
    model.optimizer.build(model.trainable_variables)
    return model


def step(optimizer, variables, times=1):
    for _ in range(times):
        optimizer.apply([keras.ops.ones(variable.shape) for variable in variables], variables)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [1000, 2**31 - 3])
def test_a_count_that_was_assigned_does_not_count_as_captured(nested, count):
    weight = keras.Variable(np.full(2, 8.0, "float32"))
    inner = keras.optimizers.SGD(0.0)
    optimizer = Lookahead(Lookahead(inner, 2) if nested else inner, sync_period=3)
    optimizer.build([weight])
    optimizer.iterations.assign(count)
    with optimizer.slow_weights():
        np.testing.assert_array_equal(values([weight])[0], 8.0)
    step(optimizer, [weight], 5)
    np.testing.assert_array_equal(values([weight])[0], 8.0)
    with optimizer.slow_weights():
        np.testing.assert_array_equal(values([weight])[0], 8.0)


def test_assigning_iterations_moves_the_inner_optimizers_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer = Lookahead(keras.optimizers.SGD(schedule))
    assert optimizer.iterations is optimizer.inner_optimizer.iterations
    optimizer.iterations.assign(20)
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.025)


def test_slow_weights_stay_when_the_count_is_reset():
    weight = keras.Variable([0.0])
    optimizer = Lookahead(keras.optimizers.SGD(0.125), sync_period=4)
    step(optimizer, [weight], 3)
    optimizer.iterations.assign(0)
    step(optimizer, [weight], 4)
    np.testing.assert_array_equal(values([weight])[0], -0.5 * 0.125 * 7)


def test_an_update_that_fails_captures_nothing():
    weight = keras.Variable([0.0])
    optimizer = Lookahead(keras.optimizers.SGD(0.125), sync_period=2)
    optimizer.build([weight])
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply([None], [weight])
    weight.assign([8.0])
    step(optimizer, [weight], 2)
    np.testing.assert_array_equal(values([weight])[0], 8.0 - 0.125)


CHECKPOINTED = {
    "bare": lambda: keras.optimizers.SGD(0.0, momentum=0.5),
    "off": lambda: Lookahead(keras.optimizers.SGD(0.0, momentum=0.5), 0),
    "on": lambda: Lookahead(keras.optimizers.SGD(0.0, momentum=0.5), 3),
    "nested": lambda: Lookahead(Lookahead(keras.optimizers.SGD(0.0, momentum=0.5), 2), 3),
}


@on_tensorflow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("new", CHECKPOINTED)
@pytest.mark.parametrize("old", CHECKPOINTED)
def test_no_checkpoint_of_tensorflow_makes_zeros_or_old_weights_slow(old, new, trained, tmp_path):
    import tensorflow as tf

    saved = make_model(CHECKPOINTED[old]())
    step(saved.optimizer, saved.trainable_variables, 4)
    tf.train.Checkpoint(model=saved, optimizer=saved.optimizer).write(str(tmp_path / "c"))
    model = make_model(CHECKPOINTED[new](), seed=1)
    if trained:
        step(model.optimizer, model.trainable_variables, 4)
    status = tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(tmp_path / "c"))
    if old == new:
        status.assert_consumed()
        assert_same_bits(model.optimizer.variables, saved.optimizer.variables)
    status.expect_partial()
    before = values(model.weights)
    assert_same_bits(before, saved.weights)
    step(model.optimizer, model.trainable_variables, 7)
    for one, other in zip(values(model.weights), before):
        np.testing.assert_array_equal(one, other)


@on_tensorflow
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_step_without_data_does_not_happen():
    import tensorflow as tf

    x, y = data(40)
    results = []
    for is_known in (True, False):
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        if not is_known:
            dataset = dataset.filter(lambda *batch: True)
        model = make_model(Lookahead(keras.optimizers.SGD(0.05, weight_decay=0.1, use_ema=True), sync_period=6))
        model.compile(model.optimizer, loss="mse", jit_compile=False)
        model.fit(dataset, epochs=3, shuffle=False, verbose=0)
        results.append(values([*model.weights, *model.optimizer.variables]))
    for known, unknown in zip(*results, strict=True):
        np.testing.assert_allclose(unknown, known, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_frozen_weights_are_swapped_and_synchronised(layers):
    model = make_model(Lookahead(keras.optimizers.SGD(0.125), sync_period=3))
    step(model.optimizer, model.trainable_variables, 4)
    slow, weights = values(model.optimizer.slow_variables), list(model.trainable_variables)
    for index in layers:
        model.layers[index].trainable = False
    fast = values(weights)
    with model.optimizer.slow_weights():
        assert_same_bits(weights, slow)
        expected = model.evaluate(*data(8), verbose=0)
    assert_same_bits(weights, fast)
    assert model.evaluate(*data(8), callbacks=[SwapSlowWeights()], verbose=0) == expected
    model.optimizer.sync()
    for one, start, end in zip(values(weights), slow, fast):
        np.testing.assert_allclose(one, start + 0.5 * (end - start), rtol=1e-6)
    assert_same_bits(weights, model.optimizer.slow_variables)


def overriding(method):
    """Return an SGD whose `method` scales the gradients before the step."""

    class Scaling(keras.optimizers.SGD):
        pass

    def scaled(gradients):
        return [None if one is None else 0.5 * one for one in gradients]

    def apply(self, grads, trainable_variables=None):
        return keras.optimizers.SGD.apply(self, scaled(grads), trainable_variables)

    def apply_gradients(self, grads_and_vars):
        grads, variables = zip(*grads_and_vars)
        return keras.optimizers.SGD.apply_gradients(self, zip(scaled(grads), variables))

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        return keras.optimizers.SGD.stateless_apply(self, optimizer_variables, scaled(grads), trainable_variables)

    function = {"apply": apply, "apply_gradients": apply_gradients, "stateless_apply": stateless_apply}[method]
    setattr(Scaling, method, function)
    return Scaling


@pytest.mark.parametrize("method", ["apply", "apply_gradients", "stateless_apply"])
def test_what_the_inner_optimizer_overrides_is_called_in_fit_as_that_of_a_bare_one(method):
    results = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: Lookahead(optimizer, sync_period=100)):
        model = make_model(wrap(overriding(method)(0.125)))
        train(model, model.optimizer, *data(40))
        results.append(values(model.weights))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm", "weight_decay", "momentum", "nesterov"])
@pytest.mark.parametrize("nested", [False, True])
def test_settings_on_the_wrapper_are_the_inner_optimizers(name, nested):
    inner = keras.optimizers.SGD(0.1, momentum=0.5)
    optimizer = Lookahead(Lookahead(inner)) if nested else Lookahead(inner)
    assert getattr(optimizer, name) == getattr(inner, name)
    setattr(optimizer, name, 0.25)
    assert getattr(inner, name) == getattr(optimizer, name) == 0.25
    assert name not in vars(optimizer)


def test_an_attribute_that_nobody_has_is_an_error():
    message = "'Lookahead' object has no attribute 'beta_1', .* inner optimizer: 'SGD' object has no attribute 'beta_1'"
    for optimizer in (Lookahead("sgd"), Lookahead(Lookahead("sgd"))):
        with pytest.raises(AttributeError, match=message):
            optimizer.beta_1  # noqa: B018


@pytest.mark.parametrize("value", [-1, 2.5, "x", True, None])
@pytest.mark.parametrize("name", ["sync_period", "slow_step_size"])
def test_settings_by_hand_are_checked(name, value):
    if (name, value) == ("slow_step_size", 2.5):
        value = float("nan")
    optimizer = Lookahead("sgd", sync_period=2)
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must"):
        setattr(optimizer, name, value)
    assert (optimizer.sync_period, optimizer.slow_step_size) == (2, 0.5)


def test_a_period_cannot_be_switched_on_after_it_was_built_without():
    optimizer = Lookahead("sgd", sync_period=0)
    optimizer.build([keras.Variable([0.0])])
    with pytest.raises(ValueError, match="`sync_period` must stay 0"):
        optimizer.sync_period = 3


def test_a_model_saved_while_it_was_switched_off_loads_and_is_off(tmp_path):
    model = make_model(Lookahead(keras.optimizers.SGD(0.05), sync_period=2))
    model.fit(*data(8), verbose=0)
    model.optimizer.sync_period = 0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.sync_period == 0
    assert_same_bits(loaded.optimizer.variables, model.optimizer.inner_optimizer.variables)


@pytest.mark.parametrize("period", [2**31, 2**40, 2**80])
def test_a_period_beyond_the_count_never_comes(period):
    weight = keras.Variable([0.0])
    optimizer = Lookahead(keras.optimizers.SGD(0.125), sync_period=period)
    step(optimizer, [weight], 3)
    np.testing.assert_array_equal(values([weight])[0], -0.375)
    optimizer.sync()
    np.testing.assert_array_equal(values([weight])[0], -0.1875)


@pytest.mark.parametrize(
    ("start", "end", "size", "expected"),
    [
        (-np.inf, -np.inf, 0.5, -np.inf),
        (3e38, -3e38, 0.5, 0.0),
        (3e38, -3e38, 0.0, 3e38),
        (3e38, -3e38, 1.0, -3e38),
        (1.0, np.inf, 0.0, 1.0),
        (1.0, np.inf, 0.5, np.inf),
    ],
)
def test_a_sync_near_the_ends_of_numbers(start, end, size, expected):
    weight = keras.Variable(np.full(3, start, "float32"))
    optimizer = Lookahead(keras.optimizers.SGD(0.0), 2, size)
    gradients = [keras.ops.zeros(3)]
    optimizer.apply(gradients, [weight])
    weight.assign(np.full(3, end, "float32"))
    optimizer.apply(gradients, [weight])
    np.testing.assert_allclose(values([weight])[0], expected, rtol=1e-6, atol=1e32 * (expected == 0))


def by_layer(wrap):
    optimizers = keras.optimizers.OptimizerMap(wrap(keras.optimizers.SGD(0.01)))
    optimizers["b.*"] = wrap(keras.optimizers.Adam(0.01))
    return keras.optimizers.MultiOptimizer(optimizers)


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_layer(Lookahead),
        lambda: Lookahead(Lookahead("adam"), sync_period=3),
        lambda: Lookahead(Lookahead(Lookahead("adam"))),
        lambda: Lookahead(by_layer(Lookahead)),
    ],
)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_variables_have_paths_of_their_own(make, tmp_path):
    model = make_model(make())
    paths = [variable.path for variable in model.optimizer.variables]
    assert len(set(paths)) == len(paths)
    model.get_state_tree()
    model.save(tmp_path / "model.h5")


@pytest.mark.parametrize("nested", [False, True])
def test_callbacks_change_the_learning_rates_of_a_multi_optimizer_inside(nested):
    optimizer = Lookahead(by_layer(lambda one: one))
    model = make_model(Lookahead(optimizer) if nested else optimizer)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1e6)
    model.fit(*data(8), epochs=2, callbacks=[halve, plateau], verbose=0)
    rates = [float(one.learning_rate) for one in optimizer.inner_optimizer.optimizers]
    # The first epoch is the best.
    np.testing.assert_allclose(rates, 0.01 / 2**3, rtol=1e-6)


@on_tensorflow
def test_a_bare_optimizers_checkpoint_goes_on_inside_of_a_wrapper(tmp_path):
    import tensorflow as tf

    saved = make_model(keras.optimizers.SGD(0.05, momentum=0.9))
    step(saved.optimizer, saved.trainable_variables, 4)
    tf.train.Checkpoint(model=saved, optimizer=saved.optimizer).write(str(tmp_path / "c"))
    model = make_model(Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), sync_period=3), seed=1)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer.inner_optimizer)
    checkpoint.read(str(tmp_path / "c")).expect_partial()
    start = values(model.weights)
    for one in (saved, model):
        step(one.optimizer, one.trainable_variables, 2)
    for slow, fast, end in zip(start, values(saved.weights), values(model.weights)):
        np.testing.assert_allclose(end, slow + 0.5 * (fast - slow), rtol=1e-5)


def test_an_optimizer_goes_when_it_is_deleted():
    gc.collect()
    gc.disable()
    try:
        optimizer, weight = Lookahead(Lookahead("sgd")), keras.Variable([1.0])
        step(optimizer, [weight], 7)
        optimizer.get_config()
        optimizer.learning_rate = 0.5
        held = [weakref.ref(one) for one in (optimizer, optimizer.inner_optimizer, weight)]
        del optimizer, weight
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


OPTIMIZERS = [
    name
    for name in dir(keras.optimizers)
    if isinstance(getattr(keras.optimizers, name), type)
    and issubclass(getattr(keras.optimizers, name), keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
]


@keras.saving.register_keras_serializable("named_like_one_of_keras")
class Adam(keras.optimizers.SGD):
    """Registered under a name that Keras uses too."""


@pytest.mark.parametrize("kind", [*OPTIMIZERS, Adam])
def test_every_optimizer_loads_inside_a_saved_model(kind, tmp_path):
    inner = (kind if isinstance(kind, type) else getattr(keras.optimizers, kind))(learning_rate=0.01)
    model = make_model(Lookahead(inner))
    model.fit(*data(8), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer.inner_optimizer) is type(inner)
    assert_same_bits(loaded.optimizer.variables, model.optimizer.variables)
    assert type(Lookahead(keras.optimizers.serialize(inner)).inner_optimizer) is type(inner)


@pytest.mark.parametrize("wrong", [np.full((4, 1), "x"), np.full((4, 1), None)])
def test_arrays_that_are_no_numbers_change_nothing(wrong):
    model = make_model(Lookahead("sgd"))
    step(model.optimizer, model.trainable_variables)
    before = values(model.optimizer.variables)
    arrays = [array + 1 for array in model.optimizer.get_weights()]
    arrays[1] = wrong
    with pytest.raises(ValueError, match="needs an array of numbers"):
        model.optimizer.set_weights(arrays)
    assert_same_bits(model.optimizer.variables, before)


@pytest.mark.parametrize("count", [np.nan, -1, 0.5, 2.0**70])
@pytest.mark.parametrize("index", [0, 5])
def test_a_count_that_is_none_is_refused(index, count):
    model = make_model(Lookahead("sgd"))
    step(model.optimizer, model.trainable_variables)
    before = values(model.optimizer.variables)
    arrays = [array + 1 for array in model.optimizer.get_weights()]
    arrays[index] = np.asarray(count)
    with pytest.raises(ValueError, match="needs an integer >= 0"):
        model.optimizer.set_weights(arrays)
    assert_same_bits(model.optimizer.variables, before)


def test_a_variable_that_its_gradient_overwrites_has_no_slow_weight():
    scale, weight = keras.Variable([1.0]), keras.Variable([2.0])
    scale.overwrite_with_gradient = True
    optimizer = Lookahead(keras.optimizers.SGD(0.0), sync_period=2)
    step(optimizer, [scale, weight])
    assert len(optimizer.slow_variables) == 1
    assert optimizer.get_slot(weight, "slow") is optimizer.slow_variables[0]
    with pytest.raises(ValueError, match="`var` must not be a variable that Keras overwrites with its gradient"):
        optimizer.get_slot(scale, "slow")
    with optimizer.slow_weights():
        scale.assign([5.0])
    np.testing.assert_array_equal(values([scale, weight]), [[1.0], [2.0]])
