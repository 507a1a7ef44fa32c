"""A prompt followed through every layer of a model."""

from typing import Literal

from throughline.records.base import Record
from throughline.records.features import Label


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
    num_sinks: int = 0  # tokens that are attention sinks of this layer: of them there is error alone
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
    asked: str | None = None  # in a chat: what the user said, of which the model's template made the prompt
    answer: str  # what is explained
    explains: Literal["answer", "next token", "named"] = "answer"  # named: somebody named the answer or its rival
    says: str | None = None  # what the model says by itself, where that is not the answer
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
    def origin(self) -> tuple[str, ...]:
        """What it is a trace of: no two that a run keeps have the same."""
        named = (self.answer, self.targets[0].against) if self.explains == "named" else ()
        return (self.model, self.prompt, *named)

    @property
    def reply(self) -> str:
        """What the model says by itself."""
        return self.answer if self.says is None else self.says

    @property
    def features(self) -> list[ActiveFeature]:
        """All features shown, layer by layer."""
        return [feature for layer in self.layers for feature in layer.features]

    @property
    def runner_up(self) -> str:
        """What the model would have said instead at the first contested token."""
        return self.targets[0].against.strip()
