"""Dictionaries of activations that come from anywhere: other language models, vision, audio, biology."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from throughline.dictionaries import Dictionary, save_dictionary
from throughline.errors import InputError, TrainingError
from throughline.run_dir import digest_key
from throughline.study import DictionarySpec, Section, TrainingSpec, folder_name, parse_study
from throughline.training import Progress, train
from throughline.training.checkpoints import Checkpoints
from throughline.training.sources import OnDevice, open_source

PROBE_TOKENS = 16
CHECKPOINT = "checkpoint"
NOT_IN_KEY = {"checkpoint_minutes", "ceiling_seeds"}


def train_on_activations(
    activations: Any,
    out: str | Path | None = None,
    *,
    dictionary: DictionarySpec | dict[str, Any] | None = None,
    training: TrainingSpec | dict[str, Any] | None = None,
    layers: list[str] | None = None,
    name: str = "activations",
    resume: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Dictionary]:
    """One dictionary for each layer, by the layer's name; `throughline.train(activations=…)` describes the arguments."""
    wanted = _given_tokens(training)
    spec, checked = _resolve(dictionary, training, {})
    if checked.ceiling_seeds:
        raise InputError(
            f"training.ceiling_seeds is for studies, whose transfer has a use for them, found {checked.ceiling_seeds}; "
            "leave it out with activations"
        )
    source = open_source(activations, epochs=checked.epochs, num_tokens=wanted)
    tokens = getattr(source, "num_tokens", None) or wanted
    if tokens is None:
        raise InputError(
            "how many activations these are is not known before they are read, and the learning rate has to know; "
            "say it with training={'tokens': …}, those of one epoch"
        )
    spec, checked = _resolve(dictionary, training, {"tokens": tokens})
    first = next(source.batches(), None)
    if first is None or not first.shape[1]:
        raise InputError("there are no activations to train on")
    names = _layer_names(layers, first.shape[0])
    folders = _folders(out, names, resume)
    say(f"{name}: {tokens:,} activations, layers: {', '.join(names)}; {first.shape[2]} wide")
    checkpoints = None
    if folders:
        key = digest_key(names, first.shape[2], spec.model_dump(), checked.model_dump(exclude=NOT_IN_KEY))
        checkpoints = Checkpoints(folders[0].parent / CHECKPOINT, key, checked.checkpoint_minutes, say)
    specs = {layer: spec.at_layer(layer) for layer in range(len(names))}
    trained = train(
        OnDevice(source, device),
        specs,
        checked,
        model=name,
        num_layers=len(names),
        report=report,
        say=say,
        checkpoints=checkpoints,
    )
    dictionaries = trained.own
    for layer, layer_name in enumerate(names):
        if layer in trained.failed:
            continue
        dictionaries[layer].metadata.update({"hook_name": layer_name})
        if folders:
            save_dictionary(dictionaries[layer], folders[layer], first[layer, :PROBE_TOKENS].to(device))
    if folders:
        shutil.rmtree(folders[0].parent / CHECKPOINT, ignore_errors=True)
    if trained.failed:
        raise TrainingError("; ".join(trained.failed.values()))
    return {layer_name: dictionaries[layer] for layer, layer_name in enumerate(names)}


def _resolve(
    dictionary: DictionarySpec | dict[str, Any] | None,
    training: TrainingSpec | dict[str, Any] | None,
    changes: dict[str, Any],
) -> tuple[DictionarySpec, TrainingSpec]:
    """Both, checked as those of a study file are."""
    tree: dict[str, Any] = {"name": "activations", "models": ["activations"], "data": {"path": "activations"}}
    tree["dictionary"], tree["training"] = _plain(dictionary), _plain(training) | changes
    study = parse_study(tree, "train")
    return study.dictionary, study.training


def _plain(section: Section | dict[str, Any] | None) -> dict[str, Any]:
    return section.model_dump() if isinstance(section, Section) else dict(section or {})


def _given_tokens(training: TrainingSpec | dict[str, Any] | None) -> int | None:
    """The tokens of an epoch, if the caller said; a default is not meant for an array of known length."""
    if isinstance(training, TrainingSpec):
        return training.tokens if "tokens" in training.model_fields_set else None
    return (training or {}).get("tokens")


def _layer_names(wanted: list[str] | None, num_layers: int) -> list[str]:
    names = wanted or [f"layer_{layer:02}" for layer in range(num_layers)]
    if len(names) != num_layers:
        raise InputError(f"the activations have {num_layers} layers, found {len(names)} names for them")
    if len({folder_name(name) for name in names}) < num_layers:
        raise InputError(f"layers need different names (letters and digits count), found {', '.join(names)}")
    return names


def _folders(out: str | Path | None, names: list[str], resume: bool) -> list[Path]:
    """Where each layer's dictionary will lie; none, if they are not to be saved."""
    if out is None:
        return []
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise InputError(f"{out} is not empty; give another folder, or resume=True to go on or write into it")
    return [out / folder_name(name) for name in names]
