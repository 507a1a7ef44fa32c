"""The same prompt in several models: which of the features at work have a counterpart in the others.

A feature's partner in another model is the feature of any of its layers with the highest correlation (matching, over aligned
tokens of held-out text), if it is above the threshold of that pair of layers. With partners in all other models a feature is
universal, with some shared, with none specific. The same shares over all live features are the base rate to compare with.
"""

from typing import Literal

import numpy as np

from throughline.records import Comparison, SharedFeature, Trace, TransferResult

Standing = Literal["universal", "shared", "specific"]
STANDINGS: tuple[Standing, ...] = ("universal", "shared", "specific")


def compare_traces(traces: dict[str, Trace], matches: dict[tuple[str, str], TransferResult]) -> Comparison:
    """Traces of one prompt side by side. `matches[a, b]` is the matching from model a to model b, for every pair."""
    models = list(traces)
    best = {pair: _best_partners(result) for pair, result in matches.items()}
    features, shares, all_shares = [], {}, {}
    for model, trace in traces.items():
        others = [m for m in models if m != model]
        mine = [_place(trace, f, others, best, matches) for layer in trace.layers for f in layer.features]
        features += mine
        shares[model] = {s: _share([f.standing == s for f in mine]) for s in STANDINGS}
        all_shares[model] = _base_rates(model, others, best, matches)
    infos = [result.info for result in matches.values()]
    return Comparison(
        prompt=next(iter(traces.values())).prompt,
        models=models,
        answers={m: t.answer for m, t in traces.items()},
        probabilities={m: t.answer_probability for m, t in traces.items()},
        correct={m: t.correct for m, t in traces.items()},
        features=features,
        shares=shares,
        all_shares=all_shares,
        threshold=f"{infos[0].details['threshold']}, over {min(i.num_tokens for i in infos):,} tokens or more",
        forced=any(t.forced for t in traces.values()),
        traces=traces,
    )


def _best_partners(result: TransferResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each source layer and feature the best target layer's index, partner and correlation; -1 and NaN if none."""
    correlation = result.arrays["correlation"].astype(np.float64)  # [Ls, Lt, F]
    above = correlation > result.arrays["threshold"][:, :, None]
    masked = np.where(above, correlation, -np.inf)
    column = masked.argmax(1)
    found = np.take_along_axis(masked, column[:, None], 1)[:, 0]
    partner = np.take_along_axis(result.arrays["partner"], column[:, None], 1)[:, 0]
    none = ~np.isfinite(found)
    return np.where(none, -1, column), np.where(none, -1, partner), np.where(none, np.nan, found)


def _place(trace: Trace, feature, others: list[str], best: dict, matches: dict) -> SharedFeature:
    partners = {}
    for other in others:
        info = matches[trace.model, other].info
        columns, partner, correlation = best[trace.model, other]
        row = info.source_layers.index(feature.layer)
        column = int(columns[row, feature.feature])
        if column >= 0:
            partners[other] = (
                info.target_layers[column],
                int(partner[row, feature.feature]),
                float(correlation[row, feature.feature]),
            )
    return SharedFeature(
        model=trace.model,
        layer=feature.layer,
        position=feature.position,
        feature=feature.feature,
        activation=feature.activation,
        effect=feature.effect,
        label=feature.label.text if feature.label else "unlabelled: " + ", ".join(map(repr, feature.top_tokens[:3])),
        partners=partners,
        standing=_standing(len(partners), len(others)),
    )


def _standing(num_partners: int, num_others: int) -> Standing:
    return "universal" if num_partners == num_others else "shared" if num_partners else "specific"


def _base_rates(model: str, others: list[str], best: dict, matches: dict) -> dict[str, float]:
    live = matches[model, others[0]].arrays["live"]
    count = np.sum([best[model, other][0] >= 0 for other in others], axis=0)
    return {s: _share([_standing(int(c), len(others)) == s for c in count[live]]) for s in STANDINGS}


def _share(hits: list[bool]) -> float:
    return float(np.mean(hits)) if hits else 0.0
