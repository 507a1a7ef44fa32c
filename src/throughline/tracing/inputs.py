"""What traces of a model are made with: the model, its dictionaries, and what is known of their features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from throughline.dictionaries import Dictionary
from throughline.models import LanguageModel
from throughline.records import Label, Place


@dataclass(frozen=True)
class TraceInputs:
    """What a trace is made with: the model, its dictionaries, and the tables of features and of labels that reached the bar.

    `throughlines` (columns layer, feature, throughline, birth, death) is None where the run has none.
    """

    model: LanguageModel
    dictionaries: dict[int, Dictionary]
    features: pl.DataFrame
    labels: pl.DataFrame
    throughlines: pl.DataFrame | None = None
    seed: int = 0
    forced: bool = False

    def role_means(self, layer: int) -> np.ndarray:
        """Mean activation of each feature over held-out tokens of each role, [F, roles]."""
        column = self.features.filter(pl.col("layer") == layer).sort("feature")["role_means"]
        return np.array(column.to_list())

    @cached_property
    def _labels(self) -> dict[int, dict[int, dict[str, Any]]]:
        found: dict[int, dict[int, dict[str, Any]]] = {}
        for row in self.labels.iter_rows(named=True):
            found.setdefault(row["layer"], {})[row["feature"]] = row
        return found

    def labels_of(self, layer: int) -> dict[int, dict[str, Any]]:
        """The label row of each feature of a layer that has one. It speaks only of activations above its threshold."""
        return self._labels.get(layer, {})

    def find_label(self, layer: int, feature: int, activation: float) -> Label | None:
        """The feature's label, if it has one that speaks of so large an activation."""
        row = self.labels_of(layer).get(feature)
        if row is None or not speaks(row, activation):
            return None
        return Label(text=row["label"], **{name: row[name] for name in Label.model_fields if name != "text"})

    @cached_property
    def top_tokens(self) -> dict[tuple[int, int], list[str]]:
        """By layer and feature."""
        columns = (self.features[c].to_list() for c in ("layer", "feature", "top_tokens"))
        return {(layer, feature): tokens for layer, feature, tokens in zip(*columns, strict=True)}

    def name_step(self, places: Sequence[Place], activations: Mapping[Place, float]) -> str:
        """Words for the features of one step of a chain: the first label that speaks, or the first feature's top tokens."""
        for place in places:
            label = self.find_label(place[0], place[2], activations[place])
            if label is not None:
                return label.text
        tokens = self.top_tokens.get((places[0][0], places[0][2]), [])
        return "unlabelled: " + ", ".join(map(repr, tokens[:3]))

    @cached_property
    def lives(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """By layer and feature: number, birth and death of its throughline."""
        if self.throughlines is None:
            return {}
        rows = self.throughlines.select("layer", "feature", "throughline", "birth", "death").iter_rows()
        return {(layer, feature): rest for layer, feature, *rest in rows}  # pyright: ignore[reportReturnType]


def speaks(label: dict[str, Any] | None, activation: float) -> bool:
    """Whether the label is of so large an activation."""
    return label is not None and activation > label["threshold"]
