"""CKA, SVCCA and RSA against dense formulas, their invariances, and what shuffled tokens leave of them."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from builders import GivenSide, make_codes, random_dictionary, random_documents
from throughline.errors import InputError
from throughline.transfer import Side
from throughline.transfer.similarity import MOST_TOKENS, RSA_TOKENS, Similarity

DOCUMENTS = random_documents(120, seed=0, answers=True)
CODES = make_codes(DOCUMENTS)
N = CODES.num_tokens
MEASURES = ("value", "svcca", "rsa")


def activations(width: int, seed: int, rank: int = 5, noise: float = 0.3) -> np.ndarray:
    """[N, width]: a few strong directions of what seed 0 draws, noise of their own, and a mean."""
    shared = np.random.default_rng(0).standard_normal((N, rank)) * np.arange(rank, 0, -1)
    rng = np.random.default_rng(seed)
    return (shared @ rng.standard_normal((rank, width)) + noise * rng.standard_normal((N, width)) + 3).astype(
        np.float32
    )


def unrelated(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, width)).astype(np.float32)


def side_of(model: str, *layers: np.ndarray) -> Side:
    codes = replace(CODES, residual_LND=np.stack(layers))
    dictionaries = {i: random_dictionary(x.shape[1], 8) for i, x in enumerate(layers)}
    return GivenSide(model, dictionaries, codes, codes, codes)


def compare(x_ND: np.ndarray, y_NE: np.ndarray, seed: int = 0) -> dict[str, float]:
    arrays = Similarity().compute(side_of("a", x_ND), side_of("b", y_NE), seed=seed, min_count=1)[0].arrays
    return {name: float(array[0, 0]) for name, array in arrays.items()}


def by_hand(x_ND: np.ndarray, y_NE: np.ndarray) -> dict[str, float]:
    """CKA from Gram matrices, canonical correlations as cosines of principal angles, Spearman's from scipy; all in float64."""
    x, y = (a.astype(np.float64) - a.astype(np.float64).mean(0) for a in (x_ND, y_NE))
    K, L = x @ x.T, y @ y.T
    spaces = []
    for a in (x, y):
        U, s, _ = np.linalg.svd(a, full_matrices=False)
        kept = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.99)) + 1
        spaces.append(U[:, :kept])
    return {
        "value": float((K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum())),
        "svcca": float(np.cos(scipy.linalg.subspace_angles(*spaces)).mean()),
        "rsa": float(spearmanr(pdist(x, "cosine"), pdist(y, "cosine")).statistic),
    }


def test_all_three_are_the_dense_formulas(monkeypatch):
    monkeypatch.setattr("throughline.transfer.similarity.RSA_TOKENS", N)
    assert N < MOST_TOKENS
    for x, y in ((activations(20, 1), activations(33, 2)), (activations(20, 1), unrelated(20, 5))):
        found, expected = compare(x, y), by_hand(x, y)
        for name in MEASURES:
            assert found[name] == pytest.approx(expected[name], abs=2e-5), name


def test_wide_layers_are_multiplied_strip_by_strip(monkeypatch):
    whole = compare(activations(20, 1), activations(33, 2))
    monkeypatch.setattr("throughline.transfer.similarity.BLOCK_ROWS", 7)
    assert compare(activations(20, 1), activations(33, 2)) == pytest.approx(whole, abs=1e-5)


def test_rotation_scale_and_mean_do_not_count():
    x, y = activations(20, 1), activations(33, 2)
    R = np.linalg.qr(np.random.default_rng(3).standard_normal((33, 33)))[0].astype(np.float32)
    same = compare(x, y)
    moved = compare(5 * x - 2, 0.1 * (y @ R))
    for name in MEASURES:
        assert moved[name] == pytest.approx(same[name], abs=1e-4), name
        assert compare(y, 3 * y @ R)[name] == pytest.approx(1, abs=1e-4), name


def test_independent_layers_are_at_the_null():
    """CKA and SVCCA of so few tokens are far above 0, and so are their nulls."""
    found = compare(unrelated(80, 4), unrelated(60, 5))
    assert found["value"] == pytest.approx(found["null"], rel=0.1) and found["null"] > 0.05
    assert found["value"] < found["null_high"] * 1.05
    assert found["svcca"] == pytest.approx(found["null_svcca"], rel=0.1) and found["null_svcca"] > 0.1
    assert abs(found["rsa"]) < 0.03 and abs(found["null_rsa"]) < 0.02
    shared = compare(activations(80, 1), activations(60, 2))
    for name, null in (("value", "null_high"), ("svcca", "null_svcca"), ("rsa", "null_rsa_high")):
        assert shared[name] > shared[null] + 0.3, name


def test_the_mean_null_is_what_permutations_give_on_average():
    """E|X^T P Y|^2 = tr(X^T X) tr(Y^T Y) / (N - 1) over all permutations P of centred rows."""
    x, y = activations(20, 1), activations(33, 2)
    found = compare(x, y)
    a, b = (t.astype(np.float64) - t.astype(np.float64).mean(0) for t in (x, y))
    expected = (a**2).sum() * (b**2).sum() / (N - 1) / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert found["null"] == pytest.approx(expected, rel=0.2) and found["null"] < found["null_high"]


def test_what_the_kind_of_position_explains_is_shown():
    """Layers that tell roles apart and share nothing else are similar, and as similar when shuffled within roles."""
    roles = np.unique(CODES.roles_N, return_inverse=True)[1]
    layers = [
        (3 * np.random.default_rng(seed).standard_normal((roles.max() + 1, 30))[roles] + unrelated(30, seed)).astype(
            np.float32
        )
        for seed in (1, 2)
    ]
    found = compare(*layers)
    assert found["value"] > found["null_high"] + 0.2
    assert found["null_role"] == pytest.approx(found["value"], rel=0.1)


def test_the_interval_widens_with_fewer_documents_and_holds_the_value():
    x, y = activations(20, 1, noise=4), activations(33, 2, noise=4)
    found = compare(x, y)
    assert found["low"] < found["value"] < found["high"] < found["low"] + 0.1
    few = make_codes(DOCUMENTS[:20])
    sides = [
        GivenSide(name, {0: random_dictionary(t.shape[1], 8)}, codes, codes, codes)
        for name, t in (("a", x), ("b", y))
        for codes in [replace(few, residual_LND=t[None, : few.num_tokens])]
    ]
    arrays = Similarity().compute(*sides, seed=0, min_count=1)[0].arrays
    assert arrays["high"][0, 0] - arrays["low"][0, 0] > 1.5 * (found["high"] - found["low"])


def test_the_interval_is_as_wide_as_independent_texts_differ():
    """Over texts drawn anew, values spread about as much as the interval says."""
    rng, values, widths = np.random.default_rng(0), [], []
    maps = rng.standard_normal((2, 6, 24))
    for _ in range(20):
        f = rng.standard_normal((N, 6)) * np.arange(6, 0, -1)
        x, y = ((f @ m + 3 * rng.standard_normal((N, 24))).astype(np.float32) for m in maps)
        found = compare(x, y)
        values.append(found["value"])
        widths.append(found["high"] - found["low"])
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.5)


def test_both_directions_and_layers_of_one_model():
    x, y, z = activations(20, 1), unrelated(20, 5), activations(33, 2)
    there, back = Similarity().compute(side_of("a", x, y), side_of("b", z), seed=0, min_count=1)
    assert there.arrays["value"].shape == (2, 1) and (back.info.source, back.info.target) == ("b", "a")
    for name in there.arrays:
        np.testing.assert_array_equal(there.arrays[name].T, back.arrays[name])
    (within,) = Similarity().compute(side := side_of("a", x, y), side, seed=0, min_count=1)
    np.testing.assert_array_equal(within.arrays["value"], within.arrays["value"].T)
    np.testing.assert_allclose(np.diag(within.arrays["value"]), 1)
    assert within.info.num_tokens == N and within.info.details["rsa_tokens"] == RSA_TOKENS


def test_one_document_is_refused():
    codes = replace(
        make_codes(DOCUMENTS[:1]), residual_LND=activations(20, 1)[None, : make_codes(DOCUMENTS[:1]).num_tokens]
    )
    side = GivenSide("a", {0: random_dictionary(20, 8)}, codes, codes, codes)
    with pytest.raises(InputError, match=r"two held-out documents or more [^\n]*found 1; [^\n]+$"):
        Similarity().compute(side, side, seed=0, min_count=1)
