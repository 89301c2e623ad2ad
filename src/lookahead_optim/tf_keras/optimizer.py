"""The `Lookahead` optimizer for Keras 2: Keras' protocol around the inner optimizer and the slow weights.

Where things happen:

- a sync: `apply_gradients`, `SlowWeights._synchronize` in `_slow_weights.py`, and `synchronize` in
  `../_outer_step_tensorflow.py`. The arithmetic is in `slow_step` there, and on a CPU in `_interpolate_in_place`;
- capture of a new variable: `SlowWeights._create_slots`, by the initial value of its slot;
- capture of all variables, before the first applied step: `SlowWeights._capture`, as long as `_capture_state` asks for
  it. `_mark_captured` ends that;
- what is saved: `_saving.py`;
- a skipped step: the period counts `_steps` of `_count.py`. That is `iterations`. Under a loss scaler it is
  `_applied_steps`, which `_count_and_mark` raises only after an update;
- a frozen weight: `SlowWeights._synchronize`.

An averaging wrapper around this optimizer calls none of these. It makes its step by `_one_variable.py`.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from lookahead_optim._checks import (
    OVER_RELAXATION,
    check_outside_block,
    check_slow_step_size,
    check_sync_period,
    explain_other_names,
    warn_if_over_relaxed,
    warn_if_within_first_cycle,
)
from lookahead_optim._control_flow_tensorflow import after, operations
from lookahead_optim.tf_keras._configure import checked_settings, configure, deserialize, legacy_form
from lookahead_optim.tf_keras._count import has_crossed, to_int
from lookahead_optim.tf_keras._inner_methods import coming_back, is_overridden
from lookahead_optim.tf_keras._keras import keras
from lookahead_optim.tf_keras._one_variable import step_of_one_variable
from lookahead_optim.tf_keras._saving import Saving
from lookahead_optim.tf_keras._slow_weights import NEVER, wrappers_in

__all__ = ["Lookahead"]

LegacyOptimizer = keras.optimizers.legacy.Optimizer


def _clipping(name: str) -> property:
    """Return the property for one kind of clipping: the wrapper's own value if set, else the inner optimizer's."""
    own = getattr(LegacyOptimizer, name)

    def get(self: Any) -> Any:
        inner, value = self.__dict__.get("_optimizer"), own.fget(self)
        return value if value is not None or inner is None else getattr(inner, name)

    def set_(self: Any, value: Any) -> None:
        inner = self.__dict__.get("_optimizer")
        if inner is None or own.fget(self) is not None:
            own.fset(self, value)
        if inner is not None and (value is None or own.fget(self) is None):
            setattr(inner, name, value)

    return property(get, set_, doc=f"The wrapper's own `{name}` if it was given one, else the inner optimizer's.")


# The protocol of Keras. The base classes are `Saving` (files), on top of `SlowWeights` (which variables have slow
# weights, capture, sync), on top of `Counting` (the step count).
@keras.utils.register_keras_serializable(package="Addons")
class Lookahead(Saving):
    r"""Lookahead: `k` steps forward, one step back. A drop-in for `tfa.optimizers.Lookahead`.

    The inner optimizer moves the variables. These are the *fast* weights $\theta$. A second copy of them is kept, the
    *slow* weights $\phi$. After every `sync_period` ($k$) steps of the inner optimizer a *sync* moves the slow weights
    towards the fast weights. The fast weights then restart from the slow weights:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.

    The slow weights are captured from the variables immediately before the first step. They take the memory of one more
    copy of the variables. `iterations` counts the steps. A `LossScaleOptimizer` around this optimizer adds the steps
    that it skips to `iterations`. In that case the applied steps have a count of their own, the last of `weights`.

    At a sync every variable that the step was given takes part, with or without a gradient. A variable that the step
    was not given is frozen: the sync does not move it, and its slow weight is captured again from it. Under a
    `LossScaleOptimizer` such a variable takes part, as the scaler leaves variables out by itself. A constraint is
    applied to the fast weight.

    Weights, slots and checkpoints have the same names and the same order as in TensorFlow Addons. So files of
    TensorFlow Addons load here.

    A `Lookahead` may be inside another `Lookahead`. Both count the steps of the innermost optimizer. At a sync of the
    outer wrapper all weights restart from the outer wrapper's slow weights, and so do the slow weights of the inner
    wrapper.

    Args:
        optimizer: The inner optimizer: a `keras.optimizers.legacy.Optimizer`, a name or config of a legacy optimizer,
            or an optimizer of Keras 2's newer kind, which is converted.
        sync_period: Integer >= 0, the number of inner steps per sync ($k$). 0 switches Lookahead off: the wrapper then
            behaves as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$): the part of the way to the fast weights that
            the slow weights move at a sync. 1 gives the inner optimizer. Above 1 there is a `UserWarning`. A scalar
            tensor or variable is also possible, and its value is not checked. A schedule is not possible. Defaults to
            0.5.
        name: String, the name of the optimizer and of its operations. Defaults to `"Lookahead"`.
        **kwargs: `clipnorm`, `clipvalue` or `global_clipnorm`, finite and >= 0 as in Keras 2 (> 0 in Keras 3). The
            wrapper clips gradients with them, before the inner optimizer clips by its own settings. Also
            `learning_rate` or `lr`, and `decay` (inverse-time decay, per step), which are set on the inner optimizer.

    Raises:
        TypeError: if an argument has the wrong type, is unknown, or has another implementation's name. (Keras 2 raises
            `TypeError` for an unknown keyword, Keras 3 `ValueError`.)
        ValueError: if a value is out of range, or if the inner optimizer has no legacy form.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = Lookahead(keras.optimizers.legacy.SGD(0.1), sync_period=5, slow_step_size=0.5)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(tf.ones((8, 3)), tf.ones((8, 1)), epochs=5, verbose=0)
    >>> bool(tf.reduce_all(optimizer.get_slot(model.weights[0], "slow") == model.weights[0]))
    True

    References:
        Zhang, Lucas, Hinton and Ba, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`__, 2019, Algorithm 1.
    """

    _HAS_AGGREGATE_GRAD = True

    @explain_other_names("optimizer")
    def __init__(
        self,
        optimizer: Any,
        sync_period: int = 6,
        slow_step_size: Any = 0.5,
        name: str = "Lookahead",
        **kwargs: Any,
    ) -> None:
        inner = legacy_form(optimizer)
        learning_rate, decay = checked_settings(kwargs)
        for key in ("learning_rate", "lr", "decay"):
            kwargs.pop(key, None)
        super().__init__(name, **kwargs)
        self._set_hyper("sync_period", sync_period)
        self._set_hyper("slow_step_size", slow_step_size)
        self._own_aggregator = kwargs.get("gradient_aggregator") is not None
        self._optimizer = inner
        configure(inner, learning_rate, decay)
        self._track_trackable(self._optimizer, "lh_base_optimizer")

    def __repr__(self) -> str:
        inner = self.__dict__.get("_optimizer")
        if inner is None:
            return super().__repr__()
        # Keras' optimizers have Python's default `repr`.
        shown = repr(inner) if isinstance(inner, Lookahead) else f"<{type(inner).__name__} {inner._name!r}>"
        settings = ", ".join(f"{name}={self._hyper[name]!r}" for name in ("sync_period", "slow_step_size"))
        return f"{type(self).__name__}({shown}, {settings})"

    @property
    def inner_optimizer(self) -> Any:
        """The inner optimizer."""
        return self._optimizer

    clipnorm = _clipping("clipnorm")
    global_clipnorm = _clipping("global_clipnorm")
    clipvalue = _clipping("clipvalue")

    def __getattr__(self, name: str) -> Any:
        # All that the wrapper lacks: settings, attributes and methods of the inner optimizer.
        inner = self.__dict__.get("_optimizer")
        if inner is None or name.startswith("_"):
            raise AttributeError(f"`{type(self).__name__}` has no attribute {name!r}")
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_optimizer")
        is_own = inner is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if is_own or name in self._hyper or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    def _get_hyper(self, name: str, dtype: Any = None) -> Any:
        return super()._get_hyper(name, dtype) if name in self._hyper else self._optimizer._get_hyper(name, dtype)

    def _set_hyper(self, name: str, value: Any) -> None:
        if name == "sync_period":
            value = check_sync_period(value)
        elif name == "slow_step_size" and not tf.is_tensor(value):
            value = check_slow_step_size(value)
            # Keras' `__setattr__` and this class' own are between this line and the user's line. In the constructor
            # there are also two calls.
            warn_if_over_relaxed(value, stacklevel=4)
        owner: Any = self._optimizer if name == "learning_rate" else super()
        owner._set_hyper(name, value)
        if name == "sync_period":
            # Slots may have to be made now. Slow weights from before a period of 0 are no longer valid.
            self._complete.clear()
            self._block.note_period_set(self._count)
            if not value and self._capture_state is not None:
                self._capture_state.assign(NEVER)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate. It can be set."""
        return self._optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self._optimizer.learning_rate = learning_rate

    @property
    def lr(self) -> Any:
        """The inner optimizer's learning rate. It can be set."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate: Any) -> None:
        self.learning_rate = learning_rate

    def minimize(
        self, loss: Any, var_list: Any, grad_loss: Any = None, name: str | None = None, tape: Any = None, **kwargs: Any
    ) -> Any:
        """Compute gradients and make a step.

        Args:
            loss: Callable that returns the loss, or a tensor with the `tape` that computed it.
            var_list: List of variables, or a callable that returns the list.
            grad_loss: Tensor, the gradient of the loss. Defaults to ones.
            name: String, the name of the operation. Defaults to the name of the optimizer.
            tape: The `tf.GradientTape` of a `loss` that is a tensor.
            **kwargs: Other arguments of the inner optimizer's `minimize`.

        Returns:
            The operation, in a graph.
        """
        if not is_overridden(self._optimizer, "minimize"):
            return super().minimize(loss, var_list, grad_loss, name, tape, **kwargs)
        with coming_back(self._optimizer, self.apply_gradients, "minimize"):
            return self._optimizer.minimize(loss, var_list, grad_loss=grad_loss, name=name, tape=tape, **kwargs)

    def get_updates(self, loss: Any, params: Any) -> list[Any]:
        """Return the operations of a step, in a graph of TensorFlow 1.

        Args:
            loss: Tensor.
            params: List of variables.
        """
        if not is_overridden(self._optimizer, "get_updates"):
            return super().get_updates(loss, params)
        with coming_back(self._optimizer, self.apply_gradients, "get_updates"):
            return self._optimizer.get_updates(loss, params)

    def get_gradients(self, loss: Any, params: Any) -> list[Any]:
        """Return the inner optimizer's gradients, in a graph of TensorFlow 1.

        Args:
            loss: Tensor.
            params: List of variables.
        """
        return self._optimizer.get_gradients(loss, params)

    def _compute_gradients(self, *args: Any, **kwargs: Any) -> Any:
        return self._optimizer._compute_gradients(*args, **kwargs)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Any],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Let the inner optimizer make one step, then make a sync if it is due.

        Args:
            grads_and_vars: Pairs of a gradient (dense, sparse or `None`) and its variable.
            name: String, the name of the operation. Defaults to the name of the optimizer.
            experimental_aggregate_gradients: Boolean, whether gradients are summed over the replicas of a
                `tf.distribute` strategy. Defaults to `True`.
            **kwargs: Other arguments of the inner optimizer's `apply_gradients`.

        Returns:
            The operation, in a graph.

        Raises:
            TypeError: if `grads_and_vars` is not made of pairs.
            ValueError: if no variable has a gradient.
            RuntimeError: inside a `slow_weights()` block, or in a cross-replica context.
        """
        check_outside_block(self._block.is_open, "apply_gradients(grads_and_vars)")
        # Training continues from the weights in the model. In `fit` the callback has put the fast weights back before.
        self._block.loaded = {}
        pairs = _check_pairs(grads_and_vars)
        if name is not None:
            kwargs["name"] = name
        variables = [variable for gradient, variable in pairs if gradient is not None]
        if not variables or tf.distribute.in_cross_replica_context():
            # The inner optimizer raises its own error.
            return self._inner_step(pairs, experimental_aggregate_gradients, kwargs)
        with tf.name_scope(self._name):
            with tf.init_scope():
                self._create_all_weights(variables)
            captured = self._capture()
            with after(captured):
                steps_before, iterations_before = tf.identity(self._steps), tf.identity(self.iterations)
            # The reads come first, in a graph of TensorFlow 1 too.
            with after(captured, steps_before, iterations_before):
                applied = self._inner_step(pairs, experimental_aggregate_gradients, kwargs)
            # A step that fails, for example at the end of a dataset, ends here: the count comes after all updates.
            with after(applied):
                marked = self._count_and_mark(iterations_before)
            with after(applied, *marked):
                synchronized = self._synchronize(
                    has_crossed(steps_before, self.sync_period), [variable for _, variable in pairs]
                )
            if tf.compat.v1.executing_eagerly_outside_functions():
                return applied
            # In a graph of TensorFlow 1 nothing else makes the other operations run.
            return tf.group(*operations(applied, *marked, synchronized))

    def _inner_step(self, pairs: list[Any], aggregate: bool, kwargs: dict[str, Any]) -> Any:
        """Make the inner optimizer's step by its own `apply_gradients`, after the wrapper's own clipping."""
        inner = self._optimizer
        clips = any(clip is not None for clip in (self._clipnorm, self._clipvalue, self._global_clipnorm))
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if clips or self.gradient_transformers or self._own_aggregator:
            pairs = [pair for pair in pairs if pair[0] is not None]
            if aggregate and (replicas > 1 or self._own_aggregator):
                pairs, aggregate = self._aggregate_gradients(self._transform_unaggregated_gradients(pairs)), False
            pairs = self._transform_gradients(pairs)
        if not aggregate and (replicas > 1 or _takes(inner.apply_gradients, "experimental_aggregate_gradients")):
            kwargs = {**kwargs, "experimental_aggregate_gradients": False}
        return inner.apply_gradients(pairs, **kwargs)

    def _transform_unaggregated_gradients(self, grads_and_vars: Any) -> Any:
        # A `LossScaleOptimizer` around this optimizer begins its step with this call, and may then skip the step.
        with tf.init_scope():
            self._create_applied_steps()
        return self._optimizer._transform_unaggregated_gradients(grads_and_vars)

    def _aggregate_gradients(self, grads_and_vars: Any) -> Any:
        aggregate = super()._aggregate_gradients if self._own_aggregator else self._optimizer._aggregate_gradients
        return aggregate(grads_and_vars)

    def _count_and_mark(self, iterations_before: Any) -> list[Any]:
        """If the inner optimizer has counted a step, count an applied step and mark the slow weights as captured."""
        if tf.executing_eagerly() and self._applied_steps is None and self._is_captured():
            return []
        made = self.iterations - iterations_before
        # Wrappers share the count of applied steps. The innermost wrapper adds to it.
        is_innermost = not isinstance(self._optimizer, Lookahead)
        counted = []
        if self._applied_steps is not None and is_innermost:
            counted.append(self._applied_steps.assign_add(made, read_value=False))
        return [*counted, *self._mark_captured(made)]

    # Only averaging wrappers around this optimizer call these three methods. `apply_gradients` above does not.

    def _resource_apply_dense(self, grad: Any, var: Any, apply_state: Any = None) -> Any:
        return step_of_one_variable(self, "_dense_apply_args", "_resource_apply_dense", var, (grad, var), apply_state)

    def _resource_apply_sparse(self, grad: Any, var: Any, indices: Any, apply_state: Any = None) -> Any:
        method = "_resource_apply_sparse"
        return step_of_one_variable(self, "_sparse_apply_args", method, var, (grad, var, indices), apply_state)

    def _resource_apply_sparse_duplicate_indices(
        self, grad: Any, var: Any, indices: Any, apply_state: Any = None
    ) -> Any:
        method = "_resource_apply_sparse_duplicate_indices"
        return step_of_one_variable(self, "_sparse_apply_args", method, var, (grad, var, indices), apply_state)

    def _create_hypers(self) -> None:
        self._optimizer._create_hypers()

    def _prepare_local(self, var_device: Any, var_dtype: Any, apply_state: Any) -> Any:
        return self._optimizer._prepare_local(var_device, var_dtype, apply_state)

    def sync(self) -> None:
        """Make a sync now, for the end of a run that does not end on a sync. A second call changes nothing.

        Every variable that has a slow weight takes part. A call before the first step changes nothing.

        There is a `UserWarning` if all of this holds: fewer steps than `sync_period` were applied, the slow step size
        is below 1, and neither `sync` nor `reset_slow_weights` was called before. The slow weights of such a short run
        are still the weights with which training began, so the sync takes back a part of the training. In a
        `tf.function` there is no warning.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or in a graph of TensorFlow 1.
        """
        self._check_eager("sync()")
        self._end_block_of_callback("sync()")
        # A wrapper that was just switched on has no slow weights before its next step. Wrappers inside still restart.
        if any(wrapper._has_slow_weights() for wrapper in wrappers_in(self)):
            self._warn_if_within_first_cycle()
            self._capture()
            self._synchronize(lambda count: True)
            self._block.note_made_equal(self._count)

    def _warn_if_within_first_cycle(self) -> None:
        if tf.executing_eagerly() and self._has_slow_weights() and self._block.made_equal_at is None:
            slow_step_size = float(self._get_hyper("slow_step_size"))
            warn_if_within_first_cycle(self._count(), self.sync_period, slow_step_size, stacklevel=3)

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the variables again, for example after you restored the best weights.

        The next sync comes when it was due before. A call before the first step changes nothing.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or in a graph of TensorFlow 1.
        """
        self._check_eager("reset_slow_weights()")
        self._end_block_of_callback("reset_slow_weights()")
        self._reset()
        self._block.note_made_equal(self._count)

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Return a context manager that puts the slow weights into the model, for an evaluation or an export.

        At the end of the block the fast weights are back, bit for bit, also after an exception. Until then a copy of
        the fast weights takes the memory of one more set of weights. A block inside a block changes nothing. Training
        inside a block raises an error. A step that was compiled before the block cannot notice the block. Its changes
        of the weights are lost when the block ends.

        A model that is saved inside a block has the slow weights. The file has the fast weights too: as slots `"fast"`
        in a checkpoint, and at the end of `weights` in an `.h5` file. `fit` with the callback `SwapSlowWeights` resumes
        from the fast weights, bit for bit. Other training from such a file starts from the slow weights.

        Raises:
            RuntimeError: in a graph of TensorFlow 1.
        """
        self._check_eager("slow_weights()")
        if self._block.is_open:
            yield
            return
        if self._has_slow_weights():
            self._capture()
        with self._block.run(self._pairs_to_swap(), self._count()):
            yield

    # The callback `SwapSlowWeights` calls these methods.

    def _end_block_of_callback(self, caller: str) -> None:
        """End the block of a `SwapSlowWeights`, which lasts until the next epoch. Inside another block raise an error.

        Another callback may have put weights into the model at the end of the epoch. These weights stay.
        """
        if self._block.is_of_callback:
            self._leave_slow_weights()
        check_outside_block(self._block.is_open, caller)

    def _enter_slow_weights(self) -> None:
        self._check_eager("slow_weights()")
        self._capture()
        pairs = self._pairs_to_swap()
        self._block.open(pairs, self._block.copies(pairs), self._count())

    def _pairs_to_swap(self) -> list[Any]:
        return self._pairs()

    def _count(self) -> int:
        return 0 if self._iterations is None else to_int(self._steps)

    def _leave_slow_weights(self, is_last: bool = True) -> None:
        if self._block.is_open:
            self._block.leave(self._count(), self._averages(), is_last)

    def _averages(self) -> dict[int, Any]:
        """Return none: there is no `SwapEMAWeights` in Keras 2."""
        return {}

    def _take_loaded_fast_weights(self) -> None:
        if loaded := self._loaded_fast_weights():
            slots = {id(pair.fast): pair.slow for pair in self._pairs()}
            variables = [variable for variable, _ in self._block.loaded.values()]
            # If a checkpoint is restored in `fit`, the first step makes the slots. Until then there is nothing to
            # compare with.
            self._block.put_back(loaded, [(slots.get(id(variable), variable), variable) for variable in variables])
        self._block.loaded = {}

    def _check_eager(self, caller: str) -> None:
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise RuntimeError(
                f"`{caller}` needs eager execution. Received: a call in a graph of TensorFlow 1. Training works there; "
                f"for `{caller}` load the weights in a program without `tf.compat.v1.disable_eager_execution()`."
            )

    def get_config(self) -> dict[str, Any]:
        """Return the config, from which `from_config` makes the same optimizer, without its state."""
        config = super().get_config()
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            if self.__dict__[f"_{name}"] is None:
                # The value is the inner optimizer's.
                config.pop(name, None)
        return {
            **config,
            "optimizer": keras.optimizers.serialize(self._optimizer),
            "sync_period": self._serialize_hyperparameter("sync_period"),
            "slow_step_size": self._serialize_hyperparameter("slow_step_size"),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Lookahead":
        """Make an optimizer from its config, or from a config of TensorFlow Addons. The config is not changed.

        Args:
            config: Dictionary, as from `get_config`.
            custom_objects: Dictionary from names to classes and functions that are not registered with Keras.
        """
        config = copy.deepcopy(config)
        config.pop("is_legacy_optimizer", None)
        optimizer = config.pop("optimizer")
        if isinstance(optimizer, dict):
            optimizer = deserialize(optimizer, custom_objects)
        with warnings.catch_warnings():
            # The warning came when the config's optimizer was made.
            warnings.filterwarnings("ignore", OVER_RELAXATION)
            return cls(optimizer, **config)


# In the config of another optimizer, such as a `LossScaleOptimizer`, Keras leaves out the package.
keras.utils.get_custom_objects().setdefault("Lookahead", Lookahead)


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _check_pairs(grads_and_vars: Any) -> list[tuple[Any, Any]]:
    try:
        pairs = [tuple(pair) for pair in grads_and_vars]
    except TypeError as error:
        raise TypeError(
            f"`grads_and_vars` must be pairs of gradient and variable. Received: {grads_and_vars!r}"
        ) from error
    for pair in pairs:
        if len(pair) != 2 or not hasattr(pair[1], "assign"):
            raise TypeError(f"`grads_and_vars` must be pairs of gradient and variable. Received: {pair!r}")
    return pairs
