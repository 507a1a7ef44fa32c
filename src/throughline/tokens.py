"""Documents to rows of tokens, each with the characters it covers, and the alignment of two tokenizers' rows.

A document becomes one or more pieces of at most `context` tokens; pieces are packed into rows without being split. Positions
count from the start of a piece and attention is to stay within it, so a document gets the activations it would have alone.
Offsets count characters of the whole document. A leading space may belong to a token or to none, depending on the tokenizer,
so tokens of different tokenizers are matched where they end.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from throughline.errors import InputError
from throughline.records import TOKEN_KINDS, Document, Token

if TYPE_CHECKING:
    import transformers

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"

BATCH_DOCUMENTS = 256  # tokenized in one call
SPARE_ROWS = 32  # kept open beyond a batch, so that short pieces find room
PIECE_ARRAYS = ("ids", "starts", "ends", "special", "answers", "kinds")
PADDING: dict[str, tuple[Any, Any]] = {
    "ids": (np.int64, 0),
    "positions": (np.int64, 0),
    "pieces": (np.int32, -1),
    "documents": (np.int64, -1),
    "starts": (np.int32, 0),
    "ends": (np.int32, 0),
    "special": (np.bool_, True),
    "answers": (np.bool_, False),
    "kinds": (np.int8, -1),
}


@dataclass(frozen=True)
class Piece:
    """At most `context` tokens of one document; arrays [T] as in `TokenRows`."""

    document: int
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    special: np.ndarray
    answers: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class TokenRows:
    """Rows of packed pieces. Padding is special, belongs to no piece and no document (-1), and has id 0."""

    ids: Int64[np.ndarray, "R T"]
    positions: Int64[np.ndarray, "R T"]  # within the piece
    pieces: Int32[np.ndarray, "R T"]  # 0, 1, … within this batch
    documents: Int64[np.ndarray, "R T"]  # number of the document in the order given
    starts: Int32[np.ndarray, "R T"]  # characters of the document's text; special tokens have 0, 0
    ends: Int32[np.ndarray, "R T"]
    special: Bool[np.ndarray, "R T"]  # a special token or a sink that is left out, or padding
    # of the answer, or the end of text after it, and not first in its piece: its prediction counts
    answers: Bool[np.ndarray, "R T"]
    kinds: Int8[np.ndarray, "R T"]  # index into TOKEN_KINDS; -1 where `special`

    @property
    def num_rows(self) -> int:
        """Rows R."""
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """Columns T."""
        return self.ids.shape[1]

    @property
    def keep(self) -> Bool[np.ndarray, "R T"]:
        """Tokens that count: neither padding nor a special token that is left out."""
        return ~self.special

    @property
    def num_tokens(self) -> int:
        """How many tokens count."""
        return int(self.keep.sum())

    def select(self, rows: np.ndarray | slice | Sequence[int]) -> "TokenRows":
        """The chosen rows, their pieces numbered anew from 0."""
        chosen = self._map(lambda name, array: array[rows])
        numbers, pieces = np.unique(chosen.pieces, return_inverse=True)
        padded = int(numbers.size > 0 and numbers[0] < 0)
        renumbered = (pieces.reshape(chosen.pieces.shape) - padded).astype(np.int32)
        return chosen._map(lambda name, array: renumbered if name == "pieces" else array)

    def batches(self, num_rows: int) -> Iterator["TokenRows"]:
        """At most `num_rows` rows at a time, in order, without columns on the right that are all padding."""
        for start in range(0, self.num_rows, num_rows):
            batch = self.select(slice(start, start + num_rows))
            used = np.flatnonzero((batch.pieces >= 0).any(axis=0))
            width = int(used[-1]) + 1 if used.size else 0
            yield batch._map(lambda name, array, width=width: array[:, :width])

    def without(self, left_out_N: Bool[np.ndarray, "N"]) -> "TokenRows":
        """The same rows, of whose kept tokens (row by row) some do not count."""
        if not left_out_N.any():
            return self
        special, kinds = self.special.copy(), self.kinds.copy()
        places = np.flatnonzero(self.keep)[left_out_N]
        special.flat[places], kinds.flat[places] = True, -1
        return replace(self, special=special, kinds=kinds)

    @staticmethod
    def concatenate(parts: Sequence["TokenRows"]) -> "TokenRows":
        """All rows of all parts below one another, as wide as the widest; pieces are numbered on from part to part."""
        out = TokenRows.padding(sum(p.num_rows for p in parts), max((p.width for p in parts), default=0))
        row = piece = 0
        for part in parts:
            here = np.s_[row : row + part.num_rows, : part.width]
            for name in PADDING:
                getattr(out, name)[here] = getattr(part, name)
            out.pieces[here] += np.where(part.pieces >= 0, piece, 0).astype(np.int32)
            row += part.num_rows
            piece += int(part.pieces.max(initial=-1)) + 1
        return out

    @staticmethod
    def padding(num_rows: int, width: int) -> "TokenRows":
        """Rows without a token, to be filled."""
        return TokenRows(**{name: np.full((num_rows, width), fill, dtype) for name, (dtype, fill) in PADDING.items()})

    def _map(self, change: Callable[..., np.ndarray]) -> "TokenRows":
        return TokenRows(**{f.name: change(f.name, getattr(self, f.name)) for f in fields(self)})


def open_tokenizer(path: str, revision: str | None = None) -> Tokenizer:
    """The fast tokenizer of a hub id, a local folder or zoo/NAME. Raises InputError if there is none; runs no remote code."""
    from transformers import AutoTokenizer

    from throughline.zoo import resolve_path

    found = str(resolve_path(path))
    if found.startswith((".", "/", "~")) and not Path(found).expanduser().exists():
        raise InputError(f"tokenizer folder {path} does not exist; expected a folder with tokenizer.json, or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(found).expanduser()) if found.startswith("~") else found,
            revision=revision or "main",
            use_fast=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the hub's client, the parser and their dependencies have many
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise InputError(
            f"no tokenizer found for {path}{at}: {reason}; expected a hub id, a folder with tokenizer.json, or zoo/NAME"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {path} is a {type(tokenizer).__name__}, which cannot say what characters a token covers; "
            "expected a fast one (a folder with tokenizer.json)"
        )
    return tokenizer


def encode_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context: int,
    keep_special_tokens: bool = False,
) -> Iterator[Piece]:
    """Pieces of at most `context` tokens, document after document, the tokenizer's end-of-text token after each document.

    A longer document is cut, never within the bytes of one character if that can be helped; the tokenizer's leading special
    tokens stand in front of every piece, nothing is dropped. Special tokens written out in a text are special too, except the
    unknown token. With `keep_special_tokens` they count (special is False, kind "other"). Raises InputError if the context
    has no room beside the leading special tokens.
    """
    source, number = iter(documents), 0
    special_ids = _special_ids(tokenizer)
    while batch := list(islice(source, BATCH_DOCUMENTS)):
        encoded = _tokenize(tokenizer, [d.text for d in batch])
        for document, ids, offsets, added in zip(batch, *encoded, strict=True):
            end_of_text = tokenizer.eos_token_id
            if end_of_text is not None and not (added and added[-1] and ids[-1] == end_of_text and not all(added)):
                ids, offsets, added = [*ids, end_of_text], [*offsets, (0, 0)], [*added, 1]
            special = [bool(a) or i in special_ids for i, a in zip(ids, added, strict=True)]
            whole = _describe(document, number, ids, offsets, special)
            yield from _cut(whole, added, context, keep_special_tokens)
            number += 1


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[list, list, list]:
    """Ids, character offsets, and 1 where the tokenizer itself added the token; one list per text."""
    encoded = tokenizer(
        texts,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,  # no warning for a text longer than the model's context: it is cut afterwards
    )
    offsets = [_cover_composed(text, spans) for text, spans in zip(texts, encoded["offset_mapping"], strict=True)]  # type: ignore[arg-type]
    found: Any = (encoded["input_ids"], offsets, encoded["special_tokens_mask"])
    for ids, spans, added in zip(*found, strict=True):
        if len(ids) > 1 and added[0] and not added[1] and ids[0] == ids[1]:  # a text that has BOS gets no second one
            del ids[1], spans[1], added[1]
    return found


def _cover_composed(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """`spans` in which characters that no token covers belong to the token before them, spaces excepted.

    A tokenizer that composes characters first (e and a combining accent to é) says only the first of them.
    """
    if unicodedata.is_normalized("NFC", text):
        return spans
    covered = {character for start, end in spans for character in range(start, end)}

    def last_end(end: int) -> int:
        while end < len(text) and end not in covered and not text[end].isspace():
            end += 1
        return end

    return [(start, last_end(end)) if end > start else (start, end) for start, end in spans]


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that stand for no text. The unknown token stands for some, unless it has another office too."""
    marked: set[Any] = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown: Any = tokenizer.unk_token_id
    offices: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return (marked | set(tokenizer.all_special_ids)) - {unknown} | set(offices) - {None}


def _describe(document: Document, number: int, ids: list[int], offsets: list, special: list[bool]) -> Piece:
    """The whole document as one piece, special tokens marked and without characters."""
    text = document.text
    spans = [(0, 0) if s else span for s, span in zip(special, offsets, strict=True)]
    starts, ends = np.array(spans, dtype=np.int32).reshape(-1, 2).T
    kinds = [-1 if s else kind_of_text(text[a:b]) for s, (a, b) in zip(special, spans, strict=True)]
    special_T = np.array(special, dtype=bool)
    answers = np.zeros(len(ids), dtype=bool)
    if document.answer_start is not None:
        answers = ~special_T & (ends > document.answer_start)
        answers[-1:] |= special_T[-1:]  # the end of the text is part of the answer
    return Piece(
        number, np.array(ids, dtype=np.int64), starts, ends, special_T, answers, np.array(kinds, dtype=np.int8)
    )


@lru_cache(maxsize=1 << 17)
def kind_of_text(characters: str) -> int:
    """Index into TOKEN_KINDS for the characters of a token. Combining marks are letters here, as the scripts use them."""
    body = characters.lstrip()
    classes = {"L" if c in "'’-" else unicodedata.category(c)[0] for c in body}
    if not body:
        kind = "space"
    elif body.isdigit():
        kind = "number"
    elif classes <= {"L", "M"} and any(unicodedata.category(c)[0] in "LM" for c in body):
        kind = "word"
    elif not any(c.isalnum() or unicodedata.category(c)[0] == "M" for c in body):
        kind = "punctuation"
    else:
        kind = "other"
    return TOKEN_KINDS.index(kind)


def _cut(whole: Piece, added: list[int], context: int, keep_special_tokens: bool) -> Iterator[Piece]:
    """The document in pieces of at most `context` tokens, its leading special tokens before each."""
    length = len(whole.ids)
    leading = next((i for i, by_tokenizer in enumerate(added) if not by_tokenizer), max(length - 1, 0))
    if context <= leading:
        raise InputError(
            f"data.context should exceed the tokenizer's {leading} leading special tokens, found {context}"
        )
    start = leading if length > context else 0
    while start < length:
        stop = min(start + context - (leading if start else 0), length)
        end = stop
        while start < end < length and whole.ends[end] == whole.ends[end - 1] and not whole.special[end]:
            end -= 1  # the tokens of one character stay together
        stop = end if end > start else stop
        index = [*range(leading if start else 0), *range(start, stop)]
        arrays = {name: getattr(whole, name)[index] for name in PIECE_ARRAYS}
        arrays["answers"][0] = False  # nothing before it in its piece predicts it
        if keep_special_tokens:
            arrays["kinds"][arrays["special"]] = TOKEN_KINDS.index("other")
            arrays["special"][:] = False
        yield Piece(whole.document, **arrays)
        start = stop


def pack(pieces: Iterable[Piece], context: int, num_rows: int) -> Iterator[TokenRows]:
    """Batches of `num_rows` rows of width `context` (the last batch may be smaller), no piece split; deterministic.

    First fit: a piece goes into the first open row with room; when none has, the fullest `num_rows` rows are closed.
    """
    rows: list[list[Piece]] = [[] for _ in range(num_rows + SPARE_ROWS)]
    room = np.full(len(rows), context)
    for piece in pieces:
        size = len(piece.ids)
        assert size <= context, f"a piece of {size} tokens does not fit into a context of {context}"
        fitting = room >= size
        if not fitting.any():
            closed = np.sort(np.argsort(room, kind="stable")[:num_rows])
            yield _lay_out([rows[i] for i in closed], context)
            closing = set(closed.tolist())
            rows = [row for i, row in enumerate(rows) if i not in closing] + [[] for _ in closing]
            room = np.append(np.delete(room, closed), np.full(num_rows, context))
            fitting = room >= size
        first = int(np.argmax(fitting))
        rows[first].append(piece)
        room[first] -= size
    rows = [row for row in rows if row]
    for start in range(0, len(rows), num_rows):
        yield _lay_out(rows[start : start + num_rows], context)


def _lay_out(rows: list[list[Piece]], context: int) -> TokenRows:
    out = TokenRows.padding(len(rows), context)
    number = 0
    for r, row in enumerate(rows):
        column = 0
        for piece in row:
            here = np.s_[r, column : column + len(piece.ids)]
            for name in PIECE_ARRAYS:
                getattr(out, name)[here] = getattr(piece, name)
            out.positions[here] = np.arange(len(piece.ids))
            out.pieces[here] = number
            out.documents[here] = piece.document
            column += len(piece.ids)
            number += 1
    return out


def stream_rows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context: int,
    num_rows: int,
    keep_special_tokens: bool = False,
) -> Iterator[TokenRows]:
    """Batches of packed rows [num_rows, context], read as they are asked for."""
    return pack(encode_documents(documents, tokenizer, context, keep_special_tokens), context, num_rows)


def collect_rows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    context: int,
    keep_special_tokens: bool = False,
) -> TokenRows:
    """All documents as one batch of rows, at most `context` wide."""
    return TokenRows.concatenate(list(stream_rows(documents, tokenizer, context, 64, keep_special_tokens)))


def take_documents(
    documents: Iterator[Document], tokenizer: Tokenizer, num_tokens: int, context: int
) -> list[Document]:
    """The fewest first documents with at least `num_tokens` tokens that are not special; all, if there are too few.

    Reads no further than needed: no text has more tokens than bytes (and one for a space some tokenizers put in front), so
    the documents of as many bytes as tokens are missing can be tokenized together.
    """
    taken: list[Document] = []
    missing = num_tokens
    while missing > 0:
        batch: list[Document] = []
        size = 0
        while size < missing and len(batch) < BATCH_DOCUMENTS and (document := next(documents, None)) is not None:
            batch.append(document)
            size += len(document.text.encode()) + 1
        if not batch:
            break
        counts = np.zeros(len(batch), dtype=np.int64)
        for piece in encode_documents(batch, tokenizer, context):
            counts[piece.document] += int((~piece.special).sum())
        enough = int(np.searchsorted(np.cumsum(counts), missing)) + 1
        taken += batch[:enough]
        missing -= int(counts[:enough].sum())
    return taken


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[Token]:
    """The tokens of a prompt as the model sees it, without a closing end-of-text token.

    Special tokens have start = end = 0 and their name as text; a token that shares a character with a neighbour has its
    vocabulary entry as text. Raises InputError for a prompt without a token of its own, or with half a surrogate pair.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(f"prompt {prompt!r} holds half a surrogate pair, which no text has; type it anew")
    (ids,), (offsets,), (added,) = _tokenize(tokenizer, [prompt])
    special_ids = _special_ids(tokenizer)
    special = [bool(a) or i in special_ids for i, a in zip(ids, added, strict=True)]
    if all(special):
        raise InputError(
            f"prompt {prompt!r} has no tokens but special ones; expected some text, such as 'What is 15 + 27?'"
        )
    length = len(ids) - (added[::-1].index(0) if added[-1] else 0)  # what the tokenizer adds in front stays
    names: list[str] = tokenizer.convert_ids_to_tokens(ids)  # type: ignore[assignment]
    spans = [(0, 0) if s else tuple(span) for s, span in zip(special, offsets, strict=True)]
    tokens = []
    for i in range(length):
        start, end = spans[i]
        before, after = spans[i - 1][1] if i else 0, spans[i + 1][0] if i + 1 < length and not special[i + 1] else end
        shared = start < before or after < end
        text = names[i] if special[i] or shared or start == end else prompt[start:end]
        tokens.append(Token(ids[i], text, start, end))
    return tokens


class Alignment(NamedTuple):
    """Tokens of two batches that end at the same character of the same document, in order of document and character."""

    index_a: np.ndarray  # int64 [N], into the flattened [R*T] of a
    index_b: np.ndarray  # int64 [N], into the flattened [R*T] of b
    coverage: float  # share of a's tokens that count which have a partner
    strict: np.ndarray  # bool [N], True where the tokens also start at the same character


def align_ends(a: TokenRows, b: TokenRows) -> Alignment:
    """Pairs of tokens of `a` and `b`, made from the same documents in the same order by two tokenizers.

    Of several tokens that end at one character (the bytes of an emoji), the last stands for all. Special tokens have none.
    """
    (keys_a, where_a), (keys_b, where_b) = _last_ends(a), _last_ends(b)
    _, in_a, in_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    index_a, index_b = where_a[in_a], where_b[in_b]
    strict = a.starts.ravel()[index_a] == b.starts.ravel()[index_b]
    return Alignment(index_a, index_b, index_a.size / max(a.num_tokens, 1), strict)


def _last_ends(rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
    """Document and end as one key, each once and in order, and the flat index of the last token with that key."""
    flat = np.flatnonzero((rows.keep & (rows.ends > rows.starts)).ravel())[::-1]
    keys = rows.documents.ravel()[flat] * 2**32 + rows.ends.ravel()[flat]
    unique, first = np.unique(keys, return_index=True)
    return unique, flat[first]
