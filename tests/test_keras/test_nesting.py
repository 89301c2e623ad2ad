"""Optimizers around Lookahead and inside it."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests import reference
from tests.test_keras.helpers import BACKEND, assert_lookahead_in_fit, data, mlp, train, values

not_on_tensorflow = pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has no stateless_apply")
not_on_jax = pytest.mark.skipif(BACKEND == "jax", reason="on JAX a LossScaleOptimizer has stateless_apply alone")


INF = float("inf")
# Loss scales as `initial_scale=4, dynamic_growth_steps=2` gives them, and the gradient before scaling.
SCALED_STEPS = [(4, INF), (2, 1), (2, 1), (4, INF), (2, 1), (2, INF), (1, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize(
    "stateless", [pytest.param(False, marks=not_on_jax), pytest.param(True, marks=not_on_tensorflow)]
)
def test_steps_skipped_by_a_loss_scale_optimizer_do_not_count(stateless):
    lookahead = Lookahead(keras.optimizers.SGD(0.125), 3, 0.5)
    optimizer = keras.optimizers.LossScaleOptimizer(lookahead, initial_scale=4.0, dynamic_growth_steps=2)
    weight = keras.Variable([1.0])
    optimizer.build([weight])
    oracle = reference.Lookahead(reference.SGD(0.125), 3, 0.5).start([np.ones(1)])
    t = 0
    for scale, gradient in SCALED_STEPS:
        assert float(optimizer.dynamic_scale) == scale
        gradients = [keras.ops.convert_to_tensor(np.array([gradient * scale], "float32"))]
        if stateless:
            trainable, state = optimizer.stateless_apply(
                [one.value for one in optimizer.variables], gradients, [weight.value]
            )
            for variable, value in zip([weight, *optimizer.variables], [*trainable, *state], strict=True):
                variable.assign(value)
        else:
            optimizer.apply(gradients, [weight])
        if gradient != INF:
            oracle.apply([np.ones(1)])
            t += 1
        assert int(lookahead.iterations) == int(optimizer.iterations) == t
        np.testing.assert_array_equal(weight.numpy(), oracle.weights[0])
        if t:
            np.testing.assert_array_equal(lookahead.slow_variables[0].numpy(), oracle.slow[0])
    assert t == 6


def by_kind(**kwargs):
    default = keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(default, {".*kernel": keras.optimizers.Adam(0.05, **kwargs)})
    )


has_multi_optimizer = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
)


@has_multi_optimizer
def test_around_a_multi_optimizer():
    model, _, _ = assert_lookahead_in_fit(mlp, by_kind, *data(56))
    assert [len(one.variables) for one in model.optimizer.inner_optimizer.optimizers] == [6, 4]


@has_multi_optimizer
def test_around_a_multi_optimizer_that_accumulates_gradients():
    counts = [step // 2 for step in range(1, 15)]
    assert_lookahead_in_fit(mlp, lambda: by_kind(gradient_accumulation_steps=2), *data(14 * 8), counts=counts)


@has_multi_optimizer
def test_multi_optimizer_with_different_accumulation_is_refused():
    accumulating = keras.optimizers.Adam(0.05, gradient_accumulation_steps=2)
    inner = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*kernel": accumulating})
    )
    with pytest.raises(ValueError, match=r"same `gradient_accumulation_steps`. Received: \[1, 2\]"):
        Lookahead(inner).build(mlp().trainable_variables)


def half_square(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_pred)) / 2


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=["default", "eager"])
def test_around_another_lookahead(mode):
    keras.utils.set_random_seed(0)
    # The output is the only weight for the input 1, so the gradient of the loss is the weight.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    optimizer = Lookahead(Lookahead(keras.optimizers.SGD(0.1, momentum=0.5), 2, 0.5), 3, 0.8)
    ones = np.ones((13, 1), "float32")
    record = train(model, optimizer, ones, ones, batch_size=1, loss=half_square, **mode)
    oracle = reference.Lookahead(reference.Lookahead(reference.SGD(0.1, momentum=0.5), 2, 0.5), 3, 0.8)
    oracle.start([np.ones(1)])
    for fast, slow in zip(record.fast, record.slow, strict=True):
        oracle.apply([oracle.weights[0]])
        np.testing.assert_allclose(np.ravel(fast), oracle.weights[0], rtol=1e-6)
        np.testing.assert_allclose(np.ravel(slow), oracle.slow[0], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(values(optimizer.inner_optimizer.slow_variables)), oracle.inner.slow[0], 1e-6)
    assert int(optimizer.iterations) == int(optimizer.inner_optimizer.iterations) == 13
