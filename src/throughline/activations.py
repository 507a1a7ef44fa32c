"""Dictionaries of activations that come from anywhere: other language models, vision, audio, biology."""

import os
import re
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from throughline.dictionaries import Dictionary, load_dictionary, save_dictionary
from throughline.errors import InputError, TrainingError
from throughline.run_dir import digest_key
from throughline.study import DictionarySpec, Section, TrainingSpec, folder_name, parse_study
from throughline.training import Progress, train
from throughline.training.checkpoints import Checkpoints
from throughline.training.chunks import chunk_tokens
from throughline.training.memory import USABLE_SHARE, free_bytes, measure_layer
from throughline.training.sources import ArraySource, OnDevice, ShardSource, open_source

PROBE_TOKENS = 16
CHECKPOINT = "checkpoint"
LONGEST_NAME = 200  # characters of a folder's name; file systems take 255 bytes
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
    _require_kinds(dictionary, training, name)
    folder = _require_place(out)
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
    specs = _specs(spec, len(names), first.shape[2])
    _require_varying(first, names)
    _require_memory(specs, checked, first, device)
    folders = _folders(folder, names, resume)
    known = (
        "" if isinstance(source, ArraySource | ShardSource) else "up to "
    )  # the others are not counted before they are read
    say(f"{name}: {known}{tokens:,} activations, layers: {', '.join(names)}; {first.shape[2]} wide")
    checkpoints = None
    if folders:
        key = digest_key(names, first.shape[2], spec.model_dump(), checked.model_dump(exclude=NOT_IN_KEY))
        checkpoints = Checkpoints(folders[0].parent / CHECKPOINT, key, checked.checkpoint_minutes, say)
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
    ended = getattr(source, "ended_after", None)
    if ended is not None:
        say(
            f"{name}: the activations ended after {ended:,} of {tokens:,}; for a learning rate that fits, set tokens to {ended}"
        )
    for layer, layer_name in enumerate(names):
        if layer in trained.failed:
            continue
        dictionaries[layer].metadata.update({"hook_name": layer_name})
        if folders:  # what is returned is what lies there: files of TopK are in other units, which rounds
            save_dictionary(dictionaries[layer], folders[layer], first[layer, :PROBE_TOKENS].to(device))
            dictionaries[layer] = load_dictionary(folders[layer], str(device))
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


def _require_kinds(dictionary: Any, training: Any, name: Any) -> None:
    """InputError unless each argument is of a kind that is described."""
    for what, found, kind in (("dictionary", dictionary, DictionarySpec), ("training", training, TrainingSpec)):
        if not isinstance(found, kind | dict | None):
            raise InputError(
                f"{what} should be a {kind.__name__} or a dict of the settings that a study file has there, found {found!r:.60}"
            )
    if not isinstance(name, str):
        raise InputError(f"name should be a string, found {name!r:.60}")


def _require_place(out: Any) -> Path | None:
    """The folder that is written to, if one is; InputError if it cannot be made."""
    if out is None:
        return None
    if not isinstance(out, str | PathLike) or not str(out).strip():
        raise InputError(f"out should be the name of a folder, found {out!r:.60}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):
        raise InputError(f"dictionaries of activations are saved to local folders only, found out {out}; give a folder")
    folder = Path(out)
    above = next((path for path in folder.absolute().parents if path.exists()), None)
    if above is not None and not above.is_dir():
        raise InputError(f"{folder} cannot be made, since {above} is a file; give another folder")
    if above is not None and not folder.exists() and not os.access(above, os.W_OK):
        raise InputError(f"{folder} cannot be made, since {above} cannot be written to; give another folder")
    return folder


def _specs(spec: DictionarySpec, num_layers: int, d_model: int) -> dict[int, DictionarySpec]:
    """The dictionary of each layer; InputError for overrides of layers that are not there and for what cannot be made."""
    unknown = sorted(set(spec.per_layer) - set(range(num_layers)))
    if unknown:
        raise InputError(
            f"dictionary.per_layer has layer {unknown[0]}, but the activations have layers 0-{num_layers - 1}"
        )
    specs = {layer: spec.at_layer(layer) for layer in range(num_layers)}
    for layer, own in specs.items():
        try:
            own.require_fit(own.width(d_model))
        except ValueError as error:
            raise InputError(f"dictionary of layer {layer}, width {d_model}: {error}") from None
    return specs


def _require_varying(first_LND: Float[Tensor, "L N D"], names: list[str]) -> None:
    """InputError for a layer whose first activations are all the same: there is nothing to explain, and their scale is 0."""
    for x_ND, name in zip(first_LND, names, strict=True):
        if len(x_ND) > 1 and bool((x_ND == x_ND[0]).all()):
            raise InputError(
                f"the activations of {name} do not vary: the first {len(x_ND):,} are all the same, so there is nothing to train on"
            )


def _require_memory(
    specs: dict[int, DictionarySpec], training: TrainingSpec, first_LND: Float[Tensor, "L N D"], device: str
) -> None:
    """InputError if the training needs more memory than there is."""
    L, _, D = first_LND.shape
    tokens = chunk_tokens(D, training.step_tokens, training.tokens * training.epochs, L)
    need = sum(
        measure_layer(D, spec.width(D), tokens, training.step_tokens, by_autograd=False).total
        for spec in specs.values()
    )
    usable = int(USABLE_SHARE * free_bytes(device))
    if need > usable:
        raise InputError(
            f"the training needs {need / 2**30:.1f} GiB or more, found {usable / 2**30:.1f} usable; set dictionary.d_sae or "
            f"training.batch_tokens lower{', or train fewer layers at once' if L > 1 else ''}"
        )


def _layer_names(wanted: Any, num_layers: int) -> list[str]:
    if wanted is not None and not (isinstance(wanted, list | tuple) and all(isinstance(name, str) for name in wanted)):
        raise InputError(f"layers should be a list of names, one for each layer, found {wanted!r:.60}")
    names = list(wanted) if wanted is not None else [f"layer_{layer:02}" for layer in range(num_layers)]
    if len(names) != num_layers:
        raise InputError(f"the activations have {num_layers} layers, found {len(names)} names for them")
    if len({folder_name(name) for name in names}) < num_layers:
        raise InputError(f"layers need different names (letters and digits count), found {', '.join(names)}")
    for name in names:
        if not re.search(r"[A-Za-z0-9]", name) or len(name) > LONGEST_NAME or name.lower() == CHECKPOINT:
            raise InputError(
                f"a layer needs a name with a letter or digit, of {LONGEST_NAME} characters at most and other than {CHECKPOINT}, "
                f"where training keeps its state; found {name!r:.60}"
            )
    return names


def _folders(out: Path | None, names: list[str], resume: bool) -> list[Path]:
    """Where each layer's dictionary will lie; none, if they are not to be saved."""
    if out is None:
        return []
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise InputError(f"{out} is not empty; give another folder, or resume=True to go on or write into it")
    return [out / folder_name(name) for name in names]
