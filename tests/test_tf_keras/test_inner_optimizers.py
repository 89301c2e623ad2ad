"""The inner optimizer keeps its methods, its settings and its count; and averaging goes around both."""

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import Lookahead
from lookahead_optim.tf_keras._keras import keras
from tests.comparison import assert_same_bits
from tests.test_tf_keras import resuming
from tests.test_tf_keras.resuming import compiled, fit, state, values

legacy = keras.optimizers.legacy
ExponentialDecay = keras.optimizers.schedules.ExponentialDecay


def ones(variables):
    return [(tf.ones_like(variable), variable) for variable in variables]


def step(optimizer, variables, times=1):
    for _ in range(times):
        optimizer.apply_gradients(ones(variables))


class ClipsInApplyGradients(legacy.SGD):
    """Clips as `AdamWeightDecay` of TensorFlow's model garden does."""

    def apply_gradients(self, grads_and_vars, name=None, **kwargs):
        gradients, variables = zip(*grads_and_vars)
        gradients, _ = tf.clip_by_global_norm(gradients, 0.01)
        return super().apply_gradients(zip(gradients, variables), name=name, **kwargs)


class ProjectsAfterApplyGradients(legacy.SGD):
    """Lacks the argument for aggregation, as older optimizers do."""

    def apply_gradients(self, grads_and_vars, name=None):
        pairs = list(grads_and_vars)
        done = super().apply_gradients(pairs, name)
        for _, variable in pairs:
            variable.assign(tf.clip_by_value(variable, -0.6, 0.6))
        return done


class DecaysSome(legacy.SGD):
    """Takes one more argument, also in `minimize`, as `DecoupledWeightDecayExtension` of TensorFlow Addons does."""

    decayed: tuple = ()

    def minimize(self, loss, var_list, grad_loss=None, name=None, decay_var_list=None, tape=None):
        self.decayed = tuple(map(id, decay_var_list or var_list))
        return super().minimize(loss, var_list, grad_loss=grad_loss, name=name, tape=tape)

    def apply_gradients(self, grads_and_vars, name=None, decay_var_list=None, **kwargs):
        if decay_var_list is not None:
            self.decayed = tuple(map(id, decay_var_list))
        return super().apply_gradients(grads_and_vars, name=name, **kwargs)

    def _resource_apply_dense(self, grad, var, apply_state=None):
        if id(var) in self.decayed:
            var.assign(0.9 * var)
        return super()._resource_apply_dense(grad, var, apply_state=apply_state)


class SharpnessAware(legacy.SGD):
    """Takes the gradients a step away from the weights."""

    def minimize(self, loss, var_list, grad_loss=None, name=None, tape=None):
        pairs = self._compute_gradients(loss, var_list, grad_loss)
        for gradient, variable in pairs:
            variable.assign_add(0.1 * gradient)
        moved = self._compute_gradients(loss, var_list, grad_loss)
        for gradient, variable in pairs:
            variable.assign_sub(0.1 * gradient)
        return self.apply_gradients(moved, name=name)


class ScalesTheLoss(legacy.SGD):
    def _transform_loss(self, loss):
        return 3.0 * loss


class NoisyGradients(legacy.SGD):
    def _get_gradients(self, tape, loss, var_list, grad_loss=None):
        return [(2.0 * one, variable) for one, variable in super()._get_gradients(tape, loss, var_list, grad_loss)]


class AggregatesItself(legacy.SGD):
    def _aggregate_gradients(self, grads_and_vars):
        return [(5.0 * gradient, variable) for gradient, variable in grads_and_vars]


class Accumulates(legacy.SGD):
    """Makes an update of the sum of every third call. The calls between do not count."""

    def apply_gradients(self, grads_and_vars, name=None, **kwargs):
        pairs = list(grads_and_vars)
        self.sums = [gradient + former for (gradient, _), former in zip(pairs, getattr(self, "sums", [0.0] * 9))]
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls % 3 == 0:
            sums, self.sums = self.sums, [0.0] * 9
            return super().apply_gradients([(one, variable) for one, (_, variable) in zip(sums, pairs)], name, **kwargs)
        return None


OVERRIDES = [
    ClipsInApplyGradients,
    ProjectsAfterApplyGradients,
    DecaysSome,
    SharpnessAware,
    ScalesTheLoss,
    NoisyGradients,
    AggregatesItself,
]


def minimized(optimizer, mode, steps=5, **kwargs):
    """Return the path of two variables."""
    variables = [tf.Variable([1.0, -2.0]), tf.Variable(0.5)]

    def loss():
        return tf.reduce_sum(variables[0] ** 4) / 4 + variables[1] ** 2

    def one():
        optimizer.minimize(loss, variables, **{name: get(variables) for name, get in kwargs.items()})

    traced = one if mode == "eager" else tf.function(one, jit_compile=mode == "xla")
    path = []
    for _ in range(steps):
        traced()
        path += values(variables)
    return path


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", OVERRIDES)
def test_minimize_is_the_inner_optimizers_between_syncs(kind, depth, mode):
    optimizer = kind(0.05)
    for _ in range(depth):
        optimizer = Lookahead(optimizer, 100)
    expected = minimized(kind(0.05), mode)
    assert_same_bits(minimized(optimizer, mode), expected)
    assert any(np.any(one != other) for one, other in zip(expected, minimized(legacy.SGD(0.05), mode)))


@pytest.mark.parametrize("kind", OVERRIDES)
def test_at_a_sync_the_slow_step_follows_the_whole_step_of_the_inner_optimizer(kind):
    bare = minimized(kind(0.05), "eager", 3)
    start = [np.array([1.0, -2.0], "float32"), np.array(0.5, "float32")]
    expected = [one + 0.25 * (other - one) for one, other in zip(start, bare[-2:])]
    assert_same_bits(minimized(Lookahead(kind(0.05), 3, 0.25), "eager", 3)[-2:], [np.float32(one) for one in expected])


@pytest.mark.parametrize("kind", [kind for kind in OVERRIDES if kind is not SharpnessAware])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_fit_is_the_inner_optimizers_between_syncs(kind, run_eagerly):
    expected = fit(compiled(kind(0.05), run_eagerly=run_eagerly)).get_weights()
    wrapped = fit(compiled(Lookahead(kind(0.05), 100), run_eagerly=run_eagerly))
    assert_same_bits(wrapped.get_weights(), expected)


def test_arguments_that_the_inner_optimizer_takes_more_are_passed_on():
    def some(variables):
        return variables[:1]

    for call in ("minimize", "apply_gradients"):
        paths = []
        for optimizer in (DecaysSome(0.05), Lookahead(DecaysSome(0.05), 100)):
            if call == "minimize":
                paths.append(minimized(optimizer, "eager", decay_var_list=some))
            else:
                variables = [tf.Variable(1.0), tf.Variable(2.0)]
                optimizer.apply_gradients(ones(variables), decay_var_list=some(variables))
                paths.append(values(variables))
        assert_same_bits(*paths)
    with pytest.raises(TypeError, match="decay_var_list"):
        Lookahead("sgd").apply_gradients(ones([tf.Variable(1.0)]), decay_var_list=[])


def test_calls_that_the_inner_optimizer_does_not_count_are_no_steps():
    variable = tf.Variable(1.0)
    optimizer = Lookahead(Accumulates(0.1), 2, 0.5)
    path = []
    for _ in range(9):
        step(optimizer, [variable])
        path.append(round(float(variable), 5))
    # Updates of 0.3 after three, six and nine calls, and a sync at the second update.
    assert path == [1, 1, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.4]
    assert int(optimizer.iterations) == 3


def test_weights_loaded_after_calls_that_made_no_step_are_captured():
    variable = tf.Variable(1.0)
    optimizer = Lookahead(Accumulates(0.1), 2, 0.5)
    step(optimizer, [variable])
    variable.assign(5.0)
    step(optimizer, [variable], 2)
    assert float(optimizer.get_slot(variable, "slow")) == 5.0


def test_the_wrappers_clipping_comes_before_what_the_inner_optimizers_step_does():
    variables = [tf.Variable([1.0, 1.0]), tf.Variable(2.0)]
    optimizer = Lookahead(ClipsInApplyGradients(1.0), 100, clipvalue=1.0)
    optimizer.apply_gradients([(tf.constant([30.0, 40.0]), variables[0]), (None, variables[1])])
    np.testing.assert_allclose(variables[0], 1 - 0.01 / 2**0.5, rtol=1e-6)


class StepsAlone(legacy.SGD):
    def minimize(self, loss, var_list, grad_loss=None, name=None, tape=None):
        return super().apply_gradients(self._compute_gradients(loss, var_list, grad_loss, tape), name=name)


def test_a_minimize_that_goes_past_lookahead_is_an_error_that_names_it():
    variable = tf.Variable(1.0)
    optimizer = Lookahead(StepsAlone(0.1))
    with pytest.raises(RuntimeError, match=r"`minimize` of the inner optimizer must make its step by `self\.apply_"):
        optimizer.minimize(lambda: variable**2, [variable])
    step(optimizer, [variable])


def test_updates_in_a_graph_are_the_inner_optimizers():
    class DoublesInGetUpdates(legacy.SGD):
        def get_gradients(self, loss, params):
            return [2.0 * gradient for gradient in super().get_gradients(loss, params)]

        def get_updates(self, loss, params):
            return [*super().get_updates(3.0 * loss, params), tf.no_op()]

    for optimizer in (DoublesInGetUpdates(0.1), Lookahead(DoublesInGetUpdates(0.1), 100)):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            variable = tf.Variable(1.0)
            updates = optimizer.get_updates(variable * variable / 2, [variable])
            session.run(tf.compat.v1.global_variables_initializer())
            session.run(updates)
            assert len(updates) == 2
            np.testing.assert_allclose(session.run(variable), 1 - 0.1 * 6, rtol=1e-6)


# Settings.


INNERS = {
    "momentum": lambda: legacy.SGD(0.1, momentum=0.9),
    "beta_1": lambda: legacy.Adam(0.1),
    "beta_2": lambda: legacy.Adam(0.1),
    "rho": lambda: legacy.RMSprop(0.1),
    "epsilon": lambda: legacy.Adam(0.1),
    "nesterov": lambda: legacy.SGD(0.1, momentum=0.9),
    "clipnorm": lambda: legacy.SGD(0.1),
    "clipvalue": lambda: legacy.SGD(0.1),
    "global_clipnorm": lambda: legacy.SGD(0.1),
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", INNERS)
def test_a_setting_of_the_inner_optimizer_is_read_and_set_through_the_wrapper(name, depth, steps_before):
    bare, inner = INNERS[name](), INNERS[name]()
    optimizer = inner
    for _ in range(depth):
        optimizer = Lookahead(optimizer, 100)
    paths = []

    def grow(one, variable, begin, end):
        for t in range(begin, end):
            one.apply_gradients([(tf.constant([1.0, 2.0]) * t, variable)])

    for one in (bare, optimizer):
        variable = tf.Variable([1.0, 2.0])
        grow(one, variable, 1, steps_before + 1)
        before, expected = getattr(one, name), getattr(INNERS[name](), name)
        assert before is None if "clip" in name else float(before) == pytest.approx(float(expected))
        setattr(one, name, name == "nesterov" or 0.125)
        assert float(getattr(one, name)) == float(getattr(inner if one is optimizer else bare, name))
        grow(one, variable, steps_before + 1, steps_before + 4)
        paths.append(values([variable]))
    assert_same_bits(*paths)
    untouched = tf.Variable([1.0, 2.0])
    grow(INNERS[name](), untouched, 1, steps_before + 4)
    assert np.any(untouched.numpy() != paths[0][0])


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_is_read_from_where_it_is_and_switched_off_everywhere(name):
    optimizer = Lookahead(legacy.SGD(0.1, **{name: 0.5}))
    assert getattr(optimizer, name) == 0.5
    assert name not in optimizer.get_config()
    setattr(optimizer, name, None)
    assert getattr(optimizer, name) is getattr(optimizer.inner_optimizer, name) is None
    both = Lookahead(legacy.SGD(0.1, **{name: 0.5}), **{name: 0.25})
    assert (getattr(both, name), both.get_config()[name]) == (0.25, 0.25)
    setattr(both, name, 0.125)
    assert (getattr(both, name), getattr(both.inner_optimizer, name)) == (0.125, 0.5)
    setattr(both, name, None)
    assert getattr(both, name) is getattr(both.inner_optimizer, name) is None


def test_what_neither_has_is_an_attribute_error_that_names_it():
    optimizer = Lookahead("sgd")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = optimizer.nonsense
    optimizer.note = "mine"
    assert (optimizer.note, hasattr(optimizer.inner_optimizer, "note")) == ("mine", False)
    assert DecaysSome(0.1).decayed == Lookahead(DecaysSome(0.1)).decayed


# The count.


def schedule():
    return legacy.SGD(ExponentialDecay(0.1, 10, 0.5), momentum=0.5)


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: Lookahead(one, 7)], ids=["alone", "in another wrapper"])
def test_an_optimizer_that_has_made_steps_keeps_its_count_and_its_schedule(wrap):
    inner, bare = schedule(), schedule()
    variable, other = tf.Variable(1.0), tf.Variable(1.0)
    first = wrap(inner)
    for one, weight in (first, variable), (wrap(bare), other):
        step(one, [weight], 20)
    optimizer = Lookahead(inner, 100)
    assert int(optimizer.iterations) == 20
    step(optimizer, [variable], 3)
    step(bare, [other], 3)
    assert_same_bits([variable], [other])
    assert int(optimizer.iterations) == int(inner.iterations) == int(first.iterations) == 23


def test_the_slow_weights_of_a_trained_optimizer_start_when_it_is_wrapped():
    inner, variable = legacy.SGD(0.125), tf.Variable(1.0)
    step(inner, [variable], 4)
    optimizer = Lookahead(inner, 3, 0.5)
    step(optimizer, [variable], 2)
    # From 0.5 two steps to 0.25. The sixth update is followed by a sync.
    assert float(variable) == 0.375


TOUCHES = {
    "nothing": lambda one: None,
    "the inner count": lambda one: one.inner_optimizer.iterations,
    "the innermost count": lambda one: one.inner_optimizer.inner_optimizer.iterations,
    "the count": lambda one: one.iterations,
    "a reset": lambda one: one.inner_optimizer.reset_slow_weights(),
    "a sync": lambda one: one.inner_optimizer.sync(),
    "the weights": lambda one: one.inner_optimizer.get_weights(),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_is_read_first_leaves_one_count_first_in_the_weights_and_files_resume(touch, tmp_path):
    def made():
        return compiled(Lookahead(Lookahead(legacy.SGD(0.1, momentum=0.9), 3), 4))

    model, untouched = made(), made()
    TOUCHES[touch](model.optimizer)
    for one in (model, untouched):
        fit(one, end=5)
    assert_same_bits(model.optimizer.get_weights(), untouched.optimizer.get_weights())
    assert [int(weight) for weight in model.optimizer.get_weights() if weight.dtype == "int64"] == [5]
    for form in ("h5", "checkpoint_unbuilt"):
        resuming.save(model, tmp_path / "model", form)
    loaded, restored = keras.models.load_model(tmp_path / "model.h5"), made()
    TOUCHES[touch](restored.optimizer)
    status = resuming.checkpoint_of(restored).read(f"{tmp_path}/model.checkpoint_unbuilt")
    for one in (loaded, restored, model):
        fit(one, begin=5)
    status.assert_consumed()
    assert_same_bits(state(loaded), state(model))
    assert_same_bits(state(restored), state(model))


def test_a_count_that_is_set_is_the_inner_optimizers_too():
    for touched in (False, True):
        inner = schedule()
        if touched:
            _ = inner.iterations
        optimizer, count, variable = Lookahead(inner, 100), tf.Variable(20, dtype=tf.int64), tf.Variable(1.0)
        optimizer.iterations = count
        step(optimizer, [variable])
        assert float(variable) == pytest.approx(1 - 0.025, abs=1e-6)
        assert [one.dtype for one in optimizer.weights].count(tf.int64) == 1
        assert int(count) == int(inner.iterations) == 21


def assert_resumes_bit_for_bit(never_stopped, make, stops, folder):
    """Save and restore a model that made four steps, `stops` more times before a step, and let both models train on."""
    model = never_stopped
    for number in range(stops + 1):
        resuming.checkpoint_of(model).write(f"{folder}/{number}")
        model = compiled(make(), seed=3)
        resuming.checkpoint_of(model).read(f"{folder}/{number}")
    for one in (never_stopped, model):
        fit(one, begin=4)
    assert_same_bits(state(model), state(never_stopped))


@pytest.mark.parametrize("stops", [1, 3])
@pytest.mark.parametrize("name", resuming.OPTIMIZERS)
def test_what_is_restored_and_saved_again_before_a_step_is_the_same_checkpoint(name, stops, tmp_path):
    make = resuming.OPTIMIZERS[name]
    model = never_stopped = fit(compiled(make()), end=4)
    # Settings are variables too.
    inner = model.optimizer
    while isinstance(inner, Lookahead):
        inner = inner.inner_optimizer
    if name != "nested":
        inner.learning_rate = 0.03
    assert_resumes_bit_for_bit(never_stopped, make, stops, tmp_path)


@pytest.mark.parametrize("stops", [1, 2])
def test_the_count_of_applied_steps_is_saved_again_before_a_step(stops, tmp_path):
    def make():
        return keras.mixed_precision.LossScaleOptimizer(resuming.momentum(), initial_scale=64.0)

    model = never_stopped = compiled(make())
    model.train_on_batch(resuming.data(8)[0], np.full((8, 1), np.inf))
    fit(model, end=4)
    assert_resumes_bit_for_bit(never_stopped, make, stops, tmp_path)


# An averaging wrapper around `Lookahead`.


class Averaging(legacy.Optimizer):
    """Has the form of `SWA` and `MovingAverage` of TensorFlow Addons: it calls the same inner methods."""

    def __init__(self, optimizer, name="Averaging"):
        super().__init__(name)
        self._optimizer = keras.optimizers.deserialize(optimizer) if isinstance(optimizer, dict) else optimizer
        self._track_trackable(self._optimizer, "awg_optimizer")

    def _create_slots(self, var_list):
        self._optimizer._create_slots(var_list=var_list)
        for var in var_list:
            self.add_slot(var, "average", var.read_value())

    def _create_hypers(self):
        self._optimizer._create_hypers()

    def _prepare_local(self, var_device, var_dtype, apply_state):
        return self._optimizer._prepare_local(var_device, var_dtype, apply_state)

    def apply_gradients(self, grads_and_vars, name=None, **kwargs):
        self._optimizer._iterations = self.iterations
        return super().apply_gradients(grads_and_vars, name, **kwargs)

    def _averaged(self, var, method, takes, *arguments, apply_state):
        kwargs = {"apply_state": apply_state} if "apply_state" in getattr(self._optimizer, takes) else {}
        done = getattr(self._optimizer, method)(*arguments, **kwargs)
        average = self.get_slot(var, "average")
        return tf.group(
            *([] if done is None else [done]), average.assign(0.5 * average + 0.5 * var, read_value=False) or ()
        )

    def _resource_apply_dense(self, grad, var, apply_state=None):
        return self._averaged(var, "_resource_apply_dense", "_dense_apply_args", grad, var, apply_state=apply_state)

    def _resource_apply_sparse_duplicate_indices(self, grad, var, indices, apply_state=None):
        method = "_resource_apply_sparse_duplicate_indices"
        return self._averaged(var, method, "_sparse_apply_args", grad, var, indices, apply_state=apply_state)

    def _resource_apply_sparse(self, grad, var, indices, apply_state=None):
        method = "_resource_apply_sparse"
        return self._averaged(var, method, "_sparse_apply_args", grad, var, indices, apply_state=apply_state)

    @property
    def weights(self):
        return self._weights + self._optimizer.weights

    @property
    def learning_rate(self):
        return self._optimizer._get_hyper("learning_rate")

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self._optimizer._set_hyper("learning_rate", learning_rate)

    def get_config(self):
        return {**super().get_config(), "optimizer": keras.optimizers.serialize(self._optimizer)}


def lookaheads():
    return {
        "momentum": Lookahead(legacy.SGD(0.05, momentum=0.9), 3, 0.4),
        "adam": Lookahead(legacy.Adam(0.02), 4),
        "nested": Lookahead(Lookahead(legacy.SGD(0.05), 2), 3, 0.4),
        "off": Lookahead(legacy.SGD(0.05), 0),
        "copy": Lookahead(legacy.SGD(0.05), 3, 1.0),
    }


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("name", lookaheads())
def test_training_with_averaging_around_is_the_training_without(name, run_eagerly):
    expected = fit(compiled(lookaheads()[name], run_eagerly=run_eagerly))
    model = fit(compiled(Averaging(lookaheads()[name]), run_eagerly=run_eagerly))
    for one, other in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    if name != "off":
        slow = [
            [one.get_slot(weight, "slow") for weight in trained.trainable_weights]
            for one, trained in ((model.optimizer._optimizer, model), (expected.optimizer, expected))
        ]
        for one, other in zip(*slow):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_sparse_gradients_with_averaging_around():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 2)).astype("float32")
    variables = [tf.Variable(start) for _ in range(2)]
    optimizers = [wrap(Lookahead(legacy.Adam(0.05), 3, 0.4)) for wrap in (Averaging, lambda one: one)]
    for _ in range(7):
        gradient = tf.IndexedSlices(tf.constant(rng.normal(size=(3, 2)), tf.float32), [0, 3, 0], [5, 2])
        for optimizer, variable in zip(optimizers, variables):
            optimizer.apply_gradients([(gradient, variable)])
    np.testing.assert_allclose(*variables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["h5", "weights", "checkpoint_unbuilt"])
def test_a_run_with_averaging_around_resumes_bit_for_bit(form, tmp_path):
    def make():
        return Averaging(Lookahead(legacy.SGD(0.05, momentum=0.9), 3, 0.4))

    model = fit(compiled(make()), end=4)
    resuming.save(model, tmp_path / "model", form)
    path = f"{tmp_path}/model.{form}"
    if form == "h5":
        with keras.utils.custom_object_scope({"Averaging": Averaging}):
            other = keras.models.load_model(path)
    else:
        other = compiled(make(), seed=3)
        other.load_weights(path) if form == "weights" else resuming.checkpoint_of(other).read(path)
    for one in (model, other):
        fit(one, begin=4)
    assert_same_bits(other.get_weights(), model.get_weights())
    for slot, get in (("average", lambda one: one.optimizer), ("slow", lambda one: one.optimizer._optimizer)):
        assert_same_bits(
            *([get(one).get_slot(weight, slot) for weight in one.trainable_weights] for one in (other, model))
        )
    assert int(other.optimizer.iterations) == 10
    assert sum(weight.dtype == np.int64 for weight in other.optimizer.get_weights()) == 1
    with other.optimizer._optimizer.slow_weights():
        assert_same_bits(
            other.trainable_weights,
            [other.optimizer._optimizer.get_slot(weight, "slow") for weight in other.trainable_weights],
        )
    other.optimizer.learning_rate = 0.25
    assert float(other.optimizer._optimizer.inner_optimizer.learning_rate) == 0.25
