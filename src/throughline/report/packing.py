"""Features, labels, contexts, partners and matched pairs as the page holds them: tables by column in which a token is a number.

Each is added in rounds (every feature's best context, every feature's second, …) until its budget is spent, so that in a large
run every feature loses the same; what was left out is counted, and the page says so.
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import polars as pl
from pydantic import BaseModel

from throughline.records import Comparison, Trace, TransferInfo, complete_labels, rank_labels, reaches
from throughline.run_dir import RunDir
from throughline.views.reading import RunReader
from throughline.views.relations import MATCHING, ROLES, Relations

MAX_FEATURES = 24_000
CONTEXT_BYTES = 1_500_000
MAX_PARTNERS = 40_000
MAX_PAIRS = 100_000
MOST_PAIRS, FEWEST_PAIRS = 30, 5  # of a cell
CONTEXT_TOKENS = 8  # on either side of the token a context is about
LISTED_TOKENS = 8

Numbers = list[float | None]


class PackedLabels(BaseModel):
    """Labels by column, with the row of their feature, the best of each feature first."""

    row: list[int]
    label: list[int]
    source: list[int]
    measure: list[int]
    f1: Numbers
    precision: Numbers
    recall: Numbers
    threshold: Numbers
    num_positive: list[int | None]
    num_tokens: list[int | None]
    base_f1: Numbers
    neuron_f1: Numbers
    untrained_f1: Numbers
    balanced_accuracy: Numbers
    fuzzing: Numbers
    reached: list[bool]


class PackedContexts(BaseModel):
    """Contexts by column. `texts` are tokens as numbers in base 36; `shades` one digit a token, ninths of the feature's largest."""

    texts: list[str]
    row: list[int]
    text: list[int]
    shades: list[str]
    value: Numbers
    focus: list[int]
    stratum: list[int]
    document: list[int]


class PackedPartners(BaseModel):
    """Partners above chance by column: the row of the feature, and model (by number), layer, feature and correlation."""

    row: list[int]
    model: list[int]
    layer: list[int]
    feature: list[int]
    correlation: Numbers


class PackedModel(BaseModel):
    """The features of one model by column."""

    layer: list[int]
    feature: list[int]
    density: Numbers
    num_active: list[int]
    num_tokens: list[int]
    mean_active: Numbers
    max: Numbers
    top_token_share: Numbers
    top_tokens: list[list[int]]
    promoted: list[list[int]]
    suppressed: list[list[int]]
    role_means: list[Numbers]
    throughline: list[int | None] | None
    birth: list[int | None] | None
    death: list[int | None] | None
    family: list[int | None] | None
    labels: PackedLabels | None
    contexts: PackedContexts
    partners: PackedPartners


class PackedFeatures(BaseModel):
    """The features of all models; a token, label or word is its number in `strings`."""

    strings: list[str]
    roles: list[str]
    names: list[str]  # of the models, as partners count them
    models: dict[str, PackedModel]
    num_left_out: int
    num_contexts_left_out: int
    num_partners_left_out: int


class PackedCells(BaseModel):
    """Matched features by cell [source layer, target layer], the best correlated first: how many there are, and the first ones."""

    source: str
    target: str
    total: list[list[int]]
    above: list[list[int]]
    sources: list[list[list[int]]]
    targets: list[list[list[int]]]
    correlations: list[list[Numbers]]


class PackedPairs(BaseModel):
    """The matched pairs of all results of `matching`; of each cell at most `most`."""

    most: int
    results: list[PackedCells]


class Strings:
    """A table of strings in which each stands once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def column(self, texts: list[str]) -> list[int]:
        return [self.number(text) for text in texts]


def pack_features(
    reader: RunReader, relations: Relations, traces: list[Trace], comparisons: list[Comparison]
) -> PackedFeatures:
    """The feature tables of a run with labels, contexts and partners, and how much was left out."""
    run, study, strings = reader.run, reader.study, Strings()
    names = [spec.name for spec in study.models]
    tables = {name: _read_tables(run, name) for name in names if run.has_table(name, "features")}
    named = _named_features(traces, comparisons)
    num_layers = sum(found["features"]["layer"].n_unique() for found in tables.values())
    quota = max(1, MAX_FEATURES // max(1, num_layers))
    kept = {
        name: _choose_features(found["features"], found["labels"], study.features.bar, named.get(name, set()), quota)
        for name, found in tables.items()
    }
    contexts, num_contexts = _pack_contexts(
        {name: _order_contexts(kept[name], found["examples"]) for name, found in tables.items()}, strings
    )
    partners, num_partners = _pack_partners(reader, relations, kept, names)
    models = {
        name: PackedModel(
            **_pack_table(kept[name], strings),
            **_pack_throughlines(kept[name], found["throughlines"]),
            labels=_pack_labels(kept[name], found["labels"], study.features.bar, strings),
            contexts=contexts[name],
            partners=partners[name],
        )
        for name, found in tables.items()
    }
    total = sum(found["features"].height for found in tables.values())
    return PackedFeatures(
        strings=list(strings.numbers),
        roles=ROLES,
        names=names,
        models=models,
        num_left_out=total - sum(frame.height for frame in kept.values()),
        num_contexts_left_out=num_contexts,
        num_partners_left_out=num_partners,
    )


def _read_tables(run: RunDir, model: str) -> dict[str, Any]:
    names = ("features", "labels", "examples", "throughlines")
    return {name: run.table(model, name) if run.has_table(model, name) else None for name in names}


def _named_features(traces: list[Trace], comparisons: list[Comparison]) -> dict[str, set[tuple[int, int]]]:
    """Layer and feature of what traces and comparisons speak of, by model."""
    named: dict[str, set[tuple[int, int]]] = {}
    for trace in traces:
        named.setdefault(trace.model, set()).update((f.layer, f.feature) for r in trace.layers for f in r.features)
    for comparison in comparisons:
        for feature in comparison.features:
            named.setdefault(feature.model, set()).add((feature.layer, feature.feature))
            for model, (layer, number, _) in feature.partners.items():
                named.setdefault(model, set()).add((layer, number))
    return named


def _choose_features(
    features: pl.DataFrame, labels: pl.DataFrame | None, bar: float, named: set[tuple[int, int]], quota: int
) -> pl.DataFrame:
    """At most `quota` features a layer: named ones first, then labelled ones, then the most active; in their order."""
    keys = ["layer", "feature"]
    schema = {key: features.schema[key] for key in keys}
    spoken_of = pl.DataFrame(sorted(named), schema=schema, orient="row").with_columns(named=pl.lit(True))
    chosen = features.join(spoken_of, on=keys, how="left").with_columns(pl.col("named").fill_null(False))
    if labels is not None:
        good = labels.filter(reaches(bar)).select(pl.col(key).cast(schema[key]) for key in keys).unique()
        chosen = chosen.join(good.with_columns(labelled=pl.lit(True)), on=keys, how="left")
    else:
        chosen = chosen.with_columns(labelled=pl.lit(None, pl.Boolean))
    chosen = chosen.with_columns(pl.col("labelled").fill_null(False))
    chosen = chosen.sort("layer", "named", "labelled", "num_active", descending=[False, True, True, True])
    chosen = chosen.with_columns(order=pl.int_range(pl.len()).over("layer"))
    kept = chosen.filter((pl.col("order") < quota) | pl.col("named")).select(features.columns)
    return kept.sort(keys)


def _pack_table(features: pl.DataFrame, strings: Strings) -> dict[str, Any]:
    """The columns that the page shows."""
    names = (
        "layer",
        "feature",
        "density",
        "num_active",
        "num_tokens",
        "mean_active",
        "max",
        "top_token_share",
        "role_means",
    )
    packed: dict[str, Any] = {name: features[name].to_list() for name in names}
    packed["role_means"] = features["role_means"].list.eval(pl.element().round_sig_figs(2)).to_list()
    for name in ("top_tokens", "promoted", "suppressed"):
        packed[name] = [strings.column((texts or [])[:LISTED_TOKENS]) for texts in features[name].to_list()]
    return packed


def _pack_throughlines(features: pl.DataFrame, throughlines: pl.DataFrame | None) -> dict[str, Any]:
    """Number, birth, death and family of each feature's throughline; no columns where the run has none."""
    names = ("throughline", "birth", "death", "family")
    if throughlines is None:
        return dict.fromkeys(names)
    keys = ["layer", "feature"]
    own = throughlines.cast({key: features.schema[key] for key in keys}).select(
        *keys, *(name for name in names if name in throughlines.columns)
    )
    joined = features.select(keys).join(own, on=keys, how="left", maintain_order="left")
    return {name: joined[name].to_list() if name in joined.columns else None for name in names}


def _pack_labels(
    features: pl.DataFrame, labels: pl.DataFrame | None, bar: float, strings: Strings
) -> PackedLabels | None:
    """Labels with the row of their feature, the best of each feature first, and whether they reach the bar."""
    if labels is None:
        return None
    keys = ["layer", "feature"]
    rows = features.select(keys).with_row_index("row")
    labels = complete_labels(labels).cast({key: features.schema[key] for key in keys})
    joined = rank_labels(labels.with_columns(pl.col("f1").fill_nan(None)).join(rows, on=keys), bar)
    joined = joined.with_columns(reached=reaches(bar).fill_null(False)).sort("row", maintain_order=True)
    joined = joined.filter(pl.col("reached") | (pl.int_range(pl.len()).over("row") == 0))  # or else the best of each
    scores = ("f1", "precision", "recall", "base_f1", "neuron_f1", "untrained_f1", "balanced_accuracy", "fuzzing")
    joined = joined.with_columns(pl.col(scores).round(3))
    words = ("label", "source", "measure")
    columns = {name: joined[name].to_list() for name in PackedLabels.model_fields}
    return PackedLabels.model_validate(columns | {name: strings.column(columns[name]) for name in words})


def _order_contexts(features: pl.DataFrame, examples: pl.DataFrame | None) -> list[pl.DataFrame]:
    """Contexts in rounds: every feature's first, every feature's second, …; the top ones and quantiles in turn."""
    if examples is None:
        return []
    keys = ["layer", "feature"]
    rows = features.select(*keys, "max").with_row_index("row")
    joined = examples.cast({key: features.schema[key] for key in keys}).join(rows, on=keys)
    top = (pl.col("stratum") == "top").alias("top")
    joined = joined.with_columns(top).sort(
        "row", "top", "value", descending=[False, True, True], nulls_last=True, maintain_order=True
    )
    joined = joined.with_columns(place=pl.int_range(pl.len()).over("row", "top"))
    turn = pl.when("top").then(2 * pl.col("place")).otherwise(2 * pl.col("place") + 1)
    joined = joined.with_columns(turn=turn).sort("row", "turn").with_columns(round=pl.int_range(pl.len()).over("row"))
    return joined.partition_by("round", maintain_order=True) if joined.height else []


def _pack_contexts(rounds: dict[str, list[pl.DataFrame]], strings: Strings) -> tuple[dict[str, PackedContexts], int]:
    """Contexts by model, whole rounds of them until CONTEXT_BYTES are spent; how many did not fit."""
    columns: dict[str, dict[str, list]] = {name: defaultdict(list) for name in rounds}
    texts: dict[str, dict[str, int]] = {name: {} for name in rounds}
    spent, left_out = 0, 0
    for number in range(max((len(own) for own in rounds.values()), default=0)):
        frames = {name: own[number] for name, own in rounds.items() if number < len(own)}
        # one more round costs about as much as each before
        if number and spent * (number + 1) / number > CONTEXT_BYTES:
            left_out += sum(frame.height for frame in frames.values())
            spent = max(spent, CONTEXT_BYTES)
            continue
        for name, frame in frames.items():
            spent += sum(_pack_context(columns[name], texts[name], row, strings) for row in frame.iter_rows(named=True))
    names = [name for name in PackedContexts.model_fields if name != "texts"]
    packed = {
        model: PackedContexts(texts=list(texts[model]), **{name: own[name] for name in names})
        for model, own in columns.items()
    }
    return packed, left_out


def _pack_context(columns: dict[str, list], texts: dict[str, int], row: dict[str, Any], strings: Strings) -> int:
    """Append one context, cut to CONTEXT_TOKENS around its focus; returns about how many bytes it takes."""
    focus = row["focus"]
    begin, end = max(0, focus - CONTEXT_TOKENS), min(len(row["tokens"]), focus + CONTEXT_TOKENS + 1)
    tokens = ["…"] * (begin > 0) + row["tokens"][begin:end] + ["…"] * (end < len(row["tokens"]))
    values = [0.0] * (begin > 0) + row["values"][begin:end] + [0.0] * (end < len(row["tokens"]))
    line = " ".join(np.base_repr(strings.number(token), 36) for token in tokens)
    largest = max(row["max"] or 0.0, *values, 1e-30)
    shades = "".join(str(min(9, max(0, math.ceil(9 * v / largest)))) if v > 0 else "0" for v in values)
    new = line not in texts
    columns["text"].append(texts.setdefault(line, len(texts)))
    columns["row"].append(row["row"])
    columns["shades"].append(shades)
    columns["value"].append(row["value"])
    columns["focus"].append(focus - begin + (begin > 0))
    columns["stratum"].append(strings.number(row["stratum"]))
    columns["document"].append(row["document"])
    return (len(line) + 3 if new else 0) + len(shades) + 34


def _pack_partners(
    reader: RunReader, relations: Relations, kept: dict[str, pl.DataFrame], names: list[str]
) -> tuple[dict[str, PackedPartners], int]:
    """Partners above chance of the kept features by model, every feature's best first, its second, …; how many did not fit."""
    columns = list(PackedPartners.model_fields)
    frames = []
    for number, (model, features) in enumerate(kept.items()):
        found = [
            _find_partners(relations, info, features, names)
            for info in reader.transfers.get()
            if (info.metric, info.source) == (MATCHING, model) and info.target in names
        ]
        if not found:
            continue
        place = pl.col("correlation").rank("ordinal", descending=True).over("row")
        frames.append(
            pl.concat(found).with_columns(place=place, of=pl.lit(number), correlation=pl.col("correlation").round(2))
        )
    if not frames:
        empty = {column: [] for column in columns}
        return {model: PackedPartners(**empty) for model in kept}, 0
    everything = pl.concat(frames).sort("place", maintain_order=True)
    chosen = everything.head(MAX_PARTNERS).sort("of", "row", "place")
    packed = {
        model: PackedPartners(**chosen.filter(pl.col("of") == number).select(columns).to_dict(as_series=False))
        for number, model in enumerate(kept)
    }
    return packed, everything.height - chosen.height


def _find_partners(relations: Relations, info: TransferInfo, features: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """Rows of `features` with each partner above chance in the layers of one result's target."""
    rows, layers, numbers = np.arange(features.height), features["layer"].to_numpy(), features["feature"].to_numpy()
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    with relations.open(info) as arrays:
        for place, layer in enumerate(info.source_layers):
            partner_TF = arrays.get_slice("partner")[place]
            correlation_TF, threshold_T = arrays.get_slice("correlation")[place], arrays.get_slice("threshold")[place]
            mine = rows[(layers == layer) & (numbers < partner_TF.shape[1])]
            for column, there in enumerate(info.target_layers):
                partner, correlation = partner_TF[column, numbers[mine]], correlation_TF[column, numbers[mine]]
                itself = (info.source, layer) == (info.target, there)
                above = (partner >= 0) & (correlation > threshold_T[column]) & ~(itself & (partner == numbers[mine]))
                parts["row"].append(mine[above])
                parts["layer"].append(np.full(int(above.sum()), there))
                parts["feature"].append(partner[above].astype(np.int64))
                parts["correlation"].append(correlation[above].astype(np.float64))
    frame = pl.DataFrame({name: np.concatenate(arrays) for name, arrays in parts.items()})
    return frame.with_columns(model=pl.lit(names.index(info.target)))


def pack_pairs(reader: RunReader, relations: Relations) -> PackedPairs:
    """The best correlated pairs behind each cell of every result of `matching`."""
    infos = [info for info in reader.transfers.get() if info.metric == MATCHING]
    num_cells = sum(len(info.source_layers) * len(info.target_layers) for info in infos)
    most = max(FEWEST_PAIRS, min(MOST_PAIRS, MAX_PAIRS // max(1, num_cells)))
    results = []
    for info in infos:
        rows: dict[str, list] = defaultdict(list)
        with relations.open(info) as arrays:
            for place in range(len(info.source_layers)):
                cells = [relations.cell(arrays, place, column) for column in range(len(info.target_layers))]
                rows["total"].append([len(cell.sources) for cell in cells])
                rows["above"].append([cell.num_above for cell in cells])
                rows["sources"].append([cell.sources[:most].tolist() for cell in cells])
                rows["targets"].append([cell.targets[:most].tolist() for cell in cells])
                rows["correlations"].append([cell.correlations[:most].tolist() for cell in cells])
        results.append(PackedCells(source=info.source, target=info.target, **rows))
    return PackedPairs(most=most, results=results)
