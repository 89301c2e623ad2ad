"""The `Lookahead` optimizer for PyTorch."""

from lookahead_optim.torch.optimizer import Lookahead

__all__ = ["Lookahead"]
