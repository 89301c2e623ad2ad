"""The workers of test_workers.py that are processes, which JAX' own `jax.distributed` connects.

    python -m tests.test_optax.worker_processes RUN DIRECTORY RANK WORLD_SIZE

A run writes the parameters after each step, and the state after the last one, to DIRECTORY/RUN-RANK.npz.
"""

import os
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lookahead_optim.optax import lookahead
from tests.test_optax import test_workers
from tests.test_optax.whole_steps import whole_step


def address(path, rank):
    """Return where the processes meet. The first process finds a free port, and the others read it from a file."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            found = f"localhost:{free.getsockname()[1]}"
        whole = path.with_suffix(".whole")
        whole.write_text(found)
        whole.rename(path)
    while not path.exists():
        time.sleep(0.02)
    return path.read_text()


def main(run, directory, rank, world_size):
    # The tests have four devices in a process, and each of these has one.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address(directory / run, rank), world_size, rank, initialization_timeout=60)
    mesh = jax.make_mesh((world_size,), ("workers",), axis_types=(AxisType.Auto,))
    by_worker = NamedSharding(mesh, PartitionSpec("workers"))
    start, gradients = test_workers.start_and_gradients(8)
    momentum = {"slow_momentum": 0.9, "slow_step_size": test_workers.ETA}
    reduce = test_workers.mean_over_workers
    optimizer = lookahead(optax.sgd(test_workers.RATE), test_workers.PERIOD, reduce=reduce, **momentum)
    step = test_workers.by_shard_map(whole_step(optimizer, run), mesh)

    def of_all(tree):
        """Return a tree with an axis of workers, of which this process has its own part."""
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(by_worker, leaf[None]), tree)

    def own(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)[0]), tree)

    params, state = of_all(start), of_all(jax.tree.map(np.asarray, optimizer.init(start)))
    found = {}
    for count, one in enumerate(gradients):
        params, state = step(params, state, of_all(one[rank]))
        found |= {f"{name} {count}": value for name, value in own(params).items()}
    slow, momentum = own((state.slow_params, state.outer_state.slow_momentum))
    found |= {f"slow {name}": value for name, value in slow.items()}
    found |= {f"momentum {name}": value for name, value in momentum.items()}
    np.savez(directory / f"{run}-{rank}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
