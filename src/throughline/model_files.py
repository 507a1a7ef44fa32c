"""What can be said of a model from its files and its depth alone, without torch: so it is said at once."""

import json
from pathlib import Path
from typing import Literal

from throughline.errors import InputError
from throughline.gguf_models import find_file, locate
from throughline.study import ModelSpec
from throughline.zoo import resolve_path

PICKLED = ("*.bin", "*.pt", "*.pth")
DEPTHS = ("num_hidden_layers", "n_layer")  # what families call it in config.json


def check_files(spec: ModelSpec) -> None:
    """InputError for a model of the zoo or a local folder that is not there or no model, and for layers that it has not.

    Of a hub id nothing is said.
    """
    path = locate(resolve_path(spec.path))
    if not is_local(path):
        return
    folder = Path(path).expanduser()
    if find_file(folder):  # its configuration is within
        return
    check_folder(folder, needs_weights=spec.weights == "trained")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it will be said by who opens it
        return
    depth = next((config[name] for name in DEPTHS if name in config), None) if isinstance(config, dict) else None
    if isinstance(depth, int):
        check_layers(spec.name, spec.layers, depth)


def is_local(path: str) -> bool:
    """True for the name of a folder, False for a hub id."""
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~"))


def check_layers(name: str, wanted: Literal["all"] | list[int], num_layers: int) -> None:
    """InputError for the first wanted layer that a model of this depth has not."""
    for layer in [] if wanted == "all" else wanted:
        if not 0 <= layer < num_layers:
            raise InputError(f"layer {layer} asked of {name}, which has layers 0-{num_layers - 1}")


def check_folder(folder: Path, needs_weights: bool) -> None:
    if not folder.is_dir():
        raise InputError(
            f"model folder {folder} does not exist; give a folder, a hub id such as openai-community/gpt2, or zoo/NAME"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {folder} has no config.json, so it is not a Hugging Face model")
    if not needs_weights or any(folder.glob("*.safetensors")):
        return
    pickled = next((file.name for pattern in PICKLED for file in sorted(folder.glob(pattern))), None)
    if pickled:
        raise InputError(
            f"model folder {folder} has pickled weights only ({pickled}), which can run code when read; "
            f"convert to safetensors"
        )
    raise InputError(
        f"model folder {folder} has config.json but no weights (*.safetensors); "
        "to measure speed and memory without, set weights: random"
    )
