"""Four tiny trained models that ship with throughline, so that everything works offline: gpt2, phi, pythia, gemma."""

from pathlib import Path

from throughline.errors import InputError
from throughline.registry import unknown

NAMES = ("gpt2", "phi", "pythia", "gemma")
PREFIX = "zoo/"


def resolve_path(path: str) -> str:
    """The folder of `zoo/NAME`; any other model path unchanged. InputError for an unknown NAME."""
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX).rstrip("/")
    if name not in NAMES:
        raise InputError(unknown("zoo model", path, [PREFIX + n for n in NAMES]))
    return str(Path(__file__).parent / name)
