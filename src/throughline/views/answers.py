"""What the page asks of a run, as types. The API's description (/api/openapi.json) and the page's types are made from them."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator

from throughline.records import JobState, Label, LayerQuality, TransferInfo

Number = Annotated[
    float | None, BeforeValidator(lambda x: x if x is None or abs(x) < float("inf") else None)
]  # NaN: None
Matrix = list[list[Number]]  # [source layer, target layer]
LayerPhase = Literal["done", "imported", "running", "stopped", "waiting", "failed"]
JobKind = Literal["trace", "compare"]
JobPhase = Literal["queued", "running", "done", "failed", "cancelled"]


class Refusal(BaseModel):
    """Why a request was refused: one sentence."""

    detail: str


class StudyAnswer(BaseModel):
    """What a run was made with, without where it lies on this machine."""

    name: str
    text: str
    config: str | None
    context: int
    heldout: float
    tokens: int
    epochs: int
    seed: int
    bar: float  # held-out F1 from which a label is shown as one
    gate: dict[str, float]


class StepAnswer(BaseModel):
    """A finished step of a run."""

    name: str
    started: str
    seconds: float


class ModelAnswer(BaseModel):
    """A model of the run and the shape of its dictionaries."""

    name: str
    path: str
    weights: str
    layers: list[int]  # that were evaluated
    d_model: int | None
    d_sae: list[int]
    architecture: list[str]
    num_features: int
    num_labelled: int  # with a label that reaches the bar


class QualityAnswer(LayerQuality):
    """A layer's quality and whether it passes the gate."""

    passes: bool


class Overview(BaseModel):
    """The run: what it was made from and with, its models and how good their dictionaries are."""

    study: StudyAnswer
    created: str
    versions: dict[str, str]
    hardware: dict[str, str | int | float]
    commit: str | None
    forced: bool
    random_weights: list[str]
    models: list[ModelAnswer]
    quality: list[QualityAnswer]
    steps: list[StepAnswer]
    num_transfers: int
    num_traces: int
    num_comparisons: int
    has_analysis: bool


class FeatureRow(BaseModel):
    """A feature in a list: `label` is its best one, whether it reaches the bar or not."""

    model: str
    layer: int
    feature: int
    density: Number
    max: Number
    label: str | None
    source: str | None
    f1: Number
    reached: bool
    tokens: list[str]


class FeaturePage(BaseModel):
    """One page of the features that were asked for."""

    total: int
    offset: int
    features: list[FeatureRow]


class FeatureName(BaseModel):
    """A feature spoken of: its label if one reaches the bar, or else its top tokens."""

    model: str
    layer: int
    feature: int
    label: str | None
    tokens: list[str]


class ScoredLabel(Label):
    """A label of a feature with its scores, and whether it reaches the study's bar."""

    threshold: Number
    num_tokens: int
    fuzzing: Number
    reached: bool


class Context(BaseModel):
    """A piece of text with the feature's activation at each token. `stratum` is top, or a quantile such as 0.50."""

    stratum: str
    rank: int
    value: float
    document: int
    tokens: list[str]
    values: list[float]
    focus: int


class Partner(BaseModel):
    """The best match of a feature in a layer of a model, and the correlation that chance gives there."""

    partner: FeatureName
    correlation: Number
    threshold: Number
    above_chance: bool


class Throughline(BaseModel):
    """The chain of features that this one belongs to; `family` is shared with throughlines of other models."""

    number: int
    birth: int
    death: int
    family: int | None
    features: list[FeatureName]


class FeatureAnswer(BaseModel):
    """All that is known of one feature."""

    model: str
    layer: int
    feature: int
    density: Number
    num_active: int
    num_tokens: int
    mean_active: Number
    max: Number
    top_tokens: list[str]
    top_token_share: Number
    promoted: list[str]
    suppressed: list[str]
    roles: dict[str, Number]  # mean activation on tokens of each role
    labels: list[ScoredLabel]  # the best first
    contexts: list[Context]
    partners: list[Partner]
    throughline: Throughline | None


class TransferAnswer(BaseModel):
    """One result: matrices by name (value, low, high, null, ceiling, and a metric's own)."""

    info: TransferInfo
    matrices: dict[str, Matrix]


class Pair(BaseModel):
    """A feature of the source layer and its best match in the target layer."""

    source: FeatureName
    target: FeatureName
    correlation: Number


class PairPage(BaseModel):
    """One page of a cell's pairs, best correlated first. `num_above` of them are above the threshold."""

    total: int
    offset: int
    threshold: Number
    num_above: int
    pairs: list[Pair]


class TraceRow(BaseModel):
    """A trace of the run, in a list."""

    id: str
    model: str
    prompt: str
    answer: str
    probability: Number
    correct: bool | None


class ComparisonRow(BaseModel):
    """A comparison of the run, in a list."""

    id: str
    models: list[str]
    prompt: str
    answers: dict[str, str]


class LayerState(BaseModel):
    """Where the training of a layer is; `gate` lists the conditions it failed, None before it was evaluated."""

    state: LayerPhase
    gate: list[str] | None


class JobProgress(JobState):
    """A job of training, and whether its process is alive."""

    state: str


class ModelState(BaseModel):
    """Where a model is: its layers by number, its steps, and the jobs of training that are not done."""

    state: str
    steps: dict[str, bool]
    jobs: list[JobProgress]
    layers: dict[str, LayerState]


class StatusAnswer(BaseModel):
    """Where training is, as `throughline status` says it: counts by state, jobs that run, and each model's layers and steps."""

    name: str
    forced: bool
    random_weights: list[str]
    layers: dict[str, int]
    eta_seconds: Number
    devices: list[JobState]
    models: dict[str, ModelState]


class TrainingCurve(BaseModel):
    """What the training of one layer measured, at up to a few hundred steps; lists are by point."""

    model: str
    layer: int
    step: list[int]
    tokens: list[int]
    loss: list[Number]
    l0: list[Number]
    fvu: list[Number]
    dead: list[Number]


class JobAnswer(BaseModel):
    """A job. `position` is how many are before it in the queue; `/api/jobs/{id}/result` has the result of one that is done."""

    id: str
    kind: JobKind
    phase: JobPhase
    position: int | None
    doing: str | None  # what it is at, in words
    step: int
    num_steps: int
    created: float  # seconds since 1970
    seconds: float | None  # it ran, or has run
    error: str | None
