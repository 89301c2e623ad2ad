"""The slow weights' arithmetic on PyTorch, where learning the step count must not make the host wait for the device.

Nothing here belongs into a graph that `torch.compile` makes: its guards on the step count would recompile every step.
"""

import contextlib
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from lookahead_optim._outer_step_torch import Piece, cut, is_large, outer_step

__all__ = ["Tracked", "after", "capture", "check_scope", "copy_of", "gradients", "mark_captured", "read", "synchronize"]


def _native(variables):
    # `Variable.value` asks for a scope and a device each time, which for small weights takes longer than a sync. No
    # public function of Keras says whether there is a scope.
    if in_stateless_scope():
        return [variable.value for variable in variables]
    return [variable._value for variable in variables]


def _read(counter, stepped=False):
    """Return the value of a scalar integer, from the device only if the host cannot know it.

    The host notes the value on the tensor. What was noted holds until the tensor's version changes. If it has changed
    once, and that was a step that counts by one (`stepped`), the step has added one.
    """
    tensor: Any = counter.value if isinstance(counter, keras.Variable) else torch.as_tensor(counter)
    version, noted, noted_after_step = getattr(tensor, "_lookahead_noted", (None, 0, False))
    if stepped and version is not None and tensor._version == version + 1 and noted < torch.iinfo(tensor.dtype).max:
        noted += 1
    elif tensor._version != version or stepped > noted_after_step:
        noted = int(tensor)
    tensor._lookahead_noted = (tensor._version, noted, stepped)
    return noted


@torch.compiler.disable
def mark_captured(captured, counter, is_applied, stepped):
    """Set `captured` to one if `is_applied(counter)`."""
    if not _read(captured) and is_applied(_read(counter, stepped)):
        captured.assign(1)


@torch.compiler.disable
@torch.no_grad()
def capture(counter, due, pairs, stepped=False):
    """Set every slow weight of `pairs()` to its fast one if `due(counter)`."""
    if due(_read(counter, stepped)) and (found := pairs()):
        slow, fast = map(_native, zip(*found))
        torch._foreach_copy_(slow, fast)


@torch.compiler.disable
@torch.no_grad()
def synchronize(counter, due, pairs, slow_step_size, stepped=False):
    """Move the slow weights of `pairs()` towards the fast ones and restart these from there, if `due(counter)`."""
    if not due(_read(counter, stepped)):
        return
    found = pairs()
    free = [(slow, fast) for slow, fast in found if fast.constraint is None]
    for piece in cut(*map(_native, zip(*free))) if free else ():
        _outer_step(piece, slow_step_size)
    for slow, fast in found:
        if fast.constraint is not None:
            _outer_step(Piece([slow.value], [fast.value]), slow_step_size)
            slow.assign(fast.constraint(slow.value))
            # In a stateless scope the assignment has made a new value.
            fast.value.copy_(slow.value)


def _outer_step(piece, slow_step_size):
    # Nobody notes whether these weights need care, so that they are asked each time.
    outer_step([piece], [slow_step_size], is_careful=piece.slow[0].is_cpu and is_large(piece.slow))


def copy_of(variable):
    """Return the variable's value as a tensor of its own."""
    return variable.value.detach().clone()


def gradients(loss, variables, grad_loss):
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    value = loss()
    grad_loss = torch.ones_like(value) if grad_loss is None else torch.as_tensor(grad_loss).to(value)
    return torch.autograd.grad(value, _native(variables), grad_loss, allow_unused=True)


@torch.compiler.disable
def read(counter):
    """Return the value of a scalar integer: a variable, a tensor or a number."""
    return _read(counter)


def after(gradients):
    """Return a context manager for a step that follows the gradients, as all of PyTorch's operations do."""
    return contextlib.nullcontext()


def check_scope(optimizers, variables):
    """PyTorch has no scope to check."""


class Tracked:
    """PyTorch has no checkpoints that match objects by their attributes."""

    def _track_own(self, objects):
        pass
