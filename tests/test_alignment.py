"""Two tokenizers on one text: which tokens end together, character by character, against each tokenizer's own offsets."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from test_tokens import EVERY, tokenizer
from throughline.codes import reading_order
from throughline.records import Document
from throughline.tokens import TokenRows, align_ends, collect_rows
from throughline.transfer.pairs import align

WIDE = 4096  # more than any of these texts has tokens: one piece each
PIECES = [
    *("What", " is", " 15", "1234567", " 27", "?", "...", " don't", "x=-1.5e3", "(a+b)*c"),
    *("🙂", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "é", "e\u0301", "a\u0308\u0323", "n\u0303o", "हिन्दी", "שלום", "مرحبا", "ﬁ"),
    *("漢字", "かな", "한국어", "𠮷", "。", "，", "①", "𝒳", "\u200d", "\ufeff", "�"),
    *(" ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "▁", "Ġ"),
    *("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<0xE2>", "<|endoftext|"),
]
texts = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)), max_size=16
).map("".join)
PAIRS = [(a, b) for i, a in enumerate(EVERY) for b in EVERY[i + 1 :]]


class Token(NamedTuple):
    """A token as its tokenizer alone says: id, first character, and the one after its last."""

    id: int
    start: int
    end: int


def plain_tokens(tok: Any, text: str) -> list[Token]:
    """The tokens of a text that are not special, one by one.

    A combining mark that was composed with what is before it is no token's by the tokenizer's own account; it is of the token
    before it.
    """
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special and i != tok.unk_token_id}
    special |= {i for i in (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) if i is not None}
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = [Token(i, *span) for i, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
    owner = {n: t.end for t in tokens for n in range(t.start, t.end)}  # where the token ends that has this character
    longer: dict[int, int] = {}
    for n in range(1, len(text)):
        if n not in owner and not text[n].isspace() and n - 1 in owner:
            owner[n] = owner[n - 1]
            longer[owner[n]] = n + 1
    return [
        Token(t.id, t.start, longer.get(t.end, t.end) if t.end > t.start else t.end)
        for t in tokens
        if t.id not in special
    ]


def plain_pairs(a: Any, b: Any, texts: Sequence[str]) -> list[tuple[int, Token, Token]]:
    """Document, and two tokens that end at the same character, for every character of every document in turn."""
    found = []
    for number, text in enumerate(texts):
        ending_a, ending_b = ({t.end: t for t in plain_tokens(tok, text) if t.end > t.start} for tok in (a, b))
        ends = [end for end in range(1, len(text) + 1) if end in ending_a and end in ending_b]
        found += [
            (number, ending_a[end], ending_b[end]) for end in ends
        ]  # of several with one end the dict keeps the last
    return found


def pick(rows: TokenRows, index: np.ndarray) -> list[tuple[int, Token]]:
    """Document and token at places of the flattened rows."""
    arrays = (rows.documents, rows.ids, rows.starts, rows.ends)
    chosen = zip(*(array.ravel()[index].tolist() for array in arrays), strict=True)
    return [(document, Token(*token)) for document, *token in chosen]


def check(names: tuple[str, str], texts: Sequence[str], contexts: tuple[int, int]) -> None:
    """Everything that is said of two tokenizers on the same texts, cut at these lengths."""
    toks, documents = [tokenizer(name) for name in names], [Document(text) for text in texts]
    a, b = (collect_rows(documents, tok, context) for tok, context in zip(toks, contexts, strict=True))
    found, expected = align_ends(a, b), plain_pairs(*toks, texts)
    pairs = [(d, x, y) for (d, x), (e, y) in zip(pick(a, found.index_a), pick(b, found.index_b), strict=True) if d == e]
    assert len(pairs) == len(found.index_a) == len(found.index_b)
    assert pairs == expected
    assert found.strict.tolist() == [x.start == y.start for _, x, y in expected]
    counts = [sum(len(plain_tokens(tok, text)) for text in texts) for tok in toks]
    assert found.coverage == (len(expected) / counts[0] if counts[0] else 0)
    for document, x, y in pairs:
        written = [texts[document][token.start : token.end] for token in (x, y)]
        assert written[0].endswith(written[1]) or written[1].endswith(written[0])
    assert_in_reading_order(a, b, expected)
    back = align_ends(b, a)
    np.testing.assert_array_equal(back.index_a, found.index_b)
    np.testing.assert_array_equal(back.index_b, found.index_a)
    assert back.coverage == (len(expected) / counts[1] if counts[1] else 0)


def assert_in_reading_order(a: TokenRows, b: TokenRows, expected: list[tuple[int, Token, Token]]) -> None:
    """The same pairs as metrics see them: by place among the kept tokens of the documents."""
    sides: list[Any] = [SimpleNamespace(rows=rows, num_tokens=rows.num_tokens) for rows in (a, b)]
    aligned = align(*sides)
    kept = [np.flatnonzero(rows.keep)[reading_order(rows)] for rows in (a, b)]
    chosen = pick(a, kept[0][aligned.source_N]), pick(b, kept[1][aligned.target_N])
    assert [(d, x, y) for (d, x), (_, y) in zip(*chosen, strict=True)] == expected
    assert (np.diff(aligned.source_N) > 0).all() and (np.diff(aligned.target_N) > 0).all()
    reverse = aligned.reversed(a.num_tokens, b.num_tokens)
    assert reverse.coverage == pytest.approx(len(expected) / max(1, b.num_tokens))


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents=st.lists(texts, min_size=1, max_size=4))
@example(documents=["".join(PIECES), " ".join(PIECES), "\n".join(reversed(PIECES))])
def test_pairs_are_all_tokens_that_end_at_the_same_character(names: tuple[str, str], documents: list[str]) -> None:
    check(names, documents, (WIDE, WIDE))


@pytest.mark.parametrize(
    "names", [("gpt2", "stories260K"), ("zoo/gemma", "pythia"), ("phi-2", "zoo/gpt2")], ids="-".join
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents=st.lists(texts, min_size=1, max_size=4), contexts=st.tuples(st.integers(8, 40), st.integers(8, 40)))
def test_documents_in_pieces_have_the_same_pairs(
    names: tuple[str, str], documents: list[str], contexts: tuple[int, int]
) -> None:
    check(names, documents, contexts)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents=st.lists(texts, min_size=1, max_size=4))
def test_a_tokenizer_meets_itself_at_every_end(name: str, documents: list[str]) -> None:
    check((name, name), documents, (WIDE, 24))


# ---- by hand


def written(names: tuple[str, str], text: str) -> list[tuple[str, str, bool]]:
    """The texts of aligned tokens, and whether they are the same."""
    a, b = (collect_rows([Document(text)], tokenizer(name), WIDE) for name in names)
    found = align_ends(a, b)
    spans = zip(pick(a, found.index_a), pick(b, found.index_b), found.strict.tolist(), strict=True)
    return [(text[x.start : x.end], text[y.start : y.end], same) for (_, x), (_, y), same in spans]


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        # prefix spaces within a token, and as one of their own
        (("gpt2", "pythia"), " cats", [(" cats", " cats", True)]),
        (("gpt2", "stories260K"), "a cat", [("a", "a", True), (" cat", "at", False)]),
        (
            ("gpt2", "pythia"),
            "  x\n\ny",
            [(" x", "x", False), ("\n", "\n", True), ("\n", "\n", True), ("y", "y", True)],
        ),
        # whole numbers, pairs of digits, and single ones
        (("gpt2", "stories260K"), "b 1234", [("b", "b", True), (" 12", "2", False), ("34", "4", False)]),
        # one token, and the four bytes of it, of which the last counts; two bytes and three, the first of which has the space
        (("gpt2", "stories260K"), "a 🙂!", [("a", "a", True), (" 🙂", "🙂", False), ("!", "!", True)]),
        (("phi-2", "zoo/gemma"), "é 漢", [("é", "é", True), ("漢", "漢", True)]),
        # composed to é by pythia, so it ends behind the accent, and not where the other's bare e does
        (("gpt2", "pythia"), "a e\u0301.", [("a", "a", True), ("\u0301", " e\u0301", False), (".", ".", True)]),
        (("pythia", "gpt2"), "e\u0301", [("e\u0301", "\u0301", False)]),
        # special for both, or only text for one of them
        (("gpt2", "pythia"), "a<|endoftext|>b", [("a", "a", True), ("b", "b", True)]),
        (("gpt2", "stories260K"), "<s>hi</s>", [("hi", "i", False)]),
    ],
)
def test_pairs_that_are_known(names: tuple[str, str], text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert written(names, text) == expected
