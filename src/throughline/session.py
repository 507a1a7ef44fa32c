"""What one process has open of a run: models, dictionaries, and texts read through them; each opened once.

Three texts serve all measures. `evaluation`: held-out documents, the same for every model. `sample`: the first part of these,
with the residual stream kept. `selection`: documents of the training split, on which labels are chosen.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from throughline.dictionaries import Dictionary, load_dictionary
from throughline.errors import GateError, ThroughlineError
from throughline.models import LanguageModel, open_model
from throughline.records import Document
from throughline.run_dir import RunDir
from throughline.study import ModelSpec, Study
from throughline.text import announce_hub, read_documents
from throughline.tokens import TokenRows, collect_rows, take_documents

if TYPE_CHECKING:
    from throughline.codes import Codes

SELECTION_SEED = 1_000_003  # apart from the seeds of training


class Session:
    """One run, opened for work on one device."""

    def __init__(self, run: RunDir, device: str = "cpu", say: Callable[[str], None] = lambda line: None) -> None:
        self.run, self.device, self.say = run, device, say
        self.device_name = device  # as people know it, where a process sees its device by another number
        self.study: Study = run.study()
        self._models: dict[str, LanguageModel] = {}
        self._dictionaries: dict[tuple[str, int], dict[int, Dictionary]] = {}  # by model and twin
        self._codes: dict[tuple[str, str], list[Codes]] = {}  # by model and text: of its dictionaries, and of its twins
        self._warned = False
        self._seconds: defaultdict[str, float] = defaultdict(float)  # by stage
        self.overlap_seconds: float | None = (
            None  # that models side by side spent at once; None where none went side by side
        )

    # ---- time and threads

    @property
    def num_threads(self) -> int:
        """Threads that one training on a CPU has: the study's, or as many as torch takes."""
        return self.study.executor.cpus or torch.get_num_threads()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of the block as the stage's, unless it fails: then nothing was done."""
        started = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - started

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Count what another process spent."""
        for stage, value in seconds.items():
            self._seconds[stage] += value

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Note by how much the seconds that stages are given in the block exceed those of the clock."""
        started, before = time.perf_counter(), sum(self._seconds.values())
        yield
        spent = sum(self._seconds.values()) - before
        self.overlap_seconds = max(0.0, spent - (time.perf_counter() - started))

    def take_seconds(self) -> dict[str, float]:
        """Seconds by stage since this was last asked."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    @contextmanager
    def noting_seconds(self) -> Iterator[dict[str, float]]:
        """Give the seconds by stage that the block counted, once it has ended, and add them to the run's own, even if it fails.

        Writing the report again is no news.
        """
        spent: dict[str, float] = {}
        try:
            yield spent
        finally:
            spent |= self.take_seconds()
            if spent.keys() - {"report"}:
                with suppress(OSError, ThroughlineError):  # whatever keeps it from being written is said elsewhere
                    known = self.run.info().seconds
                    total = {stage: round(known.get(stage, 0) + value, 3) for stage, value in spent.items()}
                    self.run.update_info(seconds=known | total)

    # ---- what is open

    def let_go(self, name: str) -> None:
        """Give back the memory of a model: itself, its dictionaries and codes."""
        self._models.pop(name, None)
        self._dictionaries = {key: value for key, value in self._dictionaries.items() if key[0] != name}
        self._codes = {key: value for key, value in self._codes.items() if key[0] != name}

    def model(self, name: str) -> LanguageModel:
        """The language model called `name`."""
        if name not in self._models:
            self._models[name] = open_model(self.study.model(name), self.device, self.say, self.study.data.bos)
        return self._models[name]

    def layers(self, spec: ModelSpec) -> list[int]:
        """The layers of a model that the study wants. The model is opened only if the run does not know how deep it is."""
        if spec.layers != "all":
            return sorted(set(spec.layers))
        depth = self.run.info().depths.get(spec.name)
        return self.model(spec.name).layers("all") if depth is None else list(range(depth))

    def context(self, name: str) -> int:
        """Longest piece of text, in tokens: the study's, or the model's if that is less."""
        return min(self.study.data.context, self.model(name).context)

    def dictionaries(self, name: str) -> dict[int, Dictionary]:
        """A model's trained dictionaries by layer, checked against their checksums and probes."""
        return self._load(name, self.layers(self.study.model(name)), twin=0)

    def twins(self, name: str) -> list[dict[int, Dictionary]]:
        """By number of the twin, those of all layers that have one, checked likewise; [] if the study wants none.

        Imported layers have none.
        """
        found = []
        for twin in range(1, 1 + self.study.training.ceiling_seeds):
            there = self.run.layers_with_twin(name, twin)
            if layers := [layer for layer in self.layers(self.study.model(name)) if layer in there]:
                found.append(self._load(name, layers, twin))
        return found

    def _load(self, name: str, layers: list[int], twin: int) -> dict[int, Dictionary]:
        key = (name, twin)
        if key not in self._dictionaries:
            for layer in layers:
                self.run.check(f"train/{name}/{layer}")
            self._dictionaries[key] = {
                layer: load_dictionary(self.run.layer_folder(name, layer, twin), self.device) for layer in layers
            }
        return self._dictionaries[key]

    def rows(self, name: str, documents: list[Document]) -> TokenRows:
        """Documents as a model's tokens."""
        return collect_rows(
            documents, self.model(name).tokenizer, self.context(name), self.study.data.keep_special_tokens
        )

    @cached_property
    def heldout(self) -> list[Document]:
        """Held-out documents: as many as the first model needs for the study's evaluation tokens."""
        return self._take("heldout", self.study.training.seed, self.study.evaluation.tokens)

    @cached_property
    def heldout_sample(self) -> list[Document]:
        """The first of them, for what costs more."""
        return self._first(self.heldout, self.study.evaluation.sample_tokens)

    @cached_property
    def selection_documents(self) -> list[Document]:
        """Documents of the training split."""
        return self._take("train", self.study.training.seed + SELECTION_SEED, self.study.evaluation.sample_tokens)

    def evaluation(self, name: str) -> "Codes":
        """A model's codes of the held-out documents."""
        return self._read_evaluation(name)[0]

    def twin_evaluation(self, name: str) -> "list[Codes]":
        """The same documents as each of `twins` reads them, all in the forward pass that `evaluation` makes."""
        return self._read_evaluation(name)[1:]

    def sample(self, name: str) -> "Codes":
        """A model's codes and residual stream of the held-out sample."""
        return self._read(name, "sample", self.heldout_sample, [self.dictionaries(name)], keep_residuals=True)[0]

    def selection(self, name: str) -> "Codes":
        """A model's codes and residual stream of the selection text."""
        return self._read(name, "selection", self.selection_documents, [self.dictionaries(name)], keep_residuals=True)[
            0
        ]

    def require_gate(self, force: bool) -> None:
        """Refuse to build on dictionaries that failed the quality gate, unless `force`, which the run then remembers."""
        failed = [
            f"{quality.model} layer {quality.layer} ({', '.join(quality.gate)})"
            for spec in self.study.models
            for quality in self.run.quality(spec.name)
            if not quality.passed
        ]
        if not failed:
            return
        if not force:
            shown = "; ".join(failed[:3]) + (f"; and {len(failed) - 3} more" if len(failed) > 3 else "")
            raise GateError(f"quality gate failed: {shown}. Train longer or wider, or go on with --force")
        self.run.update_info(forced=True)
        if not self._warned:
            self.say(f"warning: {len(failed)} dictionaries failed the quality gate; every output says so")
            self._warned = True

    def _take(self, split: str, seed: int, num_tokens: int) -> list[Document]:
        first = self.study.models[0].name
        announce_hub(self.study.data, self.say)
        documents = read_documents(self.study.data, split, seed)
        return take_documents(documents, self.model(first).tokenizer, num_tokens, self.context(first))

    def _first(self, documents: list[Document], num_tokens: int) -> list[Document]:
        first = self.study.models[0].name
        return take_documents(iter(documents), self.model(first).tokenizer, num_tokens, self.context(first))

    def _read_evaluation(self, name: str) -> "list[Codes]":
        """Codes of the held-out documents in the model's dictionaries and, if there are any, in their twins."""
        return self._read(name, "evaluation", self.heldout, [self.dictionaries(name), *self.twins(name)])

    def _read(
        self,
        name: str,
        which: str,
        documents: list[Document],
        sets: list[dict[int, Dictionary]],
        keep_residuals: bool = False,
    ) -> "list[Codes]":
        key = (name, which)
        if key not in self._codes:
            from throughline.codes import encode_text_with  # brings scipy, which a trace does without

            rows = self.rows(name, documents)
            self._codes[key] = encode_text_with(sets, self.model(name), rows, documents, keep_residuals)
        return self._codes[key]
