"""Programs of PyTorch, and its peers. Peers that are not installed are left out."""

import importlib.metadata
import importlib.util

import torch

import models
from lookahead_optim.torch import Lookahead
from timing import Program

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEERS = ("timm", "pytorch_optimizer", "torch_optimizer")


def versions():
    """Return the packages whose versions matter."""
    return ["torch", *PEERS]


def inner_optimizer(case, weights):
    options = {"fused": True} if case.mode.endswith("fused") else {"foreach": True}
    if case.inner == "Adam":
        return torch.optim.AdamW(weights, 1e-3, **options)
    return torch.optim.SGD(weights, 1e-3, momentum=0.9 if case.inner == "momentum" else 0, **options)


def _peer(name):
    package = importlib.metadata.distribution(name)
    if name != "timm":
        return importlib.import_module(name).Lookahead
    # The module alone: the package needs torchvision, of which there is no build for every PyTorch.
    path = package.locate_file("timm/optim/lookahead.py")
    spec = importlib.util.spec_from_file_location("timm_lookahead", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


def optimizers(case):
    """Return functions of the weights that make the optimizers to compare, by name; the bare one comes first."""
    made = {
        "bare": lambda weights: inner_optimizer(case, weights),
        "lookahead-optim": lambda weights: Lookahead(inner_optimizer(case, weights), case.period),
    }
    if case.mode.endswith("compiled"):
        # Otherwise the compiler would give up in silence after a few cases, and run steps as they are.
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return made
    for name in PEERS:
        try:
            peer = _peer(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        made[name] = lambda weights, peer=peer: peer(inner_optimizer(case, weights), k=case.period, alpha=0.5)
    return made


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step_program(case, make):
    """Return the program of the optimizer's step alone."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (case.side, case.side)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator, device=DEVICE)) for _ in range(case.weights)]
    for weight in weights:
        weight.grad = torch.randn(shape, generator=generator, device=DEVICE)
    optimizer = make(weights)
    step = torch.compile(optimizer.step) if case.mode.endswith("compiled") else optimizer.step
    return Program(step, wait)


def training_program(case, make):
    """Return the program of a training loop."""
    model, x, y = models.of_torch(case.model, DEVICE)
    optimizer = make(list(model.parameters()))
    compiled = case.mode.endswith("compiled")
    forward, update = (torch.compile(model), torch.compile(optimizer.step)) if compiled else (model, optimizer.step)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(x).flatten(0, -2), y.flatten()).backward()
        update()

    return Program(step, wait)
