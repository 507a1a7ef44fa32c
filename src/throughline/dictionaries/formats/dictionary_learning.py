"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt`, a state dict, and `config.json`, whose trainer.dict_class says of what.

    f = act((x - b_dec) @ encoder.weight.T + encoder.bias)        x_hat = f @ decoder.weight.T + b_dec

`JumpReluAutoEncoder` and `AutoEncoderNew` subtract nothing. BatchTopK and Matryoshka dictionaries are read with the one threshold
that they encode with after training, as `jumprelu`. The state dict is read as tensors only; nothing is unpickled.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.formats.files import read_json, read_state_dict, take, write_json
from throughline.dictionaries.formats.folding import (
    biases_after_subtraction,
    fold,
    in_units_of_choice,
    read_sink_norm,
    sink_norm_of,
)
from throughline.errors import DamagedFileError, InputError
from throughline.files import replacing

CONFIG, WEIGHTS = "config.json", "ae.pt"
ARCHITECTURES_HELD = ("relu", "topk", "jumprelu", "gated")


class _Class(NamedTuple):
    """How one of its classes names and uses its weights; `names` are theirs by ours."""

    architecture: str
    names: dict[str, str]
    subtracts_b_dec: bool = True


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_GATED = {
    "W_enc": "encoder.weight",
    "b_enc": "gate_bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "r_mag": "r_mag",
    "b_mag": "mag_bias",
}
CLASSES = {
    "AutoEncoder": _Class("relu", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Class("relu", _LINEAR | {"b_dec": "decoder.bias"}, subtracts_b_dec=False),
    "GatedAutoEncoder": _Class("gated", _GATED),
    "JumpReluAutoEncoder": _Class("jumprelu", _PLAIN, subtracts_b_dec=False),
    "AutoEncoderTopK": _Class("topk", _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": _Class("jumprelu", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", _PLAIN),
}
TRAINED_AS = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}
WRITTEN_AS = {
    "relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}
NOT_WEIGHTS = ("k", "group_sizes")


def holds(folder: Path) -> bool:
    """True if the folder has this format's files."""
    return (folder / WEIGHTS).is_file()


def read(folder: Path) -> Dictionary:
    """The dictionary of a folder in our convention. InputError for what cannot be held, DamagedFileError for faults."""
    path = folder / CONFIG
    trainer = take(read_json(path), "trainer", path)
    name = take(trainer, "dict_class", path) if isinstance(trainer, dict) else None
    if name not in CLASSES:
        raise InputError(f"{path} has trainer.dict_class {name!r}; expected one of {', '.join(CLASSES)}")
    kind, state = CLASSES[name], read_state_dict(folder / WEIGHTS)
    ours = {mine: state[theirs] for mine, theirs in kind.names.items() if theirs in state}
    used = {*kind.names.values(), *NOT_WEIGHTS, *(["threshold"] if name == "AutoEncoderTopK" else [])}
    ours |= {theirs: tensor for theirs, tensor in state.items() if theirs not in used}
    if "encoder.weight" in kind.names.values():  # a Linear's weight has a row per output
        ours |= {mine: ours[mine].T.contiguous() for mine in ("W_enc", "W_dec") if mine in ours}
    if name in TRAINED_AS and "threshold" in ours:
        ours["threshold"] = _one_threshold(ours, folder)
    return fold(
        kind.architecture,
        ours,
        f"the dictionary in {folder}",
        subtracts_b_dec=kind.subtracts_b_dec,
        options={"k": _k(trainer, state, folder)} if kind.architecture == "topk" else {},
        metadata=_metadata(trainer, name, kind),
        sink_norm=read_sink_norm(trainer, path),
    )


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a dictionary; returns the file names."""
    dictionary = in_units_of_choice(dictionary)
    name = WRITTEN_AS[dictionary.architecture]
    kind = CLASSES[name]
    weights = {m: getattr(dictionary, m) for m in ("W_enc", "b_enc", "W_dec", "b_dec")} | dictionary.extra
    if kind.subtracts_b_dec:
        weights |= biases_after_subtraction(dictionary)
    if "encoder.weight" in kind.names.values():
        weights |= {m: weights[m].T for m in ("W_enc", "W_dec")}
    state = {theirs: weights[mine].detach().cpu().contiguous().clone() for mine, theirs in kind.names.items()}
    trainer: dict[str, Any] = {
        "trainer_class": None,
        "dict_class": name,
        "activation_dim": dictionary.d_model,
        "dict_size": dictionary.d_sae,
        "layer": dictionary.metadata.get("layer"),
        "lm_name": dictionary.metadata.get("model_name"),
        "submodule_name": dictionary.metadata.get("hf_hook_name"),
    } | sink_norm_of(dictionary)
    if dictionary.architecture == "topk":
        trainer["k"] = dictionary.options["k"]
        state |= {"k": torch.tensor(trainer["k"], dtype=torch.int), "threshold": torch.tensor(-1.0)}
    with replacing(folder / WEIGHTS) as temporary:
        torch.save(state, temporary)
    buffer = {"ctx_len": dictionary.metadata.get("context_size"), "d_submodule": dictionary.d_model}
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": buffer})
    return [WEIGHTS, CONFIG]


def _one_threshold(weights: dict[str, Tensor], folder: Path) -> Tensor:
    """The single threshold of a dictionary, for each feature."""
    threshold = float(weights["threshold"])
    if threshold < 0:
        raise InputError(
            f"the dictionary in {folder} never got its threshold (it is {threshold:g}); train beyond threshold_start_step"
        )
    return torch.full_like(weights["b_enc"], threshold) if "b_enc" in weights else weights["threshold"]


def _k(trainer: dict[str, Any], state: dict[str, Tensor], folder: Path) -> int:
    found = {int(k) for k in (trainer.get("k"), state.get("k")) if k is not None}
    if len(found) != 1 or min(found) < 1:
        said = " and ".join(map(str, sorted(found))) or "none"
        raise DamagedFileError(f"the dictionary in {folder} should have one k above 0, found {said}")
    return found.pop()


def _metadata(trainer: dict[str, Any], name: str, kind: _Class) -> dict[str, Any]:
    known = {
        "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "layer": trainer.get("layer"),
    }
    said = {key: value for key, value in known.items() if value is not None}
    own = {"relu": "standard"}.get(kind.architecture, kind.architecture)
    return said | {"training_architecture": TRAINED_AS.get(name, own), "trained_with": "dictionary_learning"}
