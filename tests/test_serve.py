"""The server: the same rows as `predict`, limits with reasons, nothing on disk or in a log, no film that stops it."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_process import ROOT, Running, form, serving, until

from cxr_fastai.console import QUIET
from cxr_fastai.errors import ModelFileError, UsageError
from cxr_fastai.predict import Predictor
from cxr_fastai.serving import ServeConfig
from cxr_fastai.serving.form import base_name
from cxr_fastai.serving.guard import SECURITY, Guard
from cxr_fastai.serving.server import run_server, with_token
from cxr_fastai.serving.workers import Busy, Pool

# The server's tests look at processes and limits as Linux has them.
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b0undary"}
TOKEN = "a-token-of-more-than-sixteen-characters"


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[Running]:
    """Return a server with small limits."""
    with serving(finished, max_mb=2, max_files=4, queue=8, header_seconds=1, body_seconds=1) as running:
        yield running


@pytest.fixture(scope="module")
def film(films: Path) -> bytes:
    return next(films.rglob("*.png")).read_bytes()


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def talk(server: Running, data: bytes, seconds: float = 8) -> bytes:
    """Send raw bytes, and return all that comes until the server closes."""
    with socket.create_connection(server.address, timeout=seconds) as connection:
        connection.sendall(data)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    return got


def test_rows_are_those_of_predict(server: Running, finished: Path, films: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    paths = [*sorted(films.rglob("*.png"))[:2], tmp_path / "broken.png"]
    answer = server.post(*((path.name, path.read_bytes()) for path in paths))
    assert answer.status == 200
    said = Predictor(finished, precision="auto").predict(map(str, paths), abstain=True)
    expected = [row.to_dict() | {"path": Path(row.path).name} for row in said]
    assert [without_seconds(row) for row in answer.json["rows"]] == [without_seconds(row) for row in expected]
    assert [row["error"] is None for row in answer.json["rows"]] == [True, True, False]
    assert list(answer.json) == ["rows"]


def test_a_picture_has_the_evidence_of_predict(server: Running, finished: Path, films: Path) -> None:
    predictor = Predictor(finished, precision="auto")
    said = list(predictor.predict([str(path) for path in sorted(films.rglob("*.png"))[:8]], abstain=True))
    row = next(row for row in said if row.label is not None)
    picture = server.post(("a.png", Path(row.path).read_bytes()), query="?pictures=true").json["pictures"][0]
    assert np.abs(np.array(picture["evidence"]) - predictor.evidence_shown(row)).max() < 1e-5


def test_pictures_are_the_films_and_without_a_verdict_there_is_no_evidence(server: Running, tmp_path: Path) -> None:
    wide = np.tile(np.linspace(0, 255, 2048).astype(np.uint8), (512, 1))
    Image.fromarray(wide).save(tmp_path / "wide.png")
    data = (tmp_path / "wide.png").read_bytes()
    answer = server.post(("wide.png", data), ("no film", b"text"), query="?pictures=true").json
    picture, none = answer["pictures"]
    assert none is None
    head, _, encoded = picture["film"].partition(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert shown.shape == (256, 1024)
    assert abs(shown[100].astype(int) - np.linspace(0, 255, 1024)).max() <= 1
    assert answer["rows"][0]["flags"][-1] == "unlike-training"
    assert picture["evidence"] == []


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/x.png", "x.png"),
        ("/etc/passwd", "passwd"),
        ("C:\\films\\y.png", "y.png"),
        ("..", ".."),
        ("a/", "unnamed"),
        ("", "unnamed"),
        ("\x1b[31mred\u202e.png", "\\x1b[31mred\\u202e.png"),
        ("ß雪.dcm", "ß雪.dcm"),
        ("n" * 300, "n" * 255),
        ("=1+1.png", "=1+1.png"),
    ],
)
def test_names_lose_their_folders_and_controls(sent: str, shown: str) -> None:
    assert base_name(sent) == shown


def test_a_path_as_a_name_is_only_a_name(server: Running) -> None:
    names = ["../../etc/passwd", "/proc/self/environ", "ß雪.dcm"]
    rows = server.post(*((name, b"no film") for name in names)).json["rows"]
    assert [row["path"] for row in rows] == ["passwd", "environ", "ß雪.dcm"]
    assert {row["error"] for row in rows} == {"it is no picture format that we know"}


def test_too_large_is_refused_by_its_head_and_by_its_bytes(server: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    said = talk(server, head + b"Content-Length: 1000000000\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"more than 2 MB in one request" in said
    pieces = (b"x" * 100_000 for _ in range(30))
    body = form(("x.png", b"")).removesuffix(b"\r\n--b0undary--\r\n")
    answer = server.ask("POST", "/predict", iter([body, *pieces]), MULTIPART)
    assert (answer.status, answer.json["detail"][:11]) == (413, "more than 2")


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (form(*[("x.png", b"x")] * 5), MULTIPART, 413, "more than 4 files"),
        (b"{}", {"Content-Type": "application/json"}, 415, "send multipart/form-data"),
        (b"", {}, 415, "send multipart/form-data"),
        (b"", {"Content-Type": "multipart/form-data"}, 400, "names no boundary"),
        (b"", {"Content-Type": f"multipart/form-data; boundary={'b' * 400}"}, 400, "boundary is too long"),
        (form(), MULTIPART, 422, "no file in the form"),
        (form(("x.png", b"x"), field="model"), MULTIPART, 422, "a file in the field 'files'"),
        (form(("x.png", b"x"))[:-8], MULTIPART, 400, "cut short"),
        (b"--b0undary\r\nno header\r\n\r\n", MULTIPART, 400, "not multipart/form-data as it should be"),
        (b"--b0undary\r\n\r\nx\r\n--b0undary--\r\n", MULTIPART, 422, "must be a file"),
    ],
)
def test_a_bad_form_is_refused_with_its_reason(
    server: Running, body: bytes, headers: dict[str, str], status: int, reason: str
) -> None:
    answer = server.ask("POST", "/predict", body, headers)
    assert answer.status == status
    assert reason in answer.json["detail"]


def test_a_bad_parameter_is_refused(server: Running, film: bytes) -> None:
    answer = server.post(("x.png", film), query="?pictures=perhaps")
    assert answer.status == 422
    assert answer.json["detail"].startswith("query.pictures: ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: local", b"408"),
        (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
         b"Content-Length: 100\r\n\r\n--b\r\n", b"408"),
        (b"\x16\x03\x01 this is no HTTP\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_what_comes_slowly_or_is_no_http_is_cut_off(server: Running, sent: bytes, status: bytes) -> None:
    began = time.monotonic()
    said = talk(server, sent)
    assert said.split()[1] == status
    assert time.monotonic() - began < 5
    for name, value in SECURITY.items():
        assert f"{name}: {value}".encode() in said


def test_silence_is_cut_off_without_a_word(server: Running) -> None:
    began = time.monotonic()
    assert talk(server, b"") == b""
    assert 0.5 < time.monotonic() - began < 5


def test_a_body_that_nobody_reads_is_cut_off(server: Running) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert talk(server, head + b"x" * 1000).startswith(b"HTTP/1.1 404 ")
    assert time.monotonic() - began < 7


def test_one_connection_serves_many_requests(server: Running, film: bytes) -> None:
    body = form(("x.png", film))
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    one = head.encode() + b"Content-Type: multipart/form-data; boundary=b0undary\r\n\r\n" + body
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert talk(server, one + one + last).count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "a@localhost", "[::1"])
def test_another_host_is_refused(server: Running, host: str) -> None:
    answer = server.ask("GET", "/health", headers={"Host": host})
    assert answer.status == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:8000", "[::1]:8000"])
def test_our_own_names_are_ours(server: Running, host: str) -> None:
    assert server.ask("GET", "/health", headers={"Host": host}).status == 200


def test_a_server_for_all_addresses_takes_any_address_but_no_foreign_name() -> None:
    guard = Guard(None, ServeConfig(host="0.0.0.0", token=TOKEN))  # type: ignore[arg-type]
    hosts = ["192.168.1.7:8000", "[fe80::1]:8000", socket.gethostname(), "evil.example"]
    assert [guard.host_is_ours(host) for host in hosts] == [True, True, True, False]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[", "Host": "localhost"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(
    server: Running, film: bytes, headers: dict[str, str], status: int
) -> None:
    assert server.post(("x.png", film), **headers).status == status


def test_every_answer_has_the_security_headers(server: Running, film: bytes) -> None:
    answers = [
        server.ask("GET", "/"),
        server.ask("GET", "/nothing"),
        server.ask("PUT", "/predict"),
        server.ask("GET", "/", headers={"Host": "evil.example"}),
        server.post(("x.png", film)),
        server.post(("x.png", b"x" * 3_000_000)),
    ]
    assert [answer.status for answer in answers] == [200, 404, 405, 400, 200, 413]
    for answer in answers:
        assert answer.headers | SECURITY == answer.headers
        assert "server" not in answer.headers


def test_model_is_the_card_and_health_counts(server: Running, finished: Path) -> None:
    assert server.ask("GET", "/model").json == Predictor(finished).card
    health = server.ask("GET", "/health").json
    assert (health["status"], health["workers"], health["waiting"], health["queue"]) == ("ok", 1, 0, 8)


def test_the_reference_names_the_port_that_is_listened_on(server: Running) -> None:
    page = server.ask("GET", "/docs").body.decode()
    assert f"http://127.0.0.1:{server.address[1]}/predict" in page


def test_pages_name_no_other_place(server: Running) -> None:
    for path, kind in {"/": "html", "/docs": "html", "/page.css": "css", "/page.js": "javascript"}.items():
        answer = server.ask("GET", path)
        assert answer.status == 200
        assert kind in answer.headers["content-type"]
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "").replace("http://127.0.0.1", "")
        assert "//" not in text.replace("// ", "") or "://" not in text
    routes = server.ask("GET", "/openapi.json").json["paths"]
    assert sorted(routes) == ["/health", "/model", "/predict"]
    assert set(routes["/predict"]["post"]["responses"]) >= {"200", "408", "413", "415", "422", "429", "503"}


def test_nothing_was_written_or_logged(server: Running) -> None:
    """What the tests above sent, names of files and hostile forms among it, left no trace but the first line."""
    server.post(("Patient^Name.png", b"x" * 1_500_000), ("Patient^Name.dcm", b"x"))
    server.ask("POST", "/predict", b"--b0undary\r\n\x00\r\n", MULTIPART)
    said = server.said().splitlines()
    assert said[1:] == []
    assert said[0].startswith("Serving ")


def test_a_token_is_asked_for(finished: Path, film: bytes) -> None:
    with serving(finished, token=TOKEN) as server:
        assert server.facts["token"] == TOKEN
        assert f"#token={TOKEN}" in server.said()
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "ß"}):
            headers = {key: value.encode("latin-1").decode("latin-1") for key, value in headers.items()}
            answer = server.post(("x.png", film), **headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert server.ask("GET", "/model", headers=headers).status == 401
        assert server.post(("x.png", film), Authorization=f"Bearer {TOKEN}").status == 200
        assert [server.ask("GET", path).status for path in ("/", "/page.js", "/health", "/docs")] == [200] * 4
        assert "security" in server.ask("GET", "/openapi.json").json["paths"]["/predict"]["post"]


def test_only_this_machine_needs_no_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        assert with_token(ServeConfig(host=host)).token is None
    for host in ("0.0.0.0", "::", "192.168.1.7", "films.example"):
        assert len(with_token(ServeConfig(host=host)).token or "") == 32
    assert with_token(ServeConfig(host="0.0.0.0", token=TOKEN)).token == TOKEN
    assert TOKEN not in repr(ServeConfig(token=TOKEN))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "--port is 70000, but must be from 0"),
        ({"workers": 0}, "--workers is 0, but must be from 1"),
        ({"max_mb": 0}, "--max-mb is 0, but must be above 0"),
        ({"queue": 4}, "--queue is 4, but must be at least --max-files, 64"),
        ({"body_seconds": 0}, "--body-seconds is 0, but must be above 0"),
        ({"worker_mb": 10}, "--worker-mb is 10, but must be at least 512"),
        ({"token": "short"}, "CXR_TOKEN is set, but must be 16 or more printable"),
        ({"host": " "}, "--host is ' ', but must be"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServeConfig(**settings)


def test_threads_and_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr_fastai.serving.config.usable_cores", lambda: 8)
    configs = [ServeConfig(workers=n) for n in (None, 1, 2, 16)]
    counts = [(config.processes, config.threads) for config in configs]
    assert counts == [(8, 1), (1, 8), (2, 4), (16, 1)]


def test_without_a_model_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no run there"):
        run_server(ServeConfig(model=str(tmp_path / "none"), port=0), QUIET)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"model\.onnx"):
        run_server(ServeConfig(model=str(tmp_path / "model.onnx"), port=0, workers=1), QUIET)


def test_a_port_in_use_is_told(finished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            run_server(ServeConfig(model=str(finished), port=port), QUIET)


def test_the_server_process_holds_no_network() -> None:
    heavy = ("torch", "fastai", "sklearn", "matplotlib", "onnx", "onnxruntime", "pydicom")
    code = f"import sys, cxr_fastai.serving.server\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_a_film_that_takes_its_worker_along_has_a_row(finished: Path, film: bytes) -> None:
    with serving(finished, predict_seconds=1.5) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)  # as a decoder that hangs
        (row,) = server.post(("hangs.png", film)).json["rows"]
        assert (row["path"], row["error"][:42]) == ("hangs.png", "reading it takes longer than 1.5 seconds; ")
        assert server.post(("next.png", film)).json["rows"][0]["error"] is None

        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)  # while it has nothing to do: no film is to blame
        until(lambda: not Path(f"/proc/{worker}").exists())
        assert server.post(("innocent.png", film)).json["rows"][0]["error"] is None
        assert server.ask("GET", "/health").json["workers"] == 1


def test_sigterm_answers_what_is_under_way_and_ends_the_workers(finished: Path, film: bytes) -> None:
    with serving(finished) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        body = form(("x.png", film))
        with socket.create_connection(server.address, timeout=20) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b0undary\r\n\r\n" + body)
            until(lambda: server.ask("GET", "/health").json["waiting"] == 1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            os.kill(worker, signal.SIGCONT)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(20) == 0
        assert not Path(f"/proc/{worker}").exists()
        assert server.said().count("\n") == 1


# ---- the pool by itself ----


@contextlib.asynccontextmanager
async def started(model: Path, **settings: Any) -> AsyncIterator[Pool]:
    pool = Pool(str(model / "model.onnx"), ServeConfig(workers=1, **settings))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def test_places_are_counted_and_given_back(finished: Path) -> None:
    pool = Pool(str(finished), ServeConfig(workers=2, queue=40, max_files=30))
    pool.seconds = 0.5
    with pool.places(30):
        with pytest.raises(Busy, match="30 films wait or are read, of 40 places") as busy, pool.places(11):
            pass
        assert (busy.value.seconds, busy.value.status) == (8, 429)  # 30 films of half a second, by two workers
        with pool.places(10):
            assert pool.waiting == 40
    assert pool.waiting == 0


def test_bodies_are_counted_and_given_back() -> None:
    pool = Pool("model", ServeConfig(max_mb=1))
    with pool.holding() as hold:
        hold(8 * 2**20)
        with pytest.raises(Busy, match="fill the memory"):
            hold(1)
    assert pool.held == 0


def test_who_leaves_frees_the_queue(finished: Path, film: bytes) -> None:
    async def leave() -> tuple[int, dict[str, Any]]:
        async with started(finished) as pool:
            gone = [asyncio.create_task(pool.classify("gone.png", film, False)) for _ in range(50)]
            await asyncio.sleep(0)
            for task in gone:
                task.cancel()
            answer = await pool.classify("stays.png", film, False)
            return sum(task.cancelled() for task in gone), answer["row"]

    cancelled, row = asyncio.run(leave())
    assert cancelled == 50
    assert (row["path"], row["error"]) == ("stays.png", None)


def the_worker() -> int:
    """Return the process id of the only worker that is a child of this process."""
    (worker,) = the_workers()
    return worker


def the_workers() -> list[int]:
    """Return the process ids of the workers among the children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(child) for child in children if b"serving.worker " in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_film_that_kills_its_worker_has_a_row(finished: Path, film: bytes) -> None:
    async def kill() -> list[dict[str, Any]]:
        async with started(finished) as pool:
            os.kill(the_worker(), signal.SIGSTOP)
            tasks = [asyncio.create_task(pool.classify(name, film, False)) for name in ("kills.png", "next.png")]
            await asyncio.sleep(0.2)
            os.kill(the_worker(), signal.SIGKILL)
            return [(await task)["row"] for task in tasks]

    killer, after = asyncio.run(kill())
    assert killer["error"] == "the process that read it died of it; export it again, or in another format"
    assert (killer["path"], killer["label"]) == ("kills.png", None)
    assert (after["path"], after["error"]) == ("next.png", None)


def test_a_model_that_was_exchanged_is_not_taken(finished: Path, film: bytes) -> None:
    async def exchange() -> tuple[int, int]:
        async with started(finished) as pool:
            pool.card = {**pool.card, "threshold": 0.123456}
            os.kill(the_worker(), signal.SIGKILL)
            while the_workers():
                await asyncio.sleep(0.01)
            waits = asyncio.create_task(pool.classify("x.png", film, False))
            while not pool.failing:
                await asyncio.sleep(0.01)
            with pytest.raises(Busy, match="cannot be loaded any more") as busy:
                pool.require_places(1)
            waits.cancel()
            return busy.value.status, pool.alive

    assert asyncio.run(exchange()) == (503, 0)


def test_a_worker_writes_no_file_and_has_a_limit(finished: Path, film: bytes) -> None:
    with serving(finished, worker_mb=1000) as server:
        limits = Path(f"/proc/{server.workers()[0]}/limits").read_text().splitlines()
    found = {line[:20].strip(): line[26:].split()[0] for line in limits}
    assert found["Max file size"] == "0"
    assert found["Max core file size"] == "0"
    assert found["Max data size"] == str(1000 * 2**20)


def test_documents_match_the_rows(server: Running, film: bytes) -> None:
    described = server.ask("GET", "/openapi.json").json["components"]["schemas"]["Row"]["properties"]
    assert set(described) <= set(json.loads(json.dumps(server.post(("x.png", film)).json["rows"][0])))
