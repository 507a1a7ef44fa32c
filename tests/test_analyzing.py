"""Findings from planted matrices: what is there is said with its numbers, and what is not there is not said."""

import math

import numpy as np
import polars as pl
import pytest

from synthetic_run import SyntheticModel, make_tables, make_transfer
from throughline.analyzing import analyze_run, write_markdown
from throughline.analyzing.shares import Share
from throughline.records import Analysis, Finding, TransferResult, best_labels

A, B = SyntheticModel("zoo/a", 5, 8, 12), SyntheticModel("b", 3, 8, 12)


def planted(
    value: np.ndarray, null: float | np.ndarray, *, metric="matching", models=(A, A), width=0.02, layers=None
) -> TransferResult:
    result = make_transfer(models[0], models[1], metric)
    arrays = {"value": value, "low": value - width, "high": value + width, "null": np.broadcast_to(null, value.shape)}
    rows, columns = list(range(len(value))), list(range(value.shape[1]))
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


# ---- layers of one model


def matched(mutual: list[float], depth: int = 5, num_features: int = 400, **arrays: np.ndarray) -> TransferResult:
    """A model whose features go on into the next layer with these shares."""
    live = np.ones((depth, num_features), bool)
    shape = (depth, depth)
    partner, correlation = np.zeros((*shape, num_features), np.int32), np.full((*shape, num_features), 0.1, np.float32)
    for place, share in enumerate(mutual):
        going = np.arange(1, 1 + round(share * num_features))
        partner[place, place + 1, going] = partner[place + 1, place, going] = going
        correlation[place, place + 1, going] = correlation[place + 1, place, going] = 0.9
    given = {
        "live": live,
        "partner": partner,
        "correlation": correlation,
        "threshold": np.full(shape, 0.2),
        "mutual": np.diag(mutual, 1),
        "null": np.full(shape, 0.05),
        "value": decaying(depth),
        "low": decaying(depth) - 0.02,
        "high": decaying(depth) + 0.02,
    }
    info = make_transfer(A, A, "matching").info
    layers = list(range(depth))
    return TransferResult(info.model_copy(update={"source_layers": layers, "target_layers": layers}), given | arrays)


def test_bottlenecks():
    found = findings(matched([0.6, 0.2, 0.6, 0.6], ceiling_mutual=np.full((5, 5), 0.8)))["bottlenecks"]
    assert found.beyond_null and (found.numbers["from"], found.numbers["to"], found.numbers["n"]) == (1, 2, 400)
    assert found.sentence == (
        "zoo/a: fewest features go on from layer 1 to 2: 20% [16%, 24%], 80% to another seed's dictionary of the same layer; "
        "60% [57%, 63%] elsewhere."
    )
    same = findings(matched([0.6, 0.58, 0.6, 0.6]))["bottlenecks"]
    assert not same.beyond_null and same.sentence.endswith("elsewhere, so no step is a bottleneck beyond chance.")
    assert same.numbers["ceiling"] is None


def test_hubs():
    value = decaying()
    value[:, 3] += 0.3
    found = findings(planted(value, 0.05))["hubs"]
    assert found.beyond_null and found.numbers["hub"] == 3
    assert found.numbers["mean"] == pytest.approx(np.mean([value[i, 3] for i in range(5) if i != 3]))
    nearly = np.full((5, 5), 0.3)
    nearly[0, 1] += 0.001
    flat = findings(planted(nearly, 0.05))["hubs"]
    assert not flat.beyond_null and flat.sentence.endswith("no layer is a hub beyond chance.")


def test_early_middle_late():
    found = findings(matched([0.2, 0.2, 0.5, 0.8]))["early, middle, late"]
    assert found.beyond_null
    assert found.numbers["early: goes on"] == pytest.approx(0.2)
    assert found.numbers["middle: goes on"] == pytest.approx(0.65)  # of the layers 2 and 3 of 5
    assert found.numbers["early: born"] == pytest.approx(0.8)  # in layer 1: in the first all are
    assert not findings(matched([0.4, 0.4, 0.4, 0.4]))["early, middle, late"].beyond_null


def test_persistence_is_told():
    found = findings(matched([0.6, 0.6, 0.6, 0.6], ceiling_mutual=np.full((5, 5), 0.8)))["throughlines"]
    assert found.beyond_null and found.numbers["alive after 1"] == pytest.approx(0.6)
    assert found.numbers["throughlines"] == 5 * 400 - 4 * 240 and found.numbers["through all layers"] == 240
    assert "60% [" in found.sentence and "at most 5% by kind of token alone, 80% by another seed's" in found.sentence
    assert not findings(matched([0.05] * 4))["throughlines"].beyond_null


def test_curves_and_ribbons_go_with_the_findings():
    analysis = analyze_run([matched([0.6, 0.6, 0.6, 0.6])], {}, {}, seed=7).analysis
    assert [(c.kind, c.source, c.metric) for c in analysis.curves] == [
        ("decay", "zoo/a", "matching"),
        ("persistence", "zoo/a", "matching"),
    ]
    decay, lived = analysis.curves
    assert decay.x == [1, 2, 3, 4] and decay.num == [8, 6, 4, 2] and decay.ceiling == []
    assert decay.value == pytest.approx([0.8 * math.exp(-0.5 * d) for d in range(1, 5)])
    assert lived.x == [0, 1, 2, 3, 4] and lived.value[0] == 1 and lived.num == [2000, 1600, 1200, 800, 400]
    [ribbon] = analysis.ribbons
    assert [sum(column) for column in zip(*ribbon.alive, strict=True)] == [400] * 5


# ---- models


def pair(value: np.ndarray, **arrays: np.ndarray) -> TransferResult:
    result = planted(value, 0.05, models=(A, B))
    return TransferResult(result.info, result.arrays | arrays)


def test_divergence_is_where_the_ceiling_is_left():
    value = np.full((5, 3), 0.2)
    value[:, 1] = [0.78, 0.76, 0.6, 0.77, 0.5]
    given = {"ceiling": 0.8, "ceiling_low": 0.75, "ceiling_high": 0.85}
    ceilings = {name: np.full((5, 3), number) for name, number in given.items()}
    found = findings(pair(value, **ceilings))["divergence"]
    assert found.beyond_null and found.numbers["layer"] == 2 and found.numbers["depth"] == 0.5
    assert found.sentence == (
        "zoo/a to b: similarity leaves its ceiling at relative depth 0.50 (layer 2): 60% [58%, 62%] are found in layer 1, "
        "80% [75%, 85%] in a dictionary of the same layer from another seed (null 5%); "
        "1 of the 2 layers after it are within the ceiling again."
    )
    within = findings(pair(np.full((5, 3), 0.78), **ceilings))["divergence"]
    assert not within.beyond_null and within.numbers["depth"] is None and "stays within" in within.sentence
    curve = analyze_run([pair(value, **ceilings)], {}, {}, seed=0).analysis.curves[0]
    assert (
        curve.kind == "divergence" and curve.x == [0, 0.25, 0.5, 0.75, 1] and curve.value == pytest.approx(value[:, 1])
    )
    assert curve.ceiling_low == [0.75] * 5 and curve.num


def test_a_ceiling_of_several_seeds_is_told_with_its_range():
    value = np.full((5, 3), 0.2)
    value[:, 1] = [0.78, 0.76, 0.6, 0.77, 0.5]
    given = {"ceiling": 0.8, "ceiling_low": 0.7, "ceiling_high": 0.9, "ceiling_min": 0.76, "ceiling_max": 0.85}
    given |= {"num_twins": 3}
    analysis = analyze_run(
        [pair(value, **{name: np.full((5, 3), n) for name, n in given.items()})], {}, {}, seed=0
    ).analysis
    [found] = [finding for finding in analysis.findings if finding.topic == "divergence"]
    assert (
        "80% [70%, 90%] in a dictionary of the same layer from another seed (mean of 3 seeds, 76% to 85%) (null 5%)"
        in found.sentence
    )
    assert (found.numbers["ceiling min"], found.numbers["ceiling max"], found.numbers["twins"]) == (0.76, 0.85, 3)
    [curve] = analysis.curves
    assert (curve.ceiling_min, curve.ceiling_max, curve.num_twins) == ([0.76] * 5, [0.85] * 5, 3)
    page = write_markdown(analysis, "run")
    assert "ceilings are means of 3 seeds, least and most behind them." in page and "| 0.80 (0.76 to 0.85) |" in page
    mutual = {"ceiling_mutual": 0.8, "ceiling_mutual_min": 0.7, "ceiling_mutual_max": 0.9, "num_twins": 2}
    of_links = findings(matched([0.6, 0.2, 0.6, 0.6], **{name: np.full((5, 5), n) for name, n in mutual.items()}))
    assert "80% to another seed's dictionary of the same layer (mean of 2 seeds, 70% to 90%);" in (
        of_links["bottlenecks"].sentence
    )
    assert "80% by another seed's dictionaries (mean of 2 seeds, 70% to 90%)" in of_links["throughlines"].sentence


def test_without_another_seed_no_divergence_is_told():
    result = pair(np.full((5, 3), 0.3))
    arrays = {name: a for name, a in result.arrays.items() if not name.startswith("ceiling")}
    found = findings(TransferResult(result.info, arrays))["divergence"]
    assert not found.beyond_null and "training.ceiling_seeds" in found.sentence and "is not known" in found.sentence


def test_shared_and_specific_features():
    """Three models: of a's 12 features in each of 5 layers, 6 are in both others and 3 in one alone."""
    models = [A, B, SyntheticModel("c", 4, 8, 12)]
    results = []
    for one in models:
        for other in models:
            if one != other:
                result = make_transfer(one, other, "matching")
                mppc = np.full((one.num_layers, 12), 0.1, np.float32)
                mppc[:, :6] = 0.9
                if other.name == "b":
                    mppc[:, 6:9] = 0.9
                mppc[:, 11] = np.nan  # not live
                extra = {"mppc": mppc, "mppc_threshold": np.full(one.num_layers, 0.5)}
                results.append(TransferResult(result.info, result.arrays | extra))
    labels = pl.DataFrame({"layer": [0, 1, 0], "feature": [0, 1, 10], "label": ["sum", "sum", "it"], "f1": [0.9] * 3})
    baselines = labels.with_columns(base_f1=0.1, neuron_f1=0.1, untrained_f1=0.1)
    live = pl.DataFrame({"num_active": [1] * 55})
    analysis = analyze_run(results, {"zoo/a": live}, {"zoo/a": baselines}, seed=0).analysis
    [found] = [
        f for f in analysis.findings if f.topic == "shared and specific features" and f.numbers["model"] == "zoo/a"
    ]
    assert found.numbers["in all"] == pytest.approx(6 / 11) and found.numbers["in none"] == pytest.approx(2 / 11)
    assert (
        found.numbers["shared with a label"] == pytest.approx(2 / 30) and found.beyond_null and found.numbers["n"] == 55
    )
    assert "'sum' (2)" in found.sentence and "'it' (1)" in found.sentence


def test_causes():
    result = make_transfer(A, A, "reconstruction")
    measured = {kind: np.full((5, 5, 40), np.nan) for kind in ("matched", "cosine", "cause", "random")}
    for place in range(4):
        for kind, share in (("matched", 0.5), ("cosine", 0.4), ("cause", 0.75), ("random", 0.05)):
            measured[kind][place, place + 1] = np.where(np.arange(40) < 40 * share, 0.9, 0.1)
    arrays = result.arrays | {f"{kind}_measured": a for kind, a in measured.items()}
    info = result.info.model_copy(update={"metric": "flow"})
    found = findings(TransferResult(info, arrays))["causes"]
    assert found.beyond_null and found.numbers["n"] == 160
    assert [found.numbers[kind] for kind in measured] == pytest.approx([0.5, 0.4, 0.75, 0.05])
    assert (
        found.numbers["matched: mean drop"] == pytest.approx(0.5) and "in 50% [42%, 58%] of 160 cases" in found.sentence
    )
    arrays["matched_measured"] = measured["random"]
    none = findings(TransferResult(info, arrays))["causes"]
    assert not none.beyond_null and none.sentence.endswith(
        "matched predecessors cause no more than any active feature."
    )


def test_the_page_of_text_has_every_sentence_and_nobody_s_markup():
    analysis = analyze_run([matched([0.6, 0.6, 0.6, 0.6])], {}, {}, seed=7).analysis
    evil = Finding(
        topic="labels", sentence="x: <script>alert(1)</script>\n# [a](b) | `c` *d*", beyond_null=False, numbers={}
    )
    text = write_markdown(analysis.model_copy(update={"findings": [*analysis.findings, evil]}), "study")
    assert text.startswith("# Analysis of study\n\n50,000 held-out tokens")
    for finding in analysis.findings:
        assert finding.sentence.split(":")[0] in text
    assert "<script>" not in text.replace("\\<", "") and "\n# [" not in text and "\\[a\\](b)" in text
    assert "| matching, zoo/a | 1 | 0.60 [0.5" in text and "## Persistence: numbers" in text


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (10, 10), (400, 1000)])
def test_share_has_wilson_s_interval(count, n):
    from scipy.stats import binomtest

    share, expected = Share.of(count, n), binomtest(count, n).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert math.isnan(Share.of(0, 0).value)
