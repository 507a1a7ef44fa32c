"""Comparisons of hand-made traces and readings, whose features' counterparts and concepts' depths are known."""

import numpy as np
import polars as pl
import pytest

from synthetic_run import MODELS, SyntheticModel, make_trace, make_transfer
from throughline.comparing import compare_prompts, compare_traces
from throughline.comparing.concepts import family_of
from throughline.comparing.standings import estimate
from throughline.records import (
    ActiveCodes,
    ActiveFeature,
    Comparison,
    ComparisonTotals,
    LayerReading,
    PromptReading,
    SharedFeature,
    Trace,
    TransferResult,
)

A, B, C = (SyntheticModel(name, layers, 8, 6) for name, layers in (("zoo/a", 2), ("b-1.5", 3), ("c", 1)))
THRESHOLD = 0.3


def matching(source: SyntheticModel, target: SyntheticModel, *planted: tuple) -> TransferResult:
    """No correlation reaches the threshold but the planted (layer, feature, layer, feature, r); feature 5 is dead."""
    shape = (source.num_layers, target.num_layers, source.d_sae)
    result = make_transfer(source, target, "matching")
    correlation, partner = np.full(shape, 0.2, np.float32), np.zeros(shape, np.int32)
    for i, u, j, v, r in planted:
        correlation[i, j, u], partner[i, j, u] = r, v
    correlation[:, :, 5], partner[:, :, 5] = np.nan, -1
    live = np.ones((source.num_layers, source.d_sae), bool)
    live[:, 5] = False
    info = result.info.model_copy(update={"details": {"threshold": "the null's quantile"}})
    arrays = {"correlation": correlation, "partner": partner, "live": live, "chance": np.full_like(correlation, 0.1)}
    arrays |= {"null": np.full(shape[:2], 0.02), "ceiling": np.full(shape[:2], 0.9)}
    return TransferResult(info, result.arrays | arrays | {"threshold": np.full(shape[:2], THRESHOLD)})


def trace_of(model: SyntheticModel, *shown: tuple[int, int]) -> Trace:
    """A trace that shows the given features (layer, feature); feature 0 is labelled."""
    template = make_trace(A)
    feature = template.layers[0].features[0]

    def at(layer: int, number: int) -> ActiveFeature:
        label = feature.label if number == 0 else None
        return feature.model_copy(update={"layer": layer, "feature": number, "label": label})

    layers = [
        LayerReading(
            layer=i, features=[at(*f) for f in shown if f[0] == i], num_active=1, num_nodes=1, fvu=0, error_effect=0
        )
        for i in range(model.num_layers)
    ]
    return template.model_copy(update={"model": model.name, "layers": layers})


def reading_of(model: SyntheticModel, *active: tuple[int, int, float], answer: str = "42") -> PromptReading:
    """A reading in which these features (layer, feature, activation) are active, each at two positions."""
    layers = {}
    for i in range(model.num_layers):
        mine = [(f, a) for layer, f, a in active if layer == i]
        features, values = (
            np.array([x[n] for x in mine for _ in range(2)], dtype) for n, dtype in ((0, int), (1, float))
        )
        layers[i] = ActiveCodes(np.tile([3, 5], len(mine)), features, values)
    return PromptReading(model.name, "What is 15 + 27?", answer, 0.98, True, layers)


def as_shown(model: SyntheticModel, trace: Trace) -> PromptReading:
    """A reading in which just the features of a trace are active."""
    return reading_of(model, *((f.layer, f.feature, f.activation) for f in trace.features))


def labels_of(*rows: tuple[int, int, str, float]) -> pl.DataFrame:
    """Labels by layer, feature, text, threshold."""
    names = {"layer": pl.Int32, "feature": pl.Int32, "label": pl.String, "threshold": pl.Float64}
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(source=pl.lit("concepts"))


NO_LABELS = labels_of()


def compared(traces: dict[SyntheticModel, Trace], matches: dict) -> Comparison:
    """A comparison of just what the traces show, without labels."""
    return compare_traces(
        {m.name: trace for m, trace in traces.items()},
        {m.name: as_shown(m, trace) for m, trace in traces.items()},
        matches,
        {m.name: NO_LABELS for m in traces},
    )


def shares(comparison: Comparison, model: SyntheticModel) -> list[float | None]:
    """Universal, shared, specific."""
    return [e.value for e in comparison.standings[model.name].active.values()]


def place(comparison: Comparison, model: SyntheticModel, layer: int, feature: int) -> SharedFeature:
    return next(f for f in comparison.features if (f.model, f.layer, f.feature) == (model.name, layer, feature))


@pytest.fixture
def three() -> Comparison:
    """Feature 0 of A's layer 0 is everywhere, 1 in B, 2 in C, 3 just below the threshold, 4 nowhere."""
    matches = {
        (A, B): matching(A, B, (0, 0, 1, 4, 0.8), (0, 0, 2, 3, 0.9), (0, 1, 0, 1, 0.5), (0, 3, 0, 1, 0.299)),
        (A, C): matching(A, C, (0, 0, 0, 2, 0.7), (0, 2, 0, 2, 0.31)),
        (B, A): matching(B, A, (2, 3, 0, 0, 0.9)),
        (B, C): matching(B, C),
        (C, A): matching(C, A, (0, 2, 0, 0, 0.7)),
        (C, B): matching(C, B, (0, 2, 2, 3, 0.6)),
    }
    traces = {A: trace_of(A, *((0, u) for u in range(5)), (1, 4)), B: trace_of(B, (2, 3)), C: trace_of(C)}
    return compared(traces, {(a.name, b.name): result for (a, b), result in matches.items()})


def test_standings_of_three_models(three):
    standings = [place(three, A, 0, u).standing for u in range(5)]
    assert standings == ["universal", "shared", "shared", "specific", "specific"]
    assert place(three, B, 2, 3).standing == "shared"
    assert shares(three, A) == [pytest.approx(1 / 6), pytest.approx(1 / 3), 0.5]
    assert shares(three, B) == [0, 1, 0]
    assert shares(three, C) == [None, None, None]  # nothing is active
    assert three.active[A.name] == {
        "universal": [(0, 0)],
        "shared": [(0, 1), (0, 2)],
        "specific": [(0, 3), (0, 4), (1, 4)],
    }


def test_a_feature_counts_once_and_only_if_it_is_frequent_enough_to_be_judged():
    """Feature 5 is not live; each feature of a reading is active at two positions."""
    matches = {(A.name, B.name): matching(A, B, (0, 0, 1, 4, 0.8)), (B.name, A.name): matching(B, A)}
    readings = {A.name: reading_of(A, (0, 0, 1.0), (0, 1, 1.0), (0, 5, 1.0)), B.name: reading_of(B, (0, 5, 1.0))}
    traces = {A.name: trace_of(A), B.name: trace_of(B)}
    found = compare_traces(traces, readings, matches, dict.fromkeys(readings, NO_LABELS))
    mine = found.standings[A.name]
    assert (mine.num_active, mine.num_rare, mine.active["universal"].n) == (2, 1, 2)
    assert shares(found, A) == [0.5, 0, 0.5]
    assert mine.active["universal"].low is None  # of two features nothing is sure
    assert (found.standings[B.name].num_active, found.standings[B.name].num_rare) == (0, 1)


def test_a_ceiling_of_several_seeds_has_its_range():
    """That of the pair of layers where the mean is largest, of the model where that is least."""
    far, near = matching(A, B), matching(A, C)
    far.arrays["ceiling"][0] = [0.5, 0.7, 0.6]
    for result in (far, near):
        ceiling = result.arrays["ceiling"]
        result.arrays.update(
            {
                "ceiling_min": ceiling - 0.1,
                "ceiling_max": ceiling + 0.05,
                "num_twins": np.full_like(ceiling, 3),
            }
        )
    pairs = {(a, b): matching(a, b) for a in (A, B, C) for b in (A, B, C) if a != b} | {(A, B): far, (A, C): near}
    matches = {(a.name, b.name): result for (a, b), result in pairs.items()}
    standings = compared({A: trace_of(A, (0, 0), (0, 1)), B: trace_of(B), C: trace_of(C)}, matches).standings
    mine = standings[A.name]
    assert (mine.ceiling, mine.ceiling_min, mine.ceiling_max) == pytest.approx((0.7, 0.6, 0.75)) and mine.num_twins == 3
    other = standings[B.name]
    assert (other.ceiling_min, other.ceiling_max, other.num_twins) == (None, None, 0)


def test_what_chance_and_kind_would_give_and_the_ceiling():
    """By definition 0.1 % pass in each layer of the other model; B has three layers, C one. The null is 2 % a layer."""
    far, near = matching(A, B), matching(A, C)
    far.arrays["chance"][0, 2, 1] = near.arrays["chance"][0, 0, 1] = 0.4
    far.arrays["ceiling"][0] = [0.5, 0.7, 0.6]
    pairs = {(a, b): matching(a, b) for a in (A, B, C) for b in (A, B, C) if a != b} | {(A, B): far, (A, C): near}
    matches = {(a.name, b.name): result for (a, b), result in pairs.items()}
    found = compared({A: trace_of(A, (0, 0), (0, 1)), B: trace_of(B), C: trace_of(C)}, matches).standings[A.name]
    assert found.chance == {"universal": 0.5, "shared": 0, "specific": 0.5}
    assert found.most_universal_by_chance == pytest.approx(0.001)
    assert found.most_universal_by_kind == pytest.approx(0.02)  # the least of 3 x 2 % and 2 %
    assert found.ceiling == pytest.approx(0.7)  # at best 70 % for B, 90 % for C
    without = TransferResult(far.info, {k: v for k, v in far.arrays.items() if k != "ceiling"})
    found = compared(
        {A: trace_of(A, (0, 0)), B: trace_of(B)}, {(A.name, B.name): without, (B.name, A.name): matching(B, A)}
    )
    assert found.standings[A.name].ceiling is None


def test_the_best_partner_of_any_layer_is_named(three):
    first = place(three, A, 0, 0)
    assert first.partners == {B.name: (2, 3, pytest.approx(0.9)), C.name: (0, 2, pytest.approx(0.7))}
    assert first.label == make_trace(A).layers[0].features[0].label.text
    assert place(three, A, 0, 1).partners == {B.name: (0, 1, pytest.approx(0.5))}
    assert place(three, A, 0, 1).label.startswith("unlabelled: ' 1', '5', ")


def test_base_rates_count_all_live_features(three):
    """Ten features of A live; fifteen of B, of which one has one partner; five of C, of which one has both."""
    assert three.standings[A.name].live == {"universal": 0.1, "shared": 0.2, "specific": pytest.approx(0.7)}
    assert three.standings[B.name].live == {
        "universal": 0,
        "shared": pytest.approx(1 / 15),
        "specific": pytest.approx(14 / 15),
    }
    assert three.standings[C.name].live == {"universal": 0.2, "shared": 0, "specific": 0.8}


def test_answers_and_threshold_are_carried_along(three):
    assert three.models == [A.name, B.name, C.name] == list(three.traces)
    assert three.answers == dict.fromkeys(three.models, "42") and three.probabilities[A.name] == 0.98
    assert three.threshold == "the null's quantile, over 50,000 tokens or more"
    assert Comparison.model_validate_json(three.model_dump_json()) == three


def test_of_two_models_nothing_is_only_shared():
    """With one other model a feature is universal or specific; layers keep their own numbers, and thresholds differ."""
    ab, ba = matching(A, B, (1, 2, 0, 3, 0.5), (1, 4, 2, 3, 0.5)), matching(B, A)
    ab.arrays["threshold"][1, 2] = 0.6
    far = TransferResult(ab.info.model_copy(update={"source_layers": [3, 7], "target_layers": [1, 4, 9]}), ab.arrays)
    back = TransferResult(ba.info.model_copy(update={"source_layers": [1, 4, 9], "target_layers": [3, 7]}), ba.arrays)
    a = trace_of(A, (1, 2), (1, 4))
    moved = a.model_copy(update={"layers": [
        LayerReading(layer=7, features=[f.model_copy(update={"layer": 7}) for f in a.layers[1].features],
                     num_active=1, num_nodes=1, fvu=0, error_effect=0)
    ]})  # fmt: skip
    mine = reading_of(A, (1, 2, 1.0), (1, 4, 1.0))
    theirs = reading_of(B)
    readings = {
        A.name: PromptReading(A.name, "", "", 1, True, {3: mine.layers[0], 7: mine.layers[1]}),
        B.name: PromptReading(B.name, "", "", 1, True, dict(zip((1, 4, 9), theirs.layers.values(), strict=True))),
    }
    matches = {(A.name, B.name): far, (B.name, A.name): back}
    found = compare_traces(
        {A.name: moved, B.name: trace_of(B)}, readings, matches, {A.name: NO_LABELS, B.name: NO_LABELS}
    )
    assert found.active[A.name] == {"universal": [(7, 2)], "shared": [], "specific": [(7, 4)]}
    assert [(f.feature, f.standing) for f in found.features] == [(2, "universal"), (4, "specific")]
    assert found.features[0].partners == {B.name: (1, 3, pytest.approx(0.5))}


def test_smallest_text_and_force_are_said():
    ab, ba = matching(A, B), matching(B, A)
    fewer = TransferResult(ba.info.model_copy(update={"num_tokens": 1234}), ba.arrays)
    traces = {A: trace_of(A, (0, 0)), B: trace_of(B, (0, 0)).model_copy(update={"forced": True})}
    found = compared(traces, {(A.name, B.name): ab, (B.name, A.name): fewer})
    assert found.threshold.endswith("over 1,234 tokens or more") and found.forced


def test_random_features_are_matched_by_chance_only():
    """Of the made-up models' random correlations, the share above 0.2 in one of several layers is as binomial."""
    first, second = MODELS[:2]
    ab, ba = (make_transfer(a, b, "matching") for a, b in ((first, second), (second, first)))
    ab.info.details["threshold"] = "0.2"
    found = compared(
        {first: make_trace(first), second: make_trace(second)},
        {(first.name, second.name): ab, (second.name, first.name): ba},
    )
    above = (ab.arrays["correlation"] > 0.2).any(1)[ab.arrays["live"]]
    assert found.standings[first.name].live["universal"] == pytest.approx(above.mean())


# ---- concepts


@pytest.mark.parametrize(
    ("label", "family"),
    [
        ("carry = 1", "carry"),
        ("operand 2 tens = 7, at the units of number 2", "operand 2 tens"),
        ("sum of units ≥ 10, addition", "sum of units"),
        ("number 1 in 20-29", "number 1"),
        ("carry", "carry"),
        ("units of both numbers carry, at the hundreds of the answer", "units of both numbers carry"),
        ("token ' = 3'", "token ' = 3'"),
        ("after 'What'", "after 'What'"),
        ("text of kind 'which is larger'", "text of kind 'which is larger'"),
    ],
)
def test_families_of_labels(label, family):
    assert family_of(label) == family


FOUR = SyntheticModel("four", 5, 8, 6)  # relative depths 0, 0.25, 0.5, 0.75, 1
TWO = SyntheticModel("two", 2, 8, 6)
PAIRS = {("four", "two"): matching(FOUR, TWO), ("two", "four"): matching(TWO, FOUR)}


def test_births_and_deaths_of_planted_concepts():
    """In `four` carry lives from layer 1 to 3; in `two` its label is there, but the activation is below its threshold."""
    labels = {
        "four": labels_of((1, 0, "carry = 1", 0.5), (2, 3, "token ' 1'", 0.0), (3, 4, "carry = 0", 0.5)),
        "two": labels_of((0, 1, "carry = 1", 2.0), (1, 2, "sum ≥ 10", 0.5)),
    }
    readings = {
        "four": reading_of(FOUR, (1, 0, 1.0), (2, 3, 1.0), (3, 4, 0.6), (4, 0, 9.0)),
        "two": reading_of(TWO, (0, 1, 1.9), (1, 2, 1.0)),
    }
    found = compare_traces({"four": trace_of(FOUR), "two": trace_of(TWO)}, readings, PAIRS, labels).concepts
    assert [(c.name, c.valued) for c in found] == [("carry", True), ("sum", True), ("token ' 1'", False)]
    carry = found[0].lives
    assert carry.keys() == {"four"} and carry["four"].layers == [1, 3]
    assert (carry["four"].birth, carry["four"].death) == (0.25, 0.75)
    assert (found[1].lives["two"].birth, found[1].lives["two"].death) == (1, 1)


def planted_totals() -> ComparisonTotals:
    """Twenty prompts with a carry and twenty without. The label of `four` speaks from layer 1 to 3 on the former alone, that of
    `two` from layer 0 on all. Each model has other labelled features, which are silent. `two` is right on every other prompt."""
    silent = [(layer, feature, "operator = +", 9.0) for layer in range(5) for feature in (1, 2)]
    labels = {
        "four": labels_of((1, 0, "carry = 1", 0.5), (3, 0, "carry = 1", 0.5), *silent),
        "two": labels_of((0, 0, "carry = 1", 0.5), *silent[:4]),
    }
    carries = [True] * 20 + [False] * 20
    on, off = ((1, 0, 1.0), (3, 0, 1.0)), ((2, 3, 1.0),)
    readings = {
        "four": [reading_of(FOUR, *(on if c else off)) for c in carries],
        "two": [reading_of(TWO, (0, 0, 1.0), answer="42" if i % 2 else "41") for i in range(40)],
    }
    facts = [frozenset({"carry"}) if c else frozenset({"borrow"}) for c in carries]
    return compare_prompts(readings, PAIRS, labels, ["42"] * 40, facts, forced=False)


def test_totals_know_where_a_concept_is_true():
    """A label that speaks on every prompt is there early, but says no more of the carry than where there is none."""
    found = planted_totals()
    assert (found.right["four"].value, found.right["two"].value, found.right["two"].n) == (1, 0.5, 40)
    [carry] = [c for c in found.concepts if c.name == "carry"]
    assert carry.known and carry.num_prompts == 20
    four, two = carry.models["four"], carry.models["two"]
    assert (four.present.value, four.early.value, four.elsewhere.value) == (1, 1, 0)
    assert (four.birth.value, four.death.value, four.birth.n) == (0.25, 0.75, 20)
    assert (two.early.value, two.elsewhere.value) == (1, 1)
    assert 0.1 < two.early_by_chance < 0.6  # dealt out anew, one of three labels in layer 0 is carry's
    assert carry.early_in == ["four"]
    assert carry.sentence == (
        "carry is present before relative depth 0.5 in 1 of 2 models (two: no more than by chance, or than where it is not "
        "true), n = 20"
    )
    assert ComparisonTotals.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("num", "has_interval"), [(0, False), (2, False), (9, False), (10, True)])
def test_an_interval_is_of_ten_values_or_more(num, has_interval):
    found = estimate(np.ones(num), seed=0)
    assert (found.low is not None) == (found.high is not None) == has_interval
    assert (found.n, found.value) == (num, 1.0 if num else None)


def test_totals_of_unknown_texts_count_where_some_model_has_the_concept():
    labels = {"four": labels_of((1, 0, "carry = 1", 0.5), (1, 1, "sum = 3", 9.0)), "two": NO_LABELS}
    readings = {
        "four": [reading_of(FOUR, (1, 0, 1.0)), reading_of(FOUR), reading_of(FOUR)],
        "two": [reading_of(TWO)] * 3,
    }
    found = compare_prompts(readings, PAIRS, labels, [None] * 3, [None] * 3, forced=True)
    assert found.right["four"].n == 0 and found.right["four"].value is None and found.forced
    [carry] = found.concepts
    assert (carry.known, carry.num_prompts, carry.models["four"].elsewhere.n) == (False, 1, 0)


def test_totals_are_means_of_what_single_prompts_have():
    ab, ba = matching(A, B, (0, 0, 1, 4, 0.8), (1, 1, 1, 4, 0.8)), matching(B, A, (2, 3, 0, 0, 0.9))
    matches = {(A.name, B.name): ab, (B.name, A.name): ba}
    readings = {
        A.name: [reading_of(A, (0, 0, 1.0), (1, 1, 1.0), (0, 2, 1.0)), reading_of(A, (0, 0, 1.0), (0, 2, 1.0))],
        B.name: [reading_of(B, (2, 3, 1.0)), reading_of(B)],
    }
    labels = dict.fromkeys(readings, NO_LABELS)
    total = compare_prompts(readings, matches, labels, [None] * 2, [None] * 2, forced=False).standings
    traces = {A.name: trace_of(A), B.name: trace_of(B)}
    single = [
        compare_traces(traces, {m: each[i] for m, each in readings.items()}, matches, labels).standings for i in (0, 1)
    ]
    for standing, share in total[A.name].active.items():
        each = np.array([one[A.name].active[standing].value for one in single], float)
        assert share.value == pytest.approx(each.mean())
    assert (total[A.name].num_active, total[A.name].active["universal"].n) == (2.5, 2)
    assert total[B.name].active["universal"].n == 1  # of the prompt on which none is active there is no share
    assert total[A.name].live == single[0][A.name].live
