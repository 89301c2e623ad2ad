"""The order of an optimizer's weights, by which HDF5 files and `set_weights` identify them."""

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["appended"]


@contextlib.contextmanager
def appended(optimizer: Any, placed: list[Any]) -> Iterator[None]:
    """Return a context manager in which `optimizer` makes slots. It orders `_weights` as if no slot had been restored.

    A checkpoint makes restored slots in the order of the checkpoint, and before the step count. But HDF5 files and
    `set_weights` identify weights only by their place.

    Args:
        optimizer: The optimizer.
        placed: List of slots that keep their places. Slots that are made here are added to it.
    """
    created: dict[int, Any] = {}
    add_slot = optimizer.add_slot

    def recording(*args: Any, **kwargs: Any) -> Any:
        slot = add_slot(*args, **kwargs)
        created[id(slot)] = slot
        return slot

    optimizer.add_slot = recording
    try:
        yield
    finally:
        del optimizer.add_slot
    # No public way leads to the slots of an optimizer, or sets the order of its weights.
    restored = {id(slot) for slots in optimizer._slots.values() for slot in slots.values()} - set(map(id, placed))
    others = [weight for weight in optimizer._weights if id(weight) not in created]
    optimizer._weights = [
        *(weight for weight in others if weight is optimizer._iterations),
        *(weight for weight in others if weight is not optimizer._iterations and id(weight) not in restored),
        *created.values(),
        *(weight for weight in others if id(weight) in restored),
    ]
    placed += created.values()
