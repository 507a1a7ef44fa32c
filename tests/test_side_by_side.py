"""Models side by side in processes of their own: the same files as one after another, whatever is killed on the way."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from commands import start
from throughline import api
from throughline.errors import GateError, InputError, TrainingError
from throughline.executors import processes
from throughline.executors.processes import SideBySide, divide_cores
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import parse_study
from trained import TWO_MODELS

pytestmark = [
    pytest.mark.xdist_group("side_by_side"),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found by what Linux tells of them"),
]
LONG = {"tokens": 80_000, "batch_tokens": 64, "checkpoint_minutes": 0}  # seconds rather than milliseconds of training
MADE = ("*.safetensors", "*.parquet", "quality.json")


def study_of(**changes: Any) -> dict[str, Any]:
    """Two models, of which two are worked on at once; without prompts, since nothing here looks at traces."""
    tree = TWO_MODELS | {"executor": {"cpus": 2, "processes": 2}, "trace": {"prompts": []}}
    return tree | changes


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_of(**changes)))
    return path


def hashes_of(run: Path) -> dict[str, str]:
    """Every file of a model's dictionaries, quality and tables, by name; throughlines are of all models together."""
    files = {file for pattern in MADE for file in (run / "models").rglob(pattern) if "checkpoints" not in file.parts}
    files = {file for file in files if file.name != "throughlines.parquet"}
    return {str(file.relative_to(run)): sha256(file.read_bytes()).hexdigest() for file in files}


def weights_of(hashes: dict[str, str]) -> dict[str, str]:
    """Those of dictionaries and probes."""
    return {name: digest for name, digest in hashes.items() if name.endswith(".safetensors")}


def children(pid: int | str = "self") -> list[int]:
    """The model processes that a process has started."""
    return [child for child in _children(pid) if b"model_process" in _read(Path(f"/proc/{child}/cmdline"))]


def _children(pid: int | str) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in _read(task / "children").split()]


def _read(path: Path) -> bytes:
    """What lies there; nothing if the process, or the thread, is gone."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory) -> dict[str, str]:
    """What the study gives in this process alone, one stage of all models after another."""
    folder = tmp_path_factory.mktemp("alone")
    run = api.train(write(folder, executor={"cpus": 1}, training=LONG), folder / "run", device="cpu").root
    for stage in (api.evaluate, api.features, api.label):
        stage(run, device="cpu")
    return hashes_of(folder / "run")


@pytest.mark.slow("processes")
def test_the_same_files_as_one_after_another(one_after_another, tmp_path):
    said: list[str] = []
    finished = api.run(write(tmp_path, training=LONG), tmp_path / "run", device="cpu", say=said.append)
    assert hashes_of(tmp_path / "run") == one_after_another
    assert len(one_after_another) > 12
    assert {"evaluating zoo/pythia", "labelling the features of zoo/gpt2"} <= set(said)
    stages = {"train", "evaluate", "features", "label", "transfer", "report"}
    assert set(finished.seconds) == stages and min(finished.seconds.values()) > 0
    assert finished.overlap_seconds is not None
    assert sum(finished.seconds.values()) - finished.overlap_seconds <= finished.total_seconds
    noted = RunDir.open(tmp_path / "run").info().seconds
    assert noted == pytest.approx(finished.seconds, abs=1e-3)
    api.run(tmp_path / "study.yaml", tmp_path / "run", device="cpu", resume=True)  # finds all of it done
    assert RunDir.open(tmp_path / "run").info().seconds == noted


def test_model_processes_that_are_killed_are_made_up_for(one_after_another, tmp_path):
    said: list[str] = []

    def kill() -> None:
        wait_for(lambda: list((tmp_path / "run").glob("models/*/checkpoints/*/state.safetensors")))
        for child in children():
            os.kill(child, signal.SIGKILL)

    killing = Thread(target=kill)
    killing.start()
    api.train(write(tmp_path, training=LONG), tmp_path / "run", device="cpu", say=said.append)
    killing.join()
    assert [line for line in said if "its process was ended (out of memory, or killed)" in line]
    assert [line for line in said if "going on from step" in line]
    assert hashes_of(tmp_path / "run") == weights_of(one_after_another)


def test_a_model_that_kills_its_processes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MODEL_PROCESS", "throughline.no_such_module")
    with pytest.raises(TrainingError, match=r"zoo/gpt2: its process was ended .* 3 times; .*; zoo/pythia: its process"):
        api.train(write(tmp_path), tmp_path / "run", device="cpu")


@pytest.mark.slow("processes")
def test_model_processes_end_with_whoever_started_them(one_after_another, tmp_path):
    study = write(tmp_path, training=LONG)
    with start("train", study, "--out", tmp_path / "run", "--device", "cpu", "--quiet") as driver:
        working = wait_for(lambda: found if len(found := children(driver.pid)) == 2 else None)
        wait_for(lambda: list((tmp_path / "run" / "progress").glob("*.json")))
        driver.kill()
        driver.wait(timeout=30)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in working), seconds=10)
    api.train(study, tmp_path / "run", device="cpu", resume=True)
    assert hashes_of(tmp_path / "run") == weights_of(one_after_another)


@pytest.mark.slow("processes")
def test_a_model_that_fails_the_gate_goes_no_further(tmp_path):
    strict = TWO_MODELS["gate"] | {"max_fvu": 1e-9}
    with pytest.raises(GateError, match=r"quality gate failed: .*zoo/pythia layer 0"):
        api.run(write(tmp_path, gate=strict), tmp_path / "run", device="cpu")
    steps = RunDir.open(tmp_path / "run").manifest()
    assert {"evaluate/zoo/pythia", "evaluate/zoo/gpt2"} <= steps.keys()
    assert not any(step.startswith(("features/", "label/")) for step in steps)
    api.run(tmp_path / "study.yaml", tmp_path / "run", device="cpu", resume=True, force=True)
    assert RunDir.open(tmp_path / "run").info().forced


@pytest.mark.slow("processes")
def test_every_model_that_fails_is_named(tmp_path):
    wild = {"tokens": 6000, "batch_tokens": 64, "lr": 1e30}
    with pytest.raises(TrainingError, match=r"zoo/gpt2.*the loss is .*; zoo/pythia.*the loss is "):
        api.train(write(tmp_path, training=wild), tmp_path / "run", device="cpu")
    assert all(state.failed for state in RunDir.open(tmp_path / "run").jobs())
    assert not children()


@pytest.mark.slow("processes")
def test_an_interruption_ends_all_of_them(tmp_path):
    """Ctrl-C, as a signal of the main thread of a process with two model processes."""
    with start("run", write(tmp_path, training=LONG), "--out", tmp_path / "run", "--device", "cpu") as driver:
        reading = Thread(target=driver.communicate, daemon=True)
        reading.start()
        working = wait_for(lambda: found if len(found := children(driver.pid)) == 2 else None)
        wait_for(lambda: list((tmp_path / "run" / "progress").glob("*.json")))
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=30) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in working)


def test_an_interruption_is_noticed_while_the_processes_say_nothing():
    """Polars, once used, has the system restart calls that a signal interrupts."""
    script = """
        import os, signal, time
        from queue import SimpleQueue
        from threading import Timer
        import polars as pl
        from throughline.executors import processes

        pl.DataFrame({"a": [1]}).lazy().select("a").collect()
        silent = SimpleQueue()
        Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        last = Timer(20, silent.put, ("too late",))
        last.daemon = True
        last.start()
        try:
            processes._next_of(silent)
        except KeyboardInterrupt:
            os._exit(130)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120)
    assert done.returncode == 130


@pytest.mark.parametrize(
    ("executor", "widths", "division"),
    [
        ({"cpus": 2}, (64, 96), SideBySide(2, 1)),
        ({"cpus": 8}, (64, 96), SideBySide(2, 4)),
        ({"cpus": 1}, (64, 96), None),
        ({"cpus": 8}, (64, 256), None),  # a wide model's products take all cores
        ({"cpus": 8}, (64, None), None),
        ({"cpus": 8, "processes": 2}, (64, 256), SideBySide(2, 4)),
        ({"cpus": 8, "processes": 1}, (64, 96), None),
        ({"kind": "ray"}, (64, 96), None),
    ],
)
def test_cores_are_divided_by_the_study_and_the_machine(tmp_path, executor, widths, division):
    run = RunDir.create(tmp_path / "run", parse_study(study_of(executor=executor), "study"))
    by_model = dict(zip(("zoo/pythia", "zoo/gpt2"), widths, strict=True))
    assert divide_cores(Session(run), by_model) == division


def test_processes_are_refused_where_ray_has_its_own():
    with pytest.raises(InputError, match="processes is for kind: local"):
        parse_study(study_of(executor={"kind": "ray", "processes": 2}), "study")
