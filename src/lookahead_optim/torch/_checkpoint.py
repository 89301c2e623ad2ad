"""State dicts: the inner optimizer's, and a slow weight beside each parameter's entries."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_optim.torch._fsdp import local
from lookahead_optim.torch._settings import Group, Names, check_group, is_setting, is_slow_weight
from lookahead_optim.torch._slow_weights import SlowWeights

__all__ = ["StateDict", "load_inner", "split", "with_slow_weights"]

StateDict: TypeAlias = dict[str, Any]


def with_slow_weights(
    state_dict: StateDict, groups: list[Group], slow_weights: SlowWeights, keep_all: bool
) -> StateDict:
    """Return the inner optimizer's state dict with the slow weights in it.

    A parameter that never had a gradient has no entry of the inner optimizer, and most optimizers refuse a state dict
    that has an entry for it with nothing of theirs. Such a slow weight is left out if it equals the parameter, from
    which it can be captured again. `keep_all` keeps it too.
    """
    state, saved_groups = dict(state_dict["state"]), [dict(saved) for saved in state_dict["param_groups"]]
    for group, saved in zip(groups, saved_groups):
        index_of = dict(zip(group["params"], saved["params"]))
        keeps_state = any(isinstance(entries, Mapping) and entries for entries in map(state.get, index_of.values()))
        for parameter, index in index_of.items():
            slow, entries = slow_weights.by_parameter.get(parameter), state.get(index, {})
            if slow is None or not isinstance(entries, Mapping):
                continue
            if keeps_state and not entries and not keep_all and _are_same(slow, parameter):
                continue
            state[index] = {**entries, slow_weights.name: slow}
    return {**state_dict, "state": state, "param_groups": saved_groups}


def split(
    state_dict: StateDict, groups: list[Group], names: Names, is_innermost: bool
) -> tuple[StateDict, dict[Tensor, Tensor]]:
    """Check a state dict; return what is the inner optimizer's in it, and copies of the slow weights by parameter.

    Raises:
        TypeError, ValueError: if the state dict does not fit the groups.
    """
    saved_groups = state_dict["param_groups"]
    expected, received = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
    if expected != received:
        raise ValueError(
            f"`state_dict` must have the optimizer's groups, with {expected} parameters. Received: groups with "
            f"{received} parameters"
        )
    for saved in saved_groups:
        check_group(saved, names)
    state, slow_by_parameter = dict(state_dict["state"]), {}
    for group, saved in zip(groups, saved_groups):
        for parameter, index in zip(group["params"], saved["params"]):
            entries = state.get(index, {})
            if not isinstance(entries, Mapping):
                continue
            slow = entries.get(names.slow)
            if slow is not None:
                _check_shape(slow, parameter, index)
                slow = slow.to_dense() if slow.layout is not torch.strided else slow
                # In the dtype in which it was saved: the parameters may get it back before they are trained.
                slow_by_parameter[parameter] = slow.detach().to(parameter.device, copy=True)
            # The innermost wrapper removes those of any wrapper: an optimizer may take an entry with something in it
            # for one in which its own is complete.
            of_inner = {
                name: value
                for name, value in entries.items()
                if not (is_slow_weight(name) if is_innermost else name == names.slow)
            }
            if of_inner:
                state[index] = of_inner
            else:
                state.pop(index, None)
    return {**state_dict, "state": state}, slow_by_parameter


def load_inner(
    inner_state_dict: StateDict, inner_optimizer: Optimizer, inner_slow_weights: list[SlowWeights], names: Names
) -> None:
    """Have the inner optimizer load its part. If it cannot, all inside it is as before.

    Args:
        inner_state_dict: The first part that `split` returned.
        inner_optimizer: The optimizer, or a `Lookahead` around it.
        inner_slow_weights: Those of each wrapper in `inner_optimizer`, from the outside to the inside.
        names: The names of the loading wrapper. Its settings stay where the state dict has none.

    Raises:
        TypeError, ValueError: if the inner optimizer cannot load it.
    """
    settings = [{name: group[name] for name in names.settings} for group in inner_optimizer.param_groups]
    needed = [set(group) & set(inner_optimizer.defaults) for group in inner_optimizer.param_groups]
    try:
        with _restored_on_failure(inner_optimizer, inner_slow_weights):
            inner_optimizer.load_state_dict(inner_state_dict)
            for group, keys in zip(inner_optimizer.param_groups, needed):
                # Its next step would fail: the groups are those of another class.
                if missing := sorted(key for key in keys - set(group) if not is_setting(key)):
                    raise ValueError(f"its groups have no {missing}")
    except Exception as error:
        has_wrappers = bool(inner_slow_weights)
        if has_wrappers and isinstance(error, (TypeError, ValueError)):
            raise
        name = type(inner_optimizer).__name__
        raise ValueError(
            f"`state_dict` must come from a `Lookahead` around a {name}, or from that optimizer alone. "
            f"Received: one that it cannot load ({type(error).__name__}: {error})"
        ) from error
    for group, settings_before in zip(inner_optimizer.param_groups, settings):
        group.update({**settings_before, **group})


@contextlib.contextmanager
def _restored_on_failure(inner_optimizer: Optimizer, inner_slow_weights: list[SlowWeights]) -> Iterator[None]:
    """Give an optimizer, all that it wraps and the slow weights back what they had if the block raises an exception.

    A PyTorch optimizer replaces its state and groups when it loads others, so that keeping the old ones is enough.
    """
    optimizers = [inner_optimizer]
    for _ in inner_slow_weights:
        optimizers.append(optimizers[-1].inner_optimizer)  # type: ignore[attr-defined]
    attributes_before = [dict(vars(optimizer)) for optimizer in optimizers]
    slow_before = [(dict(owner.by_parameter), dict(owner.captured)) for owner in inner_slow_weights]
    try:
        yield
    except BaseException:
        for optimizer, attributes in zip(optimizers, attributes_before):
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
        for owner, (by_parameter, captured) in zip(inner_slow_weights, slow_before):
            owner.replace(by_parameter)
            owner.captured = captured
        raise


def _check_shape(slow: object, parameter: Tensor, index: object) -> None:
    if not isinstance(slow, Tensor) or slow.shape != parameter.shape:
        received = f"shape {tuple(slow.shape)}" if isinstance(slow, Tensor) else repr(slow)
        raise ValueError(
            f"`state_dict` must have a slow weight of shape {tuple(parameter.shape)} for parameter {index}. "
            f"Received: {received}"
        )


def _are_same(slow: Tensor, parameter: Tensor) -> bool:
    (slow,), (fast,) = local([slow]), local([parameter])
    return slow.dtype == fast.dtype and slow.device == fast.device and torch.equal(slow, fast)
