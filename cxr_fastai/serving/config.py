"""What can be set of the server. Standard library only."""

import ipaddress
from dataclasses import dataclass, field

from cxr_fastai.config import Limits, Saved, require, usable_cores

MIN_TOKEN = 16  # characters; what is generated has 32
BODIES_IN_MEMORY = 8  # bodies of the largest size that are held at once, before clients are asked to wait


@dataclass(frozen=True)
class ServeConfig(Saved):
    """One server.

    model: run folder or .onnx file. host, port: where it listens; port 0 is any free one.
    workers: processes that read films and run the network; None is one a core.
    max_mb: of one request's body. max_files: of one request. queue: films that wait or are read, of all requests.
    header_seconds, body_seconds: until a request's head, then its body, must be there.
    predict_seconds: for one film, before its worker is replaced. request_seconds: for all films of a request.
    worker_mb: memory of one worker. max_pixels, max_seconds: of one film, as in `Limits`.
    token: what a client must send, in `Authorization: Bearer`; None is made up where the host is not loopback.
    """

    model: str = "exports/latest"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int | None = None
    max_mb: float = 64
    max_files: int = 64
    queue: int = 128
    header_seconds: float = 10
    body_seconds: float = 30
    predict_seconds: float = 30
    request_seconds: float = 120
    worker_mb: int = 2048
    max_pixels: int = Limits.max_pixels
    max_seconds: float = Limits.max_seconds
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(bool(self.host.strip()), "--host", repr(self.host), "a name or address of this machine")
        require(0 <= self.port <= 65535, "--port", self.port, "from 0 (any free one) to 65535")
        require(self.workers is None or 1 <= self.workers <= 256, "--workers", self.workers, "from 1 to 256")
        require(0 < self.max_mb <= 1024, "--max-mb", self.max_mb, "above 0 and up to 1024")
        require(1 <= self.max_files <= 1000, "--max-files", self.max_files, "from 1 to 1000")
        require(self.queue >= self.max_files, "--queue", self.queue, f"at least --max-files, {self.max_files}")
        for name in ("header_seconds", "body_seconds", "predict_seconds", "request_seconds", "max_seconds"):
            seconds = getattr(self, name)
            require(0 < seconds <= 3600, f"--{name.replace('_', '-')}", seconds, "above 0 and up to 3600 seconds")
        require(self.worker_mb >= 512, "--worker-mb", self.worker_mb, "at least 512")
        require(self.max_pixels >= 1, "--max-pixels", self.max_pixels, "1 or more")
        token = "x" * MIN_TOKEN if self.token is None else self.token
        usable = len(token) >= MIN_TOKEN and token.isascii() and token.isprintable() and " " not in token
        require(usable, "CXR_TOKEN", "set", f"{MIN_TOKEN} or more printable ASCII characters without a space")

    @property
    def max_bytes(self) -> int:
        """What one body may have, in bytes."""
        return int(self.max_mb * 2**20)

    @property
    def processes(self) -> int:
        """How many workers there are."""
        return self.workers or usable_cores()

    @property
    def threads(self) -> int:
        """How many threads each worker has, so that all of them together have one a core."""
        return max(1, usable_cores() // self.processes)

    @property
    def limits(self) -> Limits:
        """What one film may cost."""
        return Limits(self.max_pixels, self.max_bytes, self.max_seconds)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
