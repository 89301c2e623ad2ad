"""What is saved of a wrapper and how it is loaded: arrays by position, and files of Keras by name.

| saved as | what |
|---|---|
| `captured` | whether slow weights were captured, and with momentum whether no update followed the last sync |
| `slow_0`, `slow_1`, ... | the slow weights |
| `slow_momentum_0`, ... | the slow momentum, if there is any |
| `fast_0`, ..., `fast_count` | while the slow weights are in the model: the fast weights, and their number of updates |

Settings are saved in the config, and in arrays.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from lookahead_optim._checks import check_slow_step_size
from lookahead_optim._evaluation import Block
from lookahead_optim.keras._settings import Schedule, Setting
from lookahead_optim.keras._slow_weights import SlowWeights
from lookahead_optim.keras._state import assign, checked, to_numpy

__all__ = ["Saving"]


class Saving:
    """The methods of a wrapper that save and load its state."""

    built: bool
    name: str
    sync_period: int
    inner_optimizer: Any
    _variables: list[Any]
    _captured: Any
    _block: Block
    _slow_weights: SlowWeights
    _sync_period: Setting
    _slow_step_size: Setting | Schedule
    _count: Callable[[], int]
    _check_built: Callable[[str], None]
    _end_block_of_callback: Callable[[str], None]
    _pairs_to_swap: Callable[[], Sequence[Any]]

    @property
    def variables(self) -> list[Any]:
        """All state, a list of `keras.Variable`.

        The order is: whether the slow weights were captured, the slow weights, the slow momentum if there is any,
        `sync_period`, `slow_step_size` unless it is a schedule, and the inner optimizer's variables.
        """
        return self._variables + self.inner_optimizer.variables

    @property
    def weights(self) -> list[Any]:
        """The same as `variables`. Keras 2 used this name."""
        return self.variables

    def _settings(self) -> list[Setting]:
        """Return the settings that have variables."""
        return [one for one in (self._sync_period, self._slow_step_size) if isinstance(one, Setting)]

    def get_weights(self) -> list[np.ndarray]:
        """Return the values of `variables` as a list of NumPy arrays."""
        return [to_numpy(variable) for variable in self.variables]

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Set the values of `variables`.

        Args:
            weights: List of arrays, as from `get_weights`.

        Raises:
            ValueError: if the optimizer is not built, if the number of arrays or a shape is wrong, if an array has no
                numbers, or if a step count or setting is out of range. Nothing is changed then.
            RuntimeError: inside a `slow_weights()` block.
        """
        self._check_built("set_weights(weights)")
        self._end_block_of_callback("set_weights(weights)")
        arrays = checked(self.variables, weights, "set_weights(weights)")
        own = dict(zip(map(id, self._variables), arrays))
        if self._slow_step_size.variable is not None:
            check_slow_step_size(float(own[id(self._slow_step_size.variable)]))
        self.inner_optimizer.set_weights(arrays[len(own) :])
        for variable in self._variables:
            variable.assign(own[id(variable)])
        self._block.loaded = {}
        for setting in self._settings():
            setting.take_what_was_loaded()

    def _own_variables(self) -> dict[str, Any]:
        # Variables are saved by name. By number, a bare optimizer's momentum of the same count and shapes would load as
        # slow weights. A wrapper that is switched off saves no variables, so its file loads into a wrapper that was
        # made with a period of 0.
        return {"captured": self._captured, **self._slow_weights.named()} if self.sync_period and self.built else {}

    def save_own_variables(self, store: Any) -> None:
        """Save the slow weights, the slow momentum and whether they were captured.

        Keras lets the inner optimizer save its own state beside them. While the slow weights are in the model, the fast
        weights are saved too, together with the number of updates to which they belong.

        Args:
            store: Mapping from names to arrays, which Keras provides.
        """
        for name, variable in self._own_variables().items():
            store[name] = to_numpy(variable)
        fast = self._loaded_fast_weights() or self._block.fast_weights()
        if fast and self._own_variables():
            store["fast_count"] = np.asarray(self._count())
            for index, pair in enumerate(self._slow_weights.pairs()):
                store[f"fast_{index}"] = keras.ops.convert_to_numpy(fast[id(pair.fast)])

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` saved.

        Settings stay as the constructor or the user has set them. If no slow momentum was saved, it starts from 0. A
        saved slow momentum that this optimizer cannot use is left out, with a warning.

        Args:
            store: Mapping from names to arrays, which Keras provides.
        """
        for setting in self._settings():
            setting.keep_what_was_set()
        caller = "load_own_variables(store)"
        variables = self._own_variables()
        self._block.loaded = {}
        saved = set(store.keys())
        fast = [f"fast_{index}" for index in range(len(self._slow_weights.slow))]
        if saved >= {"fast_count", *fast}:
            saved -= {"fast_count", *fast}
        else:
            fast = []
        momentum = {f"slow_momentum_{index}" for index in range(len(self._slow_weights.slow))}
        found, wanted = saved & momentum, variables.keys() & momentum
        if {frozenset(found), frozenset(wanted)} == {frozenset(), frozenset(momentum)}:
            # Either the file or this optimizer has momentum, but not both.
            saved -= momentum
            variables = {name: variable for name, variable in variables.items() if name not in momentum}
        if saved != set(variables) and not self.built:
            warnings.warn(
                f"Skipping the state of optimizer {self.name!r}, which is not built yet. To load it, call "
                "`optimizer.build(model.trainable_variables)` before.",
                stacklevel=2,
            )
            return
        if saved != set(variables):
            warnings.warn(
                f"Skipping the state of optimizer {self.name!r}, which has {len(self._slow_weights.slow)} slow "
                f"weights, as what was saved is another optimizer's state ({len(store.keys())} variables). The slow "
                "weights start anew, from the model's weights.",
                stacklevel=2,
            )
            self._slow_weights.forget()
            return
        count = int(np.asarray(store["fast_count"])) if fast else 0
        values = checked(self._slow_weights.slow if fast else [], [store[name] for name in fast], caller)
        assign(list(variables.values()), [store[name] for name in variables], caller)
        if wanted and not found:
            self._slow_weights.clear_momentum()
        if found and not wanted:
            warnings.warn(
                f"Leaving out the slow momentum that was saved, as the optimizer {self.name!r} has none. Make it with "
                "the `slow_momentum` of the optimizer that was saved to go on with it.",
                stacklevel=2,
            )
        self._block.loaded_at = count
        self._block.loaded = {
            id(pair.fast): (pair.fast, value) for pair, value in zip(self._slow_weights.pairs(), values)
        }

    def _loaded_fast_weights(self) -> dict[int, Any]:
        """Return the fast weights of the last loaded file, unless an update was applied since."""
        loaded = {key: value for key, (_, value) in self._block.loaded.items()}
        return loaded if loaded and self._count() == self._block.loaded_at else {}

    def _take_loaded_fast_weights(self) -> None:
        if loaded := self._loaded_fast_weights():
            self._block.put_back(loaded, self._pairs_to_swap())
        self._block.loaded = {}
