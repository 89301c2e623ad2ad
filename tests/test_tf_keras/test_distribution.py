"""Keras 2 training on several devices and in several processes equals training on one device, to rounding."""

import contextlib
import json
import socket
import time

import numpy as np
import pytest
import tensorflow as tf

from lookahead_optim.tf_keras import AdamW, Lookahead, RectifiedAdam
from lookahead_optim.tf_keras._keras import keras
from tests.child_processes import start
from tests.comparison import assert_same_bits
from tests.test_tf_keras import distribution_worker as worker
from tests.test_tf_keras import kept
from tests.test_tf_keras.distribution_worker import BATCHES, OPTIMIZERS, STOPPED_AT, History, fit
from tests.test_tf_keras.resuming import checkpoint_of, mlp, momentum, slow_of, values

# Keras 2.15 on Python 3.11.
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange:DeprecationWarning")

LIMIT = 90
legacy = keras.optimizers.legacy
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

# Only possible before the first operation, so here and not in a fixture.
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def free_ports(number):
    """Return ports on 127.0.0.1 that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def run_children(tmp_path, run, *arguments, environments=({},)):
    """Run the worker once per environment, at the same time, and return the arrays that they wrote."""
    results = [tmp_path / f"result{number}.npz" for number in range(len(environments))]
    logs = [tmp_path / f"log{number}.txt" for number in range(len(environments))]
    children = []
    deadline = time.monotonic() + LIMIT
    try:
        for result, log, environment in zip(results, logs, environments):
            with log.open("w") as file:
                environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **environment}
                children.append(start(worker, run, result, *arguments, output=file, **environment))
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            if any(child.poll() for child in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    codes = [child.returncode for child in children]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs)
    return [dict(np.load(result)) for result in results]


def assert_close(actual, expected, atol=1e-6):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(actual[key], expected[key], rtol=2e-5, atol=atol, err_msg=key)


def part_of(arrays, prefix):
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def on_one_device(make, **compile_args):
    """Return the history of a `fit` without distribution."""
    model, history = mlp(), History()
    model.compile(make(), loss="mse", **compile_args)
    fit(model, history)
    return history.arrays()


def copies(variables):
    """Return the values of the mirrored variables on each of two devices."""
    replicas = [mirrored.values for mirrored in variables]
    assert all(len(one) == 2 for one in replicas)
    return [values(device) for device in zip(*replicas)]


@pytest.fixture(scope="module")
def strategy():
    # One strategy for all tests: the collectives of several strategies in a process have the same keys, and mix.
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def compiled_on(strategy, make):
    with strategy.scope():
        model = mlp()
        model.compile(make(), loss="mse")
    return model


@every_optimizer
def test_mirrored_fit_equals_one_device(name, strategy):
    history = History(copies)
    fit(compiled_on(strategy, OPTIMIZERS[name]), history)
    assert len(history.steps) == BATCHES
    assert_close(history.arrays(), on_one_device(OPTIMIZERS[name]))


@pytest.mark.parametrize(("name", "graph"), [("momentum", True), ("nested", True), ("momentum", False)])
def test_mirrored_loop_equals_one_device(name, graph, strategy):
    with strategy.scope():
        model, optimizer = mlp(), OPTIMIZERS[name]()
    history = History(copies)
    worker.loop(strategy, model, optimizer, history, graph)
    assert_close(history.arrays(), on_one_device(OPTIMIZERS[name]))


@pytest.mark.parametrize(
    "inner",
    [
        lambda: legacy.SGD(0.1),
        lambda: RectifiedAdam(0.05, weight_decay=0.1, total_steps=9),
        lambda: AdamW(0.1, 0.05, exclude_from_weight_decay=["embeddings:0$", "bias:0$"]),
    ],
    ids=["SGD", "RectifiedAdam", "AdamW"],
)
def test_mirrored_sparse_gradients_equal_one_device(inner, strategy):
    rows = worker.BATCH * BATCHES
    x, y = np.random.default_rng(0).integers(7, size=(rows, 3)), np.random.default_rng(1).normal(size=(rows, 1))

    def train(scope, history):
        with scope:
            keras.utils.set_random_seed(0)
            layers = [keras.Input((3,), dtype="int64"), keras.layers.Embedding(9, 2), keras.layers.Flatten()]
            model = keras.Sequential([*layers, keras.layers.Dense(1)])
            model.compile(Lookahead(inner(), 3), loss="mse")
        model.fit(x, y, batch_size=worker.BATCH, shuffle=False, verbose=0, callbacks=[history])
        return history.arrays()

    assert_close(train(strategy.scope(), History(copies)), train(contextlib.nullcontext(), History()))


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Lookahead(inner, 3)], ids=["bare", "wrapped"])
def test_mirrored_variables_of_a_list_decay_on_every_replica(wrap, strategy):
    with strategy.scope():
        weights = [tf.Variable([1.0, 2.0], name=name) for name in ("kernel", "bias")]
        optimizer = wrap(AdamW(0.5, 0.0, exclude_from_weight_decay=["bias"]))

    @tf.function
    def step(**kwargs):
        strategy.run(lambda: optimizer.apply_gradients([(tf.zeros(2), one) for one in weights], **kwargs))

    step(decay_var_list=weights[1:])
    assert all(np.array_equal(device, [[1.0, 2.0], [0.5, 1.0]]) for device in copies(weights))
    step()
    assert all(np.array_equal(device, [[0.5, 1.0], [0.5, 1.0]]) for device in copies(weights))


def test_mirrored_steps_that_a_loss_scaler_skips_do_not_count(strategy, monkeypatch):
    x, y = worker.data(worker.BATCH * BATCHES)
    # On both replicas, as Keras lets the first replica's gradients decide on a skip.
    y[: worker.BATCH] = y[4 * worker.BATCH : 5 * worker.BATCH] = np.inf
    monkeypatch.setattr(worker, "data", lambda rows: (x, y))

    def make():
        return keras.mixed_precision.LossScaleOptimizer(momentum(), initial_scale=1024.0)

    history, expected = History(copies, skipped=(0, 4)), History(skipped=(0, 4))
    model, one_model = compiled_on(strategy, make), mlp()
    one_model.compile(make(), loss="mse")
    fit(model, history)
    fit(one_model, expected)
    assert_close(history.arrays(), expected.arrays())
    assert len(history.steps) == BATCHES - 1
    assert all(np.array_equal(one, other) for one, other in zip(history.steps[3], history.steps[2]))


@pytest.mark.parametrize("scoped", [True, False], ids=["in the scope", "outside"])
def test_mirrored_slow_weights_sync_and_reset_act_on_every_replica(scoped, strategy):
    model, history = compiled_on(strategy, momentum), History(copies)
    fit(model, history, stop=STOPPED_AT)
    weights, optimizer = model.trainable_variables, model.optimizer
    slow_variables = [optimizer.get_slot(variable, "slow") for variable in weights]

    def check(expected, variables):
        for device in copies(variables):
            assert all(np.array_equal(one, other) for one, other in zip(device, expected))

    with strategy.scope() if scoped else contextlib.nullcontext():
        fast, slow = values(weights), slow_of(model)
        with optimizer.slow_weights():
            check(slow, weights)
        check(fast, weights)
        check(slow, slow_variables)
        worker.check_slow_weights(model, optimizer)
        check(values(weights), weights)
        check(values(weights), slow_variables)
        new = [weight + 1 for weight in fast]
        model.set_weights(new)
        optimizer.reset_slow_weights()
        check(new, slow_variables)


@pytest.mark.parametrize(
    ("name", "form"), [("momentum", "weights"), ("adam", "checkpoint"), ("nested", "checkpoint"), ("nested", "weights")]
)
def test_mirrored_run_resumed_in_mid_cycle_is_bit_for_bit_the_one_that_never_stopped(name, form, strategy, tmp_path):
    model, history = compiled_on(strategy, OPTIMIZERS[name]), History(copies)
    fit(model, history, stop=STOPPED_AT)
    path = str(tmp_path / "saved")
    checkpoint_of(model).write(path) if form == "checkpoint" else model.save_weights(path)
    fit(model, history, start=STOPPED_AT)
    resumed, resumed_history = compiled_on(strategy, OPTIMIZERS[name]), History(copies, STOPPED_AT)
    resumed.set_weights([weight + 1 for weight in resumed.get_weights()])
    with strategy.scope():
        status = checkpoint_of(resumed).read(path) if form == "checkpoint" else resumed.load_weights(path)
    fit(resumed, resumed_history, start=STOPPED_AT)
    status.assert_consumed()
    assert len(resumed_history.steps) == BATCHES - STOPPED_AT
    for one, other in zip(resumed_history.steps, history.steps[STOPPED_AT:]):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


def test_a_mirrored_checkpoint_goes_on_on_one_device(strategy, tmp_path):
    model, history = compiled_on(strategy, momentum), History(copies)
    fit(model, history, stop=STOPPED_AT)
    checkpoint_of(model).write(str(tmp_path / "saved"))
    fit(model, history, start=STOPPED_AT)
    one_model, one_history = mlp(seed=3), History(start=STOPPED_AT)
    one_model.compile(momentum(), loss="mse")
    checkpoint_of(one_model).read(str(tmp_path / "saved"))
    fit(one_model, one_history, start=STOPPED_AT)
    for one, other in zip(one_history.steps, history.steps[STOPPED_AT:], strict=False):
        for a, b in zip(one, other):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_workers_agree_bit_for_bit_and_with_one_device(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    environments = [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(2)
    ]
    first, second = run_children(tmp_path, "multi_worker", environments=environments)
    assert first.keys() == second.keys()
    for key, array in first.items():
        assert array.tobytes() == second[key].tobytes(), key
    for name, make in {**OPTIMIZERS, "fit": momentum}.items():
        assert_close(part_of(first, f"{name}/"), on_one_device(make))


def test_parameter_servers_equal_one_device(tmp_path):
    (result,) = run_children(tmp_path, "parameter_server", *free_ports(3))
    for name, make in OPTIMIZERS.items():
        assert_close(part_of(result, f"{name}/"), on_one_device(make))


@pytest.mark.parametrize("devices", [("CPU:0", "CPU:1", "CPU:0"), ("CPU:0", "CPU:0", "CPU:1")])
def test_a_graph_on_two_devices_equals_one_device(devices):
    """A conditional runs on one device, so a loop is used here."""

    def train(first, second, third):
        variables = []
        for device in (first, second):
            with tf.device(device):
                variables.append(tf.Variable([1.0, -2.0]))
        with tf.device(third):
            slow_step_size = tf.Variable(0.25)
        optimizer = Lookahead(legacy.SGD(0.1, momentum=0.5), 2, slow_step_size)

        @tf.function
        def step():
            optimizer.apply_gradients([(3.0 * one, one) for one in variables])

        for _ in range(5):
            step()
        types = [one.type for one in step.get_concrete_function().graph.get_operations()]
        return [one.numpy() for one in variables], types

    weights, types = train(*devices)
    expected, others = train("CPU:0", "CPU:0", "CPU:0")
    np.testing.assert_array_equal(weights, expected)
    assert "While" in types
    assert others.count("If") == 2
    assert "While" not in others


class _Interrupt(keras.callbacks.Callback):
    """Interrupts the third epoch. A backup has the weights from before it."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == kept.KILLED_IN:
            raise KeyboardInterrupt


def test_mirrored_backup_with_the_slow_weights_in_the_model_resumes_bit_for_bit(strategy, tmp_path):
    def run(*callbacks):
        with strategy.scope():
            model = kept.make_model()
        weights = []
        look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_: weights.append(model.get_weights()))
        losses = kept.fit(model, [*kept.callbacks(["backup", "swap"], tmp_path), look, *callbacks])
        return losses, weights[-1]

    losses, weights = run()
    with pytest.raises(KeyboardInterrupt):
        run(_Interrupt())
    resumed_losses, resumed_weights = run()
    assert resumed_losses == losses[kept.KILLED_IN :]
    assert_same_bits(resumed_weights, weights)
