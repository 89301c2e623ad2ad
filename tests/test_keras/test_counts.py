"""Inner optimizers that do not count by one in each step, or that step by methods of their own."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.test_keras.helpers import BACKEND, values

PERIOD, LEARNING_RATE = 3, 0.125


class Twice(keras.optimizers.SGD):
    """Makes two updates in each step."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        super().apply(grads, trainable_variables)


class ByTwo(keras.optimizers.SGD):
    """Counts its update as two, by a single assignment."""

    def apply(self, grads, trainable_variables=None):
        count = keras.ops.convert_to_tensor(self._iterations) + 2
        super().apply(grads, trainable_variables)
        self._iterations.assign(count)


class ByHand(keras.optimizers.SGD):
    """Counts by two, and does not use Keras' `apply`."""

    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables or self._trainable_variables):
            variable.assign(variable - LEARNING_RATE * gradient)
        self._iterations.assign_add(2)


class Sometimes(keras.optimizers.SGD):
    """Makes no update in every second step."""

    calls = 0

    def apply(self, grads, trainable_variables=None):
        self.calls += 1
        if self.calls % 2:
            super().apply(grads, trainable_variables)


class OwnCount(keras.optimizers.SGD):
    """Has another count than Keras', which starts at ten."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updates = self.add_variable((), "zeros", dtype="int", name="updates")
        self.updates.assign(10)

    @property
    def iterations(self):
        return self.updates

    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables or self._trainable_variables):
            variable.assign(variable - LEARNING_RATE * gradient)
        self.updates.assign_add(1)


def expected(updates_and_counts, start_count=0):
    """Return the fast weight after each step with a constant gradient of 1, from a weight of 1, in float64."""
    slow = fast = 1.0
    count, path = start_count, []
    for updates, counted in updates_and_counts:
        fast -= LEARNING_RATE * updates
        if (count + counted) // PERIOD > count // PERIOD:
            slow = fast = slow + 0.5 * (fast - slow)
        count += counted
        path.append(fast)
    return path, count


def run(make, steps, method="apply"):
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = Lookahead(make(LEARNING_RATE), sync_period=PERIOD)
    optimizer.build([variable])
    gradient, path = keras.ops.ones(3), []
    for _ in range(steps):
        if method == "apply":
            optimizer.apply([gradient], [variable])
        elif method == "stateless_apply":
            state = [one.value for one in optimizer.variables]
            weights, state = optimizer.stateless_apply(state, [gradient], [variable.value])
            for one, value in zip([variable, *optimizer.variables], [*weights, *state]):
                one.assign(value)
        else:
            optimizer.minimize(lambda: keras.ops.sum(variable), [variable])
        path.append(float(values([variable])[0][0]))
    return path, optimizer


METHODS = ["apply", *(["stateless_apply"] if BACKEND != "tensorflow" else [])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "steps"),
    [(Twice, [(2, 2)] * 8), (ByTwo, [(1, 2)] * 8), (ByHand, [(1, 2)] * 8)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_sync_is_due_when_a_multiple_of_the_period_was_crossed(make, steps, method):
    path, optimizer = run(make, len(steps), method)
    right, count = expected(steps)
    assert path == right
    assert int(optimizer.iterations) == count


def test_a_step_without_an_update_neither_captures_nor_synchronises():
    steps = [(1, 1), (0, 0)] * 7
    path, optimizer = run(Sometimes, len(steps))
    assert (path, int(optimizer.iterations)) == expected(steps)


def test_an_overridden_count_is_the_one_that_counts():
    path, optimizer = run(OwnCount, 8)
    right, count = expected([(1, 1)] * 8, start_count=10)
    assert path == right
    assert int(optimizer.iterations) == int(optimizer.inner_optimizer.iterations) == count


class OwnMinimize(keras.optimizers.SGD):
    """Has a `minimize`, which Keras' optimizers lack, and lowers the loss twice in it."""

    def minimize(self, loss, var_list):
        assert callable(loss)
        for _ in range(2):
            self.apply([keras.ops.ones(3) for _ in var_list], var_list)


def test_an_inner_minimize_is_called_and_its_updates_count():
    steps = [(2, 2)] * 8
    path, optimizer = run(OwnMinimize, len(steps), "minimize")
    right, count = expected(steps)
    assert path == right
    assert int(optimizer.iterations) == count


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_synchronises_when_a_multiple_was_crossed(jit_compile):
    import tensorflow as tf

    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = Lookahead(Twice(LEARNING_RATE), sync_period=PERIOD)
    optimizer.build([variable])
    step = tf.function(lambda: optimizer.apply([tf.ones(3)], [variable]), jit_compile=jit_compile)
    path = []
    for _ in range(8):
        step()
        path.append(float(values([variable])[0][0]))
    assert path == expected([(2, 2)] * 8)[0]
