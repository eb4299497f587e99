"""Starts the workers, then listens, until it is told to stop."""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from cxr_fastai.console import Console
from cxr_fastai.errors import UsageError
from cxr_fastai.runs import find_model
from cxr_fastai.serving.app import create_app
from cxr_fastai.serving.config import ServeConfig
from cxr_fastai.serving.protocol import DeadlineProtocol
from cxr_fastai.serving.workers import Pool

KEEP_ALIVE = 5  # seconds
MAX_HEAD = 32 * 1024  # bytes of a request's head
ELSEWHERE = ("192.0.2.1", 9)  # an address for documentation (RFC 5737), to which nothing is sent


def run_server(
    config: ServeConfig, console: Console, ready: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Serve a model until SIGINT or SIGTERM; films that are being read then are answered first.

    Parameters
    ----------
    config
        Without a token, one is made up where the host is not loopback.
    ready
        Called once with url, docs, model, workers and, where one is needed, token, when requests are taken.

    Raises
    ------
    ModelFileError
        Where there is no such model, before anything listens.
    UsageError
        Where the address cannot be listened on.
    """
    config = with_token(config)
    model = str(find_model(config.model))
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs what clients send
    with listener(config) as sock:
        config = dataclasses.replace(config, port=sock.getsockname()[1])
        asyncio.run(_serve(config, model, sock, console, ready or (lambda _: None)))


def with_token(config: ServeConfig) -> ServeConfig:
    """Return the config with a token, made up if need be, where others than this machine can reach the server."""
    if config.is_local or config.token is not None:
        return config
    return dataclasses.replace(config, token=secrets.token_urlsafe(24))


def listener(config: ServeConfig) -> socket.socket:
    """Return a socket that is bound, but does not listen yet."""
    with contextlib.ExitStack() as undo:
        try:
            family, kind, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
            sock = undo.enter_context(socket.socket(family, kind))
            if sys.platform != "win32":  # there it would let two servers share a port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as error:
            where = f"{config.host} port {config.port}"
            raise UsageError(f"cannot listen on {where}: {error.strerror}; choose another --host or --port") from None
        undo.pop_all()
    return sock


def address_of(config: ServeConfig) -> str:
    """Return the URL under which others reach the server."""
    host = config.host
    if host in ("0.0.0.0", "::"):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(ELSEWHERE)  # sends nothing; tells which of our addresses leads outward
                host = probe.getsockname()[0]
        except OSError:
            host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}/"


class Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready, and takes a signal for an order and not for an accident."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after the requests under way; at once at the second Ctrl-C."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


async def _serve(
    config: ServeConfig, model: str, sock: socket.socket, console: Console, ready: Callable[[dict[str, Any]], None]
) -> None:
    pool = Pool(model, config)
    url = address_of(config)
    facts = {"url": url, "docs": f"{url}docs", "model": model, "workers": config.processes}
    if config.token:
        facts["token"] = config.token

    def announce() -> None:
        fragment = f"#token={config.token}" if config.token else ""
        console.say(f"Serving {model} at {url}{fragment}   Ctrl-C stops it. Not a medical device.")
        ready(facts)

    settings = uvicorn.Config(
        create_app(config, pool),
        http=DeadlineProtocol.bounded_by(config),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",  # uvicorn would log paths and tracebacks; the guard logs what is needed
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(config.predict_seconds) + 1,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    try:
        with console.busy("Loading the model"):
            await pool.start()
        await Server(settings, announce).serve(sockets=[sock])
    finally:
        await pool.close()
