"""Dictionaries of activations that come without a language model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import throughline
from builders import planted_activations
from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.study import DictionarySpec, TrainingSpec
from throughline.training import Progress, chunks, engine

pytestmark = pytest.mark.xdist_group("activations")  # what it sets up takes long

D, F, K, N = 16, 32, 2, 12_000
DICTIONARY = {"d_sae": F, "k": K}
TRAINING = {"batch_tokens": 128, "epochs": 2}


@pytest.fixture(scope="module")
def directions() -> torch.Tensor:
    rows = torch.randn(F, D, generator=torch.Generator().manual_seed(1))
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def x_ND(directions) -> torch.Tensor:
    return planted_activations(N, directions, K)


@pytest.fixture(scope="module")
def trained(x_ND) -> Dictionary:
    return throughline.train(activations=x_ND, dictionary=DICTIONARY, training=TRAINING)["layer_00"]


def same(a: Dictionary, b: Dictionary) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_planted_features_are_found(trained, x_ND, directions):
    residual = x_ND - trained.reconstruct(x_ND)
    assert float(residual.square().sum() / (x_ND - x_ND.mean(0)).square().sum()) < 0.15
    best = (trained.W_dec @ directions.T).max(0).values
    assert float((best > 0.9).float().mean()) > 0.75
    assert (
        trained.metadata["training_tokens"] == 2 * N // 128 * 128
    )  # the length of the array is the length of an epoch


def test_every_way_of_giving_them_is_the_same(trained, x_ND, tmp_path):
    np.save(tmp_path / "0.npy", x_ND[:5000].numpy())
    save_file({"x": x_ND[5000:].contiguous()}, tmp_path / "1.safetensors")
    epoch = TRAINING | {"tokens": N}
    given = [
        (x_ND.numpy(), TRAINING),
        (x_ND[None], TRAINING),
        (tmp_path, TRAINING),
        (str(tmp_path), TrainingSpec(batch_tokens=128, epochs=2)),
        (lambda: iter(x_ND.split(1000)), epoch),
        (list(x_ND.split(1000)), epoch),
    ]
    for activations, training in given:
        found = throughline.train(activations=activations, dictionary=DictionarySpec(**DICTIONARY), training=training)
        assert list(found) == ["layer_00"] and torch.allclose(found["layer_00"].W_dec, trained.W_dec, atol=1e-4)
    once = throughline.train(
        activations=iter(x_ND.split(1000)), dictionary=DICTIONARY, training={"tokens": N, "batch_tokens": 128}
    )
    assert once["layer_00"].metadata["training_tokens"] == N // 128 * 128


def test_layers_are_saved_by_their_names(x_ND, tmp_path):
    said: list[str] = []
    found = throughline.train(
        activations=torch.stack([x_ND, x_ND.flip(1) * 3]),
        dictionary=DICTIONARY | {"per_layer": {1: {"k": 1}}},
        training={"batch_tokens": 256, "tokens": 2000},
        layers=["conv 1", "mixed/5b"],
        name="inception",
        out=tmp_path / "out",
        say=said.append,
    )
    assert said == ["inception: 2,000 activations, layers: conv 1, mixed/5b; 16 wide"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["conv-1", "mixed-5b"]
    for name, k in (("conv 1", K), ("mixed/5b", 1)):
        loaded = throughline.load_dictionary(tmp_path / "out" / name.replace(" ", "-").replace("/", "-"))
        assert same(loaded, found[name]) and loaded.options["k"] == k
        assert (loaded.metadata["hook_name"], loaded.metadata["model_name"]) == (name, "inception")
        assert loaded.metadata["training_tokens"] == 2000 // 256 * 256


def test_wrong_input_is_refused_in_one_line(x_ND, tmp_path):
    def refused(expected: str, **arguments) -> None:
        with pytest.raises(InputError, match=expected) as error:
            throughline.train(**{"activations": x_ND, "training": TRAINING} | arguments)
        assert "\n" not in str(error.value)

    refused("unknown key dictionary.kk; did you mean k?", dictionary={"kk": 3})
    refused("unknown key training.lrr; did you mean lr?", training={"lrr": 3})
    refused("architecture 'topp' is unknown; did you mean 'topk'?", dictionary={"architecture": "topp"})
    refused(
        "batch_tokens 4096 is more than the 100 tokens of the training",
        activations=x_ND[:100],
        training={"batch_tokens": 4096},
    )
    refused("how many activations these are is not known .* training={'tokens'", activations=iter([x_ND]), training={})
    refused("an iterator of activations cannot be read for 2 epochs", activations=iter([x_ND]))
    refused("training.ceiling_seeds is for studies, .* found 1; leave it out", training=TRAINING | {"ceiling_seeds": 1})
    refused("the activations have 1 layers, found 2 names", layers=["a", "b"])
    refused("layers need different names", activations=x_ND.reshape(2, -1, D), layers=["a b", "a/b"])
    refused(
        r"the array of activations is empty, found shape \(0, 16\)", activations=x_ND[:0], training={"tokens": 5000}
    )
    refused(
        "the activations of layer_00 do not vary: the first 500 are all the same", activations=x_ND[:1].expand(500, D)
    )
    refused("the activations of b do not vary", activations=torch.stack([x_ND, x_ND * 0]), layers=["a", "b"])
    refused("dictionary.per_layer has layer 7, but .* layers 0-0", dictionary={"per_layer": {7: {"k": 1}}})
    refused("dictionary of layer 0, width 16: k 200 is more than the 128 features", dictionary={"k": 200})
    refused("dictionary should be a DictionarySpec or a dict of .*, found 'topk'", dictionary="topk")
    refused("training should be a TrainingSpec or a dict .*, found 'x'", training="x")
    refused("training should be a TrainingSpec or a dict", training=DictionarySpec())
    refused("layers should be a list of names, one for each layer, found 3", layers=3)
    refused("layers should be a list of names, one for each layer, found 'a'", layers="a")
    refused("name should be a string, found 3", name=3)
    refused("out should be the name of a folder, found 3", out=3)
    refused("out should be the name of a folder, found ''", out="")
    refused("saved to local folders only, found out s3://b/x", out="s3://b/x")
    refused("saved to local folders only, found out s3:/b/x", out=Path("s3://b/x"))
    for name in ("checkpoint", "Checkpoint", "..", ".", "", "/", "x" * 300):
        refused(
            "a layer needs a name with a letter or digit, .*other than checkpoint", layers=[name], out=tmp_path / "out"
        )
    refused("device '0' is unknown; expected cpu, cuda", device=0)
    refused("device 'meta' is unknown", device=torch.device("meta"))
    refused("train takes a study or activations, found both", study="study.yaml")
    refused("train needs a study file, or activations=", activations=None, training=None)
    refused("dictionary, training and layers go with activations", activations=None, study="study.yaml")
    refused("found int", activations=3)
    (tmp_path / "a.txt").touch()
    refused("is a file; give a folder", out=tmp_path / "a.txt")
    refused("x/y cannot be made, since .*a.txt is a file; give another folder", out=tmp_path / "a.txt" / "x" / "y")
    refused("is not empty; give another folder, or resume=True", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_memory_that_cannot_be_had_is_refused(x_ND, tmp_path, monkeypatch):
    monkeypatch.setattr("throughline.activations.free_bytes", lambda device: 2**20)
    with pytest.raises(
        InputError, match=r"needs .* GiB or more, found 0.0 usable; set dictionary.d_sae or training.batch"
    ):
        throughline.train(activations=x_ND, training=TRAINING, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_device_of_torch_is_a_device(x_ND):
    assert throughline.train(activations=x_ND[:300], training={"batch_tokens": 128}, device=torch.device("cpu"))


def test_an_iterator_with_fewer_than_were_said_is_announced_so(x_ND):
    said: list[str] = []
    arguments: dict[str, Any] = {"dictionary": DICTIONARY, "training": {"tokens": 5000, "batch_tokens": 128}}
    throughline.train(activations=iter(x_ND[:1000].split(500)), say=said.append, **arguments)
    assert said[0].startswith("activations: up to 5,000 activations, layers: layer_00")
    assert (
        "activations: the activations ended after 1,000 of 5,000; for a learning rate that fits, set tokens to 1000"
        in said
    )
    said.clear()
    throughline.train(activations=iter(x_ND[:6000].split(500)), say=said.append, **arguments)
    assert not any("ended after" in line for line in said)


def test_the_documented_example_works(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[1] / "docs" / "activations.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)  # noqa: S102
    assert capsys.readouterr().out == "64 256\n"
    assert same(names["block"], names["same"])


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(x_ND, tmp_path, monkeypatch):
    """Stopped by an interrupt after some chunks; what was read before is skipped."""
    monkeypatch.setattr(chunks, "MOST_TOKENS", 1024)
    monkeypatch.setattr(engine, "REPORT_SECONDS", 0.0)
    training = TRAINING | {"checkpoint_minutes": 0, "passes": 2}
    whole = tmp_path.with_name(f"{tmp_path.name}-whole")  # what is saved is rounded on the way
    expected = throughline.train(activations=x_ND, out=whole, dictionary=DICTIONARY, training=training)["layer_00"]

    def stop(progress: Progress) -> None:
        if progress.step > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        throughline.train(activations=x_ND, out=tmp_path, dictionary=DICTIONARY, training=training, progress=stop)
    assert (tmp_path / "checkpoint" / "state.safetensors").is_file()
    said: list[str] = []
    arguments: dict[str, Any] = {"out": tmp_path, "dictionary": DICTIONARY, "training": training, "resume": True}
    found = throughline.train(activations=x_ND, say=said.append, **arguments)["layer_00"]
    assert any(re.search(r"going on from step [1-9]\d* of", line) for line in said)
    assert same(found, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer_00"]
