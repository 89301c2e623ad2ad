"""Weights that FSDP2 has distributed: this process' shards, and a new gathering of all when they have changed."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

__all__ = ["gathered_anew", "local"]


def local(weights: list[Tensor]) -> list[Tensor]:
    """Return this process' shards of weights, as not all `foreach` operations take a `DTensor`."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]


@contextlib.contextmanager
def gathered_anew(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have the modules of a block gather their weights anew, in the block and after it.

    FSDP2 may keep what a forward pass has gathered until a backward pass, which an evaluation does not have.
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

    # Runs before FSDP's own.
    hook = nn.modules.module.register_module_forward_pre_hook(reshard)
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            module.reshard()
