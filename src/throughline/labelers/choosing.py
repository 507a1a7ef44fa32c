"""For each feature, the predicate and threshold that are surest to fit it: the search over the vocabulary.

    together[f, c] = sum over the cells a of predicate c of |f > t and a|        F1 = 2 together / (|f > t| + |c|)

1. F1 = 2 J / (1 + J), where J = together / either is a share of the `either` = |f > t| + |c| - together tokens on which one of
   them holds. Its lower bound (Wilson 1927, z = CAUTION) puts a lower bound below F1, and the best lower bound is chosen: of tens
   of thousands of predicates the best F1 as such would be one that holds on a dozen tokens, by luck.
2. All pairs are counted, one predicate for all features at a time, which is vectorised: to leave out what cannot win costs more.

A threshold may leave out no more than half of what a feature does (MIN_MASS): a label of the highest tenth of its activations
would say little of it, and any direction, learned or not, is highest on some one kind of token.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from throughline.kernel_cache import njit
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


@njit(nogil=True, error_model="numpy")
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
            live = np.flatnonzero(num_active)
            if not len(live):
                continue
            together_AL = (cells_AN @ active[:, live]).toarray()
            low_GL, predicate_GL = _search(
                together_AL,
                unions.indptr,
                unions.indices,
                num_active[live].astype(float),
                positive_C,
                predicates.families_C,
                len(FAMILIES),
            )
            _take_better(first + live, share, low_GL, predicate_GL, by_feature, by_family)
    return by_feature, by_family


@njit(nogil=True, error_model="numpy")
def _search(
    together_AL: Any, starts: Any, cells: Any, num_active_L: Any, positive_C: Any, families_C: Any, num_families: int
) -> Any:
    """Of each family the best score for each feature, [G, L], and the first predicate that has it; -1 where there is none."""
    L = len(num_active_L)
    low_GL, predicate_GL = np.full((num_families, L), -1.0), np.zeros((num_families, L), np.int64)
    together_L = np.empty(L, together_AL.dtype)
    for c in range(len(positive_C)):
        together_L[:] = 0
        for a in range(starts[c], starts[c + 1]):
            row_L = together_AL[cells[a]]
            for f in range(L):
                together_L[f] += row_L[f]
        low_L, predicate_L, positive = low_GL[families_C[c]], predicate_GL[families_C[c]], positive_C[c]
        for f in range(L):
            score = lowest_f1(together_L[f], num_active_L[f], positive)
            is_better = score > low_L[f]
            low_L[f] = score if is_better else low_L[f]
            predicate_L[f] = c if is_better else predicate_L[f]
    return low_GL, predicate_GL


def _take_better(
    features_L: np.ndarray,
    share: float,
    low_GL: np.ndarray,
    predicate_GL: np.ndarray,
    by_feature: Choice,
    by_family: Choice,
) -> None:
    """What one threshold found takes the place of what is worse; of equals the first predicate, of a family the first feature."""
    # of families with the same score, the one whose predicate comes first
    first_GL = np.where(low_GL == low_GL.max(axis=0), predicate_GL, np.iinfo(np.int64).max)
    low_L, predicate_L = low_GL.max(axis=0), first_GL.min(axis=0)
    better_L = low_L > by_feature.low[features_L]
    taken = features_L[better_L]
    by_feature.predicate[taken], by_feature.threshold[taken] = predicate_L[better_L], share
    by_feature.low[taken] = low_L[better_L]
    best_G = low_GL.argmax(axis=1)
    for g, best in enumerate(best_G):
        if low_GL[g, best] > by_family.low[g]:
            by_family.feature[g], by_family.predicate[g] = features_L[best], predicate_GL[g, best]
            by_family.threshold[g], by_family.low[g] = share, low_GL[g, best]
