"""How the features of two layers go together: sums over tokens, one source feature at a time.

    p[u, v] = sum_t f_u(t) g_v(t)        c[u, v] = number of tokens on which both fire
    r[u, v] = (p / N - mean_u mean_v) / (deviation_u deviation_v), Pearson's correlation over N tokens, zeros counted

A few rows of these sums, some source features with all target features, are gathered where they stay in the cache, made into
correlations, and forgotten but for the best of every row and column. So memory grows with the number of features, never with that
of their pairs (16k features: 2 GB for each sum), and a pair of layers costs N k k' additions for k and k' active features a token.
Sums are float64 and run over the tokens in order: how many threads there are changes nothing. They are looked at after each of
`cuts` tokens, so that a part of the tokens that stands first is related for nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from throughline.kernel_cache import njit
from throughline.transfer.prefetching import prefetch

# The sums of a few source features and the target's features for a block of tokens are to stay in a core's cache together.
TILE_BYTES = 2**19
BLOCK_BYTES = 2**18
TILE_ROWS = 1024
AHEAD = 4  # tokens after the current one whose target features are fetched: they lie anywhere in a block
GROUP = 4  # a token's target features are padded to groups: an inner loop without branches


class Moments(NamedTuple):
    """By cut [C] and feature: tokens that count, those on which the feature fires, mean, 1 / deviation (0 if it never changes)."""

    num_C: np.ndarray
    count_CF: np.ndarray
    mean_CF: np.ndarray
    scale_CF: np.ndarray

    @classmethod
    def of(cls, num_C: np.ndarray, sums: tuple[np.ndarray, np.ndarray, np.ndarray]) -> "Moments":
        """From how often, the sum, and the sum of squares."""
        count_CF, sum_CF, square_CF = sums
        num_C1 = np.maximum(num_C, 1)[:, None]
        mean_CF = sum_CF / num_C1
        deviation_CF = np.sqrt(np.maximum(square_CF / num_C1 - mean_CF**2, 0))
        scale_CF = np.divide(1, deviation_CF, out=np.zeros_like(deviation_CF), where=deviation_CF > 0)
        return cls(num_C, count_CF, mean_CF, scale_CF)


class SourceFeatures(NamedTuple):
    """The live features of a layer and, one after another, the tokens on which they fire: A activations of U features."""

    features: np.ndarray  # ids of the live ones [U]
    starts_U: np.ndarray  # int64 [U + 1]
    tokens_A: np.ndarray  # uint32, ascending for each feature
    values_A: np.ndarray  # float32

    @classmethod
    def of(cls, matrix_RF: sp.csr_array, rows_N: np.ndarray, min_count: int) -> "SourceFeatures":
        """Features that fire on `min_count` or more of these rows; tokens are numbered in their order."""
        starts, indices = matrix_RF.indptr, matrix_RF.indices
        count_F = _counts(rows_N, starts, indices, matrix_RF.shape[1])
        live = np.flatnonzero(count_F >= min_count)
        starts_U = np.r_[0, np.cumsum(count_F[live])]
        return cls(
            live, starts_U, *_transposed(rows_N, starts, indices, matrix_RF.data, _numbers(matrix_RF, live), starts_U)
        )

    def moments(self, is_met_N: np.ndarray, cuts: np.ndarray) -> Moments:
        """Over the tokens that meet one of the target's."""
        num_C = np.cumsum(is_met_N)[cuts - 1]
        return Moments.of(num_C, _moments_of_columns(*self[1:], is_met_N, cuts))

    def tokens_of(self, u: int) -> np.ndarray:
        """Where the u-th live feature fires."""
        return self.tokens_A[self.starts_U[u] : self.starts_U[u + 1]]


class TargetTokens(NamedTuple):
    """The tokens of a layer in a source's order and, one after another, the live features that fire on each, in padded groups."""

    features: np.ndarray  # ids of the live ones [V]
    starts_N: np.ndarray  # int64 [N + 1], counts groups
    features_B: np.ndarray  # 0 to V - 1, V for padding
    values_B: np.ndarray  # float32, 0 for padding
    is_met_N: np.ndarray  # False: the source's token meets none, and does not count
    cuts: np.ndarray
    moments: Moments

    @classmethod
    def of(cls, matrix_RF: sp.csr_array, features: np.ndarray, rows_N: np.ndarray, cuts: np.ndarray) -> "TargetTokens":
        """These features at the rows that the source's tokens meet, one by one; -1 where they meet none."""
        given = (matrix_RF.indptr, matrix_RF.indices, matrix_RF.data, _numbers(matrix_RF, features))
        dtype = np.uint16 if len(features) < 2**16 else np.uint32
        starts, tokens, values = _gather(rows_N, *given, len(features), np.empty(0, dtype))
        sums = _moments_of_rows(starts, tokens, values, len(features), cuts)
        moments = Moments.of(np.cumsum(rows_N >= 0)[cuts - 1], sums)
        return cls(features, starts, tokens, values, rows_N >= 0, cuts, moments)

    def tokens_of(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Where each of these live features fires, ascending."""
        place_V = np.full(len(self.features) + 1, -1, np.int64)
        place_V[list(wanted)] = np.arange(len(wanted))
        ends = np.cumsum(self.moments.count_CF[-1][list(wanted)])
        tokens = _tokens_of(self.starts_N, self.features_B, place_V, np.r_[0, ends])
        return dict(zip(wanted, np.split(tokens, ends[:-1]), strict=True))


def live_features(matrix_RF: sp.csr_array, rows_N: np.ndarray, min_count: int) -> np.ndarray:
    """Ids of the features that fire on `min_count` or more of these rows."""
    return np.flatnonzero(_counts(rows_N, matrix_RF.indptr, matrix_RF.indices, matrix_RF.shape[1]) >= min_count)


def _numbers(matrix_RF: sp.csr_array, live: np.ndarray) -> np.ndarray:
    """Of each feature its place among the live ones; -1 if it is not of them."""
    number_F = np.full(matrix_RF.shape[1], -1, np.int32)
    number_F[live] = np.arange(len(live))
    return number_F


class Best(NamedTuple):
    """For each of a layer's live features the one of the other layer that correlates most; ties go to the first."""

    features: np.ndarray  # ids
    num_active: np.ndarray  # tokens on which it fires
    correlation: np.ndarray
    partner: np.ndarray  # index into the other layer's live features
    both: np.ndarray  # tokens on which it and its partner fire


class Related(NamedTuple):
    """Two layers: the best partners in both directions at each cut, and of all tokens pairs that nearly imply one another."""

    source: list[Best]
    target: list[Best]
    r_UV: np.ndarray | None  # all correlations, if asked for
    strong: np.ndarray  # [pairs, 3] indices of a source and a target feature, and on how many tokens both fire


def relate(
    source: SourceFeatures, moments: Moments, target: TargetTokens, *, strength: float = 2.0, with_matrix: bool = False
) -> Related:
    """Relate every source feature to every target feature; `moments` are the source's over the tokens that meet the target's.

    `strong` lists pairs in which one feature fires on a share of at least `strength` of the other's tokens.
    """
    C, U, V = len(target.cuts), len(source.features), len(target.features)
    best = [(np.full((C, F), -np.inf), np.zeros((C, F), np.int64), np.zeros((C, F), np.int64)) for F in (U, V)]
    r_UV = np.zeros((U, V) if with_matrix else (0, 0))
    strong = _relate(
        *source[1:], *target[1:4], target.cuts, *moments, *target.moments[1:], strength, *best[0], *best[1], r_UV
    )
    return Related(
        [Best(source.features, moments.count_CF[c], *(array[c] for array in best[0])) for c in range(C)],
        [Best(target.features, target.moments.count_CF[c], *(array[c] for array in best[1])) for c in range(C)],
        r_UV if with_matrix else None,
        strong,
    )


def best_by_chance(source: SourceFeatures, moments: Moments, target: TargetTokens) -> tuple[np.ndarray, np.ndarray]:
    """The highest correlation of each source [C, U] and target feature [C, V], for tokens put together by chance."""
    best = [np.full((len(target.cuts), len(side.features)), -np.inf) for side in (source, target)]
    _best_by_chance(*source[1:], *target[1:4], target.cuts, *moments, *target.moments[1:], *best)
    return best[0], best[1]


def best_by_groups(source: "Grouped", target: "Grouped") -> tuple[np.ndarray, np.ndarray]:
    """The highest correlation of each source and each target feature if all tokens were shuffled within their groups.

    In the mean over all shuffles, in closed form: the covariance of the groups' means.
    """
    num = int(source.moments.num_C[-1])
    best_U, best_V = (np.full(len(side.sums_FG), -np.inf) for side in (source, target))
    (mean_U, scale_U), (mean_V, scale_V) = ((s.moments.mean_CF[-1], s.moments.scale_CF[-1]) for s in (source, target))
    for first in range(0, len(best_U), TILE_ROWS):
        tile = slice(first, first + TILE_ROWS)
        r = (source.sums_FG[tile] * source.share_G) @ target.sums_FG.T / num - np.outer(mean_U[tile], mean_V)
        r *= np.outer(scale_U[tile], scale_V)
        best_U[tile], best_V = r.max(1), np.maximum(best_V, r.max(0))
    return best_U, best_V


class Grouped(NamedTuple):
    """One layer's activations summed up by G groups of tokens; `share_G` is 1 / tokens of a group."""

    moments: Moments
    sums_FG: np.ndarray
    share_G: np.ndarray

    @classmethod
    def of_source(cls, source: SourceFeatures, moments: Moments, group_N: np.ndarray) -> "Grouped":
        """Of a source's features, all of whose tokens meet one of the target's."""
        num_N = np.bincount(group_N)
        return cls(moments, _sums_of_columns(*source[1:], group_N, len(num_N)), 1 / np.maximum(num_N, 1))

    @classmethod
    def of_target(cls, target: TargetTokens, group_N: np.ndarray) -> "Grouped":
        """Of a target's features."""
        num_N, num = np.bincount(group_N), len(target.features)
        sums_FG = _sums_of_rows(target.starts_N, target.features_B, target.values_B, num, group_N, len(num_N))
        return cls(target.moments, sums_FG, 1 / np.maximum(num_N, 1))


# ---- compiled


@njit(nogil=True)
def _counts(rows_N: Any, starts_R: Any, features_A: Any, F: int) -> Any:
    count_F = np.zeros(F, np.int64)
    for row in rows_N:
        for a in range(starts_R[row], starts_R[row + 1]):
            count_F[features_A[a]] += 1
    return count_F


@njit(nogil=True)
def _transposed(rows_N: Any, starts_R: Any, features_A: Any, values_A: Any, number_F: Any, starts_U: Any) -> Any:
    tokens, values, next_U = np.empty(starts_U[-1], np.uint32), np.empty(starts_U[-1], np.float32), starts_U.copy()
    for n in range(len(rows_N)):
        for a in range(starts_R[rows_N[n]], starts_R[rows_N[n] + 1]):
            u = number_F[features_A[a]]
            if u >= 0:
                tokens[next_U[u]], values[next_U[u]] = n, values_A[a]
                next_U[u] += 1
    return tokens, values


@njit(nogil=True)
def _gather(
    rows_N: Any, starts_R: Any, features_A: Any, values_A: Any, number_F: Any, padding: int, nothing: Any
) -> Any:
    starts_N = np.zeros(len(rows_N) + 1, np.int64)
    for n in range(len(rows_N)):
        num, row = 0, rows_N[n]
        if row >= 0:
            for a in range(starts_R[row], starts_R[row + 1]):
                num += 1 if number_F[features_A[a]] >= 0 else 0
        starts_N[n + 1] = starts_N[n] + (num + GROUP - 1) // GROUP
    size = GROUP * starts_N[-1]
    features_B, values_B = np.full(size, padding, nothing.dtype), np.zeros(size, np.float32)
    for n in range(len(rows_N)):
        b, row = GROUP * starts_N[n], rows_N[n]
        if row >= 0:
            for a in range(starts_R[row], starts_R[row + 1]):
                number = number_F[features_A[a]]
                if number >= 0:
                    features_B[b], values_B[b] = number, values_A[a]
                    b += 1
    return starts_N, features_B, values_B


@njit(nogil=True)
def _tokens_of(starts_N: Any, features_B: Any, place_V: Any, places: Any) -> Any:
    tokens, next_W = np.empty(places[-1], np.uint32), places.copy()
    for n in range(len(starts_N) - 1):
        for b in range(GROUP * starts_N[n], GROUP * starts_N[n + 1]):
            w = place_V[features_B[b]]
            if w >= 0:
                tokens[next_W[w]] = n
                next_W[w] += 1
    return tokens


@njit(nogil=True)
def _moments_of_columns(starts_U: Any, tokens_A: Any, values_A: Any, is_met_N: Any, cuts: Any) -> Any:
    C, U = len(cuts), len(starts_U) - 1
    counts, sums, squares = np.zeros((C, U), np.int64), np.zeros((C, U)), np.zeros((C, U))
    for u in range(U):
        count, total, square, a = 0, 0.0, 0.0, starts_U[u]
        for c in range(C):
            while a < starts_U[u + 1] and tokens_A[a] < cuts[c]:
                if is_met_N[tokens_A[a]]:
                    value = np.float64(values_A[a])
                    count += 1
                    total += value
                    square += value * value
                a += 1
            counts[c, u], sums[c, u], squares[c, u] = count, total, square
    return counts, sums, squares


@njit(nogil=True)
def _moments_of_rows(starts_N: Any, features_B: Any, values_B: Any, V: int, cuts: Any) -> Any:
    C, begin = len(cuts), 0
    counts, sums, squares = np.zeros((C, V + 1), np.int64), np.zeros((C, V + 1)), np.zeros((C, V + 1))
    for c in range(C):
        if c > 0:
            counts[c], sums[c], squares[c] = counts[c - 1], sums[c - 1], squares[c - 1]
        for b in range(GROUP * starts_N[begin], GROUP * starts_N[cuts[c]]):
            v, value = features_B[b], np.float64(values_B[b])
            counts[c, v] += 1
            sums[c, v] += value
            squares[c, v] += value * value
        begin = cuts[c]
    return counts[:, :V].copy(), sums[:, :V].copy(), squares[:, :V].copy()


@njit(nogil=True)
def _sums_of_columns(starts_U: Any, tokens_A: Any, values_A: Any, group_N: Any, num_groups: int) -> Any:
    sums_UG = np.zeros((len(starts_U) - 1, num_groups))
    for u in range(len(starts_U) - 1):
        for a in range(starts_U[u], starts_U[u + 1]):
            sums_UG[u, group_N[tokens_A[a]]] += values_A[a]
    return sums_UG


@njit(nogil=True)
def _sums_of_rows(starts_N: Any, features_B: Any, values_B: Any, V: int, group_N: Any, num_groups: int) -> Any:
    sums_VG = np.zeros((V + 1, num_groups))
    for n in range(len(starts_N) - 1):
        for b in range(GROUP * starts_N[n], GROUP * starts_N[n + 1]):
            sums_VG[features_B[b], group_N[n]] += values_B[b]
    return sums_VG[:V].copy()


@njit(nogil=True)
def _tokens_of_a_block(starts_N: Any) -> int:
    """How many tokens' target features fit into the cache."""
    return max(1, (len(starts_N) - 1) * BLOCK_BYTES // max(1, 6 * GROUP * starts_N[-1]))


@njit(nogil=True, inline="always")
def _fetch(features_B: Any, values_B: Any, group: Any) -> None:
    b = np.uint64(GROUP * group)
    prefetch(features_B, b)
    prefetch(values_B, b)
    prefetch(values_B, b + np.uint64(16))


@njit(nogil=True, inline="always")
def _pearson(product: Any, num: Any, mean_u: Any, mean_v: Any, scale_u: Any, scale_v: Any) -> Any:
    return (product / num - mean_u * mean_v) * scale_u * scale_v


@njit(nogil=True)
def _relate(
    starts_U: Any,
    tokens_A: Any,
    values_A: Any,
    starts_N: Any,
    features_B: Any,
    values_B: Any,
    cuts: Any,
    num_C: Any,
    count_CU: Any,
    mean_CU: Any,
    scale_CU: Any,
    count_CV: Any,
    mean_CV: Any,
    scale_CV: Any,
    strength: float,
    best_CU: Any,
    partner_CU: Any,
    both_CU: Any,
    best_CV: Any,
    partner_CV: Any,
    both_CV: Any,
    r_UV: Any,
) -> Any:
    C, U, V = len(cuts), count_CU.shape[1], count_CV.shape[1]
    tile, block = max(1, TILE_BYTES // (16 * (V + 1))), _tokens_of_a_block(starts_N)
    sums = np.zeros((min(tile, U), V + 1, 2))  # product and count side by side, so that both are fetched at once
    place_U = starts_U[:-1].copy()
    strong, num_strong = np.empty((256, 3), np.int64), 0
    for first in range(0, U, tile):
        last, begin = min(first + tile, U), 0
        sums[:] = 0
        for c in range(C):
            for start in range(begin, cuts[c], block):
                end = min(start + block, cuts[c])
                for u in range(first, last):
                    of_u, a, stop = sums[u - first], place_U[u], starts_U[u + 1]
                    while a < stop and tokens_A[a] < end:
                        if a + AHEAD < stop:
                            _fetch(features_B, values_B, starts_N[tokens_A[a + AHEAD]])
                        n, value = tokens_A[a], np.float64(values_A[a])
                        for group in range(starts_N[n], starts_N[n + 1]):
                            b = np.uint64(GROUP * group)
                            v0, v1 = features_B[b], features_B[b + np.uint64(1)]
                            v2, v3 = features_B[b + np.uint64(2)], features_B[b + np.uint64(3)]
                            of_u[v0, 0] += value * values_B[b]
                            of_u[v0, 1] += 1
                            of_u[v1, 0] += value * values_B[b + np.uint64(1)]
                            of_u[v1, 1] += 1
                            of_u[v2, 0] += value * values_B[b + np.uint64(2)]
                            of_u[v2, 1] += 1
                            of_u[v3, 0] += value * values_B[b + np.uint64(3)]
                            of_u[v3, 1] += 1
                        a += 1
                    place_U[u] = a
            begin = cuts[c]
            for u in range(first, last):
                for v in range(V):
                    both = np.int64(sums[u - first, v, 1])
                    product = sums[u - first, v, 0]
                    r = _pearson(product, num_C[c], mean_CU[c, u], mean_CV[c, v], scale_CU[c, u], scale_CV[c, v])
                    if r > best_CU[c, u]:
                        best_CU[c, u], partner_CU[c, u], both_CU[c, u] = r, v, both
                    if r > best_CV[c, v]:
                        best_CV[c, v], partner_CV[c, v], both_CV[c, v] = r, u, both
                    if c < C - 1:
                        continue
                    if len(r_UV):
                        r_UV[u, v] = r
                    if both >= strength * min(count_CU[c, u], count_CV[c, v]):
                        if num_strong == len(strong):
                            longer = np.empty((2 * len(strong), 3), np.int64)
                            longer[:num_strong] = strong
                            strong = longer
                        strong[num_strong, 0], strong[num_strong, 1], strong[num_strong, 2] = u, v, both
                        num_strong += 1
    return strong[:num_strong]


@njit(nogil=True)
def _best_by_chance(
    starts_U: Any,
    tokens_A: Any,
    values_A: Any,
    starts_N: Any,
    features_B: Any,
    values_B: Any,
    cuts: Any,
    num_C: Any,
    _count_CU: Any,
    mean_CU: Any,
    scale_CU: Any,
    _count_CV: Any,
    mean_CV: Any,
    scale_CV: Any,
    best_CU: Any,
    best_CV: Any,
) -> None:
    U, V = mean_CU.shape[1], mean_CV.shape[1]
    tile, block = max(1, TILE_BYTES // (8 * (V + 1))), _tokens_of_a_block(starts_N)
    sums = np.zeros((min(tile, U), V + 1))
    place_U = starts_U[:-1].copy()
    for first in range(0, U, tile):
        last, begin = min(first + tile, U), 0
        sums[:] = 0
        for c in range(len(cuts)):
            for start in range(begin, cuts[c], block):
                end = min(start + block, cuts[c])
                for u in range(first, last):
                    of_u, a, stop = sums[u - first], place_U[u], starts_U[u + 1]
                    while a < stop and tokens_A[a] < end:
                        if a + AHEAD < stop:
                            _fetch(features_B, values_B, starts_N[tokens_A[a + AHEAD]])
                        n, value = tokens_A[a], np.float64(values_A[a])
                        for group in range(starts_N[n], starts_N[n + 1]):
                            b = np.uint64(GROUP * group)
                            of_u[features_B[b]] += value * values_B[b]
                            of_u[features_B[b + np.uint64(1)]] += value * values_B[b + np.uint64(1)]
                            of_u[features_B[b + np.uint64(2)]] += value * values_B[b + np.uint64(2)]
                            of_u[features_B[b + np.uint64(3)]] += value * values_B[b + np.uint64(3)]
                        a += 1
                    place_U[u] = a
            begin = cuts[c]
            for u in range(first, last):
                for v in range(V):
                    product = sums[u - first, v]
                    r = _pearson(product, num_C[c], mean_CU[c, u], mean_CV[c, v], scale_CU[c, u], scale_CV[c, v])
                    best_CU[c, u] = max(best_CU[c, u], r)
                    best_CV[c, v] = max(best_CV[c, v], r)
