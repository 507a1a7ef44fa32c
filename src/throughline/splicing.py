"""A model run with something else in the place of a layer's residual stream, and what that costs its predictions.

What is computed is the stream after the last block. Logits are made of it a few tokens at a time, so that a vocabulary of
262,144 tokens costs no memory to speak of.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax

from throughline.harvesting import tokens_of_a_pass
from throughline.models import LanguageModel
from throughline.models.language_model import Inputs, quiet_transformers
from throughline.pools import spread
from throughline.tokens import TokenRows

LOGIT_BYTES = 2**26  # of the logits that are made at once
STREAM_BYTES = 2**28  # of the streams of a batch that are kept

Replacement = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]


def batch_rows(model: LanguageModel, width: int, num_streams: int = 1) -> int:
    """How many rows are run at once, if so many streams of them are kept."""
    most = STREAM_BYTES // (4 * model.d_model * num_streams)
    return max(1, min(tokens_of_a_pass(model), most) // max(1, width))


class CleanPass(NamedTuple):
    """A batch of rows as the model reads them: its stream after the wanted blocks and after the last one."""

    inputs: Inputs
    residuals: dict[int, Float[Tensor, "B T D"]]
    final_BTD: Float[Tensor, "B T D"]


def run_clean(model: LanguageModel, rows: TokenRows, layers: Collection[int]) -> CleanPass:
    """The model run with nothing replaced."""
    last = model.num_layers - 1
    inputs = model.inputs(rows.ids, rows.positions, rows.pieces)
    residuals = model.run(inputs, capture={*layers, last}, logits=False).residuals
    return CleanPass(inputs, residuals, residuals[last])


def run_spliced(
    model: LanguageModel, rows: TokenRows, clean: CleanPass, layer: int, replace: Replacement
) -> Float[Tensor, "B T D"]:
    """The stream after the last block with `replace` of the kept tokens after block `layer` in their place; special tokens stay
    as they are.

    Only the blocks after it are run again: those before see what they saw in the clean pass.
    """
    return run_on(model, clean.inputs, layer, _edit_kept(clean.residuals[layer], rows, replace))


def run_on(
    model: LanguageModel, inputs: Inputs, layer: int, stream_BTD: Float[Tensor, "B T D"]
) -> Float[Tensor, "B T D"]:
    """The stream after the last block, from a stream after block `layer`."""
    last = model.num_layers - 1
    if layer == last:
        return stream_BTD
    edits = {layer: lambda _: stream_BTD}
    return model.after(layer).run(inputs, edits=edits, capture=[last], logits=False).residuals[last]


def run_replaced(
    model: LanguageModel, rows: TokenRows, replacements: Mapping[int, Replacement]
) -> Float[Tensor, "B T D"]:
    """The stream after the last block with the kept tokens of any layers replaced, each by what it does to the stream that the
    layers before it left; special tokens stay as they are."""
    last = model.num_layers - 1
    edits = {layer: partial(_edit_kept, rows=rows, replace=replace) for layer, replace in replacements.items()}
    inputs = model.inputs(rows.ids, rows.positions, rows.pieces)
    return model.run(inputs, edits=edits, capture=[last], logits=False).residuals[last]


def _edit_kept(x_BTD: Tensor, rows: TokenRows, replace: Replacement) -> Tensor:
    keep, out = torch.from_numpy(rows.keep).to(x_BTD.device), x_BTD.clone()
    out[keep] = replace(x_BTD[keep].float()).to(x_BTD.dtype)
    return out


def predicted_tokens(rows: TokenRows) -> Bool[np.ndarray, "B predicted"]:
    """Which tokens but the first of each row are predicted: the one before belongs to the same piece of text."""
    return (rows.pieces[:, 1:] == rows.pieces[:, :-1]) & (rows.pieces[:, 1:] >= 0)


class Scores(NamedTuple):
    """Of each predicted token, row by row, on the CPU."""

    ce_N: Float[Tensor, "N"]  # nats
    kl_N: Float[Tensor, "N"]  # from the first stream's prediction, nats
    right_N: Bool[Tensor, "N"]  # whether it is the most probable one


@torch.no_grad()
def score_streams(model: LanguageModel, rows: TokenRows, streams: Sequence[Float[Tensor, "B T D"]]) -> list[Scores]:
    """How well each of several streams after the last block, of the same rows, predicts them."""
    predicted = predicted_tokens(rows)
    targets_N = torch.from_numpy(rows.ids[:, 1:][predicted]).to(model.device)
    at = torch.from_numpy(predicted).to(model.device)
    flat = [x_BTD[:, :-1][at] for x_BTD in streams]
    parts = [_score(model, targets_N, flat, part) for part in logit_parts(model, len(targets_N))]
    by_stream = zip(*parts, strict=True)
    return [Scores(*(torch.cat(values).cpu() for values in zip(*of_one, strict=True))) for of_one in by_stream]


def logit_parts(model: LanguageModel, num_tokens: int) -> list[slice]:
    """Which tokens' logits are made at once."""
    size = max(1, LOGIT_BYTES // (4 * model.vocab_size))
    return [slice(start, start + size) for start in range(0, max(1, num_tokens), size)]


def _score(model: LanguageModel, targets_N: Tensor, streams: list[Tensor], part: slice) -> list[Scores]:
    scores, p_NV, entropy_N = [], None, None
    targets_N1 = targets_N[part, None]
    for x_ND in streams:
        log_p_NV = log_softmax(model.unembed(x_ND[part]), dim=-1)
        if p_NV is None or entropy_N is None:
            p_NV = log_p_NV.exp()
            entropy_N = -_dot_rows(p_NV, log_p_NV)
        right_N = log_p_NV.argmax(1) == targets_N1[:, 0]
        scores.append(Scores(-log_p_NV.gather(1, targets_N1)[:, 0], -_dot_rows(p_NV, log_p_NV) - entropy_N, right_N))
    return scores


def _dot_rows(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    return torch.bmm(a_NV[:, None, :], b_NV[:, :, None])[:, 0, 0]


@torch.no_grad()
def measure_ce(model: LanguageModel, rows: TokenRows, replacements: Mapping[int, Replacement]) -> float:
    """Mean CE over the predicted tokens, nats, with the kept tokens of some layers replaced."""

    @torch.no_grad()
    def measure(batch: TokenRows) -> Tensor:
        return score_streams(model, batch, [run_replaced(model, batch, replacements)])[0].ce_N

    with quiet_transformers():
        ce_N = torch.cat(list(spread(measure, rows.batches(batch_rows(model, rows.width)), model.device)))
    return float(ce_N.double().sum()) / max(1, len(ce_N))
