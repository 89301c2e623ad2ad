"""The order of an optimizer's weights, by which HDF5 files and `set_weights` know them."""

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["appended"]


@contextlib.contextmanager
def appended(optimizer: Any, placed: list[Any]) -> Iterator[None]:
    """Context manager in which `optimizer` creates slots, that leaves `_weights` as if none had been restored.

    Slots that a checkpoint restores come into being in the order of the checkpoint, and before the step count. But in
    HDF5 files and `set_weights` weights have no other name than their place. `placed` are slots that keep theirs; those
    that are created here join them.
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
