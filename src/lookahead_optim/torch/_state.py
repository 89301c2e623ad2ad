"""`Lookahead.state`: the inner optimizer's state and the slow weights, as one."""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["State"]


class State(MutableMapping[Tensor, Any]):
    """The inner optimizer's state with one more entry per parameter, its slow weight.

    `on_change` is called whenever a slow weight comes, goes or is replaced.
    """

    def __init__(
        self,
        inner: MutableMapping[Tensor, Any],
        slow: dict[Tensor, dict[str, Tensor]],
        name: str,
        on_change: Callable[[], None],
    ) -> None:
        self.inner, self.slow, self.name, self.on_change = inner, slow, name, on_change

    def __getitem__(self, parameter: Tensor) -> "ParameterState":
        entries = ParameterState(self.inner[parameter], self.slow.get(parameter, {}))
        entries.owner = self, parameter
        return entries

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        # `__getitem__` would make an entry, as that of PyTorch's own state does.
        return self[parameter] if parameter in self else default  # noqa: SIM401

    def __setitem__(self, parameter: Tensor, entries: Mapping[str, Any]) -> None:
        entries = dict(entries)
        self.forget(parameter)
        if self.name in entries:
            self.slow[parameter] = {self.name: entries.pop(self.name)}
        self.inner[parameter] = entries

    def __delitem__(self, parameter: Tensor) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self.forget(parameter)
        self.inner.pop(parameter, None)

    def pop(self, parameter: Tensor, *default: Any) -> Any:
        if default and parameter not in self:
            return default[0]
        entries = self[parameter]
        del self[parameter]
        return entries

    def setdefault(self, parameter: Tensor, default: Any = None) -> Any:
        if parameter not in self:
            self[parameter] = default or {}
        return self[parameter]

    def clear(self) -> None:
        self.slow.clear()
        self.inner.clear()
        self.on_change()

    def forget(self, parameter: Tensor) -> None:
        """Drop the slow weight of a parameter, if there is one."""
        self.slow.pop(parameter, None)
        self.on_change()

    def __iter__(self) -> Iterator[Tensor]:
        return iter([*self.inner, *(parameter for parameter in self.slow if parameter not in self.inner)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.inner or parameter in self.slow


class ParameterState(ChainMap[str, Any]):
    """A parameter's state: the inner optimizer's entries and the slow weight, each written to where it belongs."""

    owner: tuple[State, Tensor] | None = None

    def __reduce__(self) -> Any:
        # A copy is no view, and goes without the optimizer.
        return dict, (dict(self),)

    def __setitem__(self, name: str, value: Any) -> None:
        if self.owner and self.owner[0].name == name:
            state, parameter = self.owner
            self.maps[-1] = state.slow.setdefault(parameter, {})
            self.maps[-1][name] = value
            state.on_change()
        else:
            self.maps[0][name] = value

    def __delitem__(self, name: str) -> None:
        if self.owner and self.owner[0].name == name and name in self:
            self.owner[0].forget(self.owner[1])
            self.maps[-1] = {}
        else:
            del self.maps[0][name]

    # Those of `ChainMap` see the first of its dictionaries alone.
    pop = MutableMapping.pop  # type: ignore[assignment]
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
