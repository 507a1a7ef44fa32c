"""Matching: which feature of another layer or model fires with this one.

    1. tokens of the two models are aligned where they end
    2. r[u, v] = Pearson's correlation of activations over the aligned tokens
    3. the partner of u is argmax_v r[u, v]
    4. null: the same with the target's tokens taken from the next document; the threshold of a layer pair is the 99.9 %
       quantile of these best chance correlations. `null` is the share that passes it when target tokens are shuffled
       within their role (number in the question, word in the answer, …): what the kind of position alone explains
Features that fire on fewer than `min_count` aligned tokens are left out: two rare features that meet once correlate perfectly.
"""

import numpy as np
import scipy.sparse as sp

from throughline.errors import InputError
from throughline.records import TransferInfo, TransferResult
from throughline.transfer.pairs import (
    Side,
    align,
    bootstrap_interval,
    correlate,
    moments_of,
    shift_documents,
    shuffle_within,
)

NULL_QUANTILE = 0.999


class Matching:
    """Share of live source features whose best partner in the target layer is above the null."""

    name = "matching"
    across_models = True

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> TransferResult:
        """Arrays value, low, high, null [Ls, Lt]; mean_correlation, null_correlation, threshold [Ls, Lt]; mutual [Ls, Lt],
        the share in mutual-best pairs above the threshold; partner, correlation [Ls, Lt, F]; live [Ls, F]."""
        aligned = align(source.codes, target.codes)
        num_documents = len(np.unique(source.codes.documents_N[aligned.source_N]))
        if num_documents < 2:
            raise InputError(
                f"matching needs two held-out documents or more, found {num_documents}; raise evaluation.tokens, or give more text"
            )
        shifted = shift_documents(target.codes, aligned.target_N, by=1)
        rng = np.random.default_rng(seed)
        shuffled = shuffle_within(target.codes.roles_N[aligned.target_N], rng)
        here = {layer: m[aligned.source_N] for layer, m in source.codes.layers.items()}
        there = {layer: m[aligned.target_N] for layer, m in target.codes.layers.items()}
        width = max(m.shape[1] for m in here.values())
        shape = (len(source.layers), len(target.layers))
        names = ("value", "low", "high", "null", "mean_correlation", "null_correlation", "threshold", "mutual")
        arrays: dict[str, np.ndarray] = {name: np.full(shape, np.nan) for name in names}
        arrays["partner"] = np.full((*shape, width), -1, dtype=np.int32)
        arrays["correlation"] = np.full((*shape, width), np.nan, dtype=np.float32)
        arrays["live"] = np.zeros((shape[0], width), dtype=bool)
        for i, a in enumerate(source.layers):
            arrays["live"][i, : here[a].shape[1]] = moments_of(here[a]).num_active >= min_count
            for j, b in enumerate(target.layers):
                found = match_layers(here[a], there[b], shifted, shuffled, min_count, seed)
                for name, value in found.items():
                    if isinstance(value, np.ndarray):
                        arrays[name][i, j, : len(value)] = value
                    else:
                        arrays[name][i, j] = value
        info = TransferInfo(
            metric=self.name,
            source=source.model,
            target=target.model,
            source_layers=source.layers,
            target_layers=target.layers,
            quantity="share of live source features with a partner in the target layer above the null",
            null="the same share when target tokens are shuffled among the same kind of position (number in the question, …)",
            ceiling=None,
            num_tokens=len(aligned.source_N),
            num_documents=num_documents,
            coverage=aligned.coverage,
            seed=seed,
            details={
                "min_count": min_count,
                "threshold": f"{NULL_QUANTILE:.1%} quantile of best correlations with the next document's tokens",
                "interval": "bootstrap over features",
            },
        )
        return TransferResult(info, arrays)


def match_layers(
    source_NF: sp.csr_array,
    target_NF: sp.csr_array,
    shifted_N: np.ndarray,
    shuffled_N: np.ndarray,
    min_count: int,
    seed: int,
) -> dict[str, float | np.ndarray]:
    """Partners and summaries of one layer pair; the arrays of `Matching.compute` for it."""
    live_source = moments_of(source_NF).num_active >= min_count
    live_target = moments_of(target_NF).num_active >= min_count
    features = np.flatnonzero(live_source)
    correlation = np.full(source_NF.shape[1], np.nan)
    partner = np.full(source_NF.shape[1], -1)
    if not live_source.any() or not live_target.any():
        return {"partner": partner, "correlation": correlation}
    columns = np.flatnonzero(live_target)
    source, target = source_NF[:, features], target_NF[:, columns]
    r = correlate(source, target)
    best = r.argmax(1)
    correlation[features], partner[features] = r[np.arange(len(features)), best], columns[best]
    has_other = shifted_N >= 0
    chance = correlate(source[has_other], target[shifted_N[has_other]]).max(1)
    threshold = float(np.quantile(chance, NULL_QUANTILE))
    within_kind = correlate(source, target[shuffled_N]).max(1)
    above = (correlation[features] > threshold).astype(float)
    mutual = (r.argmax(0)[best] == np.arange(len(features))) & (above > 0)
    low, high = bootstrap_interval(above, seed)
    return {
        "partner": partner,
        "correlation": correlation,
        "value": float(above.mean()),
        "low": low,
        "high": high,
        "null": float((within_kind > threshold).mean()),
        "mean_correlation": float(correlation[features].mean()),
        "null_correlation": float(within_kind.mean()),
        "threshold": threshold,
        "mutual": float(mutual.mean()),
    }
