"""Helpers for the Keras tests: small models and data, and comparison bit for bit."""

import keras
import numpy as np

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits

BACKEND = keras.config.backend()


def data(rows=96, columns=4, seed=0):
    """Return float32 `x` of shape (rows, columns) and `y` of shape (rows, 1), a noisy linear task."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype("float32")
    y = x @ rng.normal(size=(columns, 1)) + 0.1 * rng.normal(size=(rows, 1))
    return x, y.astype("float32")


def mlp(columns=4, seed=0, **kwargs):
    """Return a built two-layer network with the same weights for the same seed."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((columns,)), keras.layers.Dense(8, activation="tanh", **kwargs), keras.layers.Dense(1, **kwargs)]
    )


def values(variables):
    """Return copies of the variables' values as NumPy arrays."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def differ(actual, expected):
    """Return whether any of two lists of variables or arrays differ."""
    return any(np.any(one != other) for one, other in zip(values(actual), values(expected), strict=True))


class Recorder(keras.callbacks.Callback):
    """Records the fast weights, the slow weights and the step count after every batch of `fit`.

    `resets` maps the number of a batch, from 0, to the weights that the model gets after it was recorded.
    """

    def __init__(self, resets=None):
        super().__init__()
        self.resets = resets or {}
        self.fast, self.slow, self.counts = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        lookahead = find_lookahead(model.optimizer)
        self.fast.append(values(model.trainable_variables))
        for variable, value in zip(model.trainable_variables, self.resets.get(len(self.fast) - 1, [])):
            variable.assign(value)
        self.slow.append(values(lookahead.slow_variables) if lookahead else None)
        self.counts.append(int(model.optimizer.iterations))


def find_lookahead(optimizer):
    """Return the outermost `Lookahead` in an optimizer, or None."""
    while optimizer is not None and not isinstance(optimizer, Lookahead):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def train(
    model, optimizer, x, y, resets=None, callbacks=list, batch_size=8, epochs=1, loss="mse", fit=None, **compile_args
):
    """Compile, fit on batches in their order with the callbacks that `callbacks()` makes, and return the `Recorder`.

    On TensorFlow, XLA compiles only if `compile_args` say so: it takes seconds for each model.
    """
    if BACKEND == "tensorflow":
        compile_args.setdefault("jit_compile", False)
    model.compile(optimizer, loss=loss, **compile_args)
    recorder = Recorder(resets)
    callbacks = [recorder, *callbacks()]
    model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **(fit or {}))
    return recorder


EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def assert_is_slow_step(new, slow, fast, slow_step_size, variables):
    """Check slow + slow_step_size (fast - slow), and the constraint, to the rounding of the variables' dtype."""
    for one, start, end, variable in zip(new, slow, fast, variables):
        start, end = np.asarray(start, "float64"), np.asarray(end, "float64")
        expected = start + slow_step_size * (end - start)
        if variable.constraint is not None:
            expected = keras.ops.convert_to_numpy(variable.constraint(keras.ops.convert_to_tensor(expected, "float32")))
        scale = np.abs(start) + np.abs(end) + np.abs(expected)
        error = np.abs(np.asarray(one, "float64") - expected)
        assert np.all(error <= 2 * EPSILON[keras.backend.standardize_dtype(variable.dtype)] * scale), variable.path


def assert_lookahead(run, make_model, make_optimizer, sync_period=3, slow_step_size=0.5, counts=None):
    """Check every step of a training with `Lookahead` against the bare inner optimizer, bit for bit.

    The bare optimizer is trained on the same batches. After each sync its weights, not its state, are set to the slow
    weights. It must make every step that the inner optimizer made, and end with the same state.
    `run(model, optimizer, resets)` trains and returns a `Recorder`; `counts` are the applied updates expected after
    each step, by default one each. Returns the model trained with `Lookahead` and the records of both runs.
    """
    model, bare_model = make_model(), make_model()
    slow = values(model.trainable_variables)
    wrapped = run(model, Lookahead(make_optimizer(), sync_period, slow_step_size), None)
    steps = range(len(wrapped.counts))
    counts = [step + 1 for step in steps] if counts is None else counts
    assert wrapped.counts == counts
    syncs = [step for step in steps if counts[step] % sync_period == 0 and counts[step] != [0, *counts][step]]
    assert syncs
    bare = run(bare_model, make_optimizer(), {step: wrapped.slow[step] for step in syncs})
    for step, fast, new, bare_fast in zip(steps, wrapped.fast, wrapped.slow, bare.fast, strict=True):
        if step in syncs:
            assert_same_bits(fast, new)
            assert_is_slow_step(new, slow, bare_fast, slow_step_size, model.trainable_variables)
            slow = new
        else:
            assert_same_bits(fast, bare_fast)
            if counts[step]:
                assert_same_bits(new, slow)
    assert_same_bits(model.weights, bare_model.weights)
    lookahead, bare_optimizer = find_lookahead(model.optimizer), bare_model.optimizer
    if isinstance(bare_optimizer, keras.optimizers.LossScaleOptimizer):
        bare_optimizer = bare_optimizer.inner_optimizer
    assert_same_bits(lookahead.inner_optimizer.variables, bare_optimizer.variables)
    return model, wrapped, bare


def assert_lookahead_in_fit(make_model, make_optimizer, x, y, sync_period=3, slow_step_size=0.5, counts=None, **kwargs):
    """Do `assert_lookahead` for `train(model, optimizer, x, y, **kwargs)`."""

    def run(model, optimizer, resets):
        return train(model, optimizer, x, y, resets, **kwargs)

    return assert_lookahead(run, make_model, make_optimizer, sync_period, slow_step_size, counts)
