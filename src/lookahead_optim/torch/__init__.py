"""The `Lookahead` optimizer for PyTorch."""

from lookahead_optim._missing import explain_missing

with explain_missing("lookahead_optim.torch", "torch", "torch"):
    from lookahead_optim.torch._workers import average
    from lookahead_optim.torch.optimizer import Lookahead

__all__ = ["Lookahead", "average"]
