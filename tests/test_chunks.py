"""Chunks of activations: every token once, and the same chunks from wherever reading begins."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from throughline.training import chunks
from throughline.training.chunks import START, Chunk, Cursor, chunk_tokens, read_chunks

LAYERS = 2


class Numbered:
    """Tokens that say their number, in pieces; layer l says it plus l million. It remembers where it was begun."""

    def __init__(self, num_tokens: int, piece: int) -> None:
        self.num_tokens, self.piece = num_tokens, piece
        self.begun: list[int] = []

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        self.begun.append(start)
        for first in range(start * self.piece, self.num_tokens, self.piece):
            numbers = torch.arange(first, min(first + self.piece, self.num_tokens), dtype=torch.float32)
            yield torch.stack([numbers + 1e6 * layer for layer in range(LAYERS)])[:, :, None]


def read(
    source: Numbered, batch: int, seed: int = 0, cursor: Cursor = START, depth: int = 2, total: int | None = None
) -> list[Chunk]:
    """All chunks from `cursor` on, copied, since their memory is used again."""
    total = source.num_tokens if total is None else total
    return [c._replace(x_LCD=c.x_LCD.clone()) for c in read_chunks(source, batch, total, depth, seed, cursor)]


def drawn(chunk: Chunk) -> Tensor:
    """Numbers of a chunk's tokens in the order in which they are drawn."""
    return chunk.x_LCD[0, chunk.order_C, 0].long()


def same(a: Chunk, b: Chunk) -> bool:
    return torch.equal(a.x_LCD, b.x_LCD) and torch.equal(a.order_C, b.order_C) and a.following == b.following


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 64, 100, 1000, 1023])
@pytest.mark.parametrize("piece", [1, 7, 50, 2000])
def test_every_token_is_drawn_once(monkeypatch, num_tokens, piece):
    monkeypatch.setattr(chunks, "MOST_TOKENS", 128)
    found = read(Numbered(num_tokens, piece), batch=16)
    numbers = torch.cat([drawn(c) for c in found]) if found else torch.empty(0)
    assert sorted(numbers.tolist()) == list(range(num_tokens - num_tokens % 16))
    for chunk in found:
        assert chunk.x_LCD.shape[0] == LAYERS and len(chunk.order_C) == chunk.x_LCD.shape[1]
        assert len(chunk.order_C) % 16 == 0  # whole batches
        assert torch.equal(chunk.x_LCD[1], chunk.x_LCD[0] + 1e6)  # layers keep step
    assert [c.following.chunk for c in found] == list(range(1, len(found) + 1))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 2**20))
def test_chunks_are_of_about_the_same_size(num_batches, batch, most):
    """None exceeds the memory it may have (or four batches) by a whole batch, and the last is smaller by less than one for each."""
    total, d_model, depth = num_batches * batch, 8, 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MEMORY_BYTES", most)
        size = chunk_tokens(d_model, batch, total, depth)
    assert size % batch == 0
    assert size < max(chunks.FEWEST_BATCHES * batch, most // (4 * depth * d_model)) + batch
    num_chunks = -(-total // size)
    last = total - (num_chunks - 1) * size
    assert 0 < last <= size and size - last < num_chunks * batch


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reading_from_any_cursor_gives_the_chunks_of_an_uninterrupted_reading(data):
    num_tokens, batch = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 30))
    piece, most, seed = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 120)), data.draw(st.integers(0, 5))
    source = Numbered(num_tokens, piece)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MOST_TOKENS", most)
        straight = read(source, batch, seed)
        for number, chunk in enumerate(straight):
            source.begun.clear()
            rest = read(source, batch, seed, chunk.following)
            assert len(rest) == len(straight) - number - 1
            assert all(same(a, b) for a, b in zip(rest, straight[number + 1 :], strict=True))
            assert source.begun == [chunk.following.batch]  # what lies before is not read


def test_the_order_depends_on_the_seed_and_the_chunk(monkeypatch):
    monkeypatch.setattr(chunks, "MOST_TOKENS", 128)
    first, again, other = (read(Numbered(512, 30), 16, seed) for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.order_C, b.order_C) for a, b in zip(first, other, strict=True))
    assert not any(torch.equal(a.order_C, b.order_C) for a, b in pairwise(first))
    assert all(torch.equal(a.x_LCD, b.x_LCD) for a, b in zip(first, other, strict=True))  # only the order


def test_batches_mix_the_chunk():
    [chunk] = read(Numbered(2048, 20), 32)
    for numbers in drawn(chunk).split(32):
        assert len((numbers // 20).unique()) > 16  # pieces of 20 tokens each
        assert numbers.max() - numbers.min() > 1000 and (numbers.diff() < 0).any()


def test_a_chunk_is_as_large_for_some_layers_as_for_all(monkeypatch):
    """Its size goes by the model's depth, not by how many layers the source has: a layer sees the same whichever train with it."""
    monkeypatch.setattr(chunks, "MEMORY_BYTES", 4 * 96 * 6)  # 96 tokens of six layers of width 1
    source = Numbered(400, 50)
    both = read(source, 16, depth=6)

    class OneLayer(Numbered):
        def batches(self, start: int = 0) -> Iterator[Tensor]:
            return (piece[:1] for piece in super().batches(start))

    one = read(OneLayer(400, 50), 16, depth=6)
    assert len(both) == len(one) == 5 and {len(c.order_C) for c in both[:-1]} == {80}
    for a, b in zip(both, one, strict=True):
        assert torch.equal(a.x_LCD[:1], b.x_LCD) and torch.equal(a.order_C, b.order_C) and a.following == b.following
    assert len(read(source, 16, depth=2)) < 5  # fewer layers in the model: more tokens fit


def test_no_more_than_a_chunk_is_read_ahead(monkeypatch):
    monkeypatch.setattr(chunks, "MOST_TOKENS", 100)
    taken = 0

    class Counted(Numbered):
        def batches(self, start: int = 0) -> Iterator[Tensor]:
            nonlocal taken
            for piece in super().batches(start):
                taken += piece.shape[1]
                yield piece

    for number, chunk in enumerate(read_chunks(Counted(1000, 10), 20, 1000, 2, 0), 1):
        assert taken == 100 * number == chunk.following.batch * 10


def test_a_chunk_keeps_the_source_s_dtype_and_its_memory_is_used_again():
    class Half(Numbered):
        def batches(self, start: int = 0) -> Iterator[Tensor]:
            return (piece.bfloat16() for piece in super().batches(start))

    places = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MOST_TOKENS", 64)
        for chunk in read_chunks(Half(256, 10), 16, 256, 2, 0):
            assert chunk.x_LCD.dtype == torch.bfloat16
            places.add(chunk.x_LCD.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("passes", [2, 3])
def test_each_pass_draws_every_token_once_in_an_order_of_its_own(monkeypatch, passes):
    monkeypatch.setattr(chunks, "MOST_TOKENS", 128)
    found = list(read_chunks(Numbered(400, 50), 16, 400, 2, 0, passes=passes))
    once = read(Numbered(400, 50), batch=16)
    assert len(found) == len(once)
    for chunk, alone in zip(found, once, strict=True):
        orders = chunk.order_C.view(passes, -1)
        assert torch.equal(orders.sort(1).values, torch.arange(orders.shape[1]).expand(passes, -1))
        assert not torch.equal(orders[0], orders[1])
        assert torch.equal(orders[0], alone.order_C) and chunk.following == alone.following
