"""Methods that the inner optimizer's class overrides, such as a `minimize` that adds a term to the loss."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lookahead_optim.tf_keras._keras import keras

__all__ = ["coming_back", "is_overridden"]


def is_overridden(optimizer: Any, method: str) -> bool:
    """Return whether an optimizer has its own version of a method of all legacy optimizers."""
    base = getattr(keras.optimizers.legacy.Optimizer, method)
    return method in optimizer.__dict__ or getattr(type(optimizer), method) is not base


@contextlib.contextmanager
def coming_back(inner: Any, step: Callable[..., Any], method: str) -> Iterator[None]:
    """Return a context manager in which `inner.apply_gradients` is `step`, the wrapper's method.

    So a method of the inner optimizer comes back to the wrapper for the step that it makes. `step` may call the inner
    optimizer's own `apply_gradients`.

    Raises:
        RuntimeError: if the method made no step by `apply_gradients`.
    """
    calls = []
    former = inner.__dict__.get("apply_gradients")

    def put_back() -> None:
        inner.__dict__.pop("apply_gradients", None)
        if former is not None:
            inner.__dict__["apply_gradients"] = former

    def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        put_back()
        try:
            return step(grads_and_vars, *args, **kwargs)
        finally:
            inner.__dict__["apply_gradients"] = apply_gradients

    inner.__dict__["apply_gradients"] = apply_gradients
    try:
        yield
    finally:
        put_back()
    if not calls:
        raise RuntimeError(
            f"`{method}` of the inner optimizer must make its step by `self.apply_gradients(...)`, where "
            "`Lookahead` takes part. This step was one of the inner optimizer alone. Call its `apply_gradients` "
            f"there, or give gradients to `Lookahead.apply_gradients`. Received: optimizer={inner!r}"
        )
