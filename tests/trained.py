"""What takes long to set up and is the same for many tests: made once a session, on disk, by the worker that asks first.

    made_once("report", make)           the folder that `make` filled
    trained(TWO_MODELS, "evaluate")     the run of a study when it has come that far; its study file lies beside it

It is made in a folder that all workers of pytest-xdist share, under a lock, and has its name only once it is complete. No test
works there: each worker has a copy of its own, so that commands in two workers do not meet in one run. A test that changes files
copies them once more. If making it fails, it fails in the other workers too, with the same traceback and without another try.
"""

import fcntl
import hashlib
import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

LENIENT = {"max_l0_share": 1.0, "max_fvu": 1.0, "min_ce_recovered": 0.0, "max_dead": 1.0}
TWO_MODELS: dict[str, Any] = {
    "name": "tiny",
    "models": [{"path": "zoo/pythia", "layers": [0, 1]}, {"path": "zoo/gpt2", "layers": [0, 1]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"architecture": "topk", "d_sae": 64, "k": 8},
    "training": {"tokens": 6000, "batch_tokens": 64},
    "gate": LENIENT,
    "evaluation": {"tokens": 2000, "spliced_tokens": 600, "sample_tokens": 1000},
    "features": {"contexts": 2},
    "transfer": {"min_count": 5},
    "trace": {"prompts": ["What is 15 + 27?"], "features": 3, "answer_tokens": 4},
}
STAGES = ("train", "evaluate", "label", "transfer")  # each goes on from the one before it


def change_study(run: Path, **sections: dict[str, Any]) -> None:
    """Give keys of sections of a run's study other values, here `transfer={"metrics": ["matching"]}`."""
    file = run / "study.yaml"
    tree = yaml.safe_load(file.read_text())
    for name, keys in sections.items():
        tree[name] |= keys
    file.write_text(yaml.safe_dump(tree))


def _do(stage: str, study: Path, run: Path) -> None:
    from throughline import api  # not before the tests are collected: what checks shapes must be there first

    match stage:
        case "train":
            api.train(study, run, device="cpu")
        case "evaluate":
            api.evaluate(run, device="cpu")
        case "label":
            api.features(run, device="cpu")
            api.label(run, device="cpu")
        case "transfer":
            api.transfer(run, device="cpu")
        case "run":
            api.run(study, run, device="cpu")


class MadeOnce(Protocol):
    """This worker's copy of the folder of that name, which `make` fills if no worker has."""

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path: ...


class Trained(Protocol):
    """The run of a study (the tree of its file), not to be changed: up to and with a stage of STAGES, or "run", all at once."""

    def __call__(self, tree: dict[str, Any], stage: str = "train") -> Path: ...


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> MadeOnce:
    """A folder that takes long to fill, by its name."""
    own, copies = tmp_path_factory.getbasetemp(), {}
    shared = _shared(tmp_path_factory, request)

    def copied(name: str, make: Callable[[Path], object]) -> Path:
        if name not in copies:
            copies[name] = shutil.copytree(make_once(shared, name, make), own / "copies" / name)
        return copies[name]

    return copied


@pytest.fixture(scope="session")
def trained(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Trained:
    """The run of a study."""
    shared = _shared(tmp_path_factory, request)

    def name_of(tree: dict[str, Any], stage: str) -> str:
        digest = hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:12]
        return f"{tree['name']}-{digest}-{stage}"

    def make(tree: dict[str, Any], stage: str, folder: Path) -> None:
        if stage in ("train", "run"):
            (folder / "study.yaml").write_text(yaml.safe_dump(tree))
        else:
            before = STAGES[STAGES.index(stage) - 1]
            begun = make_once(shared, name_of(tree, before), lambda folder: make(tree, before, folder))
            shutil.copytree(begun, folder, dirs_exist_ok=True)
        _do(stage, folder / "study.yaml", folder / "run")

    def run_of(tree: dict[str, Any], stage: str = "train") -> Path:
        return made_once(name_of(tree, stage), lambda folder: make(tree, stage, folder)) / "run"

    return run_of


def _shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where all workers of this session look; a worker's own folder lies in it."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if hasattr(request.config, "workerinput") else own) / "made_once"


def make_once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder shared/name, which `make` fills in whichever process comes first; RuntimeError if it failed there."""
    shared.mkdir(exist_ok=True)
    folder, failed = shared / name, shared / f"{name}.failed"
    with _locked(shared / f"{name}.lock"):
        if failed.exists():
            raise RuntimeError(f"{name} could not be made, which another test was told first:\n{failed.read_text()}")
        if not folder.exists():
            unfinished = shared / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a worker that was killed
            unfinished.mkdir()
            try:
                make(unfinished)
            except Exception:
                failed.write_text(traceback.format_exc())
                raise
            unfinished.rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes. The system lets go of the lock of a process that ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing the file would not, while a child process has it open too
