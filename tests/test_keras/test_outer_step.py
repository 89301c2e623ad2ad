"""Slow momentum in `fit`, compared with the oracle, and user actions in between."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, values
from tests.test_keras.outer import FIT, OUTER, QUICK, STEPS, Beside, Oracle, assert_close, momenta, stepper, tensors

every_outer = pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
every_mode = pytest.mark.parametrize("mode", STEPS)

# In a cycle of three updates. `Beside.run` explains the operations of a run.
RUNS = {
    "nothing else": [10],
    "sync before the first step": ["sync", "sync", 4],
    "sync in mid-cycle, twice": [4, "sync", "sync", 1, "sync", 4],
    "sync after a sync": [3, "sync", "sync", 4],
    "reset": [5, "reset", "sync", 5],
    "reset before the first step": ["reset", 4],
    "other periods": [4, {"sync_period": 2}, 3, {"sync_period": 5}, 6, {"sync_period": 1}, 2],
    "off and on": [4, {"sync_period": 0}, 2, "sync", {"sync_period": 2}, "sync", 5],
    "other step sizes": [4, {"slow_step_size": 0.25}, 3, {"slow_step_size": 1.0}, 3, {"slow_step_size": 0.0}, 3],
}
EVERYTHING = [operation for run in RUNS.values() for operation in run]
if BACKEND != "torch":
    # Every model is compiled separately.
    RUNS = {"all": EVERYTHING}


@every_outer
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_fit_with_momentum_is_the_oracles(run, outer):
    Beside(QUICK, [(3, 0.7, outer)]).run(*run)


@pytest.mark.skipif(BACKEND == "torch", reason="one mode")
@pytest.mark.parametrize("mode", [mode for mode in STEPS if mode != QUICK])
def test_so_it_is_in_the_other_modes(mode):
    Beside(mode, [(3, 0.7, OUTER["nesterov"])]).run(4, "sync", "sync", 1, {"sync_period": 2, "slow_step_size": 0.25}, 3)


# Keras' `fit` passes an optimizer only the weights that are trainable. On JAX the bare optimizers refuse that, too.
@pytest.mark.skipif(BACKEND == "jax", reason="a step of `fit` needs all weights")
@every_outer
def test_a_frozen_layer_is_not_moved_in_fit_and_its_momentum_starts_from_0(outer):
    beside = Beside(QUICK, [(3, 0.7, outer)])
    beside.run(4, ("freeze", 0), 1)
    frozen = values(beside.variables[:2])
    beside.run(4)
    assert_same_bits(values(beside.variables[:2]), frozen)
    assert_same_bits(values(beside.lookahead.slow_variables[:2]), frozen)
    assert not any(one.any() for one in momenta(beside.lookahead, beside.variables)[:2])
    beside.run(("freeze",), 5, ("freeze", 1), 4, "sync", ("freeze",), 4)


@every_mode
@every_outer
def test_a_frozen_variable_is_not_moved_and_its_momentum_starts_from_0(outer, mode):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype("float32")) for shape in [(3, 2), (2,)]]
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 2, 0.7, **outer)
    oracle = Oracle(reference.SGD(0.1), 2, 0.7, **outer).start(values(variables))
    # A step that is compiled knows what is frozen when it is traced.
    step = stepper(optimizer, variables, mode)
    for count in range(14):
        if count in (5, 9):
            variables[0].trainable = count == 9
            oracle.frozen = {0} if count == 5 else set()
            step = stepper(optimizer, variables, mode)
        gradients = [rng.normal(size=variable.shape) for variable in variables]
        if 0 in oracle.frozen:
            gradients[0] = np.zeros((3, 2))
        before = values(variables)
        step(tensors(gradients, variables))
        oracle.apply(gradients)
        assert_close(values(variables), oracle.weights)
        assert_close(values(optimizer.slow_variables), oracle.slow)
        assert_close(momenta(optimizer, variables), oracle.b)
        if 0 in oracle.frozen:
            assert_same_bits(values(variables)[0], before[0])
            if count % 2:
                assert_same_bits(values(optimizer.slow_variables)[0], before[0])
                assert not momenta(optimizer, variables)[0].any()


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@every_outer
def test_a_weight_without_gradient_coasts_in_fit(outer):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    unused, used = keras.layers.Dense(2, name="unused"), keras.layers.Dense(1, name="used")
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 2, 0.7, **outer)
    model.compile(optimizer, loss=["mse", None], **FIT[QUICK])
    x, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, batch_size=4, verbose=0)
    # Its momentum comes from an earlier move.
    kernel, start = unused.kernel, np.full((2, 2), 0.25, "float32")
    optimizer.get_slot(kernel, "slow_momentum").assign(start)
    before, b = values([kernel])[0].astype("float64"), start.astype("float64")
    for _ in range(3):
        model.fit(x, y, batch_size=4, verbose=0)
        mu = outer["slow_momentum"]
        b = mu * b
        before = before - 0.7 * (mu * b if outer.get("slow_nesterov", True) else b)
        assert_close(values([kernel]), [before])
        assert_close(momenta(optimizer, [kernel]), [b])


@every_outer
def test_micro_steps_of_accumulation_change_neither_slow_weights_nor_momentum(outer):
    beside = Beside(QUICK, [(2, 0.7, outer)], micro_steps=3)
    # A micro-step after a sync is no update, so another sync has nothing to do.
    beside.run(5, "sync", "sync", 1, "sync", 1, "sync", 6, {"sync_period": 1}, 5)
    assert int(beside.lookahead.iterations) == 6


@every_outer
def test_steps_that_a_loss_scaler_skips_change_neither_slow_weights_nor_momentum(outer):
    beside = Beside(QUICK, [(3, 0.7, outer)], is_scaled=True)
    # The first step, a step right before a sync and a step right after a sync.
    beside.run(("fit", 9, (0, 3, 5)), "sync", ("fit", 1, (0,)), "sync", ("fit", 6, (1, 2)))
    assert int(beside.lookahead.iterations) == 10


@pytest.mark.parametrize("periods", [(2, 3), (3, 3)])
def test_an_outer_sync_keeps_the_inner_momentum_and_leaves_an_inner_sync_nothing_to_do(periods):
    (inner_period, period), (nesterov, heavy) = periods, OUTER.values()
    beside = Beside(QUICK, [(inner_period, 0.6, heavy), (period, 0.7, nesterov)])
    beside.run(5, "sync")
    inner = beside.lookahead.inner_optimizer
    state = values([*beside.variables, *inner.variables])
    assert any(one.any() for one in momenta(inner, beside.variables))
    beside.run("sync_inner")
    assert_same_bits(values([*beside.variables, *inner.variables]), state)
    beside.run(1, "sync_inner", "sync", 4, "reset", "sync", 7)
    if periods == (3, 3):
        # Both were synchronised by the last update.
        beside.run(3 - int(beside.lookahead.iterations) % 3, "sync_inner", "sync", 2)


def test_slots_have_the_momentum_by_name_and_a_plain_optimizer_has_none():
    weight = keras.Variable([1.0, 2.0])
    optimizer = Lookahead(keras.optimizers.SGD(0.125), 2, 0.5, slow_momentum=0.5)
    plain = Lookahead(keras.optimizers.SGD(0.125), 2, 0.5, slow_nesterov=False)
    assert optimizer.get_slot_names() == ["slow", "slow_momentum"]
    assert plain.get_slot_names() == ["slow"]
    for one in (optimizer, plain):
        one.build([weight])
    for _ in range(2):
        optimizer.apply([keras.ops.ones(2)], [weight])
    np.testing.assert_array_equal(values([optimizer.get_slot(weight, "slow_momentum")])[0], 0.25)
    assert_same_bits(values([optimizer.get_slot(weight, "slow")]), values([weight]))
    with pytest.raises(ValueError, match=r"`slot_name` must be one of \['slow'\]. Received: slot_name='slow_momentum'"):
        plain.get_slot(weight, "slow_momentum")
    with pytest.raises(ValueError, match=r"must be one of \['slow', 'slow_momentum'\]. Received: slot_name='momentum'"):
        optimizer.get_slot(weight, "momentum")


def test_repr_has_momentum_and_dtype_where_they_are_set():
    optimizer = Lookahead(keras.optimizers.SGD(name="mine"), 5, 0.3, slow_momentum=0.9, slow_dtype="float32")
    settings = "sync_period=5, slow_step_size=0.3, slow_momentum=0.9, slow_nesterov=True, slow_dtype='float32'"
    assert repr(optimizer) == f"Lookahead(<SGD 'mine'>, {settings})"


# Values that are not finite.


def test_momentum_that_is_poisoned_stays_so_until_a_reset():
    weight = keras.Variable([1.0, 2.0])
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 2, 0.7, slow_momentum=0.9)
    good = keras.ops.ones(2)
    for count in range(4):
        bad = keras.ops.convert_to_tensor(np.array([np.nan, 1.0], "float32"))
        optimizer.apply([bad if count == 1 else good], [weight])
    # Better weights do not repair it.
    weight.assign([1.0, 2.0])
    optimizer.slow_variables[0].assign([1.0, 2.0])
    for _ in range(2):
        optimizer.apply([good], [weight])
    assert np.isnan(values([weight])[0]).tolist() == [True, False]
    weight.assign([1.0, 2.0])
    optimizer.reset_slow_weights()
    for _ in range(4):
        optimizer.apply([good], [weight])
    assert np.isfinite(values([weight])[0]).all()
    assert np.isfinite(momenta(optimizer, [weight])[0]).all()
