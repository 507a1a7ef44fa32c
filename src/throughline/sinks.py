"""Attention sinks: tokens whose residual stream is out of all proportion to that of any other token of the layer.

Language models park attention on a few tokens (the first of a text, BOS, a lone quote or space), to which some block gives a
norm of up to several hundred times the median. What such a token's stream says is that it is a sink, and nothing of the text,
yet its variance can be 99 % of a layer's (Sun et al. 2024, arXiv 2402.17762; Xiao et al. 2024, arXiv 2309.17453).

Large tokens are no sinks because they are large: after Gemma 3's block 0 the space before a number is 15 times as long as the
median. What tells sinks apart is a gap. Ordinary norms, however far they reach, have no hole in between (the widest found in two
language models: a factor of 1.42), whereas sinks lie beyond an empty band (the narrowest: 1.59). So a layer's limit is the middle
of the first band at least GAP wide; docs/real-models.md has the figures of every layer, and where this rule finds nothing.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

GAP = 1.5  # between the largest ordinary norm and the smallest of a sink
LEAST = 2.0  # times the median: no sink is shorter
MOST_SHARE = 0.25  # of the tokens: more of them are no exception
PIECE_TOKENS = 4096  # whose norms are computed at once
BEYOND_ALL = 2.0  # the limit where no band is found, as a multiple of the largest norm seen


def find_sink_norm(x_ND: Float[Tensor, "N D"]) -> float:
    """The norm above which a token of this layer is a sink, from a sample of the layer's tokens."""
    return _limit_of(measure_norms(x_ND).double().sort().values.cpu())


def measure_norms(x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """Norms in float32, a piece at a time: a chunk of bfloat16 is not copied whole."""
    return (
        torch.cat([piece.float().norm(dim=1) for piece in x_ND.split(PIECE_TOKENS)]) if len(x_ND) else x_ND.new_zeros(0)
    )


def _limit_of(sorted_N: Float[Tensor, "N"]) -> float:
    if not len(sorted_N):
        return math.inf
    first = max(0, math.ceil((1 - MOST_SHARE) * len(sorted_N)) - 1)
    below, above = sorted_N[first:-1], sorted_N[first + 1 :]
    median = sorted_N[len(sorted_N) // 2]
    is_band = (above >= GAP * below) & (above >= LEAST * median) & (below > 0)
    if is_band.any():
        band = int(is_band.nonzero()[0, 0])
        return float((below[band] * above[band]).sqrt())
    return float(BEYOND_ALL * sorted_N[-1]) or math.inf
