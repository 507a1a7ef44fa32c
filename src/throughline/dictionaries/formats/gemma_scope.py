"""Gemma Scope: `params.npz` (2024), and `params.safetensors` of Gemma Scope 2, which is read only.

    f = z H(z - threshold), z = x @ W_enc + b_enc        x_hat = f @ W_dec + b_dec        (arXiv 2408.05147)

JumpReLU, in our convention but for the norms of decoder rows. A ReLU dictionary is written as one with thresholds of 0.
"""

from pathlib import Path

import numpy as np
import torch

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.formats.files import read_json, read_npz, read_safetensors
from throughline.dictionaries.formats.folding import fold
from throughline.errors import InputError
from throughline.files import replacing

WEIGHTS, WEIGHTS_2, CONFIG_2 = "params.npz", "params.safetensors", "config.json"
ARCHITECTURES_HELD = ("jumprelu", "relu")
NAMES_2 = {"w_enc": "W_enc", "w_dec": "W_dec"}


def holds(folder: Path) -> bool:
    """True if the folder has this format's files."""
    return (folder / WEIGHTS).is_file() or (folder / WEIGHTS_2).is_file()


def read(folder: Path) -> Dictionary:
    """The dictionary of a folder in our convention. InputError for what cannot be held, DamagedFileError for faults."""
    if (folder / WEIGHTS_2).is_file() and not (folder / WEIGHTS).is_file():
        path, weights = folder / WEIGHTS_2, read_safetensors(folder / WEIGHTS_2)
        _check_config(folder / CONFIG_2)
    else:
        path, weights = folder / WEIGHTS, read_npz(folder / WEIGHTS)
    if "affine_skip_connection" in weights:
        raise InputError(f"{path} is of a transcoder (affine_skip_connection); expected an autoencoder")
    ours = {NAMES_2.get(name, name): tensor for name, tensor in weights.items()}
    metadata = {"training_architecture": "jumprelu", "trained_with": "gemma-scope"}
    return fold("jumprelu", ours, str(path), metadata=metadata)


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a JumpReLU or ReLU dictionary as `params.npz`; returns the file names."""
    d = dictionary
    threshold_F = d.extra.get("threshold", torch.zeros_like(d.b_enc))
    W_enc, b_enc, W_dec, b_dec, threshold = (
        tensor.detach().cpu().numpy() for tensor in (d.W_enc, d.b_enc, d.W_dec, d.b_dec, threshold_F)
    )
    with replacing(folder / WEIGHTS) as temporary, temporary.open("wb") as file:
        np.savez(file, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold)
    return [WEIGHTS]


def _check_config(path: Path) -> None:
    found = read_json(path).get("architecture", "jump_relu") if path.is_file() else "jump_relu"
    if found != "jump_relu":
        raise InputError(f"{path} has architecture {found!r}; expected jump_relu")
