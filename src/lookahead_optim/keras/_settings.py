"""The settings of a wrapper, which take effect in steps that are compiled, too."""

from typing import Any

import keras
import numpy as np

from lookahead_optim.keras._backend import backend

__all__ = ["Setting"]


class Setting:
    """A number that may be changed between two steps.

    A number of Python's is a constant of a step that is compiled. So there is a variable beside it, which such a step
    reads. It is a part of the optimizer's state, as Keras' learning rate is, but not of files: those have the config.

    The variable may round the number, or be too short for it. What Python knows stands until the variable is changed.
    """

    def __init__(self, number: Any) -> None:
        self._number = number
        self.variable: keras.Variable | None = None

    def create_variable(self, wrapper: keras.optimizers.Optimizer, name: str, dtype: str) -> None:
        """Make the variable, as one of the wrapper's."""

        def initial(shape: tuple[int, ...], dtype: str) -> Any:
            return keras.ops.convert_to_tensor(_fitted(self._number, dtype), dtype)

        self.variable = wrapper.add_variable((), initial, dtype, aggregation="only_first_replica", name=name)

    @property
    def number(self) -> Any:
        """The number. In a step that is compiled it is the last that Python knows."""
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
        """Forget what was loaded into the variable, as a `LossScaleOptimizer` around loads all variables."""
        self.number = self._number

    def take_what_was_loaded(self) -> None:
        """Keep what was loaded into the variable."""
        self.number = self.number

    def in_step(self) -> Any:
        """Return the number, or in a step that is compiled a scalar tensor."""
        traced = None if self.variable is None else backend.traced(self.variable)
        return self.number if traced is None else traced


def _fitted(number: Any, dtype: str) -> np.generic:
    """Return a number in a dtype, or the largest that it has."""
    type_ = np.dtype(keras.backend.standardize_dtype(dtype))
    largest = (np.iinfo if type_.kind == "i" else np.finfo)(type_).max
    return type_.type(min(number, largest))
