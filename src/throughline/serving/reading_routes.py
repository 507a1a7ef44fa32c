"""Addresses that read. Their functions are run in threads, so that a large table read for one user delays no other.

Answers are of their types when they are made, so they are sent as they are and not checked once more on their way out.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from throughline.records import Analysis, Comparison, ComparisonTotals, Trace, TransferInfo
from throughline.serving.events import follow_status
from throughline.serving.streaming import Streams
from throughline.views.answers import (
    ComparisonRow,
    FeatureAnswer,
    FeaturePage,
    Overview,
    PairPage,
    StatusAnswer,
    TraceRow,
    TrainingCurve,
    TransferAnswer,
)
from throughline.views.feature_index import FeatureQuery, SortBy
from throughline.views.reading import RunReader
from throughline.views.relations import Relations

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "server-sent events"}
}
Name = Annotated[str, Query(max_length=200)]
Text = Annotated[str, Query(max_length=200)]
Names = Annotated[list[Name], Query(max_length=64)]
Count = Annotated[int, Query(ge=0, le=2**31 - 1)]
Counts = Annotated[list[Count], Query(max_length=512)]
Limit = Annotated[int, Query(ge=1, le=200)]


def send(answer: BaseModel | list[Any]) -> Response:
    """An answer, or a list of them, as JSON."""
    body = (
        answer.model_dump_json()
        if isinstance(answer, BaseModel)
        else f"[{','.join(map(BaseModel.model_dump_json, answer))}]"
    )
    return Response(body, media_type="application/json")


def reading_routes(reader: RunReader, relations: Relations, streams: Streams) -> APIRouter:
    """The run as the API shows it."""
    router = APIRouter(prefix="/api")

    @router.get("/overview", response_model=Overview)
    def overview() -> Response:
        """Models, quality and what the run was made from."""
        return send(reader.overview())

    @router.get("/features", response_model=FeaturePage)
    def features(
        q: Text = "",
        model: Names = [],  # noqa: B006
        layer: Counts = [],  # noqa: B006
        min_density: float | None = None,
        max_density: float | None = None,
        min_f1: float | None = None,
        labelled: bool | None = None,
        source: Name | None = None,
        sort: SortBy = "f1",
        descending: bool = True,
        offset: Count = 0,
        limit: Limit = 50,
    ) -> Response:
        """Features whose label or top tokens have `q` in them, by model, layer, density and score."""
        models = tuple(reader.model(name) for name in model)
        query = FeatureQuery(
            q, models, tuple(layer), min_density, max_density, min_f1, labelled, source, sort, descending, offset, limit
        )
        found = reader.index.find(query)
        return send(FeaturePage(total=found.total, offset=offset, features=found.rows))

    @router.get("/feature", response_model=FeatureAnswer)
    def feature(model: Name, layer: Count, feature: Count) -> Response:
        """One feature: statistics, labels, contexts, promoted tokens, partners and its throughline."""
        return send(relations.feature(model, layer, feature))

    @router.get("/transfers", response_model=list[TransferInfo])
    def transfers() -> Response:
        """What transfer results there are."""
        return send(reader.transfers.get())

    @router.get("/transfer", response_model=TransferAnswer)
    def transfer(metric: Name, source: Name, target: Name) -> Response:
        """One result: value, null and ceiling by source layer (rows) and target layer (columns)."""
        return send(relations.transfer(metric, source, target))

    @router.get("/pairs", response_model=PairPage)
    def pairs(
        source: Name, target: Name, source_layer: Count, target_layer: Count, offset: Count = 0, limit: Limit = 50
    ) -> Response:
        """The features behind one cell of `matching`, the best correlated first."""
        return send(relations.pairs(source, target, source_layer, target_layer, offset, limit))

    @router.get("/analysis", response_model=Analysis)
    def analysis() -> Response:
        """What the matrices say, in sentences, curves and ribbons."""
        return send(reader.analysis())

    @router.get("/traces", response_model=list[TraceRow])
    def traces() -> Response:
        """The traces kept in the run."""
        return send(reader.traces())

    @router.get("/traces/{key}", response_model=Trace)
    def trace(key: str) -> Response:
        """One of them."""
        return send(reader.trace(key))

    @router.get("/comparisons", response_model=list[ComparisonRow])
    def comparisons() -> Response:
        """The comparisons kept in the run."""
        return send(reader.comparisons())

    @router.get("/comparisons/{key}", response_model=Comparison)
    def comparison(key: str) -> Response:
        """One of them."""
        return send(reader.comparison(key))

    @router.get("/totals", response_model=list[ComparisonTotals])
    def totals() -> Response:
        """The comparisons over many prompts."""
        return send(reader.totals())

    @router.get("/training", response_model=list[TrainingCurve])
    def training() -> Response:
        """What training measured so far, layer by layer."""
        return send(reader.training())

    @router.get("/status", response_model=StatusAnswer)
    def status() -> Response:
        """Where training is, as `throughline status` says it."""
        return send(reader.status())

    @router.get("/status/events", response_class=StreamingResponse, responses=EVENTS)
    async def status_events() -> StreamingResponse:
        """The same whenever it changes: events `status`."""
        return streams.answer(follow_status(reader.status, streams.is_stopping))

    return router
