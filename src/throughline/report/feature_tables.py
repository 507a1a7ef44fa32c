"""Features, labels and examples as the page holds them: tables by column in which a token is a number.

Examples are added in rounds (every feature's best, every feature's second, …) until their budget is spent, so that in a
large run every feature loses the same; what was left out is counted, and the page says so.
"""

import math
from typing import Any

import numpy as np
import polars as pl

from throughline.errors import InputError
from throughline.records import Comparison, Trace, rank_labels, reaches
from throughline.run_dir import RunDir
from throughline.study import Study

MAX_FEATURES = 24_000
EXAMPLE_BYTES = 5_000_000
CONTEXT_TOKENS = 8  # on either side of the token an example is about
LISTED_TOKENS = 8


class Strings:
    """A table of strings in which each stands once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def column(self, texts: list[str]) -> list[int]:
        return [self.number(text) for text in texts]


def describe_features(
    run: RunDir, study: Study, strings: Strings, traces: list[Trace], comparisons: list[Comparison]
) -> dict[str, Any]:
    """The feature tables by model, with labels and examples, and how much was left out."""
    tables = {}
    for model in study.models:
        found = {name: _table(run, model.name, name) for name in ("features", "labels", "examples")}
        if found["features"] is not None:
            tables[model.name] = found
    if not tables:
        return {"models": {}, "num_features": 0, "num_left_out": 0, "num_examples": 0, "num_examples_left_out": 0}
    named = _named_features(traces, comparisons)
    num_layers = sum(found["features"]["layer"].n_unique() for found in tables.values())
    quota, total = max(1, MAX_FEATURES // max(1, num_layers)), 0
    models, rounds = {}, {}
    for name, found in tables.items():
        total += found["features"].height
        kept = _choose_features(found["features"], found["labels"], study.features.bar, named.get(name, set()), quota)
        models[name] = _describe_table(kept, strings)
        models[name]["labels"] = _describe_labels(kept, found["labels"], study.features.bar, strings)
        rounds[name] = _order_examples(kept, found["examples"])
    examples, left_out = _pack_examples(rounds, strings)
    for name in models:
        models[name]["examples"] = examples[name]
    shown = sum(len(model["feature"]) for model in models.values())
    packed = sum(len(columns["row"]) for columns in examples.values())
    return {
        "models": models,
        "num_features": shown,
        "num_left_out": total - shown,
        "num_examples": packed,
        "num_examples_left_out": left_out,
    }


def _table(run: RunDir, model: str, name: str) -> pl.DataFrame | None:
    try:
        return run.table(model, name)
    except InputError:
        return None


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


def _describe_table(features: pl.DataFrame, strings: Strings) -> dict[str, Any]:
    """The columns that the page shows; a column with one value throughout is that value."""
    tokens = features["num_tokens"].unique().to_list()
    described: dict[str, Any] = {
        name: features[name].to_list()
        for name in ("layer", "feature", "density", "num_active", "mean_active", "max", "top_token_share", "role_means")
    }
    described["num_tokens"] = tokens[0] if len(tokens) == 1 else features["num_tokens"].to_list()
    for name in ("top_tokens", "promoted", "suppressed"):
        described[name] = [strings.column((texts or [])[:LISTED_TOKENS]) for texts in features[name].to_list()]
    return described


def _describe_labels(
    features: pl.DataFrame, labels: pl.DataFrame | None, bar: float, strings: Strings
) -> dict[str, Any] | None:
    """Labels with the row of their feature, the best of each feature first, and whether they reach the bar."""
    if labels is None:
        return None
    keys = ["layer", "feature"]
    rows = features.select(keys).with_row_index("row")
    labels = labels.cast({key: features.schema[key] for key in keys})
    joined = rank_labels(labels.with_columns(pl.col("f1").fill_nan(None)).join(rows, on=keys), bar)
    joined = joined.with_columns(reached=reaches(bar).fill_null(False)).sort("row", maintain_order=True)
    numbers = ("row", "f1", "precision", "recall", "threshold", "num_positive", "num_tokens", "base_f1", "neuron_f1")
    more = ("untrained_f1", "balanced_accuracy", "fuzzing", "reached")
    described: dict[str, Any] = {name: joined[name].to_list() for name in (*numbers, *more)}
    return described | {name: strings.column(joined[name].to_list()) for name in ("label", "source", "measure")}


def _order_examples(features: pl.DataFrame, examples: pl.DataFrame | None) -> list[pl.DataFrame]:
    """Examples in rounds: every feature's first, every feature's second, …; the top ones and quantiles in turn."""
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


def _pack_examples(rounds: dict[str, list[pl.DataFrame]], strings: Strings) -> tuple[dict[str, dict[str, Any]], int]:
    """Columns of examples by model, whole rounds of them until EXAMPLE_BYTES are spent; how many did not fit."""
    packed: dict[str, dict[str, Any]] = {
        name: {"row": [], "context": [], "shades": [], "value": [], "focus": [], "stratum": [], "cut": []}
        | {"document": [], "contexts": {}}
        for name in rounds
    }
    spent, left_out = 0, 0
    for number in range(max((len(own) for own in rounds.values()), default=0)):
        frames = {name: own[number] for name, own in rounds.items() if number < len(own)}
        if (
            number and spent * (number + 1) / number > EXAMPLE_BYTES
        ):  # one more round costs about as much as each before
            left_out += sum(frame.height for frame in frames.values())
            spent = max(spent, EXAMPLE_BYTES)
            continue
        for name, frame in frames.items():
            spent += sum(_pack_example(packed[name], row, strings) for row in frame.iter_rows(named=True))
    for columns in packed.values():
        columns["contexts"] = list(columns["contexts"])
    return packed, left_out


def _pack_example(columns: dict[str, Any], row: dict[str, Any], strings: Strings) -> int:
    """Append one example, cut to CONTEXT_TOKENS around its focus; returns about how many bytes it takes.

    Tokens are written in base 36. Shades are one digit a token: its activation in ninths of the feature's largest.
    """
    focus = row["focus"]
    begin, end = max(0, focus - CONTEXT_TOKENS), min(len(row["tokens"]), focus + CONTEXT_TOKENS + 1)
    line = " ".join(np.base_repr(strings.number(token), 36) for token in row["tokens"][begin:end])
    largest = max(row["max"] or 0.0, *row["values"][begin:end], 1e-30)
    shades = "".join(
        str(min(9, max(0, math.ceil(9 * v / largest)))) if v > 0 else "0" for v in row["values"][begin:end]
    )
    contexts = columns["contexts"]
    new = line not in contexts
    columns["context"].append(contexts.setdefault(line, len(contexts)))
    columns["row"].append(row["row"])
    columns["shades"].append(shades)
    columns["value"].append(row["value"])
    columns["focus"].append(focus - begin)
    columns["stratum"].append(strings.number(row["stratum"]))
    columns["cut"].append(2 * (begin > 0) + (end < len(row["tokens"])))
    columns["document"].append(row["document"])
    return (len(line) + 3 if new else 0) + len(shades) + 34
