"""The distributed training runs of test_distribution.py that need processes of their own.

    python -m tests.test_keras.distribution_worker RUN RESULT [RANK PORT]

A run checks what holds within its process, and writes the history of its weights to the file RESULT.
"""

import os
import sys

import keras
import numpy as np

from lookahead_optim.keras import Lookahead
from tests.comparison import assert_same_bits
from tests.test_keras.helpers import data, mlp, values

BATCH = 16
BATCHES = 17
STOPPED_AT = 8
SYNC_PERIOD = 5


def momentum(**kwargs):
    return Lookahead(keras.optimizers.SGD(0.05, momentum=0.9, **kwargs), SYNC_PERIOD)


def adam(**kwargs):
    return Lookahead(keras.optimizers.Adam(0.02, **kwargs), SYNC_PERIOD, slow_step_size=0.8)


def outer(**kwargs):
    """Slow weights and momentum are made like slow weights of a wider dtype, and may be compared to rounding."""
    settings = {"slow_momentum": 0.6, "slow_dtype": "float32"}
    return Lookahead(keras.optimizers.SGD(0.05, momentum=0.9, **kwargs), SYNC_PERIOD, 0.7, **settings)


OPTIMIZERS = {"momentum": momentum, "adam": adam, "outer": outer}


def momentum_of(optimizer, variables):
    """Return the slow momentum, a list that is empty without momentum."""
    return [optimizer.get_slot(one, "slow_momentum") for one in variables] if optimizer.slow_momentum else []


def batches():
    """Return the data of all steps, an array of inputs and one of targets."""
    return data(rows=BATCH * BATCHES)


class History(keras.callbacks.Callback):
    """Records fast weights, slow weights and slow momentum of every step.

    It checks that after a sync the fast weights equal the slow weights, bit for bit.

    Args:
        copies: Function from a list of variables to a list of lists of arrays, a list for each device on which all
            these variables are held in full. Their bits must be the same everywhere.
    """

    def __init__(self, copies=lambda variables: [values(variables)]):
        super().__init__()
        self.copies = copies
        self.fast, self.slow, self.momentum = [], [], []

    def record(self, model, optimizer):
        weights = model.trainable_variables
        first, *others = self.copies(weights + optimizer.slow_variables + momentum_of(optimizer, weights))
        for other in others:
            assert_same_bits(other, first)
        fast, slow, *_ = (first[start : start + len(weights)] for start in range(0, len(first), len(weights)))
        self.fast.append(fast)
        self.slow.append(slow)
        self.momentum.append(first[2 * len(weights) :])
        if len(self.fast) % SYNC_PERIOD == 0:
            # Slow weights of a wider dtype, rounded.
            assert_same_bits(fast, [one.astype(other.dtype) for one, other in zip(slow, fast)])

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        self.record(self.model, optimizer if isinstance(optimizer, Lookahead) else optimizer.inner_optimizer)

    def until(self, step):
        """Return a history that starts with the steps before `stop`."""
        beginning = History(self.copies)
        beginning.fast, beginning.slow, beginning.momentum = self.fast[:step], self.slow[:step], self.momentum[:step]
        return beginning

    def assert_same_bits(self, other):
        assert len(self.fast) == len(other.fast) == BATCHES
        assert_same_bits([self.fast, self.slow, self.momentum], [other.fast, other.slow, other.momentum])

    def arrays(self):
        """Return all weights of all steps by name."""
        histories = {"fast": self.fast, "slow": self.slow, "momentum": self.momentum}
        return {
            f"{name}/{step}/{index}": array
            for name, history in histories.items()
            for step, weights in enumerate(history)
            for index, array in enumerate(weights)
        }


def fit(model, history, start=0, stop=BATCHES, callbacks=()):
    """Fit the compiled model on the batches from `start` to `stop`, in their order."""
    x, y = (array[start * BATCH : stop * BATCH] for array in batches())
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[history, *callbacks])


def plain_numpy(variables):
    return [[np.asarray(variable.value) for variable in variables]]


def jax_fit(distribution, result):
    import jax

    devices = keras.distribution.list_devices()
    assert len(devices) == 4
    if distribution == "data_parallel":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        parts = 1
    else:
        mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*kernel"] = ("model", None)
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        )
        parts = 2

    def check_layouts(model):
        weights, optimizer = model.trainable_variables, model.optimizer
        pairs = [*zip(weights, optimizer.slow_variables), *zip(weights, momentum_of(optimizer, weights))]
        for fast, slow in pairs:
            kernel = fast.path.endswith("kernel")
            for array in (fast.value, slow.value):
                assert len(array.sharding.device_set) == 4, (fast.path, array.sharding)
                rows = array.shape[0] // (parts if kernel else 1)
                assert {shard.data.shape[0] for shard in array.addressable_shards} == {rows}, (
                    fast.path,
                    array.sharding,
                )
            assert slow.value.sharding.is_equivalent_to(fast.value.sharding, fast.value.ndim), fast.path
            shards = zip(fast.value.addressable_shards, slow.value.addressable_shards)
            assert all(one.index == other.index and one.device == other.device for one, other in shards)

    class Layouts(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            check_layouts(self.model)

    arrays = {}
    for name, make in OPTIMIZERS.items():
        model = mlp()
        model.compile(make(), loss="mse")
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        check_layouts(model)
        history = History(plain_numpy)
        fit(model, history, 0, STOPPED_AT, [Layouts()])
        model.save(f"{result}.keras")
        fit(model, history, STOPPED_AT, BATCHES, [Layouts()])
        resumed = keras.saving.load_model(f"{result}.keras")
        check_layouts(resumed)
        resumed_history = history.until(STOPPED_AT)
        fit(resumed, resumed_history, STOPPED_AT, BATCHES, [Layouts()])
        resumed_history.assert_same_bits(history)
        arrays.update({f"{name}/{key}": array for key, array in history.arrays().items()})

        (fast,), (slow,) = plain_numpy(model.trainable_variables), plain_numpy(optimizer.slow_variables)
        with optimizer.slow_weights():
            check_layouts(model)
            assert_same_bits(*plain_numpy(model.trainable_variables), slow)
        check_layouts(model)
        assert_same_bits(*plain_numpy(model.trainable_variables), fast)
        optimizer.sync()
        check_layouts(model)
        assert_same_bits(*plain_numpy(model.trainable_variables), *plain_numpy(optimizer.slow_variables))
        assert any(np.any(one != other) for one, other in zip(plain_numpy(model.trainable_variables)[0], fast))
        model.trainable_variables[0].assign(jax.numpy.zeros_like(model.trainable_variables[0].value))
        optimizer.reset_slow_weights()
        check_layouts(model)
        assert not np.any(np.asarray(optimizer.slow_variables[0].value))
    jax_narrow(check_layouts)
    np.savez(result, **arrays)


def jax_narrow(check_layouts):
    """Train a model in bfloat16 with wide slow weights, which have the layout of their weights."""
    keras.config.set_dtype_policy("bfloat16")
    model, history = mlp(), History(plain_numpy)
    model.compile(outer(), loss="mse")
    fit(model, history)
    check_layouts(model)
    assert {array.dtype.name for array in history.slow[-1]} == {"float32"}
    assert {array.dtype.name for array in history.fast[-1]} == {"bfloat16"}
    keras.config.set_dtype_policy("float32")


def torch_loop(result, rank, port):
    import torch

    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    arrays = {}
    for name, make in OPTIMIZERS.items():
        model, optimizer = mlp(), make()
        optimizer.build(model.trainable_variables)
        history = History()
        torch_steps(model, optimizer, history, 0, STOPPED_AT, rank)
        model.compile(optimizer)
        model.save(f"{result}.{rank}.keras")
        resumed = keras.saving.load_model(f"{result}.{rank}.keras")
        torch_steps(model, optimizer, history, STOPPED_AT, BATCHES, rank)
        resumed_history = history.until(STOPPED_AT)
        torch_steps(resumed, resumed.optimizer, resumed_history, STOPPED_AT, BATCHES, rank)
        resumed_history.assert_same_bits(history)
        arrays.update({f"{name}/{key}": array for key, array in history.arrays().items()})
        with optimizer.slow_weights():
            arrays[f"{name}/inside"] = values(model.trainable_variables)[0]
        optimizer.sync()
        arrays[f"{name}/synced"] = values(model.trainable_variables)[0]
        assert_same_bits(model.trainable_variables, optimizer.slow_variables)
    np.savez(result, **arrays)
    torch.distributed.destroy_process_group()


def torch_steps(model, optimizer, history, start, stop, rank):
    """Train on this process' half of every batch from `start` to `stop`, or, with rank None, on all of it."""
    import torch

    parallel = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
    x, y = (torch.from_numpy(array) for array in batches())
    for step in range(start, stop):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        if rank is not None:
            rows = slice(rows.start + rank * BATCH // 2, rows.start + (rank + 1) * BATCH // 2)
        model.zero_grad()
        torch.mean((parallel(x[rows]) - y[rows]) ** 2).backward()
        variables = model.trainable_variables
        optimizer.apply([variable.value.grad for variable in variables], variables)
        history.record(model, optimizer)


def tensorflow_loop(strategy, model, optimizer, history, start=0, stop=BATCHES, graph=True):
    """Train on the batches from `start` to `stop` with a custom loop.

    Each replica trains on its part of every batch.
    """
    import tensorflow as tf

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_sum((model(x) - y) ** 2) / BATCH)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    def step(x, y):
        strategy.run(replica_step, args=(x, y))

    lookahead = optimizer if isinstance(optimizer, Lookahead) else optimizer.inner_optimizer
    if graph:
        step = tf.function(step)
    size = BATCH // strategy.num_replicas_in_sync
    x, y = batches()
    for number in range(start, stop):

        def part(array, number=number):
            def of(context):
                first = number * BATCH + context.replica_id_in_sync_group * size
                return tf.constant(array[first : first + size])

            return strategy.experimental_distribute_values_from_function(of)

        step(part(x), part(y))
        history.record(model, lookahead)


def tensorflow_multi_worker(result):
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == 2
    arrays = {}
    for name, make in OPTIMIZERS.items():
        with strategy.scope():
            model, optimizer = mlp(), make()
            optimizer.build(model.trainable_variables)
        history = History()
        tensorflow_loop(strategy, model, optimizer, history)
        arrays.update({f"{name}/{key}": array for key, array in history.arrays().items()})
        with optimizer.slow_weights():
            assert_same_bits(model.trainable_variables, history.slow[-1])
        assert_same_bits(model.trainable_variables, history.fast[-1])
        optimizer.sync()
        assert_same_bits(model.trainable_variables, optimizer.slow_variables)
    np.savez(result, **arrays)


if __name__ == "__main__":
    run, result, *where = sys.argv[1:]
    if run == "torch":
        torch_loop(result, *map(int, where))
    elif run == "multi_worker":
        tensorflow_multi_worker(result)
    else:
        jax_fit(run, result)
    # The frameworks' threads may wait for a peer that has ended already.
    sys.stdout.flush()
    os._exit(0)
