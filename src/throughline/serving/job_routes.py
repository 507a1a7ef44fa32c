"""Addresses that trace and compare, as jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from throughline.records import Comparison, Trace
from throughline.serving.events import follow_job
from throughline.serving.jobs import JobQueue
from throughline.serving.reading_routes import EVENTS
from throughline.serving.requests import CompareRequest, TraceRequest
from throughline.serving.streaming import Streams
from throughline.views.answers import JobAnswer
from throughline.views.reading import RunReader
from throughline.views.refusals import RefusedError

NEW: dict[int | str, dict[str, Any]] = {202: {"model": JobAnswer, "description": "a new job"}}


def job_routes(reader: RunReader, queue: JobQueue, streams: Streams) -> APIRouter:
    """Jobs of one server."""
    router = APIRouter(prefix="/api")

    @router.post("/traces", responses=NEW)
    def trace(request: TraceRequest, response: Response) -> JobAnswer:
        """Follow a prompt through a model. The same request again is the same job, done or not (200)."""
        names = [spec.name for spec in reader.study.models]
        if request.model is None and len(names) > 1:
            raise RefusedError(422, f"the run has several models; say which: {', '.join(names)}")
        named = request.model_copy(update={"model": reader.model(request.model or names[0])})
        answer, is_new = queue.add("trace", named, reader.fingerprint())
        response.status_code = 202 if is_new else 200
        return answer

    @router.post("/comparisons", responses=NEW)
    def compare(request: CompareRequest, response: Response) -> JobAnswer:
        """Compare models on a prompt, likewise."""
        for name in request.models or ():
            reader.model(name)
        answer, is_new = queue.add("compare", request, reader.fingerprint())
        response.status_code = 202 if is_new else 200
        return answer

    @router.get("/jobs/{key}")
    def job(key: str) -> JobAnswer:
        """Where a job is."""
        return queue.answer(queue.get(key))

    @router.get("/jobs/{key}/result", response_model=Trace | Comparison)
    def result(key: str) -> Response:
        """What a job that is done has found."""
        found = queue.get(key)
        if found.result is None:
            raise RefusedError(409, f"the job is {found.phase}, so it has no result")
        return Response(found.result, media_type="application/json")

    @router.get("/jobs/{key}/events", response_class=StreamingResponse, responses=EVENTS)
    async def events(key: str, last_event_id: Annotated[int | None, Header(ge=0)] = None) -> StreamingResponse:
        """Events `queued`, `position`, `running`, `progress`, and `done`, `failed` or `cancelled` at the end."""
        found = queue.get(key)
        return streams.answer(follow_job(queue, found, last_event_id, streams.is_stopping))

    @router.delete("/jobs/{key}")
    def cancel(key: str) -> JobAnswer:
        """Cancel a job that waits, or that runs: then it ends at its next step (409 if it has ended)."""
        return queue.cancel(key)

    return router
