"""Reading and writing files of foreign formats: every fault in one line, nothing unpickled."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from throughline.errors import DamagedFileError, InputError
from throughline.files import replacing

T = TypeVar("T")
HOLDS_MORE = "holds more than tensors, or is damaged; nothing is unpickled here, since that can run code"


def read_json(path: Path) -> dict[str, Any]:
    """Keys and values of a JSON file. InputError if it is not there, DamagedFileError if it is something else."""
    value = _read(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged: expected keys and values, found {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file."""
    return _read(path, lambda: load_file(path))


def read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of an npz file; object arrays, which are pickled, are refused."""

    def load() -> dict[str, Tensor]:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, NpzFile):
                raise InputError(f"{path} holds one array; expected an archive of several, as numpy.savez writes it")
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}

    return _read(path, load)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors saved with torch.save; anything else in the file, which could run code, is refused."""
    found = _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} should hold named tensors and nothing else; save the state_dict() of the dictionary")
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write keys and values, in whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, in whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def take(values: dict[str, Any], name: str, path: Path) -> Any:
    """`values[name]`; InputError names the file and what is missing."""
    if name not in values:
        raise InputError(f"{path} has no {name}; found {', '.join(sorted(values)) or 'nothing'}")
    return values[name]


def _read(path: Path, load: Callable[[], T]) -> T:
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected {path.name} beside the other files of the dictionary")
    try:
        return load()
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} {HOLDS_MORE}") from error
    except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, KeyError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "").partition(". ")[0] or type(error).__name__
        if "pickle" in reason:  # numpy's word for an array of objects, and for whatever it does not know
            raise InputError(f"{path} {HOLDS_MORE}") from error
        raise DamagedFileError(f"{path} is damaged: {reason}") from error
