"""Several workers: averaging their pseudo-gradients, and checking that they start alike."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, distributed
from torch.nn.parameter import is_lazy

from lookahead_optim.torch._fsdp import local
from lookahead_optim.torch._settings import Group, Names

if TYPE_CHECKING:
    from lookahead_optim.torch._slow_weights import SlowWeights

__all__ = ["Average", "Reduce", "average", "description"]

# A callable that changes pseudo-gradients in place. If it returns `False`, the cycle is abandoned.
Reduce: TypeAlias = Callable[[list[Tensor]], bool | None]

# The number of bytes that are reduced at once.
_BYTES_PER_BUCKET = 2**25


def average(process_group: Any = None) -> "Average":
    """Return a `reduce` for `Lookahead` that averages the pseudo-gradients over processes.

    Each process then trains on its own data, and sends one sum per cycle. It sends `sync_period` times fewer bytes than
    in data-parallel training. This is DiLoCo.

    float16 and bfloat16 are averaged in float32. Averaging needs memory for 32 MiB of pseudo-gradients, besides the
    memory that the communication backend takes.

    Before the first step the processes compare their counts, settings and shapes, and the checksums of the weights and
    of the momentum with which they start. They compare again after `load_state_dict`, `reset_slow_weights` and
    `add_param_group`, and after a group's `sync_period` changed to 0 or from 0. So either all processes must do such a
    thing, or none.

    Args:
        process_group: A `torch.distributed.ProcessGroup` that contains this process, such as
            `mesh["replicate"].get_group()`. All its processes must have the same weights, or the same shards of the
            weights. Defaults to `None`, the group of all processes.

    Returns:
        A callable for the argument `reduce`.

    Raises:
        RuntimeError: from the first step, in all processes of the group and before anything is changed, if the
            processes do not start alike; if this process is not in the group; from any sync in which the communication
            fails.

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
        """Replace pseudo-gradients by their means, in place.

        Args:
            pseudo_gradients: List of tensors.
        """
        size = self._size()
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
            # Free the memory of this bucket for the next.
            del sent, mean

    def _size(self) -> int:
        """Return the number of workers."""
        if distributed.get_rank(self.process_group) < 0:
            raise RuntimeError(
                "`average(process_group)` must be given a group that has this process in it, in each process the group "
                f"of its own workers. Received: a group without process {distributed.get_rank()}"
            )
        return distributed.get_world_size(self.process_group)

    def compare(self, described: dict[str, Any]) -> None:
        """Raise `RuntimeError`, in all processes, if a process describes another start."""
        found: list[Any] = [None] * self._size()
        distributed.all_gather_object(found, described, group=self.process_group)
        for rank, other in enumerate(found):
            for name in {**found[0], **other}:
                one, another = found[0].get(name), other.get(name)
                if one != another:
                    raise RuntimeError(
                        "All workers must start alike, with the same settings, counts, shapes and weights. Load the "
                        "same checkpoint in all, or send the weights of one to the others before training, with "
                        "`torch.distributed.broadcast(parameter.data, 0)` for each parameter or, if it is a `DTensor`, "
                        "with its `to_local()` in the group of the workers. "
                        f"Received: {name} is {one} in process 0 of the group and {another} in process {rank}"
                    )


def description(groups: list[Group], names: Names, slow_weights: "SlowWeights") -> dict[str, Any]:
    """Return the values that must be equal in all workers before their first step, by their names in the error."""
    described: dict[str, Any] = {"the number of groups": len(groups), "`slow_dtype`": str(slow_weights.dtype)}
    for index, group in enumerate(groups):
        for name in (*names.settings, names.lookahead_step, names.lookahead_unsynced):
            described[f"`{name}` of group {index}"] = group[name]
        described[f"the number of parameters of group {index}"] = len(group["params"])
        for number, parameter in enumerate(group["params"]):
            label = f"parameter {number} of group {index}"
            described[f"the dtype of {label}"] = str(parameter.dtype)
            described[f"`requires_grad` of {label}"] = parameter.requires_grad
            if is_lazy(parameter):
                continue
            described[f"the shape of {label}"] = tuple(parameter.shape)
            momentum = slow_weights.momentum.get(parameter)
            if momentum is not None:
                described[f"the checksum of the slow momentum of {label}"] = _checksum(*local([momentum]))
            # A slow weight starts from its parameter. In a group without a sync period workers may have different
            # parameters.
            if parameter in slow_weights.by_parameter or group[names.sync_period]:
                start = slow_weights.by_parameter.get(parameter, parameter)
                described[f"the checksum of the slow weight of {label}"] = _checksum(*local([start]))
    return described


def _checksum(weight: Tensor) -> int:
    """Return a checksum of a weight: an integer below 2 ** 64.

    The bits of each element, as an integer, are multiplied by an odd number that depends on the element's position. The
    checksum is the sum of the products modulo 2 ** 64. It needs at most the memory of a bucket, or of a row.
    """
    weight = torch.view_as_real(weight.detach().resolve_conj()) if weight.is_complex() else weight.detach()
    if not weight.numel():
        return 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weight.view(integers[weight.element_size()])
    total = first = 0
    for rows in _rows(bits, _BYTES_PER_BUCKET // 16):
        factors = torch.arange(first, first + rows.numel(), device=rows.device).mul_(2).add_(1)
        total += int(factors.mul_(rows.reshape(-1)).sum())
        first += rows.numel()
    return total % 2**64


def _rows(tensor: Tensor, elements: int) -> Sequence[Tensor]:
    """Cut a tensor into parts of at most `elements` elements, in the order of its elements.

    A tensor that is not contiguous is cut only along its first dimension, so a part has at least a row.
    """
    if tensor.is_contiguous() or not tensor.ndim:
        return tensor.view(-1).split(elements)
    return tensor.split(max(1, elements // max(1, tensor[0].numel())))


def _dtype_to_send(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of tensors of one device and dtype, of at most a bucket's bytes when sent. Large tensors are cut."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        parts = _rows(tensor, _BYTES_PER_BUCKET // _dtype_to_send(tensor).itemsize) if tensor.numel() else ()
        by_kind[tensor.device, tensor.dtype].extend(parts)
    for parts in by_kind.values():
        bucket: list[Tensor] = []
        elements = 0
        for part in parts:
            if bucket and (elements + part.numel()) * _dtype_to_send(part).itemsize > _BYTES_PER_BUCKET:
                yield bucket
                bucket, elements = [], 0
            bucket.append(part)
            elements += part.numel()
        if bucket:
            yield bucket
