"""BatchTopK: the N k largest pre-activations of a batch of N tokens, k a token on average (Bussmann et al. 2024, 2412.06410).

    loss = |x - x_hat|^2 / D + AuxK

A token's features must not depend on its batch, so a trained dictionary is a `jumprelu` whose one threshold is the running mean
of the smallest activation kept in a batch.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.auxk import auxk_loss
from throughline.dictionaries.jumprelu import JumpReLU
from throughline.dictionaries.share import WHOLE, Share
from throughline.dictionaries.stack import Architecture, Stack, StepLoss

# Weight of the newest batch in the running mean (SAELens; dictionary_learning has 0.001, longer than a short run); the first
# batches weigh the same, so that nothing is left of where it started.
THRESHOLD_RATE = 0.01


class BatchTopK(Architecture):
    """Option in training: k. Weights of its own: `threshold`, measured, not trained."""

    name = "batch_topk"
    inference = "jumprelu"
    # Under one threshold for all, a feature that means nothing still fires by chance once in a long while, too seldom to learn and
    # too often to be dead by a count of tokens: on planted directions, 22 % of the features of a run of 500,000 tokens.
    starved_after = 20.0
    activate = JumpReLU.activate
    fold = JumpReLU.fold

    @staticmethod
    def extra(shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """The threshold, the same for all features of a layer, and of how many batches it is the mean."""
        return {name: torch.zeros(shape[:2]) for name in ("threshold", "num_batches")}

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
        x_hat_LND = f_LNF @ stack.W_dec_LFD + stack.b_dec_LD[:, None]
        error_LND = x_LND - x_hat_LND
        loss_L = error_LND.square().mean(dim=(1, 2))
        if dead_LF.any():
            loss_L = loss_L + auxk_loss(stack, pre_LNF, error_LND, dead_LF, share)
        return StepLoss(loss_L, x_hat_LND, (f_LNF > 0).sum(1), smallest_positive(f_LNF))

    @staticmethod
    @torch.no_grad()
    def after_step_(stack: Stack, smallest_L: Float[Tensor, "L"] | None, trim_L: Float[Tensor, "L"]) -> None:
        """Move the threshold towards the smallest activation kept; a layer that kept none leaves it."""
        assert smallest_L is not None
        threshold_LF, num_batches_LF = stack.extra_LF["threshold"], stack.extra_LF["num_batches"]
        smallest_L1 = smallest_L[:, None]
        kept_L1 = smallest_L1.isfinite()
        num_batches_LF += kept_L1
        rate_LF = (1 / num_batches_LF).clamp(min=THRESHOLD_RATE)
        threshold_LF += torch.where(kept_L1, rate_LF * (smallest_L1 - threshold_LF), 0.0)


def keep_largest(pre_LNF: Float[Tensor, "L N F"], k: int, share: Share = WHOLE) -> Float[Tensor, "L N F"]:
    """The N k largest positive entries of each layer, N being the tokens of the whole batch; all else zero."""
    L, N, _ = pre_LNF.shape
    flat, num_kept = pre_LNF.reshape(L, -1), share.num_tokens(N) * k
    top = flat.topk(min(num_kept, flat.shape[1]), dim=1, sorted=False)
    kept = share.keep_largest(top.values.relu(), num_kept)
    return torch.zeros_like(flat).scatter(1, top.indices, kept).view_as(pre_LNF)


def smallest_positive(f_LNF: Float[Tensor, "L N F"]) -> Float[Tensor, "L"]:
    """The smallest active value of each layer; inf where nothing is active."""
    return f_LNF.detach().masked_fill(f_LNF <= 0, torch.inf).amin(dim=(1, 2))
