"""The `RectifiedAdam` optimizer."""

import numbers
from typing import Any

import tensorflow as tf

from lookahead_optim._adam_settings import check_flag, check_keywords, check_setting, check_warm_up
from lookahead_optim.tf_keras._checked_adam import CheckedAdam
from lookahead_optim.tf_keras._keras import keras

__all__ = ["RectifiedAdam"]

_HYPERS = "weight_decay", "sma_threshold", "total_steps", "warmup_proportion", "min_lr"


@keras.utils.register_keras_serializable(package="Addons")
class RectifiedAdam(CheckedAdam):
    r"""Adam that takes a plain momentum step until its second moment is reliable.

    A drop-in for `tfa.optimizers.RectifiedAdam`. $\hat m$ and $\hat v$ are Adam's moments with their bias removed, and
    $\rho_t$ is the number of gradients in $\hat v$:

    .. math::

        \theta \leftarrow \theta - \eta (u + \lambda \theta), \qquad
        u = r_t \frac{\hat m}{\sqrt{\hat v} + \epsilon} \text{ if } \rho_t \ge \rho_\text{min}, \text{ else } \hat m.

    Args:
        learning_rate: Float >= 0, schedule, config of a schedule, tensor or callable ($\eta$). Defaults to 0.001.
        beta_1, beta_2: Floats in [0, 1), the decay rates of the first and the second moment. Default to 0.9 and 0.999.
        epsilon: Float >= 0 ($\epsilon$). 0 and `None` stand for `keras.backend.epsilon()`. Defaults to 1e-7.
        weight_decay: As `learning_rate`, by which it is multiplied ($\lambda$). Defaults to 0.
        amsgrad: Boolean, whether the largest second moment so far is used. Defaults to `False`.
        sma_threshold: Float >= 4, the number of gradients from which the step is rectified ($\rho_\text{min}$).
            Defaults to 5.
        total_steps: Integer >= 0, the number of training steps, or 0. If it is not 0, the learning rate rises from 0 in
            the first `warmup_proportion` of these steps, and falls to `min_lr` in the others. Defaults to 0.
        warmup_proportion: Float in [0, 1], the part of `total_steps` in which the learning rate rises. Defaults to 0.1.
        min_lr: Float in [0, `learning_rate`], the learning rate after `total_steps`. Defaults to 0.
        name: String, the name of the optimizer and of its operations. Defaults to `"RectifiedAdam"`.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`; `lr`, another name of `learning_rate`; `decay`,
            inverse-time decay of the learning rate, per step.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is unknown, or if a value is out of range.

    Example:

    >>> variable = tf.Variable(1.0)
    >>> operation = RectifiedAdam(0.1).apply_gradients([(tf.constant(2.0), variable)])  # `u` is the gradient.
    >>> round(float(variable), 4)
    0.8

    References:
        Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
        <https://arxiv.org/abs/1908.03265>`__, 2019.
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`__, 2017.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: float | None = 1e-7,
        weight_decay: Any = 0.0,
        amsgrad: bool = False,
        sma_threshold: Any = 5.0,
        total_steps: int = 0,
        warmup_proportion: Any = 0.1,
        min_lr: Any = 0.0,
        name: str = "RectifiedAdam",
        **kwargs: Any,
    ) -> None:
        self._active: set[str] = set()
        learning_rate = kwargs.pop("lr", learning_rate)
        check_keywords(kwargs)
        epsilon, amsgrad = check_setting("epsilon", epsilon or 0), check_flag("amsgrad", amsgrad)
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, name, **kwargs)
        for hyper, value in zip(_HYPERS, (weight_decay, sma_threshold, total_steps, warmup_proportion, min_lr)):
            self._set_hyper(hyper, value)
        check_warm_up(total_steps, min_lr, learning_rate)

    def _set_hyper(self, name: str, value: Any) -> None:
        super()._set_hyper(name, value)
        if name in ("weight_decay", "total_steps"):
            # A setting that is off costs no time.
            self._active.discard(name) if isinstance(value, numbers.Real) and not value else self._active.add(name)

    def _prepare_local(self, var_device: Any, var_dtype: Any, apply_state: Any) -> None:
        # In half precision the step count and 1 - beta_2 have too few digits. Float32 is not widened, so that the
        # results are equal to TensorFlow Addons'. There rho is a small difference of large numbers, and its rounding
        # shows in all weights.
        dtype = tf.float32 if var_dtype.size < 4 else var_dtype
        step = tf.cast(self.iterations + 1, dtype)
        hypers = ("beta_1", "beta_2", "sma_threshold", "weight_decay")
        beta_1, beta_2, threshold, weight_decay = (self._get_hyper(name, dtype) for name in hypers)
        if isinstance(weight_decay, keras.optimizers.schedules.LearningRateSchedule):
            weight_decay = tf.cast(weight_decay(self.iterations), dtype)
        power = tf.pow(beta_2, step)
        unbiased = 1.0 / (1.0 - tf.pow(beta_1, step)), 1.0 / (1.0 - power)
        longest = 2.0 / (1.0 - beta_2) - 1.0
        rho = longest - 2.0 * step * power * unbiased[1]
        apply_state[(var_device, var_dtype)].update(
            learning_rate=self._warmed_up(self._decayed_lr(dtype), step),
            weight_decay=weight_decay,
            epsilon=tf.convert_to_tensor(self.epsilon, dtype),
            betas=((beta_1, 1.0 - beta_1), (beta_2, 1.0 - beta_2)),
            unbiased=unbiased,
            is_rectified=rho >= threshold,
            rectification=tf.sqrt((rho - 4.0) / (longest - 4.0) * (rho - 2.0) / (longest - 2.0) * longest / rho),
        )

    def _warmed_up(self, rate: Any, step: Any) -> Any:
        if "total_steps" not in self._active:
            return rate
        total_steps, proportion, lowest = (self._get_hyper(name, step.dtype) for name in _HYPERS[2:])
        rising = total_steps * proportion
        falling = tf.maximum(total_steps - rising, 1)
        fallen = (lowest - rate) / falling * tf.minimum(step - rising, falling)
        return tf.where(step <= rising, rate * (step / rising), rate + fallen)

    def _resource_apply_sparse(self, grad: Any, var: Any, indices: Any, apply_state: Any = None) -> Any:
        return self._resource_apply_dense(grad, var, apply_state, indices)

    def _resource_apply_dense(self, grad: Any, var: Any, apply_state: Any = None, indices: Any = None) -> Any:
        key = var.device, var.dtype.base_dtype
        now = (apply_state or {}).get(key) or self._fallback_apply_state(*key)
        dtype = now["epsilon"].dtype
        rows: Any = (lambda value: value) if indices is None else (lambda value: tf.gather(value, indices))
        grad, old, new = tf.cast(grad, dtype), tf.cast(rows(var), dtype), {}
        for name, (beta, rest), term in zip("mv", now["betas"], (grad, tf.square(grad))):
            kept, added = beta * tf.cast(self.get_slot(var, name), dtype), rest * term
            new[name] = kept + added if indices is None else tf.tensor_scatter_nd_add(kept, indices[:, None], added)
        if self.amsgrad:
            new["vhat"] = tf.maximum(tf.cast(self.get_slot(var, "vhat"), dtype), new["v"])
        mean = rows(new["m"]) * now["unbiased"][0]
        deviation = tf.sqrt(rows(new["vhat" if self.amsgrad else "v"]) * now["unbiased"][1])
        change = tf.where(now["is_rectified"], now["rectification"] * mean / (deviation + now["epsilon"]), mean)
        if "weight_decay" in self._active:
            change += now["weight_decay"] * old
        moved = tf.cast(old - now["learning_rate"] * change, var.dtype)
        updates = [self.get_slot(var, name).assign(tf.cast(moment, var.dtype)) for name, moment in new.items()]
        updates.append(var.assign(moved) if indices is None else var.scatter_update(tf.IndexedSlices(moved, indices)))
        return tf.group(*updates)

    def get_config(self) -> dict[str, Any]:
        """Return the config, from which `from_config` makes the same optimizer, without its state."""
        values = {name: self._serialize_hyperparameter(name) for name in ("decay", *_HYPERS)}
        return {**super().get_config(), **values, "total_steps": int(values["total_steps"])}


# In the config of another optimizer, such as a `LossScaleOptimizer`, Keras leaves out the package.
keras.utils.get_custom_objects().setdefault("RectifiedAdam", RectifiedAdam)
