"""What predictions cost when a layer's stream is the same at every token: zero ablation and mean ablation, exactly, from few runs.

What such a model predicts after a token depends on the token's position and on the tokens before it that kept their stream
(special tokens, sinks), which follow from the text up to the last of them. So of all pieces of text that begin with the same
such text, the longest is run, and speaks for all. Where only BOS keeps its stream that is one piece, whatever the vocabulary.

A model whose later blocks see the tokens themselves would be another matter, so one more piece of the commonest beginning is run:
if its predictions differ, every piece is.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax

from throughline.models import LanguageModel
from throughline.splicing import batch_rows, logit_parts, run_clean, run_on
from throughline.tokens import TokenRows

SAME = 1e-2  # nats: predictions of two runs that should be equal; those that saw other tokens differ by whole ones


class _Piece(NamedTuple):
    """One text of a row."""

    ids_T: Int[np.ndarray, "T"]
    kept_T: Bool[np.ndarray, "T"]  # whose stream stays

    def beginning(self) -> tuple[bytes, bytes]:
        """The text up to the last token that keeps its stream and is predicted from, and which of it do."""
        kept = np.flatnonzero(self.kept_T[:-1])
        end = int(kept[-1]) + 1 if kept.size else 0
        return self.ids_T[:end].tobytes(), self.kept_T[:end].tobytes()


@torch.no_grad()
def ablated_ce(
    model: LanguageModel,
    rows: TokenRows,
    kept_RT: Bool[np.ndarray, "R T"],
    layer: int,
    values: Sequence[Float[Tensor, "D"]],
) -> list[float]:
    """Sum of CE over the predicted tokens, nats, with the stream after block `layer` set to each of `values` where not `kept`."""
    pieces = list(_pieces(rows, kept_RT))
    if not pieces:
        return [0.0] * len(values)
    beginnings = [piece.beginning() for piece in pieces]
    by_length = sorted(range(len(pieces)), key=lambda i: len(pieces[i].ids_T))
    longest = {beginnings[i]: i for i in by_length}  # the last of its kind stays
    ((commonest, count),) = Counter(beginnings).most_common(1)
    runs = [longest[begins] for begins in beginnings]
    if count > 1:
        one = longest[commonest]
        other = next(i for i, begins in enumerate(beginnings) if begins == commonest and i != one)
        if not _agree(model, [pieces[one], pieces[other]], layer, values[0]):
            runs = list(range(len(pieces)))
    return _sum_ce(model, pieces, runs, layer, values)


def _pieces(rows: TokenRows, kept_RT: np.ndarray) -> Iterator[_Piece]:
    """The texts of which a token is predicted."""
    for numbers_T, ids_T, kept_T in zip(rows.pieces, rows.ids, kept_RT, strict=True):
        cuts = np.flatnonzero(np.diff(numbers_T)) + 1
        for part in np.split(np.arange(len(ids_T)), cuts):
            if len(part) > 1 and numbers_T[part[0]] >= 0:
                yield _Piece(ids_T[part], kept_T[part])


def _agree(model: LanguageModel, two: list[_Piece], layer: int, value_D: Tensor) -> bool:
    shortest = min(len(piece.ids_T) for piece in two) - 1
    [[x_PD], [y_PD]] = ([x_BTD[0, :shortest] for x_BTD in _ablated(model, [one], layer, [value_D])] for one in two)
    at = torch.linspace(0, shortest - 1, min(shortest, 16)).long()  # enough of them to tell
    a, b = (log_softmax(model.unembed(stream_PD[at]), dim=-1) for stream_PD in (x_PD, y_PD))
    return bool((a - b).abs().amax() < SAME)


def _ablated(model: LanguageModel, batch: list[_Piece], layer: int, values: Sequence[Tensor]) -> Iterator[Tensor]:
    """For each of `values` the stream after the last block, one piece a row."""
    rows = _lay_out(batch)
    clean = run_clean(model, rows, [layer])
    replaced = torch.from_numpy(rows.keep).to(model.device)[..., None]
    for value_D in values:
        stream_BTD = clean.residuals[layer]
        yield run_on(model, clean.inputs, layer, torch.where(replaced, value_D.to(stream_BTD), stream_BTD))


def _lay_out(pieces: list[_Piece]) -> TokenRows:
    """A row for each; `special` are the tokens that keep their stream."""
    rows = TokenRows.padding(len(pieces), max(len(piece.ids_T) for piece in pieces))
    for r, piece in enumerate(pieces):
        here = np.s_[r, : len(piece.ids_T)]
        rows.ids[here], rows.special[here], rows.pieces[here] = piece.ids_T, piece.kept_T, r
        rows.positions[here] = np.arange(len(piece.ids_T))
    return rows


def _sum_ce(
    model: LanguageModel, pieces: list[_Piece], runs: list[int], layer: int, values: Sequence[Tensor]
) -> list[float]:
    """`runs[i]` is the piece whose run speaks for piece i."""
    targets: dict[int, list[np.ndarray]] = {}
    for piece, run in zip(pieces, runs, strict=True):
        targets.setdefault(run, []).append(piece.ids_T[1:])
    order = sorted(targets, key=lambda i: len(pieces[i].ids_T))
    width = len(pieces[order[-1]].ids_T)
    sums = [0.0] * len(values)
    num_rows = batch_rows(model, width, 2 + len(values))
    for start in range(0, len(order), num_rows):
        batch = order[start : start + num_rows]
        at = [(r, t) for r, run in enumerate(batch) for t in range(len(pieces[run].ids_T) - 1)]
        rows_P, places_P = (torch.tensor(index, device=model.device) for index in zip(*at, strict=True))
        wanted = [_targets_at(targets[run], t) for run in batch for t in range(len(pieces[run].ids_T) - 1)]
        for v, x_BTD in enumerate(_ablated(model, [pieces[run] for run in batch], layer, values)):
            x_PD = x_BTD[rows_P, places_P]
            for part in logit_parts(model, len(x_PD)):
                log_p_PV = log_softmax(model.unembed(x_PD[part]), dim=-1)
                sums[v] -= float(
                    sum(row_V[ids].double().sum() for row_V, ids in zip(log_p_PV, wanted[part], strict=True))
                )
    return sums


def _targets_at(targets: list[np.ndarray], position: int) -> Tensor:
    """What the pieces have after a position."""
    return torch.tensor([int(ids[position]) for ids in targets if len(ids) > position])
