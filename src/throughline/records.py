"""What travels between the stages: frozen records that become JSON, Parquet or safetensors, and no torch.

`run_dir` writes and reads them; figures, report and page need nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Fact:
    """Something true of the characters start to end of a text: a name and its value, such as `carry` = 1."""

    name: str
    value: int | str | bool
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """One text. `answer_start` is the character at which the answer begins, if the text has one."""

    text: str
    answer_start: int | None = None
    facts: tuple[Fact, ...] = ()
    kind: str = ""


class Record(BaseModel):
    """A frozen JSON record, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerQuality(Record):
    """How well one layer's dictionary stands in for the residual stream, on held-out text.

    Names as in SAEBench core where it has one. `fvu` = sum|x - x_hat|^2 / sum|x - mean|^2 with the global mean. CE and KL in
    nats per token. `num_` counts say over how many tokens, answers or features a number was taken.
    """

    model: str
    layer: int
    architecture: str
    d_model: int
    d_sae: int
    num_tokens: int
    fvu: float
    fvu_by_position: list[float]  # first, second, … eighth of the context
    fvu_within_kind: float  # variance left after the mean of each kind of token is taken out
    explained_variance: float  # 1 - fvu
    explained_variance_legacy: float  # mean over tokens of 1 - |x - x_hat|^2 / |x - mean|^2
    l0: float
    dead: float  # share of features that never fire on the num_tokens held-out tokens
    dense: float  # share of features that fire on more than a tenth of the tokens
    cossim: float
    l2_ratio: float
    relative_reconstruction_bias: float
    num_spliced_tokens: int
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_ablation: float  # the layer's residual stream set to zero
    ce_loss_with_mean_ablation: float
    ce_loss_score: float  # (CE zero-ablated - CE with SAE) / (CE zero-ablated - CE without)
    ce_loss_score_mean: float  # the same against mean ablation
    delta_ce: float
    kl_div_with_sae: float
    num_answers: int  # answers the model gives exactly without the dictionary
    answers_kept: float | None  # share of those still given with it; None where the text has no answers
    gate: list[str]  # the failed conditions, empty if it passes

    @property
    def passed(self) -> bool:
        """True if the layer's dictionary passes the quality gate."""
        return not self.gate


FEATURE_COLUMNS = {
    "layer": pl.Int32,
    "feature": pl.Int32,
    "density": pl.Float64,  # share of held-out tokens on which it fires
    "num_active": pl.Int64,
    "num_tokens": pl.Int64,
    "mean_active": pl.Float64,  # mean activation where it fires
    "max": pl.Float64,
    "top_tokens": pl.List(pl.String),  # tokens with the largest share of its activation, best first
    "top_token_share": pl.Float64,  # share of its activation on the first of them
    "promoted": pl.List(pl.String),  # tokens its decoder row raises most through the unembedding
    "suppressed": pl.List(pl.String),
    "role_means": pl.List(pl.Float64),  # mean activation over held-out tokens of each role (see `role_of`)
}
EXAMPLE_COLUMNS = {
    "layer": pl.Int32,
    "feature": pl.Int32,
    "stratum": pl.String,  # "top", or the quantile of activation it stands for, such as "0.50"
    "rank": pl.Int32,
    "value": pl.Float64,
    "document": pl.Int64,
    "tokens": pl.List(pl.String),
    "values": pl.List(pl.Float64),
    "focus": pl.Int32,  # index in `tokens` of the token with `value`
}
LABEL_COLUMNS = {
    "layer": pl.Int32,
    "feature": pl.Int32,
    "label": pl.String,
    "source": pl.String,  # which labeler
    "measure": pl.String,  # what f1, precision and recall count: "tokens" of a predicate, or contexts judged in "detection"
    "f1": pl.Float64,  # on held-out text; feature, threshold and predicate were chosen on other text
    "precision": pl.Float64,
    "recall": pl.Float64,
    "threshold": pl.Float64,  # activation above which the label speaks
    "num_positive": pl.Int64,  # held-out tokens of which the label is true; detection: contexts in which the feature is active
    "num_tokens": pl.Int64,  # held-out tokens; detection: contexts judged
    "base_f1": pl.Float64,  # F1 of always saying yes
    "neuron_f1": pl.Float64,  # best single coordinate of the residual stream; null for detection, as is the next
    "untrained_f1": pl.Float64,  # best feature of an untrained dictionary of the same shape
    "balanced_accuracy": pl.Float64,  # of detection; null for tokens
    "fuzzing": pl.Float64,  # balanced accuracy of judging which tokens are marked; null for tokens
}
SOURCES = ("concepts", "tokens", "llm")  # of labels, the most trusted first


def complete_labels(labels: pl.DataFrame) -> pl.DataFrame:
    """A table of labels with all LABEL_COLUMNS; those of older versions and of other packages count tokens and have no others."""
    defaults = {"measure": pl.lit("tokens"), "balanced_accuracy": pl.lit(None), "fuzzing": pl.lit(None)}
    missing = {name: value.cast(LABEL_COLUMNS[name]) for name, value in defaults.items() if name not in labels.columns}
    return labels.with_columns(**missing).select(*LABEL_COLUMNS) if missing else labels


def reaches(bar: float) -> pl.Expr:
    """True of a label that reaches `bar`: by its F1 and, where contexts were judged half of which are so, by balanced accuracy too,
    for always saying yes has F1 0.67 there."""
    return (pl.col("f1") >= bar) & (pl.col("balanced_accuracy").fill_null(1.0) >= bar)


def above_chance() -> pl.Expr:
    """Where F1 lies between that of always saying yes (0) and 1, so that scores over different base rates compare."""
    base = pl.col("base_f1")
    return pl.when(base < 1).then((pl.col("f1") - base) / (1 - base)).otherwise(0.0)


def rank_labels(labels: pl.DataFrame, bar: float) -> pl.DataFrame:
    """Labels by layer and feature: those that reach `bar` first, then by score above chance, then by trust in their source."""
    trust = pl.col("source").replace_strict({s: i for i, s in enumerate(SOURCES)}, default=len(SOURCES))
    keys = ["layer", "feature", ~reaches(bar).fill_null(False), above_chance().fill_nan(None), trust, "source"]
    return labels.sort(
        *keys, descending=[False, False, False, True, False, False], nulls_last=True, maintain_order=True
    )


COVERAGE_COLUMNS = {
    "layer": pl.Int32,
    "dictionary": pl.String,  # trained, or untrained: random directions of the same shape, labelled in the same way
    "num_live": pl.Int64,  # features that fire on the selection text
    "over_07": pl.Float64,  # share of these whose label has a held-out F1 above 0.7
    "over_09": pl.Float64,
    "num_labels": pl.Int64,  # different ones among those above 0.7
    "num_tokens": pl.Int64,
}
FAMILY_COLUMNS = {
    "layer": pl.Int32,
    "family": pl.String,  # of predicates: units, tens, carry, sum
    "feature": pl.Int32,  # surest to fit any of these on the selection text
    "label": pl.String,
    "selection_f1": pl.Float64,  # the lower bound by which it was chosen
    **{name: LABEL_COLUMNS[name] for name in ("f1", "num_positive", "base_f1", "neuron_f1", "untrained_f1")},
}


def best_of_families(families: pl.DataFrame) -> pl.DataFrame:
    """Of each family the layer whose feature did best on the selection text, which the held-out F1 owes nothing to."""
    ordered = families.sort("selection_f1", descending=True, maintain_order=True)
    return ordered.unique("family", keep="first", maintain_order=True).sort("family")


def best_labels(labels: pl.DataFrame, bar: float) -> pl.DataFrame:
    """The label of each feature that is best above chance, of those that reach `bar`."""
    reached = rank_labels(labels.filter(reaches(bar)), bar)
    return reached.unique(["layer", "feature"], keep="first", maintain_order=True)


TOKEN_KINDS = ("number", "word", "punctuation", "space", "other")
PARTS = ("question", "answer")  # the answer's part begins with the last token before it, where it is decided
NUM_ROLES = len(TOKEN_KINDS) * len(PARTS)


def role_of(kind: Any, in_answer: Any) -> Any:
    """The role of a token, or of an array of them: its kind, and the part of the text it stands in.

    This is what "the same kind of position" means wherever features are averaged or shuffled.
    """
    return kind + len(TOKEN_KINDS) * in_answer


class TransferInfo(Record):
    """What a transfer result's arrays mean. Rows are layers of `source`, columns layers of `target`."""

    metric: str
    source: str
    target: str
    source_layers: list[int]
    target_layers: list[int]
    quantity: str  # what `value` is, in words
    null: str | None  # what `null` is, in words; None where the metric has none
    ceiling: str | None
    num_tokens: int
    num_documents: int
    coverage: float  # share of the source's tokens with an aligned partner in the target
    seed: int
    details: dict[str, str | int | float] = {}


@dataclass(frozen=True)
class TransferResult:
    """Arrays [source layer, target layer] named value, low, high (95 % bootstrap interval), null, ceiling; and a metric's own.

    `matching` adds threshold [source layer, target layer], partner and correlation [source layer, target layer, source
    feature], and live [source layer, source feature].
    """

    info: TransferInfo
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


NULL_QUANTILE = 0.999  # of correlations by chance in two layers: the threshold of `matching`


class Token(NamedTuple):
    """One token of a prompt as the model sees it; start and end are characters of the text (equal for special tokens)."""

    id: int
    text: str
    start: int
    end: int


class Label(Record):
    """Words for a feature, where they come from, and the held-out F1 with its baselines (LABEL_COLUMNS)."""

    text: str
    source: str
    measure: Literal["tokens", "detection"] | None = None  # None, in traces of older versions: tokens
    f1: float
    precision: float
    recall: float
    num_positive: int
    base_f1: float
    neuron_f1: float | None
    untrained_f1: float | None
    balanced_accuracy: float | None = None


class AskedLabels(Record):
    """What asking a language model for the labels of one model's features came to. Features are named `layer 3 #45`."""

    model: str
    answered_by: str
    num_features: int  # asked about
    num_labelled: int
    failed: dict[str, str]  # no label, since a call failed after all retries: why
    unread: dict[str, str]  # no label, since answers had no words or too few judgements
    left_out: dict[str, str]  # not asked about: why
    num_calls: int  # made now; what was answered before is not asked again
    num_stored: int  # answers that were there already
    prompt_tokens: int  # of all answers that were used, as far as the endpoint counts them
    answer_tokens: int
    price: float | None  # of these tokens; None where no prices are given


class Target(Record):
    """One contested token of the answer: what every effect is measured on is logit(text) - logit(against) at `position`."""

    position: int  # of the token before it, where it is decided
    text: str
    against: str  # the runner-up, or the token that the counterfactual prompt has there
    probability: float
    score: float  # logit(text) - logit(against), undisturbed


class ActiveFeature(Record):
    """One feature at one position of a traced prompt.

    `effect` is the measured change of the answer score (logits) when the feature is set to `off_value` at this position in the
    real model; `predicted_effect` is the same by the gradient. The score is the mean over targets; `effects` and
    `predicted_effects` are by target.
    """

    layer: int
    position: int
    feature: int
    activation: float
    off_value: float
    effect: float | None  # None: not measured (`--no-verify`)
    predicted_effect: float
    effects: list[float]
    predicted_effects: list[float]
    answer_if_off: str | None  # None: not measured
    label: Label | None  # None: no label reached the bar
    top_tokens: list[str]
    lifetime: tuple[int, int] | None = None  # first and last layer of its throughline, where the run has them


class LayerReading(Record):
    """One layer of a trace: its most influential features, its most influential labelled ones, and what is left out."""

    layer: int
    features: list[ActiveFeature]  # largest predicted effects first; then labelled ones that are not among these
    num_active: float  # features active per token, mean over the prompt
    num_nodes: int  # of the layer in the graph: features whose value differs from "off"
    fvu: float  # of the dictionary on this prompt's tokens
    error_effect: float | None  # change of the answer score when the reconstruction error is left out at all positions


Place = tuple[int, int, int]  # layer, position, feature (-1: the reconstruction error there)


class TraceEdge(Record):
    """What switching off the source does to the target, a feature of the next traced layer, in units of its activation.

    `predicted` and `measured` are changes of its pre-activation, through the linearised and the real blocks between them;
    `measured_activation` is that of the activation itself, which the selection of the dictionary also changes.
    """

    source: Place
    target: Place
    predicted: float
    measured: float | None = None
    measured_activation: float | None = None


class ChainStep(Record):
    """One step of a chain: a feature, or consecutive features of one throughline that hand something on."""

    features: list[Place]  # one per layer, ascending
    label: str
    activation: float  # of the first
    lifetime: tuple[int, int] | None  # birth and death of the throughline

    @property
    def layers(self) -> tuple[int, int]:
        """First and last layer of the step."""
        return self.features[0][0], self.features[-1][0]


class Chain(Record):
    """A path from the first traced layer to one token of the answer.

    `predicted` is the product of its edges: the change of that target's score that the first feature's switching off brings about
    along this path alone. `measured` is the same with the real blocks: between layers, only the change of the chain's next feature
    is passed on.
    """

    steps: list[ChainStep]
    target: int  # number of the target
    predicted: float
    measured: float | None
    predicted_together: (
        float  # sum of the features' own predicted effects on the target: what switching all of them off does
    )
    measured_together: float | None  # the same measured, each feature's step taken out of its layer
    answer_if_off: str | None  # the answer then
    num_alternatives: (
        int  # other paths to this target, mostly through the same features, of at least ALIKE of its strength
    )


class Agreement(Record):
    """How well predictions agree with measurements; None where too few or all alike. `slope` is of measured on predicted."""

    what: str
    num: int
    pearson: float | None
    slope: float | None
    sign: (
        float | None
    )  # share of the same sign, among effects above 2 % of the answer score (nodes) or of the largest (edges)
    num_signed: int
    shuffled: float | None  # Pearson with the predictions in random order: the null


class FaithfulnessPoint(Record):
    """What the n nodes of largest influence do alone, and what the model does without them.

    faithfulness = (score with these nodes only - score with none) / (score of the model - score with none); completeness is the
    same for all other nodes. `random` is the faithfulness of n nodes drawn at random, the mean of `num_random` draws.
    """

    num: int
    faithfulness: float
    completeness: float
    answer_kept: bool  # every target's token is still preferred to all others
    random: float
    random_kept: float  # share of the draws


class Verification(Record):
    """What was measured in the real model, next to what was predicted, and what chance gives."""

    nodes: Agreement
    controls: Agreement  # random active features, matched in number by layer
    within: Agreement  # edges within a position
    across: Agreement  # edges between positions
    random_effect: float  # mean |effect| of the controls
    num_random: int
    faithfulness: list[FaithfulnessPoint]  # n = 0 first
    num_candidates: int  # nodes of all layers
    random_draws: int
    replacement: float | None
    completeness: float | None


class Steering(Record):
    """What happened when features were set by hand."""

    settings: list[str]
    answer: str
    probability: float  # of the undisturbed answer
    scores: list[float]  # of the targets
    changed: list["Change"]  # features downstream that changed most


class Change(Record):
    """A feature's activation before and after steering."""

    layer: int
    position: int
    feature: int
    before: float
    after: float
    label: str


class Trace(Record):
    """One prompt followed through every layer of one model."""

    version: Literal[2] = 2
    model: str
    prompt: str
    tokens: list[tuple[int, str, int, int]]  # prompt and answer: id, text, start, end
    num_prompt_tokens: int
    answer: str
    answer_probability: float
    complete: bool  # False if the answer was cut at the longest length allowed
    expected: str | None  # the right answer, where one is known
    correct: bool | None
    score: float  # mean over the targets of logit minus the other's logit
    targets: list[Target]
    off_kind: Literal["mean", "counterfactual", "zero"]
    off: str  # what "off" means, in words
    against: str | None  # the counterfactual prompt
    linearization: str
    layers: list[LayerReading]
    edges: list[TraceEdge]
    chains: list[Chain]
    verification: Verification | None  # None: with --no-verify
    steering: Steering | None = None
    forced: bool  # True if dictionaries failed the quality gate and the user insisted
    notes: list[str]

    @property
    def features(self) -> list[ActiveFeature]:
        """All features shown, layer by layer."""
        return [feature for layer in self.layers for feature in layer.features]

    @property
    def runner_up(self) -> str:
        """What the model would have said instead at the first contested token."""
        return self.targets[0].against.strip()


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
    """A mean or share of n, with its 95 % bootstrap interval; None of nothing."""

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


EARLY = 0.5  # relative depth before which a concept counts as early


class Finding(Record):
    """One computed sentence of the analysis, with the numbers it was made from."""

    topic: str
    sentence: str
    beyond_null: bool
    numbers: dict[str, float | int | str | None]


class Curve(Record):
    """A measured quantity along depth, distance or age; lists are by point, and empty for what there is none of.

    `divergence`: x is the relative depth of a source layer, value the best share of its features found in a layer of the target.
    `decay`: x is the distance between two layers of one model, value the mean over such pairs. `persistence`: x is a number of
    layers, value the share of throughlines that live so long.
    """

    kind: Literal["divergence", "decay", "persistence"]
    metric: str
    source: str
    target: str
    x: list[float]
    value: list[float | None]
    low: list[float | None] = []
    high: list[float | None] = []
    null: list[float | None] = []
    ceiling: list[float | None] = []
    ceiling_low: list[float | None] = []
    ceiling_high: list[float | None] = []
    num: list[int] = []  # features, or pairs of layers, behind each point


class Ribbon(Record):
    """Births and deaths of one model's throughlines: `alive[b][l]` of those born at `layers[b]` are alive at `layers[l]`."""

    model: str
    layers: list[int]
    alive: list[list[int]]


class Analysis(Record):
    """What the matrices say, sentence by sentence, and as curves."""

    num_tokens: int
    seed: int
    findings: list[Finding]
    curves: list[Curve] = []
    ribbons: list[Ribbon] = []


class StepRecord(Record):
    """One finished step of a run: what it was made from (`key`), when, and the checksums of its files."""

    step: str
    key: str
    started: str
    seconds: float
    files: dict[str, str]


class JobState(Record):
    """Where a job of training is, or why it failed: consecutive layers of one model, on one device. Lists are by layer."""

    model: str
    layers: list[int]
    host: str
    pid: int
    device: str
    at: float  # when this was noted; seconds since 1970
    attempt: int = 1
    failed: str | None = None
    step: int = 0
    num_steps: int = 0
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    loss: list[float] = []
    l0: list[float] = []
    fvu: list[float] = []
    dead: list[float] = []


class RunInfo(Record):
    """Versions and hardware of a run, and what is known of its models."""

    name: str
    versions: dict[str, str]
    hardware: dict[str, str | int | float]
    commit: str | None
    created: str
    forced: bool = False
    random_weights: list[str] = []  # models of the run that were never trained
    depths: dict[str, int] = {}  # number of layers of each model


class PlannedDevice(Record):
    """One device that work is planned for, with the rates that times are computed from."""

    name: str
    kind: str  # devices of one kind have the same memory and rates
    memory_bytes: int
    flops_per_second: float  # matrix products in the dtype that dictionaries are trained in
    float32_flops_per_second: float
    bytes_per_second: float  # memory
    start_seconds: float  # until a job's model begins to be read
    measured: bool  # False: the rates are assumed
    on_cpu: bool
    bfloat16: bool  # multiplies it faster than float32
    threads: int = 1  # that train on a CPU


class PlannedJob(Record):
    """Consecutive pending layers of one model on one device. `bytes` are parts of its peak memory, which is `total_bytes`."""

    model: str
    first: int
    last: int
    layers: list[int]  # first to last, but for those that are done
    device: str
    bytes: dict[str, int]  # base, model, forward, parameters, optimizer, activations, buffers
    total_bytes: int
    disk_bytes: dict[str, int]  # dictionaries; while it runs, checkpoint and activations
    flops: float
    start_second: float
    seconds: float
    cached: bool  # activations are kept on disk and read again, instead of computed in each epoch


class PlannedModel(Record):
    """What is planned of one model, and why its activations are kept or not."""

    model: str
    num_layers: int
    pending: list[int]
    done: list[int]  # from the same settings, so skipped
    invalidated: list[int]  # there, but from other settings, so trained again
    tokens: int  # of an epoch
    activations: str


class Plan(Record):
    """What a study takes, job by job in the order in which they start. Seconds and bytes are predictions."""

    study: str
    devices: list[PlannedDevice]
    models: list[PlannedModel]
    jobs: list[PlannedJob]
    makespan_seconds: float
    lower_bound_seconds: float  # no split and no placement ends sooner
    work_seconds: float  # of all models unsplit, on the fastest device
    flops: float
    disk_bytes: dict[str, int]  # dictionaries, which stay; checkpoints and activations, the most at any time
    assumptions: list[str]


def span(layers: Sequence[int]) -> str:
    """`0-5`, `0-2, 5` or `3`: layers in ascending order, consecutive ones together."""
    known = sorted(set(layers))
    starts = [layer for layer in known if layer - 1 not in known]
    ends = [layer for layer in known if layer + 1 not in known]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
