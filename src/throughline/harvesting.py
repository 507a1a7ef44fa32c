"""Activations of all wanted layers from one forward pass, which stops after the last of them."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from throughline.models import LanguageModel
from throughline.tokens import TokenRows


@torch.no_grad()
def harvest(
    model: LanguageModel, batches: Iterable[TokenRows], layers: Sequence[int]
) -> Iterator[tuple[TokenRows, Float[Tensor, "L N D"]]]:
    """For each batch of rows the residual stream after `layers` at its N kept tokens (row by row), as float32."""
    for rows in batches:
        inputs = model.inputs(rows.ids, rows.positions, rows.pieces)
        residuals = model.run(inputs, capture=layers, logits=False).residuals
        keep = torch.from_numpy(rows.keep).to(inputs.ids.device)
        yield rows, torch.stack([residuals[layer][keep].float() for layer in layers])
