"""Layers whose features are planted: activations, and the dictionary that knows their directions."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from builders import GivenSide, make_codes, random_documents
from throughline.codes import Codes, encode_csr
from throughline.dictionaries import Dictionary
from throughline.transfer import Side

HELD, FIT = random_documents(300, seed=0, answers=True), random_documents(300, seed=7, answers=True)
ACTIVE = 3  # features of a token

Layer = tuple[Tensor, Tensor, Dictionary]  # activations on HELD and FIT, each [N, D], and their dictionary


def coefficients(num_features: int = 24, seed: int = 3) -> list[Tensor]:
    """Features of the tokens of HELD and FIT, [N, F] each: ACTIVE of them on every token."""
    found = []
    for number, documents in enumerate((HELD, FIT)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        num_tokens = make_codes(documents).num_tokens
        chosen = torch.rand(num_tokens, num_features, generator=generator).topk(ACTIVE, dim=1).indices
        size = 1 + torch.rand(num_tokens, ACTIVE, generator=generator)
        found.append(torch.zeros(num_tokens, num_features).scatter_(1, chosen, size))
    return found


def layer_of(f: list[Tensor], rows_FD: Tensor, seed: int, noise: float = 0.05) -> Layer:
    """Sums of unit directions that are nearly orthogonal, off centre; the dictionary reads them by projection."""
    generator = torch.Generator().manual_seed(seed)
    offset_D = torch.randn(rows_FD.shape[1], generator=generator)
    held, fit = (f_NF @ rows_FD + offset_D for f_NF in f)
    held, fit = (x + noise * torch.randn(x.shape, generator=generator) for x in (held, fit))
    b_enc = -(rows_FD @ offset_D)
    return held, fit, Dictionary("topk", rows_FD.T.contiguous(), b_enc, rows_FD, offset_D, options={"k": ACTIVE})


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Random orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T


def planted_layer(seed: int = 3, d_model: int = 24) -> Layer:
    """As many orthonormal features as dimensions."""
    return layer_of(coefficients(d_model, seed), orthonormal(d_model, d_model, seed), seed)


def turned(layer: Layer) -> Layer:
    """The same turned by a rotation."""
    held, fit, d = layer
    R = orthonormal(held.shape[1], held.shape[1], seed=6)
    return held @ R, fit @ R, replace(d, W_enc=R.T @ d.W_enc, W_dec=d.W_dec @ R, b_dec=d.b_dec @ R)


def scaled_and_moved(layer: Layer, a: float = 3.0) -> Layer:
    """a x + b. Topk is homogeneous: features become a f."""
    held, fit, d = layer
    b_D = torch.linspace(-4, 4, held.shape[1])
    moved = replace(d, b_enc=a * d.b_enc - b_D @ d.W_enc, b_dec=a * d.b_dec + b_D)
    return a * held + b_D, a * fit + b_D, moved


def codes_of(which: int, layers: tuple[Layer, ...], num_documents: int | None = None) -> Codes:
    """The text HELD (0) or FIT (1), or its first documents, as these layers read it."""
    codes = make_codes((HELD, FIT)[which][:num_documents])
    x_LND = [layer[which][: codes.num_tokens] for layer in layers]
    features = {i: encode_csr(layers[i][2], x_ND) for i, x_ND in enumerate(x_LND)}
    return replace(codes, layers=features, residual_LND=np.stack([x_ND.numpy() for x_ND in x_LND]))


def layered_side(
    model: str, *layers: Layer, num_fit: int | None = None, twins: Sequence[dict[int, Dictionary]] = ()
) -> Side:
    """A model with these layers; maps are fitted on the first `num_fit` documents of FIT."""
    held = codes_of(0, layers)
    dictionaries = {i: dictionary for i, (_, _, dictionary) in enumerate(layers)}
    return GivenSide(model, dictionaries, held, held, codes_of(1, layers, num_fit), list(twins))
