"""Slow momentum in each dtype that weights have, in weights of many sizes.

PyTorch's kernels treat whole CPU vectors and the rest of a weight differently. They treat float16 and bfloat16 in other
ways again.
"""

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests import reference
from tests.test_torch.by_hand import parameters, set_gradients

SIZES = 1, 7, 8, 15, 16, 17, 32, 33, 64, 1000


@pytest.mark.parametrize("slow_nesterov", [True, False])
@pytest.mark.parametrize(
    ("dtype", "slow_dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
        (torch.float32, None),
        (torch.float32, torch.float64),
        (torch.float64, None),
    ],
    ids=str,
)
def test_the_outer_step_is_the_oracles_up_to_roundings_of_the_dtype(dtype, slow_dtype, slow_nesterov):
    outer = {"slow_momentum": 0.9, "slow_nesterov": slow_nesterov}
    weights = parameters(*[(size,) for size in SIZES], dtype=dtype)
    optimizer = Lookahead(torch.optim.SGD(weights, 0.1), 2, 0.7, **outer, slow_dtype=slow_dtype)
    oracle = reference.Lookahead(reference.SGD(0.1), 2, 0.7, **outer)
    oracle.start([weight.detach().double() for weight in weights])
    for step in range(8):
        set_gradients(weights, step)
        oracle.apply([weight.grad.double() for weight in weights])
        optimizer.step()
    tolerance = 16 * torch.finfo(dtype).eps
    for weight, slow, b in zip(weights, oracle.slow, oracle.b):
        state = optimizer.state[weight]
        torch.testing.assert_close(state["slow"].double(), torch.as_tensor(slow), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["slow_momentum"].double(), torch.as_tensor(b), rtol=tolerance, atol=tolerance)
