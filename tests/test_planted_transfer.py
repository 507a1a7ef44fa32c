"""Whole transfer metrics on planted truths: what was put into the layers comes back, and what was not does not."""

import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from builders import GivenSide, make_codes, random_dictionary, random_documents, tiny_model
from planted import layered_side, orthonormal, planted_layer, scaled_and_moved, turned
from throughline.codes import Codes, encode_text
from throughline.records import TransferResult
from throughline.registry import METRICS
from throughline.transfer import Side
from throughline.transfer.gates import AND, OR
from throughline.transfer.matching import Matching
from throughline.transfer.reconstruction import Reconstruction

CODES = make_codes(random_documents(700, seed=0, answers=True))
FEW = make_codes(random_documents(300, seed=0, answers=True))
MIN_COUNT = 20


def side_of(model: str, codes: Codes, *layers: np.ndarray) -> Side:
    """A model with these features [N, F] at the tokens of `codes`; its dictionaries are random, since none is read."""
    given = replace(codes, layers={layer: sp.csr_array(f) for layer, f in enumerate(layers)})
    return GivenSide(model, {i: random_dictionary(4, f.shape[1]) for i, f in enumerate(layers)}, given, given, given)


def match(source: Side, target: Side) -> list[TransferResult]:
    return Matching().compute(source, target, seed=0, min_count=MIN_COUNT)


def agreement(found: set, planted: set) -> tuple[float, float]:
    """Precision and recall."""
    right = len(found & planted)
    return right / max(1, len(found)), right / max(1, len(planted))


# ---- a rotation


def test_the_map_of_a_rotated_layer_is_its_rotation(monkeypatch):
    """Layer 1 is layer 0 turned by R, with noise of its own. The maps are those that the metric itself carries by."""
    fits = {}

    def watch(here, there):
        fit = fit_layers(here, there)
        fits[len(fits)] = fit.maps["orthogonal"].down.matrix_DE
        return fit

    from throughline.transfer.maps import fit_layers

    monkeypatch.setattr("throughline.transfer.reconstruction.fit_layers", watch)
    monkeypatch.setattr("throughline.transfer.reconstruction.spread", lambda work, items, device: [*map(work, items)])
    layer = planted_layer()
    held, fit, dictionary = turned(layer)
    R = orthonormal(24, 24, seed=6).double()  # what `turned` turns by: x_1 = x_0 R
    noise = torch.Generator().manual_seed(5)
    held, fit = (x + 0.02 * torch.randn(x.shape, generator=noise) for x in (held, fit))
    side = layered_side("m", layer, (held, fit, dictionary))
    arrays = Reconstruction().compute(side, side, seed=0, min_count=1)[0].arrays
    assert len(fits) == 3  # 0 to 0, 1 to 0, 1 to 1
    for found, expected in zip(fits.values(), (torch.eye(24), R.T, torch.eye(24)), strict=True):
        np.testing.assert_allclose(found, expected.double(), atol=0.01)
    for place in ((0, 1), (1, 0)):
        assert arrays["orthogonal"][place] == pytest.approx(arrays["ceiling"][place], abs=0.01)
        assert arrays["ceiling"][place] > 0.95
        assert arrays["raw"][place] < arrays["null_scaled"][place] + 0.1 < 0.5, "no more than random directions explain"


# ---- a stack of layers


class Stack(NamedTuple):
    """Layers of features, and for each step to the next layer what became of them, as ids in either layer."""

    layers: list[np.ndarray]  # [N, F] each
    persisting: list[set[tuple[int, int]]]
    gates: list[set[tuple[int, int, int, int]]]  # kind, child, its parents in order


NUM_PERSISTING, NUM_DYING, NUM_EACH_GATE = 120, 60, 20
NUM_BORN = NUM_DYING - 2 * NUM_EACH_GATE
WIDTH = NUM_PERSISTING + NUM_DYING


def planted_stack(num_layers: int = 5, seed: int = 0) -> Stack:
    """Of every layer 2/3 of the features persist and 1/3 die; of the next layer 1/9 each are new, an AND, an OR of two parents.

    Parents of ANDs persist or die like others, those of ORs die: else a later AND of one would have the OR as a third parent,
    by the definition of it. Activations change by a fifth from layer to layer; what persists loses
    a tenth of its tokens and gains some; an AND fires on 98 % of the tokens it should, an OR on 2 % more.
    """
    rng, N = np.random.default_rng(seed), CODES.num_tokens

    def sized(on_NF: np.ndarray) -> np.ndarray:
        return on_NF * (0.5 + rng.random(on_NF.shape))

    def fresh(num: int) -> np.ndarray:
        return sized(rng.random((N, num)) < rng.uniform(0.02, 0.12, num))

    def kept(f_NF: np.ndarray) -> np.ndarray:
        louder = f_NF * (1 + 0.2 * rng.standard_normal(f_NF.shape)).clip(0.2)
        gained = sized(rng.random(f_NF.shape) < 0.001)
        return np.where(rng.random(f_NF.shape) < 0.9, louder, 0) + gained * (f_NF == 0)

    layers, persisting, gates = [fresh(WIDTH)], [], []
    for _ in range(num_layers - 1):
        f_NF = layers[-1]
        on_NF = f_NF > 0
        busy = np.argsort(-on_NF.mean(0))
        first, others = np.split(busy, [2 * NUM_EACH_GATE])
        ands = rng.permutation(first).reshape(-1, 2)  # both fire on enough tokens
        ors = others[np.sort(rng.permutation(len(others))[: 2 * NUM_EACH_GATE])].reshape(-1, 2)  # alike in how often
        staying = rng.permutation(np.setdiff1d(busy, ors))[:NUM_PERSISTING]
        both = on_NF[:, ands].all(2) & (rng.random((N, NUM_EACH_GATE)) < 0.98)
        either = on_NF[:, ors].any(2)
        either |= rng.random(either.shape) < 0.02 * either.mean(0)
        parts = [kept(f_NF[:, staying]), sized(both), sized(either), fresh(NUM_BORN)]
        place = rng.permutation(WIDTH)  # where each feature of the next layer comes to lie
        following = np.zeros((N, WIDTH))
        following[:, place] = np.hstack(parts)
        layers.append(following)
        persisting.append({(int(u), int(v)) for u, v in zip(staying, place, strict=False)})
        children = place[NUM_PERSISTING : NUM_PERSISTING + 2 * NUM_EACH_GATE]
        kinds = np.repeat([AND, OR], NUM_EACH_GATE)
        rows = zip(kinds, children, np.vstack([ands, ors]), strict=True)
        gates.append({(int(k), int(c), *sorted(map(int, parents))) for k, c, parents in rows})
    return Stack([f.astype(np.float32) for f in layers], persisting, gates)


@pytest.mark.parametrize("seed", range(3))
def test_what_persists_dies_is_born_and_is_made_of_two_is_found(seed):
    stack = planted_stack(seed=seed)
    side = side_of("m", CODES, *stack.layers)
    arrays = match(side, side)[0].arrays
    partner, everything = arrays["partner"], set(range(WIDTH))
    assert arrays["live"].all()
    for i, (persisting, planted_gates) in enumerate(zip(stack.persisting, stack.gates, strict=True)):
        rows = arrays["gates"][(arrays["gates"][:, :2] == (i, i + 1)).all(1), 2:]
        gates = {(int(k), int(c), *sorted((int(a), int(b)))) for k, c, a, b in rows}
        for kind in (AND, OR):
            found, planted = ({g for g in some if g[0] == kind} for some in (gates, planted_gates))
            assert min(agreement(found, planted)) >= 0.95, (i, kind)
        made = {child for _, child, *_ in gates}
        above = np.flatnonzero(arrays["correlation"][i, i + 1] > arrays["threshold"][i, i + 1])
        mutual = {(int(u), int(partner[i, i + 1, u])) for u in above if partner[i + 1, i, partner[i, i + 1, u]] == u}
        mutual = {(u, v) for u, v in mutual if v not in made}
        assert min(agreement(mutual, persisting)) >= 0.95, i
        died, dying = (everything - {u for u, _ in pairs} for pairs in (mutual, persisting))
        born, coming = (everything - {v for _, v in pairs} - made for pairs in (mutual, persisting))
        coming -= {child for _, child, *_ in planted_gates}
        assert min(agreement(died, dying)) >= 0.95, i
        assert min(agreement(born, coming)) >= 0.95, i


# ---- two models of unequal width

SHARED = 0.6


class Embedded(NamedTuple):
    """Two models' sides, and which features of each the other has as well."""

    sides: list[Side]
    is_shared: list[np.ndarray]


def embed(num_features: int, seed: int, most_frequent: float = 0.02) -> Embedded:
    """Widths 64 and 96, in each more features than dimensions: SHARED of them are features of both, along directions of each
    model's own.

    The codes are what the true directions read off the noisy sum, the largest few of a token that are large enough: some
    features are missed, and some fire because another points the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    num_shared = round(SHARED * num_features)
    num_world = 2 * num_features - num_shared
    chance = 0.01 + torch.rand(num_world, generator=generator) * (most_frequent - 0.01)
    on = torch.rand(CODES.num_tokens, num_world, generator=generator) < chance
    world = on * (1 + torch.rand(on.shape, generator=generator))
    own = world[:, num_shared:].split(num_features - num_shared, dim=1)
    sides, is_shared = [], []
    for model, d_model, of_model in zip(("narrow", "wide"), (64, 96), own, strict=True):
        order = torch.randperm(num_features, generator=generator)
        f_NF = torch.cat([world[:, :num_shared], of_model], dim=1)[:, order]
        E_FD = torch.randn(num_features, d_model, generator=generator)
        E_FD /= E_FD.norm(dim=1, keepdim=True)
        x_ND = f_NF @ E_FD
        x_ND += 0.05 * torch.randn(x_ND.shape, generator=generator)
        k = int(2 * (f_NF > 0).sum(1).float().mean())
        largest = (x_ND @ E_FD.T).topk(k, dim=1)
        codes = torch.zeros_like(f_NF).scatter_(1, largest.indices, largest.values * (largest.values > 0.8))
        misfires = ((codes > 0) != (f_NF > 0)).sum() / (f_NF > 0).sum()
        assert misfires > 0.03, "not exact"
        sides.append(side_of(model, CODES, codes.numpy()))
        is_shared.append((order < num_shared).numpy())
    return Embedded(sides, is_shared)


def auroc(scores: np.ndarray, is_one: np.ndarray) -> float:
    """Chance that one of those scores above one of the others."""
    ones, others = scores[is_one][:, None], scores[~is_one]
    return float((ones > others).mean() + 0.5 * (ones == others).mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_features_that_two_models_share_are_told_from_their_own(seed):
    sides, is_shared = embed(100, seed)
    for result, shared in zip(match(*sides), is_shared, strict=True):
        arrays = result.arrays
        assert arrays["live"].all()
        assert auroc(arrays["correlation"][0, 0], shared) >= 0.99
        assert arrays["value"][0, 0] == pytest.approx(SHARED, abs=0.03)
        assert arrays["mutual"][0, 0] == pytest.approx(SHARED, abs=0.03)


def test_codes_that_leak_raise_the_share_with_a_partner_and_not_that_of_mutual_ones():
    """In 64 dimensions 150 features that fire often read each other. They do go with what they read, which `value` counts."""
    sides, is_shared = embed(150, 0, most_frequent=0.04)
    results = match(*sides)
    assert results[0].arrays["value"][0, 0] > SHARED + 0.1  # the narrow model's
    for result, shared in zip(results, is_shared, strict=True):
        assert result.arrays["mutual"][0, 0] == pytest.approx(SHARED, abs=0.03)
        assert auroc(result.arrays["correlation"][0, 0], shared) >= 0.99


# ---- chance


def independent(rng: np.random.Generator, num_features: int) -> np.ndarray:
    """Features that fire at random: most on 1 to 3 % of the tokens, a few on up to half of them."""
    density = np.minimum(0.01 * (1 + rng.pareto(1.5, num_features)), 0.5)
    shape = (FEW.num_tokens, num_features)
    return ((rng.random(shape) < density) * (0.5 + rng.random(shape))).astype(np.float32)


@pytest.mark.parametrize(
    ("source_widths", "target_widths", "num_seeds"),
    [
        ([500], [500], 40),
        ([200], [900], 40),
        ([150], [150], 200),
        ([300, 500], [700, 200], 20),
        ([250] * 2, [250] * 3, 20),
    ],
)
def test_independent_features_match_by_chance_in_a_thousandth(source_widths, target_widths, num_seeds):
    """The share of all features with a partner in either direction, over many draws, is below 0.2 % by two standard errors."""
    matches, lives = np.zeros(num_seeds), np.zeros(num_seeds)
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        source, target = ([independent(rng, width) for width in widths] for widths in (source_widths, target_widths))
        for result in match(side_of("a", FEW, *source), side_of("b", FEW, *target)):
            live = result.arrays["live"].sum(1)[:, None]
            matches[seed] += (result.arrays["value"] * live).sum()
            lives[seed] += live.sum() * result.arrays["value"].shape[1]
    rate = matches.sum() / lives.sum()
    error = (matches / lives).std(ddof=1) / np.sqrt(num_seeds)
    assert error < 0.0003
    assert rate + 2 * error <= 0.002


# ---- one worker and two


@pytest.mark.parametrize("name", METRICS.names())
def test_one_worker_and_two_find_the_same_bits(name, monkeypatch):
    layers = (planted_layer(), turned(planted_layer()), scaled_and_moved(planted_layer()))
    planted = layered_side("planted", *layers, twins=[{0: layers[0][2]}])
    planted.twin_codes = [planted.codes]  # type: ignore[attr-defined]
    pairs = [(planted, planted), (planted, layered_side("other", planted_layer(8), planted_layer()))]
    metric = METRICS.load(name)()
    if not metric.across_models:
        model = tiny_model()
        dictionaries = {layer: random_dictionary(model.d_model, 20, k=3, seed=layer) for layer in range(3)}
        codes = encode_text(model, dictionaries, FEW.rows, FEW.documents, keep_residuals=True)
        pairs = [(side := GivenSide("tiny", dictionaries, codes, codes, codes, language_model=model), side)]
    for pair in pairs:
        found = []
        for num_workers in (1, 2):
            monkeypatch.setattr(os, "cpu_count", lambda n=num_workers: n)
            found.append(metric.compute(*pair, seed=0, min_count=5))
        for alone, together in zip(*found, strict=True):
            assert alone.info == together.info
            assert alone.arrays.keys() == together.arrays.keys()
            for key, array in alone.arrays.items():
                assert array.dtype == together.arrays[key].dtype
                assert array.tobytes() == together.arrays[key].tobytes(), key
