"""Affine maps between the activations of two layers, fitted on training text, and dictionaries carried through them.

    1. of each layer: mean m, span s (mean norm of x - m), covariance C_jj with its eigenvectors
    2. of a pair: C_ji = mean of (x_j - m_j)^T (x_i - m_i), rows layer j, columns layer i
    3. down, from layer j to layer i, where the dictionary lives, and up, the way back:
       scaled      x_j -> (x_j - m_j) s_i / s_j + m_i, and its inverse; only where widths are equal
       orthogonal  x_j -> (x_j - m_j) R c + m_i;  R = U V^T of C_ji = U S V^T;  c = s_i / s_j, of what R keeps of both layers
       ridge       x_j -> (x_j - m_j) A + m_i;  A = (C_jj + p I)^-1 C_ji, and another such map up
    4. the penalty p is the one of PENALTIES (in units of the mean eigenvalue) that does best on documents held back. Up is
       meant for the dictionary's reconstructions, so its penalty is chosen on these: weak directions of layer i may tell much
       of layer j, but a dictionary does not keep them, and a map that counts on them returns noise

All sums are float64 and streamed, so a pair of layers holds a few D x D matrices however long the text. Ridge is the stitching of
Chen et al. 2025 (arXiv 2506.06609), orthogonal the rotation of McCann 2026 (arXiv 2605.24577).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.dictionaries import Dictionary
from throughline.registry import ARCHITECTURES

PENALTIES = tuple(10.0**power for power in range(-7, 4))
CHOICE_TOKENS = 512  # on which a dictionary chooses the way back
CHUNK_TOKENS = 4096


class Affine(NamedTuple):
    """x -> x @ matrix + shift; rows of the matrix are coordinates of where it comes from."""

    matrix_DE: Float[Tensor, "D E"]
    shift_E: Float[Tensor, "E"]

    def of(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Where it takes activations, in their own precision."""
        return torch.addmm(self.shift_E.to(x_ND), x_ND, self.matrix_DE.to(x_ND))

    @classmethod
    def between(cls, matrix_DE: Tensor, mean_D: Tensor, mean_E: Tensor) -> "Affine":
        """The map that takes one mean to the other: x -> (x - mean_D) @ matrix + mean_E."""
        return cls(matrix_DE, mean_E - mean_D @ matrix_DE)


class Maps(NamedTuple):
    """`down` from a layer's activations to where a dictionary lives, `up` the way back. Both float64."""

    down: Affine
    up: Affine

    @property
    def reversed(self) -> "Maps":
        """The same two for a dictionary that lives at the other end."""
        return Maps(self.up, self.down)


def carry(dictionary: Dictionary, maps: Maps) -> Dictionary:
    """`dictionary` as one of the layer that `maps.down` comes from: it gives up(reconstruct(down(x))).

    W_enc' = A_down W_enc, b_enc' = b_enc + b_down W_enc, W_dec' = W_dec A_up, b_dec' = b_dec A_up + b_up. Its features are those of
    the dictionary, in its units; its decoder rows have no unit norm. It knows no sinks: their norm is another one there.
    """
    (A_down, b_down), (A_up, b_up) = maps
    exact = {name: getattr(dictionary, name).to(A_down) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    pushed_F = b_down @ exact["W_enc"]
    weights = {
        "W_enc": A_down @ exact["W_enc"],
        "b_enc": exact["b_enc"] + pushed_F,
        "W_dec": exact["W_dec"] @ A_up,
        "b_dec": exact["b_dec"] @ A_up + b_up,
    }
    carried = {name: tensor.to(dictionary.W_enc).contiguous() for name, tensor in weights.items()}
    # an architecture's own weights follow a shift of the pre-activations as they follow the mean that training took out
    fold = ARCHITECTURES.load(dictionary.architecture).fold
    extra = fold(dictionary.extra, torch.ones_like(dictionary.b_enc), -pushed_F.to(dictionary.b_enc))
    return replace(dictionary, **carried, extra=extra, sink_norm=math.inf)


@dataclass(frozen=True)
class FitTokens:
    """One layer's activations on the text that maps are fitted on. Token n of two such belong together.

    `chosen_N` are rows of `x_MD`. The first `num_fit` fit the maps, the others choose the penalty.
    """

    x_MD: np.ndarray
    chosen_N: Int[np.ndarray, "N"]
    num_fit: int
    device: torch.device

    def chunks(self, held: bool) -> Iterator[Float[Tensor, "n D"]]:
        """Activations in float64, those that fit or those that are held back for choosing."""
        rows_N = self.chosen_N[self.num_fit :] if held else self.chosen_N[: self.num_fit]
        for start in range(0, len(rows_N), CHUNK_TOKENS):
            yield torch.from_numpy(self.x_MD[rows_N[start : start + CHUNK_TOKENS]]).to(self.device).double()


@dataclass(frozen=True)
class LayerMoments:
    """What maps from and to one layer need of it, all float64."""

    tokens: FitTokens
    mean_D: Float[Tensor, "D"]
    span: float
    eigenvalues_D: Float[Tensor, "D"]
    basis_DD: Float[Tensor, "D D"]  # eigenvectors of the covariance as columns
    held_DD: Float[Tensor, "D D"]  # second moments about the mean of the tokens held back

    @classmethod
    def of(cls, tokens: FitTokens) -> "LayerMoments":
        """Three passes over a layer: mean, spread, and the tokens held back."""
        sums_D = [x.sum(0) for x in tokens.chunks(held=False)]
        mean_D = torch.stack(sums_D).sum(0) / tokens.num_fit
        length = sum(float((x - mean_D).norm(dim=1).sum()) for x in tokens.chunks(held=False))
        covariance_DD, held_DD = cross_moments(tokens, mean_D, tokens, mean_D)
        eigenvalues_D, basis_DD = torch.linalg.eigh(covariance_DD)
        return cls(tokens, mean_D, length / tokens.num_fit, eigenvalues_D.clamp_min(0), basis_DD, held_DD)

    def share(self, directions_DR: Float[Tensor, "D R"]) -> float:
        """Share of the layer's variance in orthonormal directions; 1 if they are a basis."""
        weight_D = (self.basis_DD.T @ directions_DR).square().sum(1)
        return float(self.eigenvalues_D @ weight_D / self.eigenvalues_D.sum())


def cross_moments(source: FitTokens, source_mean_D: Tensor, target: FitTokens, target_mean_E: Tensor) -> list[Tensor]:
    """Mean of (x - m)^T (y - m) [D, E] over the tokens that fit, and over those held back, both about the given means."""
    found = []
    for held in (False, True):
        total_DE = torch.zeros(len(source_mean_D), len(target_mean_E), dtype=torch.float64, device=source_mean_D.device)
        count = 0
        for x_ND, y_NE in zip(source.chunks(held), target.chunks(held), strict=True):
            total_DE += (x_ND - source_mean_D).T @ (y_NE - target_mean_E)
            count += len(x_ND)
        found.append(total_DE / max(count, 1))
    return found


@dataclass(frozen=True)
class Ridge:
    """All ridge maps from layer x to layer y, by penalty: A = B diag(1 / (eigenvalue + p)) B^T C_xy in the eigenbasis B of C_xx."""

    x: LayerMoments
    y: LayerMoments
    rows_DE: Float[Tensor, "D E"]  # B^T C_xy

    def choose(self, xx_DD: Float[Tensor, "D D"], xy_DE: Float[Tensor, "D E"]) -> Affine:
        """The map that leaves least of y, by second moments about the layers' means of what is fed in place of x, with itself and
        with y.

        What is left, tr(yy - 2 A^T xy + A^T xx A), is quadratic in d = 1 / (eigenvalue + p), so all penalties are tried at once.
        """
        basis_DD, eigenvalues_D = self.x.basis_DD, self.x.eigenvalues_D
        scale = eigenvalues_D.mean().clamp_min(torch.finfo(torch.float32).tiny)
        shrink_PD = 1 / (eigenvalues_D + scale * torch.tensor(PENALTIES).to(scale)[:, None])
        gain_D = (self.rows_DE * (basis_DD.T @ xy_DE)).sum(1)
        curve_DD = (basis_DD.T @ xx_DD @ basis_DD) * (self.rows_DE @ self.rows_DE.T)
        left_P = ((shrink_PD @ curve_DD) * shrink_PD).sum(1) - 2 * shrink_PD @ gain_D
        matrix_DE = basis_DD @ (shrink_PD[left_P.argmin()][:, None] * self.rows_DE)
        return Affine.between(matrix_DE, self.x.mean_D, self.y.mean_D)

    @torch.no_grad()
    def choose_behind(self, dictionary: Dictionary, down: Affine) -> Affine:
        """The map for what `dictionary`, a dictionary of x, makes of y's tokens held back when these come `down` to it."""
        y_NE = next(self.y.tokens.chunks(held=True))[:CHOICE_TOKENS]
        x_hat_ND = dictionary.reconstruct(down.of(y_NE).to(dictionary.W_enc)).to(y_NE) - self.x.mean_D
        return self.choose(x_hat_ND.T @ x_hat_ND / len(y_NE), x_hat_ND.T @ (y_NE - self.y.mean_D) / len(y_NE))


class Fit(NamedTuple):
    """What a dictionary of one layer needs to explain another, by name; and how ridge's way back is chosen for a dictionary.

    `maps["ridge"]` is the way back that suits the layer's own activations.
    """

    maps: dict[str, Maps]
    back: Ridge
    forth: Ridge

    @property
    def reversed(self) -> "Fit":
        """The same for the other layer's dictionary."""
        return Fit({name: maps.reversed for name, maps in self.maps.items()}, self.forth, self.back)

    def maps_for(self, name: str, dictionary: Dictionary) -> Maps:
        """The maps by which `dictionary` explains the other layer."""
        maps = self.maps[name]
        return Maps(maps.down, self.back.choose_behind(dictionary, maps.down)) if name == "ridge" else maps


def fit_layers(here: LayerMoments, there: LayerMoments) -> Fit:
    """Maps for a dictionary of layer `there` that is to explain `here`; reversed, they serve the other direction."""
    cross_DE, held_DE = cross_moments(here.tokens, here.mean_D, there.tokens, there.mean_D)
    down = Ridge(here, there, here.basis_DD.T @ cross_DE)
    up = Ridge(there, here, there.basis_DD.T @ cross_DE.T)
    maps = {
        "orthogonal": _orthogonal(here, there, cross_DE),
        "ridge": Maps(down.choose(here.held_DD, held_DE), up.choose(there.held_DD, held_DE.T)),
    }
    if len(here.mean_D) == len(there.mean_D):
        eye_DD = torch.eye(len(here.mean_D), dtype=torch.float64, device=here.mean_D.device)
        nowhere = Affine(eye_DD, torch.zeros_like(here.mean_D))
        maps |= {"raw": Maps(nowhere, nowhere), "scaled": _similar(here, there, eye_DD, there.span / here.span)}
    return Fit(maps, back=up, forth=down)


def turn(mean_D: Float[Tensor, "D"], rotation_DD: Float[Tensor, "D D"]) -> Maps:
    """Maps that carry a dictionary to where it has its directions turned about the mean."""
    return Maps(Affine.between(rotation_DD, mean_D, mean_D), Affine.between(rotation_DD.T, mean_D, mean_D))


def _orthogonal(here: LayerMoments, there: LayerMoments, cross_DE: Tensor) -> Maps:
    """Procrustes. Of unequal widths the wider layer keeps as many directions as the narrower has; the scale is that of the
    parts of both layers in the directions kept."""
    U_DR, _, V_RE = torch.linalg.svd(cross_DE, full_matrices=False)
    scale = there.span / here.span * (there.share(V_RE.T) / here.share(U_DR)) ** 0.5
    return _similar(here, there, U_DR @ V_RE, scale)


def _similar(here: LayerMoments, there: LayerMoments, rotation_DE: Tensor, scale: float) -> Maps:
    """Turned and made longer by `scale`, and the way back."""
    return Maps(
        Affine.between(rotation_DE * scale, here.mean_D, there.mean_D),
        Affine.between(rotation_DE.T / scale, there.mean_D, here.mean_D),
    )
