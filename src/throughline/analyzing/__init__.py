"""What the matrices say, in computed sentences.

Each finding carries the numbers it was made from, and whether they go beyond their null. Nothing is said that the numbers do
not say: where an interval reaches the null, the sentence is that there is nothing beyond it.
"""

import numpy as np
import polars as pl

from throughline.records import Analysis, Finding, TransferResult


def analyze_run(
    results: list[TransferResult], features: dict[str, pl.DataFrame], labels: dict[str, pl.DataFrame], seed: int
) -> Analysis:
    """Findings on labels, decay with distance, universal and specialised layers, and models against each other."""
    findings = [_coverage(model, features[model], labels[model]) for model in features]
    for result in results:
        info = result.info
        if not np.isfinite(_pairs(result)).any():
            findings.append(_nothing(result))
        elif info.source == info.target and len(info.source_layers) > 2:
            findings.append(_decay(result))
            if not _one_way(result):
                findings.append(_universal_layer(result))
        elif info.metric == "matching" and info.source != info.target:
            findings.append(_across(result))
    tokens = max((r.info.num_tokens for r in results), default=0)
    return Analysis(num_tokens=tokens, seed=seed, findings=findings)


def _coverage(model: str, features: pl.DataFrame, labels: pl.DataFrame) -> Finding:
    live = int((features["num_active"] > 0).sum())
    share = len(labels) / max(live, 1)
    beyond = int(
        (labels["f1"] > labels.select(pl.max_horizontal("base_f1", "neuron_f1", "untrained_f1")).to_series()).sum()
    )
    return Finding(
        topic="labels",
        sentence=f"{model}: {len(labels)} of {live} live features ({share:.0%}) have a label above the bar; "
        f"{beyond} of these labels fit the feature better than they fit any neuron or untrained feature.",
        beyond_null=beyond > 0,
        numbers={"model": model, "labelled": len(labels), "live": live, "beyond_baselines": beyond},
    )


def _pairs(result: TransferResult) -> np.ndarray:
    """Values of the pairs that say something: all of two models, those of different layers of one."""
    value = result.arrays["value"]
    return value[~np.eye(len(value), dtype=bool)] if result.info.source == result.info.target else value


def _one_way(result: TransferResult) -> bool:
    """True if layers are related to later ones alone: their means are then over other distances, and not to be compared."""
    value = result.arrays["value"]
    return not np.isfinite(value[np.tril_indices(len(value), -1)]).any()


def _nothing(result: TransferResult) -> Finding:
    info = result.info
    return Finding(
        topic="too little text",
        sentence=f"{info.source} to {info.target}: {info.metric} relates no two layers; {info.num_tokens} tokens are too few.",
        beyond_null=False,
        numbers={"source": info.source, "target": info.target, "metric": info.metric, "n": info.num_tokens},
    )


def _decay(result: TransferResult) -> Finding:
    """Mean value at each distance between layers, against the null at the same distances."""
    info, value, null = result.info, result.arrays["value"], result.arrays["null"]
    distance = np.abs(np.subtract.outer(np.array(info.source_layers), np.array(info.target_layers)))
    known = np.isfinite(value)
    steps = [int(d) for d in np.unique(distance[known]) if d > 0]
    means = [_mean(value[distance == d]) for d in steps]
    nulls = [_mean(null[distance == d]) for d in steps]
    beyond = bool((result.arrays["low"] > null)[known & (distance == steps[0])].all())
    near = "between neighbouring layers" if steps[0] == 1 else f"at a distance of {steps[0]} layers"
    sentence = (
        f"{info.source}: {info.metric} {near} is {means[0]:.2f} on average (null {nulls[0]:.2f})"
        f" and {means[-1]:.2f} at a distance of {steps[-1]} (null {nulls[-1]:.2f})"
    )
    if not beyond:
        sentence += "; at least one pair of the nearest layers is not beyond the null"
    numbers: dict[str, float | int | str | None] = {"metric": info.metric, "model": info.source, "n": info.num_tokens}
    for d, mean, null_mean in zip(steps, means, nulls, strict=True):
        numbers |= {f"distance {d}": mean, f"null at distance {d}": null_mean}
    return Finding(topic="decay with distance", sentence=sentence + ".", beyond_null=beyond, numbers=numbers)


def _universal_layer(result: TransferResult) -> Finding:
    """The layers whose dictionaries serve the others best and worst, with the gap to the best one's interval."""
    info, value = result.info, result.arrays["value"]
    off = ~np.eye(len(value), dtype=bool)

    def mean_over_others(array: np.ndarray) -> np.ndarray:
        return np.array([_mean(row[mask]) for row, mask in zip(array, off, strict=True)])

    means, lows, highs = (mean_over_others(result.arrays[name]) for name in ("value", "low", "high"))
    best, worst = int(np.nanargmax(means)), int(np.nanargmin(means))
    beyond = bool(lows[best] > highs[worst])
    words = (
        f"{info.source}: by {info.metric} layer {info.source_layers[best]} serves the other layers best ({means[best]:.2f})"
        f" and layer {info.source_layers[worst]} least ({means[worst]:.2f})"
    )
    return Finding(
        topic="universal and specialised layers",
        sentence=words + ("." if beyond else "; their intervals overlap, so this is nothing beyond chance."),
        beyond_null=beyond,
        numbers={
            "metric": info.metric,
            "model": info.source,
            "best": info.source_layers[best],
            "best mean": float(means[best]),
            "worst": info.source_layers[worst],
            "worst mean": float(means[worst]),
            "n": info.num_tokens,
        },
    )


def _across(result: TransferResult) -> Finding:
    info, value, null = result.info, result.arrays["value"], result.arrays["null"]
    flat = int(np.nanargmax(value))
    i, j = np.unravel_index(flat, value.shape)
    beyond = bool(result.arrays["low"][i, j] > null[i, j])
    mean, null_mean = _mean(value), _mean(null)
    words = (
        f"{info.source} to {info.target}: on average {mean:.0%} of a layer's live features have a partner above the null"
        f" ({null_mean:.0%} by kind of token alone), at best {value[i, j]:.0%}"
        f" (layer {info.source_layers[i]} to {info.target_layers[j]}, {null[i, j]:.0%} by kind alone)"
    )
    return Finding(
        topic="between models",
        sentence=words + ("." if beyond else "; nothing beyond the null."),
        beyond_null=beyond,
        numbers={
            "source": info.source,
            "target": info.target,
            "mean": mean,
            "null": null_mean,
            "best": float(value[i, j]),
            "coverage": info.coverage,
            "n": info.num_tokens,
        },
    )


def _mean(values: np.ndarray) -> float:
    """Mean of what is not NaN (a pair of layers without live features); NaN if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
