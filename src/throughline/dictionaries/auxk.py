"""AuxK: features that have stopped firing reconstruct the error (Gao et al. 2024, arXiv 2406.04093, appendix A.2).

    (1/8) |e - e_hat|^2 / |e - mean(e)|^2        e = x - x_hat

e_hat is made of the D / 2 strongest dead features of each token, without b_dec, on the first 256 tokens of a batch. The
paper's weight of 1/32 leaves more features dead in short runs: of 512 on five layers of a small model, 1.3 % against 0.1 %
(400,000 tokens, k = 8).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries.share import WHOLE, Share
from throughline.dictionaries.stack import Stack

AUX_WEIGHT = 1 / 8
AUX_TOKENS = 256  # of a batch at most: enough for a gradient, and dead features do not slow down a large batch


def auxk_loss(
    stack: Stack,
    pre_LNF: Float[Tensor, "L N F"],
    error_LND: Float[Tensor, "L N D"],
    dead_LF: Bool[Tensor, "L F"],
    share: Share = WHOLE,
) -> Float[Tensor, "L"]:
    """What AuxK adds to the loss of each layer; 0 for layers without dead features.

    Where others have a `share` of the batch, its first tokens are theirs too, and the error varies among all of these.
    """
    num_tokens = min(AUX_TOKENS, share.num_tokens(error_LND.shape[1]))
    some = slice(0, share.num_of_first(num_tokens))
    error_LND = error_LND[:, some].detach()
    num_dead_L = dead_LF.sum(1)
    k_aux = min(error_LND.shape[-1] // 2, int(num_dead_L.max()))
    top = pre_LNF[:, some].masked_fill(~dead_LF[:, None], -torch.inf).topk(k_aux, dim=-1, sorted=False)
    values = top.values.relu().to(
        error_LND.dtype
    )  # relu also silences the -inf of layers with fewer than k_aux dead features
    e_hat_LND = stack.decode_sparse(values, top.indices)
    deviation_LND = error_LND - share.mean_of_first(error_LND, num_tokens, (1,))
    variance_L = share.mean_of_first(deviation_LND.square(), num_tokens, (1, 2)).flatten()
    relative_L = (error_LND - e_hat_LND).square().mean(dim=(1, 2)) / variance_L.clamp_min(1e-12)
    return AUX_WEIGHT * share.weight_of_first(num_tokens) * torch.where(num_dead_L > 0, relative_L, 0.0)
