"""Two models against each other: how much of one is found in the other, at which depth they diverge, and what they share."""

from collections.abc import Mapping

import numpy as np
import polars as pl

from throughline.analyzing.naming import most_frequent
from throughline.analyzing.shares import Share, describe_twins, finite, mean
from throughline.records import Curve, Finding, TransferResult


def describe_pair(result: TransferResult) -> tuple[list[Finding], Curve]:
    """How much of one model's features is found in another, and where along its depth that leaves its ceiling, if it has one."""
    finding, curve = _divergence(result)
    return [_across(result), *([finding] if finding else [])], curve


def describe_lack(pairs: list[str]) -> Finding:
    """That there is no ceiling for these pairs of models."""
    return Finding(
        topic="divergence",
        sentence=f"{', '.join(pairs)}: no dictionaries of another seed were trained (training.ceiling_seeds), so where the models "
        "diverge from what two dictionaries of one layer share is not known.",
        beyond_null=False,
        numbers={"pairs": len(pairs)},
    )


def _across(result: TransferResult) -> Finding:
    info, value, null = result.info, result.arrays["value"], result.arrays["null"]
    flat = int(np.nanargmax(value))
    i, j = np.unravel_index(flat, value.shape)
    beyond = bool(result.arrays["low"][i, j] > null[i, j])
    overall, null_mean = mean(value), mean(null)
    words = (
        f"{info.source} to {info.target}: on average {overall:.0%} of a layer's live features have a partner above the null"
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
            "mean": overall,
            "null": null_mean,
            "best": float(value[i, j]),
            "coverage": info.coverage,
            "n": info.num_tokens,
        },
    )


def _divergence(result: TransferResult) -> tuple[Finding | None, Curve]:
    """The best share of each source layer against its ceiling, by relative depth; diverged is the first whose interval lies below
    the ceiling's. The best of many layers is taken, which favours the pair a little."""
    info, arrays = result.info, result.arrays
    value = arrays["value"]
    known = np.flatnonzero(np.isfinite(value).any(axis=1))
    best = np.nanargmax(value[known], axis=1)
    depth = np.array(info.source_layers)[known] / max(1, max(info.source_layers))
    at_best = {name: arrays[name][known, best] for name in ("value", "low", "high", "null")}
    ceilings = {
        name: arrays[name][known, best]
        for name in ("ceiling", "ceiling_low", "ceiling_high", "ceiling_min", "ceiling_max")
        if name in arrays
    }
    curve = Curve(
        kind="divergence",
        metric=info.metric,
        source=info.source,
        target=info.target,
        x=[float(d) for d in depth],
        num=[int(n) for n in arrays["live"][known].sum(1)] if "live" in arrays else [],
        num_twins=result.num_twins,
        **{name: finite(array) for name, array in (at_best | ceilings).items()},
    )
    numbers: dict[str, float | int | str | None] = {"source": info.source, "target": info.target, "n": info.num_tokens}
    pair = f"{info.source} to {info.target}"
    if "ceiling_low" not in ceilings or not np.isfinite(ceilings["ceiling_low"]).any():
        return None, curve
    left = np.flatnonzero(at_best["high"] < ceilings["ceiling_low"])
    if not len(left):
        sentence = f"{pair}: similarity stays within the interval of its ceiling (another seed of the same layer) at every depth."
        return Finding(
            topic="divergence", sentence=sentence, beyond_null=False, numbers=numbers | {"depth": None}
        ), curve
    p = int(left[0])
    layers = (info.source_layers[known[p]], info.target_layers[best[p]])
    ends = [float(ceilings[f"ceiling_{end}"][p]) for end in ("min", "max")] if result.num_twins else []
    twins = describe_twins(result, *ends) if ends else ""
    again = np.flatnonzero(at_best["high"][p:] >= ceilings["ceiling_low"][p:])
    sentence = (
        f"{pair}: similarity leaves its ceiling at relative depth {depth[p]:.2f} (layer {layers[0]}): "
        f"{at_best['value'][p]:.0%} [{at_best['low'][p]:.0%}, {at_best['high'][p]:.0%}] are found in layer {layers[1]}, "
        f"{ceilings['ceiling'][p]:.0%} [{ceilings['ceiling_low'][p]:.0%}, {ceilings['ceiling_high'][p]:.0%}] in a dictionary of "
        f"the same layer from another seed{twins} (null {at_best['null'][p]:.0%})"
        + (
            f"; {len(again)} of the {len(depth) - p - 1} layers after it are within the ceiling again."
            if len(again)
            else "."
        )
    )
    numbers |= {
        "depth": float(depth[p]),
        "layer": layers[0],
        "value": float(at_best["value"][p]),
        "ceiling": float(ceilings["ceiling"][p]),
        "null": float(at_best["null"][p]),
    }
    if ends:
        numbers |= {"ceiling min": ends[0], "ceiling max": ends[1], "twins": result.num_twins}
    return Finding(topic="divergence", sentence=sentence, beyond_null=True, numbers=numbers), curve


def describe_sharing(
    matching: Mapping[tuple[str, str], TransferResult], labels: Mapping[str, pl.DataFrame]
) -> list[Finding]:
    """For each model which of its features every other model has (MPPC above chance), which none has, and their labels."""
    found = []
    names = list(dict.fromkeys(a for a, _ in matching))
    for name in names:
        others = [r for (a, b), r in matching.items() if a == name and b != name and "mppc" in r.arrays]
        if not others or len(others) < len(names) - 1:
            continue
        info = others[0].info
        has = [r.arrays["mppc"] > r.arrays["mppc_threshold"][:, None] for r in others]
        live_LF = np.isfinite(np.stack([r.arrays["mppc"] for r in others])).any(0)
        in_all, in_none = np.logical_and.reduce(has) & live_LF, ~np.logical_or.reduce(has) & live_LF
        shares = [Share.of(int(mask.sum()), int(live_LF.sum())) for mask in (in_all, in_none)]
        # what the kind of position alone would find in the best layer of each other model
        null = float(np.prod([np.nanmean(np.nanmax(r.arrays["null"], axis=1)) for r in others]))
        beyond = shares[0].low > null
        known = labels.get(name)
        words, numbers = [], {"model": name, "in all": shares[0].value, "in none": shares[1].value, "null": null}
        for what, mask in (("shared", in_all), ("specific", in_none)):
            text, labelled = _labels(info.source_layers, mask, known)
            numbers[f"{what} with a label"] = labelled.value
            words.append(f"of the {what} {labelled} have a label{text}")
        sentence = (
            f"{name}: {shares[0]} of {int(live_LF.sum())} live features have a partner above chance in every other model "
            f"({null:.0%} by kind of token alone), {shares[1]} in none; {'; '.join(words)}"
        )
        found.append(
            Finding(
                topic="shared and specific features",
                sentence=sentence + ("." if beyond else "; nothing beyond the null."),
                beyond_null=beyond,
                numbers=numbers | {"n": int(live_LF.sum())},
            )
        )
    return found


def _labels(layers: list[int], mask_LF: np.ndarray, labels: pl.DataFrame | None) -> tuple[str, Share]:
    """The most frequent labels of some features in words, and how many have one."""
    places, features = np.nonzero(mask_LF)
    chosen = pl.DataFrame({"layer": np.array(layers, dtype=np.int64)[places], "feature": features.astype(np.int64)})
    if labels is None or not len(chosen):
        return "", Share.of(0, len(chosen))
    keys = labels.with_columns(pl.col("layer", "feature").cast(pl.Int64))
    joined = chosen.join(keys, on=["layer", "feature"])
    text = most_frequent(joined)
    return (f" (most often {text})" if text else ""), Share.of(len(joined), len(chosen))
