"""SAELens 6: `cfg.json` and `sae_weights.safetensors`; the layout of our own runs too.

    f = act((x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc)        x_hat = f @ W_dec + b_dec

Architectures `standard` (our relu), `topk`, `jumprelu` and `gated` (whose `b_gate` is our b_enc); dictionaries trained as
`batchtopk` or `matryoshka_batchtopk` are saved as `jumprelu` there as here. Files of SAELens before 6.0 are read by its own
rules for them.
"""

from pathlib import Path
from typing import Any

import torch

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.formats.files import read_json, read_safetensors, take, write_json, write_safetensors
from throughline.dictionaries.formats.folding import (
    EXTRA,
    MATRICES,
    SINK_NORM,
    fold,
    in_units_of_choice,
    read_sink_norm,
    sink_norm_of,
)
from throughline.errors import DamagedFileError, InputError
from throughline.registry import ARCHITECTURES

VERSION = "6.54.12"  # whose layout is written
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
ARCHITECTURES_HELD = tuple(EXTRA)
TO_SAELENS = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
FROM_SAELENS = {theirs: ours for ours, theirs in TO_SAELENS.items()}
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
TRAINED_AS = {"relu": "standard", "batch_topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
# What every cfg.json holds; `metadata` says where the dictionary belongs. The rest are an architecture's options.
CONFIG_KEYS = (
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
)
RANKED = "rescale_acts_by_decoder_norm"
OLD_METADATA = ("model_name", "hook_name", "hook_head_index", "context_size", "dataset_path", "prepend_bos")


def holds(folder: Path) -> bool:
    """True if the folder has this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> Dictionary:
    """The dictionary of a folder in our convention. InputError for what cannot be folded, DamagedFileError for faults."""
    path = folder / CONFIG
    config = _current(read_json(path), path)
    weights = read_safetensors(folder / WEIGHTS)
    architecture = _architecture(config, path)
    _refuse(config, path)
    if architecture == "gated" and "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    for name in ("scaling_factor", "finetuning_scaling_factor"):  # SAELens 3 to 5 saved one of these, mostly of ones
        factor = weights.pop(name, None)
        if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
            raise InputError(f"{folder / WEIGHTS} has a {name} that is not 1; load and save it with SAELens first")
    said = config.get("metadata", {})
    dictionary = fold(
        architecture,
        weights,
        f"the dictionary in {folder}",
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        scale=_input_scale(config, folder),
        ranked_by_decoder_norm=bool(config.get(RANKED, False)),
        options=_options(config, architecture, path),
        metadata={"trained_with": "saelens"}
        | {k: v for k, v in said.items() if k not in ("sae_lens_version", SINK_NORM)},
        sink_norm=read_sink_norm(said, path),
    )
    for name, found in (("d_in", dictionary.d_model), ("d_sae", dictionary.d_sae)):
        if config.get(name, found) != found:
            raise DamagedFileError(f"{path} says {name} {config[name]}, but the weights in {folder} have {found}")
    return dictionary


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a dictionary; returns the file names."""
    dictionary = in_units_of_choice(dictionary)
    weights = {name: getattr(dictionary, name) for name in MATRICES} | dictionary.extra
    if dictionary.architecture == "gated":
        weights["b_gate"] = weights.pop("b_enc")
    write_safetensors(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, config_of(dictionary))
    return [WEIGHTS, CONFIG]


def config_of(dictionary: Dictionary) -> dict[str, Any]:
    """What cfg.json holds."""
    name = TO_SAELENS.get(dictionary.architecture, dictionary.architecture)
    trained_as = dictionary.metadata.get("training_architecture", name)
    metadata = {"sae_lens_training_version": None, "trained_with": "throughline"} | dictionary.metadata
    metadata["training_architecture"] = TRAINED_AS.get(trained_as, trained_as)
    metadata |= sink_norm_of(dictionary)
    config = {
        "d_in": dictionary.d_model,
        "d_sae": dictionary.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | {"sae_lens_version": VERSION},  # the layout's, not the origin's
        "architecture": name,
    }
    if dictionary.architecture == "topk":
        config[RANKED] = False
    return config | dictionary.options


def _current(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A configuration in the form of SAELens 6; older ones by the rules SAELens has for them."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DamagedFileError(f"{path} should hold keys and values in metadata, found {type(metadata).__name__}")
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    major = version.partition(".")[0]
    if major.isdigit() and int(major) >= 6:
        return config
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation not in ("relu", "topk"):
        raise InputError(f"{path} has activation_fn {activation!r}; expected relu or topk")
    normalize = config.get("normalize_activations")
    hook = config.get("hook_name", config.get("hook_point", ""))
    new = config | {
        "architecture": "topk" if activation == "topk" else config.get("architecture", "standard"),
        "normalize_activations": "expected_average_only_in" if normalize is True else normalize or "none",
        "reshape_activations": config.get("reshape_activations", "hook_z" if "hook_z" in str(hook) else "none"),
        "metadata": {k: config[k] for k in OLD_METADATA if k in config} | {"hook_name": hook} | metadata,
    }
    if activation == "topk":
        new["k"] = (config.get("activation_fn_kwargs") or {}).get("k", config.get("k"))
    return new


def _architecture(config: dict[str, Any], path: Path) -> str:
    theirs = take(config, "architecture", path)
    if theirs in TRAINING_ONLY:
        raise InputError(
            f"{path} is of a {theirs} in training; write it with save_inference_model, which saves jumprelu"
        )
    ours = FROM_SAELENS.get(theirs, theirs)
    if ours not in ARCHITECTURES.names():
        known = ", ".join(FROM_SAELENS)
        raise InputError(f"{path} has an unknown architecture, {theirs!r}; expected one of {known}")
    return ours


def _refuse(config: dict[str, Any], path: Path) -> None:
    """What changes the input in a way that no weights can hold."""
    normalize = config.get("normalize_activations") or "none"
    if normalize not in ("none", "expected_average_only_in"):
        raise InputError(
            f"{path} has normalize_activations {normalize!r}, which depends on each input and cannot be folded into weights; "
            "expected none or expected_average_only_in"
        )
    reshape = config.get("reshape_activations") or "none"
    if reshape != "none":
        raise InputError(f"{path} has reshape_activations {reshape!r}; expected none: a residual stream has no heads")


def _input_scale(config: dict[str, Any], folder: Path) -> float:
    """The scale that training applied to activations, if it is not in the weights yet."""
    if config.get("normalize_activations") != "expected_average_only_in":
        return 1.0
    if not (folder / SCALER).is_file():
        raise InputError(
            f"{folder / CONFIG} has normalize_activations 'expected_average_only_in', and the scale is not there ({SCALER}); "
            "fold it in with fold_activation_norm_scaling_factor of SAELens and save again"
        )
    scale = read_json(folder / SCALER).get("scaling_factor")
    if not isinstance(scale, int | float) or not scale > 0:
        raise DamagedFileError(f"{folder / SCALER} should have a scaling_factor above 0, found {scale!r}")
    return float(scale)


def _options(config: dict[str, Any], architecture: str, path: Path) -> dict[str, Any]:
    if architecture == "topk":
        k = take(config, "k", path)
        if not isinstance(k, int) or k < 1:
            raise DamagedFileError(f"{path} should have a whole number above 0 as k, found {k!r}")
    if architecture in EXTRA:
        return {"k": config["k"]} if architecture == "topk" else {}
    return {name: value for name, value in config.items() if name not in (*CONFIG_KEYS, RANKED)}
