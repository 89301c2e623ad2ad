"""Records what the original, `tfa.optimizers.Lookahead`, computes and saves: the reference of these tests.

To make `recordings/` again, use a Python 3.11 environment:

    pip install tensorflow==2.15.1 tensorflow-addons==0.23.0
    python tests/test_tf_keras/record_original.py

With `--optimizers` only `recordings/optimizers/` is made. It records the original's `RectifiedAdam` and `AdamW`, bare
and inside the original's `Lookahead`, and the programs of `programs.py` with them. (For a bare optimizer an entry's
`wrapper` is null, and it has no `slow`.) It has the same format. It takes its inputs and batches from the other files.

With `--check` nothing is written. A new process resumes from the existing files.

A list of arrays (weights, or the entries of `get_weights()`) is stored flat: each array is raveled, then all are
concatenated. `recordings/index.json` describes the runs. An entry of `trajectories` can be run again from data alone:

- `name`; `inner` (`class_name`, and a `config` for that class' `from_config`); `wrapper` (keyword arguments); `dtype`;
- `inputs`: in `trajectories.npz` the arrays `inputs/<inputs>/weight/<i>` are the initial weights, and the arrays
  `inputs/<inputs>/gradient/<i>` are the gradients. The first axis of a gradient is the step. A weight whose number is
  in `sparse` has `.../gradient/<i>/values` and `.../gradient/<i>/indices` instead, for a `tf.IndexedSlices`;
- `<name>/fast` and `<name>/slow`: the flat weights after every step, a row for each step. `<name>/state`: the flat
  `get_weights()`, in the weights' dtype, after the steps `state_steps` (counted from 1). `state` lists its entries:
  `[name of the variable, shape, dtype]`.

An entry of `models` describes the folder of that name. The original trained a small model for `stopped_after` batches,
saved it in the files that `files` names, and trained on. `model_data.npz` has the batches, `x` and `y`, and the initial
weights, `initial/<i>`. `continuation.npz` has `fast` and `slow` (a row for every further step), `state` (after the last
step), and `stopped/fast`, `stopped/slow`, `stopped/state` for the moment when the files were written.

`continuation_without_state.npz` continues from the same weights with a new optimizer. The original can do no more from
`weights.h5`, which has no optimizer in it, and with `load_model` from a SavedModel: there Keras 2 restores no slots of
a legacy optimizer. `load_weights` restores them from the SavedModel's `variables/variables`.

After restoring a checkpoint the original lists its weights in the order of the restoration, in which it creates them.
So the order is not the order of `state`.
"""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

from programs import write_those_of_the_original

RECORDINGS = Path(__file__).parent / "recordings"
OPTIMIZERS = RECORDINGS / "optimizers"
VERSIONS = {"tensorflow": tf.__version__, "tensorflow_addons": tfa.__version__}
STEPS = 13
STATE_STEPS = [7, 13]
STOPPED_AFTER = 8
FURTHER_STEPS = 9
SPARSE_ROWS = 6

SETTINGS = {
    "sgd": ("SGD", {"learning_rate": 0.1}),
    "sgd_momentum": ("SGD", {"learning_rate": 0.05, "momentum": 0.9}),
    "sgd_nesterov": ("SGD", {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"learning_rate": 0.05}),
    "amsgrad": ("Adam", {"learning_rate": 0.05, "amsgrad": True}),
    "rmsprop": ("RMSprop", {"learning_rate": 0.02}),
    "rmsprop_centered": ("RMSprop", {"learning_rate": 0.02, "momentum": 0.9, "centered": True}),
    "adagrad": ("Adagrad", {"learning_rate": 0.1}),
    "adadelta": ("Adadelta", {"learning_rate": 1.0}),
    "adamax": ("Adamax", {"learning_rate": 0.05}),
    "nadam": ("Nadam", {"learning_rate": 0.05}),
    "ftrl": ("Ftrl", {"learning_rate": 0.2, "l1_regularization_strength": 0.01, "l2_regularization_strength": 0.01}),
}
SCHEDULES = {
    "exponential": ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 4, "decay_rate": 0.7}),
    "piecewise": ("PiecewiseConstantDecay", {"boundaries": [3, 8], "values": [0.1, 0.04, 0.01]}),
}
DEFAULT = {"sync_period": 5, "slow_step_size": 0.5}


def schedule(name: str, **changed) -> dict:
    class_name, config = SCHEDULES[name]
    return {
        "module": "keras.optimizers.schedules",
        "class_name": class_name,
        "config": {**config, **changed},
        "registered_name": None,
    }


RATE = {"learning_rate": 0.05}
OPTIMIZER_SETTINGS = {
    "rectified_adam": ("RectifiedAdam", RATE),
    "rectified_adam_defaults": ("RectifiedAdam", {}),
    "rectified_adam_short_memory": ("RectifiedAdam", {**RATE, "beta_1": 0.8, "beta_2": 0.98, "epsilon": 1e-3}),
    "rectified_adam_amsgrad": ("RectifiedAdam", {**RATE, "beta_2": 0.9, "amsgrad": True}),
    "rectified_adam_weight_decay": ("RectifiedAdam", {**RATE, "weight_decay": 0.1}),
    "rectified_adam_threshold": ("RectifiedAdam", {**RATE, "sma_threshold": 8.0}),
    "rectified_adam_warm_up": ("RectifiedAdam", {**RATE, "total_steps": 10, "warmup_proportion": 0.3, "min_lr": 0.002}),
    "rectified_adam_decay": ("RectifiedAdam", {**RATE, "decay": 0.2}),
    "rectified_adam_schedules": (
        "RectifiedAdam",
        {
            "learning_rate": schedule("piecewise"),
            "weight_decay": schedule("exponential", initial_learning_rate=0.3),
            "total_steps": 12,
            "min_lr": 0.001,
        },
    ),
    "adamw": ("AdamW", {**RATE, "weight_decay": 0.02}),
    "adamw_amsgrad": ("AdamW", {**RATE, "weight_decay": 0.02, "beta_2": 0.9, "amsgrad": True}),
    "adamw_decay": ("AdamW", {**RATE, "weight_decay": 0.02, "decay": 0.2}),
    "adamw_schedules": (
        "AdamW",
        {
            "learning_rate": schedule("exponential"),
            "weight_decay": schedule("exponential", initial_learning_rate=0.05),
        },
    ),
}


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20231113)
    arrays = {}
    shapes = [(3, 4), (5,), ()]
    weights = [rng.normal(size=shape) for shape in shapes]
    gradients = [rng.normal(size=(STEPS, *shape)) for shape in shapes]
    for dtype in ("float16", "float32", "float64"):
        for i, (weight, gradient) in enumerate(zip(weights, gradients)):
            arrays[f"inputs/dense_{dtype}/weight/{i}"] = weight.astype(dtype)
            arrays[f"inputs/dense_{dtype}/gradient/{i}"] = gradient.astype(dtype)
    embedding, dense = rng.normal(size=(7, 3)), rng.normal(size=(4,))
    values, gradient = rng.normal(size=(STEPS, SPARSE_ROWS, 3)), rng.normal(size=(STEPS, 4))
    indices = rng.integers(0, 7, size=(STEPS, SPARSE_ROWS))
    indices[:, -1] = indices[:, 0]
    arrays["inputs/sparse_float32/gradient/0/indices"] = indices
    for key, value in {
        "weight/0": embedding,
        "weight/1": dense,
        "gradient/0/values": values,
        "gradient/1": gradient,
    }.items():
        arrays[f"inputs/sparse_float32/{key}"] = value.astype("float32")
    return arrays


def planned_trajectories() -> list[dict]:
    """Return everything that describes the runs, before they are made."""
    plan = []

    def add(name, setting, wrapper, inputs="dense", dtype="float32", **config):
        class_name, kwargs = SETTINGS[setting]
        plan.append(
            {
                "name": f"{setting}-{name}",
                "inner": {"class_name": class_name, "config": {**kwargs, **config}},
                "wrapper": wrapper,
                "dtype": dtype,
                "inputs": f"{inputs}_{dtype}",
                "sparse": [0] if inputs == "sparse" else [],
            }
        )

    for setting in SETTINGS:
        for sync_period, slow_step_size in [(5, 0.5), (3, 0.8), (1, 0.5)]:
            wrapper = {"sync_period": sync_period, "slow_step_size": slow_step_size}
            add(f"k{sync_period}-a{slow_step_size}", setting, wrapper)
        add("defaults", setting, {})
        add("sparse", setting, DEFAULT, inputs="sparse")
        add("float64", setting, DEFAULT, dtype="float64")
    for setting in ("sgd", "sgd_momentum", "sgd_nesterov", "adagrad"):
        add("float16", setting, DEFAULT, dtype="float16")
    for setting in ("adam", "rmsprop", "adadelta"):
        add("float16", setting, DEFAULT, dtype="float16", epsilon=1e-3)
    for setting in ("sgd_momentum", "adam"):
        for clipping in ({"clipnorm": 0.7}, {"clipvalue": 0.4}, {"global_clipnorm": 1.5}):
            (kind,) = clipping
            add(kind, setting, {**DEFAULT, **clipping})
            add(f"{kind}-sparse", setting, {**DEFAULT, **clipping}, inputs="sparse")
    for setting in ("sgd", "sgd_momentum", "adam", "rmsprop", "ftrl"):
        for schedule, (class_name, config) in SCHEDULES.items():
            serialized = {"module": "keras.optimizers.schedules", "class_name": class_name, "config": config}
            add(schedule, setting, DEFAULT, learning_rate={**serialized, "registered_name": None})
    for setting in SETTINGS:
        if setting != "nadam":  # there, `decay` is not the learning rate's
            add("decay", setting, DEFAULT, decay=0.2)
    return plan


def planned_optimizer_trajectories() -> list[dict]:
    plan = []

    def add(name, setting, wrapper, inputs="dense", dtype="float32", **config):
        class_name, kwargs = OPTIMIZER_SETTINGS[setting]
        plan.append(
            {
                "name": f"{setting}-{name}-{'bare' if wrapper is None else 'wrapped'}",
                "inner": {"class_name": class_name, "config": {**kwargs, **config}},
                "wrapper": wrapper,
                "dtype": dtype,
                "inputs": f"{inputs}_{dtype}",
                "sparse": [0] if inputs == "sparse" else [],
            }
        )

    for wrapper in (None, DEFAULT):
        for setting in OPTIMIZER_SETTINGS:
            add("dense", setting, wrapper)
            add("sparse", setting, wrapper, inputs="sparse")
            add("float64", setting, wrapper, dtype="float64")
        for setting in ("rectified_adam_short_memory", "adamw"):
            add("float16", setting, wrapper, dtype="float16", epsilon=1e-3)
        for setting in ("rectified_adam", "adamw"):
            for clipping in ({"clipnorm": 0.7}, {"clipvalue": 0.4}, {"global_clipnorm": 1.5}):
                # The original ignores the clipping of an inner optimizer.
                own, outer = ({}, {**wrapper, **clipping}) if wrapper else (clipping, None)
                add(*clipping, setting, outer, **own)
                add(f"{next(iter(clipping))}-sparse", setting, outer, inputs="sparse", **own)
    # Inside its Lookahead, the original also decays excluded variables.
    add("excluded", "adamw", None, exclude_from_weight_decay=["weight_1", "weight_2:0$"])
    return plan


def make_optimizer(inner: dict, wrapper: dict | None):
    own = inner["class_name"] in ("RectifiedAdam", "AdamW")
    inner_class = getattr(tfa.optimizers if own else tf.keras.optimizers.legacy, inner["class_name"])
    optimizer = inner_class.from_config(copy.deepcopy(inner["config"]))
    return optimizer if wrapper is None else tfa.optimizers.Lookahead(optimizer, **wrapper)


def run_trajectory(run: dict, inputs: dict[str, np.ndarray], traced: bool) -> dict[str, np.ndarray]:
    prefix = f"inputs/{run['inputs']}"
    count = sum(key.startswith(f"{prefix}/weight/") for key in inputs)
    variables = [tf.Variable(inputs[f"{prefix}/weight/{i}"], name=f"weight_{i}") for i in range(count)]
    optimizer = make_optimizer(run["inner"], run["wrapper"])

    def gradient_at(step, i):
        key = f"{prefix}/gradient/{i}"
        if i not in run["sparse"]:
            return tf.constant(inputs[key][step])
        values, indices = inputs[f"{key}/values"][step], inputs[f"{key}/indices"][step]
        return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant(variables[i].shape))

    def apply(gradients):
        optimizer.apply_gradients(zip(gradients, variables))

    if traced:
        apply = tf.function(apply)
    fast, slow, state = [], [], []
    for step in range(STEPS):
        apply([gradient_at(step, i) for i in range(count)])
        fast.append(flat([variable.numpy() for variable in variables]))
        if run["wrapper"] is not None:
            slow.append(flat([optimizer.get_slot(variable, "slow").numpy() for variable in variables]))
        if step + 1 in STATE_STEPS:
            state.append(flat(optimizer.get_weights()))
    run["state_steps"] = STATE_STEPS
    run["state"] = described(optimizer)
    recorded = {"fast": fast, "slow": slow, "state": state}
    return {
        f"{run['name']}/{key}": np.stack(rows).astype(run["dtype"], casting="same_kind")
        for key, rows in recorded.items()
        if rows
    }


def flat(values: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in values])


def described(optimizer: tfa.optimizers.Lookahead) -> list[tuple]:
    return [(variable.name, variable.shape.as_list(), variable.dtype.name) for variable in optimizer.weights]


def record_trajectories(plan: list[dict], arrays: dict[str, np.ndarray], path: Path) -> tuple[list[dict], list[dict]]:
    inputs, arrays = arrays, ({} if path.parent == OPTIMIZERS else arrays)
    recorded, refused = [], []
    largest = 0.0
    for run in plan:
        try:
            eager = run_trajectory(run, inputs, traced=False)
        except KeyError as error:
            refused.append({**run, "error": type(error).__name__})
            continue
        graph = run_trajectory(run, inputs, traced=True)
        for key, value in eager.items():
            assert np.isfinite(value).all(), key
            ulps = np.abs(value - graph[key]) / np.spacing(np.maximum(np.abs(value), value.dtype.type(1e-3)))
            largest = max(largest, float(ulps.max()))
        arrays.update(eager)
        recorded.append(run)
    print(f"{len(recorded)} trajectories; tf.function differs by at most {largest} units in the last place")
    np.savez_compressed(path, **arrays)
    return recorded, refused


def make_model_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20231114)
    steps = STOPPED_AFTER + FURTHER_STEPS
    data = {"x": rng.normal(size=(steps, 8, 4)), "y": rng.normal(size=(steps, 8, 1))}
    for i, shape in enumerate([(4, 3), (3,), (3, 1), (1,)]):
        data[f"initial/{i}"] = rng.normal(size=shape)
    return {key: value.astype("float32") for key, value in data.items()}


def make_model(inner: dict, wrapper: dict, weights: list[np.ndarray]) -> tf.keras.Model:
    tf.keras.backend.clear_session()
    model = tf.keras.Sequential(
        [
            tf.keras.Input((4,), name="features"),
            tf.keras.layers.Dense(3, activation="tanh", name="hidden"),
            tf.keras.layers.Dense(1, name="prediction"),
        ],
        name="small",
    )
    model.set_weights(weights)
    model.compile(make_optimizer(inner, wrapper), "mse")
    return model


def snapshot(model: tf.keras.Model) -> dict[str, np.ndarray]:
    optimizer, variables = model.optimizer, model.trainable_variables
    wrapped = isinstance(optimizer, tfa.optimizers.Lookahead)
    slow = [optimizer.get_slot(variable, "slow").numpy() for variable in variables if wrapped]
    state = flat(optimizer.get_weights()).astype("float32")
    return {"fast": flat(model.get_weights()), "slow": flat([[], *slow]), "state": state}


def train_on(model: tf.keras.Model, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the further steps, recorded as in `continuation.npz`, without its `stopped`."""
    fast, slow = [], []
    for step in range(STOPPED_AFTER, STOPPED_AFTER + FURTHER_STEPS):
        model.train_on_batch(data["x"][step], data["y"][step])
        now = snapshot(model)
        fast.append(now["fast"])
        slow.append(now["slow"])
    return {"fast": np.stack(fast), "slow": np.stack(slow), "state": now["state"]}


def save_model(model: tf.keras.Model, folder: Path, every_format: bool) -> dict[str, str]:
    """Write the files, and return their names by kind."""
    files = {"h5": "model.h5", "checkpoint": "ckpt", "config": "optimizer.json"}
    model.save(folder / "model.h5")
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "ckpt"))
    config = tf.keras.optimizers.serialize(model.optimizer)
    (folder / "optimizer.json").write_text(json.dumps(config, indent=1, default=float) + "\n")
    if every_format:
        files.update(saved_model="saved_model", saved_model_weights="saved_model/variables/variables")
        files.update(weights="weights", weights_h5="weights.h5")
        model.save(folder / "saved_model", save_format="tf")
        model.save_weights(folder / "weights", save_format="tf")
        model.save_weights(folder / "weights.h5")
    return files


def record_model(
    folder: Path, setting: tuple[str, dict], wrapper: dict | None, every_format: bool, data: dict[str, np.ndarray]
) -> dict:
    folder.mkdir()
    class_name, config = setting
    inner = {"class_name": class_name, "config": config}
    model = make_model(inner, wrapper, [data[f"initial/{i}"] for i in range(4)])
    for step in range(STOPPED_AFTER):
        model.train_on_batch(data["x"][step], data["y"][step])
    files = save_model(model, folder, every_format)
    weights = model.get_weights()
    stopped = {f"stopped/{key}": value for key, value in snapshot(model).items()}
    np.savez_compressed(folder / "continuation.npz", **train_on(model, data), **stopped)
    state = described(model.optimizer)
    if "weights_h5" in files:
        new = make_model(inner, wrapper, weights)
        np.savez_compressed(folder / "continuation_without_state.npz", **train_on(new, data))
    return {
        "inner": inner,
        "wrapper": wrapper,
        "files": files,
        "stopped_after": STOPPED_AFTER,
        "state": state,
    }


def resume(kind: str, path: Path, entry: dict) -> tf.keras.Model:
    if kind in ("h5", "saved_model"):
        # The name of an inner optimizer in an `.h5` file lacks the package, so that it is not found without this.
        known = {name: getattr(tfa.optimizers, name) for name in ("RectifiedAdam", "AdamW")}
        return tf.keras.models.load_model(path, custom_objects=known)
    model = make_model(entry["inner"], entry["wrapper"], [np.zeros(s, "float32") for s in [(4, 3), (3,), (3, 1), (1,)]])
    if kind == "config":
        config = json.loads(path.read_text())
        model.compile(tf.keras.optimizers.deserialize(config), "mse")
        assert tf.keras.optimizers.serialize(model.optimizer) == json.loads(path.read_text())
    if kind in ("checkpoint", "config"):
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(path.with_name("ckpt")))
    else:
        model.load_weights(path)
    return model


def without_scope(name: str) -> str:
    return re.sub("^(Lookahead|RectifiedAdam|AdamW)/", "", name)


def check_resumption(models: dict, recordings: Path = RECORDINGS) -> None:
    """Compare every file with the continuation, bit for bit."""
    data = dict(np.load(RECORDINGS / "model_data.npz"))
    for name, entry in models.items():
        for kind, file in entry["files"].items():
            model = resume(kind, recordings / name / file, entry)
            resumed = train_on(model, data)
            names = [without_scope(variable.name) for variable in model.optimizer.weights]
            values = dict(zip(names, model.optimizer.get_weights()))
            in_order = [values[without_scope(variable)] for variable, *_ in entry["state"]]
            same_order = np.array_equal(resumed["state"], flat(in_order))
            resumed["state"] = flat(in_order)
            report = [f"{name} {kind}:"]
            for recording in ("continuation.npz", "continuation_without_state.npz"):
                if (recordings / name / recording).exists():
                    expected = np.load(recordings / name / recording)
                    if all(np.array_equal(value, expected[key]) for key, value in resumed.items()):
                        report.append(f"exactly {recording}")
            if len(report) == 1:
                report.append("as neither continuation")
            print(*report, "" if same_order else "(get_weights() in another order)")


def json_lines(index: dict) -> str:
    """Return JSON with one line for every run."""
    parts = []
    for key, value in index.items():
        items = [json.dumps(item) for item in value] if isinstance(value, list) else []
        if isinstance(value, dict):
            items = [f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()]
        opening, closing = "[]" if isinstance(value, list) else "{}"
        parts.append(f"{json.dumps(key)}: {opening}\n" + ",\n".join(items) + f"\n{closing}")
    return "{\n" + ",\n".join(parts) + "\n}"


def record_optimizers() -> None:
    shutil.rmtree(OPTIMIZERS, ignore_errors=True)
    OPTIMIZERS.mkdir()
    inputs, data = (dict(np.load(RECORDINGS / f"{name}.npz")) for name in ("trajectories", "model_data"))
    recorded, refused = record_trajectories(planned_optimizer_trajectories(), inputs, OPTIMIZERS / "trajectories.npz")
    models = {}
    for name in ("rectified_adam_weight_decay", "adamw"):
        for kind, wrapper in (("bare", None), ("wrapped", DEFAULT)):
            setting = OPTIMIZER_SETTINGS[name]
            models[f"{name}-{kind}"] = record_model(OPTIMIZERS / f"{name}-{kind}", setting, wrapper, True, data)
    index = {"trajectories": recorded, "refused_by_the_original": refused, "models": models}
    (OPTIMIZERS / "index.json").write_text(json_lines({"versions": VERSIONS, **index}) + "\n")
    (OPTIMIZERS / "programs").mkdir()
    write_those_of_the_original(OPTIMIZERS / "programs")
    check_resumption(models, OPTIMIZERS)


def main() -> None:
    if "--check" in sys.argv:
        for recordings in (RECORDINGS, OPTIMIZERS):
            check_resumption(json.loads((recordings / "index.json").read_text())["models"], recordings)
        return
    if "--optimizers" in sys.argv:
        record_optimizers()
        return
    shutil.rmtree(RECORDINGS, ignore_errors=True)
    RECORDINGS.mkdir()
    recorded, refused = record_trajectories(planned_trajectories(), make_inputs(), RECORDINGS / "trajectories.npz")
    data = make_model_data()
    np.savez_compressed(RECORDINGS / "model_data.npz", **data)
    models = {
        name: record_model(RECORDINGS / name, setting, DEFAULT, name == "adam", data)
        for name, setting in SETTINGS.items()
    }
    index = {
        "versions": VERSIONS,
        "trajectories": recorded,
        "refused_by_the_original": refused,
        "models": models,
    }
    (RECORDINGS / "index.json").write_text(json_lines(index) + "\n")
    check_resumption(models)
    record_optimizers()


if __name__ == "__main__":
    main()
