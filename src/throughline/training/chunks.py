"""Activations in shuffled chunks: each is filled from the source, trained on in random order once or more, then replaced.

Which tokens a chunk holds and in which order they are drawn depends only on its number and on where in the source it begins,
so training continues at any chunk without a stored buffer: the chunk is made again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.training.sources import ActivationSource

MEMORY_BYTES = 2**30
MOST_TOKENS = 2**16
FEWEST_BATCHES = 4


class Cursor(NamedTuple):
    """Where a chunk begins: its number, the source's batch, and how many tokens of that batch are used up."""

    chunk: int = 0
    batch: int = 0
    used: int = 0


START = Cursor()


class Chunk(NamedTuple):
    """Activations, the order in which their tokens are drawn (each once a pass), and where the next chunk begins."""

    x_LCD: Float[Tensor, "L C D"]
    order_C: Int[Tensor, "draws"]  # C times the number of passes
    following: Cursor


def read_chunks(
    source: ActivationSource,
    batch_tokens: int,
    total_tokens: int,
    depth: int,
    seed: int,
    cursor: Cursor = START,
    passes: int = 1,
) -> Iterator[Chunk]:
    """Chunks from `cursor` on, whole batches of training each; the tokens left over at the end of the source are dropped.

    A chunk's size is chosen for all `depth` layers of a model, so that a layer sees the same whichever others are trained
    with it. The memory of a chunk is used again for the next one. Chunks are bfloat16 where the source is, else float32.
    """
    x_LCD = torch.empty(0, 0, 0)
    batch, used = cursor.batch, cursor.used
    pieces, piece = source.batches(batch), None
    for number in range(cursor.chunk, 2**62):
        filled = 0
        while not x_LCD.numel() or filled < x_LCD.shape[1]:
            if piece is None:
                piece = next(pieces, None)
            if piece is None:
                break
            if not x_LCD.numel():
                L, _, D = piece.shape
                dtype = torch.bfloat16 if piece.dtype == torch.bfloat16 else torch.float32
                x_LCD = piece.new_empty(L, chunk_tokens(D, batch_tokens, total_tokens, depth), D, dtype=dtype)
            taken = min(piece.shape[1] - used, x_LCD.shape[1] - filled)
            x_LCD[:, filled : filled + taken] = piece[:, used : used + taken]
            filled, used = filled + taken, used + taken
            if used == piece.shape[1]:
                piece, batch, used = None, batch + 1, 0
        filled -= filled % batch_tokens
        if not filled:
            return
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        orders = [torch.randperm(filled, generator=generator) for _ in range(passes)]
        yield Chunk(x_LCD[:, :filled], torch.cat(orders), Cursor(number + 1, batch, used))


def chunk_tokens(d_model: int, batch_tokens: int, total_tokens: int, depth: int) -> int:
    """Tokens of a chunk: as many as memory allows, in chunks of about the same size, so that the last is mixed as well."""
    most = max(FEWEST_BATCHES * batch_tokens, min(MOST_TOKENS, MEMORY_BYTES // (4 * depth * d_model)))
    num_chunks = max(1, -(-total_tokens // most))
    return max(1, -(-total_tokens // (num_chunks * batch_tokens))) * batch_tokens
