"""Fast weights from a checkpoint that was made in a `slow_weights()` block, until the parameters have them again.

In such a checkpoint the model has the slow weights, for a program that loads the model alone. The optimizer has both.
Training resumes bit for bit if the parameters have the fast weights before the next forward pass.

If the model was loaded before the optimizer, the parameters get the fast weights at once. If the model is loaded after
the optimizer, nothing tells the optimizer. So a hook looks before each forward pass of a module that has such a
parameter. The first step removes the hook. There is no hook if the parameters have their fast weights already, as
compilers do not like hooks for all modules.

Only a parameter that holds a slow weight gets its fast weight. Any other value comes from another file and is left
alone.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lookahead_optim.torch._fsdp import local

if TYPE_CHECKING:
    from lookahead_optim.torch._slow_weights import SlowWeights

__all__ = ["LoadedFastWeights"]


class LoadedFastWeights:
    """The fast weights of a checkpoint, as long as the parameters may still need them.

    Attributes:
        by_parameter: The fast weights. Each has its parameter's shape.
    """

    def __init__(self) -> None:
        self.by_parameter: dict[Tensor, Tensor] = {}
        self._slow_weights: Sequence[SlowWeights] = ()
        self._hook: Any = None

    def load(self, by_parameter: dict[Tensor, Tensor], slow_weights: Sequence["SlowWeights"]) -> None:
        """Take the fast weights of a checkpoint, and put them into the parameters if the model was loaded before.

        Args:
            by_parameter: The fast weights. They replace the fast weights of an earlier checkpoint.
            slow_weights: The slow weights of all wrappers. In the block the parameters had the slow weights of any
                wrapper.
        """
        self.forget()
        if by_parameter:
            self.by_parameter, self._slow_weights = by_parameter, slow_weights
            if not self.put_back():
                self._watch()

    def forget(self) -> None:
        """Drop the fast weights. The parameters have the weights with which training continues."""
        self.by_parameter, self._slow_weights = {}, ()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def settle(self) -> None:
        """Put the fast weights into the parameters for the last time."""
        self.put_back()
        self.forget()

    def settle_before_step(self) -> None:
        """Put the fast weights into the parameters, before a step that uses the present gradients.

        Raises:
            RuntimeError: if a parameter still holds the slow weight, and has a gradient that was computed with it.
        """
        if any(parameter.grad is not None for parameter in self._waiting()):
            raise RuntimeError(
                "Load the model before the optimizer. The state dict of the optimizer was saved in a `slow_weights()` "
                "block. The model was loaded after it, and the gradients were computed with the slow weights."
            )
        self.settle()

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_back(self) -> bool:
        """Put the fast weights into parameters that hold slow weights; return whether all have fast weights."""
        waiting = self._waiting()
        if waiting:
            torch._foreach_copy_(local(waiting), local([self.by_parameter[parameter] for parameter in waiting]))
        return all(_holds(parameter, fast) for parameter, fast in self.by_parameter.items())

    def _waiting(self) -> list[Tensor]:
        return [
            parameter
            for parameter, fast in self.by_parameter.items()
            if any(_holds(parameter, owner.by_parameter.get(parameter)) for owner in self._slow_weights)
            and not _holds(parameter, fast)
        ]

    def _watch(self) -> None:
        # The hook must not keep alive an optimizer that the program has dropped.
        reference = weakref.ref(self)

        @torch.compiler.disable
        def before_forward(module: nn.Module, args: object) -> None:
            loaded = reference()
            if loaded is None:
                hook.remove()
            elif any(parameter in loaded.by_parameter for parameter in module.parameters()) and loaded.put_back():
                loaded.forget()

        # This hook runs before the hooks of FSDP2, which gather the weights. Tensors have no such hook.
        hook = self._hook = nn.modules.module.register_module_forward_pre_hook(before_forward)


def _holds(parameter: Tensor, weight: Tensor | None) -> bool:
    """Return whether a parameter has the values of a weight, rounded to the parameter's dtype."""
    if weight is None or weight.shape != parameter.shape:
        return False
    (value,), (expected,) = local([parameter]), local([weight])
    return torch.equal(value, expected.to(value.device, value.dtype))
