"""The layers of one model against each other: decay with distance, universal and specialised layers, hubs, bottlenecks, thirds."""

import numpy as np
import polars as pl

from throughline.analyzing.shares import Share, describe_twins, finite, mean, one_way
from throughline.records import Curve, Finding, TransferResult

THIRDS = ("early", "middle", "late")


def describe_layers(
    result: TransferResult, lines: pl.DataFrame | None, labels: pl.DataFrame | None
) -> tuple[list[Finding], Curve]:
    """Findings on one metric's matrix of a model with itself, and its decay with distance.

    `lines` are the model's throughlines and `labels` its features' best labels; both are for `matching`.
    """
    finding, curve = _decay(result)
    findings = [finding]
    if not one_way(result):
        findings.append(_universal_layer(result))
        if not np.allclose(result.arrays["value"], result.arrays["value"].T, equal_nan=True):  # else rows say the same
            findings.append(_hub(result))
    if result.info.metric == "matching" and lines is not None and len(lines):
        findings.append(_bottleneck(result))
        findings.append(_thirds(result, lines, labels))
    return findings, curve


def _decay(result: TransferResult) -> tuple[Finding, Curve]:
    """Mean value at each distance between layers, against the null at the same distances."""
    info, value, null = result.info, result.arrays["value"], result.arrays["null"]
    distance = np.abs(np.subtract.outer(np.array(info.source_layers), np.array(info.target_layers)))
    known = np.isfinite(value)
    steps = [int(d) for d in np.unique(distance[known]) if d > 0]

    def means_of(name: str) -> list[float]:
        return [mean(result.arrays[name][distance == d]) for d in steps] if name in result.arrays else []

    means, nulls = means_of("value"), means_of("null")
    beyond = bool((result.arrays["low"] > null)[known & (distance == steps[0])].all())
    near = "between neighbouring layers" if steps[0] == 1 else f"at a distance of {steps[0]} layers"
    sentence = (
        f"{info.source}: {info.metric} {near} is {means[0]:.2f} on average (null {nulls[0]:.2f})"
        f" and {means[-1]:.2f} at a distance of {steps[-1]} (null {nulls[-1]:.2f})"
    )
    if not beyond:
        sentence += "; at least one pair of the nearest layers is not beyond the null"
    numbers: dict[str, float | int | str | None] = {"metric": info.metric, "model": info.source, "n": info.num_tokens}
    for d, at_d, null_at_d in zip(steps, means, nulls, strict=True):
        numbers |= {f"distance {d}": at_d, f"null at distance {d}": null_at_d}
    curve = Curve(
        kind="decay",
        metric=info.metric,
        source=info.source,
        target=info.target,
        x=[float(d) for d in steps],
        value=finite(np.array(means)),
        low=finite(np.array(means_of("low"))),  # means of intervals: wider than the interval of the mean
        high=finite(np.array(means_of("high"))),
        null=finite(np.array(nulls)),
        ceiling=finite(np.array(means_of("ceiling"))),
        ceiling_min=finite(np.array(means_of("ceiling_min"))),
        ceiling_max=finite(np.array(means_of("ceiling_max"))),
        num_twins=result.num_twins if "ceiling_min" in result.arrays else 0,
        num=[int((known & (distance == d)).sum()) for d in steps],
    )
    return Finding(topic="decay with distance", sentence=sentence + ".", beyond_null=beyond, numbers=numbers), curve


def _of_others(array: np.ndarray) -> np.ndarray:
    """The mean of each row but its own entry."""
    off = ~np.eye(len(array), dtype=bool)
    return np.array([mean(row[mask]) for row, mask in zip(array, off, strict=True)])


def _universal_layer(result: TransferResult) -> Finding:
    """The layers whose dictionaries serve the others best and worst, with the gap to the best one's interval."""
    info = result.info
    means, lows, highs = (_of_others(result.arrays[name]) for name in ("value", "low", "high"))
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


def _hub(result: TransferResult) -> Finding:
    """The layer in which the others are found again most: the column with the highest mean."""
    info = result.info
    means, lows, highs = (_of_others(result.arrays[name].T) for name in ("value", "low", "high"))
    hub, rest = int(np.nanargmax(means)), np.delete(highs, int(np.nanargmax(means)))
    beyond = bool(lows[hub] > np.nanmax(rest))
    words = (
        f"{info.source}: by {info.metric} the other layers are found again most in layer {info.target_layers[hub]}"
        f" ({means[hub]:.2f} on average, {mean(np.delete(means, hub)):.2f} in the others)"
    )
    return Finding(
        topic="hubs",
        sentence=words
        + ("." if beyond else "; its interval overlaps another layer's, so no layer is a hub beyond chance."),
        beyond_null=beyond,
        numbers={
            "metric": info.metric,
            "model": info.source,
            "hub": info.target_layers[hub],
            "mean": float(means[hub]),
            "mean of the others": mean(np.delete(means, hub)),
            "n": info.num_tokens,
        },
    )


def _links(result: TransferResult) -> list[Share]:
    """Of the live features of each layer but the last the share that goes on in the next one."""
    live_L = result.arrays["live"].sum(1)
    mutual_L = (
        np.diagonal(result.arrays["mutual"], 1) if "mutual" in result.arrays else np.full(len(live_L) - 1, np.nan)
    )
    known = np.nan_to_num(mutual_L) * live_L[:-1]
    return [Share.of(count, int(n)) for count, n in zip(known, live_L, strict=False)]


def _bottleneck(result: TransferResult) -> Finding:
    """The two consecutive layers between which fewest features go on."""
    info, links = result.info, _links(result)
    place = int(np.nanargmin([link.value for link in links]))
    link, rest = links[place], [other for i, other in enumerate(links) if i != place]
    others = Share.of(sum(r.value * r.n for r in rest), sum(r.n for r in rest))
    beyond = link.high < others.low
    ceilings = result.arrays.get("ceiling_mutual")
    ceiling = (
        f", {ceilings[place, place + 1]:.0%} to another seed's dictionary of the same layer"
        if ceilings is not None
        else ""
    )
    if result.num_twins:
        ends = (float(result.arrays[f"ceiling_mutual_{end}"][place, place + 1]) for end in ("min", "max"))
        ceiling += describe_twins(result, *ends)
    words = (
        f"{info.source}: fewest features go on from layer {info.source_layers[place]} to {info.source_layers[place + 1]}:"
        f" {link}{ceiling}; {others} elsewhere"
    )
    return Finding(
        topic="bottlenecks",
        sentence=words + ("." if beyond else ", so no step is a bottleneck beyond chance."),
        beyond_null=beyond,
        numbers={
            "model": info.source,
            "from": info.source_layers[place],
            "to": info.source_layers[place + 1],
            "share": link.value,
            "low": link.low,
            "high": link.high,
            "share elsewhere": others.value,
            "ceiling": float(ceilings[place, place + 1]) if ceilings is not None else None,
            "n": link.n,
        },
    )


def _thirds(result: TransferResult, lines: pl.DataFrame, labels: pl.DataFrame | None) -> Finding:
    """What goes on, is born and has a label in the early, middle and late third of the layers."""
    info, links = result.info, _links(result)
    third_of = {layer: min(2, 3 * place // len(info.source_layers)) for place, layer in enumerate(info.source_layers)}
    numbers: dict[str, float | int | str | None] = {"model": info.source}
    going: list[Share] = []
    words = []
    for third, name in enumerate(THIRDS):
        inside = [layer for layer, number in third_of.items() if number == third]
        own = [link for layer, link in zip(info.source_layers, links, strict=False) if layer in inside]
        going.append(Share.of(sum(link.value * link.n for link in own), sum(link.n for link in own)))
        rows = lines.filter(pl.col("layer").is_in(inside))
        later = rows.filter(pl.col("layer") != info.source_layers[0])  # in the first layer all are born
        born = Share.of(int((later["birth"] == later["layer"]).sum()), len(later))
        known = labels.filter(pl.col("layer").is_in(inside)) if labels is not None else None
        labelled = rows.join(known, on=["layer", "feature"], how="semi") if known is not None else None
        numbers |= {f"{name}: goes on": going[-1].value, f"{name}: born": born.value, f"{name}: n": len(rows)}
        told = [f"{going[-1]} go on"] if going[-1].n else []
        told += [f"{born} are born there"] if born.n else []
        if labelled is not None:
            share = Share.of(len(labelled), len(rows))
            numbers[f"{name}: labelled"] = share.value
            told.append(f"{share} have a label")
        words.append(
            f"{name} (layers {inside[0]} to {inside[-1]}): {', '.join(told)}" if told else f"{name}: no features"
        )
    known_shares = [share for share in going if share.n]
    beyond = max(s.low for s in known_shares) > min(s.high for s in known_shares)
    sentence = f"{info.source}, of the features of each third of the layers, {'; '.join(words)}"
    return Finding(
        topic="early, middle, late",
        sentence=sentence + ("." if beyond else "; what goes on does not differ between the thirds beyond chance."),
        beyond_null=beyond,
        numbers=numbers,
    )
