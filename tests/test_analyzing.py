"""Findings from planted matrices: what is there is said with its numbers, and what is not there is not said."""

import math

import numpy as np
import polars as pl
import pytest

from synthetic_run import SyntheticModel, make_tables, make_transfer
from throughline.analyzing import analyze_run
from throughline.records import Analysis, Finding, TransferResult, best_labels

A, B = SyntheticModel("zoo/a", 5, 8, 12), SyntheticModel("b", 3, 8, 12)


def planted(
    value: np.ndarray, null: float | np.ndarray, *, metric="matching", models=(A, A), width=0.02, layers=None
) -> TransferResult:
    result = make_transfer(*models, metric)
    arrays = {"value": value, "low": value - width, "high": value + width, "null": np.broadcast_to(null, value.shape)}
    rows, columns = (list(range(n)) for n in value.shape)
    changes = {"source_layers": layers or rows, "target_layers": layers or columns}
    cut = {
        name: a[: len(rows)] if name == "live" else a[: len(rows), : len(columns)] for name, a in result.arrays.items()
    }
    return TransferResult(result.info.model_copy(update=changes), cut | arrays)


def decaying(size: int = 5) -> np.ndarray:
    return 0.8 * np.exp(-0.5 * np.abs(np.subtract.outer(np.arange(size), np.arange(size))))


def findings(*results: TransferResult) -> dict[str, Finding]:
    found = analyze_run(list(results), {}, {}, seed=7).analysis
    assert (found.seed, found.num_tokens) == (7, 50_000)
    assert Analysis.model_validate_json(found.model_dump_json()).findings[0].sentence == found.findings[0].sentence
    return {finding.topic: finding for finding in found.findings}


def test_decay_is_told_with_its_numbers():
    found = findings(planted(decaying(), 0.05))["decay with distance"]
    assert found.beyond_null
    assert found.sentence == (
        "zoo/a: matching between neighbouring layers is 0.49 on average (null 0.05) and 0.11 at a distance of 4 (null 0.05)."
    )
    for distance in range(1, 5):
        assert found.numbers[f"distance {distance}"] == pytest.approx(0.8 * math.exp(-0.5 * distance))
        assert found.numbers[f"null at distance {distance}"] == pytest.approx(0.05)
    assert found.numbers["n"] == 50_000


def test_layers_that_relate_to_later_ones_alone_are_not_ranked():
    value = np.where(np.triu(np.ones((5, 5)), 1) > 0, decaying(), np.nan)
    found = findings(planted(value, 0.05, metric="reconstruction"))
    assert (
        list(found) == ["decay with distance"]
        and "between neighbouring layers is 0.49" in found["decay with distance"].sentence
    )


def test_what_equals_its_null_is_not_beyond_it():
    found = findings(planted(np.full((5, 5), 0.3), 0.3))
    assert not any(finding.beyond_null for finding in found.values())
    assert "not beyond the null" in found["decay with distance"].sentence
    assert "nothing beyond chance" in found["universal and specialised layers"].sentence


def test_one_pair_within_its_null_is_enough_to_say_so():
    """Its null is high while the others' are low: the mean null would hide it."""
    null = np.full((5, 5), 0.05)
    null[2, 3] = 0.6
    found = findings(planted(decaying(), null))["decay with distance"]
    assert not found.beyond_null and "at least one pair of the nearest layers" in found.sentence


def test_layers_apart_are_called_so():
    found = findings(planted(decaying(3), 0.05, layers=[0, 4, 8]))["decay with distance"]
    assert found.beyond_null and "at a distance of 4 layers is 0.49" in found.sentence
    assert {k for k in found.numbers if k.startswith("distance")} == {"distance 4", "distance 8"}


def test_universal_and_specialised_layers():
    value = decaying()
    value[1], value[3] = value[1] + 0.2, value[3] - 0.1
    found = findings(planted(value, 0.05))["universal and specialised layers"]
    assert found.beyond_null and (found.numbers["best"], found.numbers["worst"]) == (1, 3)
    others = [value[1, j] for j in range(5) if j != 1]
    assert found.numbers["best mean"] == pytest.approx(np.mean(others))
    wide = findings(planted(value, 0.05, width=0.4))["universal and specialised layers"]
    assert not wide.beyond_null and wide.sentence.endswith("their intervals overlap, so this is nothing beyond chance.")


def test_models_against_each_other():
    value = np.full((5, 3), 0.2)
    value[4, 1] = 0.7
    found = findings(planted(value, 0.1, models=(A, B)))["between models"]
    assert found.beyond_null
    assert found.sentence == (
        "zoo/a to b: on average 23% of a layer's live features have a partner above the null (10% by kind of token alone), "
        "at best 70% (layer 4 to 1, 10% by kind alone)."
    )
    assert (found.numbers["best"], found.numbers["coverage"]) == (0.7, 0.93)
    null = findings(planted(value, 0.7, models=(A, B)))["between models"]
    assert not null.beyond_null and null.sentence.endswith("; nothing beyond the null.")


def test_layers_without_a_value_are_left_out():
    value = decaying()
    value[2] = value[:, 2] = np.nan
    found = findings(planted(value, np.where(np.isnan(value), np.nan, 0.05)))
    near = [value[0, 1], value[1, 0], value[3, 4], value[4, 3]]
    assert found["decay with distance"].beyond_null
    assert found["decay with distance"].numbers["distance 1"] == pytest.approx(np.mean(near))
    assert found["universal and specialised layers"].numbers["best"] != 2
    across = findings(planted(value, 0.05, models=(A, B)))["between models"]
    assert across.numbers["mean"] == pytest.approx(np.nanmean(value))


@pytest.mark.parametrize("models", [(A, A), (A, B)])
def test_too_little_text_is_said(models):
    value = np.full((5, 5), np.nan)
    if models == (A, A):
        value[0, 0] = 1  # a layer with itself says nothing
    (found,) = findings(planted(value, np.nan, models=models)).values()
    assert (found.topic, found.beyond_null) == ("too little text", False)
    assert "relates no two layers; 50000 tokens are too few" in found.sentence


def test_two_layers_or_another_metric_between_models_give_no_sentence():
    assert list(findings(planted(decaying(2), 0.1))) == ["throughlines"]
    other = planted(decaying(), 0.1, metric="reconstruction", models=(A, B))
    assert analyze_run([other], {}, {}, seed=0).analysis.findings == []


def test_labels_are_counted_against_their_baselines():
    tables = make_tables(B)
    labels = best_labels(tables["labels"], 0.7)
    assert set(labels["feature"]) == set(range(12)) - {7}  # below the bar in every layer
    beaten = labels.with_columns(neuron_f1=pl.when(pl.col("layer") == 0).then(0.99).otherwise("neuron_f1"))
    found = analyze_run([], {B.name: tables["features"]}, {B.name: beaten}, seed=0).analysis
    live = int((tables["features"]["num_active"] > 0).sum())
    assert found.num_tokens == 0 and found.findings[0].numbers == {
        "model": "b",
        "labelled": 33,
        "live": live,
        "beyond_baselines": 22,
    }
    assert found.findings[0].sentence.startswith(
        f"b: 33 of {live} live features ({33 / live:.0%}) have a label above the bar; 22 of"
    )
    none = analyze_run([], {B.name: tables["features"]}, {B.name: labels.clear()}, seed=0).analysis.findings[0]
    assert not none.beyond_null and none.numbers["labelled"] == 0
