"""The `RectifiedAdam` optimizer."""

import math
from typing import Any

import keras
from keras import ops

from lookahead_optim._adam_settings import check_flag, check_keywords, check_setting
from lookahead_optim.keras._warm_up import WarmUp

__all__ = ["RectifiedAdam"]

# The class of Adam on this backend: on PyTorch Keras makes a subclass that moves all weights at once.
_Adam: Any = type(keras.optimizers.Adam.__new__(keras.optimizers.Adam))


@keras.saving.register_keras_serializable(package="lookahead_optim")
class RectifiedAdam(_Adam):
    r"""Adam that takes a plain momentum step until its second moment is reliable.

    $\hat m$ and $\hat v$ are Adam's moments with their bias removed, and $\rho_t$ is the number of gradients in
    $\hat v$:

    .. math::

        \theta \leftarrow \theta - \eta u, \qquad
        u = r_t \frac{\hat m}{\sqrt{\hat v} + \epsilon} \text{ if } \rho_t \ge \rho_\text{min}, \text{ else } \hat m.

    It computes the same numbers as `tfa.optimizers.RectifiedAdam`, except that each row of an embedding moves in each
    step.

    Args:
        learning_rate: Float >= 0, a `LearningRateSchedule` or a callable ($\eta$). Defaults to 0.001.
        beta_1, beta_2: Floats in [0, 1), the decay rates of the first and the second moment. Default to 0.9 and 0.999.
        epsilon: Float >= 0 ($\epsilon$). Defaults to 1e-7.
        amsgrad: Boolean, whether the largest second moment so far is used. Defaults to `False`.
        sma_threshold: Float >= 4, the number of gradients from which the step is rectified ($\rho_\text{min}$).
            Defaults to 5.
        total_steps: Integer >= 0, the number of training steps, or 0. If it is not 0, the learning rate is a schedule:
            it rises from 0 in the first `warmup_proportion` of these steps, and falls to `min_lr` in the others.
            Defaults to 0.
        warmup_proportion: Float in [0, 1], the part of `total_steps` in which the learning rate rises. Defaults to 0.1.
        min_lr: Float in [0, `learning_rate`], the learning rate after `total_steps`. Defaults to 0.
        **kwargs: Other arguments of `keras.optimizers.Adam`: `weight_decay`, `clipnorm`, `use_ema` and others.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is unknown, or if a value is out of range.

    Example:

    >>> variable = keras.Variable(1.0)
    >>> RectifiedAdam(0.1).apply([ops.convert_to_tensor(2.0)], [variable])  # `u` is the gradient.
    >>> round(float(ops.convert_to_numpy(variable)), 4)
    0.8

    References:
        Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
        <https://arxiv.org/abs/1908.03265>`__, 2019.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        sma_threshold: float = 5.0,
        total_steps: int = 0,
        warmup_proportion: float = 0.1,
        min_lr: float = 0.0,
        **kwargs: Any,
    ) -> None:
        peak = learning_rate if callable(learning_rate) else check_setting("learning_rate", learning_rate)
        warm_up = WarmUp(peak, total_steps, warmup_proportion, min_lr)
        check_keywords(kwargs)
        beta_1, beta_2 = check_setting("beta_1", beta_1), check_setting("beta_2", beta_2)
        epsilon, amsgrad = check_setting("epsilon", epsilon), check_flag("amsgrad", amsgrad)
        super().__init__(warm_up if total_steps else peak, beta_1, beta_2, epsilon, amsgrad, **{"name": None, **kwargs})
        self.sma_threshold = check_setting("sma_threshold", sma_threshold)

    def _scalars(self, learning_rate: Any, dtype: str) -> tuple[Any, Any, Any]:
        """Return three scalars. The step is `rate * m / (root * sqrt(v) + epsilon)`, rectified or not."""
        # rho = longest - 2 t beta^t / (1 - beta^t) is a small difference of large numbers. In float32 it has only three
        # digits. With x = -t log(beta), what is left of the difference is 1 - x / expm1(x), or a series where x is
        # small.
        step, rate = ops.cast(self.iterations + 1, dtype), ops.cast(learning_rate, dtype)
        log_1, log_2 = (-math.log(max(beta, 1e-30)) for beta in (self.beta_1, self.beta_2))
        biased, x = -ops.expm1(-step * log_1), step * log_2
        longest = 2.0 / (1.0 - self.beta_2) - 1.0
        series = x * (1 / 2 - x * (1 / 12 - x**2 * (1 / 720 - x**2 * (1 / 30240 - x**2 / 1209600))))
        rho = 2.0 / log_2 * ops.where(x < 0.25, series, 1.0 - x / ops.expm1(x)) + (longest - 2.0 / log_2)
        share = longest / ((longest - 4.0) * (longest - 2.0)) if longest > 4.0 else 0.0
        squared = ops.maximum(share * (rho - 4.0) * (rho - 2.0) / rho, 0.0)
        is_rectified = rho >= self.sma_threshold
        # Roots and quotients come last: XLA computes other scalars again for each number of a weight.
        root = ops.sqrt(ops.where(is_rectified, -1.0 / ops.expm1(-x), 0.0))
        epsilon = ops.sqrt(ops.where(is_rectified, float(self.epsilon) ** 2, 1.0))
        return rate * ops.sqrt(ops.where(is_rectified, squared, 1.0)) / biased, root, epsilon

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        # The scalars are computed once for all weights. Keras calls no public method at this moment.
        dtypes = {keras.backend.standardize_dtype(variable.dtype) for variable in trainable_variables}
        scalars = self._scalars(learning_rate, "float64" if "float64" in dtypes else "float32")
        super()._backend_update_step(grads, trainable_variables, scalars)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move one variable.

        Args:
            gradient: Tensor of the variable's shape.
            variable: The variable.
            learning_rate: The learning rate, or the result of `_scalars` for it.
        """
        dtype = keras.backend.standardize_dtype(variable.dtype)
        # In float16 the square of a gradient of 256 would be infinite.
        dtype = "float32" if dtype in ("float16", "bfloat16") else dtype
        scalars = learning_rate if isinstance(learning_rate, tuple) else self._scalars(learning_rate, dtype)
        rate, root, epsilon = (ops.cast(scalar, dtype) for scalar in scalars)
        index, gradient = self._get_variable_index(variable), ops.cast(gradient, dtype)
        old_m, old_v = ops.cast(self._momentums[index], dtype), ops.cast(self._velocities[index], dtype)
        m = ops.add(old_m, ops.multiply(ops.subtract(gradient, old_m), 1 - self.beta_1))
        v = ops.add(old_v, ops.multiply(ops.subtract(ops.square(gradient), old_v), 1 - self.beta_2))
        self.assign(self._momentums[index], m)
        self.assign(self._velocities[index], v)
        if self.amsgrad:
            v = ops.maximum(ops.cast(self._velocity_hats[index], dtype), v)
            self.assign(self._velocity_hats[index], v)
        change = ops.divide(ops.multiply(m, rate), ops.add(ops.multiply(ops.sqrt(v), root), epsilon))
        self.assign(variable, ops.subtract(ops.cast(variable, dtype), change))

    def _parallel_update_step(self, grads: Any, variables: Any, learning_rate: Any) -> None:
        """Move all variables at once, on PyTorch."""
        import torch

        if any(variable.value.dtype.itemsize < 4 for variable in variables):
            for gradient, variable in zip(grads, variables):
                self.update_step(gradient, variable, learning_rate)
            return
        rate, root, epsilon = learning_rate
        indices = [self._get_variable_index(variable) for variable in variables]
        m, v = ([moments[index].value for index in indices] for moments in (self._momentums, self._velocities))
        grads = [gradient.to(average.dtype) for gradient, average in zip(grads, m)]
        torch._foreach_lerp_(m, grads, 1 - self.beta_1)
        torch._foreach_mul_(v, self.beta_2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - self.beta_2)
        if self.amsgrad:
            largest = [self._velocity_hats[index].value for index in indices]
            torch._foreach_maximum_(largest, v)
            v = largest
        deviation = torch._foreach_sqrt(v)
        torch._foreach_mul_(deviation, root)
        torch._foreach_add_(deviation, epsilon)
        weights = [variable.value for variable in variables]
        torch._foreach_addcdiv_(weights, torch._foreach_mul(m, rate), deviation, value=-1)

    def get_config(self) -> dict[str, Any]:
        """Return the config, from which `from_config` makes the same optimizer, without its state."""
        warm_up = self._learning_rate.get_config() if isinstance(self._learning_rate, WarmUp) else {}
        return {**super().get_config(), "sma_threshold": self.sma_threshold, **warm_up}
