"""Other projects' dictionaries into a run, and a run's out to them.

Import: read and fold into our convention -> check width and place -> probe and first figures on held-out activations of the model.
Export: refuse what the format cannot hold -> write every layer -> for the hub, a model card.
"""

import math
import re
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from throughline.dictionaries import Dictionary, load_dictionary, save_dictionary
from throughline.dictionaries.formats import read_foreign, require_held, write_foreign
from throughline.errors import InputError
from throughline.harvesting import harvest, tokens_of_a_pass
from throughline.jobs import PROBE_TOKENS, place_of
from throughline.model_card import hook_name, write_model_card
from throughline.pipeline.training import require_layers
from throughline.records import LayerQuality
from throughline.run_dir import IMPORTED, RunDir, digest_key
from throughline.session import Session
from throughline.sinks import find_sink_norm
from throughline.study import folder_name
from throughline.text import read_documents
from throughline.tokens import stream_rows

HELDOUT_TOKENS = 4096  # that an imported dictionary is looked at with: sinks are a few in a thousand


@dataclass(frozen=True)
class ImportedDictionary:
    """What was imported, and its first figures on `num_tokens` held-out tokens; `throughline evaluate` has the real ones."""

    model: str
    layer: int
    format: str
    architecture: str
    d_sae: int
    fvu: float
    l0: float
    num_tokens: int


def import_dictionary(session: Session, path: Path, model: str | None, layer: int, from_: str) -> ImportedDictionary:
    """Put the dictionary at `path` into the run at a layer; it takes the place of one that is there.

    InputError if the run does not want that layer, or if the dictionary has another width or says it belongs elsewhere.
    """
    spec = session.study.model(model)
    require_layers(session, spec)
    wanted = session.layers(spec)
    if layer not in wanted:
        raise InputError(
            f"layer {layer} of {spec.name} is not in this run, which has {', '.join(map(str, wanted))}; "
            "add it to models.layers of the study"
        )
    format_name, dictionary = read_foreign(path, from_)
    d_model = session.model(spec.name).d_model
    if dictionary.d_model != d_model:
        raise InputError(
            f"the dictionary in {path} is for activations of width {dictionary.d_model}, {spec.name} has {d_model}; "
            "give the model it was trained on with --model"
        )
    _check_place(dictionary.metadata, layer, path)
    said = {name: value for name, value in dictionary.metadata.items() if value is not None}
    metadata = said | place_of(session, spec, layer) | {"imported_from": format_name}
    dictionary = replace(dictionary.to(str(session.device)), metadata=metadata)
    x_ND = _heldout_activations(session, spec.name, layer)
    if not math.isfinite(dictionary.sink_norm):
        dictionary = replace(dictionary, sink_norm=find_sink_norm(x_ND))
    run, step = session.run, f"train/{spec.name}/{layer}"
    with run.step(step, IMPORTED + _digest(dictionary)) as files:
        run.remove_twins(spec.name, layer)
        names = save_dictionary(dictionary, run.layer_folder(spec.name, layer), x_ND[:PROBE_TOKENS])
        files += [f"{run.layer_name(spec.name, layer)}/{name}" for name in names]
    run.forget(f"evaluate/{spec.name}")
    run.storage.remove(f"{run.layer_name(spec.name, layer)}/quality.json")
    x_ND = x_ND[~dictionary.is_sink(x_ND)]
    x_hat_ND = dictionary.reconstruct(x_ND)
    return ImportedDictionary(
        spec.name,
        layer,
        format_name,
        dictionary.architecture,
        dictionary.d_sae,
        fvu=float((x_ND - x_hat_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum()),
        l0=len(dictionary.encode_sparse(x_ND).tokens) / len(x_ND),
        num_tokens=len(x_ND),
    )


def export_dictionaries(
    run: RunDir, to: str, out: Path, model: str | None, layers: list[int] | None, hub_layout: bool
) -> list[Path]:
    """Write trained dictionaries of a model (or of all) in another project's format; returns their folders.

    InputError, before anything is written, if one is not trained yet or the format cannot hold it, or if `out` is not empty.
    """
    if hub_layout and to != "saelens":
        raise InputError(f"--hub-layout is SAELens' layout of a repository, found --to {to}; use --to saelens")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; give another with --out")
    study = run.study()
    names = [spec.name for spec in study.models] if model is None else [study.model(model).name]
    found = {name: _load(run, name, layers, to) for name in names}
    qualities = {name: {quality.layer: quality for quality in run.quality(name)} for name in names}
    if hub_layout:
        _require_quality(
            run, {name: [layer for layer in found[name] if layer not in qualities[name]] for name in names}
        )
    written = []
    for name in names:
        root = out if len(names) == 1 else out / folder_name(name)
        for layer, dictionary in found[name].items():
            folder = root / _folder(to, dictionary, layer, qualities[name].get(layer), hub_layout)
            if to == "saelens":
                dictionary = replace(dictionary, metadata=_in_transformer_lens_words(dictionary.metadata, layer))
            write_foreign(dictionary, folder, to)
            written.append(folder)
        if hub_layout:
            card = {layer: (dictionary, qualities[name][layer]) for layer, dictionary in found[name].items()}
            write_model_card(root, study, study.model(name), card)
    return written


# ---- import


def _heldout_activations(session: Session, name: str, layer: int) -> Tensor:
    """The model's activations [N, D] of the first held-out tokens."""
    data, context = session.study.data, session.context(name)
    rows = max(1, tokens_of_a_pass(session.model(name)) // context)
    documents = read_documents(data, "heldout", session.study.training.seed)
    batches = stream_rows(documents, session.model(name).tokenizer, context, rows, data.keep_special_tokens)
    some = islice(batches, max(1, HELDOUT_TOKENS // (rows * context)))
    found = [x_LND[0] for _, x_LND in harvest(session.model(name), some, [layer])]
    if not found:
        raise InputError(f"{data.path} has no held-out tokens, which the probe of a dictionary is made from")
    return torch.cat(found)


def _check_place(metadata: dict[str, Any], layer: int, path: Path) -> None:
    """Refuse a dictionary that says it belongs at another layer, or not on the residual stream after a block."""
    hook = str(metadata.get("hook_name") or "")
    said, place = metadata.get("layer"), re.search(r"blocks\.(\d+)\.(.+)$", hook)
    if place and place[2] not in ("hook_resid_pre", "hook_resid_post"):
        raise InputError(f"the dictionary in {path} is of {hook}; expected one of the residual stream after a block")
    if place:
        said = int(place[1]) - (place[2] == "hook_resid_pre")
    elif module := re.search(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)$", hook):
        said = int(module[1])
    if isinstance(said, int) and said != layer:
        raise InputError(
            f"the dictionary in {path} is of layer {said}{f' ({hook})' if hook else ''}, asked for layer {layer}; "
            f"give --layer {said}"
        )


def _digest(dictionary: Dictionary) -> str:
    tensors = [dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec, *dictionary.extra.values()]
    sums = [sha256(t.detach().cpu().contiguous().numpy().tobytes()).hexdigest() for t in tensors]
    return digest_key(dictionary.architecture, dictionary.options, sums, dictionary.sink_norm)


# ---- export


def _load(run: RunDir, name: str, layers: list[int] | None, to: str) -> dict[int, Dictionary]:
    """The wanted layers' dictionaries, of which the format holds every one."""
    trained = run.trained_layers(name)
    missing = [layer for layer in layers or [] if layer not in trained]
    if missing or not trained:
        have = f"trained are {', '.join(map(str, trained))}" if trained else "none is trained"
        which = f"layer {missing[0]} of {name}" if missing else f"{name}"
        raise InputError(f"{which} has no dictionary in {run.place}; {have}; `throughline train` makes them")
    found = {}
    for layer in trained if layers is None else layers:
        run.check(f"train/{name}/{layer}")
        found[layer] = load_dictionary(run.layer_folder(name, layer))
        require_held(to, found[layer].architecture, f"layer {layer} of {name}")
    return found


def _require_quality(run: RunDir, missing: dict[str, list[int]]) -> None:
    for name, layers in missing.items():
        if layers:
            raise InputError(
                f"layer {layers[0]} of {name} is not evaluated, and the model card has a table of quality; "
                f"`throughline evaluate {run.place}` makes it"
            )


def _folder(to: str, dictionary: Dictionary, layer: int, quality: LayerQuality | None, hub_layout: bool) -> str:
    """Where each project keeps a layer's dictionary."""
    if to == "sparsify":  # the module's path below the base model
        return str(dictionary.metadata.get("hf_hook_name", "")).partition(".")[2] or f"layers.{layer}"
    if to == "gemma-scope":
        F = dictionary.d_sae
        width = f"{F // 1024}k" if F % 1024 == 0 else str(F)
        return f"layer_{layer}/width_{width}/" + (f"average_l0_{quality.l0:.0f}" if quality else "canonical")
    if to == "dictionary-learning":
        return f"resid_post_layer_{layer}/trainer_0"
    return hook_name(layer) if hub_layout else f"layer_{layer:02d}"


def _in_transformer_lens_words(metadata: dict[str, Any], layer: int) -> dict[str, Any]:
    """The hook's name as SAELens' users write it, for models that TransformerLens can find by their hub id."""
    model = str(metadata.get("model_name", ""))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "zoo/")):
        return metadata | {"hook_name": hook_name(layer), "model_class_name": "HookedTransformer"}
    return metadata
