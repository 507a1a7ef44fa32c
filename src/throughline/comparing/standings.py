"""Which features of a model have a counterpart in the others, and how many would have one by chance.

1. a feature's partner in another model is the feature of any of its layers with the highest correlation, if that is above
   the threshold of the pair of layers (`matching`)
2. with partners in all other models it is universal, with some shared, with none specific. Features too rare in the
   aligned text of any pair of models (`live`) cannot be judged, and are not counted
3. base rate: the same shares of all live features
4. chance: the same shares with the correlations that matching found with tokens of other documents. By the threshold's
   definition 1 - NULL_QUANTILE of them pass in each layer, so at most that times the number of layers in a model, and at most
   the least of these in all models (bounds of Boole and Frechet: they hold however much layers and models agree)
5. kind of position: the same bounds from the null of `matching`, the share that passes when only roles are known
6. ceiling: the share of a layer's features that its dictionary from another seed has (of several the mean, and their range), in
   the pair of layers where it is largest, and the model where that is least
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from throughline.records import (
    FEWEST_OF_INTERVAL,
    NULL_QUANTILE,
    Estimate,
    PromptReading,
    Standing,
    Standings,
    TransferResult,
)
from throughline.stats import bootstrap_interval

STANDINGS: tuple[Standing, ...] = ("universal", "shared", "specific")
Matches = Mapping[tuple[str, str], TransferResult]  # matching from one model to another, for every pair


def estimate(values: np.ndarray, seed: int) -> Estimate:
    """Mean with its bootstrap interval; none of fewer than FEWEST_OF_INTERVAL values."""
    if not len(values):
        return Estimate(value=None, low=None, high=None, n=0)
    if len(values) < FEWEST_OF_INTERVAL:  # resampling two values that agree gives an interval without width
        return Estimate(value=float(values.mean()), low=None, high=None, n=len(values))
    low, high = bootstrap_interval(values.astype(float), seed)
    return Estimate(value=float(values.mean()), low=low, high=high, n=len(values))


@dataclass(frozen=True)
class Counterparts:
    """One model's features against all other models. Rows are its layers, columns its features.

    `places_LF` index STANDINGS and are -1 for what cannot be judged; `by_chance_LF` are the same by chance.
    """

    layers: list[int]
    places_LF: np.ndarray
    by_chance_LF: np.ndarray
    most_by_kind_L: np.ndarray
    most_by_chance: float
    ceiling_L: np.ndarray
    ceiling_ends_L: tuple[np.ndarray, np.ndarray]  # least and most of several twins; NaN with one
    num_twins: int  # 0: not told, which is one or none
    partners: Mapping[
        str, tuple[np.ndarray, np.ndarray, np.ndarray]
    ]  # other model -> layer, feature, correlation, [L, F]

    @classmethod
    def of(cls, model: str, matches: Matches) -> "Counterparts":
        """From the matchings of `model` to all others."""
        results = {b: result for (a, b), result in matches.items() if a == model}
        first = next(iter(results.values()))
        live_LF = np.logical_and.reduce([r.arrays["live"] for r in results.values()])
        partners = {other: _best_partners(r, "correlation") for other, r in results.items()}
        chances = [_best_partners(r, "chance")[0] for r in results.values()] if "chance" in first.arrays else []
        kinds = [np.minimum(1, np.nansum(r.arrays["null"], axis=1)) for r in results.values()]
        passing = [(1 - NULL_QUANTILE) * len(r.info.target_layers) for r in results.values()]
        ceilings_RCL = np.stack([_ceilings(r) for r in results.values()])
        least = ceilings_RCL[:, 0].argmin(0)  # NaN, no ceiling, comes before all numbers
        ceiling_L, min_L, max_L = np.take_along_axis(ceilings_RCL, least[None, None], 0)[0]
        return cls(
            layers=first.info.source_layers,
            places_LF=_places([p[0] for p in partners.values()], live_LF),
            by_chance_LF=_places(chances, live_LF) if chances else np.full(live_LF.shape, -1),
            most_by_kind_L=np.min(kinds, axis=0),
            most_by_chance=min(1.0, *passing),
            ceiling_L=ceiling_L,
            ceiling_ends_L=(min_L, max_L),
            num_twins=first.num_twins,
            partners=partners,
        )

    def standing(self, layer: int, feature: int) -> Standing:
        """Universal, shared or specific; what cannot be judged has no partner, and is specific."""
        return STANDINGS[int(self.places_LF[self.layers.index(layer), feature])]

    def partners_of(self, layer: int, feature: int) -> dict[str, tuple[int, int, float]]:
        """Layer, feature and correlation of its partner in each model that has one."""
        row = self.layers.index(layer)
        found = {other: tuple(a[row, feature] for a in arrays) for other, arrays in self.partners.items()}
        return {other: (int(p), int(f), float(r)) for other, (p, f, r) in found.items() if p >= 0}

    def active(self, reading: PromptReading) -> np.ndarray:
        """Rows and columns [2, A] of the features that are active anywhere on the prompt, each once."""
        each = []
        for row, layer in enumerate(self.layers):
            features = np.unique(reading.layers[layer].features_A)
            each.append(np.stack([np.full(len(features), row), features]))
        return np.concatenate(each, axis=1)


def _best_partners(result: TransferResult, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each source layer and feature the best target layer, partner and correlation; -1 and NaN if none."""
    correlation = result.arrays[name].astype(np.float64)  # [Ls, Lt, F]
    above = correlation > result.arrays["threshold"][:, :, None]
    masked = np.where(above, correlation, -np.inf)
    column = masked.argmax(1)
    found = np.take_along_axis(masked, column[:, None], 1)[:, 0]
    partner = np.take_along_axis(result.arrays["partner"], column[:, None], 1)[:, 0]
    none = ~np.isfinite(found)
    layer = np.array(result.info.target_layers)[column]
    return np.where(none, -1, layer), np.where(none, -1, partner), np.where(none, np.nan, found)


def _places(layers: list[np.ndarray], live_LF: np.ndarray) -> np.ndarray:
    """Index into STANDINGS by how many of the other models have a partner."""
    count = np.sum([layer >= 0 for layer in layers], axis=0)
    return np.where(live_LF, np.where(count == len(layers), 0, np.where(count > 0, 1, 2)), -1)


def _ceilings(result: TransferResult) -> np.ndarray:
    """Ceiling, and least and most of several twins, in the pair of layers where the ceiling is largest: [3, L] by source layer;
    NaN where there is none."""
    none = np.full((len(result.info.source_layers), 1), np.nan)
    ceiling = result.arrays.get("ceiling", none)
    place = np.where(np.isnan(ceiling), -np.inf, ceiling).argmax(1)[:, None]
    each = (ceiling, *(result.arrays.get(f"ceiling_{end}", np.full_like(ceiling, np.nan)) for end in ("min", "max")))
    return np.stack([np.take_along_axis(array, place, 1)[:, 0] for array in each])


def judge_prompt(found: Counterparts, reading: PromptReading, seed: int) -> Standings:
    """The standings of a prompt's active features, resampled by feature."""
    rows, columns = found.active(reading)
    places, by_chance = found.places_LF[rows, columns], found.by_chance_LF[rows, columns]
    known = places >= 0
    return Standings(
        active={s: estimate(places[known] == i, seed) for i, s in enumerate(STANDINGS)},
        num_active=int(known.sum()),
        num_rare=int((~known).sum()),
        live=_shares(found.places_LF),
        num_live=int((found.places_LF >= 0).sum()),
        chance=_shares(by_chance),
        most_universal_by_chance=found.most_by_chance,
        most_universal_by_kind=float(found.most_by_kind_L[rows[known]].mean()) if known.any() else 0.0,
        ceiling=_known_mean(found.ceiling_L[rows[known]]),
        ceiling_min=_known_mean(found.ceiling_ends_L[0][rows[known]]),
        ceiling_max=_known_mean(found.ceiling_ends_L[1][rows[known]]),
        num_twins=found.num_twins,
    )


def judge_prompts(found: Counterparts, readings: list[PromptReading], seed: int) -> Standings:
    """The means over prompts, resampled by prompt; prompts without a feature that can be judged are left out."""
    each = [judged for reading in readings if (judged := judge_prompt(found, reading, seed)).num_active]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    def known_mean(name: str) -> float | None:
        values = [value for judged in each if (value := getattr(judged, name)) is not None]
        return mean(values) if values else None

    return Standings(
        active={s: estimate(np.array([judged.active[s].value for judged in each]), seed) for s in STANDINGS},
        num_active=mean([s.num_active for s in each]),
        num_rare=mean([s.num_rare for s in each]),
        live=_shares(found.places_LF),
        num_live=int((found.places_LF >= 0).sum()),
        chance={s: mean([judged.chance[s] for judged in each]) for s in STANDINGS} if each and each[0].chance else {},
        most_universal_by_chance=found.most_by_chance,
        most_universal_by_kind=mean([s.most_universal_by_kind for s in each]),
        ceiling=known_mean("ceiling"),
        ceiling_min=known_mean("ceiling_min"),
        ceiling_max=known_mean("ceiling_max"),
        num_twins=found.num_twins,
    )


def list_active(found: Counterparts, reading: PromptReading) -> dict[Standing, list[tuple[int, int]]]:
    """The active features that can be judged, by standing: layer and feature."""
    rows, columns = found.active(reading)
    places = found.places_LF[rows, columns]
    layers = np.array(found.layers)[rows]
    return {
        s: [(int(a), int(b)) for a, b in zip(layers[places == i], columns[places == i], strict=True)]
        for i, s in enumerate(STANDINGS)
    }


def _shares(places: np.ndarray) -> dict[Standing, float]:
    """Share of each standing among what was judged; {} of nothing."""
    known = places[places >= 0]
    return {s: float((known == i).mean()) for i, s in enumerate(STANDINGS)} if len(known) else {}


def _known_mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
