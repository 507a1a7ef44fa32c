"""Shuffle activations across documents with bounded memory."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

MEMORY_BYTES = 2**30
MOST_TOKENS = 2**16
FEWEST_BATCHES = 4


class ShuffleBuffer:
    """Batches drawn at random from a buffer that is refilled when half of it is used.

    `fill` must be called before iterating; it makes the first activations available for statistics. Every token of the
    source comes out exactly once; the last, incomplete batch is dropped.
    """

    def __init__(self, source: Iterator[Float[Tensor, "L N D"]], batch_tokens: int, generator: torch.Generator) -> None:
        self._source = source
        self._batch = batch_tokens
        self._generator = generator
        self._content: Tensor | None = None
        self._count = 0

    def fill(self) -> Float[Tensor, "L N D"]:
        """Load activations up to capacity; returns what the buffer holds now."""
        parts = [] if self._content is None else [self._content[:, : self._count]]
        count = self._count
        while not parts or count < self._capacity(parts[0]):
            part = next(self._source, None)
            if part is None:
                break
            parts.append(part)
            count += part.shape[1]
        if not parts:
            return torch.empty(0, 0, 0)
        self._content, self._count = torch.cat(parts, dim=1), count
        return self._content

    def __iter__(self) -> Iterator[Float[Tensor, "L N D"]]:
        while self._content is not None and self._count >= self._batch:
            order = torch.randperm(self._count, generator=self._generator).to(self._content.device)
            shuffled, full = self._content[:, order], self._count >= self._capacity(self._content)
            used = 0
            stop = self._count // 2 if full else self._count
            while used + self._batch <= max(stop, self._batch):
                yield shuffled[:, used : used + self._batch]
                used += self._batch
            self._content, self._count = shuffled[:, used:], self._count - used
            self.fill()

    def _capacity(self, like: Tensor) -> int:
        bytes_per_token = like.shape[0] * like.shape[2] * like.element_size()
        return max(FEWEST_BATCHES * self._batch, min(MOST_TOKENS, MEMORY_BYTES // max(1, bytes_per_token)))
