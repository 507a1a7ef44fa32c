"""Pieces of a text in which a feature is active or not, spread over the quantiles of its activation, and tokens marked in them.

A context is `length` tokens of one document (less at its end). Top ones alone make labels too narrow, so contexts are taken at
even ranks from the strongest to the weakest (Paulo et al. 2024, arXiv 2410.13928).
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from throughline.codes import Codes

OPEN, CLOSE = "<<", ">>"


@dataclass(frozen=True)
class Context:
    """Tokens in reading order, and a feature's activation at each."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def active(self) -> tuple[int, ...]:
        """Tokens at which the feature is active, by their place."""
        return tuple(i for i, value in enumerate(self.values) if value > 0)

    def show(self, marked: Collection[int] = ()) -> str:
        """The text on one line, marked tokens between << and >>; what looks like a mark in the text itself is pulled apart."""
        return "".join(
            f"{OPEN}{_plain(token)}{CLOSE}" if i in marked else _plain(token) for i, token in enumerate(self.tokens)
        )


def choose_contexts(
    codes: Codes, layer: int, feature: int, length: int, num: int, rng: np.random.Generator
) -> tuple[list[Context], list[Context]]:
    """At most `num` contexts in which a feature is active, strongest first and at even ranks; at most `num` others at random."""
    matrix = codes.columns[layer]
    at = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
    tokens, values = matrix.indices[at], matrix.data[at]
    starts = _starts(codes, length)
    piece_of = np.searchsorted(starts, tokens, side="right") - 1
    peaks = np.zeros(len(starts))
    np.maximum.at(peaks, piece_of, values)
    active = np.flatnonzero(peaks > 0)
    strongest_first = active[np.argsort(-peaks[active], kind="stable")]
    ranks = np.unique(np.linspace(0, max(len(active) - 1, 0), min(num, len(active))).round().astype(int))
    quiet = np.flatnonzero(peaks == 0)
    others = np.sort(rng.choice(quiet, min(num, len(quiet)), replace=False))
    values_N = np.zeros(codes.num_tokens)
    values_N[tokens] = values
    bounds = np.r_[starts, codes.num_tokens]

    def cut(piece: int) -> Context:
        span = slice(bounds[piece], bounds[piece + 1])
        return Context(tuple(codes.token_texts[span]), tuple(values_N[span].tolist()))

    return [cut(p) for p in strongest_first[ranks]], [cut(p) for p in others]


def corrupt(context: Context, rng: np.random.Generator) -> tuple[int, ...] | None:
    """As many tokens as are active, drawn from those that are not (all of these, if they are fewer); None if there are none."""
    quiet = [i for i, value in enumerate(context.values) if value <= 0]
    if not quiet:
        return None
    drawn = rng.choice(len(quiet), min(len(context.active), len(quiet)), replace=False)
    return tuple(sorted(quiet[i] for i in drawn))


def _starts(codes: Codes, length: int) -> np.ndarray:
    """The first token of each context."""
    tokens = np.arange(codes.num_tokens)
    begins = np.r_[True, codes.documents_N[1:] != codes.documents_N[:-1]][: codes.num_tokens]
    document_starts = np.maximum.accumulate(np.where(begins, tokens, 0))
    return np.flatnonzero((tokens - document_starts) % length == 0)


def _plain(token: str) -> str:
    return token.replace("<<", "< <").replace(">>", "> >").replace("\r", "").replace("\n", "↵")
