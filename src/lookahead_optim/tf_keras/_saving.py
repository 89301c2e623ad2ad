"""What is saved and how it comes back: the order of `weights`, checkpoints, and state that is made on first use.

| saved as | what | where |
|---|---|---|
| `iter` | the step count | everywhere |
| slot `slow` | a slow weight | everywhere |
| `lh_base_optimizer` | the inner optimizer | checkpoints, SavedModels; its weights in `weights` |
| `lookahead_step` | `_applied_steps`, under a `LossScaleOptimizer` | everywhere |
| `lookahead_captured` | `_capture_state` | SavedModels |
| `sync_period`, `slow_step_size` | the settings | the config |
"""

from typing import Any

import tensorflow as tf

from lookahead_optim.tf_keras._slow_weights import SlowWeights, wrappers_in

__all__ = ["Saving"]


class Saving(SlowWeights):
    """An optimizer whose files are those of TensorFlow Addons, and complete at any time.

    Checkpoints match objects by the names under which an optimizer tracks them, and slots by their variable.
    TensorFlow's methods for this are private, and there are no public ones.
    """

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint":
            children.pop("lookahead_captured", None)
        return children

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        found = super()._lookup_dependency(name, cached_dependencies)
        if found is not None or cached_dependencies is None or not tf.executing_eagerly():
            return found
        # A checkpoint is being restored. State that is made on first use would be missing in one written before that.
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
        # Only from TensorFlow 2.16 on is there a shape.
        slot = super()._create_or_restore_slot_variable(slot_variable_position, slot_name, variable, *shape, **kwargs)
        if slot_name == "slow":
            self._mark_restored()
        return slot

    @property
    def weights(self) -> list[Any]:
        """The step count, the slow weights and the inner optimizer's state, in this order.

        With a `LossScaleOptimizer` around, the count of applied steps is the last.
        """
        count = self._iterations
        own = [weight for weight in self._weights if weight is count or weight is not self._listed_count]
        own.sort(key=lambda weight: weight is not count)
        return [
            *own,
            *(weight for weight in self._optimizer.weights if weight is not count),
            *([self._applied_steps] if self._is_in_loss_scaler() and self._applied_steps is not None else []),
        ]

    def variables(self) -> list[Any]:
        """Return `weights`."""
        return self.weights

    def set_weights(self, weights: list[Any]) -> None:
        """Set all `weights`.

        Args:
            weights: NumPy arrays in the order of `weights`. With a `LossScaleOptimizer` around, the last one may be
                left out, as in files of TensorFlow Addons, which counted by `iterations`.
        """
        if len(weights) == len(self.weights) - 1 and self.weights[-1] is self._applied_steps:
            weights = [*weights, weights[0]]
        super().set_weights(weights)
        for wrapper in wrappers_in(self):
            wrapper._mark_restored()
