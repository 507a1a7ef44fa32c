"""What of a language model its costs depend on, counted on the meta device: no weights are read or made."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from throughline.models import outline_model
from throughline.models.families import FAMILIES
from throughline.models.structure import find_blocks
from throughline.study import ModelSpec


@dataclass(frozen=True)
class ModelShape:
    """Counts of one model. A block's matrices are its weights of two axes or more: each takes 2 operations a token."""

    name: str
    num_layers: int
    d_model: int
    context: int  # longest text, in tokens
    parameters: int  # tied ones once
    matrices: tuple[int, ...]  # weights in the matrices of each block
    attention_width: int  # heads times their width
    widest: int  # largest output of a matrix in a block

    def forward_flops(self, layer: int, tokens: int, context: int) -> float:
        """Of `tokens` in texts of `context`, up to and with block `layer`: products, and attention to all of the text."""
        attention = 4 * context * self.attention_width * (layer + 1)
        return tokens * (2 * sum(self.matrices[: layer + 1]) + attention)


def measure_shape(spec: ModelSpec) -> ModelShape:
    """The counts of a model from its configuration; InputError if that cannot be read or has no list of blocks."""
    hf: PreTrainedModel = outline_model(spec)
    config = hf.config.get_text_config()
    _, blocks = find_blocks(hf, config.num_hidden_layers)
    known = config.model_type in FAMILIES.names()
    context = getattr(config, FAMILIES.load(config.model_type).context if known else "max_position_embeddings")
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = [[p for p in block.parameters() if p.ndim >= 2] for block in blocks]
    return ModelShape(
        name=spec.name,
        num_layers=len(blocks),
        d_model=config.hidden_size,
        context=context,
        parameters=sum(p.numel() for p in hf.parameters()),
        matrices=tuple(sum(p.numel() for p in block) for block in matrices),
        attention_width=heads * width,
        widest=max(max(p.shape[-2:]) for block in matrices for p in block),
    )
