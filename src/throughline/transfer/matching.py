"""Matching: which feature of another layer or model fires with this one.

    1. tokens of the two models are aligned where they end
    2. r[u, v] = Pearson's correlation of activations over the aligned tokens
    3. the partner of u is argmax_v r[u, v]
    4. null: the same with the target's tokens taken from the next document; the threshold of a layer pair is the 99.9 %
       quantile of these best chance correlations. `null` is the share that passes it when target tokens are shuffled
       within their role (number in the question, word in the answer, …): what the kind of position alone explains
Features that fire on fewer than `min_count` aligned tokens are left out: two rare features that meet once correlate perfectly.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from throughline.errors import InputError
from throughline.records import TransferInfo, TransferResult
from throughline.transfer.pairs import (
    Columns,
    Side,
    align,
    bootstrap_interval,
    correlate,
    moments_of,
    prepare,
    shift_documents,
    shuffle_within,
)

NULL_QUANTILE = 0.999


class Matching:
    """Share of live source features whose best partner in the target layer is above the null."""

    name = "matching"
    across_models = True
    both_ways = False

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
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
        has_other = shifted >= 0
        here = [_View.of(m[aligned.source_N], min_count, {"shifted": has_other}) for m in source.codes.layers.values()]
        ways = {"shifted": shifted[has_other], "shuffled": shuffled}
        there = [_View.of(m[aligned.target_N], min_count, ways) for m in target.codes.layers.values()]
        width = max(view.width for view in here)
        shape = (len(list(source.dictionaries)), len(list(target.dictionaries)))
        names = ("value", "low", "high", "null", "mean_correlation", "null_correlation", "threshold", "mutual")
        arrays: dict[str, np.ndarray] = {name: np.full(shape, np.nan) for name in names}
        arrays["partner"] = np.full((*shape, width), -1, dtype=np.int32)
        arrays["correlation"] = np.full((*shape, width), np.nan, dtype=np.float32)
        arrays["live"] = np.zeros((shape[0], width), dtype=bool)
        for i, a in enumerate(here):
            arrays["live"][i, a.features] = True
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # sparse products let go of the interpreter lock
            cells = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
            matched = pool.map(lambda cell: match_layers(here[cell[0]], there[cell[1]], seed), cells)
            for (i, j), found in zip(cells, matched, strict=True):
                for name, value in found.items():
                    where = (i, j, slice(0, len(value))) if isinstance(value, np.ndarray) else (i, j)
                    arrays[name][where] = value
        info = TransferInfo(
            metric=self.name,
            source=source.model,
            target=target.model,
            source_layers=list(source.dictionaries),
            target_layers=list(target.dictionaries),
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
        return [TransferResult(info, arrays)]


class _View(NamedTuple):
    """The live features of a layer on the aligned tokens, and the same with tokens chosen otherwise for the nulls."""

    width: int
    features: np.ndarray
    real: Columns
    other: dict[str, Columns]

    @classmethod
    def of(cls, matrix_NF: sp.csr_array, min_count: int, ways: dict[str, np.ndarray]) -> "_View":
        features = np.flatnonzero(moments_of(matrix_NF).num_active >= min_count)
        live = sp.csr_array(matrix_NF[:, features])
        return cls(matrix_NF.shape[1], features, prepare(live), {way: prepare(live[N]) for way, N in ways.items()})


def match_layers(source: _View, target: _View, seed: int) -> dict[str, float | np.ndarray]:
    """Partners and summaries of one layer pair; the arrays of `Matching.compute` for it."""
    features, columns = source.features, target.features
    correlation, partner = np.full(source.width, np.nan), np.full(source.width, -1)
    if not len(features) or not len(columns):
        return {"partner": partner, "correlation": correlation}
    r = correlate(source.real, target.real)
    best = r.argmax(1)
    correlation[features], partner[features] = r[np.arange(len(features)), best], columns[best]
    chance = correlate(source.other["shifted"], target.other["shifted"]).max(1)
    threshold = float(np.quantile(chance, NULL_QUANTILE))
    within_role = correlate(source.real, target.other["shuffled"]).max(1)
    above = (correlation[features] > threshold).astype(float)
    mutual = (r.argmax(0)[best] == np.arange(len(features))) & (above > 0)
    low, high = bootstrap_interval(above, seed)
    return {
        "partner": partner,
        "correlation": correlation,
        "value": float(above.mean()),
        "low": low,
        "high": high,
        "null": float((within_role > threshold).mean()),
        "mean_correlation": float(correlation[features].mean()),
        "null_correlation": float(within_role.mean()),
        "threshold": threshold,
        "mutual": float(mutual.mean()),
    }
