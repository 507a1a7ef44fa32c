"""Training: the same again for the same seed, planted features found, layers apart from one another, faults named."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize

from builders import planted_activations, planted_layers
from throughline.dictionaries import Dictionary
from throughline.errors import TrainingError
from throughline.study import DictionaryOverride, DictionarySpec, TrainingSpec, dump_study, parse_study
from throughline.training import Progress, chunks, compiled, engine, train
from throughline.training.engine import Trained
from throughline.training.group import TWINS_APART, Course, Group, seed_of
from throughline.training.sources import ArraySource

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
K, L1 = {"d_sae": 16, "k": 2}, {"d_sae": 16, "l1": 0.3}
SPECS = {
    name: DictionarySpec(architecture=name, **given)
    for name, given in {
        "topk": K,
        "batch_topk": K,
        "matryoshka": K,
        "jumprelu": K,
        "relu": L1,
        "gated": L1,
    }.items()
}
TOPK, RELU = SPECS["topk"], SPECS["relu"]
every_architecture = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
both_trainers = pytest.mark.parametrize("spec", [TOPK, RELU, SPECS["gated"]], ids=["topk", "relu", "gated"])


def run_all(
    x_LND: Tensor, specs: dict[int, DictionarySpec], reports: list[Progress] | None = None, **training: Any
) -> Trained:
    spec = TrainingSpec.model_validate({"tokens": x_LND.shape[1] or 1, "batch_tokens": 64} | training)
    return train(
        ArraySource(x_LND, epochs=spec.epochs, num_tokens=spec.tokens),
        specs,
        spec,
        model="planted",
        num_layers=len(specs),
        report=(reports if reports is not None else []).append,
    )


def run(
    x_LND: Tensor, specs: dict[int, DictionarySpec], reports: list[Progress] | None = None, **training: Any
) -> dict[int, Dictionary]:
    return run_all(x_LND, specs, reports, **training).own


def weights(dictionary: Dictionary) -> dict[str, Tensor]:
    return {name: getattr(dictionary, name) for name in WEIGHTS} | dictionary.extra


def same(a: Dictionary, b: Dictionary) -> bool:
    pairs = zip(weights(a).values(), weights(b).values(), strict=True)
    return a.architecture == b.architecture and all(torch.equal(x, y) for x, y in pairs)


# ---- what comes out


@every_architecture
def test_training_is_a_function_of_its_seed(spec):
    x_LND = planted_layers(3000)
    first, again, other = (run(x_LND, {0: spec, 1: spec}, seed=seed) for seed in (5, 5, 6))
    for layer in (0, 1):
        assert same(first[layer], again[layer])
        assert not torch.equal(first[layer].W_dec, other[layer].W_dec)


@both_trainers
def test_training_leaves_torch_as_it_was(spec):
    """Neither the number of threads nor the state of random numbers is changed."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run(planted_layers(640), {0: spec, 1: spec})
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@both_trainers
def test_layers_start_from_different_dictionaries(spec):
    x_ND = planted_layers(600)[0]
    trained = run(torch.stack([x_ND, x_ND]), {0: spec, 1: spec}, lr=0.0)
    cosines = trained[0].W_dec @ trained[1].W_dec.T
    assert cosines.max() < 0.9999  # a shared start would be 1 on the diagonal


@every_architecture
def test_layers_do_not_influence_each_other(monkeypatch, spec):
    """Each comes out as it does alone; AuxK and resampling are at work in both."""
    monkeypatch.setattr(engine, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(engine, "DEAD_AFTER_BATCHES", 1)
    spec = spec.overridden(DictionaryOverride(d_sae=48))
    x_LND = planted_layers(4000)
    reports: list[Progress] = []
    together = run(x_LND, {0: spec, 1: spec}, reports)
    if spec.architecture == "topk":
        assert all(max(r.dead[i] for r in reports) > 0 for i in (0, 1))
    for layer in (0, 1):
        alone = run(x_LND[[layer]], {layer: spec}, reports)[layer]
        for name, tensor in weights(together[layer]).items():
            torch.testing.assert_close(tensor, weights(alone)[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_planted_dictionary_is_recovered(architecture):
    directions_FD = normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(7)))
    x_ND = planted_activations(100_000, directions_FD, 3)
    reports: list[Progress] = []
    spec = DictionarySpec(architecture=architecture, d_sae=64, k=3)
    one = run(x_ND[None], {0: spec}, reports, batch_tokens=256)[0]
    cosines = (directions_FD @ one.W_dec.T).max(1).values
    assert cosines.mean() >= 0.9, float(cosines.mean())
    assert (one.encode(x_ND[:1000]) > 0).sum(1).float().mean() > 2.5
    assert reports[-1].fvu[0] < 0.2


def test_overrides_of_one_layer():
    """Other widths, other k and another architecture in one run: each layer is trained on its own column."""
    overrides = {1: {"k": 5}, 2: {"d_sae": 24}, 4: {"k": 16}, 5: {"architecture": "gated", "l1": 0.1}}
    per_layer = {layer: DictionaryOverride.model_validate(o) for layer, o in overrides.items()}
    spec = DictionarySpec(d_sae=16, k=2, per_layer=per_layer)
    x_LND = planted_layers(1200, num_layers=6)
    trained = run(x_LND, {layer: spec.at_layer(layer) for layer in range(6)})
    assert sorted(trained) == [0, 1, 2, 3, 4, 5]
    assert [trained[layer].options.get("k") for layer in range(6)] == [2, 5, 2, 2, 16, None]
    assert [trained[layer].d_sae for layer in range(6)] == [16, 16, 24, 16, 16, 16]
    assert trained[5].architecture == "gated"
    for layer, one in trained.items():
        assert one.metadata["layer"] == layer
        residual = (x_LND[layer] - one.reconstruct(x_LND[layer])).square().sum()
        assert residual < 0.8 * (x_LND[layer] - x_LND[layer].mean(0)).square().sum()


def test_overrides_survive_the_study_file():
    tree = {
        "name": "s",
        "data": {"path": "zoo/arithmetic"},
        "models": [{"path": "zoo/gpt2", "dictionary": {"k": 7}}],
        "dictionary": {"expansion": 4, "per_layer": {3: {"d_sae": 100}, 5: {"expansion": 2}}},
    }
    study = parse_study(tree)
    for one in (study, parse_study(yaml.safe_load(dump_study(study)))):
        spec = one.dictionary_for(one.models[0])
        assert [spec.at_layer(layer).k for layer in (0, 3, 5)] == [7, 7, 7]
        assert [spec.at_layer(layer).width(16) for layer in (0, 3, 5)] == [64, 100, 32]


def test_metadata_says_where_a_dictionary_comes_from():
    trained = run(planted_layers(320), {4: TOPK, 9: SPECS["batch_topk"]}, seed=3, epochs=2)
    common = {"model_name": "planted", "training_tokens": 640, "seed": 3, "sink_tokens_left_out": 0, "setbacks": 0}
    assert trained[4].metadata == common | {"layer": 4, "training_architecture": "topk"}
    assert trained[9].metadata == common | {"layer": 9, "training_architecture": "batch_topk"}
    assert (trained[4].architecture, trained[4].options) == ("topk", {"k": 2})
    assert (trained[9].architecture, trained[9].options) == ("jumprelu", {})


def test_bfloat16_activations_are_taken():
    class Half:
        def batches(self, start: int = 0):
            return (batch.bfloat16() for batch in ArraySource(planted_layers(1280)).batches(start))

    spec = TrainingSpec(tokens=1280, batch_tokens=64)
    trained = train(Half(), {0: TOPK, 1: SPECS["gated"]}, spec, model="planted", num_layers=2).own
    expected = run(planted_layers(1280).bfloat16().float(), {0: TOPK, 1: SPECS["gated"]})
    assert same(trained[0], expected[0])
    for name, tensor in weights(trained[1]).items():
        torch.testing.assert_close(tensor, weights(expected[1])[name], rtol=1e-3, atol=1e-3, msg=name)


# ---- twins


@pytest.mark.parametrize("way", ["compiled", "compiled, large", "plain"])
@every_architecture
def test_own_dictionaries_are_the_same_with_and_without_twins(monkeypatch, spec, way):
    """To the bit, on more threads than there are layers; AuxK, resampling and the controller of L0 are at work."""
    if way != "plain" and spec.architecture not in compiled.ARCHITECTURES:
        pytest.skip(f"{spec.architecture} is trained the plain way anyhow")
    monkeypatch.setattr(compiled, "SMALL_PRODUCT", 5e7 if way == "compiled" else 0)
    monkeypatch.setattr(compiled, "ARCHITECTURES", () if way == "plain" else compiled.ARCHITECTURES)
    monkeypatch.setattr(engine, "DEAD_AFTER_BATCHES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    target_l0 = 4 if "l1" in spec.model_fields_set else None
    spec = spec.overridden(DictionaryOverride(d_sae=48, target_l0=target_l0))
    specs = {0: spec, 3: TOPK, 5: spec}
    x_LND = planted_layers(3000, 3)
    alone = run(x_LND, specs)
    trained = run_all(x_LND, specs, ceiling_seeds=2)
    assert [list(found) for found in (trained.own, *trained.twins)] == [list(alone)] * 3
    for layer, one in alone.items():
        assert same(one, trained.own[layer]) and one.metadata == trained.own[layer].metadata
        for twin, found in enumerate(trained.twins, 1):
            assert found[layer].metadata == one.metadata | {"ceiling_seed": twin}
            assert not torch.equal(found[layer].W_dec, one.W_dec)


@both_trainers
def test_twins_start_from_different_dictionaries(spec):
    """Of one another, of their layer's own and of other layers', of the same activations."""
    x_ND = planted_layers(600)[0]
    trained = run_all(torch.stack([x_ND, x_ND]), {0: spec, 1: spec}, lr=0.0, ceiling_seeds=3)
    first = [found[layer].W_dec for found in (trained.own, *trained.twins) for layer in (0, 1)]
    for i, one in enumerate(first):
        for other in first[:i]:
            assert (one @ other.T).max() < 0.9999  # a shared start would be 1 on the diagonal


def test_seeds_of_all_twins_differ_where_torch_looks():
    """torch's generator takes 32 bits of a seed."""
    numbers = [torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in (7, 7 + 2**32)]
    assert torch.equal(*numbers)
    assert 3 * TWINS_APART + seed_of(100_000, 1000, 0) < 2**32
    places = [(seed, layer, twin) for seed in range(50) for layer in range(100) for twin in range(4)]
    assert len({seed_of(*place) % 2**32 for place in places}) == len(places)


def test_reports_are_of_own_dictionaries_alone(monkeypatch):
    monkeypatch.setattr(engine, "REPORT_SECONDS", 0.0)
    specs, x_LND = {0: TOPK, 1: SPECS["gated"]}, planted_layers(1280)
    with_twins: list[Progress] = []
    without: list[Progress] = []
    run(x_LND, specs, with_twins, ceiling_seeds=1)
    run(x_LND, specs, without)
    last, expected = with_twins[-1], without[-1]
    assert last.layers == [0, 1] and (last.step, last.num_steps) == (20, 20)
    assert (last.loss, last.l0, last.fvu, last.dead) == (expected.loss, expected.l0, expected.fvu, expected.dead)
    assert all(a.step <= b.step for a, b in pairwise(with_twins))


@both_trainers
def test_a_twin_that_diverges_is_named(monkeypatch, spec):
    make = engine._make_groups

    def spoil(*given: Any) -> list[Group]:
        groups = make(*given)
        with torch.no_grad():
            groups[1].stack.W_dec_LFD[0] = torch.nan
        return groups

    monkeypatch.setattr(engine, "_make_groups", spoil)
    trained = run_all(planted_layers(6400, 1), {4: spec}, ceiling_seeds=1)
    assert not trained.own and re.match(
        r"planted layer 4 seed 1: the loss is nan at step \d+, after 2 setbacks", trained.failed[4]
    )


# ---- what can go wrong


@pytest.mark.parametrize("num_tokens", [0, 63])
def test_too_little_text_is_said(num_tokens):
    with pytest.raises(TrainingError, match=r"planted: the text has less than one batch of 64 tokens; .*batch_tokens"):
        run(planted_layers(100)[:, :num_tokens], {0: TOPK, 1: TOPK}, tokens=100)


@both_trainers
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 900])
def test_bad_activations_name_the_layer(monkeypatch, spec, bad, at):
    monkeypatch.setattr(chunks, "MOST_TOKENS", 256)  # so that the later token is not in the first chunk
    x_LND = planted_layers(1000)
    x_LND[1, at, 3] = bad
    with pytest.raises(TrainingError, match="^planted layer 4: its activations are not all finite; [^\n]*$"):
        run(x_LND, {2: spec, 4: spec}, tokens=100_000)  # more than there are: the source ends first


@both_trainers
def test_diverged_training_names_layer_step_and_rate(spec):
    reports: list[Progress] = []
    trained = run_all(planted_layers(6400), {0: spec, 1: spec}, reports, lr=1e30)
    assert not trained.own and list(trained.failed) == [0, 1]
    words = trained.failed[1]
    found = re.fullmatch(
        r"planted layer 1: (the loss is|FVU is) \S+ at step (\d+), after 2 setbacks with a lower learning rate each; "
        r"training.lr 1e\+30 is \d+ times what auto would take \(\S+\)",
        words,
    )
    assert found and int(found[2]) < 100, words
    assert len([said for said in reports[-1].events if "back to the last good state" in said]) == 4


@both_trainers
def test_a_layer_that_jumps_goes_back_and_on(monkeypatch, spec):
    """One layer is spoilt in the middle of training: it ends nearly as good as unharmed, and the other one the same."""
    monkeypatch.setattr(chunks, "MOST_TOKENS", 1024)
    x_LND = planted_layers(12_800, 2)
    unharmed = run_all(x_LND, {0: spec, 1: spec})
    make, clean = engine._make_groups, engine.SinkFilter.clean_
    groups: list[Group] = []
    chunks_seen: list[Any] = []

    def make_and_tell(*given: Any) -> list[Group]:
        groups.extend(make(*given))
        return groups

    def clean_and_spoil(self: Any, chunk: Any) -> None:
        clean(self, chunk)
        chunks_seen.append(chunk)
        if len(chunks_seen) == 7:
            with torch.no_grad():
                groups[0].stack.W_enc_LFD[1] *= 50

    monkeypatch.setattr(engine, "_make_groups", make_and_tell)
    monkeypatch.setattr(engine.SinkFilter, "clean_", clean_and_spoil)
    reports: list[Progress] = []
    trained = run_all(x_LND, {0: spec, 1: spec}, reports)
    assert [said for said in reports[-1].events if said.startswith("layer 1: FVU")] == reports[-1].events != []
    assert same(trained.own[0], unharmed.own[0])
    assert trained.own[1].metadata["setbacks"] == 1 and trained.own[0].metadata["setbacks"] == 0
    x_ND = x_LND[1]
    lost, best = (float((x_ND - t.own[1].reconstruct(x_ND)).square().sum()) for t in (trained, unharmed))
    assert lost < 2 * best


# ---- schedule and progress


def course(num_steps: int) -> Course:
    return Course(num_steps, batch_tokens=64, seed=0, dead_after=1e6, bfloat16=False)


def test_learning_rate_rises_holds_and_falls():
    factors = [course(1000).rate(step) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and factors[50] == 1.0  # 5 % warm-up
    assert set(factors[50:200]) == {1.0}
    assert all(a > b for a, b in pairwise(factors[200:]))
    assert factors[599] == pytest.approx(0.5, abs=1e-3) and factors[-1] < 1e-3
    assert course(1).rate(0) > 0.5  # a run of one step learns too


def test_automatic_learning_rate():
    assert engine.learning_rate(TrainingSpec(lr=0.1), 512) == 0.1
    small, large = TrainingSpec(batch_tokens=256), TrainingSpec(batch_tokens=1024)
    assert engine.learning_rate(small, 512) == pytest.approx(engine.LR_AT_256_TOKENS_512_FEATURES)
    assert engine.learning_rate(large, 512) == pytest.approx(2 * engine.learning_rate(small, 512))
    assert engine.learning_rate(small, 2048) == pytest.approx(engine.learning_rate(small, 512) / 2)
    short = TrainingSpec(tokens=3 * 256, batch_tokens=256)
    assert engine.learning_rate(short, 512) == pytest.approx(engine.learning_rate(small, 512) / 10)


@pytest.mark.parametrize("spec", [TOPK, SPECS["gated"]], ids=["compiled", "plain"])
def test_rate_in_effect_is_the_scheduled_one(monkeypatch, spec):
    """Every step asks for its own, and nothing moves without."""
    asked: list[int] = []
    original = Course.rate

    def watched(self: Course, step: int) -> float:
        asked.append(step)
        return original(self, step)

    x_LND = planted_layers(1280, num_layers=1)
    still = run(x_LND, {0: spec}, lr=0.0)[0]
    monkeypatch.setattr(Course, "rate", watched)
    assert not same(run(x_LND, {0: spec}, lr=0.01)[0], still)
    assert sorted(set(asked)) == list(range(20))
    monkeypatch.setattr(Course, "rate", lambda self, step: 0.0)
    assert same(run(x_LND, {0: spec}, lr=0.01)[0], still)


@pytest.mark.parametrize("spec", [TOPK, SPECS["matryoshka"], RELU, SPECS["gated"]], ids=lambda s: s.architecture)
def test_decoder_rows_keep_unit_norm_and_only_turn(monkeypatch, spec):
    """What Adam remembers of their gradients has no part along them when there has been one step."""
    groups: list[Group] = []
    moments: list[dict] = []
    made = Group.__post_init__

    def watched(self: Group) -> None:
        made(self)
        groups.append(self)
        moments.append(self.moments)

    monkeypatch.setattr(Group, "__post_init__", watched)
    monkeypatch.setattr(Course, "rate", lambda self, step: 0.0)  # so that rows are where the gradient was taken
    run(planted_layers(64), {0: spec, 1: spec})
    W_dec_LFD, first_LFD = groups[0].stack.W_dec_LFD.detach(), moments[0]["W_dec"][0]
    assert first_LFD.abs().max() > 0
    assert (first_LFD * W_dec_LFD).sum(-1).abs().max() < 1e-5 * first_LFD.norm(dim=-1).max()
    monkeypatch.undo()
    for one in run(planted_layers(1280), {0: spec, 1: spec}).values():
        torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("second", ["topk", "gated"])
def test_progress_is_sane(monkeypatch, second):
    """With two layers in two groups, of one trainer or of both kinds."""
    monkeypatch.setattr(engine, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(chunks, "MOST_TOKENS", 256)
    reports: list[Progress] = []
    x_LND = planted_layers(1300)
    other = SPECS["topk"].overridden(DictionaryOverride(k=3)) if second == "topk" else SPECS["gated"]
    run(x_LND, {7: TOPK, 3: other}, reports)
    steps = [r.step for r in reports]
    assert steps == sorted(steps) and steps[-1] == 20
    assert {4, 8, 12, 16} <= set(steps)  # chunks that are too quick for a look in between are told of as well
    for r in reports:
        assert (r.model, r.layers, r.num_steps) == ("planted", [3, 7], 20)
        assert r.tokens_per_second > 0 and r.eta_seconds >= 0
        for values in (r.loss, r.l0, r.fvu, r.dead):
            assert len(values) == 2 and all(math.isfinite(v) and v >= 0 for v in values)
        assert r.l0[1] <= 2 and max(r.dead) <= 1
        # AuxK adds to the squared error, and the batch's variance is not quite that of all
        assert 0.7 * r.fvu[1] * mean_square(x_LND[0]) < r.loss[1] < r.fvu[1] * mean_square(x_LND[0]) + 0.2
    assert reports[-1].eta_seconds == 0
    assert reports[-1].fvu[1] < 0.5


def mean_square(x_ND: Tensor) -> float:
    """Mean square of centred activations scaled to mean norm sqrt(D)."""
    centred_ND = x_ND - x_ND.mean(0)
    return float((centred_ND * math.sqrt(x_ND.shape[1]) / centred_ND.norm(dim=1).mean()).square().mean())


def test_source_that_ends_early_is_counted_as_far_as_it_went():
    reports: list[Progress] = []
    trained = run(planted_layers(1000), {0: TOPK, 1: SPECS["gated"]}, reports, tokens=6400)
    assert (reports[-1].step, reports[-1].num_steps) == (15, 100)
    assert trained[0].metadata["training_tokens"] == trained[1].metadata["training_tokens"] == 15 * 64


def test_source_that_does_not_end_is_left_when_the_tokens_are_used():
    reports: list[Progress] = []

    class Endless:
        def batches(self, start: int = 0):
            while True:
                yield planted_layers(500)

    spec = TrainingSpec(tokens=1000, batch_tokens=64)
    train(Endless(), {0: TOPK, 1: TOPK}, spec, model="planted", num_layers=2, report=reports.append)
    assert (reports[-1].step, reports[-1].num_steps) == (15, 15)
