"""Arguments of the constructor and of the members: which are accepted, which are refused, and with which message."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, mlp, values


def built(**kwargs):
    model = mlp()
    optimizer = Lookahead(keras.optimizers.SGD(0.1, momentum=0.9), **kwargs)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def ones_like(variables):
    return [keras.ops.ones(variable.shape, variable.dtype) for variable in variables]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sync_period": 2.5}, TypeError, r"`sync_period` must be an integer.*Received: sync_period=2.5 of type float"),
        ({"sync_period": 6.0}, TypeError, r"`sync_period` must be an integer.*Received: sync_period=6.0 of type float"),
        ({"sync_period": True}, TypeError, r"Received: sync_period=True of type bool"),
        ({"sync_period": "6"}, TypeError, r"Received: sync_period='6' of type str"),
        ({"sync_period": None}, TypeError, r"Received: sync_period=None of type NoneType"),
        ({"sync_period": -1}, ValueError, r"`sync_period` must be 0 .* or a positive.*Received: sync_period=-1"),
        (
            {"slow_step_size": "0.5"},
            TypeError,
            r"`slow_step_size` must be a real .*Received: slow_step_size='0.5'",
        ),
        ({"slow_step_size": True}, TypeError, r"Received: slow_step_size=True of type bool"),
        ({"slow_step_size": 1j}, TypeError, r"Received: slow_step_size=1j of type complex"),
        ({"slow_step_size": -3}, ValueError, r"`slow_step_size` must be finite and >= 0.*Received: slow_step_size=-3"),
        ({"slow_step_size": float("nan")}, ValueError, r"Received: slow_step_size=nan"),
        ({"slow_step_size": float("inf")}, ValueError, r"Received: slow_step_size=inf"),
        *(
            ({"slow_momentum": value}, ValueError, rf"`slow_momentum` must be >= 0 and < 1.*slow_momentum={value}$")
            for value in (-0.1, 1, 1.5, float("nan"), float("inf"))
        ),
        *(
            ({"slow_momentum": value}, TypeError, r"`slow_momentum` must be a real number.*Received: slow_momentum=")
            for value in ("x", True, None, 1j)
        ),
        *(
            ({"slow_nesterov": value}, TypeError, r"`slow_nesterov` must be True .*or False.*Received: slow_nesterov=")
            for value in (1, 0, None, "True")
        ),
        *(
            ({"slow_dtype": value}, TypeError, r"`slow_dtype` must be a dtype of real numbers.*Received: slow_dtype=")
            for value in ("int32", "x", 3, bool, "complex64", "bool")
        ),
        ({"momentum": 0.9}, ValueError, r"does not know the keyword argument\(s\) \['momentum'\]"),
        ({"learning_rate": 0.2}, ValueError, r"`learning_rate=0.2` contradicts the learning rate 0.1.* of the inner"),
        ({"lr": 0.2}, ValueError, r"`lr=0.2` contradicts the learning rate 0.1.* of the inner optimizer 'sgd'"),
        ({"lr": 0.1, "learning_rate": 0.1}, ValueError, r"`lr` is another name of `learning_rate`: give one"),
        (
            {"learning_rate": "fast"},
            TypeError,
            r"`learning_rate` must be a finite .*Received: learning_rate='fast'",
        ),
        ({"decay": -1.0}, ValueError, r"`decay` must be a finite number >= 0. Received: decay=-1.0"),
        ({"decay": "much"}, ValueError, r"`decay` must be a finite number >= 0. Received: decay='much'"),
        ({"clipnorm": 2.0}, ValueError, r"The clipping \{'clipnorm': 2.0\} contradicts another one.*'clipvalue': 1.0"),
        ({"clipvalue": 2.0}, ValueError, r"The clipping \{'clipvalue': 2.0\} contradicts another one"),
        (
            {"clipvalue": 1.0, "clipnorm": 1.0},
            ValueError,
            r"only one of \['clipnorm', 'clipvalue', 'global_clipnorm'\]",
        ),
        ({"global_clipnorm": -1.0}, ValueError, r"`global_clipnorm` must be a finite number >= 0. Received"),
        ({"clipnorm": "big"}, ValueError, r"`clipnorm` must be a finite number >= 0. Received: clipnorm='big'"),
    ],
)
def test_bad_argument_is_refused_and_the_inner_optimizer_left_as_it_was(arguments, error, message):
    inner = keras.optimizers.SGD(0.1, clipvalue=1.0, name="sgd")
    config = inner.get_config()
    with pytest.raises(error, match=message):
        Lookahead(inner, **arguments)
    assert inner.get_config() == config


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (None, TypeError, r"`optimizer` must be an instance of `keras.optimizers.Optimizer`.*Received: optimizer=None"),
        (0.1, TypeError, r"Received: optimizer=0.1 of type <class 'float'>"),
        (keras.optimizers.SGD, TypeError, r"must be an instance of `keras.optimizers.Optimizer`"),
        ("sdg", ValueError, r"`optimizer` must be a Keras 3 optimizer, or a name or config.*Received: optimizer='sdg'"),
        ({"class_name": "nonsense", "config": {}}, ValueError, r"a name or config that `keras.optimizers.get` takes"),
        ({}, ValueError, r"a name or config that `keras.optimizers.get` takes.*Received: optimizer=\{\}"),
    ],
)
def test_bad_optimizer_is_refused(optimizer, error, message):
    with pytest.raises(error, match=message):
        Lookahead(optimizer)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras 2 is TensorFlow's")
@pytest.mark.parametrize(
    "make",
    [
        lambda keras_2: keras_2.optimizers.legacy.SGD(),
        lambda keras_2: keras_2.optimizers.Adam(),
        lambda keras_2: keras_2.optimizers.Adam,
        lambda keras_2: type("Mine", (keras_2.optimizers.legacy.SGD,), {})(),
    ],
    ids=["legacy", "newer", "class", "own class"],
)
def test_an_optimizer_of_keras_2_is_refused_and_the_message_names_the_front_end_for_it(make):
    keras_2 = pytest.importorskip("tf_keras")
    with pytest.raises(TypeError, match=r"For one of Keras 2 use `lookahead_optim.tf_keras.Lookahead`. Received: opt"):
        Lookahead(make(keras_2))


def test_loss_scale_optimizer_inside_is_refused():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    with pytest.raises(ValueError, match=r"cannot be inside `Lookahead`.*LossScaleOptimizer\(Lookahead\(inner\)\)"):
        Lookahead(scaled)


def test_numpy_scalars_are_numbers():
    optimizer = Lookahead("sgd", sync_period=np.int64(5), slow_step_size=np.float32(0.5))
    assert optimizer.get_config()["sync_period"] == 5
    assert type(optimizer.sync_period) is int
    assert type(optimizer.slow_step_size) is float


def test_defaults_are_those_of_tensorflow_addons():
    optimizer = Lookahead("sgd")
    assert (optimizer.sync_period, optimizer.slow_step_size, optimizer.name) == (6, 0.5, "Lookahead")


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_learning_rate_keyword_configures_an_optimizer_given_by_name(name):
    optimizer = Lookahead("adam", **{name: 0.25})
    assert float(keras.ops.convert_to_numpy(optimizer.inner_optimizer.learning_rate)) == 0.25


def test_learning_rate_keyword_may_repeat_the_inner_optimizers():
    Lookahead(keras.optimizers.SGD(0.1), learning_rate=0.1)


def test_learning_rate_keyword_may_be_a_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    assert Lookahead("sgd", learning_rate=schedule).inner_optimizer.get_config()["learning_rate"]["config"] == (
        schedule.get_config()
    )


def test_learning_rate_is_read_and_set_through_any_depth():
    inner = keras.optimizers.SGD(0.1)
    outer = Lookahead(Lookahead(inner))
    outer.learning_rate = 0.5
    assert float(keras.ops.convert_to_numpy(inner.learning_rate)) == 0.5
    outer.lr = 0.25
    assert float(keras.ops.convert_to_numpy(inner.learning_rate)) == 0.25
    assert float(keras.ops.convert_to_numpy(outer.lr)) == 0.25
    assert float(keras.ops.convert_to_numpy(outer.learning_rate)) == 0.25


def test_decay_lowers_the_learning_rate_by_inverse_time():
    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=100, decay=0.5)
    expected = 0.0
    for t in range(4):
        optimizer.apply([keras.ops.ones((1,))], [variable])
        expected -= 0.1 / (1 + 0.5 * t)
        assert values([variable])[0][0] == pytest.approx(expected, rel=1e-6)


def test_decay_contradicts_a_schedule():
    inner = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5))
    with pytest.raises(ValueError, match=r"`decay=0.5` contradicts the learning rate of the inner optimizer"):
        Lookahead(inner, decay=0.5)


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_keyword_clips_as_the_inner_optimizers_own(name):
    results = []
    for make in (
        lambda: Lookahead(keras.optimizers.SGD(1.0), **{name: 0.5}),
        lambda: Lookahead(keras.optimizers.SGD(1.0, **{name: 0.5})),
    ):
        variables = [keras.Variable(np.zeros(3, "float32")), keras.Variable(np.zeros(2, "float32"))]
        make().apply([keras.ops.ones((3,)), keras.ops.ones((2,)) * 3], variables)
        results.append(values(variables))
    assert_same_bits(*results)
    assert np.abs(results[0][1]).max() < 1


def test_clipping_by_zero_is_no_clipping_as_in_keras():
    optimizer = Lookahead("sgd", clipnorm=0.0, learning_rate=1.0)
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer.apply([keras.ops.convert_to_tensor([3.0, 4.0])], [variable])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value), [-2.0, -3.0])


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras has no MultiOptimizer")
def test_settings_for_a_multi_optimizer_are_refused():
    multi = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match=r"\['clipnorm'\] cannot configure a `MultiOptimizer`"):
        Lookahead(multi, clipnorm=1.0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda optimizer: optimizer.set_weights([]), r"set_weights\(weights\)"),
        (lambda optimizer: optimizer.apply([keras.ops.ones((1,))]), r"apply\(grads\)"),
        (lambda optimizer: optimizer.get_slot(keras.Variable([1.0]), "slow"), r"get_slot\(var, slot_name\)"),
    ],
)
def test_unbuilt_use_says_what_to_do(call, name):
    with pytest.raises(ValueError, match=rf"`{name}` needs an optimizer that is built. .*optimizer\.build\("):
        call(Lookahead("sgd"))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras has no stateless_apply on TensorFlow")
def test_unbuilt_stateless_apply_says_what_to_do():
    with pytest.raises(ValueError, match=r"Lookahead must be built"):
        Lookahead("sgd").stateless_apply([], [], [])


def test_foreign_variable_is_refused_and_nothing_changed():
    model, optimizer = built()
    foreign = keras.Variable(np.ones(2, "float32"))
    before = values(model.trainable_variables), optimizer.get_weights()
    gradients = ones_like(model.trainable_variables)
    with pytest.raises(ValueError, match=r"Unknown variable"):
        optimizer.apply([*gradients[:-1], keras.ops.ones((2,))], [*model.trainable_variables[:-1], foreign])
    with pytest.raises(ValueError, match=r"Unknown variable"):
        optimizer.apply([*gradients, keras.ops.ones((2,))], [*model.trainable_variables, foreign])
    with pytest.raises(ValueError, match=r"Unknown variable"):
        optimizer.get_slot(foreign, "slow")
    assert_same_bits(values(model.trainable_variables), before[0])
    assert_same_bits(optimizer.get_weights(), before[1])


def test_inner_optimizer_built_for_other_variables_is_refused():
    inner = keras.optimizers.SGD()
    inner.build([keras.Variable(np.ones(2, "float32"))])
    optimizer = Lookahead(inner)
    with pytest.raises(ValueError, match=r"was already built, for 1 variables that are not the 4 given"):
        optimizer.build(mlp().trainable_variables)
    assert not optimizer.built


def test_gradients_and_variables_of_different_number_are_refused():
    model, optimizer = built()
    with pytest.raises(ValueError, match=r"must have the same length. Received: 3 gradients and 4 variables"):
        optimizer.apply(ones_like(model.trainable_variables)[:3], model.trainable_variables)
    with pytest.raises(ValueError, match=r"at least one pair \(gradient, variable\)"):
        optimizer.apply_gradients([])


def test_no_gradient_at_all_is_refused_and_not_counted():
    model, optimizer = built()
    with pytest.raises(ValueError, match=r"No gradients provided for any variable"):
        optimizer.apply([None] * 4, model.trainable_variables)
    assert int(optimizer.iterations) == 0


def test_no_variables_change_nothing():
    _, optimizer = built()
    optimizer.apply([])
    assert int(optimizer.iterations) == 0


def test_apply_without_variables_takes_those_of_build():
    model, optimizer = built(sync_period=1, slow_step_size=0.5)
    before = values(model.trainable_variables)
    optimizer.apply(ones_like(model.trainable_variables))
    for new, old in zip(values(model.trainable_variables), before):
        np.testing.assert_allclose(new, old - 0.05, atol=1e-7)


def test_apply_gradients_takes_pairs_and_a_name_and_returns_the_iterations():
    model, optimizer = built()
    pairs = zip(ones_like(model.trainable_variables), model.trainable_variables)
    assert int(optimizer.apply_gradients(pairs, name="ignored")) == 1


def test_get_slot_is_the_slow_variable():
    model, optimizer = built()
    optimizer.apply(ones_like(model.trainable_variables), model.trainable_variables)
    assert optimizer.get_slot_names() == ["slow"]
    for variable, slow in zip(model.trainable_variables, optimizer.slow_variables):
        assert optimizer.get_slot(variable, "slow") is slow
        assert (slow.shape, slow.dtype) == (variable.shape, variable.dtype)
    with pytest.raises(ValueError, match=r"`slot_name` must be one of \['slow'\]. Received: slot_name='momentum'"):
        optimizer.get_slot(model.trainable_variables[0], "momentum")


def test_period_zero_has_no_slow_weights():
    model, optimizer = built(sync_period=0)
    assert optimizer.slow_variables == []
    assert optimizer.variables == optimizer.inner_optimizer.variables
    with pytest.raises(ValueError, match=r"There are no slow weights: Lookahead is switched off"):
        optimizer.get_slot(model.trainable_variables[0], "slow")


def test_variables_are_captured_the_slow_weights_the_settings_and_the_inner_optimizers():
    _, optimizer = built()
    assert optimizer.variables == [
        optimizer._captured,
        *optimizer.slow_variables,
        optimizer._sync_period.variable,
        optimizer._slow_step_size.variable,
        *optimizer.inner_optimizer.variables,
    ]
    assert optimizer.weights == optimizer.variables


def test_minimize_refuses_a_loss_that_is_no_callable():
    model, optimizer = built()
    with pytest.raises(TypeError, match=r"`loss` must be a callable without arguments.*Received: loss=1.0"):
        optimizer.minimize(1.0, model.trainable_variables)


def test_public_names_are_sorted_and_exist():
    import lookahead_optim.keras

    assert lookahead_optim.keras.__all__ == sorted(lookahead_optim.keras.__all__)
    assert all(hasattr(lookahead_optim.keras, name) for name in lookahead_optim.keras.__all__)
