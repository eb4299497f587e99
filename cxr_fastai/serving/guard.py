"""What every request passes before a route sees it, and what every response carries: host, origin, token, headers."""

import hmac
import ipaddress
import json
import logging
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr_fastai.serving.config import ServeConfig

# default-src 'self': nothing comes from elsewhere and nothing inline runs. Films are data: URIs.
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
SECURITY_HEADERS = [(name.encode(), value.encode()) for name, value in SECURITY.items()]
WITH_TOKEN = ("/predict", "/model")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")
log = logging.getLogger(__name__)


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, config: ServeConfig):
        self.app = app
        self.token = config.token
        self.names = {"localhost", "127.0.0.1", "::1", config.host.lower()}
        # Bound to every address: any of them may be meant. A name that an attacker's DNS points here is still refused.
        self.any_address = config.host in ("0.0.0.0", "::")
        if self.any_address:
            name = socket.gethostname().lower()
            self.names |= {name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        if refused := self.refusal(scope):
            await refuse(guarded, *refused)
            return
        try:
            await self.app(scope, receive, guarded)
        except Exception as error:  # noqa: BLE001 (a traceback may hold names of files, and so of patients)
            log.error("a request failed: %s at %s", type(error).__name__, place(error))
            if not started:
                await refuse(guarded, 500, "the server made a mistake; it is in its log")

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and reason where the request may not pass."""
        headers = Headers(scope=scope)
        if not self.host_is_ours(headers.get("host", "")):
            return 400, "the Host header names another server; use the address that was printed at the start"
        if scope["method"] == "POST" and not same_origin(headers):
            return 403, "requests from pages of other sites are refused"
        if scope["path"] in WITH_TOKEN and not self.has_token(headers):
            return 401, "a token is needed: send Authorization: Bearer TOKEN, as printed at the start"
        return None

    def host_is_ours(self, host: str) -> bool:
        """Tell whether a Host header names this server; a page elsewhere may have its own name resolved to it."""
        match = HOST.fullmatch(host)
        if not match:
            return False
        name = match[1].strip("[]").lower()
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address

    def has_token(self, headers: Headers) -> bool:
        """Tell whether the token was sent, or none is needed."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self.token is None:
            return True
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())


def same_origin(headers: Headers) -> bool:
    """Tell whether a request comes from our own page, or from no page at all."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


def refusal(reason: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an answer that says why, as JSON."""
    body = json.dumps({"detail": reason}).encode()
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())], body


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with one line of why, as JSON."""
    headers, body = refusal(reason)
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def place(error: BaseException) -> str:
    """Return file and line where an exception was raised, without any value."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
