"""What FSDP2 needs to see weights that change between two forward passes."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["gathered_anew"]


@contextlib.contextmanager
def gathered_anew(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have the modules of a block gather their weights anew, in the block and after it.

    FSDP2 may keep what a forward pass has gathered until a backward pass, which an evaluation does not have.
    """
    if not any(hasattr(one, "to_local") for one in parameters):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    modules: list[Any] = []

    def reshard(module: nn.Module, args: Any) -> None:
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
