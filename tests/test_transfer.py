"""Transfer metrics on planted features whose partners, or whose lack of any, are known."""

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from builders import GivenSide, make_codes, random_dictionary, random_documents, tiny_model
from throughline.codes import Codes, encode_text
from throughline.errors import InputError
from throughline.models import open_model
from throughline.records import TransferResult
from throughline.registry import METRICS
from throughline.run_dir import RunDir
from throughline.stats import bootstrap_interval
from throughline.study import ModelSpec, parse_study
from throughline.tokens import collect_rows
from throughline.transfer import Side
from throughline.transfer.matching import CEILINGS, SPREADS, Matching
from throughline.transfer.pairs import align, correlate, moments_of, prepare, shift_documents, shuffle_within
from throughline.zoo.texts import sample_problems

DOCUMENTS = random_documents(300, seed=0, answers=True)
NUM_TOKENS = make_codes(DOCUMENTS).num_tokens


def sparse_features(num_features: int, seed: int, density: float = 0.08) -> np.ndarray:
    """Independent features, active on a random share of the tokens, [N, F]."""
    rng = np.random.default_rng(seed)
    shape = (NUM_TOKENS, num_features)
    return ((rng.random(shape) < density) * (0.5 + rng.random(shape))).astype(np.float32)


def side_of(model: str, *layers: np.ndarray, residual_LND: np.ndarray | None = None, dictionaries=None) -> Side:
    """A model whose features at each layer are given; dictionaries are random where they do not matter."""
    codes = replace(
        make_codes(DOCUMENTS),
        layers={layer: sp.csr_array(features) for layer, features in enumerate(layers)},
        residual_LND=residual_LND,
    )
    dictionaries = dictionaries or {i: random_dictionary(4, f.shape[1]) for i, f in enumerate(layers)}
    return GivenSide(model, dictionaries, codes, codes, codes)


def match(source: np.ndarray, target: np.ndarray, min_count: int = 20) -> TransferResult:
    return Matching().compute(side_of("a", source), side_of("b", target), seed=0, min_count=min_count)[0]


# ---- the parts


def test_correlation_is_pearsons():
    a, b = sparse_features(12, 1), sparse_features(9, 2)
    b[:, 3] = a[:, 5] + 0.1 * b[:, 3]
    a[:, 7] = 0
    a[:, 8] = 100 + 0.1 * a[:, 8]  # always on, and hardly changes
    b[:, 2] = 100 + 0.1 * b[:, 2] + a[:, 8]
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(a.astype(np.float64), b.astype(np.float64), rowvar=False)[:12, 12:]
    expected[7] = 0  # a feature that never fires correlates with nothing
    np.testing.assert_allclose(correlate(prepare(sp.csr_array(a)), prepare(sp.csr_array(b))), expected, atol=1e-6)


def test_moments_count_zeros():
    a = sparse_features(5, 3)
    moments = moments_of(sp.csr_array(a))
    np.testing.assert_array_equal(moments.num_active, (a > 0).sum(0))
    np.testing.assert_allclose(moments.mean, a.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(moments.deviation, a.std(0, dtype=np.float64), rtol=1e-6)


def test_documents_are_shifted_place_by_place():
    codes = make_codes(DOCUMENTS[:7])
    kept = np.flatnonzero(np.random.default_rng(0).random(codes.num_tokens) < 0.8)  # as after an alignment
    shifted = shift_documents(codes, kept, by=1)
    numbers = codes.documents_N[kept]
    tokens = {d: np.flatnonzero(numbers == d) for d in range(7)}
    for i, other in enumerate(shifted):
        document, place = numbers[i], int(np.flatnonzero(tokens[numbers[i]] == i)[0])
        following = tokens[(document + 1) % 7]
        assert other == (following[place] if place < len(following) else -1)
    assert (numbers[shifted[shifted >= 0]] != numbers[shifted >= 0]).all()
    assert (shifted >= 0).mean() > 0.7


def test_a_lone_document_is_not_its_own_neighbour():
    codes = make_codes(DOCUMENTS[:1])
    assert (shift_documents(codes, np.arange(codes.num_tokens), by=1) == -1).all()
    side = GivenSide("a", {0: random_dictionary(4, 1)}, codes, codes, codes)
    with pytest.raises(InputError, match=r"two held-out documents or more, found 1; [^\n]+$"):
        Matching().compute(side, side, seed=0, min_count=1)


def test_shuffling_keeps_roles():
    roles = make_codes(DOCUMENTS).roles_N
    order = shuffle_within(roles, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(order), np.arange(len(roles)))
    np.testing.assert_array_equal(roles[order], roles)
    assert (order != np.arange(len(roles))).mean() > 0.9 and len(np.unique(roles)) >= 4


@pytest.mark.parametrize("binary", [True, False])
def test_bootstrap_interval_is_that_of_the_mean(binary):
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 400, 1600):
        values = (rng.random(n) < 0.4).astype(float) if binary else rng.exponential(size=n)
        low, high = bootstrap_interval(values, seed=1)
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(n), rel=0.15)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]
    assert all(math.isnan(x) for x in bootstrap_interval(np.array([]), seed=0))


# ---- matching


def test_independent_features_have_no_partners():
    arrays = match(sparse_features(400, 10), sparse_features(300, 11)).arrays
    assert arrays["value"][0, 0] <= 0.01 and arrays["null"][0, 0] <= 0.01 and arrays["mutual"][0, 0] <= 0.01
    assert arrays["live"].all()
    assert (arrays["correlation"] < 0.15).all()


def test_permuted_features_are_found_again():
    source = sparse_features(60, 12)
    order = np.random.default_rng(0).permutation(60)
    noise = 1 + 0.1 * np.random.default_rng(1).standard_normal(source.shape).astype(np.float32)
    target = np.hstack([(source * noise)[:, order], sparse_features(20, 13)])
    arrays = match(source, target).arrays
    np.testing.assert_array_equal(arrays["partner"][0, 0], np.argsort(order))
    assert arrays["value"][0, 0] == arrays["mutual"][0, 0] == 1 and arrays["null"][0, 0] <= 0.02
    for u in (0, 31, 59):
        expected = np.corrcoef(source[:, u], target[:, arrays["partner"][0, 0, u]])[0, 1]
        assert arrays["correlation"][0, 0, u] == pytest.approx(expected, abs=1e-5)
    back = match(target, source).arrays
    assert back["value"][0, 0] == pytest.approx(60 / 80, abs=0.02)
    assert (back["partner"][0, 0, :60] == order).all()


def test_what_the_kind_of_position_explains_is_the_null():
    """Features of both models that fire on all numbers of the question and nowhere else match, and say nothing."""
    role = np.unique(make_codes(DOCUMENTS).roles_N)[0]
    on = (make_codes(DOCUMENTS).roles_N == role)[:, None] * 1.0
    source, target = np.hstack([on, sparse_features(99, 1)]), np.hstack([on, sparse_features(99, 2)])
    arrays = match(source.astype(np.float32), target.astype(np.float32)).arrays
    assert arrays["correlation"][0, 0, 0] == pytest.approx(1) and arrays["partner"][0, 0, 0] == 0
    assert 0.01 <= arrays["null"][0, 0] <= arrays["value"][0, 0] + 0.01


def test_rare_features_are_left_out():
    source, target = sparse_features(50, 14), sparse_features(40, 15)
    source[:, 7] = target[:, 9] = 0
    source[5, 7] = target[5, 9] = 3.0  # meet once: correlation 1
    arrays = match(source, target, min_count=20).arrays
    assert not arrays["live"][0, 7] and arrays["live"].sum() == 49
    assert arrays["partner"][0, 0, 7] == -1 and np.isnan(arrays["correlation"][0, 0, 7])
    assert 9 not in arrays["partner"][0, 0]
    with_rare = match(source, target, min_count=1).arrays
    assert with_rare["partner"][0, 0, 7] == 9 and with_rare["correlation"][0, 0, 7] == pytest.approx(1)


def test_layers_without_live_features_have_no_value():
    result = match(sparse_features(10, 1), sparse_features(10, 2), min_count=NUM_TOKENS)
    assert np.isnan(result.arrays["value"]).all() and (result.arrays["partner"] == -1).all()
    assert not result.arrays["live"].any()


def test_layers_and_widths_keep_their_places():
    """Three source layers of unequal width; only layer 1 has counterparts, in target layer 0."""
    shared = sparse_features(30, 16)
    source = side_of("a", sparse_features(50, 17), shared, sparse_features(40, 18))
    target = side_of("b", shared[:, ::-1].copy(), sparse_features(20, 19))
    result = Matching().compute(source, target, seed=0, min_count=20)[0]
    assert result.arrays["value"].shape == (3, 2) and result.arrays["partner"].shape == (3, 2, 50)
    assert result.arrays["value"][1, 0] == 1
    assert np.delete(result.arrays["value"].ravel(), 2).max() <= 0.05
    np.testing.assert_array_equal(result.arrays["partner"][1, 0, :30], np.arange(30)[::-1])
    assert (result.arrays["partner"][1, 0, 30:] == -1).all() and not result.arrays["live"][1, 30:].any()


# ---- two tokenizers


@pytest.fixture(scope="module")
def zoo_sides() -> list[Side]:
    """gpt2 (numbers whole) and pythia (digits alone) on the same forty problems, with random dictionaries."""
    documents = list(islice(sample_problems("heldout", 0), 40))
    sides = []
    for name in ("zoo/gpt2", "zoo/pythia"):
        model = open_model(ModelSpec(path=name))
        dictionaries = {layer: random_dictionary(model.d_model, 24, k=4, seed=layer) for layer in (1, 3)}
        codes = encode_text(model, dictionaries, collect_rows(documents, model.tokenizer, 64), documents, True)
        sides.append(GivenSide(name, dictionaries, codes, codes, codes, language_model=model))
    return sides


def test_tokens_are_aligned_where_they_end(zoo_sides):
    whole, digits = (side.codes for side in zoo_sides)
    aligned = align(whole, digits)
    expected = pairs_by_loop(whole, digits)
    assert list(zip(aligned.source_N.tolist(), aligned.target_N.tolist(), strict=True)) == expected
    assert aligned.coverage == pytest.approx(len(expected) / whole.num_tokens)
    texts = [(whole.token_texts[i], digits.token_texts[j]) for i, j in expected]
    numbers = [(a, b) for a, b in texts if a.strip().isdigit() and len(a.strip()) == 2]
    assert len(numbers) > 80 and all(len(b) == 1 and a.endswith(b) for a, b in numbers), "the units digit"
    assert all(b.endswith(a) or a.endswith(b) for a, b in texts)


def pairs_by_loop(a: Codes, b: Codes) -> list[tuple[int, int]]:
    places = {(int(d), int(e)): j for j, (d, e) in enumerate(zip(b.documents_N, b.ends_N, strict=True))}
    ends = enumerate(zip(a.documents_N.tolist(), a.ends_N.tolist(), strict=True))
    return [(i, places[place]) for i, place in ends if place in places]


def test_codes_are_in_reading_order_with_their_own_activations(zoo_sides):
    """Token i's text, features and activations belong together, whatever row it was packed into."""
    codes, model = zoo_sides[1].codes, open_model(ModelSpec(path="zoo/pythia"))
    order = np.lexsort((codes.starts_N, codes.documents_N))
    np.testing.assert_array_equal(order, np.arange(codes.num_tokens))
    for number in (0, 17, 39):
        ids = model.tokenizer(codes.documents[number].text).input_ids
        here = codes.documents_N == number
        np.testing.assert_array_equal(codes.ids_N[here], ids)
        with torch.no_grad():
            alone = model.run(model.inputs(np.array([ids])), capture=[3], logits=False).residuals[3][0]
        np.testing.assert_allclose(codes.residual_LND[1][here], alone, atol=1e-4)
        f = zoo_sides[1].dictionaries[3].encode(alone)
        np.testing.assert_allclose(codes.layers[3][here].toarray(), f, atol=1e-4)


# ---- every metric


@pytest.fixture(scope="module")
def layered() -> Side:
    """A model of random weights, whose features fire at random."""
    model = tiny_model()
    dictionaries = {layer: random_dictionary(model.d_model, 20, k=3, seed=layer) for layer in range(3)}
    codes = encode_text(model, dictionaries, make_codes(DOCUMENTS).rows, DOCUMENTS, keep_residuals=True)
    return GivenSide("org/model-1.5", dictionaries, codes, codes, codes, language_model=model)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_keeps_the_contract(name, layered, zoo_sides, tmp_path):
    metric = METRICS.load(name)()
    assert metric.name == name
    pairs = [(layered, layered), (zoo_sides[0], zoo_sides[0])]
    if metric.across_models:
        pairs += [tuple(zoo_sides), tuple(zoo_sides[::-1])]
    run = RunDir.create(tmp_path / "run", parse_study({"name": "x", "models": ["zoo/gpt2"], "data": {"path": "x"}}))
    for source, target in pairs:
        results = metric.compute(source, target, seed=0, min_count=10)
        ways = [(source.model, target.model), (target.model, source.model)]
        assert [(r.info.source, r.info.target) for r in results] == ways[
            : 1 + (metric.both_ways and source is not target)
        ]
        result = results[0]
        info, arrays = result.info, result.arrays
        assert (info.metric, info.source, info.target, info.seed) == (name, source.model, target.model, 0)
        assert (info.source_layers, info.target_layers) == (list(source.dictionaries), list(target.dictionaries))
        assert info.quantity and info.num_tokens > 100 and info.num_documents > 10 and 0 < info.coverage <= 1
        assert info.coverage == 1 or source is not target
        assert (info.null is not None) == ("null" in arrays) and (info.ceiling is not None) == ("ceiling" in arrays)
        shape = (len(source.dictionaries), len(target.dictionaries))
        assert all(arrays[key].shape == shape for key in ("value", "low", "high", *({"null", "ceiling"} & set(arrays))))
        known = np.isfinite(arrays["value"])  # flow relates a layer to later ones alone
        low, value, high = (arrays[key][known] for key in ("low", "value", "high"))
        assert len(value) and (low <= value + 1e-9).all() and (value <= high + 1e-9).all()
        again = metric.compute(source, target, seed=0, min_count=10)[0]
        run.write_transfer(result)
        for other in (again, run.transfer(name, source.model, target.model)):
            assert other.info == info and other.arrays.keys() == arrays.keys()
            for key, array in arrays.items():
                np.testing.assert_array_equal(other.arrays[key], array)
                assert other.arrays[key].dtype == array.dtype
    assert len(run.transfers()) == len(pairs)


# ---- matching: ceilings, the same tokens, the best of all layers


def test_the_twin_is_the_ceiling():
    """Of a layer's 60 features the twin has 45 again, in another order; of the second layer's none."""
    first, second = sparse_features(60, 20), sparse_features(60, 21)
    order = np.random.default_rng(0).permutation(60)
    again = np.hstack([first[:, :45], sparse_features(15, 22)])[:, order]
    side = side_of("a", first, second)
    twin_codes = replace(side.codes, layers={0: sp.csr_array(again), 1: sp.csr_array(sparse_features(60, 23))})
    twins = {layer: random_dictionary(4, 60, seed=5 + layer) for layer in (0, 1)}
    given = GivenSide(
        "a", side.dictionaries, side.codes, side.codes, side.codes, twins=[twins], twin_codes=[twin_codes]
    )
    other = side_of("b", sparse_features(60, 24), sparse_features(60, 25))
    for result in (
        Matching().compute(given, given, seed=0, min_count=20)[0],
        Matching().compute(given, other, seed=0, min_count=20)[0],
        Matching().compute(other, given, seed=0, min_count=20)[1],
    ):
        arrays = result.arrays
        assert result.info.ceiling is not None
        assert arrays["ceiling"][0] == pytest.approx(0.75, abs=0.02) and (arrays["ceiling"][1] <= 0.02).all()
        assert arrays["ceiling_mutual"][0] == pytest.approx(0.75, abs=0.02)
        assert (arrays["ceiling_low"][0] < arrays["ceiling"][0]).all() and (
            arrays["ceiling_high"][0] > arrays["ceiling"][0]
        ).all()
        assert (arrays["ceiling_correlation"][0] > 0.7).all()
    without = Matching().compute(other, given, seed=0, min_count=20)[0]
    assert without.info.ceiling is None and not any(name.startswith("ceiling") for name in without.arrays)


def test_one_twin_alone_is_the_ceiling_of_its_layer():
    first, second = sparse_features(60, 20), sparse_features(60, 21)
    side = side_of("a", first, second)
    twin_codes = replace(side.codes, layers={1: sp.csr_array(second)})
    twins = [{1: side.dictionaries[1]}]
    given = GivenSide("a", side.dictionaries, side.codes, side.codes, side.codes, twins, [twin_codes])
    ceiling = Matching().compute(given, given, seed=0, min_count=20)[0].arrays["ceiling"]
    assert np.isnan(ceiling[0]).all() and (ceiling[1] == 1).all()


def test_several_twins_give_their_mean_and_range():
    """Of a layer's 60 features three twins have 30, 45 and 60 again; of the second layer's two have 15 and 30, one is not there.

    All else is as with one twin, to the bit; each twin alone gives what the mean is made of.
    """
    first, second = sparse_features(60, 20), sparse_features(60, 21)
    side, other = side_of("a", first, second), side_of("b", sparse_features(60, 24), sparse_features(60, 25))

    def again(features: np.ndarray, kept: int, seed: int) -> sp.csr_array:
        shuffled = np.random.default_rng(seed).permutation(60)
        return sp.csr_array(np.hstack([features[:, :kept], sparse_features(60 - kept, seed)])[:, shuffled])

    layers = [
        {0: again(first, 30, 40), 1: again(second, 15, 41)},
        {0: again(first, 45, 42), 1: again(second, 30, 43)},
        {0: sp.csr_array(first)},
    ]

    def matched(which: list[int]) -> list[dict[str, np.ndarray]]:
        twins = [{layer: random_dictionary(4, 60, seed=5 + layer) for layer in layers[n]} for n in which]
        codes = [replace(side.codes, layers=layers[n]) for n in which]
        given = GivenSide("a", side.dictionaries, side.codes, side.codes, side.codes, twins=twins, twin_codes=codes)
        pairs = ((given, given, 0), (given, other, 0), (other, given, 1))
        return [Matching().compute(a, b, seed=0, min_count=20)[way].arrays for a, b, way in pairs]

    alone = [matched([n]) for n in range(3)]
    for way, arrays in enumerate(matched([0, 1, 2])):
        assert arrays["ceiling"][0] == pytest.approx((0.5 + 0.75 + 1) / 3, abs=0.02)
        assert arrays["ceiling"][1] == pytest.approx((0.25 + 0.5) / 2, abs=0.02)
        np.testing.assert_allclose(arrays["ceiling_min"], [[0.5] * 2, [0.25] * 2], atol=0.02)
        np.testing.assert_allclose(arrays["ceiling_max"], [[1.0] * 2, [0.5] * 2], atol=0.02)
        assert (arrays["num_twins"] == [[3, 3], [2, 2]]).all()
        for name in ("ceiling", "ceiling_mutual", "ceiling_correlation"):
            each = np.stack([found[way][name] for found in alone])
            np.testing.assert_allclose(arrays[name], np.nanmean(each, axis=0), rtol=1e-12)
            np.testing.assert_array_equal(arrays[f"{name}_min"], np.nanmin(each, axis=0))
            np.testing.assert_array_equal(arrays[f"{name}_max"], np.nanmax(each, axis=0))
        for name, end in (("ceiling_low", np.nanmin), ("ceiling_high", np.nanmax)):
            np.testing.assert_array_equal(arrays[name], end(np.stack([found[way][name] for found in alone]), axis=0))
        of_one = alone[0][way]
        assert arrays.keys() - of_one.keys() == set(SPREADS)
        assert all(of_one[name].tobytes() == arrays[name].tobytes() for name in of_one if name not in CEILINGS)


def test_the_best_of_all_layers():
    """Half of the source's features are in the target's second layer, a quarter weakly in its first as well."""
    source = sparse_features(80, 30)
    there = np.hstack([source[:, :40], sparse_features(40, 31)])
    weak = np.hstack([source[:, :20] + 2 * sparse_features(20, 32), sparse_features(60, 33)])
    forth, back = Matching().compute(side_of("a", source), side_of("b", weak, there), seed=0, min_count=20)
    arrays = forth.arrays
    np.testing.assert_array_equal(arrays["mppc"], np.nanmax(arrays["correlation"], axis=1))
    assert (arrays["mppc_place"][0, :40] == 1).all()
    assert arrays["mppc_share"][0] == pytest.approx(0.5, abs=0.02)
    assert arrays["mppc_threshold"][0] >= np.quantile(np.nanmax(arrays["chance"], axis=1), 0.99)
    assert back.arrays["mppc_share"][1] == pytest.approx(0.5, abs=0.02)
    assert "mppc" not in Matching().compute(side_of("a", source), side_of("a", source), seed=0, min_count=20)[0].arrays
