"""Other projects' files: each format is a module that says what it `holds`, reads it and writes it.

A folder's format is told by the files in it. Nothing is guessed: what a format or our convention cannot hold is refused in one
line.
"""

from pathlib import Path
from types import ModuleType

from throughline.dictionaries.dictionary import Dictionary
from throughline.dictionaries.formats import dictionary_learning, gemma_scope, saelens, sparsify
from throughline.errors import InputError
from throughline.registry import unknown

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "gemma-scope": gemma_scope,
    "dictionary-learning": dictionary_learning,
}
EXPECTED = (
    "saelens: cfg.json and sae_weights.safetensors, sparsify: cfg.json and sae.safetensors, "
    "gemma-scope: params.npz or params.safetensors, dictionary-learning: ae.pt and config.json"
)


def read_foreign(path: Path, format_name: str = "auto") -> tuple[str, Dictionary]:
    """Format and dictionary of a folder (or of a file in it), in our convention.

    InputError for what is not there, not known or cannot be held; DamagedFileError for files that are not what they should be.
    """
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise InputError(f"{path} does not exist; expected the folder of one dictionary")
    if format_name == "auto":
        format_name = _recognise(folder)
    return format_name, _format(format_name).read(folder)


def require_held(format_name: str, architecture: str, what: str) -> None:
    """InputError if a format has no such architecture; `what` is the dictionary, as the error names it."""
    held = _format(format_name).ARCHITECTURES_HELD
    if architecture not in held:
        formats = ", ".join(name for name, module in FORMATS.items() if architecture in module.ARCHITECTURES_HELD)
        raise InputError(
            f"{what} is a {architecture} dictionary and {format_name} holds {' and '.join(held)} only"
            + (f"; {formats} can hold it" if formats else "")
        )


def write_foreign(dictionary: Dictionary, folder: Path, format_name: str) -> list[str]:
    """Write a dictionary into a folder in a format that holds it (see `require_held`); returns the file names."""
    return _format(format_name).write(dictionary, folder)


def _format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise InputError(unknown("format", name, list(FORMATS)))
    return FORMATS[name]


def _recognise(folder: Path) -> str:
    fitting = [name for name, module in FORMATS.items() if module.holds(folder)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"{folder} fits {' and '.join(fitting)}; say which with --from")
    inside = [f.name for f in sorted(folder.iterdir()) if f.is_dir() and any(m.holds(f) for m in FORMATS.values())]
    if inside:
        raise InputError(
            f"{folder} holds {len(inside)} dictionaries; give the folder of one, such as {folder / inside[0]}"
        )
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:6]) or "nothing"
    raise InputError(f"{folder} holds no dictionary that is known ({EXPECTED}); found {found}")
