"""Training: every token once, the same again for the same seed, planted features found, layers apart from one another."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize

from builders import planted_activations
from throughline.dictionaries import Dictionary
from throughline.errors import TrainingError
from throughline.study import DictionaryOverride, DictionarySpec, TrainingSpec, dump_study, parse_study
from throughline.training import Progress, buffer, engine, train
from throughline.training.buffer import ShuffleBuffer

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- shuffle buffer


def numbered(num_tokens: int, part: int, num_layers: int = 2) -> Iterator[Tensor]:
    """Tokens that say their number, in parts; layer l says it plus l million."""
    for start in range(0, num_tokens, part):
        numbers = torch.arange(start, min(start + part, num_tokens), dtype=torch.float64)
        yield torch.stack([numbers + 1e6 * layer for layer in range(num_layers)])[:, :, None]


def drain(num_tokens: int, part: int, batch: int, seed: int = 0) -> list[Tensor]:
    one = ShuffleBuffer(numbered(num_tokens, part), batch, seeded(seed))
    one.fill()
    return list(one)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 100, 1000, 1023])
@pytest.mark.parametrize("part", [1, 7, 50, 2000])
def test_every_token_comes_out_once(monkeypatch, num_tokens, part):
    monkeypatch.setattr(buffer, "MOST_TOKENS", 128)
    batches = drain(num_tokens, part, batch=16)
    assert all(b.shape == (2, 16, 1) for b in batches)
    assert len(batches) == num_tokens // 16
    seen = torch.cat([b[0, :, 0] for b in batches]).long() if batches else torch.empty(0)
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(num_tokens))
    for b in batches:  # layers keep step
        assert torch.equal(b[1], b[0] + 1e6)


def test_batches_mix_the_source(monkeypatch):
    monkeypatch.setattr(buffer, "MOST_TOKENS", 512)
    batches = drain(2000, part=20, batch=32)
    for b in batches[:-1]:
        assert len((b[0, :, 0] // 20).unique()) > 8  # parts of 20 tokens each
        assert (b[0, :, 0].diff() < 0).any()
    spans = [float(b.max() - b.min()) for b in (pair[0] for pair in batches)]
    assert sum(span > 600 for span in spans) > 30  # half of the 512 stay when new ones come: no walls between fillings


def test_same_seed_same_order(monkeypatch):
    monkeypatch.setattr(buffer, "MOST_TOKENS", 128)
    first, again, other = (torch.cat(drain(500, 30, 16, seed), dim=1) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("limit", "value", "most"), [("MOST_TOKENS", 200, 200), ("MEMORY_BYTES", 150 * 16, 150)])
def test_memory_is_bounded(monkeypatch, limit, value, most):
    monkeypatch.setattr(buffer, limit, value)
    taken = 0

    def count() -> Iterator[Tensor]:
        nonlocal taken
        for part in numbered(5000, 10):
            taken += part.shape[1]
            yield part

    one = ShuffleBuffer(count(), 16, seeded(0))
    one.fill()
    assert taken == most
    for given, _ in enumerate(one):
        assert taken - 16 * given <= most + 10


# ---- training


def planted(num_tokens: int, num_layers: int = 2, num_features: int = 12, d_model: int = 8) -> Tensor:
    """Activations [L, N, D] of layers that have their own features."""
    layers = []
    for layer in range(num_layers):
        directions_FD = normalize(torch.randn(num_features, d_model, generator=seeded(100 + layer)))
        layers.append(planted_activations(num_tokens, directions_FD, 2, seed=layer))
    return torch.stack(layers)


def run(x_LND: Tensor, specs: dict[int, DictionarySpec], reports: list[Progress] | None = None, **training) -> dict:
    settings = {"tokens": x_LND.shape[1], "batch_tokens": 64} | training
    return train(
        iter(x_LND.split(500, dim=1)),
        specs,
        TrainingSpec(**settings),
        model="planted",
        num_layers=len(specs),
        report=(reports if reports is not None else []).append,
    )


def same(a: Dictionary, b: Dictionary) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in WEIGHTS)


TOPK = DictionarySpec(d_sae=16, k=2)
RELU = DictionarySpec(architecture="relu", d_sae=16, l1=0.3)


@pytest.mark.parametrize("spec", [TOPK, RELU], ids=["topk", "relu"])
def test_training_is_a_function_of_its_seed(spec):
    x_LND = planted(3000)
    first, again, other = (run(x_LND, {0: spec, 1: spec}, seed=seed) for seed in (5, 5, 6))
    for layer in (0, 1):
        assert same(first[layer], again[layer])
        assert not torch.equal(first[layer].W_dec, other[layer].W_dec)


def test_layers_start_from_different_dictionaries():
    x_ND = planted(600)[0]
    trained = run(torch.stack([x_ND, x_ND]), {0: TOPK, 1: TOPK}, lr=0.0)
    cosines = trained[0].W_dec @ trained[1].W_dec.T
    assert cosines.max() < 0.999  # a shared start would be 1 on the diagonal


@pytest.mark.parametrize("spec", [DictionarySpec(d_sae=48, k=2), RELU], ids=["topk", "relu"])
def test_layers_of_a_stack_do_not_influence_each_other(monkeypatch, spec):
    monkeypatch.setattr(engine, "REPORT_SECONDS", 0.0)
    x_LND = planted(4000)
    reports: list[Progress] = []
    together = run(x_LND, {0: spec, 1: spec}, reports)
    if spec.architecture == "topk":
        assert all(max(r.dead[i] for r in reports) > 0 for i in (0, 1))  # AuxK was at work in both
    for layer in (0, 1):
        alone = run(x_LND[[layer]], {layer: spec})[layer]
        for name in WEIGHTS:
            torch.testing.assert_close(
                getattr(together[layer], name), getattr(alone, name), rtol=1e-4, atol=1e-4, msg=name
            )


def test_planted_dictionary_is_recovered():
    directions_FD = normalize(torch.randn(64, 24, generator=seeded(7)))
    x_ND = planted_activations(100_000, directions_FD, 3)
    reports: list[Progress] = []
    spec = DictionarySpec(d_sae=64, k=3)
    one = run(x_ND[None], {0: spec}, reports, batch_tokens=256, tokens=100_000)[0]
    cosines = (directions_FD @ one.W_dec.T).max(1).values
    assert cosines.mean() >= 0.9, float(cosines.mean())
    assert (one.encode(x_ND[:1000]) > 0).sum(1).float().mean() > 2.5
    assert reports[-1].fvu[0] < 0.2


def test_overrides_of_one_layer():
    spec = DictionarySpec(
        d_sae=16,
        k=2,
        per_layer={1: DictionaryOverride(k=5), 2: DictionaryOverride(d_sae=24), 4: DictionaryOverride(k=50)},
    )
    trained = run(planted(600, num_layers=5), {layer: spec.at_layer(layer) for layer in range(5)})
    assert sorted(trained) == [0, 1, 2, 3, 4]
    assert [trained[layer].options["k"] for layer in range(5)] == [2, 5, 2, 2, 16]  # no more than there are features
    assert [trained[layer].d_sae for layer in range(5)] == [16, 16, 24, 16, 16]
    x_LND = planted(600, num_layers=5)
    for layer, one in trained.items():  # each was trained on its own column
        assert one.metadata["layer"] == layer
        residual = (x_LND[layer] - one.reconstruct(x_LND[layer])).square().sum()
        assert residual < (x_LND[layer] - x_LND[layer].mean(0)).square().sum()


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


# ---- what can go wrong


@pytest.mark.parametrize("num_tokens", [0, 63])
def test_too_little_text_is_said(num_tokens):
    with pytest.raises(TrainingError, match=rf"{num_tokens} tokens, less than one batch of 64.*batch_tokens"):
        run(planted(100)[:, :num_tokens], {0: TOPK, 1: TOPK}, tokens=100)


@pytest.mark.parametrize("spec", [TOPK, RELU], ids=["topk", "relu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 900])
def test_bad_activations_name_the_layer(monkeypatch, spec, bad, at):
    monkeypatch.setattr(buffer, "MOST_TOKENS", 256)  # so that the later token is not in the first buffer
    x_LND = planted(1000)
    x_LND[1, at, 3] = bad
    with pytest.raises(TrainingError, match="planted layer 4") as caught:
        run(x_LND, {2: spec, 4: spec}, tokens=100_000)  # more than there are: the source ends first
    assert "\n" not in str(caught.value)


def test_diverged_training_names_layer_and_rate():
    with pytest.raises(
        TrainingError, match=r"layer 0: the loss is (nan|inf) at step .* lower training.lr \(now 1e\+30\)"
    ):
        run(planted(3000), {0: RELU, 1: RELU}, lr=1e30)


# ---- schedule and progress


def test_learning_rate_rises_holds_and_falls():
    factors = [engine.schedule(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and factors[50] == 1.0  # 5 % warm-up
    assert set(factors[50:200]) == {1.0}
    assert all(a > b for a, b in pairwise(factors[200:]))
    assert factors[599] == pytest.approx(0.5, abs=1e-3) and factors[-1] < 1e-3
    assert engine.schedule(0, 1) > 0.5  # a run of one step learns too
    assert engine.learning_rate(TrainingSpec(lr=0.1), 512) == 0.1
    auto = TrainingSpec(batch_tokens=256)
    assert engine.learning_rate(auto, 512) == pytest.approx(8e-3)
    assert engine.learning_rate(auto, 2048) == pytest.approx(4e-3)


def test_rate_in_effect_is_the_scheduled_one(monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def watched(self, *args, **options):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run(planted(1280, num_layers=1), {0: TOPK}, lr=0.01)
    assert seen == pytest.approx([0.01 * engine.schedule(i, 20) for i in range(20)])


def test_decoder_rows_only_turn(monkeypatch):
    """At every step they have unit norm and a gradient without a part along them."""
    step, num_steps = torch.optim.Adam.step, 0

    def watched(self, *args, **options):
        nonlocal num_steps
        W_dec_LFD = self.param_groups[0]["params"][2]
        torch.testing.assert_close(W_dec_LFD.norm(dim=-1), torch.ones(2, 16))
        assert (W_dec_LFD.grad * W_dec_LFD).sum(-1).abs().max() < 1e-5 * W_dec_LFD.grad.norm(dim=-1).max()
        num_steps += 1
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run(planted(1280), {0: TOPK, 1: TOPK})
    assert num_steps == 20


def test_progress_is_sane(monkeypatch):
    monkeypatch.setattr(engine, "REPORT_SECONDS", 0.0)
    reports: list[Progress] = []
    x_LND = planted(1300)
    run(x_LND, {7: TOPK, 3: TOPK.overridden(DictionaryOverride(k=3))}, reports)
    assert [r.step for r in reports] == list(range(1, 21))
    for r in reports:
        assert (r.model, r.layers, r.num_steps) == ("planted", [3, 7], 20)
        assert r.tokens_per_second > 0 and r.eta_seconds >= 0
        for values in (r.loss, r.l0, r.fvu, r.dead):
            assert len(values) == 2 and all(math.isfinite(v) and v >= 0 for v in values)
        assert r.l0[0] <= 3 and r.l0[1] <= 2 and max(r.dead) <= 1
        assert r.loss[0] == pytest.approx(
            r.fvu[0] * mean_square(x_LND[1]), rel=0.5
        )  # near: the batch's variance differs
    assert reports[-1].eta_seconds == 0
    assert reports[-1].fvu[1] < reports[0].fvu[1]


def mean_square(x_ND: Tensor) -> float:
    """Mean square of centred activations scaled to mean norm sqrt(D)."""
    centred_ND = x_ND - x_ND.mean(0)
    return float((centred_ND * math.sqrt(x_ND.shape[1]) / centred_ND.norm(dim=1).mean()).square().mean())


def test_source_that_ends_early_is_counted_as_far_as_it_went():
    reports: list[Progress] = []
    trained = run(planted(1000), {0: TOPK, 1: TOPK}, reports, tokens=6400)
    assert (reports[-1].step, reports[-1].num_steps) == (15, 100)
    assert trained[0].metadata["training_tokens"] == 15 * 64


def test_metadata_says_where_a_dictionary_comes_from():
    trained = run(planted(640), {4: TOPK, 9: TOPK}, seed=3, tokens=320, epochs=2)
    assert trained[9].metadata == {"model_name": "planted", "layer": 9, "training_tokens": 640, "seed": 3}
    assert trained[4].options == {"k": 2} and trained[4].architecture == "topk"
