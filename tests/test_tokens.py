"""Documents to rows of tokens: nothing lost, every offset true, and two tokenizers matched at the characters where they meet."""

import io
import logging
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from throughline.errors import InputError
from throughline.records import TOKEN_KINDS, Document
from throughline.tokens import (
    Piece,
    TokenRows,
    align_ends,
    collect_rows,
    encode_documents,
    encode_prompt,
    open_tokenizer,
    pack,
    stream_rows,
    take_documents,
)
from throughline.zoo.texts import sample_problems
from throughline.zoo.vocabularies import build_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = {n: SHARED / "tokenizers" / n for n in ("gpt2", "pythia", "phi-2")} | {"stories260K": SHARED / "stories260K"}
ZOO = ("zoo/gpt2", "zoo/phi", "zoo/pythia", "zoo/gemma")
EVERY = [*ZOO, *REAL]
AWKWARD = [
    "🙂👩‍👩‍👧",
    "né e\u0301",
    "漢字かな",
    "שלום",
    "مرحبا ﷺ",
    "हिन्दी",
    "don't",
    " 15 + 27?",
    "\n\n",
    "  ",
    "▁",
    "<s>",
    "ﬁ",
]
# characters one by one, and pieces that tokenizers are known to stumble over
texts = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), max_size=8), st.sampled_from(AWKWARD)), max_size=12
).map("".join)


@cache
def tokenizer(name: str) -> Any:
    if name.startswith("zoo/"):
        return build_tokenizer(name.removeprefix("zoo/"))
    if not REAL[name].exists():
        pytest.skip("the shared data is not beside this checkout; the zoo's tokenizers stand under the same law")
    return open_tokenizer(str(REAL[name]))


def plain(tok: Any, text: str) -> list[int]:
    """The tokenizer's own ids of a text without its special ones: the slow exact way."""
    special = set(tok.all_special_ids) | {i for i, t in tok.added_tokens_decoder.items() if t.special}
    return [i for i in tok(text, add_special_tokens=False, verbose=False)["input_ids"] if i not in special]


def pieces_of(rows: TokenRows, document: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row and columns of every piece of a document, in the order of its text."""
    found = []
    for piece in np.unique(rows.pieces[rows.documents == document]):
        where = np.nonzero(rows.pieces == piece)
        end = rows.ends[where].max()
        found.append((end or np.inf, where))  # an end of text alone comes last
    yield from (where for _, where in sorted(found, key=lambda f: f[0]))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents=st.lists(texts, min_size=1, max_size=6), context=st.integers(8, 40), num_rows=st.integers(1, 4))
def test_packing_loses_nothing(name: str, documents: list[str], context: int, num_rows: int) -> None:
    tok = tokenizer(name)
    batches = list(stream_rows([Document(t) for t in documents], tok, context, num_rows))
    assert all(b.num_rows == num_rows for b in batches[:-1])
    rows = TokenRows.concatenate(batches)
    assert rows.width == context
    for number, text in enumerate(documents):
        where = list(pieces_of(rows, number))
        ids = np.concatenate([rows.ids[w][rows.keep[w]] for w in where])
        starts, ends = (np.concatenate([array[w][rows.keep[w]] for w in where]) for array in (rows.starts, rows.ends))
        assert ids.tolist() == plain(tok, text)
        assert (starts >= 0).all()
        assert (ends <= len(text)).all()
        assert (starts <= ends).all()
        assert (np.diff(ends) >= 0).all()
        assert (np.diff(starts) >= 0).all()
        assert rows.ids[where[-1]][-1] == tok.eos_token_id
        for row, columns in where:
            assert len(set(row)) == 1
            assert rows.positions[row, columns].tolist() == list(range(len(columns)))
            if tok.bos_token == "<bos>":
                assert rows.ids[row[0], columns[0]] == tok.bos_token_id
    padding = rows.pieces < 0
    assert (rows.special[padding]).all()
    assert (rows.documents[padding] == -1).all()
    assert not rows.answers[padding].any()
    assert ((rows.kinds == -1) == rows.special).all()
    assert sorted(set(rows.pieces[~padding].tolist())) == list(range(rows.pieces.max() + 1))


def assert_aligned(a: TokenRows, b: TokenRows) -> None:
    found = align_ends(a, b)
    for name in ("documents", "ends"):
        assert (getattr(a, name).ravel()[found.index_a] == getattr(b, name).ravel()[found.index_b]).all()
    same = a.starts.ravel()[found.index_a] == b.starts.ravel()[found.index_b]
    assert (found.strict == same).all()
    assert a.keep.ravel()[found.index_a].all()
    assert b.keep.ravel()[found.index_b].all()
    keys = [
        {
            (d, e)
            for d, e, s, k in zip(*(x.ravel().tolist() for x in (r.documents, r.ends, r.starts, r.keep)), strict=True)
            if k and e > s
        }
        for r in (a, b)
    ]
    assert len(found.index_a) == len(keys[0] & keys[1])
    assert found.coverage == pytest.approx(len(keys[0] & keys[1]) / max(a.num_tokens, 1))


@pytest.mark.parametrize(
    "pair", [("zoo/gpt2", "zoo/pythia"), ("zoo/gemma", "zoo/phi"), ("gpt2", "pythia"), ("stories260K", "phi-2")]
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents=st.lists(texts, min_size=1, max_size=5), contexts=st.tuples(st.integers(8, 40), st.integers(8, 40)))
def test_aligned_tokens_end_together(pair: tuple[str, str], documents: list[str], contexts: tuple[int, int]) -> None:
    a, b = (
        collect_rows([Document(t) for t in documents], tokenizer(n), c) for n, c in zip(pair, contexts, strict=True)
    )
    assert_aligned(a, b)
    assert_aligned(b, a)


@pytest.mark.parametrize("name", EVERY)
def test_aligned_with_itself_all_is_covered_but_earlier_members_of_a_group(name: str) -> None:
    documents = [Document(t) for t in ["What is 15 + 27? 42", "né 漢字 🙂 dé", *AWKWARD]]
    rows = collect_rows(documents, tokenizer(name), 16)
    found = align_ends(rows, rows)
    assert (found.index_a == found.index_b).all()
    assert found.strict.all()
    document, end = rows.documents.ravel(), rows.ends.ravel()
    left_out = np.setdiff1d(np.flatnonzero(rows.keep), found.index_a)
    for index in left_out:  # a later token of its row ends at the same character, or it has no characters
        empty = rows.starts.ravel()[index] == end[index]
        assert empty or (document[index + 1], end[index + 1]) == (document[index], end[index])


def test_numbers_align_character_by_character() -> None:
    text = "What is 15 + 27? 42"
    a, b = (collect_rows([Document(text)], tokenizer(n), 32) for n in ("zoo/gpt2", "zoo/pythia"))
    found = align_ends(a, b)
    ends = a.ends.ravel()[found.index_a].tolist()
    assert ends == [4, 7, 10, 12, 15, 16, 19]  # What| is| 15| +| 27|?| 42
    written = [
        (text[a.starts.ravel()[i] : a.ends.ravel()[i]], text[b.starts.ravel()[j] : b.ends.ravel()[j]])
        for i, j in zip(found.index_a, found.index_b, strict=True)
    ]
    assert written == [
        ("What", "What"),
        (" is", " is"),
        (" 15", "5"),
        (" +", " +"),
        (" 27", "7"),
        ("?", "?"),
        (" 42", "2"),
    ]
    assert found.strict.tolist() == [True, True, False, True, False, True, False]
    assert found.coverage == 1
    back = align_ends(b, a)
    assert back.coverage == pytest.approx(7 / b.num_tokens)
    assert (back.index_b == found.index_a).all()


def test_spaces_inside_or_outside_a_token_do_not_matter() -> None:
    def one(spans: list[tuple[int, int]]) -> TokenRows:
        starts, ends = np.array(spans, dtype=np.int32).T
        size, no = len(spans), np.zeros(len(spans), dtype=bool)
        return next(pack([Piece(0, np.arange(size), starts, ends, no, no, no.astype(np.int8))], 8, 1))

    found = align_ends(one([(0, 4), (4, 7), (7, 10)]), one([(0, 4), (5, 7), (7, 8), (8, 10), (8, 10)]))
    assert found.index_a.tolist() == [0, 1, 2]
    assert found.index_b.tolist() == [0, 1, 4]
    assert found.strict.tolist() == [True, False, False]


def test_a_document_in_pieces_aligns_with_itself_whole() -> None:
    documents = [Document("Tom has 12 apples and buys 30 more. " * 12 + "né 漢字 🙂" * 5) for _ in range(3)]
    short, long = (collect_rows(documents, tokenizer("zoo/gemma"), c) for c in (16, 1024))
    found, own = align_ends(short, long), align_ends(long, long)
    assert len(found.index_a) == len(own.index_a)
    assert found.strict.all()
    assert (short.ids.ravel()[found.index_a] == long.ids.ravel()[found.index_b]).all()


def test_many_tokens_align_quickly_and_exactly() -> None:
    documents = list(islice(sample_problems("train", 0), 3000))
    a, b = (collect_rows(documents, tokenizer(n), 64) for n in ("zoo/phi", "zoo/gemma"))
    assert_aligned(a, b)
    assert align_ends(a, b).coverage > 0.9


@pytest.mark.parametrize("name", EVERY)
def test_the_characters_of_the_answer_are_marked(name: str) -> None:
    for document in islice(sample_problems("train", 1), 40):
        rows = collect_rows([document], tokenizer(name), 128)
        assert document.answer_start is not None
        own = rows.answers & rows.keep
        expected = rows.keep & (rows.ends > document.answer_start)
        assert (own == expected).all()
        written = document.text[rows.starts[own].min() : rows.ends[own].max()]
        assert written.strip() == document.text[document.answer_start :].strip()
        (closing,) = np.flatnonzero(rows.answers & rows.special)  # the end of text after it
        assert rows.ids.ravel()[closing] == tokenizer(name).eos_token_id
    rows = collect_rows([Document("no answer here")], tokenizer(name), 128)
    assert not rows.answers.any()


def test_the_first_token_of_a_piece_predicts_from_nothing_and_is_no_answer() -> None:
    rows = collect_rows([Document("15 + 27 = 42 and so on", answer_start=0)], tokenizer("zoo/pythia"), 4)
    assert rows.num_rows > 2
    assert not rows.answers[:, 0].any()
    assert rows.answers[:, 1:][rows.pieces[:, 1:] >= 0].all()


@pytest.mark.parametrize("keep", [False, True])
def test_special_tokens_are_left_out_unless_kept(keep: bool) -> None:
    tok = tokenizer("zoo/gemma")
    rows = collect_rows([Document("a <eos> b"), Document("")], tok, 16, keep_special_tokens=keep)
    special = np.isin(rows.ids, [tok.bos_token_id, tok.eos_token_id]) & (rows.pieces >= 0)
    assert special.sum() == 5
    assert (rows.special[special] == (not keep)).all()
    assert not rows.starts[special].any()
    assert not rows.ends[special].any()
    assert (rows.kinds[special] == (TOKEN_KINDS.index("other") if keep else -1)).all()
    assert rows.special[rows.pieces < 0].all()
    assert not np.isin(np.flatnonzero(special), align_ends(rows, rows).index_a).any()


def test_the_unknown_token_stands_for_text() -> None:
    tok = tokenizer("zoo/gemma")
    rows = collect_rows([Document("a <unk> b")], tok, 16)
    (unknown,) = np.argwhere(rows.ids == tok.unk_token_id)
    assert rows.keep[tuple(unknown)]
    assert (rows.starts[tuple(unknown)], rows.ends[tuple(unknown)]) == (2, 7)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 42", "number"), ("٤", "number"), (" apples", "word"), ("'s", "word"), ("né", "word"), ("हि", "word"), ("漢", "word"),
        ("?", "punctuation"), (" +", "punctuation"), ("-", "punctuation"), ("🙂", "punctuation"), (" ", "space"), ("\n\n", "space"),
        ("a1", "other"), ("x=", "other"),
    ],
)  # fmt: skip
def test_the_kind_of_a_token_is_that_of_its_characters(text: str, kind: str) -> None:
    from throughline.tokens import kind_of_text

    assert TOKEN_KINDS[kind_of_text(text)] == kind


def test_the_characters_of_one_character_stay_in_one_piece() -> None:
    tok = tokenizer("zoo/gemma")  # four byte tokens each
    for piece in encode_documents([Document("🙂🙃😀😁🤖")], tok, 7):
        spans = list(zip(piece.starts[~piece.special].tolist(), piece.ends[~piece.special].tolist(), strict=True))
        assert all(spans.count(s) == 4 for s in spans)
    sizes = [len(p.ids) for p in encode_documents([Document("🙂🙂")], tok, 3)]  # no room for four: cut all the same
    assert max(sizes) <= 3
    assert sum(sizes) - len(sizes) == 9


def test_long_texts_warn_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        tok = build_tokenizer("pythia")  # a fresh one: each warns once at most
        collect_rows([Document("What is 15 + 27? " * 100)], tok, 32)
        encode_prompt(tok, "What is 15 + 27? " * 100)
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == ""
    assert capfd.readouterr().err == ""


def test_rows_are_filled_and_the_same_each_time() -> None:
    documents = list(islice(sample_problems("train", 2), 400))
    first, second = (list(stream_rows(documents, tokenizer("zoo/pythia"), 64, 8)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert (one.ids == other.ids).all()
        assert (one.documents == other.documents).all()
    rows = TokenRows.concatenate(first)
    assert (rows.pieces >= 0).mean() > 0.85
    assert sorted(set(rows.documents.ravel().tolist()) - {-1}) == list(range(400))


def test_rows_can_be_selected_split_and_put_together() -> None:
    documents = list(islice(sample_problems("heldout", 0), 90))
    rows = collect_rows(documents, tokenizer("zoo/gpt2"), 64)
    parts = list(rows.batches(7))
    assert [p.num_rows for p in parts[:-1]] == [7] * (len(parts) - 1)
    assert sum(p.num_tokens for p in parts) == rows.num_tokens == int(rows.keep.sum())
    for part in parts:
        assert (part.pieces[:, -1] >= 0).any()
        assert sorted(set(part.pieces.ravel().tolist()) - {-1}) == list(range(part.pieces.max() + 1))
    whole = TokenRows.concatenate(parts)
    for name in ("ids", "positions", "pieces", "documents", "starts", "ends", "special", "answers", "kinds"):
        expected = getattr(rows, name)[:, : whole.width]
        assert (getattr(whole, name) == expected).all(), name
        assert getattr(whole, name).dtype == getattr(rows, name).dtype
    chosen = rows.select([3, 1])
    assert (chosen.ids == rows.ids[[3, 1]]).all()
    assert sorted(set(chosen.pieces.ravel().tolist()) - {-1}) == list(range(chosen.pieces.max() + 1))


def test_no_documents_give_no_rows() -> None:
    rows = collect_rows([], tokenizer("zoo/gpt2"), 16)
    assert (rows.num_rows, rows.num_tokens) == (0, 0)
    assert list(rows.batches(4)) == []
    assert align_ends(rows, rows).coverage == 0


@pytest.mark.parametrize("num_tokens", [0, 1, 20, 21, 500, 5000])
def test_as_few_documents_are_taken_as_do(num_tokens: int) -> None:
    tok = tokenizer("zoo/gemma")
    source = sample_problems("train", 0)
    taken = take_documents(source, tok, num_tokens, 64)
    counts = [len(plain(tok, d.text)) for d in taken]
    assert sum(counts) >= num_tokens
    assert not counts or sum(counts[:-1]) < num_tokens
    untouched = list(islice(sample_problems("train", 0), len(taken) + 1))
    assert taken == untouched[:-1]
    assert next(source) == untouched[-1]  # the source was read no further


def test_a_short_source_is_taken_whole() -> None:
    documents = list(islice(sample_problems("train", 0), 5))
    assert take_documents(iter(documents), tokenizer("zoo/phi"), 10_000, 64) == documents


def test_a_prompt_is_shown_token_by_token() -> None:
    tokens = encode_prompt(tokenizer("zoo/gemma"), "What is 15?")
    assert tokens[0][1:] == ("<bos>", 0, 0)
    assert [t.text for t in tokens[1:]] == ["What", " is", " ", "1", "5", "?"]
    assert "".join("What is 15?"[t.start : t.end] for t in tokens) == "What is 15?"
    assert [t.text for t in encode_prompt(tokenizer("zoo/gpt2"), "What is 15 + 27?")] == [
        "What",
        " is",
        " 15",
        " +",
        " 27",
        "?",
    ]


def test_the_bytes_of_one_character_are_shown_as_the_vocabulary_has_them() -> None:
    assert [t.text for t in encode_prompt(tokenizer("zoo/gemma"), "a🙂")][2:] == [
        "<0xF0>",
        "<0x9F>",
        "<0x99>",
        "<0x82>",
    ]
    for name in ("gpt2", "stories260K"):
        assert len({t.text for t in encode_prompt(tokenizer(name), "🙂")[-2:]}) == 2


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_has_the_tokens_of_a_document(name: str) -> None:
    prompt = "What is 15 + 27? né 漢"
    rows = collect_rows([Document(prompt)], tokenizer(name), 64)
    ids = rows.ids[rows.pieces >= 0].tolist()
    assert [t.id for t in encode_prompt(tokenizer(name), prompt)] == ids[:-1]


@pytest.mark.parametrize("prompt", ["", "<bos>"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="has no tokens but special ones; expected some text"):
        encode_prompt(tokenizer("zoo/gemma"), prompt)
    with pytest.raises(InputError, match="half a surrogate pair"):
        encode_prompt(tokenizer("zoo/gemma"), "a\udce9")


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(
        InputError, match="data.context should exceed the tokenizer's 1 leading special tokens, found 1"
    ):
        list(encode_documents([Document("a")], tokenizer("zoo/gemma"), 1))


def test_a_saved_tokenizer_is_opened(tmp_path: Path) -> None:
    tokenizer("zoo/phi").save_pretrained(tmp_path)
    opened = open_tokenizer(str(tmp_path))
    assert plain(opened, "What is 15?") == plain(tokenizer("zoo/phi"), "What is 15?")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no tokenizer found for .*; expected a hub id, a folder with tokenizer.json"
    ) as caught:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="gone does not exist; expected a folder with tokenizer.json, or a hub id"):
        open_tokenizer(str(tmp_path / "gone"))
    with pytest.raises(InputError, match="zoo/gpt3"):
        open_tokenizer("zoo/gpt3")


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(
        InputError, match="is a Slow, which cannot say what characters a token covers; expected a fast one"
    ):
        open_tokenizer(str(tmp_path))
