"""What of a command can be checked without torch and transformers, whose imports take seconds: before these are imported."""

import re
from collections.abc import Sequence
from pathlib import Path

from throughline.errors import InputError
from throughline.model_files import check_files
from throughline.run_dir import RunDir
from throughline.study import DataSpec, Study
from throughline.text import SUFFIXES, check_prompt, read_documents


def check_study_early(study: Study) -> None:
    """InputError for a model, layer, text or prompt that cannot work, as far as files here tell; `check_study` tells the rest."""
    for spec in study.models:
        check_files(spec)
    for prompt in study.trace.prompts:
        check_prompt(prompt)
    if _is_here(study.data):
        for split in ("train", "heldout"):
            next(read_documents(study.data, split, study.training.seed))


def check_asked_prompt(run: RunDir, prompt: str, models: Sequence[str | None]) -> None:
    """InputError for an empty prompt and for models that the run has not; None stands for its only one."""
    study = run.study()
    for model in models:
        study.model(model)
    check_prompt(prompt)


def check_device_name(device: object) -> None:
    """InputError for a text that is no name of a device."""
    if isinstance(device, str) and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise InputError(f"device {device!r} is unknown; expected cpu, cuda, cuda:0, cuda:1, … or mps")


def _is_here(data: DataSpec) -> bool:
    """True unless the text lies on the hub, or is a link to something there."""
    path = Path(data.path).expanduser()
    return data.path.startswith("zoo/") or path.exists() or path.suffix in SUFFIXES
