"""The `Lookahead` optimizer for Keras 3: Keras' protocol around the inner optimizer and the slow weights.

Where things happen:

- a sync: `apply`, `_step`, `SlowWeights.synchronize_if_due` in `_slow_weights.py`, and `synchronize` in `_on_jax.py`,
  `_on_tensorflow.py` or `_on_torch.py`. The arithmetic is in `_outer_step_jax.py` here, `../_outer_step_tensorflow.py`
  or `../_outer_step_torch.py`;
- capture: `_step` and `SlowWeights.capture_if_due`, as long as the variable `captured` is 0. `mark_captured` sets it;
- what is saved: by name in `Saving._own_variables`, for `.keras` and `.weights.h5` files; by position in `variables`,
  for `get_weights`; by the names given to `_track_own`, for `tf.train.Checkpoint`;
- a skipped update: a loss scaler around the wrapper does not call `_step`. A micro-step of accumulation raises the
  count of calls, but not the count of updates that `Due` reads. A micro-step also captures. The last capture before an
  update counts;
- a frozen weight: `SlowWeights.synchronize_if_due`.
"""

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

from lookahead_optim._checks import (
    OVER_RELAXATION,
    check_outside_block,
    check_slow_momentum,
    check_slow_nesterov,
    check_slow_step_size,
    check_sync_period,
    explain_other_names,
    warn_if_over_relaxed,
    warn_if_within_first_cycle,
)
from lookahead_optim._evaluation import Block
from lookahead_optim.keras._backend import backend
from lookahead_optim.keras._due import Due
from lookahead_optim.keras._inner_optimizer import deserialize, make_inner_optimizer
from lookahead_optim.keras._saving import Saving
from lookahead_optim.keras._settings import Schedule, Setting, check_slow_dtype, check_slow_dtype_of, make_step_size
from lookahead_optim.keras._slow_weights import SlowWeights
from lookahead_optim.keras._state import to_numpy, to_tensor
from lookahead_optim.keras._wrappers import accumulation_steps, counter_of, counts_by_one, optimizers_in

__all__ = ["Lookahead"]

_Tracked: Any = backend.Tracked


@keras.saving.register_keras_serializable(package="lookahead_optim")
class Lookahead(Saving, _Tracked, keras.optimizers.Optimizer):
    r"""Lookahead: `k` steps forward, one step back.

    The inner optimizer moves the model's weights. These are the *fast* weights $\theta$. A second copy of them is kept,
    the *slow* weights $\phi$. After every `sync_period` ($k$) updates of the inner optimizer a *sync* moves the slow
    weights towards the fast weights. The fast weights then restart from the slow weights:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.

    The difference $s = \phi - \theta$ at a sync is the *pseudo-gradient*. Without momentum, a sync is a step of
    gradient descent with $s$. With `slow_momentum` ($\mu$) it is gradient descent with momentum $b$, as in SNOO and,
    with one worker, DiLoCo:

    .. math:: b \leftarrow \mu b + s, \qquad \phi \leftarrow \phi - \alpha (s + \mu b), \qquad \theta \leftarrow \phi.

    The momentum $b$ starts from 0. If `slow_nesterov` is `False`, the slow step is $\alpha b$ instead of
    $\alpha (s + \mu b)$.

    The slow weights are captured from the model immediately before the first applied update. Updates that a loss scaler
    skips do not count, and micro-steps of gradient accumulation do not count. All else is the inner optimizer's:
    learning rate, schedules, clipping, weight decay, EMA, accumulation. The slow weights take the memory of one more
    copy of the weights. Slow momentum takes the memory of another copy.

    A weight that is not `trainable` when a sync is due is frozen. The sync does not move it, and its slow weight is
    captured again from it. `sync()` does move a frozen weight.

    A `Lookahead` may be inside another `Lookahead`. Both count the updates of the innermost optimizer. At a sync of the
    outer wrapper all weights restart from the outer wrapper's slow weights, and so do the slow weights of the inner
    wrapper.

    Args:
        optimizer: The inner optimizer: a `keras.optimizers.Optimizer`, or a name or config that `keras.optimizers.get`
            takes. A `LossScaleOptimizer` goes around `Lookahead`, not inside.
        sync_period: Integer >= 0, the number of inner updates per sync ($k$). 0 switches Lookahead off: the wrapper
            then behaves as the inner optimizer and holds no slow weights. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$): the part of the way to the fast weights that
            the slow weights move at a sync. 1, without slow momentum, gives the inner optimizer. Above 1, without slow
            momentum, there is a `UserWarning`. It may also be a schedule: a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable that returns a scalar. The schedule is
            given the number of syncs so far, `iterations // sync_period`, an int32 scalar. Defaults to 0.5.
        name: String, the name of this optimizer. Defaults to `"Lookahead"`.
        slow_momentum: Float in [0, 1), the factor of the slow momentum ($\mu$). In the long run it makes slow steps
            $1 / (1 - \mu)$ times as long. Defaults to 0, no momentum.
        slow_nesterov: Boolean, whether the slow momentum is Nesterov's. `False` gives heavy ball. Without slow momentum
            it has no effect. Defaults to `True`.
        slow_dtype: Dtype of the slow weights and the slow momentum. It must be at least as wide as the dtype of each
            weight. Use `"float32"` for a model in bfloat16 or float16: slow weights in these dtypes would lose small
            moves. The fast weights restart from the slow weights rounded to their own dtype, and the pseudo-gradient is
            measured from there. Defaults to `None`, the dtype of each weight.
        **kwargs: Settings for the inner optimizer, for code written for TensorFlow Addons: `learning_rate` (or `lr`),
            `decay` (inverse-time decay of the learning rate, per step), `clipnorm`, `clipvalue`, `global_clipnorm` (0
            is no clipping, as in Keras). A setting that contradicts the inner optimizer is an error.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range; if a keyword contradicts the inner optimizer, is unknown or is another
            implementation's name of an argument. (Keras 3 raises `ValueError` for an unknown keyword, Keras 2
            `TypeError`.)

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=5, slow_step_size=0.5)
    >>> model.compile(optimizer, loss="mse")
    >>> x, y = keras.random.normal((160, 3)), keras.random.normal((160, 1))
    >>> history = model.fit(x, y, verbose=0)
    >>> int(optimizer.iterations)
    5
    >>> with optimizer.slow_weights():
    ...     loss = model.evaluate(x, y, verbose=0)

    References:
        Zhang, Lucas, Hinton and Ba, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`__, 2019, Algorithm 1.

        Slow momentum: Kallusky, Rao, Nandavanam and Shi, `SNOO: Step-K Nesterov Outer Optimizer
        <https://arxiv.org/abs/2510.15830>`__, 2025; Douillard et al., `DiLoCo
        <https://arxiv.org/abs/2311.08105>`__, 2023, Algorithm 1.
    """

    built: bool

    @explain_other_names("optimizer", ValueError)
    def __init__(
        self,
        optimizer: Any,
        sync_period: int = 6,
        slow_step_size: float | Callable[[Any], Any] = 0.5,
        name: str = "Lookahead",
        *,
        slow_momentum: float = 0.0,
        slow_nesterov: bool = True,
        slow_dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        sync_period = check_sync_period(sync_period)
        step_size = make_step_size(slow_step_size)
        slow_momentum, slow_nesterov = check_slow_momentum(slow_momentum), check_slow_nesterov(slow_nesterov)
        slow_dtype = check_slow_dtype(slow_dtype)
        if isinstance(step_size, Setting):
            warn_if_over_relaxed(step_size.number, slow_momentum, stacklevel=3)
        inner_optimizer = make_inner_optimizer(optimizer, kwargs)
        # With a callable learning rate Keras makes no variable for it. The callable is never called.
        super().__init__(learning_rate=float, name=name)
        self.inner_optimizer = inner_optimizer
        # Keras' constructor made a step count. The wrapper uses the inner optimizer's instead. `_untrack_variable` is
        # private, and so are `_trainable_variables`, `_trainable_variables_indices` and `_var_key` in `build`. No
        # public method removes a variable from an optimizer, or tells an optimizer for which variables it was built.
        self._untrack_variable(*self._variables)
        self._sync_period, self._slow_step_size = Setting(sync_period), step_size
        self._slow_momentum, self._slow_nesterov, self._slow_dtype = slow_momentum, slow_nesterov, slow_dtype
        self._slow_weights = SlowWeights(inner_optimizer, bool(slow_momentum), slow_dtype)
        self._block = Block(to_tensor, backend.copy_of, keras.ops.all)
        self._track_own({"inner_optimizer": inner_optimizer})
        # With a period of 0 there is no variable, so no file says that slow weights exist.
        if sync_period:
            self._create_captured()

    def _create_captured(self) -> None:
        self._slow_weights.create_captured(self)
        self._track_own({"captured": self._captured})

    def _create_settings(self) -> None:
        label = self._slow_weights.label()
        # The variable is as wide as the widest slow weight, so a sync computes the same bits as with a Python number.
        is_double = any(keras.backend.standardize_dtype(slow.dtype) == "float64" for slow in self.slow_variables)
        self._sync_period.create_variable(self, f"{label}_sync_period", "int")
        if isinstance(self._slow_step_size, Setting):
            dtype = "float64" if is_double else "float32"
            self._slow_step_size.create_variable(self, f"{label}_slow_step_size", dtype)

    def _outer_step(self, syncs: Any) -> Any:
        """Return the settings of the outer step after `syncs` syncs, a tuple of the backend."""
        return backend.OuterStep(self._slow_step_size.at(syncs), self._slow_momentum, self._slow_nesterov)

    def __repr__(self) -> str:
        inner = self.__dict__.get("inner_optimizer")
        if inner is None:
            return super().__repr__()
        # Keras' optimizers have Python's default `repr`.
        shown = repr(inner) if isinstance(inner, Lookahead) else f"<{type(inner).__name__} {inner.name!r}>"
        settings = f"sync_period={self.sync_period}, slow_step_size={self._slow_step_size}"
        if self.slow_momentum:
            settings += f", slow_momentum={self.slow_momentum}, slow_nesterov={self.slow_nesterov}"
        if self.slow_dtype:
            settings += f", slow_dtype={self.slow_dtype!r}"
        return f"{type(self).__name__}({shown}, {settings})"

    @property
    def _captured(self) -> Any:
        return self._slow_weights.captured

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner optimizer: a setting such as `momentum`, or one of its own methods."""
        if name.startswith("_") or "inner_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        try:
            return getattr(self.inner_optimizer, name)
        except AttributeError as error:
            message = f"{type(self).__name__!r} object has no attribute {name!r}, nor has its inner optimizer: {error}"
            raise AttributeError(message, name=name, obj=self) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, on the inner optimizer if the inner optimizer has it."""
        if name.startswith("_") or name in ("name", "built", "inner_optimizer") or hasattr(type(self), name):
            # Keras would track the variables of the model and of the inner optimizer as the wrapper's own.
            object.__setattr__(self, name, value)
        elif "inner_optimizer" in self.__dict__:
            if hasattr(self.inner_optimizer, name):
                setattr(self.inner_optimizer, name, value)
            else:
                object.__setattr__(self, name, value)
        # Before there is an inner optimizer, Keras' constructor sets defaults of settings that are the inner
        # optimizer's. Ignore them.

    @property
    def sync_period(self) -> int:
        """The number of inner updates per sync, $k$.

        A sync is due when `iterations` is a multiple of it. A new value holds from the next step on, also in a step
        that was compiled before: a variable holds the value, as for Keras' learning rate. A training step of your own
        on JAX gets the value with `variables`, so read them again after a change. 0 switches Lookahead off. When it is
        switched on again, the slow weights are captured again.

        Raises:
            TypeError: if the value is no integer.
            ValueError: if the value is negative, or if the optimizer was built with 0 and so has no slow weights.
        """
        return self._sync_period.number

    @sync_period.setter
    def sync_period(self, sync_period: int) -> None:
        sync_period = check_sync_period(sync_period)
        if sync_period and self.built and not self._slow_weights.slow_or_none:
            raise ValueError(
                "`sync_period` must stay 0 in an optimizer that was built with 0, which has no slow weights. Make a "
                f"new `Lookahead`. Received: sync_period={sync_period!r}"
            )
        self._sync_period.number = sync_period
        self._block.note_period_set(self._count)
        if not sync_period:
            self._slow_weights.forget()

    @property
    def slow_step_size(self) -> float:
        r"""The slow step size of the next sync, $\alpha$.

        A new value holds from the next sync on, also in a step that was compiled before. A schedule cannot be replaced.

        Raises:
            TypeError: if the value is no real number, or if the optimizer was made with a schedule.
            ValueError: if the value is negative or not finite.
        """
        if isinstance(self._slow_step_size, Setting):
            return self._slow_step_size.number
        return self._slow_step_size.at(self._syncs())

    @slow_step_size.setter
    def slow_step_size(self, slow_step_size: float) -> None:
        slow_step_size = check_slow_step_size(slow_step_size)
        if isinstance(self._slow_step_size, Schedule):
            raise TypeError(
                "`slow_step_size` cannot be set, as this `Lookahead` was made with a schedule of it. Make a new one "
                f"with a number. Received: slow_step_size={slow_step_size!r}"
            )
        # The `__setattr__` of this class is a call between this line and the user's line.
        warn_if_over_relaxed(slow_step_size, self.slow_momentum, stacklevel=3)
        self._slow_step_size.number = slow_step_size

    @property
    def slow_momentum(self) -> float:
        r"""The factor of the slow momentum, $\mu$. It cannot be set, as state and compiled steps depend on it."""
        return self._slow_momentum

    @slow_momentum.setter
    def slow_momentum(self, slow_momentum: Any) -> None:
        _refuse_to_set("slow_momentum", slow_momentum)

    @property
    def slow_nesterov(self) -> bool:
        """Whether the slow momentum is Nesterov's. It cannot be set."""
        return self._slow_nesterov

    @slow_nesterov.setter
    def slow_nesterov(self, slow_nesterov: Any) -> None:
        _refuse_to_set("slow_nesterov", slow_nesterov)

    @property
    def slow_dtype(self) -> str | None:
        """The dtype of the slow weights and the slow momentum, or `None` for the dtype of each weight.

        It cannot be set.
        """
        return self._slow_dtype

    @slow_dtype.setter
    def slow_dtype(self, slow_dtype: Any) -> None:
        _refuse_to_set("slow_dtype", slow_dtype)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate, through any depth of wrapping. It can be set."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    lr = learning_rate

    @property
    def _learning_rate(self) -> Any:
        return self.inner_optimizer._learning_rate

    @_learning_rate.setter
    def _learning_rate(self, learning_rate: Any) -> None:
        """Ignore what Keras' constructor sets."""

    @property
    def _iterations(self) -> Any:
        return self.inner_optimizer._iterations

    @_iterations.setter
    def _iterations(self, iterations: Any) -> None:
        """Ignore what Keras' constructor sets."""

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        # `SwapEMAWeights` looks for the EMA one wrapper deep. With a `LossScaleOptimizer` around, this wrapper is at
        # that depth.
        return self.inner_optimizer._model_variables_moving_average

    @property
    def iterations(self) -> Any:
        """The number of applied updates, a scalar integer. It is the inner optimizer's count, also when it is set."""
        counter, calls = counter_of(self.inner_optimizer)
        return counter if calls == 1 else keras.ops.floor_divide(counter, calls)

    @property
    def slow_variables(self) -> list[Any]:
        """The slow weights, a list of `keras.Variable`, in the order of the optimizer's variables.

        Each has the shape of its variable, and its dtype or `slow_dtype`. Their values are undefined before the first
        update. The list is empty if the optimizer was built with a `sync_period` of 0. Variables that Keras overwrites
        with their gradients (the scales of float8) have no slow weight; see `get_slot`.
        """
        return self._slow_weights.slow

    def build(self, variables: Iterable[Any]) -> None:
        """Create the state.

        Args:
            variables: List of the trainable variables to optimize.

        Raises:
            ValueError: if the inner optimizer was built for other variables, if it belongs to another `tf.distribute`
                strategy than the variables, or if `slow_dtype` is narrower than the dtype of a variable.
        """
        if self.built:
            return
        variables = list(variables)
        backend.check_scope(list(optimizers_in(self)), variables)
        check_slow_dtype_of(self.slow_dtype, variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        built_for = [self._var_key(variable) for variable in self.inner_optimizer._trainable_variables]
        if built_for != [self._var_key(variable) for variable in variables]:
            raise ValueError(
                f"The inner optimizer {self.inner_optimizer.name!r} was already built, for {len(built_for)} variables "
                f"that are not the {len(variables)} given to `Lookahead`. Wrap a new inner optimizer."
            )
        # Raises an error if the optimizers inside disagree.
        accumulation_steps(self.inner_optimizer)
        if self.sync_period:
            if self._captured is None:
                self._create_captured()
            self._slow_weights.create(self, variables)
            self._track_own(self._slow_weights.named())
            self._create_settings()
        # `super().build` would make the variables of EMA and accumulation a second time.
        self._trainable_variables_indices = {self._var_key(variable): index for index, variable in enumerate(variables)}
        self._trainable_variables = variables
        self.built = True

    def _count(self) -> int:
        return int(to_numpy(self.iterations))

    def _syncs(self) -> int:
        """Return the number of syncs so far, assuming that the period never changed."""
        return self._count() // max(self.sync_period, 1)

    def _check_built(self, caller: str) -> None:
        if not self.built:
            raise ValueError(
                f"`{caller}` needs an optimizer that is built. Train first, or call "
                "`optimizer.build(model.trainable_variables)`."
            )

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Let the inner optimizer make one update, then make a sync if it is due.

        Args:
            grads: List of gradients, one per variable and of its shape. `None` for a variable without a gradient.
            trainable_variables: List of variables, in the order of `grads`. The first call needs it, as it builds the
                optimizer. Defaults to all variables with which the optimizer was built.

        Raises:
            ValueError: if the optimizer is not built and no variables are given, if it was built with other variables,
                or if no variable has a gradient.
            RuntimeError: inside a `slow_weights()` block. A step that was compiled before the block cannot notice the
                block. Its changes of the weights are lost when the block ends.
        """
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if len(grads) != len(trainable_variables):
                raise ValueError(
                    "`grads` and `trainable_variables` must have the same length. "
                    f"Received: {len(grads)} gradients and {len(trainable_variables)} variables"
                )
            self._build_for(trainable_variables)
        self._step(grads, lambda: self.inner_optimizer.apply(grads, trainable_variables))

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], name: str | None = None) -> Any:
        """Apply gradients to their variables; see `apply`.

        Args:
            grads_and_vars: List of `(gradient, variable)` pairs.
            name: Not used.

        Returns:
            The number of applied updates, a scalar integer.
        """
        grads_and_vars = list(grads_and_vars)
        if not grads_and_vars:
            raise ValueError("`grads_and_vars` must have at least one pair (gradient, variable). Received none.")
        grads, trainable_variables = map(list, zip(*grads_and_vars))
        self._build_for(trainable_variables)
        self._step(grads, lambda: self.inner_optimizer.apply_gradients(grads_and_vars))
        return self.iterations

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Do what `apply` does, with values in place of variables, on JAX and PyTorch.

        Args:
            optimizer_variables: List of arrays, the values of `variables`.
            grads: List of gradients, one per variable with which the optimizer was built, or `None`.
            trainable_variables: List of arrays, the values of these variables.

        Returns:
            The new values of the trainable variables and of the optimizer's variables, two lists of arrays.
        """
        inner = self.inner_optimizer
        weights, variables = self._trainable_variables, self.variables

        def update() -> None:
            values = [[variable.value for variable in group] for group in (inner.variables, weights)]
            new_weights, new_state = inner.stateless_apply(values[0], grads, values[1])
            for variable, value in zip([*weights, *inner.variables], [*new_weights, *new_state]):
                variable.assign(value)

        if not self.built or (len(optimizer_variables), len(trainable_variables)) != (len(variables), len(weights)):
            # Keras raises an error that names what is wrong.
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        mapping = [*zip(weights, trainable_variables), *zip(variables, optimizer_variables)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._step(list(grads), update)
        current = scope.get_current_value
        return list(map(current, weights)), list(map(current, variables))

    def _build_for(self, variables: list[Any]) -> None:
        self.build(variables)
        known = self._trainable_variables
        # Most often the lists are the same. This check is faster than looking up every variable.
        if len(variables) > len(known) or not all(map(operator.is_, variables, known)):
            self._check_variables_are_known(variables)

    def _step(self, grads: list[Any], update: Callable[[], Any]) -> None:
        """Capture before the first applied update, let the inner optimizer update, and make a sync if it is due.

        An inner optimizer may count more than one update in a call, or none. A sync is due when the count has crossed a
        multiple of the period. A `LossScaleOptimizer` around the wrapper does not call this method for a step that it
        skips.
        """
        self._check_built("apply(grads)")
        check_outside_block(self._block.is_open, "apply(grads)")
        # Training continues from the weights in the model. In `fit` the callback has put the fast weights back before.
        self._block.loaded = {}
        period = self._sync_period.in_step()
        if isinstance(period, int) and not period:
            update()
            return
        counter, calls_per_update = counter_of(self.inner_optimizer)
        with backend.after(grads):
            before = backend.read(counter)
            due = Due(period, before, calls_per_update)
            self._slow_weights.capture_if_due(due.capture)
            update()
            # If the count is no variable, it is a new tensor after the update.
            counter, _ = counter_of(self.inner_optimizer)
            by_one = counts_by_one(self.inner_optimizer)
            # Only now, as an update that raised an error does not count.
            backend.mark_captured(self._captured, counter, due.mark, by_one)
            self._slow_weights.synchronize_if_due(counter, due.sync, lambda: self._outer_step(due.syncs()), by_one)

    def minimize(self, loss: Callable[[], Any], var_list: Any, grad_loss: Any = None, name: str | None = None) -> Any:
        """Compute the gradients of `loss` and apply them.

        Args:
            loss: Callable without arguments that computes the loss from the variables, a scalar or an array. On JAX
                this is for eager use; under `jax.jit` use `stateless_apply`.
            var_list: List of variables to update, or a callable that returns the list.
            grad_loss: Array of the loss' shape: the gradient, with respect to the loss, of the value to minimise.
                Defaults to ones.
            name: Not used.

        Returns:
            The number of applied updates, a scalar integer.

        Raises:
            TypeError: if `loss` is not callable.
        """
        if not callable(loss):
            raise TypeError(
                "`loss` must be a callable without arguments that computes the loss. "
                f"Received: loss={loss!r} of type {type(loss)}"
            )
        variables = list(var_list() if callable(var_list) else var_list)
        if hasattr(self.inner_optimizer, "minimize") and not isinstance(self.inner_optimizer, Lookahead):
            # Keras' optimizers have no `minimize`, so this is a user's class. It makes its step by itself.
            self._build_for(variables)
            arguments = {"grad_loss": grad_loss, "name": name}
            arguments = {key: value for key, value in arguments.items() if value is not None}
            self._step([], lambda: self.inner_optimizer.minimize(loss, variables, **arguments))
            return self.iterations
        grads = backend.gradients(lambda: self.scale_loss(loss()), variables, grad_loss)
        return self.apply_gradients(zip(grads, variables))

    def sync(self) -> None:
        """Make a sync now, for the end of a run that does not end on a sync. A second call changes nothing.

        A call before the first applied update changes nothing either. Frozen weights take part.

        There is a `UserWarning` if all of this holds: `iterations` is less than `sync_period`, the slow step size is
        below 1, there is no slow momentum, and neither `sync` nor `reset_slow_weights` was called before. The slow
        weights of such a short run are still the weights with which training began, so the sync takes back a part of
        the training.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        self._end_block_of_callback("sync()")
        self._warn_if_within_first_cycle()
        self._slow_weights.synchronize(lambda: self._outer_step(self._syncs()))
        self._block.note_made_equal(self._count)

    def _warn_if_within_first_cycle(self) -> None:
        if not self.slow_momentum and self._has_slow_weights() and self._block.made_equal_at is None:
            warn_if_within_first_cycle(self._count(), self.sync_period, self.slow_step_size, stacklevel=3)

    def reset_slow_weights(self) -> None:
        """Capture the slow weights from the model again, for example after you restored its best weights.

        Slow momentum starts from 0 again. The next sync comes when it was due before. A call before the first applied
        update changes nothing, as that update captures.

        Raises:
            RuntimeError: inside a `slow_weights()` block.
        """
        self._end_block_of_callback("reset_slow_weights()")
        self._slow_weights.reset()
        self._block.note_made_equal(self._count)

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Return a context manager that puts the slow weights into the model, for an evaluation or an export.

        At the end of the block the fast weights are back, bit for bit, also after an exception. Until then a copy of
        the fast weights takes the memory of one more set of weights. A block inside a block changes nothing. Do not
        train inside a block. Before the first applied update the block has the model's own weights. Slow weights of a
        wider dtype are rounded to the dtypes of the model's weights.

        A model that is saved inside a block has the slow weights. A `.keras` or `.weights.h5` file has the fast weights
        too. `fit` with the callback `SwapSlowWeights` resumes from the fast weights, bit for bit. Other training from
        such a file starts from the slow weights.
        """
        if self._block.is_open or not self.built:
            yield
            return
        # Weights without a slow weight take part too: the block's changes to them are undone.
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
        pairs = self._pairs_to_swap()
        self._block.open(pairs, self._block.copies(pairs), self._count())

    def _pairs_to_swap(self) -> Sequence[tuple[Any, Any]]:
        return self._slow_weights.to_swap()

    def _has_slow_weights(self) -> bool:
        return self._slow_weights.is_captured()

    def _leave_slow_weights(self, is_last: bool = True) -> None:
        if self._block.is_open:
            self._block.leave(self._count(), self._averages(), is_last)

    def _averages(self) -> dict[int, Any]:
        """Return the averages that `SwapEMAWeights` may exchange with weights, by the `id` of the weight."""
        averages: dict[int, Any] = {}
        for optimizer in optimizers_in(self.inner_optimizer):
            if not isinstance(optimizer, Lookahead) and optimizer.use_ema and optimizer.built:
                # Private names, which `SwapEMAWeights` uses too. There are no public names.
                found = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average)
                averages |= {id(weight): average for weight, average in found if average is not None}
        return averages

    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Let the inner optimizer end the training after `fit`, for example by putting its EMA into the model.

        Args:
            var_list: List of the trained variables.
        """
        self._leave_slow_weights()
        self.inner_optimizer.finalize_variable_values(var_list)

    def scale_loss(self, loss: Any) -> Any:
        """Scale the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Exclude variables from the inner optimizer's weight decay.

        Args:
            var_list: List of variables. Defaults to none.
            var_names: List of strings. A variable with one of these in its name is excluded. Defaults to none.
        """
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def get_slot_names(self) -> list[str]:
        """Return the names that `get_slot` takes: `["slow"]`, with slow momentum also `"slow_momentum"`."""
        return ["slow", "slow_momentum"] if self.slow_momentum else ["slow"]

    def __dir__(self) -> list[str]:
        # TensorFlow's checkpoints take an object that lists `get_slot_names` for an optimizer of TensorFlow 1.
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def get_slot(self, var: Any, slot_name: str) -> Any:
        """Return the slow weight or the slow momentum of a variable.

        Args:
            var: A trainable variable with which the optimizer was built.
            slot_name: `"slow"` or, with slow momentum, `"slow_momentum"`.

        Returns:
            A `keras.Variable` of the variable's shape.

        Raises:
            ValueError: for another slot name, an optimizer that is not built, or a variable without a slow weight.
        """
        if slot_name not in self.get_slot_names():
            raise ValueError(f"`slot_name` must be one of {self.get_slot_names()}. Received: slot_name={slot_name!r}")
        self._check_built("get_slot(var, slot_name)")
        self._check_variables_are_known([var])
        if not self._slow_weights.slow_or_none:
            raise ValueError("There are no slow weights: Lookahead is switched off. Received: sync_period=0")
        slots = self._slow_weights.slow_or_none if slot_name == "slow" else self._slow_weights.momentum_or_none
        slot = slots[self._get_variable_index(var)]
        if slot is None:
            raise ValueError(
                "`var` must not be a variable that Keras overwrites with its gradient, such as a scale of float8: "
                f"those have no slow weight. Received: var={var!r}"
            )
        return slot

    def get_config(self) -> dict[str, Any]:
        """Return the config, from which `from_config` makes the same optimizer, without its state."""
        return {
            "name": self.name,
            "optimizer": keras.optimizers.serialize(self.inner_optimizer),
            "sync_period": self.sync_period,
            "slow_step_size": self._slow_step_size.config(),
            "slow_momentum": self.slow_momentum,
            "slow_nesterov": self.slow_nesterov,
            "slow_dtype": self.slow_dtype,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Lookahead":
        """Make an optimizer from its config. The config is not changed.

        Args:
            config: Dictionary, as from `get_config`.
            custom_objects: Dictionary from names to classes and functions that are not registered with Keras.
        """
        config = dict(config)
        if isinstance(config["optimizer"], dict):
            config["optimizer"] = deserialize(config["optimizer"], custom_objects)
        if isinstance(config.get("slow_step_size"), dict):
            config["slow_step_size"] = keras.saving.deserialize_keras_object(config["slow_step_size"], custom_objects)
        with warnings.catch_warnings():
            # The warning came when the config's optimizer was made.
            warnings.filterwarnings("ignore", OVER_RELAXATION)
            return cls(**config)


def _refuse_to_set(name: str, value: Any) -> None:
    raise AttributeError(
        f"`{name}` cannot be set, as state and compiled steps depend on it. Make a new `Lookahead` with it. "
        f"Received: {name}={value!r}"
    )
