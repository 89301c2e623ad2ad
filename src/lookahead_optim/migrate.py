"""From checkpoints of `tfa.optimizers.Lookahead` to models of Keras 3."""

import os
import re
from collections.abc import Mapping
from typing import Any

from lookahead_optim._missing import explain_missing

with explain_missing("lookahead_optim.migrate", "keras", "keras"):
    import keras
    import numpy as np

from lookahead_optim.keras import Lookahead

__all__ = ["load_checkpoint"]

_ADAM = {"m": "_momentums", "v": "_velocities", "vhat": "_velocity_hats"}
# The names of an inner optimizer's state in Keras 2, and the attributes of Keras 3 that mean the same.
_SLOTS: Mapping[str, Mapping[str, str]] = {
    "SGD": {"momentum": "momentums"},
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RectifiedAdam": _ADAM,
    "RMSprop": {"rms": "_velocities", "momentum": "_momentums", "mg": "_average_gradients"},
    "Adagrad": {"accumulator": "_accumulators"},
    "Adadelta": {"accum_grad": "_accumulated_grads", "accum_var": "_accumulated_delta_vars"},
    "Adamax": {"m": "_m", "v": "_u"},
    "Ftrl": {"accumulator": "_accumulators", "linear": "_linears"},
}


def load_checkpoint(path: str | os.PathLike[str], model: keras.Model) -> None:
    """Load a model whose training with `tfa.optimizers.Lookahead` was stopped, so that training resumes in Keras 3.

    This loads the weights, the slow weights, the step count and the inner optimizer's state. The optimizers' settings
    stay as they are in `model`. Save the model afterwards like any Keras 3 model. The step count of Keras 2 includes
    the steps that a loss scaler skipped. After such steps the first sync may come earlier than in the old run.

    Args:
        path: The checkpoint. It may be an `.h5` file that `model.save` wrote in Keras 2; the prefix of a checkpoint
            (`.../ckpt`) that `tf.train.Checkpoint(model=model, optimizer=optimizer)` or, in TensorFlow's format,
            `model.save_weights` wrote; or the folder of a SavedModel. Reading a checkpoint or a SavedModel needs
            TensorFlow.
        model: A Keras 3 model of the same architecture, `Sequential` or functional, whose layers own their weights.
            (For an `.h5` file, a recurrent layer may have them in its cell.) It must be compiled with
            `lookahead_optim.keras.Lookahead` around an inner optimizer of the same class and options: `SGD`, `Adam`,
            `RMSprop` with momentum, `Adagrad`, `Adadelta`, `Adamax`, `Ftrl`, `AdamW`, or `RectifiedAdam` of
            `lookahead_optim.keras`. Other classes (`Nadam`) and `RMSprop` without momentum are refused, as it was not
            shown that they compute the same in Keras 3. Keras 3's `AdamW` multiplies its `weight_decay` by the learning
            rate, TensorFlow Addons' does not. So divide the old `weight_decay` by the learning rate. Under mixed
            precision a `LossScaleOptimizer` is around the `Lookahead`. Its scale starts again.

    Raises:
        TypeError: if `model` is not compiled with a `Lookahead`.
        ValueError: if the checkpoint does not fit the model or its optimizer, or has no `Lookahead`. The model is
            unchanged then.

    Example:

    ```
    model.compile(lookahead_optim.keras.Lookahead(keras.optimizers.Adam(1e-3), sync_period=5), loss="mse")
    load_checkpoint("stopped.h5", model)
    model.fit(x, y)
    ```
    """
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if not isinstance(optimizer, Lookahead):
        raise TypeError(
            "`model` must be compiled with a `lookahead_optim.keras.Lookahead` optimizer. "
            f"Received: model.optimizer={optimizer!r}"
        )
    inner = optimizer.inner_optimizer
    slots = _slots_of(inner)
    path = os.fspath(path)
    if not model.built:
        raise ValueError("`model` must be built: give it an `Input`, or call it once. Received: an unbuilt model")
    _check_layers(model)
    variables = model.trainable_variables
    read = _read_h5 if path.endswith((".h5", ".hdf5")) else _read_checkpoint
    weights, iterations, state = read(path, model)
    if (shapes := [array.shape for array in weights]) != (wanted := [tuple(weight.shape) for weight in model.weights]):
        raise ValueError(f"`path` must have weights of the model's shapes, {wanted}. Received: {shapes}")
    # Under a loss scaler, `lookahead_optim.tf_keras` also writes the number of applied steps. In Keras 3 there is only
    # one count, which Adam's bias correction and the learning rate schedule use too.
    state.pop("lookahead_step", None)
    # If the file was written while the slow weights were in the model, training resumes from its fast weights.
    fast = _arrays_of(state, "fast", variables) if "fast" in state else []
    state.pop("fast", None)
    arrays = {"slow": _arrays_of(state, "slow", variables)}
    unknown = set(state) - {"slow"} - set(slots)
    if unknown:
        raise ValueError(
            f"`path` must be a checkpoint of an inner optimizer like that of `model`, {type(inner).__name__}. "
            f"Received: a checkpoint with the state {sorted(unknown)}, which that has not"
        )
    model.optimizer.build(variables)
    targets = {"slow": optimizer.slow_variables}
    for name, attribute in slots.items():
        target = getattr(inner, attribute, None) or []
        if bool(target) != (name in state):
            raise ValueError(
                f"`path` must be a checkpoint of an inner optimizer with the options of that of `model`: {name!r} is "
                f"{'missing in' if target else 'only in'} the checkpoint. Received: path={path!r}"
            )
        if target:
            targets[name], arrays[name] = target, _arrays_of(state, name, variables)
    for variable, value in [*zip(model.weights, weights), *zip(variables, fast)]:
        variable.assign(value)
    for name, target in targets.items():
        for variable, value in zip(target, arrays[name]):
            variable.assign(value)
    optimizer.iterations.assign(iterations)
    optimizer._captured.assign(1)


def _slots_of(inner: Any) -> Mapping[str, str]:
    name = type(inner).__name__
    if name not in _SLOTS or (name == "RMSprop" and not inner.momentum):
        raise ValueError(
            f"`model` must have an inner optimizer that computes the same in Keras 2 and 3: one of {sorted(_SLOTS)}, "
            f"`RMSprop` with momentum. Received: {inner!r}"
        )
    for option in ("use_ema", "gradient_accumulation_steps"):
        if getattr(inner, option):
            raise ValueError(
                f"`model` must have an inner optimizer without `{option}`, of which Keras 2 keeps no state that fits. "
                f"Received: {inner!r} with {option}={getattr(inner, option)!r}"
            )
    return _SLOTS[name]


def _check_layers(model: keras.Model) -> None:
    """Raise `ValueError` for a layer of layers.

    Keras 2 and Keras 3 list the weights of such layers in different orders.
    """
    for layer in model.layers:
        owners = [
            part for part in layer._flatten_layers() if part._trainable_variables or part._non_trainable_variables
        ]
        if owners not in ([], [layer]) and not (isinstance(layer, keras.layers.RNN) and len(owners) == 1):
            raise ValueError(
                "`model` must have layers that own their weights, not layers of layers, whose weights Keras 2 and 3 "
                f"list in different orders. Received: the layer {layer.name!r} of type {type(layer).__name__}. Load "
                "into a flat model of the same weights, and take them from there."
            )


def _arrays_of(state: Mapping[str, list[np.ndarray]], name: str, variables: list[Any]) -> list[np.ndarray]:
    """Return the arrays of a slot, one for each variable, or raise `ValueError`."""
    arrays = state.get(name, [])
    shapes, wanted = [tuple(np.shape(array)) for array in arrays], [tuple(variable.shape) for variable in variables]
    if shapes != wanted:
        raise ValueError(
            f"`path` must be a checkpoint with {name!r} arrays of the shapes of the model's trainable variables, "
            f"{wanted}. Received: {shapes}"
        )
    return arrays


def _read_h5(path: str, model: keras.Model) -> tuple[list[np.ndarray], int, dict[str, list[np.ndarray]]]:
    """Return the weights in the model's order, the step count, and the optimizer's arrays by slot."""
    import h5py

    def names(group: Any, attribute: str) -> list[str]:
        return [name.decode() if isinstance(name, bytes) else name for name in group.attrs[attribute]]

    with h5py.File(path, "r") as file:
        if "optimizer_weights" not in file or "model_weights" not in file:
            raise ValueError(
                f"`path` must be a file that `model.save` wrote, with its optimizer. Received: path={path!r}"
            )
        weights: dict[str, np.ndarray] = {}
        for layer in names(file["model_weights"], "layer_names"):
            group = file["model_weights"][layer]
            weights |= {name: np.array(group[name]) for name in names(group, "weight_names")}
        group = file["optimizer_weights"]
        entries = {name.partition(":")[0]: np.array(group[name]) for name in names(group, "weight_names")}
    # Arrays are found by name, as an optimizer that was restored has its weights in another order.
    state: dict[str, list[np.ndarray]] = {}
    for weight in weights:
        slot_of = re.compile(rf"(?:.*/)?{re.escape(weight.partition(':')[0])}/(\w+?)(?:_\d+)?")
        for name in [name for name in entries if slot_of.fullmatch(name)]:
            state.setdefault(slot_of.fullmatch(name)[1], []).append(entries.pop(name))  # type: ignore[index]
    others = {name.rsplit("/", 1)[-1]: value for name, value in entries.items()}
    if "iter" not in others:
        raise ValueError(f"`path` must be a file with the optimizer's step count. Received: path={path!r}")
    iterations = int(others.pop("iter"))
    return list(weights.values()), iterations, state | {name: [value] for name, value in others.items()}


def _read_checkpoint(path: str, model: keras.Model) -> tuple[list[np.ndarray], int, dict[str, list[np.ndarray]]]:
    import tensorflow as tf

    if os.path.isdir(path):
        path = os.path.join(path, "variables", "variables")
    try:
        reader = tf.train.load_checkpoint(path)
    except (tf.errors.OpError, ValueError) as error:
        raise ValueError(
            "`path` must be an `.h5` file, a checkpoint's prefix (without `.index`), or the folder of a SavedModel. "
            f"Received: path={path!r}, which TensorFlow cannot read as a checkpoint: {error}"
        ) from error
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    keys = {key.removesuffix(suffix) for key in reader.get_variable_to_shape_map() if key.endswith(suffix)}
    prefix = "model/" if any(key.startswith("model/layer_with_weights-") for key in keys) else ""
    wrapper = next((name for name in ("optimizer", "model/optimizer") if f"{name}/iter" in keys), None)
    if wrapper is None:
        raise ValueError(
            "`path` must be a checkpoint of a model and its optimizer. "
            f"Received: path={path!r} with {sorted(keys)!r:.500}"
        )
    weights: list[np.ndarray] = []
    state: dict[str, list[np.ndarray]] = {}
    owners = [layer for layer in model.layers if layer.weights]
    for index, layer in enumerate(owners):
        for variable in layer.weights:
            key = f"{prefix}layer_with_weights-{index}/{variable.name}"
            if key not in keys:
                raise ValueError(
                    f"`path` must have a variable for each of the model's weights. Received: path={path!r} without "
                    f"{key!r}; it has {sorted(keys)!r:.500}"
                )
            weights.append(reader.get_tensor(key + suffix))
            slots = f"{key}/.OPTIMIZER_SLOT/{wrapper}/"
            for slot_key in sorted(keys):
                if slot_key.startswith(slots):
                    # With a wrapper inside the wrapper, two slots have the name "slow". The check of the slots then
                    # refuses the checkpoint.
                    slot = slot_key.removeprefix(slots).rsplit("/", 1)[-1]
                    state.setdefault(slot, []).append(reader.get_tensor(slot_key + suffix))
    if f"{wrapper}/lookahead_step" in keys:
        state["lookahead_step"] = [reader.get_tensor(f"{wrapper}/lookahead_step{suffix}")]
    return weights, int(reader.get_tensor(f"{wrapper}/iter{suffix}")), state
