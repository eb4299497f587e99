"""What a pickle is read into: names, calls and mappings as plain records, tensors as views of storages."""

from dataclasses import dataclass, field
from typing import Any

SHOWN = 60  # characters of an argument


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle would have imported."""

    module: str
    name: str

    def __str__(self) -> str:
        module = "builtins" if self.module == "__builtin__" else self.module
        return f"{module}.{self.name}"


@dataclass(eq=False, slots=True)
class Mapping:
    """A dict or OrderedDict: pairs in the order in which they were set; only keys that are text are ever hashed."""

    pairs: list[tuple[Any, Any]]
    ordered: bool = False
    _by_name: dict[str, Any] | None = field(default=None, repr=False)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value last set for a text key."""
        return self.by_name().get(name, default)

    def by_name(self) -> dict[str, Any]:
        """Return the values of all keys that are text."""
        if self._by_name is None:
            self._by_name = {key: value for key, value in self.pairs if type(key) is str}
        return self._by_name


@dataclass(eq=False, slots=True)
class Record:
    """An object: what would have been called to make it, with what, and what would have been put into it."""

    made_by: Any
    arguments: tuple[Any, ...]
    state: Any = None
    pairs: list[tuple[Any, Any]] | None = None
    items: list[Any] | None = None

    @property
    def kind(self) -> str:
        """Its class, or the function that makes it, as text; "" where that is computed."""
        return str(self.made_by) if isinstance(self.made_by, Global) else ""

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute that is set on it."""
        return self.state.get(name, default) if isinstance(self.state, Mapping) else default


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Numbers in another member of the archive; `kind` as torch calls it."""

    key: str
    kind: str
    length: int


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage; offset and strides in elements, checked to stay inside."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def shown(value: Any, depth: int = 3) -> str:
    """Return a value as a short text, for people."""
    if isinstance(value, Record):
        if not depth:
            return "..."
        inner = ", ".join(shown(a, depth - 1) for a in value.arguments[:3]) + ", ..." * (len(value.arguments) > 3)
        return f"{shown(value.made_by, depth - 1)}({inner})"
    if isinstance(value, Global) or value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, str | bytes):
        return repr(value[:SHOWN]) + "..." * (len(value) > SHOWN)
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else "a large number"
    if isinstance(value, tuple | list) and depth:
        inner = ", ".join(shown(a, depth - 1) for a in value[:3]) + ", ..." * (len(value) > 3)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, Mapping) and depth:
        pairs = (f"{shown(k, depth - 1)}: {shown(v, depth - 1)}" for k, v in value.pairs[:3])
        return "{" + ", ".join(pairs) + ", ..." * (len(value.pairs) > 3) + "}"
    return f"<{type(value).__name__.lower()}>"
