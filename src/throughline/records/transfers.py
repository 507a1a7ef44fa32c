"""How features carry over between layers and models, and what the matrices say."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from throughline.records.base import Record


class TransferInfo(Record):
    """What a transfer result's arrays mean. Rows are layers of `source`, columns layers of `target`."""

    metric: str
    source: str
    target: str
    source_layers: list[int]
    target_layers: list[int]
    quantity: str  # what `value` is, in words
    null: str | None  # what `null` is, in words; None where the metric has none
    ceiling: str | None
    num_tokens: int
    num_documents: int
    coverage: float  # share of the source's tokens with an aligned partner in the target
    seed: int
    details: dict[str, str | int | float] = {}


@dataclass(frozen=True)
class TransferResult:
    """Arrays [source layer, target layer] named value, low, high (95 % bootstrap interval), null, ceiling; and a metric's own.

    Where layers have several twins a ceiling is the mean over them: NAME_min and NAME_max are the least and the most, and
    num_twins how many there are.
    `matching` adds threshold [source layer, target layer], partner and correlation [source layer, target layer, source
    feature], and live [source layer, source feature].
    """

    info: TransferInfo
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_twins(self) -> int:
        """Twins of each layer (of the layer that has most) if they are several; 0 if there is one or none."""
        counts = self.arrays.get("num_twins", np.zeros(0))
        return int(counts[np.isfinite(counts)].max(initial=0))


NULL_QUANTILE = 0.999  # of correlations by chance in two layers: the threshold of `matching`


class Finding(Record):
    """One computed sentence of the analysis, with the numbers it was made from."""

    topic: str
    sentence: str
    beyond_null: bool
    numbers: dict[str, float | int | str | None]


class Curve(Record):
    """A measured quantity along depth, distance or age; lists are by point, and empty for what there is none of.

    `divergence`: x is the relative depth of a source layer, value the best share of its features found in a layer of the target.
    `decay`: x is the distance between two layers of one model, value the mean over such pairs. `persistence`: x is a number of
    layers, value the share of throughlines that live so long.
    """

    kind: Literal["divergence", "decay", "persistence"]
    metric: str
    source: str
    target: str
    x: list[float]
    value: list[float | None]
    low: list[float | None] = []
    high: list[float | None] = []
    null: list[float | None] = []
    ceiling: list[float | None] = []
    ceiling_low: list[float | None] = []
    ceiling_high: list[float | None] = []
    ceiling_min: list[float | None] = []  # least and most of several twins; empty with one, whose ceiling it is
    ceiling_max: list[float | None] = []
    num_twins: int = 0  # dictionaries of each layer from other seeds behind the ceiling; 0 if that is not told
    num: list[int] = []  # features, or pairs of layers, behind each point


class Ribbon(Record):
    """Births and deaths of one model's throughlines: `alive[b][l]` of those born at `layers[b]` are alive at `layers[l]`."""

    model: str
    layers: list[int]
    alive: list[list[int]]


class Analysis(Record):
    """What the matrices say, sentence by sentence, and as curves."""

    num_tokens: int
    seed: int
    findings: list[Finding]
    curves: list[Curve] = []
    ribbons: list[Ribbon] = []
