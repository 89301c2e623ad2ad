"""Several workers: what averages their pseudo-gradients, and the check that they start alike."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed
from torch.nn.parameter import is_lazy

from lookahead_optim.torch._fsdp import local
from lookahead_optim.torch._settings import Group, Names

__all__ = ["Average", "Reduce", "average", "description"]

# Changes pseudo-gradients in place. `False` abandons the cycle.
Reduce: TypeAlias = Callable[[list[Tensor]], bool | None]

# So many bytes are reduced at once.
_BYTES_PER_BUCKET = 2**25


def average(process_group: Any = None) -> "Average":
    """Return a `reduce` for `Lookahead` that averages the pseudo-gradients over processes.

    Each process then trains on its own data and sends one sum for each cycle: `sync_period` times fewer bytes than
    data-parallel training. That is DiLoCo.

    float16 and bfloat16 are averaged in float32. The memory is that of 32 MiB of pseudo-gradients, besides what the
    backend takes. Before the first step, and the first one after a state dict was loaded, the processes compare counts,
    settings, shapes and, by a checksum, the weights with which they start. So all must load a state dict, or none.

    Args:
        process_group: A `torch.distributed.ProcessGroup`, such as `mesh["replicate"].get_group()`, in which all
            processes have the same weights, or the same shards of them. Defaults to `None`, the group of all.

    Returns:
        A callable for `reduce`.

    Raises:
        RuntimeError: from the first step, in all processes of the group, if they do not start alike, before anything
            has changed; and from any sync in which the communication fails.

    Example:

    >>> from lookahead_optim.torch import Lookahead, average
    >>> model = torch.nn.Linear(3, 1)
    >>> inner = torch.optim.AdamW(model.parameters())
    >>> optimizer = Lookahead(inner, 500, 0.7, slow_momentum=0.9, reduce=average())

    References:
        Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`__, 2023, Algorithm 1.
    """
    return Average(process_group)


class Average:
    """The mean over the processes of a group. See `average`."""

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group

    def __repr__(self) -> str:
        return f"average({'' if self.process_group is None else self.process_group!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Average":
        # A process group cannot be copied.
        return self

    def __call__(self, pseudo_gradients: list[Tensor]) -> None:
        """Replace pseudo-gradients, a list of tensors, by their means, in place."""
        size = distributed.get_world_size(self.process_group)
        for bucket in _buckets(pseudo_gradients):
            sent = [part.to(_dtype_to_send(part)).contiguous() for part in bucket]
            # Private: the public `all_reduce_coalesced` is deprecated.
            with distributed.distributed_c10d._coalescing_manager(group=self.process_group):
                for part in sent:
                    distributed.all_reduce(part, group=self.process_group)
            torch._foreach_div_(sent, size)
            for part, mean in zip(bucket, sent):
                if mean is not part:
                    part.copy_(mean)

    def compare(self, described: dict[str, Any]) -> None:
        """Raise `RuntimeError`, in all processes, if one of them describes another start."""
        found: list[Any] = [None] * distributed.get_world_size(self.process_group)
        distributed.all_gather_object(found, described, group=self.process_group)
        for rank, other in enumerate(found):
            for name in {**found[0], **other}:
                one, another = found[0].get(name), other.get(name)
                if one != another:
                    raise RuntimeError(
                        "All workers must start alike, with the same settings, counts, shapes and weights. Load the "
                        "same checkpoint in all, or send the weights of one to the others before training: "
                        "`for parameter in model.parameters(): torch.distributed.broadcast(parameter.data, 0)`. "
                        f"Received: {name} is {one} in process 0 of the group and {another} in process {rank}"
                    )


def description(groups: list[Group], names: Names, slow_weights: Mapping[Tensor, Tensor]) -> dict[str, Any]:
    """Return what must be equal in all workers before their first step, by the names that an error has for it."""
    described: dict[str, Any] = {"the number of groups": len(groups)}
    for index, group in enumerate(groups):
        for name in (*names.settings, names.lookahead_step):
            described[f"`{name}` of group {index}"] = group[name]
        described[f"the number of parameters of group {index}"] = len(group["params"])
        for number, parameter in enumerate(group["params"]):
            label = f"parameter {number} of group {index}"
            described[f"the dtype of {label}"] = str(parameter.dtype)
            if is_lazy(parameter):
                continue
            described[f"the shape of {label}"] = tuple(parameter.shape)
            # A slow weight starts from its parameter. Without a sync period parameters are each worker's own.
            if parameter in slow_weights or group[names.sync_period]:
                (start,) = local([slow_weights.get(parameter, parameter)])
                described[f"the checksum of the slow weight of {label}"] = _checksum(start)
    return described


def _checksum(weight: Tensor) -> int:
    """Return the sum of the bits of a weight, read as integers. The memory is that of a bucket at most, or of a row."""
    weight = torch.view_as_real(weight.detach().resolve_conj()) if weight.is_complex() else weight.detach()
    if not weight.numel():
        return 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # A sum of another dtype than that of its elements copies these into it first.
    bits = weight.view(integers[weight.element_size()])
    bits = bits.view(-1) if bits.is_contiguous() else bits
    rows = max(1, _BYTES_PER_BUCKET // (8 * bits[0].numel()))
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(rows)) % 2**64


def _dtype_to_send(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one device and dtype, together of no more bytes than a bucket has. Large ones are split."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        elements = _BYTES_PER_BUCKET // tensor.element_size()
        parts = tensor.view(-1).split(elements) if tensor.is_contiguous() else [tensor]
        by_kind[tensor.device, tensor.dtype].extend(part for part in parts if part.numel())
    for parts in by_kind.values():
        bucket: list[Tensor] = []
        for part in parts:
            if bucket and sum(one.nbytes for one in bucket) + part.nbytes > _BYTES_PER_BUCKET:
                yield bucket
                bucket = []
            bucket.append(part)
        if bucket:
            yield bucket
