"""The `Lookahead` optimizer."""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from lookahead_optim import _tensorflow
from lookahead_optim._checks import check_slow_step_size, check_sync_period
from lookahead_optim._evaluation import Block
from lookahead_optim.tf_keras._configure import checked_settings, configure, legacy_form
from lookahead_optim.tf_keras._keras import keras

__all__ = ["Lookahead"]


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
        self._optimizer = inner
        configure(inner, learning_rate, decay)
        self._track_trackable(self._optimizer, "lh_base_optimizer")
        # Variables by id: those that have a slow weight, and those whose slots are in their places in `weights`, not
        # just restored. As in other optimizers, a model that is gone is not kept.
        self._fast_variables: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._complete: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._placed: list[Any] = []
        self._block = Block()
        self._applied_steps: Any = None

    @property
    def inner_optimizer(self) -> Any:
        """The inner optimizer."""
        return self._optimizer

    def _set_hyper(self, name: str, value: Any) -> None:
        if name == "sync_period":
            value = check_sync_period(value)
        elif name == "slow_step_size" and not tf.is_tensor(value):
            value = check_slow_step_size(value)
        super()._set_hyper(name, value)

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
        """Variable, int64: the number of steps, those that a `LossScaleOptimizer` around skipped included."""
        iterations = super().iterations
        if self._applied_steps is None and getattr(self, "_is_wrapped_by_loss_scale_optimizer", False):

            def initial_value(shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
                # A checkpoint without this count has been counted by `iterations`.
                return tf.constant(iterations.numpy() if tf.executing_eagerly() else 0, dtype)

            with tf.init_scope(), self._distribution_strategy_scope():
                self._applied_steps = self.add_weight(
                    "lookahead_step",
                    shape=[],
                    dtype=tf.int64,
                    initializer=initial_value,
                    trainable=False,
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
        return iterations

    @iterations.setter
    def iterations(self, variable: Any) -> None:
        keras.optimizers.legacy.Optimizer.iterations.fset(self, variable)

    @property
    def _steps(self) -> Any:
        """The number of steps that were applied, by which the period is counted."""
        iterations = self.iterations
        return iterations if self._applied_steps is None else self._applied_steps

    @property
    def weights(self) -> list[Any]:
        """The step count, the slow weights and the inner optimizer's state, in this order."""
        own_count = getattr(self, "_is_wrapped_by_loss_scale_optimizer", False) and self._applied_steps is not None
        return self._weights + self._optimizer.weights + ([self._applied_steps] if own_count else [])

    def set_weights(self, weights: list[Any]) -> None:
        """Set all `weights`.

        Args:
            weights: NumPy arrays in the order of `weights`. With a `LossScaleOptimizer` around, the last one may be
                left out, as in files of TensorFlow Addons, which counted by `iterations`.
        """
        if len(weights) == len(self.weights) - 1 and self.weights[-1] is self._applied_steps:
            weights = [*weights, weights[0]]
        super().set_weights(weights)

    def variables(self) -> list[Any]:
        """Return `weights`."""
        return self.weights

    def apply_gradients(
        self, grads_and_vars: Iterable[Any], name: str | None = None, experimental_aggregate_gradients: bool = True
    ) -> Any:
        """Make a step.

        Args:
            grads_and_vars: Pairs of a gradient, dense, sparse or `None`, and its variable.
            name: Name of the operation. Defaults to that of the optimizer.
            experimental_aggregate_gradients: Whether gradients are summed over the replicas of a `tf.distribute`
                strategy. Defaults to `True`.

        Returns:
            The operation, in a graph.

        Raises:
            TypeError: if `grads_and_vars` is not made of pairs.
            ValueError: if no variable has a gradient.
            RuntimeError: inside a `slow_weights()` block, or in a cross-replica context.
        """
        self._check_not_in_slow_weights("apply_gradients(grads_and_vars)")
        return super().apply_gradients(
            _check_pairs(grads_and_vars), name, experimental_aggregate_gradients=experimental_aggregate_gradients
        )

    def _create_hypers(self) -> None:
        self._optimizer._create_hypers()

    def _create_slots(self, var_list: list[Any]) -> None:
        inner = self._optimizer
        inner._iterations = self.iterations
        if isinstance(inner, Lookahead):
            inner._applied_steps = self._applied_steps
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

    def _prepare(self, var_list: list[Any]) -> Any:
        return self._optimizer._prepare(var_list)

    def _transform_unaggregated_gradients(self, grads_and_vars: Any) -> Any:
        return self._optimizer._transform_unaggregated_gradients(
            super()._transform_unaggregated_gradients(grads_and_vars)
        )

    def _transform_gradients(self, grads_and_vars: Any) -> Any:
        return self._optimizer._transform_gradients(super()._transform_gradients(grads_and_vars))

    def _distributed_apply(self, distribution: Any, grads_and_vars: Any, apply_state: Any, name: str | None) -> Any:
        captured = _tensorflow.capture(self._steps, _is_first, self._pairs)
        with _after(captured):
            applied = self._optimizer._distributed_apply(distribution, grads_and_vars, apply_state, name)
        if self._applied_steps is not None and not isinstance(self._optimizer, Lookahead):
            with _after(applied):
                applied = self._applied_steps.assign_add(1, read_value=False)
        with _after(applied):
            synchronized = self._synchronize(self._is_due)
        if tf.executing_eagerly():
            return applied
        return tf.group(*(one for one in (applied, synchronized) if one is not None))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The copy has slots for the same variables, as that of every legacy optimizer.
        for variables in (self._fast_variables, self._complete):
            memo[id(variables)] = copy.copy(variables)
        memo[id(self._block)] = Block()
        return super().__deepcopy__(memo)

    def _is_due(self, steps: Any) -> Any:
        return tf.equal(steps % self.sync_period, 0)

    def _synchronize(self, due: Callable[[Any], Any]) -> Any:
        if not self.sync_period:
            return None
        done = _tensorflow.synchronize(
            self._steps, due, self._pairs, self._get_hyper("slow_step_size"), constrain_slow=False
        )
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
        _tensorflow.capture(self._steps, _is_first, self._pairs)
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
        _tensorflow.capture(self._steps, _is_first, self._pairs)
        with self._block.run(self._pairs(), tf.identity, self._count()):
            yield

    def _count(self) -> int:
        return int(self._steps.numpy())

    def _has_slow_weights(self) -> bool:
        return bool(self._fast_variables)

    def _slow_weights_were_replaced(self) -> bool:
        """Whether others were put into the model, inside a block."""
        return any(bool(tf.reduce_any(slow != fast)) for slow, fast, _ in self._pairs())

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
        return {
            **super().get_config(),
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


def _after(done: Any) -> Any:
    """Return a context whose operations wait for a tensor or operation, in a graph of TensorFlow 1 too."""
    return tf.control_dependencies([] if done is None or tf.executing_eagerly() else [done])


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
