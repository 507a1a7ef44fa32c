"""Layers of one shape and architecture in training: weights, Adam's moments, and all else that is remembered of them."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from throughline.dictionaries.stack import Architecture, Stack
from throughline.training.sparsity import SparsityController

BETAS = (0.9, 0.99)  # a hundred steps' memory of squares: short runs gain 3 to 5 % in FVU over the usual thousand
EPSILON = 1e-8
WARM_UP_SHARE = 0.05
DECAY_FROM = 0.2  # of the run, then linear to 0
TWINS_APART = (
    1_000_000_007  # three times as much is less than 2^32, of which torch's generator on the CPU takes the remainder
)


@dataclass(frozen=True)
class Course:
    """What is the same for all layers of a training: its length and its rates."""

    num_steps: int
    batch_tokens: int
    seed: int
    dead_after: float  # tokens without firing
    bfloat16: bool  # products in bfloat16; weights and moments stay float32

    def progress(self, step: int) -> float:
        """Share of the run that is done before `step`."""
        return step / self.num_steps

    def rate(self, step: int) -> float:
        """Learning-rate factor: linear warm-up over 5 % of the run, then 1, then linear to 0 from 20 % on."""
        done = (step + 0.5) / self.num_steps
        return min(1.0, done / WARM_UP_SHARE) * min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))

    def dead_after_of(self, group: "Group") -> float:
        """Tokens after which AuxK takes care of a feature."""
        return min(self.dead_after, group.starved_after)


def seed_of(seed: int, layer: int, twin: int) -> int:
    """What the random numbers of a layer's dictionary (`twin` 0) are drawn from, or those of one of its twins (1, 2, 3).

    All differ: a shared start would fake matches between layers and between seeds.
    """
    return seed * 1009 + layer + twin * TWINS_APART


@dataclass
class Measures:
    """The latest batch, by layer [L]: loss, active features per token, share of variance missed, share of dead features."""

    loss: Tensor
    l0: Tensor
    fvu: Tensor
    dead: Tensor

    @classmethod
    def none(cls, num_layers: int) -> "Measures":
        """Before the first batch."""
        return cls(*(torch.full((num_layers,), math.nan) for _ in range(4)))


@dataclass(eq=False)  # a group is itself alone: tensors have no one answer to whether they are equal
class Group:
    """L layers of one architecture, d_sae and k. `columns` is where they stand in the harvest; the rest is by layer.

    `twin` is 0 for the layers' own dictionaries. Twins have groups of their own, alike in all but the first weights: what
    products of stacked layers give may depend, in the last bits, on how many they are.
    """

    twin: int
    columns: list[int]
    layers: list[int]
    architecture: type[Architecture]
    options: dict[str, Any]
    k: int | None
    learning_rate: float
    starved_after: (
        float  # tokens without firing after which AuxK takes care of a feature, if sooner than it counts as dead
    )
    mean_LD: Tensor
    scale_LD: Tensor  # of each coordinate of a layer
    stack: Stack
    controller: SparsityController
    idle_tokens_LF: Tensor  # since a feature last fired
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by name of the weight: first, second
    latest: Measures = field(default_factory=lambda: Measures.none(0))
    slowed_L: Tensor = field(default_factory=lambda: torch.ones(0))  # factor of the learning rate after setbacks
    setbacks_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    events: list[tuple[int, str]] = field(default_factory=list)  # setbacks, by layer, in words

    def __post_init__(self) -> None:
        if not len(self.setbacks_L):
            like = {"size": (len(self.layers),), "device": self.mean_LD.device}  # ranks send all of a group one way
            self.slowed_L, self.setbacks_L = torch.ones(**like), torch.zeros(**like, dtype=torch.int64)
        if not self.moments:
            self.moments = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in self.stack.trained().items()}
        if not len(self.latest.loss):
            self.latest = Measures.none(len(self.layers))

    def single(self, index: int) -> "Group":
        """One layer as a group of its own that shares this one's memory."""
        one = slice(index, index + 1)
        stack = self.stack
        return replace(
            self,
            columns=self.columns[one],
            layers=self.layers[one],
            mean_LD=self.mean_LD[one],
            scale_LD=self.scale_LD[one],
            stack=stack.single(index),
            controller=self.controller.single(index),
            idle_tokens_LF=self.idle_tokens_LF[one],
            moments={name: (first[one], second[one]) for name, (first, second) in self.moments.items()},
            latest=Measures(*(getattr(self.latest, f.name)[one] for f in fields(Measures))),
            slowed_L=self.slowed_L[one],
            setbacks_L=self.setbacks_L[one],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint has to hold of this group, by name; writing into them restores it."""
        moments = {f"{n}.{which}": m for n, pair in self.moments.items() for which, m in zip("mv", pair, strict=True)}
        own = {"mean": self.mean_LD, "scale": self.scale_LD, "idle": self.idle_tokens_LF}
        own |= {"slowed": self.slowed_L, "setbacks": self.setbacks_L}
        return self.stack.tensors() | moments | self.controller.tensors() | own
