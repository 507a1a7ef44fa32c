"""Save and load dictionaries in SAELens' layout: cfg.json and sae_weights.safetensors, and beside them a probe.

The probe is a handful of inputs with the features they gave when the dictionary was saved. Loading computes them anew and
refuses the dictionary on a mismatch: scale kept outside the weights, or a class guessed wrongly, shows here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from throughline.dictionaries.dictionary import Dictionary
from throughline.errors import DamagedFileError, InputError
from throughline.run_dir import replacing

SAELENS_VERSION = "6.54.12"  # whose layout this is
CONFIG, WEIGHTS, PROBE = "cfg.json", "sae_weights.safetensors", "probe.safetensors"
TO_SAELENS = {"topk": "topk", "relu": "standard"}
FROM_SAELENS = {theirs: ours for ours, theirs in TO_SAELENS.items()}
TOLERANCE = 1e-4  # relative to the largest expected feature: other machines sum in another order


def save_dictionary(dictionary: Dictionary, folder: Path, probe_ND: Tensor) -> list[str]:
    """Write a dictionary and its probe; returns the file names."""
    weights = {name: getattr(dictionary, name).contiguous().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    probe = {"inputs": probe_ND.contiguous().cpu(), "features": dictionary.encode(probe_ND).contiguous().cpu()}
    for name, tensors in ((WEIGHTS, weights), (PROBE, probe)):
        with replacing(folder / name) as temporary:
            save_file(tensors, temporary)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(_saelens_config(dictionary), indent=1) + "\n")
    return [WEIGHTS, PROBE, CONFIG]


def load_dictionary(folder: Path, device: str = "cpu") -> Dictionary:
    """The dictionary of a folder, checked against its probe.

    Raises InputError if there is none, DamagedFileError if files are damaged or the probe's features come out otherwise.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} holds no dictionary ({CONFIG} and {WEIGHTS}); `throughline train` makes them")
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
        architecture = FROM_SAELENS[config["architecture"]]
        options = {"k": config["k"]} if architecture == "topk" else {}
        dictionary = Dictionary(
            architecture,
            **{name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
            options=options,
            metadata=config["metadata"],
        )
        _check_probe(dictionary, folder)
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise DamagedFileError(f"dictionary in {folder} is damaged: {type(error).__name__} {error}") from error
    return dictionary.to(device)


def _check_probe(dictionary: Dictionary, folder: Path) -> None:
    if not (folder / PROBE).is_file():
        return  # trained elsewhere
    probe = load_file(folder / PROBE)
    features, expected = dictionary.encode(probe["inputs"]), probe["features"]
    off = (features - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    if features.shape != expected.shape or not torch.isfinite(off) or off > TOLERANCE:
        raise DamagedFileError(f"dictionary in {folder} does not give its probe's features (off by {float(off):.2g})")


def _saelens_config(dictionary: Dictionary) -> dict[str, Any]:
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "trained_with": "throughline",
        "training_architecture": TO_SAELENS[dictionary.architecture],
    }
    config = {
        "d_in": dictionary.d_model,
        "d_sae": dictionary.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | dictionary.metadata,
        "architecture": TO_SAELENS[dictionary.architecture],
    }
    if dictionary.architecture == "topk":
        config |= {"k": dictionary.options["k"], "rescale_acts_by_decoder_norm": False}
    return config
