"""Slow weights of a wider dtype than their weights, alone and with momentum."""

import keras
import ml_dtypes
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, SwapSlowWeights
from tests.comparison import assert_same_bits
from tests.test_keras import kept
from tests.test_keras.helpers import BACKEND, data, values
from tests.test_keras.outer import FIT, OUTER, QUICK, STEPS, momenta, stepper, tensors

every_mode = pytest.mark.parametrize("mode", STEPS)
SETTINGS = {"plain": {}, **OUTER}
every_outer = pytest.mark.parametrize("outer", SETTINGS.values(), ids=SETTINGS)
# Elsewhere every model is compiled separately.
IN_FIT = SETTINGS if BACKEND == "torch" else {"nesterov": SETTINGS["nesterov"]}
in_fit = pytest.mark.parametrize("outer", IN_FIT.values(), ids=IN_FIT)
UNIT = 2.0**-7  # the spacing of bfloat16 from 1 to 2
DTYPES = ["bfloat16", "float32", "float16", "bfloat16"]
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def variables_of(dtypes=DTYPES, seed=0, constraint=None):
    """Return variables of these dtypes, with a constraint if it is given."""
    rng = np.random.default_rng(seed)
    made = []
    for dtype in dtypes:
        variable = keras.Variable(rng.normal(size=(4, 3)), dtype=dtype)
        variable.constraint = constraint
        made.append(variable)
    return made


def rounded(arrays, variables):
    """Return arrays in the dtypes of the variables."""
    return [array.astype(NUMPY[keras.backend.standardize_dtype(one.dtype)]) for array, one in zip(arrays, variables)]


def moved_by_units(units, slow_step_size, slow_dtype, mode):
    """Return the slow weight, from 1, after cycles of one step that moves the weight by `units` units."""
    weight = keras.Variable([1.0], dtype="bfloat16")
    optimizer = Lookahead(keras.optimizers.SGD(1.0), 1, slow_step_size, slow_dtype=slow_dtype)
    step = stepper(optimizer, [weight], mode)
    for move in units:
        step(tensors([[-move * UNIT]], [weight]))
    (slow,) = optimizer.slow_variables
    assert keras.backend.standardize_dtype(slow.dtype) == (slow_dtype or "bfloat16")
    assert_same_bits(values([weight]), rounded(values([slow]), [weight]))
    return float(values([slow])[0][0])


@every_mode
@pytest.mark.parametrize(("slow_dtype", "expected"), [(None, 1.0), ("float32", 1.25)])
def test_small_moves_add_up_in_slow_weights_of_a_wider_dtype(slow_dtype, expected, mode):
    assert moved_by_units([1] * 64, 0.5, slow_dtype, mode) == expected


@every_mode
def test_moves_are_measured_from_the_restart_point(mode):
    # From the slow weight itself it would be 0.059 units.
    slow = moved_by_units(([1] + [0] * 9) * 20, 0.1, "float32", mode)
    assert (slow - 1) / UNIT == pytest.approx(2.0, rel=1e-4)


@every_mode
@pytest.mark.parametrize("slow_momentum", [0.0, 0.9])
def test_a_weight_that_does_not_move_leaves_its_wide_slow_weight_alone_bit_for_bit(slow_momentum, mode):
    # The last values are below the normal numbers of float16. The very last value lies halfway between two float16
    # numbers.
    numbers = np.array([1.001, -3.002, 3e-5, -4.3e-6, 2.0**-24 * 2.5, 1e-9, 0.0, 65503.0], "float32")
    variables = [keras.Variable(np.ones(8), dtype=dtype) for dtype in ("bfloat16", "float16", "float32")]
    optimizer = Lookahead(keras.optimizers.SGD(0.1), 1, 0.3, slow_momentum=slow_momentum, slow_dtype="float32")
    step, zeros = stepper(optimizer, variables, mode), tensors([np.zeros(8)] * 3, variables)
    step(zeros)
    for variable, slow in zip(variables, optimizer.slow_variables):
        slow.assign(numbers)
        variable.assign(rounded([numbers], [variable])[0])
    for _ in range(3):
        step(zeros)
        assert_same_bits(values(optimizer.slow_variables), [numbers] * 3)
        assert_same_bits(values(variables), rounded([numbers] * 3, variables))


def outer_step_by_hand(slow, fast, b, outer, eta, constraint):
    """Return slow weight and momentum after an outer step in float32, from arrays."""
    mu = np.float32(outer.get("slow_momentum", 0.0))
    s = slow.astype(fast.dtype).astype("float32") - fast.astype("float32")
    b = mu * b + s
    d = s + mu * b if outer.get("slow_nesterov", True) else b
    slow = slow - np.float32(eta) * d
    if constraint is not None:
        slow = keras.ops.convert_to_numpy(constraint(keras.ops.convert_to_tensor(slow)))
    return slow, b


CONSTRAINTS = {"free": None, "non-negative": keras.constraints.NonNeg(), "norm": keras.constraints.MaxNorm(1.0)}


@every_mode
@every_outer
@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_every_sync_of_a_mixed_model_is_the_outer_step_by_hand_and_fast_weights_are_the_rounded_slow_ones(
    constraint, outer, mode
):
    if mode == "xla" and constraint is not CONSTRAINTS["norm"]:
        pytest.skip("XLA takes seconds for each")
    variables, bare = variables_of(constraint=constraint), variables_of(constraint=constraint)
    optimizer = Lookahead(keras.optimizers.SGD(0.5), 2, 0.7, **outer, slow_dtype="float32")
    inner, rng = keras.optimizers.SGD(0.5), np.random.default_rng(1)
    step, bare_step = stepper(optimizer, variables, mode), stepper(inner, bare, mode)
    slow, b = [one.astype("float32") for one in values(variables)], [np.zeros((4, 3), "float32")] * 4
    for count in range(1, 7):
        gradients = [rng.normal(size=(4, 3)) for _ in variables]
        step(tensors(gradients, variables))
        bare_step(tensors(gradients, bare))
        if count % 2:
            assert_same_bits(values(variables), values(bare))
            continue
        found = values(optimizer.slow_variables)
        assert {one.dtype for one in found} == {np.dtype("float32")}
        for index, fast in enumerate(values(bare)):
            expected, b[index] = outer_step_by_hand(slow[index], fast, b[index], outer, 0.7, constraint)
            np.testing.assert_allclose(found[index], expected, rtol=1e-6, atol=1e-6)
        assert_same_bits(values(variables), rounded(found, variables))
        if "slow_momentum" in outer:
            for one, other in zip(momenta(optimizer, variables), b):
                assert one.dtype == "float32"
                np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
            b = momenta(optimizer, variables)
        slow = found
        for variable, other in zip(variables, bare):
            other.assign(variable.value)
    if constraint is CONSTRAINTS["non-negative"]:
        assert all((one >= 0).all() for one in found)
        assert any((one == 0).any() for one in found)
    if constraint is CONSTRAINTS["norm"]:
        assert all((np.linalg.norm(one, axis=0) <= 1 + 1e-6).all() for one in found)


@every_mode
@pytest.mark.parametrize("slow_dtype", [None, "float32"])
def test_a_step_size_of_1_without_momentum_is_the_inner_optimizer_bit_for_bit(slow_dtype, mode):
    variables, bare = variables_of(), variables_of()
    optimizer, inner = Lookahead(keras.optimizers.SGD(0.5), 2, 1.0, slow_dtype=slow_dtype), keras.optimizers.SGD(0.5)
    step, bare_step, rng = stepper(optimizer, variables, mode), stepper(inner, bare, mode), np.random.default_rng(1)
    for count in range(1, 8):
        gradients = [rng.normal(size=(4, 3)) for _ in variables]
        step(tensors(gradients, variables))
        bare_step(tensors(gradients, bare))
        assert_same_bits(values(variables), values(bare))
        if count % 2 == 0:
            assert_same_bits(rounded(values(optimizer.slow_variables), variables), values(bare))


@every_mode
def test_a_step_size_that_becomes_1_makes_wide_slow_weights_copies_of_the_fast_ones(mode):
    variables = variables_of()
    optimizer = Lookahead(keras.optimizers.SGD(0.5), 2, 0.3, slow_dtype="float32")
    step, rng = stepper(optimizer, variables, mode), np.random.default_rng(1)
    for count in range(1, 5):
        step(tensors([rng.normal(size=(4, 3)) for _ in variables], variables))
        fast = [one.astype("float32") for one in values(variables)]
        if count == 2:
            # From here on the slow weights are no numbers of the narrow dtypes.
            assert any((one != other).any() for one, other in zip(values(optimizer.slow_variables), fast))
            optimizer.slow_step_size = 1.0
    assert_same_bits(values(optimizer.slow_variables), fast)


@every_outer
def test_nested_wrappers_of_different_dtypes_restart_from_the_same_rounded_weights(outer):
    variables = variables_of()
    inner = Lookahead(keras.optimizers.SGD(0.5), 2, 0.5, **outer, slow_dtype="float32")
    optimizer = Lookahead(inner, 4, 0.7, **outer)
    step, rng = stepper(optimizer, variables, STEPS[-1]), np.random.default_rng(1)
    for count in range(1, 9):
        step(tensors([rng.normal(size=(4, 3)) for _ in variables], variables))
        if count % 2 == 0:
            assert_same_bits(rounded(values(inner.slow_variables), variables), values(variables))
        if count % 4 == 0:
            assert_same_bits(values(optimizer.slow_variables), values(variables))
            # Captured again from the restarted weights.
            assert_same_bits(values(inner.slow_variables), [one.astype("float32") for one in values(variables)])


def test_float32_weights_with_a_slow_dtype_of_float32_are_as_without():
    results = []
    for slow_dtype in (None, "float32"):
        variables = variables_of(["float32"] * 2)
        optimizer = Lookahead(keras.optimizers.SGD(0.5), 2, 0.3, slow_dtype=slow_dtype)
        step, rng = stepper(optimizer, variables, QUICK), np.random.default_rng(1)
        for _ in range(5):
            step(tensors([rng.normal(size=(4, 3)) for _ in variables], variables))
        results.append(values([*variables, *optimizer.variables]))
    assert_same_bits(*results)


# In `fit`.


def make_model(outer, sync_period=kept.SYNC_PERIOD):
    """Return a model whose first layer is in bfloat16 and whose last layer is in float32."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="tanh", dtype="bfloat16"), keras.layers.Dense(1, dtype="float32")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    optimizer = Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), sync_period, **outer, slow_dtype="float32")
    model.compile(optimizer, loss="mse", **FIT[QUICK])
    model.optimizer.build(model.trainable_variables)
    return model


@in_fit
def test_a_block_and_the_callback_show_the_rounded_slow_weights_and_put_the_fast_ones_back_bit_for_bit(outer):
    model, last = make_model(outer), kept.LastBatch()
    losses = kept.fit(model, [SwapSlowWeights(), last], 2)
    fast, slow = values(model.trainable_variables), values(model.optimizer.slow_variables)
    assert_same_bits(fast, last.fast[-1])
    assert_same_bits(slow, last.slow[-1])
    with model.optimizer.slow_weights():
        assert_same_bits(values(model.trainable_variables), rounded(slow, model.trainable_variables))
        assert model.evaluate(*kept.VALIDATION, batch_size=8, verbose=0) == losses[-1]
    assert_same_bits(values(model.trainable_variables), fast)
    assert_same_bits(values(model.optimizer.slow_variables), slow)
    assert model.evaluate(*kept.VALIDATION, batch_size=8, verbose=0) != losses[-1]
    # Training is as without the callback.
    plain, other = make_model(outer), kept.LastBatch()
    kept.fit(plain, [other], 2)
    assert_same_bits(last.states, other.states)


def test_the_callback_takes_rounded_weights_for_those_of_a_sync():
    # Every epoch ends with a sync, where other weights in the model would be an error.
    model = make_model(OUTER["nesterov"], kept.BATCHES)
    losses = kept.fit(model, [SwapSlowWeights()], 2)
    assert model.evaluate(*kept.VALIDATION, batch_size=8, verbose=0) == losses[-1]
    assert model.evaluate(*kept.VALIDATION, batch_size=8, verbose=0, callbacks=[SwapSlowWeights()]) == losses[-1]


@pytest.mark.parametrize("form", ["model.keras", "model.weights.h5"])
def test_a_file_saved_in_a_block_resumes_bit_for_bit_with_the_callback(tmp_path, form):
    outer = OUTER["nesterov"]
    model, last = make_model(outer), kept.LastBatch()
    kept.fit(model, [last], 2)
    with model.optimizer.slow_weights():
        model.save(tmp_path / form) if form == "model.keras" else model.save_weights(tmp_path / form)
    kept.fit(model, [last], 3, initial_epoch=2)
    if form == "model.keras":
        loaded = keras.saving.load_model(tmp_path / form)
    else:
        loaded = make_model(outer)
        loaded.load_weights(tmp_path / form)
    assert_same_bits(values(loaded.trainable_variables), rounded(last.slow[1], loaded.trainable_variables))
    resumed = kept.LastBatch()
    kept.fit(loaded, [resumed, SwapSlowWeights()], 3, initial_epoch=2)
    assert_same_bits(resumed.states[0], last.states[2])


@in_fit
def test_a_sync_by_hand_rounds_and_a_reset_captures_the_fast_weights(outer):
    model = make_model(outer)
    x, y = data(8 * 7)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    weights, optimizer = model.trainable_variables, model.optimizer
    optimizer.sync()
    state = values([*weights, *optimizer.variables])
    assert_same_bits(values(weights), rounded(values(optimizer.slow_variables), weights))
    if outer:
        # Without momentum, a sync does not change a weight that did not move.
        assert any(one.any() for one in momenta(optimizer, weights))
    optimizer.sync()
    assert_same_bits(values([*weights, *optimizer.variables]), state)
    optimizer.reset_slow_weights()
    assert_same_bits(values(optimizer.slow_variables), [one.astype("float32") for one in values(weights)])
    if outer:
        assert not any(one.any() for one in momenta(optimizer, weights))


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", {"slow_momentum": 0.5}), ("bfloat16", {"slow_dtype": "float32"})],
    ids=["momentum", "wide"],
)
def test_weights_that_stay_infinite_stay_what_they_are(dtype, settings, mode):
    variables = [keras.Variable([-np.inf, np.inf, 1.0], dtype=dtype)]
    optimizer = Lookahead(keras.optimizers.SGD(0.25), 1, 0.5, **settings)
    step = stepper(optimizer, variables, mode)
    for _ in range(2):
        step(tensors([np.array([0.0, 0.0, 1.0], "float32")], variables))
    (fast,) = values(variables)
    # s = 1/4; with momentum b = 1/4, then 3/8 and d = 3/8, then 7/16.
    expected = 1 - 0.5 * (3 / 8 + 7 / 16) if "slow_momentum" in settings else 1 - 0.5 * (1 / 4 + 1 / 4)
    np.testing.assert_array_equal(fast.astype("float32"), np.array([-np.inf, np.inf, expected], "float32"))
