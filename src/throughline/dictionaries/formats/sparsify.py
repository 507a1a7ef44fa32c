"""sparsify 1.3 (EleutherAI): `cfg.json` and `sae.safetensors`, in a folder named after the module (`h.3`, `layers.3`).

    f = the k largest of relu((x - b_dec) @ encoder.weight.T + encoder.bias)        x_hat = f @ W_dec + b_dec

TopK only: multi-TopK's loss asks for other features at other k, transcoders map one place to another, and groupmax chooses
otherwise.
"""

from pathlib import Path
from typing import Any

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.formats.files import read_json, read_safetensors, take, write_json, write_safetensors
from throughline.dictionaries.formats.folding import (
    biases_after_subtraction,
    fold,
    in_units_of_choice,
    read_sink_norm,
    sink_norm_of,
)
from throughline.errors import DamagedFileError, InputError

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ARCHITECTURES_HELD = ("topk",)
REFUSED = ("multi_topk", "skip_connection", "transcode", "signed")
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def holds(folder: Path) -> bool:
    """True if the folder has this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> Dictionary:
    """The dictionary of a folder in our convention. InputError for what cannot be held, DamagedFileError for faults."""
    path = folder / CONFIG
    config, weights = read_json(path), read_safetensors(folder / WEIGHTS)
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise InputError(f"{path} has activation {activation!r}; expected topk")
    for name in REFUSED:
        if config.get(name):
            raise InputError(f"{path} has {name}; expected a plain TopK autoencoder, with {name} off")
    k = take(config, "k", path)
    if not isinstance(k, int) or k < 1:
        raise DamagedFileError(f"{path} should have a whole number above 0 as k, found {k!r}")
    ours = {NAMES.get(name, name): tensor for name, tensor in weights.items()}
    if "W_enc" in ours:
        ours["W_enc"] = ours["W_enc"].T.contiguous()
    metadata: dict[str, Any] = {"training_architecture": "topk", "trained_with": "sparsify", "hook_name": folder.name}
    where = f"the dictionary in {folder}"
    return fold(
        "topk",
        ours,
        where,
        subtracts_b_dec=True,
        options={"k": k},
        metadata=metadata,
        sink_norm=read_sink_norm(config, path),
    )


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a TopK dictionary; returns the file names."""
    dictionary = in_units_of_choice(dictionary)
    tensors = {
        "encoder.weight": dictionary.W_enc.T,
        "encoder.bias": biases_after_subtraction(dictionary)["b_enc"],
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, dictionary.d_sae // dictionary.d_model),
        "normalize_decoder": True,
        "num_latents": dictionary.d_sae,
        "k": dictionary.options["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": dictionary.d_model,
    }
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config | sink_norm_of(dictionary))
    return [WEIGHTS, CONFIG]
