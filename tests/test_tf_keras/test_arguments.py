"""Arguments of the constructor: accepted, or refused with which message; and which inner optimizers fit."""

import copy
import importlib.util
import warnings

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras

legacy = keras.optimizers.legacy
ExponentialDecay = keras.optimizers.schedules.ExponentialDecay
START = [np.array([1.0, -2.0, 0.5], "float32"), np.array([[3.0]], "float32")]
GRADIENTS = [np.array([3.0, -4.0, 0.25], "float32"), np.array([[12.0]], "float32")]


def train(optimizer, steps=7, gradients=GRADIENTS, traced=False):
    """Make steps whose gradients grow, and return the variables."""
    variables = [tf.Variable(value) for value in START]

    def step(scale):
        optimizer.apply_gradients([(gradient * scale, one) for gradient, one in zip(gradients, variables)])

    step = tf.function(step) if traced else step
    for t in range(steps):
        step(tf.constant(1.0 + 0.125 * t))
    return variables


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        np.testing.assert_array_equal(one, other)


def by_value(limit):
    return lambda gradients: [np.clip(gradient, -limit, limit) for gradient in gradients]


def by_norm(limit):
    return lambda gradients: [gradient * min(1, limit / np.linalg.norm(gradient)) for gradient in gradients]


def by_global_norm(limit):
    def clip(gradients):
        norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))
        return [gradient * min(1, limit / norm) for gradient in gradients]

    return clip


CLIPPINGS = [("clipvalue", 2.0, by_value), ("clipnorm", 2.5, by_norm), ("global_clipnorm", 6.5, by_global_norm)]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("where", ["wrapper", "inner", "outermost"])
@pytest.mark.parametrize(("name", "limit", "by"), CLIPPINGS)
def test_clipping(name, limit, by, where, traced):
    optimizer = legacy.SGD(0.5, **({name: limit} if where == "inner" else {}))
    optimizer = Lookahead(optimizer, 10, **({name: limit} if where == "wrapper" else {}))
    if where == "outermost":
        optimizer = Lookahead(optimizer, 10, **{name: limit})
    clipped = by(limit)(GRADIENTS)
    assert any(np.any(one != other) for one, other in zip(clipped, GRADIENTS))
    for variable, start, gradient in zip(train(optimizer, 1, traced=traced), START, clipped):
        np.testing.assert_allclose(variable, start - 0.5 * gradient, rtol=1e-6)


@pytest.mark.parametrize(("inner_name", "inner_limit", "inner_by"), CLIPPINGS)
@pytest.mark.parametrize(("name", "limit", "by"), CLIPPINGS)
def test_both_clip_the_wrapper_first(name, limit, by, inner_name, inner_limit, inner_by):
    inner_limit /= 2
    optimizer = Lookahead(legacy.SGD(0.5, **{inner_name: inner_limit}), 10, **{name: limit})
    clipped = inner_by(inner_limit)(by(limit)(GRADIENTS))
    for variable, start, gradient in zip(train(optimizer, 1), START, clipped):
        np.testing.assert_allclose(variable, start - 0.5 * gradient, rtol=1e-6)


def test_the_wrappers_clipping_comes_before_the_inner_one():
    small_first = train(Lookahead(legacy.SGD(0.5, clipnorm=4.0), 10, clipvalue=3.0), 1)
    for one, start, gradient in zip(small_first, START, by_norm(4.0)(by_value(3.0)(GRADIENTS))):
        np.testing.assert_allclose(one, start - 0.5 * gradient, rtol=1e-6)
    assert np.any(by_norm(4.0)(by_value(3.0)(GRADIENTS))[0] != by_value(3.0)(by_norm(4.0)(GRADIENTS))[0])


@pytest.mark.parametrize(("name", "limit", "by"), CLIPPINGS)
def test_clipping_of_sparse_gradients(name, limit, by):
    dense = np.zeros((3, 1), "float32")
    dense[1] = 12.0
    gradient = tf.IndexedSlices(tf.constant([[12.0]]), tf.constant([1]), tf.constant([3, 1]))
    for optimizer in (Lookahead(legacy.SGD(0.5), 10, **{name: limit}), Lookahead(legacy.SGD(0.5, **{name: limit}), 10)):
        variable = tf.Variable(np.ones((3, 1), "float32"))
        optimizer.apply_gradients([(gradient, variable)])
        np.testing.assert_allclose(variable, 1 - 0.5 * by(limit)([dense])[0], rtol=1e-6)


@pytest.mark.parametrize("inner", [lambda: legacy.SGD(0.5), lambda: Lookahead(legacy.SGD(0.5), 10), lambda: "sgd"])
@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_a_learning_rate_is_set_on_the_inner_optimizer(name, inner):
    optimizer = Lookahead(inner(), 10, **{name: 0.125})
    assert float(optimizer.inner_optimizer.learning_rate) == 0.125
    for variable, start, gradient in zip(train(optimizer, 1), START, GRADIENTS):
        np.testing.assert_array_equal(variable, start - 0.125 * gradient)


def test_a_learning_rate_may_be_a_number_of_numpy():
    for optimizer in (
        Lookahead("sgd", learning_rate=np.float32(0.25)),
        Lookahead(legacy.SGD(np.float32(0.25)), learning_rate=0.5),
    ):
        optimizer.lr = 0.125
        for variable, start, gradient in zip(train(optimizer, 1), START, GRADIENTS):
            np.testing.assert_array_equal(variable, start - 0.125 * gradient)


@pytest.mark.parametrize("settings", [{"decay": 0.5}, {"learning_rate": ExponentialDecay(0.5, 1, 0.5)}])
def test_nadam_keeps_its_own_schedule(settings):
    with pytest.raises(ValueError, match=r"`Nadam` has a schedule of its own.*Received: learning_rate="):
        Lookahead("nadam", **settings)


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_a_learning_rate_may_be_a_schedule_or_a_callable(name):
    schedule = ExponentialDecay(0.5, 1, 0.5)
    assert Lookahead("sgd", **{name: schedule}).learning_rate is schedule
    optimizer = Lookahead("sgd", 10, **{name: lambda: 0.25})
    for variable, start, gradient in zip(train(optimizer, 1), START, GRADIENTS):
        np.testing.assert_array_equal(variable, start - 0.25 * gradient)


@pytest.mark.parametrize("depth", [1, 2])
def test_decay_lowers_the_learning_rate_by_inverse_time(depth):
    optimizer = legacy.SGD(0.5)
    for _ in range(depth - 1):
        optimizer = Lookahead(optimizer, 10)
    optimizer = Lookahead(optimizer, 10, decay=0.5)
    rate = sum(0.5 / (1 + 0.5 * t) * (1 + 0.125 * t) for t in range(4))
    for variable, start, gradient in zip(train(optimizer, 4), START, GRADIENTS):
        np.testing.assert_allclose(variable, start - rate * gradient, rtol=1e-6)


def test_decay_and_learning_rate_are_in_the_config_of_the_inner_optimizer():
    config = Lookahead("adam", learning_rate=0.25, decay=0.5).get_config()
    assert (config["optimizer"]["config"]["learning_rate"], config["optimizer"]["config"]["decay"]) == (0.25, 0.5)
    assert_equal(train(Lookahead.from_config(config)), train(Lookahead(legacy.Adam(0.25, decay=0.5), sync_period=6)))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sync_period": 2.5}, TypeError, r"`sync_period` must be an integer.*Received: sync_period=2.5 of type float"),
        ({"sync_period": True}, TypeError, r"Received: sync_period=True of type bool"),
        ({"sync_period": "6"}, TypeError, r"Received: sync_period='6' of type str"),
        ({"sync_period": None}, TypeError, r"Received: sync_period=None of type NoneType"),
        ({"sync_period": -1}, ValueError, r"`sync_period` must be 0 .* or a positive.*Received: sync_period=-1"),
        ({"slow_step_size": "0.5"}, TypeError, r"`slow_step_size` must be a real .*Received: slow_step_size='0.5'"),
        ({"slow_step_size": True}, TypeError, r"Received: slow_step_size=True of type bool"),
        ({"slow_step_size": None}, TypeError, r"Received: slow_step_size=None of type NoneType"),
        ({"slow_step_size": -3}, ValueError, r"`slow_step_size` must be finite and >= 0.*slow_step_size=-3"),
        ({"slow_step_size": NAN}, ValueError, r"Received: slow_step_size=nan"),
        ({"slow_step_size": INF}, ValueError, r"Received: slow_step_size=inf"),
        ({"momentum": 0.9}, TypeError, r"momentum.*[Aa]llowed"),
        ({"lr": 0.1, "learning_rate": 0.1}, ValueError, r"`lr` is another name of `learning_rate`: give one.*lr=0.1"),
        ({"learning_rate": "fast"}, TypeError, r"`learning_rate` must be.*Received: learning_rate='fast'"),
        ({"learning_rate": True}, TypeError, r"`learning_rate` must be.*Received: learning_rate=True"),
        ({"learning_rate": [1, 2]}, TypeError, r"`learning_rate` must be.*Received: learning_rate=\[1, 2\]"),
        ({"lr": "fast"}, TypeError, r"`lr` must be.*Received: lr='fast'"),
        ({"lr": -1.0}, ValueError, r"`lr` must be.*Received: lr=-1.0"),
        ({"learning_rate": NAN}, ValueError, r"`learning_rate` must be.*Received: learning_rate=nan"),
        ({"decay": -1.0}, ValueError, r"`decay` must be a finite number >= 0. Received: decay=-1.0"),
        ({"decay": "much"}, (TypeError, ValueError), r"`decay` must be a finite .*Received: decay='much'"),
        ({"decay": True}, (TypeError, ValueError), r"`decay` must be a finite .*Received: decay=True"),
        ({"decay": INF}, ValueError, r"Received: decay=inf"),
        ({"learning_rate": 0.5, "decay": -1.0}, ValueError, r"`decay` must be .*Received: decay=-1.0"),
        ({"learning_rate": 0.5, "slow_step_size": -1.0}, ValueError, r"`slow_step_size` must be"),
        ({"learning_rate": 0.5, "clipnorm": -1.0}, ValueError, r"clipnorm.*>= 0.*-1.0"),
        ({"clipvalue": -1.0}, ValueError, r"clipvalue.*>= 0.*[Rr]eceived.*-1.0"),
        ({"global_clipnorm": -1.0}, ValueError, r"global_clipnorm.*>= 0.*[Rr]eceived.*-1.0"),
        ({"clipnorm": "big"}, (TypeError, ValueError), r"clipnorm.*[Rr]eceived.*big"),
        ({"clipnorm": NAN}, ValueError, r"clipnorm.*[Rr]eceived.*nan"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, ValueError, r"both `clipnorm` and `global_clipnorm`"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_and_the_inner_optimizer_left_as_it_was(arguments, error, message):
    inner = legacy.SGD(0.125)
    config = inner.get_config()
    with pytest.raises(error, match=message):
        Lookahead(inner, **arguments)
    assert inner.get_config() == config


def test_numpy_scalars_are_numbers_and_the_defaults_those_of_the_original():
    optimizer = Lookahead("sgd", np.int64(5), np.float32(0.5))
    assert (optimizer.sync_period, optimizer.slow_step_size) == (5, 0.5)
    assert type(optimizer.get_config()["sync_period"]) is int
    assert type(optimizer.get_config()["slow_step_size"]) is float
    config = Lookahead("sgd").get_config()
    assert (config["sync_period"], config["slow_step_size"], config["name"]) == (6, 0.5, "Lookahead")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"k": 5}, "`sync_period` for `k`"),
        ({"alpha": 0.5}, "`slow_step_size` for `alpha`"),
        ({"la_steps": 5, "la_alpha": 0.5}, "`sync_period` for `la_steps` and `slow_step_size` for `la_alpha`"),
        ({"slow_step": 0.5}, "`slow_step_size` for `slow_step`"),
    ],
)
def test_names_of_other_implementations_are_explained(arguments, names):
    received = ", ".join(f"{name}={value}" for name, value in arguments.items())
    with pytest.raises(TypeError, match=rf"^Write {names}: the arguments .*Received: {received}$"):
        Lookahead("sgd", **arguments)


@pytest.mark.parametrize("name", ["base_optimizer", "inner_optimizer", "fast_optimizer", "inner"])
def test_so_are_names_of_the_inner_optimizer(name):
    with pytest.raises(TypeError, match=rf"^Write `optimizer` for `{name}`: .*Received: {name}='sgd'$"):
        Lookahead(**{name: "sgd"})


def test_a_step_size_above_1_warns_at_the_line_that_sets_it_and_nowhere_else():
    message = r"`slow_step_size` above 1 .*below 2 / \(1 - r\).*slow_step_size="
    with pytest.warns(UserWarning, match=f"{message}1.5") as warned:
        optimizer = Lookahead("sgd", 2, 1.5)
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer)
        optimizer.sync()
        Lookahead.from_config(optimizer.get_config())
        copy.deepcopy(optimizer)
        optimizer.slow_step_size = 1.0
        Lookahead("sgd", 2, tf.Variable(1.5))
    with pytest.warns(UserWarning, match=f"{message}3.0") as warned:
        optimizer.slow_step_size = 3
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}


def test_repr_has_the_settings_and_the_inner_optimizer():
    optimizer = Lookahead(legacy.Adam(name="mine"), 5, 0.3)
    assert repr(optimizer) == "Lookahead(<Adam 'mine'>, sync_period=5, slow_step_size=0.3)"
    train(optimizer, 1)
    assert repr(Lookahead(optimizer, 2)) == f"Lookahead({optimizer!r}, sync_period=2, slow_step_size=0.5)"


NEWER = keras.optimizers


@pytest.mark.parametrize(
    "inner",
    [
        lambda: legacy.Adam(0.01),
        lambda: "Adam",
        lambda: {"class_name": "Adam", "config": {"learning_rate": 0.01}},
        lambda: keras.optimizers.serialize(legacy.Adam(0.01)),
        lambda: NEWER.Adam(0.01),
        lambda: keras.optimizers.serialize(NEWER.Adam(0.01)),
    ],
    ids=["legacy", "name", "config", "serialized", "newer", "newer serialized"],
)
def test_every_kind_of_inner_optimizer_trains_as_the_legacy_one(inner):
    inner = inner()
    before = copy.deepcopy(inner) if isinstance(inner, dict) else None
    optimizer = Lookahead(inner, 3, learning_rate=0.01)
    assert isinstance(optimizer.inner_optimizer, legacy.Adam)
    assert before is None or inner == before
    expected = Lookahead(legacy.Adam(0.01), 3)
    assert_equal(train(optimizer), train(expected))
    assert_equal(optimizer.get_weights(), expected.get_weights())


@pytest.mark.parametrize(
    ("newer", "expected"),
    [
        (lambda: NEWER.SGD(0.1, momentum=0.9, nesterov=True), lambda: legacy.SGD(0.1, momentum=0.9, nesterov=True)),
        (lambda: NEWER.Adam(0.1, beta_1=0.8, epsilon=1e-3), lambda: legacy.Adam(0.1, beta_1=0.8, epsilon=1e-3)),
        (lambda: NEWER.SGD(0.1, clipnorm=0.5), lambda: legacy.SGD(0.1, clipnorm=0.5)),
        (lambda: NEWER.SGD(0.1, global_clipnorm=0.5), lambda: legacy.SGD(0.1, global_clipnorm=0.5)),
        (lambda: NEWER.RMSprop(0.1, centered=True), lambda: legacy.RMSprop(0.1, centered=True)),
        (lambda: NEWER.SGD(ExponentialDecay(0.1, 2, 0.5)), lambda: legacy.SGD(ExponentialDecay(0.1, 2, 0.5))),
        (lambda: NEWER.Adagrad(0.1), lambda: legacy.Adagrad(0.1)),
        (lambda: NEWER.Adadelta(0.1), lambda: legacy.Adadelta(0.1)),
        (lambda: NEWER.Adamax(0.1), lambda: legacy.Adamax(0.1)),
        (lambda: NEWER.Ftrl(0.1), lambda: legacy.Ftrl(0.1)),
    ],
)
def test_a_newer_optimizer_is_converted_with_its_settings(newer, expected):
    optimizer, expected = Lookahead(newer(), 3), Lookahead(expected(), 3)
    assert type(optimizer.inner_optimizer) is type(expected.inner_optimizer)
    assert_equal(train(optimizer), train(expected))
    assert_equal(optimizer.get_weights(), expected.get_weights())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: NEWER.AdamW(use_ema=True), "use_ema"),
        (lambda: NEWER.Adam(weight_decay=0.1), "weight_decay.* Weight decay is kept by `keras.optimizers.AdamW`"),
        (lambda: NEWER.SGD(use_ema=True), "use_ema"),
        (lambda: NEWER.Adafactor(), "there is none"),
    ],
)
def test_a_newer_optimizer_without_legacy_form_is_refused(make, reason):
    with pytest.raises(ValueError, match=rf"`optimizer` must have a form in `keras.optimizers.legacy`.*{reason}"):
        Lookahead(make())


@pytest.mark.skipif(
    tf.__version__ < "2.16" or importlib.util.find_spec("keras") is None, reason="Keras 3 is not installed"
)
def test_an_optimizer_of_keras_3_is_refused_and_the_message_names_the_front_end_for_it():
    import keras as keras_3

    with pytest.raises(TypeError, match=r"Keras 3 use `lookahead_optim.keras.Lookahead`.*Received: optimizer=<keras"):
        Lookahead(keras_3.optimizers.SGD())


@pytest.mark.parametrize("inner", [legacy.SGD, keras.optimizers.SGD])
def test_a_loss_scale_optimizer_inside_is_refused(inner):
    scaled = keras.mixed_precision.LossScaleOptimizer(inner())
    with pytest.raises(ValueError, match=r"cannot be inside `Lookahead`.*LossScaleOptimizer\(Lookahead\(inner\)\)"):
        Lookahead(scaled)


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (None, TypeError, r"`optimizer` must be an instance of `keras.optimizers.legacy.Optimizer`.*optimizer=None"),
        (0.1, TypeError, r"Received: optimizer=0.1 of type float"),
        (legacy.SGD, TypeError, r"must be an instance of `keras.optimizers.legacy.Optimizer`.*of type type"),
        (keras.optimizers, TypeError, r"must be an instance of `keras.optimizers.legacy.Optimizer`.*of type module"),
        ("sdg", ValueError, r"`optimizer` must be a Keras 2 optimizer, or a name or config.*optimizer='sdg'"),
        ("adamw", ValueError, r"a name or config of a legacy one.*Received: optimizer='adamw'"),
        ({"class_name": "nonsense", "config": {}}, ValueError, r"a name or config .*nonsense"),
        ({}, ValueError, r"a name or config .*Received: optimizer=\{\}"),
    ],
    ids=str,
)
def test_any_other_object_is_refused(optimizer, error, message):
    with pytest.raises(error, match=message):
        Lookahead(optimizer)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("inner", [lambda: legacy.SGD(0.1, momentum=0.9), lambda: legacy.Adam(0.1)])
def test_period_zero_is_the_bare_optimizer_without_slow_weights(inner, traced):
    optimizer, bare = Lookahead(inner(), 0), inner()
    assert_equal(train(optimizer, traced=traced), train(bare, traced=traced))
    assert_equal(optimizer.get_weights(), bare.get_weights())
    assert optimizer.get_slot_names() == []


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("inner", [lambda: legacy.SGD(0.1, momentum=0.9), lambda: legacy.Adam(0.1)])
def test_slow_step_size_one_is_the_bare_optimizer(inner, traced):
    optimizer, bare = Lookahead(inner(), 3, 1), inner()
    variables = train(optimizer, 6, traced=traced)
    assert_equal(variables, train(bare, 6, traced=traced))
    assert_equal([optimizer.get_slot(one, "slow") for one in variables], variables)


@pytest.mark.parametrize("traced", [False, True])
def test_slow_step_size_zero_goes_back_to_the_start_at_every_sync(traced):
    assert_equal(train(Lookahead(legacy.SGD(0.1), 3, 0), 6, traced=traced), START)


@pytest.mark.parametrize("traced", [False, True])
def test_slow_step_size_may_be_a_variable_that_changes_meanwhile(traced):
    slow_step_size, variable = tf.Variable(0.5), tf.Variable(1.0)
    optimizer = Lookahead(legacy.SGD(0.125), 2, slow_step_size)

    def step():
        optimizer.apply_gradients([(tf.constant(1.0), variable)])

    step = tf.function(step) if traced else step
    step()
    step()
    assert variable.numpy() == 1 - 0.5 * 0.25
    slow_step_size.assign(0.25)
    step()
    step()
    assert variable.numpy() == 0.875 - 0.25 * 0.25
    assert float(optimizer.get_config()["slow_step_size"]) == 0.25
    optimizer.slow_step_size = 0.75
    assert slow_step_size.numpy() == 0.75
