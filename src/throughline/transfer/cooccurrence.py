"""How the features of two layers go together: sums over tokens, one source feature at a time.

    p[u, v] = sum_t f_u(t) g_v(t)        c[u, v] = number of tokens on which both fire
    r[u, v] = (p / N - mean_u mean_v) / (deviation_u deviation_v), Pearson's correlation over N tokens, zeros counted

A row of these sums, one source feature with all target features, is gathered in an array that stays in the cache, made into
correlations, and forgotten but for its best entry and the best of every column. So memory grows with the number of features,
never with that of their pairs (16k features: 2 GB for each sum), and a pair of layers costs N k k' additions for k and k' active
features a token. Sums are float64 and run over the tokens in order: how many threads there are changes nothing.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit

# The sums of a few source features and the target's rows for a block of tokens are to stay in a core's cache together.
TILE_BYTES = 2**19
BLOCK_BYTES = 2**18
TILE_ROWS = 1024


class SourceFeatures(NamedTuple):
    """The live features of a layer and, one after another, the tokens on which they fire: A activations of U features."""

    width: int  # of the dictionary
    features: np.ndarray  # ids of the live ones [U]
    starts_U: np.ndarray  # int64 [U + 1]
    tokens_A: np.ndarray  # int32, ascending for each feature
    values_A: np.ndarray  # float32

    @classmethod
    def of(cls, matrix_NF: sp.csr_array, tokens_N: np.ndarray, min_count: int) -> "SourceFeatures":
        """Features that fire on `min_count` or more of the tokens chosen by index; tokens are numbered as they are chosen."""
        chosen = matrix_NF[tokens_N] if len(tokens_N) != matrix_NF.shape[0] else matrix_NF
        columns = chosen.tocsc()
        counts = np.diff(columns.indptr)
        live = np.flatnonzero(counts >= min_count)
        if len(live) < columns.shape[1]:
            columns = columns[:, live]
        starts_U, tokens_A = columns.indptr.astype(np.int64), columns.indices.astype(np.int32)
        return cls(matrix_NF.shape[1], live, starts_U, tokens_A, columns.data)


class TargetTokens(NamedTuple):
    """The tokens of a layer in a source's order and, one after another, the live features that fire on each."""

    width: int
    features: np.ndarray  # ids of the live ones [V]
    starts_N: np.ndarray  # int64 [N + 1]
    features_B: np.ndarray  # int32, 0 to V - 1
    values_B: np.ndarray  # float32
    is_met_N: np.ndarray  # False: the source's token meets none, and does not count

    @classmethod
    def of(cls, matrix_RF: sp.csr_array, features: np.ndarray, rows_N: np.ndarray) -> "TargetTokens":
        """These features at the rows that the source's tokens meet, one by one; -1 where they meet none."""
        number_F = np.full(matrix_RF.shape[1], -1, np.int32)
        number_F[features] = np.arange(len(features))
        given = (matrix_RF.indptr.astype(np.int64), matrix_RF.indices.astype(np.int32, copy=False), matrix_RF.data)
        starts_N, features_B, values_B = _gather(rows_N.astype(np.int64), *given, number_F)
        return cls(matrix_RF.shape[1], features, starts_N, features_B, values_B, rows_N >= 0)


def live_features(matrix_RF: sp.csr_array, rows_N: np.ndarray, min_count: int) -> np.ndarray:
    """Ids of the features that fire on `min_count` or more of these tokens."""
    counts_R = np.bincount(rows_N, minlength=matrix_RF.shape[0])
    return np.flatnonzero((matrix_RF != 0).T @ counts_R >= min_count)


class Best(NamedTuple):
    """For each of a layer's live features the one of the other layer that correlates most; ties go to the first."""

    features: np.ndarray  # ids
    num_active: np.ndarray  # tokens on which it fires
    correlation: np.ndarray
    partner: np.ndarray  # index into the other layer's live features
    both: np.ndarray  # tokens on which it and its partner fire


class Related(NamedTuple):
    """Two layers: the best partners in both directions, and pairs that nearly imply one another."""

    source: Best
    target: Best
    r_UV: np.ndarray | None  # all correlations, if asked for
    strong: np.ndarray  # [pairs, 3] indices of a source and a target feature, and on how many tokens both fire


def relate(
    source: SourceFeatures, target: TargetTokens, *, strength: float = 2.0, with_matrix: bool = False
) -> Related:
    """Relate every source feature to every target feature.

    `strong` lists pairs in which one feature fires on a share of at least `strength` of the other's tokens.
    """
    num, ours, theirs = _moments(source, target)
    U, V = len(source.features), len(target.features)
    best = [_Empty.of(U), _Empty.of(V)]
    r_UV = np.zeros((U, V) if with_matrix else (0, 0))
    strong = _relate(*source[2:], *target[2:5], num, *ours, *theirs, strength, *best[0], *best[1], r_UV)
    one = Best(source.features, ours[0], *best[0])
    other = Best(target.features, theirs[0], *best[1])
    return Related(one, other, r_UV if with_matrix else None, strong)


def best_by_chance(source: SourceFeatures, target: TargetTokens) -> tuple[np.ndarray, np.ndarray]:
    """The highest correlation of each source and of each target feature, for tokens that were put together by chance."""
    num, ours, theirs = _moments(source, target)
    best_U, best_V = (np.full(len(features), -np.inf) for features in (source.features, target.features))
    _best_by_chance(*source[2:], *target[2:5], num, *ours[1:], *theirs[1:], best_U, best_V)
    return best_U, best_V


def best_by_groups(source: SourceFeatures, target: TargetTokens, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest correlation of each source and each target feature if tokens were shuffled within their groups.

    In the mean over all shuffles, in closed form: the covariance of the groups' means.
    """
    num, ours, theirs = _moments(source, target)
    num_groups = int(group_N.max(initial=0)) + 1
    sums_UG, sums_VG = _sums_by_group(*source[2:], *target[2:5], len(theirs[0]), group_N.astype(np.int64), num_groups)
    share_G = 1 / np.maximum(np.bincount(group_N, minlength=num_groups), 1)
    best_U, best_V = (np.full(len(side[0]), -np.inf) for side in (ours, theirs))
    for first in range(0, len(best_U), TILE_ROWS):
        tile = slice(first, first + TILE_ROWS)
        r = (sums_UG[tile] * share_G) @ sums_VG.T / num - np.outer(ours[1][tile], theirs[1])
        r *= np.outer(ours[2][tile], theirs[2])
        best_U[tile], best_V = r.max(1), np.maximum(best_V, r.max(0))
    return best_U, best_V


def masses_of(source: SourceFeatures, target: TargetTokens) -> tuple[np.ndarray, np.ndarray]:
    """Summed activations of the live features of both."""
    num, ours, theirs = _moments(source, target)
    return ours[1] * num, theirs[1] * num


class _Empty(NamedTuple):
    correlation: np.ndarray
    partner: np.ndarray
    both: np.ndarray

    @classmethod
    def of(cls, num: int) -> "_Empty":
        return cls(np.full(num, -np.inf), np.zeros(num, np.int64), np.zeros(num, np.int64))


_Moments = tuple[np.ndarray, np.ndarray, np.ndarray]


def _moments(source: SourceFeatures, target: TargetTokens) -> tuple[int, _Moments, _Moments]:
    """How many tokens meet; count of active tokens, mean, and 1 / deviation (0 for what never changes) of both sides' features."""
    num = int(target.is_met_N.sum())
    ours = _moments_of_columns(*source[2:], target.is_met_N)
    theirs = _moments_of_rows(target.features_B, target.values_B, len(target.features))
    return num, _scaled(max(1, num), *ours), _scaled(max(1, num), *theirs)


def _scaled(
    num: int, counts: np.ndarray, sums: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = sums / num
    deviation = np.sqrt(np.maximum(squares / num - mean**2, 0))
    return counts, mean, np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)


# ---- compiled


@njit(nogil=True, cache=True)
def _gather(rows_N: Any, starts_R: Any, features_A: Any, values_A: Any, number_F: Any) -> Any:
    starts_N = np.zeros(len(rows_N) + 1, np.int64)
    most = 0
    for row in rows_N:
        most += starts_R[row + 1] - starts_R[row] if row >= 0 else 0
    features_B, values_B, num = np.empty(most, np.int32), np.empty(most, np.float32), 0
    for n in range(len(rows_N)):
        row = rows_N[n]
        if row >= 0:
            for a in range(starts_R[row], starts_R[row + 1]):
                number = number_F[features_A[a]]
                if number >= 0:
                    features_B[num], values_B[num] = number, values_A[a]
                    num += 1
        starts_N[n + 1] = num
    return starts_N, features_B[:num], values_B[:num]


@njit(nogil=True, cache=True)
def _moments_of_columns(starts_U: Any, tokens_A: Any, values_A: Any, is_met_N: Any) -> Any:
    U = len(starts_U) - 1
    counts, sums, squares = np.zeros(U, np.int64), np.zeros(U), np.zeros(U)
    for u in range(U):
        for a in range(starts_U[u], starts_U[u + 1]):
            if is_met_N[tokens_A[a]]:
                value = np.float64(values_A[a])
                counts[u] += 1
                sums[u] += value
                squares[u] += value * value
    return counts, sums, squares


@njit(nogil=True, cache=True)
def _moments_of_rows(features_B: Any, values_B: Any, num_features: int) -> Any:
    counts, sums, squares = np.zeros(num_features, np.int64), np.zeros(num_features), np.zeros(num_features)
    for b in range(len(features_B)):
        v, value = features_B[b], np.float64(values_B[b])
        counts[v] += 1
        sums[v] += value
        squares[v] += value * value
    return counts, sums, squares


@njit(nogil=True, cache=True)
def _sums_by_group(
    starts_U: Any,
    tokens_A: Any,
    values_A: Any,
    starts_N: Any,
    features_B: Any,
    values_B: Any,
    V: int,
    group_N: Any,
    num_groups: int,
) -> Any:
    sums_UG, sums_VG = np.zeros((len(starts_U) - 1, num_groups)), np.zeros((V, num_groups))
    for u in range(len(starts_U) - 1):
        for a in range(starts_U[u], starts_U[u + 1]):
            sums_UG[u, group_N[tokens_A[a]]] += values_A[a]
    for n in range(len(starts_N) - 1):
        for b in range(starts_N[n], starts_N[n + 1]):
            sums_VG[features_B[b], group_N[n]] += values_B[b]
    return sums_UG, sums_VG


@njit(nogil=True, cache=True)
def _tokens_of_a_block(starts_N: Any) -> int:
    """How many tokens' target features fit into the cache."""
    return max(1, (len(starts_N) - 1) * BLOCK_BYTES // max(1, 8 * starts_N[-1]))


@njit(nogil=True, cache=True)
def _relate(
    starts_U: Any,
    tokens_A: Any,
    values_A: Any,
    starts_N: Any,
    features_B: Any,
    values_B: Any,
    num: int,
    count_U: Any,
    mean_U: Any,
    scale_U: Any,
    count_V: Any,
    mean_V: Any,
    scale_V: Any,
    strength: float,
    best_U: Any,
    partner_U: Any,
    both_U: Any,
    best_V: Any,
    partner_V: Any,
    both_V: Any,
    r_UV: Any,
) -> Any:
    U, V, N = len(count_U), len(count_V), len(starts_N) - 1
    tile, block = max(1, TILE_BYTES // (16 * max(1, V))), _tokens_of_a_block(starts_N)
    sums = np.zeros((min(tile, U), V, 2))  # product and count side by side, so that both are fetched at once
    place_U = starts_U[:-1].copy()
    strong, num_strong = np.empty((256, 3), np.int64), 0
    for first in range(0, U, tile):
        last = min(first + tile, U)
        sums[:] = 0
        for begin in range(0, N, block):
            for u in range(first, last):
                of_u, a = sums[u - first], place_U[u]
                while a < starts_U[u + 1] and tokens_A[a] < begin + block:
                    n, value = tokens_A[a], np.float64(values_A[a])
                    for b in range(starts_N[n], starts_N[n + 1]):
                        of_u[features_B[b], 0] += value * values_B[b]
                        of_u[features_B[b], 1] += 1
                    a += 1
                place_U[u] = a
        for u in range(first, last):
            for v in range(V):
                both = np.int64(sums[u - first, v, 1])
                r = (sums[u - first, v, 0] / num - mean_U[u] * mean_V[v]) * scale_U[u] * scale_V[v]
                if len(r_UV):
                    r_UV[u, v] = r
                if r > best_U[u]:
                    best_U[u], partner_U[u], both_U[u] = r, v, both
                if r > best_V[v]:
                    best_V[v], partner_V[v], both_V[v] = r, u, both
                if both >= strength * min(count_U[u], count_V[v]):
                    if num_strong == len(strong):
                        longer = np.empty((2 * len(strong), 3), np.int64)
                        longer[:num_strong] = strong
                        strong = longer
                    strong[num_strong, 0], strong[num_strong, 1], strong[num_strong, 2] = u, v, both
                    num_strong += 1
    return strong[:num_strong]


@njit(nogil=True, cache=True)
def _best_by_chance(
    starts_U: Any,
    tokens_A: Any,
    values_A: Any,
    starts_N: Any,
    features_B: Any,
    values_B: Any,
    num: int,
    mean_U: Any,
    scale_U: Any,
    mean_V: Any,
    scale_V: Any,
    best_U: Any,
    best_V: Any,
) -> None:
    U, V, N = len(mean_U), len(mean_V), len(starts_N) - 1
    tile, block = max(1, TILE_BYTES // (8 * max(1, V))), _tokens_of_a_block(starts_N)
    sums = np.zeros((min(tile, U), V))
    place_U = starts_U[:-1].copy()
    for first in range(0, U, tile):
        last = min(first + tile, U)
        sums[:] = 0
        for begin in range(0, N, block):
            for u in range(first, last):
                of_u, a = sums[u - first], place_U[u]
                while a < starts_U[u + 1] and tokens_A[a] < begin + block:
                    n, value = tokens_A[a], np.float64(values_A[a])
                    for b in range(starts_N[n], starts_N[n + 1]):
                        of_u[features_B[b]] += value * values_B[b]
                    a += 1
                place_U[u] = a
        for u in range(first, last):
            for v in range(V):
                r = (sums[u - first, v] / num - mean_U[u] * mean_V[v]) * scale_U[u] * scale_V[v]
                best_U[u] = max(best_U[u], r)
                best_V[v] = max(best_V[v], r)
