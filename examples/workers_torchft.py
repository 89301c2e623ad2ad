"""Three workers under torchft. One misses a sync, and one is killed and starts again. All stay equal.

    pip install torchft==0.2.0
    python examples/workers_torchft.py

Starts torchft's lighthouse, which knows who is alive, and three workers, all on this machine.
"""

import copy
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

WORKERS, PERIOD, SYNCS = 3, 4, 8
# In the second cycle worker 0 does not commit, and the others do. In the fifth cycle worker 2 is killed, and the others
# abandon the cycle. In the seventh cycle worker 2 is back.
MISSED, KILLED, BACK = 2, 5, 7
ADDRESS = "127.0.0.1:29811"
TIMEOUT = timedelta(seconds=10)


def make_manager(worker: int) -> tuple[Any, Any]:
    """Return the manager of a worker that is a single process, and its store."""
    from torchft import Manager, ProcessGroupGloo  # type: ignore[import-not-found]

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        # `share_state` registers these.
        load_state_dict=None,
        state_dict=None,
        min_replica_size=2,
        # `start_quorum` returns after a worker has got the state of another.
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


def share_state(manager: Any, model: torch.nn.Module, optimizer: Lookahead) -> None:
    """Let torchft send the state of one worker to a worker that is new or has missed a sync."""

    def state_dict() -> dict[str, Any]:
        # A copy, as this worker may train on while torchft sends it.
        return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager.register_state_dict_fn("training", load_state_dict, state_dict)


def make_reduce(manager: Any) -> Callable[[list[torch.Tensor]], bool]:
    """Return a `reduce` that averages over the workers of torchft's quorum."""

    def reduce(pseudo_gradients: list[torch.Tensor]) -> bool:
        for work in [manager.allreduce(one) for one in pseudo_gradients]:
            work.wait()
        # False if a worker was lost on the way: abandon the cycle.
        return bool(manager.should_commit())

    return reduce


def miss_a_sync(manager: Any) -> None:
    """Let a worker find an error of its own after the second reduction."""
    should_commit = manager.should_commit

    def should_commit_or_not() -> bool:
        if manager.current_step() == MISSED - 1:
            manager.report_error(RuntimeError("An error that the other workers do not see."))
            manager.should_commit = should_commit
        return bool(should_commit())

    manager.should_commit = should_commit_or_not


def gradients(worker: int, step: int) -> list[torch.Tensor]:
    """Return what stands for a worker's own data."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return [torch.randn(shape, generator=generator) for shape in ((1, 3), (1,))]


def wait_for_others(folder: Path, cycle: int) -> None:
    """Wait for all before the first cycle, and before the seventh for the worker that was killed."""
    pattern, number = {1: ("*-is-ready", WORKERS), BACK: ("*-is-back", 1)}.get(cycle, ("*", 0))
    while len(list(folder.glob(pattern))) < number:
        time.sleep(0.05)
    # What a worker sends next has reached the lighthouse then.
    time.sleep(0.5 if number else 0)


def train(worker: int, folder: Path, is_back: bool) -> None:
    """Train in one worker, and save its weights after each cycle."""
    torch.set_num_threads(1)
    # Without the store the manager would have none.
    manager, _store = make_manager(worker)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Lookahead(inner, PERIOD, 0.7, slow_momentum=0.9, reduce=make_reduce(manager))
    share_state(manager, model, optimizer)
    if worker == 0:
        miss_a_sync(manager)

    def count() -> int:
        # A worker that is new gets the count with the state of another.
        return int(optimizer.param_groups[0]["lookahead_step"])

    (folder / f"{worker}-is-{'back' if is_back else 'ready'}").touch()
    saved = {}
    while manager.current_step() < SYNCS:
        if not is_back:
            wait_for_others(folder, count() // PERIOD + 1)
        # At the start of a cycle. The model of each worker is the slow weights then.
        manager.start_quorum()
        cycle = count() // PERIOD + 1
        (folder / f"{worker}-in-{cycle}").touch()
        for step in range(count(), count() + PERIOD):
            if worker == 2 and step == PERIOD * KILLED - 2:
                os.kill(os.getpid(), signal.SIGKILL)
            for parameter, gradient in zip(model.parameters(), gradients(worker, step)):
                parameter.grad = gradient
            optimizer.step()
        told = f"cycle {cycle}, worker {worker}: {manager.num_participants()} workers, {manager.current_step()} syncs"
        print(told, flush=True)
        saved[cycle] = [parameter.detach().clone() for parameter in model.parameters()]
    torch.save(saved, folder / f"weights-{worker}.pt")
    manager.shutdown(wait=False)
    sys.stdout.flush()
    # torchft's threads would wait for their timeouts.
    os._exit(0)


def by_hand() -> dict[int, list[torch.Tensor]]:
    """Return the weights after each cycle, in float64."""
    torch.manual_seed(0)
    slow = [parameter.detach().double() for parameter in torch.nn.Linear(3, 1).parameters()]
    momentum = [torch.zeros_like(weight) for weight in slow]
    saved = {}
    for cycle in range(1, SYNCS + 2):
        workers = {KILLED: [], KILLED + 1: [0, 1]}.get(cycle, [0, 1, 2])
        steps = range(PERIOD * (cycle - 1), PERIOD * cycle)
        for index in range(len(slow)) if workers else ():
            moves = [0.1 * sum(gradients(worker, step)[index].double() for step in steps) for worker in workers]
            s = sum(moves) / len(moves)
            momentum[index] = 0.9 * momentum[index] + s
            slow[index] = slow[index] - 0.7 * (s + 0.9 * momentum[index])
        saved[cycle] = list(slow)
    return saved


def main() -> None:
    """Start all, and compare with the model by hand."""
    scripts = Path(sys.executable).parent
    options = ["--min_replicas", "2", "--join_timeout_ms", "3000", "--heartbeat_timeout_ms", "1000"]
    command = [str(scripts / "torchft_lighthouse"), "--bind", ADDRESS, *options]
    lighthouse = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = []
    try:
        time.sleep(1)
        with tempfile.TemporaryDirectory() as folder:

            def start(worker: int, *arguments: str) -> "subprocess.Popen[bytes]":
                command = [sys.executable, "-W", "ignore", __file__, str(worker), folder, *arguments]
                workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
                return workers[-1]

            *_, last = [start(worker) for worker in range(WORKERS)]
            assert last.wait(timeout=120) == -signal.SIGKILL
            while len(list(Path(folder).glob(f"*-in-{KILLED + 1}"))) < WORKERS - 1:
                time.sleep(0.1)
            start(WORKERS - 1, "back")
            codes = [worker.wait(timeout=120) for worker in workers]
            assert codes == [0, 0, -signal.SIGKILL, 0], codes
            results = [torch.load(Path(folder) / f"weights-{worker}.pt") for worker in range(WORKERS)]
    finally:
        for process in (lighthouse, *workers):
            process.kill()
    # After the sync that this worker missed, until the next cycle, it has the weights of before.
    missed = results[0].pop(MISSED)
    assert all(map(torch.equal, missed, results[0][MISSED - 1]))
    expected = by_hand()
    for result in results:
        for cycle, weights in result.items():
            assert all(map(torch.equal, weights, results[1][cycle]))
            torch.testing.assert_close([one.double() for one in weights], expected[cycle], rtol=1e-5, atol=1e-5)
    print("The workers' slow weights are equal bit for bit, and equal to those by hand.")


if __name__ == "__main__":
    train(int(sys.argv[1]), Path(sys.argv[2]), "back" in sys.argv) if len(sys.argv) > 1 else main()
