"""Every member of TensorFlow Addons' class works as its documentation says."""

import copy
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead, SwapSlowWeights
from lookahead_optim.tf_keras._keras import keras
from tests import reference

legacy = keras.optimizers.legacy
ExponentialDecay = keras.optimizers.schedules.ExponentialDecay
START = [np.array([1.0, 2.0], "float32"), np.array([[3.0]], "float32")]


def make(sync_period=3, slow_step_size=0.5, **kwargs):
    return Lookahead(legacy.SGD(0.125, momentum=0.5), sync_period, slow_step_size, **kwargs)


def two_variables():
    return [tf.Variable(value) for value in START]


def step(optimizer, variables, times=1):
    for _ in range(times):
        optimizer.apply_gradients([(tf.ones_like(variable), variable) for variable in variables])


def oracle(variables, times, sync_period=3, slow_step_size=0.5):
    expected = reference.Lookahead(reference.SGD(0.125, momentum=0.5), sync_period, slow_step_size).start(variables)
    for _ in range(times):
        expected.apply([np.ones_like(weight) for weight in expected.weights])
    return expected


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        np.testing.assert_array_equal(one, other)


def plain(config):
    """Return the JSON form of a config. Like a config of every legacy optimizer, it may have NumPy scalars in it."""
    return json.loads(json.dumps(config, default=lambda scalar: scalar.item()))


def test_iterations_is_a_variable_that_counts_steps_also_those_of_the_inner_optimizer():
    optimizer, variables = make(), two_variables()
    assert isinstance(optimizer.iterations, tf.Variable)
    assert optimizer.iterations.numpy() == 0
    step(optimizer, variables, 4)
    assert optimizer.iterations.numpy() == optimizer.inner_optimizer.iterations.numpy() == 4
    assert optimizer.iterations.dtype == tf.int64


def test_iterations_can_be_set_once():
    optimizer, count = make(), tf.Variable(3, dtype=tf.int64)
    optimizer.iterations = count
    step(optimizer, two_variables())
    assert count.numpy() == optimizer.inner_optimizer.iterations.numpy() == 4
    with pytest.raises(RuntimeError, match="Cannot set `iterations`"):
        optimizer.iterations = tf.Variable(0, dtype=tf.int64)


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_learning_rate_is_read_and_set_on_the_inner_optimizer(name, steps_before, depth):
    inner = legacy.SGD(0.125)
    optimizer = inner
    for _ in range(depth):
        optimizer = Lookahead(optimizer, 10)
    variable = tf.Variable(1.0)
    step(optimizer, [variable], steps_before)
    assert float(getattr(optimizer, name)) == 0.125
    setattr(optimizer, name, 0.25)
    assert float(inner.learning_rate) == float(optimizer.lr) == float(optimizer.learning_rate) == 0.25
    before = variable.numpy()
    step(optimizer, [variable])
    assert variable.numpy() == before - 0.25


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_learning_rate_may_be_set_to_a_schedule_and_back(name, steps_before):
    optimizer, variable = Lookahead(legacy.SGD(0.125), 10), tf.Variable(4.0)
    step(optimizer, [variable], steps_before)
    schedule = ExponentialDecay(0.5, 1, 0.5)
    setattr(optimizer, name, schedule)
    assert getattr(optimizer, name) is schedule
    before = variable.numpy()
    step(optimizer, [variable])
    assert variable.numpy() == before - 0.5 * 0.5**steps_before
    setattr(optimizer, name, 1.0)
    before = variable.numpy()
    step(optimizer, [variable])
    assert variable.numpy() == before - 1


def test_a_learning_rate_set_between_calls_is_that_of_a_traced_step():
    optimizer, variable = Lookahead(legacy.SGD(0.125), 10), tf.Variable(1.0)
    traced = tf.function(lambda: step(optimizer, [variable]))
    traced()
    optimizer.learning_rate = 0.25
    traced()
    assert variable.numpy() == 1 - 0.125 - 0.25


def test_weights_and_variables_are_the_count_the_slow_weights_and_the_inner_state():
    optimizer, variables = make(), two_variables()
    step(optimizer, variables)
    inner = optimizer.inner_optimizer
    expected = [
        optimizer.iterations,
        *(optimizer.get_slot(variable, "slow") for variable in variables),
        *(inner.get_slot(variable, "momentum") for variable in variables),
    ]
    for actual in (optimizer.weights, optimizer.variables()):
        assert [id(one) for one in actual] == [id(one) for one in expected]


def test_get_weights_begins_with_the_count_and_has_the_original_order():
    optimizer, variables = make(), two_variables()
    expected = oracle(variables, 4)
    step(optimizer, variables, 4)
    weights = optimizer.get_weights()
    assert all(isinstance(weight, (np.ndarray, np.generic)) for weight in weights)
    assert_equal(weights, [4, *expected.slow, *(state["v"] for state in expected.inner.state)])


def test_set_weights_brings_a_state_back():
    variables = two_variables()
    optimizer = make()
    step(optimizer, variables, 4)
    weights, fast = optimizer.get_weights(), [variable.numpy() for variable in variables]
    step(optimizer, variables, 3)
    expected = [variable.numpy() for variable in variables], optimizer.get_weights()
    other, others = make(), two_variables()
    step(other, others)
    other.set_weights(weights)
    for variable, value in zip(others, fast):
        variable.assign(value)
    assert_equal(other.get_weights(), weights)
    step(other, others, 3)
    assert_equal(others, expected[0])
    assert_equal(other.get_weights(), expected[1])


def test_set_weights_refuses_a_list_of_another_length_or_shapes_and_changes_nothing():
    optimizer = make()
    step(optimizer, two_variables())
    weights = optimizer.get_weights()
    with pytest.raises(ValueError, match=r"weight list of length 4.*expecting 5"):
        optimizer.set_weights(weights[:-1])
    with pytest.raises(ValueError, match="not compatible with provided weight shape"):
        optimizer.set_weights([weights[0], *reversed(weights[1:])])
    assert_equal(optimizer.get_weights(), weights)


def test_add_slot_makes_a_slot_that_get_slot_and_get_slot_names_know():
    optimizer, (variable, _) = make(), two_variables()
    slot = optimizer.add_slot(variable, "extra", initializer="ones", shape=[3])
    assert_equal([slot], [[1, 1, 1]])
    assert optimizer.add_slot(variable, "extra") is slot
    assert optimizer.get_slot(variable, "extra") is slot
    assert optimizer.get_slot_names() == ["extra"]
    assert any(one is slot for one in optimizer.weights)
    step(optimizer, [variable], 3)
    assert_equal([slot, optimizer.get_slot(variable, "slow")], [[1, 1, 1], variable])
    assert optimizer.get_slot_names() == ["extra", "slow"]


def test_get_slot_is_the_slow_weight_and_get_slot_names_names_it():
    optimizer, variables = make(), two_variables()
    assert optimizer.get_slot_names() == []
    start = [variable.numpy() for variable in variables]
    step(optimizer, variables)
    assert optimizer.get_slot_names() == ["slow"]
    assert_equal([optimizer.get_slot(variable, "slow") for variable in variables], start)
    assert [optimizer.get_slot(one, "slow").dtype for one in variables] == [one.dtype for one in variables]
    with pytest.raises(KeyError):
        optimizer.get_slot(variables[0], "nonsense")


def test_add_weight_makes_a_variable():
    weight = make().add_weight("extra", [2, 3], dtype=tf.float64, initializer="ones", trainable=False)
    assert weight.name.startswith("extra")
    assert (weight.shape, weight.dtype, weight.trainable) == ([2, 3], tf.float64, False)
    np.testing.assert_array_equal(weight, np.ones((2, 3)))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"name": "step"}, {"experimental_aggregate_gradients": False}, {"experimental_aggregate_gradients": True}],
    ids=str,
)
def test_apply_gradients_makes_the_oracles_steps(arguments, traced):
    optimizer, variables = make(), two_variables()
    expected = oracle(variables, 7)

    def apply():
        pairs = ((tf.ones_like(variable), variable) for variable in variables)
        optimizer.apply_gradients(pairs, **arguments)

    apply = tf.function(apply) if traced else apply
    for _ in range(7):
        apply()
    np.testing.assert_allclose(variables[0], expected.weights[0], rtol=1e-6)
    np.testing.assert_allclose(variables[1], expected.weights[1], rtol=1e-6)


def test_apply_gradients_takes_its_arguments_by_position():
    optimizer, variable = make(), tf.Variable(1.0)
    optimizer.apply_gradients([(tf.constant(1.0), variable)], "step", False)
    assert variable.numpy() == 0.875


@pytest.mark.parametrize(
    "malformed",
    [
        3,
        None,
        [1.0, 2.0],
        lambda variable: [tf.constant(1.0), variable],
        lambda variable: [(tf.constant(1.0),)],
        lambda variable: [(tf.constant(1.0), variable, variable)],
        lambda variable: [(variable, tf.constant(1.0))],
        lambda variable: [(tf.constant(1.0), "weight")],
        lambda variable: [(tf.constant(1.0), variable), (tf.constant(1.0), None)],
    ],
)
def test_apply_gradients_refuses_what_is_not_made_of_pairs_and_counts_nothing(malformed):
    optimizer, variable = make(), tf.Variable(1.0)
    step(optimizer, [variable])
    malformed = malformed(variable) if callable(malformed) else malformed
    with pytest.raises(TypeError, match=r"`grads_and_vars` must be pairs of gradient and variable. Received: "):
        optimizer.apply_gradients(malformed)
    assert (optimizer.iterations.numpy(), variable.numpy()) == (1, 0.875)


def test_apply_gradients_without_any_gradient_is_refused_and_not_counted():
    optimizer, variables = make(), two_variables()
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(None, variable) for variable in variables])
    assert optimizer.iterations.numpy() == 0
    assert_equal(variables, two_variables())


@pytest.mark.parametrize("traced", [False, True])
def test_minimize_a_callable_loss_with_the_gradient_of_the_loss_given(traced):
    optimizer, variable = make(), tf.Variable([1.0, 2.0])
    grad_loss = tf.constant([2.0, 4.0])

    def minimize():
        optimizer.minimize(lambda: variable * variable / 2, [variable], grad_loss, "name")

    (tf.function(minimize) if traced else minimize)()
    np.testing.assert_array_equal(variable, [1 - 0.125 * 2 * 1, 2 - 0.125 * 4 * 2])


@pytest.mark.parametrize("var_list", [list, lambda variables: lambda: variables], ids=["list", "callable"])
def test_minimize_makes_the_oracles_steps(var_list):
    optimizer, variables = make(), two_variables()
    expected = oracle(variables, 7)
    for _ in range(7):
        optimizer.minimize(lambda: sum(map(tf.reduce_sum, variables)), var_list=var_list(variables))
    assert_equal(variables, expected.weights)


def test_minimize_a_tensor_with_its_tape():
    optimizer, variable = make(), tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variable * variable) / 2
    optimizer.minimize(loss, [variable], tape=tape)
    np.testing.assert_array_equal(variable, [0.875, 1.75])
    with pytest.raises(ValueError, match="`tape` is required"):
        optimizer.minimize(loss, [variable])


class InGraph:
    """Two variables and their loss, half the sum of squares, in a graph of TensorFlow 1."""

    def __enter__(self):
        self.exits = [tf.Graph().as_default(), tf.compat.v1.Session()]
        _, self.session = [one.__enter__() for one in self.exits]
        self.variables = two_variables()
        self.loss = sum(tf.reduce_sum(tf.square(variable)) / 2 for variable in self.variables)
        return self

    def __exit__(self, *error):
        for one in reversed(self.exits):
            one.__exit__(*error)

    def initialize(self):
        self.session.run(tf.compat.v1.global_variables_initializer())


def test_get_gradients_in_a_graph():
    with InGraph() as graph:
        gradients = make().get_gradients(graph.loss, graph.variables)
        graph.initialize()
        assert_equal(graph.session.run(gradients), START)
        with pytest.raises(ValueError, match="has `None` for gradient"):
            make().get_gradients(graph.loss, [tf.Variable(1.0)])


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: Lookahead(one, 4, 0.3)], ids=["single", "nested"])
def test_updates_in_a_graph_make_the_steps_and_the_syncs_of_eager_mode_in_order(wrap):
    optimizer, variables = wrap(make()), two_variables()
    expected = []
    for _ in range(9):
        optimizer.minimize(lambda: sum(tf.reduce_sum(tf.square(one)) / 2 for one in variables), variables)
        expected.append([*(one.numpy() for one in variables), *optimizer.get_weights()])
    with InGraph() as graph:
        optimizer = wrap(make())
        updates = optimizer.get_updates(graph.loss, graph.variables)
        assert isinstance(updates, list)
        graph.initialize()
        for values in expected:
            graph.session.run(updates)
            actual = graph.session.run([*graph.variables, *optimizer.weights])
            for one, other in zip(actual, values, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6)


def test_updates_in_a_graph_capture_weights_assigned_after_the_initialization():
    with InGraph() as graph:
        optimizer = make(sync_period=2)
        updates = optimizer.get_updates(graph.loss, graph.variables)
        graph.initialize()
        loaded = [value * 2 for value in START]
        for variable, value in zip(graph.variables, loaded):
            keras.backend.set_value(variable, value)
        graph.session.run(updates)
        slow = [optimizer.get_slot(variable, "slow") for variable in graph.variables]
        assert_equal(graph.session.run(slow), loaded)


def test_what_acts_at_once_is_refused_in_a_graph_of_tensorflow_1():
    with InGraph() as graph:
        optimizer = make()
        optimizer.get_updates(graph.loss, graph.variables)
        for name in ("sync", "reset_slow_weights"):
            with pytest.raises(RuntimeError, match=rf"`{name}\(\)` needs eager execution. Received: a call in a graph"):
                getattr(optimizer, name)()
        with pytest.raises(RuntimeError, match=r"`slow_weights\(\)` needs eager"), optimizer.slow_weights():
            pass


def test_get_and_set_weights_in_a_graph():
    with InGraph() as graph:
        optimizer = make()
        updates = optimizer.get_updates(graph.loss, graph.variables)
        graph.initialize()
        graph.session.run(updates)
        weights = optimizer.get_weights()
        assert weights[0] == 1
        assert_equal(weights[1:3], START)
        changed = [weights[0], *(weight + 1 for weight in weights[1:])]
        optimizer.set_weights(changed)
        assert_equal(optimizer.get_weights(), changed)


def test_get_config_is_json_and_has_the_keys_of_the_original():
    optimizer = make(4, 0.25, name="Wrapped", clipnorm=1.0)
    inner = {"name": "SGD", "learning_rate": 0.125, "decay": 0.0, "momentum": 0.5, "nesterov": False}
    for _ in range(2):
        config = plain(optimizer.get_config())
        serialized = config.pop("optimizer")
        assert config == {"name": "Wrapped", "clipnorm": 1.0, "sync_period": 4, "slow_step_size": 0.25}
        assert (serialized["class_name"], serialized["config"]) == ("SGD", inner)
        step(optimizer, two_variables())


@pytest.mark.parametrize(
    "inner",
    [
        lambda: legacy.SGD(0.1, momentum=0.5, clipvalue=0.5, name="inner"),
        lambda: legacy.Adam(ExponentialDecay(0.1, 10, 0.5)),
        lambda: Lookahead(legacy.RMSprop(0.1), 2, 0.25, clipvalue=2.0),
        lambda: legacy.Adagrad(0.1, decay=0.5),
    ],
    ids=["SGD", "schedule", "nested", "decay"],
)
def test_config_round_trip(inner):
    optimizer = Lookahead(inner(), 4, 0.25, name="Wrapped", global_clipnorm=1.0)
    config = optimizer.get_config()
    through_json = plain(config)
    for given in (config, through_json):
        before = copy.deepcopy(given)
        again = Lookahead.from_config(given)
        assert given == before
        assert plain(again.get_config()) == through_json
        assert type(again.inner_optimizer) is type(optimizer.inner_optimizer)


def test_registered_name_and_round_trip_through_keras():
    optimizer = make(4, 0.25)
    assert keras.utils.get_registered_name(Lookahead) == "Addons>Lookahead"
    assert keras.utils.get_registered_object("Addons>Lookahead") is Lookahead
    serialized = keras.optimizers.serialize(optimizer)
    assert "Addons>Lookahead" in (serialized["class_name"], serialized.get("registered_name"))
    for given in (
        plain(serialized),
        {"class_name": "Addons>Lookahead", "config": plain(optimizer.get_config())},
        keras.utils.legacy.serialize_keras_object(optimizer),
    ):
        again = keras.optimizers.deserialize(given)
        assert isinstance(again, Lookahead)
        assert plain(again.get_config()) == plain(optimizer.get_config())


def test_from_config_takes_a_config_of_the_original():
    config = {
        "name": "Lookahead",
        "optimizer": {"class_name": "Adam", "config": {"learning_rate": 0.5, "name": "Adam"}},
        "sync_period": 4,
        "slow_step_size": 0.25,
        "is_legacy_optimizer": True,
    }
    optimizer = Lookahead.from_config(config)
    assert isinstance(optimizer.inner_optimizer, legacy.Adam)
    assert float(optimizer.learning_rate) == 0.5
    assert "optimizer" in config


def test_from_config_takes_custom_objects():
    class Halving(legacy.SGD):
        def _resource_apply_dense(self, grad, var, apply_state=None):
            return super()._resource_apply_dense(grad / 2, var, apply_state)

    config = plain(Lookahead(Halving(0.25), 4).get_config())
    optimizer = Lookahead.from_config(config, custom_objects={"Halving": Halving})
    assert type(optimizer.inner_optimizer) is Halving
    variable = tf.Variable(1.0)
    step(optimizer, [variable])
    assert variable.numpy() == 0.875
    with pytest.raises((ValueError, TypeError), match="Halving"):
        Lookahead.from_config(config)


def test_a_configured_optimizer_trains_as_the_one_it_came_from():
    optimizer, variables = make(slow_step_size=0.3), two_variables()
    other, others = Lookahead.from_config(plain(optimizer.get_config())), two_variables()
    step(optimizer, variables, 7)
    step(other, others, 7)
    assert_equal(variables, others)
    assert_equal(optimizer.get_weights(), other.get_weights())


@pytest.mark.parametrize("steps_before", [0, 2, 3])
def test_a_deep_copy_goes_on_with_the_same_variables_and_a_state_of_its_own(steps_before):
    optimizer, variables = make(), two_variables()
    expected = oracle(variables, 7)
    step(optimizer, variables, steps_before)
    copied = copy.deepcopy(optimizer)
    before = optimizer.get_weights()
    step(copied, variables, 7 - steps_before)
    assert_equal(variables, expected.weights)
    assert_equal(copied.get_weights(), [7, *expected.slow, *(state["v"] for state in expected.inner.state)])
    assert_equal(optimizer.get_weights(), before)


def test_the_config_makes_the_optimizer_of_a_cloned_model():
    def train(model, optimizer):
        model.compile(optimizer, loss="mse")
        x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
        model.fit(x, x[:, :1], batch_size=4, shuffle=False, verbose=0)
        return model.get_weights()

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    cloned = keras.models.clone_model(model)
    cloned.set_weights(model.get_weights())
    weights = train(model, make())
    assert_equal(train(cloned, Lookahead.from_config(model.optimizer.get_config())), weights)
    assert model.optimizer.iterations.numpy() == 5


@pytest.mark.parametrize("inner", [legacy.SGD, legacy.Adam])
def test_the_graph_of_a_step_has_at_most_half_as_many_operations_more_beside_two_conditionals(inner):
    """The two are the capture and the sync."""

    def operations(optimizer):
        variables = [tf.Variable([1.0]) for _ in range(60)]
        traced = tf.function(lambda: step(optimizer, variables)).get_concrete_function()
        return traced.graph.get_operations()

    wrapped, bare = operations(Lookahead(inner(0.1))), operations(inner(0.1))
    assert len(wrapped) <= 1.5 * len(bare)
    assert [one.type for one in wrapped].count("If") == 2
    # With this operation TensorFlow takes a conditional or loop apart, and passes every weight through its parts at
    # each step.
    assert not any("_lower_using_switch_merge" in one.node_def.attr for one in wrapped)


def test_sync_period_and_slow_step_size_are_read_and_set():
    optimizer, variable = Lookahead(legacy.SGD(0.125), 2, 0.5), tf.Variable(1.0)
    step(optimizer, [variable], 2)
    assert variable.numpy() == 1 - 0.125
    optimizer.sync_period, optimizer.slow_step_size = 3, 0.25
    assert (optimizer.sync_period, optimizer.slow_step_size) == (3, 0.25)
    step(optimizer, [variable])
    assert variable.numpy() == 0.875 - 0.125 * 0.25
    step(optimizer, [variable], 2)
    assert variable.numpy() == 0.84375 - 0.25
    assert plain(optimizer.get_config())["sync_period"] == 3
    assert plain(optimizer.get_config())["slow_step_size"] == 0.25


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("sync_period", 2.5, TypeError),
        ("sync_period", True, TypeError),
        ("sync_period", -1, ValueError),
        ("slow_step_size", "0.5", TypeError),
        ("slow_step_size", -0.5, ValueError),
        ("slow_step_size", float("nan"), ValueError),
    ],
)
def test_a_bad_value_set_is_refused_and_the_old_one_stays(name, value, error):
    optimizer = make(4, 0.25)
    with pytest.raises(error, match=rf"`{name}` must be .*Received: {name}={value!r}"):
        setattr(optimizer, name, value)
    assert (optimizer.sync_period, optimizer.slow_step_size) == (4, 0.25)


def test_a_sync_that_halves_a_short_training_warns():
    optimizer, variables = make(6), two_variables()
    step(optimizer, variables, 4)
    expected = oracle(START, 4, 6)
    expected.sync()
    message = r"`sync\(\)` in the first cycle takes back 0.5 of .*Received: sync\(\) after 4 .* with sync_period=6"
    with pytest.warns(UserWarning, match=message) as warned:
        optimizer.sync()
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}
    assert_equal(variables, expected.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.sync()
        step(optimizer, variables)
        optimizer.sync()


def test_after_a_reset_a_sync_does_not_warn():
    optimizer, variables = make(6), two_variables()
    step(optimizer, variables, 2)
    optimizer.reset_slow_weights()
    step(optimizer, variables, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.sync()


@pytest.mark.parametrize(
    ("steps", "sync_period", "slow_step_size"),
    [(0, 6, 0.5), (6, 6, 0.5), (7, 6, 0.5), (13, 6, 0.5), (4, 6, 1.0), (4, 0, 0.5), (4, 1, 0.5)],
)
def test_any_other_sync_does_not_warn(steps, sync_period, slow_step_size):
    optimizer, variables = make(sync_period, slow_step_size), two_variables()
    step(optimizer, variables, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.sync()


def test_a_sync_in_a_function_does_not_warn():
    optimizer, variables = make(6), two_variables()
    step(optimizer, variables, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tf.function(optimizer.sync)()


def test_the_callback_does_not_take_a_new_period_for_a_sync():
    class Change(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # 4 is a multiple of 2, but no sync was due then.
            if batch == 3:
                self.model.optimizer.sync_period = 2

    model = keras.Sequential([keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", input_shape=(1,))])
    model.compile(Lookahead(legacy.SGD(0.125), 3), loss=lambda labels, outputs: outputs)
    ones = np.ones((4, 1), "float32")
    callbacks = [Change(), SwapSlowWeights()]
    history = model.fit(ones, ones, batch_size=1, validation_data=(ones, ones), callbacks=callbacks, verbose=0)
    assert history.history["val_loss"] == [-1.5 * 0.125]


def test_the_inner_optimizer_transforms_gradients_before_they_are_aggregated_too():
    class Halving(legacy.SGD):
        def _transform_unaggregated_gradients(self, grads_and_vars):
            return [(gradient / 2, variable) for gradient, variable in grads_and_vars]

    variable = tf.Variable([1.0])
    Lookahead(Halving(1.0)).apply_gradients([(tf.constant([0.5]), variable)])
    assert float(variable[0]) == 0.75
