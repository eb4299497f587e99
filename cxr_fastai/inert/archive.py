"""The bytes of a file of torch's -> its members, once every byte of it is accounted for.

`torch.save` writes a zip in one way only: each member uncompressed, its sizes in a descriptor after it, padded to a
boundary; then the directory, no dates, no comments. So the few bytes that are no data are made again from the directory
and compared, and each member against its CRC, which torch itself never looks at. A changed byte is seen wherever it
is, and there is nothing to unpack, no member behind another, none twice.
"""

import re
import struct
import zlib

from cxr_fastai.errors import ModelFileError

MAX_MEMBERS = 50_000  # a DenseNet121's export has 750
MAX_NAME = 300
ZIP = b"PK\x03\x04"
LOCAL, CENTRAL, DESCRIPTOR, END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), "<4s3I", "<4s4H2IH"
END_64, LOCATOR = "<4sQ2H2I4Q", "<4sIQI"
FLAGS = 0x0808  # names in UTF-8, sizes after the data
# What torch puts beside the pickle and the storages, by itself.
PLAIN_MEMBERS = frozenset(
    ("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
)


def members_of(data: bytes) -> dict[str, memoryview]:
    """Return the members of an archive as `torch.save` writes it, by their names below its one folder.

    Raises
    ------
    ModelFileError
        Where it is another kind of file, was packed by another program, or any byte of it was changed.
    """
    if data[:4] != ZIP:
        raise ModelFileError("not a file that torch.save wrote since version 1.6 (it is no zip); save it again")
    try:
        found = _walk_directory(memoryview(data))
    except (struct.error, UnicodeDecodeError):
        raise _damaged("its directory is cut short") from None
    folders = {name.partition("/")[0] for name in found}
    if len(folders) != 1:
        raise _damaged("its members are in several folders")
    members = {name.partition("/")[2]: content for name, content in found.items()}
    strange = next((n for n in members if n not in PLAIN_MEMBERS and not re.fullmatch(r"data/\d{1,20}", n)), None)
    if strange is not None:
        raise ModelFileError(f"it has a member {strange[:60]!r}, which no export has; export it again")
    if "data.pkl" not in members or bytes(members.get("byteorder", b"little")) != b"little":
        raise ModelFileError("it has no data.pkl, or its numbers are in another byte order; export it again")
    return members


def _damaged(reason: str) -> ModelFileError:
    return ModelFileError(f"damaged, or packed by another program than torch ({reason}); copy or export it again")


def _walk_directory(data: memoryview) -> dict[str, memoryview]:
    """Return the members by their full names; raise unless the archive is just what torch makes of them."""
    size = struct.calcsize(END)
    _, _, _, _, count, length, start, _ = struct.unpack(END, data[-size:])
    tail = struct.pack(END_64, b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, length, start)
    tail += struct.pack(LOCATOR, b"PK\6\7", 0, start + length, 1)
    tail += struct.pack(END, b"PK\5\6", 0, 0, count, count, length, start, 0)
    if start + length + len(tail) != len(data) or data[start + length :] != tail:
        raise _damaged("its end is not as torch writes it")
    if count > MAX_MEMBERS:
        raise _damaged(f"it has {count:,} members")
    members: dict[str, memoryview] = {}
    position, at = start, 0
    for _ in range(count):
        name, content, at, entry = _member(data, position, at)
        if name in members:
            raise _damaged(f"it has two members {name[:60]!r}")
        members[name] = content
        position += entry
    if at != start or position != start + length:
        raise _damaged("it has bytes that belong to no member")
    return members


def _member(data: memoryview, position: int, at: int) -> tuple[str, memoryview, int, int]:
    """Return name and content of the member at `at`, where the next one is, and the length of its directory entry.

    Its entry in the directory is at `position`. Both headers are made again from what the entry says, and compared.
    """
    fields = CENTRAL.unpack_from(data, position)
    crc, packed, size, name_length = fields[7:11]
    offset = fields[16]
    raw = bytes(data[position + CENTRAL.size : position + CENTRAL.size + min(name_length, MAX_NAME)])
    entry = CENTRAL.pack(b"PK\1\2", 0, 0, FLAGS, 0, 0, 0, crc, size, size, len(raw), 0, 0, 0, 0, 0, at) + raw
    if packed != size or offset != at or data[position : position + len(entry)] != entry:
        raise _damaged("an entry of its directory is not as torch writes it")
    (padded,) = struct.unpack_from("<H", data, at + LOCAL.size - 2)
    header = LOCAL.pack(ZIP, 0, FLAGS, 0, 0, 0, 0, 0, 0, len(raw), padded) + raw
    if padded:
        header += struct.pack("<2sH", b"FB", padded - 4) + b"Z" * (padded - 4) if padded >= 4 else b"?"
    begin = at + len(header)
    content = data[begin : begin + size]
    after = struct.pack(DESCRIPTOR, b"PK\7\x08", crc, size, size)
    following = begin + size + len(after)
    if data[at:begin] != header or data[begin + size : following] != after:
        raise _damaged(f"the header of {raw.decode()[:60]!r} is not as torch writes it")
    if zlib.crc32(content) != crc:
        raise _damaged(f"the checksum of {raw.decode()[:60]!r} is wrong")
    return raw.decode(), content, following, len(entry)
