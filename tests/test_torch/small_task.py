"""The small network and the optimizers that the tests of other tools use."""

import torch

# With this slow step size `ByHand` rounds like `torch.lerp`.
PERIOD, SIZE = 3, 0.25


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def loss_of(network, batch):
    return torch.nn.functional.mse_loss(network(batch[0]), batch[1])


def adamw(network):
    return torch.optim.AdamW(network.parameters(), lr=0.05)


def momentum(network):
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
