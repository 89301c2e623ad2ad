"""`AdamW`: the paper's algorithm, and cases in which the original fails."""

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import AdamW, Lookahead, RectifiedAdam
from lookahead_optim.tf_keras._keras import keras
from tests.comparison import assert_same_bits
from tests.reference_adam import adamw

ExponentialDecay = keras.optimizers.schedules.ExponentialDecay
RNG = np.random.default_rng(6)
START, GRADIENTS = RNG.normal(size=6), RNG.normal(size=(20, 6))


def variables():
    return [tf.Variable(START.astype("float32"), name=name) for name in ("kernel", "bias")]


def train(optimizer, pairs=None, gradients=GRADIENTS, **kwargs):
    pairs = pairs or variables()
    for gradient in gradients.astype("float32"):
        optimizer.apply_gradients([(tf.constant(gradient), one) for one in pairs], **kwargs)
    return [one.numpy() for one in pairs]


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Lookahead(inner, 0)], ids=["bare", "wrapped"])
def test_it_is_the_papers_algorithm(wrap):
    expected = adamw(START, GRADIENTS, 0.02, 0.05)[-1]
    for actual in train(wrap(AdamW(0.02, 0.05))):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


WRAPPINGS = pytest.mark.parametrize(
    "wrap", [lambda inner: inner, lambda inner: Lookahead(inner, 50)], ids=["bare", "wrapped"]
)


@WRAPPINGS
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_excluded_and_listed_variables(wrap, graph):
    """The original's Lookahead decays excluded variables, and its `minimize` forgets the listed variables."""
    decayed, kept = adamw(START, GRADIENTS, 0.02, 0.05)[-1], adamw(START, GRADIENTS, 0.0, 0.05)[-1]

    def step_of(optimizer, kernel, bias, way, listed):
        def step(gradient):
            if way == "minimize":
                loss = lambda: tf.reduce_sum(gradient * (kernel + bias))  # noqa: E731
                optimizer.minimize(loss, [kernel, bias], decay_var_list=listed)
            else:
                optimizer.apply_gradients([(gradient, kernel), (gradient, bias)], decay_var_list=listed)

        return tf.function(step) if graph else step

    for way in ("minimize", "apply_gradients"):
        for excluded, list_bias, expected in [
            (None, False, (decayed, decayed)),
            (["^bias", "x"], False, (decayed, kept)),
            (["^bias"], True, (kept, decayed)),
        ]:
            kernel, bias = variables()
            optimizer = wrap(AdamW(0.02, 0.05, exclude_from_weight_decay=excluded))
            step = step_of(optimizer, kernel, bias, way, [bias] if list_bias else None)
            for gradient in GRADIENTS.astype("float32"):
                step(tf.constant(gradient))
            for actual, one in zip((kernel, bias), expected):
                np.testing.assert_allclose(actual, one, rtol=1e-5, atol=1e-6)


def test_a_list_holds_for_one_step_and_may_have_variables_without_gradient():
    optimizer, (kernel, bias) = AdamW(0.5, 0.0), variables()
    gradient = tf.zeros(6)
    optimizer.apply_gradients([(gradient, kernel), (None, bias)], decay_var_list=[kernel, bias])
    assert_same_bits([kernel, bias], [START.astype("float32") * 0.5, START.astype("float32")])
    optimizer.apply_gradients([(gradient, kernel), (gradient, bias)])
    assert_same_bits([kernel, bias], [START.astype("float32") * 0.25, START.astype("float32") * 0.5])


@pytest.mark.parametrize("rate", [0.05, ExponentialDecay(0.05, 4, 0.5)], ids=["constant", "schedule"])
@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "clipvalue": 0.5}], ids=str)
@pytest.mark.parametrize("excluded", [[], ["bias"]], ids=str)
def test_keras_newer_adamw_is_converted_with_the_same_numbers(rate, settings, excluded):
    newer = keras.optimizers.AdamW(rate, weight_decay=0.3, jit_compile=False, **settings)
    newer.exclude_from_weight_decay(var_names=excluded)
    optimizer = Lookahead(newer, 0)
    assert type(optimizer.inner_optimizer) is AdamW
    optimizer = Lookahead.from_config(optimizer.get_config())
    pairs, others = variables(), variables()
    newer.build(others)
    for _ in range(2):
        train(optimizer, pairs)
        train(newer, others)
        for one, other in zip(pairs, others):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        if rate == 0.05:
            # The weight decay follows the learning rate.
            optimizer.learning_rate = newer.learning_rate = 0.01


def test_variables_that_the_newer_adamw_excludes_cannot_be_converted():
    newer = keras.optimizers.AdamW()
    newer.exclude_from_weight_decay(var_list=variables())
    with pytest.raises(ValueError, match="`optimizer` must name what it excludes from weight decay"):
        Lookahead(newer)


def test_patterns_may_come_from_a_generator():
    excluded = AdamW(0.1, exclude_from_weight_decay=(name for name in ["bias"]))
    assert excluded.get_config()["exclude_from_weight_decay"] == ["bias"]


@pytest.mark.parametrize("listed", [["kernel"], "kernel", [None]], ids=str)
def test_a_list_of_something_else_than_variables_is_refused_and_changes_nothing(listed):
    optimizer, (kernel, bias) = AdamW(0.5, 0.1), variables()
    pairs = [(tf.ones(6), kernel), (tf.ones(6), bias)]
    optimizer.apply_gradients(pairs, decay_var_list=[bias])
    before = [*optimizer.get_weights(), kernel.numpy(), bias.numpy()]
    with pytest.raises(TypeError, match="`decay_var_list` must be a list of variables"):
        optimizer.apply_gradients(pairs, decay_var_list=listed)
    assert_same_bits([*optimizer.get_weights(), kernel.numpy(), bias.numpy()], before)


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, first):
        self.first = first

    def __call__(self, step):
        return self.first * 0.5 ** tf.cast(step, "float32")

    def get_config(self):
        return {"first": self.first}


@pytest.mark.parametrize(
    "make", [lambda: AdamW(Halving(0.3), Halving(0.1)), lambda: RectifiedAdam(0.1, weight_decay=Halving(0.3))]
)
def test_a_schedule_of_ones_own_is_found_among_custom_objects(make):
    optimizer = make()
    config = optimizer.get_config()
    again = type(optimizer).from_config(config, custom_objects={"Halving": Halving})
    assert config == optimizer.get_config()
    assert_same_bits(train(again), train(optimizer))


@pytest.mark.parametrize("inner", [AdamW(0.1), RectifiedAdam()], ids=["AdamW", "RectifiedAdam"])
def test_a_users_own_class_of_that_name_comes_first(inner):
    class Own(keras.optimizers.legacy.SGD):
        pass

    name = type(inner).__name__
    config = Lookahead(inner).get_config() | {"optimizer": {"class_name": name, "config": {"momentum": 0.5}}}
    assert type(Lookahead.from_config(config, {name: Own}).inner_optimizer) is Own
    with keras.utils.custom_object_scope({name: Own}):
        assert type(Lookahead.from_config(config).inner_optimizer) is Own


def test_a_row_without_gradient_does_not_decay():
    variable, optimizer = tf.Variable(np.ones((3, 2), "float32")), AdamW(0.5, 0.0)
    optimizer.apply_gradients([(tf.IndexedSlices(tf.ones((2, 2)), tf.constant([2, 2]), tf.constant([3, 2])), variable)])
    assert_same_bits(variable, np.array([[1, 1], [1, 1], [0.5, 0.5]], "float32"))


BAD = [
    ({"weight_decay": -0.1}, ValueError, r"`weight_decay` must be a finite number >= 0. Received: weight_decay=-0.1"),
    ({"weight_decay": None}, TypeError, r"`weight_decay` must be a finite number >= 0. Received: weight_decay=None"),
    ({"learning_rate": "fast"}, TypeError, r"`learning_rate` must be a finite number >= 0"),
    ({"beta_2": 1.0}, ValueError, r"`beta_2` must be a finite number >= 0 and < 1"),
    ({"epsilon": "small"}, TypeError, r"`epsilon` must be a finite number >= 0"),
    ({"amsgrad": 1}, TypeError, r"`amsgrad` must be `True` or `False`"),
    ({"exclude_from_weight_decay": "bias"}, TypeError, r"`exclude_from_weight_decay` must be a list.*'bias'"),
    ({"exclude_from_weight_decay": [1]}, TypeError, r"`exclude_from_weight_decay` must be a list of regular expr"),
    ({"exclude_from_weight_decay": 5}, TypeError, r"`exclude_from_weight_decay` must be a list.* Received.*=5"),
    (
        {"exclude_from_weight_decay": ["bias", "["]},
        ValueError,
        r"in the form of Python's `re`.* where '\[' has an error",
    ),
    ({"scale_by_learning_rate": 0.1}, TypeError, r"`scale_by_learning_rate` must be `True` or `False`"),
    ({"clipvalue": -1.0}, ValueError, r"`clipvalue` must be a finite number >= 0"),
    ({"momentum": 0.9}, TypeError, r"momentum"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=[str(settings) for settings, *_ in BAD])
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        AdamW(**{"weight_decay": 0.1, **settings})


def test_only_the_learning_rate_and_the_weight_decay_may_be_schedules():
    with pytest.raises(TypeError, match=r"`beta_1` must be a finite number .*ExponentialDecay"):
        AdamW(0.1, beta_1=ExponentialDecay(0.9, 4, 0.5))
