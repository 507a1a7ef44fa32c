"""A model run with something else in the place of a layer's residual stream, and what that costs its predictions."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from throughline.models import LanguageModel
from throughline.models.language_model import Inputs, ModelOutput
from throughline.tokens import TokenRows

BATCH_BYTES = 2**28  # of one batch's log-probabilities, or of the streams that are kept of it

Replacement = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]


def batch_rows(model: LanguageModel, rows: TokenRows, num_layers: int = 0) -> int:
    """How many rows are run at once, if the stream of so many layers is kept."""
    return max(1, BATCH_BYTES // (4 * rows.width * max(model.vocab_size, num_layers * model.d_model)))


class CleanPass(NamedTuple):
    """A batch of rows as the model reads them: log-probabilities of the next token, and the stream after some blocks."""

    inputs: Inputs
    log_p_BTV: Float[Tensor, "B predicted V"]
    residuals: dict[int, Float[Tensor, "B T D"]]


def run_clean(model: LanguageModel, rows: TokenRows, layers: Collection[int] = ()) -> CleanPass:
    """The model run with nothing replaced, its stream after each of `layers` kept."""
    inputs = model.inputs(rows.ids, rows.positions, rows.pieces)
    output = model.run(inputs, capture=layers)
    return CleanPass(inputs, _log_softmax(output), output.residuals)


def run_spliced(
    model: LanguageModel, rows: TokenRows, clean: CleanPass, layer: int, replace: Replacement
) -> Float[Tensor, "B predicted V"]:
    """Log-probabilities with `replace` of the kept tokens after block `layer` in their place; special tokens stay as they are.

    Only the blocks after it are run again: those before see what they saw in the clean pass.
    """
    edited_BTD = _edit_kept(clean.residuals[layer], rows, replace)
    return _log_softmax(model.after(layer).run(clean.inputs, edits={layer: lambda _: edited_BTD}))


def log_probabilities(
    model: LanguageModel, rows: TokenRows, replacements: Mapping[int, Replacement]
) -> Float[Tensor, "B predicted V"]:
    """Log-probabilities of the next token with the kept tokens of any layers replaced, each by what it does to the stream that
    the layers before it left; special tokens stay as they are."""
    inputs = model.inputs(rows.ids, rows.positions, rows.pieces)

    def edit_with(replace: Replacement) -> Callable[[Tensor], Tensor]:
        return lambda x_BTD: _edit_kept(x_BTD, rows, replace)

    return _log_softmax(model.run(inputs, edits={layer: edit_with(replace) for layer, replace in replacements.items()}))


def _edit_kept(x_BTD: Tensor, rows: TokenRows, replace: Replacement) -> Tensor:
    keep, out = torch.from_numpy(rows.keep).to(x_BTD.device), x_BTD.clone()
    out[keep] = replace(x_BTD[keep].float()).to(x_BTD.dtype)
    return out


def _log_softmax(output: ModelOutput) -> Tensor:
    assert output.logits is not None
    return log_softmax(output.logits[:, :-1].float(), dim=-1)


def predicted_tokens(rows: TokenRows) -> Bool[np.ndarray, "B predicted"]:
    """Which tokens but the first of each row are predicted: the one before belongs to the same piece of text."""
    return (rows.pieces[:, 1:] == rows.pieces[:, :-1]) & (rows.pieces[:, 1:] >= 0)


@torch.no_grad()
def measure_ce(model: LanguageModel, rows: TokenRows, replacements: Mapping[int, Replacement]) -> float:
    """Mean CE over the predicted tokens, nats, with the kept tokens of some layers replaced."""
    total, count = 0.0, 0
    for batch in rows.batches(batch_rows(model, rows)):
        log_p_BTV, predicted = log_probabilities(model, batch, replacements), predicted_tokens(batch)
        at = torch.from_numpy(predicted).to(log_p_BTV.device)
        targets = torch.from_numpy(batch.ids[:, 1:]).to(log_p_BTV.device)
        total += float(nll_loss(log_p_BTV[at], targets[at], reduction="sum"))
        count += int(predicted.sum())
    return total / max(1, count)
