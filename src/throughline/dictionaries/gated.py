"""Gated: one half of the encoder says which features are active, the other how much (Rajamanoharan et al. 2024a, arXiv 2404.16014).

    z = x @ W_enc + b_gate        f = H(z) relu(exp(r_mag) (z - b_gate) + b_mag)
    loss = (|x - x_hat(f)|^2 + lambda * sum_f relu(z_f) |W_dec,f| + |x - x_hat_frozen(relu(z))|^2) / D

The penalty is on the gate alone, so magnitudes do not shrink; H has no gradient, so the gate learns from the last term, in
which the decoder is a constant. lambda grows from 0 over the first tenth. `b_enc` of a dictionary is b_gate.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.relu import WARM_UP
from throughline.dictionaries.stack import Architecture, Stack, StepLoss


class Gated(Architecture):
    """Weights of its own: `r_mag`, `b_mag`. No options."""

    name = "gated"
    inference = "gated"

    @staticmethod
    def activate(
        pre_NF: Float[Tensor, "N F"], options: dict[str, Any], weights: dict[str, Tensor]
    ) -> Float[Tensor, "N F"]:
        """Magnitudes where the gate, which `pre_NF` is, is open."""
        return magnitudes(pre_NF, weights["b_enc"], weights["r_mag"], weights["b_mag"])

    @staticmethod
    def first_penalty(l1: float, d_model: int) -> float:
        """The study's L1 coefficient."""
        return l1

    @staticmethod
    def extra(shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Log scale and bias of the magnitudes; at zero they are those of the gate."""
        return {name: torch.zeros(shape[:2], requires_grad=True) for name in ("r_mag", "b_mag")}

    @staticmethod
    def fold(extra: dict[str, Tensor], norm_F: Tensor, offset_F: Tensor) -> dict[str, Tensor]:
        """The magnitude's bias takes the mean's part, stretched as the encoder is."""
        return {
            "r_mag": extra["r_mag"].clone(),
            "b_mag": extra["b_mag"] * norm_F - extra["r_mag"].exp() * offset_F,
        }

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
        r_mag_LF, b_mag_LF = stack.extra_LF["r_mag"], stack.extra_LF["b_mag"]
        per_feature = (weight_LF[:, None] for weight_LF in (stack.b_enc_LF, r_mag_LF, b_mag_LF))
        pre_LNF = stack.pre_activations(x_LND)
        gate_LNF = pre_LNF.relu()
        f_LNF = magnitudes(pre_LNF, *per_feature)
        x_hat_LND = f_LNF @ stack.W_dec_LFD + stack.b_dec_LD[:, None]
        by_gate_LND = gate_LNF @ stack.W_dec_LFD.detach() + stack.b_dec_LD.detach()[:, None]
        error_L = (x_LND - x_hat_LND).square().sum(-1).mean(1)
        auxiliary_L = (x_LND - by_gate_LND).square().sum(-1).mean(1)
        penalized_L = (gate_LNF * stack.W_dec_LFD.norm(dim=-1)[:, None]).sum(-1).mean(1)
        penalty_L = penalty_L * min(1.0, progress / WARM_UP)
        loss_L = (error_L + penalty_L * penalized_L + auxiliary_L) / x_LND.shape[-1]
        return StepLoss(loss_L, x_hat_LND, (f_LNF > 0).sum(1))


def magnitudes(gate: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """How active features are whose gate, z, is positive; 0 elsewhere."""
    return torch.where(gate > 0, (gate - b_gate) * r_mag.exp() + b_mag, 0).relu()
