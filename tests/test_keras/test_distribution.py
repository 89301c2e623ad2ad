"""Training on several devices and in several processes equals training on one device, to rounding."""

import contextlib
import json
import socket
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead, RectifiedAdam, SwapSlowWeights
from tests.child_processes import start
from tests.comparison import assert_same_bits
from tests.test_keras import distribution_worker as worker
from tests.test_keras import kept
from tests.test_keras.distribution_worker import (
    BATCH,
    BATCHES,
    OPTIMIZERS,
    STOPPED_AT,
    History,
    batches,
    fit,
    momentum,
    tensorflow_loop,
)
from tests.test_keras.helpers import BACKEND, data, mlp, values

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="a tf.distribute strategy")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="a JAX device mesh")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="DistributedDataParallel")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

LIMIT = 240

if BACKEND == "tensorflow":
    import tensorflow as tf

    # Only possible before the first operation, so here and not in a fixture.
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def run_children(tmp_path, commands, environments):
    """Run the worker once per command, at the same time, and return the files that they wrote."""
    children = []
    for number, (command, environment) in enumerate(zip(commands, environments)):
        result = tmp_path / f"result{number}.npz"
        output = tmp_path / f"output{number}.txt"
        with output.open("w") as file:
            environment = {"KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
            process = start(worker, command[0], result, *command[1:], output=file, **environment)
        children.append((process, output, result))
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process, _, _ in children) and time.monotonic() < deadline:
            if any(process.poll() for process, _, _ in children):
                break
            time.sleep(0.1)
    finally:
        for process, _, _ in children:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process, _, _ in children]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(Path(output).read_text() for _, output, _ in children)
    results = []
    for _, _, result in children:
        with np.load(result) as arrays:
            results.append(dict(arrays))
    return results


def free_ports(number):
    """Return ports on 127.0.0.1 that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def assert_close(actual, expected, atol=1e-6):
    """Check two dictionaries of float32 arrays to rounding."""
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(actual[key], expected[key], rtol=2e-5, atol=atol, err_msg=key)


def on_one_device(make):
    """Return the history of a `fit` without distribution."""
    model, history = mlp(), History()
    model.compile(make(), loss="mse")
    fit(model, history)
    return history.arrays()


def part_of(arrays, prefix):
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


@on_jax
@pytest.mark.parametrize("distribution", ["data_parallel", "model_parallel"])
def test_jax_slow_weights_are_laid_out_like_the_fast_ones_and_the_result_is_that_of_one_device(distribution, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    (result,) = run_children(tmp_path, [(distribution,)], [flags])
    for name, make in OPTIMIZERS.items():
        assert_close(part_of(result, f"{name}/"), on_one_device(make))


@on_torch
def test_torch_ranks_of_a_ddp_model_agree_bit_for_bit_and_with_one_process_on_the_whole_batch(tmp_path):
    (port,) = free_ports(1)
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    first, second = run_children(tmp_path, [("torch", str(rank), str(port)) for rank in range(2)], [loopback] * 2)
    assert first.keys() == second.keys()
    for key, array in first.items():
        assert array.tobytes() == second[key].tobytes(), key
    for name, make in OPTIMIZERS.items():
        model, optimizer, history = mlp(), make(), History()
        optimizer.build(model.trainable_variables)
        worker.torch_steps(model, optimizer, history, 0, BATCHES, rank=None)
        expected = history.arrays()
        with optimizer.slow_weights():
            expected["inside"] = values(model.trainable_variables)[0]
        optimizer.sync()
        expected["synced"] = values(model.trainable_variables)[0]
        assert_close(part_of(first, f"{name}/"), expected)


@on_tensorflow
def test_tensorflow_workers_agree_bit_for_bit_and_with_one_device(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    environments = [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(2)
    ]
    first, second = run_children(tmp_path, [("multi_worker",)] * 2, environments)
    assert first.keys() == second.keys()
    for key, array in first.items():
        assert array.tobytes() == second[key].tobytes(), key
    for name, make in OPTIMIZERS.items():
        assert_close(part_of(first, f"{name}/"), on_one_device(make))


def copies(variables):
    """Return the values of the mirrored variables on each of two devices."""
    replicas = [mirrored.value.values for mirrored in variables]
    assert all(len(one) == 2 for one in replicas)
    return [[array.numpy() for array in device] for device in zip(*replicas)]


@pytest.fixture(scope="module")
def strategy():
    # One strategy for all tests: the collectives of several strategies in a process have the same keys, and mix.
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def fit_on(strategy, make, make_model=mlp, history=None, **compile_args):
    """Fit on the strategy, and return the model and the history of all replicas."""
    with strategy.scope():
        model = make_model()
        model.compile(make(), loss="mse", **compile_args)
    history = history or History(copies)
    fit(model, history)
    return model, history


def loop_on(strategy, make, make_model=mlp, built=True, graph=True):
    """Train in a custom loop, and return model, optimizer and the history of all replicas."""
    with strategy.scope():
        model, optimizer = make_model(), make()
        if built:
            optimizer.build(model.trainable_variables)
    history = History(copies if strategy.num_replicas_in_sync > 1 else History().copies)
    tensorflow_loop(strategy, model, optimizer, history, graph=graph)
    return model, optimizer, history


def rectified_adam():
    return Lookahead(RectifiedAdam(0.02, weight_decay=0.1, total_steps=20), worker.SYNC_PERIOD)


@on_tensorflow
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), rectified_adam], ids=lambda make: make.__name__)
def test_mirrored_fit_equals_one_device(make, strategy):
    _, history = fit_on(strategy, make)
    assert_close(history.arrays(), on_one_device(make))


@on_tensorflow
@every_optimizer
def test_mirrored_loop_in_a_graph_equals_one_device(name, strategy):
    _, _, history = loop_on(strategy, OPTIMIZERS[name])
    assert_close(history.arrays(), on_one_device(OPTIMIZERS[name]))


@on_tensorflow
def test_mirrored_eager_loop_that_builds_the_optimizer_equals_one_device(strategy):
    _, _, history = loop_on(strategy, momentum, built=False, graph=False)
    assert_close(history.arrays(), on_one_device(momentum))


@on_tensorflow
def test_mirrored_loop_without_merge_calls_as_under_xla_on_gpus_equals_one_device(strategy, monkeypatch):
    monkeypatch.setattr(strategy.extended, "_use_merge_call", lambda: False)
    _, _, history = loop_on(strategy, momentum)
    assert_close(history.arrays(), on_one_device(momentum))


@on_tensorflow
def test_mirrored_wide_slow_weights_of_a_narrow_model_equal_one_device_to_its_precision(strategy):
    keras.config.set_dtype_policy("bfloat16")
    model, history = fit_on(strategy, worker.outer)
    state = [*model.optimizer.slow_variables, *worker.momentum_of(model.optimizer, model.trainable_variables)]
    assert {keras.backend.standardize_dtype(one.dtype) for one in state} == {"float32"}
    assert all(len(one.value.values) == 2 for one in state)
    expected = on_one_device(worker.outer)
    for key, array in history.arrays().items():
        np.testing.assert_allclose(array.astype("float32"), expected[key].astype("float32"), rtol=0.1, atol=0.1)


@on_tensorflow
def test_mirrored_nested_wrappers_equal_one_device(strategy):
    def make():
        inner = Lookahead(keras.optimizers.SGD(0.05, momentum=0.9), 2, 0.8, slow_momentum=0.5, slow_nesterov=False)
        return Lookahead(inner, worker.SYNC_PERIOD)

    _, history = fit_on(strategy, make)
    assert_close(history.arrays(), on_one_device(make))


@on_tensorflow
def test_mirrored_constraint_holds_in_both_copies_and_the_result_equals_one_device(strategy):
    def make_model():
        return mlp(kernel_constraint=keras.constraints.MaxNorm(0.5))

    _, history = fit_on(strategy, momentum, make_model)
    model, expected = make_model(), History()
    model.compile(momentum(), loss="mse")
    fit(model, expected)
    assert_close(history.arrays(), expected.arrays())
    for kernel in (*history.fast[14][::2], *history.slow[14][::2]):
        assert np.all(np.linalg.norm(kernel, axis=0) <= 0.5 * (1 + 1e-6))


@on_tensorflow
def test_mirrored_loop_with_gradient_accumulation_equals_one_device(strategy):
    def make():
        return Lookahead(keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2), 3)

    class Weights(History):
        def record(self, model, optimizer):
            first, second = self.copies(model.trainable_variables + optimizer.slow_variables)
            assert_same_bits(first, second)
            self.fast.append(first)
            if len(self.fast) % 6 == 0:
                assert_same_bits(first[:4], first[4:])

    with strategy.scope():
        model, optimizer = mlp(), make()
    history = Weights(copies)
    # Keras' own accumulation makes a merge call in a conditional, which a graph does not allow on several replicas.
    tensorflow_loop(strategy, model, optimizer, history, graph=False)
    model, optimizer = mlp(), make()
    expected = Weights(lambda variables: [values(variables)] * 2)
    tensorflow_loop(tf.distribute.get_strategy(), model, optimizer, expected, graph=False)
    assert int(optimizer.iterations) == BATCHES // 2
    assert_close(history.arrays(), expected.arrays())


@on_tensorflow
@pytest.mark.parametrize("custom_loop", [False, True], ids=["fit", "loop"])
def test_mirrored_steps_that_a_loss_scaler_skips_do_not_count(custom_loop, strategy, monkeypatch):
    x, y = batches()
    y[6 * BATCH : 7 * BATCH] = np.inf
    monkeypatch.setattr(worker, "batches", lambda: (x, y))

    class Skipping(History):
        def record(self, model, optimizer):
            if len(self.fast) == 6 and not hasattr(self, "skipped"):
                self.skipped = self.copies(model.trainable_variables + optimizer.slow_variables)
            else:
                super().record(model, optimizer)

    def make():
        return keras.optimizers.LossScaleOptimizer(momentum(), initial_scale=1024.0)

    one_model, expected = mlp(), Skipping()
    one_model.compile(make(), loss="mse")
    fit(one_model, expected)
    history = Skipping(copies)
    with strategy.scope():
        model, optimizer = mlp(), make()
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, loss="mse")
    if custom_loop:
        tensorflow_loop(strategy, model, optimizer, history)
    else:
        fit(model, history)
    assert_close(history.arrays(), expected.arrays())
    for skipped in history.skipped:
        assert_same_bits(skipped, history.fast[5] + history.slow[5])
    assert values([optimizer.iterations])[0] == BATCHES - 1


@on_tensorflow
def test_mirrored_mixed_precision_equals_one_device_to_half_precision(strategy):
    keras.config.set_dtype_policy("mixed_float16")

    def make():
        # Keras lets the first replica's gradients decide on a skip, so none may overflow.
        return keras.optimizers.LossScaleOptimizer(momentum(), initial_scale=256.0)

    model, history = fit_on(strategy, make)
    one_model, expected = mlp(), History()
    one_model.compile(make(), loss="mse")
    fit(one_model, expected)
    assert values([model.optimizer.iterations])[0] == BATCHES
    assert_close(history.arrays(), expected.arrays(), atol=2e-3)


@on_tensorflow
@pytest.mark.parametrize("updates", [0, STOPPED_AT], ids=["before the first update", "in mid-cycle"])
@pytest.mark.parametrize("scoped", [True, False], ids=["in the scope", "outside"])
def test_mirrored_slow_weights_sync_and_reset_act_on_every_replica(scoped, updates, strategy):
    with strategy.scope():
        model, optimizer = mlp(), momentum()
        optimizer.build(model.trainable_variables)
    tensorflow_loop(strategy, model, optimizer, History(copies), stop=updates)
    weights = model.trainable_variables
    fast, _ = copies(weights)
    slow, _ = copies(optimizer.slow_variables) if updates else (fast, fast)
    synced = [start + np.float32(0.5) * (end - start) for start, end in zip(slow, fast)]

    def check(expected, variables):
        for device in copies(variables):
            assert_same_bits(device, expected)

    with strategy.scope() if scoped else contextlib.nullcontext():
        with optimizer.slow_weights():
            check(slow, weights)
        check(fast, weights)
        check(slow, optimizer.slow_variables)
        optimizer.sync()
        first, second = copies(weights)
        assert_same_bits(first, second)
        check(first, optimizer.slow_variables)
        for one, other in zip(first, synced):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        model.set_weights([weight + 1 for weight in fast])
        optimizer.reset_slow_weights()
        # Before the first update there is nothing to reset: that update captures.
        check([weight + 1 for weight in fast] if updates else slow, optimizer.slow_variables)


@on_tensorflow
def test_mirrored_callback_validates_on_the_slow_weights(strategy):
    with strategy.scope():
        model = mlp()
        model.compile(momentum(), loss="mse")
    x, y = batches()
    x_test, y_test = data(rows=32, seed=1)
    logs = model.fit(
        x,
        y,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        validation_data=(x_test, y_test),
        callbacks=[SwapSlowWeights()],
    ).history
    with model.optimizer.slow_weights():
        expected = model.evaluate(x_test, y_test, verbose=0)
    assert logs["val_loss"] == [pytest.approx(expected, rel=1e-6)]
    assert model.evaluate(x_test, y_test, verbose=0) != pytest.approx(expected, rel=1e-3)


class _Interrupt(keras.callbacks.Callback):
    """Interrupts the third epoch. A backup has the weights from before it."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == kept.KILLED_IN:
            raise KeyboardInterrupt


@on_tensorflow
def test_mirrored_backup_with_the_slow_weights_in_the_model_resumes_bit_for_bit(strategy, tmp_path):
    def run(*callbacks):
        with strategy.scope():
            model = kept.make_model()
        last = kept.LastBatch()
        losses = kept.fit(model, [*kept.callbacks(["backup", "swap"], tmp_path), last, *callbacks])
        return losses, last.states[-1]

    losses, state = run()
    with pytest.raises(KeyboardInterrupt):
        run(_Interrupt())
    resumed_losses, resumed_state = run()
    assert resumed_losses == losses[kept.KILLED_IN :]
    assert_same_bits(resumed_state, state)


@on_tensorflow
@every_optimizer
def test_mirrored_run_resumed_in_mid_cycle_is_bit_for_bit_the_one_that_never_stopped(name, strategy, tmp_path):
    with strategy.scope():
        model = mlp()
        model.compile(OPTIMIZERS[name](), loss="mse")
    history = History(copies)
    fit(model, history, stop=STOPPED_AT)
    model.save(tmp_path / "model.keras")
    fit(model, history, start=STOPPED_AT)
    with strategy.scope():
        resumed = keras.saving.load_model(tmp_path / "model.keras")
    resumed_history = history.until(STOPPED_AT)
    fit(resumed, resumed_history, start=STOPPED_AT)
    resumed_history.assert_same_bits(history)


@on_tensorflow
@pytest.mark.parametrize("in_fit", [False, True], ids=["build", "fit"])
@pytest.mark.parametrize(
    "inside",
    [("model",), ("model", "inner"), ("model", "wrapper"), ("inner", "wrapper"), ("inner",), ("wrapper",)],
    ids=" and ".join,
)
def test_objects_created_only_partly_inside_the_scope_are_refused(inside, in_fit, strategy):
    def scope(name):
        return strategy.scope() if name in inside else contextlib.nullcontext()

    with scope("model"):
        model = mlp()
    with scope("inner"):
        inner = keras.optimizers.SGD(0.05, momentum=0.9)
    with scope("wrapper"):
        optimizer = Lookahead(inner)
    before = values(model.trainable_variables)

    def train():
        model.compile(optimizer, loss="mse")
        fit(model, History())

    def build():
        optimizer.build(model.trainable_variables)

    with pytest.raises(ValueError, match=r"must be created inside the same `with strategy.scope\(\):` block"):
        train() if in_fit else build()
    assert not optimizer.built
    assert not inner.built
    assert_same_bits(model.trainable_variables, before)


@on_tensorflow
@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_an_optimizer_deep_inside_that_was_created_outside_the_scope_is_refused(strategy):
    innermost = keras.optimizers.SGD(0.05)
    with strategy.scope():
        model = mlp()
        both = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.05), {".*bias": innermost})
        optimizer = Lookahead(keras.optimizers.MultiOptimizer(both))
    with pytest.raises(ValueError, match=rf"the optimizer '{innermost.name}', created outside of any"):
        optimizer.build(model.trainable_variables)
