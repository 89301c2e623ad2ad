"""A check that the processes of a data-parallel run have the same settings. Otherwise their weights silently differ."""

import collections
import hashlib
import json

from torch import distributed

from lookahead_optim.torch._settings import Group, Names

__all__ = ["check_equal_on_all_ranks"]

# The number of optimizers of this process that were compared, by the shapes of their parameters.
_compared: collections.Counter[str] = collections.Counter()


def check_equal_on_all_ranks(groups: list[Group], names: Names) -> None:
    """Raise `RuntimeError` if another process has an optimizer like this one, with other settings or counts.

    The processes belong to one run. Nothing else is known about them: each may have another part of a model, or make
    its first step much later. So there is no collective operation, which would wait for all processes. Instead each
    process asks the run's key-value store once, under a key made of its parameters' shapes. The first process stores
    its settings there. The other processes compare their settings with the stored settings.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    shapes = json.dumps([[list(parameter.shape) for parameter in group["params"]] for group in groups])
    signature = hashlib.sha256(shapes.encode()).hexdigest()
    key = f"lookahead_optim/{signature}/{_compared[signature]}"
    _compared[signature] += 1
    own = json.dumps([{name: group[name] for name in (*names.settings, names.lookahead_step)} for group in groups])
    # No public function returns the store. A new store would need an address of its own.
    rank = distributed.get_rank()
    try:
        store = distributed.distributed_c10d._get_default_store()
        first = json.loads(store.compare_set(key, "", json.dumps([rank, own])))
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        # Not every store can do this. The check is then left out.
        return
    if first[1] != own:
        raise RuntimeError(
            "All processes must have the same `sync_period`, `slow_step_size` and number of steps, or their weights "
            f"drift apart. Received: {own} on rank {rank}, and {first[1]} on rank {first[0]}"
        )
