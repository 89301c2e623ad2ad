"""Slow momentum and wide slow weights in every format, and loading files with momentum without it and the reverse."""

import functools

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.damage import check
from tests.test_keras.helpers import BACKEND, mlp, values
from tests.test_keras.outer import FIT, QUICK, momenta, stepper, tensors

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="the format is TensorFlow's")
SHAPES = [(4, 8), (8,), (8, 1), (1,)]
PERIOD = 3
FORMATS = ["model.keras", "model.weights.h5", "arrays", "tree", *(["checkpoint"] if BACKEND == "tensorflow" else [])]


def lookahead(**outer):
    return Lookahead(keras.optimizers.SGD(0.05, momentum=0.9, name="inner"), PERIOD, 0.7, name="outer", **outer)


def nested():
    inner = lookahead(slow_momentum=0.6, slow_dtype="float32")
    return Lookahead(inner, 4, 0.5, name="outermost", slow_momentum=0.9, slow_nesterov=False)


def multi():
    """A wrapper with momentum for each of two optimizers."""
    biases = Lookahead(keras.optimizers.Adam(0.02), 2, slow_momentum=0.5)
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(with_momentum(), {".*bias": biases}))


with_momentum = functools.partial(lookahead, slow_momentum=0.9)
wide = functools.partial(lookahead, slow_momentum=0.9, slow_dtype="float32")
OPTIMIZERS = {"momentum": with_momentum, "wide": wide, "nested": nested, "plain": lookahead}


class Training:
    """A model, compiled with an optimizer, and steps with gradients of their own. The first layer may be narrow."""

    def __init__(self, make, dtype="float32", seed=0):
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Dense(8, dtype=dtype, name="first"), keras.layers.Dense(1, dtype="float32", name="last")]
        self.of(keras.Sequential([keras.Input((4,)), *layers], name="model"), make())

    def of(self, model, optimizer):
        self.model = model
        if optimizer is not None:
            model.compile(optimizer, loss="mse", **FIT[QUICK])
        self.optimizer = model.optimizer
        self.variables = model.trainable_variables
        self.step = stepper(self.optimizer, self.variables, QUICK)
        return self

    def steps(self, start, stop):
        for count in range(start, stop):
            rng = np.random.default_rng(count)
            self.step(tensors([rng.normal(size=shape) for shape in SHAPES], self.variables))
        return self

    def state(self):
        return values([*self.variables, *self.optimizer.variables])

    def save(self, form, path):
        """Return what `load` takes."""
        if form == "model.keras":
            return self.model.save(path / form)
        if form == "model.weights.h5":
            return self.model.save_weights(path / form)
        if form == "arrays":
            return values(self.variables), [np.copy(one) for one in self.optimizer.get_weights()]
        if form == "tree":
            return keras.tree.map_structure(np.copy, self.model.get_state_tree(value_format="numpy_array"))
        return self._checkpoint().write(str(path / form))

    def load(self, form, path, saved=None):
        if form == "model.keras":
            return self.of(keras.saving.load_model(path / form), None)
        if form == "model.weights.h5":
            self.model.load_weights(path / form)
        elif form == "arrays":
            self.model.set_weights(saved[0])
            self.optimizer.set_weights(saved[1])
        elif form == "tree":
            self.model.set_state_tree(saved)
        else:
            self._checkpoint().read(str(path / form)).assert_consumed()
        return self

    def _checkpoint(self):
        import tensorflow as tf

        return tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("momentum", "float32"), ("wide", "bfloat16"), ("wide", "float16"), ("nested", "bfloat16")]
)
def test_a_run_resumes_bit_for_bit_from_every_format_at_every_position_of_a_cycle(name, dtype, form, tmp_path):
    make, positions = OPTIMIZERS[name], range(2 * PERIOD)
    straight, saved = Training(make, dtype), []
    for position in positions:
        (tmp_path / str(position)).mkdir()
        saved.append((straight.save(form, tmp_path / str(position)), straight.state()))
        straight.steps(position, position + 1)
    end = straight.steps(len(positions), 9).state()
    resumed = Training(make, dtype, seed=1)
    for position in positions:
        # Into an optimizer that has trained and has another momentum.
        resumed.steps(0, 4)
        resumed.load(form, tmp_path / str(position), saved[position][0])
        assert_same_bits(resumed.state(), saved[position][1])
        assert_same_bits(resumed.steps(position, 9).state(), end)
    dtypes = [keras.backend.standardize_dtype(one.dtype) for one in resumed.optimizer.slow_variables]
    assert dtypes == ([dtype, dtype] if name == "nested" else ["float32"] * 2) + ["float32"] * 2


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
@pytest.mark.parametrize("make", [multi, lambda: Lookahead(multi(), 4, slow_momentum=0.9)], ids=["around", "inside"])
@pytest.mark.parametrize("form", ["model.keras", "model.weights.h5"])
def test_wrappers_in_a_multi_optimizer_keep_their_momentum_apart(form, make, tmp_path):
    straight = Training(make).steps(0, 5)
    straight.save(form, tmp_path)
    resumed = Training(make, seed=1).steps(0, 2).load(form, tmp_path)
    assert_same_bits(resumed.state(), straight.state())
    assert_same_bits(resumed.steps(5, 10).state(), straight.steps(5, 10).state())


@pytest.mark.parametrize("stop", [0, 4, 6])
def test_after_a_resume_a_sync_does_what_it_would_have_done(stop, tmp_path):
    straight = Training(wide, "bfloat16").steps(0, stop)
    straight.save("model.weights.h5", tmp_path)
    resumed = Training(wide, "bfloat16", seed=1).load("model.weights.h5", tmp_path)
    before = straight.state()
    for one in (straight, resumed):
        one.optimizer.sync()
    # After a sync it does nothing. It would coast otherwise.
    assert (values(straight.variables)[0].tobytes() == before[0].tobytes()) == (stop % PERIOD == 0)
    if stop:
        assert_same_bits(resumed.state(), straight.state())


def test_weights_that_were_loaded_between_build_and_the_first_update_are_captured(tmp_path):
    Training(lookahead, seed=1).model.save_weights(tmp_path / "pretrained.weights.h5")
    other = Training(wide)
    other.model.set_weights(mlp(seed=3).get_weights())
    start = values(other.variables)
    other.steps(0, 1)
    assert_same_bits(values(other.optimizer.slow_variables), start)
    assert not any(one.any() for one in momenta(other.optimizer, other.variables))


# Files from before slow momentum existed, and files with momentum into optimizers without.

STORED = ["model.weights.h5", *(["checkpoint"] if BACKEND == "tensorflow" else [])]


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("stop", [0, 4, 6])
@pytest.mark.parametrize("trained", [0, 4])
def test_a_file_without_momentum_begins_with_a_momentum_of_0(trained, stop, form, tmp_path):
    plain = Training(lookahead).steps(0, stop)
    plain.save(form, tmp_path)
    resumed = Training(with_momentum, seed=1).steps(0, trained)
    if form == "checkpoint":
        resumed._checkpoint().read(str(tmp_path / form)).expect_partial()
    else:
        resumed.load(form, tmp_path)
    assert_same_bits(values(resumed.variables), values(plain.variables))
    if stop:
        assert_same_bits(values(resumed.optimizer.slow_variables), values(plain.optimizer.slow_variables))
    inner, plain_inner = (one.optimizer.inner_optimizer.variables for one in (resumed, plain))
    assert_same_bits(values(inner), values(plain_inner))
    assert not any(one.any() for one in momenta(resumed.optimizer, resumed.variables))
    # The first outer step is Nesterov's first step, with the pseudo-gradient of the cycle in which the file was made.
    start = values(plain.optimizer.slow_variables) if stop else values(plain.variables)
    next_sync = PERIOD * (stop // PERIOD + 1)
    plain.optimizer.slow_step_size = 1.0
    fast = values(plain.steps(stop, next_sync).variables)
    resumed.steps(stop, next_sync)
    for one, slow, end in zip(values(resumed.variables), start, fast):
        np.testing.assert_allclose(one, slow - 0.7 * 1.9 * (slow - end), rtol=1e-5, atol=1e-6)


def test_a_keras_file_of_before_there_was_momentum_is_a_plain_optimizer():
    config = Lookahead("sgd", 4, 0.25).get_config()
    for name in ("slow_momentum", "slow_nesterov", "slow_dtype"):
        del config[name]
    old = Lookahead.from_config(config)
    assert (old.slow_momentum, old.slow_nesterov, old.slow_dtype) == (0.0, True, None)


@pytest.mark.parametrize("trained", [0, 4])
def test_momentum_that_an_optimizer_has_no_use_for_is_left_out_with_a_warning_and_all_else_is_loaded(trained, tmp_path):
    saved = Training(with_momentum).steps(0, 5)
    saved.save("model.weights.h5", tmp_path)
    plain = Training(lookahead, seed=1).steps(0, trained)
    with pytest.warns(UserWarning, match="Leaving out the slow momentum that was saved, as the optimizer 'outer' has"):
        plain.load("model.weights.h5", tmp_path)
    expected = saved.state()
    del expected[4 + 1 + 4 : 4 + 1 + 8]
    assert_same_bits(plain.state(), expected)
    # It is a plain optimizer from there on.
    slow = values(plain.optimizer.slow_variables)
    plain.optimizer.sync()
    for one, start, end in zip(values(plain.variables), slow, values(saved.variables)):
        np.testing.assert_allclose(one, start + 0.7 * (end - start), rtol=1e-6, atol=1e-7)


@on_tensorflow
def test_tensorflow_leaves_momentum_out_of_an_optimizer_without(tmp_path):
    saved = Training(with_momentum).steps(0, 5)
    saved.save("checkpoint", tmp_path)
    plain = Training(lookahead, seed=1)
    plain._checkpoint().read(str(tmp_path / "checkpoint")).assert_existing_objects_matched()
    assert_same_bits(values(plain.optimizer.slow_variables), values(saved.optimizer.slow_variables))
    assert_same_bits(values(plain.variables), values(saved.variables))


@pytest.mark.parametrize("outer", [{}, {"slow_momentum": 0.9}], ids=["plain", "momentum"])
@pytest.mark.parametrize("stored", ["slow_momentum_1", "slow_2", "captured"])
def test_a_store_that_lacks_one_array_is_another_optimizers_and_the_slow_weights_start_anew(stored, outer):
    saved = Training(with_momentum).steps(0, 5)
    model = Training(functools.partial(lookahead, **outer), seed=1).steps(0, 4)
    store = {}
    saved.optimizer.save_own_variables(store)
    del store[stored]
    before = model.state()
    with pytest.warns(UserWarning, match="as what was saved is another optimizer's state"):
        model.optimizer.load_own_variables(store)
    after = model.state()
    assert after.pop(4) == 0
    del before[4]
    assert_same_bits(after, before)
    start = values(model.variables)
    model.steps(4, 5)
    assert_same_bits(values(model.optimizer.slow_variables), start)
    if outer:
        assert not any(one.any() for one in momenta(model.optimizer, model.variables))


@pytest.mark.parametrize("name", ["slow_momentum_3", "slow_momentum_0", "slow_1"])
@pytest.mark.parametrize("wrong", [np.ones(3), np.full((1,), "x"), np.ones((9, 9))], ids=["shape", "dtype", "large"])
def test_a_store_with_a_wrong_array_is_refused_and_nothing_changed(wrong, name):
    model = Training(wide, "bfloat16").steps(0, 4)
    store = {}
    model.optimizer.save_own_variables(store)
    before = model.state()
    damaged = {key: value + 1 for key, value in store.items()} | {name: wrong}
    with pytest.raises(ValueError, match=r"`load_own_variables\(store\)` needs an array"):
        model.optimizer.load_own_variables(damaged)
    assert_same_bits(model.state(), before)


def test_weights_of_an_optimizer_with_momentum_do_not_fit_one_without_and_nothing_is_changed():
    saved, plain = Training(with_momentum).steps(0, 5), Training(lookahead).steps(0, 2)
    for one, other in ((saved, plain), (plain, saved)):
        before = one.state()
        with pytest.raises(ValueError, match=r"`set_weights\(weights\)` needs \d+ arrays, one per optimizer variable"):
            one.optimizer.set_weights(other.optimizer.get_weights())
        assert_same_bits(one.state(), before)


def test_weights_are_in_the_documented_order():
    model = Training(wide, "bfloat16").steps(0, 4)
    optimizer = model.optimizer
    arrays = optimizer.get_weights()
    assert arrays[0] == 1
    assert_same_bits(arrays[1:5], values(optimizer.slow_variables))
    assert_same_bits(arrays[5:9], momenta(optimizer, model.variables))
    assert (arrays[9], arrays[10]) == (PERIOD, np.float32(0.7))
    assert_same_bits(arrays[11:], values(optimizer.inner_optimizer.variables))


def test_a_damaged_file_with_momentum_is_an_error_or_unharmed(tmp_path):
    saved = Training(wide, "bfloat16").steps(0, 5)
    saved.save("model.keras", tmp_path)
    expected, loaded = [one.tobytes() for one in saved.state()], {}

    def load(data):
        (tmp_path / "damaged.keras").write_bytes(data)
        model = keras.saving.load_model(tmp_path / "damaged.keras")
        loaded["state"] = values([*model.trainable_variables, *model.optimizer.variables])

    def is_as_saved():
        return [one.tobytes() for one in loaded["state"]] == expected

    count = 24
    found = check((tmp_path / "model.keras").read_bytes(), count, load, lambda: True, is_as_saved)
    assert found["cut", "error"] == count // 4
    assert found["flip", "changed"] == 0
