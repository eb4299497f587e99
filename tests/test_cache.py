"""What the cache of films promises: each decoded once, never wrong pixels, within its bound, nothing of a patient."""

import errno
import multiprocessing
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_films
from torch.utils.data import DataLoader

from cxr_fastai import cache, data
from cxr_fastai.cache import FilmCache, Place, cache_limit
from cxr_fastai.data import OpenFilm, read_films
from cxr_fastai.errors import UsageError
from cxr_fastai.images import read_radiograph, to_input

SIZE = 32
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="modes, locks and signals of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache; return where its shards will lie."""
    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXR_CACHE_GB", raising=False)
    monkeypatch.setattr(cache, "KEEP_FREE", 0)
    return tmp_path / "cache" / "films"


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Return the paths of 12 films."""
    write_films(tmp_path / "Jane Doe", ["normal", "abnormal"] * 6)
    return sorted(map(str, (tmp_path / "Jane Doe").rglob("*.png")))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes | str]:
    """Return a list that gains an item for each film that is decoded."""
    seen: list[bytes | str] = []

    def counting(source: bytes | str) -> np.ndarray:
        seen.append(source)
        return read_radiograph(source)

    monkeypatch.setattr(data, "read_radiograph", counting)
    return seen


def read(paths: list[str], size: int = SIZE) -> OpenFilm:
    opener = OpenFilm(size)
    assert read_films(opener, paths, lambda: None) == {}
    return opener


def is_true_to_file(opener: OpenFilm, path: str) -> bool:
    truth = torch.from_numpy(to_input(read_radiograph(path), opener.size))
    return (opener.encodes(path)[0] - truth).abs().max().item() < 1e-5


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def in_new_process(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200)


def test_a_second_run_decodes_nothing(paths: list[str], folder: Path, decoded: list) -> None:
    read(paths)
    assert len(decoded) == 12
    again = read(paths)
    assert [again.encodes(path).shape for path in paths] == [(1, SIZE, SIZE)] * 12
    assert len(decoded) == 12
    assert again.warning is None
    assert all(is_true_to_file(again, path) for path in paths)
    assert all(isinstance(film, Place) for film in again.films.values())
    assert len(list(folder.iterdir())) == 1
    # A closed shard is as long as its films and table, not as long as it might have become.
    assert next(folder.iterdir()).stat().st_blocks * 512 < 12 * 2 * SIZE**2 + 20_000


def test_a_moved_film_is_known_and_a_changed_one_is_read_again(paths: list[str], decoded: list) -> None:
    read(paths)
    old, new = Path(paths[0]), Path(paths[-1])
    when = old.stat()
    moved = old.rename(old.with_name("moved.png"))
    read([str(moved)])
    assert len(decoded) == 12
    changed = new.read_bytes()
    old.write_bytes(changed + b"\0")  # other bytes at an old path, with the old time
    os.utime(old, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert is_true_to_file(read([str(old)]), str(old))
    assert len(decoded) == 13


def test_each_size_and_each_reader_has_films_of_its_own(
    paths: list[str], decoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(paths)
    larger = read(paths, 48)
    assert len(decoded) == 24
    assert larger.encodes(paths[0]).shape == (1, 48, 48)
    monkeypatch.setattr(cache, "reader_version", lambda: b"another reader")
    read(paths)
    assert len(decoded) == 36


def test_the_version_of_the_reader_is_that_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "images"
    shutil.copytree(Path(cache.images.__file__).parent, copy)
    before = cache.reader_version.__wrapped__()
    monkeypatch.setattr(cache.images, "__file__", str(copy / "__init__.py"))
    assert cache.reader_version.__wrapped__() == before
    flip_byte(copy / "tone.py", 200)
    assert cache.reader_version.__wrapped__() != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_byte(path, -1),
        lambda path: flip_byte(path, -12 * 2 * SIZE**2),
        lambda path: flip_byte(path, cache.HASH),  # the check of the first film
        lambda path: os.truncate(path, path.stat().st_size - 100),
    ],
    ids=["last-pixel", "first-pixel", "check", "cut"],
)
def test_a_damaged_shard_is_dropped_and_its_films_decoded_again(
    damage: Callable[[Path], None], paths: list[str], folder: Path, decoded: list
) -> None:
    read(paths)
    shard = next(folder.iterdir())
    damage(shard)
    opener = read(paths)
    count = len(decoded)
    assert count > 12
    assert not shard.exists()
    assert all(is_true_to_file(opener, path) for path in paths)
    assert len(decoded) == count  # those found sound before the damage was are still mapped
    read(paths)
    read(paths)
    assert len(decoded) <= count + 11  # those that shared the shard, once
    count = len(decoded)
    read(paths)
    assert len(decoded) == count


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, os.urandom(5000), bytes(70_000)])
def test_a_file_that_is_no_shard_does_no_harm(content: bytes, paths: list[str], folder: Path, decoded: list) -> None:
    folder.mkdir(0o700, parents=True)
    for name in ("32-10-abc.films", "32-x-abc.films", "32-.films", "32-9999999999999999-a.films"):
        (folder / name).write_bytes(content)
    read(paths)
    assert all(is_true_to_file(read(paths), path) for path in paths)
    assert len(decoded) == 12


# What OpenFilm does, without the seconds that importing fastai takes.
READ = """
import os, sys
from pathlib import Path
from cxr_fastai import cache, images
cache.KEEP_FREE = 0
films, count = cache.FilmCache(32), 0
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    if films.find(films.key(data)) is None:
        pixels = images.to_input(images.read_radiograph(data), 32)
        films.keep(films.key(data), (pixels * 65535).round().astype("uint16"))
        count += 1
films.close()
print(count, films.warning)
"""


def test_several_processes_at_once(paths: list[str], decoded: list) -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", READ, *paths], stdout=subprocess.PIPE) for _ in range(3)]
    assert [job.communicate(timeout=200)[0].split()[-1] for job in jobs] == [b"None"] * 3
    opener = read(paths)
    assert all(is_true_to_file(opener, path) for path in paths)
    assert decoded == []


@posix
def test_what_a_killed_run_decoded_is_kept(paths: list[str], decoded: list) -> None:
    killed = READ.replace("count += 1", "count += 1; count == 7 and os.kill(os.getpid(), 9)")
    assert in_new_process(killed, *paths).returncode == -9
    opener = read(paths)
    assert len(decoded) == 12 - 7
    assert all(is_true_to_file(opener, path) for path in paths)


def test_the_bound_holds_and_the_shard_unused_for_longest_goes(
    paths: list[str], folder: Path, decoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = 2 * SIZE**2 + cache.ENTRY
    monkeypatch.setattr(cache, "SHARDS_IN_LIMIT", 4)
    monkeypatch.setenv("CXR_CACHE_GB", f"{8.5 * film / cache.GB:.9f}")  # shards of two films, four of them
    for i in range(0, 8, 2):
        read(paths[i : i + 2])
    read(paths[:2])  # used again: now the second pair is the oldest
    assert len(decoded) == 8
    read(paths[8:10])
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8.5 * film
    read(paths[:2])
    read(paths[4:10])
    assert len(decoded) == 10
    read(paths[2:4])
    assert len(decoded) == 12


def test_more_films_than_the_bound_stay_in_memory_with_one_warning(
    paths: list[str], folder: Path, decoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = 2 * SIZE**2 + cache.ENTRY
    monkeypatch.setenv("CXR_CACHE_GB", f"{8.5 * film / cache.GB:.9f}")
    opener = read(paths)
    assert sum(path.stat().st_size for path in folder.iterdir()) == 8 * film
    assert sum(isinstance(kept, Place) for kept in opener.films.values()) == 8
    assert all(is_true_to_file(opener, path) for path in paths)
    assert len(decoded) == 12
    assert opener.warning is not None
    assert "\n" not in opener.warning
    del opener  # as long as it lives, no one removes the shards it uses
    read(paths)
    assert 12 + 4 <= len(decoded) <= 12 + 8  # threads that run ahead may push out what is yet to be used


def test_beyond_memory_films_are_read_from_their_files(
    paths: list[str], decoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXR_CACHE_GB", "0")
    monkeypatch.setattr(cache, "memory_limit", lambda: 5 * 2 * SIZE**2)
    opener = read(paths)
    assert len(opener.films) == 5
    assert all(is_true_to_file(opener, path) for path in paths)
    assert len(decoded) == 12 + 7
    assert opener.warning == "half of the memory is full of films; the others are read from their files in each epoch"


def test_a_bound_of_zero_writes_nothing(paths: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_CACHE_GB", "0")
    assert read(paths).warning is None
    assert not folder.exists()


@pytest.mark.parametrize("text", ["-1", "ten", "inf", "nan"])
def test_a_bound_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"CXR_CACHE_GB is '{text}', but must be a number"):
        cache_limit()


def test_a_disk_that_fills_up_warns_once_and_training_goes_on(
    paths: list[str], decoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener, add, stored = OpenFilm(SIZE), FilmCache._add, []

    def full(self: FilmCache, key: bytes, film: np.ndarray) -> Place:
        stored.append(key)
        if len(stored) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, key, film)

    monkeypatch.setattr(FilmCache, "_add", full)
    assert read_films(opener, paths, lambda: None) == {}
    assert len(stored) == 5  # not tried again
    assert opener.warning is not None
    assert "(No space left on device)" in opener.warning
    assert all(is_true_to_file(opener, path) for path in paths)
    assert len(decoded) == 12


@posix
def test_a_write_that_the_system_refuses(paths: list[str]) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))" + READ
    done = in_new_process(limited, *paths)
    assert done.stdout.startswith("12 decoded films cannot be stored in "), done
    assert "(File too large)" in done.stdout


def test_space_is_left_for_others(paths: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEEP_FREE", 1 << 62)
    opener = read(paths)
    assert opener.warning is not None
    assert "must leave" in opener.warning
    assert list(folder.iterdir()) == []


@posix
def test_only_the_user_may_read_and_nothing_names_a_patient(paths: list[str], folder: Path) -> None:
    read(paths)
    shard = next(folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(shard.stat().st_mode) == 0o600
    assert b"Jane" not in shard.read_bytes()
    assert shard.name.startswith("32-")


@posix
def test_a_folder_open_to_others_is_not_believed(paths: list[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    warning = read(paths).warning
    assert warning is not None
    assert f"{folder} is open to other users" in warning


def test_without_a_home_films_stay_in_memory(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    opener = read(paths)
    assert len(opener.films) == 12
    assert opener.warning is not None


def test_a_pickle_has_no_film_no_path_and_no_cache(paths: list[str], tmp_path: Path) -> None:
    opener = read(paths)
    saved = pickle.dumps(opener)
    assert len(saved) < 500
    assert str(tmp_path).encode() not in saved
    assert b".films" not in saved
    loaded = pickle.loads(saved)
    assert (loaded.size, loaded.films, loaded.cache) == (SIZE, {}, None)
    assert is_true_to_file(loaded, paths[0])  # from the file


class Films(torch.utils.data.Dataset):
    """The films of an opener, decoding none of them."""

    def __init__(self, opener: OpenFilm, paths: list[str]):
        self.opener, self.paths = opener, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        data.read_radiograph = None  # type: ignore[assignment]  # in a worker process alone
        return torch.as_tensor(self.opener.encodes(self.paths[i]))


@posix
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_share_the_cache(method: str, paths: list[str]) -> None:
    opener = read(paths)
    loader = DataLoader(
        Films(opener, paths),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    batches = torch.cat(list(loader))
    assert all(torch.equal(batch, opener.encodes(path)) for batch, path in zip(batches, paths, strict=True))
