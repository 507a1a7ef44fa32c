"""ReLU with an L1 penalty, weighted by decoder norms (Anthropic's April 2024 update, transformer-circuits.pub).

loss = (|x - x_hat|^2 + lambda * sum_f f |W_dec,f|) / D        lambda grows from 0 over the first tenth
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.stack import Architecture, Stack, StepLoss

WARM_UP = 0.1
TRIM = 0.5  # of an activation's usual size, which is near 1 at the scale of training


class ReLU(Architecture):
    """Options: none at inference; the L1 coefficient of each layer in training."""

    name = "relu"
    inference = "relu"
    # A tenth of the features on a token. With half of them, which biases of 0 give, a short run ends with several times the
    # features at twice the error.
    first_bias = 1.3

    @staticmethod
    def activate(
        pre_NF: Float[Tensor, "N F"], options: dict[str, Any], weights: dict[str, Tensor]
    ) -> Float[Tensor, "N F"]:
        """Negative entries become zero."""
        return pre_NF.relu()

    @staticmethod
    def first_penalty(l1: float, d_model: int) -> float:
        """The study's L1 coefficient."""
        return l1

    @staticmethod
    def loss(
        stack: Stack,
        x_LND: Float[Tensor, "L N D"],
        dead_LF: Bool[Tensor, "L F"],
        progress: float,
        penalty_L: Float[Tensor, "L"],
        **_: Any,
    ) -> StepLoss:
        """Loss of every layer on centred, scaled activations."""
        f_LNF = stack.pre_activations(x_LND).relu()
        x_hat_LND = f_LNF @ stack.W_dec_LFD + stack.b_dec_LD[:, None]
        l1_L = (f_LNF * stack.W_dec_LFD.norm(dim=-1)[:, None]).sum(-1).mean(1)
        error_L = (x_LND - x_hat_LND).square().sum(-1).mean(1)
        loss_L = (error_L + penalty_L * min(1.0, progress / WARM_UP) * l1_L) / x_LND.shape[-1]
        return StepLoss(loss_L, x_hat_LND, (f_LNF > 0).sum(1))

    @staticmethod
    @torch.no_grad()
    def after_step_(stack: Stack, smallest_L: Float[Tensor, "L"] | None, trim_L: Float[Tensor, "L"]) -> None:
        """Biases sink a little where more features are active than asked for, towards the end of the run."""
        stack.b_enc_LF.sub_(TRIM * trim_L[:, None])
