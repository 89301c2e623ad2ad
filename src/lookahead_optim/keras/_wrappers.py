"""Optimizers inside optimizers: how to find them, and how they count updates."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import keras

__all__ = ["accumulation_steps", "counter_of", "counts_by_one", "innermost", "optimizers_in"]

Optimizer: TypeAlias = keras.optimizers.Optimizer


def optimizers_in(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and all optimizers inside it, from the outside to the inside."""
    yield optimizer
    # `Lookahead` passes on all attributes of its inner optimizer, also the `optimizers` of a `MultiOptimizer`.
    if hasattr(optimizer, "inner_optimizer"):
        inside = [optimizer.inner_optimizer]
    else:
        inside = getattr(optimizer, "optimizers", [])
    for inner_optimizer in inside:
        yield from optimizers_in(inner_optimizer)


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the first optimizer, from the outside to the inside, that does not wrap a single other optimizer."""
    return next(wrapped for wrapped in optimizers_in(optimizer) if not hasattr(wrapped, "inner_optimizer"))


def accumulation_steps(optimizer: Optimizer) -> int:
    """Return the number of calls of `apply` over which the optimizer accumulates gradients for one update.

    Returns:
        Integer, 1 if gradients are not accumulated.

    Raises:
        ValueError: for a `MultiOptimizer` whose optimizers have different numbers.
    """
    optimizer = innermost(optimizer)
    parts = getattr(optimizer, "optimizers", None) or [optimizer]
    steps = {innermost(part).gradient_accumulation_steps or 1 for part in parts}
    if len(steps) > 1:
        raise ValueError(
            "All optimizers in a `MultiOptimizer` inside `Lookahead` must have the same `gradient_accumulation_steps`. "
            f"Received: {sorted(steps)}"
        )
    return steps.pop()


def counter_of(optimizer: Optimizer) -> tuple[Any, int]:
    """Return the count of an optimizer's calls or updates, and how much the count rises with each update.

    The count is a variable. The exception is an optimizer whose class has another `iterations`: that counts updates.
    """
    optimizer = innermost(optimizer)
    calls = accumulation_steps(optimizer)
    is_multi_optimizer = hasattr(optimizer, "optimizers")
    if calls > 1 and (is_multi_optimizer or type(optimizer).iterations is Optimizer.iterations):
        # The public `iterations` is divided by `calls`. That makes a new tensor, on which PyTorch's host can note
        # nothing.
        return optimizer._iterations, calls
    return optimizer.iterations, 1


def counts_by_one(optimizer: Optimizer) -> bool:
    """Return whether the count rises by one in each call, as in Keras' own `apply`."""
    optimizer = innermost(optimizer)
    methods = optimizer.apply, optimizer.apply_gradients
    return all(getattr(method, "__module__", "").startswith("keras.") for method in methods)
