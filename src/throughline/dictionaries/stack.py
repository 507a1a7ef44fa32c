"""Dictionaries of several layers while they are trained: one tensor with a leading layer axis for each weight.

Stacked, one batched product serves all layers, and one optimizer step too; nothing couples them.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.share import WHOLE, Share

WHITENING = 0.1  # of the mean variance is added to every direction's, so that those with hardly any are not blown up
START_NOISE = 0.1  # length beside that of a row: no two features begin alike


class StepLoss(NamedTuple):
    """What an architecture's loss returns: the loss of each layer, the reconstruction, and which features fired."""

    loss_L: Float[Tensor, "L"]
    x_hat_LND: Float[Tensor, "L N D"]
    fired_LF: Int[Tensor, "L F"]  # tokens of the batch on which each feature fired
    smallest_L: Float[Tensor, "L"] | None = (
        None  # smallest activation kept, inf if none (architectures that measure it)
    )


class Architecture:
    """What the file of an architecture provides; what most have not is nothing here.

    Nothing has state; what training remembers is in the stack.
    """

    name: str
    inference: str  # the architecture that a trained dictionary is saved as
    # dead if silent for as many tokens as an average feature takes to fire so often; None: no such rule
    starved_after: float | None = None
    # a feature fires at first on what lies so many standard deviations of its pre-activation above the mean
    first_bias: float = 0.0

    @staticmethod
    def activate(pre_NF: Tensor, options: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
        """Features of pre-activations, same shape, zero where inactive; `weights` are `b_enc` and the dictionary's `extra`."""
        raise NotImplementedError

    @staticmethod
    def options(**settings: Any) -> dict[str, Any]:
        """What of the settings (`k`) a saved dictionary needs beside its weights."""
        return {}

    @staticmethod
    def first_penalty(l1: float, d_model: int) -> float | None:
        """Coefficient of the sparsity penalty to start from; None if there is none and `k` says how many features are active."""
        return None

    @staticmethod
    def extra(shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Initial weights of its own for a stack of shape [L, F, D], each [L, F]; those that require gradients are trained."""
        return {}

    @staticmethod
    def fold(extra: dict[str, Tensor], norm_F: Tensor, offset_F: Tensor) -> dict[str, Tensor]:
        """Weights of its own for one layer's raw activations, each [F].

        Pre-activations of raw x are norm_F times those of training; `offset_F` is mean @ W_enc of the folded encoder.
        """
        return {}

    @staticmethod
    def loss(
        stack: "Stack",
        x_LND: Tensor,
        dead_LF: Tensor,
        progress: float,
        *,
        k: int | None,
        penalty_L: Tensor,
        share: Share = WHOLE,
    ) -> StepLoss:
        """Loss of every layer on centred, scaled activations.

        `progress` is the share of the run done, `penalty_L` the coefficient of each layer's penalty, `share` what `x_LND` is
        of the batch.
        """
        raise NotImplementedError

    @staticmethod
    def after_step_(stack: "Stack", smallest_L: Tensor | None, trim_L: Tensor) -> None:
        """Bring the stack's own weights up to date after an optimizer step: clamp them, average them.

        `smallest_L` is the step's smallest activation kept (`StepLoss`); `trim_L` is how far, in logarithms, thresholds are to
        rise for the L0 asked for (SparsityController.trim).
        """


@dataclass(frozen=True)
class Stack:
    """Trainable weights of L layers of one shape, for activations that are centred and scaled, each coordinate by its own factor.

    Decoder rows have unit norm in this scale; the folded dictionary's have it in that of the residual stream.
    """

    W_enc_LFD: Float[Tensor, "L F D"]  # a row per feature, as the decoder's: the gradients of active features are rows
    b_enc_LF: Float[Tensor, "L F"]
    W_dec_LFD: Float[Tensor, "L F D"]
    b_dec_LD: Float[Tensor, "L D"]
    # An architecture's own; those that require gradients are trained.
    extra_LF: dict[str, Float[Tensor, "L F"]] = field(default_factory=dict)

    @classmethod
    def initialize(
        cls,
        samples_LND: Float[Tensor, "L N D"],
        d_sae: int,
        generators: list[torch.Generator],
        architecture: type[Architecture],
    ) -> "Stack":
        """Tied unit rows: directions of sampled activations after whitening, with a little noise.

        In a language model a few directions hold most of the variance, and activations as they are all point along these:
        features that begin there compete for the same tokens, and half of them die (docs/real-models.md). Each layer draws
        from its own generator: a shared start would fake matches between layers.
        """
        rows = []
        for x_ND, generator in zip(samples_LND, generators, strict=True):
            N, D = x_ND.shape
            order = torch.cat([torch.randperm(N, generator=generator) for _ in range(-(-d_sae // N))])[:d_sae]
            row_FD = normalize(whiten(x_ND, x_ND)[order.to(x_ND.device)], dim=1)
            noise_FD = torch.randn(d_sae, D, generator=generator).to(x_ND)
            rows.append(normalize(row_FD + START_NOISE * normalize(noise_FD, dim=1), dim=1))
        W_dec_LFD = torch.stack(rows)
        L, F, D = W_dec_LFD.shape
        weights = (W_dec_LFD.clone(), W_dec_LFD.new_zeros(L, F), W_dec_LFD, W_dec_LFD.new_zeros(L, D))
        extra = {
            name: tensor.detach().to(W_dec_LFD.device).requires_grad_(tensor.requires_grad)
            for name, tensor in architecture.extra((L, F, D)).items()
        }
        return cls(*(w.requires_grad_() for w in weights), extra_LF=extra)

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name."""
        four = {"W_enc": self.W_enc_LFD, "b_enc": self.b_enc_LF, "W_dec": self.W_dec_LFD, "b_dec": self.b_dec_LD}
        return four | self.extra_LF

    def trained(self) -> dict[str, Tensor]:
        """The weights that are trained: four, and what the architecture adds."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}

    def parameters(self) -> list[Tensor]:
        """The same, without names."""
        return list(self.trained().values())

    def single(self, index: int) -> "Stack":
        """One layer as a stack of its own that shares this one's memory; it takes no gradients."""
        one = slice(index, index + 1)
        four = (w.detach()[one] for w in (self.W_enc_LFD, self.b_enc_LF, self.W_dec_LFD, self.b_dec_LD))
        return Stack(*four, extra_LF={name: tensor.detach()[one] for name, tensor in self.extra_LF.items()})

    def pre_activations(self, x_LND: Float[Tensor, "L N D"]) -> Float[Tensor, "L N F"]:
        """x @ W_enc + b_enc for every layer."""
        return torch.baddbmm(self.b_enc_LF[:, None], x_LND, self.W_enc_LFD.mT)

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
        architecture: type[Architecture],
        mean_D: Tensor,
        scale_D: Tensor,
        options: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Dictionary:
        """Layer `index` as a dictionary of raw activations.

        Training saw s * (x - m), s by coordinate. Rows W_dec / s reconstruct x - m. With their norms n, f' = n f gives
        x_hat = f' @ (W_dec / s / n) + b_dec / s + m, and since the activations are positively homogeneous
        f' = act(x @ (n s W_enc) + n b_enc - m @ (n s W_enc)); of what chooses by size among features `fold` keeps the choice.
        """
        W_dec = self.W_dec_LFD[index].detach() / scale_D
        norm_F = W_dec.norm(dim=1).clamp_min(1e-30)
        W_enc = (self.W_enc_LFD[index].detach() * scale_D * norm_F[:, None]).T.contiguous()
        offset_F = mean_D @ W_enc
        extra = {name: tensor[index].detach() for name, tensor in self.extra_LF.items()}
        return Dictionary(
            architecture.inference,
            W_enc=W_enc,
            b_enc=self.b_enc_LF[index].detach() * norm_F - offset_F,
            W_dec=W_dec / norm_F[:, None],
            b_dec=self.b_dec_LD[index].detach() / scale_D + mean_D,
            extra=architecture.fold(extra, norm_F, offset_F),
            options=options,
            metadata=metadata,
        )


def whiten(rows_AD: Float[Tensor, "A D"], x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "A D"]:
    """Rows times (C + WHITENING * mean eigenvalue of C)^(-1/2), C the covariance of centred x: no direction dominates."""
    rows, x = (t.to("cpu" if t.device.type == "mps" else t.device, torch.float64) for t in (rows_AD, x_ND))
    values_D, vectors_DD = torch.linalg.eigh(x.T @ x / len(x))
    scale_D = (values_D.clamp_min(0) + WHITENING * values_D.mean().clamp_min(1e-30)).rsqrt()
    return ((rows @ vectors_DD * scale_D) @ vectors_DD.T).to(rows_AD)


def count_fired(features_LNK: Int[Tensor, "L N K"], active_LNK: Bool[Tensor, "L N K"], d_sae: int) -> Tensor:
    """On how many tokens each feature fired, [L, F]."""
    L = features_LNK.shape[0]
    counts = torch.zeros(L, d_sae, dtype=torch.int64, device=features_LNK.device)
    return counts.scatter_add_(1, features_LNK.reshape(L, -1), active_LNK.reshape(L, -1).long())
