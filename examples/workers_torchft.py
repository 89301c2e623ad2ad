"""Three workers under torchft, of which one is killed: the others abandon that cycle and train on.

    pip install torchft==0.2.0
    python examples/workers_torchft.py

Starts torchft's lighthouse, which knows who is alive, and three workers, all on this machine.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lookahead_optim.torch import Lookahead

WORKERS, PERIOD, CYCLES, KILLED_IN_CYCLE = 3, 4, 6, 3
ADDRESS = "127.0.0.1:29811"
TIMEOUT = timedelta(seconds=20)


def make_manager(worker: int) -> tuple[Any, Any]:
    """Return the manager of a worker that is a single process, and its store."""
    from torchft import Manager, ProcessGroupGloo  # type: ignore[import-not-found]

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        # These would send the state to a worker that comes back.
        load_state_dict=None,
        state_dict=None,
        init_sync=False,
        min_replica_size=2,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=f"http://{ADDRESS}",
        replica_id=f"worker_{worker}",
        hostname="127.0.0.1",
    ), store


def make_reduce(manager: Any, worker: int) -> Callable[[list[torch.Tensor]], bool]:
    """Return a `reduce` that averages over the workers that are alive."""
    syncs = 0

    def reduce(pseudo_gradients: list[torch.Tensor]) -> bool:
        nonlocal syncs
        syncs += 1
        manager.start_quorum(allow_heal=False)
        if worker == WORKERS - 1 and syncs == KILLED_IN_CYCLE:
            os.kill(os.getpid(), signal.SIGKILL)
        for work in [manager.allreduce(one) for one in pseudo_gradients]:
            work.wait()
        # False if a worker was lost on the way: abandon the cycle.
        goes_on = manager.should_commit()
        print(f"worker {worker}, sync {syncs}: {manager.num_participants()} workers, goes on: {goes_on}", flush=True)
        return goes_on

    return reduce


def gradients(worker: int, step: int) -> list[torch.Tensor]:
    """Return what stands for a worker's own data."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return [torch.randn(shape, generator=generator) for shape in ((3, 2), (4,))]


def train(worker: int, folder: Path) -> None:
    """Train in one worker, and save its weights after each sync."""
    torch.set_num_threads(1)
    # Without the store the manager would have none.
    manager, _store = make_manager(worker)
    (folder / f"ready-{worker}").touch()
    while len(list(folder.glob("ready-*"))) < WORKERS:
        time.sleep(0.05)
    # All heartbeats have come then.
    time.sleep(0.5)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,))]
    inner = torch.optim.SGD(weights, lr=0.1)
    optimizer = Lookahead(inner, PERIOD, 0.7, slow_momentum=0.9, reduce=make_reduce(manager, worker))
    saved = []
    for step in range(PERIOD * CYCLES):
        for weight, gradient in zip(weights, gradients(worker, step)):
            weight.grad = gradient
        optimizer.step()
        if (step + 1) % PERIOD == 0:
            saved.append([weight.detach().clone() for weight in weights])
    torch.save(saved, folder / f"weights-{worker}.pt")
    manager.shutdown(wait=False)
    sys.stdout.flush()
    # torchft's threads would wait for their timeouts.
    os._exit(0)


def by_hand() -> list[list[torch.Tensor]]:
    """Return the weights after each sync, in float64."""
    torch.manual_seed(0)
    slow = [torch.randn(shape).double() for shape in ((3, 2), (4,))]
    momentum = [torch.zeros_like(weight) for weight in slow]
    saved = []
    for cycle in range(1, CYCLES + 1):
        alive = range(WORKERS if cycle < KILLED_IN_CYCLE else WORKERS - 1)
        steps = range(PERIOD * (cycle - 1), PERIOD * cycle)
        for index in range(len(slow)) if cycle != KILLED_IN_CYCLE else ():
            moves = [0.1 * sum(gradients(worker, step)[index].double() for step in steps) for worker in alive]
            s = sum(moves) / len(moves)
            momentum[index] = 0.9 * momentum[index] + s
            slow[index] = slow[index] - 0.7 * (s + 0.9 * momentum[index])
        saved.append(list(slow))
    return saved


def main() -> None:
    """Start all, and compare with the model by hand."""
    scripts = Path(sys.executable).parent
    options = ["--min_replicas", "2", "--join_timeout_ms", "3000", "--heartbeat_timeout_ms", "1000"]
    command = [str(scripts / "torchft_lighthouse"), "--bind", ADDRESS, *options]
    lighthouse = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        time.sleep(1)
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
            workers = [
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", __file__, str(worker), folder],
                    env=environment,
                    stderr=subprocess.DEVNULL,
                )
                for worker in range(WORKERS)
            ]
            codes = [worker.wait(timeout=120) for worker in workers]
            assert codes == [0] * (WORKERS - 1) + [-signal.SIGKILL], codes
            first, *others = (torch.load(Path(folder) / f"weights-{worker}.pt") for worker in range(WORKERS - 1))
    finally:
        lighthouse.kill()
    for weights, *of_others, expected in zip(first, *others, by_hand(), strict=True):
        for other in of_others:
            assert all(map(torch.equal, weights, other))
        torch.testing.assert_close([weight.double() for weight in weights], expected, rtol=1e-5, atol=1e-5)
    print("The slow weights of the other workers are equal bit for bit, and equal to those by hand.")


if __name__ == "__main__":
    train(int(sys.argv[1]), Path(sys.argv[2])) if len(sys.argv) > 1 else main()
