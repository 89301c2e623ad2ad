"""The training runs of test_resume.py, and the processes in which they are stopped and resumed.

python -m tests.test_torch.stopped_runs COMMAND DIRECTORY

killed     saves after every step, and waits to be killed in the middle of a save
resumed    resumes all runs that were saved there
"""

import os
import sys
import time
import warnings
from pathlib import Path

import torch

from lookahead_optim.torch import Lookahead

STEPS = 15
SAVED_AFTER = range(9)
KILLED_IN = 7
# The part of a checkpoint that is loaded first.
FIRST = "model", "optimizer"


class Run:
    """A model, its optimizer, a learning rate schedule if there is one, and the number of steps so far."""

    def __init__(self, make, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to(dtype)
        for parameter in self.model.parameters():
            parameter.data.normal_(generator=generator)
        self.optimizer, self.schedule = make(self.model)
        self.dtype, self.steps = dtype, 0

    def step(self):
        generator = torch.Generator().manual_seed(100 + self.steps)
        x, y = (torch.randn(8, size, generator=generator, dtype=self.dtype) for size in (3, 1))

        def closure():
            self.optimizer.zero_grad()
            loss = (self.model(x) - y).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)
        if self.schedule:
            self.schedule.step()
        self.steps += 1

    def train(self, end=STEPS):
        while self.steps < end:
            self.step()
        return self

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else {},
            "steps": self.steps,
        }

    def save(self, path):
        torch.save(self.state(), path)

    def save_in_block(self, path):
        with self.optimizer.slow_weights():
            torch.save({**self.state(), "score": self.score()}, path)

    def score(self):
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            return self.model(torch.randn(8, 3, generator=generator, dtype=self.dtype))

    def load(self, path, first="model"):
        state = torch.load(path, weights_only=True)
        for part in ("model", "optimizer") if first == "model" else ("optimizer", "model"):
            getattr(self, part).load_state_dict(state[part])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
        return self


def momentum(model):
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True), 4)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)


def adam_fused(model):
    return Lookahead(torch.optim.Adam(model.parameters(), lr=0.05, fused=True), 4, slow_step_size=0.8), None


def adam_foreach(model):
    optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=0.05, amsgrad=True, foreach=True), 4)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def nested(model):
    inner = Lookahead(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 3)
    return Lookahead(inner, 4, slow_step_size=0.8), None


def outer(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Lookahead(inner, 4, 0.7, slow_momentum=0.9, slow_dtype=torch.float64), None


def lbfgs(model):
    return Lookahead(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=4), 4), None


def three_groups(model, *settings):
    first, _, last = model
    parameters = [list(first.parameters()), [last.weight], [last.bias]]
    groups = [{"params": one, **setting} for one, setting in zip(parameters, settings)]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def groups(model):
    optimizer = three_groups(model, {"sync_period": 3, "slow_step_size": 0.8}, {"sync_period": 0}, {})
    return Lookahead(optimizer, 4), None


def groups_without_settings(model):
    return Lookahead(three_groups(model, {}, {}, {}), 2, slow_step_size=0.1), None


RUNS = {make.__name__: make for make in (momentum, adam_fused, adam_foreach, nested, outer, lbfgs, groups)}
# The settings come from the checkpoint too.
RESUMED_BY = {**RUNS, "groups": groups_without_settings}


def bare_adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.05), None


def wrapped_adam(model):
    return Lookahead(bare_adam(model)[0], 4), None


def killed(directory):
    run = Run(momentum)
    while run.steps < KILLED_IN:
        run.step()
        partial = directory / "checkpoint.partial"
        run.save(partial)
        if run.steps == KILLED_IN:
            partial.write_bytes(partial.read_bytes()[:500])
            (directory / "reached").touch()
            time.sleep(120)
            sys.exit("not killed")
        os.replace(partial, directory / "checkpoint.pt")


def resumed(directory):
    for path in sorted(directory.glob("*-*.pt")):
        name, _ = path.stem.split("-")
        Run(RESUMED_BY[name]).load(path).train().save(path.with_suffix(".result"))

    for path in sorted(directory.glob("*-*.block")):
        name, _ = path.stem.split("-")
        for first in FIRST:
            Run(RESUMED_BY[name]).load(path, first).train().save(path.with_suffix(f".{first}"))
        # The model alone.
        run = Run(RESUMED_BY[name])
        run.model.load_state_dict(torch.load(path, weights_only=True)["model"])
        torch.save(run.score(), path.with_suffix(".score"))

    run = Run(momentum).load(directory / "checkpoint.pt")
    torch.save(run.steps, directory / "resumed_from.result")
    run.train().save(directory / "checkpoint.result")

    run = Run(wrapped_adam, torch.float64).load(directory / "bare.pt")
    run.step()
    run.save(directory / "bare_first_step.result")
    run.train().save(directory / "bare.result")


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    {"killed": killed, "resumed": resumed}[sys.argv[1]](Path(sys.argv[2]))
