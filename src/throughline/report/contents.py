"""What the one-file page holds: the answers that the server would give, as values small enough to travel inside the page.

Numbers have four digits. Features, their contexts and partners, and the matched pairs behind each cell are packed by column
(`packing`) and end at a budget; what was left out is counted, and the page says so.
"""

import math
from typing import Any

import numpy as np
from pydantic import BaseModel

from throughline.records import Analysis, Comparison, ComparisonTotals, Trace
from throughline.report.packing import PackedFeatures, PackedPairs, pack_features, pack_pairs
from throughline.run_dir import RunDir
from throughline.views.answers import Overview, StatusAnswer, TrainingCurve, TransferAnswer
from throughline.views.reading import RunReader, trace_id
from throughline.views.relations import Relations


class KeptTrace(BaseModel):
    """A trace and what it is called."""

    id: str
    trace: Trace


class KeptComparison(BaseModel):
    """A comparison without its traces, which are among all traces: `traces` says by model which."""

    id: str
    comparison: Comparison
    traces: dict[str, str]


class PageData(BaseModel):
    """All that a page without a server shows."""

    overview: Overview
    status: StatusAnswer
    training: list[TrainingCurve]
    transfers: list[TransferAnswer]
    pairs: PackedPairs
    analysis: Analysis | None
    features: PackedFeatures
    traces: list[KeptTrace]
    outdated_traces: list[str]  # files that another version made, which are left out
    comparisons: list[KeptComparison]
    totals: list[ComparisonTotals]


def collect(run: RunDir) -> dict[str, Any]:
    """`PageData` of a run as JSON values. What the run does not have is None or empty; the page names the command that makes it."""
    reader = RunReader(run)
    relations = Relations(reader)
    kept = [KeptTrace(id=row.id, trace=reader.trace(row.id)) for row in reader.traces()]
    comparisons = [_keep(row.id, reader.comparison(row.id)) for row in reader.comparisons()]
    data = PageData(
        overview=reader.overview(),
        status=reader.status(),
        training=reader.training(),
        transfers=[relations.transfer(info.metric, info.source, info.target) for info in reader.transfers.get()],
        pairs=pack_pairs(reader, relations),
        analysis=run.analysis(),
        features=pack_features(reader, relations, [one.trace for one in kept], [one.comparison for one in comparisons]),
        traces=kept,
        outdated_traces=reader.outdated_traces(),
        comparisons=comparisons,
        totals=reader.totals(),
    )
    return compact(data.model_dump())


def _keep(key: str, comparison: Comparison) -> KeptComparison:
    traces = {model: trace_id(trace) for model, trace in comparison.traces.items()}
    return KeptComparison(id=key, comparison=comparison.model_copy(update={"traces": {}}), traces=traces)


TIMES = frozenset({"at"})  # seconds since 1970: four digits would be another year


def compact(value: Any) -> Any:
    """`value` for JSON: floats with four significant digits (but for times), NaN and infinities as None."""
    if isinstance(value, dict):
        return {key: item if key in TIMES else compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item) for item in value]
    if isinstance(value, np.ndarray):
        return compact(value.tolist())
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.4g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return value
