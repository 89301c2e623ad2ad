"""Weights that FSDP2 has distributed: this process' shards, and gathering the weights again after a change."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

__all__ = ["gathered_anew", "local"]


def local(weights: list[Tensor]) -> list[Tensor]:
    """Return this process' shards of weights, as some `foreach` operations do not take a `DTensor`."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]


@contextlib.contextmanager
def gathered_anew(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Return a context manager in which modules gather their weights again, at their first use and after the block.

    FSDP2 may keep gathered weights from a forward pass until the backward pass. An evaluation has no backward pass.
    """
    if not any(hasattr(parameter, "to_local") for parameter in parameters):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    modules: list[FSDPModule] = []

    def reshard(module: nn.Module, args: object) -> None:
        if isinstance(module, FSDPModule) and module not in modules:
            module.reshard()
            modules.append(module)

    # This hook runs before FSDP's own.
    hook = nn.modules.module.register_module_forward_pre_hook(reshard)
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            module.reshard()
