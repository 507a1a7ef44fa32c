"""Labels from a vocabulary of predicates: what is true of the text at a token.

The vocabulary is read off the selection text: what the user's functions and the documents' facts say; the token itself, the
ones around it, its class and its place (`lexical`); and the numbers known there, their digits, ranges and sums (`numbers`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import scipy.sparse as sp

from throughline.codes import Codes
from throughline.labelers.choosing import Choice, choose_predicates
from throughline.labelers.coverage import count_covered, count_on, held_f1
from throughline.labelers.facts import add_facts, find_given, load_predicates
from throughline.labelers.lexical import add_classes, add_positions, add_tokens
from throughline.labelers.numbers import add_numbers, read_numbers
from throughline.labelers.scoring import (
    MIN_POSITIVE,
    Baselines,
    LayerText,
    label_table,
    maxima_of,
    measure_baselines,
)
from throughline.labelers.viewing import View
from throughline.labelers.vocabulary import FAMILIES, SPECIFIC, Builder, Predicates
from throughline.records import COVERAGE_COLUMNS, FAMILY_COLUMNS

MOST_POSITIVE = 0.9  # share of tokens; what is nearly always true says nothing


def find_concepts(selection: Codes, heldout: Codes, given: Sequence = ()) -> tuple[Predicates, Predicates]:
    """The vocabulary, and its truth at each token of both texts."""
    view, N = View.of([selection, heldout]), selection.num_tokens

    def keep(cells_NA: sp.csr_array, unions_AC: sp.csc_array) -> np.ndarray:
        count_C = unions_AC.T @ np.bincount(cells_NA[:N].indices, minlength=cells_NA.shape[1])
        return (count_C >= MIN_POSITIVE) & (count_C < MOST_POSITIVE * N)

    builder = Builder(view.num_tokens, keep)
    numbers = read_numbers(view)
    builder.add_truths(find_given(view, given))
    add_facts(builder, view, numbers.places)
    add_tokens(builder, view)
    add_classes(builder, view)
    add_positions(builder, view)
    add_numbers(builder, view, numbers)
    found = builder.build()
    return found.tokens(slice(N)), found.tokens(slice(N, None))


class _Reading(NamedTuple):
    """Labels of one layer's features, and the best of each family, with the texts they were read from."""

    texts: tuple[LayerText, LayerText]
    labels: pl.DataFrame
    predicates: np.ndarray
    families: pl.DataFrame


class Concepts:
    """The best predicate of the vocabulary for each feature."""

    name = "concepts"

    def __init__(self, predicates: Sequence[str] = ()) -> None:
        """`predicates` are the user's functions, as `module:attribute`."""
        self._given = load_predicates(predicates)
        self._texts: tuple[Codes, Codes] | None = None
        self._concepts: tuple[Predicates, Predicates] | None = None
        self._reading: _Reading | None = None

    def label(self, selection: LayerText, heldout: LayerText) -> pl.DataFrame:
        """One label per feature that fires on the selection text."""
        return self._read(selection, heldout).labels

    def cover(self, selection: LayerText, heldout: LayerText) -> tuple[pl.DataFrame, pl.DataFrame]:
        """How many features have a good label, of the dictionary and of an untrained one that is labelled in the same way
        (COVERAGE_COLUMNS); and the best feature of each family that is reported by name (FAMILY_COLUMNS)."""
        select, held = self._find(selection.codes, heldout.codes)
        maxima = maxima_of(selection.untrained)
        choice = choose_predicates(selection.untrained, select, maxima)[0].of_live()
        read, N = self._read(selection, heldout), heldout.codes.num_tokens
        rows = [
            count_covered(heldout.layer, "trained", read.predicates, read.labels["f1"].to_numpy(), N),
            count_covered(
                heldout.layer, "untrained", choice.predicate, held_f1(heldout.untrained, held, choice, maxima), N
            ),
        ]
        return pl.DataFrame(rows, schema=COVERAGE_COLUMNS), read.families

    def _read(self, selection: LayerText, heldout: LayerText) -> "_Reading":
        """Labels of features and of families, scored together, since baselines cost most; kept for the other of the two calls."""
        if self._reading is None or self._reading.texts[0] is not selection or self._reading.texts[1] is not heldout:
            select, held = self._find(selection.codes, heldout.codes)
            maxima = maxima_of(selection.features)
            by_feature, by_family = choose_predicates(selection.features, select, maxima)
            live, named = by_feature.of_live(), by_family.of_live()
            choice = Choice(*(np.concatenate(parts) for parts in zip(live, named, strict=True)))
            table = self._score(selection, heldout, choice, maxima)
            by_name = table[len(live.low) :].with_columns(
                family=pl.Series([FAMILIES[g] for g in held.families_C[named.predicate]], dtype=pl.String),
                selection_f1=named.low,
            )
            by_name = by_name.filter(pl.col("family").is_in(SPECIFIC)).select(list(FAMILY_COLUMNS))
            self._reading = _Reading((selection, heldout), table[: len(live.low)], live.predicate, by_name)
        return self._reading

    def _score(self, selection: LayerText, heldout: LayerText, choice: Choice, maxima_F: np.ndarray) -> pl.DataFrame:
        """Chosen labels with what they reach on the held-out text."""
        select, held = self._find(selection.codes, heldout.codes)
        used, at = np.unique(choice.predicate, return_inverse=True)
        select_NC, held_NC = select.truths(used), held.truths(used)
        counts = count_on(heldout.features, held_NC, at, choice, maxima_F)
        baselines = measure_baselines(selection, heldout, select_NC, held_NC)
        return label_table(
            heldout,
            self.name,
            choice.feature,
            [held.words[c] for c in choice.predicate],
            choice.threshold * maxima_F[choice.feature],
            *counts,
            Baselines(*(b[at] for b in baselines)),
        )

    def _find(self, selection: Codes, heldout: Codes) -> tuple[Predicates, Predicates]:
        """The concepts of two texts, found once for all layers."""
        known = self._texts is not None and self._texts[0] is selection and self._texts[1] is heldout
        if self._concepts is None or not known:
            self._texts, self._concepts = (selection, heldout), find_concepts(selection, heldout, self._given)
        return self._concepts
