"""The step of one variable, for averaging wrappers around a `Lookahead`.

TensorFlow Addons' `SWA` and `MovingAverage` do not call `apply_gradients` of the optimizer that they wrap. They call
the methods that update one variable, in a step of their own. They count the step after all variables.
"""

from typing import Any

import tensorflow as tf

from lookahead_optim._control_flow_tensorflow import after, operations
from lookahead_optim._outer_step_tensorflow import slow_step
from lookahead_optim.tf_keras._slow_weights import CAPTURED, SlowWeights, wrappers_in

__all__ = ["step_of_one_variable"]


def step_of_one_variable(
    optimizer: SlowWeights, takes: str, method: str, fast: Any, arguments: tuple[Any, ...], apply_state: Any
) -> Any:
    """Call `method` of the inner optimizer, between the capture and the outer step of this variable.

    Capture and outer step are done by `tf.where`: the variables come one at a time, and control flow for each costs
    more.

    Args:
        optimizer: The wrapper.
        takes: Name of the inner optimizer's attribute that says whether `method` takes `apply_state`.
        method: Name of the method.
        fast: The variable.
        arguments: Positional arguments of the method.
        apply_state: Dictionary of the step's settings.
    """
    inner, done = optimizer._optimizer, []
    kwargs = {"apply_state": apply_state} if "apply_state" in getattr(inner, takes) else {}
    slow = optimizer.get_slot(fast, "slow") if optimizer.sync_period else None
    if slow is not None:
        is_first = tf.equal(tf.convert_to_tensor(optimizer.iterations), 0)
        done.append(slow.assign(tf.where(is_first, fast, slow), read_value=False))
    with after(*done):
        done.append(getattr(inner, method)(*arguments, **kwargs))
    if slow is None:
        return done[-1]
    with after(*done):
        is_due = tf.equal((optimizer.iterations + 1) % optimizer.sync_period, 0)
        new = slow_step(slow.read_value(), fast.read_value(), optimizer._get_hyper("slow_step_size"))
        restarted = [wrapper.get_slot(fast, "slow") for wrapper in wrappers_in(inner) if wrapper.sync_period]
        for variable in [slow, fast, *restarted]:
            done.append(variable.assign(tf.where(is_due, new, variable), read_value=False))
        if optimizer._capture_state is not None:
            done.append(optimizer._capture_state.assign(CAPTURED, read_value=False))
    return tf.group(*operations(done)) if not tf.executing_eagerly() else None
