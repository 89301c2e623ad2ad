"""The training runs of test_distributed.py, most of which need processes of their own.

    python -m tests.test_torch.distributed_worker RUN DIRECTORY RANK WORLD_SIZE

A run writes what it did to DIRECTORY/RUN-RANK.pt. Weights are gathered, so that they can be compared with the weights
of a single process. Shards are written as shards.
"""

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lookahead_optim.torch import Lookahead
from tests.test_torch.process_groups import join

TIMEOUT = 120
STEPS = 15
SAVED_AFTER = 10
ROWS = 12
LEARNING_RATE = 0.1


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=LEARNING_RATE)


def adam_foreach(parameters):
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, foreach=True)


OUTER = {"slow_momentum": 0.9, "slow_dtype": torch.float64}
# The inner optimizer, and for each Lookahead around it, from the inside to the outside: sync period, slow step size and
# more.
OPTIMIZERS = {
    "momentum": (momentum, [(4, 0.5)]),
    "adam": (adam, [(4, 0.8)]),
    "adam_foreach": (adam_foreach, [(4, 0.3)]),
    "nested": (momentum, [(3, 0.5), (4, 0.8)]),
    "outer": (adam, [(4, 0.7, OUTER)]),
}
REPLICATED = ["momentum", "adam", "nested"]
CHECKPOINTED = ["adam", "nested", "outer"]
ZERO_REDUNDANCY = [(form, name) for form in ("inside", "around") for name in ("momentum", "adam")]


def make_optimizer(name, parameters):
    make, settings = OPTIMIZERS[name]
    optimizer = make(parameters)
    for period, step_size, *more in settings:
        optimizer = Lookahead(optimizer, period, step_size, **dict(*more))
    return optimizer


def make_model(seed=0):
    """Return a model whose weights cannot all be cut into even shards."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(ROWS, size, generator=generator, dtype=torch.float64) for size in (3, 1))


def own_rows(tensors):
    """Return this process' part of a batch."""
    size = ROWS // dist.get_world_size() if dist.is_initialized() else ROWS
    start = size * dist.get_rank() if dist.is_initialized() else 0
    return tuple(one[start : start + size] for one in tensors)


def backward(model, step):
    model.zero_grad()
    x, y = own_rows(batch(step))
    (model(x) - y).square().mean().backward()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shard(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def slow_of(model, optimizer, name="slow"):
    return [optimizer.state[one][name] for one in model.parameters()]


def slow_names(optimizer):
    """Return the names of the slow weights of all levels, from the inside to the outside."""
    return sorted(key for key in next(iter(optimizer.state.values())) if key.startswith("slow"))


def weights(model, optimizer):
    return {
        "fast": [whole(one) for one in model.parameters()],
        **{name: [whole(one) for one in slow_of(model, optimizer, name)] for name in slow_names(optimizer)},
    }


def train(model, optimizer, begin=0, end=STEPS):
    """Return the weights after each step."""
    history = []
    for step in range(begin, end):
        backward(model, step)
        optimizer.step()
        history.append(weights(model, optimizer))
    return history


def optimizer_state(model, optimizer, look=shard):
    """Return copies of the state of all parameters and of the settings of all groups."""
    state = {
        f"{name} {key}": look(torch.as_tensor(value))
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": state, "groups": copy.deepcopy(groups)}


def shard_model(model, cut="layers"):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    if cut == "layers":
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data_parallel(name):
    """The processes start from different weights.

    DistributedDataParallel replaces them by the first process' weights.
    """
    model = make_model(seed=dist.get_rank())
    optimizer = make_optimizer(name, model.parameters())
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    return {"history": train(ddp, optimizer)}


def fully_sharded(name):
    """Train on shards, compare every shard around each step, and evaluate after it."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = shard_model(make_model())
    optimizer = make_optimizer(name, model.parameters())
    innermost = optimizer
    while isinstance(innermost, Lookahead):
        innermost = innermost.inner_optimizer
    moved = []
    innermost.register_step_post_hook(lambda *_: moved.append(list(map(shard, model.parameters()))))
    history, steps, evaluations = [], [], []
    alike = came_back = True
    communication = 0
    for step in range(STEPS):
        before = list(map(shard, slow_of(model, optimizer) if step else model.parameters()))
        backward(model, step)
        with CommDebugMode() as counts:
            optimizer.step()
        communication += counts.get_total_counts()
        slow, fast = slow_of(model, optimizer), list(model.parameters())
        alike &= all(
            isinstance(one, DTensor) and (one.placements, one.device_mesh) == (other.placements, other.device_mesh)
            for name in slow_names(optimizer)
            for one, other in zip(slow_of(model, optimizer, name), fast)
        )
        steps.append((before, moved[-1], list(map(shard, slow)), list(map(shard, fast))))
        history.append(weights(model, optimizer))
        with optimizer.slow_weights(), torch.no_grad():
            evaluations.append(model(batch(0)[0]))
        came_back &= all(map(torch.equal, map(shard, fast), steps[-1][-1]))
    return {
        "history": history,
        "steps": steps,
        "evaluations": evaluations,
        "alike": alike,
        "came_back": came_back,
        "communication": communication,
    }


def evaluated_with_gathered_weights(name):
    """FSDP2 does not free the root's own weights after a forward pass without a backward pass."""
    model = shard_model(make_model(), cut="root")
    optimizer = make_optimizer(name, model.parameters())
    history, evaluations = [], []
    for step in range(STEPS):
        history += train(model, optimizer, step, step + 1)
        with optimizer.slow_weights(), torch.no_grad():
            evaluations.append(model(batch(0)[0]))
    return {"history": history, "evaluations": evaluations}


def options(kind):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        full_state_dict=kind == "full",
        cpu_offload=kind == "full",
        flatten_optimizer_state_dict=kind == "flat",
    )


def saved(name, directory):
    """Save in mid-cycle, in several forms, and continue. Then load these in the same processes and continue again."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict

    model = shard_model(make_model())
    optimizer = make_optimizer(name, model.parameters())
    train(model, optimizer, end=SAVED_AFTER)
    kept = {}
    for kind in ("sharded", "flat", "full"):
        kept[kind] = model_state, state = get_state_dict(model, optimizer, options=options(kind))
        if kind != "full":
            dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=directory / f"{name}-{kind}")
    with optimizer.slow_weights():
        kept["block"] = model_state, state = get_state_dict(model, optimizer)
        # The tensors of the model would have the fast weights after the block.
        kept["block"] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, kept["block"])
        dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=directory / f"{name}-block")
        full = get_state_dict(model, optimizer, options=options("full"))
    # The tensors are the optimizer's own.
    kept = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, kept)
    result = {"saved": optimizer_state(model, optimizer), "history": train(model, optimizer, SAVED_AFTER)}
    for kind, (model_state, state) in kept.items():
        model = shard_model(make_model(seed=1))
        optimizer = make_optimizer(name, model.parameters())
        how = options(kind)
        how.broadcast_from_rank0 = kind == "full"
        set_model_state_dict(model, model_state, options=how)
        set_optimizer_state_dict(model, optimizer, state, options=how)
        result[kind] = {"loaded": optimizer_state(model, optimizer), "history": train(model, optimizer, SAVED_AFTER)}
    how = options("full")
    how.broadcast_from_rank0 = True
    try:
        set_optimizer_state_dict(model, optimizer, full[1], options=how)
    except ValueError as error:
        result["full in a block"] = str(error)
    return result


def loaded(name, directory):
    """Continue, in as many processes as there are, from the files that `saved` wrote in two processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    result = {}
    for kind in ("sharded", "flat", "block"):
        model = make_model(seed=1)
        if dist.is_initialized():
            shard_model(model)
        optimizer = make_optimizer(name, model.parameters())
        model_state, state = get_state_dict(model, optimizer, options=options(kind))
        if kind == "block":
            # Only entries that the state dict has are loaded.
            with optimizer.slow_weights():
                model_state, state = get_state_dict(model, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
            dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=directory / f"{name}-{kind}")
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state, options=options(kind))
        result[kind] = {
            "loaded": optimizer_state(model, optimizer, look=whole),
            "history": train(model, optimizer, SAVED_AFTER),
        }
    return result


def zero_redundancy(form, name):
    """Train, continue with an optimizer that loads the consolidated state, and then with the first optimizer."""
    # PyTorch's own module uses `torch.jit.script`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer

    make, [settings] = OPTIMIZERS[name]

    def make_zero(model):
        if form == "around":
            local = lambda parameters: Lookahead(make(parameters), *settings)  # noqa: E731
            optimizer = zero = ZeroRedundancyOptimizer(model.parameters(), local)
        else:
            zero = ZeroRedundancyOptimizer(model.parameters(), make)
            optimizer = Lookahead(zero, *settings)
        return optimizer, zero

    def run(model, optimizer, begin, end):
        history = []
        for step in range(begin, end):
            backward(model, step)
            optimizer.step()
            history.append([whole(one) for one in model.parameters()])
        return history

    model = torch.nn.parallel.DistributedDataParallel(make_model())
    optimizer, zero = make_zero(model)
    history = run(model, optimizer, 0, SAVED_AFTER)
    zero.consolidate_state_dict(to=0)
    received = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(received)
    # PyTorch copies neither when it saves nor when it loads.
    state = {**received[0], "state": copy.deepcopy(received[0]["state"])}
    slow = [state["state"][index]["slow"].clone() for index in range(4)]
    count = int(state["param_groups"][0]["lookahead_step"])
    other_model = torch.nn.parallel.DistributedDataParallel(make_model())
    other_model.load_state_dict(model.state_dict())
    other, _ = make_zero(other_model)
    other.load_state_dict(state)
    resumed = run(other_model, other, SAVED_AFTER, STEPS)
    history += run(model, optimizer, SAVED_AFTER, STEPS)
    return {"history": history, "slow": slow, "count": count, "resumed": resumed}


def first_steps_of_unequal_optimizers():
    """For each difference between the processes, return the error of this process' first step and whether it moved."""
    rank, outcomes = dist.get_rank(), {}
    for name, change in {
        "nothing": lambda optimizer, _: None,
        "period": lambda optimizer, group: group.update(sync_period=3 + rank),
        "step size": lambda optimizer, group: group.update(slow_step_size=0.5 + rank / 4),
        "count": lambda optimizer, group: group.update(lookahead_step=7 * rank),
        # Parts of a pipeline may have settings of their own.
        "period and shape": lambda optimizer, group: group.update(sync_period=3 + rank),
    }.items():
        weights = [torch.nn.Parameter(torch.ones(9 + rank if name == "period and shape" else 9))]
        optimizer = Lookahead(torch.optim.SGD(weights, 0.1))
        change(optimizer, optimizer.param_groups[0])
        weights[0].grad = torch.ones_like(weights[0])
        error = None
        try:
            optimizer.step()
        except RuntimeError as raised:
            error = str(raised)
        outcomes[name] = error, bool((weights[0] != 1).any())
    return outcomes


def two(directory):
    return {
        "unequal": first_steps_of_unequal_optimizers(),
        "data_parallel": {name: data_parallel(name) for name in REPLICATED},
        "fully_sharded": {name: fully_sharded(name) for name in OPTIMIZERS},
        "gathered": evaluated_with_gathered_weights("momentum"),
        "saved": {name: saved(name, directory) for name in CHECKPOINTED},
        "zero_redundancy": {one: zero_redundancy(*one) for one in ZERO_REDUNDANCY},
    }


def load(directory):
    return {name: loaded(name, directory) for name in CHECKPOINTED}


if __name__ == "__main__":
    run, directory, rank, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    join(run, directory, rank, world_size, TIMEOUT)
    torch.save({"two": two, "load": load}[run](directory), directory / f"{run}-{rank}.pt")
    dist.destroy_process_group()
