"""The body of a POST -> films, in memory only.

Starlette's own form parser is not used: it writes files above 1 MB to disk.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from cxr_fastai.images import printable
from cxr_fastai.serving.config import ServeConfig

FIELD = "files"
MAX_NAME = 255  # characters; no file system has longer names


@dataclass
class Part:
    """One file of a form."""

    name: str
    data: bytearray = field(default_factory=bytearray)


def base_name(name: str) -> str:
    """Return the last part of a client's file name, without what a terminal or a page should not be given."""
    return printable(re.split(r"[/\\]", name)[-1])[:MAX_NAME] or "unnamed"


class Form:
    """A multipart/form-data body, as it comes in."""

    def __init__(self, boundary: bytes, max_files: int):
        self.parts: list[Part] = []
        self.complete = False
        self.max_files = max_files
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": lambda data, start, end: self.parts[-1].data.extend(memoryview(data)[start:end]),
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        """Take a piece of the body; HTTPException where it is not as it should be."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise HTTPException(400, "the body is not multipart/form-data as it should be") from None

    def _begin(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        if options.get(b"name") != FIELD.encode() or b"filename" not in options:
            raise HTTPException(422, f"every part of the form must be a file in the field {FIELD!r}")
        if len(self.parts) == self.max_files:
            raise HTTPException(413, f"more than {self.max_files} files in one request; send the others after it")
        name = options[b"filename"].decode("utf-8", "replace").replace("%22", '"')  # as browsers write a quote
        self.parts.append(Part(base_name(name)))

    def _end(self) -> None:
        self.complete = True


def new_form(request: Request, config: ServeConfig) -> Form:
    """Return an empty form for a request that may be one, judged by its head."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise HTTPException(415, f"send multipart/form-data with the films in the field {FIELD!r}")
    if not options.get(b"boundary"):
        raise HTTPException(400, "the Content-Type names no boundary")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > config.max_bytes:
        raise too_large(config)
    try:
        return Form(options[b"boundary"], config.max_files)
    except FormParserError:
        raise HTTPException(400, "the boundary is too long") from None


def too_large(config: ServeConfig) -> HTTPException:
    """Return the refusal of a body that is too large."""
    return HTTPException(413, f"more than {config.max_mb:g} MB in one request; send fewer films at once")


async def read_form(request: Request, config: ServeConfig, hold: Callable[[int], None]) -> list[Part]:
    """Return the films of a request; `hold` is told of the bytes before they are kept, and may raise.

    Raises
    ------
    HTTPException
        400, 408, 413, 415 or 422, with the reason.
    """
    form = new_form(request, config)
    size = 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > config.max_bytes:
                    raise too_large(config)
                hold(len(chunk))
                form.write(chunk)
    except TimeoutError:
        reason = f"the body took longer than {config.body_seconds:g} seconds"
        raise HTTPException(408, reason, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    if not form.complete:
        raise HTTPException(400, "the body is cut short")
    if not form.parts:
        raise HTTPException(422, f"no file in the form; send one or more in the field {FIELD!r}")
    return form.parts
