"""The private parts of Keras 3 that the package uses, so that a release that changes a part is named here."""

import inspect

import keras
import numpy as np
import pytest

from tests.test_keras.helpers import BACKEND

# Methods and properties of every optimizer. Keras uses the same of a wrapper.
METHODS = {
    # No public method removes a variable from an optimizer.
    "_untrack_variable": ("variable",),
    # No public method tells for which variables an optimizer was built.
    "_var_key": ("variable",),
    "_get_variable_index": ("variable",),
    "_check_variables_are_known": ("variables",),
}
ATTRIBUTES = [
    "_variables",
    "_trainable_variables",
    "_trainable_variables_indices",
    # With gradient accumulation the public `iterations` is a new tensor, the count divided.
    "_iterations",
    # Keras' callbacks and constructor read and set it, on a wrapper too.
    "_learning_rate",
    # `SwapEMAWeights` takes the averages by this name. There is no public name.
    "_model_variables_moving_average",
]


def message(name):
    return f"Keras {keras.__version__} has no `{name}` any more, which `lookahead_optim.keras` uses."


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_an_optimizer_take_what_they_are_given(name):
    method = getattr(keras.optimizers.Optimizer, name, None)
    assert method is not None, message(f"Optimizer.{name}")
    found = tuple(inspect.signature(method).parameters)[1 : 1 + len(METHODS[name])]
    assert found == METHODS[name], f"{message(f'Optimizer.{name}({METHODS[name]})')} It takes {found}."


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_optimizer_that_is_built_has_the_attributes(name):
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    optimizer.build([variable])
    assert hasattr(optimizer, name), message(f"Optimizer.{name}")


def test_keras_own_methods_of_a_step_are_told_by_their_module():
    optimizer = keras.optimizers.Adam()
    for method in (optimizer.apply, optimizer.apply_gradients):
        assert method.__module__.startswith("keras."), f"Keras {keras.__version__}: {method} is of {method.__module__}"


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch")
def test_what_the_pytorch_backend_uses_is_there():
    import torch

    try:
        from keras.src.backend.common.stateless_scope import in_stateless_scope
    except ImportError:
        pytest.fail(message("keras.src.backend.common.stateless_scope.in_stateless_scope"))
    assert not in_stateless_scope()
    variable = keras.Variable(np.ones(2, "float32"))
    with keras.StatelessScope():
        assert in_stateless_scope()
    assert variable._value is variable.value, message("Variable._value")
    version = variable.value._version
    variable.assign(variable + 1)
    assert variable.value._version == version + 1, (
        f"Keras {keras.__version__} on PyTorch {torch.__version__} does not change a tensor once in an assignment, as "
        "`lookahead_optim.keras` needs to follow the step count."
    )


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow")
@pytest.mark.parametrize("name", ["_track_trackable", "_lookup_dependency"])
def test_what_the_tensorflow_backend_uses_is_there(name):
    assert hasattr(keras.optimizers.Optimizer, name), message(f"Optimizer.{name}")
