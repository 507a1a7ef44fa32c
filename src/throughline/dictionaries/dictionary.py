"""One trained dictionary: raw activations in, features out, and back.

    pre = x @ W_enc + b_enc        f = activation(pre)        x_hat = f @ W_dec + b_dec

Saved weights take raw activations: scale and mean of training are folded in, decoder rows have unit norm, and nothing is
subtracted from the input (`apply_b_dec_to_input` is false). Features are in units of the residual stream.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.registry import ARCHITECTURES

CHUNK_ELEMENTS = 2**25  # pre-activations held at once


class Sparse(NamedTuple):
    """Active features of N tokens, flat: `values[i]` of feature `features[i]` at token `tokens[i]`, tokens ascending."""

    tokens: Int[Tensor, "A"]
    features: Int[Tensor, "A"]
    values: Float[Tensor, "A"]


class Architecture(Protocol):
    """What an architecture's file provides, beside its loss."""

    name: str

    @staticmethod
    def activate(pre_NF: Tensor, options: dict[str, Any]) -> Tensor:
        """Features of pre-activations, same shape, zero where inactive."""
        ...


@dataclass(frozen=True)
class Dictionary:
    """The features of one layer. `options` are the architecture's own (k for topk)."""

    architecture: str
    W_enc: Float[Tensor, "D F"]
    b_enc: Float[Tensor, "F"]
    W_dec: Float[Tensor, "F D"]
    b_dec: Float[Tensor, "D"]
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def encode(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        """Features of activations, dense; zero where inactive."""
        return self._activate(torch.addmm(self.b_enc, x_ND, self.W_enc), self.options)

    def decode(self, f_NF: Float[Tensor, "N F"]) -> Float[Tensor, "N D"]:
        """Activations from features."""
        return torch.addmm(self.b_dec, f_NF, self.W_dec)

    def reconstruct(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """x_hat, chunk by chunk so that memory stays bounded."""
        return torch.cat([self.decode(self.encode(x)) for x in self.chunks(x_ND)]) if len(x_ND) else x_ND.clone()

    def encode_sparse(self, x_ND: Float[Tensor, "N D"]) -> Sparse:
        """Active features of activations, chunk by chunk."""
        parts, offset = [], 0
        for chunk in self.chunks(x_ND):
            f_NF = self.encode(chunk)
            tokens, features = f_NF.nonzero(as_tuple=True)
            parts.append((tokens + offset, features, f_NF[tokens, features]))
            offset += len(chunk)
        tokens, features, values = (torch.cat(p) for p in zip(*parts, strict=True))
        return Sparse(tokens, features, values)

    def chunks(self, x_ND: Tensor) -> Iterator[Tensor]:
        """Pieces of x small enough for dense pre-activations."""
        return iter(x_ND.split(max(1, CHUNK_ELEMENTS // self.d_sae)))

    def to(self, device: str) -> "Dictionary":
        """The same dictionary on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        return replace(self, **moved)

    @property
    def _activate(self) -> Callable[[Tensor, dict[str, Any]], Tensor]:
        return ARCHITECTURES.load(self.architecture).activate


def untrained_like(dictionary: Dictionary, mean_D: Tensor, generator: torch.Generator) -> Dictionary:
    """A dictionary of the same shape with random unit rows, tied, centred on the data: the control of a learned one."""
    rows = torch.randn(dictionary.W_dec.shape, generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(dictionary.W_dec)
    return replace(dictionary, W_enc=rows.T.contiguous(), b_enc=-(rows @ mean_D), W_dec=rows, b_dec=mean_D)
