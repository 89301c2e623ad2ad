"""The workers of test_workers.py: processes that train on data of their own, and average pseudo-gradients.

    python -m tests.test_torch.worker_processes RUN DIRECTORY RANK WORLD_SIZE

A run writes what it did to DIRECTORY/RUN-RANK.pt.
"""

import copy
import datetime
import inspect
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lookahead_optim.torch import Lookahead, _workers, average
from tests.test_torch.process_groups import join

TIMEOUT = 120
STEPS = 14
# A sync by hand in mid-cycle.
PERIOD, SYNCED_AFTER = 4, 6
SHAPES = [(3, 2), (4,), ()]
LEARNING_RATE = 0.1
# Slow step size and more.
SETTINGS = {
    "plain": (0.5, {}),
    "nesterov": (0.7, {"slow_momentum": 0.9}),
    "heavy_ball": (0.3, {"slow_momentum": 0.9, "slow_nesterov": False}),
    "wide": (0.7, {"slow_momentum": 0.9, "slow_dtype": torch.float32}),
}
WIDE_DTYPES = [torch.bfloat16, torch.float32, torch.bfloat16]
# Curvatures and optima of two workers, the inner step, and pairs of eta and mu.
CURVATURES, OPTIMA, STEP, CYCLES = (0.5, 2.0), (1.0, -3.0), 0.2, 250
OUTER = [(0.5, 0.0), (1.0, 0.0), (0.7, 0.5), (0.3, 0.9)]
DIFFERENCES = ["nothing", "count", "period", "step size", "momentum", "nesterov", "shape", "dtype", "weight"]
DIFFERENCES += ["parameters", "groups", "loaded", "loaded momentum", "local", "unsynced", "off", "permuted", "frozen"]
DIFFERENCES += ["slow dtype"]
CHANGES = ["reset", "added", "off and on"]
SMALL_BUCKET = 2**22
KINDS = ["float32", "bfloat16", "one, bfloat16", "transposed", "channels last"]
SAVED_EVERY, KILLED_AFTER = 3, 10
# In mid-cycle, and right after a sync.
LOADED_BY_OTHERS = (9, 12)
# PyTorch 2.6 cannot save one process by itself.
FORMS = ["plain", "dcp"] if "no_dist" in inspect.signature(dcp.save).parameters else ["plain"]


def make_parameters(dtypes=(torch.float64, torch.float64, torch.float64)):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [torch.nn.Parameter(value.to(dtype)) for value, dtype in zip(values, dtypes)]


def gradients(worker, step):
    """Return the gradients of a worker in float64."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def set_gradients(parameters, worker, step):
    for parameter, gradient in zip(parameters, gradients(worker, step)):
        parameter.grad = gradient.to(parameter.dtype)


def clones(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def trained(name):
    """Return copies of the weights after each step, and in each step before a sync."""
    slow_step_size, settings = SETTINGS[name]
    parameters = make_parameters(*[WIDE_DTYPES] if name == "wide" else [])
    inner = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9)
    optimizer = Lookahead(inner, PERIOD, slow_step_size, **settings, reduce=average())
    history, moved = [], []
    inner.register_step_post_hook(lambda *_: moved.append(clones(parameters)))
    for step in range(1, STEPS + 1):
        set_gradients(parameters, dist.get_rank(), step)
        optimizer.step()
        if step == SYNCED_AFTER:
            optimizer.sync()
            optimizer.sync()
        state = [optimizer.state[one] for one in parameters]
        keys = [key for key in ("slow", "slow_momentum") if key in state[0]]
        history.append(
            {"fast": clones(parameters), "moved": moved[-1]} | {key: clones(one[key] for one in state) for key in keys}
        )
    return history


def fixed_points():
    """Return where the slow weights settle, with a group for each pair of eta and mu."""
    rank = dist.get_rank()
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in OUTER]
    groups = [
        {"params": [one], "slow_step_size": eta, "slow_momentum": mu} for one, (eta, mu) in zip(parameters, OUTER)
    ]
    optimizer = Lookahead(torch.optim.SGD(groups, STEP), 5, reduce=average())
    for _ in range(5 * CYCLES):
        for one in parameters:
            one.grad = CURVATURES[rank] * (one.detach() - OPTIMA[rank])
        optimizer.step()
    return clones(parameters)


def linear_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


def data_parallel(momentum):
    """Return the weights with DistributedDataParallel, and with Lookahead at sync period 1 and slow step size 1."""
    results = []
    for is_ddp in (True, False):
        model = linear_model()
        wrapped = torch.nn.parallel.DistributedDataParallel(model) if is_ddp else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        if not is_ddp:
            optimizer = Lookahead(optimizer, 1, 1.0, reduce=average())
        history = []
        for step in range(STEPS):
            loss_of(wrapped, dist.get_rank(), step).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(clones(model.parameters()))
        results.append(history)
    return results


def batch(worker, step):
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return tuple(torch.randn(8, size, generator=generator, dtype=torch.float64) for size in (3, 1))


def loss_of(model, worker, step, part=slice(None)):
    x, y = batch(worker, step)
    return (model(x[part]) - y[part]).square().mean()


def started(difference):
    """Start with a difference between the workers. Return the error of the first step, what changed, and calls."""
    rank = dist.get_rank()
    parameters = make_parameters()
    if difference == "shape" and rank:
        parameters[1] = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    if difference == "dtype" and rank:
        parameters[1] = torch.nn.Parameter(parameters[1].detach().float())
    if difference == "parameters" and rank:
        del parameters[2]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    if difference == "groups" and rank:
        groups = [{"params": parameters}]
    wide = {"slow_dtype": torch.float64} if difference == "slow dtype" and rank else {}
    optimizer = Lookahead(torch.optim.SGD(groups, 0.1), 3, slow_momentum=0.5, **wide, reduce=average())
    if difference.startswith("loaded"):
        for _ in range(2):
            set_gradients(parameters, rank, 1)
            optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][1]["slow" if difference == "loaded" else "slow_momentum"][2] += rank
        optimizer.load_state_dict(state)
    group = optimizer.param_groups[-1]
    changes = {"count": {"lookahead_step": 7}, "period": {"sync_period": 4}, "step size": {"slow_step_size": 0.7}}
    changes |= {"momentum": {"slow_momentum": 0.7}, "nesterov": {"slow_nesterov": False}}
    changes |= {"unsynced": {"lookahead_unsynced": 3}}
    if rank:
        group.update(changes.get(difference, {}))
    with torch.no_grad():
        if difference == "weight":
            parameters[1][2] += 1e-15 * rank
        if difference == "permuted" and rank:
            parameters[1].copy_(parameters[1].flip(0))
        if difference == "local":
            # Without a sync period there is nothing to keep equal.
            group["sync_period"] = 0
            parameters[1][2] += rank
        if difference == "off" and rank:
            for one in optimizer.param_groups:
                one["sync_period"] = 0
        if difference == "frozen" and rank:
            parameters[1].requires_grad_(False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = clones(parameters), copy.deepcopy(optimizer.state_dict())
    error = None
    try:
        optimizer.step()
    except RuntimeError as raised:
        error = str(raised)
    result = {"error": error, "before": before, "after": (clones(parameters), copy.deepcopy(optimizer.state_dict()))}
    if difference == "weight":
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
        optimizer.step()
        result["moved"] = not torch.equal(parameters[1], before[0][1])
    return result


def changed(change):
    """Make the workers differ after the start, and return the error of the next step."""
    rank, parameters = dist.get_rank(), make_parameters()
    optimizer = Lookahead(torch.optim.SGD(parameters[:2], 0.1), 3, slow_momentum=0.5, reduce=average())
    for step in range(7):
        set_gradients(parameters, rank, step)
        if step == 4 and change == "off and on":
            optimizer.param_groups[0]["sync_period"] = 0
        optimizer.step()
    if change == "reset":
        optimizer.reset_slow_weights()
    if change == "added":
        with torch.no_grad():
            parameters[2] += rank
        optimizer.add_param_group({"params": parameters[2:]})
    if change == "off and on":
        optimizer.param_groups[0]["sync_period"] = 3
    try:
        optimizer.step()
    except RuntimeError as raised:
        return str(raised)
    return None


def in_groups():
    """Return the error of a process that is in no group, and the weights of two groups with own settings.

    Each group has one process. All processes make all groups.
    """
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    error = None
    if rank == 1:
        parameters = make_parameters()
        optimizer = Lookahead(torch.optim.SGD(parameters, 0.1), 2, reduce=average(groups[0]))
        set_gradients(parameters, rank, 1)
        try:
            optimizer.step()
        except RuntimeError as raised:
            error = str(raised)
        try:
            average(groups[0])([torch.ones(2)])
        except RuntimeError as raised:
            error += str(raised)
    parameters = make_parameters()
    optimizer = Lookahead(torch.optim.SGD(parameters, 0.1), 2 + rank, reduce=average(groups[rank]))
    alone = make_parameters()
    bare = Lookahead(torch.optim.SGD(alone, 0.1), 2 + rank)
    # The other process may have other settings.
    bare._is_compared = True
    for step in range(7):
        for one, of in ((optimizer, parameters), (bare, alone)):
            set_gradients(of, rank, step)
            one.step()
    return error, clones(parameters), clones(alone)


def calls():
    """Return how often the workers compared themselves and reduced: in training, and after a state dict was loaded."""
    counts = []
    gather, coalesce = dist.all_gather_object, dist.distributed_c10d._coalescing_manager

    def counted(name, function):
        def count(*arguments, **keywords):
            counts[-1][name] += 1
            return function(*arguments, **keywords)

        return count

    dist.all_gather_object = counted("compared", gather)
    dist.distributed_c10d._coalescing_manager = counted("reduced", coalesce)
    try:
        parameters = make_parameters()
        optimizer = Lookahead(torch.optim.SGD(parameters, 0.1), PERIOD, reduce=average())
        for _ in range(2):
            counts.append({"compared": 0, "reduced": 0})
            for step in range(3 * PERIOD):
                set_gradients(parameters, dist.get_rank(), step)
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    finally:
        dist.all_gather_object, dist.distributed_c10d._coalescing_manager = gather, coalesce
    return counts


def to_average(worker):
    """Return tensors of all kinds."""
    generator = torch.Generator().manual_seed(worker)
    normal = lambda *shape, **options: torch.randn(*shape, generator=generator, **options)  # noqa: E731
    return [
        normal(40),
        normal(7, 3).t(),
        normal(0, 3),
        normal(()),
        normal(4, 3, dtype=torch.complex64),
        normal(5, dtype=torch.float64),
        # Their sum is no number of float16, and no exact number of bfloat16.
        torch.full((3,), 60000.0 + 32 * worker, dtype=torch.float16),
        torch.tensor([256.0, 1.0 + worker], dtype=torch.bfloat16),
        normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        normal(0, dtype=torch.float32).to(torch.bfloat16),
    ]


def averaged(bytes_per_bucket):
    kept, _workers._BYTES_PER_BUCKET = _workers._BYTES_PER_BUCKET, bytes_per_bucket
    try:
        tensors = to_average(dist.get_rank())
        assert average()(tensors) is None
        assert average()([torch.zeros(0)]) is None
        assert average()([]) is None
    finally:
        _workers._BYTES_PER_BUCKET = kept
    return tensors


def resident(name):
    """Return the memory of this process, in bytes: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def weights_of(kind):
    """Return 126 MB of weights, or half of that in bfloat16."""
    if kind == "transposed":
        return [torch.ones(5 * 2**10, 6 * 2**10).t()]
    if kind == "channels last":
        return [torch.ones(2**10, 2**8, 5, 4).to(memory_format=torch.channels_last) for _ in range(6)]
    if kind == "one, bfloat16":
        return [torch.ones(30 * 2**20, dtype=torch.bfloat16)]
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return [torch.ones(5 * 2**20, dtype=dtype) for _ in range(6)]


def memory(kind):
    """Return the bytes of the weights, and the additional peak memory of a step with a sync."""
    parameters = [torch.nn.Parameter(weight) for weight in weights_of(kind)]
    optimizer = Lookahead(torch.optim.SGD(parameters, 0.1), 2, slow_momentum=0.9, reduce=average())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    growth = []
    kept, _workers._BYTES_PER_BUCKET = _workers._BYTES_PER_BUCKET, SMALL_BUCKET
    try:
        for _ in range(4):
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            optimizer.step()
            growth.append(resident("VmHWM") - before)
    finally:
        _workers._BYTES_PER_BUCKET = kept
    return sum(parameter.nbytes for parameter in parameters), growth


def written():
    """Return the bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def sent():
    """Return the bytes sent in 20 steps with DistributedDataParallel (`None`), and with each period; and the size."""
    found = {}
    for period in (None, 1, 5, 20):
        model = torch.nn.Linear(200, 200)
        wrapped = torch.nn.parallel.DistributedDataParallel(model) if period is None else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if period:
            optimizer = Lookahead(optimizer, period, reduce=average())
        before = 0
        # The first cycle compares.
        for step in range(40):
            before = written() if step == 20 else before
            wrapped(torch.ones(1, 200)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[period] = written() - before
    return found, sum(parameter.nbytes for parameter in model.parameters())


class Restartable:
    """A run that saves every worker after some steps, and resumes from the last ones that all workers have.

    It saves in two forms and loads one.
    """

    def __init__(self, directory, form="plain"):
        directory.mkdir(exist_ok=True)
        self.directory, self.form = directory, form
        self.model = linear_model()
        inner = torch.optim.AdamW(self.model.parameters(), 0.05)
        self.optimizer = Lookahead(inner, PERIOD, 0.7, slow_momentum=0.9, reduce=average())
        self.rank, size = dist.get_rank(), dist.get_world_size()
        self.step, steps = 0, range(SAVED_EVERY, STEPS, SAVED_EVERY)
        last = max((step for step in steps if all(self.path(step, one).exists() for one in range(size))), default=0)
        if last:
            self.load(last)

    def path(self, step, rank):
        return self.directory / f"{step}-{rank}"

    def state(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self):
        path = self.path(self.step, self.rank)
        partial = path.with_suffix(".partial")
        partial.mkdir()
        # Between syncs each worker has weights of its own, so that each has a checkpoint of its own.
        if "dcp" in FORMS:
            dcp.save(self.state(), checkpoint_id=partial / "dcp", no_dist=True)
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, partial / "plain")
        partial.rename(path)

    def load(self, step):
        path = self.path(step, self.rank) / self.form
        if self.form == "dcp":
            state = self.state()
            dcp.load(state, checkpoint_id=path, no_dist=True)
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        else:
            state = torch.load(path)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = step

    def train(self, stop=None, end=STEPS):
        """Return the weights after each step."""
        history = {}
        while self.step < end:
            loss_of(self.model, self.rank, self.step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.step % SAVED_EVERY == 0:
                self.save()
            slow = [self.optimizer.state[one]["slow"] for one in self.model.parameters()]
            history[self.step] = {"fast": clones(self.model.parameters()), "slow": clones(slow)}
            if stop is not None and self.step == KILLED_AFTER and self.rank == 1:
                stop()
        return history


def two(directory):
    result = {
        "trained": {name: trained(name) for name in SETTINGS},
        "fixed": fixed_points(),
        "data_parallel": {momentum: data_parallel(momentum) for momentum in (0.0, 0.9)},
        "started": {difference: started(difference) for difference in DIFFERENCES},
        "changed": {change: changed(change) for change in CHANGES},
        "in_groups": in_groups(),
        "calls": calls(),
        "averaged": {size: averaged(size) for size in (2**25, 64)},
        "memory": {kind: memory(kind) for kind in KINDS},
        "sent": sent(),
    }
    result["uninterrupted"] = Restartable(directory / "uninterrupted").train()
    return result


def killed(directory):
    """Train until the second worker waits for its end, in mid-cycle."""

    def stop():
        (directory / "reached").touch()
        time.sleep(TIMEOUT)

    return Restartable(directory / "checkpoints").train(stop)


def resumed(directory):
    histories = {}
    for form in FORMS:
        folder = directory / f"resumed-{form}"
        if dist.get_rank() == 0:
            shutil.copytree(directory / "checkpoints", folder)
        dist.barrier()
        histories[form] = Restartable(folder, form).train()
    return histories


def another_number(directory):
    """Continue from the checkpoints of one of two workers, in all workers of another number."""
    histories = {}
    for step in LOADED_BY_OTHERS:
        folder = directory / f"{dist.get_world_size()}-from-{step}"
        for rank in range(dist.get_world_size()) if dist.get_rank() == 0 else ():
            shutil.copytree(directory / "uninterrupted" / f"{step}-0", folder / f"{step}-{rank}")
        dist.barrier()
        histories[step] = Restartable(folder).train(end=step + 2 * PERIOD)
    return histories


def restarted_by_torchrun(directory):
    """Kill the second worker once."""
    mark = directory / "torchrun-killed"

    def stop():
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return Restartable(directory / "restarted").train(stop)


def sharded_model(mesh):
    from torch.distributed.fsdp import fully_shard

    model = linear_model()
    for one in (model[0], model[2], model):
        fully_shard(one, mesh=mesh)
    return model


def whole(tensor):
    return tensor.full_tensor().detach().clone()


def replicas(directory):
    """Train two replicas, each sharded over two processes; save in mid-cycle, and load and train on."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replica, part = mesh["replicate"].get_local_rank(), mesh["shard"].get_local_rank()

    def make():
        model = sharded_model(mesh["shard"])
        inner = torch.optim.Adam(model.parameters(), 0.05)
        return model, Lookahead(inner, PERIOD, 0.7, slow_momentum=0.9, reduce=average(mesh["replicate"].get_group()))

    def train(model, optimizer, begin, end):
        history = []
        for step in range(begin, end):
            loss_of(model, replica, step, slice(4 * part, 4 * part + 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
            slow = [optimizer.state[one]["slow"] for one in model.parameters()]
            history.append({"fast": list(map(whole, model.parameters())), "slow": list(map(whole, slow))})
        return history

    model, optimizer = make()
    history = train(model, optimizer, 0, KILLED_AFTER)
    # Each replica has its own fast weights, under the same names.
    where = {"checkpoint_id": directory / f"replica-{replica}", "process_group": mesh["shard"].get_group()}
    names = ("model", "optimizer")
    dcp.save(dict(zip(names, get_state_dict(model, optimizer))), **where)
    history += train(model, optimizer, KILLED_AFTER, STEPS)
    other = make()
    state = dict(zip(names, get_state_dict(*other)))
    dcp.load(state, **where)
    set_state_dict(*other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return {"history": history, "resumed": train(*other, KILLED_AFTER, STEPS), "replica": replica}


def four(directory):
    return {
        "trained": {name: trained(name) for name in ("plain", "nesterov", "heavy_ball")},
        "averaged": {64: averaged(64)},
        "replicas": replicas(directory) if hasattr(torch.cpu.Stream, "record_event") else None,
    }


RUNS = {
    "two": two,
    "four": four,
    "killed": killed,
    "resumed": resumed,
    "another_number": another_number,
    "torchrun": restarted_by_torchrun,
}

if __name__ == "__main__":
    run, directory, *numbers = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    warnings.simplefilter("error")
    # PyTorch warns of `no_dist=True`.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    torch.set_num_threads(1)
    if numbers:
        rank, world_size = numbers
        join(run, directory, rank, world_size, TIMEOUT)
    else:
        # torchrun provides the rest.
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    torch.save(RUNS[run](directory), directory / f"{run}-{rank}.pt")
    dist.destroy_process_group()
