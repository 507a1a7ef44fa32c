"""JumpReLU: a threshold of its own for each feature, and a penalty on L0 itself (Rajamanoharan et al. 2024b, arXiv 2407.14435).

    f = z H(z - theta)        loss = (|x - x_hat|^2 + lambda * sum_f H(z_f - theta_f)) / D        z = x @ W_enc + b_enc

lambda grows from 0 over the first tenth. The step H has no gradient; thresholds get the paper's pseudo-derivatives, from the
tokens within half a bandwidth of the threshold:

    df/dtheta = -(theta / eps) rect((z - theta) / eps)        dH/dtheta = -(1 / eps) rect((z - theta) / eps)

lambda, and in the end the thresholds, are moved by a controller (training/sparsity.py) until L0 is what was asked for.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.relu import WARM_UP
from throughline.dictionaries.stack import Architecture, Stack, StepLoss

# The paper has threshold and bandwidth 0.001 where E|x|^2 = 1; activations scale with |x|, here sqrt(D). A window so narrow
# holds one token in thousands, which runs of 10^9 tokens can afford and ours cannot. Chosen by that argument, not by a sweep.
THRESHOLD = 0.02  # of sqrt(D)
BANDWIDTH = 0.05  # of sqrt(D)
PENALTY = 0.012  # of D: where the controller starts


class JumpReLU(Architecture):
    """Weights of its own: `threshold`. No options."""

    name = "jumprelu"
    inference = "jumprelu"

    @staticmethod
    def activate(
        pre_NF: Float[Tensor, "N F"], options: dict[str, Any], weights: dict[str, Tensor]
    ) -> Float[Tensor, "N F"]:
        """Entries above their feature's threshold (and 0) stay, others become zero."""
        return torch.where(pre_NF > weights["threshold"], pre_NF, 0).relu()

    @staticmethod
    def first_penalty(l1: float, d_model: int) -> float:
        """Coefficient of L0 to start from."""
        return PENALTY * d_model

    @staticmethod
    def extra(shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Thresholds, trained as they are (not their logarithm, which Adam moves by a constant factor a step)."""
        L, F, D = shape
        return {"threshold": torch.full((L, F), THRESHOLD * math.sqrt(D), requires_grad=True)}

    @staticmethod
    def fold(extra: dict[str, Tensor], norm_F: Tensor, offset_F: Tensor) -> dict[str, Tensor]:
        """Thresholds of raw pre-activations."""
        return {"threshold": extra["threshold"] * norm_F}

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
        D = x_LND.shape[-1]
        pre_LNF = stack.pre_activations(x_LND).to(x_LND.dtype)
        threshold_L1F = stack.extra_LF["threshold"][:, None]
        step_LNF = (pre_LNF > threshold_L1F).to(x_LND.dtype)
        ste_LNF = straight_through(pre_LNF, threshold_L1F, BANDWIDTH * math.sqrt(D))
        f_LNF = pre_LNF * step_LNF + threshold_L1F.detach() * ste_LNF
        x_hat_LND = f_LNF @ stack.W_dec_LFD + stack.b_dec_LD[:, None]
        error_L = (x_LND - x_hat_LND).square().sum(-1).mean(1)
        l0_L = (step_LNF + ste_LNF).sum(-1).mean(1)
        loss_L = (error_L + penalty_L * min(1.0, progress / WARM_UP) * l0_L) / D
        return StepLoss(loss_L, x_hat_LND, (step_LNF > 0).sum(1))

    @staticmethod
    @torch.no_grad()
    def after_step_(stack: Stack, smallest_L: Float[Tensor, "L"] | None, trim_L: Float[Tensor, "L"]) -> None:
        """Trim thresholds; they stay at 0 or above, since below negative activations would pass."""
        stack.extra_LF["threshold"].mul_(trim_L.exp()[:, None]).clamp_(min=0)


def straight_through(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Zero, whose derivative with respect to the threshold is -(1 / eps) rect((z - theta) / eps), and to z is 0."""
    ramp = ((pre.detach() - threshold) / bandwidth).clamp(-0.5, 0.5)
    return ramp - ramp.detach()
