"""Bad settings of the outer step: refused before anything is made or changed."""

import contextlib
import warnings

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, values


@pytest.mark.parametrize(
    ("dtype", "slow_dtype"),
    [
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
        pytest.param("float64", "float32", marks=pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64")),
    ],
)
def test_a_slow_dtype_that_does_not_hold_the_values_of_a_weight_is_refused_before_anything_is_made(dtype, slow_dtype):
    wide_enough = keras.Variable([1.0], dtype=slow_dtype)
    weight = keras.Variable([2.0], dtype=dtype, name="narrowed")
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = Lookahead(inner, slow_momentum=0.5, slow_dtype=slow_dtype)
    before = len(optimizer.variables)
    message = rf"`slow_dtype` must hold all values.*slow_dtype='{slow_dtype}' for the weight 'narrowed' of '{dtype}'"
    gradients = [keras.ops.ones(1, slow_dtype), keras.ops.ones(1, dtype)]
    for build in (
        lambda: optimizer.build([wide_enough, weight]),
        lambda: optimizer.apply(gradients, [wide_enough, weight]),
    ):
        with pytest.raises(ValueError, match=message):
            build()
        assert not optimizer.built
        assert not inner.built
        assert len(optimizer.variables) == before
        assert values([weight])[0] == 2
    # With other weights nothing remains of the error.
    optimizer.apply([keras.ops.ones(1, slow_dtype)], [wide_enough])
    assert int(optimizer.iterations) == 1


@pytest.mark.skipif(BACKEND != "jax", reason="the others have float64")
def test_float64_on_jax_is_refused_unless_it_is_switched_on():
    import jax

    message = r"must be a dtype that the backend has.*`jax_enable_x64`.*Received: slow_dtype='float64'"
    with pytest.raises(ValueError, match=message):
        Lookahead("sgd", slow_dtype="float64")
    jax.config.update("jax_enable_x64", True)
    try:
        assert Lookahead("sgd", slow_dtype="float64").slow_dtype == "float64"
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("slow_dtype", ["float32", np.float32, np.dtype("float32")])
def test_a_dtype_may_be_given_as_numpy_does_and_has_its_name_in_the_config(slow_dtype):
    optimizer = Lookahead("sgd", slow_dtype=slow_dtype)
    assert optimizer.slow_dtype == optimizer.get_config()["slow_dtype"] == "float32"
    weight = keras.Variable([1.0], dtype="bfloat16")
    optimizer.build([weight])
    assert keras.backend.standardize_dtype(optimizer.slow_variables[0].dtype) == "float32"


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_float64_holds_all(dtype):
    weight = keras.Variable([1.0], dtype=dtype)
    optimizer = Lookahead(keras.optimizers.SGD(0.25), 1, 0.3, slow_momentum=0.5, slow_dtype="float64")
    optimizer.apply([keras.ops.ones(1, dtype)], [weight])
    slow, b = values([optimizer.get_slot(weight, name) for name in optimizer.get_slot_names()])
    np.testing.assert_allclose(slow, [1 - 0.3 * 1.5 * 0.25], rtol=1e-12)
    assert (slow.dtype, b.dtype, b[0]) == (np.dtype("float64"), np.dtype("float64"), 0.25)
    assert values([weight])[0] == slow.astype(values([weight])[0].dtype)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch")
def test_a_dtype_of_pytorch_may_be_given():
    import torch

    assert Lookahead("sgd", slow_dtype=torch.float32).slow_dtype == "float32"


@pytest.mark.parametrize(
    ("name", "value"), [("slow_momentum", 0.5), ("slow_nesterov", False), ("slow_dtype", "float32")]
)
def test_settings_on_which_state_and_compiled_steps_depend_cannot_be_assigned(name, value):
    optimizer = Lookahead("sgd", slow_momentum=0.9, slow_dtype="float32")
    before = optimizer.get_config()
    with pytest.raises(AttributeError, match=f"`{name}` cannot be set.*Make a new `Lookahead`.*Received: {name}="):
        setattr(optimizer, name, value)
    assert optimizer.get_config() == before
    assert not hasattr(optimizer.inner_optimizer, name)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("slow_momentum", 1.0, ValueError), ("slow_nesterov", 1, TypeError), ("slow_dtype", "int8", TypeError)],
)
def test_so_are_those_of_a_config(name, value, error):
    config = Lookahead("sgd", slow_momentum=0.9).get_config() | {name: value}
    with pytest.raises(error, match=rf"`{name}` must be"):
        Lookahead.from_config(config)


def test_settings_of_the_outer_step_are_keywords():
    with pytest.raises(TypeError):
        Lookahead("sgd", 6, 0.5, "Lookahead", 0.9)


@pytest.mark.parametrize(("slow_momentum", "warns"), [(0.0, True), (0.9, False)])
def test_only_without_momentum_a_step_size_above_1_warns(slow_momentum, warns):
    caught = pytest.warns(UserWarning, match="above 1") if warns else contextlib.nullcontext()
    with caught:
        optimizer = Lookahead("sgd", 5, 1.5, slow_momentum=slow_momentum)
    with pytest.warns(UserWarning, match="above 1") if warns else contextlib.nullcontext():
        optimizer.slow_step_size = 2.0
    assert optimizer.slow_step_size == 2.0


def test_with_momentum_an_early_sync_does_not_warn():
    optimizer, weight = Lookahead(keras.optimizers.SGD(0.125), 6, 0.5, slow_momentum=0.5), keras.Variable([0.0])
    optimizer.apply([keras.ops.ones(1)], [weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.sync()
    # 0.5 (1 + 0.5) of the way.
    assert_same_bits(values([weight]), [np.float32([-0.09375])])
