"""Linear transport: how much of a feature of layer j a linear map of layer i's residual stream already tells, token by token.

    d_b · x̂_j = w_b · x_i + c_b     w_b by ridge regression on training text
    R²_b = 1 − Σ (d_b · x_j − d_b · x̂_j)² / Σ (d_b · x_j − mean)²     on held-out text, mean over the same tokens

d_b is the feature's decoder row. One map of the whole stream and one regression for each feature are the same thing, since ridge
regression treats every output on its own. Szablewski & Masiak 2025 (arXiv 2508.17540), "activation transport operators".
A feature that is transported is kept along; whether anything downstream was computed from it is not asked.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg

from throughline.codes import Codes
from throughline.dictionaries import Dictionary

RIDGE = 1e-4  # of the mean variance of a coordinate
CHUNK_TOKENS = 4096  # held in float64 at once


class Transported(NamedTuple):
    """R² of features, by source and target layer, [G]: on the tokens on which each fires, and on all."""

    firing: dict[tuple[int, int], np.ndarray]
    everywhere: dict[tuple[int, int], np.ndarray]


def transport_features(
    fit: Codes, sample: Codes, dictionaries: Mapping[int, Dictionary], features: Mapping[int, np.ndarray]
) -> Transported:
    """R² of `features` of each layer from each earlier layer: maps fitted on `fit`, judged on `sample`.

    Features whose direction does not vary on the tokens get NaN.
    """
    assert fit.residual_LND is not None and sample.residual_LND is not None
    layers = list(dictionaries)
    directions = {j: dictionaries[j].W_dec[features[j]].cpu().double().numpy() for j in layers}
    fitted_on = {j: _project(fit.residual_LND[c], directions[j]) for c, j in enumerate(layers)}
    judged_on = {j: _project(sample.residual_LND[c], directions[j]) for c, j in enumerate(layers)}
    fires = {j: (sample.layers[j][:, features[j]] > 0).toarray() for j in layers}
    found = Transported({}, {})
    for row, i in enumerate(layers[:-1]):
        later = layers[row + 1 :]
        y_NG = np.hstack([fitted_on[j] for j in later])
        w_DG, c_G = _fit_ridge(fit.residual_LND[row], y_NG)
        predicted_NG = _project(sample.residual_LND[row], w_DG.T) + c_G
        bounds = np.cumsum([len(features[j]) for j in later])[:-1]
        for j, z_NG in zip(later, np.split(predicted_NG, bounds, axis=1), strict=True):
            found.firing[i, j] = _explained(judged_on[j], z_NG, fires[j])
            found.everywhere[i, j] = _explained(judged_on[j], z_NG, np.ones_like(fires[j]))
    return found


def _chunks(x_ND: np.ndarray) -> Iterator[np.ndarray]:
    return (x_ND[start : start + CHUNK_TOKENS].astype(np.float64) for start in range(0, len(x_ND), CHUNK_TOKENS))


def _project(x_ND: np.ndarray, directions_GD: np.ndarray) -> np.ndarray:
    """x · d in float64, [N, G]."""
    return np.concatenate([x @ directions_GD.T for x in _chunks(x_ND)])


def _fit_ridge(x_ND: np.ndarray, y_NG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [D, G] and constants [G] of y from x, by least squares with a penalty on the weights alone."""
    num_tokens, width = x_ND.shape
    mean_D, mean_G = x_ND.mean(0, dtype=np.float64), y_NG.mean(0)
    gram_DD, product_DG = np.zeros((width, width)), np.zeros((width, y_NG.shape[1]))
    for start, x in zip(range(0, num_tokens, CHUNK_TOKENS), _chunks(x_ND), strict=True):
        x -= mean_D
        gram_DD += x.T @ x
        product_DG += x.T @ (y_NG[start : start + CHUNK_TOKENS] - mean_G)
    gram_DD[np.diag_indices(width)] += RIDGE * max(np.trace(gram_DD) / width, np.finfo(float).tiny)
    w_DG = scipy.linalg.solve(gram_DD, product_DG, assume_a="pos")
    return w_DG, mean_G - mean_D @ w_DG


def _explained(y_NG: np.ndarray, predicted_NG: np.ndarray, counted_NG: np.ndarray) -> np.ndarray:
    """1 − residual over variance on the tokens counted for each feature, [G]."""
    count_G = np.maximum(counted_NG.sum(0), 1)
    mean_G = (y_NG * counted_NG).sum(0) / count_G
    variance_G = ((y_NG - mean_G) ** 2 * counted_NG).sum(0)
    residual_G = ((y_NG - predicted_NG) ** 2 * counted_NG).sum(0)
    return 1 - np.divide(residual_G, variance_G, out=np.full(len(count_G), np.nan), where=variance_G > 0)
