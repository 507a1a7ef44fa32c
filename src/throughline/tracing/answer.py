"""What a model answers, and how clearly: the quantity every effect in a trace is measured on.

    score = mean over answer tokens of  logit(token) - logit(runner-up)

each at the position before the token, with the answer so far given. Tokens that are only white space say nothing about the
answer and are left out, unless there are no others. Runner-ups are those of the undisturbed run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.errors import InputError
from throughline.models import LanguageModel

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """The prompt's tokens, the answer's, and what is contested in it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    complete: bool
    probability: float
    places_C: Int[Tensor, "C"]  # positions whose logits are read
    tokens_C: Int[Tensor, "C"]
    runners_up_C: Int[Tensor, "C"]

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids

    def score(self, logits_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B"]:
        """The answer score of each sequence of a batch."""
        at_BCV = logits_BTV[:, self.places_C]
        tokens, runners_up = (t[None, :, None].expand(len(at_BCV), -1, 1) for t in (self.tokens_C, self.runners_up_C))
        return (at_BCV.gather(2, tokens) - at_BCV.gather(2, runners_up)).squeeze(2).mean(1)


@torch.no_grad()
def find_answer(model: LanguageModel, prompt_ids: list[int], most_tokens: int) -> Answer:
    """What the model says greedily after the prompt. InputError if prompt and answer do not fit its context."""
    room = model.context - len(prompt_ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(prompt_ids)} tokens; {model.name} sees {model.context} and needs at least one for the answer"
        )
    most_tokens = min(most_tokens, room)
    answer_ids = model.generate(prompt_ids, most_tokens)
    ids = torch.tensor([prompt_ids + answer_ids])
    logits_TV = _logits(model, ids)[0]
    last = int(logits_TV[-1].argmax())
    complete = len(answer_ids) < most_tokens or last in model.end_ids
    said = answer_ids or [last]  # a model that ends the text at once chose the end
    places = torch.arange(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(said))
    tokens = torch.tensor(said)
    log_p = logits_TV[places.to(logits_TV.device)].log_softmax(-1).cpu()
    probability = float(log_p[torch.arange(len(tokens)), tokens].sum().exp())
    runners_up = log_p.scatter(1, tokens[:, None], -torch.inf).argmax(1)
    contested = [bool(model.tokenizer.decode([t]).strip()) for t in said]
    keep = torch.tensor(contested if any(contested) else [True] * len(contested))
    device = model.device
    return Answer(
        prompt_ids,
        answer_ids,
        complete,
        probability,
        places[keep].to(device),
        tokens[keep].to(device),
        runners_up[keep].to(device),
    )


@torch.no_grad()
def answer_under(model: LanguageModel, answer: Answer, logits_TV: Tensor, edits: Mapping[int, Edit]) -> list[int]:
    """What the model says when edited, given the logits of its edited run over prompt and answer.

    Where the edited run agrees with the answer it is kept; from the first token that differs, the end of the text included,
    the model goes on by itself, for two tokens more than the answer has at most.
    """
    first, whole = len(answer.prompt_ids) - 1, len(answer.answer_ids)
    said = logits_TV[first:].argmax(-1).tolist()  # one token for each of the answer, and what follows it
    agreed = next((i for i in range(whole) if said[i] != answer.answer_ids[i]), whole)
    if agreed == whole and not answer.complete:
        return answer.answer_ids
    ends, ids = model.end_ids, answer.ids[: first + 1 + agreed]
    most = min(model.context, len(answer.ids) + 2)
    token = said[agreed]
    while token not in ends and len(ids) < most:
        ids.append(token)
        logits = model.run(model.inputs(torch.tensor([ids])), edits=edits).logits
        assert logits is not None
        token = int(logits[0, -1].argmax())
    return ids[first + 1 :]


def _logits(model: LanguageModel, ids_BT: Tensor) -> Tensor:
    logits = model.run(model.inputs(ids_BT)).logits
    assert logits is not None
    return logits


def spell(model: LanguageModel, prompt_ids: list[int], ids: list[int]) -> str:
    """The characters that `ids` add to the prompt's. Decoded alone, some tokenizers drop the space in front."""
    before = model.tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return model.tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)[len(before) :]
