"""Random operations in Keras 2, beside a model of the optimizer in float64 NumPy."""

import copy
import tempfile
import warnings

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras
from tests import random_operations
from tests.random_operations import operation

# Keras 2.15 on Python 3.11.
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange:DeprecationWarning")

legacy = keras.optimizers.legacy
NUMBER = 3
NEVER, RESTORED, CAPTURED = range(3)
rates = strategies.sampled_from([0.0, 0.0625, 0.125, 0.25])
periods = strategies.sampled_from([0, 1, 2, 3, 4])
step_sizes = strategies.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5])
small = strategies.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0])
gradients = strategies.lists(strategies.none() | small, min_size=NUMBER, max_size=NUMBER)
listed = strategies.lists(strategies.booleans(), min_size=NUMBER, max_size=NUMBER)
weights = strategies.lists(small, min_size=NUMBER, max_size=NUMBER)


class Level:
    """One `Lookahead`. `slow` has the weights that have a slot."""

    def __init__(self, period, step_size):
        self.period, self.step_size, self.slow, self.state = period, step_size, {}, NEVER


class Model:
    """The expected result: `levels` from the inside out, `t` applied steps, and `calls` with the skipped steps."""

    def __init__(self, start, rate, momentum, settings):
        self.fast, self.velocity = list(start), {}
        self.rate, self.momentum, self.clipvalue = rate, momentum, None
        self.levels = [Level(*one) for one in settings]
        self.t = self.calls = 0

    def capture(self):
        for level in self.levels:
            if level.period and (level.state == NEVER or (level.state == RESTORED and self.t == 0)):
                level.slow = {index: self.fast[index] for index in level.slow}

    def make_slots(self, gradients):
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self.velocity.setdefault(index, 0.0)
                for level in self.levels:
                    if level.period:
                        level.slow.setdefault(index, self.fast[index])

    def step(self, gradients, trained):
        self.make_slots(gradients)
        self.capture()
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                if self.clipvalue is not None:
                    gradient = np.clip(gradient, -self.clipvalue, self.clipvalue)
                self.velocity[index] = self.momentum * self.velocity[index] - self.rate * gradient
                self.fast[index] = self.fast[index] + self.velocity[index]
        self.t, self.calls = self.t + 1, self.calls + 1
        for number, level in enumerate(self.levels):
            if level.period:
                level.state = CAPTURED
                if self.t % level.period == 0:
                    self.synchronize(number, trained)

    def synchronize(self, number, trained):
        level = self.levels[number]
        for index, slow in level.slow.items():
            if index in trained:
                self.fast[index] = slow + level.step_size * (self.fast[index] - slow)
            level.slow[index] = self.fast[index]
        for inner in self.levels[:number]:
            if inner.period:
                inner.slow = {index: self.fast[index] for index in inner.slow}

    def sync(self):
        outer = self.levels[-1]
        if outer.period:
            if outer.state == NEVER or (outer.state == RESTORED and self.t == 0):
                outer.slow = {index: self.fast[index] for index in outer.slow}
            self.synchronize(len(self.levels) - 1, range(NUMBER))

    def reset(self):
        for level in self.levels:
            if level.period:
                level.slow = {index: self.fast[index] for index in level.slow}


class Keras2(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.saved, self.number = [], 0

    def teardown(self):
        self.folder.cleanup()

    @initialize(
        rate=rates,
        momentum=strategies.sampled_from([0.0, 0.5]),
        settings=strategies.lists(strategies.tuples(periods, step_sizes), min_size=1, max_size=2),
        start=weights,
        scaled=strategies.booleans(),
    )
    def make(self, rate, momentum, settings, start, scaled):
        self.scaled = scaled
        self.model = Model(start, rate, momentum, settings)
        # With momentum 0, SGD has no slots.
        self.has_slots = momentum > 0
        self.build()
        for variable, value in zip(self.variables, start):
            variable.assign(tf.fill(variable.shape, value))

    def build(self):
        model = self.model
        optimizer = legacy.SGD(model.rate, momentum=model.momentum)
        for level in model.levels:
            optimizer = Lookahead(optimizer, level.period, level.step_size)
        if model.clipvalue is not None:
            optimizer.clipvalue = model.clipvalue
        if self.scaled:
            optimizer = keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=2.0, dynamic_growth_steps=999)
        self.network = keras.Sequential([keras.Input((2,)), *(keras.layers.Dense(2, use_bias=False) for _ in "123")])
        self.network.compile(optimizer, loss="mse")
        self.take()

    def take(self):
        """Take the parts of the network, perhaps of a loaded network."""
        self.optimizer, self.variables = self.network.optimizer, self.network.trainable_weights
        self.lookahead = self.optimizer.inner_optimizer if self.scaled else self.optimizer
        self.traced = {}

    def lookaheads(self):
        found = [self.lookahead]
        while isinstance(found[0].inner_optimizer, Lookahead):
            found.insert(0, found[0].inner_optimizer)
        return found

    def places(self, indices):
        """Return the place of each slot, by optimizer."""
        slots = [[(number, index) for index in indices] for number, _ in enumerate(self.model.levels)]
        return slots + ([[("momentum", index) for index in indices]] if self.has_slots else [])

    def order(self):
        """Return the weights in the order of their places."""
        known = {}
        inner = self.lookaheads()[0].inner_optimizer
        named = [*enumerate(self.lookaheads()), ("momentum", inner)]
        for name, one in named:
            for index, variable in enumerate(self.variables):
                slots = one._slots.get(variable._unique_id, {})
                known.update({id(slot): (name, index) for slot in slots.values()})
        found = [known[id(weight)] for weight in self.optimizer.weights if id(weight) in known]
        return sorted(found, key=lambda place: len(self.model.levels) if place[0] == "momentum" else place[0])

    def apply(self, pairs, trained, traced):
        """Make a step, in a function that is traced once for each pattern of gradients."""

        def step(*given):
            given, chosen = iter(given), []
            for index, (gradient, variable) in enumerate(zip(pairs, self.variables)):
                if gradient is not None:
                    chosen.append((tf.fill(variable.shape, next(given)), variable))
                elif index in trained:
                    chosen.append((None, variable))
            self.optimizer.apply_gradients(chosen)

        values = [tf.constant(one) for one in pairs if one is not None]
        if traced:
            key = tuple(one is None for one in pairs), tuple(trained)
            step = self.traced.setdefault(key, tf.function(step))
        step(*values)

    @operation(gradients=gradients, listed=listed, traced=strategies.booleans(), times=strategies.integers(1, 3))
    def step(self, gradients, listed, traced, times):
        trained = [index for index in range(NUMBER) if listed[index] or gradients[index] is not None]
        if not trained or all(one is None for one in gradients):
            return
        if traced:
            # A function synchronises the variables that the optimizer knew when the function was traced.
            known = tuple(sorted(level.slow) for level in self.model.levels)
            if getattr(self, "known", None) != known:
                self.traced = {}
        for _ in range(times):
            self.apply(gradients, trained, traced)
            # A loss scaler leaves out weights without gradient.
            self.model.step(gradients, range(NUMBER) if self.scaled else trained)
        self.known = tuple(sorted(level.slow) for level in self.model.levels)

    @operation(times=strategies.integers(1, 4), gradient=small)
    def steps_of_all(self, times, gradient):
        self.step(gradients=[gradient] * NUMBER, listed=[True] * NUMBER, traced=False, times=times)

    @precondition(lambda self: self.model.t % 4 == 1)
    @operation()
    def no_gradient_at_all(self):
        with pytest.raises(ValueError, match="No gradients provided"):
            self.optimizer.apply_gradients([(None, variable) for variable in self.variables])

    @precondition(lambda self: self.scaled)
    @operation(traced=strategies.booleans(), value=strategies.sampled_from([np.nan, np.inf]))
    def skipped_step(self, traced, value):
        self.traced = {}
        self.apply([value] * NUMBER, range(NUMBER), traced)
        self.traced = {}
        if traced:
            # Both branches are traced, also the branch that makes slots.
            self.model.make_slots([0.0] * NUMBER)
        self.model.calls += 1

    @precondition(lambda self: not self.scaled and self.model.t % 4 == 2)
    @operation()
    def step_in_error(self):
        with pytest.raises(TypeError, match="must be pairs"):
            self.optimizer.apply_gradients([(tf.constant(1.0), None)])

    @operation(rate=rates)
    def set_learning_rate(self, rate):
        self.optimizer.learning_rate = self.model.rate = rate

    @precondition(lambda self: self.has_slots)
    @operation(momentum=strategies.sampled_from([0.25, 0.5, 0.75]))
    def set_momentum(self, momentum):
        self.lookahead.momentum = self.model.momentum = momentum

    @operation(clipvalue=strategies.sampled_from([None, 0.25, 0.5]))
    def set_clipvalue(self, clipvalue):
        self.lookahead.clipvalue = self.model.clipvalue = clipvalue
        self.traced = {}

    @operation(outer=strategies.booleans(), period=periods)
    def set_period(self, outer, period):
        number = -outer
        level = self.model.levels[number]
        # Variables that are not made yet will all be captured anyway.
        if not period:
            level.state = NEVER
        level.period = self.lookaheads()[number].sync_period = period
        self.traced = {}

    @operation(outer=strategies.booleans(), step_size=step_sizes)
    def set_step_size(self, outer, step_size):
        number = -outer
        self.model.levels[number].step_size = self.lookaheads()[number].slow_step_size = step_size
        self.traced = {}

    @operation(values=weights)
    def load_weights(self, values):
        for index, (variable, value) in enumerate(zip(self.variables, values)):
            variable.assign(tf.fill(variable.shape, value))
            self.model.fast[index] = value

    @precondition(lambda self: not self.scaled)
    @operation(count=strategies.sampled_from([0, 0, 0, 1, 2, 3, 5, 12]))
    def assign_count(self, count):
        self.optimizer.iterations.assign(count)
        self.model.t = self.model.calls = count

    @operation(which=strategies.sampled_from(["iterations", "inner", "weights", "get_weights", "get_config"]))
    def read(self, which):
        if which == "inner":
            _ = self.lookaheads()[0].inner_optimizer.iterations
        elif which in ("iterations", "weights"):
            getattr(self.optimizer, which)
        else:
            getattr(self.optimizer, which)()

    @operation()
    def sync(self):
        self.lookahead.sync()
        self.model.sync()

    @operation()
    def reset(self):
        self.lookahead.reset_slow_weights()
        self.model.reset()

    @operation(ends_badly=strategies.booleans(), changed=strategies.booleans(), twice=strategies.booleans())
    def block(self, ends_badly, changed, twice):
        outer = self.model.levels[-1]
        if outer.period and (outer.state == NEVER or (outer.state == RESTORED and self.model.t == 0)):
            outer.slow = {index: self.model.fast[index] for index in outer.slow}
        slow = outer.slow if outer.period else {}
        before = [variable.numpy() for variable in self.variables]
        try:
            with self.lookahead.slow_weights():
                self.assert_close([slow.get(index, fast) for index, fast in enumerate(self.model.fast)])
                if twice:
                    with self.lookahead.slow_weights():
                        pass
                with pytest.raises(RuntimeError, match="inside a `slow_weights"):
                    self.lookahead.sync()
                if changed:
                    for index in slow:
                        self.variables[index].assign(tf.fill(self.variables[index].shape, 77.0))
                if ends_badly:
                    raise KeyError
        except KeyError:
            assert ends_badly
        for variable, value in zip(self.variables, before):
            assert variable.numpy().tobytes() == value.tobytes()

    @operation(form=strategies.sampled_from(["checkpoint", "weights", "list"]))
    def save(self, form):
        if any(np.isnan(slow) for level in self.model.levels for slow in level.slow.values()):
            return
        self.number += 1
        path = f"{self.folder.name}/{self.number}"
        content = None
        if form == "list":
            content = self.network.get_weights(), self.optimizer.get_weights(), self.order()
        elif form == "weights":
            self.network.save_weights(path)
        else:
            tf.train.Checkpoint(model=self.network, optimizer=self.optimizer).write(path)
        hypers = self.lookaheads()[0].inner_optimizer._hypers_created
        model = copy.deepcopy(self.model)
        if form != "list" and self.lookahead._iterations is None:
            # There is no count to load.
            model.t = model.calls = None
        self.saved.append((form, path, content, model, hypers))

    @precondition(lambda self: self.saved)
    @operation(which=strategies.integers(0, 9), anew=strategies.booleans(), built=strategies.booleans())
    def load(self, which, anew, built):
        form, path, content, then, hypers = self.saved[which % len(self.saved)]
        now = self.model
        if form != "list" and not all(len(one.slow) in (0, NUMBER) for one in [*then.levels, *now.levels]):
            # A limit: a slot that was made before and is not in the file counts as restored.
            built, anew = False, True
        if anew:
            self.model = Model(
                [0.0] * NUMBER, now.rate, now.momentum, [(one.period, one.step_size) for one in now.levels]
            )
            self.model.clipvalue = now.clipvalue
            self.build()
            self.model.fast = [np.nan] * NUMBER
        if form == "list" or built:
            self.lookahead._create_all_weights(self.variables)
            model = self.model
            model.make_slots([0.0] * NUMBER)
        if form == "list":
            if content[2] != self.order() or len(content[1]) != len(self.optimizer.weights):
                if np.isnan(self.model.fast).any():
                    self.network.set_weights(content[0])
                    self.model.fast = list(then.fast)
                    self.lookahead.reset_slow_weights()
                    self.model.reset()
                return
            self.network.set_weights(content[0])
            self.optimizer.set_weights(content[1])
        elif form == "weights":
            self.network.load_weights(path).expect_partial()
        else:
            tf.train.Checkpoint(model=self.network, optimizer=self.optimizer).read(path).expect_partial()
        self.taken(then, form, hypers)

    def taken(self, then, form, hypers):
        model = self.model
        model.fast = list(then.fast)
        if then.calls is not None:
            model.t, model.calls = then.t, then.calls
        model.velocity.update(then.velocity)
        for level, former in zip(model.levels, then.levels):
            level.slow.update(former.slow)
            # Slots that the saved optimizer did not use any more, with a period of 0, are in the file too.
            if form == "list" or former.slow:
                level.state = RESTORED
        if form != "list" and hypers:
            model.rate, model.momentum = then.rate, then.momentum
        if form == "list" and not self.has_slots:
            model.velocity = dict.fromkeys(model.velocity, 0.0)
        self.traced = {}

    @precondition(lambda self: all(len(level.slow) == NUMBER and level.period for level in self.model.levels))
    @operation()
    def through_h5(self):
        if self.order() != [slot for slots in self.places(range(NUMBER)) for slot in slots]:
            # Weights in `.h5` files have no name, and the optimizer met the variables one after the other.
            return
        if any(np.isnan(slow) for level in self.model.levels for slow in level.slow.values()):
            # A limit: such a file does not say that slow weights were not captured yet.
            return
        path = f"{self.folder.name}/model.h5"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file", UserWarning)
            self.network.save(path)
        self.network = keras.models.load_model(path)
        self.take()
        self.taken(copy.deepcopy(self.model), "list", False)

    @precondition(lambda self: not self.scaled and any(level.slow for level in self.model.levels))
    @operation()
    def deep_copy(self):
        twin = copy.deepcopy(self.optimizer)
        self.lookahead.reset_slow_weights()
        self.optimizer = self.lookahead = twin
        self.network.compile(twin, loss="mse")
        self.traced = {}

    def assert_close(self, expected):
        for variable, value in zip(self.variables, expected, strict=True):
            np.testing.assert_allclose(variable, np.full((2, 2), value), rtol=1e-5, atol=1e-5)

    @invariant()
    def the_weights_are_those_of_the_model(self):
        if not hasattr(self, "network"):
            return
        self.assert_close(self.model.fast)
        for one, level in zip(self.lookaheads(), self.model.levels, strict=True):
            for index, value in level.slow.items() if level.period else ():
                if np.isnan(value):
                    # Made for weights that were not loaded yet.
                    assert level.state == NEVER
                    continue
                slow = one.get_slot(self.variables[index], "slow")
                np.testing.assert_allclose(slow, np.full((2, 2), value), rtol=1e-5, atol=1e-5)
        if self.lookahead._iterations is not None:
            assert int(self.optimizer.iterations) == self.model.calls
            counts = [int(one) for one in self.optimizer.weights if one.dtype == tf.int64]
            if self.lookahead._applied_steps is None:
                # The first step or a checkpoint makes this count. Reading the other count does not.
                assert self.model.t == self.model.calls
                assert counts == [self.model.calls]
            else:
                assert counts == [self.model.calls, self.model.t]


@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1:UserWarning")
def test_random_operations():
    random_operations.run(Keras2, examples=30, steps=30)
