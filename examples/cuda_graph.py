"""A training step in a CUDA graph, with Lookahead around it.

The graph holds the forward and the backward pass and the inner optimizer's step. The host counts the replays and makes
the slow step after every `sync_period` of them. It does not wait for the GPU.
"""

from collections.abc import Callable

import torch

from lookahead_optim.torch import Lookahead

BATCH, FEATURES = 64, 256
# Steps before the capture.
WARM_UP = 3


def make_step(
    device: str, sync_period: int | None = 6, use_graph: bool = True
) -> tuple[Callable[[], object], torch.optim.Optimizer]:
    """Return a function that makes one training step, and its optimizer.

    Args:
        device: The device, `"cuda"` for a graph.
        sync_period: The sync period, or `None` for the bare inner optimizer.
        use_graph: Whether to replay a graph.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(FEATURES, FEATURES), torch.nn.GELU()) for _ in range(8)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(FEATURES, 1)).to(device)
    # `capturable` keeps AdamW's step count on the GPU.
    inner = torch.optim.AdamW(model.parameters(), 1e-3, capturable=device == "cuda")
    optimizer = inner if sync_period is None else Lookahead(inner, sync_period)
    x = torch.randn(BATCH, FEATURES, device=device)
    y = x.mean(dim=1, keepdim=True)

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()

    def step() -> None:
        forward_and_backward()
        optimizer.step()

    if not use_graph:
        return step, optimizer
    # A few steps come before the capture, on a stream of their own. They are training steps, and they count.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_and_backward()
        inner.step()
    # From now on a step of the inner optimizer replays all of that.
    inner.step = graph.replay  # type: ignore[method-assign, assignment]
    return optimizer.step, optimizer


def train(device: str, steps: int, use_graph: bool = True) -> torch.optim.Optimizer:
    """Make `steps` steps, and return the optimizer."""
    step, optimizer = make_step(device, use_graph=use_graph)
    for _ in range(steps - WARM_UP if use_graph else steps):
        step()
    return optimizer


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    trained = train("cuda" if on_gpu else "cpu", 120, use_graph=on_gpu)
    print(f"{trained.param_groups[0]['lookahead_step']} steps, {'in a graph' if on_gpu else 'without a graph: no GPU'}")
