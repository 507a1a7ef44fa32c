"""Activations made of 512 known directions in 64 dimensions: what a dictionary should find.

    x = sum_f a_f d_f + m        d_f random unit vectors, a_f = 0 or uniform in [0.5, 1.5], m a mean of norm 1

On average 5 features are active, so that each token is a sparse sum and the directions are identifiable: a token with the true
directions known is solved by non-negative least squares. Rates fall with rank as rank^-0.5 (the rarest fires on 0.5 % of tokens,
the most frequent on 11 %). There is no noise: what is left unexplained is the dictionary's own failure.

    plain          features fire independently of one another
    hierarchical   64 parents with 7 children each; with half of a parent's firings comes one of its children, never a child alone
    correlated     32 blocks of 16 features; a Gaussian copula with correlation 0.5 within a block, none between, rates as in plain
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

Variant = Literal["plain", "hierarchical", "correlated"]
VARIANTS: tuple[Variant, ...] = ("plain", "hierarchical", "correlated")
NUM_FEATURES, D_MODEL, MEAN_L0 = 512, 64, 5.0
CHILDREN, CHILD_SHARE = 7, 0.5
BLOCK, CORRELATION = 16, 0.5
CHUNK = 50_000


class Planted(NamedTuple):
    """`x_ND` are activations, `rates_F` how often each of the directions `d_FD` was active in them."""

    x_ND: Tensor
    d_FD: Tensor
    rates_F: Tensor


def plant(
    variant: Variant,
    num_tokens: int,
    seed: int = 0,
    *,
    num_features: int = NUM_FEATURES,
    d_model: int = D_MODEL,
    mean_l0: float = MEAN_L0,
) -> Planted:
    """Activations of one variant; the same seed has the same directions, and the first tokens of more tokens are the same."""
    generator = torch.Generator().manual_seed(seed)
    d_FD = normalize(torch.randn(num_features, d_model, generator=generator))
    mean_D = normalize(torch.randn(d_model, generator=generator), dim=0)
    order_F = torch.randperm(num_features, generator=generator)
    rates_F = (1.0 + order_F).rsqrt()
    rates_F = rates_F * (mean_l0 / rates_F.sum())
    parts, count_F = [], torch.zeros(num_features)
    for start in range(0, num_tokens, CHUNK):
        n = min(CHUNK, num_tokens - start)
        active_NF = _firing(variant, rates_F, mean_l0, generator)[:n]
        size_NF = 0.5 + torch.rand(CHUNK, num_features, generator=generator)[:n]
        parts.append((active_NF * size_NF) @ d_FD + mean_D)
        count_F += active_NF.sum(0)
    return Planted(torch.cat(parts), d_FD, count_F / num_tokens)


def _firing(variant: Variant, rates_F: Tensor, mean_l0: float, generator: torch.Generator) -> Tensor:
    """Which features fire on each of CHUNK tokens, bool [N, F]."""
    F = len(rates_F)
    uniform_NF = torch.rand(CHUNK, F, generator=generator)
    if variant == "plain":
        return uniform_NF < rates_F
    if variant == "correlated":
        block_NG = torch.randn(CHUNK, -(-F // BLOCK), generator=generator)
        shared_NF = block_NG.repeat_interleave(BLOCK, dim=1)[:, :F]
        own_NF = torch.special.ndtri(uniform_NF.clamp(1e-7, 1 - 1e-7))
        z_NF = CORRELATION**0.5 * shared_NF + (1 - CORRELATION) ** 0.5 * own_NF
        return z_NF > -torch.special.ndtri(rates_F)
    P = F // (1 + CHILDREN)
    parent_NP = uniform_NF[:, :P] < mean_l0 / (P * (1 + CHILD_SHARE))
    which_NP = (uniform_NF[:, P : 2 * P] * (CHILDREN / CHILD_SHARE)).long()  # CHILDREN and more: no child
    child_NPC = parent_NP[..., None] & (which_NP[..., None] == torch.arange(CHILDREN))
    return torch.cat([parent_NP, child_NPC.flatten(1)], dim=1)
