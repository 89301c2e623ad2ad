"""The functions that Keras 3's `Lookahead` needs from its backend, on PyTorch.

The host must not wait for the device to learn a count. Nothing here belongs into a graph of `torch.compile`: its guards
on the step count would recompile at every step.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import torch

# Private: no public function says whether there is a scope. `Variable.value` asks for the scope and for a device each
# time. For many small weights that takes longer than a sync.
from keras.src.backend.common.stateless_scope import in_stateless_scope

from lookahead_optim._outer_step_torch import OuterStep, is_large, outer_step_unshared
from lookahead_optim._pieces_torch import cut

__all__ = [
    "OuterStep",
    "Tracked",
    "after",
    "beside",
    "capture",
    "check_scope",
    "copy_of",
    "float_of",
    "gradients",
    "mark_captured",
    "mark_synchronized",
    "number_of",
    "read",
    "synchronize",
    "traced",
]

# The value that decides: a count, or whether the slow weights were captured. A count is no variable if an inner
# optimizer has its own `iterations`.
Scalar: TypeAlias = keras.Variable | torch.Tensor | int
IsDue: TypeAlias = Callable[[int], bool]
# A slow weight, its fast weight, and its slow momentum or `None`.
Pairs: TypeAlias = Callable[[], Sequence[tuple[keras.Variable, keras.Variable, keras.Variable | None]]]


def _native(variables: Iterable[keras.Variable]) -> list[torch.Tensor]:
    if in_stateless_scope():
        return [variable.value for variable in variables]
    # Private, as above.
    return [variable._value for variable in variables]


def _read(scalar: Scalar, counts_by_one: bool = False) -> Any:
    """Return the value of a scalar. Read it from the device only if the host cannot know it.

    The host notes the value on the tensor. The note holds as long as the tensor's version does not change. If a step of
    an optimizer that `counts_by_one` has changed the version once, the step has added 1.
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
    """Return `None`: steps are not traced here."""


@torch.compiler.disable
def mark_captured(captured: keras.Variable, counter: Scalar, is_applied: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to 1 if `is_applied(counter)`."""
    if _read(captured) != 1 and is_applied(_read(counter, counts_by_one)):
        captured.assign(1)
        _note(captured.value, 1)


@torch.compiler.disable
def mark_synchronized(captured: keras.Variable, counter: Scalar, is_due: IsDue, counts_by_one: bool) -> None:
    """Set `captured` to 2 if it is not 0 and `is_due(counter)`."""
    if is_due(_read(counter, counts_by_one)) and _read(captured):
        captured.assign(2)
        _note(captured.value, 2)


@torch.compiler.disable
@torch.no_grad()
def capture(scalar: Scalar, is_due: IsDue, pairs: Pairs, counts_by_one: bool = False) -> None:
    """If `is_due(scalar)`, set every slow weight of `pairs()` to its fast weight, and its momentum to 0."""
    if is_due(_read(scalar, counts_by_one)) and (found := pairs()):
        slow, fast, momentum = _columns(found)
        torch._foreach_copy_(slow, fast)
        if momentum:
            torch._foreach_zero_(momentum)


@torch.compiler.disable
@torch.no_grad()
def synchronize(
    scalar: Scalar, is_due: IsDue, pairs: Pairs, step: Callable[[], OuterStep], counts_by_one: bool = False
) -> None:
    """If `is_due(scalar)`, make the outer step of all `pairs()`. `step()` is called only then."""
    if not is_due(_read(scalar, counts_by_one)):
        return
    found, settings = pairs(), step()
    free = [pair for pair in found if pair[1].constraint is None]
    if free:
        _outer_step(settings, *_columns(free))
    for pair in found:
        slow, fast, _ = pair
        if fast.constraint is not None:
            _outer_step(settings, *_columns([pair]))
            slow.assign(fast.constraint(slow.value))
            # In a stateless scope the assignment has made a new value.
            fast.value.copy_(slow.value)


def _columns(pairs: Sequence[tuple[Any, Any, Any]]) -> list[list[torch.Tensor]]:
    """Return three lists: the slow weights, the fast weights, and the slow momentum.

    The last is empty without momentum.
    """
    return [_native(one for one in column if one is not None) for column in zip(*pairs)]


def _outer_step(
    step: OuterStep, slow: list[torch.Tensor], fast: list[torch.Tensor], momentum: list[torch.Tensor]
) -> None:
    """Make the outer step. On the CPU, note on slow weights that they need no care, so as to check them only once."""
    is_careful = slow[0].is_cpu and any(_version_noted(weight) != weight._version for weight in slow) and is_large(slow)
    for piece in cut(slow, fast, momentum):
        is_careful = outer_step_unshared(piece, step, is_careful)
    for weight in slow:
        weight._lookahead_needs_no_care = None if is_careful else weight._version  # type: ignore[attr-defined]


def _version_noted(weight: Any) -> int | None:
    return getattr(weight, "_lookahead_needs_no_care", None)


def float_of(value: Any) -> float:
    """Return a scalar as a number."""
    return float(value)


def beside(weight: keras.Variable) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that does nothing. Keras has one device on PyTorch."""
    return contextlib.nullcontext()


def after(gradients: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that does nothing. In PyTorch all operations follow the gradients."""
    return contextlib.nullcontext()


def copy_of(variable: keras.Variable) -> torch.Tensor:
    """Return a copy of the variable's value, as a tensor."""
    return variable.value.detach().clone()


def gradients(
    loss: Callable[[], Any], variables: Sequence[keras.Variable], grad_loss: Any
) -> Sequence[torch.Tensor | None]:
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    value = loss()
    grad_loss = torch.ones_like(value) if grad_loss is None else torch.as_tensor(grad_loss).to(value)
    return torch.autograd.grad(value, _native(variables), grad_loss, allow_unused=True)


def check_scope(optimizers: Iterable[Any], variables: Iterable[Any]) -> None:
    """Do nothing. PyTorch has no scope to check."""


class Tracked:
    """Does nothing. PyTorch has no checkpoints that match objects by their attributes."""

    def _track_own(self, objects: Mapping[str, Any]) -> None:
        pass
