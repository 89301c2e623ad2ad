"""PyTorch: the inner optimizers to measure, bare and with Lookahead."""

import torch

from lookahead_optim.torch import Lookahead

PERIOD = 6
# Functions that take the weights.
INNER = {
    "SGD, foreach": lambda weights: torch.optim.SGD(weights, 1e-3, foreach=True),
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, 1e-3, fused=True),
    "AdamW, foreach": lambda weights: torch.optim.AdamW(weights, 1e-3, foreach=True),
}
# Functions that take the inner optimizer.
WRAPPERS = {"bare": lambda inner: inner, "lookahead-optim": lambda inner: Lookahead(inner, PERIOD)}
