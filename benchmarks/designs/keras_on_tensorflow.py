"""Designs in Keras on TensorFlow, in graphs: by TensorFlow's own executor, and compiled by XLA."""

import tensorflow as tf

from programs import of_keras
from programs.of_keras import INNER


class Designed:
    """An optimizer that has `when` call the sync, of lists of native variables, if a cycle ends.

    It captures nothing: its slow weights start as the weights that it was built with.
    """

    def __init__(self, inner, period, when, sync, flat):
        self.inner, self.period, self.when, self.sync, self.flat = inner, period, when, sync, flat

    def build(self, weights):
        self.inner.build(weights)
        self.fast = [weight.value for weight in weights]
        self.count = tf.Variable(0)
        self.slow = [tf.Variable(flattened(self.fast))] if self.flat else [tf.Variable(one) for one in self.fast]

    def apply(self, gradients, weights):
        self.inner.apply(gradients, weights)
        self.when(self.counted(), lambda: self.sync(self.fast, self.slow))

    def counted(self):
        """Count a step and return whether a sync is due."""
        count = self.count.assign_add(1, read_value=False)
        with tf.control_dependencies([count]):
            return tf.equal(self.count % self.period, 0)


class Capturing(Designed):
    """One that has `when` call the capture too, at the first step."""

    def capture(self):
        for one, other in zip(self.slow, [flattened(self.fast)] if self.flat else self.fast):
            one.assign(other)

    def apply(self, gradients, weights):
        self.when(tf.equal(self.count, 0), self.capture)
        super().apply(gradients, weights)


class InOneBranch(Designed):
    """One that has the inner update in the conditional, with the sync and without."""

    def apply(self, gradients, weights):
        def update_and_sync():
            self.inner.apply(gradients, weights)
            self.sync(self.fast, self.slow)
            return tf.constant(0)

        def update_alone():
            self.inner.apply(gradients, weights)
            return tf.constant(0)

        tf.cond(self.counted(), update_and_sync, update_alone)


def flattened(weights):
    return tf.concat([tf.reshape(one, [-1]) for one in weights], 0)


def if_alone(due, sync):
    """A conditional that stays one operation."""
    branch = tf.function(sync, autograph=False).get_concrete_function()
    inputs = branch.captured_inputs
    signature = [tf.TensorSpec(one.shape, one.dtype) for one in inputs]
    other = tf.function(lambda *inputs: None, signature, autograph=False).get_concrete_function()
    tf.raw_ops.If(cond=due, input=inputs, Tout=[], then_branch=branch, else_branch=other)


def if_taken_apart(due, sync):
    """A conditional through whose switches every weight passes."""

    def branch():
        sync()
        return tf.constant(0)

    tf.cond(due, branch, lambda: tf.constant(0))


def loop(due, sync):
    def body(_):
        sync()
        return (tf.constant(False),)

    tf.while_loop(lambda pending: pending, body, (due,))


def compiled_loop(due, sync):
    loop(due, tf.function(sync, autograph=False, jit_compile=True))


def new_arrays(fast, slow):
    for one, other in zip(fast, slow):
        new = other + 0.5 * (one - other)
        other.assign(new)
        one.assign(new)


def in_place(fast, slow):
    for one, other in zip(fast, slow):
        alpha = tf.constant(-0.5)
        done = tf.raw_ops.ResourceApplyGradientDescent(var=other.handle, alpha=alpha, delta=tf.subtract(one, other))
        with tf.control_dependencies([done]):
            one.assign(other)


def one_by_one(fast, slow):
    last = None
    for pair in zip(fast, slow):
        with tf.control_dependencies([last] if last is not None else []):
            in_place(*([one] for one in pair))
            last = tf.identity(pair[0])[0]


def difference_in_fast(fast, slow):
    for one, other in zip(fast, slow):
        one.assign_sub(other)
        other.assign_add(0.5 * one)
        one.assign(other)


def in_one_array(fast, slow):
    (array,) = slow
    new = array + 0.5 * (flattened(fast) - array)
    array.assign(new)
    for one, part in zip(fast, tf.split(new, [one.shape.num_elements() for one in fast])):
        one.assign(tf.reshape(part, one.shape))


# Names, kinds, conditionals, syncs, and whether all slow weights are in one array.
DESIGNS = {
    "conditional left whole, slow weights in place": (Capturing, if_alone, in_place, False),
    "conditional left whole, a new array for both": (Capturing, if_alone, new_arrays, False),
    "conditional left whole, one weight after the other": (Capturing, if_alone, one_by_one, False),
    "conditional left whole, difference made in the fast weight": (Capturing, if_alone, difference_in_fast, False),
    "conditional left whole, slow weights in one array": (Capturing, if_alone, in_one_array, True),
    "conditional taken apart, slow weights in place": (Capturing, if_taken_apart, in_place, False),
    "loop of zero or one rounds, slow weights in place": (Capturing, loop, in_place, False),
    "loop, sync compiled by XLA": (Capturing, compiled_loop, new_arrays, False),
}
# Of weights that a capture reads and does not write, XLA makes copies, which would hide what the sync costs.
COMPILED = {
    "no capture, conditional": (Designed, if_taken_apart, new_arrays, False),
    "no capture, loop of zero or one rounds": (Designed, loop, new_arrays, False),
    "no capture, loop, difference made in the fast weight": (Designed, loop, difference_in_fast, False),
    "no capture, loop, slow weights in one array": (Designed, loop, in_one_array, True),
    "no capture, update and sync in one branch": (InOneBranch, None, new_arrays, False),
}


def optimizers(case):
    """Return functions that make the optimizers to compare, by name; the bare one comes first."""
    made = of_keras.optimizers(case)
    for name, (kind, *design) in (COMPILED if case.mode.endswith("XLA") else DESIGNS).items():
        made[name] = lambda kind=kind, design=design: kind(INNER[case.inner](), case.period, *design)
    return made
