"""Films decoded once, ever: their pixels at the training size, in memory-mapped files that every later run shares.

    bytes of a film's file ──► key ──► find ──► Place ──► at ──► uint16 (size, size), a view of the mapped file
                                        └─ not there: decoded by the caller ──► keep ──► Place (or in memory, or nowhere)

A shard is one file: a table of (key, check), then as many films. One process fills it, all may read it; no two write to
the same file. The key is a SHA-256 of the film's bytes, the size and the reader's own version, so that nothing in the
folder names a file or a patient. The check is a SHA-256 of key and pixels; it is looked at once a run, before a film is
given out, so that no kill, full disk or flipped bit can turn into wrong pixels. An entry is written after its pixels.

Folder: $CXR_CACHE, else $XDG_CACHE_HOME/cxr_fastai, else ~/.cache/cxr_fastai. Bound: $CXR_CACHE_GB (10; 0 keeps films
in memory alone); the shards that were unused for longest go first, but none that a living process has mapped.

Why not a library: diskcache stores pickles, which run code, and has had no release since 2023; LMDB takes one writer at
a time, evicts nothing, and has neither checks of its pages nor a bound that several sizes could share.
"""

import contextlib
import errno
import functools
import hashlib
import math
import mmap
import os
import shutil
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_fastai import images
from cxr_fastai.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a mapped file by itself
    fcntl = None  # type: ignore[assignment]

GB = 1_000_000_000
DEFAULT_GB = 10.0
KEEP_FREE = 2 * GB  # bytes of the disk that the cache leaves to others, such as the run's own files
SHARDS_IN_LIMIT = 32  # one shard may take this part of the bound
MAX_SHARDS = 64  # each that is used costs a file descriptor; where many small runs left more, the oldest go
MAX_FILMS = 65_536  # in one shard
HASH = 32  # bytes of a SHA-256
ENTRY = 2 * HASH  # key, check
SUFFIX = ".films"
DECODERS = ("numpy", "pillow", "pydicom", "simplejpeg", "imagecodecs", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls")


class Place(NamedTuple):
    """Where a film lies: the name of its shard and its number therein."""

    shard: str
    slot: int


class Shard:
    """One mapped file, named `size-capacity-random.films`: `capacity` entries, then `capacity` films.

    While it is mapped a shared lock is on it, by which other processes know not to remove it: the mapping keeps its own
    copy of the descriptor. A crash frees it.
    """

    def __init__(self, descriptor: int, name: str):
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.size, self.capacity = shape_of(name)
        self.name, self.used = name, 0
        self.mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def offset(self, slot: int) -> int:
        """Return where the pixels of a film begin."""
        return self.capacity * ENTRY + slot * 2 * self.size**2

    def film(self, slot: int) -> np.ndarray:
        """Return one film, uint16 (size, size), a read-only view; ValueError where the file is too short for it."""
        flat = np.frombuffer(self.mapped, np.uint16, self.size**2, self.offset(slot))
        return flat.reshape(self.size, self.size)

    def is_sound(self, slot: int, key: bytes) -> bool:
        """Tell whether entry and pixels are those that were written."""
        return self.mapped[slot * ENTRY : (slot + 1) * ENTRY] == key + check(key, self.film(slot))


class FilmCache:
    """The films of one size: those that earlier runs left, and those that this run adds. Threads may share it.

    Attributes
    ----------
    warning : str or None
        One line that says why films could not be stored, and what that means; training goes on.
    """

    def __init__(self, size: int):
        self.size, self.limit = size, cache_limit()
        self.warning: str | None = None
        self.lock = threading.RLock()
        self.index: dict[bytes, Place] = {}
        self.shards: dict[str, Shard] = {}
        self.open: Shard | None = None  # the one that this process fills
        self.spare = memory_limit()
        self.writes = self.limit > 0
        if self.writes:
            try:
                self.folder = cache_folder()
                for path in self.folder.glob(f"{size}-*{SUFFIX}"):
                    self._list(path)
            except (OSError, RuntimeError) as error:  # RuntimeError: no home
                self._give_up(error)

    def key(self, data: bytes) -> bytes:
        """Return the key of a film by the bytes of its file."""
        digest = hashlib.sha256(reader_version() + f"{self.size}:".encode())
        digest.update(data)
        return digest.digest()

    def find(self, key: bytes) -> Place | None:
        """Return where a film lies, its pixels checked; a damaged shard is removed, and its films are decoded again."""
        place = self.index.get(key)
        shard = place and self._mapped(place.shard)
        if not place or not shard:
            return None
        with contextlib.suppress(ValueError):  # cut short
            if shard.is_sound(place.slot, key):
                return place
        with contextlib.suppress(OSError):
            (self.folder / place.shard).unlink()
        self._forget(place.shard)
        return None

    def at(self, place: Place) -> np.ndarray | None:
        """Return a film that `find` or `keep` placed, uint16 (size, size), a view; None where the shard is gone."""
        shard = self.shards.get(place.shard) or self._mapped(place.shard)
        return shard.film(place.slot) if shard else None

    def keep(self, key: bytes, film: np.ndarray) -> Place | np.ndarray | None:
        """Store a film: in the cache, else in memory (the film itself comes back), else, with memory used up, nowhere."""
        with self.lock:
            if self.writes:
                try:
                    return self._add(key, film)
                except OSError as error:
                    self._give_up(error)
            self.spare -= film.nbytes
            return film if self.spare >= 0 else None

    def close(self) -> None:
        """Cut the shard to what it holds, and note which shards were used. Films given out stay readable."""
        with self.lock, contextlib.suppress(OSError):
            self._finish()
            for name in self.shards:
                os.utime(self.folder / name)
            if self.shards:
                self._make_room()

    def _list(self, path: Path) -> None:
        """Take the keys of a shard into the index; a file that is none, or is being made, is passed over."""
        with contextlib.suppress(OSError, ValueError):
            _, capacity = shape_of(path.name)
            table = path.read_bytes() if capacity > MAX_FILMS else _head(path, capacity * ENTRY)
            for slot in range(len(table) // ENTRY):
                key = table[slot * ENTRY : slot * ENTRY + HASH]
                if not any(key):
                    break
                self.index[key] = Place(path.name, slot)

    def _mapped(self, name: str) -> Shard | None:
        with self.lock:
            if name not in self.shards:
                try:
                    with (self.folder / name).open("rb") as file:
                        self.shards[name] = Shard(file.fileno(), name)
                except (OSError, ValueError):
                    self._forget(name)
            return self.shards.get(name)

    def _forget(self, name: str) -> None:
        with self.lock:
            self.shards.pop(name, None)
            self.index = {key: place for key, place in self.index.items() if place.shard != name}

    def _add(self, key: bytes, film: np.ndarray) -> Place:
        if self.open is None or self.open.used == self.open.capacity:
            self._finish()
            self.open = self._begin()
        shard = self.open
        with (self.folder / shard.name).open("r+b") as file:
            file.seek(shard.offset(shard.used))
            file.write(film.tobytes())
            file.flush()
            file.seek(shard.used * ENTRY)
            file.write(key + check(key, film))
        place = self.index[key] = Place(shard.name, shard.used)
        shard.used += 1
        return place

    def _begin(self) -> Shard:
        """Make a shard at its full length, a sparse file: what will be written counts against the bound from now on."""
        film = ENTRY + 2 * self.size**2
        capacity = min(max(self.limit // SHARDS_IN_LIMIT // film, 1), MAX_FILMS)
        descriptor, path = tempfile.mkstemp(SUFFIX, f"{self.size}-{capacity}-", self.folder)  # of mode 0600
        try:
            os.truncate(descriptor, capacity * film)
            shard = Shard(descriptor, Path(path).name)
            self._make_room()
        except OSError:
            Path(path).unlink()
            raise
        finally:
            os.close(descriptor)
        self.shards[shard.name] = shard
        return shard

    def _finish(self) -> None:
        shard, self.open = self.open, None
        if shard:
            os.truncate(self.folder / shard.name, shard.offset(shard.used))

    def _make_room(self) -> None:
        """Remove the shards that were unused for longest until the cache keeps its bound and the disk some space."""
        stats = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process just now
                stats[path] = path.stat()
        reserved = sum(s.st_size for s in stats.values())
        written = sum(getattr(s, "st_blocks", s.st_size // 512) * 512 for s in stats.values())
        in_limit = self.limit - reserved
        on_disk = shutil.disk_usage(self.folder).free - KEEP_FREE - max(reserved - written, 0)
        for path in sorted(stats, key=lambda p: stats[p].st_mtime_ns):
            if min(in_limit, on_disk) >= 0 and len(stats) <= MAX_SHARDS:
                return
            if _remove_unused(path):
                size = stats.pop(path).st_size
                in_limit, on_disk = in_limit + size, on_disk + size
        if in_limit < 0:
            raise OSError(errno.EDQUOT, f"the bound of {self.limit / GB:g} GB is reached; raise CXR_CACHE_GB")
        if on_disk < 0:
            raise OSError(errno.ENOSPC, f"less than {KEEP_FREE / GB:g} GB are free there; free some space")

    def _give_up(self, error: Exception) -> None:
        self.writes = False
        self.warning = (
            f"cannot store decoded films ({getattr(error, 'strerror', None) or error}); they are kept in memory, those "
            "beyond half of it are read from their files in each epoch, and the next run decodes them again. "
            "Or set CXR_CACHE to another folder"
        )
