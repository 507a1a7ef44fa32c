"""Chains: the strongest paths of a graph from its first layer to a token of the answer. Numbers only, no torch.

The strength of a path is the product of its edges per unit times the first feature's step to "off": the linearised change of the
target's score along this path alone. The strongest K from every node are found from the top down, by the K strongest of the nodes
above it. Of two paths that share more than half of their nodes only the stronger is shown; the other counts as an alternative
of it if it has at least ALIKE of its strength.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

PATHS_KEPT = 16  # from every node
ALIKE = 0.8
SHARED = 0.5


class Path(NamedTuple):
    """The number of a kept node in each layer, first layer first, the predicted effect, and how many others are much the same."""

    nodes: tuple[int, ...]
    predicted: float
    num_alternatives: int


class _Suffixes(NamedTuple):
    """For each node of a layer [M, K]: the strengths of its strongest paths to the target, and where each goes on."""

    strength: np.ndarray
    following: np.ndarray
    rank: np.ndarray


def find_paths(steps_M: np.ndarray, per_unit: Sequence[np.ndarray], last_M: np.ndarray, num_paths: int) -> list[Path]:
    """The strongest distinct paths.

    `steps_M` is off - own of the first layer's nodes, `per_unit[i]` [M_{i+1}, M_i] what passes between layers, `last_M` what the
    last layer's nodes do to the target, per unit.
    """
    if not len(last_M) or not len(steps_M):
        return []
    suffixes = _strongest_suffixes(per_unit, last_M)
    strength_MK = suffixes[0].strength * steps_M[:, None]
    order = np.argsort(-np.abs(strength_MK), axis=None, kind="stable")
    shown: list[tuple[tuple[int, ...], float]] = []
    alternatives: list[int] = []
    for flat in order[: PATHS_KEPT * len(steps_M)]:
        node, rank = np.unravel_index(flat, strength_MK.shape)
        predicted = float(strength_MK[node, rank])
        if predicted == 0:
            break
        nodes = _walk(suffixes, int(node), int(rank))
        alike = [i for i, (other, _) in enumerate(shown) if _num_shared(nodes, other) > SHARED * len(nodes)]
        for i in alike:
            alternatives[i] += abs(predicted) >= ALIKE * abs(shown[i][1])
        if not alike and len(shown) < num_paths:
            shown.append((nodes, predicted))
            alternatives.append(0)
    return [Path(nodes, predicted, n) for (nodes, predicted), n in zip(shown, alternatives, strict=True)]


def _strongest_suffixes(per_unit: Sequence[np.ndarray], last_M: np.ndarray) -> list[_Suffixes]:
    strength = np.zeros((len(last_M), PATHS_KEPT))
    strength[:, 0] = last_M
    nowhere = np.full(strength.shape, -1)
    found = [_Suffixes(strength, nowhere, nowhere)]
    for weights in reversed(per_unit):
        above = found[0].strength  # [M2, K]
        candidates = (weights.T[:, :, None] * above[None]).reshape(weights.shape[1], -1)  # [M, M2 * K]
        if candidates.shape[1] < PATHS_KEPT:
            candidates = np.pad(candidates, ((0, 0), (0, PATHS_KEPT - candidates.shape[1])))
        best = np.argsort(-np.abs(candidates), axis=1, kind="stable")[:, :PATHS_KEPT]
        strongest = np.take_along_axis(candidates, best, 1)
        following = np.minimum(best // PATHS_KEPT, max(0, len(above) - 1))
        found.insert(0, _Suffixes(strongest, following, best % PATHS_KEPT))
    return found


def _walk(suffixes: list[_Suffixes], node: int, rank: int) -> tuple[int, ...]:
    nodes = [node]
    for layer in suffixes[:-1]:
        node, rank = int(layer.following[node, rank]), int(layer.rank[node, rank])
        nodes.append(node)
    return tuple(nodes)


def _num_shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def join_steps(
    places: Sequence[tuple[int, int, int]], throughline_of: Mapping[tuple[int, int], int]
) -> list[list[tuple[int, int, int]]]:
    """Consecutive places (layer, position, feature) of one throughline at one position together, the others alone."""
    steps: list[list[tuple[int, int, int]]] = []
    for place in places:
        mine = throughline_of.get((place[0], place[2]))
        before = steps[-1][-1] if steps else None
        if (
            before is not None
            and mine is not None
            and before[1] == place[1]
            and throughline_of.get((before[0], before[2])) == mine
        ):
            steps[-1].append(place)
        else:
            steps.append([place])
    return steps
