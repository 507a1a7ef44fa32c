"""Foreign files: each format's formula, written out here, gives the same features; what cannot be held is refused in one line.

The real libraries are asked in tests/test_interop_peers.py.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import throughline
from builders import dictionary_of
from throughline import api
from throughline.cli import commands, main
from throughline.dictionaries import Dictionary, load_dictionary, untrained_like
from throughline.dictionaries.formats import FORMATS, read_foreign, require_held, write_foreign
from throughline.dictionaries.formats.folding import fold
from throughline.errors import DamagedFileError, InputError, ThroughlineError
from throughline.run_dir import RunDir

D, F, N = 16, 40, 64
HELD = [(name, architecture) for name, module in FORMATS.items() for architecture in module.ARCHITECTURES_HELD]


@pytest.fixture
def x_ND() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(N, D, generator=generator) + torch.randn(D, generator=generator)


def assert_same(one: Dictionary, other: Dictionary, x_ND: Tensor, tolerance: float = 1e-5) -> None:
    assert_close(one.encode(x_ND), other.encode(x_ND), tolerance)
    assert_close(one.reconstruct(x_ND), other.reconstruct(x_ND), tolerance)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def topk(pre_NF: Tensor, k: int) -> Tensor:
    """By sorting, not as the code does it."""
    kth_N1 = pre_NF.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(pre_NF >= kth_N1, pre_NF, 0).relu()


# ---- round trips


@pytest.mark.parametrize(("name", "architecture"), HELD)
def test_written_and_read_again_it_is_the_same_dictionary(tmp_path, x_ND, name, architecture):
    ours = dictionary_of(architecture)
    files = write_foreign(ours, tmp_path, name)
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    found, again = read_foreign(tmp_path)
    expected = "jumprelu" if (name, architecture) == ("gemma-scope", "relu") else architecture
    assert (found, again.architecture, again.options) == (name, expected, ours.options)
    assert_same(again, ours, x_ND)
    assert read_foreign(tmp_path / files[0], name)[1].d_sae == F  # a file in it serves as well


@pytest.mark.parametrize("architecture", FORMATS["saelens"].ARCHITECTURES_HELD)
def test_our_own_convention_comes_back_bit_equal(tmp_path, architecture):
    ours = dictionary_of(architecture)
    write_foreign(ours, tmp_path, "saelens")
    again = read_foreign(tmp_path)[1]
    assert all(torch.equal(getattr(again, n), getattr(ours, n)) for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert again.extra.keys() == ours.extra.keys()
    assert all(torch.equal(again.extra[n], ours.extra[n]) for n in ours.extra)


# ---- their formulas


@pytest.fixture
def theirs() -> dict[str, Tensor]:
    """Weights that hide no mistake: no bias is zero, decoder rows have all kinds of norms, one none."""
    generator = torch.Generator().manual_seed(6)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= dict.fromkeys(("threshold", "r_mag", "b_mag"), (F,))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["threshold"] = weights["threshold"].abs()
    weights["W_dec"][7] = 0
    return weights


FORMULAS = {
    "standard": (("W_enc", "b_enc"), lambda pre, x, w: pre.relu()),
    "topk": (("W_enc", "b_enc"), lambda pre, x, w: topk(pre * w["W_dec"].norm(dim=1), 6)),
    "jumprelu": (("W_enc", "b_enc", "threshold"), lambda pre, x, w: pre.relu() * (pre > w["threshold"])),
    "gated": (
        ("W_enc", "b_gate", "r_mag", "b_mag"),
        lambda pre, x, w: (pre > 0) * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu(),
    ),
}


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", list(FORMULAS))
def test_saelens_formula(tmp_path, x_ND, theirs, architecture, subtracts, scale):
    names, act = FORMULAS[architecture]
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": "none" if scale == 1 else "expected_average_only_in",
        "metadata": {"sae_lens_version": "6.54.12", "training_architecture": "batchtopk"},
    }
    config |= {"k": 6, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    weights = theirs | {"b_gate": theirs["b_enc"]}
    save_file({n: weights[n] for n in (*names, "W_dec", "b_dec")}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    seen_ND = x_ND * scale - theirs["b_dec"] * subtracts
    f_NF = act(seen_ND @ theirs["W_enc"] + theirs["b_enc"], seen_ND, theirs)
    norm_F = theirs["W_dec"].norm(dim=1)
    f_NF = torch.where(norm_F > 0, f_NF / norm_F, 0) if architecture == "topk" else f_NF
    found = read_foreign(tmp_path)[1]
    live = norm_F > 0
    assert_close(found.encode(x_ND)[:, live], (f_NF * norm_F / scale)[:, live])
    assert_close(found.reconstruct(x_ND), (f_NF @ theirs["W_dec"] + theirs["b_dec"]) / scale)
    torch.testing.assert_close(found.W_dec.norm(dim=1)[live], torch.ones(int(live.sum())))
    assert found.metadata["training_architecture"] == "batchtopk"
    assert found.metadata["trained_with"] == "saelens"


def test_sparsify_formula(tmp_path, x_ND, theirs):
    W_dec = torch.nn.functional.normalize(theirs["W_dec"] + 1)
    weights = {"encoder.weight": theirs["W_enc"].T.contiguous(), "encoder.bias": theirs["b_enc"], "W_dec": W_dec}
    save_file(weights | {"b_dec": theirs["b_dec"]}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"k": 6, "d_in": D, "num_latents": F, "activation": "topk"}))
    f_NF = topk((x_ND - theirs["b_dec"]) @ theirs["W_enc"] + theirs["b_enc"], 6)
    found = read_foreign(tmp_path)[1]
    assert_close(found.encode(x_ND), f_NF)
    assert_close(found.reconstruct(x_ND), f_NF @ W_dec + theirs["b_dec"])


@pytest.mark.parametrize("generation", [1, 2])
def test_gemma_scope_formula(tmp_path, x_ND, theirs, generation):
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    if generation == 1:
        np.savez(tmp_path / "params.npz", **{n: theirs[n].numpy() for n in names})  # type: ignore[arg-type]
    else:
        save_file({n.lower(): theirs[n] for n in names}, tmp_path / "params.safetensors")
    pre_NF = x_ND @ theirs["W_enc"] + theirs["b_enc"]
    f_NF = pre_NF * (pre_NF > theirs["threshold"])
    found = read_foreign(tmp_path)[1]
    assert_close(found.reconstruct(x_ND), f_NF @ theirs["W_dec"] + theirs["b_dec"])
    live = theirs["W_dec"].norm(dim=1) > 0
    assert_close(found.encode(x_ND)[:, live], (f_NF * theirs["W_dec"].norm(dim=1))[:, live])


def write_learned(folder: Path, dict_class: str, state: dict, **trainer) -> None:
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, **trainer}}))


@pytest.mark.parametrize("dict_class", ["AutoEncoder", "AutoEncoderNew", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_dictionary_learning_formulas(tmp_path, x_ND, theirs, dict_class):
    linear = {
        "encoder.weight": theirs["W_enc"].T.contiguous(),
        "encoder.bias": theirs["b_enc"],
        "decoder.weight": theirs["W_dec"].T.contiguous(),
    }
    plain = {n: theirs[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    k = {"k": torch.tensor(6), "threshold": torch.tensor(1.7)}
    state = {
        "AutoEncoder": linear | {"bias": theirs["b_dec"]},
        "AutoEncoderNew": linear | {"decoder.bias": theirs["b_dec"]},
        "BatchTopKSAE": linear | k | {"b_dec": theirs["b_dec"]},
        "MatryoshkaBatchTopKSAE": plain | k | {"group_sizes": torch.tensor([20, 20])},
    }[dict_class]
    write_learned(tmp_path, dict_class, state, k=6, layer=3)
    seen_ND = x_ND if dict_class == "AutoEncoderNew" else x_ND - theirs["b_dec"]
    f_NF = (seen_ND @ theirs["W_enc"] + theirs["b_enc"]).relu()
    f_NF = f_NF * (f_NF > 1.7) if "TopK" in dict_class else f_NF
    found = read_foreign(tmp_path)[1]
    assert found.metadata["layer"] == 3
    assert_close(found.reconstruct(x_ND), f_NF @ theirs["W_dec"] + theirs["b_dec"])


def test_half_precision_weights_are_read(tmp_path, x_ND):
    for architecture in ("topk", "jumprelu"):
        ours = dictionary_of(architecture)
        write_foreign(ours, tmp_path, "saelens")
        path = tmp_path / "sae_weights.safetensors"
        half = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(half, path)
        found = read_foreign(tmp_path)[1]
        exact = replace(ours, **{n: half[n].float() for n in ("W_enc", "b_enc", "W_dec", "b_dec")})
        exact = replace(exact, extra={n: half[n].float() for n in ours.extra})
        assert found.W_enc.dtype == torch.float32
        assert_close(found.reconstruct(x_ND), exact.reconstruct(x_ND))


def test_topk_rows_of_one_norm_are_folded_and_of_many_keep_the_choice(x_ND, tmp_path):
    ours = dictionary_of("topk")
    weights = {"W_enc": ours.W_enc, "b_enc": ours.b_enc, "W_dec": ours.W_dec * 0.1, "b_dec": ours.b_dec}
    found = fold("topk", weights, "it", options={"k": 6})
    torch.testing.assert_close(found.W_dec, ours.W_dec)
    assert_close(found.encode(x_ND), ours.encode(x_ND) * 0.1)
    norm_F = torch.linspace(0.5, 2, F)
    weights["W_dec"] = ours.W_dec * norm_F[:, None]
    found = fold("topk", weights, "it", options={"k": 6})
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(F))
    assert_close(
        found.encode(x_ND), ours.encode(x_ND) * norm_F
    )  # those that were chosen before, in units of the stream
    x_hat_ND = ours.encode(x_ND) @ weights["W_dec"] + ours.b_dec
    for to in ("saelens", "sparsify", "dictionary-learning"):  # each writes it as it was
        write_foreign(found, tmp_path / to, to)
        again = read_foreign(tmp_path / to, to)[1]
        assert_close(again.encode(x_ND), found.encode(x_ND))
        assert_close(again.reconstruct(x_ND), x_hat_ND)


# ---- refusals


def test_a_format_says_what_it_cannot_hold():
    with pytest.raises(
        InputError, match=r"layer 3 is a gated dictionary and sparsify holds topk only; saelens, dictionary"
    ):
        require_held("sparsify", "gated", "layer 3")
    with pytest.raises(InputError, match=r"gemma-scope holds jumprelu and relu only"):
        require_held("gemma-scope", "topk", "layer 3")
    with pytest.raises(InputError, match="format 'sparsifi' is unknown; did you mean 'sparsify'"):
        require_held("sparsifi", "topk", "layer 3")


def refused(folder: Path, name: str = "auto", kind: type[ThroughlineError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        read_foreign(folder, name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


CONFIGS = {
    "saelens": [
        ({"architecture": "temporal"}, "unknown architecture, 'temporal'; expected one of standard, topk"),
        ({"architecture": None}, "unknown architecture, None"),
        ({"architecture": "batchtopk"}, "write it with save_inference_model"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm', which depends on each input"),
        ({"normalize_activations": "covariance_whitening"}, "cannot be folded"),
        ({"normalize_activations": "expected_average_only_in"}, "the scale is not there (activation_scaler.json)"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'; expected none"),
        ({"metadata": {}, "activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'; expected relu or topk"),
    ],
    "sparsify": [
        ({"multi_topk": True}, "has multi_topk; expected a plain TopK"),
        ({"transcode": True}, "has transcode"),
        ({"skip_connection": True}, "has skip_connection"),
        ({"activation": "groupmax"}, "activation 'groupmax'; expected topk"),
    ],
    "dictionary-learning": [
        ({"trainer": {"dict_class": "CrossCoder"}}, "dict_class 'CrossCoder'; expected one of AutoEncoder,"),
        ({"trainer": {}}, "has no dict_class"),
        ({"trainer": "AutoEncoder"}, "dict_class None"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "said"), [(n, change, said) for n, cases in CONFIGS.items() for change, said in cases]
)
def test_what_cannot_be_folded_is_refused(tmp_path, name, change, said):
    write_foreign(dictionary_of("topk"), tmp_path, name)
    path = tmp_path / ("config.json" if name == "dictionary-learning" else "cfg.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = refused(tmp_path)
    assert said in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(("name", "architecture"), HELD)
def test_damaged_files_are_named(tmp_path, name, architecture):
    files = write_foreign(dictionary_of(architecture), tmp_path, name)
    for file in files:
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[: len(content) // 2])
        assert file in refused(tmp_path, name, ThroughlineError)
        (tmp_path / file).unlink()
        assert f"{file} does not exist" in refused(tmp_path, name)
        (tmp_path / file).write_bytes(content)
    read_foreign(tmp_path)


@pytest.mark.parametrize("damage", ["narrower", "missing", "not a number", "one too many"])
@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "threshold"])
def test_wrong_weights_are_named(tmp_path, tensor, damage):
    write_foreign(dictionary_of("jumprelu"), tmp_path, "saelens")
    path = tmp_path / "sae_weights.safetensors"
    weights = load_file(path)
    match damage:
        case "narrower":
            weights[tensor] = weights[tensor][..., :-1].contiguous()
        case "missing":
            del weights[tensor]
        case "not a number":
            weights[tensor].view(-1)[0] = torch.nan
        case "one too many":
            weights[f"{tensor}_2"] = weights[tensor].clone()
    save_file(weights, path)
    message = refused(tmp_path, kind=ThroughlineError)
    assert str(tmp_path) in message
    assert "W_" in message or tensor in message


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    write_foreign(dictionary_of("topk"), tmp_path, "dictionary-learning")
    torch.save({"encoder.weight": Evil()}, tmp_path / "ae.pt")
    assert "nothing is unpickled" in refused(tmp_path)
    (tmp_path / "gemma").mkdir()
    np.savez(tmp_path / "gemma" / "params.npz", W_enc=np.array([Evil()], dtype=object))
    assert "nothing is unpickled" in refused(tmp_path / "gemma")
    (tmp_path / "gemma" / "params.npz").write_bytes(b"some text")
    assert "nothing is unpickled" in refused(tmp_path / "gemma")
    with (tmp_path / "gemma" / "params.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "params.npz holds one array; expected an archive of several" in refused(tmp_path / "gemma")
    assert not (tmp_path / "touched").exists()


def test_a_threshold_that_was_never_set_is_refused(tmp_path):
    state = {"W_enc": torch.ones(D, F), "b_enc": torch.ones(F), "W_dec": torch.ones(F, D), "b_dec": torch.ones(D)}
    write_learned(tmp_path, "MatryoshkaBatchTopKSAE", state | {"threshold": torch.tensor(-1.0)})
    assert "never got its threshold" in refused(tmp_path)


def test_two_k_are_one_too_many(tmp_path):
    write_foreign(dictionary_of("topk"), tmp_path, "dictionary-learning")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"k": 6', '"k": 7'))
    assert "should have one k above 0, found 6 and 7" in refused(tmp_path, kind=DamagedFileError)


def test_folders_that_hold_no_dictionary(tmp_path):
    assert "does not exist" in refused(tmp_path / "none")
    assert "holds no dictionary that is known" in refused(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "found notes.txt" in refused(tmp_path)
    write_foreign(dictionary_of("topk"), tmp_path / "h.3", "sparsify")
    assert f"give the folder of one, such as {tmp_path / 'h.3'}" in refused(tmp_path)
    write_foreign(dictionary_of("topk"), tmp_path / "h.3", "saelens")
    assert "fits saelens and sparsify; say which with --from" in refused(tmp_path / "h.3")
    assert "format 'sae-lens' is unknown; did you mean 'saelens'?" in refused(tmp_path / "h.3", "sae-lens")
    assert "params.npz does not exist" in refused(tmp_path / "h.3", "gemma-scope")


# ---- the control of a learned dictionary


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
def test_an_untrained_dictionary_is_of_the_same_kind_and_as_sparse(x_ND, architecture):
    ours = dictionary_of(architecture)
    mean_D = x_ND.mean(0)
    other = untrained_like(ours, mean_D, torch.Generator().manual_seed(3))
    assert (other.architecture, other.extra.keys()) == (architecture, ours.extra.keys())
    torch.testing.assert_close(other.reconstruct(mean_D[None]), mean_D[None], atol=1e-4, rtol=1e-4)
    if architecture in ("jumprelu", "gated"):  # each feature begins no nearer to the mean than the one it stands for
        edge_F = ours.extra["threshold"] if architecture == "jumprelu" else torch.zeros(F)
        out_F = (edge_F - mean_D @ ours.W_enc - ours.b_enc) / ours.W_enc.norm(dim=0)
        along_NF = (x_ND - mean_D) @ other.W_enc
        assert torch.equal(other.encode(x_ND) > 0, along_NF > out_F.clamp_min(0))
        active_NF = other.encode(x_ND)
        torch.testing.assert_close(active_NF[active_NF > 0], along_NF[active_NF > 0], atol=1e-4, rtol=1e-4)


# ---- import and export

STUDY = {
    "name": "interop",
    "models": [{"path": "zoo/gpt2", "layers": [0, 1]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"architecture": "topk", "d_sae": 64, "k": 8},
    "training": {"tokens": 6000, "batch_tokens": 64},
    "gate": {"max_l0_share": 1.0, "max_fvu": 1.0, "min_ce_recovered": -9.0, "max_dead": 1.0},
    "evaluation": {"tokens": 1000, "spliced_tokens": 300, "sample_tokens": 500},
}
MODEL, WIDTH = "zoo/gpt2", 160


@pytest.fixture(scope="session")
def tiny(trained) -> Path:
    """A run of two layers, trained and evaluated, not to be changed; its study file lies beside it."""
    return trained(STUDY, "evaluate")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    shutil.copy(tiny.parent / "study.yaml", tmp_path)
    return shutil.copytree(tiny, tmp_path / "run")


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A ReLU dictionary of the model's width, in dictionary_learning's format."""
    ours = replace(dictionary_of("relu", WIDTH, 96), metadata={"model_name": "someone/else"})
    write_foreign(ours, tmp_path / "foreign", "dictionary-learning")
    return tmp_path / "foreign"


@pytest.fixture
def say(capsys):
    """Run a command here; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err  # type: ignore[return-value]

    return run


def one_line(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_an_imported_layer_is_done_and_not_trained_again(say, copy, foreign):
    code, out, err = say("import", copy, foreign, "--layer", 1)
    assert (code, err) == (0, "")
    assert re.match(
        r"zoo/gpt2 layer 1: relu of 96 features from dictionary-learning; FVU \d+\.\d+, L0 \d+\.\d on [\d,]+ held", out
    )
    state = api.status(copy)["models"][MODEL]
    assert (state["state"], state["steps"]["evaluate"]) == ("done", False)
    assert {layer: s["state"] for layer, s in state["layers"].items()} == {0: "done", 1: "imported"}
    folder = RunDir(copy).layer_folder(MODEL, 1)
    found = load_dictionary(folder)
    assert (found.metadata["imported_from"], found.metadata["hf_hook_name"]) == (
        "dictionary-learning",
        "transformer.h.1",
    )
    assert (folder / "probe.safetensors").is_file()
    before = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    code, out, err = say("train", copy.parent / "study.yaml", "--out", copy, "--resume")
    assert code == 0
    assert err.count("imported, so not trained: layer 1") == 1
    assert {path: path.read_bytes() for path in copy.rglob("*.safetensors")} == before
    qualities = api.evaluate(copy, device="cpu")
    assert [q.layer for q in qualities] == [0, 1]


def test_an_imported_layer_is_not_trained_for_another_setting_either(say, copy, foreign):
    say("import", copy, foreign, "--layer", 1)
    before = (RunDir(copy).layer_folder(MODEL, 1) / "sae_weights.safetensors").read_bytes()
    other = (RunDir(copy).layer_folder(MODEL, 0) / "sae_weights.safetensors").read_bytes()
    setting = ["--set", "dictionary.k=4"]
    code, _, _ = say("train", copy.parent / "study.yaml", "--out", copy, "--resume", *setting)
    assert code == 0
    assert (RunDir(copy).layer_folder(MODEL, 1) / "sae_weights.safetensors").read_bytes() == before
    assert (RunDir(copy).layer_folder(MODEL, 0) / "sae_weights.safetensors").read_bytes() != other


def test_a_damaged_import_is_said_and_a_deleted_one_trained(say, copy, foreign):
    say("import", copy, foreign, "--layer", 1)
    folder = RunDir(copy).layer_folder(MODEL, 1)
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    for command in (["evaluate", copy], ["train", copy.parent / "study.yaml", "--out", copy, "--resume"]):
        code, out, err = say(*command)
        assert (code, out) == (1, "")
        assert "import it again with `throughline import`, or delete its folder" in err.splitlines()[-1]
    shutil.rmtree(folder)
    assert say("train", copy.parent / "study.yaml", "--out", copy, "--resume")[0] == 0
    assert load_dictionary(folder).architecture == "topk"


def test_only_the_layers_that_are_new_are_trained(say, copy, tiny):
    before = {path.name: path.read_bytes() for path in (RunDir(copy).layer_folder(MODEL, 0)).iterdir()}
    arguments = ["--out", copy, "--resume", "--set", "models.0.layers=[0, 1, 3]"]
    code, _, err = say("train", copy.parent / "study.yaml", *arguments)
    assert code == 0
    assert ", 1 layers, " in err
    assert {path.name: path.read_bytes() for path in (RunDir(copy).layer_folder(MODEL, 0)).iterdir()} == before
    assert RunDir(copy).trained_layers(MODEL) == [0, 1, 3]
    study = copy.parent / "other.yaml"
    study.write_text(yaml.safe_dump(STUDY | {"models": [{"path": MODEL, "layers": [3]}]}))
    api.train(study, copy.parent / "alone", device="cpu")
    same = [
        load_file(RunDir(r).layer_folder(MODEL, 3) / "sae_weights.safetensors") for r in (copy, copy.parent / "alone")
    ]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_a_run_can_begin_with_an_import(say, tmp_path, foreign):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"models": [{"path": MODEL}]}))
    arguments = [tmp_path / "new", foreign, "--layer", 2]
    assert "does not exist; `throughline train STUDY --out" in one_line(say("import", *arguments))
    assert say("import", *arguments, "--study", tmp_path / "study.yaml")[0] == 0
    state = api.status(tmp_path / "new")["models"][MODEL]
    assert state["state"] == "waiting"
    assert [s["state"] for s in state["layers"].values()] == ["waiting", "waiting", "imported", "waiting"]
    assert "not trained yet" in one_line(say("evaluate", tmp_path / "new"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", 4], "layer 4 of zoo/gpt2 is not in this run, which has 0, 1"),
        (["--layer", 1, "--model", "zoo/phi"], "this run has no model 'zoo/phi'; it has "),
        (["--layer", 1, "--from", "sparsify"], "cfg.json does not exist"),
        ([], "Missing option '--layer'"),
    ],
)
def test_wrong_imports_change_nothing(say, copy, foreign, arguments, said):
    before = RunDir(copy).manifest()
    assert said in one_line(say("import", copy, foreign, *arguments))
    assert RunDir(copy).manifest() == before


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("blocks.1.hook_resid_post", None),
        ("blocks.2.hook_resid_pre", None),
        ("transformer.h.1", None),
        ("somewhere", None),
        ("blocks.1.hook_resid_pre", "is of layer 0 (blocks.1.hook_resid_pre), asked for layer 1; give --layer 0"),
        ("gpt_neox.layers.3", "is of layer 3 (gpt_neox.layers.3), asked for layer 1"),
        ("blocks.1.hook_mlp_out", "is of blocks.1.hook_mlp_out; expected one of the residual stream"),
    ],
)
def test_a_dictionary_of_another_place_is_refused(say, copy, tmp_path, hook, said):
    ours = replace(dictionary_of("topk", WIDTH, 96), metadata={"hook_name": hook})
    write_foreign(ours, tmp_path / "foreign", "saelens")
    result = say("import", copy, tmp_path / "foreign", "--layer", 1)
    assert result[0] == 0 if said is None else said in one_line(result)


def test_a_dictionary_of_another_width_is_refused(say, copy, tmp_path):
    write_foreign(dictionary_of("gated", 16), tmp_path / "foreign", "saelens")
    message = one_line(say("import", copy, tmp_path / "foreign", "--layer", 1))
    assert "is for activations of width 16, zoo/gpt2 has 160; give the model it was trained on" in message


@pytest.mark.parametrize(
    ("to", "folders"),
    [
        ("saelens", ["layer_00", "layer_01"]),
        ("sparsify", ["h.0", "h.1"]),
        ("dictionary-learning", ["resid_post_layer_0/trainer_0", "resid_post_layer_1/trainer_0"]),
    ],
)
def test_what_is_exported_is_what_the_run_has(say, tiny, tmp_path, to, folders):
    out = tmp_path / "out"
    assert say("export", tiny, "--to", to, "--out", out) == (0, f"2 dictionaries in {out}\n", "")
    for layer, folder in enumerate(folders):
        found = read_foreign(out / folder)[1]
        x_ND = load_file(RunDir(tiny).layer_folder(MODEL, layer) / "probe.safetensors")["inputs"]
        assert_same(found, load_dictionary(RunDir(tiny).layer_folder(MODEL, layer)), x_ND)


def test_gemma_scope_folders_say_width_and_l0(say, copy, tmp_path):
    write_foreign(dictionary_of("jumprelu", WIDTH, 1024), tmp_path / "foreign", "gemma-scope")
    say("import", copy, tmp_path / "foreign", "--layer", 0)
    assert say("export", copy, "--to", "gemma-scope", "--layers", "0", "--out", tmp_path / "out", "--quiet") == (
        0,
        "",
        "",
    )
    assert (tmp_path / "out/layer_0/width_1k/canonical/params.npz").is_file()
    api.evaluate(copy, device="cpu")
    api.export_sae(copy, "gemma-scope", tmp_path / "again", layers=[0])
    assert len(list((tmp_path / "again/layer_0/width_1k").glob("average_l0_*/params.npz"))) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--to", "gemma-scope"],
            "layer 0 of zoo/gpt2 is a topk dictionary and gemma-scope holds jumprelu and relu only",
        ),
        (["--to", "saelense"], "format 'saelense' is unknown; did you mean 'saelens'?"),
        (["--to", "sparsify", "--hub-layout"], "--hub-layout is SAELens' layout of a repository"),
        (["--to", "saelens", "--layers", "0-7"], "layer 2 of zoo/gpt2 has no dictionary in"),
        (["--to", "saelens", "--layers", "all"], "--layers expects numbers and spans such as 0-3,6, found 'all'"),
        (["--to", "saelens", "--model", "gpt3"], "this run has no model 'gpt3'; it has "),
    ],
)
def test_wrong_exports_write_nothing(say, tiny, tmp_path, arguments, said):
    assert said in one_line(say("export", tiny, "--out", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_an_export_goes_into_an_empty_folder_only(say, tiny, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        assert "is not an empty folder" in one_line(say("export", tiny, "--to", "saelens", "--out", out))


def test_the_layout_of_the_hub(say, tiny, tmp_path):
    out = tmp_path / "out"
    assert say("export", tiny, "--to", "saelens", "--out", out, "--hub-layout")[0] == 0
    ids = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", *ids]
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "saelens"
    assert "base_model" not in yaml.safe_load(front)  # the zoo is not on the hub
    for quality, name in zip(RunDir(tiny).quality(MODEL), ids, strict=True):
        row = next(line for line in body.splitlines() if line.startswith(f"| `{name}`"))
        assert [cell.strip() for cell in row.strip("|").split("|")][3:] == [
            f"{quality.l0:.1f}",
            f"{quality.fvu:.4f}",
            f"{quality.ce_loss_score:.4f}",
            f"{quality.delta_ce:+.4f}",
            f"{quality.dead:.2%}",
            "pass",
        ]
    assert f'SAE.from_pretrained("USER/REPOSITORY", "{ids[0]}")' in body
    assert "5,952 tokens in batches of 64" in body
    assert str(tmp_path) not in card


def test_the_card_says_what_failed_and_what_was_not_trained_here(say, copy, foreign, tmp_path):
    say("import", copy, foreign, "--layer", 1)
    export = ["export", copy, "--to", "saelens", "--hub-layout", "--out"]
    assert "is not evaluated, and the model card has a table of quality" in one_line(say(*export, tmp_path / "none"))
    study = yaml.safe_load((copy / "study.yaml").read_text())
    study["gate"]["max_fvu"] = 0.0
    (copy / "study.yaml").write_text(yaml.safe_dump(study))
    api.evaluate(copy, device="cpu")
    assert say(*export, tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**2 of 2 failed the quality gate.**" in card
    assert "`blocks.1.hook_resid_post` was trained elsewhere (dictionary-learning)" in card


def test_an_exported_layer_comes_back_by_import(copy, tmp_path):
    api.export_sae(copy, "sparsify", tmp_path / "out", layers=[1])
    x_ND = load_file(RunDir(copy).layer_folder(MODEL, 1) / "probe.safetensors")["inputs"]
    before = load_dictionary(RunDir(copy).layer_folder(MODEL, 1))
    made = throughline.import_sae(copy, tmp_path / "out" / "h.1", layer=1, device="cpu")
    assert (made.format, made.architecture, made.d_sae) == ("sparsify", "topk", 64)
    assert made.l0 == pytest.approx(8.0)
    assert_same(load_dictionary(RunDir(copy).layer_folder(MODEL, 1)), before, x_ND)


def test_the_commands_know_every_format():
    assert tuple(FORMATS) == commands.FORMAT_NAMES


@pytest.mark.parametrize(("text", "layers"), [("0", [0]), ("0-3,6", [0, 1, 2, 3, 6]), ("6, 2-2", [2, 6]), (None, None)])
def test_layers_as_they_are_typed(text, layers):
    assert commands.parse_layers(text) == layers
