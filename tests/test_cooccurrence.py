"""Sums over tokens against dense matrices: every number of a pair of layers is what numpy says of all pairs of features."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from throughline.transfer import cooccurrence
from throughline.transfer.cooccurrence import (
    Grouped,
    Moments,
    SourceFeatures,
    TargetTokens,
    best_by_chance,
    best_by_groups,
    live_features,
    relate,
)

N, U, V = 600, 23, 17


def features(num: int, seed: int, density: float = 0.1) -> np.ndarray:
    """Activations [N, num] of float32, with features that are always on, hardly change, or never fire."""
    rng = np.random.default_rng(seed)
    dense = ((rng.random((N, num)) < density) * (0.5 + rng.random((N, num)))).astype(np.float32)
    dense[:, 3] = 100 + 0.1 * dense[:, 3]
    dense[:, 5] = 0
    dense[:, 7] = 2.5
    return dense


@pytest.fixture
def dense() -> tuple[np.ndarray, np.ndarray]:
    """Source and target features, of which some are related."""
    a, b = features(U, 1), features(V, 2)
    b[:, 0] = a[:, 9] + 0.1 * b[:, 0]
    b[:, 3] += 3 * a[:, 2]
    return a, b


def layers(
    a: np.ndarray, b: np.ndarray, rows_N: np.ndarray | None = None, cuts: tuple[int, ...] = (N,)
) -> tuple[SourceFeatures, Moments, TargetTokens]:
    """All features, and those of the target at `rows_N`."""
    rows_N, places = np.arange(N) if rows_N is None else rows_N, np.array(cuts)
    source = SourceFeatures.of(sp.csr_array(a), np.arange(N), 0)
    return (
        source,
        source.moments(rows_N >= 0, places),
        TargetTokens.of(sp.csr_array(b), np.arange(b.shape[1]), rows_N, places),
    )


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All correlations; 0 for what never changes."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a.astype(np.float64), b.astype(np.float64), rowvar=False)[: a.shape[1], a.shape[1] :]
    changes = np.outer(a.std(0) > 1e-6, b.std(0) > 1e-6)
    return np.where(changes, np.nan_to_num(r), 0)


@pytest.mark.parametrize("small", [False, True])
def test_everything_of_a_pair_of_layers_is_what_dense_matrices_say(dense, small, monkeypatch):
    if (
        small
    ):  # tiles of one source feature, blocks of one token: compiled code keeps its constants, so it is run uncompiled
        monkeypatch.setattr(cooccurrence, "TILE_BYTES", 1)
        monkeypatch.setattr(cooccurrence, "BLOCK_BYTES", 1)
        for name in ("_relate", "_tokens_of_a_block"):
            monkeypatch.setattr(cooccurrence, name, getattr(cooccurrence, name).py_func)
        monkeypatch.setattr(cooccurrence, "_fetch", lambda *_: None)
    a, b = dense
    expected, both = pearson(a, b), (a > 0).T.astype(int) @ (b > 0)
    found = relate(*layers(a, b), strength=0.9, with_matrix=True)
    assert found.r_UV is not None
    np.testing.assert_allclose(found.r_UV, expected, atol=1e-6)
    for [best], r, c in ((found.source, expected, both), (found.target, expected.T, both.T)):
        np.testing.assert_allclose(best.correlation, r.max(1), atol=1e-6)
        np.testing.assert_allclose(r[np.arange(len(r)), best.partner], r.max(1), atol=1e-6)
        np.testing.assert_array_equal(best.both, c[np.arange(len(c)), best.partner])
    np.testing.assert_array_equal(found.source[0].num_active, (a > 0).sum(0))
    fewest = np.minimum.outer((a > 0).sum(0), (b > 0).sum(0))
    strong = {(int(u), int(v)): int(c) for u, v, c in found.strong}
    assert strong == {(int(u), int(v)): both[u, v] for u, v in zip(*np.nonzero(both >= 0.9 * fewest), strict=True)}
    assert len(strong) > 50


def test_ties_go_to_the_first():
    a = features(U, 1)
    twice = np.hstack([a, a])
    found = relate(*layers(a, twice))
    changing = np.flatnonzero(a.std(0) > 1e-6)
    np.testing.assert_array_equal(found.source[0].partner[changing], changing)
    np.testing.assert_array_equal(found.target[0].partner[changing + U], changing)


def test_tokens_without_a_counterpart_do_not_count(dense):
    a, b = dense
    rows_N = np.random.default_rng(0).permutation(N)
    rows_N[::5] = -1
    met = rows_N >= 0
    expected = pearson(a[met], b[rows_N[met]])
    [best_U], [best_V] = best_by_chance(*layers(a, b, rows_N))
    np.testing.assert_allclose(best_U, expected.max(1), atol=1e-6)
    np.testing.assert_allclose(best_V, expected.max(0), atol=1e-6)


def test_shuffles_within_groups_in_their_mean(dense):
    a, b = dense
    group_N = np.random.default_rng(1).integers(4, size=N)
    a[:, 11] *= group_N == 2
    b[:, 13] *= group_N == 2
    drawn = np.zeros((U, V))
    for seed in range(400):
        order, rng = np.arange(N), np.random.default_rng(seed)
        for group in range(4):
            at = np.flatnonzero(group_N == group)
            order[at] = rng.permutation(at)
        drawn += pearson(a, b[order]) / 400
    source, moments, target = layers(a, b)
    best_U, best_V = best_by_groups(Grouped.of_source(source, moments, group_N), Grouped.of_target(target, group_N))
    np.testing.assert_allclose(best_U, drawn.max(1), atol=0.01)
    np.testing.assert_allclose(best_V, drawn.max(0), atol=0.01)
    assert best_U[11] > 0.08 > 2 * np.median(best_U)


def test_live_features_are_counted_on_the_chosen_tokens(dense):
    a, b = dense
    chosen = np.arange(0, N, 3)
    counts = (a[chosen] > 0).sum(0)
    expected = np.flatnonzero(counts >= 20)
    assert 0 < len(expected) < U
    np.testing.assert_array_equal(live_features(sp.csr_array(a), chosen, 20), expected)
    source = SourceFeatures.of(sp.csr_array(a), chosen, 20)
    np.testing.assert_array_equal(source.features, expected)
    cuts = np.array([len(chosen)])
    target = TargetTokens.of(sp.csr_array(b), np.array([0, 3, 16]), chosen, cuts)
    moments = source.moments(np.ones(len(chosen), bool), cuts)
    found = relate(source, moments, target, with_matrix=True)
    np.testing.assert_allclose(found.r_UV, pearson(a[chosen][:, expected], b[chosen][:, [0, 3, 16]]), atol=1e-6)
    np.testing.assert_allclose(moments.mean_CF[0], a[chosen][:, expected].mean(0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(target.moments.mean_CF[0], b[chosen][:, [0, 3, 16]].mean(0, dtype=np.float64), rtol=1e-9)


def test_a_cut_is_what_its_tokens_alone_would_say(dense):
    a, b = dense
    rows_N = np.random.default_rng(0).permutation(N)
    rows_N[::5] = -1
    cut = relate(*layers(a, b, rows_N, cuts=(211, N)))
    by_chance = best_by_chance(*layers(a, b, rows_N, cuts=(211, N)))
    for c, num in enumerate((211, N)):
        met = np.flatnonzero(rows_N[:num] >= 0)
        expected, both = pearson(a[met], b[rows_N[met]]), (a[met] > 0).T.astype(int) @ (b[rows_N[met]] > 0)
        for bests, r, counts in ((cut.source, expected, both), (cut.target, expected.T, both.T)):
            np.testing.assert_allclose(bests[c].correlation, r.max(1), atol=1e-6)
            np.testing.assert_array_equal(bests[c].both, counts[np.arange(len(r)), bests[c].partner])
        np.testing.assert_array_equal(cut.source[c].num_active, (a[met] > 0).sum(0))
        np.testing.assert_array_equal(cut.target[c].num_active, (b[rows_N[met]] > 0).sum(0))
        np.testing.assert_allclose(by_chance[0][c], expected.max(1), atol=1e-6)
        np.testing.assert_allclose(by_chance[1][c], expected.max(0), atol=1e-6)


def test_tokens_of_features(dense):
    a, b = dense
    _, _, target = layers(a, b)
    found = target.tokens_of([2, 0, 5])
    assert list(found) == [2, 0, 5]
    for v, tokens in found.items():
        np.testing.assert_array_equal(tokens, np.flatnonzero(b[:, v] > 0))


def test_threads_change_no_bit(dense):
    given = layers(*dense)
    alone = relate(*given, with_matrix=True)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: relate(*given, with_matrix=True), range(8)):
            assert found.r_UV is not None and alone.r_UV is not None
            assert found.r_UV.tobytes() == alone.r_UV.tobytes()
