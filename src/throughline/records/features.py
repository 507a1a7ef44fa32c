"""What is known of a layer's features: quality, statistics, contexts and labels."""

from typing import Literal

import polars as pl

from throughline.records.base import Record


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
    num_tokens: int  # ordinary ones, over which all is measured
    num_sinks: int = 0  # attention sinks of this layer beside them, left out
    fvu: float
    fvu_coordinate: float | None = None  # mean over the stream's coordinates of each one's own FVU: none dominates it
    fvu_with_sinks: float | None = None  # over all tokens; None in quality tables of earlier versions
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
    setbacks: int = 0  # times that training went wrong here and went back, with a lower learning rate
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
    num_shared: int = 0  # times that a feature asked what another one had asked; such a question is counted once
    prompt_tokens: int  # of all answers that were used, as far as the endpoint counts them
    answer_tokens: int
    price: float | None  # of these tokens; None where no prices are given
