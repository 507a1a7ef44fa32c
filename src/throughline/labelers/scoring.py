"""How well a predicate says when a feature fires: F1, with the baselines beside it.

A predicate is a column of a boolean matrix P [N, C] over tokens. For feature f at threshold t

    precision = |f > t and P| / |f > t|      recall = |f > t and P| / |P|      F1 = 2 |f > t and P| / (|f > t| + |P|)

Feature, threshold and predicate are chosen on one text and scored on another. Beside each F1 stand three others for the same
predicate: always saying yes (2p / (1 + p) at base rate p), the best single coordinate of the residual stream, and the best
feature of an untrained dictionary of the same shape; both of these are chosen on the first text and scored on the second too.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl
import scipy.sparse as sp

from throughline.codes import Codes
from throughline.records import LABEL_COLUMNS

THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)  # of the feature's maximum
NEURON_QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
MIN_POSITIVE = 10  # tokens of a text on which a predicate must hold to be considered


@dataclass(frozen=True)
class LayerText:
    """One layer's view of one text: features, features of an untrained dictionary, and the residual stream itself."""

    codes: Codes
    layer: int
    features: sp.csr_array  # [N, F]
    untrained: sp.csr_array  # [N, F]
    residual_ND: np.ndarray


class Labeler(Protocol):
    """What a labeler's file provides. One instance serves all layers of a model, so it may keep what they share."""

    name: str

    def label(self, selection: LayerText, heldout: LayerText) -> pl.DataFrame:
        """At most one label per feature (LABEL_COLUMNS), chosen on `selection`, scored on `heldout`."""
        ...


def f1(true_positive: np.ndarray, num_active: np.ndarray, num_positive: np.ndarray) -> np.ndarray:
    """2 TP / (active + positive), 0 where both are empty."""
    return 2 * true_positive / np.maximum(num_active + num_positive, 1)


def active_above(features: sp.csr_array, share: float, maxima_F: np.ndarray) -> sp.csr_array:
    """Where features exceed `share` of their maxima, as ones."""
    above = features.data > share * maxima_F[features.indices]
    starts = np.r_[0, np.cumsum(above)][features.indptr]
    indices = features.indices[above]
    return sp.csr_array((np.ones(len(indices), dtype=np.float32), indices, starts), shape=features.shape)


def overlap(active: sp.csr_array, predicates: sp.csr_array) -> np.ndarray:
    """Tokens on which feature and predicate hold together, dense [F, C]."""
    return (active.T @ predicates).toarray()


def measure_pairs(
    features: sp.csr_array, predicates: sp.csr_array, chosen_C: np.ndarray, thresholds: np.ndarray, maxima: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """True positives and active counts of feature f with predicate chosen_C[f] at its threshold, on another text."""
    true_positive, num_active = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for share in np.unique(thresholds):
        active = active_above(features, share, maxima)
        mine = np.flatnonzero(thresholds == share)
        columns = active.tocsc()[:, mine]
        num_active[mine] = np.diff(columns.indptr)
        paired = predicates.tocsc()[:, chosen_C[mine].astype(int)]
        true_positive[mine] = np.asarray(columns.multiply(paired).sum(axis=0)).ravel()
    return true_positive, num_active


class Baselines(NamedTuple):
    """Held-out F1 of each predicate by three things that are not a trained feature."""

    always: np.ndarray
    neuron: np.ndarray
    untrained: np.ndarray


def measure_baselines(
    selection: LayerText, heldout: LayerText, select_NC: sp.csr_array, held_NC: sp.csr_array
) -> Baselines:
    """What always saying yes, the best neuron and the best untrained feature reach for each predicate."""
    rate_C = _count(held_NC) / held_NC.shape[0]
    return Baselines(
        2 * rate_C / (1 + rate_C),
        _best_neuron(selection.residual_ND, heldout.residual_ND, select_NC, held_NC),
        _best_untrained(selection.untrained, heldout.untrained, select_NC, held_NC),
    )


def _best_neuron(
    select_ND: np.ndarray, held_ND: np.ndarray, select_NC: sp.csr_array, held_NC: sp.csr_array
) -> np.ndarray:
    """Each coordinate, in either direction, above quantiles of its own values."""
    best, scored = np.full(select_NC.shape[1], -1.0), np.zeros(select_NC.shape[1])
    positive, held_positive = _count(select_NC), _count(held_NC)
    select_CN, held_CN = select_NC.T.tocsr(), held_NC.T.tocsr()
    for sign in (1, -1):
        levels = np.quantile(sign * select_ND, NEURON_QUANTILES, axis=0)
        for level_D in levels:
            on, held_on = ((sign * x > level_D).astype(np.float32) for x in (select_ND, held_ND))
            scores_CD = f1(select_CN @ on, on.sum(0)[None], positive[:, None])
            neuron = scores_CD.argmax(1)
            at = np.arange(len(neuron))
            better = scores_CD[at, neuron] > best
            best = np.where(better, scores_CD[at, neuron], best)
            held_scores = f1(held_CN @ held_on, held_on.sum(0)[None], held_positive[:, None])
            scored = np.where(better, held_scores[at, neuron], scored)
    return scored


def _best_untrained(
    select_NF: sp.csr_array, held_NF: sp.csr_array, select_NC: sp.csr_array, held_NC: sp.csr_array
) -> np.ndarray:
    maxima = maxima_of(select_NF)
    best, scored = np.full(select_NC.shape[1], -1.0), np.zeros(select_NC.shape[1])
    positive, held_positive = _count(select_NC), _count(held_NC)
    for share in THRESHOLDS:
        on, held_on = active_above(select_NF, share, maxima), active_above(held_NF, share, maxima)
        scores_FC = f1(overlap(on, select_NC), _count(on)[:, None], positive[None])
        feature, at = scores_FC.argmax(0), np.arange(len(best))
        better = scores_FC[feature, at] > best
        best = np.where(better, scores_FC[feature, at], best)
        held_scores = f1(overlap(held_on, held_NC), _count(held_on)[:, None], held_positive[None])
        scored = np.where(better, held_scores[feature, at], scored)
    return scored


def maxima_of(features: sp.csr_array) -> np.ndarray:
    """Largest activation of each feature."""
    return features.max(axis=0).toarray().ravel()


def label_table(
    heldout: LayerText,
    source: str,
    features: np.ndarray,
    words: list[str],
    thresholds: np.ndarray,
    true_positive: np.ndarray,
    num_active: np.ndarray,
    num_positive: np.ndarray,
    baselines: Baselines,
) -> pl.DataFrame:
    """Rows of LABEL_COLUMNS; all arrays have one entry per labelled feature."""
    return pl.DataFrame(
        {
            "layer": np.full(len(features), heldout.layer),
            "feature": features,
            "label": words,
            "source": [source] * len(features),
            "measure": ["tokens"] * len(features),
            "f1": f1(true_positive, num_active, num_positive),
            "precision": true_positive / np.maximum(num_active, 1),
            "recall": true_positive / np.maximum(num_positive, 1),
            "threshold": thresholds,
            "num_positive": num_positive.astype(np.int64),
            "num_tokens": np.full(len(features), heldout.codes.num_tokens),
            "base_f1": baselines.always,
            "neuron_f1": baselines.neuron,
            "untrained_f1": baselines.untrained,
            "balanced_accuracy": [None] * len(features),
            "fuzzing": [None] * len(features),
        },
        schema=LABEL_COLUMNS,
    )


def _count(matrix: sp.csr_array) -> np.ndarray:
    return np.bincount(matrix.indices, minlength=matrix.shape[1]).astype(np.float64)
