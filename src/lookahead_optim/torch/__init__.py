"""The `Lookahead` optimizer for PyTorch."""

from lookahead_optim.torch._workers import average
from lookahead_optim.torch.optimizer import Lookahead

__all__ = ["Lookahead", "average"]
