"""Films decoded once, ever: their pixels at the training size, in memory-mapped files that every later run shares.

    bytes of a film's file ──► key ──► find ──► Place ──► at ──► uint16 (size, size), a view of the mapped file
                                        └─ not there: the caller decodes ──► keep ──► Place (or in memory, or nowhere)

A shard is one file: a table of (key, check), then as many films. One process fills it, all may read it. The key is a
SHA-256 of the file's bytes, the size and the version of the reader, so that nothing in the folder names a file or a
patient. The check is a SHA-256 of key and pixels, looked at once a run before a film is given out; an entry is written
after its pixels. So no kill, full disk or flipped bit becomes wrong pixels, and nothing that was decoded is lost.

Folder: $CXR_CACHE, else $XDG_CACHE_HOME/cxr_fastai, else ~/.cache/cxr_fastai; on a local disk, since a mapped file that
vanishes on a network drive kills its readers. Bound: $CXR_CACHE_GB (0: films stay in memory). Shards that were unused
for longest go first, but none that a living process has mapped.

No library does this: diskcache stores pickles, which run code, and was last released in 2023; LMDB has one writer at a
time, evicts nothing and checks no pages.
"""

import contextlib
import errno
import functools
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_fastai import __version__, images
from cxr_fastai.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, which removes no mapped file anyway
    fcntl = None  # type: ignore[assignment]

GB = 1_000_000_000
DEFAULT_GB = "10"
KEEP_FREE = 2 * GB  # bytes of the disk left to others, such as the run's own files
SHARDS_IN_LIMIT = 32  # one shard takes this part of the bound
MAX_SHARDS = 64  # each one in use costs a file descriptor; where many small runs left more, the oldest go
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

    A shared lock says that it is in use. The mapping keeps a copy of the descriptor, and so the lock; a crash frees it.
    """

    def __init__(self, descriptor: int, name: str):
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.name, self.used = name, 0
        self.size, self.capacity = shape_of(name)
        self.mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def start(self, slot: int) -> int:
        """Return the byte where the pixels of a film begin."""
        return self.capacity * ENTRY + slot * 2 * self.size**2

    def entry(self, slot: int) -> bytes:
        """Return key and check of a film."""
        return self.mapped[slot * ENTRY : (slot + 1) * ENTRY]

    def film(self, slot: int) -> np.ndarray:
        """Return a film, uint16 (size, size), a read-only view; ValueError where the file is too short for it."""
        return np.frombuffer(self.mapped, np.uint16, self.size**2, self.start(slot)).reshape(self.size, self.size)


class FilmCache:
    """The films of one size: those that earlier runs left, and those that this one adds. Threads may share it.

    Attributes
    ----------
    warning : str or None
        One line that says why films could not be stored and what that means. Training goes on.
    """

    def __init__(self, size: int):
        self.size, self.limit, self.spare = size, cache_limit(), memory_limit()
        self.warning: str | None = None
        self.lock = threading.RLock()
        self.index: dict[bytes, Place] = {}
        self.shards: dict[str, Shard] = {}
        self.filling: Shard | None = None
        self.folder = Path(os.devnull)  # nothing lies below it
        self.writes = self.limit > 0
        if self.writes:
            try:
                self.folder = cache_folder()
                for path in self.folder.glob(f"{size}-*{SUFFIX}"):
                    self._list(path)
            except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
                self._give_up(error)

    def key(self, data: bytes) -> bytes:
        """Return the key of a film, given the bytes of its file."""
        return _sha256(reader_version(), f"{self.size}:".encode(), data)

    def find(self, key: bytes) -> Place | None:
        """Return where a film lies, once its check holds; a damaged shard is removed: its films are decoded again."""
        place = self.index.get(key)
        if place is None:
            return None
        film = self.at(place)
        if film is not None and self.shards[place.shard].entry(place.slot) == key + _sha256(key, film):
            return place
        with self.lock:
            if place.shard in self.shards:  # damaged, not merely gone; what was given out before stays mapped
                with contextlib.suppress(OSError):
                    (self.folder / place.shard).unlink()
            self.index = {other: at for other, at in self.index.items() if at.shard != place.shard}
        return None

    def at(self, place: Place) -> np.ndarray | None:
        """Return a film that `find` or `keep` placed, uint16 (size, size), a view; None where it is gone."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: cut short
            return self._shard(place.shard).film(place.slot)
        return None

    def keep(self, key: bytes, film: np.ndarray) -> Place | np.ndarray | None:
        """Store a film in a shard, else in memory (the film itself comes back), else, with memory used up, nowhere."""
        with self.lock:
            if self.writes:
                try:
                    return self._add(key, film)
                except OSError as error:
                    self._give_up(error)
            self.spare -= film.nbytes
            if self.spare < 0:
                self.warning = "half of the memory is full of films; the others are read from their files in each epoch"
            return film if self.spare >= 0 else None

    def close(self) -> None:
        """Cut the last shard to what it holds and mark all as used just now. Films given out stay readable."""
        with self.lock:
            self._finish()
            for name in self.shards:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / name)

    def _list(self, path: Path) -> None:
        """Take the keys of a shard into the index; what is no shard, or just being made, is passed over."""
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            table = file.read(shape_of(path.name)[1] * ENTRY)
            for slot in range(len(table) // ENTRY):
                key = table[slot * ENTRY : slot * ENTRY + HASH]
                if not any(key):
                    break
                self.index[key] = Place(path.name, slot)

    def _shard(self, name: str) -> Shard:
        with self.lock:
            if name not in self.shards:
                with (self.folder / name).open("rb") as file:
                    self.shards[name] = Shard(file.fileno(), name)
            return self.shards[name]

    def _add(self, key: bytes, film: np.ndarray) -> Place:
        if self.filling is None or self.filling.used == self.filling.capacity:
            self._finish()
            self.filling = self._begin()
        shard = self.filling
        with (self.folder / shard.name).open("r+b") as file:
            file.seek(shard.start(shard.used))
            file.write(film.tobytes())
            file.flush()
            file.seek(shard.used * ENTRY)
            file.write(key + _sha256(key, film))
        place = self.index[key] = Place(shard.name, shard.used)
        shard.used += 1
        return place

    def _begin(self) -> Shard:
        """Make a shard of its full length, a sparse file: what it will hold counts against the bound from now on."""
        film = ENTRY + 2 * self.size**2
        capacity = min(max(self.limit // SHARDS_IN_LIMIT // film, 1), MAX_FILMS)
        descriptor, path = tempfile.mkstemp(SUFFIX, f"{self.size}-{capacity}-", self.folder)  # readable to us alone
        try:
            os.truncate(descriptor, capacity * film)
            shard = self.shards[Path(path).name] = Shard(descriptor, Path(path).name)
            make_room(self.folder, self.limit)
        except OSError:
            self.shards.pop(Path(path).name, None)
            Path(path).unlink()
            raise
        finally:
            os.close(descriptor)
        return shard

    def _finish(self) -> None:
        if self.filling:
            with contextlib.suppress(OSError):  # Windows cuts no mapped file
                os.truncate(self.folder / self.filling.name, self.filling.start(self.filling.used))
        self.filling = None

    def _give_up(self, error: Exception) -> None:
        self.writes = False
        self.warning = (
            f"decoded films cannot be stored in {self.folder} ({getattr(error, 'strerror', None) or error}): they stay "
            "in memory and the next run decodes them again. Free some space, or set CXR_CACHE to another folder"
        )


def make_room(folder: Path, limit: int) -> None:
    """Remove the shards unused for longest until the rest keep the bound and the disk has KEEP_FREE, else OSError."""
    stats = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            stats[path] = path.stat()
    reserved = sum(s.st_size for s in stats.values())
    written = sum(getattr(s, "st_blocks", s.st_size // 512) * 512 for s in stats.values())
    too_much = max(reserved - limit, KEEP_FREE - shutil.disk_usage(folder).free + max(reserved - written, 0))
    for path in sorted(stats, key=lambda p: stats[p].st_mtime_ns):
        if too_much <= 0 and len(stats) <= MAX_SHARDS:
            break
        if _remove_unused(path):
            too_much -= stats.pop(path).st_size
    if too_much > 0:
        raise OSError(errno.ENOSPC, f"the cache may take {limit / GB:g} GB and must leave {KEEP_FREE / GB:g} GB free")


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # in use
        return False
    return True


@functools.cache
def reader_version() -> bytes:
    """Return a SHA-256 of the reader's source and its decoders' versions: no one has to remember to count it up."""
    digest = hashlib.sha256(__version__.encode())
    for source in sorted(Path(images.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for name in DECODERS:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{name}={version(name)};".encode())
    return digest.digest()


def _sha256(*parts: bytes | np.ndarray) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)  # type: ignore[arg-type]
    return digest.digest()


def shape_of(name: str) -> tuple[int, int]:
    """Return side and capacity of a shard by its file's name; ValueError where it is not one of ours."""
    size, capacity, _ = name.split("-")
    return int(size), min(int(capacity), MAX_FILMS)


def cache_folder() -> Path:
    """Return the folder of the shards, made where there is none; refuse one that other users could have filled."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("CXR_CACHE") or Path(base, "cxr_fastai")) / "films"
    folder.mkdir(0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError(errno.EPERM, f"{folder} is open to other users")
    folder.chmod(0o700)
    return folder


def cache_limit() -> int:
    """Return the bound of the cache in bytes, from CXR_CACHE_GB."""
    text = os.environ.get("CXR_CACHE_GB") or DEFAULT_GB
    if not text.replace(".", "", 1).isdecimal():
        raise UsageError(f"CXR_CACHE_GB is {text!r}, but must be a number of gigabytes; 0 turns the cache off")
    return int(float(text) * GB)


def memory_limit() -> int:
    """Return how many bytes of films may stay in memory: half of what the machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError):  # Windows
        return 4 * GB
