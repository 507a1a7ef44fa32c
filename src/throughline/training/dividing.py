"""A source whose batches are made by several ranks, each its part, so that no device waits for the language model of another."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from throughline.errors import TrainingError
from throughline.training.ranks import Ranks
from throughline.training.sources import ActivationSource


@runtime_checkable
class DivisibleSource(ActivationSource, Protocol):
    """A source whose batches are costly to make and cheap to leave out."""

    def every(self, step: int, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """Batches number `start`, `start` + `step`, `start` + 2 `step`, …; the others are not made."""
        ...


class DividedSource:
    """A source's batches in their order, each made by one rank and sent to all.

    Of W batches in a row every rank makes one, at the same time; then they say what they have, and each is sent. A rank that
    fails raises its own error, the others a TrainingError with its words.
    """

    def __init__(self, source: DivisibleSource, ranks: Ranks, device: str) -> None:
        self._source, self._ranks, self._device = source, ranks, device

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it."""
        mine = self._source.every(self._ranks.size, start + self._ranks.rank)
        while True:
            batch, fault = _next_of(mine)
            described = None if batch is None else (batch.shape, batch.dtype)
            round_ = self._ranks.gather_objects((described, fault and (str(fault) or type(fault).__name__)))
            if fault:
                raise fault
            for rank, (_, words) in enumerate(round_):
                if words:
                    raise TrainingError(f"rank {rank} of {self._ranks.size} could not make its activations: {words}")
            for rank, (described, _) in enumerate(round_):
                if described is None:
                    return
                if rank == self._ranks.rank:
                    assert batch is not None
                    sent = batch.contiguous()
                else:
                    sent = torch.empty(described[0], dtype=described[1], device=self._device)
                self._ranks.take_(sent, rank)
                yield sent


def _next_of(batches: Iterator[Tensor]) -> tuple[Tensor | None, Exception | None]:
    """The next batch, None after the last, or what went wrong."""
    try:
        return next(batches, None), None
    except Exception as error:
        return None, error
