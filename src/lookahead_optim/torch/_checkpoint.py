"""State dicts: the inner optimizer's, with slow weights and, in a block, fast weights in each parameter's entries."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_optim.torch._fsdp import local
from lookahead_optim.torch._settings import FAST, Group, Names, check_group, is_setting, is_slow_weight
from lookahead_optim.torch._slow_weights import SlowWeights

__all__ = ["StateDict", "load_inner", "split", "with_slow_weights"]

StateDict: TypeAlias = dict[str, Any]


class Loaded(NamedTuple):
    """The entries that a state dict has beside the inner optimizer's part, by parameter."""

    slow: dict[Tensor, Tensor]
    momentum: dict[Tensor, Tensor]
    # Empty, except for a state dict that was made in a `slow_weights()` block.
    fast: dict[Tensor, Tensor]


def with_slow_weights(
    state_dict: StateDict, groups: list[Group], slow_weights: SlowWeights, fast_weights: Mapping[Tensor, Tensor]
) -> StateDict:
    """Return the inner optimizer's state dict with the slow weights in it.

    A parameter that never had a gradient has no entry of the inner optimizer. Most optimizers refuse a state dict with
    an entry for such a parameter that lacks their own values. So the parameter's slow weight is left out if it equals
    the parameter and its slow momentum is 0 or missing. It can be captured from the parameter again.

    Args:
        state_dict: The inner optimizer's state dict.
        groups: The parameter groups.
        slow_weights: The slow weights of the wrapper.
        fast_weights: The fast weights of parameters that hold slow weights now. They are added to the state dict too.
    """
    state, saved_groups = dict(state_dict["state"]), [dict(saved) for saved in state_dict["param_groups"]]
    for group, saved in zip(groups, saved_groups):
        index_of = dict(zip(group["params"], saved["params"]))
        keeps_state = any(isinstance(entries, Mapping) and entries for entries in map(state.get, index_of.values()))
        for parameter, index in index_of.items():
            slow, entries = slow_weights.by_parameter.get(parameter), state.get(index, {})
            if slow is None or not isinstance(entries, Mapping):
                continue
            fast, momentum = fast_weights.get(parameter), slow_weights.momentum.get(parameter)
            if keeps_state and not entries and _is_at_start(slow, parameter if fast is None else fast, momentum):
                continue
            own = {slow_weights.name: slow, slow_weights.momentum_name: momentum, FAST: fast}
            state[index] = {**entries, **{name: value for name, value in own.items() if value is not None}}
    return {**state_dict, "state": state, "param_groups": saved_groups}


def split(state_dict: StateDict, groups: list[Group], names: Names, is_innermost: bool) -> tuple[StateDict, Loaded]:
    """Split a checked state dict into the inner optimizer's part and copies of the rest.

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
    state = dict(state_dict["state"])
    loaded = Loaded({}, {}, {})
    for group, saved in zip(groups, saved_groups):
        for parameter, index in zip(group["params"], saved["params"]):
            entries = state.get(index, {})
            if not isinstance(entries, Mapping):
                continue
            # Keep the saved dtype: the parameters may get it back before they are trained.
            if entries.get(names.slow) is not None:
                for by_parameter, name, kind in (
                    (loaded.slow, names.slow, "slow weight"),
                    (loaded.momentum, names.slow_momentum, "slow momentum"),
                    (loaded.fast, FAST, "fast weight"),
                ):
                    if entries.get(name) is not None:
                        by_parameter[parameter] = _like(parameter, entries[name], kind, index)
            # The innermost wrapper removes the entries of all wrappers. An optimizer may take a parameter's entry that
            # is not empty for a complete entry of its own.
            own = (names.slow, names.slow_momentum)
            not_of_inner = {name for name in entries if (is_slow_weight(name) if is_innermost else name in own)}
            not_of_inner |= {FAST} if not_of_inner else set()
            of_inner = {name: value for name, value in entries.items() if name not in not_of_inner}
            if of_inner:
                state[index] = of_inner
            else:
                state.pop(index, None)
    return {**state_dict, "state": state}, loaded


def load_inner(
    inner_state_dict: StateDict, inner_optimizer: Optimizer, inner_slow_weights: list[SlowWeights], names: Names
) -> None:
    """Let the inner optimizer load its part. If it fails, the inner optimizer and all inside it are unchanged.

    Args:
        inner_state_dict: The first part that `split` returned.
        inner_optimizer: The optimizer, or a `Lookahead` around it.
        inner_slow_weights: The slow weights of each wrapper in `inner_optimizer`, from the outside to the inside.
        names: The names of the wrapper that loads. Its settings are kept where the state dict has none.

    Raises:
        TypeError, ValueError: if the inner optimizer cannot load its part.
    """
    settings = [{name: group[name] for name in names.settings} for group in inner_optimizer.param_groups]
    needed = [set(group) & set(inner_optimizer.defaults) for group in inner_optimizer.param_groups]
    try:
        with _restored_on_failure(inner_optimizer, inner_slow_weights):
            inner_optimizer.load_state_dict(inner_state_dict)
            for group, keys in zip(inner_optimizer.param_groups, needed):
                # The next step would fail, as the groups belong to another class of optimizer.
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
    """Return a context manager that restores an optimizer, all that it wraps, and the slow weights after an exception.

    A PyTorch optimizer replaces its state and groups when it loads others, so it is enough to keep the old objects.
    """
    optimizers = [inner_optimizer]
    for _ in inner_slow_weights:
        optimizers.append(optimizers[-1].inner_optimizer)  # type: ignore[attr-defined]
    attributes_before = [dict(vars(optimizer)) for optimizer in optimizers]
    slow_before = [
        (dict(owner.by_parameter), dict(owner.momentum), dict(owner.captured)) for owner in inner_slow_weights
    ]
    try:
        yield
    except BaseException:
        for optimizer, attributes in zip(optimizers, attributes_before):
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
        for owner, (by_parameter, momentum, captured) in zip(inner_slow_weights, slow_before):
            owner.replace(by_parameter, momentum)
            owner.captured = captured
        raise


def _like(parameter: Tensor, weight: object, kind: str, index: object) -> Tensor:
    """Return a copy of a weight or momentum on the device of its parameter, or raise `ValueError`."""
    if not isinstance(weight, Tensor) or weight.shape != parameter.shape:
        received = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise ValueError(
            f"`state_dict` must have a {kind} of shape {tuple(parameter.shape)} for parameter {index}. "
            f"Received: {received}"
        )
    is_real = weight.is_floating_point() or (weight.is_complex() and parameter.is_complex())
    if not is_real and weight.dtype != parameter.dtype:
        raise ValueError(
            f"`state_dict` must have a {kind} of a floating point dtype for parameter {index}. Received: {weight.dtype}"
        )
    weight = weight.to_dense() if weight.layout is not torch.strided else weight
    if hasattr(parameter, "to_local") and not hasattr(weight, "to_local"):
        raise ValueError(
            f"`state_dict` must have a {kind} for parameter {index} that is sharded as the parameter. Received: one "
            "that is whole, from a full state dict that was made in a `slow_weights()` block. Make full state dicts "
            "outside of it."
        )
    return weight.detach().to(parameter.device, copy=True)


def _is_at_start(slow: Tensor, parameter: Tensor, momentum: Tensor | None) -> bool:
    """Return whether a capture from the parameter would make this slow weight and this momentum."""
    (slow,), (fast,) = local([slow]), local([parameter])
    is_as_wide = torch.promote_types(slow.dtype, fast.dtype) == slow.dtype
    is_same = is_as_wide and slow.device == fast.device and torch.equal(slow, fast.to(slow.dtype))
    return is_same and (momentum is None or not local([momentum])[0].any())
