"""A prompt with its answer as the model and its dictionaries read it: the residual stream, split at every traced layer.

x = decode(f) + error      f = encode(x)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.dictionaries import Dictionary
from throughline.models import LanguageModel, Past
from throughline.records import Token, role_of
from throughline.tokens import kind_of_text
from throughline.tracing.answer import Answer, read_logits, spell


@dataclass(frozen=True)
class Split:
    """A text's residual stream by layer: x [T, D], features [T, F] and errors [T, D]."""

    x: Mapping[int, Float[Tensor, "T D"]]
    features: Mapping[int, Float[Tensor, "T F"]]
    errors: Mapping[int, Float[Tensor, "T D"]]


@torch.no_grad()
def split_text(model: LanguageModel, dictionaries: Mapping[int, Dictionary], ids: list[int]) -> Split:
    """The residual stream of a text, split by the dictionaries."""
    found = model.run(model.inputs(torch.tensor([ids])), capture=dictionaries, logits=False).residuals
    x = {layer: found[layer][0].float() for layer in dictionaries}
    features = {layer: dictionary.encode(x[layer]) for layer, dictionary in dictionaries.items()}
    errors = {layer: x[layer] - dictionary.decode(features[layer]) for layer, dictionary in dictionaries.items()}
    return Split(x, features, errors)


@dataclass(frozen=True)
class Subject:
    """What is traced: a prompt and its answer, with the tokens shown. Special tokens are not read (`kept_T` is False)."""

    model: LanguageModel
    dictionaries: Mapping[int, Dictionary]
    prompt: str
    answer: Answer
    tokens: list[Token]  # of prompt and answer
    roles: np.ndarray  # [T], -1 for special tokens
    clean: Split

    @property
    def layers(self) -> list[int]:
        """The traced layers, ascending."""
        return list(self.dictionaries)

    def held_against(self, others_C: Tensor) -> "Subject":
        """The same, its answer's tokens held against others."""
        return replace(self, answer=self.answer.against(others_C))

    @cached_property
    def logits_PV(self) -> Float[Tensor, "P V"]:
        """At the positions that are read, nothing changed."""
        return read_logits(self.model, self.answer.ids, self.answer.read_P)[0]

    @cached_property
    def scores(self) -> list[float]:
        """The targets' scores, nothing changed."""
        return self.answer.scores(self.logits_PV[None])[0].tolist()

    @cached_property
    def past(self) -> Past:
        """What the model remembers of the text, for copies of it that differ from some position on."""
        return self.model.remember(self.answer.ids)

    @property
    def kept_T(self) -> Bool[Tensor, "T"]:
        """Positions that are read."""
        return torch.from_numpy(self.roles >= 0).to(self.model.device)

    def sinks_T(self, layer: int) -> Bool[Tensor, "T"]:
        """Positions that are read and are attention sinks of a layer: all there is of them is error, and it stays as it is."""
        return self.kept_T & self.dictionaries[layer].is_sink(self.clean.x[layer])

    def ordinary_T(self, layer: int) -> Bool[Tensor, "T"]:
        """Positions whose features are read at a layer."""
        return self.kept_T & ~self.sinks_T(layer)


def find_subject(
    model: LanguageModel, dictionaries: Mapping[int, Dictionary], prompt: str, tokens: list[Token], answer: Answer
) -> Subject:
    """The subject of a trace. The answer's part begins with the last token of the prompt, where it is decided, as in `Codes`."""
    shown, text = list(tokens), prompt
    last = max(token.end for token in tokens)
    roles = [role_of(kind_of_text(prompt[t.start : t.end]), t.end == last) if t.end > t.start else -1 for t in tokens]
    for i in range(len(answer.answer_ids)):
        so_far = prompt + spell(model, answer.prompt_ids, answer.answer_ids[: i + 1])
        piece = so_far[len(text) :]
        shown.append(Token(answer.answer_ids[i], piece, len(text), len(so_far)))
        roles.append(role_of(kind_of_text(piece), True))
        text = so_far
    clean = split_text(model, dictionaries, answer.ids)
    return Subject(model, dictionaries, prompt, answer, shown, np.array(roles), clean)
