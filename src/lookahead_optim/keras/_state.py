"""Values of optimizer variables: as arrays and tensors, and checked before they are assigned."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

__all__ = ["assign", "checked", "to_numpy", "to_tensor"]


def to_numpy(variable: keras.Variable) -> np.ndarray:
    """Return the value of a variable as a NumPy array."""
    # In the scope of a strategy, a variable of several replicas can be converted only as a tensor.
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def to_tensor(value: Any, dtype: Any = None) -> Any:
    """Return the value of a variable or tensor as a tensor, cast to `dtype` if it is given."""
    # `convert_to_tensor` ignores its dtype for a variable, on PyTorch up to Keras 3.10 at least.
    tensor = keras.ops.convert_to_tensor(value)
    return tensor if dtype is None else keras.ops.cast(tensor, keras.backend.standardize_dtype(dtype))


def assign(variables: Sequence[keras.Variable], values: Iterable[Any], caller: str) -> None:
    """Assign all values, or none if one value does not fit."""
    for variable, array in zip(variables, checked(variables, values, caller)):
        variable.assign(array)


def checked(variables: Sequence[keras.Variable], values: Iterable[Any], caller: str) -> list[np.ndarray]:
    """Return the values as arrays, or raise `ValueError` if a value does not fit its variable."""
    arrays = list(map(_to_array, values))
    if len(arrays) != len(variables):
        raise ValueError(
            f"`{caller}` needs {len(variables)} arrays, one per optimizer variable. Received: {len(arrays)}"
        )
    for variable, array in zip(variables, arrays):
        if array.shape != tuple(variable.shape):
            raise ValueError(
                f"`{caller}` needs an array of shape {tuple(variable.shape)} for the optimizer variable "
                f"{variable.path!r}. Received: shape {array.shape}"
            )
        if not _is_numeric(array):
            raise ValueError(
                f"`{caller}` needs an array of numbers for the optimizer variable {variable.path!r}. "
                f"Received: dtype {array.dtype}"
            )
        dtype = keras.backend.standardize_dtype(variable.dtype)
        # All integers in an optimizer's state are counts.
        if "int" in dtype and not np.all((array >= 0) & (array <= np.iinfo(dtype).max) & (array == np.floor(array))):
            raise ValueError(
                f"`{caller}` needs an integer >= 0 for the optimizer variable {variable.path!r}, a count. "
                f"Received: {array}"
            )
    return arrays


def _to_array(value: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)


def _is_numeric(array: np.ndarray) -> bool:
    if array.dtype.kind in "SUOMmc":
        return False
    try:
        array[:0].astype("float64") if array.ndim else array.astype("float64")
    except (TypeError, ValueError):
        return False
    return True
