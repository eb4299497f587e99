"""The bytes of a pickle -> a tree of records, without importing, calling or hashing anything that they name.

A pickle is a program for a stack machine: its instructions push values, look names up and call what was found. Here
they are walked one by one, and what they mean is in `machine.py`.

What it may cost is bounded: so many instructions at most, none of which does more than copy its part of the file.
Mappings are lists of pairs, so that no chosen keys can make a hash table slow, and there are no endless integers.
"""

import gc
import struct
from collections.abc import Callable
from typing import Any

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.machine import Machine
from cxr_fastai.inert.records import Mapping, Record, shown

MAX_PICKLE = 16 * 2**20  # bytes; a DenseNet121's export has a quarter of a megabyte
MAX_INSTRUCTIONS = 1_000_000  # a DenseNet121's export has 80,000
MAX_INTEGER = 1_024  # bytes
MAX_LINE = 2**16  # of text, in protocols 0 and 1
NEWEST = 5  # protocol
STOP = ord(".")

Instruction = Callable[[Machine], Any]


def walk(machine: Machine, *, every_protocol: bool = False) -> Any:
    """Return the object that the pickle in `machine` describes; it keeps what was named and called on the way.

    Parameters
    ----------
    machine
        Fresh, with the bytes.
    every_protocol
        Whether to follow what no export has as well: instructions of protocols 0 and 1, and bytes after the end.

    Raises
    ------
    ModelFileError
        Where the pickle is damaged, too large, or does what no honest export does. One line.
    """
    if len(machine.data) > MAX_PICKLE:
        raise ModelFileError(f"its pickle has {len(machine.data):,} bytes; at most {MAX_PICKLE:,} are read")
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of records would set it off, over and over, and none is garbage
    try:
        return _walk(machine, every_protocol)
    finally:
        if collecting:
            gc.enable()


def _walk(machine: Machine, every_protocol: bool) -> Any:
    data = machine.data
    known = {**OLD_INSTRUCTIONS, **INSTRUCTIONS} if every_protocol else INSTRUCTIONS
    try:
        for _ in range(MAX_INSTRUCTIONS):
            code = data[machine.position]
            machine.position += 1
            if code == STOP:
                return _result(machine, alone=not every_protocol)
            if code not in known:
                raise machine.refused(f"has the instruction {bytes([code])!r}")
            known[code](machine)
    except (IndexError, KeyError, ValueError, OverflowError):
        raise machine.refused("is damaged") from None
    raise ModelFileError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")


def _result(m: Machine, alone: bool) -> Any:
    if alone and (m.marks or len(m.stack) != 1 or m.position != len(m.data)):
        raise m.refused("ends with more or less than one object")
    return m.stack[-1]


# Values


def _pushes(value: Callable[[Machine], Any]) -> Instruction:
    """Return the instruction that pushes what `value` reads."""

    def push(m: Machine) -> None:
        m.stack.append(value(m))

    return push


def _integer(m: Machine, size: int) -> int:
    if size > MAX_INTEGER:
        raise m.refused("has an integer without bounds")
    return int.from_bytes(m.take(size), "little", signed=True)


def _protocol(m: Machine) -> None:
    if m.number(1) > NEWEST:
        raise m.refused("has an unknown protocol")


def _frame(m: Machine) -> None:
    if m.number(8) > len(m.data) - m.position:
        raise m.refused("is cut short")


def _text(m: Machine, size: int) -> str:
    return m.take(size).decode("utf-8", "surrogatepass")


def _tuple(count: int) -> Instruction:
    def push(m: Machine) -> None:
        if len(m.stack) < count:
            raise m.refused("makes a tuple of nothing")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return push


# Containers and objects


def _mark(m: Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _tuple_to_mark(m: Machine) -> None:
    items = m.to_mark()
    m.stack.append(tuple(items))


def _list_to_mark(m: Machine) -> None:
    items = m.to_mark()
    m.stack.append(items)


def _append(m: Machine) -> None:
    item = m.stack.pop()
    m.append(m.stack[-1], [item])


def _appends(m: Machine) -> None:
    items = m.to_mark()
    m.append(m.stack[-1], items)


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _set_items(m: Machine) -> None:
    items = m.to_mark()
    m.set_items(m.stack[-1], items)


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.name(module, name))


def _reduce(m: Machine) -> None:
    arguments = m.stack.pop()
    m.stack[-1] = m.reduce(m.stack[-1], arguments)


def _new_object(m: Machine) -> None:
    arguments = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], arguments, ".__new__")


def _new_object_with_names(m: Machine) -> None:
    named, arguments = m.stack.pop(), m.stack.pop()
    if not isinstance(named, Mapping) or not isinstance(arguments, tuple):
        raise m.refused("makes an object of nothing")
    m.stack[-1] = m.call(m.stack[-1], (*arguments[:16], named), ".__new__")


def _build(m: Machine) -> None:
    state = m.stack.pop()
    m.build(m.stack[-1], state)


def _storage(m: Machine) -> None:
    m.stack[-1] = m.storage(m.stack[-1])


INSTRUCTIONS: dict[int, Instruction] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): _mark,
    ord("0"): Machine.pop,
    ord("1"): Machine.to_mark,
    ord("2"): _pushes(lambda m: m.stack[-1]),
    ord("N"): _pushes(lambda m: None),
    0x88: _pushes(lambda m: True),
    0x89: _pushes(lambda m: False),
    ord("J"): _pushes(lambda m: _integer(m, 4)),
    ord("K"): _pushes(lambda m: m.number(1)),
    ord("M"): _pushes(lambda m: m.number(2)),
    0x8A: _pushes(lambda m: _integer(m, m.number(1))),
    0x8B: _pushes(lambda m: _integer(m, m.number(4))),
    ord("G"): _pushes(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("X"): _pushes(lambda m: _text(m, m.number(4))),
    0x8C: _pushes(lambda m: _text(m, m.number(1))),
    0x8D: _pushes(lambda m: _text(m, m.number(8))),
    ord("B"): _pushes(lambda m: m.take(m.number(4))),
    ord("C"): _pushes(lambda m: m.take(m.number(1))),
    0x8E: _pushes(lambda m: m.take(m.number(8))),
    0x96: _pushes(lambda m: m.take(m.number(8))),
    ord(")"): _pushes(lambda m: ()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): _tuple_to_mark,
    ord("]"): _pushes(lambda m: []),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): _pushes(lambda m: Mapping([])),
    ord("s"): _set_item,
    ord("u"): _set_items,
    0x8F: _pushes(lambda m: []),
    0x90: _appends,
    0x91: _list_to_mark,
    ord("h"): _pushes(lambda m: m.memo[m.number(1)]),
    ord("j"): _pushes(lambda m: m.memo[m.number(4)]),
    ord("q"): lambda m: m.remember(m.number(1)),
    ord("r"): lambda m: m.remember(m.number(4)),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("c"): _pushes(lambda m: m.name(m.line(), m.line())),
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _new_object,
    0x92: _new_object_with_names,
    ord("b"): _build,
    ord("Q"): _storage,
}


# What only `describe` follows, to show what a hostile pickle would have called: protocols 0 and 1, and the registry of
# extensions. No export has them.


def _dict_to_mark(m: Machine) -> None:
    items = m.to_mark()
    mapping = Mapping([])
    m.set_items(mapping, items)
    m.stack.append(mapping)


def _instance(m: Machine) -> None:
    called = m.name(m.line(), m.line())
    arguments = tuple(m.to_mark())
    m.stack.append(m.call(called, arguments))


def _object(m: Machine) -> None:
    called, *arguments = m.to_mark()
    m.stack.append(m.call(called, tuple(arguments)))


def _text_integer(m: Machine) -> int:
    return int(m.line().rstrip("L"))


OLD_INSTRUCTIONS: dict[int, Instruction] = {
    ord("I"): _pushes(_text_integer),
    ord("L"): _pushes(_text_integer),
    ord("F"): _pushes(lambda m: float(m.line())),
    ord("S"): _pushes(lambda m: m.line(MAX_LINE).strip("'\"")),
    ord("V"): _pushes(lambda m: m.line(MAX_LINE)),
    ord("T"): _pushes(lambda m: _text(m, m.number(4))),
    ord("U"): _pushes(lambda m: _text(m, m.number(1))),
    ord("l"): _list_to_mark,
    ord("d"): _dict_to_mark,
    ord("g"): _pushes(lambda m: m.memo[int(m.line())]),
    ord("p"): lambda m: m.remember(int(m.line())),
    ord("i"): _instance,
    ord("o"): _object,
    ord("P"): _pushes(lambda m: Record(m.name("persistent id", shown(m.line(MAX_LINE))), ())),
    0x82: _pushes(lambda m: m.name("extension registry", str(m.number(1)))),
    0x83: _pushes(lambda m: m.name("extension registry", str(m.number(2)))),
    0x84: _pushes(lambda m: m.name("extension registry", str(m.number(4)))),
}
