"""The run folder: the only module that knows where things lie.

Every file is written to a temporary name, synced and renamed. A finished step is noted in a file of its own in `manifest/`, with
the checksums of its files, so that several processes can finish steps at once; a step whose files do not match them is reported
and done again, never silently used. Likewise each job of training notes where it is in a file of its own in `progress/`.

A run at a URL is worked on in a copy, which is then `root` (`mirror`): what is read through a RunDir is fetched first, what is
written through it is sent.
"""

import glob
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from throughline.claims import Claim, hold, take
from throughline.errors import DamagedFileError, InputError
from throughline.files import checksum_of
from throughline.records import (
    Analysis,
    AskedLabels,
    Comparison,
    ComparisonTotals,
    JobState,
    LayerQuality,
    Record,
    RunInfo,
    StepRecord,
    Trace,
    TransferInfo,
    TransferResult,
    complete_labels,
)
from throughline.storage import open_storage
from throughline.study import NOT_YAML, Study, dump_study, folder_name, parse_study

R = TypeVar("R", bound=Record)
TABLES = ("features", "examples", "labels", "coverage", "families", "throughlines")
MANIFEST, PROGRESS = "manifest", "progress"
COMMANDS = {
    "features": "features",
    "examples": "features",
    "labels": "label",
    "coverage": "label",
    "families": "label",
    "throughlines": "report",
}  # that make them
WHEN_DELETED = {  # by folder, of files that no command makes again while they are damaged
    MANIFEST: ", and a run with --resume does that step anew",
    PROGRESS: "; it says only how far a training was",
    "traces": ", and trace or compare its prompt again",
}
TWIN = "seed_"  # how the folder of a twin begins
ROW_GROUP = 8192  # rows of a table that are read together: of one feature only those of its layer, or a part of them
CHECKPOINTS, DRIVER, CLAIM = "checkpoints", "driver.json", "claim.json"
IMPORTED = "imported "  # how the key of a dictionary begins that was not trained here
PARTS = {  # of a run that are made one after another, and may be made again while somebody reads
    "study": "study.yaml",
    "info": "run.json",
    "steps": f"{MANIFEST}/*.json",
    "quality": "models/*/layer_*/quality.json",
    "tables": "models/*/*.parquet",
    "transfer": "transfer/*/*.json",
    "analysis": "analysis.json",
    "journals": "models/*/training_*.jsonl",
    "traces": "traces/*.json",
}
TRACE_VERSION = Trace.model_fields["version"].default
REPORTED_PACKAGES = ("throughline", "torch", "transformers", "tokenizers", "safetensors", "numpy", "polars")


class RunDir:
    """A run's files, by what they are."""

    def __init__(self, root: str | Path):
        """`root` is a folder, or a URL as a string. InputError if nothing that is installed opens such a URL."""
        self.storage = open_storage(root)
        self.root, self.place = self.storage.root, self.storage.place
        self._known_traces: dict[str, tuple[tuple[int, int], Any]] = {}  # by file: when it was read, and what was in it

    # ---- the run itself

    @classmethod
    def open(cls, root: str | Path) -> "RunDir":
        """The run at `root`; InputError if that is not a run folder."""
        run = cls(root)
        if not run.storage.is_there():
            if not run.storage.is_remote and run.root.exists():
                raise InputError(f"{root} is a file; give the folder of a run")
            raise InputError(f"run folder {root} does not exist; `throughline train STUDY --out {root}` makes one")
        if not run.exists("study.yaml") or not run.exists("run.json"):
            raise InputError(f"{root} is not a run folder (it has no study.yaml and run.json)")
        return run

    @classmethod
    def create(cls, root: str | Path, study: Study) -> "RunDir":
        """A new run at `root`, or the existing one if its folder is there; its run.json is made anew if it is damaged."""
        run = cls(root)
        run.root.mkdir(parents=True, exist_ok=True)
        run.write_text("study.yaml", dump_study(study))
        try:
            run.info()
        except DamagedFileError:
            run.write_record("run.json", _describe_run(study.name))
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Work on the run alone; HeldError says which process does so already."""
        self.root.mkdir(parents=True, exist_ok=True)
        with hold(self.storage.slot(DRIVER), f"run {self.place}"):
            yield

    def study(self) -> Study:
        """The resolved study; DamagedFileError if its file is no YAML or empty."""
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it
        try:
            tree = yaml.load(self.read_text("study.yaml"), loader)
        except NOT_YAML as error:
            raise self._damaged("study.yaml", error) from error
        if not isinstance(tree, dict):
            raise self._damaged("study.yaml", f"it should hold keys and values, found {type(tree).__name__}")
        return parse_study(tree, self.storage.name("study.yaml"))

    def info(self) -> RunInfo:
        """Versions, hardware and times."""
        return self.read_record("run.json", RunInfo)

    def update_info(self, **changes: Any) -> None:
        """Replace fields of run.json."""
        self.write_record("run.json", self.info().model_copy(update=changes))

    def exists(self, relative: str) -> bool:
        """True if the run has this file."""
        return self.storage.has(relative)

    def stamp(self, *parts: str) -> tuple[tuple[str, int, int], ...]:
        """Names, times and sizes of the files of PARTS: another if one of them was made anew."""
        found = []
        for name in (name for part in parts for name in self.storage.glob(PARTS[part])):
            self.storage.fetch(name, keep_unsent=True)
            with suppress(FileNotFoundError):  # taken away since the look
                status = (self.root / name).stat()
                found.append((name, status.st_mtime_ns, status.st_size))
        return tuple(found)

    # ---- steps

    def manifest(self) -> dict[str, StepRecord]:
        """Finished steps by name."""
        steps = [self.read_record(name, StepRecord) for name in self.storage.glob(f"{MANIFEST}/*.json")]
        return {step.step: step for step in steps}

    def finished(self, step: str) -> bool:
        """True if a step was finished, from whatever settings."""
        return self.exists(_step_file(step))

    def _step(self, name: str) -> StepRecord | None:
        """One finished step."""
        return self.read_record(_step_file(name), StepRecord) if self.exists(_step_file(name)) else None

    def is_done(self, step: str, key: str, warn: Callable[[str], None] = lambda line: None) -> bool:
        """True if `step` was finished from the same `key` and all its files still match their checksums."""
        record = self._step(step)
        if record is None or record.key != key:
            return False
        damaged = [name for name, checksum in record.files.items() if not self._matches(name, checksum)]
        if damaged:
            if record.key.startswith(IMPORTED):  # training it instead would pass off one dictionary as another
                self._check_file(step, damaged[0])
            warn(f"{self.storage.name(damaged[0])} does not match its checksum; {step} is done again")
        return not damaged

    def _matches(self, relative: str, checksum: str | None) -> bool:
        """True if a file is what was written; of a damaged copy of a URL's, a new one is tried."""
        path = self.root / relative
        self.storage.fetch(relative)
        return checksum_of(path) == checksum or (
            self.storage.fetch(relative, anew=True) and checksum_of(path) == checksum
        )

    def check(self, step: str) -> None:
        """Raise DamagedFileError if a file of a finished step is not what was written."""
        record = self._step(step)
        for name in record.files if record else ():
            self._check_file(step, name)

    def _check_file(self, step: str, relative: str) -> None:
        record = self._step(step)
        if record and not self._matches(relative, record.files.get(relative)):
            imported = record.key.startswith(IMPORTED)
            advice = "import it again with `throughline import`, or delete its folder" if imported else self._redo()
            raise DamagedFileError(f"{self.storage.name(relative)} does not match its checksum; {advice}")

    def _damaged(self, relative: str, error: Exception | str) -> DamagedFileError:
        name = self.storage.name(relative)
        if isinstance(error, FileNotFoundError):
            return DamagedFileError(f"{name} is missing; {self._redo()}")
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        folder = relative.partition("/")[0]
        redo = f"delete it{WHEN_DELETED[folder]}" if folder in WHEN_DELETED else self._redo()
        return DamagedFileError(f"{name} is damaged ({reason}); {redo}")

    def _redo(self) -> str:
        return f"`throughline run STUDY --out {self.place} --resume` makes it again"

    @contextmanager
    def step(self, name: str, key: str) -> Iterator[list[str]]:
        """Do a step: the block appends the relative names of the files it wrote; they are noted when it ends well."""
        with self.steps({name: key}) as files:
            yield files[name]

    @contextmanager
    def steps(self, keys: dict[str, str], check: Callable[[], None] = lambda: None) -> Iterator[dict[str, list[str]]]:
        """Do several steps at once, by name and key; the block appends to the files of each, and takes out what was not done.
        Each has an equal share of the seconds, so that those of all steps add up to what was spent.

        `check` is asked before each is noted, and raises if it may not be.
        """
        started, clock, files = _now(), time.perf_counter(), {name: [] for name in keys}
        yield files
        seconds = round((time.perf_counter() - clock) / max(1, len(files)), 3)
        for name in files:
            check()
            self.storage.push(*files[name])
            checksums = {file: checksum_of(self.root / file) or "" for file in files[name]}
            done = StepRecord(step=name, key=keys[name], started=started, seconds=seconds, files=checksums)
            self.write_record(_step_file(name), done)

    def forget(self, step: str) -> None:
        """Take a step out of the manifest, so that it is done again."""
        self.storage.remove(_step_file(step))

    # ---- places

    def layer_folder(self, model: str, layer: int, twin: int = 0) -> Path:
        """Where a layer's dictionary and its quality.json are, in SAELens' layout, or one of its twins (1, 2, …)."""
        return self.root / self.layer_name(model, layer, twin)

    @staticmethod
    def layer_name(model: str, layer: int, twin: int = 0) -> str:
        """The same, relative to the run."""
        return f"models/{folder_name(model)}/layer_{layer:02d}" + (f"/{TWIN}{twin}" if twin else "")

    def model_folder(self, model: str) -> Path:
        """All that is kept of one model."""
        return self.root / "models" / folder_name(model)

    def checkpoint_folder(self, model: str, layers: Sequence[int]) -> Path:
        """Training state of a block of layers; removed when they are trained."""
        return self.root / self._checkpoint_name(model, layers)

    @staticmethod
    def _checkpoint_name(model: str, layers: Sequence[int]) -> str:
        return f"models/{folder_name(model)}/{CHECKPOINTS}/layers_{layers[0]:02d}-{layers[-1]:02d}"

    def journal(self, model: str, layers: Sequence[int]) -> Path:
        """What the training of a block of layers measured, as JSON lines."""
        return self.root / self._journal_name(model, layers)

    def journals(self, model: str) -> list[Path]:
        """What the training of each block of a model's layers measured."""
        names = self.storage.glob(f"models/{folder_name(model)}/training_*.jsonl")
        for name in names:
            self.storage.fetch(name, keep_unsent=True)  # the one that is being written here is newer
        return [self.root / name for name in names]

    @staticmethod
    def _journal_name(model: str, layers: Sequence[int]) -> str:
        return f"models/{folder_name(model)}/training_{layers[0]:02d}-{layers[-1]:02d}.jsonl"

    def begun(self, model: str) -> list[tuple[int, int]]:
        """First and last layer of each block of a model whose training was begun and not finished."""
        names = self.storage.children(f"models/{folder_name(model)}/{CHECKPOINTS}")
        spans = [name.removeprefix("layers_").split("-") for name in names if name.startswith("layers_")]
        return [(int(first), int(last)) for first, last in spans]

    # ---- blocks of layers in training

    def take(self, model: str, layers: Sequence[int]) -> Claim:
        """A claim on a block of layers that outdoes all earlier ones; its checkpoint and journal are then the latest there are."""
        claim = take(self.storage.slot(f"{self._checkpoint_name(model, layers)}/{CLAIM}"))
        self.storage.fetch_folder(self._checkpoint_name(model, layers))
        self.storage.fetch(self._journal_name(model, layers), keep_unsent=True)
        return claim

    def push_checkpoint(self, model: str, layers: Sequence[int]) -> None:
        """Send the state of a block that was just saved, and its journal."""
        self.push_journal(model, layers)
        self.storage.push_folder(self._checkpoint_name(model, layers), deep=False)

    def push_journal(self, model: str, layers: Sequence[int]) -> None:
        """Send what the training of a block measured."""
        self.storage.push(self._journal_name(model, layers))

    def remove_checkpoint(self, model: str, layers: Sequence[int]) -> None:
        """A block is trained: its state goes, and activations that were kept."""
        self.storage.remove_folder(self._checkpoint_name(model, layers))

    # ---- where jobs of training are

    def jobs(self) -> list[JobState]:
        """Where the jobs of training are that are not done."""
        found = []
        for name in self.storage.glob(f"{PROGRESS}/*.json"):
            try:
                found.append(self.read_record(name, JobState))
            except DamagedFileError:
                if self.exists(name):  # or it is done since the look
                    raise
        return found

    def note_job(self, state: JobState, at_once: bool = True) -> None:
        """Replace what is known of a job; at a URL only if it is to be known at once."""
        if at_once or not self.storage.is_remote:
            self.write_record(_job_file(state.model, state.layers), state)

    def forget_job(self, model: str, layers: Sequence[int]) -> None:
        """A job is done, or about to begin anew."""
        self.storage.remove(_job_file(model, layers))

    def report_folder(self) -> Path:
        """The one-file page and figures/; `push_report` sends them."""
        return self.root / "report"

    def push_report(self) -> None:
        """Send the page and its figures."""
        self.storage.push_folder("report")

    # ---- records

    def write_quality(self, quality: LayerQuality) -> str:
        """Save a layer's quality; returns the relative name."""
        return self.write_record(f"{self.layer_name(quality.model, quality.layer)}/quality.json", quality)

    def quality(self, model: str) -> list[LayerQuality]:
        """The quality of all evaluated layers of a model, by layer."""
        step = self._step(f"evaluate/{model}")
        if step is not None:  # layers that an earlier version of the study had are left out
            return [
                self.read_record(name, LayerQuality) for name in sorted(step.files) if name.endswith("quality.json")
            ]
        names = self.storage.glob(f"{glob.escape(f'models/{folder_name(model)}')}/layer_*/quality.json")
        return [self.read_record(name, LayerQuality) for name in names]

    def trained_layers(self, model: str) -> list[int]:
        """Layers of a model whose dictionaries are finished."""
        return sorted(self._layer_steps(model))

    def layers_with_twin(self, model: str, twin: int) -> list[int]:
        """Those of them that have a twin of this number."""
        return [
            layer
            for layer, record in sorted(self._layer_steps(model).items())
            if any(name.startswith(f"{self.layer_name(model, layer, twin)}/") for name in record.files)
        ]

    def remove_twins(self, model: str, layer: int) -> None:
        """Take away all twins of a layer whose dictionary is about to be another."""
        for name in self.storage.children(self.layer_name(model, layer)):
            if name.startswith(TWIN):
                self.storage.remove_folder(f"{self.layer_name(model, layer)}/{name}")

    def imported(self, model: str) -> dict[int, str]:
        """The keys of those of them that were imported, by layer; one whose folder was deleted is not."""
        steps = self._layer_steps(model)
        return {
            layer: record.key
            for layer, record in steps.items()
            if record.key.startswith(IMPORTED) and self.storage.has_folder(self.layer_name(model, layer))
        }

    def _layer_steps(self, model: str) -> dict[int, StepRecord]:
        prefix = f"train/{model}/"
        names = self.storage.glob(f"{MANIFEST}/{glob.escape(_one_component(prefix))}*.json")
        records = [self.read_record(name, StepRecord) for name in names]
        steps = {record.step.removeprefix(prefix): record for record in records}
        return {int(layer): record for layer, record in steps.items() if layer.isdigit()}

    def write_table(self, model: str, table: str, frame: pl.DataFrame) -> str:
        """Save one of TABLES of a model as Parquet; returns the relative name."""
        assert table in TABLES, table
        relative = f"models/{folder_name(model)}/{table}.parquet"
        with self._replacing(relative) as temporary:
            frame.write_parquet(temporary, row_group_size=ROW_GROUP)
        return relative

    def has_table(self, model: str, table: str) -> bool:
        """True if this table of a model was made."""
        return self.exists(f"models/{folder_name(model)}/{table}.parquet")

    def table(self, model: str, table: str) -> pl.DataFrame:
        """One of TABLES of a model; InputError names the command that makes it."""
        relative = self._table_file(model, table)
        try:
            found = pl.read_parquet(self.root / relative)
            return complete_labels(found) if table == "labels" else found
        except pl.exceptions.PolarsError as error:
            raise self._damaged(relative, error) from error

    def table_bytes(self, model: str, table: str) -> int:
        """How large a table's file is."""
        return (self.root / self._table_file(model, table)).stat().st_size

    def scan_table(self, model: str, table: str) -> pl.LazyFrame:
        """The same, checked now and read as far as is asked, for tables that are larger than what one wants of them."""
        return pl.scan_parquet(self.root / self._table_file(model, table), glob=False)

    def _table_file(self, model: str, table: str) -> str:
        relative, command = f"models/{folder_name(model)}/{table}.parquet", COMMANDS[table]
        if not self.exists(relative):
            raise InputError(f"{model} has no {table} yet; `throughline {command} {self.place}` makes them")
        self._check_file(f"{command}/{model}", relative)
        return relative

    def answers(self, model: str) -> Path:
        """Where a language model's answers about the features of a model are added, a JSON object a line."""
        relative = self._answers_name(model)
        self.storage.fetch(relative, keep_unsent=True)
        return self.root / relative

    def push_answers(self, model: str) -> None:
        """Send them."""
        if (self.root / self._answers_name(model)).is_file():
            self.storage.push(self._answers_name(model))

    @staticmethod
    def _answers_name(model: str) -> str:
        return f"models/{folder_name(model)}/llm_answers.jsonl"

    def write_asked(self, asked: AskedLabels) -> str:
        """Save what asking for a model's labels came to; returns the relative name."""
        return self.write_record(f"models/{folder_name(asked.model)}/llm.json", asked)

    def asked(self, model: str) -> AskedLabels | None:
        """What asking for a model's labels came to; None if nobody was asked."""
        relative = f"models/{folder_name(model)}/llm.json"
        return self.read_record(relative, AskedLabels) if self.exists(relative) else None

    def write_transfer(self, result: TransferResult) -> list[str]:
        """Save a transfer result: arrays and what they mean; returns the relative names."""
        info = result.info
        stem = f"transfer/{folder_name(info.metric)}/{folder_name(info.source)}__{folder_name(info.target)}"
        with self._replacing(f"{stem}.safetensors") as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in result.arrays.items()}, temporary)
        return [f"{stem}.safetensors", self.write_record(f"{stem}.json", info)]

    def transfer(self, metric: str, source: str, target: str) -> TransferResult:
        """One transfer result; InputError names the command that makes it."""
        stem = f"transfer/{folder_name(metric)}/{folder_name(source)}__{folder_name(target)}"
        if not self.exists(f"{stem}.json"):
            raise InputError(
                f"no {metric} from {source} to {target} yet; `throughline transfer {self.place}` computes it"
            )
        info = self.read_record(f"{stem}.json", TransferInfo)
        try:
            return TransferResult(info, load_file(self.transfer_file(info)))
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"{stem}.safetensors", error) from error

    def transfer_file(self, info: TransferInfo) -> Path:
        """The safetensors file of one of them, checked now, for arrays of which one wants a part."""
        relative = (
            f"transfer/{folder_name(info.metric)}/{folder_name(info.source)}__{folder_name(info.target)}.safetensors"
        )
        self._check_file(f"transfer/{info.metric}/{info.source}/{info.target}", relative)
        self.storage.fetch(relative)
        return self.root / relative

    def transfers(self) -> list[TransferInfo]:
        """What transfer results there are."""
        return [self.read_record(name, TransferInfo) for name in self.storage.glob("transfer/*/*.json")]

    def write_trace(self, trace: Trace) -> str:
        """Save a trace under an id made from its content's origin (model and prompt)."""
        return self.write_record(f"traces/{_digest(*trace.origin)}.json", trace)

    def traces(self) -> list[Trace]:
        """All saved traces of this version, in a fixed order."""
        return self._read_traces(self._trace_files(), Trace)

    def _trace_files(self) -> list[str]:
        return [
            name
            for name in self.storage.glob("traces/*.json")
            if not name.startswith(("traces/compare-", "traces/totals-"))
        ]

    def write_comparison(self, comparison: Comparison) -> str:
        """Save a comparison."""
        return self.write_record(f"traces/compare-{_digest(*comparison.models, comparison.prompt)}.json", comparison)

    def comparisons(self) -> list[Comparison]:
        """All saved comparisons of traces of this version, in a fixed order."""
        return self._read_traces(self._comparison_files(), Comparison)

    def _comparison_files(self) -> list[str]:
        return list(self.storage.glob("traces/compare-*.json"))

    def outdated_traces(self) -> list[str]:
        """Files of traces and comparisons that another version of throughline made, which `traces` and `comparisons` leave out."""
        return [name for name in (*self._trace_files(), *self._comparison_files()) if self._is_outdated(name)]

    def _read_traces(self, names: list[str], kind: type[R]) -> list[R]:
        """Those of this version. A file is read once while it stays the same: a run that is served gains traces one by one."""
        found = []
        for name in names:
            self.storage.fetch(name)
            status = (self.root / name).stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if self._known_traces.get(name, (None,))[0] != stamp:
                self._known_traces[name] = (stamp, None if self._is_outdated(name) else self.read_record(name, kind))
            found.append(self._known_traces[name][1])
        return [record for record in found if record is not None]

    def _is_outdated(self, relative: str) -> bool:
        """True if it has a trace of another version than `Trace`; False of what cannot be read, which `read_record` names."""
        try:
            tree = json.loads(self.read_text(relative))
        except ValueError:
            return False
        if not isinstance(tree, dict):
            return False
        if "traces" in tree and "standings" not in tree:
            return True
        traces = tree["traces"].values() if isinstance(tree.get("traces"), dict) else [tree]
        return any(isinstance(t, dict) and t.get("version") != TRACE_VERSION for t in traces)

    def write_totals(self, totals: ComparisonTotals) -> str:
        """Save what a comparison of many prompts found."""
        return self.write_record(f"traces/totals-{_digest(*totals.models, *totals.prompts)}.json", totals)

    def totals(self) -> list[ComparisonTotals]:
        """All saved comparisons of many prompts, in a fixed order."""
        return [self.read_record(name, ComparisonTotals) for name in self.storage.glob("traces/totals-*.json")]

    def analysis(self) -> Analysis | None:
        """The analysis, if there is one."""
        return self.read_record("analysis.json", Analysis) if self.exists("analysis.json") else None

    # ---- files

    def write_record(self, relative: str, record: Record) -> str:
        """Save a JSON record; returns `relative`."""
        return self.write_text(relative, record.model_dump_json(indent=1) + "\n")

    def read_record(self, relative: str, kind: type[R]) -> R:
        """Load a JSON record; DamagedFileError if it is not one, or not there."""
        try:
            return kind.model_validate_json(self.read_text(relative))
        except (ValueError, FileNotFoundError) as error:
            raise self._damaged(relative, error) from error

    def read_json(self, relative: str) -> Any:
        """Plain values of a JSON file; DamagedFileError if it is not one, or not there."""
        try:
            return json.loads(self.read_text(relative))
        except (ValueError, FileNotFoundError) as error:
            raise self._damaged(relative, error) from error

    def write_json(self, relative: str, value: Any) -> str:
        """Save plain values as JSON; returns `relative`."""
        return self.write_text(relative, json.dumps(value, indent=1) + "\n")

    def read_text(self, relative: str) -> str:
        """A text file of the run."""
        self.storage.fetch(relative)
        return (self.root / relative).read_text(encoding="utf-8")

    def write_text(self, relative: str, text: str) -> str:
        """Save a text file; returns `relative`."""
        return self.write_bytes(relative, text.encode())

    def write_bytes(self, relative: str, content: bytes) -> str:
        """Save a file; returns `relative`."""
        with self._replacing(relative) as temporary:
            temporary.write_bytes(content)
        return relative

    @contextmanager
    def _replacing(self, relative: str) -> Iterator[Path]:
        with self.storage.replacing(relative) as temporary:
            yield temporary


def digest_key(*parts: Any) -> str:
    """A short key of plain values: the same values give the same key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _step_file(step: str) -> str:
    """`manifest/train,zoo,pythia,3.json`: one component, whatever the name of a model has in it."""
    return f"{MANIFEST}/{_one_component(step)}.json"


def _job_file(model: str, layers: Sequence[int]) -> str:
    return f"{PROGRESS}/{_one_component(model)},{layers[0]:02d}-{layers[-1]:02d}.json"


def _one_component(name: str) -> str:
    return quote(name, safe="/ ()").replace("/", ",")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe_run(name: str) -> RunInfo:
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware = {"machine": platform.machine(), "cores": os.cpu_count() or 0, "system": platform.system()}
    return RunInfo(name=name, versions=versions, hardware=hardware, commit=_commit(), created=_now())


def _commit() -> str | None:
    """The commit of the source tree throughline runs from, if it is one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
