"""Programs of PyTorch: this library, and the peers that are installed."""

import importlib.metadata
import importlib.util

import torch

import models
from cases import OUTER_STEP
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
    # Load this module alone. The package needs torchvision, which has no build for some versions of PyTorch.
    path = package.locate_file("timm/optim/lookahead.py")
    spec = importlib.util.spec_from_file_location("timm_lookahead", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


def optimizers(case):
    """Return functions that take weights and make the optimizers to compare, by name. The bare optimizer is first."""
    made = {
        "bare": lambda weights: inner_optimizer(case, weights),
        "lookahead-optim": lambda weights: Lookahead(inner_optimizer(case, weights), case.period),
    }
    if case.kind == "outer":
        return {**made, **_outer_optimizers(case)}
    if case.mode.endswith("compiled"):
        # By default, after a few cases the compiler would silently stop compiling and run steps as they are.
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


def _outer_optimizers(case):
    """Return the forms of the outer step."""
    momentum, wide = OUTER_STEP, {"slow_dtype": torch.float32}
    # The cost of a sync for workers, without the communication.
    alone = {**momentum, "reduce": lambda pseudo_gradients: None}
    forms = {"lookahead-optim, momentum": momentum, "lookahead-optim, momentum, reduce": alone}
    if case.dtype != "float32":
        forms |= {"lookahead-optim, float32": wide, "lookahead-optim, momentum, float32": {**momentum, **wide}}

    def made(form):
        return lambda weights: Lookahead(inner_optimizer(case, weights), case.period, **form)

    return {**{name: made(form) for name, form in forms.items()}, "SGD by hand": lambda weights: ByHand(case, weights)}


class ByHand:
    """PyTorch's SGD with Nesterov's momentum on the slow weights, written as in training scripts."""

    def __init__(self, case, weights):
        self.fast, self.period, self.steps = weights, case.period, 0
        self.slow = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
        self.inner = inner_optimizer(case, weights)
        lr, momentum = OUTER_STEP.values()
        self.outer = torch.optim.SGD(self.slow, lr, momentum=momentum, nesterov=True, foreach=True)

    @torch.no_grad()
    def step(self):
        self.inner.step()
        self.steps += 1
        if self.steps % self.period == 0:
            for slow, fast in zip(self.slow, self.fast):
                slow.grad = slow - fast
            self.outer.step()
            self.outer.zero_grad()
            torch._foreach_copy_(self.fast, self.slow)


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step_program(case, make):
    """Return the program of the optimizer's step alone."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def array():
        return torch.randn((case.side, case.side), generator=generator, device=DEVICE).to(dtype)

    weights = [torch.nn.Parameter(array()) for _ in range(case.weights)]
    for weight in weights:
        weight.grad = array()
    optimizer = make(weights)
    step = torch.compile(optimizer.step) if case.mode.endswith("compiled") else optimizer.step
    return Program(step, wait)


def training_program(case, make):
    """Return a program that trains in a loop written by hand."""
    model, x, y = models.of_torch(case.model, DEVICE)
    optimizer = make(list(model.parameters()))
    compiled = case.mode.endswith("compiled")
    forward, update = (torch.compile(model), torch.compile(optimizer.step)) if compiled else (model, optimizer.step)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(x).flatten(0, -2), y.flatten()).backward()
        update()

    return Program(step, wait)
