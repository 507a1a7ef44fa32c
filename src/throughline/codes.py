"""A text as a model's dictionaries read it: which features are active at which token, for every layer, sparse.

Feature statistics, labels and transfer are all computed from codes, so each text passes through the model once. A token that is
an attention sink at any of the layers is in none of them: what relates layers needs the same tokens everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int

from throughline.dictionaries import Dictionary
from throughline.harvesting import harvest, tokens_of_a_pass
from throughline.models import LanguageModel
from throughline.models.language_model import quiet_transformers
from throughline.pools import spread
from throughline.records import Document, role_of
from throughline.tokens import TokenRows


@dataclass(frozen=True)
class Codes:
    """The kept tokens of a text but for sinks, N of them in reading order, and their features by layer as a sparse [N, F] matrix.

    `documents_N` numbers the documents, `starts_N` and `ends_N` are characters, `kinds_N` index TOKEN_KINDS, `roles_N` are
    kinds told apart by the part of the text (`records.role_of`).
    """

    rows: TokenRows
    documents: Sequence[Document]
    ids_N: Int[np.ndarray, "N"]
    documents_N: Int[np.ndarray, "N"]
    positions_N: Int[np.ndarray, "N"]
    starts_N: Int[np.ndarray, "N"]
    ends_N: Int[np.ndarray, "N"]
    kinds_N: Int[np.ndarray, "N"]
    roles_N: Int[np.ndarray, "N"]
    layers: dict[int, sp.csr_array]
    residual_LND: Float[np.ndarray, "L N D"] | None = None  # the activations themselves, where asked for

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.ids_N)

    @cached_property
    def columns(self) -> dict[int, sp.csc_array]:
        """The same matrices by column, for reading one feature's tokens."""
        return {layer: matrix.tocsc() for layer, matrix in self.layers.items()}

    @cached_property
    def token_texts(self) -> list[str]:
        """The characters of each token."""
        spans = zip(self.documents_N, self.starts_N, self.ends_N, strict=True)
        return [self.documents[d].text[start:end] for d, start, end in spans]


def encode_text(
    model: LanguageModel,
    dictionaries: dict[int, Dictionary],
    rows: TokenRows,
    documents: Sequence[Document],
    keep_residuals: bool = False,
) -> Codes:
    """The codes of `rows`, which hold `documents`."""
    [codes] = encode_text_with([dictionaries], model, rows, documents, keep_residuals)
    return codes


def encode_text_with(
    sets: Sequence[dict[int, Dictionary]],
    model: LanguageModel,
    rows: TokenRows,
    documents: Sequence[Document],
    keep_residuals: bool = False,
) -> list[Codes]:
    """The codes of `rows` in each of several sets of dictionaries, from one forward pass; residuals are kept with the first.

    The first set has every layer that is in any.
    """
    layers = list(sets[0])
    matrices = {
        (which, layer): _Growing(d.d_sae)
        for which, dictionaries in enumerate(sets)
        for layer, d in dictionaries.items()
    }

    def read(batch: TokenRows) -> tuple[dict[tuple[int, int], sp.csr_array], np.ndarray, np.ndarray | None]:
        [(_, x_LND)] = harvest(model, [batch], layers)
        each = zip(sets[0].values(), x_LND, strict=True)
        sink_N = torch.stack([dictionary.is_sink(x_ND) for dictionary, x_ND in each]).any(0)
        if sink_N.any():
            x_LND = x_LND[:, ~sink_N]
        found = {
            (which, layer): encode_csr(sets[which][layer], x_LND[layers.index(layer)]) for which, layer in matrices
        }
        return found, sink_N.cpu().numpy(), x_LND.cpu().numpy() if keep_residuals else None

    num_rows, residuals, sinks = max(1, tokens_of_a_pass(model) // max(1, rows.width)), [], []
    with quiet_transformers():
        for found, sink_N, x_LND in spread(read, rows.batches(num_rows), model.device):
            for place, part in found.items():
                matrices[place].add(part)
            residuals.append(x_LND)
            sinks.append(sink_N)
    rows = rows.without(np.concatenate(sinks)) if sinks else rows
    order = reading_order(rows)
    ordered = dict(zip(matrices, spread(lambda m: m.take(order), matrices.values(), torch.device("cpu")), strict=True))
    first, *others = (
        {layer: ordered[which, layer] for layer in dictionaries} for which, dictionaries in enumerate(sets)
    )
    residual_LND = np.concatenate(residuals, axis=1)[:, order] if keep_residuals else None
    codes = _codes_of(rows, documents, order, first, residual_LND)
    return [codes, *(replace(codes, layers=layers, residual_LND=None) for layers in others)]


class _Growing:
    """A sparse matrix to which rows are added: two long arrays, for many short ones would keep the heap scattered."""

    def __init__(self, num_features: int) -> None:
        self._num_features = num_features
        self._features, self._values = np.empty(0, np.int32), np.empty(0, np.float32)
        self._size, self._counts = 0, [np.zeros(1, np.int64)]

    def add(self, part: sp.csr_array) -> None:
        """Further rows."""
        end = self._size + part.nnz
        if end > len(self._values):
            room = max(end, len(self._values) * 3 // 2)
            self._features, self._values = (_longer(a, room) for a in (self._features, self._values))
        self._features[self._size : end], self._values[self._size : end] = part.indices, part.data
        self._counts.append(np.diff(part.indptr))
        self._size = end

    def take(self, rows: np.ndarray) -> sp.csr_array:
        """These rows; the matrix is empty afterwards."""
        starts = np.cumsum(np.concatenate(self._counts))
        starts = starts.astype(np.int32 if starts[-1] < 2**31 else np.int64)
        given = (self._values[: self._size], self._features[: self._size], starts)
        found = sp.csr_array(given, shape=(len(starts) - 1, self._num_features))[rows]
        self.__init__(self._num_features)
        return found


def _longer(array: np.ndarray, room: int) -> np.ndarray:
    out = np.empty(room, array.dtype)
    out[: len(array)] = array
    return out


def _codes_of(
    rows: TokenRows,
    documents: Sequence[Document],
    order: np.ndarray,
    layers: dict[int, sp.csr_array],
    residual_LND: np.ndarray | None,
) -> Codes:
    """Codes with what is known of each token; `order` brings the kept tokens of the rows into that of reading."""
    keep = rows.keep
    documents_N, ends_N, kinds_N = (a[keep][order] for a in (rows.documents, rows.ends, rows.kinds))
    return Codes(
        rows,
        documents,
        ids_N=rows.ids[keep][order],
        documents_N=documents_N,
        positions_N=rows.positions[keep][order],
        starts_N=rows.starts[keep][order],
        ends_N=ends_N,
        kinds_N=kinds_N,
        roles_N=_roles(documents, documents_N, ends_N, kinds_N),
        layers=layers,
        residual_LND=residual_LND,
    )


def _roles(
    documents: Sequence[Document], documents_N: np.ndarray, ends_N: np.ndarray, kinds_N: np.ndarray
) -> np.ndarray:
    """Roles of tokens in reading order. The answer's part begins with the token that ends where the answer starts."""
    nowhere = np.iinfo(np.int64).max
    starts = np.array([nowhere if d.answer_start is None else d.answer_start for d in documents])
    return role_of(kinds_N.astype(np.int64), ends_N >= starts[documents_N])


def reading_order(rows: TokenRows) -> np.ndarray:
    """The order that brings the kept tokens of packed rows, taken row by row, into that of the documents.

    Special tokens cover no characters, so pieces are ordered by where they end and tokens by their position; a piece that is
    the end of a text alone comes last.
    """
    real = rows.pieces >= 0
    pieces, documents, positions = rows.pieces[rows.keep], rows.documents[rows.keep], rows.positions[rows.keep]
    ends = np.zeros(rows.pieces.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(ends, rows.pieces[real], rows.ends[real])
    ends[ends == 0] = np.iinfo(np.int64).max
    return np.lexsort((positions, pieces, ends[pieces], documents))


@torch.no_grad()
def encode_csr(dictionary: Dictionary, x_ND: torch.Tensor) -> sp.csr_array:
    """Features of activations as a sparse [N, F] matrix."""
    if x_ND.device.type == "cpu":
        from throughline.dictionaries.kernels import compress

        parts = [compress(dictionary.encode(chunk).float().numpy()) for chunk in dictionary.chunks(x_ND)]
        count_N, features, values = (np.concatenate(p) for p in zip(*parts, strict=True))
    else:
        tokens, features, values = (part.cpu().numpy() for part in dictionary.encode_sparse(x_ND))
        count_N, features = np.bincount(tokens, minlength=len(x_ND)), features.astype(np.int32)
    starts = np.r_[0, np.cumsum(count_N)].astype(np.int32)
    return sp.csr_array((values.astype(np.float32), features, starts), shape=(len(x_ND), dictionary.d_sae))
