"""The training runs of test_orbax.py, and the processes in which they are stopped and resumed.

python -m tests.test_optax.orbax_worker COMMAND DIRECTORY

killed     saves after every step, and is killed in the middle of a save
resumed    resumes all runs that were saved there
resharded  resumes the run that was saved from four devices on those that it has
"""

import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookahead_optim.optax import lookahead, slow_params

STEPS = 10
SAVED_AFTER = range(5)
KILLED_IN = 7
MASK = {"w": True, "b": False}

OPTIMIZERS = {
    "momentum": lookahead(optax.sgd(0.05, momentum=0.9, nesterov=True), 4),
    "adam": lookahead(optax.adam(0.05), 4, optax.linear_schedule(0.8, 0.2, 3)),
    "nested": lookahead(lookahead(optax.adam(0.05), 2), 4, 0.8),
    "chain": optax.chain(
        optax.clip(0.5), lookahead(optax.sgd(optax.linear_schedule(0.1, 0.01, 9)), 4), optax.scale(0.9)
    ),
    "masked": optax.masked(lookahead(optax.adam(0.05), 4), MASK),
    "multi_steps": optax.MultiSteps(lookahead(optax.adam(0.05), 2), 2).gradient_transformation(),
    "slow_momentum": lookahead(optax.adam(0.05), 4, 0.7, slow_momentum=0.6),
    "wide": lookahead(optax.adam(0.05), 4, 0.7, slow_momentum=0.6, slow_dtype="float32"),
    "outer": lookahead(
        optax.adam(0.05), 4, outer=optax.sgd(optax.linear_schedule(0.8, 0.2, 3), momentum=0.6, nesterov=True)
    ),
    "injected": optax.inject_hyperparams(lookahead)(optax.sgd(0.05, momentum=0.9), sync_period=4, slow_step_size=0.7),
}


def start(name):
    params = make_params(dtype="bfloat16" if name == "wide" else "float32")
    return {"params": params, "state": OPTIMIZERS[name].init(params), "steps": jnp.zeros((), jnp.int32)}


def make_params(dtype="float32"):
    rng = np.random.default_rng(0)
    return {"w": jnp.array(rng.normal(size=(8, 4)), dtype), "b": jnp.array(rng.normal(size=4), dtype)}


def loss(params, inputs, labels):
    return jnp.mean((jnp.tanh(inputs @ params["w"]) + params["b"] - labels) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def step(name, run, inputs, labels):
    grads = jax.grad(loss)(run["params"], inputs, labels)
    updates, state = OPTIMIZERS[name].update(grads, run["state"], run["params"])
    return {"params": optax.apply_updates(run["params"], updates), "state": state, "steps": run["steps"] + 1}


def train(name, run, end=STEPS):
    while run["steps"] < end:
        rng = np.random.default_rng(100 + int(run["steps"]))
        run = step(name, run, *(rng.normal(size=(6, size)).astype("float32") for size in (8, 4)))
    return run


def start_all():
    return {name: start(name) for name in OPTIMIZERS}


def train_all(runs, end=STEPS):
    return {name: train(name, run, end) for name, run in runs.items()}


# With momentum: one weight is in half precision, and its slow weight is in float32.
SHARDED = lookahead(optax.adam(0.05), 4, 0.3, slow_momentum=0.6, slow_dtype="float32")


def on_all_devices(tree):
    """Place arrays in equal parts on all devices, and scalars on each device."""
    mesh = Mesh(jax.devices(), "device")
    sharding = {False: PartitionSpec(), True: PartitionSpec("device")}
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, sharding[leaf.ndim > 0])), tree)


def start_sharded():
    params = make_params() | {"b": make_params("bfloat16")["b"]}
    return on_all_devices((params, SHARDED.init(params)))


def train_sharded(params, state, steps):
    update = jax.jit(SHARDED.apply_gradients)
    for index in steps:
        numbers = np.random.default_rng(index).normal(size=(8, 4)).astype("float32")
        grads = {"w": numbers, "b": numbers[0].astype(params["b"].dtype)}
        params, state = update(on_all_devices(grads), state, params)
    return params, state


def saved_leaves(tree):
    """Return the leaves as NumPy saves them: NumPy has no bfloat16."""
    return [np.asarray(leaf, "float32" if leaf.dtype == "bfloat16" else None) for leaf in jax.tree.leaves(tree)]


def like(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def write(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def read(path, tree):
    """Restore a tree with the structure of another tree."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like(tree))


class Notes(ocp.CheckpointHandler):
    """Writes a file beside the arrays, and stops during one save."""

    def save(self, directory, args):
        path = directory / "notes.txt"
        path.write_text("half of")
        if args.steps == KILLED_IN:
            (Path(args.directory) / "reached").touch()
            time.sleep(120)
            sys.exit("not killed")
        path.write_text("half of it, and the rest")

    def restore(self, directory, args):
        return (directory / "notes.txt").read_text()


@ocp.args.register_with_handler(Notes, for_save=True, for_restore=True)
class NotesArgs(ocp.args.CheckpointArgs):
    def __init__(self, steps, directory):
        self.steps, self.directory = steps, directory


def killed(directory):
    run = start("adam")
    with ocp.CheckpointManager(directory / "manager") as manager:
        while run["steps"] < KILLED_IN:
            run = train("adam", run, int(run["steps"]) + 1)
            notes = NotesArgs(int(run["steps"]), str(directory))
            manager.save(int(run["steps"]), args=ocp.args.Composite(run=ocp.args.StandardSave(run), notes=notes))


def resumed(directory):
    for position in SAVED_AFTER:
        runs = read(directory / f"saved-{position}", start_all())
        write(directory / f"resumed-{position}", train_all(runs))

    with ocp.CheckpointManager(directory / "manager") as manager:
        latest = manager.latest_step()
        restore = ocp.args.StandardRestore(like(start("adam")))
        run = manager.restore(latest, args=ocp.args.Composite(run=restore))["run"]
    write(directory / "resumed-killed", {"from": np.array(latest), "run": train("adam", run)})


def resharded(directory):
    run = read(directory / "sharded", start_sharded())
    params, state = train_sharded(*run, range(6, 15))
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(state.slow_params)))
    np.savez(
        directory / f"resharded-{jax.device_count()}.npz",
        *saved_leaves((params, state, slow_params(state, params))),
        devices=[len(one.addressable_shards) for pair in pairs for one in pair],
        alike=[slow.sharding.is_equivalent_to(param.sharding, param.ndim) for param, slow in pairs],
    )


if __name__ == "__main__":
    {"killed": killed, "resumed": resumed, "resharded": resharded}[sys.argv[1]](Path(sys.argv[2]))
