"""The slow weights' arithmetic on PyTorch, where learning the step count must not make the host wait for the device.

Nothing here belongs into a graph that `torch.compile` makes: its guards on the step count would recompile every step.
"""

import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from lookahead_optim._torch import cut, move

__all__ = ["capture", "check_scope", "copy_of", "gradients", "increment", "synchronize"]


def _native(variables):
    # `Variable.value` asks for a scope and a device each time, which for small weights takes longer than a sync. No
    # public function of Keras says whether there is a scope.
    if in_stateless_scope():
        return [variable.value for variable in variables]
    return [variable._value for variable in variables]


def _host_count(iterations):
    """Return the step count, from the device only if it was assigned to since `increment` noted it."""
    count = iterations.value
    version, noted = getattr(count, "_lookahead_noted", (None, None))
    return noted if version == count._version else int(count)


@torch.compiler.disable
def increment(iterations):
    """Add one to the step count and note it on the host."""
    noted = _host_count(iterations) + 1
    if in_stateless_scope():
        iterations.assign_add(1)
    else:
        iterations._value.add_(1)
    count = iterations.value
    count._lookahead_noted = (count._version, noted)


@torch.compiler.disable
@torch.no_grad()
def capture(iterations, due, pairs):
    """Set every slow weight of `pairs()` to its fast one if `due(iterations)`."""
    if due(_host_count(iterations)) and (found := pairs()):
        slow, fast = map(_native, zip(*found))
        torch._foreach_copy_(slow, fast)


@torch.compiler.disable
@torch.no_grad()
def synchronize(iterations, due, pairs, slow_step_size):
    """Move the slow weights of `pairs()` towards the fast ones and restart these from there, if `due(iterations)`."""
    if not due(_host_count(iterations)):
        return
    found = pairs()
    free = [(fast, slow) for slow, fast in found if fast.constraint is None]
    for fast, slow in cut(*map(_native, zip(*free))) if free else ():
        move(slow, fast, slow_step_size)
        torch._foreach_copy_(fast, slow)
    for slow, fast in found:
        if fast.constraint is not None:
            move([slow.value], [fast.value], slow_step_size)
            slow.assign(fast.constraint(slow.value))
            # In a stateless scope the assignment has made a new value.
            fast.value.copy_(slow.value)


def copy_of(variable):
    """Return the variable's value as a tensor of its own."""
    return variable.value.detach().clone()


def gradients(loss, variables, grad_loss):
    """Return the gradients of the callable `loss`, weighted by `grad_loss`, for `variables`."""
    value = loss()
    grad_loss = torch.ones_like(value) if grad_loss is None else torch.as_tensor(grad_loss).to(value)
    return torch.autograd.grad(value, _native(variables), grad_loss, allow_unused=True)


def check_scope(optimizers, variables):
    """PyTorch has no scope to check."""
