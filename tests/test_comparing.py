"""Comparisons of hand-made traces whose features' counterparts are known."""

import numpy as np
import pytest

from synthetic_run import MODELS, SyntheticModel, make_trace, make_transfer
from throughline.comparing import compare_traces
from throughline.records import ActiveFeature, Comparison, LayerReading, SharedFeature, Trace, TransferResult

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
    arrays = {"correlation": correlation, "partner": partner, "live": live}
    return TransferResult(info, result.arrays | arrays | {"threshold": np.full(shape[:2], THRESHOLD)})


def trace_of(model: SyntheticModel, *shown: tuple[int, int]) -> Trace:
    """A trace that shows the given features (layer, feature); feature 0 is labelled."""
    template = make_trace(model)
    feature = template.layers[0].features[0]

    def at(layer: int, number: int) -> ActiveFeature:
        label = feature.label if number == 0 else None
        return feature.model_copy(update={"layer": layer, "feature": number, "label": label})

    layers = [
        LayerReading(layer=i, features=[at(*f) for f in shown if f[0] == i], num_active=1, fvu=0, error_effect=0)
        for i in range(model.num_layers)
    ]
    return template.model_copy(update={"layers": layers})


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
    traces = {
        A.name: trace_of(A, *((0, u) for u in range(5)), (1, 4)),
        B.name: trace_of(B, (2, 3)),
        C.name: trace_of(C),
    }
    return compare_traces(traces, {(a.name, b.name): result for (a, b), result in matches.items()})


def test_standings_of_three_models(three):
    standings = [place(three, A, 0, u).standing for u in range(5)]
    assert standings == ["universal", "shared", "shared", "specific", "specific"]
    assert place(three, B, 2, 3).standing == "shared"
    assert three.shares[A.name] == {"universal": pytest.approx(1 / 6), "shared": pytest.approx(1 / 3), "specific": 0.5}
    assert three.shares[B.name] == {"universal": 0, "shared": 1, "specific": 0}
    assert three.shares[C.name] == dict.fromkeys(("universal", "shared", "specific"), 0.0)  # shows none


def test_the_best_partner_of_any_layer_is_named(three):
    first = place(three, A, 0, 0)
    assert first.partners == {B.name: (2, 3, pytest.approx(0.9)), C.name: (0, 2, pytest.approx(0.7))}
    assert first.label == make_trace(A).layers[0].features[0].label.text
    assert place(three, A, 0, 1).partners == {B.name: (0, 1, pytest.approx(0.5))}
    assert place(three, A, 0, 1).label.startswith("unlabelled: ' 1', '5', ")


def test_base_rates_count_all_live_features(three):
    """Ten features of A live; fifteen of B, of which one has one partner; five of C, of which one has both."""
    assert three.all_shares[A.name] == {"universal": 0.1, "shared": 0.2, "specific": pytest.approx(0.7)}
    assert three.all_shares[B.name] == {
        "universal": 0,
        "shared": pytest.approx(1 / 15),
        "specific": pytest.approx(14 / 15),
    }
    assert three.all_shares[C.name] == {"universal": 0.2, "shared": 0, "specific": 0.8}


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
                     num_active=1, fvu=0, error_effect=0)
    ]})  # fmt: skip
    found = compare_traces({A.name: moved, B.name: trace_of(B)}, {(A.name, B.name): far, (B.name, A.name): back})
    assert [(f.feature, f.standing) for f in found.features] == [(2, "universal"), (4, "specific")]
    assert found.features[0].partners == {B.name: (1, 3, pytest.approx(0.5))}


def test_smallest_text_and_force_are_said():
    ab, ba = matching(A, B), matching(B, A)
    fewer = TransferResult(ba.info.model_copy(update={"num_tokens": 1234}), ba.arrays)
    traces = {A.name: trace_of(A, (0, 0)), B.name: trace_of(B, (0, 0)).model_copy(update={"forced": True})}
    found = compare_traces(traces, {(A.name, B.name): ab, (B.name, A.name): fewer})
    assert found.threshold.endswith("over 1,234 tokens or more") and found.forced


def test_random_features_are_matched_by_chance_only():
    """Of the made-up models' random correlations, the share above 0.2 in one of several layers is as binomial."""
    first, second = MODELS[:2]
    ab, ba = (make_transfer(a, b, "matching") for a, b in ((first, second), (second, first)))
    ab.info.details["threshold"] = "0.2"
    found = compare_traces(
        {first.name: make_trace(first), second.name: make_trace(second)},
        {(first.name, second.name): ab, (second.name, first.name): ba},
    )
    above = (ab.arrays["correlation"] > 0.2).any(1)[ab.arrays["live"]]
    assert found.all_shares[first.name]["universal"] == pytest.approx(above.mean())
