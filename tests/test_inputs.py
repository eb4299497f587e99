import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.config import Limits
from cxr_fastai.errors import UnreadableImage, UsageError
from cxr_fastai.inputs import find_inputs


def png(value: int = 128) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) // 2 + value // 2).save(stream, "PNG")
    return stream.getvalue()


def paths(*given: object) -> list[str]:
    return [film.path for film in find_inputs(list(map(str, given)))]


def test_folders_globs_and_repeats(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    b, a = str(tmp_path / "b.png"), str(tmp_path / "sub" / "a.jpg")
    assert paths(tmp_path, b, tmp_path / "*.png") == [b, a]
    assert paths(tmp_path / "**" / "*.jpg") == [a]
    assert paths(tmp_path / "notes.txt") == [str(tmp_path / "notes.txt")]  # named in full: a row, whatever it is


@pytest.mark.parametrize(
    "name", ["with space.png", "line\nbreak.png", "-dash.png", "ümlaut.png", "[brackets].png", "=1+1.png"]
)
def test_odd_names_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(png())
    assert paths(tmp_path / name) == [str(tmp_path / name)]
    (film,) = find_inputs([str(tmp_path)])
    assert film.read(Limits()).pixels.shape == (64, 64)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).write_bytes(png())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (film,) = find_inputs([str(tmp_path)])
    assert film.path.endswith("\udcff.png")
    assert film.read(Limits()).pixels.shape == (64, 64)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\*such: no such file or folder; give image files, folders"):
        find_inputs(["no*such"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: no film in it"):
        find_inputs([str(tmp_path / "empty")])
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UsageError, match=r"bad\.zip: not a zip archive that can be read"):
        find_inputs([str(tmp_path / "bad.zip")])


def test_dead_links_and_loops(tmp_path: Path) -> None:
    (tmp_path / "dead.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (film,) = find_inputs([str(tmp_path)])
    with pytest.raises(UnreadableImage, match="it cannot be opened: No such file or directory"):
        film.read(Limits())


def test_archives_are_read_in_place_and_within_limits(tmp_path: Path) -> None:
    archive = tmp_path / "films.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/one.png", png())
        z.writestr("../../two.png", png(10))
        z.writestr("notes.txt", "x")
        z.writestr("__MACOSX/a/._one.png", "x")
        z.writestr("bomb.png", b"\0" * 5_000_000)
    films = find_inputs([str(archive)])
    assert [film.path for film in films] == [f"{archive}/a/one.png", f"{archive}/../../two.png", f"{archive}/bomb.png"]
    assert films[0].read(Limits()).pixels.shape == (64, 64)
    with pytest.raises(UnreadableImage, match="5,000,000 bytes are more than the 1,000,000 allowed"):
        films[2].read(Limits(max_bytes=1_000_000))
    assert {p.name for p in tmp_path.iterdir()} == {"films.zip"}
    for film in films:
        film.archive.close()


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "films.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("one.png", png())
    data = bytearray(archive.read_bytes())
    data[100] ^= 255
    archive.write_bytes(data)
    (film,) = find_inputs([str(archive)])
    with pytest.raises(UnreadableImage, match=r"it is damaged in its archive \(BadZipFile\); unpack it first"):
        film.read(Limits())
    film.archive.close()


@pytest.mark.parametrize("text", [b"a.png\nb c.png\n", b"a.png\0b c.png\0"])
def test_a_list_on_standard_input(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    films = find_inputs(["-"])
    assert [film.path for film in films] == ["a.png", "b c.png"]
    with pytest.raises(UnreadableImage, match="it cannot be opened"):
        films[0].read(Limits())
