"""What the page shows, as plain values small enough to travel inside it: four digits, arrays by column."""

import math
from pathlib import PurePath
from typing import Any

import numpy as np

from throughline.figures.style import color_limits
from throughline.records import PARTS, TOKEN_KINDS, ActiveFeature, Comparison, LayerQuality, Trace, TransferResult
from throughline.report.feature_tables import Strings, describe_features
from throughline.run_dir import RunDir
from throughline.study import Study

QUALITY_COLUMNS = (
    "model",
    "layer",
    "num_tokens",
    "num_spliced_tokens",
    "fvu",
    "fvu_by_position",
    "fvu_within_kind",
    "l0",
    "d_sae",
    "dead",
    "dense",
    "ce_loss_without_sae",
    "ce_loss_with_sae",
    "delta_ce",
    "ce_loss_score",
    "ce_loss_score_mean",
    "kl_div_with_sae",
    "answers_kept",
    "num_answers",
    "gate",
)


def collect(run: RunDir, results: list[TransferResult], figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the page shows of `run`, as JSON values; `results` are its transfer results, `figures` those of the analysis.

    What the run does not have is None or empty; the page then names the command that makes it.
    """
    study = run.study()
    qualities = {model.name: run.quality(model.name) for model in study.models}
    comparisons = run.comparisons()
    traces = collect_traces(run, comparisons)
    analysis = run.analysis()
    strings = Strings()
    features = describe_features(run, study, strings, traces, comparisons)
    return compact(
        {
            "study": describe_study(study),
            "info": run.info().model_dump(),
            "steps": [{"name": n, "started": s.started, "seconds": s.seconds} for n, s in run.manifest().items()],
            "models": [describe_model(study, name, layers) for name, layers in qualities.items()],
            "quality": _describe_qualities(qualities),
            "transfer": _describe_transfers(results),
            "analysis": analysis.model_dump(exclude={"curves", "ribbons"}) if analysis else None,
            "figures": figures,
            "features": features,
            "strings": list(strings.numbers),
            "roles": [f"{kind} in the {part}" for part in PARTS for kind in TOKEN_KINDS],
            "traces": [_describe_trace(trace) for trace in traces],
            "outdated_traces": run.outdated_traces(),
            "comparisons": [_describe_comparison(comparison, traces) for comparison in comparisons],
        }
    )


def collect_traces(run: RunDir, comparisons: list[Comparison]) -> list[Trace]:
    """All traces of the run and of its comparisons, each model and prompt once; models in the study's order."""
    names = [model.name for model in run.study().models]
    traces = {(trace.model, trace.prompt): trace for trace in run.traces()}
    for comparison in comparisons:
        for trace in comparison.traces.values():
            traces.setdefault((trace.model, trace.prompt), trace)
    return sorted(traces.values(), key=lambda trace: names.index(trace.model) if trace.model in names else len(names))


def compact(value: Any) -> Any:
    """`value` for JSON: floats with four significant digits, NaN as None, infinities as the words inf and -inf."""
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item) for item in value]
    if isinstance(value, np.ndarray):
        return compact(value.tolist())
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        rounded = float(f"{value:.4g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return value


def describe_study(study: Study) -> dict[str, Any]:
    """What a run was made with, without where it lies on this machine."""
    return {
        "name": study.name,
        "text": _public(study.data.path),
        "config": study.data.config,
        "context": study.data.context,
        "heldout": study.data.heldout,
        "tokens": study.training.tokens,
        "epochs": study.training.epochs,
        "seed": study.training.seed,
        "bar": study.features.bar,
        "gate": study.gate.model_dump(),
    }


def describe_model(study: Study, name: str, layers: list[LayerQuality]) -> dict[str, Any]:
    """A model of the study and the shape of its dictionaries."""
    spec = study.model(name)
    return {
        "name": name,
        "path": _public(spec.path),
        "weights": spec.weights,
        "layers": [quality.layer for quality in layers],
        "d_model": layers[0].d_model if layers else None,
        "d_sae": sorted({quality.d_sae for quality in layers}),
        "architecture": sorted({q.architecture for q in layers}) or [study.dictionary_for(spec).architecture],
    }


def _public(path: str) -> str:
    """A hub id as it is; of a place on this machine the last part only, since pages are passed on."""
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _describe_qualities(qualities: dict[str, list[LayerQuality]]) -> dict[str, list[Any]] | None:
    rows = [quality for layers in qualities.values() for quality in layers]
    return {name: [getattr(row, name) for row in rows] for name in QUALITY_COLUMNS} if rows else None


def _describe_transfers(results: list[TransferResult]) -> dict[str, Any]:
    metrics = list(dict.fromkeys(result.info.metric for result in results))
    main = ("value", "low", "high", "null", "ceiling")
    described = []
    for result in results:
        shape = result.arrays["value"].shape
        others = {name: array for name, array in result.arrays.items() if name not in main and array.shape == shape}
        described.append(
            result.info.model_dump(exclude={"details", "null", "ceiling"})
            | {"null_words": result.info.null, "ceiling_words": result.info.ceiling, "details": result.info.details}
            | {name: result.arrays[name] for name in main if name in result.arrays}
            | {"others": others}
        )
    shown = {
        metric: [
            r.arrays[n]
            for r in results
            if r.info.metric == metric
            for n in ("value", "null", "ceiling")
            if n in r.arrays
        ]
        for metric in metrics
    }
    return {"limits": {metric: color_limits(arrays) for metric, arrays in shown.items()}, "results": described}


def _describe_trace(trace: Trace) -> dict[str, Any]:
    described = trace.model_dump(exclude={"version", "tokens", "layers", "edges"})
    described["tokens"] = [text for _, text, _, _ in trace.tokens]
    described["layers"] = [
        reading.model_dump(exclude={"features"}) | {"features": [_describe_active(f) for f in reading.features]}
        for reading in trace.layers
    ]
    described["edges"] = [[*e.source, *e.target, e.predicted, e.measured, e.measured_activation] for e in trace.edges]
    return described


def _describe_active(feature: ActiveFeature) -> dict[str, Any]:
    described = feature.model_dump(exclude={"layer", "label"})
    if feature.label is not None:
        described["label"] = feature.label.model_dump(include={"text", "f1", "source", "measure"})
    return described


def _describe_comparison(comparison: Comparison, traces: list[Trace]) -> dict[str, Any]:
    """The comparison without its traces, which are in the list of all traces; by model the place there."""
    places = {(trace.model, trace.prompt): number for number, trace in enumerate(traces)}
    described = comparison.model_dump(exclude={"traces", "active", "standings", "concepts"})
    of_models = comparison.standings.items()
    described["shares"] = {model: {s: e.value for s, e in mine.active.items()} for model, mine in of_models}
    described["all_shares"] = {model: mine.live for model, mine in of_models}
    described["traces"] = {name: places[(trace.model, trace.prompt)] for name, trace in comparison.traces.items()}
    return described
