"""Slow and exact ways to the numbers that the package computes fast: loops over tokens, dense matrices, nothing shared."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from throughline.dictionaries.auxk import AUX_TOKENS, AUX_WEIGHT


def topk_features(x_ND: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """Token by token: the k largest pre-activations, those of them that are positive."""
    rows = []
    for x_D in x_ND:
        pre_F = x_D @ W_enc + b_enc
        kept_F = torch.zeros_like(pre_F)
        kept_F[pre_F.argsort(descending=True)[:k]] = 1
        rows.append(pre_F * kept_F * (pre_F > 0))
    return torch.stack(rows)


def topk_loss(x_ND: Tensor, weights: Sequence[Tensor], k: int, dead_F: Tensor) -> Tensor:
    """|x - x_hat|^2 / D, and AuxK where some features are dead (Gao et al. 2024, section 2.4 and appendix A.2).

    AuxK is taken on the same part of the tokens as in training.
    """
    W_enc, b_enc, W_dec, b_dec = weights
    D = x_ND.shape[1]
    x_hat_ND = topk_features(x_ND, W_enc, b_enc, k) @ W_dec + b_dec
    loss = torch.stack([(x - x_hat).square().sum() / D for x, x_hat in zip(x_ND, x_hat_ND, strict=True)]).mean()
    n = min(len(x_ND), AUX_TOKENS)
    return loss + AUX_WEIGHT * aux_loss(x_ND[:n], x_hat_ND[:n], weights, dead_F) if dead_F.any() else loss


def aux_loss(x_ND: Tensor, x_hat_ND: Tensor, weights: Sequence[Tensor], dead_F: Tensor) -> Tensor:
    """|e - e_hat|^2 / |e - mean(e)|^2, where e_hat is made of the D / 2 strongest dead features of each token."""
    W_enc, b_enc, W_dec, _ = weights
    error_ND = (x_ND - x_hat_ND).detach()
    dead = dead_F.nonzero()[:, 0]
    f_NF = topk_features(x_ND, W_enc[:, dead], b_enc[dead], min(x_ND.shape[1] // 2, len(dead)))
    left = (error_ND - f_NF @ W_dec[dead]).square().sum()
    return left / (error_ND - error_ND.mean(0)).square().sum()


def relu_loss(x_ND: Tensor, weights: Sequence[Tensor], l1: float) -> Tensor:
    """(|x - x_hat|^2 + l1 * sum_f f |W_dec,f|) / D, mean over tokens."""
    W_enc, b_enc, W_dec, b_dec = weights
    terms = []
    for x_D in x_ND:
        f_F = (x_D @ W_enc + b_enc).clamp_min(0)
        penalty = sum(f * row.norm() for f, row in zip(f_F, W_dec, strict=True))
        terms.append(((x_D - f_F @ W_dec - b_dec).square().sum() + l1 * penalty) / len(x_D))
    return torch.stack(terms).mean()


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two dense vectors."""
    return float(np.corrcoef(a, b)[0, 1])


def precision_recall_f1(said: Sequence[bool], true: Sequence[bool]) -> tuple[float, float, float]:
    """By counting, one token after another; 0 where a share is of nothing."""
    hits = num_said = num_true = 0
    for s, t in zip(said, true, strict=True):
        hits += bool(s) and bool(t)
        num_said += bool(s)
        num_true += bool(t)
    precision = hits / num_said if num_said else 0.0
    recall = hits / num_true if num_true else 0.0
    return precision, recall, 2 * hits / (num_said + num_true) if num_said + num_true else 0.0
