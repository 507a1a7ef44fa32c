"""The k largest entries of each row on a CPU, where `torch.topk` takes as long as the encoder's product (288 features, k 20)."""

import sys

import torch
from jaxtyping import Float
from torch import Tensor

FEW_ENTRIES = 2**19  # of a matrix: below, importing numba would take longer than the loops save
KERNELS = "throughline.dictionaries.kernels"


def keep_top(pre_NF: Float[Tensor, "N F"], k: int) -> Float[Tensor, "N F"]:
    """`pre_NF` with the k largest positive entries of each row kept and all else zero; of equal ones the first. NaN stays NaN.

    On a CPU, for float32, by a compiled loop; by torch's functions, with the same result, if it is not loaded and entries are few.
    Elsewhere, and where a gradient is wanted, torch's `topk`, which among equals keeps any.
    """
    if pre_NF.device.type == "cpu" and pre_NF.dtype == torch.float32 and not pre_NF.requires_grad:
        use_compiled = KERNELS in sys.modules or pre_NF.numel() > FEW_ENTRIES
        return _keep_top_compiled(pre_NF, k) if use_compiled else _keep_top_of_few(pre_NF, k)
    values, features = pre_NF.topk(min(k, pre_NF.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre_NF).scatter_(1, features, values.relu())


def _keep_top_of_few(pre_NF: Float[Tensor, "N F"], k: int) -> Float[Tensor, "N F"]:
    numbers_NF = pre_NF.masked_fill(pre_NF.isnan(), -torch.inf)
    least_N1 = numbers_NF.topk(min(k, pre_NF.shape[1]), dim=1).values[:, -1:].relu()
    above_NF, equal_NF = numbers_NF > least_N1, (numbers_NF == least_N1) & (least_N1 > 0)
    first_NF = equal_NF & (equal_NF.cumsum(1) <= k - above_NF.sum(1, keepdim=True))
    return pre_NF.masked_fill(~(above_NF | first_NF | pre_NF.isnan()), 0)


def _keep_top_compiled(pre_NF: Float[Tensor, "N F"], k: int) -> Float[Tensor, "N F"]:
    from throughline.dictionaries.kernels import keep_top as keep_top_compiled

    out_NF = torch.empty(pre_NF.shape)
    keep_top_compiled(pre_NF.contiguous().numpy(), k, out_NF.numpy())
    return out_NF
