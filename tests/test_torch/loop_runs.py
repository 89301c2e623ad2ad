"""The loops of test_kept_by_loops.py, as the docs show them, and the process that reads what they kept.

python -m tests.test_torch.loop_runs LOOP FOLDER
"""

import sys
import warnings
from pathlib import Path

import torch

from lookahead_optim.torch import Lookahead

PERIOD, SIZE, EPOCHS, STEPS = 3, 0.25, 5, 4
GENERATOR = torch.Generator().manual_seed(1)
INPUTS, TARGETS = torch.randn(16, 4, generator=GENERATOR), torch.randn(16, 2, generator=GENERATOR)


class Plain:
    """A loop in plain PyTorch."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        # Too large a rate, so that the best epoch is not the last.
        self.optimizer = Lookahead(torch.optim.SGD(self.model.parameters(), lr=0.6, momentum=0.9), PERIOD, SIZE)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=1.3)
        self.losses, self.best_epoch = [], 0

    def block(self):
        return self.optimizer.slow_weights()

    def backward(self, loss):
        loss.backward()

    def loss(self):
        return torch.nn.functional.mse_loss(self.model(INPUTS), TARGETS)

    def train_epoch(self):
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            self.backward(self.loss())
            self.optimizer.step()
            self.scheduler.step()

    def run(self, folder, first_epoch=0):
        for epoch in range(first_epoch, EPOCHS):
            self.train_epoch()
            with self.block():
                with torch.no_grad():
                    self.losses.append(self.loss().item())
                if self.losses[-1] == min(self.losses):
                    self.best_epoch = epoch
                    self.save(folder)

    def save(self, folder):
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            },
            folder / "best.pt",
        )
        torch.export.save(torch.export.export(self.model, (INPUTS,)), folder / "best.pt2")

    def load(self, folder):
        checkpoint = torch.load(folder / "best.pt", weights_only=True)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])

    @staticmethod
    def scores(folder):
        """Return the losses of the models in a folder, without an optimizer."""
        run = Plain()
        run.model.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["model"])
        program = torch.export.load(folder / "best.pt2").module()
        return {
            "model": run.loss().item(),
            "program": torch.nn.functional.mse_loss(program(INPUTS), TARGETS).item(),
        }

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses}


class WithAccelerate(Plain):
    """The same loop with Accelerate."""

    def __init__(self):
        import accelerate

        super().__init__()
        self.accelerator = accelerate.Accelerator(cpu=True)
        prepared = self.accelerator.prepare(self.model, self.optimizer, self.scheduler)
        self.model, self.optimizer, self.scheduler = prepared

    def block(self):
        return self.optimizer.optimizer.slow_weights()

    def backward(self, loss):
        self.accelerator.backward(loss)

    def save(self, folder):
        self.accelerator.save_state(folder)

    def load(self, folder):
        self.accelerator.load_state(folder)

    @staticmethod
    def scores(folder):
        import safetensors.torch

        run = Plain()
        run.model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return {"model": run.loss().item()}


LOOPS = {"plain": Plain, "accelerate": WithAccelerate}


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    loop, folder = LOOPS[sys.argv[1]], Path(sys.argv[2])
    scores = loop.scores(folder)
    resumed = loop()
    resumed.load(folder)
    resumed.run(folder / "resumed", first_epoch=int(sys.argv[3]))
    torch.save({"scores": scores, **resumed.state()}, folder / "found.pt")
