"""What "off" means: the values that features and errors take in the place of their own.

    counterfactual   their values in a prompt that differs in one thing (15 + 27: 15 + 24, nothing is carried), with the same answer
                     after it; position by position, so both prompts need as many tokens
    mean             the mean at the same kind of position: the same place in other problems of the same form, if the prompt is a
                     form that the text generator knows; otherwise over held-out tokens of the same kind in the same part
    zero             zero

A counterfactual changes what the question asks about and leaves everything else as the model knows it. Zero is a state the model
never sees, and switching off one of several redundant features with it often shows nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from throughline.errors import InputError
from throughline.models import LanguageModel
from throughline.records import PARTS, TOKEN_KINDS
from throughline.tokens import encode_prompt
from throughline.tracing.answer import read_logits
from throughline.tracing.texts import Subject, split_text
from throughline.zoo.variations import vary_numbers, vary_one_digit

OffKind = Literal["mean", "counterfactual", "zero"]
OFF_KINDS: tuple[OffKind, ...] = ("mean", "counterfactual", "zero")
NUM_SIMILAR = 200
FEWEST_SIMILAR = 30
MOST_TRIED = 20  # counterfactuals of the generator, of which one may fit the tokenizer


@dataclass(frozen=True)
class Baseline:
    """The values of features [T, F] and errors [T, D] when they are off, and the words for them."""

    kind: OffKind
    words: str
    prompt: str | None  # the counterfactual
    features: Mapping[int, Float[Tensor, "T F"]]
    errors: Mapping[int, Float[Tensor, "T D"]]
    others_C: Int[Tensor, "C"] | None = None  # what the model says after the counterfactual, for each target

    def nodes(self, subject: Subject, layer: int) -> Bool[Tensor, "T F"]:
        """The features to trace: the active ones that differ when off."""
        return self.differing(subject, layer) & (subject.clean.features[layer] > 0)

    def differing(self, subject: Subject, layer: int) -> Bool[Tensor, "T F"]:
        """Features whose value is another when off, at positions that are read."""
        return (subject.clean.features[layer] != self.features[layer]) & subject.kept_T[:, None]


def find_baseline(
    subject: Subject, off: OffKind | None, against: str | None, role_means: Callable[[int], np.ndarray]
) -> Baseline:
    """The baseline asked for; without a wish, a counterfactual where one can be made, or else the mean.

    `role_means(layer)` is each feature's mean by role, [F, roles]. InputError if `against` does not fit the prompt, or if a
    counterfactual is asked for that the generator cannot make.
    """
    if against is not None and off not in (None, "counterfactual"):
        raise InputError(f"a prompt to compare against was given, which is no {off}; leave out one of them")
    if against is not None:
        found = _against(subject, against, f"its value in {against!r}")
    else:
        found = _make_counterfactual(subject) if off in (None, "counterfactual") else None
        if off == "counterfactual" and found is None:
            raise InputError(
                f"no counterfactual can be made of {subject.prompt!r}; give one of as many tokens with --against, "
                "or take --off mean"
            )
        if found is None:
            found = _zero(subject) if off == "zero" else _mean(subject, role_means)
    return _leave_sinks(subject, found)


def _leave_sinks(subject: Subject, baseline: Baseline) -> Baseline:
    """The same in which sinks are what they are in the text: without them attention goes where it never goes."""
    features, errors = dict(baseline.features), dict(baseline.errors)
    for layer in subject.layers:
        sink_T1 = subject.sinks_T(layer)[:, None]
        features[layer] = torch.where(sink_T1, subject.clean.features[layer], features[layer])
        errors[layer] = torch.where(sink_T1, subject.clean.errors[layer], errors[layer])
    return replace(baseline, features=features, errors=errors)


def _against(subject: Subject, prompt: str, words: str) -> Baseline:
    model, answer = subject.model, subject.answer
    ids = [token.id for token in encode_prompt(model.tokenizer, prompt)]
    if len(ids) != len(answer.prompt_ids):
        raise InputError(
            f"{prompt!r} has {len(ids)} tokens in {model.name} and {subject.prompt!r} has {len(answer.prompt_ids)}; features are "
            "compared position by position, so give one of as many tokens"
        )
    if ids == answer.prompt_ids:
        raise InputError(f"{prompt!r} is the prompt itself; give one that differs in what matters")
    found = split_text(model, subject.dictionaries, ids + answer.answer_ids)
    return Baseline("counterfactual", words, prompt, found.features, found.errors, _others(model, subject, ids))


@torch.no_grad()
def _others(model: LanguageModel, subject: Subject, ids: list[int]) -> Int[Tensor, "C"]:
    """For each target the token preferred after the counterfactual, or the runner-up where that is the same token."""
    answer = subject.answer
    said_C = read_logits(model, ids + answer.answer_ids, answer.read_P)[0].argmax(-1)[answer.targets_C]
    return torch.where(said_C == answer.tokens_C, answer.against_C, said_C)


def _make_counterfactual(subject: Subject) -> Baseline | None:
    """The generator's nearest one-digit variation that has as many tokens and another answer; None if there is none."""
    model, answer = subject.model, subject.answer
    for tried, variation in enumerate(vary_one_digit(subject.prompt)):
        if tried == MOST_TRIED:
            break
        ids = [token.id for token in encode_prompt(model.tokenizer, variation.prompt)]
        if len(ids) != len(answer.prompt_ids):
            continue
        said_P = read_logits(model, ids + answer.answer_ids, answer.read_P)[0].argmax(-1)
        if bool((said_P[answer.targets_C] != answer.tokens_C).any()):
            return _against(subject, variation.prompt, f"its value in {variation.prompt!r} ({variation.change})")
    return None


def _zero(subject: Subject) -> Baseline:
    features = {layer: torch.zeros_like(f) for layer, f in subject.clean.features.items()}
    errors = {layer: torch.zeros_like(e) for layer, e in subject.clean.errors.items()}
    return Baseline("zero", "zero", None, features, errors)


def _mean(subject: Subject, role_means: Callable[[int], np.ndarray]) -> Baseline:
    return _mean_of_similar(subject) or _mean_of_roles(subject, role_means)


@torch.no_grad()
def _mean_of_similar(subject: Subject) -> Baseline | None:
    model, answer = subject.model, subject.answer
    rows = []
    for document in vary_numbers(subject.prompt, NUM_SIMILAR):
        question = encode_prompt(model.tokenizer, document.text[: document.answer_start])
        whole = encode_prompt(model.tokenizer, document.text)
        if len(question) == len(answer.prompt_ids) and len(whole) == len(answer.ids):
            rows.append([token.id for token in whole])
    if len(rows) < FEWEST_SIMILAR:
        return None
    found = model.run(model.inputs(torch.tensor(rows)), capture=subject.layers, logits=False).residuals
    features, errors = {}, {}
    for layer, dictionary in subject.dictionaries.items():
        x_BTD = found[layer].float()
        sums = [dictionary.encode(x_TD) for x_TD in x_BTD]
        features[layer] = torch.stack(sums).mean(0)
        errors[layer] = x_BTD.mean(0) - dictionary.decode(features[layer])
    words = f"its mean at the same position of {len(rows)} problems that differ in their numbers"
    return Baseline("mean", words, None, features, errors)


def _mean_of_roles(subject: Subject, role_means: Callable[[int], np.ndarray]) -> Baseline:
    roles = np.maximum(subject.roles, 0)
    device = subject.model.device
    features = {
        layer: torch.from_numpy(role_means(layer)[:, roles].T.copy()).float().to(device) for layer in subject.layers
    }
    errors = {layer: torch.zeros_like(e) for layer, e in subject.clean.errors.items()}
    words = (
        f"its mean over held-out tokens of the same kind ({', '.join(TOKEN_KINDS)}) in the same part of the text "
        f"({', '.join(PARTS)})"
    )
    return Baseline("mean", words, None, features, errors)
