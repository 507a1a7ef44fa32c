"""Reconstruction: how well the dictionary of layer i explains the activations of layer j, of the same or another model.

    1. maps between every two layers are fitted on training text (maps.py): raw, scaled, orthogonal, ridge
    2. x_hat = up(SAE_i(down(x_j))), down: layer j's activations -> layer i's, up: the way back
    3. EV[i, j] = 1 - sum|x_j - x_hat|^2 / sum|x_j - mean_j|^2 on held-out tokens, always in layer j's own space
    4. ceilings: EV of layer j's own dictionary; of one trained from another seed (of several the mean); of the ridge maps with
       no dictionary between them, up(down(x_j)). Floor: the same as 3 with dictionary i's directions turned at random about
       layer i's mean

`value` is ridge, the one that is defined and means the same for all pairs. (A raw ratio of losses says nothing, since layers
differ in scale, mean and basis. Literature: Chen et al. 2025, arXiv 2506.06609; McCann 2026, arXiv 2605.24577.)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from throughline.codes import Codes
from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.pools import spread
from throughline.records import TransferInfo, TransferResult
from throughline.splicing import measure_ce
from throughline.stats import NUM_RESAMPLES
from throughline.transfer.maps import Fit, FitTokens, LayerMoments, carry, fit_layers, turn
from throughline.transfer.pairs import Side, align, mean_over_twins, whole_documents

MOST_TOKENS = 3072
NULL_TOKENS = 512  # the floor needs less precision
CHOICE_SHARE = 1 / 8  # of the documents for fitting, on which ridge's penalty is chosen
VARIANTS = ("raw", "scaled", "orthogonal", "ridge")
HEADLINE = "ridge"
SPREADS = ("twin_ceiling_min", "twin_ceiling_max", "num_twins")


class Reconstruction:
    """Explained variance of layer j's activations by layer i's dictionary."""

    name = "reconstruction"
    across_models = True
    both_ways = True

    def __init__(self, spliced: bool = False) -> None:
        """`spliced`: also `delta_ce`, which runs the target model for every pair of layers."""
        self._spliced = spliced

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
        """Arrays [Ls, Lt]: value, low, high, null, l0 (of ridge), ceiling, twin_ceiling, round_trip; raw, scaled, orthogonal,
        ridge, and of those that are not `value` l0_NAME and null_NAME; delta_ce if `spliced`; SPREADS where a layer has several
        twins. Where widths differ raw and scaled are NaN."""
        read, held = align(source.fit, target.fit), align(source.sample, target.sample)
        within = source.model == target.model
        trial = _Trial.of(source.sample.documents_N[held.source_N], seed)
        here = _open_layers(source, read.source_N, held.source_N, trial, seed)
        there = here if within else _open_layers(target, read.target_N, held.target_N, trial, seed)
        cells = [(i, j) for i in range(len(here)) for j in range(len(there)) if not within or i <= j]
        sides = {side.model: side for side in (source, target)} if self._spliced else {}
        clean = {model: splice_ce(None, side) for model, side in sides.items()}

        def splice(a: _Layer, b: _Layer, fit: Fit, side: Side) -> dict[str, float]:
            if not self._spliced:
                return {}
            carried = carry(a.dictionary, fit.maps_for(HEADLINE, a.dictionary))
            return {"delta_ce": splice_ce(carried, side, b.layer) - clean[side.model]}

        def relate(cell: tuple[int, int]) -> tuple[dict[str, float], dict[str, float]]:
            a, b = here[cell[0]], there[cell[1]]
            fit = fit_layers(b.moments, a.moments)
            forth = _explain(a, b, fit, trial) | splice(a, b, fit, target)
            if a is b:
                return forth, forth
            return forth, _explain(b, a, fit.reversed, trial) | splice(b, a, fit.reversed, source)

        beside = ("delta_ce",) if self._spliced else ()
        ways = (len(here), len(there), target), (len(there), len(here), source)
        forth, back = (_empty(r, c, beside + (SPREADS if len(side.twins) > 1 else ())) for r, c, side in ways)
        for (i, j), (one, other) in zip(cells, spread(relate, cells, here[0].device), strict=True):
            for name in one:
                forth[name][i, j] = one[name]
            for name in other:
                (forth if within else back)[name][j, i] = other[name]
        results = [TransferResult(self._info(source, target, held.coverage, trial, seed), forth)]
        if not within:
            coverage = len(held.target_N) / max(1, target.sample.num_tokens)
            results.append(TransferResult(self._info(target, source, coverage, trial, seed), back))
        return results

    def _info(self, source: Side, target: Side, coverage: float, trial: "_Trial", seed: int) -> TransferInfo:
        return TransferInfo(
            metric=self.name,
            source=source.model,
            target=target.model,
            source_layers=list(source.dictionaries),
            target_layers=list(target.dictionaries),
            quantity="explained variance of the target layer's activations by the source layer's dictionary through ridge maps",
            null="the same with the dictionary's directions turned by a random rotation",
            ceiling="explained variance by the target layer's own dictionary",
            num_tokens=trial.num_tokens,
            num_documents=trial.weights_RB.shape[1],
            coverage=coverage,
            seed=seed,
            details={
                "interval": f"bootstrap over documents, {NUM_RESAMPLES} resamples, maps as they are",
                "maps": "fitted on training text",
                "null_tokens": trial.num_null,
            },
        )


@dataclass(frozen=True)
class _Trial:
    """The held-out tokens on which everything is measured: the first of the aligned ones."""

    num_tokens: int
    num_null: int
    number_N: Tensor  # of each token's document, from 0
    weights_RB: Tensor  # how often each document is drawn in each resample

    @classmethod
    def of(cls, documents_N: np.ndarray, seed: int) -> "_Trial":
        if not len(documents_N):
            raise InputError(
                "reconstruction found no held-out tokens that end together; give text that both models read"
            )
        num_tokens = whole_documents(documents_N, MOST_TOKENS)
        number_N = np.unique(documents_N[:num_tokens], return_inverse=True)[1]
        count = int(number_N.max()) + 1
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES)
        weights_RB = torch.from_numpy(draws.astype(np.float64))
        return cls(num_tokens, whole_documents(number_N, NULL_TOKENS), torch.from_numpy(number_N), weights_RB)

    def interval(self, residual_N: Tensor, variance_N: Tensor) -> tuple[float, float]:
        """95 % of the explained variances of resampled documents."""
        sums = torch.zeros(2, self.weights_RB.shape[1], dtype=torch.float64)
        sums[0].index_add_(0, self.number_N, residual_N)
        sums[1].index_add_(0, self.number_N, variance_N)
        ratios = 1 - (self.weights_RB @ sums[0]) / (self.weights_RB @ sums[1])
        low, high = (float(torch.quantile(ratios, q)) for q in (0.025, 0.975))
        return (low, high) if math.isfinite(low) else (math.nan, math.nan)


@dataclass(frozen=True)
class _Layer:
    """One layer: what its dictionary is, what maps to and from it need, and its activations on the trial's tokens."""

    layer: int
    dictionary: Dictionary
    turned: Dictionary
    moments: LayerMoments
    residual_MD: np.ndarray
    tokens_N: np.ndarray
    variance_N: Float[Tensor, "N"]
    ceiling: float
    twin_ceilings: dict[str, float]

    @property
    def device(self) -> torch.device:
        return self.dictionary.W_enc.device

    def x_ND(self) -> Tensor:
        return torch.from_numpy(self.residual_MD[self.tokens_N]).to(self.device)


def _open_layers(side: Side, fit_N: np.ndarray, held_N: np.ndarray, trial: _Trial, seed: int) -> list[_Layer]:
    """Every layer of a model, with what its pairs share computed once."""
    fit_x_LMD, held_x_LMD = side.fit.residual_LND, side.sample.residual_LND
    assert fit_x_LMD is not None and held_x_LMD is not None
    num_fit = _num_fit(side.fit, fit_N)
    d_model = held_x_LMD.shape[2]
    rotation_DD = torch.linalg.qr(
        torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(seed))
    ).Q.double()
    tokens_N = held_N[: trial.num_tokens]

    def open_layer(place: tuple[int, int]) -> _Layer:
        index, layer = place
        dictionary = side.dictionaries[layer]
        twins = [of_layers[layer] for of_layers in side.twins if layer in of_layers]
        device = dictionary.W_enc.device
        exact = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        moments = LayerMoments.of(FitTokens(fit_x_LMD[index], fit_N, num_fit, exact))
        x_ND = torch.from_numpy(held_x_LMD[index][tokens_N]).to(device)
        variance_N = (x_ND - x_ND.mean(0)).square().sum(1).cpu().double()
        own, *others = (1 - float(_unexplained(one, x_ND)[0].sum() / variance_N.sum()) for one in (dictionary, *twins))
        of_twins = mean_over_twins("twin_ceiling", others) | {"num_twins": len(others)} if others else {}
        of_twins = {name: n for name, n in of_twins.items() if len(side.twins) > 1 or name not in SPREADS}
        turned = carry(dictionary, turn(moments.mean_D, rotation_DD.to(exact)))
        return _Layer(layer, dictionary, turned, moments, held_x_LMD[index], tokens_N, variance_N, own, of_twins)

    device = next(iter(side.dictionaries.values())).W_enc.device
    return list(spread(open_layer, enumerate(side.dictionaries), device))


def _explain(source: _Layer, target: _Layer, fit: Fit, trial: _Trial) -> dict[str, float]:
    """The source's dictionary on the target's activations, through all maps that there are for these widths."""
    x_ND, variance_N = target.x_ND(), target.variance_N
    found = {"ceiling": target.ceiling, **target.twin_ceilings}
    for name in VARIANTS:
        if name not in fit.maps:
            continue
        residual_N, l0 = _unexplained(carry(source.dictionary, fit.maps_for(name, source.dictionary)), x_ND)
        found |= {name: 1 - float(residual_N.sum() / variance_N.sum()), f"l0_{name}": l0}
        if name != "raw":
            floor_N, _ = _unexplained(carry(source.turned, fit.maps_for(name, source.turned)), x_ND[: trial.num_null])
            found[f"null_{name}"] = 1 - float(floor_N.sum() / variance_N[: trial.num_null].sum())
        if name == HEADLINE:
            found["low"], found["high"] = trial.interval(residual_N, variance_N)
    maps = fit.maps[HEADLINE]
    lost_N = (x_ND - maps.up.of(maps.down.of(x_ND))).square().sum(1).cpu().double()
    found["round_trip"] = 1 - float(lost_N.sum() / variance_N.sum())
    found |= {"value": found[HEADLINE], "null": found.pop(f"null_{HEADLINE}"), "l0": found.pop(f"l0_{HEADLINE}")}
    return found


@torch.no_grad()
def _unexplained(dictionary: Dictionary, x_ND: Tensor) -> tuple[Tensor, float]:
    """|x - x_hat|^2 of each token, float64, and L0."""
    residuals, active = [], 0
    for chunk in dictionary.chunks(x_ND):
        f_NF = dictionary.encode(chunk)
        residuals.append((chunk - dictionary.decode(f_NF)).square().sum(1).cpu().double())
        active += int((f_NF > 0).sum())
    return torch.cat(residuals), active / len(x_ND)


def splice_ce(dictionary: Dictionary | None, side: Side, layer: int = 0) -> float:
    """CE of a side's model on the first rows of its sample, nats per predicted token, with `dictionary` in the place of the stream
    after block `layer`; with None, of the model as it is."""
    rows = side.sample.rows
    enough = int(np.searchsorted(rows.keep.sum(1).cumsum(), MOST_TOKENS)) + 1
    replacements = {} if dictionary is None else {layer: dictionary.reconstruct}
    return measure_ce(side.language_model, rows.select(slice(enough)), replacements)


def _empty(rows: int, columns: int, more: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All arrays of a result without any value."""
    beside = [f"{kind}_{name}" for name in VARIANTS if name != HEADLINE for kind in ("l0", "null")]
    names = ("value", "low", "high", "null", "l0", "ceiling", "twin_ceiling", "round_trip", *VARIANTS, *beside, *more)
    return {name: np.full((rows, columns), np.nan) for name in names if name != "null_raw"}


def _num_fit(codes: Codes, tokens_N: np.ndarray) -> int:
    """How many of the tokens belong to the documents that maps are fitted on; the others choose the penalty."""
    documents_N = codes.documents_N[tokens_N]
    documents = np.unique(documents_N)
    if len(documents) < 2:
        raise InputError(
            f"maps between layers need two documents of training text or more, found {len(documents)} with tokens that end "
            "together; raise evaluation.sample_tokens, or give more text"
        )
    held = max(1, int(len(documents) * CHOICE_SHARE))
    return int(np.searchsorted(documents_N, documents[-held]))
