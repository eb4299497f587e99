"""A server of ours in a process of its own, and a client that speaks plain HTTP to it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
# No regular file may grow, and every file opened for writing is told: nothing that is uploaded touches the disk.
CODE = """
import json, os, resource, sys
from cxr_fastai.console import Console
from cxr_fastai.serving import ServeConfig
from cxr_fastai.serving.server import run_server
def watch(event, given):
    if event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if given[0] != os.devnull:
            print("opened for writing:", given[0], file=sys.stderr, flush=True)
def ready(facts):
    print(json.dumps(facts), flush=True)
    sys.addaudithook(watch)
config = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
run_server(ServeConfig(**config), Console(machine=True), ready)
"""
BOUNDARY = "b0undary"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class Running:
    """A server that runs. `said`: all that it wrote on standard error."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    pipe: int

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.facts["url"])
        return parts.hostname or "", parts.port or 0

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 30
    ) -> Answer:
        """Send one request on a connection of its own; an iterable body is sent in chunks."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, bytes | None))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def post(self, *films: tuple[str, bytes], query: str = "", **headers: str) -> Answer:
        """Post films to /predict, each (name, bytes)."""
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return self.ask("POST", f"/predict{query}", form(*films), kind | headers)

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def said(self) -> str:
        """Return what has been written on standard error since the last call."""
        os.set_blocking(self.pipe, False)
        try:
            return os.read(self.pipe, 2**20).decode()
        except BlockingIOError:
            return ""

    def stop(self) -> int:
        """Stop it, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


def form(*films: tuple[str, bytes], field: str = "files") -> bytes:
    """Return a multipart/form-data body."""
    head = '--{}\r\nContent-Disposition: form-data; name="{}"; filename="{}"\r\nContent-Type: image/png\r\n\r\n'
    parts = [head.format(BOUNDARY, field, name).encode() + data + b"\r\n" for name, data in films]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@contextmanager
def serving(model: Path | str, **settings: Any) -> Iterator[Running]:
    """Start a server on a free port, with one worker unless told otherwise."""
    config = {"model": str(model), "port": 0, "workers": 1, **settings}
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-B", "-c", CODE, json.dumps(config)],
            stdout=subprocess.PIPE,
            stderr=writer,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
        )
        os.close(writer)
        assert process.stdout is not None
        line = process.stdout.readline()
        running = Running(process, json.loads(line) if line else {}, reader)
        try:
            assert line, running.said()
            yield running
            assert list(Path(folder).iterdir()) == []
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            os.close(reader)


def until(condition: Any, seconds: float = 20) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
