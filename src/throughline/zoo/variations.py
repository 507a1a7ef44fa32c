"""Problems that differ from a given one in their numbers alone: in all of them, or in one digit on which the answer turns."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from throughline.records import Document
from throughline.zoo.texts import ANSWERS, Slots, Template, is_heldout, key_fact, recognize, write_problem

TRIES = 50  # drawn problems for each that is wanted, most of which have another length of answer


class Variation(NamedTuple):
    """A prompt that differs in one digit, and what that changes, such as `carry: 1 becomes 0`."""

    prompt: str
    change: str


def vary_numbers(prompt: str, num: int, seed: int = 0) -> list[Document]:
    """At most `num` problems like `prompt`, their numbers drawn anew with as many digits each and in the answer; [] if the
    prompt is of no template.

    Held-out pairs of operands are left out, so that what is averaged over these problems knows nothing of them.
    """
    found = recognize(prompt)
    if found is None:
        return []
    template, slots = found
    rng = np.random.default_rng([seed, 7])
    wanted, made = _shape(template, slots), {}
    for _ in range(TRIES * num):
        drawn = slots | {k: _draw(slots[k], rng) for k in slots if k in "abc"}
        if is_heldout(drawn["a"], drawn["b"]) or _shape(template, drawn) != wanted:
            continue
        document = write_problem(template, drawn)
        made.setdefault(document.text, document)
        if len(made) == num:
            break
    return list(made.values())


def vary_one_digit(prompt: str) -> Iterator[Variation]:
    """Prompts with one other digit that changes what the answer turns on (`key_fact`), those nearest to `prompt` first.

    The units of the second number are tried first, then those of the others, then their tens.
    """
    found = recognize(prompt)
    if found is None:
        return
    template, slots = found
    name, value = key_fact(template, slots)
    for place in (1, 10):
        for operand in sorted((k for k in slots if k in "abc"), key="bac".index):
            old = slots[operand] // place % 10
            for digit in sorted(set(range(10)) - {old}, key=lambda d: (abs(d - old), d)):
                other = slots | {operand: slots[operand] + (digit - old) * place}
                same_length = len(str(other[operand])) == len(str(slots[operand]))
                new = key_fact(template, other)[1]
                if same_length and new != value and _shape(template, other)[0] == _shape(template, slots)[0]:
                    document = write_problem(template, other)
                    yield Variation(
                        document.text[: document.answer_start], f"{name}: {_say(value)} becomes {_say(new)}"
                    )


def _draw(number: int, rng: np.random.Generator) -> int:
    digits = len(str(number))
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _shape(template: Template, slots: Slots) -> tuple[bool, int | str]:
    """Whether the answer is negative, and its length; names and yes or no may differ in theirs."""
    answer = ANSWERS[template.operation](slots)
    return (answer < 0, len(str(answer))) if isinstance(answer, int) else (False, 0)


def _say(value: int | str | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
