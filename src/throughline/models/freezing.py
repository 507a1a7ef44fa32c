"""A model whose gradients run through it as through a linear map: attention patterns and divisors of norms are held still.

The rules of relevance propagation, RelP (Jafari et al. 2025, arXiv 2508.21258), as gradients; values do not change.

    norm          y = s * centred(x) / r        the divisor r is a constant
    attention     y = A v                       the pattern A is a constant
    activation    y = x * (g(x) / x)            the ratio is a constant
    gate          y = g(a) * b                  each factor takes one half
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from throughline.models.language_model import LanguageModel
from throughline.models.structure import norm_follows

NAME = "throughline_frozen"
ACTIVATIONS = ("act", "act_fn", "activation_fn", "activation")  # what the families call it
SMALLEST = 1e-6  # |x| below which an activation's ratio is not formed


@contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """Inside, gradients of `model` and of `model.after(layer)` follow the rules above. For one thread at a time."""
    kept = model.hf.config._attn_implementation or "sdpa"
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    with ExitStack() as stack:
        for module, rule in _rules(model):
            stack.callback(module.register_forward_hook(rule).remove)
        model.hf.set_attn_implementation(NAME)
        stack.callback(model.hf.set_attn_implementation, kept)
        yield


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention whose pattern takes no gradient: q [B, H, T, d], k and v [B, H / groups, T, d] to [B, T, H, d]."""
    with torch.no_grad():
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, dim=1).mT
        logits = logits * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if attention_mask is not None:
            logits = logits + attention_mask[..., : key.shape[2]]
        pattern = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (pattern @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


def _rules(model: LanguageModel) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """The modules that have a rule, with the hook that applies it."""
    family = model.family
    for module in [*model.structure.blocks.modules(), model.structure.final_norm]:
        if "norm" in type(module).__name__.lower() and norm_follows(module, family.centres, family.scale_of_norm):
            yield module, _norm_rule(family.centres, family.scale_of_norm)
        children = dict(module.named_children())
        gated = "gate_proj" in children and "up_proj" in children
        for name in ACTIVATIONS:
            if name in children:
                yield children[name], _activation_rule(0.5 if gated else 1.0)
        if gated:
            yield children["up_proj"], lambda _module, _args, y: _with_gradient_of(y, 0.5 * y)


def _norm_rule(centres: bool, scale_of_norm: Callable[[nn.Module], Tensor]) -> Callable[..., Tensor]:
    def rule(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0]
        centred = x - x.mean(-1, keepdim=True) if centres else x
        rms = centred.detach().float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return _with_gradient_of(y, scale_of_norm(module).to(x.dtype) * centred / rms)

    return rule


def _activation_rule(part: float) -> Callable[..., Tensor]:
    def rule(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0]
        ratio = torch.where(x.abs() > SMALLEST, y / torch.where(x.abs() > SMALLEST, x, 1), 0.5).detach()
        return _with_gradient_of(y, part * ratio * x)

    return rule


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    return value.detach() + (other - other.detach())
