"""TopK: the k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093).

loss = |x - x_hat|^2 / D + AuxK
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.auxk import auxk_loss
from throughline.dictionaries.selecting import keep_top
from throughline.dictionaries.share import WHOLE, Share
from throughline.dictionaries.stack import Architecture, Stack, StepLoss, count_fired

EVEN = 1e-5  # ranks this close to one another are the same


class TopK(Architecture):
    """Option: k. Weight of its own, after training: `rank`, if features are not in the units in which they were chosen."""

    name = "topk"
    inference = "topk"

    @staticmethod
    def activate(
        pre_NF: Float[Tensor, "N F"], options: dict[str, Any], weights: dict[str, Tensor]
    ) -> Float[Tensor, "N F"]:
        """The k largest positive entries of each row, or with `rank` those that are largest times it; all else zero."""
        if "rank" not in weights:
            return keep_top(pre_NF, options["k"])
        return torch.where(keep_top(pre_NF * weights["rank"], options["k"]) > 0, pre_NF, 0)

    @staticmethod
    def fold(extra: dict[str, Tensor], norm_F: Tensor, offset_F: Tensor) -> dict[str, Tensor]:
        """`rank`, by which features were held against one another before their units changed; none where all changed alike."""
        rank_F = extra.get("rank", torch.ones_like(norm_F)) / norm_F
        rank_F = rank_F / rank_F.mean()
        return {} if (rank_F - 1).abs().max() < EVEN else {"rank": rank_F}

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
        share: Share = WHOLE,
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
            loss_L = loss_L + auxk_loss(stack, pre_LNF, error_LND, dead_LF, share)
        return StepLoss(loss_L, x_hat_LND, count_fired(top.indices, values_LNK > 0, pre_LNF.shape[-1]))
