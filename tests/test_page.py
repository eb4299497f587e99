"""The page, as a person uses it in Chromium: drop, keyboard, phone, dark, busy server, token, CSV."""

import base64
import csv
import io
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import CHROMIUM, Page, chromium
from PIL import Image
from server_process import Running, serving

from cxr_fastai.predict import Predictor, overlay

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or not Path("/proc/self/task").exists(), reason="needs chromium (apt-get install chromium)"
)
TOKEN = "a-token-of-more-than-sixteen-characters"
DONE = "document.querySelectorAll('.verdict:not([hidden]), .problem:not([hidden])').length"
# The lowest contrast of any text that is shown, by WCAG's formula, with what it stands on.
CONTRAST = """(() => {
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0.99) return c; } return [255, 255, 255]; };
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest('.unseen, script, template')) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.className + ': ' + e.textContent.slice(0, 40)];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[Running]:
    with serving(finished, max_mb=2, workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Running) -> Iterator[Page]:
    """Return the page, newly loaded; in the end nothing has been complained of or asked from elsewhere."""
    browser.console.clear()
    browser.requests.clear()
    browser.show(1280, 900)
    browser.open(server.facts["url"])
    yield browser
    assert browser.console == []
    places = {urlsplit(url).netloc for url in browser.requests if not url.startswith(("data:", "blob:"))}
    assert places == {urlsplit(server.facts["url"]).netloc}


@pytest.fixture(scope="module")
def film(films: Path) -> Path:
    return sorted((films / "abnormal").glob("*.png"))[0]


def test_a_film_that_is_chosen_shows_its_verdict(page: Page, film: Path, finished: Path) -> None:
    (row,) = Predictor(finished, precision="auto").predict([str(film)])
    page.choose("#files", [str(film)])
    assert page.wait("document.querySelector('.verdict')?.textContent") == row.label
    text = page.run("document.querySelector('.entry').innerText")
    assert row.probability is not None
    assert isinstance(row.threshold, float)
    p = row.probability
    probability = "> 0.999" if 0.9995 < p < 1 else "< 0.001" if 0 < p < 0.0005 else f"{p:.3f}"
    for shown in (film.name, "Probability of abnormal", probability, f"Threshold {row.threshold:.3f}"):
        assert shown in text
    fill = page.run("document.querySelector('.gauge i').style.width")
    tick = page.run("document.querySelector('.gauge s').style.left")
    assert float(fill[:-1]) == pytest.approx(100 * row.probability, abs=1e-3)  # the browser keeps six digits
    assert float(tick[:-1]) == pytest.approx(100 * row.threshold, abs=1e-3)
    assert "Not a medical device" in page.run("document.body.innerText")
    assert page.run("$('status').textContent").startswith(f"{film.name}: {row.label}, probability")


def test_a_film_can_be_dropped(page: Page, film: Path) -> None:
    encoded = base64.b64encode(film.read_bytes()).decode()
    page.run(f"const bytes = Uint8Array.from(atob('{encoded}'), (c) => c.charCodeAt(0))")
    page.run("""{
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([bytes], 'dropped.png'));
      for (const kind of ['dragover', 'drop']) {
        $('drop').dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
      }
    }""")
    page.wait(f"{DONE} === 1")
    assert page.run("document.querySelector('h2').textContent") == "dropped.png"
    assert page.run("document.querySelector('.verdict').textContent") in ("normal", "abnormal")


def test_the_evidence_is_painted_as_by_predict(page: Page, film: Path, finished: Path) -> None:
    page.choose("#files", [str(film)])
    page.wait("document.querySelector('.entry .film:not([hidden]) canvas')?.width === 64")
    painted = page.run("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 64, 64).data]")
    colour, opacity = np.split(np.array(painted, np.float32).reshape(64, 64, 4) / 255, [3], axis=2)
    predictor = Predictor(finished, precision="auto")
    (row,) = predictor.predict([str(film)], keep_pixels=True)
    assert row.pixels is not None
    mixed = row.pixels[..., None] * (1 - opacity) + colour * opacity
    assert np.abs(255 * mixed - overlay(row.pixels, predictor.evidence_shown(row))).max() < 3


@pytest.mark.parametrize("width", [1280, 375])
def test_the_evidence_lies_on_the_enlarged_film(page: Page, film: Path, width: int) -> None:
    page.show(width, 800)
    page.choose("#files", [str(film)])
    page.wait("document.querySelector('.entry .film img')?.naturalWidth")
    page.run("document.querySelector('.entry .film').click()")
    boxes = page.run(
        "['img', 'canvas'].map((n) => { const b = $('large').querySelector(n).getBoundingClientRect(); "
        "return [b.left, b.top, b.width, b.height] })"
    )
    assert boxes[0] == pytest.approx(boxes[1], abs=0.5)
    assert boxes[0][2] > 0.9 * width


def test_an_enlarged_film_without_a_verdict_has_no_number(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.fromarray(np.tile(np.linspace(0, 255, 256).astype(np.uint8), (128, 1))).save(path)
    page.choose("#files", [str(path)])
    assert page.wait("document.querySelector('.verdict')?.textContent") == "no verdict"
    page.wait("document.querySelector('.entry .film img')?.naturalWidth")
    page.run("document.querySelector('.entry .film').click()")
    assert page.run("$('name').textContent") == "wide.png: no verdict"


def test_it_works_by_keyboard(page: Page, film: Path) -> None:
    page.send("Page.setInterceptFileChooserDialog", enabled=True)
    page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "files"
    assert page.run("getComputedStyle($('drop')).outlineStyle") == "solid"  # where the focus is can be seen
    page.press("Enter", 13)
    assert page.event("Page.fileChooserOpened")["mode"] == "selectMultiple"
    page.send("Page.setInterceptFileChooserDialog", enabled=False)

    page.choose("#files", [str(film)])
    page.wait("document.querySelector('.entry .film:not([hidden])')")
    stops = []
    for _ in range(8):
        page.press("Tab", 9)
        stops.append(page.run("document.activeElement.id || document.activeElement.className"))
    assert {"opacity", "csv", "clear", "film", "files"} <= set(stops)
    page.run("$('opacity').focus()")
    page.press("ArrowLeft", 37)
    assert page.run("document.querySelector('.film canvas').style.opacity") == "0.99"
    page.run("document.querySelector('.entry .film').focus()")
    page.press("Enter", 13)
    assert page.run("$('large').open")
    assert "Not a medical device" in page.run("$('large').innerText")  # it covers the one on top
    page.press("Escape", 27)
    assert page.run("!$('large').open && document.activeElement.className") == "film"


def test_names_are_text_and_errors_are_words(page: Page, film: Path, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=document.title=1>.png"
    shutil.copy(film, tmp_path / hostile)
    (tmp_path / "notes.txt").write_text("no film")
    (tmp_path / "large.dcm").write_bytes(bytes(3 * 2**20))
    page.choose("#files", [str(tmp_path / name) for name in (hostile, "notes.txt", "large.dcm")])
    page.wait(f"{DONE} === 3")
    names = page.run("[...document.querySelectorAll('h2')].map((h) => h.textContent)")
    assert names == [hostile, "notes.txt", "large.dcm"]
    assert page.run("document.title") == "Chest radiographs"
    assert page.run("[...document.querySelectorAll('.problem:not([hidden])')].map((p) => p.textContent)") == [
        "Not read: it is no picture format that we know.",
        "3 MB are more than the 2 MB that the server takes.",
    ]
    assert page.run("$('summary').textContent").endswith(", 2 not read")


def test_the_csv_has_every_film_and_no_formula(page: Page, film: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copy(film, tmp_path / '=1+1,"x".png')
    (tmp_path / "notes.txt").write_text("no film")
    page.choose("#files", [str(path) for path in sorted(tmp_path.iterdir())])
    page.wait(f"{DONE} === 2")
    first, second = csv.DictReader(io.StringIO(page.run("csv()")))
    (row,) = Predictor(finished, precision="auto").predict([str(film)])
    assert (first["path"], first["label"], first["error"]) == ("'=1+1,\"x\".png", row.label, "")
    assert float(first["p_abnormal"]) == row.probabilities["abnormal"]
    assert float(first["probability"]) == row.probability
    assert (second["path"], second["p_normal"]) == ("notes.txt", "")
    assert second["error"] == "it is no picture format that we know"


def test_a_busy_server_is_waited_for(browser: Page, finished: Path, film: Path) -> None:
    with serving(finished, max_files=1, queue=1) as server:
        (worker,) = server.workers()
        browser.show(1280, 900)
        browser.open(server.facts["url"])
        os.kill(worker, signal.SIGSTOP)
        browser.choose("#files", [str(film), str(film)])
        browser.wait("document.querySelector('#results').innerText.includes('goes on by itself in')")
        os.kill(worker, signal.SIGCONT)
        browser.wait("document.querySelectorAll('.verdict:not([hidden])').length === 2")


def test_a_server_that_is_gone_is_told_and_can_be_asked_again(browser: Page, finished: Path, film: Path) -> None:
    with serving(finished) as server:
        browser.open(server.facts["url"])
        browser.wait("!$('about').hidden")
        server.stop()
        browser.choose("#files", [str(film)])
        text = browser.wait("document.querySelector('.state.problem')?.textContent")
        assert text == "The server cannot be reached. Is it still running?"
        assert browser.run("!document.querySelector('.again').hidden")


def test_the_token_comes_from_the_address_or_is_asked_for(browser: Page, finished: Path, film: Path) -> None:
    with serving(finished, token=TOKEN) as server:
        browser.open("about:blank#")
        browser.open(f"{server.facts['url']}#token={TOKEN}")
        browser.choose("#files", [str(film)])
        browser.wait("document.querySelector('.verdict:not([hidden])')")
        assert browser.run("location.hash") == ""

        browser.open(server.facts["url"])
        browser.wait("!$('ask').hidden")
        browser.choose("#files", [str(film)])
        for given in ("wrong", TOKEN):
            browser.run(f"$('token').value = '{given}'; $('ask').requestSubmit()")
            if given == "wrong":
                browser.wait("!$('wrong').hidden")
        browser.wait("document.querySelector('.verdict:not([hidden])')")
        assert browser.run("$('ask').hidden")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_can_be_read_on_every_screen(page: Page, film: Path, tmp_path: Path, width: int, dark: bool) -> None:
    long = tmp_path / f"{'1.2.840.113619.2.5' * 8}.png"
    shutil.copy(film, long)
    (tmp_path / "notes.txt").write_text("no film")
    page.show(width, 740, dark=dark)
    page.choose("#files", [str(path) for path in sorted(tmp_path.iterdir())])
    page.wait(f"{DONE} === 2")
    page.run("document.querySelector('details').open = true")
    assert page.run("document.documentElement.scrollWidth") == width
    ratio, where = page.run(CONTRAST)
    assert ratio >= 4.5, where
    assert page.run("$('tools').getBoundingClientRect().bottom") < 100  # what stays on top leaves room for films


def test_the_reference_can_be_read(page: Page, server: Running) -> None:
    page.show(375, 740)
    page.open(f"{server.facts['url']}docs")
    assert page.run("document.documentElement.scrollWidth") == 375
    assert "POST /predict" in page.run("document.body.innerText")
    ratio, where = page.run(CONTRAST)
    assert ratio >= 4.5, where
