"""The slow weights: which variables have a slow weight, when it is captured, and the outer step.

A slow weight is the slot `"slow"` of its variable, as in TensorFlow Addons. A variable of its own says whether slow
weights were captured. Steps, restorations and changes of the period set it.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from lookahead_optim import _outer_step_tensorflow
from lookahead_optim._control_flow_tensorflow import after, operations
from lookahead_optim._evaluation import Block
from lookahead_optim._outer_step_tensorflow import OuterStep, Pair
from lookahead_optim.tf_keras._count import Counting, to_int
from lookahead_optim.tf_keras._order import appended

__all__ = ["SlowWeights", "wrappers_in"]

# The values of `SlowWeights._capture_state`:
#   NEVER      at the start, and while the period is 0. A step captures, for all variables that have a slot.
#   RESTORED   after slots or weights were loaded from a file. A step captures only if the file's count is 0.
#   CAPTURED   after a step.
NEVER, RESTORED, CAPTURED = range(3)


class SlowWeights(Counting):
    """An optimizer with slow weights, which it captures and synchronises when its protocol asks for it."""

    sync_period: int
    # A variable with one of the three values above. It is `None` before the first step or restoration. It is also
    # `None` in graphs of TensorFlow 1, where a restoration is not noticed. Checkpoints have TensorFlow Addons' format
    # and lack it. A SavedModel has it, as it may contain a step.
    _capture_state: Any = None

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        # Variables by `id`: first the variables that have a slow weight, then the variables whose slots were made in
        # their places in `weights`, and not only restored. Weak references, as other optimizers do not keep a dropped
        # model alive either.
        self._fast_variables: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._complete: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._placed: list[Any] = []
        self._block = Block(tf.convert_to_tensor, tf.identity, tf.reduce_all)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The copy has slots for the same variables, like a copy of every legacy optimizer.
        for variables in (self._fast_variables, self._complete):
            memo[id(variables)] = copy.copy(variables)
        memo[id(self._block)] = Block(tf.convert_to_tensor, tf.identity, tf.reduce_all)
        return super().__deepcopy__(memo)

    def _has_slow_weights(self) -> bool:
        return bool(self._fast_variables)

    def _pairs(self) -> list[Pair]:
        return [
            Pair(self.get_slot(fast, "slow"), fast, fast.constraint)
            for fast in self._fast_variables.values()
            if self.sync_period
        ]

    def _create_slots(self, var_list: list[Any]) -> None:
        inner = self._optimizer
        self._take_count_of_wrapper_around()
        self._create_applied_steps()
        self._create_capture_state()
        is_complete = all(id(variable) in self._complete for variable in var_list)
        keeps_order = is_complete or isinstance(inner, SlowWeights)
        with contextlib.nullcontext() if keeps_order else appended(inner, self._placed):
            inner._create_slots(var_list)
        if self.sync_period:
            with contextlib.nullcontext() if is_complete else appended(self, self._placed):
                for variable in var_list:
                    # The initial value is the capture of a variable that is new after the first step. In a graph of
                    # TensorFlow 1 the variable may not have its value yet. There the first step captures it.
                    self.add_slot(variable, "slow", initializer=variable if tf.executing_eagerly() else "zeros")
        self._complete.update({id(variable): variable for variable in var_list})

    def add_slot(self, var: Any, slot_name: str, initializer: Any = "zeros", shape: Any = None) -> Any:
        """Return the slot of a variable, and make it if there is none.

        Args:
            var: The variable.
            slot_name: String, the name of the slot. A slow weight is the slot `"slow"`.
            initializer: Initializer, or initial value, of a new slot. Defaults to `"zeros"`.
            shape: Shape of a new slot. Defaults to the shape of the variable.
        """
        depth = len(list(wrappers_in(self._optimizer)))
        # In HDF5 files variables have names. The slots of two wrappers must have different names.
        with tf.name_scope(f"{self._name}_{depth}") if depth else contextlib.nullcontext():
            slot = super().add_slot(var, slot_name, initializer, shape)
        if slot_name == "slow":
            # Slots that are restored also come here, before the first step.
            self._fast_variables.setdefault(id(var), var)
        return slot

    def _create_capture_state(self) -> Any:
        if self._capture_state is None and tf.compat.v1.executing_eagerly_outside_functions():
            self._capture_state = self._scalar("lookahead_captured", "zeros")
        return self._capture_state

    def _mark_restored(self) -> None:
        state = self._create_capture_state()
        if state is not None:
            with tf.init_scope():
                state.assign(RESTORED)

    def _mark_captured(self, made: Any) -> list[Any]:
        """Mark the slow weights as captured if steps were `made`; return the assignments."""
        if not self.sync_period or self._capture_state is None:
            return []
        new = tf.where(tf.greater(made, 0), tf.constant(CAPTURED, tf.int64), self._capture_state)
        return [self._capture_state.assign(new, read_value=False)]

    def _is_captured(self) -> bool:
        return not self.sync_period or to_int(self._capture_state) == CAPTURED

    def _is_due_to_capture(self, state: Any) -> Any:
        """Return whether the slow weights must be captured.

        Slow weights from a file count as captured, unless the file's step count is 0.
        """
        if tf.executing_eagerly():
            state = to_int(state)
            return state == NEVER or (state == RESTORED and to_int(self._steps) == 0)
        is_first = tf.equal(tf.convert_to_tensor(self._steps), 0)
        return tf.equal(state, NEVER) | (tf.equal(state, RESTORED) & is_first)

    def _capture(self) -> Any:
        """Capture the slow weights if they were not captured yet."""
        state = self._create_capture_state()
        # An averaging wrapper around this optimizer has its own count. What it loads does not pass through
        # `set_weights` here.
        if state is None or self._listed_count is None:
            return _outer_step_tensorflow.capture(self._steps, _is_first, self._pairs)
        return _outer_step_tensorflow.capture(state, self._is_due_to_capture, self._pairs)

    def _reset(self) -> None:
        """Capture the slow weights again, in wrappers inside too."""
        for wrapper in wrappers_in(self):
            # Without slow weights the step count is not needed, so it is not made.
            if wrapper._has_slow_weights():
                _outer_step_tensorflow.capture(self._steps, lambda count: True, wrapper._pairs)

    def _synchronize(self, is_due: Callable[[Any], Any], trained: list[Any] | None = None) -> Any:
        """Make the outer step if `is_due(count)`, for the variables `trained` in this step, or for all variables.

        All others are frozen: they are not moved, and their slow weights are captured again from them.

        A variable of Keras 2 does not say whether it is frozen: `layer.trainable` belongs to the layer, and
        `variable.trainable` never changes. Only the list that `apply_gradients` gets can tell. `fit` and `minimize`
        list all trained variables, with `None` for a missing gradient. A training loop that filters out pairs without a
        gradient looks the same as a loop that freezes variables. There are three possible rules for a variable that is
        not listed. Each is wrong in some case:

        - Move it. Then frozen weights move halfway back to their old values, even if other weights were loaded into
          them since.
        - Leave it and its slow weight alone, as TensorFlow Addons did. Then the same happens later, when the variable
          is trained again: it moves towards an old slow weight.
        - Treat it as frozen. This is wrong for a filtered variable, but the error is bounded: in this cycle the
          variable stays where the inner optimizer moved it. This rule is used.

        Args:
            is_due: Function of the step count that returns whether the outer step is due.
            trained: The variables that the step was given, or `None` for all.
        """
        if not self.sync_period:
            return None
        if self._applied_steps is not None:
            # A loss scaler around this optimizer filters pairs for every loop. So here most variables that are not
            # listed are not frozen.
            trained = None

        def pairs(are_trained: bool) -> list[Pair]:
            if trained is None:
                return self._pairs() if are_trained else []
            slots = {id(self.get_slot(fast, "slow")) for fast in trained if id(fast) in self._fast_variables}
            return [pair for pair in self._pairs() if (id(pair.slow) in slots) == are_trained]

        def step() -> OuterStep:
            return OuterStep(self._get_hyper("slow_step_size"))

        done = _outer_step_tensorflow.synchronize(self._steps, is_due, lambda: pairs(True), step, constrain_slow=False)
        if trained is not None:
            with after(done):
                done = operations(done, _outer_step_tensorflow.capture(self._steps, is_due, lambda: pairs(False)))
        # Wrappers inside restart too. Otherwise their slow weights would pull the fast weights back.
        for wrapper in wrappers_in(self._optimizer):
            with after(done):
                done = _outer_step_tensorflow.capture(self._steps, is_due, wrapper._pairs)
        return done


def wrappers_in(optimizer: Any) -> Iterator[SlowWeights]:
    """Yield an optimizer, if it is a `Lookahead`, and each `Lookahead` inside it, from the outside to the inside."""
    while isinstance(optimizer, SlowWeights):
        yield optimizer
        optimizer = optimizer._optimizer


def _is_first(count: Any) -> Any:
    return tf.equal(count, 0)
