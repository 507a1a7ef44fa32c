"""How effects are predicted: gradients of the answer, and of the next layer's features, by one of four linearisations.

    plain        the gradient at the text itself. Right for small changes.
    grouped      plain, but effects of each layer's strongest features by gradients on their own way to "off" (`grouping`). Predicts
                 best what switching off one feature does.
    frozen       the same with attention patterns and norm divisors held still (`models.freezing`). Adds up, predicts less well.
    integrated   the mean gradient on the way from the text to the baseline, STEPS points (Sundararajan et al. 2017); for the
                 answer the stream after the first traced layer goes that way and the model runs on from there (EAP-IG, Hanna et
                 al. 2024, arXiv 2403.17806). Ranks sets of nodes best.

Gradients of the answer are with respect to the stream after a layer, through all blocks above it. Gradients of a feature of the
next traced layer are through the blocks between the two alone, so nothing is counted twice along a path.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.models import LanguageModel
from throughline.models.freezing import frozen
from throughline.pools import spread
from throughline.tracing.baselines import Baseline
from throughline.tracing.interventions import batch_copies
from throughline.tracing.texts import Subject

Linearization = Literal["grouped", "plain", "frozen", "integrated"]
LINEARIZATIONS: tuple[Linearization, ...] = ("grouped", "plain", "frozen", "integrated")
STEPS = 10
STEPS_BETWEEN = 5  # of features of the next layer


@contextmanager
def linearized(model: LanguageModel, how: Linearization) -> Iterator[None]:
    """Inside, gradients follow the rules of the linearisation."""
    with frozen(model) if how == "frozen" else nullcontext():
        yield


def streams_between(
    clean_TD: Float[Tensor, "T D"], off_TD: Float[Tensor, "T D"], how: Linearization, steps: int
) -> Float[Tensor, "S T D"]:
    """The streams at which gradients are taken: the text's own, or `steps` on the way to the baseline's (midpoint rule)."""
    if how != "integrated":
        return clean_TD[None]
    share_S = (torch.arange(steps, device=clean_TD.device) + 0.5) / steps
    return clean_TD + share_S[:, None, None] * (off_TD - clean_TD)


def answer_gradients(subject: Subject, baseline: Baseline, how: Linearization) -> dict[int, Float[Tensor, "C T D"]]:
    """Gradient of each target's score with respect to the stream after every traced layer; the plain one for `grouped`."""
    model, answer, layers = subject.model, subject.answer, subject.layers
    first = layers[0]
    starts_STD = streams_between(subject.clean.x[first], stream_of(subject, baseline, first), how, STEPS)
    nudges = {layer: torch.zeros_like(starts_STD, requires_grad=True) for layer in layers}
    edits = {layer: (lambda x, nudge=nudge: x + nudge) for layer, nudge in nudges.items()}
    edits[first] = lambda x, nudge=nudges[first]: starts_STD + nudge
    suffix = model.after(first)
    with torch.enable_grad(), linearized(model, how):
        ids = torch.tensor([answer.ids] * len(starts_STD))
        logits = suffix.run(suffix.inputs(ids), edits=edits, at=answer.read_P).logits
        assert logits is not None
        scores_C = answer.scores(logits).mean(0)
        by_target = [torch.autograd.grad(score, list(nudges.values()), retain_graph=True) for score in scores_C]
    return {layer: torch.stack([grads[i].sum(0) for grads in by_target]) for i, layer in enumerate(layers)}


def feature_gradients(
    subject: Subject,
    baseline: Baseline,
    how: Linearization,
    layer: int,
    following: int,
    positions_N: Int[Tensor, "N"],
    features_N: Int[Tensor, "N"],
) -> Float[Tensor, "N T D"]:
    """Gradient of each of these features of the layer `following` with respect to the stream after `layer`."""
    model, ids = subject.model, subject.answer.ids
    streams_STD = streams_between(subject.clean.x[layer], stream_of(subject, baseline, layer), how, STEPS_BETWEEN)
    readers_ND = subject.dictionaries[following].readers(features_N)
    suffix = model.after(layer)

    def differentiate(chosen_B: Tensor) -> Tensor:
        total_BTD = torch.zeros(len(chosen_B), *streams_STD.shape[1:], device=model.device)
        inputs = suffix.inputs(torch.tensor([ids] * len(chosen_B)))
        rows_B = torch.arange(len(chosen_B), device=model.device)
        for x_TD in streams_STD:
            start = x_TD.expand_as(total_BTD).clone().requires_grad_()
            with torch.enable_grad():
                found = suffix.run(inputs, capture=[following], edits={layer: lambda _, s=start: s}, logits=False)
                read_B = (
                    found.residuals[following][rows_B, positions_N[chosen_B]].float() * readers_ND[chosen_B]
                ).sum()
                total_BTD += torch.autograd.grad(read_B, start)[0]
        return total_BTD / len(streams_STD)

    batches = batch_copies(subject, len(features_N))
    with linearized(model, how):
        if how == "frozen":  # its hooks are for one thread
            return torch.cat([differentiate(batch) for batch in batches])
        return torch.cat(list(spread(differentiate, batches, model.device)))


def stream_of(subject: Subject, baseline: Baseline, layer: int) -> Float[Tensor, "T D"]:
    """The residual stream with all features and errors off; special tokens and sinks keep their own."""
    off_TD = subject.dictionaries[layer].decode(baseline.features[layer]) + baseline.errors[layer]
    return torch.where(subject.ordinary_T(layer)[:, None], off_TD, subject.clean.x[layer])
