"""`Lookahead.state`: the inner optimizer's state, the slow weights and the slow momentum in one mapping.

The inner optimizer must not find the slow weight in its own state: most optimizers take a parameter with an empty entry
for a new parameter. So the slow weights are stored apart, and these two classes show both together. The classes are
dictionaries for tools that ask with `isinstance`. They store nothing themselves: every access goes to the objects that
hold the state.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lookahead_optim.torch._slow_weights import SlowWeights

__all__ = ["State"]


if TYPE_CHECKING:
    _MappingAndDict = MutableMapping[Any, Any]
else:

    class _MappingAndDict(MutableMapping, dict):
        pass


class _View(_MappingAndDict):
    """A mapping that is also a `dict`. The `dict` itself stays empty: every method that would read it is overridden."""

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(other) | dict(self)

    def __ior__(  # type: ignore[misc]
        self, other: Any
    ) -> Any:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return reversed(list(self))

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[Any, Any]:
        return dict(self)


class State(_View):
    """The inner optimizer's state, with an entry for each slow weight and each slow momentum.

    A view that a program keeps after the optimizer got another state has mappings of its own.
    """

    def __init__(
        self,
        inner: MutableMapping[Any, Any],
        slow_weights: "SlowWeights",
        slow_by_parameter: dict[Tensor, Tensor],
        momentum_by_parameter: dict[Tensor, Tensor],
    ) -> None:
        self.inner, self.slow_weights = inner, slow_weights
        self.slow_by_parameter, self.momentum_by_parameter = slow_by_parameter, momentum_by_parameter
        self.own = {slow_weights.name: slow_by_parameter, slow_weights.momentum_name: momentum_by_parameter}

    @classmethod
    def of(cls, given: Mapping[Any, Any], slow_weights: "SlowWeights") -> "State":
        """Return a view of a state that a program assigns to an optimizer."""
        has_slow = any(isinstance(entries, Mapping) and slow_weights.name in entries for entries in given.values())
        if isinstance(given, defaultdict) and not has_slow:
            return cls(given, slow_weights, {}, {})
        state = cls(defaultdict(dict), slow_weights, {}, {})
        state.update(given)
        return state

    def __getitem__(self, key: Any) -> Any:
        # A key without an entry gets a new entry, as in PyTorch's own state. But reading a slow weight must not make an
        # entry for the inner optimizer, which may take it for its own.
        entries = {} if key in self.slow_by_parameter and key not in self.inner else self.inner[key]
        # Some optimizers keep values that belong to no parameter beside the entries of the parameters.
        if not isinstance(key, Tensor) or not isinstance(entries, MutableMapping):
            return entries
        view = Entries()
        view.entries, view.owner = entries, (self, key)
        return view

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def __setitem__(self, key: Any, entries: Any) -> None:
        if isinstance(key, Tensor) and isinstance(entries, Mapping):
            own = {name: entries[name] for name in self.own if entries.get(name) is not None}
            self.forget(key)
            if isinstance(entries, Entries) and entries.owner is not None:
                # Keep the entries themselves, as a program may change them after it has assigned them.
                entries = entries.entries
            elif own or isinstance(entries, Entries):
                entries = {name: value for name, value in entries.items() if name not in self.own}
            for name, value in own.items():
                self.assign(key, name, value)
        self.inner[key] = entries

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self.forget(key)
        self.inner.pop(key, None)

    def pop(self, key: Any, *default: Any) -> Any:
        if default and key not in self:
            return default[0]
        entries = self[key]
        entries = dict(entries) if isinstance(entries, Entries) else entries
        del self[key]
        return entries

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = {} if default is None else default
        return self[key]

    def clear(self) -> None:
        for key in list(self):
            self.forget(key)
        self.inner.clear()

    def assign(self, key: Tensor, name: str, value: Any) -> None:
        """Take the slow weight or the slow momentum of a parameter."""
        if name == self.slow_weights.name:
            self.slow_weights.assign(key, value, self.slow_by_parameter)
        else:
            self.slow_weights.assign_momentum(key, value, self.momentum_by_parameter)

    def forget(self, key: Any) -> None:
        """Drop the slow weight and the slow momentum of a parameter, if there are any."""
        for by_parameter in self.own.values():
            by_parameter.pop(key, None)
        self.slow_weights.changed()

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.inner, *(key for key in self.slow_by_parameter if key not in self.inner)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        return key in self.inner or key in self.slow_by_parameter

    def __reduce__(self) -> Any:
        # A copy is a plain dictionary, without the optimizer.
        copied = {key: dict(entries) if isinstance(entries, Entries) else entries for key, entries in self.items()}
        return defaultdict, (dict, copied)


class Entries(_View):
    """A parameter's state: the inner optimizer's entries, the slow weight and the slow momentum.

    A write goes to the object that holds the entry.

    The slow weight that is read here is a copy. Some programs reset an optimizer by zeroing each tensor of its state in
    place, or move the state to a device tensor by tensor. The slow weight is not a moment. Its value must survive such
    a reset, and it follows its parameter to a device by itself. To change it, assign the entry. The slow momentum is a
    moment like others.
    """

    entries: MutableMapping[str, Any]
    owner: tuple[State, Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.entries = dict(*args, **kwargs)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def _is_own(self, name: object) -> bool:
        return self.owner is not None and name in self.owner[0].own

    def __getitem__(self, name: str) -> Any:
        if self.owner is not None and self._is_own(name):
            state, parameter = self.owner
            value = state.own[name][parameter].detach()
            if name != state.slow_weights.name:
                return value
            return value.to(parameter.device, state.slow_weights.dtype_of(parameter), copy=True)
        return self.entries[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if self.owner is not None and self._is_own(name):
            state, parameter = self.owner
            state.assign(parameter, name, value)
        else:
            if self.owner is not None and not self.entries and self.owner[1] not in self.owner[0].inner:
                self.owner[0].inner[self.owner[1]] = self.entries
            self.entries[name] = value

    def __delitem__(self, name: str) -> None:
        if self.owner is not None and self._is_own(name) and name in self:
            state, parameter = self.owner
            if name == state.slow_weights.name:
                state.forget(parameter)
            else:
                del state.momentum_by_parameter[parameter]
                state.slow_weights.changed()
        else:
            del self.entries[name]

    def __contains__(self, name: object) -> bool:
        if self.owner is not None and self._is_own(name):
            state, parameter = self.owner
            return parameter in state.own[name]  # type: ignore[index]
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        yield from self.entries
        if self.owner is not None:
            yield from (name for name in self.owner[0].own if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
