"""What Keras 3's `Lookahead` needs of its backend, on PyTorch: the host must not wait for the device to learn a count.

Nothing here belongs into a graph that `torch.compile` makes: its guards on the step count would recompile every step.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import torch

# Private: no public function says whether there is a scope. `Variable.value` asks for it, and for a device, each time.
# For many small weights that takes longer than a sync.
from keras.src.backend.common.stateless_scope import in_stateless_scope

from lookahead_optim._outer_step_torch import OuterStep, is_large, outer_step_unshared
from lookahead_optim._pieces_torch import cut

__all__ = [
    "Tracked",
    "after",
    "capture",
    "check_scope",
    "copy_of",
    "gradients",
    "mark_captured",
    "number_of",
    "read",
    "synchronize",
    "traced",
]

# What decides: a count, or whether the slow weights were captured. A count is no variable where an inner optimizer has
# an `iterations` of its own.
Scalar: TypeAlias = keras.Variable | torch.Tensor | int
IsDue: TypeAlias = Callable[[int], bool]
# Pairs of a slow weight and its fast one.
Pairs: TypeAlias = Callable[[], Sequence[tuple[keras.Variable, keras.Variable]]]


def _native(variables: Iterable[keras.Variable]) -> list[torch.Tensor]:
    if in_stateless_scope():
        return [variable.value for variable in variables]
    # Private, as above.
    return [variable._value for variable in variables]


def _read(scalar: Scalar, counts_by_one: bool = False) -> Any:
    """Return the value of a scalar, from the device only if the host cannot know it.

    The host notes the value on the tensor. What was noted holds until the tensor's version changes. If that has changed
    once, by a step of an optimizer that `counts_by_one`, the step has added one.
    """
    tensor: Any = scalar.value if isinstance(scalar, keras.Variable) else torch.as_tensor(scalar)
    # Private: nothing public says whether a tensor was written to.
    version = tensor._version
    noted_version, noted, noted_after_step = getattr(tensor, "_lookahead_noted", (None, 0, False))
    if counts_by_one and version - 1 == noted_version and noted < torch.iinfo(tensor.dtype).max:
        noted += 1
    elif version != noted_version or counts_by_one > noted_after_step:
        noted = tensor.item()
    _note(tensor, noted, counts_by_one)
    return noted


def _note(tensor: Any, value: int, counts_by_one: bool = False) -> None:
    tensor._lookahead_noted = (tensor._version, value, counts_by_one)


@torch.compiler.disable
def read(scalar: Scalar) -> int:
    """Return the value of a scalar integer: a variable, a tensor or a number."""
    return _read(scalar)


@torch.compiler.disable
def number_of(variable: keras.Variable) -> float:
    """Return the value of a scalar variable."""
    return _read(variable)


def traced(variable: keras.Variable) -> None:
    """Return None: no step is traced as far as here."""


@torch.compiler.disable
def mark_captured(captured: keras.Variable, counter: Scalar, is_applied: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to one if `is_applied(counter)`."""
    if not _read(captured) and is_applied(_read(counter, counts_by_one)):
        captured.assign(1)
        _note(captured.value, 1)


@torch.compiler.disable
@torch.no_grad()
def capture(scalar: Scalar, is_due: IsDue, pairs: Pairs, counts_by_one: bool = False) -> None:
    """Set every slow weight of `pairs()` to its fast one if `is_due(scalar)`."""
    if is_due(_read(scalar, counts_by_one)) and (found := pairs()):
        slow, fast = map(_native, zip(*found))
        torch._foreach_copy_(slow, fast)


@torch.compiler.disable
@torch.no_grad()
def synchronize(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, slow_step_size: float, counts_by_one: bool = False
) -> None:
    """Make the outer step of all `pairs()` if `is_due(scalar)`."""
    if not is_due(_read(scalar, counts_by_one)):
        return
    found = pairs()
    free = [pair for pair in found if pair[1].constraint is None]
    if free:
        _outer_step(_native(slow for slow, _ in free), _native(fast for _, fast in free), slow_step_size)
    for slow, fast in found:
        if fast.constraint is not None:
            _outer_step([slow.value], [fast.value], slow_step_size)
            slow.assign(fast.constraint(slow.value))
            # In a stateless scope the assignment has made a new value.
            fast.value.copy_(slow.value)


def _outer_step(slow: list[torch.Tensor], fast: list[torch.Tensor], slow_step_size: float) -> None:
    """Make the outer step. On the CPU it is noted on slow weights that they need no care, to ask them once."""
    is_careful = slow[0].is_cpu and any(_version_noted(weight) != weight._version for weight in slow) and is_large(slow)
    for piece in cut(slow, fast):
        is_careful = outer_step_unshared(piece, OuterStep(slow_step_size), is_careful)
    for weight in slow:
        weight._lookahead_needs_no_care = None if is_careful else weight._version  # type: ignore[attr-defined]


def _version_noted(weight: Any) -> int | None:
    return getattr(weight, "_lookahead_needs_no_care", None)


def after(gradients: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for a step that follows the gradients, as all of PyTorch's operations do."""
    return contextlib.nullcontext()


def copy_of(variable: keras.Variable) -> torch.Tensor:
    """Return the variable's value as a tensor of its own."""
    return variable.value.detach().clone()


def gradients(
    loss: Callable[[], Any], variables: Sequence[keras.Variable], grad_loss: Any
) -> Sequence[torch.Tensor | None]:
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    value = loss()
    grad_loss = torch.ones_like(value) if grad_loss is None else torch.as_tensor(grad_loss).to(value)
    return torch.autograd.grad(value, _native(variables), grad_loss, allow_unused=True)


def check_scope(optimizers: Iterable[Any], variables: Iterable[Any]) -> None:
    """PyTorch has no scope to check."""


class Tracked:
    """PyTorch has no checkpoints that match objects by their attributes."""

    def _track_own(self, objects: Mapping[str, Any]) -> None:
        pass
