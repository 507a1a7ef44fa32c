"""Chains of matched features from planted matches: who goes on, is born and dies, for how long, and in how many models."""

from itertools import chain

import numpy as np
import polars as pl
import pytest

from throughline.records import TransferInfo, TransferResult
from throughline.throughlines import (
    count_alive,
    find_throughlines,
    join_models,
    measure_persistence,
    mutual_over_layers,
)

LAYERS = [0, 2, 3, 7]  # as in a study of some layers


def result_of(
    arrays: dict[str, np.ndarray], source: str = "a", target: str = "a", layers: list[int] = LAYERS
) -> TransferResult:
    info = TransferInfo(
        metric="matching",
        source=source,
        target=target,
        source_layers=layers,
        target_layers=layers,
        quantity="",
        null="",
        ceiling=None,
        num_tokens=1000,
        num_documents=10,
        coverage=1.0,
        seed=0,
    )
    return TransferResult(info, arrays)


def linked(
    links: dict[int, list[tuple[int, int]]],
    num_features: int = 5,
    dead: tuple[tuple[int, int], ...] = (),
    depth: int = 4,
) -> dict[str, np.ndarray]:
    """Arrays of a model in which feature u of the layer at `place` is that of v in the next, both ways; all others prefer
    feature 0 of the next layer, which does not prefer them."""
    live = np.ones((depth, num_features), bool)
    for place, feature in dead:
        live[place, feature] = False
    partner = np.zeros((depth, depth, num_features), np.int32)
    correlation = np.full((depth, depth, num_features), 0.3, np.float32)
    for place, pairs in links.items():
        partner[place + 1, place] = num_features - 1  # and the last of the layer before
        for u, v in pairs:
            partner[place, place + 1, u], partner[place + 1, place, v] = v, u
            correlation[place, place + 1, u] = correlation[place + 1, place, v] = 0.9
    partner[~live[:, None].repeat(depth, 1)] = -1
    ones = np.ones((depth, depth))
    return {"live": live, "partner": partner, "correlation": correlation, "threshold": 0.5 * ones, "null": 0.1 * ones}


def chains_of(table: pl.DataFrame) -> list[list[tuple[int, int]]]:
    groups = table.group_by("throughline", maintain_order=True).agg("layer", "feature")
    return sorted(list(zip(layers, features, strict=True)) for _, layers, features in groups.iter_rows())


def test_chains_births_and_deaths():
    links = {0: [(1, 2), (2, 3)], 1: [(2, 2), (1, 4)], 2: [(2, 1)]}
    table = find_throughlines(result_of(linked(links, dead=((3, 0),))))
    chains = chains_of(table)
    assert [(0, 1), (2, 2), (3, 2), (7, 1)] in chains  # born in the first layer, alive in the last
    assert [(0, 2), (2, 3)] in chains and [(2, 1), (3, 4)] in chains
    assert sum(len(one) == 1 for one in chains) == 19 - 4 - 2 - 2
    assert sorted(chain.from_iterable(chains)) == [
        (n, f) for n in LAYERS for f in range(5) if (n, f) != (7, 0)
    ]  # each once
    row = table.filter((pl.col("layer") == 3) & (pl.col("feature") == 4)).row(0, named=True)
    assert (row["birth"], row["death"], row["length"]) == (2, 3, 2)


def test_a_link_is_mutual_and_above_both_thresholds():
    arrays = linked({0: [(1, 2)], 1: [(2, 3)]})
    arrays["correlation"][1, 2, 2] = arrays["correlation"][2, 1, 3] = 0.55
    assert [(0, 1), (2, 2), (3, 3)] in chains_of(find_throughlines(result_of(arrays)))
    arrays["threshold"][2, 1] = 0.6  # of the way back
    assert [(0, 1), (2, 2)] in chains_of(find_throughlines(result_of(arrays)))
    arrays["partner"][1, 0, 2] = 4
    assert [(0, 1)] in chains_of(find_throughlines(result_of(arrays)))


def test_the_ribbon_counts_who_is_alive():
    links = {0: [(1, 2), (2, 3)], 1: [(2, 2), (1, 4)], 2: [(2, 1)]}
    table = find_throughlines(result_of(linked(links)))
    ribbon = count_alive("a", LAYERS, table)
    assert ribbon.alive == [[5, 2, 1, 1], [0, 3, 1, 0], [0, 0, 3, 0], [0, 0, 0, 4]]
    assert [sum(column) for column in zip(*ribbon.alive, strict=True)] == [5, 5, 5, 5]


def test_persistence_is_counted_feature_by_feature():
    rng = np.random.default_rng(0)
    links = {place: [(u, u) for u in range(40) if rng.random() < 0.7] for place in range(3)}
    arrays = linked(links, num_features=41)
    arrays |= {"ceiling_mutual": np.full((4, 4), 0.8), "ceiling_mutual_min": np.full((4, 4), 0.7)}
    result = result_of(arrays)
    table = find_throughlines(result)
    lived = measure_persistence(result, table)
    number = {(n, f): t for t, n, f in table.select("throughline", "layer", "feature").iter_rows()}
    for d in range(4):
        pairs = [
            (number[LAYERS[i], f], {number[LAYERS[i + d], g] for g in range(41)})
            for i in range(4 - d)
            for f in range(41)
        ]
        assert lived.share_D[d] == pytest.approx(np.mean([mine in there for mine, there in pairs]))
        assert lived.num_D[d] == len(pairs)
        assert lived.null_D[d] == pytest.approx(0.1**d) and lived.ceiling_D[d] == pytest.approx(0.8**d)
        assert lived.ceiling_min_D[d] == pytest.approx(0.7**d)
    assert np.isnan(lived.ceiling_max_D[1:]).all()
    assert (lived.low_D[1:] < lived.share_D[1:]).all() and (lived.share_D[1:] < lived.high_D[1:]).all()
    d = int(np.flatnonzero(lived.share_D <= 0.5)[0])
    assert d - 1 < (lived.half_life or 0) <= d


def test_intervals_of_persistence_cover_what_is_planted():
    """Features go on with probability 0.6 at every layer: S(1) = 0.6 and S(2) = 0.36."""
    inside = np.zeros(2)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        result = result_of(
            linked({place: [(u, u) for u in range(1, 120) if rng.random() < 0.6] for place in range(3)}, 121)
        )
        lived = measure_persistence(result, find_throughlines(result))
        inside += [lived.low_D[d] <= 0.6**d * 119 / 121 <= lived.high_D[d] for d in (1, 2)]
    assert (inside >= 0.85 * 60).all()


def test_what_never_dies_has_no_half_life():
    result = result_of(linked({place: [(u, u) for u in range(5)] for place in range(3)}))
    lived = measure_persistence(result, find_throughlines(result))
    assert lived.half_life is None and (lived.share_D == 1).all() and np.isnan(lived.ceiling_D[1])


def between(
    pairs: list[tuple[tuple[int, int], tuple[int, int]]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays of two models, both ways, whose given (place, feature) are each other's best; all others prefer (0, 0)."""
    both = []
    for turn in (1, -1):
        place, mppc = np.zeros((4, 5), np.int32), np.full((4, 5), 0.6, np.float32)
        partner = np.zeros((4, 4, 5), np.int32)
        for pair in pairs:
            (i, u), (j, v) = pair[::turn]
            place[i, u], partner[i, j, u], mppc[i, u] = j, v, 0.9
        both.append({"mppc": mppc, "mppc_place": place, "mppc_threshold": np.full(4, 0.5), "partner": partner})
        both[-1]["live"] = np.ones((4, 5), bool)
    return both[0], both[1]


def test_throughlines_of_several_models_that_belong_together():
    own = {name: result_of(linked({0: [(1, 2)], 1: [(2, 3)]}), name, name) for name in "abc"}
    tables = {name: find_throughlines(result) for name, result in own.items()}
    # a's chain is b's through its second feature; b's is c's through its third; a and c have no link of their own
    ab, ba = between([((1, 2), (2, 3)), ((3, 4), (3, 4))])
    bc, cb = between([((0, 1), (2, 3))])
    ac, ca = between([])
    arrays = {"ab": ab, "ba": ba, "bc": bc, "cb": cb, "ac": ac, "ca": ca}
    results = {(pair[0], pair[1]): result_of(a, pair[0], pair[1]) for pair, a in arrays.items()}
    assert ((1, 2), (2, 3)) in mutual_over_layers(results["a", "b"], results["b", "a"])
    joined = join_models(results, tables)
    families = {
        name: {f: set(rows["feature"].to_list()) for (f,), rows in table.drop_nulls("family").group_by("family")}
        for name, table in joined.items()
    }
    whole = [family for family, features in families["a"].items() if features == {1, 2, 3}]
    assert len(whole) == 1 and all(families[name][whole[0]] == {1, 2, 3} for name in "bc")
    assert any(features == {4} for features in families["a"].values())
    ab["mppc"][1, 2] = 0.4  # below the threshold
    cut = join_models(results, tables)
    assert whole[0] not in cut["a"]["family"].to_list()


def test_one_model_has_no_families():
    table = find_throughlines(result_of(linked({})))
    assert join_models({}, {"a": table})["a"]["family"].null_count() == len(table) == 20
