"""The routes: POST /predict, GET /model and /health for programs, / and /docs for people."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from cxr_fastai import __version__
from cxr_fastai.images import FLAGS
from cxr_fastai.serving.config import ServeConfig
from cxr_fastai.serving.form import FIELD, Part, read_form
from cxr_fastai.serving.guard import Guard
from cxr_fastai.serving.workers import Busy, Pool

TEMPLATES = Path(__file__).parents[1] / "templates"
NOTICE = "Research software, not a medical device: nothing that it says may decide about a patient."


class Row(BaseModel):
    """What is said of one film; the same as a line of predict --json. A film unlike those of training has no label."""

    model_config = ConfigDict(extra="allow")
    path: str
    label: str | None
    probability: float | None
    probabilities: dict[str, float]
    threshold: float | dict[str, float] | None
    flags: list[str]
    error: str | None
    seconds: float


class Picture(BaseModel):
    """A film as a PNG data URI of at most 1024 pixels a side, and its evidence: rows of numbers, 0 neutral, or none."""

    film: str
    evidence: list[list[float]]


class Answer(BaseModel):
    """A row for every film, in the order sent; with pictures=true also a picture, null where the film has an error."""

    rows: list[Row]
    pictures: list[Picture | None] | None = None


class Health(BaseModel):
    """How the server is. waiting: films that wait or are read, of queue places."""

    status: str
    version: str
    workers: int
    waiting: int
    queue: int


class Problem(BaseModel):
    """Why a request was refused, in one line."""

    detail: str


REASONS = {
    400: "The request is no sound multipart form, or names another host",
    401: "The token is missing or wrong",
    403: "The request comes from a page of another site",
    408: "The body came too slowly",
    413: "Too many bytes or files",
    415: "Not multipart/form-data",
    422: "No file in the form, or a parameter that is not as it should be",
    429: "Too many films wait; Retry-After says when to come again",
    503: "No worker answered in time; Retry-After says when to come again",
}

def body_of(config: ServeConfig) -> dict[str, Any]:
    """Return the OpenAPI description of a form with films."""
    films = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        # No maxItems: the limit is this server's own, and more are refused as 413, which no schema can promise.
        "description": "Films: PNG, JPEG, TIFF, BMP, WebP or DICOM, recognised by their bytes. "
        f"At most {config.max_files}, and {config.max_mb:g} MB together.",
    }
    form = {"type": "object", "required": [FIELD], "additionalProperties": False, "properties": {FIELD: films}}
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the refusals of a route, for its documentation."""
    return {code: {"model": Problem, "description": REASONS[code]} for code in codes}


def create_app(config: ServeConfig, pool: Pool) -> ASGIApp:
    """Return the application (ASGI), for a pool that has been started or will be."""
    app = FastAPI(
        title="cxr_fastai",
        version=__version__,
        description=f"Classifies chest radiographs. {NOTICE}",
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    _add_api(app, config, pool)
    _add_pages(app, config)
    return Guard(app, config)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        return JSONResponse({"detail": f"{name}: {first['msg']}"}, 422)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        text = f"{error}; try again in {error.seconds} s"
        return JSONResponse({"detail": text}, error.status, {"Retry-After": str(error.seconds)})


def _add_api(app: FastAPI, config: ServeConfig, pool: Pool) -> None:
    # The guard checks the token; this tells the documentation of it.
    secured = [Security(HTTPBearer(auto_error=False))] if config.token else []

    @app.post(
        "/predict",
        response_model=None,
        response_description="A row for every film",
        responses={200: {"model": Answer}, **problems(400, 401, 403, 408, 413, 415, 422, 429, 503)},
        openapi_extra={"requestBody": body_of(config)},
        dependencies=secured,
    )
    async def predict(
        request: Request,
        pictures: Annotated[bool, Query(description="Whether film and evidence come back, to be shown.")] = False,
    ) -> Response:
        """Classify one or many films. Every film gets a row; one that cannot be read has error in it."""
        pool.require_places(1)  # before the body is read
        with pool.holding() as hold:
            films = await read_form(request, config, hold)
            with pool.places(len(films)):
                answers = await _classify(request, films, pool, pictures, config.request_seconds)
        answer: dict[str, Any] = {"rows": [a["row"] for a in answers]}
        if pictures:
            answer["pictures"] = [a["picture"] for a in answers]
        return JSONResponse(answer)

    @app.get("/model", response_description="The card", responses=problems(400, 401), dependencies=secured)
    async def model() -> dict[str, Any]:
        """Return what the model says of itself: classes, threshold, size, versions, data."""
        return pool.card

    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "No worker is ready"}}

    @app.get("/health", response_description="Films can be classified", responses={**problems(400), **not_ready})
    async def health(response: Response) -> Health:
        """Tell whether films can be classified, and how many wait."""
        response.status_code = 200 if pool.alive else 503
        status = "ok" if pool.alive else "starting"
        return Health(
            status=status, version=__version__, workers=pool.alive, waiting=pool.waiting, queue=config.queue
        )


async def _classify(
    request: Request, films: list[Part], pool: Pool, pictures: bool, seconds: float
) -> list[dict[str, Any]]:
    """Return the answers about the films, unless it takes too long or nobody waits for them any more."""
    work: asyncio.Future[Any] = asyncio.gather(*(pool.classify(film.name, film.data, pictures) for film in films))
    gone: asyncio.Future[Any] = asyncio.create_task(_leaving(request))
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            return work.result()
        if gone in done:
            raise HTTPException(400, "the client went away")
        raise Busy(f"no answer within {seconds:g} s", pool.retry_after(), 503)
    finally:
        work.cancel()
        gone.cancel()


async def _leaving(request: Request) -> None:
    """Wait until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_pages(app: FastAPI, config: ServeConfig) -> None:
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    settings = {"flags": dict(FLAGS), "megabytes": config.max_mb}
    page = templates.get_template("page.html").render(settings=settings, notice=NOTICE)
    reference = templates.get_template("api.html").render(
        api=app.openapi(), notice=NOTICE, token=config.token is not None, port=config.port
    )
    kinds = {".css": "text/css", ".js": "text/javascript"}

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(page)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(reference)

    for name in ("page.css", "page.js"):
        text = (TEMPLATES / name).read_text(encoding="utf-8")
        response = Response(text, media_type=kinds[Path(name).suffix])
        app.add_api_route(f"/{name}", lambda response=response: response, include_in_schema=False)
