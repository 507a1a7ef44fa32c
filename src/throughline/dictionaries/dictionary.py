"""One trained dictionary: raw activations in, features out, and back.

    pre = x @ W_enc + b_enc        f = activation(pre)        x_hat = f @ W_dec + b_dec

Saved weights take raw activations: scale and mean of training are folded in, decoder rows have unit norm, and nothing is
subtracted from the input (`apply_b_dec_to_input` is false). Features are in units of the residual stream.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from throughline.registry import ARCHITECTURES

CHUNK_ELEMENTS = 2**25  # pre-activations held at once
FEW = 16  # a gathered row of the decoder costs several times what one in a product costs


class Sparse(NamedTuple):
    """Active features of N tokens, flat: `values[i]` of feature `features[i]` at token `tokens[i]`, tokens ascending."""

    tokens: Int[Tensor, "A"]
    features: Int[Tensor, "A"]
    values: Float[Tensor, "A"]


@dataclass(frozen=True)
class Dictionary:
    """The features of one layer. `options` are the architecture's own (k for topk).

    `extra` holds an architecture's further weights, each [F]: `threshold` (jumprelu), `r_mag` and `b_mag` (gated, whose
    `b_enc` is the gate's bias), `rank` (topk that chooses the k largest of pre-activation times rank; without it of
    pre-activations). A token whose norm is above `sink_norm` is an attention sink (`sinks.py`), of which it knows
    nothing: no feature is active there, and its activation stays as it is.
    """

    architecture: str
    W_enc: Float[Tensor, "D F"]
    b_enc: Float[Tensor, "F"]
    W_dec: Float[Tensor, "F D"]
    b_dec: Float[Tensor, "D"]
    extra: dict[str, Float[Tensor, "F"]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    sink_norm: float = math.inf

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def encode(self, x_ND: Float[Tensor, "N {self.d_model}"]) -> Float[Tensor, "N {self.d_sae}"]:
        """Features of activations, dense; zero where inactive, and at sinks."""
        pre_NF = torch.addmm(self.b_enc, x_ND, self.W_enc)
        f_NF = self._activate(pre_NF, self.options, {"b_enc": self.b_enc, **self.extra})
        if math.isfinite(self.sink_norm):
            f_NF[self.is_sink(x_ND)] = 0
        return f_NF

    def is_sink(self, x_ND: Float[Tensor, "N {self.d_model}"]) -> Bool[Tensor, "N"]:
        """Which activations are of attention sinks."""
        return x_ND.float().norm(dim=1) > self.sink_norm

    def readers(self, features_C: Int[Tensor, "C"]) -> Float[Tensor, "C {self.d_model}"]:
        """For each of these features the direction of the residual stream whose product with a change is its activation's.

        That holds while the feature stays active and selected.
        """
        rows_CD = self.W_enc[:, features_C].T
        return rows_CD * self.extra["r_mag"][features_C].exp()[:, None] if "r_mag" in self.extra else rows_CD

    def decode(self, f_NF: Float[Tensor, "N {self.d_sae}"]) -> Float[Tensor, "N {self.d_model}"]:
        """Activations from features."""
        return torch.addmm(self.b_dec, f_NF, self.W_dec)

    def decode_few(self, f_NF: Float[Tensor, "N {self.d_sae}"]) -> Float[Tensor, "N {self.d_model}"]:
        """`decode`, whose sum is over the active features alone where an architecture keeps a few of many.

        Compiled loops do it, on a CPU, for float32 and float64 that take no gradient.
        """
        is_few = len(f_NF) and self.options.get("k", self.d_sae) * FEW <= self.d_sae
        is_plain = f_NF.device.type == "cpu" and f_NF.dtype in (torch.float32, torch.float64) and not f_NF.requires_grad
        if not (is_few and is_plain):
            return self.decode(f_NF)
        from throughline.dictionaries.kernels import compress  # numba takes half a second to import

        count_N, features, values = (torch.from_numpy(array) for array in compress(f_NF.contiguous().numpy()))
        bags = embedding_bag(
            features.long(), self.W_dec, count_N.cumsum(0) - count_N, mode="sum", per_sample_weights=values
        )
        return bags + self.b_dec

    def reconstruct(self, x_ND: Float[Tensor, "N {self.d_model}"]) -> Float[Tensor, "N {self.d_model}"]:
        """x_hat, chunk by chunk so that memory stays bounded; sinks as they are."""
        if not len(x_ND):
            return x_ND.clone()
        x_hat_ND = torch.cat([self.decode_few(self.encode(x)) for x in self.chunks(x_ND)])
        if math.isfinite(self.sink_norm):
            sink_N = self.is_sink(x_ND)
            x_hat_ND[sink_N] = x_ND[sink_N].to(x_hat_ND)
        return x_hat_ND

    def encode_sparse(self, x_ND: Float[Tensor, "N {self.d_model}"]) -> Sparse:
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
        return replace(self, **moved, extra={name: tensor.to(device) for name, tensor in self.extra.items()})

    @property
    def _activate(self) -> Callable[[Tensor, dict[str, Any], dict[str, Tensor]], Tensor]:
        return ARCHITECTURES.load(self.architecture).activate


def untrained_like(dictionary: Dictionary, mean_D: Tensor, generator: torch.Generator) -> Dictionary:
    """A dictionary of the same shape with random unit rows, tied, centred on the data: the control of a learned one.

    Thresholds (jumprelu) and gates (gated) say how far from the mean a feature begins: each random feature begins as far out, in
    units of the residual stream, as the learned one it stands for, and at the mean at the nearest. A gated one's magnitude is
    its projection.
    """
    rows = torch.randn(dictionary.W_dec.shape, generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(dictionary.W_dec)
    b_enc, extra = -(rows @ mean_D), {name: weight for name, weight in dictionary.extra.items() if name != "rank"}
    length_F = dictionary.W_enc.norm(dim=0).clamp_min(1e-12)
    at_mean_F = mean_D @ dictionary.W_enc + dictionary.b_enc
    if "threshold" in extra:
        extra["threshold"] = ((extra["threshold"] - at_mean_F) / length_F).clamp_min(0)
    if "r_mag" in extra:
        extra |= {"r_mag": torch.zeros_like(b_enc), "b_mag": b_enc}
        b_enc = b_enc + (at_mean_F / length_F).clamp_max(0)
    return replace(dictionary, W_enc=rows.T.contiguous(), b_enc=b_enc, W_dec=rows, b_dec=mean_D, extra=extra)
