"""`RectifiedAdam`: the paper's algorithm, and cases in which the original fails."""

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead, RectifiedAdam
from lookahead_optim.tf_keras._keras import keras
from tests.comparison import assert_same_bits
from tests.reference_adam import rectified_adam
from tests.test_tf_keras.recorded import assert_within
from tests.test_tf_keras.resuming import compiled, fit, save, state

RNG = np.random.default_rng(5)
START, GRADIENTS = RNG.normal(size=6), RNG.normal(size=(40, 6))


def train(optimizer, dtype="float32", gradients=GRADIENTS, jit_compile=None):
    variable = tf.Variable(START, dtype=dtype)

    def step(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    step = tf.function(step, jit_compile=True) if jit_compile else step
    for gradient in gradients:
        step(tf.constant(gradient, dtype))
    return np.array(tf.cast(variable, "float64"))


SETTINGS = [
    {},
    {"amsgrad": True, "beta_2": 0.9},
    {"weight_decay": 0.1, "sma_threshold": 4},
    {"total_steps": 30, "warmup_proportion": 0.3, "min_lr": 0.001},
    {"total_steps": 30, "warmup_proportion": 0.0},
    {"total_steps": 40, "warmup_proportion": 1.0},
    {"beta_1": 0.0, "beta_2": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_the_papers_algorithm(settings):
    actual = train(RectifiedAdam(0.02, **settings), "float64")
    # The settings are float32 variables, and the rectification magnifies their rounding.
    np.testing.assert_allclose(actual, rectified_adam(START, GRADIENTS, 0.02, **settings)[-1], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_xla_computes_the_same(settings):
    expected = train(RectifiedAdam(0.02, **settings))
    np.testing.assert_allclose(train(RectifiedAdam(0.02, **settings), jit_compile=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rectified_in_the_same_steps(dtype):
    """In the original's float16 the rectification starts in the third step instead of the sixth."""
    expected = rectified_adam(START, GRADIENTS, 0.02, epsilon=1e-3)[-1]
    actual = train(RectifiedAdam(0.02, epsilon=1e-3), dtype)
    np.testing.assert_allclose(actual, expected, atol={"float16": 3e-3, "bfloat16": 3e-2}[dtype])


def test_float16_goes_on_after_65504_steps():
    optimizer = RectifiedAdam(0.02, epsilon=1e-3)
    optimizer.iterations.assign(70_000)
    moved = np.abs(train(optimizer, "float16", np.full((1, 6), 4.0)) - START)
    # The moments of a first step: m = 0.1 * 4, v = 0.001 * 16.
    np.testing.assert_allclose(moved, 0.02 * 0.4 / (np.sqrt(0.016) + 1e-3), atol=2e-3)


def test_a_row_without_gradient_stays_and_its_moments_decay():
    variable = tf.Variable(np.ones((3, 2), "float32"))
    optimizer = RectifiedAdam(0.1, weight_decay=0.5)
    optimizer.apply_gradients([(tf.ones((3, 2)), variable)])
    before = variable.numpy()
    optimizer.apply_gradients([(tf.IndexedSlices(tf.ones((2, 2)), tf.constant([2, 2]), tf.constant([3, 2])), variable)])
    assert_same_bits(variable.numpy()[:2], before[:2])
    assert np.all(variable.numpy()[2] != before[2])
    np.testing.assert_allclose(optimizer.get_slot(variable, "m"), [[0.09] * 2] * 2 + [[0.29] * 2], rtol=1e-6)


def test_settings_that_are_set_later_take_effect():
    """The original ignores a weight decay that was 0 at first."""
    gradients, optimizer = GRADIENTS[:1], RectifiedAdam(0.1)
    optimizer.weight_decay, optimizer.total_steps, optimizer.warmup_proportion = 0.5, 10, 0.2
    expected = rectified_adam(START, gradients, 0.1, weight_decay=0.5, total_steps=10, warmup_proportion=0.2)
    np.testing.assert_allclose(train(optimizer, gradients=gradients), expected[-1], rtol=1e-6)
    assert optimizer.get_config()["total_steps"] == 10


def test_a_compiled_step_has_no_place_for_a_weight_decay_that_was_zero():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(RectifiedAdam(0.1), "mse")
    nothing, (before,) = np.zeros((4, 2)), model.get_weights()
    model.train_on_batch(nothing, nothing[:, :1])
    model.optimizer.weight_decay = 0.5
    model.train_on_batch(nothing, nothing[:, :1])
    assert_same_bits(model.get_weights()[0], before)
    model.compile(model.optimizer, "mse")
    model.train_on_batch(nothing, nothing[:, :1])
    np.testing.assert_allclose(model.get_weights()[0], 0.95 * before, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["RectifiedAdam", "Addons>RectifiedAdam", {"class_name": "RectifiedAdam", "config": {}}]
)
def test_it_is_found_by_name(name):
    assert type(Lookahead(name).inner_optimizer) is RectifiedAdam


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Lookahead(inner, 3)], ids=["bare", "wrapped"])
def test_hdf5_files_under_mixed_precision_resume_bit_for_bit(tmp_path, wrap):
    inner = RectifiedAdam(0.02, amsgrad=True, weight_decay=0.01, total_steps=20, min_lr=1e-3)
    model = fit(compiled(keras.mixed_precision.LossScaleOptimizer(wrap(inner), initial_scale=8.0)), end=7)
    save(model, tmp_path / "model", "h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    inner = loaded.optimizer.inner_optimizer
    assert type(getattr(inner, "inner_optimizer", inner)) is RectifiedAdam
    assert_same_bits(state(fit(loaded, begin=7)), state(fit(model, begin=7)))


BAD = [
    (
        {"learning_rate": -0.1},
        ValueError,
        r"`learning_rate` must be a finite number >= 0. Received: learning_rate=-0.1",
    ),
    ({"learning_rate": "0.1"}, TypeError, r"`learning_rate` must be a finite number >= 0"),
    ({"lr": float("nan")}, ValueError, r"`learning_rate` must be .* Received: learning_rate=nan"),
    ({"beta_1": 1.0}, ValueError, r"`beta_1` must be .*>= 0 and < 1, usually 0.9. Received: beta_1=1.0"),
    ({"beta_2": True}, TypeError, r"`beta_2` must be .* Received: beta_2=True of type bool"),
    ({"epsilon": -1e-7}, ValueError, r"`epsilon` must be a finite number >= 0"),
    ({"weight_decay": float("inf")}, ValueError, r"`weight_decay` must be a finite number >= 0"),
    ({"amsgrad": "yes"}, TypeError, r"`amsgrad` must be `True` or `False`. Received: amsgrad='yes'"),
    ({"sma_threshold": 3.9}, ValueError, r"`sma_threshold` must be a finite number >= 4, usually 5"),
    (
        {"total_steps": 10.0},
        TypeError,
        r"`total_steps` must be an integer >= 0.* Received: total_steps=10.0 of type float",
    ),
    ({"total_steps": -1}, ValueError, r"`total_steps` must be an integer >= 0"),
    ({"total_steps": int}, TypeError, r"`total_steps` must be an integer >= 0"),
    ({"total_steps": 9, "warmup_proportion": 1.5}, ValueError, r"`warmup_proportion` must be .*>= 0 and <= 1"),
    ({"total_steps": 9, "min_lr": 0.1}, ValueError, r"`min_lr` must be at most `learning_rate`.* learning_rate=0.001"),
    ({"decay": -0.1}, ValueError, r"`decay` must be a finite number >= 0"),
    ({"clipnorm": "1"}, TypeError, r"`clipnorm` must be a finite number >= 0"),
    ({"rectify": True}, TypeError, r"rectify"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=[str(settings) for settings, *_ in BAD])
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        RectifiedAdam(**settings)


def test_a_bad_setting_that_is_set_later_changes_nothing():
    optimizer = RectifiedAdam()
    with pytest.raises(ValueError, match="`sma_threshold` must be a finite number >= 4"):
        optimizer.sma_threshold = 1.0
    assert optimizer.get_config()["sma_threshold"] == 5.0


def test_a_schedule_a_callable_and_a_tensor_are_learning_rates():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.01])
    expected = train(RectifiedAdam(schedule))
    assert_within(
        train(RectifiedAdam({"class_name": "PiecewiseConstantDecay", "config": schedule.get_config()})), expected, 0
    )
    rate = tf.Variable(0.1)
    optimizer = RectifiedAdam(lambda: rate, weight_decay=lambda: 0.0 * rate)
    expected = train(RectifiedAdam(0.1))
    assert_within(train(optimizer), expected, 0)
    assert_within(train(RectifiedAdam(tf.constant(0.1))), expected, 0)
