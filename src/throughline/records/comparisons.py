"""A prompt, or many, in several models."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from throughline.records.base import Record
from throughline.records.traces import Trace


@dataclass(frozen=True)
class ActiveCodes:
    """The active features of one layer on one text, by position: arrays of one length."""

    positions_A: np.ndarray
    features_A: np.ndarray
    activations_A: np.ndarray


@dataclass(frozen=True)
class PromptReading:
    """One prompt in one model: its answer, and every feature that is active on prompt or answer, by layer."""

    model: str
    prompt: str
    answer: str
    probability: float
    complete: bool  # False if the answer was cut at the longest length allowed
    layers: dict[int, ActiveCodes]


Standing = Literal["universal", "shared", "specific"]


class Estimate(Record):
    """A mean or share of n, with its 95 % bootstrap interval: none where n is less than 10, and None of nothing."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Standings(Record):
    """How many features of one model are universal, shared and specific, and what that is to be held against.

    Of one prompt, `active` is of its active features, resampled by feature. Of several prompts, it is the mean over prompts,
    resampled by prompt. The bounds `by_kind` and `by_chance` hold however much layers and models agree.
    """

    active: dict[Standing, Estimate]
    num_active: float  # features counted on a prompt
    num_rare: float  # active, but too rare in the text of matching to be judged, so not counted
    live: dict[Standing, float]  # base rate: of all live features
    num_live: int
    chance: dict[Standing, float]  # of the same active features, with the other models' tokens from another document
    most_universal_by_chance: float  # upper bound by the definition of the threshold
    most_universal_by_kind: float  # upper bound if only the kind of position were known
    ceiling: float | None  # share found again in a dictionary of the same layer from another seed; None without one
    ceiling_min: float | None = None  # least and most of several seeds, whose mean `ceiling` then is; None with one
    ceiling_max: float | None = None
    num_twins: int = 0  # how many seeds these are


class SharedFeature(Record):
    """A feature shown in the trace of one model, with its partners in the others."""

    model: str
    layer: int
    position: int
    feature: int
    activation: float
    effect: float | None  # None: not measured
    label: str
    partners: dict[str, tuple[int, int, float]]  # other model -> layer, feature, correlation, if above the threshold
    standing: Standing


class ConceptLife(Record):
    """The layers of one model in which a feature with a label of the concept speaks; relative depth of the first and the last."""

    layers: list[int]
    birth: float
    death: float


class Concept(Record):
    """A family of labels ("carry" for "carry = 1") on one prompt, by model; models in which it is absent are left out."""

    name: str
    valued: bool  # has values, such as a digit or yes and no; others say which token, or kind of token, stands where
    lives: dict[str, ConceptLife]


class Comparison(Record):
    """One prompt in several models. A feature is universal if it has a partner above the threshold in every other model."""

    prompt: str
    models: list[str]
    expected: str | None  # the right answer, where one is known
    answers: dict[str, str]
    probabilities: dict[str, float]
    correct: dict[str, bool | None]
    standings: dict[str, Standings]  # by model, of all active features of the prompt
    active: dict[str, dict[Standing, list[tuple[int, int]]]]  # which these are: layer and feature
    features: list[SharedFeature]  # those that the traces show
    concepts: list[Concept]
    threshold: str
    seed: int
    forced: bool
    traces: dict[str, Trace]


class ConceptInModel(Record):
    """A concept in one model over prompts. Depths are means over the prompts in which it is present."""

    present: Estimate
    early: Estimate  # present before relative depth EARLY
    early_by_chance: float  # the same with the labels of each layer dealt out anew among its labelled features
    elsewhere: Estimate  # early in prompts of which it is known not to be true
    birth: Estimate
    death: Estimate


class ConceptTotals(Record):
    """A concept over prompts: those of which it is true where that is known, or else those in which any model has it."""

    name: str
    valued: bool
    known: bool  # which prompts it is true of is known, from the texts
    num_prompts: int
    models: dict[str, ConceptInModel]
    early_in: list[str]  # models that have it before relative depth EARLY in most of these prompts, beyond chance
    sentence: str


class ComparisonTotals(Record):
    """Many prompts in several models."""

    prompts: list[str]
    models: list[str]
    expected: list[str | None]
    answers: dict[str, list[str]]  # by model, in the order of the prompts
    probabilities: dict[str, list[float]]
    right: dict[str, Estimate]  # n: prompts whose right answer is known
    standings: dict[str, Standings]
    concepts: list[ConceptTotals]
    threshold: str
    seed: int
    forced: bool


FEWEST_OF_INTERVAL = 10  # values from which a bootstrap interval is given
EARLY = 0.5  # relative depth before which a concept counts as early
