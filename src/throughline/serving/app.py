"""The application: the page, the API, and what clients are told when something is refused or fails."""

import hashlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from throughline import __version__
from throughline.errors import InputError, ThroughlineError
from throughline.report.page import inline_blocks
from throughline.run_dir import RunDir
from throughline.serving.access import Access
from throughline.serving.answers import Refusal
from throughline.serving.errors import RefusedError
from throughline.serving.guarding import FAILED, NO_CONTENT_POLICY, Guard
from throughline.serving.job_routes import job_routes
from throughline.serving.jobs import JobQueue, Limits, Worker
from throughline.serving.reading import RunReader
from throughline.serving.reading_routes import reading_routes
from throughline.serving.relations import Relations
from throughline.serving.streaming import Streams

REFUSALS = (400, 401, 403, 404, 413, 421, 422, 429)


@dataclass
class Serving:
    """One run being served. `app` is what uvicorn runs; `stop` ends its streams and its working thread."""

    run: RunDir
    device: str | None = None
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.reader = RunReader(self.run)
        self.queue = JobQueue(self._make_worker, self.limits, self.redact)
        self.streams = Streams()
        self.app = build_app(self)

    def redact(self, words: str) -> str:
        """An error's words without where the run lies on this machine."""
        for place in {str(self.run.root.resolve()), str(self.run.root), self.run.place} - {".", "/", ""}:
            words = words.replace(place, "RUN")
        return words

    def stop(self) -> None:
        """End what goes on."""
        self.streams.stop()
        self.queue.stop()

    def _make_worker(self) -> Worker:
        from throughline.serving.working import Tracer

        return Tracer(self.run, self.device, self.reader.fingerprint)


def build_app(serving: Serving) -> ASGIApp:
    """The whole application, guarded."""
    app = FastAPI(
        title="throughline",
        version=__version__,
        description="One run, read at any time, and prompts traced in it. Errors are `{detail: one sentence}`.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        responses={status: {"model": Refusal} for status in REFUSALS},
    )
    app.include_router(reading_routes(serving.reader, Relations(serving.reader), serving.streams))
    app.include_router(job_routes(serving.reader, serving.queue, serving.streams))
    policy = page_policy()

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        html = serving.reader.page.encode("utf-8", "backslashreplace")
        return HTMLResponse(html, headers={"content-security-policy": policy})

    _tell_errors(app, serving.redact)
    return Guard(app, serving.access)


def page_policy() -> str:
    """What the report may do: run its own script and style, known by their digests, and nothing that data smuggled in."""
    css, js = (b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in inline_blocks())
    return f"{NO_CONTENT_POLICY}; img-src data:; style-src 'sha256-{css}'; script-src 'sha256-{js}'"


def _tell_errors(app: FastAPI, redact: Callable[[str], str]) -> None:
    def tell(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": sentence}, status, headers)

    @app.exception_handler(RefusedError)
    def refused(_: Request, error: RefusedError) -> JSONResponse:
        wait = {"retry-after": str(error.retry_seconds)} if error.retry_seconds else None
        return tell(error.status, error.sentence, wait)

    @app.exception_handler(ThroughlineError)
    def wrong(_: Request, error: ThroughlineError) -> JSONResponse:
        return tell(404 if isinstance(error, InputError) else 500, redact(str(error)))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return tell(422, f"{where or 'the request'}: {first['msg']}"[:400])

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return tell(500, FAILED)  # the guard logs it

    @app.exception_handler(HTTPException)
    def plain(_: Request, error: HTTPException) -> JSONResponse:
        sentence = "there is nothing at this address; /api/openapi.json lists what there is"
        return tell(error.status_code, sentence if error.status_code == 404 else str(error.detail), error.headers)  # pyright: ignore[reportArgumentType]
