"""What a model answers, and how clearly: the quantities every effect in a trace is measured on.

Each token of the answer that is more than white space is a target (all of them, if none is), with the score

    logit(token) - logit(other)      read at the position before the token, with the answer so far given

The other is the runner-up of the undisturbed run, the token that a counterfactual prompt makes the model say there, or that of a
rival answer that somebody named. The answer score is the mean over targets.

The answer is what the model says where the prompt is a task that is known and the model comes to an end by itself. Otherwise what
it goes on to say is no answer to anything, and the next token alone is explained. Somebody may name another answer, also one that
the model does not give.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from throughline.errors import InputError
from throughline.models import LanguageModel
from throughline.tokens import encode_prompt

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """The prompt's tokens, the answer's, and what is contested in it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    complete: bool
    probability: float
    read_P: Int[Tensor, "P"]  # positions whose logits are read: the prompt's last token and those of the answer
    targets_C: Int[Tensor, "C"]  # numbers in read_P of the positions at which the contested tokens are decided
    tokens_C: Int[Tensor, "C"]
    against_C: Int[Tensor, "C"]
    probabilities_C: Float[Tensor, "C"]  # of each contested token, given those before it

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids

    def scores(self, logits_BPV: Float[Tensor, "B P V"]) -> Float[Tensor, "B C"]:
        """The score of each target in each sequence of a batch, from the logits at `read_P`."""
        at_BCV = logits_BPV[:, self.targets_C]
        tokens, others = (t[None, :, None].expand(len(at_BCV), -1, 1) for t in (self.tokens_C, self.against_C))
        return (at_BCV.gather(2, tokens) - at_BCV.gather(2, others)).squeeze(2)

    def keeps(self, logits_BPV: Float[Tensor, "B P V"]) -> Bool[Tensor, "B"]:
        """Whether every target's token is preferred to all others."""
        return (logits_BPV[:, self.targets_C].argmax(2) == self.tokens_C).all(1)

    def against(self, others_C: Int[Tensor, "C"]) -> "Answer":
        """The same answer held against other tokens."""
        return replace(self, against_C=others_C)


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
    return _contest(model, prompt_ids, answer_ids, is_short=len(answer_ids) < most_tokens)


def next_token(model: LanguageModel, said: Answer) -> Answer:
    """What the model says up to its first token that is not white space."""
    for num in range(1, len(said.answer_ids)):
        if spell(model, said.prompt_ids, said.answer_ids[:num]).strip():
            contested = _contest(model, said.prompt_ids, said.answer_ids[:num], is_short=False)
            return replace(contested, complete=False)
    return said


def name_answer(model: LanguageModel, prompt: str, said: Answer, named: str | None, rival: str | None) -> Answer:
    """The answer `named` in place of what the model says (None: that), held against `rival`, if one is named, where they part.

    If a name has no leading white space, the model's own is put in front. InputError if a name has no tokens, does not fit
    the context, or does not part from the other.
    """
    says = spell(model, said.prompt_ids, said.answer_ids)
    space = says[: len(says) - len(says.lstrip())]

    def encode(name: str) -> list[int]:
        if not name.strip():
            raise InputError(f"an answer or rival of {name!r} says nothing; name some text")
        return _encode_after(model, prompt, said, name if name[:1].isspace() else space + name)

    answer = said if named is None else _contest(model, said.prompt_ids, encode(named), is_short=False)
    if rival is None:
        return answer
    rival_ids = encode(rival)
    own_ids = answer.answer_ids or answer.tokens_C.tolist()
    parted = next((i for i, (a, b) in enumerate(zip(own_ids, rival_ids, strict=False)) if a != b), None)
    if parted is None:
        text = spell(model, said.prompt_ids, answer.answer_ids).strip()
        raise InputError(
            f"the rival {rival!r} and the answer {text!r} begin alike to the end of one of them; name another"
        )
    log_p_PV = read_logits(model, answer.ids, answer.read_P)[0].log_softmax(-1)
    place = torch.tensor([parted], device=model.device)
    token, other = (torch.tensor([ids[parted]], device=model.device) for ids in (own_ids, rival_ids))
    return replace(
        answer, targets_C=place, tokens_C=token, against_C=other, probabilities_C=log_p_PV[place, token].exp()
    )


def _encode_after(model: LanguageModel, prompt: str, said: Answer, text: str) -> list[int]:
    """The tokens of a text as it goes on from the prompt; its own, where it would change how the prompt is cut into tokens."""
    num = len(said.prompt_ids)
    whole = [token.id for token in encode_prompt(model.tokenizer, prompt + text)]
    ids = whole[num:] if whole[:num] == said.prompt_ids else model.tokenizer(text, add_special_tokens=False).input_ids
    if num + len(ids) > model.context:
        raise InputError(
            f"prompt and answer {text!r:.40} have {num + len(ids)} tokens; {model.name} sees {model.context}"
        )
    return list(ids)


@torch.no_grad()
def _contest(model: LanguageModel, prompt_ids: list[int], answer_ids: list[int], is_short: bool) -> Answer:
    """An answer with the tokens that are contested in it, each against the likeliest other. `is_short`: the model ended it."""
    read_P = torch.arange(len(prompt_ids) - 1, len(prompt_ids) + len(answer_ids), device=model.device)
    log_p_PV = read_logits(model, prompt_ids + answer_ids, read_P)[0].log_softmax(-1)
    last = int(log_p_PV[-1].argmax())
    complete = is_short or last in model.end_ids
    said = answer_ids or [last]  # a model that ends the text at once chose the end
    tokens = torch.tensor(said, device=model.device)
    places = torch.arange(len(said), device=model.device)
    of_tokens = log_p_PV[places, tokens]
    runners_up = log_p_PV[places].scatter(1, tokens[:, None], -torch.inf).argmax(1)
    contested = [bool(model.tokenizer.decode([t]).strip()) for t in said]
    keep = torch.tensor(contested if any(contested) else [True] * len(contested), device=model.device)
    return Answer(
        prompt_ids,
        answer_ids,
        complete,
        float(of_tokens.sum().exp()),
        read_P,
        places[keep],
        tokens[keep],
        runners_up[keep],
        of_tokens[keep].exp(),
    )


@torch.no_grad()
def answer_under(model: LanguageModel, answer: Answer, preferred: list[int], edits: Mapping[int, Edit]) -> list[int]:
    """What the model says when edited, given the tokens that its edited run over prompt and answer prefers at `read_P`.

    Where the edited run agrees with the answer it is kept; from the first token that differs, the end of the text included,
    the model goes on by itself, for two tokens more than the answer has at most, or as many if the answer was cut.
    """
    first, whole = len(answer.prompt_ids) - 1, len(answer.answer_ids)
    agreed = next((i for i in range(whole) if preferred[i] != answer.answer_ids[i]), whole)
    if agreed == whole and not answer.complete:
        return answer.answer_ids
    ends, ids = model.end_ids, answer.ids[: first + 1 + agreed]
    most = min(model.context, len(answer.ids) + (2 if answer.complete else 0))
    token = preferred[agreed]
    while token not in ends and len(ids) < most:
        ids.append(token)
        if len(ids) == most:
            break
        logits = model.run(model.inputs(torch.tensor([ids])), edits=edits, last_only=True).logits
        assert logits is not None
        token = int(logits[0, -1].argmax())
    return ids[first + 1 :]


@torch.no_grad()
def read_logits(model: LanguageModel, ids: list[int], read_P: Tensor) -> Float[Tensor, "1 P V"]:
    """The logits of a text at some positions."""
    logits = model.run(model.inputs(torch.tensor([ids])), at=read_P).logits
    assert logits is not None
    return logits


def spell(model: LanguageModel, prompt_ids: list[int], ids: list[int]) -> str:
    """The characters that `ids` add to the prompt's. Decoded alone, some tokenizers drop the space in front."""
    before = model.tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return model.tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)[len(before) :]
