"""Random operations on a model with `Lookahead`, beside a float64 model of what they do.

The inner optimizer is SGD, written out below. Loss scaling, nesting, and stateless and compiled steps are drawn. Run it
longer with `FUZZ_SECONDS=600 pytest -s`.
"""

import copy
import os
import shutil
import tempfile

import keras
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from lookahead_optim.keras import Lookahead, SwapSlowWeights
from tests.random_operations import operation, run
from tests.test_keras.helpers import BACKEND, find_lookahead, values

PERIODS = st.sampled_from([0, 1, 2, 3, 5])
STEP_SIZES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5])
LEVELS = st.fixed_dictionaries(
    {
        "period": st.sampled_from([1, 2, 3, 5]),
        "size": STEP_SIZES,
        "slow_momentum": st.sampled_from([0.0, 0.0, 0.5, 0.9]),
        "slow_nesterov": st.booleans(),
    }
)
RATES = st.sampled_from([0.0, 0.05, 0.1])
SEEDS = st.integers(0, 2**16)
# A `Sequential` model that Keras loads from .h5 has an optimizer for no variables. A bare optimizer has the same
# problem.
FORMATS = ["arrays", "weights.h5", "keras", "tree"] + (["checkpoint"] if BACKEND == "tensorflow" else [])
SHAPES = [(3, 2), (2,), (2, 1), (1,)]


class Model:
    """The same in float64. `levels` are the wrappers, from the inside to the outside."""

    def __init__(self, weights, momentum, rate, levels):
        self.weights = [np.asarray(weight, "float64") for weight in weights]
        self.velocity = [np.zeros_like(weight) for weight in self.weights]
        self.momentum, self.rate, self.count = momentum, rate, 0
        self.levels = [{**level, "slow": None, "b": None, "is_synchronized": False} for level in levels]

    def capture(self, level):
        level["slow"], level["b"] = copy.deepcopy(self.weights), [np.zeros_like(one) for one in self.weights]

    def reset(self):
        for level in self.levels:
            if level["slow"] is not None:
                self.capture(level)
                level["is_synchronized"] = True

    def synchronize(self, index, frozen=()):
        level = self.levels[index]
        mu = level["slow_momentum"]
        for number, (slow, fast) in enumerate(zip(level["slow"], self.weights)):
            if number in frozen:
                level["b"][number] = np.zeros_like(fast)
            else:
                s = slow - fast
                b = level["b"][number] = mu * level["b"][number] + s
                self.weights[number] = slow - level["size"] * (s + mu * b if level["slow_nesterov"] else b)
        for follower in self.levels[: index + 1]:
            if follower["slow"] is not None:
                follower["slow"], follower["is_synchronized"] = copy.deepcopy(self.weights), True

    def sync(self):
        """Make a sync by hand. With momentum it does nothing if no update was applied since the last sync."""
        level = self.levels[-1]
        if level["slow"] is not None and not (level["slow_momentum"] and level["is_synchronized"]):
            self.synchronize(len(self.levels) - 1)

    def step(self, gradients, frozen):
        for level in self.levels:
            level["is_synchronized"] = False
            if level["period"] and level["slow"] is None:
                self.capture(level)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self.velocity[index] = self.momentum * self.velocity[index] - self.rate * gradient
                self.weights[index] = self.weights[index] + self.velocity[index]
        self.count += 1
        for index, level in enumerate(self.levels):
            if level["period"] and self.count % level["period"] == 0:
                self.synchronize(index, frozen)


class Machine(stateful.RuleBasedStateMachine):
    @stateful.initialize(
        settings=st.lists(LEVELS, min_size=1, max_size=2),
        momentum=st.sampled_from([0.0, 0.5]),
        scaled=st.booleans(),
        way=st.sampled_from(["apply", "apply_gradients", "stateless_apply", "compiled"]),
        seed=SEEDS,
    )
    def start(self, settings, momentum, scaled, way, seed):
        self.directory = tempfile.mkdtemp()
        self.momentum, self.scaled, self.way = momentum, scaled, way
        if BACKEND == "tensorflow" and way == "stateless_apply":
            self.way = "apply"
        if BACKEND == "jax" and scaled and way != "compiled":
            self.way = "stateless_apply"
        self.saved, self.files, self.frozen = [], 0, set()
        self.keras_model = self.new_model(settings)
        weights = [np.random.default_rng(seed).normal(size=shape).astype("float32") for shape in SHAPES]
        self.keras_model.set_weights(weights)
        self.model = Model(weights, momentum, 0.1, settings)
        self.compiled = None

    def new_model(self, settings):
        optimizer = keras.optimizers.SGD(0.1, momentum=self.momentum, name="inner")
        for level in settings:
            outer = {name: level[name] for name in ("slow_momentum", "slow_nesterov")}
            optimizer = Lookahead(optimizer, level["period"], level["size"], **outer)
        if self.scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=4.0, dynamic_growth_steps=3, name="scaled"
            )
        # State trees name variables by their paths, which Keras numbers in a process.
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(2, name="first"), keras.layers.Dense(1, name="second")], name="model"
        )
        model.compile(optimizer, loss=keras.losses.MeanSquaredError(), run_eagerly=BACKEND != "jax")
        optimizer.build(model.trainable_variables)
        return model

    @property
    def optimizer(self):
        return self.keras_model.optimizer

    @property
    def lookahead(self):
        return find_lookahead(self.optimizer)

    @property
    def variables(self):
        return [variable for layer in self.keras_model.layers for variable in (layer.kernel, layer.bias)]

    def wrappers(self):
        """Return the wrappers from the inside to the outside."""
        found = [self.lookahead]
        while isinstance(found[0].inner_optimizer, Lookahead):
            found.insert(0, found[0].inner_optimizer)
        return found

    def teardown(self):
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    # Steps

    def call(self, gradients):
        variables, optimizer = self.variables, self.optimizer
        scale = float(optimizer.dynamic_scale) if self.scaled else 1.0
        gradients = [
            None if one is None else keras.ops.convert_to_tensor((one * scale).astype("float32")) for one in gradients
        ]
        if self.way == "stateless_apply" or (self.way == "compiled" and BACKEND == "jax"):
            step = optimizer.stateless_apply
            if self.way == "compiled":
                import jax

                self.compiled = self.compiled or jax.jit(lambda *arguments: optimizer.stateless_apply(*arguments))
                step = self.compiled
            state = [one.value for one in optimizer.variables]
            weights, state = step(state, gradients, [one.value for one in variables])
            for variable, value in zip([*variables, *optimizer.variables], [*weights, *state], strict=True):
                variable.assign(value)
            return
        # Keras gives an optimizer the variables that are trainable now.
        pairs = [pair for index, pair in enumerate(zip(gradients, variables)) if index not in self.frozen]
        if self.way == "compiled" and BACKEND == "tensorflow":
            import tensorflow as tf

            keys = [variable for _, variable in pairs]
            self.compiled = self.compiled or tf.function(lambda gradients: optimizer.apply(gradients, keys))
            self.compiled([gradient for gradient, _ in pairs])
        elif self.way == "apply_gradients":
            optimizer.apply_gradients(pairs)
        else:
            optimizer.apply(*map(list, zip(*pairs)))

    def gradients(self, seed, missing):
        rng = np.random.default_rng(seed)
        found = [rng.normal(size=shape) for shape in SHAPES]
        return [None if index in missing | self.frozen else one for index, one in enumerate(found)]

    @operation(seed=SEEDS, missing=st.sets(st.integers(0, 3)), times=st.integers(1, 3))
    def step(self, seed, missing, times):
        for number in range(times):
            gradients = self.gradients(seed + number, missing)
            if all(one is None for one in gradients):
                return
            self.call(gradients)
            self.model.step([None if one is None else one.astype("float32") for one in gradients], self.frozen)

    @stateful.precondition(lambda self: self.scaled)
    @operation(seed=SEEDS, value=st.sampled_from([np.nan, np.inf, -np.inf]))
    def skipped_step(self, seed, value):
        gradients = self.gradients(seed, set())
        if all(one is None for one in gradients):
            return
        next(one for one in gradients if one is not None).flat[0] = value
        self.call(gradients)

    @operation()
    def step_without_gradients(self):
        if self.way in ("apply", "apply_gradients") and not self.scaled and len(self.frozen) < len(SHAPES):
            with pytest.raises(ValueError, match="No gradients provided"):
                self.call([None] * len(SHAPES))

    # What users do between steps

    @operation(layer=st.integers(0, 1))
    def freeze(self, layer):
        self.keras_model.layers[layer].trainable = not self.keras_model.layers[layer].trainable
        self.frozen ^= {2 * layer, 2 * layer + 1}
        self.compiled = None

    @operation(seed=SEEDS, reset=st.booleans())
    def other_weights(self, seed, reset):
        weights = [np.random.default_rng(seed).normal(size=shape).astype("float32") for shape in SHAPES]
        for variable, weight in zip(self.variables, weights):
            variable.assign(weight)
        self.model.weights = [weight.astype("float64") for weight in weights]
        if reset:
            self.reset()

    @operation()
    def reset(self):
        self.lookahead.reset_slow_weights()
        self.model.reset()

    @operation()
    def sync(self):
        self.lookahead.sync()
        self.model.sync()

    @operation(count=st.integers(0, 7), seed=SEEDS, times=st.integers(0, 3))
    def count_assigned(self, count, seed, times):
        self.optimizer.iterations.assign(count)
        self.model.count = count
        self.step(seed, set(), times)

    @operation(index=st.integers(0, 1), period=PERIODS, size=STEP_SIZES, rate=RATES)
    def settings(self, index, period, size, rate):
        wrappers = self.wrappers()
        index %= len(wrappers)
        wrapper, level = wrappers[index], self.model.levels[index]
        wrapper.sync_period, wrapper.slow_step_size, wrapper.learning_rate = period, size, rate
        level |= {"period": period, "size": size} | ({} if period else {"slow": None})
        self.model.rate = rate

    @operation(name=st.sampled_from(["sync_period", "slow_step_size"]), value=st.sampled_from([-1, np.nan, "x", None]))
    def wrong_setting(self, name, value):
        before = self.lookahead.get_config()
        with pytest.raises((TypeError, ValueError), match=f"`{name}` must"):
            setattr(self.lookahead, name, value)
        assert self.lookahead.get_config() == before

    # Evaluation

    @operation(raises=st.booleans(), changes=st.booleans(), nested=st.booleans())
    def block(self, raises, changes, nested):
        before = values([*self.variables, *self.optimizer.variables])
        try:
            with self.lookahead.slow_weights():
                self.check_slow_weights_are_in_the_model()
                if nested:
                    with self.lookahead.slow_weights():
                        self.check_slow_weights_are_in_the_model()
                if changes:
                    self.keras_model.set_weights([weight + 1 for weight in self.keras_model.get_weights()])
                if raises:
                    raise KeyError("of the block")
        except KeyError:
            assert raises
        self.check_fast_weights(before)

    @operation()
    def evaluation_with_the_callback(self):
        before = values([*self.variables, *self.optimizer.variables])
        x = np.ones((2, 3), "float32")
        predicted = self.keras_model.predict(x, callbacks=[SwapSlowWeights()], verbose=0)
        slow = self.model.levels[-1]["slow"] or self.model.weights
        expected = (x @ slow[0] + slow[1]) @ slow[2] + slow[3]
        np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-4)
        self.check_fast_weights(before)

    def check_slow_weights_are_in_the_model(self):
        expected = self.model.levels[-1]["slow"] or self.model.weights
        for one, other in zip(values(self.variables), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

    def check_fast_weights(self, before):
        for one, other in zip(values(self.variables), before):
            assert one.tobytes() == other.tobytes()

    # Saving

    @operation(kind=st.sampled_from(FORMATS))
    def save(self, kind):
        self.files += 1
        path = os.path.join(self.directory, f"{self.files}.{kind}")
        what = {
            "arrays": lambda: (
                (self.keras_model.get_weights(), self.optimizer.get_weights())
                if not self.scaled
                else (self.keras_model.get_weights(), values(self.optimizer.variables))
            ),
            "weights.h5": lambda: self.keras_model.save_weights(path),
            "keras": lambda: self.keras_model.save(path),
            "tree": lambda: self.keras_model.get_state_tree(value_format="numpy_array"),
            "checkpoint": lambda: self.checkpoint(self.keras_model).write(path),
        }[kind]
        if kind == "tree" and not all(one.path.startswith("model/") for one in self.variables):
            # Keras gives a loaded model other paths.
            return
        # On PyTorch Keras gives arrays that share their memory with the variables.
        self.saved.append((kind, path, copy.deepcopy(what()), copy.deepcopy(self.model), self.frozen.copy()))

    def checkpoint(self, model):
        import tensorflow as tf

        return tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    @stateful.precondition(lambda self: self.saved)
    @operation(which=st.integers(0, 7), anew=st.booleans())
    def load(self, which, anew):
        kind, path, what, saved, frozen = self.saved[which % len(self.saved)]
        levels = copy.deepcopy(self.model.levels)
        # A frozen layer's weights come in another order.
        if frozen != self.frozen or any(not level["period"] for level in levels):
            return
        # An optimizer that is loaded is built for the weights that are trainable then.
        is_off = any(not level["period"] for level in saved.levels)
        if (frozen and kind == "keras") or (is_off and kind != "keras"):
            return
        if kind == "tree" and not anew and not all(one.path.startswith("model/") for one in self.variables):
            return
        model = copy.deepcopy(saved)
        self.compiled = None
        if kind == "keras":
            self.keras_model = keras.saving.load_model(path)
        else:
            if anew:
                self.keras_model = self.new_model(levels)
                for index, layer in enumerate(self.keras_model.layers):
                    layer.trainable = 2 * index not in frozen
            if kind in ("weights.h5", "checkpoint"):
                # Files have no settings.
                for level, own in zip(model.levels, levels):
                    level |= {"period": own["period"], "size": own["size"]}
            {
                "arrays": lambda: self.set_arrays(*what),
                "weights.h5": lambda: self.keras_model.load_weights(path),
                "tree": lambda: self.keras_model.set_state_tree(copy.deepcopy(what)),
                "checkpoint": lambda: self.checkpoint(self.keras_model).read(path).assert_consumed(),
            }[kind]()
        self.model = model

    def set_arrays(self, weights, state):
        self.keras_model.set_weights(weights)
        if not self.scaled:
            self.optimizer.set_weights(state)
        else:
            for variable, value in zip(self.optimizer.variables, state, strict=True):
                variable.assign(value)

    @operation(which=st.integers(0, 40))
    def half_loaded_arrays(self, which):
        before = values([*self.variables, *self.optimizer.variables])
        arrays = self.lookahead.get_weights()
        arrays[which % len(arrays)] = np.full(arrays[which % len(arrays)].shape, "x")
        with pytest.raises(ValueError, match="an array of numbers"):
            self.lookahead.set_weights([array if array.dtype.kind == "U" else array + 1 for array in arrays])
        for one, other in zip(values([*self.variables, *self.optimizer.variables]), before, strict=True):
            np.testing.assert_array_equal(one, other)

    @stateful.invariant()
    def check(self):
        if not hasattr(self, "model"):
            return
        for one, other in zip(values(self.variables), self.model.weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert int(self.optimizer.iterations) == self.model.count
        for wrapper, level in zip(self.wrappers(), self.model.levels, strict=True):
            assert wrapper._slow_weights.is_captured() == (level["slow"] is not None)
            assert (wrapper.sync_period, wrapper.slow_step_size) == (level["period"], level["size"])
            for one, other in zip(values(wrapper.slow_variables), level["slow"] or [], strict=False):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            if level["slow"] is not None and level["slow_momentum"]:
                momenta = values([wrapper.get_slot(variable, "slow_momentum") for variable in self.variables])
                for one, other in zip(momenta, level["b"], strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1:UserWarning")
def test_random_operations_give_what_a_float64_model_gives():
    run(Machine, examples={"jax": 10, "torch": 60, "tensorflow": 20}[BACKEND], steps=25)
