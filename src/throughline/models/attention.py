"""Attention of short texts in bfloat16 on a CPU: three products and a softmax take half the time of torch's fused one.

Attention logits are rounded to bfloat16, as the queries and keys that they are made of already are.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "throughline_short"
LONGEST = 512  # tokens; the matrix of all pairs would outgrow the cache by far
CHANGES_LOGITS = ("softcap", "s_aux", "sliding_window", "position_bias")  # what only some models have is left to torch


def use_short_attention_(hf: PreTrainedModel) -> None:
    """Let a model that has torch's fused attention use `attend` instead."""
    if getattr(hf.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: q [B, H, T, d], k and v [B, H / groups, T, d] to [B, T, H, d].

    `attention_mask` [B, 1, T, T] is added to the logits; without one attention is causal.
    """
    B, H, T, d = query.shape
    is_plain = (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and key.shape[2] == T <= LONGEST
        and not dropout
        and getattr(module, "is_causal", True)
        and (attention_mask is None or attention_mask.dtype == query.dtype)
        and not any(others.get(name) is not None for name in CHANGES_LOGITS)
    )
    if not is_plain:
        return sdpa_attention_forward(  # pyright: ignore[reportReturnType]  its second is None
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    groups = H // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    mask = _causal(T) if attention_mask is None else attention_mask.expand(B, H, T, T).reshape(B * H, T, T)
    q, k, v = (t.reshape(B * H, T, d) for t in (query, key, value))
    logits = torch.baddbmm(mask, q, k.mT, alpha=d**-0.5 if scaling is None else scaling)
    return torch.bmm(logits.softmax(-1), v).view(B, H, T, d).transpose(1, 2).contiguous(), None


@lru_cache(4)
def _causal(length: int) -> Tensor:
    """[T, T]: 0 for the tokens that a token sees, the lowest number for those after it."""
    lowest = torch.finfo(torch.bfloat16).min
    return torch.full((length, length), lowest, dtype=torch.bfloat16).triu(1)
