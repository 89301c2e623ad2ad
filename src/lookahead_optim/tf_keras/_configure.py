"""The inner optimizer of a `Lookahead`: its legacy form, and the settings that the wrapper makes on it."""

import copy
import math
import numbers
import sys
from typing import Any

import numpy as np
import tensorflow as tf

from lookahead_optim.tf_keras._keras import keras
from lookahead_optim.tf_keras.adamw import AdamW

__all__ = ["checked_settings", "configure", "deserialize", "legacy_form"]


def legacy_form(optimizer: Any) -> Any:
    """Return the legacy optimizer that `optimizer` stands for."""
    keras_3 = sys.modules.get("keras")
    if isinstance(optimizer, getattr(getattr(keras_3, "optimizers", None), "Optimizer", ())) and not isinstance(
        optimizer, (keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer)
    ):
        raise TypeError(
            "`optimizer` must be an optimizer of Keras 2. For one of Keras 3 use `lookahead_optim.keras.Lookahead`. "
            f"Received: optimizer={optimizer!r}"
        )
    if isinstance(optimizer, (str, dict)):
        try:
            optimizer = keras.optimizers.get(copy.deepcopy(optimizer), use_legacy_optimizer=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "`optimizer` must be a Keras 2 optimizer, or a name or config of a legacy one. "
                f"Received: optimizer={optimizer!r}"
            ) from error
    if not isinstance(optimizer, (keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer)):
        raise TypeError(
            "`optimizer` must be an instance of `keras.optimizers.legacy.Optimizer` (Keras 2), or a name or config of "
            f"one. Received: optimizer={optimizer!r} of type {type(optimizer).__name__}"
        )
    if hasattr(optimizer, "loss_scale"):
        raise ValueError(
            "A `LossScaleOptimizer` cannot be inside `Lookahead`, as the steps that it skips must not count. Wrap the "
            f"other way round: `LossScaleOptimizer(Lookahead(inner))`. Received: optimizer={optimizer!r}"
        )
    legacy = optimizer if isinstance(optimizer, keras.optimizers.legacy.Optimizer) else _converted(optimizer)
    if isinstance(legacy._hyper.get("learning_rate"), np.floating):
        # Keras would take a NumPy number for a variable.
        legacy._hyper["learning_rate"] = float(legacy._hyper["learning_rate"])
    return legacy


def deserialize(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
    """Return the inner optimizer of a `Lookahead`'s config."""
    # An HDF5 file lacks the package in an inner optimizer's name. Keras' own legacy optimizers have no AdamW, so the
    # name is not ambiguous.
    known = keras.utils.get_registered_object("AdamW") or AdamW
    # Keras looks in a scope before it looks among the registered classes. It looks in the argument last.
    with keras.utils.custom_object_scope({"AdamW": known, **(custom_objects or {})}):
        return keras.optimizers.deserialize(config)


def _converted(optimizer: Any) -> Any:
    """Return the legacy form of an optimizer of the newer kind."""
    config = optimizer.get_config()
    if type(optimizer) is getattr(keras.optimizers, "AdamW", None) and not config["use_ema"]:
        return _converted_adamw(optimizer, config)
    lost = [name for name in ("weight_decay", "use_ema") if config.get(name)]
    legacy = getattr(keras.optimizers.legacy, type(optimizer).__name__, None)
    if legacy is None or lost:
        reason = f"its {' and '.join(f'`{name}`' for name in lost)} would be lost" if lost else "there is none"
        raise ValueError(
            "`optimizer` must have a form in `keras.optimizers.legacy`, into which it is converted. For this one "
            f"{reason}. Weight decay is kept by `keras.optimizers.AdamW`, and by `AdamW` and `RectifiedAdam` of "
            f"`lookahead_optim.tf_keras`. Received: optimizer={optimizer!r} with the config {config!r}"
        )
    return keras.__internal__.optimizers.convert_to_legacy_optimizer(optimizer)


def _converted_adamw(optimizer: Any, config: dict[str, Any]) -> AdamW:
    # Keras keeps the arguments of its `exclude_from_weight_decay` only in these two attributes.
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise ValueError(
            "`optimizer` must name what it excludes from weight decay, by `exclude_from_weight_decay(var_names=...)`, "
            f"as variables in a `var_list` cannot be converted. Received: optimizer={optimizer!r}"
        )
    # The config has only a schedule's config, whose class need not be registered.
    rate = getattr(optimizer, "_learning_rate", None)
    is_schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    names = "beta_1", "beta_2", "epsilon", "amsgrad", "name", "clipnorm", "clipvalue", "global_clipnorm"
    return AdamW(
        config["weight_decay"] or 0.0,
        rate if is_schedule else config["learning_rate"],
        exclude_from_weight_decay=list(getattr(optimizer, "_exclude_from_weight_decay_names", None) or []) or None,
        scale_by_learning_rate=True,
        **{name: config[name] for name in names if config[name] is not None},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_settings(settings: dict[str, Any]) -> tuple[Any, float | None]:
    """Return the learning rate and the decay among the keywords, `None` if not given, or raise an error."""
    given = {name: value for name, value in settings.items() if value is not None}
    if "lr" in given and "learning_rate" in given:
        raise ValueError(
            "`lr` is another name of `learning_rate`: give one of them. "
            f"Received: lr={given['lr']!r}, learning_rate={given['learning_rate']!r}"
        )
    for name in ("learning_rate", "lr", "decay", "clipnorm", "clipvalue", "global_clipnorm"):
        value = given.get(name, 0.0)
        if name in ("learning_rate", "lr") and (callable(value) or tf.is_tensor(value)):
            continue
        if not _is_number(value) or not 0 <= value < math.inf:
            other = ", a `LearningRateSchedule` or a callable" if name in ("learning_rate", "lr") else ""
            raise (ValueError if _is_number(value) else TypeError)(
                f"`{name}` must be a finite number >= 0{other}. Received: {name}={value!r} of type "
                f"{type(value).__name__}"
            )
    return given.get("learning_rate", given.get("lr")), given.get("decay")


def configure(optimizer: Any, learning_rate: Any, decay: float | None) -> None:
    """Set the learning rate and its decay on an inner optimizer, through all wrappers around it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, keras.optimizers.legacy.Nadam) and (decay is not None or callable(learning_rate)):
        raise ValueError(
            "`Nadam` has a schedule of its own: with it, `decay` must not be given, and `learning_rate` must be a "
            f"number. Received: learning_rate={learning_rate!r}, decay={decay!r}"
        )
    if learning_rate is not None:
        optimizer.learning_rate = float(learning_rate) if _is_number(learning_rate) else learning_rate
    if decay is not None:
        optimizer._set_hyper("decay", float(decay))
        optimizer._initial_decay = float(decay)
