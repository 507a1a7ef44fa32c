"""What is true of the numbers of a text: their digits, values and ranges, and what follows from two of them.

Numbers are found by a regular expression, so any text will do. At each token two numbers are known: the last one that is
complete by the end of the token, and the one before it; with them their sum, units sum, tens sum, carry, difference and
comparison. Where the text has an answer with a number in it, the last of these is known from the prompt's last number on.
Value sets are those by which arithmetic neurons were classified (Nikankin et al. 2024, arXiv 2410.21272, section 4.2): values,
ranges, remainders; and for digits the circular ranges, odd, even, low and high.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from throughline.labelers.lexical import phrase
from throughline.labelers.viewing import View
from throughline.labelers.vocabulary import NOWHERE, Builder, Places, ValueSet
from throughline.records import TOKEN_KINDS, Document

NUMBER = re.compile(r"[0-9]+(?:,[0-9]{3})*")
MOST_DIGITS = 9
LARGEST = 10**MOST_DIGITS
MOST_NUMBERS = 4  # of a text that places tell apart; later ones are like the fourth
PLACES = ("units", "tens", "hundreds", "thousands")
OPERATIONS = ("no operation asked", "in an addition", "in a subtraction", "in a comparison")
BY_FACT = {"carry": 1, "borrow": 2}  # facts that say which operation a generated text asks for
BY_WORDS = (
    (1, re.compile(r"\+|\b(?:plus|add|sum|total|altogether|in all)\b", re.IGNORECASE)),
    (2, re.compile(r"\s[-−]\s|\b(?:minus|subtract|difference|left|fewer|lost)\b", re.IGNORECASE)),
    (3, re.compile(r"\b(?:larger|smaller|greater|bigger|less)\b", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Numbers:
    """Of each token, NOWHERE where there is none: the last number and the one before it, the answer, a digit of its own."""

    last_N: np.ndarray
    previous_N: np.ndarray
    answer_N: np.ndarray
    digit_N: np.ndarray
    places: Places


def add_numbers(builder: Builder, view: View, found: Numbers) -> None:
    """All that is said of numbers, everywhere and at each place."""
    a_N, b_N, answer_N = found.previous_N, found.last_N, found.answer_N
    both = (a_N != NOWHERE) & (b_N != NOWHERE)
    digits = list(digit_sets())
    somewhere = np.zeros(view.num_tokens, dtype=np.int64)
    builder.add("", somewhere, [ValueSet("token", [0])], found.places, most_of_place=1)
    builder.add("this digit", found.digit_N, digits, found.places)
    for name, values_N in (("the last number", b_N), ("the number before it", a_N), ("the answer", answer_N)):
        for place, unit in ((1, "units"), (10, "tens"), (100, "hundreds")):
            there = values_N >= (place if place > 1 else 0)
            family = unit if unit in ("units", "tens") else "other"
            builder.add(
                f"{unit} of {name}", np.where(there, values_N // place % 10, NOWHERE), digits, found.places, family
            )
        builder.add(name, values_N, list(value_sets(values_N)), found.places)

    def of_both(values_N: np.ndarray) -> np.ndarray:
        return np.where(both, values_N, NOWHERE)

    total_N, units_N, tens_N = (
        of_both(a_N + b_N),
        of_both(a_N % 10 + b_N % 10),
        of_both(a_N // 10 % 10 + b_N // 10 % 10),
    )
    # before the sums, since the first of equally good predicates becomes the label
    yes_no = [ValueSet("carry", [1]), ValueSet("do not carry", [0])]
    builder.add("units of both numbers", of_both(units_N // 10), yes_no, found.places, "carry")
    builder.add("sum", total_N, list(value_sets(total_N)), found.places, "sum")
    builder.add("units of the sum", of_both(total_N % 10), digits, found.places, "sum")
    builder.add("tens of the sum", of_both(total_N // 10 % 10), digits, found.places, "sum")
    builder.add("units of both numbers sum", units_N, list(sum_sets()), found.places, "units")
    builder.add("tens of both numbers sum", tens_N, list(sum_sets()), found.places, "tens")
    compared = [ValueSet("than the last", [1]), ValueSet("than the last: no", [0])]
    builder.add("the number before is larger", of_both((a_N > b_N).astype(np.int64)), compared, found.places)
    same = [ValueSet("units", [1])]
    builder.add("both numbers have the same", of_both((a_N % 10 == b_N % 10).astype(np.int64)), same, found.places)
    gap_N = of_both(np.abs(a_N - b_N))
    builder.add("difference", gap_N, list(value_sets(gap_N)), found.places)
    builder.add("units of the difference", of_both((a_N - b_N) % 10), digits, found.places)


# ---- sets of values


def digit_sets() -> Iterator[ValueSet]:
    """Each digit; circular ranges of two to five; odd, even; from a digit up and down."""
    for width in (1, 2, 3, 4, 5):
        for first in range(10):
            values = [(first + i) % 10 for i in range(width)]
            yield ValueSet(phrase(values), values)
    yield ValueSet("odd", range(1, 10, 2))
    yield ValueSet("even", range(0, 10, 2))
    yield ValueSet("in 0,5", [0, 5])
    for d in range(1, 10):
        yield ValueSet(f"≥ {d}", range(d, 10))
        yield ValueSet(f"≤ {d - 1}", range(d))


def sum_sets() -> Iterator[ValueSet]:
    """Sums of two digits: each, ranges of two to four, from one up and down, and by the digit that is written."""
    for width in (1, 2, 3, 4):
        for first in range(20 - width):
            yield ValueSet(phrase(range(first, first + width)), range(first, first + width))
    for s in range(1, 19):
        yield ValueSet(f"≥ {s}", range(s, 19))
        yield ValueSet(f"≤ {s - 1}", range(s))
    for d in range(9):
        yield ValueSet(f"= {d} or {d + 10}", [d, d + 10])
    yield ValueSet("odd", range(1, 19, 2))


def value_sets(values_N: np.ndarray) -> Iterator[ValueSet]:
    """Values, ranges of 5 to 50, from a ten up and down, remainders, and numbers of digits, of the values that there are."""
    there = np.unique(values_N[values_N != NOWHERE])
    small = there[there < 1000]
    for value in small:
        yield ValueSet(f"= {value}", [value])
    top = int(small.max(initial=0)) + 1
    for width, step in ((3, 1), (5, 1), (7, 1), (10, 2), (15, 5), (20, 5), (30, 10), (50, 10)):
        for first in range(0, top, step):
            yield ValueSet(f"in {first}-{first + width - 1}", range(first, first + width))
    for bound in range(10, top, 10):
        yield ValueSet(f"≥ {bound}", there[there >= bound])
        yield ValueSet(f"< {bound}", there[there < bound])
    for divisor in range(2, 10):
        for rest in range(divisor):
            yield ValueSet(f"mod {divisor} = {rest}", there[there % divisor == rest])
    for digits in range(1, MOST_DIGITS + 1):
        low = 10 ** (digits - 1) if digits > 1 else 0
        yield ValueSet(
            f"has {digits} digits" if digits > 1 else "has 1 digit", there[(there >= low) & (there < 10**digits)]
        )


# ---- reading


def read_numbers(view: View) -> Numbers:
    """The numbers that are known at each token, and where it stands among them."""
    arrays = np.full((4, view.num_tokens), NOWHERE)
    names: dict[tuple[str, int], int] = {}
    fine_N = np.zeros(view.num_tokens, dtype=np.int64)
    for number, document in enumerate(view.documents):
        tokens = slice(*view.bounds[number : number + 2])
        operation = _operation(document)
        locations = _read_document(document, view, tokens, arrays)
        fine_N[tokens] = [names.setdefault((location, operation), len(names)) for location in locations]
    return Numbers(*arrays, places=_places(fine_N, list(names)))


def _places(fine_N: np.ndarray, fine: Sequence[tuple[str, int]]) -> Places:
    locations = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in fine))}
    asked = np.array([operation for _, operation in fine], dtype=np.int64)
    everything, whole = np.zeros(len(fine), dtype=np.int64), np.arange(len(fine))
    located = np.array([locations[name] for name, _ in fine], dtype=np.int64)
    divisions = [
        (everything, [""]),
        (asked, [f", {words}" for words in OPERATIONS]),
        (located, [f", {name}" for name in locations]),
        (whole, [f", {name}, {OPERATIONS[operation]}" for name, operation in fine]),
    ]
    return Places(fine_N, divisions)


def _operation(document: Document) -> int:
    """Index into OPERATIONS: by the generator's facts, otherwise by the words of the prompt."""
    if document.facts:
        named = {fact.name for fact in document.facts}
        return next((o for name, o in BY_FACT.items() if name in named), 3)
    prompt = document.text[: document.answer_start]
    return next((operation for operation, words in BY_WORDS if words.search(prompt)), 0)


def _read_document(document: Document, view: View, tokens: slice, arrays: np.ndarray) -> list[str]:
    """Fill in one text's part of last, previous, answer and digit; and say of each token where it stands."""
    last_N, previous_N, answer_N, digit_N = (array[tokens] for array in arrays)
    starts, ends = view.starts_N[tokens], view.ends_N[tokens]
    spans = [(m.start(), m.end(), int(m[0].replace(",", "")[:MOST_DIGITS])) for m in NUMBER.finditer(document.text)]
    answer_start = len(document.text) + 1 if document.answer_start is None else document.answer_start
    prompt = [s for s in spans if s[1] <= answer_start]
    known = np.searchsorted([end for _, end, _ in spans], ends, side="right")
    values = np.array([value for _, _, value in spans] or [0])
    last_N[known > 0] = values[known[known > 0] - 1]
    previous_N[known > 1] = values[known[known > 1] - 2]
    if len(spans) > len(prompt):
        answer_N[ends >= (prompt[-1][1] if prompt else answer_start)] = spans[-1][2]
    around = np.searchsorted([start for start, _, _ in spans], ends, side="left") - 1  # the number a token's end is in
    where, decided = [], False
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        number = spans[around[i]] if around[i] >= 0 and start < spans[around[i]][1] else None
        if number is not None and end - max(start, number[0]) == 1 and (number[1] - number[0] > 1 or end - start == 1):
            digit_N[i] = int(document.text[end - 1]) if document.text[end - 1].isdigit() else NOWHERE
        in_answer, first = end >= answer_start, not decided
        decided = decided or in_answer
        if in_answer and first:
            where.append("at the end of the prompt")
        elif number is not None:
            which = "the answer" if in_answer else _ordinal(around[i] + 1)
            where.append(f"at {_digit_place(number, start, end)}{which}")
        elif in_answer:
            where.append("just before the answer" if spans and known[i] == len(prompt) else "in the answer")
        else:
            kind = TOKEN_KINDS[view.kinds_N[tokens][i]]
            said = repr(document.text[start:end]) if kind in ("punctuation", "space") else f"a {kind} token"
            where.append(f"at {said} after {_ordinal(known[i])}" if known[i] else f"at {said} before any number")
    return where


def _ordinal(number: int) -> str:
    return f"number {number}" if number < MOST_NUMBERS else f"number {MOST_NUMBERS} or later"


def _digit_place(number: tuple[int, int, int], start: int, end: int) -> str:
    """`the units of ` for a token that is one digit of a longer number; nothing for a whole one."""
    first, last, _ = number
    if start <= first and end >= last:
        return ""
    place = last - end
    return f"the {PLACES[place]} of " if place < len(PLACES) else "a digit of "
