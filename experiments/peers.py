"""What other implementations of Lookahead compute, beside this one: run in each environment that has some of them.

python experiments/peers.py experiments/results [CODE]    adds what is installed here to peers.json, and draws the table

CODE is a file with the paper's own PyTorch code, which is no package: lookahead_pytorch.py of its repository.

Four questions to each, all with SGD: at which steps it syncs; what weights that were loaded after its construction
become; whether a run that stops in mid-cycle goes on as if it had not; what happens to a weight without a gradient.
"""

import copy
import importlib.metadata
import importlib.util
import json
import pickle
import sys
from pathlib import Path

PERIOD, STEP_SIZE, RATE = 5, 0.5, 0.1


def module_of(path):
    """Return the module in a file, without the package around it."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def torch_peers(papers_code):
    """Return functions that wrap an optimizer of PyTorch, by name."""
    import pytorch_optimizer
    import torch_optimizer

    from lookahead_optim.torch import Lookahead

    # The package needs torchvision, of which there is no build for every PyTorch.
    timm = module_of(importlib.metadata.distribution("timm").locate_file("timm/optim/lookahead.py"))
    found = {
        "timm": lambda inner: timm.Lookahead(inner, alpha=STEP_SIZE, k=PERIOD),
        "pytorch_optimizer": lambda inner: pytorch_optimizer.Lookahead(inner, k=PERIOD, alpha=STEP_SIZE),
        "torch_optimizer": lambda inner: torch_optimizer.Lookahead(inner, k=PERIOD, alpha=STEP_SIZE),
    }
    if papers_code:
        papers = module_of(papers_code)
        found["the paper's code"] = lambda inner: papers.Lookahead(inner, PERIOD, STEP_SIZE)
    return {**found, "lookahead_optim.torch": lambda inner: Lookahead(inner, PERIOD, STEP_SIZE)}


def of_torch(wrap, first_sync=PERIOD):
    """Return the answers of an implementation for PyTorch, which syncs at this step and after each period."""
    import torch

    def new(value=1.0):
        weight = torch.nn.Parameter(torch.tensor([value]))
        return weight, wrap(torch.optim.SGD([weight], lr=RATE))

    def steps(weight, optimizer, count):
        path = []
        for _ in range(count):
            weight.grad = torch.ones(1)
            optimizer.step()
            path.append(round(float(weight), 6))
        return path

    def loaded_later():
        weight, optimizer = new()
        with torch.no_grad():
            weight.fill_(5.0)
        return steps(weight, optimizer, PERIOD)[-1]

    def resumed():
        weight, optimizer = new()
        steps(weight, optimizer, 8)
        saved, value = copy.deepcopy(optimizer.state_dict()), float(weight)
        unbroken = steps(weight, optimizer, 4)[-1]
        again, other = new(value)
        other.load_state_dict(saved)
        return round(abs(steps(again, other, 4)[-1] - unbroken), 6)

    def without_gradient():
        trained, idle = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        optimizer = wrap(torch.optim.SGD([trained, idle], lr=RATE))
        for step in range(2 * PERIOD):
            trained.grad = torch.ones(1)
            # It has one in all steps but those that sync.
            idle.grad = None if (step + 1 - first_sync) % PERIOD == 0 else torch.ones(1)
            optimizer.step()
        return round(float(idle), 6)

    return {
        "path": lambda: steps(*new(), 2 * PERIOD),
        "loaded_later": loaded_later,
        "resumed": resumed,
        "without_gradient": without_gradient,
    }


def of_optax(ours):
    """Return the answers of `optax.lookahead` or of this library's front end."""
    import jax.numpy as jnp
    import optax

    from lookahead_optim.optax import lookahead

    inner = optax.sgd(RATE)
    optimizer = lookahead(inner, PERIOD, STEP_SIZE) if ours else optax.lookahead(inner, PERIOD, STEP_SIZE)

    def new(value=1.0):
        params = jnp.float32(value)
        params = params if ours else optax.LookaheadParams.init_synced(params)
        return params, optimizer.init(params)

    def steps(params, state, count):
        path = []
        for _ in range(count):
            updates, state = optimizer.update(jnp.float32(1), state, params)
            params = optax.apply_updates(params, updates)
            path.append(round(float(params if ours else params.fast), 6))
        return path, params, state

    def loaded_later():
        params, state = new()
        params = jnp.float32(5) if ours else optax.LookaheadParams(jnp.float32(5), params.slow)
        return steps(params, state, PERIOD)[0][-1]

    def resumed():
        _, params, state = steps(*new(), 8)
        unbroken = steps(params, state, 4)[0][-1]
        params, state = pickle.loads(pickle.dumps((params, state)))
        return round(abs(steps(params, state, 4)[0][-1] - unbroken), 6)

    return {"path": lambda: steps(*new(), 2 * PERIOD)[0], "loaded_later": loaded_later, "resumed": resumed}


def of_keras_2(wrapper):
    """Return the answers of TensorFlow Addons or of this library's front end for Keras 2."""
    import tensorflow as tf

    from lookahead_optim.tf_keras._keras import keras

    def new(value=1.0):
        return tf.Variable(value), wrapper(keras.optimizers.legacy.SGD(RATE), PERIOD, STEP_SIZE)

    def steps(weight, optimizer, count):
        path = []
        for _ in range(count):
            optimizer.apply_gradients([(tf.constant(1.0), weight)])
            path.append(round(float(weight.numpy()), 6))
        return path

    def loaded_later():
        weight, optimizer = new()
        weight.assign(5.0)
        return steps(weight, optimizer, PERIOD)[-1]

    def resumed():
        weight, optimizer = new()
        steps(weight, optimizer, 8)
        saved, value = optimizer.get_weights(), float(weight.numpy())
        unbroken = steps(weight, optimizer, 4)[-1]
        again, other = new(value)
        other._create_all_weights([again])
        other.set_weights(saved)
        return round(abs(steps(again, other, 4)[-1] - unbroken), 6)

    def without_gradient():
        trained, idle = tf.Variable(1.0), tf.Variable(1.0)
        optimizer = wrapper(keras.optimizers.legacy.SGD(RATE), PERIOD, STEP_SIZE)
        for step in range(2 * PERIOD):
            used = [trained] if (step + 1) % PERIOD == 0 else [trained, idle]
            optimizer.apply_gradients([(tf.constant(1.0), one) for one in used])
        return round(float(idle.numpy()), 6)

    return {
        "path": lambda: steps(*new(), 2 * PERIOD),
        "loaded_later": loaded_later,
        "resumed": resumed,
        "without_gradient": without_gradient,
    }


def answer(questions):
    """Return the answers, or the error's name where there is one."""
    answers = {}
    for name, question in questions.items():
        try:
            answers[name] = question()
        except Exception as error:
            answers[name] = type(error).__name__
    return answers


def table(content):
    """Return the answers as a table in Markdown."""
    names = ("loaded_later", "resumed", "without_gradient")
    rows = []
    for name, found in content["answers"].items():
        steps = [f"{found['path'][step - 1]:g}" for step in (1, PERIOD, PERIOD + 1, 2 * PERIOD)]
        rows.append([name, *steps, *(f"{found.get(one, '-')}" for one in names)])
    steps = [f"after step {step}" for step in (1, PERIOD, PERIOD + 1, 2 * PERIOD)]
    heading = ["", *steps, "loaded later", "resumed, off by", "no gradient at syncs"]
    alignment = ["---", *["---:"] * (len(heading) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, alignment, *rows])


def main(folder, papers_code=None):
    """Ask all that is installed in this environment."""
    if not Path(folder).is_dir():
        raise SystemExit(__doc__)
    path = Path(folder) / "peers.json"
    content = json.loads(path.read_text()) if path.exists() else {"answers": {}, "versions": {}}
    asked = {}
    if importlib.util.find_spec("tensorflow_addons"):
        import tensorflow_addons

        from lookahead_optim.tf_keras import Lookahead

        asked["TensorFlow Addons"] = of_keras_2(tensorflow_addons.optimizers.Lookahead)
        asked["lookahead_optim.tf_keras"] = of_keras_2(Lookahead)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("timm"):
        for name, wrap in torch_peers(papers_code).items():
            asked[name] = of_torch(wrap, first_sync=1 if name == "torch_optimizer" else PERIOD)
    if importlib.util.find_spec("optax"):
        asked |= {"optax.lookahead": of_optax(False), "lookahead_optim.optax": of_optax(True)}
    content["answers"] |= {name: answer(questions) for name, questions in asked.items()}
    for name in ("timm", "pytorch_optimizer", "torch_optimizer", "optax", "tensorflow-addons", "torch"):
        try:
            content["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    content["answers"] = dict(sorted(content["answers"].items(), key=lambda item: item[0].lower()))
    path.write_text(json.dumps(content, indent=1) + "\n")
    drawn = Path(__file__).resolve().parent.parent / "docs" / "experiments" / "drawn"
    (drawn / "peers.md").write_text(table(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
