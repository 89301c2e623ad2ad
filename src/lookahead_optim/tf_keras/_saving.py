"""What is saved and how it is loaded: the order of `weights`, checkpoints, and state that is made on first use.

| saved as | what | where |
|---|---|---|
| `iter` | the step count | everywhere |
| slot `slow` | a slow weight | everywhere |
| `lh_base_optimizer` | the inner optimizer | checkpoints, SavedModels; its weights in `weights` |
| `lookahead_step` | `_applied_steps`, under a `LossScaleOptimizer` | everywhere |
| `lookahead_captured` | `_capture_state` | SavedModels |
| slot `fast`, or the last of `weights` | a fast weight, while the slow weight is in the model | everywhere |
| `sync_period`, `slow_step_size` | the settings | the config |
"""

import weakref
from typing import Any

import numpy as np
import tensorflow as tf

from lookahead_optim.tf_keras._count import to_int
from lookahead_optim.tf_keras._slow_weights import RESTORED, SlowWeights, wrappers_in

__all__ = ["Saving"]


class Saving(SlowWeights):
    """An optimizer whose files have TensorFlow Addons' format, and are complete at any time.

    Checkpoints match objects by the names under which an optimizer tracks them, and slots by their variable.
    TensorFlow's methods for this are private, and there are no public methods.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        # Slots that were made to be saved, by the `id` of their variable.
        self._slots_saved: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint":
            children.pop("lookahead_captured", None)
        elif self._block.is_open and self._is_captured():
            # An optimizer that is loaded from the SavedModel takes this state. Its fast weights are valid as long as
            # the state stays.
            self._mark_restored()
        return children

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        found = super()._lookup_dependency(name, cached_dependencies)
        if found is not None or cached_dependencies is None or not tf.executing_eagerly():
            return found
        # A checkpoint is being restored. State that is made on first use would be missing if it was not made yet.
        if name == "iter":
            self._create_hypers()
            count, self._first_count = self.iterations, None
            return count
        if name == "lookahead_step":
            self._create_applied_steps()
            return self._applied_steps
        return self._create_capture_state() if name == "lookahead_captured" else None

    def _create_or_restore_slot_variable(
        self, slot_variable_position: Any, slot_name: str, variable: Any, *shape: Any, **kwargs: Any
    ) -> Any:
        if slot_name in ("slow", "fast") and self._block.loaded_at != slot_variable_position.restore_uid:
            # This is another checkpoint than the last.
            self._block.loaded, self._block.loaded_at = {}, slot_variable_position.restore_uid
        if slot_name == "fast":
            return self._slot_to_load(variable) if tf.executing_eagerly() else None
        # The argument `shape` exists only from TensorFlow 2.16 on.
        slot = super()._create_or_restore_slot_variable(slot_variable_position, slot_name, variable, *shape, **kwargs)
        if slot_name == "slow":
            self._mark_restored()
        return slot

    # A checkpoint that is written while the slow weights are in the model has the fast weights as slots. These slots
    # are made when the checkpoint is written or read. They are no state of the optimizer.

    def get_slot_names(self) -> list[str]:
        """Return the names of the slots: `"slow"`, and `"fast"` while the slow weights are in the model."""
        return [*super().get_slot_names(), *(["fast"] if self._fast_weights() else [])]

    def get_slot(self, var: Any, slot_name: str) -> Any:
        """Return a slot of a variable.

        Args:
            var: The variable.
            slot_name: `"slow"`, or while the slow weights are in the model `"fast"`, for a copy of the fast weight.

        Raises:
            KeyError: if the variable has no such slot.
        """
        if slot_name == "fast":
            return self._slot_to_save(var, self._fast_weights()[id(var)])
        return super().get_slot(var, slot_name)

    def _slot_to_save(self, variable: Any, value: Any) -> Any:
        if not tf.executing_eagerly():
            # For a SavedModel TensorFlow asks twice: before it makes a graph, and in the graph.
            return self._slots_saved[id(variable)]
        slot = tf.Variable(value, trainable=False, name=f"{self._name}/{variable.name.partition(':')[0]}/fast")
        self._slots_saved[id(variable)] = slot
        return slot

    def _slot_to_load(self, variable: Any) -> Any:
        with self._distribution_strategy_scope():
            slot = tf.Variable(tf.zeros_like(variable), trainable=False)
        self._block.loaded[id(variable)] = variable, slot
        return slot

    def _fast_weights(self) -> dict[int, Any]:
        """Return the fast weights that are not in the model, by the `id` of their variable."""
        return self._loaded_fast_weights() or self._block.fast_weights()

    def _loaded_fast_weights(self) -> dict[int, Any]:
        """Return the fast weights of the last loaded file, unless a step was made since."""
        if not self._block.loaded or to_int(self._capture_state) != RESTORED:
            return {}
        return {key: tf.convert_to_tensor(slot) for key, (_, slot) in self._block.loaded.items()}

    def _variables_with_slow_weight(self) -> list[Any]:
        """Return the variables that have a slow weight, in the order of the slow weights in `weights`."""
        fast = {id(pair.slow): pair.fast for pair in self._pairs()}
        return [fast[id(weight)] for weight in self._weights if id(weight) in fast]

    @property
    def weights(self) -> list[Any]:
        """The step count, the slow weights and the inner optimizer's state, in this order.

        With a `LossScaleOptimizer` around, the count of applied steps follows. While the slow weights are in the model,
        copies of the fast weights are last.
        """
        count = self._iterations
        own = [weight for weight in self._weights if weight is count or weight is not self._listed_count]
        own.sort(key=lambda weight: weight is not count)
        return [
            *own,
            *(weight for weight in self._optimizer.weights if weight is not count),
            *([self._applied_steps] if self._is_in_loss_scaler() and self._applied_steps is not None else []),
            *self._slots_to_save(),
        ]

    def _slots_to_save(self) -> list[Any]:
        fast = self._fast_weights()
        variables = self._variables_with_slow_weight() if fast else []
        return [self._slot_to_save(variable, fast[id(variable)]) for variable in variables]

    def variables(self) -> list[Any]:
        """Return `weights`."""
        return self.weights

    def set_weights(self, weights: list[Any]) -> None:
        """Set all `weights`.

        Args:
            weights: List of NumPy arrays in the order of `weights`. With a `LossScaleOptimizer` around, the last array
                may be left out. It is left out in files of TensorFlow Addons, which counted by `iterations`.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        self._end_block_of_callback("set_weights(weights)")
        self._block.loaded = {}
        own, variables = self.weights, self._variables_with_slow_weight()
        if len(weights) == len(own) - 1 and own[-1] is self._applied_steps:
            weights = [*weights, weights[0]]
        has_fast = len(weights) == len(own) + len(variables)
        super().set_weights(weights[: len(own)] if has_fast else weights)
        for wrapper in wrappers_in(self):
            wrapper._mark_restored()
        if has_fast:
            # Keras gives datasets of a file that it will close.
            values = map(np.array, weights[len(own) :])
            self._block.loaded = {id(variable): (variable, value) for variable, value in zip(variables, values)}
