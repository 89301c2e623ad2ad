"""Settings that change between steps, also between compiled steps; and their messages."""

import pickle
import warnings

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, SwapSlowWeights
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import BACKEND, Recorder, find_lookahead, mlp, values

# Without the default of `compile`, "auto", which uses XLA only on a GPU. `torch.compile` takes seconds.
MODES = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}
if BACKEND != "tensorflow":
    del MODES["xla" if BACKEND == "torch" else "graph"]
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

RATE = 0.125


def output(y_true, y_pred):
    return keras.ops.mean(y_pred)


def compiled(sync_period, slow_step_size, mode, wrap=lambda optimizer: optimizer, **kwargs):
    """A model with one weight, 0.0, whose gradient of the loss is 1, and its `Lookahead`."""
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", **kwargs)]
    )
    optimizer = Lookahead(keras.optimizers.SGD(RATE), sync_period, slow_step_size)
    model.compile(wrap(optimizer), loss=output, **mode)
    return model, optimizer


def fit(model, steps, callbacks=()):
    ones = np.ones((steps, 1), "float32")
    model.fit(ones, ones, batch_size=1, shuffle=False, verbose=0, callbacks=list(callbacks))


def weight_of(model):
    return float(values(model.weights)[0].item())


class ByHand:
    """The expected weight."""

    def __init__(self, sync_period, slow_step_size):
        self.sync_period, self.slow_step_size = sync_period, slow_step_size
        self.fast, self.slow, self.count = 0.0, None, 0

    def set(self, name, value):
        setattr(self, name, value)
        if not self.sync_period:
            self.slow = None

    def step(self):
        if self.slow is None:
            self.slow = self.fast
        self.fast -= RATE
        self.count += 1
        if self.sync_period and self.count % self.sync_period == 0:
            self.slow = self.fast = self.slow + self.slow_step_size * (self.fast - self.slow)
        if not self.sync_period:
            self.slow = None


CHANGES = {
    "step_size": [("slow_step_size", 0.25)],
    "step_sizes": [("slow_step_size", 0.0), ("slow_step_size", 1.0), ("slow_step_size", 0.5)],
    "shorter": [("sync_period", 2)],
    "longer": [("sync_period", 5), ("slow_step_size", 0.75), ("sync_period", 1)],
    "off_and_on": [("sync_period", 0), ("slow_step_size", 0.25), ("sync_period", 2)],
}


@every_mode
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_change_takes_effect_in_the_next_fit(changes, mode):
    model, optimizer = compiled(3, 0.5, mode)
    expected = ByHand(3, 0.5)
    for name, value in [("slow_step_size", 0.5), *changes]:
        setattr(optimizer, name, value)
        expected.set(name, value)
        assert optimizer.get_config()[name] == getattr(optimizer, name) == value
        fit(model, 7)
        for _ in range(7):
            expected.step()
        assert weight_of(model) == expected.fast
        assert optimizer.get_config()[name] == getattr(optimizer, name) == value
        with optimizer.slow_weights():
            assert weight_of(model) == (expected.fast if expected.slow is None else expected.slow)


@every_mode
def test_a_callback_may_change_them_while_fit_runs(mode):
    class Change(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                self.model.optimizer.sync_period = 2
                self.model.optimizer.slow_step_size = 0.25

    model, optimizer = compiled(3, 0.5, mode)
    recorder, expected, path = Recorder(), ByHand(3, 0.5), []
    fit(model, 9, [Change(), recorder])
    for batch in range(9):
        expected.step()
        path.append(expected.fast)
        if batch == 3:
            expected.set("sync_period", 2)
            expected.set("slow_step_size", 0.25)
    assert np.ravel(recorder.fast).tolist() == path
    assert (optimizer.sync_period, optimizer.slow_step_size) == (2, 0.25)


def test_the_callback_does_not_take_a_new_period_for_a_sync():
    class Change(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # 4 is a multiple of 2, but no sync was due then.
            if batch == 3:
                self.model.optimizer.sync_period = 2

    model, _ = compiled(3, 0.5, list(MODES.values())[-1])
    ones = np.ones((4, 1), "float32")
    callbacks = [Change(), SwapSlowWeights()]
    history = model.fit(ones, ones, batch_size=1, validation_data=(ones, ones), callbacks=callbacks, verbose=0)
    assert history.history["val_loss"] == [-1.5 * RATE]


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles no step")
def test_a_change_compiles_nothing_again():
    traces = []

    class Inner(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            traces.append(variable)
            super().update_step(gradient, variable, learning_rate)

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    optimizer = Lookahead(Inner(0.1), sync_period=3)
    model.compile(optimizer, loss="mse", jit_compile=BACKEND == "jax")
    fit(model, 4)
    before = len(traces)
    optimizer.sync_period, optimizer.slow_step_size = 2, 0.25
    fit(model, 4)
    assert len(traces) == before > 0


def test_they_stay_as_they_were_given_beside_the_variables():
    optimizer = Lookahead("sgd", 5, 0.3)
    optimizer.build([keras.Variable([0.0])])
    assert (optimizer.sync_period, optimizer.slow_step_size) == (5, 0.3)
    optimizer.sync_period, optimizer.slow_step_size = 2**80, 0.1
    assert (optimizer.sync_period, optimizer.slow_step_size) == (2**80, 0.1)


STEP_SIZES = [0.0, 0.3, 0.5, 1.0, 1.5]
# The largest and smallest values of a slow and a fast weight.
ENDS = [0.0, -0.0, 1.5, -2.25, 3e38, -3e38, np.inf, -np.inf, np.nan]


def pairs(dtype, size):
    """Return slow weights and fast weights: all pairs of extreme values, and random numbers."""
    ends = np.array([(slow, fast) for slow in ENDS for fast in ENDS]).T
    if dtype == "float16":
        ends = np.where(np.isinf(ends), ends, np.clip(ends, -6e4, 6e4))
    if size > 1:
        # Compilers may sum -inf and inf in the weighted mean, or round to inf before.
        ends = ends[:, np.all(np.abs(ends) < 1e4, axis=0)]
    return np.concatenate([ends, np.random.default_rng(0).normal(size=(2, 99))], axis=1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("size", STEP_SIZES)
def test_a_variable_gives_the_bits_of_a_number_on_tensorflow(size, jit_compile, dtype):
    import tensorflow as tf

    from lookahead_optim._outer_step_tensorflow import OuterStep, Pair, synchronize

    # Finite weights have a kernel of their own.
    of_both = pairs(dtype, size), np.where(np.isfinite(pairs(dtype, size)), pairs(dtype, size), -0.0) % 1e3
    of_both[1][:, :2] = [[-0.0, -0.0], [1.0, -1.0]]
    setting = tf.Variable(size, dtype="float64" if dtype == "float64" else "float32")
    results = []
    for step_size in (size, setting):
        listed = [Pair(*(tf.Variable(tf.cast(one, dtype)) for one in arrays), None) for arrays in of_both]
        count = tf.Variable(1)

        @tf.function(jit_compile=jit_compile, autograph=False)
        def sync(listed=listed, count=count, step_size=step_size):
            number = step_size if isinstance(step_size, float) else tf.convert_to_tensor(step_size)
            synchronize(count, lambda count: count > 0, lambda: listed, lambda: OuterStep(number))

        sync()
        found = [one.numpy().astype("float64") for pair in listed for one in pair[:2]]
        results.append([np.where(np.isnan(one), 7.0, one) for one in found])
    assert_same_bits(*results)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", STEP_SIZES)
def test_a_variable_gives_the_bits_of_a_number_on_jax(size, dtype):
    import jax
    import jax.numpy as jnp

    from lookahead_optim.keras._outer_step_jax import OuterStep, Values, outer_step

    slow, fast = pairs(dtype, size)
    pair = Values(jnp.asarray(slow, dtype), jnp.asarray(fast, dtype), None)
    by_number = jax.jit(lambda pair: outer_step(pair, OuterStep(size), None))(pair)
    by_array = jax.jit(lambda pair, size: outer_step(pair, OuterStep(size), None))(pair, jnp.float32(size))
    # NaN may have any bits.
    assert_same_bits(*([jnp.where(jnp.isnan(one), 7, one) for one in pair[:2]] for pair in (by_number, by_array)))


def test_they_are_part_of_the_state_as_a_learning_rate_is():
    optimizers = []
    for settings in [(3, 0.3), (5, 0.5)]:
        model, optimizer = compiled(*settings, {})
        fit(model, 4)
        optimizers.append(optimizer)
    first, second = optimizers
    assert first.variables[2:4] == [first._sync_period.variable, first._slow_step_size.variable]
    assert [values([one])[0].item() for one in first.variables[2:4]] == [3, np.float32(0.3)]
    second.set_weights(first.get_weights())
    assert_same_bits(second.get_weights(), first.get_weights())
    assert (second.sync_period, second.slow_step_size) == (3, np.float32(0.3))
    second.sync_period = 4
    assert second.sync_period == 4


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_a_state_with_a_bad_step_size_is_refused_and_nothing_changed(value):
    model, optimizer = compiled(3, 0.5, {})
    fit(model, 4)
    before = optimizer.get_weights()
    arrays = [np.copy(array) for array in before]
    arrays[1] += 1
    arrays[3][...] = value
    with pytest.raises(ValueError, match="`slow_step_size` must be finite and >= 0"):
        optimizer.set_weights(arrays)
    assert_same_bits(optimizer.get_weights(), before)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_files_have_them_in_the_config_alone(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    model, _ = compiled(3, 0.5, {})
    fit(model, 4)
    model.save_weights(tmp_path / "of.weights.h5")
    model.save(tmp_path / "of.keras")
    other, optimizer = compiled(5, 0.25, {})
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "of.weights.h5")
    assert (optimizer.sync_period, optimizer.slow_step_size) == (5, 0.25)
    assert values([optimizer._sync_period.variable])[0] == 5
    assert int(optimizer.iterations) == 4
    loaded = find_lookahead(keras.saving.load_model(tmp_path / "of.keras", custom_objects={"output": output}).optimizer)
    assert (loaded.sync_period, loaded.slow_step_size) == (3, 0.5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the format is TensorFlow's")
def test_a_checkpoint_of_tensorflow_has_none(tmp_path):
    import tensorflow as tf

    model, optimizer = compiled(3, 0.5, {})
    fit(model, 4)
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "c"))
    other, optimizer = compiled(5, 0.25, {})
    fit(other, 1)
    tf.train.Checkpoint(model=other, optimizer=optimizer).read(path).assert_consumed()
    assert (optimizer.sync_period, optimizer.slow_step_size) == (5, 0.25)
    assert values([optimizer._sync_period.variable])[0] == 5


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
def test_a_loop_of_ones_own_on_jax_has_them_in_its_state():
    import jax

    optimizer = Lookahead(keras.optimizers.SGD(RATE), sync_period=3)
    weight = keras.Variable([0.0])
    optimizer.build([weight])
    step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    expected = ByHand(3, 0.5)
    for changes in ([], [("sync_period", 2), ("slow_step_size", 0.25)]):
        for name, value in changes:
            setattr(optimizer, name, value)
            expected.set(name, value)
        weights, state = [weight.value], [variable.value for variable in optimizer.variables]
        for _ in range(5):
            weights, state = step(state, [np.ones(1, "float32")], weights)
            expected.step()
        # The variables' buffers were donated.
        assert (optimizer.sync_period, optimizer.slow_step_size) == (expected.sync_period, expected.slow_step_size)
        assert f"sync_period={expected.sync_period}" in repr(optimizer)
        for variable, value in zip([weight, *optimizer.variables], [*weights, *state]):
            variable.assign(value)
        assert values([weight])[0][0] == expected.fast


@pytest.mark.filterwarnings("ignore:Skipping the state of optimizer:UserWarning")
def test_a_copy_has_them():
    import copy

    optimizer = Lookahead("sgd", 5, 0.3)
    optimizer.build([keras.Variable([0.0])])
    optimizer.sync_period, optimizer.slow_step_size = 4, 0.7
    for one in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (one.sync_period, one.slow_step_size) == (4, 0.7)


# Above 1.


def test_a_step_size_above_1_warns_at_the_line_that_sets_it_and_nowhere_else(tmp_path):
    with pytest.warns(
        UserWarning, match=r"`slow_step_size` above 1 .*below 2 / \(1 - r\).*slow_step_size=1.5"
    ) as warned:
        model, _ = compiled(2, 1.5, {"jit_compile": BACKEND == "jax"})
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}
    optimizer = model.optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, 5)
        optimizer.sync()
        model.save(tmp_path / "model.keras")
        keras.saving.load_model(tmp_path / "model.keras", custom_objects={"output": output})
        Lookahead.from_config(optimizer.get_config())
        optimizer.slow_step_size = 1.0
    with pytest.warns(UserWarning, match=r"`slow_step_size` above 1 .*slow_step_size=3.0") as warned:
        optimizer.slow_step_size = 3
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}


# A sync in the first cycle.


def trained(steps, *settings, **kwargs):
    model, optimizer = compiled(*settings, {"jit_compile": BACKEND == "jax"}, **kwargs)
    if steps:
        fit(model, steps)
    return model, optimizer


def test_a_sync_that_halves_a_short_training_warns():
    model, optimizer = trained(4, 6, 0.5)
    message = r"`sync\(\)` in the first cycle takes back 0.5 of .*Received: sync\(\) after 4 .* with sync_period=6"
    with pytest.warns(UserWarning, match=message) as warned:
        optimizer.sync()
    assert {one.filename for one in warned if one.category is UserWarning} == {__file__}
    assert weight_of(model) == -2 * RATE
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.sync()
        fit(model, 1)
        optimizer.sync()


def test_after_a_reset_a_sync_does_not_warn():
    model, optimizer = trained(2, 6, 0.5)
    optimizer.reset_slow_weights()
    fit(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.sync()
    assert weight_of(model) == -3 * RATE


@pytest.mark.parametrize(
    ("steps", "sync_period", "slow_step_size"),
    [(0, 6, 0.5), (6, 6, 0.5), (7, 6, 0.5), (13, 6, 0.5), (4, 6, 1.0), (4, 0, 0.5), (4, 1, 0.5)],
)
def test_any_other_sync_does_not_warn(steps, sync_period, slow_step_size):
    _, optimizer = trained(steps, sync_period, slow_step_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.sync()


def test_under_a_loss_scaler_steps_that_were_applied_count():
    keras.config.set_dtype_policy("mixed_float16")
    model, optimizer = trained(4, 5, 0.5)
    inf = np.full((2, 1), np.inf, "float32")
    model.fit(inf, inf, batch_size=1, verbose=0)
    with pytest.warns(UserWarning, match=r"Received: sync\(\) after 4 update"):
        optimizer.sync()


# Names of other implementations.


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"k": 5}, "`sync_period` for `k`"),
        ({"alpha": 0.5}, "`slow_step_size` for `alpha`"),
        ({"la_steps": 5, "la_alpha": 0.5}, "`sync_period` for `la_steps` and `slow_step_size` for `la_alpha`"),
        ({"slow_step": 0.5}, "`slow_step_size` for `slow_step`"),
    ],
)
def test_names_of_other_implementations_are_explained(arguments, names):
    received = ", ".join(f"{name}={value}" for name, value in arguments.items())
    with pytest.raises(ValueError, match=rf"^Write {names}: the arguments .*Received: {received}$"):
        Lookahead("sgd", **arguments)


@pytest.mark.parametrize("name", ["base_optimizer", "inner_optimizer", "fast_optimizer", "inner"])
def test_so_are_names_of_the_inner_optimizer(name):
    with pytest.raises(ValueError, match=rf"^Write `optimizer` for `{name}`: .*Received: {name}='sgd'$"):
        Lookahead(**{name: "sgd"})


def test_repr_has_the_settings_and_the_inner_optimizer():
    optimizer = Lookahead(keras.optimizers.Adam(name="mine"), 5, 0.3)
    assert repr(optimizer) == "Lookahead(<Adam 'mine'>, sync_period=5, slow_step_size=0.3)"
    nested = Lookahead(optimizer, 2)
    nested.build(mlp().trainable_variables)
    assert repr(nested) == f"Lookahead({optimizer!r}, sync_period=2, slow_step_size=0.5)"
