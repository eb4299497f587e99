"""Hostile files in torch's format, for `bench/inert.py` and the tests; nothing here is ever unpickled.

`pickles(honest, canary)` are data.pkl's: pieces of assembler that make `canary` when unpickled, put before an honest
export's own, so that fastai would load it as if nothing had happened; and damaged ones. `archives(members)` are whole
files whose packing is wrong. Standard library only.
"""

import io
import marshal
import os
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping

# Assembler


def name(module: str, attribute: str) -> bytes:
    """Return the instruction that imports."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """Return the instruction that pushes a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def raw(value: bytes) -> bytes:
    """Return the instruction that pushes bytes."""
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    """Return the instruction that pushes a whole number."""
    return pickle.dumps(value, 2)[2:-1]


def row(*items: bytes) -> bytes:
    """Return the instructions that push a tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    """Return the instructions that call."""
    return function + row(*arguments) + b"R"


def pieces(canary: str) -> dict[str, bytes]:
    """Return, by name, instructions that leave one object on the stack and run something on the way."""
    command, python = text(f"touch {canary}"), f"open({canary!r}, 'w').close()"
    code = text(python)
    compiled = marshal.dumps(compile(python, "x", "exec"))
    getattr_, import_ = name("__builtin__", "getattr"), name("cloudpickle.cloudpickle", "subimport")
    system = call(getattr_, call(import_, text("os")), text("system"))
    function = call(name("types", "FunctionType"), call(name("marshal", "loads"), raw(compiled)), b"}")
    stored = call(
        name("cloudpickle.cloudpickle", "_make_function"), call(name("marshal", "loads"), raw(compiled)), b"}NNN"
    )
    inner = pickle.dumps(0)[:-1] + call(name("posix", "system"), command) + b"."
    nested = raw(pack({"data.pkl": inner}))
    opened = call(name("_io", "BytesIO"), nested)
    return {
        "os.system": call(name("os", "system"), command),
        "posix.system": call(name("posix", "system"), command),
        "builtins.eval": call(name("builtins", "eval"), code),
        "builtins.exec": call(name("builtins", "exec"), code),
        "__builtin__.eval": call(name("__builtin__", "eval"), code),
        "compile, exec": call(
            name("builtins", "exec"), call(name("builtins", "compile"), code, text("x"), text("exec"))
        ),
        "subprocess.Popen": call(name("subprocess", "Popen"), command, *[b"N"] * 7, b"\x88"),
        "subprocess.getoutput": call(name("subprocess", "getoutput"), command),
        "runpy._run_code": call(name("runpy", "_run_code"), call(name("marshal", "loads"), raw(compiled)), b"}"),
        "importlib.import_module": call(name("importlib", "import_module"), text("antigravity")),
        "__import__": call(name("builtins", "__import__"), text("antigravity")),
        "pickle.loads": call(name("pickle", "loads"), raw(inner)),
        "_pickle.loads": call(name("_pickle", "loads"), raw(inner)),
        "torch.storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), nested),
        "torch.load of a nested archive": call(name("torch.serialization", "load"), opened),
        "functools.partial, called": call(call(name("functools", "partial"), name("posix", "system"), command)),
        "functools.reduce": call(name("functools", "reduce"), system, b"]" + command + b"a"),
        "operator.methodcaller": call(
            call(name("operator", "methodcaller"), text("system"), command), call(import_, text("os"))
        ),
        "operator.attrgetter": call(
            call(call(name("operator", "attrgetter"), text("system")), call(import_, text("os"))), command
        ),
        "getattr chain": call(system, command),
        "getattr of a module in fastai": call(
            call(getattr_, name("fastai.imports", "os"), text("system")), command
        ),
        "map, list": call(name("builtins", "list"), call(name("builtins", "map"), system, b"]" + command + b"a")),
        "types.FunctionType from marshal": call(function),
        "cloudpickle._make_function, called": call(stored),
        "numpy runstring": call(name("numpy.testing._private.utils", "runstring"), code, b"}"),
        "fastcore.xtras.run": call(name("fastcore.xtras", "run"), command),
        "pandas.read_pickle": call(name("pandas.io.pickle", "read_pickle"), text(canary)),
        "pip": call(name("pip._internal.cli.main", "main"), b"]" + text("--version") + b"a"),
        "timeit": call(name("timeit", "timeit"), code),
        "open for writing": call(name("builtins", "open"), text(canary), text("w")),
        "shutil.rmtree": call(name("shutil", "rmtree"), text(canary)),
        "socket": call(name("socket", "create_connection"), row(text("127.0.0.1"), integer(9))),
        "ctypes": call(name("ctypes", "CDLL"), text("libc.so.6")),
        "webbrowser": call(name("webbrowser", "open"), text(f"file://{canary}")),
        "breakpoint": call(name("builtins", "breakpoint")),
        "NEWOBJ of Popen": name("subprocess", "Popen") + row(command) + b"\x81",
        "NEWOBJ_EX": name("os", "system") + row(command) + b"}\x92",
        "STACK_GLOBAL": text("posix") + text("system") + b"\x93" + row(command) + b"R",
        "STACK_GLOBAL, dotted": text("torch.serialization") + text("os.system") + b"\x93" + row(command) + b"R",
        "__reduce_ex__ of an object": pickle.dumps(Evil(f"touch {canary}"), 2)[2:-1],
        "BUILD on a function": name("fastai.learner", "load_learner") + b"}" + text("__code__") + code + b"sb",
        "BUILD with __setstate__": name("fastai.learner", "Learner") + b")\x81}" + text("x") + b"Nsb" + code + b"b",
        "SETITEM on a class": name("fastai.learner", "Learner") + text("x") + code + b"s",
        "APPEND to a class": name("sys", "path") + text(canary) + b"a",
        "INST": b"(" + command + b"iposix\nsystem\n",
        "OBJ": b"(" + name("posix", "system") + command + b"o",
        "protocol 0": f"cposix\nsystem\n(S'touch {canary}'\ntR".encode(),
        "EXT1": b"\x82\x01" + row(command) + b"R",
        "EXT4": b"\x84\x01\x00\x00\x00" + row(command) + b"R",
        "persistent id, a path": f"P{canary}\n".encode(),
        "persistent id that names a file": text(canary) + b"Q",
        "storage that names a file": row(*storage("FloatStorage", "../../../../etc/passwd", 4)) + b"Q",
        "storage that is not there": row(*storage("FloatStorage", "987654321", 4)) + b"Q",
        "storage of another type": row(*storage("DoubleStorage", "0", 1)) + b"Q",
        "storage of a class": row(text("storage"), name("posix", "system"), text("0"), text("cpu"), integer(1)) + b"Q",
        "storage of 2**70": row(*storage("FloatStorage", "0", 2**70)) + b"Q",
        "set of calls": call(name("__builtin__", "set"), call(name("builtins", "map"), system, b"]" + command + b"a")),
        "OrderedDict of calls": call(name("collections", "OrderedDict"), b"]" + row(text("x"), command) + b"a"),
        "tensor of a type": call(
            name("torch._tensor", "_rebuild_from_type_v2"), system, name("torch", "Tensor"), row(command), b"N"
        ),
    }  # fmt: skip


class Evil:
    """An object that names what shall be called when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce_ex__(self, protocol: object) -> tuple:
        return os.system, (self.command,)


def storage(kind: str, key: str, length: int) -> tuple[bytes, ...]:
    """Return the parts of a persistent id of torch's."""
    return text("storage"), name("torch", kind), text(key), text("cpu"), integer(length)


def pickles(honest: bytes, canary: str) -> dict[str, Callable[[], bytes]]:
    """Return makers of the data.pkl of hostile exports by name, from that of an honest one of protocol 2."""
    head, rest = honest[:2], honest[2:]
    made: dict[str, Callable[[], bytes]] = {
        what: lambda piece=piece: head + piece + b"0" + rest  # type: ignore[misc]
        for what, piece in pieces(canary).items()
    }
    alone = pieces(canary)["os.system"]
    made["nothing else"] = lambda: head + alone + b"."
    made["a second pickle behind"] = lambda: honest + head + alone + b"."
    return {**made, **damaged(head, rest), **bent_tensors(honest)}


def damaged(head: bytes, rest: bytes) -> dict[str, Callable[[], bytes]]:
    """Return makers of pickles that cost, or that no pickler writes."""
    getattr_ = name("__builtin__", "getattr")
    return {
        "memo bomb": lambda: head + b")q\0" + b"h\0h\0h\0h\0(h\0h\0h\0h\0tq\0" * 1_000 + b".",
        "deep tuples": lambda: head + b")" + b"\x85" * 300_000 + b".",
        "deep calls": lambda: head + (name("a", "b") + b"(") * 20_000 + b"N" + b"tR" * 20_000 + b".",
        "a name that clears the terminal": lambda: head + text("a\x1b[2J\n") + text("b") + b"\x930" + rest,
        "many marks": lambda: head + b"(" * 900_000 + b".",
        "instructions without end": lambda: head + b"N0" * 600_000 + b"N.",
        "computed calls without end": lambda: head + getattr_ + b"q\0)q\x010" + b"h\0h\x01R0" * 90_000 + rest,
        "names without end": lambda: head + b"".join(name("a", f"b{i}") + b"0" for i in range(5_000)) + rest,
        "an integer without end": lambda: head + b"\x8b" + struct.pack("<I", 10**6) + b"\xff" * 10**6 + b"0" + rest,
        "a text that is longer than the file": lambda: head + b"\x8d" + struct.pack("<Q", 2**40) + rest,
        "a negative text": lambda: head + b"X\xff\xff\xff\xff" + rest,
        "a frame beyond the end": lambda: head + b"\x95" + struct.pack("<Q", 2**40) + rest,
        "a memo that is not there": lambda: head + b"j\xff\xff\xff\x7f" + rest,
        "an empty stack": lambda: head + b"R" + rest,
        "a name without end": lambda: head + b"cposix" + b"x" * 2_000 + rest.replace(b"\n", b""),
        "protocol 9": lambda: b"\x80\x09" + rest,
        "17 MB": lambda: head + b"N0" * (17 * 2**19) + rest,
        "cut short": lambda: head + rest[: len(rest) // 2],
        "empty": lambda: b"",
    }


def bent_tensors(honest: bytes) -> dict[str, Callable[[], bytes]]:
    """Return makers of an honest pickle with the sizes of its first convolution changed."""
    return {
        "a negative offset": lambda: with_sizes(honest, offset=-1),
        "an offset beyond the storage": lambda: with_sizes(honest, offset=10**6),
        "strides beyond the storage": lambda: with_sizes(honest, strides=(2**40, 49, 7, 1)),
        "negative strides": lambda: with_sizes(honest, strides=(147, 49, -7, 1)),
        "sizes beyond the storage": lambda: with_sizes(honest, shape=(2**62, 3, 7, 7)),
        "a weight of 2**40 equal numbers": lambda: with_sizes(honest, shape=(2**40, 3, 7, 7), strides=(0, 49, 7, 1)),
        "another shape": lambda: with_sizes(honest, shape=(64, 3, 7, 6)),
        "fewer strides than sizes": lambda: with_sizes(honest, strides=(49, 7, 1)),
        "sizes that are texts": lambda: with_sizes(honest, shape=("a", "b", "c", "d")),
        "nine dimensions": lambda: with_sizes(honest, shape=(1,) * 9, strides=(1,) * 9),
        "sizes of 1,000 bytes": lambda: with_sizes(honest, shape=(2**8000, 3, 7, 7)),
    }


def with_sizes(honest: bytes, offset: int = 0, shape: tuple = (64, 3, 7, 7), strides: tuple = (147, 49, 7, 1)) -> bytes:
    """Return a pickle with other numbers for its first tensor of 64×3×7×7; they follow its storage."""
    found = list(pickletools.genops(honest))
    for i, (opcode, _, at) in enumerate(found):
        if opcode.name == "BINPERSID" and [value for _, value, _ in found[i + 3 : i + 7]] == [64, 3, 7, 7]:
            tuples = [k for k in range(i, i + 20) if found[k][0].name == "TUPLE"]
            numbers = integer(offset) + row(*map(_item, shape)) + row(*map(_item, strides))
            return honest[: at + 1] + numbers + honest[found[tuples[1] + 1][2] :]
    raise ValueError("no tensor of 64×3×7×7")


def _item(value: object) -> bytes:
    return text(value) if isinstance(value, str) else integer(int(value))  # type: ignore[call-overload]


# Archives


def pack(members: Mapping[str, bytes | memoryview], folder: str = "x") -> bytes:
    """Return the archive that `torch.save` makes of members; data begin at multiples of 64."""
    body, directory = bytearray(), bytearray()
    for key, content in members.items():
        raw_name, crc, at = f"{folder}/{key}".encode(), zlib.crc32(content), len(body)
        padding = -(at + 30 + len(raw_name) + 4) % 64
        head = (b"PK\3\4", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(raw_name), padding + 4)
        body += struct.pack("<4s5H3I2H", *head) + raw_name + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        body += bytes(content) + struct.pack("<4s3I", b"PK\7\x08", crc, len(content), len(content))
        entry = (b"PK\1\2", 0, 0, 0x0808, 0, 0, 0, crc, len(content), len(content), len(raw_name), 0, 0, 0, 0, 0, at)
        directory += struct.pack("<4s6H3I5H2I", *entry) + raw_name
    n, length, start = len(members), len(directory), len(body)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, n, n, length, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, n, n, length, start, 0)
    return bytes(body + directory + end)


def zipped(members: Mapping[str, bytes | memoryview], folder: str = "x/", **options: int) -> bytes:
    """Return the archive that Python's zipfile makes of members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:  # type: ignore[arg-type]
        for key, content in members.items():
            archive.writestr(folder + key, bytes(content))
    return file.getvalue()


def twice(members: Mapping[str, bytes]) -> bytes:
    """Return an archive that has its pickle twice."""
    packed = pack({**members, "data.pk2": members["data.pkl"]})
    return packed.replace(b"x/data.pk2", b"x/data.pkl")


def overlapping(sound: bytes) -> bytes:
    """Return an archive whose second member is said to lie where the first one does."""
    second = sound.index(b"PK\1\2", sound.index(b"PK\1\2") + 1)
    return sound[: second + 42] + b"\0\0\0\0" + sound[second + 46 :]


def archives(members: Mapping[str, bytes]) -> dict[str, Callable[[], bytes]]:
    """Return makers of whole files whose packing is wrong by name, from the members of a small sound one."""
    sound = pack(members)
    bomb = {**members, "data/0": b"\0" * 2**27}
    return {
        "a zip bomb": lambda: zipped(bomb, compression=zipfile.ZIP_DEFLATED),
        "packed by another program": lambda: zipped(members),
        "a member twice": lambda: twice(members),
        "a member outside of its folder": lambda: pack({**members, "../../canary": b"x"}),
        "an absolute member": lambda: pack({**members, "/etc/canary": b"x"}),
        "two folders": lambda: pack(members).replace(b"x/version", b"y/version"),
        "TorchScript": lambda: pack({**members, "code/__torch__.py": b"import os"}),
        "no pickle": lambda: pack({k: v for k, v in members.items() if k != "data.pkl"}),
        "another byte order": lambda: pack({**members, "byteorder": b"big"}),
        "a wrong checksum": lambda: sound.replace(members["data.pkl"], b"\x80\x03" + members["data.pkl"][2:]),
        "bytes before": lambda: b"MZ" + sound,
        "bytes behind": lambda: sound + b"\0",
        "a comment": lambda: sound[:-2] + b"\1\0x",
        "cut short": lambda: sound[: len(sound) // 2],
        "more members than there are": lambda: sound[:-12] + b"\xff\xff" + sound[-10:],
        "members over each other": lambda: overlapping(sound),
        "a bare pickle": lambda: bytes(members["data.pkl"]),
        "empty": lambda: b"",
    }


class Watch:
    """Notes every audit event (PEP 578) of this process between `with` and its end, but files opened for reading.

    Python raises one for each import, compilation, execution, process, socket, file and call through ctypes. A hook
    stays for the life of the process, so that there should be one Watch in it.
    """

    def __init__(self) -> None:
        self.on, self.events = False, []  # type: tuple[bool, list[str]]
        sys.addaudithook(self._note)

    def __enter__(self) -> list[str]:
        self.on, self.events = True, []
        return self.events

    def __exit__(self, *_: object) -> None:
        self.on = False

    def _note(self, event: str, arguments: tuple) -> None:
        if not self.on or event in QUIET:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return
        self.events.append(f"{event} {arguments!r:.200}")


QUIET = frozenset({"builtins.id", "object.__getattr__", "sys._getframe"})  # looking at objects
