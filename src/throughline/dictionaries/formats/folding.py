"""Foreign conventions folded into ours, and ours into theirs, without changing a feature or a reconstruction.

Ours: nothing is subtracted from the input, decoder rows have unit norm. With row norms n = |W_dec|, an input scale s and b_dec
subtracted first,

    pre = s (x - b_dec / s) @ W_enc + b_enc        x_hat = (act(pre) @ W_dec + b_dec) / s

is a dictionary of ours, since activations are positively homogeneous, with

    W_enc' = n W_enc     b_enc' = n (b_enc - b_dec @ W_enc) / s     W_dec' = W_dec / n     b_dec' = b_dec / s

and features n f / s, which are in units of the residual stream. Thresholds scale as b_enc does. Everything is computed in
float64 and kept in float32.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.topk import TopK
from throughline.errors import DamagedFileError, InputError

MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
EXTRA: dict[str, tuple[str, ...]] = {"relu": (), "topk": (), "jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}
SINK_NORM = "sink_norm"  # key: a token whose activation is longer is an attention sink (`sinks.py`)
UNIT = 1e-6  # row norms this close to 1 are 1 in float32
UNIFORM = 1e-2  # row norms this close to each other differ by the rounding of a half-precision file


def fold(
    architecture: str,
    weights: dict[str, Tensor],
    where: object,
    *,
    subtracts_b_dec: bool = False,
    scale: float = 1.0,
    ranked_by_decoder_norm: bool = False,
    options: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    sink_norm: float = math.inf,
) -> Dictionary:
    """A dictionary of ours from weights named as ours are (see the module's equations).

    `weights` are W_enc, b_enc, W_dec, b_dec and the architecture's own; `where` is what errors name. `ranked_by_decoder_norm`:
    TopK chooses by pre-activation times row norm; otherwise by pre-activations, which `rank` keeps where row norms differ. Weights
    already in our convention come back bit-equal.
    Raises DamagedFileError for wrong shapes and values that are not numbers, InputError for what cannot be folded.
    """
    _check(architecture, weights, where)
    same = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
    norm_F = weights["W_dec"].double().norm(dim=1)
    norm_F = torch.where(norm_F == 0, 1.0, norm_F)  # such a feature does nothing, and keeps doing it
    rank: dict[str, Tensor] = {}
    if architecture == "topk" and not ranked_by_decoder_norm:
        norm_F = _common(norm_F)
        rank = TopK.fold({}, norm_F.float(), norm_F)
    is_unit = bool((norm_F - 1).abs().max() < UNIT)
    if not (is_unit and scale == 1.0 and not subtracts_b_dec):
        same = {name: tensor.float() for name, tensor in _fold(same, norm_F, scale, subtracts_b_dec, is_unit).items()}
    extra = {name: tensor for name, tensor in same.items() if name not in MATRICES} | rank
    return Dictionary(
        architecture,
        **{name: same[name] for name in MATRICES},
        extra=extra,
        options=options or {},
        metadata=metadata or {},
        sink_norm=sink_norm,
    )


def sink_norm_of(dictionary: Dictionary) -> dict[str, float]:
    """What a configuration says of attention sinks: nothing where a dictionary has no rule for them."""
    return {SINK_NORM: dictionary.sink_norm} if math.isfinite(dictionary.sink_norm) else {}


def read_sink_norm(config: dict[str, Any], path: Path) -> float:
    """What `sink_norm_of` wrote; DamagedFileError if it is no norm."""
    found = config.get(SINK_NORM, math.inf)
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise DamagedFileError(f"{path} should have a number above 0 as {SINK_NORM}, found {found!r}")
    return float(found)


def biases_after_subtraction(dictionary: Dictionary) -> dict[str, Float[Tensor, "F"]]:
    """`b_enc` (and `b_mag`) for a format that subtracts b_dec from the input before encoding."""
    offset_F = dictionary.b_dec.double() @ dictionary.W_enc.double()
    biases = {"b_enc": dictionary.b_enc.double() + offset_F}
    if dictionary.architecture == "gated":
        biases["b_mag"] = dictionary.extra["b_mag"].double() + dictionary.extra["r_mag"].double().exp() * offset_F
    return {name: tensor.float() for name, tensor in biases.items()}


def _fold(
    weights: dict[str, Tensor], norm_F: Tensor, scale: float, subtracts_b_dec: bool, is_unit: bool
) -> dict[str, Tensor]:
    wide = {name: tensor.double() for name, tensor in weights.items()}
    n_F = torch.ones_like(norm_F) if is_unit else norm_F
    if subtracts_b_dec:
        offset_F = wide["b_dec"] @ wide["W_enc"]
        wide["b_enc"] = wide["b_enc"] - offset_F
        if "b_mag" in wide:
            wide["b_mag"] = wide["b_mag"] - wide["r_mag"].exp() * offset_F
    wide["W_enc"] = wide["W_enc"] * n_F
    wide["W_dec"] = wide["W_dec"] / n_F[:, None]
    for name in ("b_enc", "threshold", "b_mag"):
        if name in wide:
            wide[name] = wide[name] * n_F / scale
    wide["b_dec"] = wide["b_dec"] / scale
    return wide


def in_units_of_choice(dictionary: Dictionary) -> Dictionary:
    """A TopK dictionary with features in the units in which they are chosen, as other projects have it: rows then have other norms
    than 1. Any other dictionary as it is."""
    if "rank" not in dictionary.extra:
        return dictionary
    rank_F = dictionary.extra["rank"]
    scaled = {
        "W_enc": dictionary.W_enc * rank_F,
        "b_enc": dictionary.b_enc * rank_F,
        "W_dec": dictionary.W_dec / rank_F[:, None],
    }
    return replace(dictionary, **scaled, extra={})


def _common(norm_F: Tensor) -> Tensor:
    """Row norms of a TopK dictionary; one for all if they differ by rounding alone."""
    least, most = float(norm_F.min()), float(norm_F.max())
    if most > (1 + UNIFORM) * least:
        return norm_F
    common = norm_F.mean()
    return torch.ones_like(norm_F) if abs(float(common) - 1) < UNIFORM else common.expand_as(norm_F)


def _check(architecture: str, weights: dict[str, Tensor], where: object) -> None:
    needed = (*MATRICES, *EXTRA.get(architecture, ()))
    missing = [name for name in needed if name not in weights]
    if missing:
        raise DamagedFileError(f"{where} lacks {', '.join(missing)}; found {', '.join(sorted(weights)) or 'nothing'}")
    odd = [name for name in weights if name not in needed]
    if odd and architecture in EXTRA:
        raise InputError(f"{where} has {odd[0]}, which a {architecture} dictionary has not; it is not guessed at")
    if weights["W_enc"].ndim != 2:
        raise DamagedFileError(f"{where} should have W_enc of two axes, found {tuple(weights['W_enc'].shape)}")
    D, F = weights["W_enc"].shape
    expected = {"W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)} | {n: (F,) for n in weights if n not in MATRICES}
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise DamagedFileError(f"{where} should have {name} of shape {shape}, found {tuple(weights[name].shape)}")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise DamagedFileError(f"{where} has values in {name} that are not finite numbers")
