"""Matryoshka: BatchTopK whose first features must do on their own (Bussmann et al. 2025, arXiv 2503.17547).

    loss = mean over prefixes m of |x - b_dec - sum_{f < m} f_f W_dec,f|^2 / D + AuxK

Prefixes end after 1/32, 1/16 + 1/32, 1/8 + …, 1/4 + … and all of the features, so general features are not absorbed.
A mean as in dictionary_learning; SAELens sums, which differs by a factor that Adam does not see (but for the share of AuxK).
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.auxk import auxk_loss
from throughline.dictionaries.batch_topk import BatchTopK, keep_largest, smallest_positive
from throughline.dictionaries.share import WHOLE, Share
from throughline.dictionaries.stack import Stack, StepLoss

GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # shares of the features; the last group is the rest


class Matryoshka(BatchTopK):
    """As BatchTopK; the order of the features means something."""

    name = "matryoshka"

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
        pre_LNF = stack.pre_activations(x_LND).to(x_LND.dtype)
        f_LNF = keep_largest(pre_LNF, k, share)
        x_hat_LND, losses = stack.b_dec_LD[:, None], []
        for start, end in pairwise([0, *prefixes(f_LNF.shape[-1])]):
            x_hat_LND = x_hat_LND + f_LNF[..., start:end] @ stack.W_dec_LFD[:, start:end]
            losses.append((x_LND - x_hat_LND).square().mean(dim=(1, 2)))
        loss_L = torch.stack(losses).mean(0)
        if dead_LF.any():
            loss_L = loss_L + auxk_loss(stack, pre_LNF, x_LND - x_hat_LND, dead_LF, share)
        return StepLoss(loss_L, x_hat_LND, (f_LNF > 0).sum(1), smallest_positive(f_LNF))


def prefixes(d_sae: int) -> list[int]:
    """Where the nested groups of features end; the last is all of them."""
    ends = [round(d_sae * share) for share in accumulate(GROUPS)]
    return [*sorted({end for end in ends if 0 < end < d_sae}), d_sae]
