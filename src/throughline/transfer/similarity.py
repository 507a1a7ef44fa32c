"""Similarity of two layers' activations, whatever their dictionaries: CKA, SVCCA and RSA on aligned held-out tokens.

With X and Y the activations of both layers less their means, rows the N tokens:

    CKA    |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414, linear)
    SVCCA  mean canonical correlation of the leading principal components with 99 % of the variance of each (Raghu et al. 2017,
           arXiv 1706.05806): mean singular value of Q_x^T Q_y, Q the components as orthonormal columns
    RSA    Spearman's correlation of the cosine distances of all pairs of up to RSA_TOKENS tokens (Kriegeskorte et al. 2008)

All three keep their value when a layer is turned or scaled, and none needs equal widths. All are above 0 for layers that have
nothing in common, more so the fewer tokens there are: that is what the nulls, with one layer's tokens shuffled, are for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata
from torch import Tensor

from throughline.errors import InputError
from throughline.pools import spread
from throughline.records import TransferInfo, TransferResult
from throughline.stats import NUM_RESAMPLES
from throughline.transfer.pairs import Side, align, shuffle_within, whole_documents

MOST_TOKENS = 2048
RSA_TOKENS = 512
VARIANCE_KEPT = 0.99
NUM_SHUFFLES, NUM_SVCCA_SHUFFLES, NUM_ROLE_SHUFFLES = 20, 4, 4
NUM_BLOCKS = 32  # of documents, the units of the bootstrap
BLOCK_ROWS = 256  # of a product held at once for all blocks
ARRAYS = (
    "value",
    "low",
    "high",
    "null",
    "null_high",
    "null_role",
    "svcca",
    "null_svcca",
    "rsa",
    "null_rsa",
    "null_rsa_high",
)


class Similarity:
    """Linear CKA of two layers' activations, with SVCCA and RSA beside it."""

    name = "similarity"
    across_models = True
    both_ways = True

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
        """Arrays [Ls, Lt]: value (CKA), low, high, null (its mean over shuffles), null_high (their 99 % quantile), null_role (mean
        when shuffled within roles); svcca, null_svcca; rsa, null_rsa, null_rsa_high."""
        held = align(source.sample, target.sample)
        within = source.model == target.model
        trial = _Trial.of(source, held.source_N, seed)
        here = _open_layers(source, held.source_N, trial)
        there = here if within else _open_layers(target, held.target_N, trial)
        cells = [(i, j) for i in range(len(here)) for j in range(len(there)) if not within or i <= j]
        arrays = {name: np.full((len(here), len(there)), np.nan) for name in ARRAYS}
        found = spread(lambda cell: _compare(here[cell[0]], there[cell[1]], trial), cells, here[0].scores_ND.device)
        for (i, j), measures in zip(cells, found, strict=True):
            for name, value in measures.items():
                arrays[name][i, j] = value
                if within:
                    arrays[name][j, i] = value
        results = [TransferResult(self._info(source, target, held.coverage, trial, seed), arrays)]
        if not within:
            coverage = len(held.target_N) / max(1, target.sample.num_tokens)
            transposed = {name: array.T.copy() for name, array in arrays.items()}
            results.append(TransferResult(self._info(target, source, coverage, trial, seed), transposed))
        return results

    def _info(self, source: Side, target: Side, coverage: float, trial: "_Trial", seed: int) -> TransferInfo:
        return TransferInfo(
            metric=self.name,
            source=source.model,
            target=target.model,
            source_layers=list(source.dictionaries),
            target_layers=list(target.dictionaries),
            quantity="linear CKA of the two layers' activations",
            null="the same with one layer's tokens shuffled",
            ceiling=None,
            num_tokens=trial.num_tokens,
            num_documents=trial.num_documents,
            coverage=coverage,
            seed=seed,
            details={
                "interval": f"bootstrap over {len(trial.starts) - 1} blocks of documents, {NUM_RESAMPLES} resamples",
                "shuffles": NUM_SHUFFLES,
                "svcca": f"{VARIANCE_KEPT:.0%} of the variance kept, {NUM_SVCCA_SHUFFLES} shuffles",
                "rsa_tokens": len(trial.subset_n),
            },
        )


@dataclass(frozen=True)
class _Trial:
    """What is drawn once for all pairs of layers: tokens, their blocks, their shuffles."""

    num_tokens: int
    num_documents: int
    starts: list[int]  # where each block of documents begins, and the end
    weights_RG: Tensor  # how often each block is drawn in each resample
    shuffled_SN: list[Tensor]
    within_role_SN: list[Tensor]
    subset_n: Int[np.ndarray, "n"]
    shuffled_SP: list[
        Tensor
    ]  # for each pair of the subset's tokens the place, in a flat [n, n] matrix, of another two's

    @classmethod
    def of(cls, source: Side, tokens_N: Int[np.ndarray, "N"], seed: int) -> "_Trial":
        documents_N = source.sample.documents_N[tokens_N]
        documents_N = documents_N[: whole_documents(documents_N, MOST_TOKENS)]
        starts = np.flatnonzero(np.r_[True, documents_N[1:] != documents_N[:-1]]) if len(documents_N) else []
        if len(starts) < 2:
            raise InputError(
                f"similarity needs two held-out documents or more with tokens that end together, found {len(starts)}; "
                "raise evaluation.sample_tokens, or give more text"
            )
        rng, N = np.random.default_rng(seed), len(documents_N)
        firsts = np.linspace(0, len(starts), min(NUM_BLOCKS, len(starts)) + 1).astype(int)[:-1]
        count = len(firsts)
        weights_RG = rng.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES)
        roles_N = source.sample.roles_N[tokens_N[:N]]
        subset_n = np.sort(rng.permutation(N)[:RSA_TOKENS])
        return cls(
            N,
            len(starts),
            [*starts[firsts].tolist(), N],
            torch.from_numpy(weights_RG.astype(np.float32)),
            [torch.from_numpy(rng.permutation(N)) for _ in range(NUM_SHUFFLES)],
            [torch.from_numpy(shuffle_within(roles_N, rng)) for _ in range(NUM_ROLE_SHUFFLES)],
            subset_n,
            [_places_of_pairs(rng.permutation(len(subset_n))) for _ in range(NUM_SHUFFLES)],
        )


@dataclass(frozen=True)
class _Layer:
    """One layer's part of all its pairs."""

    scores_ND: Float[Tensor, "N D"]  # principal components, largest first
    lengths_D: Float[Tensor, "D"]  # norm of each, float64
    num_kept: int  # with VARIANCE_KEPT
    own_GG: Float[Tensor, "G G"]  # products of its blocks with themselves, as `_block_products` has them
    ranks_nn: Float[Tensor, "n n"]  # of the distances between the subset's tokens, centred
    ranks_P: Float[Tensor, "P"]  # the same, each pair of tokens once; sum of squares 1

    @property
    def norm(self) -> float:
        """|X^T X|."""
        return float(self.lengths_D.pow(4).sum().sqrt())


def _open_layers(side: Side, tokens_N: np.ndarray, trial: _Trial) -> list[_Layer]:
    x_LMD = side.sample.residual_LND
    assert x_LMD is not None
    device = next(iter(side.dictionaries.values())).W_enc.device
    exact = torch.device("cpu") if device.type == "mps" else device  # which has no float64

    def open_layer(index: int) -> _Layer:
        x_ND = torch.from_numpy(x_LMD[index][tokens_N[: trial.num_tokens]]).to(exact).double()
        x_ND -= x_ND.mean(0)
        squares_D, basis_DD = torch.linalg.eigh(x_ND.T @ x_ND)
        squares_D = squares_D.flip(0).clamp_min(0)
        scores_ND = (x_ND @ basis_DD.flip(1)).float()
        shares_D = squares_D.cumsum(0) / squares_D.sum()
        num_kept = min(int((shares_D < VARIANCE_KEPT).sum()) + 1, len(squares_D))
        ranks = rankdata(pdist(x_ND.cpu().numpy()[trial.subset_n], "cosine"))
        ranks = (ranks - ranks.mean()) / np.linalg.norm(ranks - ranks.mean())
        ranks_nn, ranks_P = (torch.from_numpy(r.astype(np.float32)).to(exact) for r in (squareform(ranks), ranks))
        own_GG, _ = _block_products(scores_ND, scores_ND, trial.starts)
        return _Layer(scores_ND, squares_D.sqrt(), num_kept, own_GG, ranks_nn, ranks_P)

    return list(spread(open_layer, range(len(side.dictionaries)), exact))


def _compare(a: _Layer, b: _Layer, trial: _Trial) -> dict[str, float]:
    """All measures of one pair of layers."""
    products_GG, cross_DE = _block_products(a.scores_ND, b.scores_ND, trial.starts)
    norms = a.norm * b.norm

    def shuffled(order_N: Tensor) -> Tensor:
        return a.scores_ND.index_select(0, order_N.to(a.scores_ND.device)).T @ b.scores_ND

    crosses = [shuffled(order_N) for order_N in trial.shuffled_SN]
    nulls = [_square(cross) / norms for cross in crosses]
    roles = [_square(shuffled(order_N)) / norms for order_N in trial.within_role_SN]
    value = _square(cross_DE) / norms
    low, high = _interval(value, products_GG, a.own_GG, b.own_GG, trial.weights_RG)
    flat = a.ranks_nn.flatten()
    chance = [float(flat.index_select(0, places_P.to(flat.device)) @ b.ranks_P) for places_P in trial.shuffled_SP]
    return {
        "value": value,
        "low": low,
        "high": high,
        "null": float(np.mean(nulls)),
        "null_high": float(np.quantile(nulls, 0.99)),
        "null_role": float(np.mean(roles)),
        "svcca": _mean_correlation(a, b, cross_DE),
        "null_svcca": float(np.mean([_mean_correlation(a, b, cross) for cross in crosses[:NUM_SVCCA_SHUFFLES]])),
        "rsa": float(a.ranks_P @ b.ranks_P),
        "null_rsa": float(np.mean(chance)),
        "null_rsa_high": float(np.quantile(chance, 0.99)),
    }


def _square(matrix_DE: Tensor) -> float:
    return float(matrix_DE.double().square().sum())


def _block_products(x_ND: Tensor, y_NE: Tensor, starts: list[int]) -> tuple[Float[Tensor, "G G"], Float[Tensor, "D E"]]:
    """<K_g, K_h> of all blocks, where K_g = X_g^T Y_g is of the tokens of block g, and the sum of all K_g in float64.

    |sum_g w_g K_g|^2 = w^T H w, so each resample of blocks costs G^2 and not D^2.
    """
    products_GG = torch.zeros(len(starts) - 1, len(starts) - 1, device=x_ND.device)
    rows = []
    for first in range(0, x_ND.shape[1], BLOCK_ROWS):
        strip_Nd = x_ND[:, first : first + BLOCK_ROWS]
        blocks_GdE = torch.stack([strip_Nd[n].T @ y_NE[n] for n in _slices(starts)])
        flat = blocks_GdE.flatten(1)
        products_GG += flat @ flat.T
        rows.append(blocks_GdE.sum(0, dtype=torch.float64))
    return products_GG, torch.cat(rows)


def _slices(starts: list[int]) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in pairwise(starts))


def _interval(value: float, both_GG: Tensor, a_GG: Tensor, b_GG: Tensor, weights_RG: Tensor) -> tuple[float, float]:
    """95 % of the CKA of resampled blocks, about the means of all tokens.

    Resampling adds to the bias that few tokens give CKA, so what the resamples are above the value on average is taken out.
    """
    w_RG = weights_RG.to(both_GG.device)
    both_R, a_R, b_R = ((w_RG @ one_GG * w_RG).sum(1).double() for one_GG in (both_GG, a_GG, b_GG))
    resampled = (both_R / (a_R * b_R).sqrt()).cpu().numpy()
    low, high = np.quantile(resampled, (0.025, 0.975)) - resampled.mean() + value
    return float(max(0.0, low)), float(min(max(1.0, value), high))


def _mean_correlation(a: _Layer, b: _Layer, cross_DE: Tensor) -> float:
    """Mean canonical correlation of the components kept."""
    scale_DE = torch.outer(a.lengths_D[: a.num_kept], b.lengths_D[: b.num_kept])
    correlations = torch.linalg.svdvals((cross_DE[: a.num_kept, : b.num_kept] / scale_DE).float())
    return float(correlations.clamp_max(1).double().mean())


def _places_of_pairs(order_n: Int[np.ndarray, "n"]) -> Int[Tensor, "P"]:
    """For tokens a < b, in the order of `pdist`, the place of order[a], order[b] in a flat matrix of all pairs."""
    first_P, second_P = np.triu_indices(len(order_n), 1)
    return torch.from_numpy(order_n[first_P] * len(order_n) + order_n[second_P])
