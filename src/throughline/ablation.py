"""What predictions cost when a layer's stream is the same at every token: zero ablation and mean ablation, exactly, from few runs.

What such a model predicts after a token depends on the token's position and on the tokens before it that kept their stream
(special tokens, sinks), which follow from the text up to the last of them. So of all pieces of text that begin with the same
such text, the longest is run, and speaks for all. Where only BOS keeps its stream that is one piece, whatever the vocabulary.

A model whose later blocks see the tokens themselves would be another matter, so at the first layer two different pieces of one
beginning are run: if their predictions differ, every piece is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    kept: Mapping[int, Bool[np.ndarray, "R T"]],
    values: Mapping[int, Sequence[Float[Tensor, "D"]]],
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> dict[int, list[float]]:
    """For each layer the sums of CE over the predicted tokens, nats, with the stream after it set to each of its `values`.

    `kept` says which tokens keep their stream at a layer. `tick` hears how many tokens of how many are
    done, all layers together.
    """
    sums = {layer: [0.0] * len(values[layer]) for layer in kept}
    pieces = {layer: list(_pieces(rows, kept_RT)) for layer, kept_RT in kept.items()}
    if not any(pieces.values()):
        return sums
    first = min(pieces)
    beginnings = {layer: [piece.beginning() for piece in of_layer] for layer, of_layer in pieces.items()}
    pair = _find_pair(pieces[first], beginnings[first])
    is_constant = pair is None or _agree(model, pair, first, values[first][0])
    together: dict[tuple[int, ...], list[int]] = {}  # layers that run the same pieces share a pass up to them
    for layer, begins in beginnings.items():
        runs = _find_runs(pieces[layer], begins) if is_constant else range(len(begins))
        together.setdefault(tuple(runs), []).append(layer)
    done, total = 0, 0
    for runs, layers in together.items():
        total += len(layers) * sum(len(pieces[layers[0]][run].ids_T) for run in set(runs))
    for runs, layers in together.items():
        texts, replaced = {layer: pieces[layer] for layer in layers}, {layer: values[layer] for layer in layers}
        for num_tokens in _sum_ce_(sums, model, texts, replaced, runs):
            done += len(layers) * num_tokens
            tick(done, total)
    return sums


def _find_pair(pieces: list[_Piece], beginnings: list[tuple[bytes, bytes]]) -> list[_Piece] | None:
    """Two different pieces of one beginning, of the commonest that has two; None if there are none."""
    alike: dict[tuple[bytes, bytes], list[_Piece]] = {}
    for piece, begins in zip(pieces, beginnings, strict=True):
        alike.setdefault(begins, []).append(piece)
    for group in sorted(alike.values(), key=len, reverse=True):
        longest, *others = sorted(group, key=lambda piece: len(piece.ids_T), reverse=True)
        for other in others:
            shared = len(other.ids_T) - 1  # tokens that something is predicted from
            if not np.array_equal(longest.ids_T[:shared], other.ids_T[:shared]):
                return [other, longest]
    return None


def _find_runs(pieces: list[_Piece], beginnings: list[tuple[bytes, bytes]]) -> list[int]:
    """For each piece the longest with the same beginning."""
    by_length = sorted(range(len(pieces)), key=lambda i: len(pieces[i].ids_T))
    longest = {beginnings[i]: i for i in by_length}  # the last of its kind stays
    return [longest[begins] for begins in beginnings]


def _pieces(rows: TokenRows, kept_RT: np.ndarray) -> Iterator[_Piece]:
    """The texts of which a token is predicted."""
    for numbers_T, ids_T, kept_T in zip(rows.pieces, rows.ids, kept_RT, strict=True):
        cuts = np.flatnonzero(np.diff(numbers_T)) + 1
        for part in np.split(np.arange(len(ids_T)), cuts):
            if len(part) > 1 and numbers_T[part[0]] >= 0:
                yield _Piece(ids_T[part], kept_T[part])


def _agree(model: LanguageModel, pair: list[_Piece], layer: int, value_D: Tensor) -> bool:
    shortest = min(len(piece.ids_T) for piece in pair) - 1
    [(_, _, x_BTD)] = _ablated(model, {layer: pair}, {layer: [value_D]})
    at = torch.linspace(0, shortest - 1, min(shortest, 16)).long()  # enough of them to tell
    a, b = (log_softmax(model.unembed(x_TD[at]), dim=-1) for x_TD in x_BTD)
    return bool((a - b).abs().amax() < SAME)


def _ablated(
    model: LanguageModel, batch: Mapping[int, list[_Piece]], values: Mapping[int, Sequence[Tensor]]
) -> Iterator[tuple[int, int, Tensor]]:
    """For each layer and each of its values: layer, number of the value, and the stream after the last block, one piece a row.

    The pieces of all layers are the same but for what is kept.
    """
    inputs, residuals = None, {}
    for layer, pieces in batch.items():
        rows = _lay_out(pieces)
        if inputs is None:
            inputs, residuals, _ = run_clean(model, rows, list(batch))
        replaced = torch.from_numpy(rows.keep).to(model.device)[..., None]
        for v, value_D in enumerate(values[layer]):
            stream_BTD = torch.where(replaced, value_D.to(residuals[layer]), residuals[layer])
            yield layer, v, run_on(model, inputs, layer, stream_BTD)


def _lay_out(pieces: list[_Piece]) -> TokenRows:
    """A row for each; `special` are the tokens that keep their stream."""
    rows = TokenRows.padding(len(pieces), max(len(piece.ids_T) for piece in pieces))
    for r, piece in enumerate(pieces):
        here = np.s_[r, : len(piece.ids_T)]
        rows.ids[here], rows.special[here], rows.pieces[here] = piece.ids_T, piece.kept_T, r
        rows.positions[here] = np.arange(len(piece.ids_T))
    return rows


def _sum_ce_(
    sums: dict[int, list[float]],
    model: LanguageModel,
    pieces: Mapping[int, list[_Piece]],
    values: Mapping[int, Sequence[Tensor]],
    runs: Sequence[int],
) -> Iterator[int]:
    """Add to the sums of each of these layers; yields how many tokens were run. The run of piece `runs[i]` speaks for piece i."""
    texts = next(iter(pieces.values()))
    targets: dict[int, list[np.ndarray]] = {}
    for piece, run in zip(texts, runs, strict=True):
        targets.setdefault(run, []).append(piece.ids_T[1:])
    order = sorted(targets, key=lambda i: len(texts[i].ids_T))
    num_rows = batch_rows(model, len(texts[order[-1]].ids_T), 2 * len(pieces) + 2)
    for start in range(0, len(order), num_rows):
        batch = order[start : start + num_rows]
        places = [(r, t) for r, run in enumerate(batch) for t in range(len(texts[run].ids_T) - 1)]
        rows_P, times_P = (torch.tensor(index, device=model.device) for index in zip(*places, strict=True))
        wanted = [_targets_at(targets[batch[r]], t) for r, t in places]
        chosen = {layer: [of_layer[run] for run in batch] for layer, of_layer in pieces.items()}
        for layer, v, x_BTD in _ablated(model, chosen, values):
            x_PD = x_BTD[rows_P, times_P]
            for part in logit_parts(model, len(x_PD)):
                log_p_PV = log_softmax(model.unembed(x_PD[part]), dim=-1)
                each = (row_V[ids].double().sum() for row_V, ids in zip(log_p_PV, wanted[part], strict=True))
                sums[layer][v] -= float(sum(each))
        yield sum(len(texts[run].ids_T) for run in batch)


def _targets_at(targets: list[np.ndarray], position: int) -> Tensor:
    """What the pieces have after a position."""
    return torch.tensor([int(ids[position]) for ids in targets if len(ids) > position])
