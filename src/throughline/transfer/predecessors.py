"""What flow picks out: target features with their contexts, their predecessors in an earlier layer, and controls."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from throughline.codes import Codes
from throughline.dictionaries import Dictionary
from throughline.transfer.pairs import Columns, correlate, prepare

NUM_TARGETS = 32  # of each layer
NUM_CONTEXTS = 12  # of each target
NUM_STRONGEST, NUM_DRAWN = 1, 2  # features of each context whose estimates are held against the model
NUM_EDGES = 8  # kept of each target


def choose_targets(matrix_NF: sp.csr_array, min_count: int) -> np.ndarray:
    """Up to NUM_TARGETS features with the largest activation mass, of those that fire often enough, largest first, [G]."""
    count_F, mass_F = np.bincount(matrix_NF.indices, minlength=matrix_NF.shape[1]), matrix_NF.sum(0)
    live_F = count_F >= max(min_count, NUM_CONTEXTS)
    return np.argsort(-np.where(live_F, mass_F, -np.inf), kind="stable")[: min(NUM_TARGETS, live_F.sum())]


def spread_tokens(sample: Codes, layer: int, targets_G: np.ndarray) -> np.ndarray:
    """For each target NUM_CONTEXTS tokens on which it fires, at the middles of equal parts of its sorted activations."""
    matrix, chosen = sample.columns[layer], []
    for target in targets_G:
        entries = slice(matrix.indptr[target], matrix.indptr[target + 1])
        tokens = matrix.indices[entries][np.argsort(matrix.data[entries], kind="stable")]
        chosen.append(tokens[((np.arange(NUM_CONTEXTS) + 0.5) / NUM_CONTEXTS * len(tokens)).astype(int)])
    return np.concatenate(chosen)


def compare_features(
    a: Columns, b: Columns, source: Dictionary, target: Dictionary, targets_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TWERA, Pearson's r, and cosine of decoder rows of every source feature with every target, each [F, G]."""
    chosen = prepare(sp.csr_array(b.matrix_NF[:, targets_G]))
    weights_FG = (source.W_dec @ target.W_enc[:, targets_G]).cpu().double().numpy()
    together_FG = (a.matrix_NF.T @ chosen.matrix_NF).toarray() / chosen.matrix_NF.sum(0)
    cosine_FG = (source.W_dec @ target.W_dec[targets_G].T).cpu().numpy()  # rows have unit norm
    return together_FG * weights_FG, correlate(a, chosen), cosine_FG


def choose_best(score_FG: np.ndarray, live_F: np.ndarray) -> np.ndarray:
    """The live feature with the highest score for each target, [G]; -1 if none is live."""
    best_G = np.where(live_F[:, None], score_FG, -np.inf).argmax(0)
    return np.where(live_F.any(), best_G, -1)


def choose_causes(share_GF: sp.csr_array) -> np.ndarray:
    """The feature with the largest estimated drop of each target; -1 where none makes it fall."""
    cause_G = np.full(share_GF.shape[0], -1)
    for g in range(len(cause_G)):
        entries = slice(share_GF.indptr[g], share_GF.indptr[g + 1])
        if share_GF.data[entries].max(initial=0) > 0:
            cause_G[g] = share_GF.indices[entries][share_GF.data[entries].argmax()]
    return cause_G


def strongest_edges(share_GF: sp.csr_array) -> dict[str, np.ndarray]:
    """The NUM_EDGES features with the largest effects of either sign on each target, the largest first."""
    shape = (share_GF.shape[0], NUM_EDGES)
    sources, estimates = np.full(shape, -1), np.full(shape, np.nan)
    for g in range(shape[0]):
        entries = slice(share_GF.indptr[g], share_GF.indptr[g + 1])
        order = np.argsort(-np.abs(share_GF.data[entries]), kind="stable")[:NUM_EDGES]
        sources[g, : len(order)] = share_GF.indices[entries][order]
        estimates[g, : len(order)] = share_GF.data[entries][order]
    return {"edge_source": sources, "edge_estimate": estimates}


def draw_active(matrix_NF: sp.csr_array, tokens_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random one of the features that are active at each of the tokens; -1 where there is none."""
    first, count = matrix_NF.indptr[tokens_K], np.diff(matrix_NF.indptr)[tokens_K]
    place = first + (rng.random(len(tokens_K)) * count).astype(int)
    found = matrix_NF.indices[np.minimum(place, max(matrix_NF.nnz - 1, 0))] if matrix_NF.nnz else place
    return np.where(count > 0, found, -1)


class Checked(NamedTuple):
    """Features drawn in contexts, flat; `others` are further features of the same contexts, the control."""

    contexts: np.ndarray
    features: np.ndarray
    others: np.ndarray
    drawn: np.ndarray  # bool: at random, not for its estimate


def draw_checked(drop_KF: sp.csr_array, rng: np.random.Generator) -> Checked:
    """In each context the NUM_STRONGEST features with the largest estimates and NUM_DRAWN others at random."""
    parts: list[tuple[np.ndarray, ...]] = [(np.empty(0, int), np.empty(0, int), np.empty(0, int), np.empty(0, bool))]
    for k in range(drop_KF.shape[0]):
        entries = slice(drop_KF.indptr[k], drop_KF.indptr[k + 1])
        features = drop_KF.indices[entries][np.argsort(-np.abs(drop_KF.data[entries]), kind="stable")]
        if len(features) < 2:
            continue
        rest = NUM_STRONGEST + rng.permutation(max(0, len(features) - NUM_STRONGEST))
        places = np.r_[np.arange(min(NUM_STRONGEST, len(features))), rest[:NUM_DRAWN]]
        others = (places + rng.integers(1, len(features), size=len(places))) % len(features)
        parts.append((np.full(len(places), k), features[places], features[others], places >= NUM_STRONGEST))
    return Checked(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class Entries(NamedTuple):
    """Numbers of some (row, feature) pairs, ascending by key = row · F + feature; all other pairs are zero."""

    width: int
    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, matrix: sp.csr_array) -> "Entries":
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        keys = rows * matrix.shape[1] + matrix.indices
        order = np.argsort(keys)
        return cls(matrix.shape[1], keys[order], matrix.data[order])

    def key(self, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Keys of pairs; that of no feature (-1) belongs to none."""
        return np.where(features >= 0, rows * self.width + features, -1)

    def at(self, keys: np.ndarray) -> np.ndarray:
        """The values of keys."""
        if not len(self.keys):
            return np.zeros(len(keys))
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.values[place], 0)
