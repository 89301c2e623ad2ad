"""The count of updates: how it grows, and what is due at it."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["END", "SlowStepSize", "SyncPeriod", "is_due", "is_off", "next_count", "slow_step_size_at"]

# Checked settings. Arrays may be traced.
SyncPeriod: TypeAlias = int | jax.Array | np.ndarray
SlowStepSize: TypeAlias = float | jax.Array | np.ndarray

# The largest count. Optax' own counts stop there.
END = np.int32(2**31 - 1)


def is_off(sync_period: SyncPeriod) -> bool:
    """Return whether a period is known to be 0."""
    return isinstance(sync_period, int) and sync_period == 0


def is_due(step: jax.Array, sync_period: SyncPeriod) -> jax.Array:
    """Return whether a sync follows the update with this count."""
    return (step % _cycle(sync_period) == 0) & (sync_period > 0) & (sync_period <= END)


def next_count(step: jax.Array, sync_period: SyncPeriod) -> jax.Array:
    """Return the count of the next update. At the end of int32 it goes back by a whole cycle, to the same phase."""
    return jnp.where(step < END, step + 1, END - (_cycle(sync_period) - 1)).astype(step.dtype)


def slow_step_size_at(
    step: jax.Array, sync_period: SyncPeriod, slow_step_size: SlowStepSize | optax.Schedule
) -> SlowStepSize:
    """Return the step size of the sync that ends the cycle of this count."""
    return slow_step_size(step // _cycle(sync_period)) if callable(slow_step_size) else slow_step_size


def _cycle(sync_period: SyncPeriod) -> SyncPeriod:
    """Return the period as a divisor of counts: not 0, and at most the largest int32."""
    if isinstance(sync_period, jax.Array):
        return jnp.maximum(sync_period, 1)
    return min(max(int(sync_period), 1), int(END))
