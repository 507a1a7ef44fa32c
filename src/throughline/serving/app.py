"""The application: the page, the API, and what clients are told when something is refused or fails."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from throughline import __version__
from throughline.errors import InputError, ThroughlineError
from throughline.report.bundle import read_bundle, render_page, render_shell
from throughline.run_dir import RunDir
from throughline.serving.access import Access
from throughline.serving.guarding import FAILED, NO_CONTENT_POLICY, Guard
from throughline.serving.job_routes import job_routes
from throughline.serving.jobs import JobQueue, Limits, Worker
from throughline.serving.reading_routes import reading_routes
from throughline.serving.remembering import Remembering
from throughline.serving.streaming import Streams
from throughline.serving.workers import TracingProcess
from throughline.views.answers import Refusal
from throughline.views.reading import RunReader
from throughline.views.refusals import RefusedError
from throughline.views.relations import Relations

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
        return TracingProcess(self.run.place, self.device, self.reader.fingerprint)


def build_app(serving: Serving) -> ASGIApp:
    """The whole application, guarded."""
    app = _make_api(serving)
    _serve_page(app, serving)
    _tell_errors(app, serving.redact)
    return Guard(Remembering(app, serving.reader.state), serving.access)


def describe_api() -> dict[str, Any]:
    """The API of any run's server as OpenAPI has it."""
    return _make_api(Serving(RunDir("nowhere"))).openapi()


def _make_api(serving: Serving) -> FastAPI:
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
    return app


# no inline script: the page's own comes from an address
PAGE_POLICY = f"{NO_CONTENT_POLICY}; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:"


def _serve_page(app: FastAPI, serving: Serving) -> None:
    """The page in parts, and as the template from which it makes files to send to somebody."""

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(render_shell(serving.reader.study.name), headers={"content-security-policy": PAGE_POLICY})

    @app.get("/page.js", include_in_schema=False)
    def script() -> Response:
        return Response(read_bundle().script, media_type="text/javascript")

    @app.get("/page.css", include_in_schema=False)
    def style() -> Response:
        return Response(read_bundle().style, media_type="text/css")

    @app.get("/page.html", include_in_schema=False)
    def template() -> Response:
        return Response(render_page("", None), media_type="text/plain; charset=utf-8")


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
