"""Means and shares with intervals, and the cells of a matrix that say something."""

import math
from typing import NamedTuple

import numpy as np

from throughline.records import TransferResult
from throughline.throughlines import CONFIDENCE


class Share(NamedTuple):
    """A share of n with its 95 % interval (Wilson's, which stays between 0 and 1); NaN if n is 0."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, count: float, n: int) -> "Share":
        """`count` of `n`."""
        if not n:
            return cls(math.nan, math.nan, math.nan, 0)
        share, z2 = count / n, CONFIDENCE**2
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = CONFIDENCE * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
        return cls(share, max(0.0, middle - half), min(1.0, middle + half), n)

    def __str__(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def pairs_of_layers(result: TransferResult) -> np.ndarray:
    """Values of the pairs that say something: all of two models, those of different layers of one."""
    value = result.arrays["value"]
    return value[~np.eye(len(value), dtype=bool)] if result.info.source == result.info.target else value


def describe_twins(result: TransferResult, least: float, most: float) -> str:
    """` (mean of 3 seeds, 70% to 75%)`, to stand behind a ceiling; nothing where it is of one seed."""
    return f" (mean of {result.num_twins} seeds, {least:.0%} to {most:.0%})" if result.num_twins else ""


def one_way(result: TransferResult) -> bool:
    """True if layers are related to later ones alone: their means are then over other distances, and not to be compared."""
    value = result.arrays["value"]
    return not np.isfinite(value[np.tril_indices(len(value), -1)]).any()


def mean(values: np.ndarray) -> float:
    """Mean of what is not NaN (a pair of layers without live features); NaN if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def finite(values: np.ndarray) -> list[float | None]:
    """A list in which NaN is None, as JSON has it."""
    return [float(v) if math.isfinite(v) else None for v in values]
