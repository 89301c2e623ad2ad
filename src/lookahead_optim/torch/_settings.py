"""The settings and the count that `Lookahead` keeps in each parameter group, beside the inner optimizer's."""

import numbers
import re
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from lookahead_optim._checks import check_slow_step_size, check_sync_period

__all__ = ["FAST", "Group", "Names", "check_group", "complete_group", "is_setting", "is_slow_weight"]

Group: TypeAlias = dict[str, Any]

# The name of a fast weight in a state dict that was made in a `slow_weights()` block, beside the slow weight.
FAST = "fast"
# That of an int64, in which other tools may keep it.
_LARGEST_COUNT = 2**63


class Names(NamedTuple):
    """What a wrapper calls its settings and its count in groups, and the slow weight in state.

    Wrappers of one optimizer share its groups and its state, so that each has names of its own.
    """

    sync_period: str
    slow_step_size: str
    lookahead_step: str
    slow: str

    @classmethod
    def at_level(cls, level: int) -> "Names":
        """Return the names of the innermost wrapper (level 1), of the wrapper around that (level 2), and so on."""
        return cls(*(name if level == 1 else f"{name}_{level}" for name in cls._fields))

    @property
    def settings(self) -> tuple[str, str]:
        """The names of what users set, and checkpoints of the bare optimizer lack."""
        return self.sync_period, self.slow_step_size


def is_setting(name: str) -> bool:
    """Return whether an entry of a group belongs to any wrapper."""
    return re.fullmatch(r"(sync_period|slow_step_size|lookahead_step)(_\d+)?", name) is not None


def is_slow_weight(name: object) -> bool:
    """Return whether an entry of a parameter's saved state is the slow weight of any wrapper."""
    return isinstance(name, str) and re.fullmatch(r"slow(_\d+)?", name) is not None


def check_group(group: Group, names: Names) -> None:
    """Raise an error if a group has an invalid setting or count of its own."""
    check_sync_period(group.get(names.sync_period, 0))
    check_slow_step_size(group.get(names.slow_step_size, 0.0))
    _check_count(group.get(names.lookahead_step, 0), names.lookahead_step)


def complete_group(group: Group, names: Names, defaults: dict[str, Any]) -> bool:
    """Check a group's settings and add those that it lacks; return whether it is new: it had no count."""
    period = group.setdefault(names.sync_period, defaults[names.sync_period])
    step_size = group.setdefault(names.slow_step_size, defaults[names.slow_step_size])
    # The types are looked at first as this runs before every step.
    if type(period) is not int or period < 0:
        group[names.sync_period] = check_sync_period(period)
    if type(step_size) is not float or not 0 <= step_size < float("inf"):
        group[names.slow_step_size] = check_slow_step_size(step_size)
    # The count last: after an error the group is still new.
    is_new = names.lookahead_step not in group
    count = group.setdefault(names.lookahead_step, 0)
    if type(count) is not int or not 0 <= count < _LARGEST_COUNT:
        group[names.lookahead_step] = _check_count(count, names.lookahead_step)
    return is_new


def _check_count(count: object, name: str) -> int:
    """Return a count of steps as an `int`, or raise an error."""
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 0 <= int(count) < _LARGEST_COUNT:
        raise ValueError(f"`{name}` must be an integer >= 0, the number of steps. Received: {count!r}")
    return int(count)
