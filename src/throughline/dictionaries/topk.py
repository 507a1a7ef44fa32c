"""TopK: the k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093).

    loss = |x - x_hat|^2 / D + (1/32) |e - e_hat|^2 / |e - mean(e)|^2        e = x - x_hat

The second term (AuxK) lets features that have stopped firing reconstruct the error, with k_aux = D / 2 of them,
on the first quarter of the batch's tokens.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.stack import Stack, StepLoss, count_fired

AUX_WEIGHT = 1 / 32
AUX_TOKENS_DIVISOR = 4  # AuxK reads D / 2 rows a token, more than the features themselves: a part of the batch will do


class TopK:
    """Options: k."""

    name = "topk"

    @staticmethod
    def activate(pre_NF: Float[Tensor, "N F"], options: dict[str, Any]) -> Float[Tensor, "N F"]:
        """The k largest positive entries of each row; all else zero."""
        values, features = pre_NF.topk(min(options["k"], pre_NF.shape[1]), dim=1)
        return torch.zeros_like(pre_NF).scatter_(1, features, values.relu())

    @staticmethod
    def options(k: int, **_: Any) -> dict[str, Any]:
        """What of a dictionary's specification this architecture uses at inference."""
        return {"k": k}

    @staticmethod
    def loss(
        stack: Stack,
        x_LND: Float[Tensor, "L N D"],
        dead_LF: Bool[Tensor, "L F"],
        progress: float,
        k: int,
        **_: Any,
    ) -> StepLoss:
        """Loss of every layer on centred, scaled activations."""
        pre_LNF = stack.pre_activations(x_LND)
        top = pre_LNF.topk(k, dim=-1, sorted=False)
        values_LNK = top.values.relu().to(x_LND.dtype)
        x_hat_LND = stack.decode_sparse(values_LNK, top.indices) + stack.b_dec_LD[:, None]
        error_LND = x_LND - x_hat_LND
        loss_L = error_LND.square().mean(dim=(1, 2))
        if dead_LF.any():
            some = slice(0, max(1, x_LND.shape[1] // AUX_TOKENS_DIVISOR))
            aux_L = _aux_loss(stack, pre_LNF[:, some], error_LND[:, some].detach(), dead_LF)
            loss_L = loss_L + AUX_WEIGHT * aux_L
        return StepLoss(loss_L, x_hat_LND, count_fired(top.indices, values_LNK > 0, pre_LNF.shape[-1]))


def _aux_loss(stack: Stack, pre_LNF: Tensor, error_LND: Tensor, dead_LF: Tensor) -> Tensor:
    """How badly dead features reconstruct the error, relative to its variance; 0 for layers without dead features."""
    num_dead_L = dead_LF.sum(1)
    k_aux = min(error_LND.shape[-1] // 2, int(num_dead_L.max()))
    top = pre_LNF.masked_fill(~dead_LF[:, None], -torch.inf).topk(k_aux, dim=-1, sorted=False)
    values = top.values.relu().to(
        error_LND.dtype
    )  # relu also silences the -inf of layers with fewer than k_aux dead features
    e_hat_LND = stack.decode_sparse(values, top.indices)
    variance_L = (error_LND - error_LND.mean(1, keepdim=True)).square().mean(dim=(1, 2))
    relative_L = (error_LND - e_hat_LND).square().mean(dim=(1, 2)) / variance_L.clamp_min(1e-12)
    return torch.where(num_dead_L > 0, relative_L, 0.0)
