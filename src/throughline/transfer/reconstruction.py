"""Reconstruction: how well the dictionary of layer i explains the activations of layer j.

    z = (x_j - mean_j) * s_i / s_j + mean_i         s = mean norm of centred activations
    EV[i, j] = 1 - sum|z - SAE_i(z)|^2 / sum|z - mean_i|^2

on held-out tokens, in the scaled variant: mean and one scalar per layer are taken out first, so that what is compared is the
directions. `raw` feeds x_j as it is. Ceiling: EV[j, j]. Null: the same with dictionary i's directions turned by a random
rotation. (Literature: a raw ratio of losses says nothing, since layers differ in scale and mean.)
"""

import math

import numpy as np
import torch

from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.records import TransferInfo, TransferResult
from throughline.transfer.pairs import NUM_RESAMPLES, Side

MOST_TOKENS = 8192


class Reconstruction:
    """Explained variance of layer j's activations by layer i's dictionary."""

    name = "reconstruction"
    across_models = False
    both_ways = False

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
        """Arrays value, low, high, null, ceiling, raw, l0 [Ls, Lt]."""
        if source.model != target.model:
            raise InputError("reconstruction compares layers of one model; models of other widths need a map")
        sample = source.sample
        assert sample.residual_LND is not None
        num_tokens = _whole_documents(sample.documents_N, min(MOST_TOKENS, sample.num_tokens))
        x_LND = torch.from_numpy(sample.residual_LND[:, :num_tokens])
        documents_N = torch.from_numpy(sample.documents_N[:num_tokens])
        means_LD = x_LND.mean(1)
        norms_L = (x_LND - means_LD[:, None]).norm(dim=2).mean(1)
        generator = torch.Generator().manual_seed(seed)
        rotation_DD = torch.linalg.qr(torch.randn(x_LND.shape[2], x_LND.shape[2], generator=generator)).Q
        weights_RB = _resampling_weights(documents_N, seed)
        L = len(list(source.dictionaries))
        names = ("value", "low", "high", "null", "raw", "l0")
        arrays = {name: np.full((L, L), np.nan) for name in names}
        for i, dictionary in enumerate(source.dictionaries.values()):
            for j in range(L):
                z_ND = (x_LND[j] - means_LD[j]) * (norms_L[i] / norms_L[j]) + means_LD[i]
                residual_N, variance_N, l0 = _residuals(dictionary, z_ND, means_LD[i])
                arrays["value"][i, j] = 1 - float(residual_N.sum() / variance_N.sum())
                arrays["low"][i, j], arrays["high"][i, j] = _interval(residual_N, variance_N, documents_N, weights_RB)
                arrays["l0"][i, j] = l0
                turned_ND = (z_ND - means_LD[i]) @ rotation_DD + means_LD[i]
                residual_N, variance_N, _ = _residuals(dictionary, turned_ND, means_LD[i])
                arrays["null"][i, j] = 1 - float(residual_N.sum() / variance_N.sum())
                residual_N, variance_N, _ = _residuals(dictionary, x_LND[j], means_LD[j])
                arrays["raw"][i, j] = 1 - float(residual_N.sum() / variance_N.sum())
        arrays["ceiling"] = np.broadcast_to(np.diag(arrays["value"]), (L, L)).copy()
        info = self._info(source, num_tokens, len(documents_N.unique()), seed)
        return [TransferResult(info, arrays)]

    def _info(self, source: Side, num_tokens: int, num_documents: int, seed: int) -> TransferInfo:
        return TransferInfo(
            metric=self.name,
            source=source.model,
            target=source.model,
            source_layers=list(source.dictionaries),
            target_layers=list(source.dictionaries),
            quantity="explained variance of the target layer's activations by the source layer's dictionary, "
            "mean and scale matched",
            null="the same with the activations turned by a random rotation",
            ceiling="explained variance by the target layer's own dictionary",
            num_tokens=num_tokens,
            num_documents=num_documents,
            coverage=1.0,
            seed=seed,
            details={"interval": f"bootstrap over documents, {NUM_RESAMPLES} resamples"},
        )


@torch.no_grad()
def _residuals(
    dictionary: Dictionary, x_ND: torch.Tensor, mean_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """|x - x_hat|^2 and |x - mean|^2 per token in float64, and L0."""
    residuals, active = [], 0
    for chunk in dictionary.chunks(x_ND):
        f_NF = dictionary.encode(chunk)
        residuals.append((chunk - dictionary.decode(f_NF)).square().sum(1).double())
        active += int((f_NF > 0).sum())
    return torch.cat(residuals), (x_ND - mean_D).square().sum(1).double(), active / max(1, len(x_ND))


def _whole_documents(documents_N: np.ndarray, most: int) -> int:
    """The largest number of tokens up to `most` that ends with a document (or `most`, if the first is longer)."""
    if most >= len(documents_N):
        return len(documents_N)
    cut = int(np.searchsorted(documents_N, documents_N[most]))
    return cut or most


def _resampling_weights(documents_N: torch.Tensor, seed: int) -> torch.Tensor:
    """How often each document is drawn in each resample, [resamples, documents]."""
    count = len(documents_N.unique())
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES)
    return torch.from_numpy(draws.astype(np.float64))


def _interval(
    residual_N: torch.Tensor, variance_N: torch.Tensor, documents_N: torch.Tensor, weights_RB: torch.Tensor
) -> tuple[float, float]:
    number_N = torch.unique(documents_N, return_inverse=True)[1]
    sums = torch.zeros(2, weights_RB.shape[1], dtype=torch.float64)
    sums[0].index_add_(0, number_N, residual_N)
    sums[1].index_add_(0, number_N, variance_N)
    ratios = 1 - (weights_RB @ sums[0]) / (weights_RB @ sums[1])
    low, high = (float(torch.quantile(ratios, q)) for q in (0.025, 0.975))
    return (low, high) if math.isfinite(low) else (math.nan, math.nan)
