"""Dictionaries on other layers' activations: planted rotations, scales, embeddings; ceilings, floors, what maps are fitted on."""

import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from builders import GivenSide, dictionary_of, identity_dictionary, random_dictionary
from planted import (
    ACTIVE,
    Layer,
    coefficients,
    layer_of,
    layered_side,
    orthonormal,
    planted_layer,
    scaled_and_moved,
    turned,
)
from throughline.codes import encode_text
from throughline.errors import InputError
from throughline.models import open_model
from throughline.pipeline.transfer import _metric_options
from throughline.quality import evaluate
from throughline.study import GateSpec, ModelSpec, parse_study
from throughline.tokens import TokenRows, collect_rows
from throughline.transfer import Side
from throughline.transfer.maps import Affine, FitTokens, LayerMoments, Maps, carry, fit_layers
from throughline.transfer.reconstruction import MOST_TOKENS, Reconstruction, splice_ce
from throughline.zoo.texts import sample_problems

OFF = ((0, 1), (1, 0))


def reconstruct(source: Side, target: Side | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    return Reconstruction().compute(source, target or source, seed=seed, min_count=1)[0].arrays


def moments(x_ND: torch.Tensor, num_fit: int) -> LayerMoments:
    return LayerMoments.of(FitTokens(x_ND.numpy(), np.arange(len(x_ND)), num_fit, torch.device("cpu")))


def embedded(d_model: int, seed: int, num_features: int = 24) -> Layer:
    """The features that all such layers share, along random unit directions of its own."""
    directions = torch.randn(num_features, d_model, generator=torch.Generator().manual_seed(seed))
    rows_FD = directions / directions.norm(dim=1, keepdim=True)
    held, fit, d = layer_of(coefficients(num_features), rows_FD, seed, noise=0.02)
    read_FD = torch.linalg.pinv(rows_FD).T  # directions interfere, so features are read by what tells them apart
    return held, fit, replace(d, W_enc=read_FD.T.contiguous(), b_enc=-(read_FD @ d.b_dec))


# ---- planted


def test_a_rotation_is_undone_by_maps_and_by_nothing_else():
    arrays = reconstruct(layered_side("m", planted_layer(), turned(planted_layer())))
    assert np.diag(arrays["ridge"]).min() > 0.97
    for place in OFF:
        for name in ("raw", "scaled"):
            assert arrays[name][place] < arrays["null_scaled"][place] + 0.1, name
        for name in ("orthogonal", "ridge"):
            assert arrays[name][place] == pytest.approx(arrays["ceiling"][place], abs=0.01), name
        assert arrays["round_trip"][place] > 0.999
    for name in ("null", "null_scaled", "null_orthogonal"):
        assert arrays[name].max() < 0.5, name


def test_scale_and_mean_do_not_count():
    arrays = reconstruct(layered_side("m", planted_layer(), scaled_and_moved(planted_layer())))
    for name in ("scaled", "orthogonal", "ridge"):
        np.testing.assert_allclose(arrays[name], arrays["ceiling"], atol=1e-5)
    assert arrays["raw"][0, 1] < arrays["ceiling"][0, 1] - 0.1 and arrays["raw"][1, 0] < arrays["ceiling"][1, 0] - 0.1
    np.testing.assert_allclose(np.diag(arrays["raw"]), np.diag(arrays["scaled"]), atol=1e-6)
    for name in ("l0", "l0_scaled", "l0_orthogonal"):
        np.testing.assert_allclose(arrays[name], ACTIVE, atol=0.05)


def test_unrelated_layers_explain_no_more_than_the_floor():
    arrays = reconstruct(layered_side("m", planted_layer(3), planted_layer(8)))
    for place in OFF:
        assert arrays["value"][place] < 0.05 and arrays["round_trip"][place] < 0.05


def test_two_models_of_unequal_width_share_their_features():
    narrow, wide = layered_side("narrow", embedded(64, 1), planted_wide()), layered_side("wide", embedded(96, 2))
    there, back = Reconstruction().compute(narrow, wide, seed=0, min_count=1)
    assert (there.info.source, there.info.target, back.info.source, back.info.target) == (
        "narrow",
        "wide",
        "wide",
        "narrow",
    )
    assert there.arrays["value"].shape == (2, 1) and back.arrays["value"].shape == (1, 2)
    for arrays, shared, apart in ((there.arrays, (0, 0), (1, 0)), (back.arrays, (0, 0), (0, 1))):
        assert arrays["ridge"][shared] > 0.97 * arrays["ceiling"][shared] > 0.95
        assert arrays["round_trip"][shared] > 0.98
        assert arrays["null"][shared] < 0.3 and arrays["null_orthogonal"][shared] < 0.3
        assert arrays["orthogonal"][shared] > 0.7, "the embeddings are no rotations of each other"
        assert arrays["ridge"][apart] < 0.1, "the other layer has features of its own"
        assert np.isnan(arrays["raw"]).all() and np.isnan(arrays["scaled"]).all()
    np.testing.assert_array_equal(there.arrays["value"], there.arrays["ridge"])


def planted_wide() -> Layer:
    """Other features in 64 dimensions."""
    return layer_of(coefficients(24, seed=9), orthonormal(24, 64, 9), seed=9)


def test_both_directions_are_those_of_the_reverse():
    a, b = layered_side("a", embedded(64, 1), planted_wide()), layered_side("b", embedded(96, 2))
    one, other = (Reconstruction().compute(*pair, seed=0, min_count=1) for pair in ((a, b), (b, a)))
    for x, y in ((one[0], other[1]), (one[1], other[0])):
        assert (x.info.source, x.info.num_tokens, x.info.coverage) == (
            y.info.source,
            y.info.num_tokens,
            y.info.coverage,
        )
        for name in x.arrays:
            np.testing.assert_allclose(x.arrays[name], y.arrays[name], atol=2e-3, err_msg=name)


def test_maps_of_few_tokens_do_not_explode():
    """24 documents of about nine tokens fit 64 x 96 maps: less is explained than with all, but nothing is made up."""
    narrow, wide = embedded(64, 1), embedded(96, 2)
    few, many = (
        reconstruct(layered_side("narrow", narrow, num_fit=n), layered_side("wide", wide, num_fit=n)) for n in (24, 300)
    )
    assert 0.5 < few["value"][0, 0] <= many["value"][0, 0] + 0.01
    unrelated = reconstruct(layered_side("a", planted_wide(), num_fit=6), layered_side("b", wide, num_fit=6))
    assert -0.2 < unrelated["value"][0, 0] < 0.2


# ---- ceilings and intervals


def test_another_seed_is_the_twin_ceiling():
    layers = planted_layer(3), planted_layer(8)
    blind = random_dictionary(24, 24, k=ACTIVE)
    twins = {0: layers[0][2], 1: blind}
    arrays = reconstruct(layered_side("m", *layers, twins=[twins]))
    np.testing.assert_allclose(arrays["twin_ceiling"][:, 0], arrays["ceiling"][:, 0])
    assert (arrays["twin_ceiling"][:, 1] < arrays["ceiling"][:, 1] - 0.5).all()
    only_first = reconstruct(layered_side("m", *layers, twins=[{0: layers[0][2]}]))["twin_ceiling"]
    assert np.isfinite(only_first[:, 0]).all() and np.isnan(only_first[:, 1]).all()
    assert np.isnan(reconstruct(layered_side("m", *layers))["twin_ceiling"]).all()


def test_several_seeds_give_their_mean_and_range():
    """Of the first layer one twin is its own dictionary and one blind; of the second there is one twin. All else is as with one."""
    layers = planted_layer(3), planted_layer(8)
    blind = random_dictionary(24, 24, k=ACTIVE)
    one, other = {0: layers[0][2]}, {0: blind, 1: layers[1][2]}
    alone = [reconstruct(layered_side("m", *layers, twins=[twins])) for twins in (one, other)]
    arrays = reconstruct(layered_side("m", *layers, twins=[one, other]))
    each = np.stack([found["twin_ceiling"] for found in alone])
    np.testing.assert_allclose(arrays["twin_ceiling"], np.nanmean(each, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(arrays["twin_ceiling_min"], np.nanmin(each, axis=0))
    np.testing.assert_array_equal(arrays["twin_ceiling_max"], np.nanmax(each, axis=0))
    assert (arrays["num_twins"] == [[2, 1]] * 2).all()
    assert (arrays["twin_ceiling_max"] - arrays["twin_ceiling_min"] > 0.5)[:, 0].all()
    assert arrays.keys() - alone[0].keys() == {"twin_ceiling_min", "twin_ceiling_max", "num_twins"}
    assert all(a.tobytes() == arrays[name].tobytes() for name, a in alone[0].items() if name != "twin_ceiling")


def test_the_interval_is_that_of_resampled_documents():
    layer = planted_layer()
    side = layered_side("m", layer)
    arrays = reconstruct(side)
    residual_N = (layer[0] - layer[2].reconstruct(layer[0])).square().sum(1).double().numpy()
    variance_N = (layer[0] - layer[0].mean(0)).square().sum(1).double().numpy()
    documents = side.sample.documents_N
    sums = [np.bincount(documents, values) for values in (residual_N, variance_N)]
    rng, count = np.random.default_rng(5), len(sums[0])
    draws = rng.integers(count, size=(2000, count))
    ratios = 1 - sums[0][draws].sum(1) / sums[1][draws].sum(1)
    width = np.quantile(ratios, 0.975) - np.quantile(ratios, 0.025)
    assert arrays["high"][0, 0] - arrays["low"][0, 0] == pytest.approx(width, rel=0.15)
    assert arrays["low"][0, 0] < arrays["value"][0, 0] < arrays["high"][0, 0]


# ---- against plain loops


def test_explained_variance_is_that_of_a_loop():
    """Source layer 0 on the rotated and moved activations, token by token in float64."""
    layers = planted_layer(), scaled_and_moved(turned(planted_layer()))
    (_, fit_i, dictionary), (x_j, fit_j, _) = layers
    num_fit = token_of_document(layered_side("m", *layers), 300 - 37)  # the last eighth chooses the penalty
    fit_i, fit_j = fit_i[:num_fit].double(), fit_j[:num_fit].double()
    m_i, m_j = fit_i.mean(0), fit_j.mean(0)
    s_i, s_j = ((x - x.mean(0)).norm(dim=1).mean() for x in (fit_i, fit_j))
    U, _, V = torch.linalg.svd((fit_j - m_j).T @ (fit_i - m_i))
    W_enc, b_enc, W_dec, b_dec = (getattr(dictionary, name).double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))

    def loop(down, up) -> float:
        left = total = 0.0
        for x in x_j.double():
            pre = down(x) @ W_enc + b_enc
            kept = pre.relu() * (pre >= pre.sort().values[-ACTIVE])
            left += float((x - up(kept @ W_dec + b_dec)).square().sum())
            total += float((x - x_j.double().mean(0)).square().sum())
        return 1 - left / total

    expected = {
        "raw": loop(lambda x: x, lambda z: z),
        "scaled": loop(lambda x: (x - m_j) * s_i / s_j + m_i, lambda z: (z - m_i) * s_j / s_i + m_j),
        "orthogonal": loop(
            lambda x: (x - m_j) @ (U @ V) * s_i / s_j + m_i, lambda z: (z - m_i) @ (U @ V).T * s_j / s_i + m_j
        ),
    }
    assert len(x_j) < MOST_TOKENS
    arrays = reconstruct(layered_side("m", *layers))
    for name, value in expected.items():
        assert arrays[name][0, 1] == pytest.approx(value, abs=1e-4), name


def token_of_document(side: Side, number: int) -> int:
    return int(np.searchsorted(side.fit.documents_N, number))


def test_ridge_is_the_best_of_its_penalties():
    """Every penalty by a plain solve; the one that leaves least on the tokens held back is taken."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, 20, generator=generator) * torch.logspace(0, -3, 20) + 5
    y_NE = x_ND @ torch.randn(20, 30, generator=generator) + 0.5 * torch.randn(400, 30, generator=generator)
    x, y = moments(x_ND, 40), moments(y_NE, 40)
    found = fit_layers(x, y).maps["ridge"]
    a, b = (t[:40].double() - t[:40].double().mean(0) for t in (x_ND, y_NE))
    held_a, held_b = (t[40:].double() - t[:40].double().mean(0) for t in (x_ND, y_NE))
    losses, maps = [], []
    C = a.T @ a / 40
    for power in range(-7, 4):
        penalty = 10.0**power * float(torch.linalg.eigvalsh(C).mean())
        maps.append(torch.linalg.solve(C + penalty * torch.eye(20, dtype=torch.float64), a.T @ b / 40))
        losses.append(float((held_b - held_a @ maps[-1]).square().sum()))
    best = int(np.argmin(losses))
    assert 0 < best < 10, "the case is between the ends"
    np.testing.assert_allclose(found.down.matrix_DE, maps[best], atol=1e-6)
    np.testing.assert_allclose(found.down.of(x.mean_D[None])[0], y.mean_D, atol=1e-9)


def test_rectangular_rotations_keep_lengths_and_come_back():
    x, y = moments(embedded(30, 1)[1], 2000), moments(embedded(40, 2)[1], 2000)
    down, up = fit_layers(x, y).maps["orthogonal"]
    R = down.matrix_DE / torch.linalg.matrix_norm(down.matrix_DE, 2)
    np.testing.assert_allclose(R @ R.T, np.eye(30), atol=1e-9)
    z = torch.randn(5, 30, dtype=torch.float64)
    np.testing.assert_allclose(up.of(down.of(z)), z, atol=1e-9)
    back = fit_layers(y, x).maps["orthogonal"]
    np.testing.assert_allclose(back.down.matrix_DE, up.matrix_DE, atol=1e-6)


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
def test_a_carried_dictionary_does_what_the_maps_do(architecture):
    dictionary = dictionary_of(architecture)
    generator = torch.Generator().manual_seed(0)

    def affine(D: int, E: int) -> Affine:
        matrix, shift = (torch.randn(shape, generator=generator).double() for shape in ((D, E), (E,)))
        return Affine(matrix, shift)

    maps = Maps(affine(10, 16), affine(16, 10))
    x_ND = torch.randn(50, 10, generator=generator)
    carried = carry(dictionary, maps)
    torch.testing.assert_close(carried.encode(x_ND), dictionary.encode(maps.down.of(x_ND)), atol=1e-3, rtol=1e-3)
    expected = maps.up.of(dictionary.reconstruct(maps.down.of(x_ND)))
    torch.testing.assert_close(carried.reconstruct(x_ND), expected, atol=1e-2, rtol=1e-3)


# ---- what maps see


def test_maps_never_see_held_out_tokens(monkeypatch):
    """Other held-out activations change no carried dictionary, other text to fit on changes those that maps can change."""
    carried: list[torch.Tensor] = []

    def watch(dictionary, maps):
        made = carry(dictionary, maps)
        carried.append(torch.cat([made.W_enc.ravel(), made.b_enc, made.W_dec.ravel(), made.b_dec]))
        return made

    monkeypatch.setattr("throughline.transfer.reconstruction.carry", watch)
    monkeypatch.setattr("throughline.transfer.reconstruction.spread", lambda work, items, device: [*map(work, items)])
    side = layered_side("m", planted_layer(), turned(planted_layer()))

    def maps_of(changed: Side) -> list[torch.Tensor]:
        carried.clear()
        reconstruct(changed)
        return list(carried)

    def noisy(codes):
        noise = np.random.default_rng(0).standard_normal(codes.residual_LND.shape).astype(np.float32)
        return replace(codes, residual_LND=codes.residual_LND + noise)

    before = maps_of(side)
    other_held = maps_of(replace(side, sample=noisy(side.sample), codes=noisy(side.codes)))
    other_fit = maps_of(replace(side, fit=noisy(side.fit)))
    assert (
        len(before) == len(other_held) == len(other_fit) == 2 + 4 * 7
    )  # turned; four variants and three floors a pair
    assert all(torch.equal(a, b) for a, b in zip(before, other_held, strict=True))
    same = sum(torch.equal(a, b) for a, b in zip(before, other_fit, strict=True))
    assert 4 <= same <= 8, "raw, and what carries a layer to itself"


def test_text_that_is_too_little_is_said():
    with pytest.raises(InputError, match=r"two documents of training text or more, found 1 [^\n]+$"):
        reconstruct(layered_side("m", planted_layer(), num_fit=1))


def test_dictionaries_of_widths_of_their_own():
    """A dictionary of other size, and one that never fires, are measured like any other."""
    layer, other = planted_layer(), turned(planted_layer())
    dead = replace(random_dictionary(24, 40), b_enc=torch.full((40,), -1e6), b_dec=other[0].mean(0))
    arrays = reconstruct(layered_side("m", layer, (*other[:2], dead)))
    assert arrays["l0"][1, 0] == arrays["l0"][1, 1] == 0
    assert abs(arrays["ceiling"][0, 1]) < 1e-3 and abs(arrays["value"][1, 1]) < 0.01
    assert math.isfinite(arrays["value"].sum())


# ---- in the model


def test_spliced_reconstructions_cost_what_quality_says(zoo_side, monkeypatch):
    """Quality's own splicing of every carried dictionary; and without the option there is no such array."""
    carried = []

    def watch(dictionary, side, layer=0):
        carried.append((dictionary, layer))
        return splice_ce(dictionary, side, layer)

    monkeypatch.setattr("throughline.transfer.reconstruction.splice_ce", watch)
    monkeypatch.setattr("throughline.transfer.reconstruction.spread", lambda work, items, device: [*map(work, items)])
    arrays = Reconstruction(spliced=True).compute(zoo_side, zoo_side, seed=0, min_count=1)[0].arrays
    model, rows = zoo_side.language_model, zoo_side.sample.rows
    assert rows.num_tokens < MOST_TOKENS and carried.pop(0) == (None, 0)
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]  # layers 1 and 3
    assert [layer for _, layer in carried] == [(1, 3)[j] for _, j in places]
    for place, (dictionary, layer) in zip(places, carried, strict=True):
        (quality,) = evaluate(model, {layer: dictionary}, rows, TokenRows.padding(0, rows.width), GateSpec())
        assert arrays["delta_ce"][place] == pytest.approx(quality.delta_ce, rel=1e-4)
        assert 1 - quality.fvu == pytest.approx(arrays["value"][place], abs=1e-4)
    assert "delta_ce" not in reconstruct(zoo_side)
    whole = identity_dictionary(model.d_model)
    assert splice_ce(whole, zoo_side, 1) == pytest.approx(splice_ce(None, zoo_side), abs=1e-4)


@pytest.fixture(scope="module")
def zoo_side() -> Side:
    """Two layers of the bundled pythia on forty problems, with random dictionaries."""
    model, texts = open_model(ModelSpec(path="zoo/pythia")), []
    dictionaries = {layer: random_dictionary(model.d_model, 48, k=8, seed=layer) for layer in (1, 3)}
    for split in ("heldout", "train"):
        documents = list(islice(sample_problems(split, 0), 40))
        texts.append(encode_text(model, dictionaries, collect_rows(documents, model.tokenizer, 64), documents, True))
    return GivenSide("zoo/pythia", dictionaries, texts[0], texts[0], texts[1], language_model=model)


def test_a_metric_is_given_the_settings_it_names():
    study = parse_study({"name": "x", "models": ["zoo/gpt2"], "data": {"path": "x"}, "transfer": {"spliced": True}})
    session = SimpleNamespace(study=study)
    assert _metric_options(session, "reconstruction") == {"spliced": True}
    assert _metric_options(session, "similarity") == {}
