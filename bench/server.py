"""What a server of ours withstands: hostile files, many clients, slow clients, huge bodies, malformed requests.

    python bench/server.py exports/latest films --corpus shared/badinputs --handmade /tmp/handmade --schemathesis st

Starts a server on a free port of this machine for each part, and talks to it over HTTP. MODEL is a run folder, FILMS a
folder of films for the honest clients. Parts: `corpus` posts every file of a corpus (see bench/badinputs.py) and wants
a row or a 4xx of each; `load` has 32 clients post films for a minute; `slow` opens 300 connections that send their
heads, and 300 that send their bodies, a byte at a time, and times an honest client before and beside them; `large`
sends 1 GB, with and without its length told beforehand; `schemathesis` lets that program make 500 requests a route.
Exit code 1 if a part fails: an answer of 5xx or none, an error of a client (429 is none), memory that grows, a byte on
disk, a slow client that stays, an honest one that waits.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

CLIENTS, SLOW, GIGABYTE = 32, 300, 1_000_000_000
P99, WORSE = 0.1, 1.5  # seconds of an honest client beside slow ones, or how many times what it takes alone
GROWTH, FLAT = 0.1, 150  # of memory: share, from a quarter of the load's time to its end; MB, during 1 GB
CODE = """
import json, sys
from cxr_fastai.console import Console
from cxr_fastai.serving import ServeConfig
from cxr_fastai.serving.server import run_server
config = ServeConfig(**json.loads(sys.argv[1]))
run_server(config, Console(quiet=True), lambda facts: print(json.dumps(facts), flush=True))
"""

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """A server process, what it costs, and how to talk to it."""

    def __init__(self, process: subprocess.Popen[str], url: str, folder: Path):
        self.process, self.folder = process, folder
        parts = urlsplit(url)
        self.url, self.address = url, (parts.hostname or "", parts.port or 0)

    def processes(self) -> list[int]:
        """Return the process ids of the server and of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def megabytes(self, field: str = "VmRSS") -> list[float]:
        """Return the memory of the server and of each worker."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError, IndexError):  # a worker may just have been replaced
                status = Path(f"/proc/{pid}/status").read_text()
                found.append(int(status.split(f"{field}:")[1].split()[0]) / 1024)
        return found

    def written(self) -> int:
        """Return the bytes that server and workers have caused to be written to a disk, and left in its folder."""
        io = [Path(f"/proc/{pid}/io").read_text() for pid in self.processes()]
        if left := list(self.folder.rglob("*")):
            print(f"  left in the folder for temporary files: {left}")
        return len(left) + sum(int(text.split("\nwrite_bytes: ")[1].split("\n")[0]) for text in io)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request; return status, headers and body."""
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def post(self, name: str, data: bytes) -> Answer:
        """Post one film under a name."""
        safe = name.encode("utf-8", "replace").replace(b'"', b"%22").replace(b"\r", b"%0D").replace(b"\n", b"%0A")
        head = b'--b0undary\r\nContent-Disposition: form-data; name="files"; filename="' + safe + b'"\r\n\r\n'
        body = head + data + b"\r\n--b0undary--\r\n"
        return self.ask("POST", "/predict", body, **{"Content-Type": "multipart/form-data; boundary=b0undary"})


@contextlib.contextmanager
def serving(options: argparse.Namespace, **settings: object) -> Iterator[Server]:
    config = {"model": options.model, "port": 0, "workers": options.workers, **settings}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-B", "-c", CODE, json.dumps(config)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder},
        )
        assert process.stdout is not None
        try:
            yield Server(process, json.loads(process.stdout.readline())["url"], Path(folder))
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()


def films_of(options: argparse.Namespace) -> list[bytes]:
    paths = sorted(p for p in Path(options.films).rglob("*") if p.suffix in (".png", ".jpg", ".jpeg", ".dcm"))
    random.Random(0).shuffle(paths)
    return [path.read_bytes() for path in paths[:50]]


def corpus(options: argparse.Namespace) -> bool:
    """Post every file of the corpora."""
    files = [p for f in (options.corpus, options.handmade) if f for p in sorted(Path(f).rglob("*")) if p.is_file()]
    answers: Counter[str] = Counter()
    slowest = 0.0
    with serving(options) as server:

        def one(path: Path) -> None:
            nonlocal slowest
            try:
                data = path.read_bytes()
            except OSError:
                return
            began = time.perf_counter()
            status, _, body = server.post(os.fsencode(path.name).decode("utf-8", "replace"), data)
            slowest = max(slowest, time.perf_counter() - began)
            rows = json.loads(body)["rows"] if status == 200 else [{"error": None}]
            kind = "a verdict" if rows[0]["error"] is None else "an error in its row"
            if "died of it" in str(rows[0]["error"]) or "takes longer than" in str(rows[0]["error"]):
                kind = "a lost worker"
                print(f"  {path}: {rows[0]['error']}")
            answers[kind if status == 200 else str(status)] += 1

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, files))
        peak = max(server.megabytes("VmHWM"))
        alive = server.ask("GET", "/health")[0] == 200
        written = server.written()
    good = alive and not any(kind.startswith("5") for kind in answers) and written == 0
    print(f"corpus: {len(files)} files: {dict(answers)}; slowest {slowest:.1f} s, largest process {peak:.0f} MB, "
          f"{written} bytes written: {verdict(good)}")  # fmt: skip
    return good


def load(options: argparse.Namespace) -> bool:
    """Let many clients post films as fast as they are answered."""
    films, counts, times, memory = films_of(options), Counter[str](), list[float](), list[float]()
    with serving(options) as server:
        end = time.monotonic() + options.seconds

        def client(number: int) -> None:
            choice = random.Random(number)
            while time.monotonic() < end:
                began = time.perf_counter()
                try:
                    status, headers, body = server.post("film", choice.choice(films))
                except OSError as error:
                    counts[type(error).__name__] += 1
                    continue
                if status == 429:
                    counts["429"] += 1
                    time.sleep(float(headers["retry-after"]))
                elif status == 200 and json.loads(body)["rows"][0]["error"] is None:
                    counts["200"] += 1
                    times.append(time.perf_counter() - began)
                else:
                    counts[f"{status} {body[:80]!r}"] += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            memory.append(sum(server.megabytes()))
            time.sleep(0.5)
        for thread in threads:
            thread.join()
        written = server.written()
    quarter, last = memory[len(memory) // 4], max(memory[-10:])
    good = set(counts) <= {"200", "429"} and last < (1 + GROWTH) * quarter and written == 0
    print(f"load: {CLIENTS} clients, {options.seconds:.0f} s: {dict(counts)}, {counts['200'] / options.seconds:.1f} "
          f"films/s, median {np.median(times):.2f} s, p99 {np.quantile(times, 0.99):.2f} s; memory {quarter:.0f} MB at "
          f"a quarter, {last:.0f} MB at the end; {written} bytes written: {verdict(good)}")  # fmt: skip
    return good


class Slow:
    """Connections that each send one byte a second, until they are cut off."""

    def __init__(self, server: Server, n: int, head: bytes):
        self.open = [socket.create_connection(server.address) for _ in range(n)]
        for connection in self.open:
            connection.sendall(head)
            connection.setblocking(False)
        self.lived: list[float] = []
        self.began = time.monotonic()

    def step(self) -> None:
        """Send a byte on each, and see which have been cut off."""
        for connection in list(self.open):
            try:
                connection.send(b"x")
                while connection.recv(4096):
                    pass
                raise ConnectionError
            except BlockingIOError:
                continue
            except OSError:
                connection.close()
                self.open.remove(connection)
                self.lived.append(time.monotonic() - self.began)


def slow(options: argparse.Namespace) -> bool:
    """Time an honest client beside clients that draw everything out."""
    film = min(films_of(options), key=len)
    times: dict[str, list[float]] = {}

    def honest(server: Server, when: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for path in ("/health", "/predict"):
                began = time.perf_counter()
                status, *_ = server.post("x", film) if path == "/predict" else server.ask("GET", path)
                assert status == 200
                times.setdefault(f"{path} {when}", []).append(time.perf_counter() - began)
            time.sleep(0.05)

    with serving(options) as server:
        honest(server, "alone", 10)
        kind = b"Host: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n--b"
        heads = Slow(server, SLOW, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        bodies = Slow(server, SLOW, b"POST /predict HTTP/1.1\r\n" + kind)
        end = time.monotonic() + 60
        while (heads.open or bodies.open) and time.monotonic() < end:
            heads.step()
            bodies.step()
            honest(server, "beside", 1)
        stay = len(heads.open) + len(bodies.open)
    p99 = {name: float(np.quantile(taken, 0.99)) for name, taken in times.items()}
    quick = all(p99[f"{path} beside"] < max(P99, WORSE * p99[f"{path} alone"]) for path in ("/health", "/predict"))
    good = stay == 0 and p99["/health beside"] < P99 and quick
    shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in p99.items())
    print(f"slow: {SLOW} heads cut off after {max(heads.lived, default=0):.0f} s, {SLOW} bodies after "
          f"{max(bodies.lived, default=0):.0f} s, {stay} stay; honest p99: {shown}: {verdict(good)}")  # fmt: skip
    return good


def large(options: argparse.Namespace) -> bool:
    """Send bodies of 1 GB that nobody wants, and go on sending although they are refused."""
    good = True
    with serving(options) as server:
        server.post("warm", films_of(options)[0])
        for told in (True, False):
            before = sum(server.megabytes())
            length = f"Content-Length: {GIGABYTE}" if told else "Transfer-Encoding: chunked"
            kind = "Content-Type: multipart/form-data; boundary=b"
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n{length}\r\n\r\n"
            part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
            piece, sent, most, said = bytes(2**20), 0, before, b""
            with socket.create_connection(server.address, timeout=60) as connection:
                connection.sendall(head.encode() + (part if told else b"%x\r\n%s\r\n" % (len(part), part)))
                with contextlib.suppress(ConnectionError):
                    while sent < GIGABYTE:
                        connection.sendall(piece if told else b"%x\r\n%s\r\n" % (len(piece), piece))
                        sent += len(piece)
                        most = max(most, sum(server.megabytes())) if sent % (16 * 2**20) == 0 else most
                with contextlib.suppress(OSError):
                    said = connection.recv(4096)
            written = server.written()
            right = said.startswith(b"HTTP/1.1 413 ") and most - before < FLAT and written == 0
            good &= right
            print(f"large ({length.split(':')[0]}): {said[:12].decode()!r} after {sent / 1e6:.0f} MB sent; memory "
                  f"{before:.0f} MB, at most {most:.0f} MB; {written} bytes written: {verdict(right)}")  # fmt: skip
    return good


def schemathesis(options: argparse.Namespace) -> bool:
    """Let schemathesis look for answers that the OpenAPI document does not promise."""
    with serving(options) as server:
        command = [options.schemathesis, "run", f"{server.url}openapi.json", "--max-examples", str(options.examples)]
        hooks = {**os.environ, "SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("schemathesis_hooks.py"))}
        done = subprocess.run(command, env=hooks, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:])
    facts = [line.strip() for line in done.stdout.splitlines() if "generated" in line or "issues" in line]
    print(f"schemathesis: {'; '.join(facts).strip('= ')}: {verdict(done.returncode == 0)}")
    return done.returncode == 0


def verdict(good: bool) -> str:
    return "ok" if good else "FAILS"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("films")
    parser.add_argument("--corpus")
    parser.add_argument("--handmade")
    parser.add_argument("--schemathesis", help="its program `st`")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--only", action="append", help="a part to run, repeatable")
    options = parser.parse_args()
    parts = {"load": load, "slow": slow, "large": large}
    if options.corpus or options.handmade:
        parts["corpus"] = corpus
    if options.schemathesis:
        parts["schemathesis"] = schemathesis
    good = True
    for name, part in parts.items():
        if not options.only or name in options.only:
            good &= part(options)
            sys.stdout.flush()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
