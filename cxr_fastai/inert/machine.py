"""What the instructions of a pickle mean here: names become `Global`s, calls become `Record`s, and nothing runs.

Understood are only tensors (as torch's rebuilding functions are told to make them), torch's storages, OrderedDict and
set. `instructions.py` walks the bytes and calls the methods below.
"""

from collections.abc import Callable
from typing import Any

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.records import Global, Mapping, Record, Storage, Tensor, shown

MAX_NAME = 256  # characters
MAX_NAMES = 2_000  # different ones
MAX_DIMENSIONS = 8
MAX_ARGUMENTS = 16  # of the functions that are understood
MAX_COMPUTED = 5_000  # calls whose text depends on their arguments

# What torch calls its storages, and their elements as numpy calls them.
STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
HASHABLE = (str, bytes, int, float, tuple, Global, Record, type(None))
# Calls that are listed with their arguments, since these say what is got.
TELLING = frozenset({
    "builtins.getattr", "builtins.reduce", "functools.reduce", "_functools.reduce",
    "cloudpickle.cloudpickle.subimport", "cloudpickle.cloudpickle._builtin_type",
})
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")


class Machine:
    """The stack, the marks and the memo of one pickle.

    Parameters
    ----------
    data
        The pickle.
    storages : dict of str to int, or None
        Bytes of each member that holds numbers; None where there are none to check against.

    Attributes
    ----------
    globals : dict
        Every name that would have been imported.
    calls : dict of str to Record
        Every name that would have been called -> the first call. Making an object is a call of `__new__`; where it is
        computed what is called, the name ends in "()".
    """

    def __init__(self, data: bytes, storages: dict[str, int] | None):
        self.data, self.storages = data, storages
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.calls: dict[str, Record] = {}
        self.computed = 0

    def refused(self, what: str) -> ModelFileError:
        """Return the error for an instruction that no honest export has."""
        return ModelFileError(f"its pickle {what} near byte {self.position:,}, which no export of fastai does")

    # The bytes after an instruction

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        end = self.position + count
        if end > len(self.data):
            raise self.refused("is cut short")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, count: int) -> int:
        """Return the next bytes as a whole number, not negative."""
        return int.from_bytes(self.take(count), "little")

    def line(self, longest: int = MAX_NAME) -> str:
        """Return the text up to the end of the line."""
        end = self.data.find(b"\n", self.position, self.position + longest + 1)
        if end < 0:
            raise self.refused("has a line without an end")
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text

    # The stack

    def to_mark(self) -> list[Any]:
        """Return what was pushed since the last mark, and take it off."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self) -> None:
        """Drop the topmost object, or the mark on top."""
        if self.stack:
            del self.stack[-1]
        else:
            self.to_mark()

    def remember(self, number: int) -> None:
        """Keep the topmost object under a number."""
        self.memo[number] = self.stack[-1]

    # What names and calls would have done

    def name(self, module: Any, name: Any) -> Global:
        """Return a name that would have been imported."""
        if type(module) is not str or type(name) is not str or not 0 < len(module) + len(name) <= MAX_NAME:
            raise self.refused("imports something that is no name")
        if not (module + name).isprintable():
            raise self.refused(f"imports {module!r}")
        if (module, name) not in self.globals and len(self.globals) >= MAX_NAMES:
            raise self.refused(f"names more than {MAX_NAMES:,} things")
        return self.globals.setdefault((module, name), Global(module, name))

    def call(self, called: Any, arguments: Any, suffix: str = "") -> Record:
        """Return the record of a call, or of the making of an object where `suffix` is ".__new__"."""
        if not isinstance(called, Global | Record) or not isinstance(arguments, tuple):
            raise self.refused(f"calls {shown(called)}")
        record = Record(called, arguments)
        name = str(called) if isinstance(called, Global) else ""
        if not name or name in TELLING:
            self.computed += 1
            if self.computed > MAX_COMPUTED:
                raise self.refused(f"computes more than {MAX_COMPUTED:,} calls")
            name = shown(record) if name else f"{shown(called)}()"
        name += suffix
        if name not in self.calls:
            if len(self.calls) >= MAX_NAMES:
                raise self.refused(f"calls more than {MAX_NAMES:,} things")
            self.calls[name] = record
        return record

    def reduce(self, called: Any, arguments: Any) -> Any:
        """Return the record of a call, or what a function that is understood gives."""
        record = self.call(called, arguments)
        understood = UNDERSTOOD.get(called) if isinstance(called, Global) else None
        if understood is None:
            return record
        if len(arguments) > MAX_ARGUMENTS:
            raise self.refused(f"calls {called} with {len(arguments):,} arguments")
        return understood(self, arguments)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Put keys and values, one after the other, into a mapping or an object that is one."""
        keys = items[::2]
        if len(items) % 2 or not all(isinstance(key, HASHABLE) for key in keys):
            raise self.refused("has a key that cannot be one")
        if isinstance(target, Record):
            target.pairs = target.pairs or []
        elif not isinstance(target, Mapping):
            raise self.refused(f"sets an item of {shown(target)}")
        target.pairs.extend(zip(keys, items[1::2], strict=True))  # type: ignore[union-attr]

    def append(self, target: Any, items: list[Any]) -> None:
        """Append to a list or an object that is one."""
        if isinstance(target, Record):
            target.items = target.items or []
            target = target.items
        if not isinstance(target, list):
            raise self.refused(f"appends to {shown(target)}")
        target.extend(items)

    def build(self, target: Any, state: Any) -> None:
        """Give an object its state."""
        if isinstance(target, Mapping) and target.ordered and isinstance(state, Mapping):
            return  # the attributes of an OrderedDict, which a state dict has: `_metadata`
        if not isinstance(target, Record) or target.state is not None:
            raise self.refused(f"sets the state of {shown(target)}")
        if not isinstance(state, Mapping | tuple | Record | list | str | bytes | int | float):
            raise self.refused(f"sets a state that is {shown(state)}")
        target.state = state

    # What is understood

    def tensor(self, arguments: tuple[Any, ...]) -> Tensor:
        """Return the tensor that torch's `_rebuild_tensor_v2` would have made."""
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
            raise self.refused("has a tensor that is not made of a storage")
        storage, offset, shape, strides = arguments[:4]
        if not _sizes((offset,)) or not _sizes(shape) or not _sizes(strides) or len(shape) != len(strides):
            raise self.refused("has a tensor of impossible sizes")
        if not _inside(storage.length, offset, shape, strides):
            raise self.refused("has a tensor that reaches beyond its storage")
        return Tensor(storage, offset, shape, strides)

    def parameter(self, arguments: tuple[Any, ...]) -> Tensor:
        """Return the data of a parameter, which `_rebuild_parameter` would have wrapped."""
        if len(arguments) != 3 or not isinstance(arguments[0], Tensor):
            raise self.refused("has a parameter that is no tensor")
        return arguments[0]

    def typed(self, arguments: tuple[Any, ...]) -> Tensor:
        """Return the tensor inside one of fastai's classes, which `_rebuild_from_type_v2` would have made."""
        function, inner = (arguments[0], arguments[2]) if len(arguments) == 4 else (None, ())
        if not isinstance(inner, tuple) or function not in (REBUILD, REBUILD_PARAMETER):
            raise self.refused("has a tensor that is not made as torch makes it")
        return self.tensor(inner) if function == REBUILD else self.parameter(inner)

    def ordered_dict(self, arguments: tuple[Any, ...]) -> Mapping:
        """Return an OrderedDict; the pickles of fastai make it empty."""
        if arguments:
            raise self.refused("has an OrderedDict that is not made empty")
        return Mapping([], ordered=True)

    def set_of(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Return the items of a set; none is hashed."""
        if len(arguments) != 1 or not isinstance(arguments[0], list):
            raise self.refused("has a set that is not made of a list")
        return arguments[0]

    def storage(self, reference: Any) -> Storage:
        """Return the storage that a persistent id names."""
        if not isinstance(reference, tuple) or len(reference) != 5 or type(reference[0]) is not str:
            raise self.refused("refers to something that is no storage")
        word, kind, key, device, length = reference
        if word != "storage" or not isinstance(kind, Global) or kind.module != "torch" or kind.name not in STORAGES:
            raise self.refused(f"refers to {shown(kind)}, not to a storage of numbers")
        if type(key) is not str or type(device) is not str or not _sizes((length,)):
            raise self.refused("has a storage without a name or a length")
        if self.storages is not None and self.storages.get(key) != length * int(STORAGES[kind.name][2]):
            raise self.refused(f"has a storage {shown(key)} of {shown(length)} elements, not what the archive holds,")
        return Storage(key, kind.name, length)


def _sizes(numbers: Any) -> bool:
    """Tell whether this is a tuple of few whole numbers, none negative."""
    few = isinstance(numbers, tuple) and len(numbers) <= MAX_DIMENSIONS
    return few and all(type(n) is int and n >= 0 for n in numbers)


def _inside(length: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a view stays inside a storage; it may repeat elements, as torch's `expand` does."""
    if 0 in shape:
        return offset <= length
    return offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) < length


UNDERSTOOD: dict[Global, Callable[[Machine, tuple[Any, ...]], Any]] = {
    REBUILD: Machine.tensor,
    REBUILD_PARAMETER: Machine.parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): Machine.typed,
    Global("collections", "OrderedDict"): Machine.ordered_dict,
    Global("__builtin__", "set"): Machine.set_of,
    Global("builtins", "set"): Machine.set_of,
}
