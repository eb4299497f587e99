"""HTTP over a connection, with a deadline on everything that a client may draw out: head, body, and taking the answer.

uvicorn has none of these: a client that sends a byte now and then keeps a connection for ever.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cxr_fastai.serving.config import ServeConfig
from cxr_fastai.serving.guard import SECURITY_HEADERS, refusal

GRACE = 2.0  # seconds that the application has for its own 408, before the connection is cut
WRITE_SECONDS, WRITE_BYTES = 30.0, 64 * 1024  # in which time a client must take how much of its answer
SPARE_FILES = 100  # descriptors for pipes, libraries and the like
MOST_CONNECTIONS = 1000


def max_connections() -> int:
    """Return how many connections fit in the limit of open files."""
    try:
        import resource
    except ImportError:  # Windows
        return MOST_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(50, min(MOST_CONNECTIONS, soft - SPARE_FILES))


class DeadlineProtocol(H11Protocol):
    """One connection. `bounded_by` gives it its settings."""

    settings = ServeConfig()
    most = MOST_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stage: Any = None  # what the client is to do next, as h11 calls it
        self.since = 0.0
        self.deadline: asyncio.TimerHandle | None = None
        self.write_deadline: asyncio.TimerHandle | None = None
        self.unsent = 0

    @classmethod
    def bounded_by(cls, settings: ServeConfig) -> type["DeadlineProtocol"]:
        """Return the class with the deadlines of a server."""
        return type(cls.__name__, (cls,), {"settings": settings, "most": max_connections()})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request's head, and make room where there are too many connections."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` tells whenever a client does not take its answer
        self._watch()
        if len(self.connections) > self.most:
            waiting = [c for c in self.connections if isinstance(c, DeadlineProtocol) and c.deadline is not None]
            min(waiting, key=lambda c: c.since, default=self).transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request of this connection."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        for timer in (self.deadline, self.write_deadline):
            if timer is not None:
                timer.cancel()
        self.deadline = self.write_deadline = None
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Set the deadline that belongs to what the client has to do now, once when that begins."""
        stage = self.conn.their_state
        if stage is self.stage or self.transport.is_closing():
            return
        self.stage, self.since = stage, self.loop.time()
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        seconds = {h11.IDLE: self.settings.header_seconds, h11.SEND_BODY: self.settings.body_seconds + GRACE}.get(stage)
        if seconds is not None:
            self.deadline = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self.deadline = None
        if self.stage is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request took longer than {self.settings.header_seconds:g} seconds")
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, msg)

    def _refuse(self, status: int, reason: str) -> None:
        """Answer in the application's place, and close."""
        headers, body = refusal(reason)
        closing = (b"connection", b"close")
        phrase = HTTPStatus(status).phrase.encode()
        head = h11.Response(status_code=status, headers=[*headers, *SECURITY_HEADERS, closing], reason=phrase)
        try:
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer is under way already
            self.transport.abort()
            return
        self.transport.close()

    def pause_writing(self) -> None:
        """Give a client that does not take its answer a deadline."""
        super().pause_writing()
        self.unsent = self.transport.get_write_buffer_size()
        self.write_deadline = self.loop.call_later(WRITE_SECONDS, self._expire_writing)

    def resume_writing(self) -> None:
        """All was taken."""
        if self.write_deadline is not None:
            self.write_deadline.cancel()
            self.write_deadline = None
        super().resume_writing()

    def _expire_writing(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if self.unsent - unsent < WRITE_BYTES:
            self.transport.abort()
        else:
            self.unsent, self.write_deadline = unsent, self.loop.call_later(WRITE_SECONDS, self._expire_writing)
