"""A model run with something else in the place of a layer's residual stream, and what that costs its predictions."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from throughline.models import LanguageModel
from throughline.tokens import TokenRows

LOGIT_BYTES = 2**28  # of one batch's log-probabilities

Replacement = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]


def batch_rows(model: LanguageModel, rows: TokenRows) -> int:
    """How many rows are run at once."""
    return max(1, LOGIT_BYTES // (4 * rows.width * model.vocab_size))


def log_probabilities(
    model: LanguageModel, rows: TokenRows, replacements: Mapping[int, Replacement]
) -> Float[Tensor, "B predicted V"]:
    """Log-probabilities of the next token with the kept tokens of some layers replaced; special tokens stay as they are."""
    inputs = model.inputs(rows.ids, rows.positions, rows.pieces)
    keep = torch.from_numpy(rows.keep).to(inputs.ids.device)

    def edit_with(replace: Replacement) -> Callable[[Tensor], Tensor]:
        def edit(x_BTD: Tensor) -> Tensor:
            out = x_BTD.clone()
            out[keep] = replace(x_BTD[keep].float()).to(x_BTD.dtype)
            return out

        return edit

    output = model.run(inputs, edits={layer: edit_with(replace) for layer, replace in replacements.items()})
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
