"""What a model's structure cannot tell, one small file a family, found by the configuration's `model_type`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from throughline.registry import Registry


def weight_of(norm: nn.Module) -> Tensor:
    """Scale [D] of a norm that multiplies by its weight."""
    assert isinstance(norm.weight, Tensor)
    return norm.weight.detach()


def one_plus_weight_of(norm: nn.Module) -> Tensor:
    """Scale [D] of a norm that multiplies by 1 + its weight, as Gemma's do."""
    return 1 + weight_of(norm).float()


@dataclass(frozen=True)
class Family:
    """Facts of one kind of model. Dotted paths are from the Hugging Face causal language model."""

    name: str
    centres: bool  # its norms subtract the mean over D (LayerNorm) or not (RMSNorm)
    scale_of_norm: Callable[[nn.Module], Tensor] = weight_of  # what the normalised vector is multiplied by, [D]
    attn_implementation: str | None = None  # forced; None leaves it to transformers
    final_norm: str | None = None  # path, where structure misleads
    context: str = "max_position_embeddings"  # the configuration's name for the longest text in tokens
    note: str = ""  # what a user should know of how the family was found


FAMILIES = Registry(
    "model type",
    {name: f"throughline.models.families.{name}:FAMILY" for name in ("gpt2", "gpt_neox", "phi", "gemma", "gemma2")}
    | {name: f"throughline.models.families.{name}:FAMILY" for name in ("llama", "qwen2", "mistral")},
)
