"""`Lookahead.state`: the inner optimizer's state and the slow weights, as one."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["State"]


class State(MutableMapping[Tensor, Any]):
    """The inner optimizer's state with one more entry per parameter, its slow weight."""

    def __init__(self, inner: MutableMapping[Tensor, Any], slow: dict[Tensor, dict[str, Tensor]], name: str) -> None:
        self.inner, self.slow, self.name = inner, slow, name

    def __getitem__(self, parameter: Tensor) -> "ParameterState":
        entries = ParameterState(self.inner[parameter], self.slow.get(parameter, {}))
        entries.owner = self, parameter
        return entries

    def __setitem__(self, parameter: Tensor, entries: Mapping[str, Any]) -> None:
        entries = dict(entries)
        self.forget(parameter)
        if self.name in entries:
            self.slow[parameter] = {self.name: entries.pop(self.name)}
        self.inner[parameter] = entries

    def __delitem__(self, parameter: Tensor) -> None:
        self.forget(parameter)
        self.inner.pop(parameter, None)

    def forget(self, parameter: Tensor) -> None:
        """Drop the slow weight of a parameter, if there is one."""
        # From its entry too, which the plan of a sync may have.
        self.slow.pop(parameter, {}).clear()

    def __iter__(self) -> Iterator[Tensor]:
        return iter([*self.inner, *(parameter for parameter in self.slow if parameter not in self.inner)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.inner or parameter in self.slow


class ParameterState(ChainMap[str, Any]):
    """A parameter's state: the inner optimizer's entries and the slow weight, each written to where it belongs."""

    owner: tuple[State, Tensor] | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        if self.owner and self.owner[0].name == name:
            state, parameter = self.owner
            self.maps[-1] = state.slow.setdefault(parameter, {})
            self.maps[-1][name] = value
        else:
            self.maps[0][name] = value

    def __delitem__(self, name: str) -> None:
        if self.owner and self.owner[0].name == name and name in self:
            self.owner[0].forget(self.owner[1])
        else:
            del self.maps[0][name]
