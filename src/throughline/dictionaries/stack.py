"""Dictionaries of several layers while they are trained: one tensor with a leading layer axis for each weight.

Stacked, one batched product serves all layers, and one optimizer step too; nothing couples them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from throughline.dictionaries.dictionary import Dictionary


class StepLoss(NamedTuple):
    """What an architecture's loss returns: the loss of each layer, the reconstruction, and which features fired."""

    loss_L: Float[Tensor, "L"]
    x_hat_LND: Float[Tensor, "L N D"]
    fired_LF: Int[Tensor, "L F"]  # tokens of the batch on which each feature fired


@dataclass(frozen=True)
class Stack:
    """Trainable weights of L layers of one shape, for activations that are centred and scaled to mean norm sqrt(D)."""

    W_enc_LDF: Float[Tensor, "L D F"]
    b_enc_LF: Float[Tensor, "L F"]
    W_dec_LFD: Float[Tensor, "L F D"]
    b_dec_LD: Float[Tensor, "L D"]

    @classmethod
    def initialize(cls, samples_LND: Float[Tensor, "L N D"], d_sae: int, generators: list[torch.Generator]) -> "Stack":
        """Tied unit rows, half of them directions of sampled activations, half random.

        Directions of the data leave fewer features dead than random ones; random ones keep the dictionary from
        collapsing onto frequent tokens. Each layer draws from its own generator: a shared start would fake matches
        between layers.
        """
        rows = []
        for x_ND, generator in zip(samples_LND, generators, strict=True):
            row_FD = torch.randn(d_sae, x_ND.shape[1], generator=generator).to(x_ND)
            picks = torch.randint(len(x_ND), (d_sae // 2,), generator=generator)
            row_FD[: d_sae // 2] = x_ND[picks.to(x_ND.device)] + 0.1 * row_FD[: d_sae // 2]
            rows.append(row_FD / row_FD.norm(dim=1, keepdim=True).clamp_min(1e-8))
        W_dec_LFD = torch.stack(rows)
        L, F, D = W_dec_LFD.shape
        weights = (W_dec_LFD.mT.contiguous(), W_dec_LFD.new_zeros(L, F), W_dec_LFD, W_dec_LFD.new_zeros(L, D))
        return cls(*(w.requires_grad_() for w in weights))

    def parameters(self) -> list[Tensor]:
        """The four weights."""
        return [self.W_enc_LDF, self.b_enc_LF, self.W_dec_LFD, self.b_dec_LD]

    def pre_activations(self, x_LND: Float[Tensor, "L N D"]) -> Float[Tensor, "L N F"]:
        """x @ W_enc + b_enc for every layer."""
        return torch.baddbmm(self.b_enc_LF[:, None], x_LND, self.W_enc_LDF)

    def decode_sparse(
        self, values_LNK: Float[Tensor, "L N K"], features_LNK: Int[Tensor, "L N K"]
    ) -> Float[Tensor, "L N D"]:
        """The sum of K decoder rows per token, without b_dec; reads K rows instead of F."""
        L, N, K = values_LNK.shape
        F, D = self.W_dec_LFD.shape[1:]
        rows = features_LNK + F * torch.arange(L, device=features_LNK.device)[:, None, None]
        return embedding_bag(
            rows.reshape(L * N, K),
            self.W_dec_LFD.reshape(L * F, D),
            per_sample_weights=values_LNK.reshape(L * N, K),
            mode="sum",
        ).view(L, N, D)

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of the decoder's gradient what would only change row norms, which are fixed at 1."""
        gradient = self.W_dec_LFD.grad
        assert gradient is not None
        gradient.sub_((gradient * self.W_dec_LFD).sum(-1, keepdim=True) * self.W_dec_LFD)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Bring decoder rows back to unit norm."""
        self.W_dec_LFD.div_(self.W_dec_LFD.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def fold(
        self,
        index: int,
        architecture: str,
        mean_D: Tensor,
        scale: float,
        options: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Dictionary:
        """Layer `index` as a dictionary of raw activations.

        Training saw s(x - m). With unit rows, f' = f / s gives x_hat = f' @ W_dec + b_dec / s + m, and since the
        activations are positively homogeneous f' = act(x @ W_enc + b_enc / s - m @ W_enc).
        """
        W_enc, W_dec = self.W_enc_LDF[index].detach().clone(), self.W_dec_LFD[index].detach().clone()
        norm_F1 = W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
        W_enc, b_enc, W_dec = W_enc * norm_F1.T, self.b_enc_LF[index] * norm_F1[:, 0], W_dec / norm_F1
        return Dictionary(
            architecture,
            W_enc=W_enc,
            b_enc=b_enc / scale - mean_D @ W_enc,
            W_dec=W_dec,
            b_dec=self.b_dec_LD[index] / scale + mean_D,
            options=options,
            metadata=metadata,
        )


def count_fired(features_LNK: Int[Tensor, "L N K"], active_LNK: Bool[Tensor, "L N K"], d_sae: int) -> Tensor:
    """On how many tokens each feature fired, [L, F]."""
    L = features_LNK.shape[0]
    counts = torch.zeros(L, d_sae, dtype=torch.int64, device=features_LNK.device)
    return counts.scatter_add_(1, features_LNK.reshape(L, -1), active_LNK.reshape(L, -1).long())
