"""The `Lookahead` optimizer."""

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from lookahead_optim import _outer_step_tensorflow as _tensorflow
from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim._evaluation import Block
from lookahead_optim.tf_keras._configure import checked_settings, configure, legacy_form
from lookahead_optim.tf_keras._keras import keras

__all__ = ["Lookahead"]

LegacyOptimizer = keras.optimizers.legacy.Optimizer
# What `Lookahead._capture_state` says of the slow weights.
NEVER, RESTORED, CAPTURED = range(3)


def _clipping(name: str) -> property:
    """Return the property for one kind of clipping: the wrapper's own if it has one, else the inner optimizer's."""
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


@keras.utils.register_keras_serializable(package="Addons")
class Lookahead(keras.optimizers.legacy.Optimizer):
    r"""Lookahead: `k` steps forward, one step back. A drop-in for `tfa.optimizers.Lookahead`.

    Wraps an optimizer, which moves the variables, the *fast* weights $\theta$. After every `sync_period` ($k$) of its
    steps a second copy of them, the *slow* weights $\phi$, takes a step towards the fast ones, and these restart from
    there:

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.$$

    The slow weights are captured from the variables immediately before their first step. Steps are counted by
    `iterations`; with a `LossScaleOptimizer` around, which adds those that it skips to `iterations`, by a weight more,
    the last one. At a sync every variable takes part, with or without a gradient in this step; a constraint is applied
    to the fast weight. Weights, slots and checkpoints have the names and the order that they have in TensorFlow Addons,
    so that those written there load here.

    A `Lookahead` may be inside another. Both count the steps of the innermost optimizer, and all weights restart from
    those that the outer one has synchronised, the inner one's slow weights too.

    Args:
        optimizer: The inner optimizer: a `keras.optimizers.legacy.Optimizer`, a name or config of one, or an
            optimizer of Keras 2's newer kind, which is converted.
        sync_period: Integer >= 0, inner steps per slow step ($k$). 0 switches Lookahead off: the wrapper then behaves
            as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$), or a scalar tensor or variable, which is not
            checked. 1 recovers the inner optimizer. Defaults to 0.5.
        name: Name of the optimizer and its operations. Defaults to `"Lookahead"`.
        **kwargs: `clipnorm`, `clipvalue` or `global_clipnorm`, by which gradients are clipped, before the inner
            optimizer clips them by its own; `learning_rate` or `lr`, and `decay` (inverse-time decay, per step), which
            are set on the inner optimizer.

    Raises:
        TypeError: if an argument has the wrong type or is unknown.
        ValueError: if a value is out of range, or the inner optimizer has no legacy form.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = Lookahead(keras.optimizers.legacy.SGD(0.1), sync_period=5, slow_step_size=0.5)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(tf.ones((8, 3)), tf.ones((8, 1)), epochs=5, verbose=0)
    >>> bool(tf.reduce_all(optimizer.get_slot(model.weights[0], "slow") == model.weights[0]))
    True

    References:
        Zhang, Lucas, Hinton and Ba, [Lookahead Optimizer: k steps forward, 1 step
        back](https://arxiv.org/abs/1907.08610), 2019, Algorithm 1.
    """

    _HAS_AGGREGATE_GRAD = True
    _iterations: Any
    _weights: list[Any]

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
        # Variables by id: those that have a slow weight, and those whose slots are in their places in `weights`, not
        # just restored. As in other optimizers, a model that is gone is not kept.
        self._fast_variables: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._complete: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._placed: list[Any] = []
        self._block = Block(tf.convert_to_tensor, tf.identity, tf.reduce_all)
        self._applied_steps: Any = None
        self._captured: Any = None
        self._listed_count: Any = None

    @property
    def inner_optimizer(self) -> Any:
        """The inner optimizer."""
        return self._optimizer

    clipnorm = _clipping("clipnorm")
    global_clipnorm = _clipping("global_clipnorm")
    clipvalue = _clipping("clipvalue")

    def __getattr__(self, name: str) -> Any:
        # What the wrapper does not have: settings, attributes and methods of the inner optimizer.
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
        owner: Any = self._optimizer if name == "learning_rate" else super()
        owner._set_hyper(name, value)
        if name == "sync_period" and "_complete" in self.__dict__:
            # Slots may have to be made now. Slow weights from before a time without any are none.
            self._complete.clear()
            if not value and self._captured is not None:
                self._captured.assign(NEVER)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self._optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self._optimizer.learning_rate = learning_rate

    @property
    def lr(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate: Any) -> None:
        self.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """Variable, int64: the number of steps, those that a `LossScaleOptimizer` around skipped included.

        It is the inner optimizer's, too: one that has made steps keeps its count and its schedule.
        """
        iterations = self._count_of_iterations()
        if self._applied_steps is None and getattr(self, "_is_wrapped_by_loss_scale_optimizer", False):

            def initial_value(shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
                # A checkpoint without this count has been counted by `iterations`.
                return tf.constant(iterations.numpy() if tf.executing_eagerly() else 0, dtype)

            self._applied_steps = self._scalar("lookahead_step", initial_value)
        return iterations

    @iterations.setter
    def iterations(self, variable: Any) -> None:
        LegacyOptimizer.iterations.fset(self, variable)
        self._listed_count = variable
        self._share_count()

    def _count_of_iterations(self) -> Any:
        if self._iterations is None:
            inner, count = self._optimizer, None
            while count is None and inner is not None:
                count, inner = inner._iterations, getattr(inner, "_optimizer", None)
            if count is None:
                LegacyOptimizer.iterations.fget(self)
            else:
                self._iterations = self._track_trackable(count, "iter", overwrite=True)
                self._handle_deferred_dependencies("iter", count)
                self._weights.append(count)
            self._listed_count = self._iterations
            self._share_count()
        return self._iterations

    def _share_count(self) -> None:
        """Give the inner optimizer this one's step count in place of its own."""
        inner, count = self._optimizer, self._iterations
        former, inner._iterations = inner._iterations, count
        if former is not None and former is not count:
            inner._weights = [one for one in inner._weights if one is not former]
            if inner._lookup_dependency("iter") is former:
                inner._track_trackable(count, "iter", overwrite=True)
        if isinstance(inner, Lookahead):
            inner._share_count()

    def _scalar(self, name: str, initializer: Any) -> Any:
        with tf.init_scope(), self._distribution_strategy_scope():
            return self.add_weight(
                name,
                shape=[],
                dtype=tf.int64,
                initializer=initializer,
                trainable=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )

    @property
    def _steps(self) -> Any:
        """The number of steps that were applied, by which the period is counted."""
        iterations = self.iterations
        return iterations if self._applied_steps is None else self._applied_steps

    @property
    def _capture_state(self) -> Any:
        """Variable: `NEVER`, `RESTORED` or `CAPTURED`. None in graphs of TensorFlow 1, where a restoration is not seen.

        Checkpoints are TensorFlow Addons' and lack it; a SavedModel, which may have a training step in it, has it.
        """
        if self._captured is None and tf.compat.v1.executing_eagerly_outside_functions():
            self._captured = self._scalar("lookahead_captured", "zeros")
        return self._captured

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
            return self._count_of_iterations()
        if name == "lookahead_step":
            _ = self.iterations
            return self._applied_steps
        return self._capture_state if name == "lookahead_captured" else None

    def _create_or_restore_slot_variable(
        self, slot_variable_position: Any, slot_name: str, variable: Any, *shape: Any, **kwargs: Any
    ) -> Any:
        # Only from TensorFlow 2.16 on is there a shape.
        slot = super()._create_or_restore_slot_variable(slot_variable_position, slot_name, variable, *shape, **kwargs)
        if slot_name == "slow":
            self._mark_restored()
        return slot

    def _mark_restored(self) -> None:
        state = self._capture_state
        if state is not None:
            with tf.init_scope():
                state.assign(RESTORED)

    @property
    def weights(self) -> list[Any]:
        """The step count, the slow weights and the inner optimizer's state, in this order."""
        count = self._iterations
        own = [one for one in self._weights if one is count or one is not self._listed_count]
        own.sort(key=lambda one: one is not count)
        own_count = getattr(self, "_is_wrapped_by_loss_scale_optimizer", False) and self._applied_steps is not None
        return [
            *own,
            *(one for one in self._optimizer.weights if one is not count),
            *([self._applied_steps] if own_count else []),
        ]

    def set_weights(self, weights: list[Any]) -> None:
        """Set all `weights`.

        Args:
            weights: NumPy arrays in the order of `weights`. With a `LossScaleOptimizer` around, the last one may be
                left out, as in files of TensorFlow Addons, which counted by `iterations`.
        """
        if len(weights) == len(self.weights) - 1 and self.weights[-1] is self._applied_steps:
            weights = [*weights, weights[0]]
        super().set_weights(weights)
        optimizer = self
        while isinstance(optimizer, Lookahead):
            optimizer._mark_restored()
            optimizer = optimizer._optimizer

    def variables(self) -> list[Any]:
        """Return `weights`."""
        return self.weights

    def minimize(
        self, loss: Any, var_list: Any, grad_loss: Any = None, name: str | None = None, tape: Any = None, **kwargs: Any
    ) -> Any:
        """Compute gradients and make a step.

        Args:
            loss: Callable that returns the loss, or a tensor, with the `tape` that computed it.
            var_list: List of variables, or a callable that returns it.
            grad_loss: Tensor, the gradient of `loss`. Defaults to ones.
            name: Name of the operation. Defaults to that of the optimizer.
            tape: `tf.GradientTape` of a loss that is a tensor.
            **kwargs: What the inner optimizer's `minimize` takes more.

        Returns:
            The operation, in a graph.
        """
        if not self._inner_overrides("minimize"):
            return super().minimize(loss, var_list, grad_loss, name, tape, **kwargs)
        with self._hooked("minimize"):
            return self._optimizer.minimize(loss, var_list, grad_loss=grad_loss, name=name, tape=tape, **kwargs)

    def get_updates(self, loss: Any, params: Any) -> list[Any]:
        """Return the operations of a step, in a graph of TensorFlow 1.

        Args:
            loss: Tensor.
            params: List of variables.
        """
        if not self._inner_overrides("get_updates"):
            return super().get_updates(loss, params)
        with self._hooked("get_updates"):
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

    def _inner_overrides(self, name: str) -> bool:
        inner = self._optimizer
        return name in inner.__dict__ or getattr(type(inner), name) is not getattr(LegacyOptimizer, name)

    @contextlib.contextmanager
    def _hooked(self, method: str) -> Iterator[None]:
        """Context manager in which the inner optimizer's own method comes back here for the step that it makes."""
        inner, calls = self._optimizer, []
        former = inner.__dict__.get("apply_gradients")

        def put_back() -> None:
            inner.__dict__.pop("apply_gradients", None)
            if former is not None:
                inner.__dict__["apply_gradients"] = former

        def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(True)
            put_back()
            try:
                return self.apply_gradients(grads_and_vars, *args, **kwargs)
            finally:
                inner.__dict__["apply_gradients"] = apply_gradients

        inner.__dict__["apply_gradients"] = apply_gradients
        try:
            yield
        finally:
            put_back()
        if not calls:
            raise RuntimeError(
                f"`{method}` of the inner optimizer must make its step by `self.apply_gradients(...)`, where "
                "`Lookahead` takes part. This step was one of the inner optimizer alone. Call its `apply_gradients` "
                f"there, or give gradients to `Lookahead.apply_gradients`. Received: optimizer={inner!r}"
            )

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Any],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Make a step.

        Args:
            grads_and_vars: Pairs of a gradient, dense, sparse or `None`, and its variable.
            name: Name of the operation. Defaults to that of the optimizer.
            experimental_aggregate_gradients: Whether gradients are summed over the replicas of a `tf.distribute`
                strategy. Defaults to `True`.
            **kwargs: What the inner optimizer's `apply_gradients` takes more.

        Returns:
            The operation, in a graph.

        Raises:
            TypeError: if `grads_and_vars` is not made of pairs.
            ValueError: if no variable has a gradient.
            RuntimeError: inside a `slow_weights()` block, or in a cross-replica context.
        """
        self._check_not_in_slow_weights("apply_gradients(grads_and_vars)")
        pairs = _check_pairs(grads_and_vars)
        if name is not None:
            kwargs["name"] = name
        variables = [variable for gradient, variable in pairs if gradient is not None]
        if not variables or tf.distribute.in_cross_replica_context():
            # The inner optimizer raises its error.
            return self._inner_step(pairs, experimental_aggregate_gradients, kwargs)
        with tf.name_scope(self._name):
            with tf.init_scope():
                self._create_all_weights(variables)
            captured = self._capture()
            with _after(captured):
                before, iterations = tf.identity(self._steps), tf.identity(self.iterations)
            # The reads come first in a graph of TensorFlow 1, too.
            with _after(captured, before, iterations):
                applied = self._inner_step(pairs, experimental_aggregate_gradients, kwargs)
            # A step that fails, at the end of a dataset say, ends here: the count comes after all updates.
            with _after(applied):
                marked = self._count_and_mark(iterations)
            with _after(applied, *marked):
                synchronized = self._synchronize(_Crossed(before, self.sync_period), [one for _, one in pairs])
            if tf.compat.v1.executing_eagerly_outside_functions():
                return applied
            # Here nothing else makes the rest run.
            return tf.group(*_operations(applied, *marked, synchronized))

    def _inner_step(self, pairs: list[Any], aggregate: bool, kwargs: dict[str, Any]) -> Any:
        """Make the inner optimizer's step, by its own `apply_gradients`, after the wrapper's own clipping."""
        inner = self._optimizer
        clips = any(one is not None for one in (self._clipnorm, self._clipvalue, self._global_clipnorm))
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
        return self._optimizer._transform_unaggregated_gradients(grads_and_vars)

    def _aggregate_gradients(self, grads_and_vars: Any) -> Any:
        aggregate = super()._aggregate_gradients if self._own_aggregator else self._optimizer._aggregate_gradients
        return aggregate(grads_and_vars)

    def _count_and_mark(self, iterations: Any) -> list[Any]:
        """Count an applied step, and mark the slow weights as captured, if the inner optimizer has counted one."""
        if tf.executing_eagerly() and self._applied_steps is None and self._is_captured():
            return []
        made = self.iterations - iterations
        done = []
        if self._applied_steps is not None and not isinstance(self._optimizer, Lookahead):
            done.append(self._applied_steps.assign_add(made, read_value=False))
        if self.sync_period and self._capture_state is not None:
            state = self._capture_state
            new = tf.where(tf.greater(made, 0), tf.constant(CAPTURED, tf.int64), state)
            done.append(state.assign(new, read_value=False))
        return done

    def _is_captured(self) -> bool:
        return not self.sync_period or _int(self._capture_state) == CAPTURED

    def _resource_apply_dense(self, grad: Any, var: Any, apply_state: Any = None) -> Any:
        return self._update("_dense_apply_args", "_resource_apply_dense", var, (grad, var), apply_state)

    def _resource_apply_sparse(self, grad: Any, var: Any, indices: Any, apply_state: Any = None) -> Any:
        return self._update("_sparse_apply_args", "_resource_apply_sparse", var, (grad, var, indices), apply_state)

    def _resource_apply_sparse_duplicate_indices(
        self, grad: Any, var: Any, indices: Any, apply_state: Any = None
    ) -> Any:
        method = "_resource_apply_sparse_duplicate_indices"
        return self._update("_sparse_apply_args", method, var, (grad, var, indices), apply_state)

    def _update(self, takes: str, method: str, var: Any, arguments: Any, apply_state: Any) -> Any:
        """Make the step of one variable, for an averaging wrapper around, which counts after all variables."""
        inner, operations = self._optimizer, []
        kwargs = {"apply_state": apply_state} if "apply_state" in getattr(inner, takes) else {}
        slow = self.get_slot(var, "slow") if self.sync_period else None
        if slow is not None:
            is_first = tf.equal(tf.convert_to_tensor(self.iterations), 0)
            operations.append(slow.assign(tf.where(is_first, var, slow), read_value=False))
        with _after(*operations):
            operations.append(getattr(inner, method)(*arguments, **kwargs))
        if slow is None:
            return operations[-1]
        with _after(*operations):
            is_due = tf.equal((self.iterations + 1) % self.sync_period, 0)
            new = _tensorflow.slow_step(slow.read_value(), var.read_value(), self._get_hyper("slow_step_size"))
            restarted = [var]
            while isinstance(inner, Lookahead):
                restarted += [inner.get_slot(var, "slow")] if inner.sync_period else []
                inner = inner._optimizer
            for one, value in [(slow, new), *((one, new) for one in restarted)]:
                operations.append(one.assign(tf.where(is_due, value, one), read_value=False))
            if self._capture_state is not None:
                operations.append(self._capture_state.assign(CAPTURED, read_value=False))
        return tf.group(*_operations(operations)) if not tf.executing_eagerly() else None

    def _create_hypers(self) -> None:
        self._optimizer._create_hypers()

    def _prepare_local(self, var_device: Any, var_dtype: Any, apply_state: Any) -> Any:
        return self._optimizer._prepare_local(var_device, var_dtype, apply_state)

    def _create_slots(self, var_list: list[Any]) -> None:
        inner = self._optimizer
        if self._listed_count is not None and self._listed_count is not self._iterations:
            # An averaging wrapper around has put its count in place of this one's.
            self._weights = [one for one in self._weights if one is not self._listed_count]
            self._listed_count = None
        if self._iterations is not None:
            self._share_count()
        if isinstance(inner, Lookahead):
            inner._applied_steps = self._applied_steps
        _ = self._capture_state
        complete = all(id(variable) in self._complete for variable in var_list)
        with contextlib.nullcontext() if complete or isinstance(inner, Lookahead) else _appended(inner, self._placed):
            inner._create_slots(var_list)
        if self.sync_period:
            with contextlib.nullcontext() if complete else _appended(self, self._placed):
                for variable in var_list:
                    # In a graph of TensorFlow 1 it need not have its value yet; the first step captures it.
                    self.add_slot(variable, "slow", initializer=variable if tf.executing_eagerly() else "zeros")
        self._complete.update({id(variable): variable for variable in var_list})

    def add_slot(self, var: Any, slot_name: str, initializer: Any = "zeros", shape: Any = None) -> Any:
        """Return the slot of a variable, a new one if there is none.

        Args:
            var: The variable.
            slot_name: Name of the slot; `"slow"` is that of the slow weights.
            initializer: Initializer, or initial value, of a new slot. Defaults to `"zeros"`.
            shape: Shape of a new slot. Defaults to that of the variable.
        """
        depth, inner = 0, self._optimizer
        while isinstance(inner, Lookahead):
            depth, inner = depth + 1, inner._optimizer
        # In HDF5 files variables have names, and the slots of two wrappers must not have the same.
        with tf.name_scope(f"{self._name}_{depth}") if depth else contextlib.nullcontext():
            slot = super().add_slot(var, slot_name, initializer, shape)
        if slot_name == "slow":
            # Slots that are restored come here before the first step, too.
            self._fast_variables.setdefault(id(var), var)
        return slot

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The copy has slots for the same variables, as that of every legacy optimizer.
        for variables in (self._fast_variables, self._complete):
            memo[id(variables)] = copy.copy(variables)
        memo[id(self._block)] = Block(tf.convert_to_tensor, tf.identity, tf.reduce_all)
        return super().__deepcopy__(memo)

    def _is_due_to_capture(self, state: Any) -> Any:
        """Whether the slow weights are to be captured.

        Those that a file brought are captured ones, unless its count says that it was written before the first step.
        """
        if tf.executing_eagerly():
            state = _int(state)
            return state == NEVER or (state == RESTORED and _int(self._steps) == 0)
        is_first = tf.equal(tf.convert_to_tensor(self._steps), 0)
        return tf.equal(state, NEVER) | (tf.equal(state, RESTORED) & is_first)

    def _capture(self) -> Any:
        """Capture the slow weights if they were not yet."""
        state = self._capture_state
        # An averaging wrapper around, which has a count of its own, loads slow weights without saying so.
        if state is None or self._listed_count is None:
            return _tensorflow.capture(self._steps, _is_first, self._pairs)
        return _tensorflow.capture(state, self._is_due_to_capture, self._pairs)

    def _synchronize(self, due: Callable[[Any], Any], trained: list[Any] | None = None) -> Any:
        """Make the slow step if `due(steps)`, for the variables `trained` in this step, or for all.

        Others are frozen: they are not moved, and their slow weights start from them.
        """
        if not self.sync_period:
            return None
        if self._applied_steps is not None:
            # A loss scaler around leaves out variables without gradient, which are not frozen.
            trained = None

        def pairs(are_trained: bool) -> list[_tensorflow.Pair]:
            if trained is None:
                return self._pairs() if are_trained else []
            slots = {id(self.get_slot(one, "slow")) for one in trained if id(one) in self._fast_variables}
            return [pair for pair in self._pairs() if (id(pair.slow) in slots) == are_trained]

        done = _tensorflow.synchronize(
            self._steps, due, lambda: pairs(True), self._get_hyper("slow_step_size"), constrain_slow=False
        )
        if trained is not None and (not tf.executing_eagerly() or len(trained) != len(self._fast_variables)):
            with _after(done):
                done = _operations(done, _tensorflow.capture(self._steps, due, lambda: pairs(False)))
        inner = self._optimizer
        while isinstance(inner, Lookahead):
            with _after(done):
                done = _tensorflow.capture(self._steps, due, inner._pairs)
            inner = inner._optimizer
        return done

    def _pairs(self) -> list[_tensorflow.Pair]:
        return [
            _tensorflow.Pair(self.get_slot(fast, "slow"), fast, fast.constraint)
            for fast in self._fast_variables.values()
            if self.sync_period
        ]

    def sync(self) -> None:
        """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or in a graph of TensorFlow 1.
        """
        self._check_eager("sync()")
        self._check_not_in_slow_weights("sync()")
        self._capture()
        self._synchronize(lambda steps: True)

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the variables again, after restoring the best weights, say.

        Raises:
            RuntimeError: inside a `slow_weights()` block, or in a graph of TensorFlow 1.
        """
        self._check_eager("reset_slow_weights()")
        self._check_not_in_slow_weights("reset_slow_weights()")
        optimizer = self
        while isinstance(optimizer, Lookahead):
            _tensorflow.capture(self._steps, lambda steps: True, optimizer._pairs)
            optimizer = optimizer._optimizer

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Context manager that runs a block, an evaluation or an export, with the slow weights in the model.

        The fast weights come back bit for bit, whatever happens in the block; until then a copy of them takes the
        memory of one more set of weights. A block inside a block changes nothing. Training in one is refused; a step
        that was compiled before does not notice the block, and what it does is lost at its end. A model saved in the
        block has the slow weights; training that goes on from such a file starts from them.

        Raises:
            RuntimeError: in a graph of TensorFlow 1.
        """
        self._check_eager("slow_weights()")
        if self._block.is_open:
            yield
            return
        self._capture()
        with self._block.run(self._pairs_to_swap(), self._count()):
            yield

    def _pairs_to_swap(self) -> list[Any]:
        return self._pairs()

    def _count(self) -> int:
        return _int(self._steps)

    def _has_slow_weights(self) -> bool:
        return bool(self._fast_variables)

    def _leave_slow_weights(self) -> None:
        if self._block.is_open:
            self._block.leave(self._count())

    def _check_eager(self, caller: str) -> None:
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise RuntimeError(
                f"`{caller}` needs eager execution. Received: a call in a graph of TensorFlow 1. Training works there; "
                f"for `{caller}` load the weights in a program without `tf.compat.v1.disable_eager_execution()`."
            )

    def _check_not_in_slow_weights(self, caller: str) -> None:
        if self._block.is_open:
            raise RuntimeError(
                f"`{caller}` was called inside a `slow_weights()` block, at whose end the fast weights come back. Call "
                "it after the block."
            )

    def get_config(self) -> dict[str, Any]:
        """Return the config, from which `from_config` makes the same optimizer, without its state."""
        config = super().get_config()
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            if self.__dict__[f"_{name}"] is None:
                # It is the inner optimizer's.
                config.pop(name, None)
        return {
            **config,
            "optimizer": keras.optimizers.serialize(self._optimizer),
            "sync_period": self._serialize_hyperparameter("sync_period"),
            "slow_step_size": self._serialize_hyperparameter("slow_step_size"),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Lookahead":
        """Make an optimizer from its config, or that of TensorFlow Addons; the config is left as it is.

        Args:
            config: Dictionary, as from `get_config`.
            custom_objects: Dictionary of names to classes and functions that are not registered with Keras.
        """
        config = copy.deepcopy(config)
        config.pop("is_legacy_optimizer", None)
        optimizer = config.pop("optimizer")
        if isinstance(optimizer, dict):
            optimizer = keras.optimizers.deserialize(optimizer, custom_objects=custom_objects)
        return cls(optimizer, **config)


# In the config of another optimizer, such as a `LossScaleOptimizer`, Keras leaves out the package.
keras.utils.get_custom_objects().setdefault("Lookahead", Lookahead)


@contextlib.contextmanager
def _appended(optimizer: Any, placed: list[Any]) -> Iterator[None]:
    """Context manager in which `optimizer` creates slots, that leaves `_weights` as if none had been restored.

    Slots that a checkpoint restores come into being in the order of the checkpoint, and before the step count. But in
    HDF5 files and `set_weights` weights have no other name than their place. `placed` are slots that keep theirs; those
    that are created here join them.
    """
    created: dict[int, Any] = {}
    add_slot = optimizer.add_slot

    def recording(*args: Any, **kwargs: Any) -> Any:
        slot = add_slot(*args, **kwargs)
        created[id(slot)] = slot
        return slot

    optimizer.add_slot = recording
    try:
        yield
    finally:
        del optimizer.add_slot
    restored = {id(slot) for slots in optimizer._slots.values() for slot in slots.values()} - set(map(id, placed))
    others = [one for one in optimizer._weights if id(one) not in created]
    optimizer._weights = [
        *(one for one in others if one is optimizer._iterations),
        *(one for one in others if one is not optimizer._iterations and id(one) not in restored),
        *created.values(),
        *(one for one in others if id(one) in restored),
    ]
    placed += created.values()


def _is_first(steps: Any) -> Any:
    return tf.equal(steps, 0)


def _int(value: Any) -> int:
    return int(tf.convert_to_tensor(value))


class _Crossed:
    """Whether a step led over a multiple of the period. None does that the inner optimizer did not count."""

    def __init__(self, before: Any, period: int) -> None:
        self._before, self._period = before, period

    def __call__(self, steps: Any) -> Any:
        if tf.executing_eagerly():
            return _int(steps) // self._period > _int(self._before) // self._period
        return tf.greater(steps // self._period, self._before // self._period)


def _operations(*done: Any) -> list[Any]:
    return [one for one in tf.nest.flatten(done) if one is not None]


def _after(*done: Any) -> Any:
    """Return a context whose operations wait for tensors and operations, in a graph of TensorFlow 1 too."""
    return tf.control_dependencies([] if tf.executing_eagerly() else _operations(*done))


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


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
