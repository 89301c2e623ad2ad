"""Helpers for the tests of the outer step: training beside the oracle in `fit`, and steps on variables of any dtype."""

import keras
import numpy as np

from lookahead_optim.keras import Lookahead
from tests import reference
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, find_lookahead, values

# How a step runs. On PyTorch no step is compiled.
STEPS = {"jax": ["eager", "jit"], "tensorflow": ["eager", "graph", "xla"], "torch": ["eager"]}[BACKEND]
# The same for `fit`. XLA on TensorFlow takes seconds for each model.
FIT = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "jit": {"jit_compile": True},
}
QUICK = {"jax": "jit", "tensorflow": "graph", "torch": "eager"}[BACKEND]

OUTER = {
    "nesterov": {"slow_momentum": 0.9},
    "heavy ball": {"slow_momentum": 0.5, "slow_nesterov": False},
}


def momenta(optimizer, variables):
    """Return the slow momentum of each variable."""
    return values([optimizer.get_slot(variable, "slow_momentum") for variable in variables])


def stepper(optimizer, variables, mode):
    """Return a function that applies gradients, eagerly or compiled. A frozen weight has the gradient `None`."""
    optimizer.build(variables)
    if mode == "jit":
        import jax

        compiled = jax.jit(optimizer.stateless_apply)

        def step(gradients):
            state = [one.value for one in optimizer.variables]
            weights, state = compiled(state, gradients, [one.value for one in variables])
            for variable, value in zip([*variables, *optimizer.variables], [*weights, *state], strict=True):
                variable.assign(value)

        return step
    if mode == "eager":
        return lambda gradients: optimizer.apply(gradients, variables)
    import tensorflow as tf

    return tf.function(lambda gradients: optimizer.apply(gradients, variables), jit_compile=mode == "xla")


def tensors(arrays, variables):
    """Return arrays as tensors of the dtypes of the variables."""
    return [keras.ops.convert_to_tensor(array, variable.dtype) for array, variable in zip(arrays, variables)]


class Oracle(reference.Lookahead):
    """The oracle with frozen weights. A sync does not move them, and their slow weights and momentum start again."""

    frozen = frozenset()

    def outer_step(self):
        fast = self.weights
        super().outer_step()
        self.restart([fast[i] if i in self.frozen else weight for i, weight in enumerate(self.weights)])
        for index in self.frozen:
            self.b[index] = np.zeros_like(self.b[index])


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


class Beside:
    """A linear network of two layers, trained in `fit` and by the oracle, and compared after every batch.

    Args:
        mode: String, how `fit` runs.
        levels: List of tuples, the arguments of each wrapper: period, step size and a dictionary of outer settings. The
            innermost wrapper comes first.
        micro_steps: Integer, the inner optimizer's `gradient_accumulation_steps`.
        is_scaled: Boolean, whether there is a `LossScaleOptimizer` around.
    """

    def __init__(self, mode, levels, micro_steps=1, is_scaled=False):
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        # Frozen weights too, which a model does not call trainable.
        self.variables = list(self.model.trainable_variables)
        optimizer = keras.optimizers.SGD(
            0.05, momentum=0.5, gradient_accumulation_steps=micro_steps if micro_steps > 1 else None
        )
        self.oracle = reference.SGD(0.05, momentum=0.5)
        for period, step_size, outer in levels:
            optimizer = Lookahead(optimizer, period, step_size, **outer)
            self.oracle = Oracle(self.oracle, period, step_size, **outer)
        if is_scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0, dynamic_growth_steps=3)
        self.settings, self.micro_steps = {"loss": "mse", **FIT[mode]}, micro_steps
        self.model.compile(optimizer, **self.settings)
        self.oracle.start(values(self.variables))
        self.gradients, self.rng = [], np.random.default_rng(0)

    @property
    def lookahead(self):
        return find_lookahead(self.model.optimizer)

    def fit(self, batches, not_finite=()):
        x = self.rng.normal(size=(4 * batches, 3)).astype("float32")
        y = self.rng.normal(size=(4 * batches, 1)).astype("float32")
        for batch in not_finite:
            y[4 * batch] = np.inf
        state, seen = [], []

        def compare(batch, logs):
            rows = slice(4 * batch, 4 * batch + 4)
            # On JAX only this gives the variables their values in mid-epoch.
            assert callback.model is self.model
            if np.all(np.isfinite(y[rows])):
                self._advance(x[rows], y[rows])
            elif state:
                assert_same_bits(values(self._of_wrappers()), state)
            self.check()
            state[:] = values(self._of_wrappers())
            seen.append(batch)

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=compare)
        self.model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[callback])
        assert len(seen) == batches

    def _of_wrappers(self):
        lookahead = self.lookahead
        return lookahead.variables[: len(lookahead.variables) - len(lookahead.inner_optimizer.variables)]

    def _advance(self, x, y):
        kernel_1, bias_1, kernel_2, bias_2 = self.oracle.weights
        hidden = x @ kernel_1 + bias_1
        error = 2 * (hidden @ kernel_2 + bias_2 - y) / len(y)
        back = error @ kernel_2.T
        self.gradients.append([x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)])
        if len(self.gradients) == self.micro_steps:
            means = [np.mean(one, axis=0) for one in zip(*self.gradients)]
            self.oracle.apply([None if i in self.oracle.frozen else one for i, one in enumerate(means)])
            self.gradients = []

    def check(self):
        """Compare weights, slow weights and momentum of all levels."""
        assert_close(values(self.variables), self.oracle.weights)
        optimizer, oracle = self.lookahead, self.oracle
        while isinstance(optimizer, Lookahead):
            if optimizer.sync_period and oracle.t:
                assert_close(values(optimizer.slow_variables), oracle.slow)
                if optimizer.slow_momentum:
                    assert_close(momenta(optimizer, self.variables), oracle.b)
            optimizer, oracle = optimizer.inner_optimizer, oracle.inner

    def sync(self):
        self.lookahead.sync()
        if self.oracle.sync_period:
            self.oracle.sync()

    def sync_inner(self):
        self.lookahead.inner_optimizer.sync()
        self.oracle.inner.sync()

    def reset(self):
        self.lookahead.reset_slow_weights()
        oracle = self.oracle
        while isinstance(oracle, reference.Lookahead):
            oracle.reset()
            oracle = oracle.inner

    def set(self, **settings):
        for name, value in settings.items():
            was_off = not self.oracle.sync_period
            setattr(self.lookahead, name, value)
            setattr(self.oracle, name, value)
            if was_off and self.oracle.sync_period:
                # The next update captures.
                self.oracle.reset()

    def freeze(self, *layers):
        """Freeze these layers, and no others."""
        for index, layer in enumerate(self.model.layers):
            layer.trainable = index not in layers
        self.oracle.frozen = frozenset(i for layer in layers for i in (2 * layer, 2 * layer + 1))
        self.model.compile(self.model.optimizer, **self.settings)

    def run(self, *operations):
        """Run operations in turn: a number of batches, a name of a method, or a tuple of a name and arguments.

        After every operation the run and the oracle are compared.
        """
        for operation in operations:
            if isinstance(operation, int):
                self.fit(operation)
            elif isinstance(operation, dict):
                self.set(**operation)
            elif isinstance(operation, str):
                getattr(self, operation)()
            else:
                getattr(self, operation[0])(*operation[1:])
            self.check()
