"""Addresses that read. Their functions are run in threads, so that a large table read for one user delays no other."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

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


def reading_routes(reader: RunReader, relations: Relations, streams: Streams) -> APIRouter:
    """The run as the API shows it."""
    router = APIRouter(prefix="/api")

    @router.get("/overview")
    def overview() -> Overview:
        """Models, quality and what the run was made from."""
        return reader.overview()

    @router.get("/features")
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
    ) -> FeaturePage:
        """Features whose label or top tokens have `q` in them, by model, layer, density and score."""
        models = tuple(reader.model(name) for name in model)
        query = FeatureQuery(
            q, models, tuple(layer), min_density, max_density, min_f1, labelled, source, sort, descending, offset, limit
        )
        found = reader.index.find(query)
        return FeaturePage(total=found.total, offset=offset, features=found.rows)

    @router.get("/feature")
    def feature(model: Name, layer: Count, feature: Count) -> FeatureAnswer:
        """One feature: statistics, labels, contexts, promoted tokens, partners and its throughline."""
        return relations.feature(model, layer, feature)

    @router.get("/transfers")
    def transfers() -> list[TransferInfo]:
        """What transfer results there are."""
        return reader.transfers.get()

    @router.get("/transfer")
    def transfer(metric: Name, source: Name, target: Name) -> TransferAnswer:
        """One result: value, null and ceiling by source layer (rows) and target layer (columns)."""
        return relations.transfer(metric, source, target)

    @router.get("/pairs")
    def pairs(
        source: Name, target: Name, source_layer: Count, target_layer: Count, offset: Count = 0, limit: Limit = 50
    ) -> PairPage:
        """The features behind one cell of `matching`, the best correlated first."""
        return relations.pairs(source, target, source_layer, target_layer, offset, limit)

    @router.get("/analysis")
    def analysis() -> Analysis:
        """What the matrices say, in sentences, curves and ribbons."""
        return reader.analysis()

    @router.get("/traces")
    def traces() -> list[TraceRow]:
        """The traces kept in the run."""
        return reader.traces()

    @router.get("/traces/{key}")
    def trace(key: str) -> Trace:
        """One of them."""
        return reader.trace(key)

    @router.get("/comparisons")
    def comparisons() -> list[ComparisonRow]:
        """The comparisons kept in the run."""
        return reader.comparisons()

    @router.get("/comparisons/{key}")
    def comparison(key: str) -> Comparison:
        """One of them."""
        return reader.comparison(key)

    @router.get("/totals")
    def totals() -> list[ComparisonTotals]:
        """The comparisons over many prompts."""
        return reader.totals()

    @router.get("/training")
    def training() -> list[TrainingCurve]:
        """What training measured so far, layer by layer."""
        return reader.training()

    @router.get("/status")
    def status() -> StatusAnswer:
        """Where training is, as `throughline status` says it."""
        return reader.status()

    @router.get("/status/events", response_class=StreamingResponse, responses=EVENTS)
    async def status_events() -> StreamingResponse:
        """The same whenever it changes: events `status`."""
        return streams.answer(follow_status(reader.status, streams.is_stopping))

    return router
