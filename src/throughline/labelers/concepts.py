"""Labels from a vocabulary of predicates: what is true of the text at a token.

The vocabulary is read off the selection text: the documents' facts (a digit at its place, the operator, carry and borrow, the
digits the answer will have), the token itself, the ones before and after it, the kind of token, and the start of the text.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import polars as pl
import scipy.sparse as sp

from throughline.codes import Codes
from throughline.labelers.scoring import (
    MIN_POSITIVE,
    Baselines,
    LayerText,
    choose_predicates,
    label_table,
    maxima_of,
    measure_baselines,
    measure_pairs,
)
from throughline.records import TOKEN_KINDS

MOST_POSITIVE = 0.9  # share of tokens; what is nearly always true says nothing
MOST_TOKENS = 300  # the most frequent ones, as the token itself, the one before and the one after


class Concepts:
    """The best predicate of the vocabulary for each feature."""

    name = "concepts"

    def __init__(self) -> None:
        self._texts: tuple[Codes, Codes] | None = None
        self._concepts: tuple[list[str], sp.csr_array, sp.csr_array] | None = None

    def label(self, selection: LayerText, heldout: LayerText) -> pl.DataFrame:
        """One label per feature that fires on the selection text."""
        words, select_NC, held_NC = self._find(selection.codes, heldout.codes)
        maxima = maxima_of(selection.features)
        live = np.flatnonzero(maxima > 0)
        choice = choose_predicates(selection.features, select_NC, maxima)
        chosen = choice.predicate.astype(int)
        true_positive, num_active = measure_pairs(heldout.features, held_NC, chosen, choice.threshold, maxima)
        baselines = measure_baselines(selection, heldout, select_NC, held_NC)
        num_positive = np.bincount(held_NC.indices, minlength=len(words))
        at = chosen[live]
        return label_table(
            heldout,
            self.name,
            live,
            [words[c] for c in at],
            choice.threshold[live] * maxima[live],
            true_positive[live],
            num_active[live],
            num_positive[at],
            Baselines(*(b[at] for b in baselines)),
        )

    def _find(self, selection: Codes, heldout: Codes) -> tuple[list[str], sp.csr_array, sp.csr_array]:
        """The concepts of two texts, found once for all layers."""
        known = self._texts is not None and self._texts[0] is selection and self._texts[1] is heldout
        if self._concepts is None or not known:
            self._texts, self._concepts = (selection, heldout), find_concepts(selection, heldout)
        return self._concepts


def find_concepts(selection: Codes, heldout: Codes) -> tuple[list[str], sp.csr_array, sp.csr_array]:
    """The vocabulary, and its truth at each token of both texts, [N, C]."""
    select, held = _truths(selection), _truths(heldout)
    words = [w for w, tokens in select.items() if MIN_POSITIVE <= len(tokens) < MOST_POSITIVE * selection.num_tokens]
    return words, _matrix(select, words, selection.num_tokens), _matrix(held, words, heldout.num_tokens)


def _matrix(truths: dict[str, np.ndarray], words: list[str], num_tokens: int) -> sp.csr_array:
    columns = [truths.get(word, np.empty(0, dtype=np.int64)) for word in words]
    tokens = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    concepts = np.repeat(np.arange(len(words)), [len(c) for c in columns])
    ones = np.ones(len(tokens), dtype=np.float32)
    return sp.csr_array((ones, (tokens, concepts)), shape=(num_tokens, len(words)))


def _truths(codes: Codes) -> dict[str, np.ndarray]:
    """Tokens at which each predicate holds; facts come first, so that ties go to them."""
    return _facts(codes) | _token_predicates(codes)


def _facts(codes: Codes) -> dict[str, np.ndarray]:
    """A fact holds at every token that overlaps its characters."""
    found: dict[str, list[np.ndarray]] = {}
    bounds = np.searchsorted(codes.documents_N, np.arange(len(codes.documents) + 1))
    for number, document in enumerate(codes.documents):
        first, last = bounds[number], bounds[number + 1]
        starts, ends = codes.starts_N[first:last], codes.ends_N[first:last]
        values = Counter(fact.name for fact in document.facts)
        for fact in document.facts:
            at = first + np.flatnonzero((starts < fact.end) & (ends > fact.start))
            found.setdefault(f"{fact.name} = {_spell(fact.value)}", []).append(at)
            if values[fact.name] == 1:
                found.setdefault(fact.name, []).append(at)
        if document.kind:
            found.setdefault(f"text of kind {document.kind!r}", []).append(np.arange(first, last))
    return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}


def _spell(value: int | str | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _token_predicates(codes: Codes) -> dict[str, np.ndarray]:
    texts = np.array(codes.token_texts, dtype=object)
    same_document = np.r_[False, codes.documents_N[1:] == codes.documents_N[:-1]]
    nothing = np.full(len(texts), None)
    before = np.where(same_document, np.r_[[""], texts[:-1]], nothing)
    found = {"start of text": np.flatnonzero(~same_document)}
    for kind, name in enumerate(TOKEN_KINDS):
        found[f"{name} token"] = np.flatnonzero(codes.kinds_N == kind)
    following = np.where(np.r_[same_document[1:], False], np.r_[texts[1:], [""]], nothing)
    for values, wording in (
        (texts, "token {!r}".format),
        (before, "after {!r}".format),
        (following, "before {!r}".format),
    ):
        found |= _most_frequent(values, wording)
    return found


def _most_frequent(values: np.ndarray, wording: Callable[[str], str]) -> dict[str, np.ndarray]:
    counts = Counter(v for v in values if v is not None)
    common = {value: i for i, (value, _) in enumerate(counts.most_common(MOST_TOKENS))}
    index = np.array([common.get(v, -1) for v in values])
    order = np.argsort(index, kind="stable")
    edges = np.searchsorted(index[order], np.arange(len(common) + 1))
    return {wording(value): np.sort(order[edges[i] : edges[i + 1]]) for value, i in common.items()}
