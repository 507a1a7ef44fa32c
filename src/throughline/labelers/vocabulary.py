"""Predicates over the tokens of a text as unions of cells, so that thousands of them cost what a few dozen would.

An attribute gives each token at most one value, such as the units digit of the last number; value and place together are a
cell. A predicate ("units of the last number in 7-9, at '?'") is a set of cells of one attribute or of several of which no
token is in two, so that counting is

    tokens on which feature f and predicate c hold = sum over the cells a of c of |f and a|

With N tokens, A cells and C predicates this is (active_FN @ cells_NA) @ unions_AC: a token is in one cell of each attribute
but in hundreds of predicates, and the second product does not grow with the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

NOWHERE = -1  # the value of an attribute that says nothing of a token
SPECIFIC = ("units", "tens", "carry", "sum")  # families that are reported by name
FAMILIES = (*SPECIFIC, "other")
MOST_OF_PLACE = 0.6  # share of a place's tokens


@dataclass(frozen=True)
class Predicates:
    """C predicates: their words, the family of each (index into FAMILIES), and of which of the A cells each is made."""

    words: list[str]
    families_C: np.ndarray
    cells_NA: sp.csr_array
    unions_AC: sp.csc_array

    @staticmethod
    def of(words: list[str], truths_NC: sp.csr_array) -> "Predicates":
        """Each predicate its own cell."""
        C = len(words)
        return Predicates(words, np.full(C, len(SPECIFIC)), truths_NC, sp.eye_array(C, dtype=np.float32, format="csc"))

    def overlap(self, active_NF: sp.csr_array) -> np.ndarray:
        """Tokens on which feature and predicate hold together, dense [F, C]."""
        return (self.unions_AC.T @ (self.cells_NA.T @ active_NF).toarray()).T

    def count(self) -> np.ndarray:
        """Tokens on which each predicate holds, [C]."""
        return self.unions_AC.T @ np.bincount(self.cells_NA.indices, minlength=self.cells_NA.shape[1]).astype(float)

    def truths(self, chosen: np.ndarray) -> sp.csr_array:
        """The predicates of these numbers, token by token, [N, len(chosen)]."""
        return sp.csr_array(self.cells_NA @ self.unions_AC[:, chosen])

    def select(self, chosen: np.ndarray) -> "Predicates":
        """The predicates of these numbers."""
        words = [self.words[c] for c in chosen]
        return Predicates(words, self.families_C[chosen], self.cells_NA, self.unions_AC[:, chosen])

    def tokens(self, part: slice) -> "Predicates":
        """The same of some of the tokens."""
        return Predicates(self.words, self.families_C, self.cells_NA[part], self.unions_AC)


class ValueSet(NamedTuple):
    """Some values of an attribute, in words that follow the attribute's name: `= 4`, `in 7-9`."""

    words: str
    values: Sequence[int] | np.ndarray


class Places(NamedTuple):
    """Where in a text tokens stand, finely; and which fine places are one place of a coarser division, with its words.

    A division is a number for each fine place and the words of each number, "" for everywhere.
    """

    fine_N: np.ndarray
    divisions: Sequence[tuple[np.ndarray, Sequence[str]]]

    @staticmethod
    def everywhere(num_tokens: int) -> "Places":
        """One place."""
        return Places(np.zeros(num_tokens, dtype=np.int64), [(np.zeros(1, dtype=np.int64), [""])])


class Builder:
    """Collects attributes of N tokens; predicates that hold on too few or too many tokens are not named at all."""

    def __init__(self, num_tokens: int, keep: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """`keep` says, from cells [N, A] and unions [A, C], which predicates are kept, bool [C]."""
        self._num_tokens, self._keep = num_tokens, keep
        self._cells: list[sp.csr_array] = []
        self._unions: list[sp.csc_array] = []
        self._words: list[str] = []
        self._families: list[int] = []

    def add(
        self,
        name: str,
        values_N: np.ndarray,
        sets: Sequence[ValueSet],
        places: Places,
        family: str = "other",
        most_of_place: float = MOST_OF_PLACE,
    ) -> None:
        """The attribute's sets of values, at each place of each division.

        A set with most of the values that a place has is not said of that place: the place alone would be the label.
        """
        tokens = np.flatnonzero(values_N != NOWHERE)
        if not len(tokens):
            return
        num_places = int(places.fine_N.max()) + 1
        keys, cells = np.unique(values_N[tokens] * num_places + places.fine_N[tokens], return_inverse=True)
        values_A, fine_A = keys // num_places, keys % num_places
        cells_NA = _indicator(tokens, cells, (self._num_tokens, len(keys)))
        set_rows, set_columns = _members(values_A, sets)
        for division, phrases in places.divisions:
            columns = set_columns * len(phrases) + division[fine_A[set_rows]]
            used, columns = np.unique(columns, return_inverse=True)
            unions_AC = sp.csc_array(_indicator(set_rows, columns, (len(keys), len(used))))
            keep = self._keep(cells_NA, unions_AC)
            if len(phrases) > 1:
                counts_A = np.bincount(cells, minlength=len(keys)).astype(np.float64)
                at_place = np.bincount(division[fine_A], counts_A, len(phrases))
                keep &= unions_AC.T @ counts_A <= most_of_place * at_place[used % len(phrases)]
            kept = np.flatnonzero(keep)
            self._unions.append(_below(unions_AC[:, kept], sum(c.shape[1] for c in self._cells)))
            at = used[kept]
            self._words += [
                f"{name} {sets[s].words}".strip() + str(phrases[p])
                for s, p in zip(at // len(phrases), at % len(phrases), strict=True)
            ]
            self._families += [FAMILIES.index(family)] * len(kept)
        self._cells.append(cells_NA)

    def add_truths(self, truths: dict[str, np.ndarray], family: str = "other") -> None:
        """Predicates given by the tokens at which they hold, each its own cell."""
        for words, tokens in truths.items():
            values_N = np.full(self._num_tokens, NOWHERE)
            values_N[tokens] = 0
            self.add(words, values_N, [ValueSet("", [0])], Places.everywhere(self._num_tokens), family)

    def build(self) -> Predicates:
        """All of them; of a family's predicates that hold on the same tokens the first is kept."""
        A = sum(c.shape[1] for c in self._cells)
        if not self._words:
            empty = sp.csr_array((self._num_tokens, 0), dtype=np.float32)
            return Predicates([], np.empty(0, dtype=int), empty, sp.csc_array((0, 0), dtype=np.float32))
        cells_NA = sp.csr_array(sp.hstack(self._cells))
        taller = [sp.csc_array((u.data, u.indices, u.indptr), shape=(A, u.shape[1])) for u in self._unions]
        unions_AC = sp.csc_array(sp.hstack(taller))
        found = Predicates(self._words, np.array(self._families), cells_NA, unions_AC)
        return found.select(_first_of_equals(found))


def _first_of_equals(predicates: Predicates) -> np.ndarray:
    """Predicates that hold on other tokens than all before them of their family: tokens have random weights, whose sums tell
    sets apart."""
    weights_N2 = np.random.default_rng(0).integers(1, 2**32, (predicates.cells_NA.shape[0], 2)).astype(np.float64)
    sums_C2 = predicates.unions_AC.T @ (predicates.cells_NA.T @ weights_N2)  # whole numbers, exact to 2 million tokens
    told_C3 = np.column_stack([sums_C2, predicates.families_C])
    return np.sort(np.unique(told_C3, axis=0, return_index=True)[1])


def _members(values_A: np.ndarray, sets: Sequence[ValueSet]) -> tuple[np.ndarray, np.ndarray]:
    """Which cell's value is in which set, as pairs."""
    order = np.argsort(values_A, kind="stable")
    lengths = [len(s.values) for s in sets]
    members = np.concatenate([np.asarray(s.values, dtype=np.int64) for s in sets])
    owner = np.repeat(np.arange(len(sets)), lengths)
    first, last = (np.searchsorted(values_A[order], members, side) for side in ("left", "right"))
    sizes = last - first
    rows = order[np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())]
    return rows, np.repeat(owner, sizes)


def _indicator(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_array:
    return sp.csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)


def _below(matrix: sp.csc_array, rows: int) -> sp.csc_array:
    """The matrix with rows of zeros above it."""
    return sp.csc_array(
        (matrix.data, matrix.indices + rows, matrix.indptr), shape=(matrix.shape[0] + rows, matrix.shape[1])
    )
