"""Training without `fit`: custom loops and `minimize`."""

import contextlib

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import (
    BACKEND,
    Recorder,
    assert_lookahead,
    data,
    differ,
    mlp,
    values,
)

only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow only")
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="JAX only")
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch only")


def adam():
    return keras.optimizers.Adam(0.05)


def native(variables):
    return [variable.value for variable in variables]


def loss_of(model, x, y):
    return keras.ops.mean(keras.ops.square(model(x, training=True) - y))


def run_loop(make_step):
    """Return a `run` for `assert_lookahead` that calls `make_step(model, optimizer)(x, y)` for seven batches."""

    def run(model, optimizer, resets):
        model.compile(optimizer, loss="mse")
        recorder = Recorder(resets)
        recorder.set_model(model)
        x, y = data(56)
        step = make_step(model, optimizer)
        for batch in range(7):
            rows = slice(8 * batch, 8 * batch + 8)
            step(keras.ops.convert_to_tensor(x[rows]), keras.ops.convert_to_tensor(y[rows]))
            recorder.on_train_batch_end(batch)
        return recorder

    return run


@only_tensorflow
@pytest.mark.parametrize("method", ["apply", "apply_gradients"])
@pytest.mark.parametrize("function", ["eager", "graph", "compiled"])
def test_gradient_tape_loop(function, method):
    import tensorflow as tf

    def make_step(model, optimizer):
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_of(model, x, y)
            variables = model.trainable_variables
            grads = tape.gradient(loss, variables)
            if method == "apply":
                optimizer.apply(grads, variables)
            else:
                optimizer.apply_gradients(zip(grads, variables))

        if function != "eager":
            optimizer.build(model.trainable_variables)
            step = tf.function(step, jit_compile=function == "compiled")
        return step

    assert_lookahead(run_loop(make_step), mlp, adam)


@only_tensorflow
def test_optimizer_built_inside_a_graph_captures_the_weights_of_the_first_step():
    import tensorflow as tf

    optimizer = Lookahead(keras.optimizers.SGD(0.125), 2)
    weight = keras.Variable([1.0, 2.0])

    @tf.function
    def step():
        optimizer.apply([tf.ones(2)], [weight])

    step()
    np.testing.assert_array_equal(optimizer.slow_variables[0], [1.0, 2.0])
    step()
    np.testing.assert_array_equal(weight, [0.875, 1.875])
    step()
    np.testing.assert_array_equal(optimizer.slow_variables[0], [0.875, 1.875])


@only_torch
def test_backward_loop():
    import torch

    def make_step(model, optimizer):
        def step(x, y):
            model.zero_grad()
            loss_of(model, x, y).backward()
            grads = [variable.value.grad for variable in model.trainable_variables]
            with torch.no_grad():
                optimizer.apply(grads, model.trainable_variables)

        return step

    assert_lookahead(run_loop(make_step), mlp, adam)


def batch_normalized():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(8, use_bias=False),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3, seed=1),
        keras.layers.Dense(1),
    ]
    return keras.Sequential(layers)


def stateless_step(model, optimizer):
    """Return one training step: a function of `(state, x, y)`, with the state of `stateless_variables`."""
    import jax

    def compute(trainable, other, x, y):
        prediction, other = model.stateless_call(trainable, other, x, training=True)
        return keras.ops.mean(keras.ops.square(prediction - y)), other

    def step(state, x, y):
        trainable, other, optimizer_state = state
        grads, other = jax.grad(compute, has_aux=True)(trainable, other, x, y)
        trainable, optimizer_state = optimizer.stateless_apply(optimizer_state, grads, trainable)
        return trainable, other, optimizer_state

    return step


def stateless_variables(model, optimizer):
    return model.trainable_variables, model.non_trainable_variables, optimizer.variables


@only_jax
def test_stateless_loop():
    import jax

    def make_step(model, optimizer):
        optimizer.build(model.trainable_variables)
        function = jax.jit(stateless_step(model, optimizer))
        variables = stateless_variables(model, optimizer)

        def step(x, y):
            for group, new in zip(variables, function(tuple(map(native, variables)), x, y)):
                for variable, value in zip(group, new):
                    variable.assign(value)

        return step

    assert_lookahead(run_loop(make_step), batch_normalized, adam)


@only_jax
def test_donated_buffers_are_freed_and_give_the_eager_result():
    import jax

    if jax.__version_info__ < (0, 5):
        pytest.skip("this JAX does not free them on the CPU")

    x, y = data(88)
    model, optimizer = batch_normalized(), Lookahead(adam(), 3)
    optimizer.build(model.trainable_variables)
    step = stateless_step(model, optimizer)
    donating = jax.jit(step, donate_argnums=0)
    state = tuple([value.copy() for value in native(group)] for group in stateless_variables(model, optimizer))
    eager = tuple(map(native, stateless_variables(model, optimizer)))
    slow = slice(1, 1 + len(model.trainable_variables))
    for batch in range(11):
        rows = slice(8 * batch, 8 * batch + 8)
        old = jax.tree.leaves(state)
        state = donating(state, x[rows], y[rows])
        eager = step(eager, x[rows], y[rows])
        assert all(leaf.is_deleted() for leaf in old)
        # The two settings come between the slow weights and the count.
        assert int(state[2][slow.stop + 2]) == batch + 1
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(eager), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        if batch % 3 == 2:
            assert_same_bits(state[0], state[2][slow])
        else:
            assert differ(state[0], state[2][slow])


@only_jax
@pytest.mark.parametrize("between", ["apply", "sync", "reset_slow_weights", "slow_weights"])
def test_fast_and_slow_weights_share_no_buffer_that_would_be_donated_twice(between):
    import jax

    x, y = data(32)
    model, optimizer = mlp(), Lookahead(adam(), 3)
    for batch in range(4):
        rows = slice(8 * batch, 8 * batch + 8)
        optimizer.minimize(lambda rows=rows: loss_of(model, x[rows], y[rows]), model.trainable_variables)
        if batch == 2 and between == "apply":
            break
    if between == "slow_weights":
        with optimizer.slow_weights():
            pass
    elif between != "apply":
        getattr(optimizer, between)()
    state = tuple(map(native, stateless_variables(model, optimizer)))
    trainable, _, variables = jax.jit(stateless_step(model, optimizer), donate_argnums=0)(state, x[:8], y[:8])
    # `captured`, four slow weights, the two settings, the count.
    assert int(variables[7]) == (4 if between == "apply" else 5)
    assert differ(trainable, variables[1:5])


def quadratic(weights):
    """A loss whose gradient is the weight itself, bit for bit."""
    return sum(keras.ops.sum(0.5 * weight.value * weight.value) for weight in weights)


def two_weights():
    return [keras.Variable([1.0, -2.0, 0.3]), keras.Variable([[0.7]])]


def test_minimize_is_apply_with_hand_made_gradients():
    weights, by_hand = two_weights(), two_weights()
    optimizer, other = Lookahead(adam(), 3), Lookahead(adam(), 3)
    for t in range(1, 8):
        assert int(optimizer.minimize(lambda: quadratic(weights), weights)) == t
        other.apply([keras.ops.copy(value) for value in native(by_hand)], by_hand)
        assert_same_bits(weights, by_hand)
    assert_same_bits(optimizer.variables, other.variables)


def test_minimize_takes_a_callable_var_list_and_updates_nothing_else():
    weights, by_hand = two_weights(), two_weights()
    optimizer, other = Lookahead(adam(), 2), Lookahead(adam(), 2)
    for _ in range(5):
        optimizer.minimize(lambda: quadratic(weights), lambda: weights[:1], name="unused")
        other.apply([keras.ops.copy(by_hand[0].value)], by_hand[:1])
    assert_same_bits(weights, by_hand)


def test_minimize_weighs_a_loss_that_is_an_array_by_grad_loss():
    weight, by_hand = keras.Variable([1.0, -2.0, 0.3]), keras.Variable([1.0, -2.0, 0.3])
    optimizer, other = Lookahead(adam(), 3), Lookahead(adam(), 3)
    factors = np.array([2.0, 0.5, -4.0], "float32")
    for _ in range(7):
        grad_loss = keras.ops.convert_to_tensor(factors)
        optimizer.minimize(lambda: 0.5 * weight.value * weight.value, [weight], grad_loss=grad_loss)
        other.apply([keras.ops.convert_to_tensor(factors) * by_hand.value], [by_hand])
        assert_same_bits([weight], [by_hand])


def test_minimize_scales_the_loss_as_the_inner_optimizer_does():
    weights, expected = two_weights(), two_weights()
    optimizer = Lookahead(keras.optimizers.SGD(0.125, loss_scale_factor=8.0), 3)
    other = Lookahead(keras.optimizers.SGD(0.125), 3)
    for _ in range(7):
        optimizer.minimize(lambda: quadratic(weights), weights)
        other.minimize(lambda: quadratic(expected), expected)
    assert_same_bits(weights, expected)


def test_minimize_leaves_alone_a_weight_that_the_loss_does_not_use():
    weights = two_weights()
    optimizer = Lookahead(adam(), 2)
    # JAX gives zeros for gradients there.
    warned = contextlib.nullcontext() if BACKEND == "jax" else pytest.warns(UserWarning, match="Gradients do not exist")
    with warned:
        optimizer.minimize(lambda: quadratic(weights[:1]), weights)
    assert_same_bits(weights[1:], two_weights()[1:])
    assert differ(weights[:1], two_weights()[:1])


@pytest.mark.parametrize("make_model", [mlp, batch_normalized])
def test_minimize_of_a_model_in_a_loop(make_model):
    def run(model, optimizer, resets):
        model.compile(optimizer, loss="mse")
        recorder = Recorder(resets)
        recorder.set_model(model)
        x, y = map(keras.ops.convert_to_tensor, data(56))
        # The bare optimizer has no `minimize`. A wrapper that never synchronises stands for it.
        wrapper = optimizer if isinstance(optimizer, Lookahead) else Lookahead(optimizer, 0)
        for batch in range(7):
            rows = slice(8 * batch, 8 * batch + 8)
            wrapper.minimize(lambda rows=rows: loss_of(model, x[rows], y[rows]), model.trainable_variables)
            recorder.on_train_batch_end(batch)
        return recorder

    model, _, _ = assert_lookahead(run, make_model, adam)
    assert make_model is mlp or differ(model.non_trainable_variables, make_model().non_trainable_variables)


@only_jax
def test_minimize_updates_batch_statistics_and_random_seeds_as_a_stateless_call_does():
    x, y = data(8)
    model, expected = batch_normalized(), batch_normalized()
    optimizer, other = Lookahead(adam()), Lookahead(adam())
    optimizer.minimize(lambda: loss_of(model, x, y), model.trainable_variables)
    other.build(expected.trainable_variables)
    variables = stateless_variables(expected, other)
    state = stateless_step(expected, other)(tuple(map(native, variables)), x, y)
    assert len(state[1]) == 3
    for before, after in zip(values(expected.non_trainable_variables), state[1]):
        assert np.any(before != np.asarray(after))
    for group, new in zip(stateless_variables(model, optimizer), state):
        for variable, value in zip(group, new):
            np.testing.assert_allclose(variable.numpy(), value, rtol=1e-6, atol=1e-7)


def test_weight_without_gradient_in_a_step_takes_part_in_the_sync():
    weights = two_weights()
    optimizer = Lookahead(keras.optimizers.SGD(0.125, momentum=0.5), 3)
    oracle = reference.Lookahead(reference.SGD(0.125, momentum=0.5), 3, 0.5).start(values(weights))
    for t in range(1, 8):
        grads = [np.array([1.0, 2.0, -1.0], "float32") * t, np.array([[0.5]], "float32")]
        if t % 3 == 0:
            grads[1] = None
        oracle.apply(grads)
        tensors = [gradient if gradient is None else keras.ops.convert_to_tensor(gradient) for gradient in grads]
        if t % 3 == 0:
            with pytest.warns(UserWarning, match="Gradients do not exist"):
                optimizer.apply(tensors, weights)
            assert_same_bits(weights, optimizer.slow_variables)
        else:
            optimizer.apply(tensors, weights)
        for actual, expected in zip(weights + optimizer.slow_variables, oracle.weights + oracle.slow, strict=True):
            np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


def test_layer_frozen_in_mid_cycle_does_not_move_at_a_sync():
    model = mlp()
    optimizer = Lookahead(keras.optimizers.SGD(0.125), 3)
    optimizer.build(model.trainable_variables)

    def step():
        grads = [keras.ops.ones(variable.shape) for variable in model.trainable_variables]
        optimizer.apply(grads, model.trainable_variables)

    step()
    first, last = model.layers
    first.trainable = False
    frozen = values(first.weights)
    assert differ(frozen, optimizer.slow_variables[:2])
    for _ in range(5):
        step()
    assert_same_bits(first.weights, frozen)
    # Otherwise the first sync after it is trained again would pull it back.
    assert_same_bits(optimizer.slow_variables[:2], frozen)
    assert_same_bits(last.weights, optimizer.slow_variables[2:])
    assert int(optimizer.iterations) == 6


def test_weights_loaded_between_the_first_micro_steps_are_captured():
    optimizer = Lookahead(keras.optimizers.SGD(0.125, gradient_accumulation_steps=2), 2)
    weight = keras.Variable([1.0])
    optimizer.apply([keras.ops.ones(1)], [weight])
    weight.assign([3.0])
    fast, slow = [], []
    for _ in range(4):
        optimizer.apply([keras.ops.ones(1)], [weight])
        fast.append(float(weight.numpy()[0]))
        slow.append(float(optimizer.slow_variables[0].numpy()[0]))
    assert fast == [2.875, 2.875, 2.875, 2.875]
    assert slow == [3.0, 3.0, 2.875, 2.875]
    assert int(optimizer.iterations) == 2


def test_layer_frozen_at_the_first_update_and_trained_later_starts_from_its_own_weights():
    kernel, bias = (keras.Variable(np.full(3, value, "float32")) for value in (1.0, 2.0))
    optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=3, slow_step_size=0.5)
    optimizer.build([kernel, bias])
    kernel.trainable = False
    for _ in range(2):
        optimizer.apply([keras.ops.ones(3)], [bias])
    kernel.trainable = True
    optimizer.apply([keras.ops.zeros(3), keras.ops.zeros(3)], [kernel, bias])
    np.testing.assert_array_equal(values([kernel])[0], np.ones(3))
    np.testing.assert_allclose(values([bias])[0], np.full(3, 1.9), rtol=1e-6)


class Clip(keras.constraints.Constraint):
    def __call__(self, value):
        return keras.ops.clip(value, -0.3, 0.3)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras has no stateless_apply on TensorFlow")
def test_stateless_apply_does_what_apply_does_and_leaves_the_variables_alone():
    weights = [keras.Variable(np.full(3, 0.5, "float32")), keras.Variable(np.full((2, 2), -1.0, "float32"))]
    optimizer = Lookahead(keras.optimizers.Adam(0.1), sync_period=2)
    optimizer.build(weights)
    gradients = [keras.ops.ones(3), keras.ops.full((2, 2), -2.0)]
    before = [keras.ops.copy(variable.value) for variable in [*weights, *optimizer.variables]]
    values, state = before[:2], before[2:]
    for _ in range(5):
        # Copies, as on PyTorch a stateless step writes into the values that it is given.
        values, state = optimizer.stateless_apply(
            [keras.ops.copy(one) for one in state], gradients, [keras.ops.copy(one) for one in values]
        )
    assert_same_bits([*weights, *optimizer.variables], before)
    for _ in range(5):
        optimizer.apply(gradients, weights)
    assert_same_bits([*values, *state], [*weights, *optimizer.variables])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras has no stateless_apply on TensorFlow")
def test_stateless_apply_holds_a_constraint_in_both_copies():
    weight = keras.Variable(np.full(3, 0.5, "float32"))
    weight.constraint = Clip()
    optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=1, slow_step_size=0.5)
    optimizer.build([weight])
    state = [keras.ops.copy(variable.value) for variable in optimizer.variables]
    weights, state = optimizer.stateless_apply(state, [keras.ops.ones(3)], [keras.ops.copy(weight.value)])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(weights[0]), np.full(3, 0.3), rtol=1e-6)
    assert_same_bits([weights[0]], [state[1]])


class ClipInNumPy(keras.constraints.Constraint):
    def __call__(self, value):
        return np.clip(keras.ops.convert_to_numpy(value), -0.3, 0.3)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="a constraint of NumPy is none in a graph")
def test_constraint_holds_for_its_own_weight_of_several_and_may_return_an_array_of_numpy():
    weights = [
        keras.Variable(np.full(size, 0.5, dtype)) for size, dtype in ((3, "float32"), (2, "float16"), (4, "float32"))
    ]
    weights[2].constraint = ClipInNumPy()
    optimizer = Lookahead(keras.optimizers.SGD(0.0), sync_period=1, slow_step_size=0.5)
    optimizer.apply([keras.ops.ones(weight.shape, weight.dtype) for weight in weights], weights)
    expected = [np.full(3, 0.5, "float32"), np.full(2, 0.5, "float16"), np.full(4, 0.3, "float32")]
    for weight, slow, value in zip(weights, optimizer.slow_variables, expected):
        np.testing.assert_array_equal(values([weight])[0], value)
        np.testing.assert_array_equal(values([slow])[0], value)


@only_torch
def test_weights_larger_than_the_cache_are_synchronised_in_parts(monkeypatch):
    import torch

    from lookahead_optim import _pieces_torch

    monkeypatch.setattr(_pieces_torch, "_BYTES_PER_THREAD", 2**13 // torch.get_num_threads())
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=shape).astype("float32") for shape in ((70, 101), (3,), (4099,), (2, 2))]
    weights = [keras.Variable(start) for start in starts]
    weights[2].constraint = Clip()
    gradients = [rng.normal(size=start.shape).astype("float32") for start in starts]
    optimizer = Lookahead(keras.optimizers.SGD(1.0), sync_period=1, slow_step_size=0.25)
    optimizer.apply(list(map(torch.as_tensor, gradients)), weights)
    # Products with 0.25 are exact.
    expected = [start + np.float32(0.25) * ((start - gradient) - start) for start, gradient in zip(starts, gradients)]
    clipped = np.clip(starts[2] - gradients[2], -0.3, 0.3)
    expected[2] = np.clip(starts[2] + np.float32(0.25) * (clipped - starts[2]), -0.3, 0.3)
    assert_same_bits(weights, expected)
    assert_same_bits(optimizer.slow_variables, expected)


@only_tensorflow
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_slow_step_in_place_has_the_bits_of_its_formula(mode, dtype):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    start, gradient = rng.normal(size=(2, 500)).astype(dtype)
    # A weight that stays at -0 becomes 0, as the sum of -0 and 0 is.
    start[:2], gradient[:2] = -0.0, 0.0
    weight = keras.Variable(start, dtype=dtype)
    optimizer = Lookahead(keras.optimizers.SGD(1.0), sync_period=1, slow_step_size=0.3)
    optimizer.build([weight])

    def apply():
        optimizer.apply([tf.constant(gradient)], [weight])

    (tf.function(apply) if mode == "graph" else apply)()
    expected = start + np.array(0.3, dtype) * ((start - gradient) - start)
    assert_same_bits([weight], [expected])
    assert_same_bits(optimizer.slow_variables, [expected])


@only_tensorflow
def test_eager_steps_list_no_weights_before_a_sync_is_due(monkeypatch):
    weight = keras.Variable(np.ones(3, "float32"))
    optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=3)
    listed = []
    slow_weights = optimizer._slow_weights
    pairs = slow_weights.pairs
    monkeypatch.setattr(slow_weights, "pairs", lambda: listed.append(int(optimizer.iterations)) or pairs())
    for _ in range(7):
        optimizer.apply([keras.ops.ones(3)], [weight])
    # The first capture.
    assert sorted(set(listed)) == [0, 3, 6]


def test_a_whole_slow_step_does_not_overflow():
    weight = keras.Variable(np.full(2, 3e38, "float32"))
    optimizer = Lookahead(keras.optimizers.SGD(1.0), sync_period=2, slow_step_size=1)
    for _ in range(2):
        optimizer.apply([keras.ops.full((2,), 3e38)], [weight])
    np.testing.assert_array_equal(values([weight])[0], np.full(2, -3e38, "float32"))
    assert_same_bits(optimizer.slow_variables, [weight])
