"""The distributed training runs of test_distribution.py that need processes of their own.

    python -m tests.test_tf_keras.distribution_worker multi_worker RESULT
    python -m tests.test_tf_keras.distribution_worker parameter_server RESULT PORT PORT PORT

The history of the weights goes to the file RESULT.
"""

import os
import sys

import numpy as np
import tensorflow as tf

from lookahead_optim.tf_keras._keras import keras
from tests.test_tf_keras.resuming import adam, data, mlp, momentum, nested, slow_of, values

BATCH = 16
BATCHES = 8
STOPPED_AT = 4
OPTIMIZERS = {"momentum": momentum, "adam": adam, "nested": nested}


def plain(variables):
    return [values(variables)]


class History(keras.callbacks.Callback):
    """Records the fast and the slow weights of every step, and checks that their bits are the same after a sync.

    Args:
        copies: Function from a list of variables to a list of lists of arrays, a list for each device. Their bits must
            be the same everywhere.
        start: Number of the first batch.
        skipped: Numbers of batches that a loss scaler skips.
    """

    def __init__(self, copies=plain, start=0, skipped=()):
        super().__init__()
        self.copies, self.number, self.skipped, self.steps = copies, start, skipped, []

    def record(self, model, optimizer):
        self.number += 1
        applied = self.number - sum(batch < self.number for batch in self.skipped)
        if not applied:
            return
        if hasattr(optimizer, "loss_scale"):
            optimizer = optimizer.inner_optimizer
        slow = [optimizer.get_slot(variable, "slow") for variable in model.trainable_variables]
        first, *others = self.copies(model.trainable_variables + slow)
        for other in others:
            assert all(np.array_equal(one, two) for one, two in zip(first, other))
        self.steps.append(first)
        half = len(first) // 2
        same = all(np.array_equal(one, two) for one, two in zip(first[:half], first[half:]))
        assert same == (applied % optimizer.sync_period == 0)

    def on_train_batch_end(self, batch, logs=None):
        self.record(self.model, self.model.optimizer)

    def arrays(self):
        return {f"{step}/{index}": array for step, all_ in enumerate(self.steps) for index, array in enumerate(all_)}


def fit(model, history, start=0, stop=BATCHES):
    """Fit the compiled model on the batches from `start` to `stop`, in their order."""
    x, y = (array[start * BATCH : stop * BATCH] for array in data(BATCH * BATCHES))
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[history])


def replica_step(model, optimizer, x, y):
    """Make a step on a replica's part of a batch."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((model(x) - y) ** 2) / BATCH
    optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))


def loop(strategy, model, optimizer, history, graph=True):
    """Train with a custom loop. Each replica trains on its part of every batch."""

    def step(x, y):
        strategy.run(replica_step, args=(model, optimizer, x, y))

    step = tf.function(step) if graph else step
    size = BATCH // strategy.num_replicas_in_sync
    for number in range(BATCHES):

        def part(array, number=number):
            def of(context):
                first = number * BATCH + context.replica_id_in_sync_group * size
                return tf.constant(array[first : first + size])

            return strategy.experimental_distribute_values_from_function(of)

        step(*(part(array) for array in data(BATCH * BATCHES)))
        history.record(model, optimizer)


def check_slow_weights(model, optimizer):
    """Check the methods that use the slow weights outside of the training steps."""
    fast, slow = values(model.trainable_variables), slow_of(model, optimizer)
    with optimizer.slow_weights():
        assert all(np.array_equal(one, two) for one, two in zip(values(model.trainable_variables), slow))
    assert all(np.array_equal(one, two) for one, two in zip(values(model.trainable_variables), fast))
    optimizer.sync()
    expected = [one + optimizer.slow_step_size * (two - one) for one, two in zip(slow, fast)]
    for one, two, three in zip(values(model.trainable_variables), slow_of(model, optimizer), expected):
        assert np.array_equal(one, two)
        np.testing.assert_allclose(one, three, rtol=1e-6, atol=1e-7)


def multi_worker():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == 2
    for name, make in OPTIMIZERS.items():
        with strategy.scope():
            model, optimizer = mlp(), make()
        history = History()
        loop(strategy, model, optimizer, history)
        yield f"{name}/", history
        check_slow_weights(model, optimizer)
    with strategy.scope():
        model = mlp()
        model.compile(momentum(), loss="mse")
    history = History()
    x, y = data(BATCH * BATCHES)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    options = tf.data.Options()
    # Each worker has the same data, and takes its half of every batch.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    model.fit(dataset.with_options(options), verbose=0, callbacks=[history])
    yield "fit/", history


def parameter_server(ports):
    addresses = [f"127.0.0.1:{port}" for port in ports]
    cluster = tf.train.ClusterSpec({"worker": addresses[:2], "ps": addresses[2:]})
    servers = [tf.distribute.Server(cluster, job, index) for job, index in (("worker", 0), ("worker", 1), ("ps", 0))]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    assert servers
    x, y = data(BATCH * BATCHES)
    for name, make in OPTIMIZERS.items():
        with strategy.scope():
            model, optimizer = mlp(), make()

        @tf.function
        def step(x, y, model=model, optimizer=optimizer):
            strategy.run(replica_step, args=(model, optimizer, x, y))

        history = History()
        for number in range(BATCHES):
            rows = slice(number * BATCH, (number + 1) * BATCH)
            coordinator.schedule(step, args=(tf.constant(x[rows]), tf.constant(y[rows])))
            # One step at a time, so that the result does not depend on the workers' speed.
            coordinator.join()
            history.record(model, optimizer)
        yield f"{name}/", history
        check_slow_weights(model, optimizer)


if __name__ == "__main__":
    run, result, *ports = sys.argv[1:]
    runs = multi_worker() if run == "multi_worker" else parameter_server(ports)
    np.savez(result, **{prefix + key: array for prefix, history in runs for key, array in history.arrays().items()})
    # The framework's threads may wait for a peer that has ended already.
    sys.stdout.flush()
    os._exit(0)
