"""Attention sinks: the limit of a layer, and training, codes and files that leave out what lies beyond it."""

import math
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import throughline
from builders import random_dictionary
from throughline.dictionaries import load_dictionary
from throughline.dictionaries.formats import read_foreign, write_foreign
from throughline.errors import DamagedFileError
from throughline.harvesting import harvest
from throughline.pipeline import evaluate_models, train_models
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.sinks import BEYOND_ALL, find_sink_norm
from throughline.study import DictionarySpec, parse_study
from throughline.text import read_documents
from throughline.tokens import stream_rows
from throughline.zoo import resolve_path

D, N = 12, 4000
SETTINGS = {"batch_tokens": 100, "lr": 0.01, "checkpoint_minutes": 0}


def with_norms(norms, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(len(norms), D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1) * torch.as_tensor(norms, dtype=torch.float32)[:, None]


def ordinary(seed: int = 0) -> np.ndarray:
    return np.exp(0.1 * np.random.default_rng(seed).standard_normal(N))


@pytest.mark.parametrize("factor", [4.0, 10.0, 1000.0])
@pytest.mark.parametrize("num_sinks", [1, 40, 400])
def test_tokens_beyond_an_empty_band_are_sinks(factor, num_sinks):
    norms = ordinary()
    norms[:num_sinks] *= factor
    limit = find_sink_norm(with_norms(norms))
    assert norms[num_sinks:].max() < limit < norms[:num_sinks].min()


def test_sinks_of_several_lengths_are_all_beyond_the_limit():
    norms = ordinary()
    norms[:5], norms[5:9] = 8.0, 300.0
    assert norms[9:].max() < find_sink_norm(with_norms(norms)) < 8


@pytest.mark.parametrize(
    "heavy", ["one token in ten is up to fifteen times as long", "a tail as of a Pareto distribution"]
)
def test_large_tokens_without_a_gap_are_ordinary(heavy):
    generator = np.random.default_rng(1)
    if heavy.startswith("one"):
        norms = ordinary()
        norms[: N // 10] *= np.linspace(1.5, 15, N // 10)
    else:
        norms = 1 + generator.pareto(4, N).clip(max=5)
    assert find_sink_norm(with_norms(norms)) == pytest.approx(BEYOND_ALL * norms.max(), rel=1e-5)


def test_a_large_minority_is_no_exception():
    norms = ordinary()
    norms[: N // 3] *= 10
    assert find_sink_norm(with_norms(norms)) == pytest.approx(BEYOND_ALL * norms.max(), rel=1e-5)


def test_nothing_and_zeros_have_no_sinks():
    assert find_sink_norm(torch.zeros(0, D)) == math.inf
    assert find_sink_norm(torch.zeros(5, D)) == math.inf


def test_a_sink_has_no_features_and_keeps_its_activation():
    x_ND = with_norms(ordinary()[:50])
    x_ND[7] *= 100
    one = replace(random_dictionary(D, 24), sink_norm=50.0)
    f_NF = one.encode(x_ND)
    assert not f_NF[7].any() and f_NF.any(dim=1).sum() == 49
    torch.testing.assert_close(one.reconstruct(x_ND)[7], x_ND[7])
    others = [n for n in range(50) if n != 7]
    torch.testing.assert_close(one.reconstruct(x_ND)[others], random_dictionary(D, 24).reconstruct(x_ND[others]))


def planted(seed: int = 0) -> torch.Tensor:
    """Tokens of one or two of 16 directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(16, D, generator=generator), dim=1)
    strengths = torch.rand(N, 16, generator=generator) * (torch.rand(N, 16, generator=generator) < 0.1)
    strengths[torch.arange(N), torch.randint(16, (N,), generator=generator)] += 1
    return strengths @ directions


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_training_is_as_good_as_without_them(architecture):
    """A hundredth of the tokens, a hundred times as long: 99 % of the variance."""
    x_ND = planted()
    with_sinks_ND = x_ND.clone()
    sinks = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: N // 100]
    with_sinks_ND[sinks] = 100.0 * torch.nn.functional.normalize(torch.ones(D), dim=0)
    spec = {"architecture": architecture, "d_sae": 32, "k" if architecture == "topk" else "target_l0": 2}
    fvu = {}
    for name, given in {"without": x_ND, "with": with_sinks_ND}.items():
        [one] = throughline.train(activations=given, dictionary=spec, training=SETTINGS | {"epochs": 3}).values()
        fvu[name] = float((x_ND - one.reconstruct(x_ND)).square().sum() / (x_ND - x_ND.mean(0)).square().sum())
        assert one.metadata["sink_tokens_left_out"] == (3 * len(sinks) if name == "with" else 0)
    assert fvu["with"] == pytest.approx(fvu["without"], rel=0.1) and fvu["with"] < 0.3
    kept = throughline.train(
        activations=with_sinks_ND, dictionary=spec, training=SETTINGS | {"epochs": 3, "sinks": "keep"}
    )
    assert kept["layer_00"].sink_norm == math.inf
    f_NF = kept["layer_00"].encode(x_ND)
    spoilt = float((x_ND - kept["layer_00"].decode(f_NF)).square().sum() / (x_ND - x_ND.mean(0)).square().sum())
    assert spoilt > 1.5 * fvu["with"]  # or else leaving them out is for nothing


def test_a_model_with_a_sink_has_the_dictionaries_of_the_same_model_without(tmp_path):
    """LayerNorm takes the mean of the coordinates away: a constant added to all coordinates of the first position makes it a sink,
    300 times as long, and changes nothing that the model computes.
    """
    original = Path(resolve_path("zoo/gpt2"))
    weights = {name: tensor.float() for name, tensor in load_file(original / "model.safetensors").items()}
    first_D = weights["transformer.wpe.weight"][0]
    runs = {}
    for name, added in {"plain": 0.0, "sink": 300 * float(first_D.norm()) / len(first_D) ** 0.5}.items():
        shutil.copytree(original, tmp_path / name)
        first_D += added
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        study = parse_study(
            {
                "name": name,
                "models": [{"path": str(tmp_path / name), "name": name, "layers": [1, 3]}],
                "data": {"path": "zoo/arithmetic", "context": 64},
                "dictionary": {"expansion": 2, "k": 8},
                "training": {"tokens": 100_000, "batch_tokens": 256, "seed": 1},
                "evaluation": {"tokens": 20_000, "spliced_tokens": 10_000},
            }
        )
        runs[name] = Session(RunDir.create(tmp_path / f"run_{name}", study), "cpu")
        train_models(runs[name], lambda progress: None)
        evaluate_models(runs[name])
    found = {name: session.run.quality(name) for name, session in runs.items()}
    fvu = {name: fvu_after_the_first_position(session, name) for name, session in runs.items()}
    for plain, sink in zip(found["plain"], found["sink"], strict=True):
        assert plain.num_sinks == 0 and sink.num_sinks > 1000
        assert sink.num_tokens + sink.num_sinks == plain.num_tokens
        assert sink.fvu_with_sinks is not None and sink.fvu_with_sinks > 10 * sink.fvu
        assert sink.num_answers == plain.num_answers > 50
        assert sink.answers_kept == pytest.approx(plain.answers_kept, abs=0.05)
        assert sink.ce_loss_score == pytest.approx(plain.ce_loss_score, abs=0.05)
        assert sink.dead == pytest.approx(plain.dead, abs=0.05)
        assert sink.passed and not sink.setbacks
    for layer in (1, 3):
        assert (
            fvu["sink"][layer] < 1.05 * fvu["plain"][layer]
        )  # the same tokens; plain was trained on the first ones as well


def fvu_after_the_first_position(session: Session, name: str) -> dict[int, float]:
    model, layers, data = session.model(name), [1, 3], session.study.data
    rows = list(islice(stream_rows(read_documents(data, "heldout"), model.tokenizer, data.context, 16), 20))
    x_LND = torch.cat([x_LND for _, x_LND in harvest(model, rows, layers)], 1)
    ordinary_N = torch.cat([torch.from_numpy(part.positions[part.keep]) for part in rows]) > 0
    missed = {}
    for layer, x_ND in zip(layers, x_LND[:, ordinary_N], strict=True):
        one = load_dictionary(session.run.layer_folder(name, layer))
        missed[layer] = float((x_ND - one.reconstruct(x_ND)).square().sum() / (x_ND - x_ND.mean(0)).square().sum())
    return missed


def test_a_training_that_goes_on_has_the_same_limit(tmp_path):
    x_ND = planted()
    x_ND[::200] *= 50
    spec = DictionarySpec(d_sae=32, k=2)
    stopped: list[int] = []

    def stop(progress) -> None:
        stopped.append(progress.step)
        if len(stopped) == 2:
            raise KeyboardInterrupt

    arguments = {"dictionary": spec, "training": SETTINGS, "out": tmp_path / "stopped"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("throughline.training.engine.REPORT_SECONDS", 0.0)
        patch.setattr("throughline.training.chunks.MOST_TOKENS", 1000)
        whole = throughline.train(activations=x_ND, **(arguments | {"out": tmp_path / "whole"}))["layer_00"]
        with pytest.raises(KeyboardInterrupt):
            throughline.train(activations=x_ND, progress=stop, **arguments)
        found = throughline.train(activations=x_ND, resume=True, **arguments)["layer_00"]
    assert found.sink_norm == whole.sink_norm < 50
    assert found.metadata == whole.metadata
    torch.testing.assert_close(found.W_enc, whole.W_enc, rtol=0, atol=0)


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary-learning"])
def test_files_say_it_and_are_read_with_it(to, tmp_path):
    one = replace(random_dictionary(D, 24), architecture="topk", options={"k": 3}, sink_norm=123.5)
    write_foreign(one, tmp_path / "with", to)
    assert read_foreign(tmp_path / "with", to)[1].sink_norm == 123.5
    write_foreign(replace(one, sink_norm=math.inf), tmp_path / "without", to)
    assert read_foreign(tmp_path / "without", to)[1].sink_norm == math.inf


def test_a_limit_that_is_no_norm_is_refused(tmp_path):
    one = replace(random_dictionary(D, 24), architecture="topk", options={"k": 3}, sink_norm=123.5)
    write_foreign(one, tmp_path, "saelens")
    path = tmp_path / "cfg.json"
    path.write_text(path.read_text().replace("123.5", '"many"'))
    with pytest.raises(DamagedFileError, match="sink_norm"):
        read_foreign(tmp_path, "saelens")
