"""Features that are made of two others by AND or OR, as far as firing tells.

    necessity of u for v   = c[u, v] / n_v    share of v's tokens on which u fires too
    sufficiency of u for v = c[u, v] / n_u    share of u's tokens on which v fires too

v is the AND of two features if exactly these two are necessary (at least 0.999), and the OR of two if exactly these two are
sufficient (Balcells et al. 2024, arXiv 2410.08869, who stop there). Such a pair is then put to the test: the tokens on which both,
or either, fire have to be v's (Jaccard at least FIT), and neither of the two may do as well alone, for then v is a feature that
persists. Features that fire on more than half of the tokens are no parents: they are necessary for whatever fires.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np
import scipy.sparse as sp

from throughline.transfer.cooccurrence import Related, SourceFeatures, TargetTokens

STRENGTH = 0.999
FIT = 0.9
MOST_ACTIVE = 0.5
AND, OR = 0, 1
JOINED = {AND: np.intersect1d, OR: np.union1d}

Tokens = Callable[[int], np.ndarray]


def find_gates(source: SourceFeatures, target: TargetTokens, related: Related) -> tuple[np.ndarray, np.ndarray]:
    """Rows of kind (AND or OR), feature, and its two parents, int32 [gates, 4]; numbers are those of the dictionaries.

    First target features made of source features, then source features made of target features.
    """
    strong, num_tokens = related.strong, len(target.is_met_N)
    n_U, n_V = related.source.num_active, related.target.num_active

    def tokens_of_source(u: int) -> np.ndarray:
        return source.tokens_A[source.starts_U[u] : source.starts_U[u + 1]]

    columns: list[sp.csc_array] = []  # made when the first is asked for: most pairs of layers have no candidates

    def tokens_of_target(v: int) -> np.ndarray:
        if not columns:
            shape = (num_tokens, len(target.features))
            columns.append(sp.csr_array((target.values_B, target.features_B, target.starts_N), shape=shape).tocsc())
        return columns[0].indices[columns[0].indptr[v] : columns[0].indptr[v + 1]]

    most = MOST_ACTIVE * num_tokens
    down = _gates(strong[n_U[strong[:, 0]] <= most], n_U, n_V, tokens_of_source, tokens_of_target)
    turned = strong[n_V[strong[:, 1]] <= most][:, [1, 0, 2]]
    up = _gates(turned, n_V, n_U, tokens_of_target, tokens_of_source)
    return _named(down, target.features, source.features), _named(up, source.features, target.features)


def _gates(
    strong: np.ndarray, n_parents: np.ndarray, n_children: np.ndarray, of_parent: Tokens, of_child: Tokens
) -> list[tuple[int, int, int, int]]:
    """Kind, child and parents. `strong`: a parent, a child, and on how many tokens both fire."""
    found = []
    for kind, n_implying in ((AND, n_children[strong[:, 1]]), (OR, n_parents[strong[:, 0]])):
        holding = strong[strong[:, 2] >= STRENGTH * n_implying]
        children, counts = np.unique(holding[:, 1], return_counts=True)
        for child in children[counts == 2]:
            pair = holding[holding[:, 1] == child, 0]
            tokens = of_child(child)
            alone = max(_jaccard(of_parent(u), tokens) for u in pair)
            if alone < FIT <= _jaccard(reduce(JOINED[kind], (of_parent(u) for u in pair)), tokens):
                found.append((kind, int(child), int(pair[0]), int(pair[1])))
    return found


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def _named(found: list[tuple[int, int, int, int]], children: np.ndarray, parents: np.ndarray) -> np.ndarray:
    rows = [(kind, children[c], parents[a], parents[b]) for kind, c, a, b in found]
    return np.array(rows, dtype=np.int32).reshape(-1, 4)
