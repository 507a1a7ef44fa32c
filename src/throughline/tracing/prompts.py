"""Many prompts read at once: answers and active features, without the cost of tracing.

    1. prompts of one length in tokens go through the model together, so nothing needs padding on the left
    2. each is continued greedily; a text that has ended leaves the batch
    3. one more pass over prompt and answer gives the probability of the answer, and the residual stream
    4. the dictionaries encode every token but special ones, as in a trace

What is read is what `trace_prompt` reads of the same prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.harvesting import tokens_of_a_pass
from throughline.models import LanguageModel
from throughline.records import ActiveCodes, PromptReading, Token
from throughline.tokens import encode_prompt
from throughline.tracing.answer import spell


class Prompt(NamedTuple):
    """A prompt, and where it stands: `line 7 of prompts.txt`."""

    place: str
    text: str


def list_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file, one a line; empty lines are skipped. InputError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise InputError(f"the file of prompts {path} {reason}; give a text file with one prompt a line") from error
    found = [Prompt(f"line {i} of {path}", line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"the file of prompts {path} has no prompts; write one a line, such as What is 15 + 27?")
    return found


def check_prompts(model: str, tokenizer: object, context: int | None, prompts: Sequence[Prompt]) -> None:
    """InputError that names the first prompt of which the model cannot read all and answer."""
    for prompt in prompts:
        try:
            num_tokens = len(encode_prompt(tokenizer, prompt.text))  # pyright: ignore[reportArgumentType]
        except InputError as error:
            raise InputError(f"{prompt.place}: {error}") from error
        if context is not None and num_tokens >= context:
            raise InputError(
                f"{prompt.place}: {prompt.text[:40]!r}… has {num_tokens} tokens; {model} sees {context} and needs at least "
                "one for the answer; shorten it or take it out"
            )


@torch.no_grad()
def read_prompts(
    model: LanguageModel, dictionaries: Mapping[int, Dictionary], prompts: Sequence[str], most_answer_tokens: int
) -> list[PromptReading]:
    """Answer and active features of each prompt, in their order. They fit the model's context (`check_prompts`)."""
    tokens = [encode_prompt(model.tokenizer, prompt) for prompt in prompts]
    found: dict[int, PromptReading] = {}
    for numbers in _batches(tokens, most_answer_tokens, tokens_of_a_pass(model)):
        answered = _continue(model, [[t.id for t in tokens[i]] for i in numbers], most_answer_tokens)
        readings = _read(model, dictionaries, [prompts[i] for i in numbers], [tokens[i] for i in numbers], answered)
        found |= dict(zip(numbers, readings, strict=True))
    return [found[i] for i in range(len(prompts))]


def _batches(tokens: Sequence[list[Token]], longest_answer: int, at_once: int) -> Iterator[list[int]]:
    """Numbers of prompts of one length, as many as go through the model at once."""
    by_length: dict[int, list[int]] = {}
    for i, mine in enumerate(tokens):
        by_length.setdefault(len(mine), []).append(i)
    for length, numbers in by_length.items():
        step = max(1, at_once // (length + longest_answer))
        yield from (numbers[i : i + step] for i in range(0, len(numbers), step))


class _Answer(NamedTuple):
    ids: list[int]
    complete: bool


def _continue(model: LanguageModel, prompts: list[list[int]], most_tokens: int) -> list[_Answer]:
    """What the model says greedily after prompts of one length, as `find_answer` does for one."""
    ends, made = model.end_ids, [list[int]() for _ in prompts]
    ended = [False] * len(prompts)
    most = min(most_tokens, model.context - len(prompts[0]))
    for step in range(most + 1):  # the last step only tells whether the text would end there
        going = [i for i in range(len(prompts)) if not ended[i]]
        if not going or len(prompts[0]) + step > model.context:
            break
        inputs = model.inputs(torch.tensor([prompts[i] + made[i] for i in going]))
        logits = model.run(inputs, last_only=True).logits
        assert logits is not None
        for i, token in zip(going, logits[:, -1].argmax(-1).tolist(), strict=True):
            ended[i] = token in ends
            if not ended[i] and step < most:
                made[i].append(token)
    return [_Answer(ids, end) for ids, end in zip(made, ended, strict=True)]


def _read(
    model: LanguageModel,
    dictionaries: Mapping[int, Dictionary],
    prompts: list[str],
    tokens: list[list[Token]],
    answers: list[_Answer],
) -> Iterator[PromptReading]:
    """Prompts of one length with their answers, padded at the end, where causal attention does not look back from."""
    first, longest = len(tokens[0]), max(len(answer.ids) for answer in answers)
    padded = [[t.id for t in mine] + (a.ids + [0] * longest)[:longest] for mine, a in zip(tokens, answers, strict=True)]
    at_P = torch.arange(first - 1, first + longest, device=model.device)
    output = model.run(model.inputs(torch.tensor(padded)), capture=dictionaries, at=at_P)
    assert output.logits is not None
    log_p_BPV = output.logits.log_softmax(-1)
    kept = [[t.end > t.start for t in mine] + [True] * len(a.ids) for mine, a in zip(tokens, answers, strict=True)]
    codes = {layer: _encode(d, output.residuals[layer], kept) for layer, d in dictionaries.items()}
    for b, (prompt, mine, answer) in enumerate(zip(prompts, tokens, answers, strict=True)):
        said = answer.ids or [int(log_p_BPV[b, 0].argmax())]  # a model that ends the text at once chose the end
        log_p = log_p_BPV[b, torch.arange(len(said)), torch.tensor(said)].sum()
        yield PromptReading(
            model=model.name,
            prompt=prompt,
            answer=spell(model, [t.id for t in mine], answer.ids).strip(),
            probability=float(log_p.exp()),
            complete=answer.complete,
            layers={layer: parts[b] for layer, parts in codes.items()},
        )


def _encode(dictionary: Dictionary, x_BTD: Tensor, kept: list[list[bool]]) -> list[ActiveCodes]:
    """The active features of each text of a batch, at its kept positions."""
    from throughline.codes import encode_csr

    places = [np.flatnonzero(mine) for mine in kept]
    rows_ND = torch.cat([x_BTD[b, torch.from_numpy(at)] for b, at in enumerate(places)])
    matrix_NF = encode_csr(dictionary, rows_ND.float())
    positions_A = np.repeat(np.concatenate(places), np.diff(matrix_NF.indptr))
    edges = matrix_NF.indptr[np.cumsum([0, *(len(at) for at in places)])]
    found = []
    for start, end in pairwise(edges):
        on = start + np.flatnonzero(matrix_NF.data[start:end] > 0)
        found.append(ActiveCodes(positions_A[on], matrix_NF.indices[on].astype(np.int64), matrix_NF.data[on]))
    return found
