"""The inner optimizer: made from the user's argument, and configured by the wrapper's keywords."""

import copy
import math
import numbers
from typing import Any

import keras
import numpy as np

from lookahead_optim.keras._wrappers import innermost

__all__ = ["deserialize", "make_inner_optimizer"]

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_KEYWORDS = ("learning_rate", "lr", "decay", *_CLIPPING)


def make_inner_optimizer(optimizer: Any, settings: dict[str, Any]) -> Any:
    """Return the Keras optimizer that `optimizer` stands for, with the keywords `settings` applied to it.

    Raises:
        TypeError, ValueError: if an argument is wrong. The optimizer is unchanged then.
    """
    unknown = sorted(set(settings) - set(_KEYWORDS))
    if unknown:
        raise ValueError(
            f"`Lookahead` does not know the keyword argument(s) {unknown}. Beside its own arguments it takes "
            f"{list(_KEYWORDS)}; set anything else on the inner optimizer."
        )
    inner_optimizer = _get(optimizer)
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings:
        _apply_settings(innermost(inner_optimizer), settings, replace_learning_rate=isinstance(optimizer, str))
    return inner_optimizer


def _get(optimizer: Any) -> Any:
    if isinstance(optimizer, keras.optimizers.Optimizer):
        inner_optimizer = optimizer
    elif isinstance(optimizer, (str, dict)):
        try:
            inner_optimizer = deserialize(optimizer) if isinstance(optimizer, dict) else keras.optimizers.get(optimizer)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "`optimizer` must be a Keras 3 optimizer, or a name or config that `keras.optimizers.get` takes. "
                f"Received: optimizer={optimizer!r}"
            ) from error
    elif _is_of_keras_2(optimizer):
        raise TypeError(
            "`optimizer` must be an optimizer of Keras 3. For one of Keras 2 use `lookahead_optim.tf_keras.Lookahead`. "
            f"Received: optimizer={optimizer!r} of type {type(optimizer)}"
        )
    else:
        raise TypeError(
            "`optimizer` must be an instance of `keras.optimizers.Optimizer` (Keras 3), or a name or config that "
            f"`keras.optimizers.get` takes. Received: optimizer={optimizer!r} of type {type(optimizer)}"
        )
    if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`optimizer` must be a Keras 3 optimizer, or a name or config that `keras.optimizers.get` takes. "
            f"Received: optimizer={optimizer!r}, which is {inner_optimizer!r}"
        )
    if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "A `LossScaleOptimizer` cannot be inside `Lookahead`, as the steps that it skips must not count. Wrap the "
            "other way round, `LossScaleOptimizer(Lookahead(inner))`, which is also what `compile` makes under the "
            f"'mixed_float16' policy. Received: optimizer={optimizer!r}"
        )
    return inner_optimizer


def _is_of_keras_2(optimizer: Any) -> bool:
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return any(base.__module__.partition(".")[0] == "tf_keras" for base in kind.__mro__)


def deserialize(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
    """Return the optimizer of a config. The config is not changed."""
    config = copy.deepcopy(config)
    if str(config.get("module")).startswith("keras.src.backend.torch.optimizers"):
        # On PyTorch Keras names a class that no other backend has.
        config |= {"module": "keras.optimizers", "registered_name": None}
    if "module" in config:
        # Keras loads a model in the same way. `keras.optimizers.deserialize` does not know all of Keras' optimizers. If
        # names are equal, it also takes a registered class for an optimizer of Keras.
        return keras.saving.deserialize_keras_object(config, custom_objects)
    return keras.optimizers.deserialize(config, custom_objects)


def _apply_settings(optimizer: Any, settings: dict[str, Any], replace_learning_rate: bool) -> None:
    if hasattr(optimizer, "optimizers"):
        raise ValueError(
            f"The keyword argument(s) {sorted(settings)} cannot configure a `MultiOptimizer`: set them on the "
            "optimizers in it."
        )
    learning_rate = _new_learning_rate(optimizer, settings, replace_learning_rate)
    clipping = _new_clipping(optimizer, settings)
    if learning_rate is not None:
        optimizer.learning_rate = learning_rate
    for name, value in clipping.items():
        setattr(optimizer, name, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _new_learning_rate(optimizer: Any, settings: dict[str, Any], replace: bool) -> Any:
    """Return the new learning rate of the optimizer, or `None` if it can stay."""
    if "lr" in settings and "learning_rate" in settings:
        raise ValueError(
            "`lr` is another name of `learning_rate`: give one of them. "
            f"Received: lr={settings['lr']!r}, learning_rate={settings['learning_rate']!r}"
        )
    name = "lr" if "lr" in settings else "learning_rate"
    wanted = settings.get(name)
    current = optimizer.get_config()["learning_rate"]
    result = None
    if wanted is not None:
        if not (_is_number(wanted) or callable(wanted)):
            raise TypeError(
                f"`{name}` must be a finite number, a `LearningRateSchedule` or a callable. "
                f"Received: {name}={wanted!r} of type {type(wanted).__name__}"
            )
        if replace:
            result = wanted
        elif not _is_number(wanted) or not _is_number(current) or np.float32(wanted) != np.float32(current):
            raise ValueError(
                f"`{name}={wanted!r}` contradicts the learning rate {current!r} of the inner optimizer "
                f"{optimizer.name!r}. Set it there, or give the inner optimizer by its name."
            )
    decay = settings.get("decay", 0)
    if not _is_number(decay) or decay < 0:
        raise ValueError(f"`decay` must be a finite number >= 0. Received: decay={decay!r}")
    if decay:
        initial = current if result is None else result
        if not _is_number(initial):
            raise ValueError(
                f"`decay={decay!r}` contradicts the learning rate of the inner optimizer {optimizer.name!r}, which is "
                f"already a schedule. Received: {initial!r}"
            )
        result = keras.optimizers.schedules.InverseTimeDecay(float(initial), decay_steps=1, decay_rate=decay)
    return result


def _new_clipping(optimizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the clipping attributes to set on the optimizer."""
    wanted = {name: settings[name] for name in _CLIPPING if name in settings}
    for name, value in wanted.items():
        if not _is_number(value) or value < 0:
            raise ValueError(f"`{name}` must be a finite number >= 0. Received: {name}={value!r}")
    present = {name: value for name in _CLIPPING if (value := getattr(optimizer, name)) is not None}
    if len(wanted) > 1 or (present and wanted and wanted != present):
        raise ValueError(
            f"The clipping {wanted} contradicts another one, of the inner optimizer {optimizer.name!r} "
            f"({present}) or among the keyword arguments: only one of {list(_CLIPPING)} can be set."
        )
    return wanted
