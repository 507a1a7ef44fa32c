"""What a transfer metric is given, and what they share.

A metric relates one model's dictionaries (source, rows) to another's or its own (target, columns), on the same documents.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp

from throughline.codes import Codes, reading_order
from throughline.dictionaries import Dictionary
from throughline.models import LanguageModel
from throughline.records import TransferResult
from throughline.tokens import TokenRows, align_ends


class Side(Protocol):
    """One model's part of a relation, on the run's shared text. What is costly is made when it is first asked for."""

    @property
    def model(self) -> str:
        """Its name in the study."""
        ...

    @property
    def dictionaries(self) -> dict[int, Dictionary]:
        """By layer, in order."""
        ...

    @property
    def twins(self) -> list[dict[int, Dictionary]]:
        """Dictionaries of the same layers that were trained from other seeds: one set by layer for each seed; [] without."""
        ...

    @property
    def codes(self) -> Codes:
        """The shared held-out text."""
        ...

    @property
    def twin_codes(self) -> list[Codes]:
        """The same text as each of `twins` reads it."""
        ...

    @property
    def sample(self) -> Codes:
        """The first part of that text, with the residual stream."""
        ...

    @property
    def fit(self) -> Codes:
        """Text of the training split with the residual stream, on which maps are fitted."""
        ...

    @property
    def language_model(self) -> LanguageModel:
        """The model itself."""
        ...


def mean_over_twins(name: str, values: Sequence[float]) -> dict[str, float]:
    """What a layer's twins give, one value each, as numbers to save: their mean as `name`, and the range from `name_min` to
    `name_max`. (A standard deviation of two or three values would say less than the two ends.)"""
    return {name: sum(values) / len(values), f"{name}_min": min(values), f"{name}_max": max(values)}


class Metric(Protocol):
    """What a metric's file provides.

    A class, made without arguments, or with those settings of the study's `transfer` section that its constructor names.
    """

    name: str
    across_models: bool  # False: only pairs of layers of one model
    both_ways: bool  # True: one call gives the results of both directions

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
        """The relation of every source layer to every target layer; with `both_ways`, and of two models, the reverse as well."""
        ...


class Aligned(NamedTuple):
    """Token i of the source and token i of the target end at the same character, and perhaps begin at the same."""

    source_N: np.ndarray
    target_N: np.ndarray
    coverage: float  # share of the source's tokens
    strict_N: np.ndarray  # True: the same token

    def strict(self) -> "Aligned":
        """The same tokens alone."""
        same = self.strict_N
        return Aligned(self.source_N[same], self.target_N[same], self.coverage * same.mean(), same[same])

    def reversed(self, num_source_tokens: int, num_target_tokens: int) -> "Aligned":
        """From the target to the source."""
        coverage = self.coverage * num_source_tokens / max(1, num_target_tokens)
        return Aligned(self.target_N, self.source_N, coverage, self.strict_N)


def align(source: Codes, target: Codes) -> Aligned:
    """Pairs of tokens (indices in reading order) of two models on the same documents."""
    if source is target:
        everything = np.arange(source.num_tokens)
        return Aligned(everything, everything, 1.0, np.ones(len(everything), dtype=bool))
    alignment = align_ends(source.rows, target.rows)
    places = (_places(source.rows)[alignment.index_a], _places(target.rows)[alignment.index_b])
    return Aligned(*places, alignment.coverage, alignment.strict)


def _places(rows: TokenRows) -> np.ndarray:
    """For each cell of the flattened rows [R * T] its place in reading order; -1 where no token is kept."""
    places = np.full(rows.keep.size, -1)
    places[np.flatnonzero(rows.keep)[reading_order(rows)]] = np.arange(rows.num_tokens)
    return places


def whole_documents(documents_N: np.ndarray, most: int) -> int:
    """The largest number of tokens up to `most` that ends with a document (or `most`, if the first is longer)."""
    if most >= len(documents_N):
        return len(documents_N)
    cut = int(np.searchsorted(documents_N, documents_N[most]))
    return cut or most


def shift_documents(codes: Codes, tokens_N: np.ndarray, by: int) -> np.ndarray:
    """For each token the one at the same place of the document `by` further on, as an index into `tokens_N`; -1 if none.

    The first follows the last, and none follows itself. Keeps how often features fire and where in a text, and destroys
    what belongs to this text.
    """
    documents = codes.documents_N[tokens_N]
    starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])
    lengths = np.diff(np.r_[starts, len(documents)])
    number = np.repeat(np.arange(len(starts)), lengths)
    place = np.arange(len(documents)) - starts[number]
    other = (number + by) % len(starts)
    return np.where((place < lengths[other]) & (other != number), starts[other] + place, -1)


def shuffle_within(roles_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation that moves tokens only among those of their role."""
    order = np.arange(len(roles_N))
    for role in np.unique(roles_N):
        at = np.flatnonzero(roles_N == role)
        order[at] = rng.permutation(at)
    return order


class Moments(NamedTuple):
    """What Pearson's r needs of each feature: count of active tokens, mean, and standard deviation."""

    num_active: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def moments_of(matrix: sp.csr_array) -> Moments:
    """Moments of the columns of a sparse matrix, zeros counted, in float64."""
    exact = matrix.astype(np.float64)
    mean = np.asarray(exact.mean(axis=0)).ravel()
    variance = np.maximum(np.asarray(exact.power(2).mean(axis=0)).ravel() - mean**2, 0)
    return Moments(np.bincount(matrix.indices, minlength=matrix.shape[1]), mean, np.sqrt(variance))


class Columns(NamedTuple):
    """Features of one layer over N tokens, ready to be correlated with others: float64, with their moments."""

    matrix_NF: sp.csr_array
    moments: Moments


def prepare(matrix_NF: sp.csr_array) -> Columns:
    """`matrix_NF` in float64, in which a feature that is always on keeps its small deviation beside its large mean."""
    matrix_NF = sp.csr_array(matrix_NF.astype(np.float64))
    return Columns(matrix_NF, moments_of(matrix_NF))


def correlate(source: Columns, target: Columns) -> np.ndarray:
    """Pearson's r of every source feature with every target feature over all tokens, [F source, F target].

    r = (sum uv / N - mean_u mean_v) / (sd_u sd_v); only tokens on which both fire enter the sum, so it costs k^2 per token.
    """
    products = (source.matrix_NF.T @ target.matrix_NF).toarray() / source.matrix_NF.shape[0]
    products -= np.outer(source.moments.mean, target.moments.mean)
    scale = np.outer(source.moments.deviation, target.moments.deviation)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
