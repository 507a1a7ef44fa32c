"""What training measures as it goes on, kept for later: JSON lines always, TensorBoard and Weights & Biases if the study asks.

    RUN/models/<model>/training_00-05.jsonl  a block of layers: step, tokens, by layer loss, l0, fvu, dead
    RUN/tensorboard/<model>/                  the same as scalars `layer_07/fvu`
    RUN/wandb/                                the same, in the service or, with WANDB_MODE=offline, on disk

A run that goes on from a checkpoint repeats the steps after it; the later lines count.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from throughline.errors import InputError
from throughline.records import span
from throughline.run_dir import RunDir
from throughline.study import Study
from throughline.training import Progress

MEASURES = ("loss", "l0", "fvu", "dead")
TENSORBOARD = "tensorboard"  # folder of a run


class Journal(Protocol):
    """One place that training is written to."""

    def write(self, progress: Progress) -> None:
        """Where the training is now."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def check_extras(study: Study) -> None:
    """InputError if the study asks for a journal whose library is not installed."""
    for name, wanted in (("tensorboard", study.logging.tensorboard), ("wandb", study.logging.wandb is not None)):
        if wanted and find_spec(name) is None:
            raise InputError(f"logging.{name} needs a library that is missing: pip install 'throughline[{name}]'")


@contextmanager
def open_journals(
    run: RunDir, study: Study, model: str, layers: Sequence[int], batch_tokens: int
) -> Iterator[Sequence[Journal]]:
    """All journals of the training of a block of layers; closed at the end, whatever happens."""
    with ExitStack() as stack:
        journals: list[Journal] = [JsonLines(run.journal(model, layers), batch_tokens)]
        stack.callback(journals[0].close)
        if study.logging.tensorboard:
            journals.append(TensorBoard(run.root / TENSORBOARD / run.model_folder(model).name))
            stack.callback(journals[-1].close)
        if study.logging.wandb is not None:
            journals.append(WeightsAndBiases(run.root, study, f"{model} {span(layers)}"))
            stack.callback(journals[-1].close)
        yield journals
    run.push_journal(model, layers)
    if study.logging.tensorboard:
        run.storage.push_folder(TENSORBOARD)


class JsonLines:
    """One object a line; a line that a kill cut short is ended first."""

    def __init__(self, path: Path, batch_tokens: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_short = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._path, self._batch_tokens = path, batch_tokens
        self._file = path.open("ab", buffering=0)  # nothing is left to be written when it is closed
        if cut_short:
            self._append("\n")

    def write(self, progress: Progress) -> None:
        """Append a line, readable at once."""
        row = asdict(progress) | {"tokens": progress.step * self._batch_tokens, "at": time.time()}
        self._append(json.dumps(row) + "\n")

    def _append(self, text: str) -> None:
        try:
            self._file.write(text.encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars by step, one event file a training."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # an extra

        self._writer = SummaryWriter(str(folder))

    def write(self, progress: Progress) -> None:
        """Every measure of every layer."""
        for name, value in _scalars(progress).items():
            self._writer.add_scalar(name, value, progress.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project that `logging.wandb` names."""

    def __init__(self, root: Path, study: Study, name: str) -> None:
        import wandb  # an extra

        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=study.logging.wandb,
            name=f"{study.name}/{name}",
            dir=str(root),
            config=study.model_dump(mode="json"),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")  # a step may come twice, which wandb's own count may not

    def write(self, progress: Progress) -> None:
        """Every measure of every layer."""
        self._run.log(_scalars(progress) | {"step": progress.step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _scalars(progress: Progress) -> dict[str, float]:
    rows = {
        f"layer_{layer:02d}/{name}": getattr(progress, name)[i]
        for i, layer in enumerate(progress.layers)
        for name in MEASURES
    }
    return rows | {"tokens_per_second": progress.tokens_per_second}
