"""Dictionaries: stacked losses equal dense ones, folding changes nothing, and a damaged folder is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oracles
from builders import planted_activations, random_dictionary
from throughline.dictionaries import dictionary, load_dictionary, save_dictionary, untrained_like
from throughline.dictionaries.formats import saelens
from throughline.dictionaries.relu import ReLU
from throughline.dictionaries.stack import Stack
from throughline.dictionaries.topk import TopK
from throughline.errors import DamagedFileError, InputError
from throughline.registry import ARCHITECTURES
from throughline.study import DictionarySpec, TrainingSpec
from throughline.training import train
from throughline.training.sources import ArraySource

L, N, D, F, K = 3, 40, 8, 20, 4
SAELENS_KEYS = set(saelens.CONFIG_KEYS)
SAELENS_TOPK_KEYS = SAELENS_KEYS | {"k", "rescale_acts_by_decoder_norm"}


def random_stack(unit: bool = True) -> tuple[Stack, Tensor]:
    """A stack whose four weights are all random, and activations for it."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((L, F, D), (L, F), (L, F, D), (L, D))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[2] = weights[2] / weights[2].norm(dim=-1, keepdim=True) if unit else weights[2]
    return Stack(*(w.requires_grad_() for w in weights)), torch.randn(L, N, D, generator=generator)


def layer_weights(stack: Stack, layer: int) -> list[Tensor]:
    """The four weights of one layer, as leaves of their own."""
    return [p[layer].detach().clone().requires_grad_() for p in stack.parameters()]


def dense(weights: list[Tensor]) -> list[Tensor]:
    """The same as the oracles take them: columns of the encoder are features."""
    return [weights[0].T, *weights[1:]]


def assert_same_gradients(stack: Stack, layer: int, weights: list[Tensor]) -> None:
    for stacked, alone in zip(stack.parameters(), weights, strict=True):
        assert stacked.grad is not None
        torch.testing.assert_close(stacked.grad[layer], alone.grad, rtol=1e-4, atol=1e-6)


# ---- losses


@pytest.mark.parametrize("num_dead", [(0, 0, 0), (0, 1, 9), (12, 3, 20)])
def test_topk_loss_is_the_dense_one(num_dead):
    stack, x_LND = random_stack(unit=False)
    dead_LF = torch.arange(F)[None] < torch.tensor(num_dead)[:, None]
    losses = TopK.loss(stack, x_LND, dead_LF, progress=0.5, k=K)
    losses.loss_L.sum().backward()
    for layer in range(L):
        weights = layer_weights(stack, layer)
        expected = oracles.topk_loss(x_LND[layer], dense(weights), K, dead_LF[layer])
        expected.backward()
        torch.testing.assert_close(losses.loss_L[layer], expected)
        f_NF = oracles.topk_features(x_LND[layer], *dense(weights)[:2], K)
        torch.testing.assert_close(losses.x_hat_LND[layer], f_NF @ weights[2] + weights[3])
        assert losses.fired_LF[layer].tolist() == (f_NF > 0).sum(0).tolist()
        assert_same_gradients(stack, layer, weights)


@pytest.mark.parametrize("progress", [0.0, 0.04, 0.1, 0.9])
def test_relu_loss_is_the_dense_one(progress):
    stack, x_LND = random_stack(unit=False)
    penalty_L = torch.tensor([0.0, 0.5, 3.0])
    losses = ReLU.loss(stack, x_LND, torch.zeros(L, F, dtype=torch.bool), progress, penalty_L=penalty_L)
    losses.loss_L.sum().backward()
    for layer in range(L):
        weights = layer_weights(stack, layer)
        expected = oracles.relu_loss(x_LND[layer], dense(weights), float(penalty_L[layer]) * min(1, progress / 0.1))
        expected.backward()
        torch.testing.assert_close(losses.loss_L[layer], expected)
        assert_same_gradients(stack, layer, weights)


def test_auxk_touches_dead_features_only():
    stack, x_LND = random_stack()
    dead_LF = torch.zeros(L, F, dtype=torch.bool)
    dead_LF[1, 5:12] = True
    gradients = []
    for dead in (torch.zeros_like(dead_LF), dead_LF):
        TopK.loss(stack, x_LND, dead, progress=0.5, k=K).loss_L.sum().backward()
        gradients.append([p.grad.clone() for p in stack.parameters() if p.grad is not None])
        for parameter in stack.parameters():
            parameter.grad = None
    change = [with_aux - without for without, with_aux in zip(*gradients, strict=True)]
    changed_LF = (change[0].abs().sum(2) > 0) | (change[1] != 0) | (change[2].abs().sum(2) > 0)
    assert changed_LF.any()
    assert not changed_LF[~dead_LF].any()
    assert not change[3].any()  # b_dec is not the dead features' business


# ---- folding


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_folded_dictionary_does_in_raw_units_what_training_saw(architecture):
    stack, x_LND = random_stack(unit=architecture == "topk")
    x_LND = 7 * x_LND + 3  # raw
    mean_LD = x_LND.mean(1)
    options = ARCHITECTURES.load(architecture).options(k=K)
    loss_options = {"k": K, "penalty_L": torch.ones(L)}
    spreads = 1 + torch.rand(L, x_LND.shape[2], generator=torch.Generator().manual_seed(5))
    for layer, scale in enumerate((0.01, 0.4, 30.0)):
        scale_D = scale / spreads[layer]
        scaled_LND = (x_LND - mean_LD[:, None]) * scale_D
        seen = ARCHITECTURES.load(architecture).loss(
            stack, scaled_LND, torch.zeros(L, F, dtype=torch.bool), 0.5, **loss_options
        )
        folded = stack.fold(layer, ARCHITECTURES.load(architecture), mean_LD[layer], scale_D, options, {})
        expected = seen.x_hat_LND[layer].detach() / scale_D + mean_LD[layer]
        error = (folded.reconstruct(x_LND[layer]) - expected).norm() / expected.norm()
        assert error < 1e-5
        torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F))
        assert not any(getattr(folded, name).requires_grad for name in ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_decoder_rows_keep_unit_norm():
    stack, x_LND = random_stack(unit=False)
    stack.normalize_()
    torch.testing.assert_close(stack.W_dec_LFD.norm(dim=-1), torch.ones(L, F))
    TopK.loss(stack, x_LND, torch.zeros(L, F, dtype=torch.bool), 0.5, k=K).loss_L.sum().backward()
    stack.remove_parallel_gradient_()
    assert stack.W_dec_LFD.grad is not None
    assert (stack.W_dec_LFD.grad * stack.W_dec_LFD).sum(-1).abs().max() < 1e-6


# ---- encoding


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("chunk", [2**25, 7 * F])
def test_sparse_codes_equal_dense_ones(monkeypatch, k, chunk):
    monkeypatch.setattr(dictionary, "CHUNK_ELEMENTS", chunk)
    one = random_dictionary(D, F, k)
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    found = one.encode_sparse(x_ND)
    dense_NF = torch.zeros(N, F)
    dense_NF[found.tokens, found.features] = found.values
    torch.testing.assert_close(dense_NF, one.encode(x_ND))
    assert (found.tokens.diff() >= 0).all() and (found.values > 0).all()
    torch.testing.assert_close(one.reconstruct(x_ND), one.decode(one.encode(x_ND)))


def test_no_tokens_have_no_codes():
    one = random_dictionary(D, F, 3)
    assert [len(part) for part in one.encode_sparse(torch.empty(0, D))] == [0, 0, 0]
    assert one.reconstruct(torch.empty(0, D)).shape == (0, D)


def test_topk_encoding_is_the_oracles():
    one = random_dictionary(D, F, K)
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(one.encode(x_ND), oracles.topk_features(x_ND, one.W_enc, one.b_enc, K))


def test_untrained_dictionary_is_random_tied_and_centred():
    one = random_dictionary(D, F, K)
    mean_D = torch.arange(D).float()
    other = untrained_like(one, mean_D, torch.Generator().manual_seed(3))
    torch.testing.assert_close(other.W_enc, other.W_dec.T)
    torch.testing.assert_close(other.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(other.reconstruct(mean_D[None]), mean_D[None], atol=1e-4, rtol=1e-4)
    assert (other.architecture, other.options, other.W_dec.shape) == (one.architecture, one.options, one.W_dec.shape)


# ---- storage


@pytest.fixture
def probe_ND() -> Tensor:
    return torch.randn(16, D, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def saved(tmp_path, probe_ND) -> Path:
    """A folder with a topk dictionary."""
    names = save_dictionary(random_dictionary(D, F, K), tmp_path, probe_ND)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    return tmp_path


@pytest.mark.parametrize("k", [None, K])
def test_loaded_dictionary_is_bit_equal(tmp_path, probe_ND, k):
    one = random_dictionary(D, F, k)
    save_dictionary(one, tmp_path, probe_ND)
    other = load_dictionary(tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.encode(probe_ND), other.encode(probe_ND))
    assert (other.architecture, other.options) == (one.architecture, one.options)
    assert other.metadata["model_name"] == "tiny"


@pytest.mark.parametrize(("k", "keys"), [(None, SAELENS_KEYS), (K, SAELENS_TOPK_KEYS)])
def test_config_is_what_saelens_writes(tmp_path, probe_ND, k, keys):
    save_dictionary(random_dictionary(D, F, k), tmp_path, probe_ND)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert set(config) == keys
    assert config["architecture"] == ("standard" if k is None else "topk")
    assert (config["d_in"], config["d_sae"], config.get("k")) == (D, F, k)
    assert config["apply_b_dec_to_input"] is False and config["normalize_activations"] == "none"
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("damage", ["scaled", "narrower", "not a number", "missing"])
def test_changed_weights_are_refused(saved, name, damage):
    path = saved / "sae_weights.safetensors"
    weights = load_file(path)
    match damage:
        case "scaled":
            weights[name] = weights[name] * 1.5
        case "narrower":
            weights[name] = weights[name][..., :-1].contiguous()
        case "not a number":
            weights[name][0] = torch.nan
        case "missing":
            del weights[name]
    save_file(weights, path)
    assert_damaged(saved)


@pytest.mark.parametrize("key", ["inputs", "features"])
def test_changed_probe_is_refused(saved, key):
    probe = load_file(saved / "probe.safetensors")
    for spoilt in (probe[key] + 1, probe[key][:, :-1].contiguous(), probe[key][:-1].contiguous()):
        save_file(probe | {key: spoilt}, saved / "probe.safetensors")
        assert_damaged(saved)
    save_file({name: t for name, t in probe.items() if name != key}, saved / "probe.safetensors")
    assert_damaged(saved)


@pytest.mark.parametrize(
    "change", [{"k": 2}, {"k": "many"}, {"architecture": "standard"}, {"architecture": "unheard of"}, {"d_sae": 4}]
)
def test_changed_config_is_refused(saved, change):
    config = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps(config | change))
    assert_damaged(saved)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "probe.safetensors"])
def test_truncated_file_is_refused(saved, name):
    content = (saved / name).read_bytes()
    for length in (0, len(content) // 2):
        (saved / name).write_bytes(content[:length])
        assert_damaged(saved)


def assert_damaged(folder: Path) -> None:
    with pytest.raises(DamagedFileError) as caught:
        load_dictionary(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_missing_dictionary_is_the_users_mistake(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match="throughline train") as caught:
        load_dictionary(saved)
    assert str(saved) in str(caught.value)


def test_dictionary_trained_elsewhere_needs_no_probe(saved):
    (saved / "probe.safetensors").unlink()
    assert load_dictionary(saved).d_sae == F


# ---- contract


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_every_architecture(name, tmp_path, probe_ND):
    directions_FD = torch.nn.functional.normalize(torch.randn(12, D, generator=torch.Generator().manual_seed(5)))
    x_LND = torch.stack([planted_activations(8000, directions_FD, 2, seed) for seed in range(2)])
    trained = train(
        ArraySource(x_LND),
        dict.fromkeys((0, 1), DictionarySpec(architecture=name, d_sae=16, k=3, l1=0.3)),
        TrainingSpec(tokens=8000, batch_tokens=100),
        model="planted",
        num_layers=2,
    ).own
    for i, (layer, one) in enumerate(trained.items()):
        assert (one.architecture, one.d_model, one.d_sae) == (ARCHITECTURES.load(name).inference, D, 16)
        f_NF = one.encode(x_LND[i])
        assert f_NF.dtype == torch.float32 and (f_NF >= 0).all() and f_NF.isfinite().all()
        assert 0 < float((f_NF > 0).float().sum(1).mean()) < 16
        torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(16))
        residual = (x_LND[i] - one.reconstruct(x_LND[i])).square().sum()
        assert residual < 0.5 * (x_LND[i] - x_LND[i].mean(0)).square().sum()
        save_dictionary(one, tmp_path / str(layer), probe_ND)
        again = load_dictionary(tmp_path / str(layer))
        torch.testing.assert_close(again.encode(x_LND[i]), f_NF)
        assert again.options == one.options


@pytest.mark.parametrize("k", [4, 200])  # few of 256, and not
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("takes_gradient", [False, True])
def test_a_reconstruction_is_what_all_features_decode_to(k, dtype, tolerance, takes_gradient):
    one = random_dictionary(16, 256)
    weights = {name: getattr(one, name).to(dtype) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    one = replace(one, **weights, architecture="topk", options={"k": k})
    x_ND = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(takes_gradient)
    x_hat_ND = one.reconstruct(x_ND)
    assert torch.allclose(x_hat_ND, one.decode(one.encode(x_ND)), atol=tolerance, rtol=0)
    assert x_hat_ND.requires_grad == takes_gradient and x_hat_ND.dtype == dtype
