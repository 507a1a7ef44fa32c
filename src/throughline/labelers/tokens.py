"""Labels that need no vocabulary: the set of tokens on which a feature fires.

Tokens are ordered by how often the feature fires on them, and the set is the prefix with the best F1 on the selection text.
"""

import numpy as np
import polars as pl
import scipy.sparse as sp

from throughline.labelers.scoring import (
    Baselines,
    LayerText,
    active_above,
    f1,
    label_table,
    maxima_of,
    measure_baselines,
    measure_pairs,
)

MOST_TOKENS = 6


class Tokens:
    """The set of tokens that says best when each feature fires."""

    name = "tokens"

    def label(self, selection: LayerText, heldout: LayerText) -> pl.DataFrame:
        """One label per feature that fires on the selection text."""
        maxima = maxima_of(selection.features)
        live = np.flatnonzero(maxima > 0)
        texts = np.unique(np.array([*selection.codes.token_texts, *heldout.codes.token_texts], dtype=object))
        number = {text: i for i, text in enumerate(texts)}
        select_NV, held_NV = (_one_hot(t.codes.token_texts, number) for t in (selection, heldout))
        sets = _choose_sets(active_above(selection.features, 0.0, maxima)[:, live], select_NV)
        sets_VC = _membership(sets, len(number))
        select_NC, held_NC = (m @ sets_VC for m in (select_NV, held_NV))
        zeros = np.zeros(len(live))
        true_positive, num_active = measure_pairs(
            heldout.features[:, live], held_NC, np.arange(len(live)), zeros, maxima[live]
        )
        words = ["tokens " + ", ".join(repr(str(texts[v])) for v in chosen) for chosen in sets]
        num_positive = np.bincount(held_NC.indices, minlength=len(live))
        baselines = Baselines(*measure_baselines(selection, heldout, select_NC, held_NC))
        return label_table(heldout, self.name, live, words, zeros, true_positive, num_active, num_positive, baselines)


def _one_hot(texts: list[str], number: dict[str, int]) -> sp.csr_array:
    columns = np.array([number[text] for text in texts])
    ones = np.ones(len(texts), dtype=np.float32)
    return sp.csr_array((ones, (np.arange(len(texts)), columns)), shape=(len(texts), len(number)))


def _choose_sets(active_NF: sp.csr_array, tokens_NV: sp.csr_array) -> list[np.ndarray]:
    fired_FV = (active_NF.T @ tokens_NV).tocsr()
    occurrences_V = np.asarray(tokens_NV.sum(axis=0)).ravel()
    num_active_F = np.asarray(active_NF.sum(axis=0)).ravel()
    sets = []
    for feature in range(fired_FV.shape[0]):
        at = slice(fired_FV.indptr[feature], fired_FV.indptr[feature + 1])
        tokens, fired = fired_FV.indices[at], fired_FV.data[at]
        usual = f1(fired, num_active_F[feature], occurrences_V[tokens])  # alone; keeps rare accidents behind
        order = np.lexsort((tokens, -usual, -np.round(fired / occurrences_V[tokens], 1)))[:MOST_TOKENS]
        tokens, fired = tokens[order], fired[order]
        scores = f1(np.cumsum(fired), num_active_F[feature], np.cumsum(occurrences_V[tokens]))
        sets.append(tokens[: int(scores.argmax()) + 1])
    return sets


def _membership(sets: list[np.ndarray], num_tokens: int) -> sp.csr_array:
    rows = np.concatenate(sets) if sets else np.empty(0, dtype=np.int64)
    columns = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    return sp.csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(num_tokens, len(sets)))
