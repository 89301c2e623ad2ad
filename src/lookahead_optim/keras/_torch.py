"""The slow weights' arithmetic on PyTorch, where learning the step count must not make the host wait for the device.

Nothing here belongs into a graph that `torch.compile` makes: its guards on the step count would recompile every step.
"""

import torch

__all__ = ["capture", "check_scope", "copy_of", "gradients", "increment", "synchronize"]


# On the CPU a `foreach` operation is a loop. In batches of this size, what one wrote is still in the
# cache when the next one reads it.
_CPU_BATCH_BYTES = 2**20


def _native(variables):
    return [variable.value for variable in variables]


def _host_count(iterations):
    """Return the step count, from the device only if it was assigned to since `increment` noted it."""
    count = iterations.value
    version, noted = getattr(count, "_lookahead_noted", (None, None))
    return noted if version == count._version else int(count)


def _batches(pairs):
    """Yield lists of pairs, slow and fast weights, on the CPU of weights that fit into its cache together."""
    batch, slow, fast, size = [], [], [], 0
    for pair in pairs:
        batch.append(pair)
        slow.append(pair[0].value)
        fast.append(pair[1].value)
        size += slow[-1].nbytes if slow[-1].is_cpu else 0
        if size >= _CPU_BATCH_BYTES:
            yield batch, slow, fast
            batch, slow, fast, size = [], [], [], 0
    if batch:
        yield batch, slow, fast


@torch.compiler.disable
def increment(iterations):
    """Add one to the step count and note it on the host."""
    noted = _host_count(iterations) + 1
    iterations.assign_add(1)
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
    for batch, slow, fast in _batches(pairs()):
        torch._foreach_lerp_(slow, fast, slow_step_size)
        for index, (slow_variable, variable) in enumerate(batch):
            if variable.constraint is not None:
                slow_variable.assign(variable.constraint(slow[index]))
                # In a stateless scope the assignment has made a new value.
                slow[index] = slow_variable.value
        torch._foreach_copy_(fast, slow)


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
