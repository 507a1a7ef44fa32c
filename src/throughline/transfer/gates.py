"""Features that are made of two others by AND or OR, as far as firing tells.

    necessity of u for v   = c[u, v] / n_v    share of v's tokens on which u fires too
    sufficiency of u for v = c[u, v] / n_u    share of u's tokens on which v fires too

v is the AND of two features if exactly these two are necessary (at least 0.999), and the OR of two if exactly these two are
sufficient (Balcells et al. 2024, arXiv 2410.08869, who stop there). Such a pair is then put to the test: the tokens on which both,
or either, fire have to be v's (Jaccard at least FIT), and neither of the two may do as well alone, for then v is a feature that
persists. Features that fire on more than half of the tokens are no parents: they are necessary for whatever fires.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from throughline.kernel_cache import njit
from throughline.transfer.cooccurrence import Related, SourceFeatures, TargetTokens

STRENGTH = 0.999
FIT = 0.9
MOST_ACTIVE = 0.5
AND, OR = 0, 1

Tokens = Callable[[Sequence[int]], dict[int, np.ndarray]]  # where each of some features fires, ascending


def find_gates(source: SourceFeatures, target: TargetTokens, related: Related) -> tuple[np.ndarray, np.ndarray]:
    """Rows of kind (AND or OR), feature, and its two parents, int32 [gates, 4]; numbers are those of the dictionaries.

    First target features made of source features, then source features made of target features.
    """
    strong, n_U, n_V = related.strong, related.source[-1].num_active, related.target[-1].num_active
    most = MOST_ACTIVE * target.cuts[-1]

    def tokens_of_source(wanted: Sequence[int]) -> dict[int, np.ndarray]:
        return {u: source.tokens_of(u) for u in wanted}

    down = _gates(strong[n_U[strong[:, 0]] <= most], n_U, n_V, tokens_of_source, target.tokens_of)
    turned = strong[n_V[strong[:, 1]] <= most][:, [1, 0, 2]]
    up = _gates(turned, n_V, n_U, target.tokens_of, tokens_of_source)
    return _named(down, target.features, source.features), _named(up, source.features, target.features)


def _gates(
    strong: np.ndarray, n_parents: np.ndarray, n_children: np.ndarray, of_parents: Tokens, of_children: Tokens
) -> list[tuple[int, int, int, int]]:
    """Kind, child and parents. `strong`: a parent, a child, and on how many tokens both fire."""
    pairs = [(AND, *pair) for pair in _pairs(strong, n_children[strong[:, 1]], n_parents, n_children)]
    for child, a, b in _pairs(strong, n_parents[strong[:, 0]], n_parents, n_children):
        if n_parents[a] + n_parents[b] >= FIT * n_children[child]:  # else they cannot cover it
            pairs.append((OR, child, a, b))
    if not pairs:
        return []
    parents = of_parents(sorted({u for _, _, *two in pairs for u in two}))
    children = of_children(sorted({child for _, child, _, _ in pairs}))
    return [pair for pair in pairs if _fit(pair[0], children[pair[1]], *(parents[u] for u in pair[2:])) >= FIT]


def _pairs(
    strong: np.ndarray, n_implying: np.ndarray, n_parents: np.ndarray, n_children: np.ndarray
) -> list[tuple[int, int, int]]:
    """Children with exactly two parents that imply them or are implied by them, neither of which does as well alone."""
    holding = strong[strong[:, 2] >= STRENGTH * n_implying]
    holding = holding[np.argsort(holding[:, 1], kind="stable")]
    children, firsts, counts = np.unique(holding[:, 1], return_index=True, return_counts=True)
    found = []
    for child, first in zip(children[counts == 2], firsts[counts == 2], strict=True):
        two = holding[first : first + 2]
        alone = two[:, 2] / (n_parents[two[:, 0]] + n_children[child] - two[:, 2])
        if alone.max() < FIT:
            found.append((int(child), int(two[0, 0]), int(two[1, 0])))
    return found


def _fit(kind: int, child: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard of the child's tokens and those of both, or either, of its parents."""
    both, both_and_child, a_and_child, b_and_child = _overlaps(a, b, child)
    if kind == AND:
        return both_and_child / (both + len(child) - both_and_child)
    either_and_child = a_and_child + b_and_child - both_and_child
    return either_and_child / (len(a) + len(b) - both + len(child) - either_and_child)


@njit(nogil=True)
def _overlaps(a: Any, b: Any, child: Any) -> tuple[int, int, int, int]:
    """Sizes of a & b, a & b & child, a & child, b & child, all ascending."""
    both, all_three, a_child, b_child, j, k = 0, 0, 0, 0, 0, 0
    for n in a:
        while j < len(b) and b[j] < n:
            j += 1
        while k < len(child) and child[k] < n:
            k += 1
        in_b, in_child = j < len(b) and b[j] == n, k < len(child) and child[k] == n
        both += in_b
        a_child += in_child
        all_three += in_b and in_child
    k = 0
    for n in b:
        while k < len(child) and child[k] < n:
            k += 1
        b_child += k < len(child) and child[k] == n
    return both, all_three, a_child, b_child


def _named(found: list[tuple[int, int, int, int]], children: np.ndarray, parents: np.ndarray) -> np.ndarray:
    rows = [(kind, children[c], parents[a], parents[b]) for kind, c, a, b in found]
    return np.array(rows, dtype=np.int32).reshape(-1, 4)
