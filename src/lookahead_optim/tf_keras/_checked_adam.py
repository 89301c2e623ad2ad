"""The base class of `RectifiedAdam` and `AdamW`: it checks settings, and a weight decay may be a schedule."""

import copy
from typing import Any

import tensorflow as tf

from lookahead_optim._adam_settings import check_setting, check_total_steps
from lookahead_optim.tf_keras._keras import keras

__all__ = ["CheckedAdam"]


class CheckedAdam(keras.optimizers.legacy.Adam):
    """Adam that checks each setting when it is set.

    A setting that may be a schedule may also be a schedule's config.
    """

    def _set_hyper(self, name: str, value: Any) -> None:
        if isinstance(value, dict):
            value = keras.optimizers.schedules.deserialize(copy.deepcopy(value))
        is_free = callable(value) or tf.is_tensor(value)
        if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
            is_free = name in ("learning_rate", "weight_decay")
        if name == "total_steps":
            value = float(check_total_steps(value))
        elif not is_free:
            value = check_setting(name, value)
        super()._set_hyper(name, value)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Return the optimizer that `config` describes.

        Args:
            config: Dictionary, as `get_config` returns it.
            custom_objects: Dictionary from names in `config` to classes, such as classes of schedules. Defaults to
                `None`.
        """
        with keras.utils.custom_object_scope(custom_objects or {}):
            return super().from_config(dict(config))
