"""Schedules of the slow step size over the number of syncs."""

import copy

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_keras import resuming
from tests.test_keras.helpers import BACKEND, data, mlp, values
from tests.test_keras.outer import FIT, QUICK, STEPS, Beside, assert_close, stepper, tensors

every_mode = pytest.mark.parametrize("mode", STEPS)


@keras.saving.register_keras_serializable(package="tests")
def halving(syncs):
    return 0.8 * 0.5 ** keras.ops.cast(syncs, "float32")


SCHEDULES = {
    "exponential": (keras.optimizers.schedules.ExponentialDecay(0.8, 2, 0.5), lambda syncs: 0.8 * 0.5 ** (syncs / 2)),
    # Up to and including the boundary it is the value before.
    "piecewise": (
        keras.optimizers.schedules.PiecewiseConstantDecay([0, 2], [0.25, 1.0, 0.0]),
        lambda syncs: [0.25, 1.0, 1.0, 0.0][min(syncs, 3)],
    ),
    "function": (halving, lambda syncs: 0.8 * 0.5**syncs),
    "constant": (lambda syncs: 0.25, lambda syncs: 0.25),
}
every_schedule = pytest.mark.parametrize(("schedule", "number"), SCHEDULES.values(), ids=SCHEDULES)


@every_mode
@every_schedule
@pytest.mark.parametrize("outer", [{}, {"slow_momentum": 0.9}], ids=["plain", "momentum"])
def test_every_sync_has_the_step_size_of_the_number_of_syncs_before_it(outer, schedule, number, mode):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype("float32")) for shape in [(3, 2), (2,)]]
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 2, schedule, **outer)
    oracle = reference.Lookahead(reference.SGD(0.1), 2, **outer).start(values(variables))
    step = stepper(optimizer, variables, mode)
    for count in range(10):
        oracle.slow_step_size = number(count // 2)
        assert isinstance(optimizer.slow_step_size, float)
        assert optimizer.slow_step_size == pytest.approx(oracle.slow_step_size, rel=1e-6)
        gradients = [rng.normal(size=variable.shape) for variable in variables]
        step(tensors(gradients, variables))
        oracle.apply(gradients)
        assert_close(values(variables), oracle.weights)
        assert_close(values(optimizer.slow_variables), oracle.slow)


@every_mode
def test_at_a_sync_of_step_size_1_the_weights_are_the_inner_optimizers_bit_for_bit(mode):
    variables, bare = ([keras.Variable(np.float32([0.1, -3.3]))] for _ in range(2))
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [1.0, 0.0])
    step = stepper(Lookahead(keras.optimizers.SGD(0.1), 2, schedule), variables, mode)
    bare_step = stepper(keras.optimizers.SGD(0.1), bare, mode)
    gradients = tensors([np.array([0.7, 1.1])], variables)
    for _ in range(2):
        step(gradients)
        bare_step(gradients)
        assert_same_bits(values(variables), values(bare))
    start = values(variables)
    # The second sync has a step size of 0.
    for _ in range(2):
        step(gradients)
    assert_same_bits(values(variables), start)


def test_a_sync_by_hand_has_the_step_size_of_the_syncs_that_were_due_before_it():
    weight = keras.Variable([0.0])
    optimizer = Lookahead(
        keras.optimizers.SGD(0.125), 2, keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.5, 0.25])
    )
    for count, expected in [(2, -0.125), (3, None)]:
        while int(optimizer.iterations) < count:
            optimizer.apply([keras.ops.ones(1)], [weight])
        assert expected is None or values([weight])[0][0] == expected
    optimizer.sync()
    assert values([weight])[0][0] == -0.125 - 0.25 * 0.125


def test_levels_of_a_nested_wrapper_have_schedules_of_their_own():
    inner = Lookahead(keras.optimizers.SGD(0.1), 2, SCHEDULES["exponential"][0], slow_momentum=0.5)
    weight = [keras.Variable([1.0, -2.0])]
    optimizer = Lookahead(inner, 4, SCHEDULES["function"][0])
    oracle_inner = reference.Lookahead(reference.SGD(0.1), 2, slow_momentum=0.5)
    oracle = reference.Lookahead(oracle_inner, 4).start(values(weight))
    step, rng = stepper(optimizer, weight, QUICK), np.random.default_rng(0)
    for count in range(13):
        oracle_inner.slow_step_size = SCHEDULES["exponential"][1](count // 2)
        oracle.slow_step_size = SCHEDULES["function"][1](count // 4)
        gradients = [rng.normal(size=2)]
        step(tensors(gradients, weight))
        oracle.apply(gradients)
        assert_close(values(weight), oracle.weights)
        assert_close(values(inner.slow_variables), oracle_inner.slow)


def test_the_syncs_are_counted_by_updates_that_were_applied():
    """Micro-steps and skipped steps do not count."""
    accumulating = Beside(QUICK, [(2, 0.5, {"slow_momentum": 0.5})], micro_steps=2)
    model = accumulating.model
    model.compile(
        Lookahead(keras.optimizers.SGD(0.05, momentum=0.5, gradient_accumulation_steps=2), 2, halving),
        **accumulating.settings,
    )
    accumulating.oracle.slow_momentum = 0.0
    for count in range(8):
        accumulating.oracle.slow_step_size = 0.8 * 0.5 ** (count // 2)
        accumulating.run(2)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles no step")
def test_nothing_is_compiled_again():
    traces = []

    def schedule(syncs):
        traces.append(syncs)
        return 0.5 / (1.0 + keras.ops.cast(syncs, "float32"))

    model = mlp()
    model.compile(Lookahead(keras.optimizers.SGD(0.05), 2, schedule, slow_momentum=0.5), loss="mse", **FIT[QUICK])
    x, y = data(8)
    model.fit(x, y, batch_size=8, verbose=0)
    before = len(traces)
    assert before > 0
    for _ in range(6):
        model.fit(x, y, batch_size=8, verbose=0)
    model.optimizer.sync_period = 3
    model.fit(x, y, batch_size=8, verbose=0)
    assert len(traces) == before


def test_it_cannot_be_set_and_a_number_cannot_become_a_schedule():
    optimizer = Lookahead("sgd", 2, halving)
    for set_to in (0.5, 1.5):
        with pytest.raises(TypeError, match=rf"`slow_step_size` cannot be set, .*Received: slow_step_size={set_to}"):
            optimizer.slow_step_size = set_to
    assert "tests>halving" in optimizer.get_config()["slow_step_size"].values()
    assert optimizer.slow_step_size == pytest.approx(0.8)
    with_number = Lookahead("sgd", 2, 0.25)
    with pytest.raises(TypeError, match=r"`slow_step_size` must be a real number"):
        with_number.slow_step_size = halving
    assert with_number.slow_step_size == 0.25
    assert "halving" in repr(optimizer)


def test_the_state_has_no_variable_for_it():
    names = []
    for step_size in (0.5, halving):
        optimizer = Lookahead(keras.optimizers.SGD(name="sgd"), 2, step_size)
        optimizer.build([keras.Variable([1.0], name="weight")])
        names.append([one.name for one in optimizer.variables])
    assert [name for name in names[0] if not name.endswith("slow_step_size")] == names[1]


@pytest.mark.parametrize("name", ["exponential", "piecewise", "function"])
def test_a_config_has_the_schedule_and_is_left_as_it_is(name):
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 2, SCHEDULES[name][0], slow_momentum=0.5, slow_nesterov=False)
    config = optimizer.get_config()
    before = copy.deepcopy(config)
    for again in (
        Lookahead.from_config(config),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer)),
    ):
        assert again.get_config() == config == before
        weight = keras.Variable([0.0])
        for count in range(6):
            assert again.slow_step_size == pytest.approx(SCHEDULES[name][1](count // 2), rel=1e-6)
            again.apply([keras.ops.ones(1)], [weight])


def test_a_keras_file_has_the_schedule_and_resumes_bit_for_bit(tmp_path):
    model = mlp()
    model.compile(Lookahead(keras.optimizers.SGD(0.05), 2, halving, slow_momentum=0.5), loss="mse", **FIT[QUICK])
    resuming.fit(model, end=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.slow_step_size == pytest.approx(0.4)
    assert_same_bits(resuming.state(resuming.fit(loaded, begin=3)), resuming.state(resuming.fit(model, begin=3)))


def test_a_function_that_is_not_registered_is_found_among_custom_objects():
    def constant(syncs):
        return 0.25

    config = Lookahead("sgd", 2, constant).get_config()
    assert Lookahead.from_config(config, {"constant": constant}).slow_step_size == 0.25
    with pytest.raises((TypeError, ValueError)):
        Lookahead.from_config(config)


@pytest.mark.parametrize(
    ("schedule", "error", "said"),
    [
        (keras.optimizers.schedules.CosineDecay, TypeError, "a class: make an object of it"),
        (lambda: 0.5, TypeError, "which fails for 0 syncs: TypeError"),
        (lambda syncs: "x", TypeError, "which fails for 0 syncs"),
        (lambda syncs: -1.0, ValueError, r"which returns -1\.0 for 0 syncs"),
        (lambda syncs: float("nan"), ValueError, "which returns nan for 0 syncs"),
    ],
)
def test_a_function_that_is_no_schedule_is_refused_at_construction(schedule, error, said):
    with pytest.raises(error, match=f"(?s)`slow_step_size` must be a number .*Received: slow_step_size=.*{said}"):
        Lookahead("sgd", 2, schedule)
