"""The `AdamW` optimizer."""

import re
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from lookahead_optim._adam_settings import check_flag, check_keywords, check_patterns, check_setting
from lookahead_optim.tf_keras._checked_adam import CheckedAdam
from lookahead_optim.tf_keras._keras import keras

__all__ = ["AdamW"]


@keras.utils.register_keras_serializable(package="Addons")
class AdamW(CheckedAdam):
    r"""Adam with decoupled weight decay. A drop-in for `tfa.optimizers.AdamW`.

    The weight decay $\lambda$ comes before Adam's step: $\theta \leftarrow \theta - \lambda \theta$. It is not
    multiplied by the learning rate. So give both the same schedule, or set `scale_by_learning_rate`, which multiplies
    them as `keras.optimizers.AdamW` does.

    Args:
        weight_decay: Float >= 0, schedule, config of a schedule, tensor or callable ($\lambda$).
        learning_rate: Float >= 0, schedule, config of a schedule, tensor or callable. Defaults to 0.001.
        beta_1, beta_2: Floats in [0, 1), the decay rates of the first and the second moment. Default to 0.9 and 0.999.
        epsilon: Float >= 0. 0 and `None` stand for `keras.backend.epsilon()`. Defaults to 1e-7.
        amsgrad: Boolean, whether the largest second moment so far is used. Defaults to `False`.
        name: String, the name of the optimizer and of its operations. Defaults to `"AdamW"`.
        exclude_from_weight_decay: List of regular expressions. A variable does not decay if an expression is found in
            its name, for example in `dense/bias:0`. Defaults to `None`.
        scale_by_learning_rate: Boolean, whether `weight_decay` is multiplied by the learning rate. Defaults to `False`.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`; `lr`, another name of `learning_rate`; `decay`,
            inverse-time decay of the learning rate, per step.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is unknown, or if a value is out of range.

    Example:

    >>> variable = tf.Variable(1.0)
    >>> operation = AdamW(weight_decay=0.5, learning_rate=0.1).apply_gradients([(tf.constant(2.0), variable)])
    >>> round(float(variable), 4)
    0.4

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`__, 2017.
    """

    def __init__(
        self,
        weight_decay: Any,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: float | None = 1e-7,
        amsgrad: bool = False,
        name: str = "AdamW",
        exclude_from_weight_decay: list[str] | None = None,
        scale_by_learning_rate: bool = False,
        **kwargs: Any,
    ) -> None:
        patterns = check_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        check_keywords(kwargs)
        epsilon, amsgrad = check_setting("epsilon", epsilon or 0), check_flag("amsgrad", amsgrad)
        super().__init__(kwargs.pop("lr", learning_rate), beta_1, beta_2, epsilon, amsgrad, name, **kwargs)
        self._set_hyper("weight_decay", weight_decay)
        self.exclude_from_weight_decay = patterns
        self.scale_by_learning_rate = check_flag("scale_by_learning_rate", scale_by_learning_rate)
        self._decayed: list[Any] | None = None

    def minimize(
        self,
        loss: Any,
        var_list: Any,
        grad_loss: Any = None,
        name: Any = None,
        decay_var_list: Any = None,
        tape: Any = None,
    ) -> Any:
        """Compute gradients of `loss`, and make a step as `apply_gradients`.

        Args:
            loss: Callable that returns the loss, or a tensor with the `tape` that computed it.
            var_list: List of variables, or a callable that returns the list.
            grad_loss: Tensor, the gradient of the loss. Defaults to ones.
            name: String, the name of the operation. Defaults to the name of the optimizer.
            decay_var_list: As for `apply_gradients`.
            tape: The `tf.GradientTape` of a `loss` that is a tensor.
        """
        grads_and_vars = self._compute_gradients(loss, var_list=var_list, grad_loss=grad_loss, tape=tape)
        return self.apply_gradients(grads_and_vars, name=name, decay_var_list=decay_var_list)

    def apply_gradients(
        self, grads_and_vars: Any, name: str | None = None, decay_var_list: Iterable[Any] | None = None, **kwargs: Any
    ) -> Any:
        """Make a step.

        Args:
            grads_and_vars: Pairs of a gradient (dense, sparse or `None`) and its variable.
            name: String, the name of the operation. Defaults to the name of the optimizer.
            decay_var_list: List of the variables that decay in this step. Defaults to `None`: all that are not
                excluded.
            **kwargs: `experimental_aggregate_gradients`.
        """
        pairs, variables = list(grads_and_vars), [] if decay_var_list is None else list(decay_var_list)
        if not all(isinstance(variable, tf.Variable) for variable in variables):
            raise TypeError(
                "`decay_var_list` must be a list of variables, of those that `grads_and_vars` holds. "
                f"Received: decay_var_list={decay_var_list!r}"
            )
        listed = {id(variable) for variable in variables}
        decayed = [variable for gradient, variable in pairs if gradient is not None and id(variable) in listed]
        self._decayed = decayed if listed else None
        return super().apply_gradients(pairs, name=name, **kwargs)

    def _prepare_local(self, var_device: Any, var_dtype: Any, apply_state: Any) -> None:
        super()._prepare_local(var_device, var_dtype, apply_state)
        now = apply_state[(var_device, var_dtype)]
        decay = self._get_hyper("weight_decay", var_dtype)
        if isinstance(decay, keras.optimizers.schedules.LearningRateSchedule):
            decay = tf.cast(decay(self.iterations), var_dtype)
        now["weight_decay"] = decay * now["lr_t"] if self.scale_by_learning_rate else tf.identity(decay)
        # A replica has its own variable, but all replicas share one slot.
        now["decayed"] = (
            None if self._decayed is None else {id(self.get_slot(variable, "m")) for variable in self._decayed}
        )

    def _resource_apply_dense(self, grad: Any, var: Any, apply_state: Any = None) -> Any:
        with tf.control_dependencies(self._decay(var, apply_state)):
            return super()._resource_apply_dense(grad, var, apply_state=apply_state)

    def _resource_apply_sparse(self, grad: Any, var: Any, indices: Any, apply_state: Any = None) -> Any:
        with tf.control_dependencies(self._decay(var, apply_state, indices)):
            return super()._resource_apply_sparse(grad, var, indices, apply_state=apply_state)

    def _decay(self, var: Any, apply_state: Any, indices: Any = None) -> list[Any]:
        """Decay a variable, or the rows `indices` of it; return the operations for which the step waits."""
        key = var.device, var.dtype.base_dtype
        now = (apply_state or {}).get(key) or self._fallback_apply_state(*key)
        name = re.sub(r"/replica_\d+(?=:\d+$)", "", var.name)
        is_excluded = any(re.search(pattern, name) for pattern in self.exclude_from_weight_decay or ())
        if is_excluded if now["decayed"] is None else id(self.get_slot(var, "m")) not in now["decayed"]:
            return []
        if indices is None:
            return [var.assign_sub(now["weight_decay"] * var)]
        return [var.scatter_sub(tf.IndexedSlices(now["weight_decay"] * tf.gather(var, indices), indices))]

    def get_config(self) -> dict[str, Any]:
        """Return the config, from which `from_config` makes the same optimizer, without its state."""
        # TensorFlow Addons does not know `scale_by_learning_rate`.
        own = {"scale_by_learning_rate": True} if self.scale_by_learning_rate else {}
        return {
            **super().get_config(),
            "weight_decay": self._serialize_hyperparameter("weight_decay"),
            "exclude_from_weight_decay": self.exclude_from_weight_decay,
            **own,
        }
