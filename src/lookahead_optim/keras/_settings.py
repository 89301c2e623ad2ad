"""The settings of a wrapper, which also take effect in compiled steps."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from lookahead_optim._checks import check_slow_step_size
from lookahead_optim.keras._backend import backend

__all__ = ["Schedule", "Setting", "check_slow_dtype", "check_slow_dtype_of", "make_step_size"]


# The dtypes that hold all values of a dtype. Keras' `result_type` cannot be used: on PyTorch it gives float64 for
# float32.
_HELD_BY = {
    "float16": ("float16", "float32", "float64"),
    "bfloat16": ("bfloat16", "float32", "float64"),
    "float32": ("float32", "float64"),
    "float64": ("float64",),
}


class Setting:
    """A number that may change between two steps.

    In a compiled step a Python number is a constant. So the setting also has a variable, which a compiled step reads.
    The variable is a part of the optimizer's state, like Keras' learning rate, but not of files: a file has the config.

    The variable may round the number, or be too small for it. So the Python number is valid until the variable is
    changed.
    """

    def __init__(self, number: Any) -> None:
        self._number = number
        self.variable: keras.Variable | None = None

    def __str__(self) -> str:
        return str(self.number)

    def config(self) -> Any:
        """Return the number for a config."""
        return self.number

    def create_variable(self, wrapper: keras.optimizers.Optimizer, name: str, dtype: str) -> None:
        """Make the variable, as a variable of the wrapper."""

        def initial(shape: tuple[int, ...], dtype: str) -> Any:
            return keras.ops.convert_to_tensor(_fitted(self._number, dtype), dtype)

        self.variable = wrapper.add_variable((), initial, dtype, aggregation="only_first_replica", name=name)

    @property
    def number(self) -> Any:
        """The number. In a compiled step it is the last number that Python knows."""
        if self.variable is None:
            return self._number
        found = backend.number_of(self.variable)
        return self._number if found is None or found == _fitted(self._number, self.variable.dtype) else found

    @number.setter
    def number(self, number: Any) -> None:
        self._number = number
        if self.variable is not None:
            self.variable.assign(_fitted(number, self.variable.dtype))

    def keep_what_was_set(self) -> None:
        """Undo a load of the variable: a `LossScaleOptimizer` around the wrapper loads all variables."""
        self.number = self._number

    def take_what_was_loaded(self) -> None:
        """Keep the number that was loaded into the variable."""
        self.number = self.number

    def in_step(self) -> Any:
        """Return the number, or in a compiled step a scalar tensor."""
        traced = None if self.variable is None else backend.traced(self.variable)
        return self.number if traced is None else traced

    def at(self, syncs: Any) -> Any:
        """Return the same as `in_step`: the number does not depend on the number of syncs."""
        return self.in_step()


class Schedule:
    """A number that depends on the number of syncs so far. It has no variable, as a compiled step computes it."""

    variable = None

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __str__(self) -> str:
        return str(self.function)

    def config(self) -> Any:
        """Return the schedule, serialized for a config."""
        return keras.saving.serialize_keras_object(self.function)

    def at(self, syncs: Any) -> Any:
        """Return the number after `syncs` syncs, or in a compiled step a scalar tensor."""
        return backend.float_of(self.function(keras.ops.convert_to_tensor(syncs, "int32")))


def make_step_size(slow_step_size: Any) -> Setting | Schedule:
    """Return the `Setting` or `Schedule` for a slow step size, or raise `TypeError` or `ValueError`."""
    if not callable(slow_step_size):
        return Setting(check_slow_step_size(slow_step_size))
    schedule = Schedule(slow_step_size)
    message = (
        "`slow_step_size` must be a number >= 0, or a schedule or function of the number of syncs that returns one. "
        f"Received: slow_step_size={slow_step_size!r}, "
    )
    if isinstance(slow_step_size, type):
        raise TypeError(f"{message}a class: make an object of it")
    try:
        first = schedule.at(0)
    except Exception as error:
        raise TypeError(f"{message}which fails for 0 syncs: {type(error).__name__}: {error!s:.200}") from error
    if isinstance(first, float) and not 0 <= first < float("inf"):
        raise ValueError(f"{message}which returns {first} for 0 syncs")
    return schedule


def check_slow_dtype(slow_dtype: Any) -> str | None:
    """Return the name of a floating point dtype, or `None`, or raise `TypeError` or `ValueError`."""
    if slow_dtype is None:
        return None
    message = (
        "`slow_dtype` must be a dtype of real numbers, such as 'float32', or None for the dtype of each weight. "
        f"Received: slow_dtype={slow_dtype!r} of type {type(slow_dtype).__name__}"
    )
    try:
        name = keras.backend.standardize_dtype(slow_dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(message) from error
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(message)
    with warnings.catch_warnings():
        # JAX warns if it makes a float32 in place of a float64.
        warnings.simplefilter("ignore")
        has_dtype = keras.backend.standardize_dtype(keras.ops.convert_to_tensor(0.0, name).dtype) == name
    if not has_dtype:
        raise ValueError(
            f"`slow_dtype` must be a dtype that the backend has. JAX has 'float64' only with `jax_enable_x64`. "
            f"Received: slow_dtype={slow_dtype!r}"
        )
    return name


def check_slow_dtype_of(slow_dtype: str | None, weights: list[Any]) -> None:
    """Raise `ValueError` if slow weights of a dtype could not hold all values of their weights."""
    for weight in weights:
        dtype = keras.backend.standardize_dtype(weight.dtype)
        if slow_dtype is not None and slow_dtype not in _HELD_BY.get(dtype, (slow_dtype,)):
            raise ValueError(
                "`slow_dtype` must hold all values of the weights' dtypes, or the slow weights would lose what the "
                "fast ones have. Give a dtype at least as wide, or None. "
                f"Received: slow_dtype={slow_dtype!r} for the weight {weight.path!r} of {dtype!r}"
            )


def _fitted(number: Any, dtype: str) -> np.generic:
    """Return a number in a dtype, or the dtype's largest number if the number is larger."""
    type_ = np.dtype(keras.backend.standardize_dtype(dtype))
    largest = (np.iinfo if type_.kind == "i" else np.finfo)(type_).max
    return type_.type(min(number, largest))
