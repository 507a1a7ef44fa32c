"""What the matrices say, in computed sentences and curves.

Each finding carries the numbers it was made from, and whether they go beyond their null. Nothing is said that the numbers do
not say: where an interval reaches the null, the sentence is that there is nothing beyond it.
"""

from typing import NamedTuple

import numpy as np
import polars as pl

from throughline.analyzing.causes import compare_causes
from throughline.analyzing.layers import describe_layers
from throughline.analyzing.markdown import write_markdown
from throughline.analyzing.models import describe_lack, describe_pair, describe_sharing
from throughline.analyzing.persistence import describe_families, describe_throughlines
from throughline.analyzing.shares import pairs_of_layers
from throughline.records import Analysis, Curve, Finding, Ribbon, TransferResult
from throughline.throughlines import count_alive, find_throughlines, join_models

__all__ = ["Analyzed", "analyze_run", "write_markdown"]


class Analyzed(NamedTuple):
    """The analysis, and every model's throughlines (`throughlines.find_throughlines` with `join_models`' column family)."""

    analysis: Analysis
    throughlines: dict[str, pl.DataFrame]


def analyze_run(
    results: list[TransferResult], features: dict[str, pl.DataFrame], labels: dict[str, pl.DataFrame], seed: int
) -> Analyzed:
    """Findings on labels, layers, throughlines, causes, and models against each other. `labels` are the best of each feature."""
    findings = [_coverage(model, features[model], labels[model]) for model in features]
    curves: list[Curve] = []
    ribbons: list[Ribbon] = []
    matching = {(r.info.source, r.info.target): r for r in results if r.info.metric == "matching"}
    own = {a: r for (a, b), r in matching.items() if a == b and np.isfinite(pairs_of_layers(r)).any()}
    lines = join_models(matching, {model: find_throughlines(result) for model, result in own.items()})
    without_ceiling: list[str] = []
    for result in results:
        info = result.info
        if not np.isfinite(pairs_of_layers(result)).any():
            findings.append(_nothing(result))
            continue
        if info.source != info.target:
            if info.metric == "matching":
                found, curve = describe_pair(result)
                findings += found
                curves.append(curve)
                without_ceiling += [f"{info.source} to {info.target}"] if not any(curve.ceiling_low) else []
        elif len(info.source_layers) > 2:
            found, curve = describe_layers(result, lines.get(info.source), labels.get(info.source))
            findings += found
            curves.append(curve)
        if info.metric == "flow":
            findings += compare_causes(result)
    findings += [describe_lack(without_ceiling)] if without_ceiling else []
    for model, table in lines.items():
        finding, curve = describe_throughlines(own[model], table)
        findings.append(finding)
        curves.append(curve)
        ribbons.append(count_alive(model, own[model].info.source_layers, table))
    findings += describe_families(lines, labels) + describe_sharing(matching, labels)
    tokens = max((r.info.num_tokens for r in results), default=0)
    return Analyzed(Analysis(num_tokens=tokens, seed=seed, findings=findings, curves=curves, ribbons=ribbons), lines)


def _coverage(model: str, features: pl.DataFrame, labels: pl.DataFrame) -> Finding:
    live = int((features["num_active"] > 0).sum())
    share = len(labels) / max(live, 1)
    # labels that were judged have no such baselines, so they beat none
    baselines = (pl.col("base_f1"), *(pl.col(name).fill_null(1.0) for name in ("neuron_f1", "untrained_f1")))
    beyond = labels.filter(pl.col("f1") > pl.max_horizontal(*baselines)).height
    return Finding(
        topic="labels",
        sentence=f"{model}: {len(labels)} of {live} live features ({share:.0%}) have a label above the bar; "
        f"{beyond} of these labels fit the feature better than they fit any neuron or untrained feature.",
        beyond_null=beyond > 0,
        numbers={"model": model, "labelled": len(labels), "live": live, "beyond_baselines": beyond},
    )


def _nothing(result: TransferResult) -> Finding:
    info = result.info
    return Finding(
        topic="too little text",
        sentence=f"{info.source} to {info.target}: {info.metric} relates no two layers; {info.num_tokens} tokens are too few.",
        beyond_null=False,
        numbers={"source": info.source, "target": info.target, "metric": info.metric, "n": info.num_tokens},
    )
