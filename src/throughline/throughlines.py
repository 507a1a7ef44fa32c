"""Throughlines: chains of features in consecutive layers of a model, each the other's best match and above chance.

    1. a feature of layer i goes on in layer i + 1 if its partner there has it as its own partner, and their correlation is above
       the threshold of that pair of layers (`matching`)
    2. a throughline is such a chain: born where no feature before goes on in its first, dead after its last. Every live feature
       is in exactly one, a feature that neither comes from anywhere nor goes on in one of length 1
    3. persistence S(d) = share of the features that have d layers after them whose throughline is alive d layers later;
       its half-life is where S falls to one half
    4. between models: two throughlines belong together if a feature of one and a feature of the other are each other's partner
       among all features of all layers (mutual MPPC), above the thresholds of both

A chain's links are correlations on one text: it says that something is carried on, not that one feature causes the next (`flow`).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl

from throughline.records import Ribbon, TransferResult

CONFIDENCE = 1.96  # standard deviations of a 95 % interval


class Persistence(NamedTuple):
    """S(d) with its 95 % interval for d = 0, 1, … layers; its null and ceiling (all NaN if there is none); features counted; and of
    several twins the ceilings of the least and of the most of them at every link (NaN with one)."""

    share_D: np.ndarray
    low_D: np.ndarray
    high_D: np.ndarray
    null_D: np.ndarray
    ceiling_D: np.ndarray
    num_D: np.ndarray
    ceiling_min_D: np.ndarray
    ceiling_max_D: np.ndarray

    @property
    def half_life(self) -> float | None:
        """Where S falls to one half; None if it stays above."""
        return half_life(list(range(len(self.share_D))), self.share_D.tolist())


def half_life(x: Sequence[float], y: Sequence[float | None]) -> float | None:
    """The x at which y first comes down to one half, on a straight line between two points; None if it never does."""
    known = [(place, share) for place, share in zip(x, y, strict=True) if share is not None]
    for (before, upper), (after, lower) in pairwise(known):
        if upper > 0.5 >= lower:
            return before + (after - before) * (upper - 0.5) / (upper - lower)
    return None


def find_throughlines(result: TransferResult) -> pl.DataFrame:
    """Every live feature of a model with its throughline, from the result of `matching` of the model with itself.

    Columns: throughline (numbered by birth, then by first feature), layer, feature, birth and death (the first and the last
    layer), length (how many layers). Rows are sorted by layer and feature.
    """
    layers, arrays = result.info.source_layers, result.arrays
    live_LF = arrays["live"]
    number_LF = np.full(live_LF.shape, -1)
    count = 0
    for place, live_F in enumerate(live_LF):
        features = np.flatnonzero(live_F)
        if place > 0:
            before_F, after_F = _links(arrays, place - 1)
            number_LF[place, after_F] = number_LF[place - 1, before_F]
        born = features[number_LF[place, features] < 0]
        number_LF[place, born] = count + np.arange(len(born))
        count += len(born)
    places, features = np.nonzero(live_LF)
    numbers = number_LF[places, features]
    first, last = np.full(count, len(layers)), np.full(count, -1)
    np.minimum.at(first, numbers, places)
    np.maximum.at(last, numbers, places)
    layer_of = np.array(layers, dtype=np.int64)
    return pl.DataFrame(
        {
            "throughline": numbers,
            "layer": layer_of[places],
            "feature": features,
            "birth": layer_of[first[numbers]],
            "death": layer_of[last[numbers]],
            "length": (last - first + 1)[numbers],
        }
    )


def _links(arrays: Mapping[str, np.ndarray], place: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of the layer at `place` that go on in the next one, and what they are there."""
    ahead, back = arrays["partner"][place, place + 1], arrays["partner"][place + 1, place]
    features = np.flatnonzero(ahead >= 0)
    features = features[back[ahead[features]] == features]
    limit = max(arrays["threshold"][place, place + 1], arrays["threshold"][place + 1, place])
    features = features[arrays["correlation"][place, place + 1, features] > limit]
    return features, ahead[features]


def count_alive(model: str, layers: list[int], table: pl.DataFrame) -> Ribbon:
    """How many throughlines of each birth layer are alive at each layer."""
    births = {(b, n): count for b, n, count in table.group_by("birth", "layer").len().iter_rows()}
    return Ribbon(model=model, layers=layers, alive=[[births.get((b, n), 0) for n in layers] for b in layers])


def measure_persistence(result: TransferResult, table: pl.DataFrame) -> Persistence:
    """The persistence curve of a model's throughlines. Intervals are those of a ratio of sums over throughlines.

    Null: the product of the shares of links that the kind of position alone explains, of each layer's live features; it asks for
    no mutual choice, so it lies too high. Ceiling: the product of the shares of mutual matches between each layer and a
    dictionary of it from another seed, as if nothing changed from layer to layer but the dictionary.
    """
    layers, arrays = result.info.source_layers, result.arrays
    depth, live_L = len(layers), arrays["live"].sum(1)
    place_of = {layer: place for place, layer in enumerate(layers)}
    chains = table.select("throughline", "birth", "length").unique("throughline", maintain_order=True)
    start_C = np.array([place_of[layer] for layer in chains["birth"]], dtype=np.int64)
    length_C = chains["length"].to_numpy()
    links = np.arange(depth - 1)
    none = np.full((depth, depth), np.nan)
    names = {"ceiling": "ceiling_mutual", "min": "ceiling_mutual_min", "max": "ceiling_mutual_max"}
    of_links = {"null": arrays["null"][links, links + 1]}
    of_links |= {name: arrays.get(saved, none)[links, links + 1] for name, saved in names.items()}
    rows = []
    for d in range(depth):
        counted_C = np.clip(
            np.minimum(start_C + length_C, depth - d) - start_C, 0, None
        )  # features with d layers after them
        alive_C = np.clip(length_C - d, 0, None)
        total = counted_C.sum()
        share = alive_C.sum() / total if total else np.nan
        deviation = np.sqrt(((alive_C - share * counted_C) ** 2).sum()) / total if total else np.nan
        weight_L = live_L[: depth - d] / max(1, live_L[: depth - d].sum())
        products = {
            name: float(weight_L @ [np.prod(shares[i : i + d]) for i in range(depth - d)])
            for name, shares in of_links.items()
        }
        low, high = max(0.0, share - CONFIDENCE * deviation), min(1.0, share + CONFIDENCE * deviation)
        rows.append((share, low, high, products["null"], products["ceiling"], total, products["min"], products["max"]))
    return Persistence(*np.array(rows, dtype=float).T)


def join_models(
    results: Mapping[tuple[str, str], TransferResult], tables: Mapping[str, pl.DataFrame]
) -> dict[str, pl.DataFrame]:
    """The tables with a column `family`: throughlines of several models that belong together have the same number, others none.

    `results` are those of `matching`, by source and target model.
    """
    names, offset, total = list(tables), {}, 0
    for name in names:
        offset[name] = total
        total += tables[name]["throughline"].n_unique()
    parent = np.arange(total)

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = int(parent[number])
        return number

    for a in names:
        for b in names[names.index(a) + 1 :]:
            if (a, b) not in results or (b, a) not in results:
                continue
            numbers = [_numbers(tables[name], results[pair]) for name, pair in ((a, (a, b)), (b, (b, a)))]
            for here, there in mutual_over_layers(results[a, b], results[b, a]):
                one, two = root(offset[a] + int(numbers[0][here])), root(offset[b] + int(numbers[1][there]))
                parent[max(one, two)] = min(one, two)
    roots = np.array([root(number) for number in range(total)], dtype=np.int64)
    shared = np.isin(roots, np.flatnonzero(np.bincount(roots, minlength=max(total, 1)) > 1))
    found = {}
    for name in names:
        numbers_A = tables[name]["throughline"].to_numpy() + offset[name]
        family = pl.Series("family", roots[numbers_A] if len(numbers_A) else np.empty(0, np.int64))
        is_shared = pl.Series(shared[numbers_A] if len(numbers_A) else np.empty(0, bool))
        found[name] = tables[name].with_columns(pl.when(is_shared).then(family).otherwise(None).alias("family"))
    return found


def _numbers(table: pl.DataFrame, result: TransferResult) -> np.ndarray:
    """The throughline of each feature [L, F]; -1 where it is not live."""
    places = {layer: place for place, layer in enumerate(result.info.source_layers)}
    numbers_LF = np.full(result.arrays["live"].shape, -1)
    rows = np.array([places[layer] for layer in table["layer"]], dtype=np.int64)
    numbers_LF[rows, table["feature"].to_numpy()] = table["throughline"].to_numpy()
    return numbers_LF


def mutual_over_layers(forth: TransferResult, back: TransferResult) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (place of layer, feature) of two models that are each other's partner among all features of all layers."""
    ahead, ahead_place = _partners(forth)
    returned, returned_place = _partners(back)
    found = []
    for i, u in zip(*np.nonzero(ahead >= 0), strict=True):
        j, v = ahead_place[i, u], ahead[i, u]
        if (returned_place[j, v], returned[j, v]) == (i, u):
            found.append(((int(i), int(u)), (int(j), int(v))))
    return found


def _partners(result: TransferResult) -> tuple[np.ndarray, np.ndarray]:
    """Each feature's partner among all layers of the other model, and the place of its layer; -1 if not above chance."""
    arrays = result.arrays
    place_LF = arrays["mppc_place"]
    partner_LF = np.take_along_axis(arrays["partner"], np.maximum(place_LF, 0)[:, None], axis=1)[:, 0]
    is_match = (place_LF >= 0) & (arrays["mppc"] > arrays["mppc_threshold"][:, None])
    return np.where(is_match, partner_LF, -1), place_LF
