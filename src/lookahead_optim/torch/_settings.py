"""The settings and the counts that `Lookahead` keeps in each parameter group, beside the inner optimizer's."""

import numbers
import re
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from lookahead_optim._checks import check_slow_momentum, check_slow_nesterov, check_slow_step_size, check_sync_period

__all__ = ["FAST", "NONE_UNSYNCED", "Group", "Names", "check_group", "complete_group", "is_setting", "is_slow_weight"]

Group: TypeAlias = dict[str, Any]

# The value of "no step since the last sync". It is not 0, as `torch.compile` makes special programs for the integers 0
# and 1, and would compile again after the first sync.
NONE_UNSYNCED = 2
# The name of a fast weight, beside the slow weight, in a state dict that was made in a `slow_weights()` block.
FAST = "lookahead_fast"
# Counts are smaller than this number, so that other tools can store them as int64.
_LARGEST_COUNT = 2**63


class Names(NamedTuple):
    """A wrapper's names for its settings and counts in groups, and for the slow weight in state.

    Wrappers of one optimizer share its groups and its state, so each wrapper has its own names. In groups,
    `slow_momentum` is the factor of the slow momentum. In state, the same name is the momentum itself.
    """

    sync_period: str
    slow_step_size: str
    slow_momentum: str
    slow_nesterov: str
    # The number of steps; and the number of steps since the last sync, plus `NONE_UNSYNCED`.
    lookahead_step: str
    lookahead_unsynced: str
    slow: str

    @classmethod
    def at_level(cls, level: int) -> "Names":
        """Return the names of the innermost wrapper (level 1), of the wrapper around it (level 2), and so on."""
        return cls(*(name if level == 1 else f"{name}_{level}" for name in cls._fields))

    @property
    def settings(self) -> tuple[str, str, str, str]:
        """The names of the settings. Users set them, and checkpoints of the bare optimizer lack them."""
        return self[:4]


def is_setting(name: str) -> bool:
    """Return whether an entry of a group belongs to a wrapper."""
    return (
        re.fullmatch(
            r"(sync_period|slow_step_size|slow_momentum|slow_nesterov|lookahead_step|lookahead_unsynced)(_\d+)?", name
        )
        is not None
    )


def is_slow_weight(name: object) -> bool:
    """Return whether an entry of a parameter's saved state is a wrapper's slow weight or slow momentum."""
    return isinstance(name, str) and re.fullmatch(r"slow(_momentum)?(_\d+)?", name) is not None


def check_group(group: Group, names: Names) -> None:
    """Raise an error if a group has an invalid setting or count."""
    check_sync_period(group.get(names.sync_period, 0))
    check_slow_step_size(group.get(names.slow_step_size, 0.0))
    check_slow_momentum(group.get(names.slow_momentum, 0.0))
    check_slow_nesterov(group.get(names.slow_nesterov, True))
    for name in (names.lookahead_step, names.lookahead_unsynced):
        _check_count(group.get(name, 0), name)


def complete_group(group: Group, names: Names, defaults: dict[str, Any]) -> bool:
    """Check a group's settings and add missing settings; return whether the group is new. A new group has no count."""
    period, step_size, momentum, nesterov = (group.setdefault(name, defaults[name]) for name in names.settings)
    # Types are compared first, which is fast. This runs before every step.
    if type(period) is not int or period < 0:
        group[names.sync_period] = check_sync_period(period)
    if type(step_size) is not float or not 0 <= step_size < float("inf"):
        group[names.slow_step_size] = check_slow_step_size(step_size)
    if type(momentum) is not float or not 0 <= momentum < 1:
        group[names.slow_momentum] = check_slow_momentum(momentum)
    if type(nesterov) is not bool:
        check_slow_nesterov(nesterov)
    # The counts are added last. After an error the group is still new.
    is_new = names.lookahead_step not in group
    group.setdefault(names.lookahead_step, 0)
    _make_integer(group, names.lookahead_step)
    if names.lookahead_unsynced not in group:
        # A checkpoint from a version without slow momentum does not have this count.
        period = group[names.sync_period]
        group[names.lookahead_unsynced] = NONE_UNSYNCED + (group[names.lookahead_step] % period if period else 0)
    _make_integer(group, names.lookahead_unsynced)
    return is_new


def _make_integer(group: Group, name: str) -> None:
    count = group[name]
    if type(count) is not int or not 0 <= count < _LARGEST_COUNT:
        group[name] = _check_count(count, name)


def _check_count(count: object, name: str) -> int:
    """Return a count of steps as an `int`, or raise an error."""
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 0 <= int(count) < _LARGEST_COUNT:
        raise ValueError(f"`{name}` must be an integer >= 0, the number of steps. Received: {count!r}")
    return int(count)
