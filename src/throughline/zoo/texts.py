"""Two-digit arithmetic in words, with the truth about every character.

A problem is a prompt and its answer (`What is 15 + 27?` and ` 42`). For each problem the generator knows what a careful
reader knows at each character: which digit of which operand stands here, whether the units carry, what the digits of the
answer will be. These are the `Fact`s of a `Document`; concept labels and tests are measured against them.

Problems are split by the unordered pair of their first two operands: a held-out pair appears in no template of the
training split, in neither order.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np

from throughline.errors import InputError
from throughline.records import Document, Fact

Slots = dict[str, Any]  # a, b, c: int; name, other, things: str

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.1
SPLIT_SALT = 158  # the first that holds out both 15 + 27 (this project's example) and 36 + 59 (the literature's)
LOWEST, HIGHEST = 10, 99
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Eva")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "cookies")


@dataclass(frozen=True)
class Template:
    """One way to ask: `pattern` has the slots a, b, c (numbers), name, other, things, and op:WORD for the operator's word."""

    name: str
    pattern: str
    operation: str
    weight: float = 1.0


TEMPLATES = (
    Template("plus sign", "What is {a} {op:+} {b}?", "add", 1.5),
    Template("plus word", "How much is {a} {op:plus} {b}?", "add"),
    Template("add", "{op:Add} {a} and {b}.", "add"),
    Template("sum of", "What is the {op:sum} of {a} and {b}?", "add"),
    Template("minus sign", "What is {a} {op:-} {b}?", "subtract", 1.5),
    Template("minus word", "How much is {a} {op:minus} {b}?", "subtract"),
    Template("subtract from", "{op:Subtract} {b} from {a}.", "subtract"),
    Template("which is larger", "Which is {op:larger}, {a} or {b}?", "larger"),
    Template("which is smaller", "Which is {op:smaller}, {a} or {b}?", "smaller"),
    Template("is it larger", "Is {a} {op:larger} than {b}?", "is larger"),
    Template("three operands", "What is {a} {op:+} {b} {op:+} {c}?", "add three", 2.0),
    Template(
        "buys more",
        "{name} has {a} {things} and {op:buys} {b} more. How many {things} does {name} have?",
        "add",
    ),
    Template("lost some", "{name} had {a} {things} and {op:lost} {b}. How many {things} are left?", "subtract"),
    Template("who has more", "{name} has {a} {things} and {other} has {b}. Who has {op:more}?", "who"),
)


def is_heldout(a: int, b: int) -> bool:
    """True if no training problem has the first two operands a and b, in either order."""
    low, high = sorted((a, b))
    digest = hashlib.sha256(f"throughline {SPLIT_SALT} {low} {high}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELDOUT_SHARE


def sample_problems(
    split: str, seed: int, template: str | None = None, emphasis: Mapping[str, float] | None = None
) -> Iterator[Document]:
    """Endless problems of one split, the same for the same seed; of one template if its name is given.

    `emphasis` multiplies the usual weights of some templates, by name.

    Raises InputError for an unknown split or template.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} asked of zoo/arithmetic, which has {' and '.join(SPLITS)}")
    chosen = [t for t in TEMPLATES if template in (None, t.name)]
    if not chosen:
        raise InputError(f"template {template!r} is unknown; there are {', '.join(t.name for t in TEMPLATES)}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    weights = np.array([t.weight * (emphasis or {}).get(t.name, 1.0) for t in chosen])
    while True:
        picks = rng.choice(len(chosen), size=256, p=weights / weights.sum())
        for pick in picks:
            yield _pose(chosen[pick], split, rng)


def pose_problem(template: str, a: int, b: int, c: int = 0, name: int = 0, other: int = 1, things: int = 0) -> Document:
    """The problem with these operands, whatever its split. a and b are in the template's own sense (a - b, b from a)."""
    found = next((t for t in TEMPLATES if t.name == template), None)
    if found is None:
        raise InputError(f"template {template!r} is unknown; there are {', '.join(t.name for t in TEMPLATES)}")
    slots = {"a": a, "b": b, "c": c, "name": NAMES[name], "other": NAMES[other], "things": THINGS[things]}
    return _write(found, slots)


def solve(prompt: str) -> str | None:
    """The right answer to a prompt of any of the templates; None if it is none of them."""
    found = recognize(prompt)
    return None if found is None else str(ANSWERS[found[0].operation](found[1]))


def recognize(prompt: str) -> tuple[Template, Slots] | None:
    """The template of a prompt and what fills its slots, numbers as int; None if it is of none."""
    for template in TEMPLATES:
        found = re.fullmatch(_expression(template), prompt.strip())
        if found:
            return template, {k: int(value) if k in "abc" else value for k, value in found.groupdict().items()}
    return None


def list_facts(prompt: str) -> frozenset[str] | None:
    """Names of what is true of a prompt of any of the templates, or of its answer; None if it is none of them."""
    found = recognize(prompt)
    return None if found is None else frozenset(fact.name for fact in _write(*found).facts)


def write_problem(template: Template, slots: Slots) -> Document:
    """The problem with these slots, whatever its split."""
    return _write(template, slots)


def key_fact(template: Template, slots: Slots) -> tuple[str, int | str | bool]:
    """What the answer turns on: what is carried, whether something is borrowed, or which of two numbers is larger."""
    if template.operation in ("add", "add three"):
        added = "ab" if template.operation == "add" else "abc"
        return "carry", sum(slots[s] % 10 for s in added) // 10
    if template.operation == "subtract":
        return "borrow", slots["a"] % 10 < slots["b"] % 10
    return "first is larger", slots["a"] > slots["b"]


def _expression(template: Template) -> str:
    """A regular expression for the template's prompts; a slot that stands twice must hold the same both times."""
    expression, seen = "", set()
    for literal, slot, argument, _ in Formatter().parse(template.pattern):
        expression += re.escape(literal)
        if slot == "op":
            expression += re.escape(argument or "")
        elif slot in seen:
            expression += f"(?P={slot})"
        elif slot is not None:
            expression += rf"(?P<{slot}>{r'[0-9]{1,9}' if slot in 'abc' else r'[A-Za-z]+'})"
            seen.add(slot)
    return expression


def _pose(template: Template, split: str, rng: np.random.Generator) -> Document:
    while True:
        a, b, c = (int(v) for v in rng.integers(LOWEST, HIGHEST + 1, size=3))
        if template.operation == "add three":
            a, b, c = (LOWEST + v % 40 for v in (a, b, c))
        if template.operation == "subtract" and a < b:
            a, b = b, a
        if a == b and template.operation in ("larger", "smaller", "is larger", "who"):
            continue
        if is_heldout(a, b) == (split == "heldout"):
            break
    name, other = rng.choice(len(NAMES), size=2, replace=False)
    things = THINGS[int(rng.integers(len(THINGS)))]
    return _write(template, {"a": a, "b": b, "c": c, "name": NAMES[name], "other": NAMES[other], "things": things})


ANSWERS: dict[str, Callable[[dict], int | str]] = {
    "add": lambda s: s["a"] + s["b"],
    "add three": lambda s: s["a"] + s["b"] + s["c"],
    "subtract": lambda s: s["a"] - s["b"],
    "larger": lambda s: max(s["a"], s["b"]),
    "smaller": lambda s: min(s["a"], s["b"]),
    "is larger": lambda s: "yes" if s["a"] > s["b"] else "no",
    "who": lambda s: s["name"] if s["a"] > s["b"] else s["other"],
}


def _write(template: Template, slots: dict) -> Document:
    """Fill the pattern left to right, noting what stands where, then add what follows from the operands."""
    text, facts, numbers, last_number_end = "", [], [], 0
    for literal, slot, argument, _ in Formatter().parse(template.pattern):
        text += literal
        if slot is None:
            continue
        start = len(text)
        text += argument or "" if slot == "op" else str(slots[slot])
        if slot == "op" and argument:
            facts.append(Fact("operator", argument, start, len(text)))
        elif slot in "abc":
            numbers.append(slots[slot])
            facts += _digit_facts(f"operand {len(numbers)}", slots[slot], start)
            last_number_end = len(text)
    prompt_end = len(text)
    answer = ANSWERS[template.operation](slots)
    text += f" {answer}"
    decided = (last_number_end - 1, len(text))
    facts += [Fact(name, value, *decided) for name, value in _consequences(template, slots, answer)]
    facts.append(Fact("first is larger", numbers[0] > numbers[1], *decided))
    if isinstance(answer, int):
        facts += _digit_facts("written answer", answer, prompt_end + 1)
    return Document(text=text, answer_start=prompt_end, facts=tuple(facts), kind=template.name)


PLACES = ("units", "tens", "hundreds")


def _digit_facts(name: str, number: int, start: int) -> list[Fact]:
    digits = str(number)
    return [
        Fact(f"{name} {PLACES[len(digits) - 1 - i]}", int(digit), start + i, start + i + 1)
        for i, digit in enumerate(digits)
    ]


def _consequences(template: Template, slots: dict, answer: int | str) -> list[tuple[str, int | str | bool]]:
    """What is settled once the last operand is read: carry or borrow, and the digits of the answer."""
    key = key_fact(template, slots)
    facts: list[tuple[str, int | str | bool]] = [] if key[0] == "first is larger" else [key]
    if isinstance(answer, int):
        facts += [(f"answer {place}", int(digit)) for place, digit in zip(PLACES, reversed(str(answer)), strict=False)]
    else:
        facts.append(("answer", answer))
    return facts
