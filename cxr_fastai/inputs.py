"""What a person names on the command line -> the films meant: files, folders, globs, zip archives, a list on `-`.

Each film is an `Input`: the name that its row carries, and how to read it. Nothing is unpacked to disk.
"""

import glob
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cxr_fastai.errors import UnreadableImage, UsageError
from cxr_fastai.images import IMAGE_SUFFIXES, Film, Limits, films_below, read_bytes, read_film


@dataclass(frozen=True)
class Input:
    """One film to read: a file, or a member of a zip archive.

    path: as the row shows it; a member's is `archive.zip/member.png`.
    """

    path: str
    archive: zipfile.ZipFile | None = None
    member: zipfile.ZipInfo | None = None

    def read(self, limits: Limits, frame: int | None = None) -> Film:
        """Read the film; see `images.read_film`.

        Raises
        ------
        UnreadableImage
            Where it cannot be read; a member larger than the limit is refused before it is unpacked.
        """
        return read_film(self.read_bytes(limits), limits, frame)

    def read_bytes(self, limits: Limits) -> bytes:
        """Return the bytes of the file or member, whatever they hold.

        Raises
        ------
        UnreadableImage
            Where there are more than the limit, or they cannot be read.
        """
        if self.archive is None or self.member is None:
            return read_bytes(self.path, limits)
        if self.member.file_size > limits.max_bytes:
            raise UnreadableImage(f"{self.member.file_size:,} bytes are more than the {limits.max_bytes:,} allowed")
        try:
            with self.archive.open(self.member) as stream:
                return stream.read(limits.max_bytes + 1)
        except Exception as error:  # noqa: BLE001 (the decompressors have error classes of their own)
            reason = "encrypted" if self.member.flag_bits & 1 else f"damaged in its archive ({type(error).__name__})"
            raise UnreadableImage(f"it is {reason}; unpack it first, or make the archive again") from None


def find_inputs(given: Sequence[str]) -> list[Input]:
    """Return the films meant by `given`, in order, each once.

    A file named in full is always a row, whatever its ending. Folders are searched to the bottom, and archives
    through, for files that end like films. `-` reads names from standard input, one a line, or divided by NUL where
    there is one (`find -print0`); a name from there that does not exist is a row with an error.

    Raises
    ------
    UsageError
        Where something named does not exist, or holds no film.
    """
    found: dict[str, Input] = {}
    for name in given:
        films = list(_expand(name))
        if not films:
            path = Path(name)
            what = "no film in it" if path.is_dir() or _is_zip(path) else "no such file or folder"
            raise UsageError(f"{name}: {what}; give image files, folders, globs, .zip archives, or - for a list")
        for film in films:
            found.setdefault(film.path, film)
    return list(found.values())


def safe_stem(path: str) -> str:
    """Return the name of a film as a file name that every system and terminal takes."""
    return re.sub(r"[^\w.-]", "_", Path(path).stem.encode("ascii", "replace").decode())[:80]


def _expand(name: str) -> Iterator[Input]:
    path = Path(name)
    if name == "-":
        names = sys.stdin.buffer.read()
        lines = names.split(b"\0") if b"\0" in names else names.splitlines()
        yield from (Input(os.fsdecode(line)) for line in lines if line.strip())
    elif path.is_dir():
        yield from (Input(str(film)) for film in films_below(path))
    elif _is_zip(path):
        yield from _members(path)
    elif os.path.lexists(name):  # a dead link is a row with an error
        yield Input(name)
    else:
        yield from map(Input, sorted(glob.glob(name, recursive=True)))  # noqa: PTH207 (absolute patterns, too)


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def _members(path: Path) -> Iterator[Input]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UsageError(f"{path}: not a zip archive that can be read ({error}); make it again") from None
    for member in archive.infolist():
        parts = PurePosixPath(member.filename)
        hidden = parts.name.startswith(".") or "__MACOSX" in parts.parts
        if not member.is_dir() and not hidden and parts.suffix.lower() in IMAGE_SUFFIXES:
            yield Input(f"{path}/{member.filename}", archive, member)
