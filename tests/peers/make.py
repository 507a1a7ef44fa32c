"""`python make.py DIR`: a dictionary of every kind that each library makes and saves, and what the library says it gives.

DIR/<format>/<case>/ holds the library's files, DIR/<format>/<case>.safetensors the inputs, features and reconstructions.
"""

import json
import sys
import warnings
from pathlib import Path

import libraries
import numpy as np
import torch
from safetensors.torch import save_file

D, F, N, K = 16, 40, 64, 6
SAELENS = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")


def randomise_(sae: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that hide no mistake: no bias is zero, decoder rows have all kinds of norms."""
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        if name in ("threshold", "r_mag"):
            parameter.data = parameter.data.abs() if name == "threshold" else 0.3 * parameter.data


def make_saelens(root: Path, generator: torch.Generator) -> None:
    from sae_lens.registry import get_sae_class, get_sae_training_class

    for name in SAELENS:
        for subtracts in (True, False):
            own = {"k": K} if "topk" in name else {}
            own |= {"matryoshka_widths": [8, 16, F]} if name.startswith("matryoshka") else {}
            kind, config = get_sae_training_class(name)
            sae = kind(config(d_in=D, d_sae=F, apply_b_dec_to_input=subtracts, **own))
            randomise_(sae, generator)
            if hasattr(sae, "topk_threshold"):
                sae.topk_threshold = torch.tensor(1.7, dtype=torch.double)
            sae.save_inference_model(root / f"{name}-{'subtracts' if subtracts else 'plain'}")
    kind, config = get_sae_class("topk")
    sae = kind(config(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True))
    randomise_(sae, generator)
    sae.save_model(root / "topk-ranked")
    make_old_saelens(root, generator)


def make_old_saelens(root: Path, generator: torch.Generator) -> None:
    """Configurations as versions 3 and 5 wrote them; the library reads them by rules of its own."""
    old = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small"}
    configs = {
        "old-3": old | {"hook_point": "blocks.3.hook_resid_post", "normalize_activations": False},
        "old-5": old
        | {
            "sae_lens_training_version": "5.3.0",
            "architecture": "standard",
            "hook_name": "blocks.3.hook_resid_post",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "finetuning_scaling_factor": False,
        },
    }
    for name, config in configs.items():
        shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
        weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        if name == "old-5":  # a TopK dictionary of that age chooses by pre-activation alone
            weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
        (root / name).mkdir(parents=True)
        save_file(weights, root / name / "sae_weights.safetensors")
        (root / name / "cfg.json").write_text(json.dumps(config))


def make_sparsify(root: Path, generator: torch.Generator) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, width in (("h.3", {"num_latents": F}), ("layers.11", {"expansion_factor": 3})):
        sae = SparseCoder(D, SparseCoderConfig(k=K, **width))
        randomise_(sae, generator)
        sae.set_decoder_norm_to_unit_norm()
        sae.save_to_disk(root / name)


def make_gemma_scope(root: Path, generator: torch.Generator) -> None:
    """No library writes this format: Google's files have these keys."""
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["threshold"] = weights["threshold"].abs()
    for folder in (root / "one", root / "two"):
        folder.mkdir(parents=True)
    np.savez(root / "one" / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    save_file({name.lower(): tensor for name, tensor in weights.items()}, root / "two" / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt", "hf_hook_point_in": "model.layers.3.output"}
    (root / "two" / "config.json").write_text(json.dumps(config))


def make_dictionary_learning(root: Path, generator: torch.Generator) -> None:
    dictionary, top_k, batch_top_k, matryoshka = map(
        libraries.dictionary_learning,
        ("dictionary", "trainers.top_k", "trainers.batch_top_k", "trainers.matryoshka_batch_top_k"),
    )
    classes = {
        "AutoEncoder": (dictionary.AutoEncoder, {}),
        "AutoEncoderNew": (dictionary.AutoEncoderNew, {}),
        "GatedAutoEncoder": (dictionary.GatedAutoEncoder, {}),
        "JumpReluAutoEncoder": (dictionary.JumpReluAutoEncoder, {}),
        "AutoEncoderTopK": (top_k.AutoEncoderTopK, {"k": K}),
        "BatchTopKSAE": (batch_top_k.BatchTopKSAE, {"k": K}),
        "MatryoshkaBatchTopKSAE": (
            matryoshka.MatryoshkaBatchTopKSAE,
            {"k": K, "group_sizes": [8, 8, F - 16]},
        ),
    }
    for name, (kind, own) in classes.items():
        sae = kind(D, F, **own)
        randomise_(sae, generator)
        if name == "AutoEncoderTopK":
            sae.decoder.weight.data /= sae.decoder.weight.norm(dim=0)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            sae.threshold = torch.tensor(1.7)
        folder = root / name
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": name,
            "activation_dim": D,
            "dict_size": F,
            "layer": 3,
            "lm_name": "someone/model",
            **own,
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    makers = {
        "saelens": make_saelens,
        "sparsify": make_sparsify,
        "gemma-scope": make_gemma_scope,
        "dictionary-learning": make_dictionary_learning,
    }
    for seed, (name, make) in enumerate(makers.items()):
        generator = torch.Generator().manual_seed(seed)
        make(root / name, generator)
        x_ND = 3 * torch.randn(N, D, generator=generator) + torch.randn(D, generator=generator)
        for folder in sorted(path for path in (root / name).iterdir() if path.is_dir()):
            found = libraries.outputs(libraries.load(name, folder), x_ND)
            save_file(
                {"inputs": x_ND, **{k: t.contiguous() for k, t in found.items()}},
                root / name / f"{folder.name}.safetensors",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
