"""Which matches are above chance: a threshold for every pair of layers, and shares above it.

    1. chance: the highest correlation of each feature with the tokens of the other layer taken from another document
    2. the threshold of a pair of layers is the 99.9 % quantile of these, of the pair itself and of those next to it (one layer
       up or down on either side): at least FEWEST_CHANCES, for the quantile of fewer is their maximum, which says too little
    3. value: the share of live source features whose best real correlation is above the threshold
    4. null: the same share when nothing is known but the kind of position
    5. ceiling: the same share, above the same threshold, between the source layer and a dictionary of it from another seed; of
       several such twins the mean, their range, and an interval from the lowest bound of theirs to the highest

The two directions have thresholds of their own and count for themselves: their highest chance correlations are the same ones.
"""

import math
from typing import NamedTuple

import numpy as np

from throughline.records import NULL_QUANTILE
from throughline.stats import bootstrap_interval
from throughline.transfer.cooccurrence import Best
from throughline.transfer.pairs import mean_over_twins

FEWEST_CHANCES = 1000
MOST_SHIFTS = 8

Cell = tuple[int, int]  # places of a source and a target layer


class Evidence(NamedTuple):
    """One direction of a pair of layers, by live source feature."""

    best: Best
    is_mutual_U: np.ndarray
    strict_U: (
        np.ndarray
    )  # best correlations on tokens that are the same in both models, of the features that are live there
    by_role_U: np.ndarray  # best correlations if only the kind of position were known
    chance_CM: (
        np.ndarray
    )  # best correlations by chance of all shifts: on tokens that are the same (if told apart), and on all


def num_shifts(sizes: dict[Cell, tuple[int, int]]) -> dict[Cell, int]:
    """How many documents to shift by for each pair of layers with so many live source and target features."""
    found = {}
    for cell in sizes:
        around = [sizes[other] for other in _next_to(cell) if other in sizes]
        fewest = min(sum(pair[side] for pair in around) for side in (0, 1))
        found[cell] = min(MOST_SHIFTS, -(-FEWEST_CHANCES // max(1, fewest)))
    return found


def judge(evidence: dict[Cell, Evidence], twins: dict[int, list[Evidence]], seed: int) -> dict[Cell, dict[str, float]]:
    """Thresholds, shares and means of every pair of layers in one direction; `twins` by the place of the source layer, each
    twin's against the layer's own dictionary."""
    found = {}
    for cell, mine in evidence.items():
        drawn_CM = np.concatenate([evidence[other].chance_CM for other in _next_to(cell) if other in evidence], axis=1)
        threshold_C = np.quantile(drawn_CM, NULL_QUANTILE, axis=1, method="higher")
        found[cell] = _shares(mine, float(threshold_C[0]), float(threshold_C[-1]), seed)
        if twins.get(cell[0]):
            found[cell] |= _ceilings([_above(twin, float(threshold_C[-1]), seed) for twin in twins[cell[0]]])
    return found


def best_of_all_layers(correlation: np.ndarray, chance: np.ndarray) -> dict[str, np.ndarray]:
    """MPPC (maximum pairwise Pearson correlation, Wang et al. 2024, arXiv 2410.06672), of [Ls, Lt, F] best correlations by layer.

    `mppc` [Ls, F] and the place of the target layer where it is, `mppc_place` (-1: not live); by source layer [Ls] the
    `mppc_threshold` that the 99.9 % quantile of the same by chance gives, and `mppc_share`, the share of live features above it.
    """
    known, known_by_chance = (np.where(np.isnan(a), -np.inf, a) for a in (correlation, chance))
    highest, by_chance = known.max(1), known_by_chance.max(1)
    is_live = np.isfinite(highest)
    found = {
        "mppc": np.where(is_live, highest, np.nan).astype(np.float32),
        "mppc_place": np.where(is_live, known.argmax(1), -1).astype(np.int32),
        "mppc_threshold": np.full(len(highest), np.nan),
        "mppc_share": np.full(len(highest), np.nan),
    }
    for i, live_F in enumerate(is_live):
        near = np.zeros(len(is_live), bool)
        near[max(0, i - 1) : i + 2] = True
        if is_live[near].sum() < FEWEST_CHANCES:
            near[:] = True
        drawn = by_chance[near][is_live[near]]
        if live_F.any():
            found["mppc_threshold"][i] = np.quantile(drawn, NULL_QUANTILE, method="higher")
            found["mppc_share"][i] = (highest[i, live_F] > found["mppc_threshold"][i]).mean()
    return found


def _next_to(cell: Cell) -> list[Cell]:
    """The pair itself, and those whose layers are at most one away."""
    return [(cell[0] + a, cell[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]


def _shares(mine: Evidence, strict_threshold: float, threshold: float, seed: int) -> dict[str, float]:
    above = _above(mine, threshold, seed)
    mean_low, mean_high = bootstrap_interval(mine.best.correlation, seed)
    return {
        **{"mean_correlation" if name == "correlation" else name: number for name, number in above.items()},
        "null": float((mine.by_role_U > threshold).mean()),
        "threshold": threshold,
        "mean_low": mean_low,
        "mean_high": mean_high,
        "null_correlation": float(mine.by_role_U.mean()),
        "strict": float((mine.strict_U > strict_threshold).mean()) if len(mine.strict_U) else math.nan,
    }


def _ceilings(of_twins: list[dict[str, float]]) -> dict[str, float]:
    """Of what `_above` says of each twin. Another seed may lie anywhere between the lowest and the highest bound."""
    each = {name: [of_twin[name] for of_twin in of_twins] for name in of_twins[0]}
    return {
        **mean_over_twins("ceiling", each["value"]),
        "ceiling_low": min(each["low"]),
        "ceiling_high": max(each["high"]),
        **mean_over_twins("ceiling_mutual", each["mutual"]),
        **mean_over_twins("ceiling_correlation", each["correlation"]),
        "num_twins": len(of_twins),
    }


def _above(mine: Evidence, threshold: float, seed: int) -> dict[str, float]:
    above_U = mine.best.correlation > threshold
    low, high = bootstrap_interval(above_U.astype(float), seed)
    return {
        "value": float(above_U.mean()),
        "low": low,
        "high": high,
        "mutual": float((mine.is_mutual_U & above_U).mean()),
        "correlation": float(mine.best.correlation.mean()),
    }
