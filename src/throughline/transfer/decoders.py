"""What the decoders of two layers of one model say of their features' relation, without any text.

Cosines of decoder rows; and rows *folded*, scaled by the mean activation of the feature where it fires, so that they are compared
in the units of the residual stream (SAE Match, arXiv 2410.07656, folds JumpReLU thresholds, which other dictionaries lack). PW-MCC
is the mean |cosine| over the best one-to-one assignment (Song et al. 2025, arXiv 2505.20254), also weighted by activation mass.
Correlation and cosine mostly choose different partners: what agrees is reported, and neither is taken for the other.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from throughline.dictionaries import Dictionary
from throughline.transfer.cooccurrence import Moments, Related

TILE_ROWS = 1024


class Compared(NamedTuple):
    """One direction: `cosine` of each feature with its partner by correlation, and numbers of all.

    `cosine_agrees`, `folded_agrees`: shares of features for which the nearest by cosine, or by distance of folded rows, is that
    partner. `mean_cosine`: of the nearest by cosine. `pw_mcc`, `pw_mcc_by_mass`: if they were asked for.
    """

    cosine: np.ndarray
    numbers: dict[str, float]


def compare_decoders(
    decoders: tuple[Dictionary, Dictionary],
    related: Related,
    moments: tuple[Moments, Moments],
    assigned: bool,
) -> tuple[Compared, Compared]:
    """Both directions, for the live features of both layers and their moments; PW-MCC if `assigned`."""
    best = (related.source[-1], related.target[-1])
    masses = [m.mean_CF[-1] * m.num_C[-1] for m in moments]  # sums of activations
    rows = [
        d.W_dec.detach().float().cpu().numpy()[chosen]
        for d, chosen in zip(decoders, (b.features for b in best), strict=True)
    ]
    units = [row / np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-12) for row in rows]
    folded = [
        row * (mass / np.maximum(side.num_active, 1))[:, None].astype(np.float32)
        for row, mass, side in zip(rows, masses, best, strict=True)
    ]
    numbers = _assigned(units, masses) if assigned else ({}, {})
    return _direction(units, folded, best[0].partner, numbers[0]), _direction(
        units[::-1], folded[::-1], best[1].partner, numbers[1]
    )


def _direction(
    units: list[np.ndarray], folded: list[np.ndarray], partner_U: np.ndarray, numbers: dict[str, float]
) -> Compared:
    cosine_U, nearest_U = _largest(units[0], units[1], np.zeros(len(units[1]), np.float32))
    _, folded_U = _largest(folded[0], folded[1], (folded[1] ** 2).sum(1) / 2)  # the nearest: |a - b|^2 less |a|^2
    agreed = {
        "cosine_agrees": float((nearest_U == partner_U).mean()),
        "folded_agrees": float((folded_U == partner_U).mean()),
        "mean_cosine": float(cosine_U.mean()),
    }
    return Compared((units[0] * units[1][partner_U]).sum(1), agreed | numbers)


def _assigned(units: list[np.ndarray], masses: list[np.ndarray]) -> tuple[dict[str, float], dict[str, float]]:
    cosine_UV = np.abs(units[0] @ units[1].T)
    chosen = linear_sum_assignment(cosine_UV, maximize=True)
    paired = cosine_UV[chosen].astype(np.float64)
    weights = [mass[places] for mass, places in zip(masses, chosen, strict=True)]
    first, second = (
        {"pw_mcc": float(paired.mean()), "pw_mcc_by_mass": float((paired * w).sum() / max(w.sum(), 1e-12))}
        for w in weights
    )
    return first, second


def _largest(a_UD: np.ndarray, b_VD: np.ndarray, less_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a the largest a . b - less, and where it is; a tile of rows at a time."""
    values, places = [], []
    for first in range(0, len(a_UD), TILE_ROWS):
        tile = a_UD[first : first + TILE_ROWS] @ b_VD.T - less_V
        places.append(tile.argmax(1))
        values.append(tile[np.arange(len(tile)), places[-1]])
    return np.concatenate(values), np.concatenate(places)
