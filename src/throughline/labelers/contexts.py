"""Pieces of a text in which a feature is active or not, spread over the quantiles of its activation, and tokens marked in them.

A context is `length` tokens of one document (less at its end). Top ones alone make labels too narrow, so contexts are taken at
even ranks from the strongest to the weakest (Paulo et al. 2024, arXiv 2410.13928).
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from throughline.codes import Codes

OPEN, CLOSE = "<<", ">>"


@dataclass(frozen=True)
class Context:
    """Tokens in reading order, a feature's activation at each, and the characters before each that are no token's."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    gaps: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[int, ...]:
        """Tokens at which the feature is active, by their place."""
        return tuple(i for i, value in enumerate(self.values) if value > 0)

    def show(self, marked: Collection[int] = ()) -> str:
        """The text on one line, marked tokens between << and >>; what looks like a mark in the text itself is pulled apart."""
        shown = (f"{OPEN}{_plain(t)}{CLOSE}" if i in marked else _plain(t) for i, t in enumerate(self.tokens))
        return "".join(f"{_plain(gap)}{token}" for gap, token in zip_longest(self.gaps, shown, fillvalue=""))


class Contexts:
    """A text cut into contexts of `length` tokens."""

    def __init__(self, codes: Codes, length: int) -> None:
        self._codes = codes
        tokens = np.arange(codes.num_tokens)
        begins = np.r_[True, codes.documents_N[1:] != codes.documents_N[:-1]][: codes.num_tokens]
        document_starts = np.maximum.accumulate(np.where(begins, tokens, 0))
        self._starts = np.flatnonzero((tokens - document_starts) % length == 0)
        self._bounds = np.r_[self._starts, codes.num_tokens]
        numbers: dict[str, int] = {}
        texts = ("\0".join(codes.token_texts[self._span(piece)]) for piece in range(len(self._starts)))
        self._text_of = np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=int)

    def choose(
        self, layer: int, feature: int, num: int, rng: np.random.Generator
    ) -> tuple[list[Context], list[Context]]:
        """At most `num` contexts in which a feature is active, strongest first and at even ranks; at most `num` others at random.

        No text comes twice: the same few words, judged again, would only seem to be more evidence.
        """
        matrix = self._codes.columns[layer]
        at = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
        tokens, values = matrix.indices[at], matrix.data[at]
        peaks = np.zeros(len(self._starts))
        np.maximum.at(peaks, np.searchsorted(self._starts, tokens, side="right") - 1, values)
        order = np.argsort(-peaks, kind="stable")
        distinct = order[np.sort(np.unique(self._text_of[order], return_index=True)[1])]
        active, quiet = distinct[peaks[distinct] > 0], np.sort(distinct[peaks[distinct] == 0])
        ranks = np.unique(np.linspace(0, max(len(active) - 1, 0), min(num, len(active))).round().astype(int))
        others = np.sort(rng.choice(quiet, min(num, len(quiet)), replace=False))
        values_N = np.zeros(self._codes.num_tokens)
        values_N[tokens] = values
        return [self._cut(p, values_N) for p in active[ranks]], [self._cut(p, values_N) for p in others]

    def _span(self, piece: int) -> slice:
        return slice(self._bounds[piece], self._bounds[piece + 1])

    def _cut(self, piece: int, values_N: np.ndarray) -> Context:
        span = self._span(piece)
        text = self._codes.documents[int(self._codes.documents_N[span.start])].text
        between = zip(self._codes.ends_N[span][:-1], self._codes.starts_N[span][1:], strict=True)
        gaps = ("", *(text[end:start] for end, start in between))
        return Context(tuple(self._codes.token_texts[span]), tuple(values_N[span].tolist()), gaps)


def corrupt(context: Context, rng: np.random.Generator) -> tuple[int, ...] | None:
    """As many tokens as are active, drawn from those that are not (all of these, if they are fewer); None if there are none."""
    quiet = [i for i, value in enumerate(context.values) if value <= 0]
    if not quiet:
        return None
    drawn = rng.choice(len(quiet), min(len(context.active), len(quiet)), replace=False)
    return tuple(sorted(quiet[i] for i in drawn))


def _plain(token: str) -> str:
    return token.replace("<<", "< <").replace(">>", "> >").replace("\r", "").replace("\n", "↵")
