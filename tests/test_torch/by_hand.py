"""Lookahead written out: what the wrapper must do with any inner optimizer, written next to the bare one."""

import torch


class ByHand:
    """Runs a bare optimizer and makes the slow step itself, one parameter after the other, after every `sync_period`.

    Half-precision weights take the slow step in float32.
    """

    def __init__(self, optimizer, sync_period=6, slow_step_size=0.5):
        self.optimizer, self.sync_period, self.slow_step_size = optimizer, sync_period, slow_step_size
        self.parameters = [one for group in optimizer.param_groups for one in group["params"]]
        self.slow = [one.detach().clone() for one in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def after_step(self):
        """Call this after each step of the bare optimizer."""
        self.steps += 1
        if self.steps % self.sync_period == 0:
            for fast, slow in zip(self.parameters, self.slow):
                dtype = torch.promote_types(slow.dtype, torch.float32)
                moved = slow.to(dtype) + self.slow_step_size * (fast.to(dtype) - slow.to(dtype))
                slow.copy_(moved)
                fast.copy_(slow)

    def step(self, closure=None):
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.after_step()
        return result


def parameters(*shapes, seed=0, dtype=torch.float32, device="cpu"):
    """Return new parameters with normal random values, the same for the same seed, on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype).to(device)) for shape in shapes]


def set_gradients(parameters, step):
    """Give parameters normal random gradients, the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=generator, dtype=one.dtype).to(one.device)
