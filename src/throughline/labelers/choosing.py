"""For each feature, the predicate and threshold that are surest to fit it: the search over the vocabulary.

    together[f, c] = sum over the cells a of predicate c of |f > t and a|        F1 = 2 together / (|f > t| + |c|)

1. F1 = 2 J / (1 + J), where J = together / either is a share of the `either` = |f > t| + |c| - together tokens on which one of
   them holds. Its lower bound (Wilson 1927, z = CAUTION) puts a lower bound below F1, and the best lower bound is chosen: of tens
   of thousands of predicates the best F1 as such would be one that holds on a dozen tokens, by luck.
2. The bound grows with `together`, which is at most min(|f > t|, |c|): most pairs are left out by that alone.

A threshold may leave out no more than half of what a feature does (MIN_MASS): a label of the highest tenth of its activations
would say little of it, and any direction, learned or not, is highest on some one kind of token.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit

from throughline.labelers.scoring import THRESHOLDS, active_above
from throughline.labelers.vocabulary import FAMILIES, Predicates

MIN_MASS = 0.5  # share of a feature's activation, summed over tokens, that must lie above its threshold
CAUTION = 2.0  # standard deviations that a score is lowered by for being counted on few tokens
FEATURES_AT_ONCE = 1024  # counts of features and cells are dense


class Choice(NamedTuple):
    """Of each feature, or of each family's best feature: predicate, threshold as a share of the maximum, and F1's lower bound."""

    feature: np.ndarray
    predicate: np.ndarray
    threshold: np.ndarray
    low: np.ndarray

    def of_live(self) -> "Choice":
        """Only those for which there was something to choose from."""
        return Choice(*(a[self.low >= 0] for a in self))


@njit(nogil=True, cache=True)
def lowest_f1(together: float, num_active: float, num_positive: float) -> float:
    """F1 as low as it may well be on another text, given how few tokens it was counted on."""
    either, z2 = num_active + num_positive - together, CAUTION**2
    centre = together + z2 / 2
    share = (centre - CAUTION * np.sqrt(together * (either - together) / either + z2 / 4)) / (either + z2)
    return 2 * share / (1 + share)


def choose_predicates(features: sp.csr_array, predicates: Predicates, maxima_F: np.ndarray) -> tuple[Choice, Choice]:
    """The best predicate and threshold of each feature; and of each of FAMILIES the best feature, predicate and threshold.

    Of equals the lowest threshold is taken, then the first predicate. `low` is -1 where there is nothing to choose from.
    """
    by_feature, by_family = (
        Choice(np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), np.zeros(n), np.full(n, -1.0))
        for n in (features.shape[1], len(FAMILIES))
    )
    by_feature.feature[:] = np.arange(features.shape[1])
    columns, cells_AN = features.tocsc(), predicates.cells_NA.T.tocsr()
    unions, positive_C = predicates.unions_AC, predicates.count()
    for first in range(0, features.shape[1], FEATURES_AT_ONCE):
        part = sp.csr_array(columns[:, first : first + FEATURES_AT_ONCE])
        maxima = maxima_F[first : first + FEATURES_AT_ONCE]
        mass = part.sum(axis=0)
        for share in THRESHOLDS:
            active = active_above(part, share, maxima)
            enough = active.multiply(part).sum(axis=0) >= MIN_MASS * mass if share else mass > 0
            num_active = np.where(enough, np.bincount(active.indices, minlength=part.shape[1]), 0)
            _search(
                (cells_AN @ active).toarray().T.copy(),
                num_active,
                unions.indptr,
                unions.indices,
                positive_C,
                predicates.families_C,
                share,
                first,
                by_feature,
                by_family,
            )
    return by_feature, by_family


@njit(nogil=True, cache=True)
def _search(
    together_FA: Any,
    num_active_F: Any,
    starts: Any,
    cells: Any,
    positive_C: Any,
    families_C: Any,
    share: float,
    first: int,
    by_feature: Any,
    by_family: Any,
) -> None:
    """Better choices at one threshold, in place, for the features from number `first` on."""
    for f in range(len(num_active_F)):
        n, row_A = num_active_F[f], together_FA[f]
        if n == 0:
            continue
        for c in range(len(positive_C)):
            g = families_C[c]
            most = lowest_f1(min(n, positive_C[c]), n, positive_C[c])
            if most <= by_feature.low[first + f] and most <= by_family.low[g]:
                continue
            together = 0.0
            for a in range(starts[c], starts[c + 1]):
                together += row_A[cells[a]]
            score = lowest_f1(together, n, positive_C[c])
            if score > by_feature.low[first + f]:
                by_feature.predicate[first + f], by_feature.threshold[first + f] = c, share
                by_feature.low[first + f] = score
            if score > by_family.low[g]:
                by_family.feature[g], by_family.predicate[g], by_family.threshold[g] = first + f, c, share
                by_family.low[g] = score
