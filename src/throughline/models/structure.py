"""Where the parts of a causal language model are, told by its structure; and its family, if no file describes it."""

from collections.abc import Callable
from copy import deepcopy
from inspect import signature
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from throughline.errors import InputError
from throughline.models.families import FAMILIES, Family, one_plus_weight_of, weight_of

NEEDED_ARGUMENTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}


class Structure(NamedTuple):
    """The parts every run needs. `blocks_path` is the dotted path of the block list, such as `transformer.h`."""

    blocks: nn.ModuleList
    blocks_path: str
    final_norm: nn.Module
    unembedding: nn.Module
    family: Family


def find_structure(hf: PreTrainedModel) -> Structure:
    """Block list, final norm, unembedding and family of `hf`; InputError says what was sought and found."""
    config = hf.config.get_text_config()
    known = config.model_type in FAMILIES.names()
    family: Family | None = FAMILIES.load(config.model_type) if known else None
    path, blocks = find_blocks(hf, config.num_hidden_layers)
    norm = hf.get_submodule(family.final_norm) if family and family.final_norm else find_final_norm(hf, path)
    unembedding = hf.get_output_embeddings()
    if unembedding is None:
        raise InputError(f"{type(hf).__name__} has no output embedding, so it is not a causal language model")
    return Structure(blocks, path, norm, unembedding, family or guess_family(hf, norm))


def find_blocks(hf: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks: the one outermost ModuleList with as many entries as the model has layers."""
    lists = {name: module for name, module in hf.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [name for name, module in lists.items() if len(module) == num_layers]
    outermost = [name for name in fitting if not any(name.startswith(other + ".") for other in fitting)]
    if len(outermost) != 1:
        found = ", ".join(f"{name} ({len(module)})" for name, module in list(lists.items())[:8]) or "none"
        raise InputError(f"{type(hf).__name__} should have one list of {num_layers} blocks; lists found: {found}")
    return outermost[0], lists[outermost[0]]


def find_final_norm(hf: nn.Module, blocks_path: str) -> nn.Module:
    """The module that follows the block list in its parent and has `norm` or `ln` in its name."""
    parent, _, own = blocks_path.rpartition(".")
    children = list(hf.get_submodule(parent).named_children())
    after = children[[name for name, _ in children].index(own) + 1 :]
    norms = [(name, module) for name, module in after if "norm" in name.lower() or "ln" in name.lower()]
    if len(norms) != 1:
        found = ", ".join(name for name, _ in after) or "nothing"
        raise InputError(
            f"{type(hf).__name__} should have one final norm after {blocks_path}, found {found}; {_how_to_add()}"
        )
    return norms[0][1]


def guess_family(hf: PreTrainedModel, norm: nn.Module) -> Family:
    """The family of a model type without a file: the rule that says what its final norm does to a probe vector.

    Tried: LayerNorm and RMSNorm, each scaled by the weight or by one plus it; InputError if not exactly one fits.
    """
    model_type = hf.config.get_text_config().model_type
    lacking = NEEDED_ARGUMENTS - set(signature(hf.forward).parameters)
    if lacking:
        raise InputError(f"model type {model_type!r} takes no {', '.join(sorted(lacking))}; {_how_to_add()}")
    fitting = [
        Family(
            model_type, centres, scale, note=f"model type {model_type!r} has no family file; read off its final norm"
        )
        for centres in (True, False)
        for scale in (weight_of, one_plus_weight_of)
        if norm_follows(norm, centres, scale)
    ]
    if len(fitting) != 1:
        raise InputError(
            f"final norm {type(norm).__name__} of model type {model_type!r} follows {len(fitting)} known rules, "
            f"expected one (LayerNorm or RMSNorm); {_how_to_add()}"
        )
    return fitting[0]


@torch.no_grad()
def norm_follows(norm: nn.Module, centres: bool, scale_of_norm: Callable[[nn.Module], torch.Tensor]) -> bool:
    """True if `norm` computes normalised(x) * scale + bias on a probe, long so that epsilon is nothing."""
    if not isinstance(getattr(norm, "weight", None), torch.Tensor):
        return False
    norm = deepcopy(norm).float().cpu()
    scale_D = scale_of_norm(norm)
    x_D = 100 * torch.randn(scale_D.numel(), generator=torch.Generator().manual_seed(0)) + 50
    bias = getattr(norm, "bias", None)
    centred_D = x_D - x_D.mean() if centres else x_D
    expected_D = centred_D / centred_D.square().mean().sqrt() * scale_D + (0 if bias is None else bias)
    return torch.allclose(norm(x_D[None, None])[0, 0], expected_D, rtol=1e-3, atol=1e-3)


def _how_to_add() -> str:
    return f"a file beside the known families ({', '.join(FAMILIES.names())}) can describe it"
