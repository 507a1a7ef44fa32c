"""Save and load dictionaries in SAELens' layout: cfg.json and sae_weights.safetensors, and beside them a probe.

The probe is a handful of inputs with the features and reconstructions they gave when the dictionary was saved. Loading
computes both anew and refuses the dictionary on a mismatch: scale kept outside the weights, or a class guessed wrongly, shows
here.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from throughline.dictionaries.dictionary import Dictionary
from throughline.errors import DamagedFileError, InputError
from throughline.registry import ARCHITECTURES
from throughline.run_dir import replacing

SAELENS_VERSION = "6.54.12"  # whose layout this is
CONFIG, WEIGHTS, PROBE = "cfg.json", "sae_weights.safetensors", "probe.safetensors"
TO_SAELENS = {"topk": "topk", "relu": "standard"}
FROM_SAELENS = {theirs: ours for ours, theirs in TO_SAELENS.items()}
# What a cfg.json holds beside an architecture's own options.
NOT_OPTIONS = [
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
    "architecture",
    "rescale_acts_by_decoder_norm",
]
TOLERANCE = 1e-4  # relative to the largest expected number: other machines sum in another order


def save_dictionary(dictionary: Dictionary, folder: Path, probe_ND: Tensor) -> list[str]:
    """Write a dictionary and its probe; returns the file names."""
    weights = {name: getattr(dictionary, name).contiguous().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for name, tensors in ((WEIGHTS, weights), (PROBE, _probe(dictionary, probe_ND))):
        with replacing(folder / name) as temporary:
            save_file(tensors, temporary)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(_saelens_config(dictionary), indent=1) + "\n")
    return [WEIGHTS, PROBE, CONFIG]


def load_dictionary(folder: Path, device: str = "cpu") -> Dictionary:
    """The dictionary of a folder, checked against its probe.

    Raises InputError if there is none, DamagedFileError if files are damaged or the probe comes out otherwise.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} holds no dictionary ({CONFIG} and {WEIGHTS}); `throughline train` makes them")
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
        architecture = FROM_SAELENS.get(config["architecture"], config["architecture"])
        if architecture not in ARCHITECTURES.names():
            raise DamagedFileError(f"dictionary in {folder} has an unknown architecture, {architecture!r}")
        options = {name: value for name, value in config.items() if name not in NOT_OPTIONS}
        dictionary = Dictionary(
            architecture,
            **{name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
            options=options,
            metadata=config["metadata"],
        )
        _check_shapes(dictionary, config, folder)
        _check_probe(dictionary, folder)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedFileError(f"dictionary in {folder} is damaged: {type(error).__name__} {error}") from error
    return dictionary.to(device)


def _probe(dictionary: Dictionary, inputs_ND: Tensor) -> dict[str, Tensor]:
    features_NF = dictionary.encode(inputs_ND)
    tensors = {"inputs": inputs_ND, "features": features_NF, "reconstructions": dictionary.decode(features_NF)}
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _check_shapes(dictionary: Dictionary, config: dict[str, Any], folder: Path) -> None:
    D, F = config["d_in"], config["d_sae"]
    for name, shape in {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}.items():
        found = tuple(getattr(dictionary, name).shape)
        if found != shape:
            raise DamagedFileError(f"dictionary in {folder} should have {name} of shape {shape}, found {found}")


def _check_probe(dictionary: Dictionary, folder: Path) -> None:
    if not (folder / PROBE).is_file():
        return  # trained elsewhere
    probe = load_file(folder / PROBE)
    if probe["inputs"].shape[1:] != (dictionary.d_model,):
        raise DamagedFileError(f"the probe of the dictionary in {folder} has inputs of another width")
    for name, found in _probe(dictionary, probe["inputs"]).items():
        expected = probe[name]
        if found.shape != expected.shape:
            raise DamagedFileError(f"the probe of the dictionary in {folder} has {name} of another shape")
        off = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        if not off <= TOLERANCE:  # nor if it is not a number
            raise DamagedFileError(f"dictionary in {folder} does not give its probe's {name} (off by {float(off):.2g})")


def _saelens_config(dictionary: Dictionary) -> dict[str, Any]:
    name = TO_SAELENS.get(dictionary.architecture, dictionary.architecture)
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "trained_with": "throughline",
        "training_architecture": name,
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
        "architecture": name,
    }
    if dictionary.architecture == "topk":
        config["rescale_acts_by_decoder_norm"] = False
    return config | dictionary.options
