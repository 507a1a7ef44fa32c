"""Chunks without attention sinks: at each layer the place of a sink is taken by an ordinary token of the same chunk.

So every layer goes through batches of the same size in the same order, and a token in a thousand, chosen at random, is seen once
more. What a layer's sinks are is settled on the first chunk, before anything else is measured on it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.errors import TrainingError
from throughline.sinks import find_sink_norm, measure_norms
from throughline.training.chunks import Chunk
from throughline.training.group import seed_of


class SinkFilter:
    """The limit of every layer, and how many tokens were left out of how many. What is remembered is tensors alone, [L] each."""

    def __init__(
        self,
        model: str,
        layers: list[int],
        seed: int,
        norm_L: Float[Tensor, "L"],
        left_out_L: Int[Tensor, "L"] | None = None,
    ) -> None:
        self._model, self._layers, self._seed, self.norm_L = model, layers, seed, norm_L
        self.left_out_L = torch.zeros(len(layers), dtype=torch.int64) if left_out_L is None else left_out_L

    @classmethod
    def from_chunk(cls, chunk: Chunk, model: str, layers: list[int], seed: int) -> "SinkFilter":
        """The limits that the tokens of a chunk show."""
        return cls(
            model, layers, seed, torch.tensor([find_sink_norm(x_CD) for x_CD in chunk.x_LCD], dtype=torch.float64)
        )

    def clean_(self, chunk: Chunk) -> None:
        """Let ordinary tokens take the places of sinks; drawn by layer and chunk, so that there is no state.

        TrainingError for activations that are not finite.
        """
        for index, (layer, limit, x_CD) in enumerate(zip(self._layers, self.norm_L.tolist(), chunk.x_LCD, strict=True)):
            norm_C = measure_norms(x_CD)
            if not norm_C.isfinite().all():
                raise TrainingError(
                    f"{self._model} layer {layer}: its activations are not all finite; if its dtype is float16, try float32"
                )
            sinks = (norm_C > limit).nonzero()[:, 0]
            others = (norm_C <= limit).nonzero()[:, 0]
            if not len(sinks) or not len(others):
                continue
            number = seed_of(self._seed, layer, 0) * 1_000_003 + chunk.following.chunk
            drawn = torch.randint(len(others), (len(sinks),), generator=torch.Generator().manual_seed(number))
            x_CD[sinks] = x_CD[others[drawn.to(others.device)]]
            self.left_out_L[index] += len(sinks)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        return {"sinks/norm": self.norm_L, "sinks/left_out": self.left_out_L}
