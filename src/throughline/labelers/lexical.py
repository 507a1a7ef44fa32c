"""What is true of a token by its characters, its neighbours and its place in the text; for any text."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from throughline.labelers.viewing import View
from throughline.labelers.vocabulary import NOWHERE, Builder, Places, ValueSet
from throughline.records import TOKEN_KINDS

MOST_TOKENS = 300  # the most frequent ones, as the token itself, the one before and the one after
MOST_PAIRS = 300
MOST_POSITIONS = 64


def add_tokens(builder: Builder, view: View, most: int = MOST_TOKENS) -> None:
    """The token, the two before it, the one after it, and it with the one before."""
    everywhere = Places.everywhere(view.num_tokens)
    words = np.array(view.token_texts, dtype=object)
    nothing = np.array(None, dtype=object)
    before, second, after = (view.neighbour(words, step, nothing) for step in (-1, -2, 1))
    pairs = np.array([None if b is None else f"{w!r} after {b!r}" for w, b in zip(words, before, strict=True)], object)
    ways = ((words, "token {!r}"), (before, "after {!r}"), (after, "before {!r}"), (second, "two after {!r}"))
    for values, wording in ways:
        _add_texts(builder, values, wording, most, everywhere)
    _add_texts(builder, pairs, "token {}", MOST_PAIRS, everywhere)


def _add_texts(builder: Builder, values: np.ndarray, wording: str, most: int, places: Places) -> None:
    common = [value for value, _ in Counter(v for v in values if v is not None).most_common(most)]
    number = {value: i for i, value in enumerate(common)}
    codes_N = np.array([number.get(v, NOWHERE) for v in values])
    builder.add("", codes_N, [ValueSet(wording.format(v), [i]) for v, i in number.items()], places)


def add_classes(builder: Builder, view: View) -> None:
    """Kinds of token, words and parts of words, capitals, lengths of digit strings, kinds of punctuation; and those before."""
    everywhere = Places.everywhere(view.num_tokens)
    kinds = [ValueSet(f"{name} token", [i]) for i, name in enumerate(TOKEN_KINDS)]
    builder.add("", view.kinds_N.astype(np.int64), kinds, everywhere)
    for step, wording in ((-1, "after a {} token"), (1, "before a {} token")):
        near_N = view.neighbour(view.kinds_N.astype(np.int64), step, NOWHERE).astype(np.int64)
        builder.add("", near_N, [ValueSet(wording.format(n), [i]) for i, n in enumerate(TOKEN_KINDS)], everywhere)
    inside_N = _continues(view)
    truths = {
        name: np.flatnonzero([bool(test.search(word)) for word in view.token_texts]) for name, test in CLASSES.items()
    }
    word_N = view.kinds_N == TOKEN_KINDS.index("word")
    truths |= {
        "begins a word": np.flatnonzero(word_N & ~inside_N),
        "continues a word": np.flatnonzero(word_N & inside_N),
        "currency or math sign": np.flatnonzero([_has_symbol(word) for word in view.token_texts]),
    }
    builder.add_truths(truths)


CLASSES = {
    "capitalised word": re.compile(r"^\s*[A-Z]"),
    "word in capitals": re.compile(r"^\s*[A-Z]{2,}$"),
    "one digit": re.compile(r"^\s*[0-9]$"),
    "two digits": re.compile(r"^\s*[0-9]{2}$"),
    "three digits or more": re.compile(r"^\s*[0-9]{3,}$"),
    "begins with a space": re.compile(r"^[^\S\n]"),
    "end of a line": re.compile(r"\n"),
    "end of a sentence": re.compile(r"^\s*[.!?]+$"),
    "comma, colon or semicolon": re.compile(r"^\s*[,;:]$"),
    "quotation mark": re.compile(r"[\"“”„«»]"),
    "bracket": re.compile(r"[()\[\]{}]"),
    "hyphen or dash": re.compile(r"^\s*[-–—]+$"),
    "apostrophe": re.compile(r"['’]"),
    "short word (1 to 3 letters)": re.compile(r"^\s*[^\W\d_]{1,3}$"),
    "long word (8 letters or more)": re.compile(r"^\s*[^\W\d_]{8,}$"),
}


def _has_symbol(word: str) -> bool:
    return any(unicodedata.category(c) in ("Sm", "Sc") for c in word)


def _continues(view: View) -> np.ndarray:
    """Tokens that go on with the letters or digits of the token before."""
    inside = np.zeros(view.num_tokens, dtype=bool)
    for n in range(1, view.num_tokens):
        text, start = view.documents[view.documents_N[n]].text, view.starts_N[n]
        first = text[start : start + 1]
        inside[n] = view.documents_N[n] == view.documents_N[n - 1] and (
            first.isalnum() and text[start - 1 : start].isalnum()
        )
    return inside


def add_positions(builder: Builder, view: View) -> None:
    """The place of a token in its text, counted from the front, and the start of a text."""
    everywhere = Places.everywhere(view.num_tokens)
    nth_N = np.arange(view.num_tokens) - view.bounds[view.documents_N]
    builder.add_truths({"start of text": np.flatnonzero(nth_N == 0)})
    builder.add("token", nth_N + 1, list(_position_sets(int(nth_N.max(initial=0)) + 1)), everywhere)


def _position_sets(longest: int) -> Iterator[ValueSet]:
    every = range(1, longest + 1)
    for n in range(1, min(longest, MOST_POSITIONS) + 1):
        yield ValueSet(f"number {n} of the text", [n])
    for n in [*range(2, 16), *range(16, longest + 1, 8)]:
        yield ValueSet(f"number {n} of the text or earlier", every[:n])
        yield ValueSet(f"number {n} of the text or later", every[n - 1 :])


def phrase(values: Sequence[int]) -> str:
    """`= 4`, `in 7-9`, `in 9,0,1`."""
    if len(values) == 1:
        return f"= {values[0]}"
    together = all(b == a + 1 for a, b in pairwise(values))
    return f"in {values[0]}-{values[-1]}" if together and len(values) > 2 else f"in {','.join(map(str, values))}"
