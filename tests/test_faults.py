"""A disk that is full, a folder that cannot be written, a checkpoint that was cut short: real ones, with whole trainings."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from subprocess import DEVNULL
from typing import NamedTuple

import pytest
from kill_cluster import ENVIRONMENT, hashes_of

import commands
from throughline.run_dir import RunDir

pytestmark = pytest.mark.xdist_group("faults")  # what it sets up takes long

STUDY = """
name: faults
models: [{path: zoo/gpt2, layers: [0]}, {path: zoo/pythia, layers: [0, 1, 2]}]
data: {path: zoo/arithmetic, context: 64}
dictionary: {expansion: 2, k: 8}
training: {tokens: 140000, batch_tokens: 256, checkpoint_minutes: 0}
"""
TRAIN = ("train", "study.yaml", "--device", "cpu")


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Room:
    """A folder, and a shell and commands in it; with disks that only they see, if the room has mounts of its own."""

    def __init__(self, folder: Path, keeper: int | None = None) -> None:
        """`keeper` is a process that has them."""
        self._folder, self._keeper = folder, keeper

    def sh(self, script: str) -> Said:
        """What a script of the shell says."""
        enter = (
            []
            if self._keeper is None
            else ["nsenter", "-t", str(self._keeper), "--user", "--mount", "--preserve-credentials"]
        )
        script = f"cd {quote(str(self._folder))} || exit; {script}"
        done = subprocess.run([*enter, "sh", "-c", script], capture_output=True, text=True)
        return Said(done.returncode, done.stdout, done.stderr)

    def throughline(self, *arguments: str) -> Said:
        """What a command says."""
        environment = os.environ | ENVIRONMENT
        done = commands.run(*arguments, cwd=self._folder, env=environment, namespaces_of=self._keeper)
        return Said(done.returncode, done.stdout, done.stderr)


@contextmanager
def mounts_of_its_own(folder: Path) -> Iterator[Room]:
    """A room that has them; they are gone with it. FileNotFoundError without unshare."""
    hold = ["unshare", "-rm", "sh", "-c", "echo held; read line"]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as keeper:
        assert keeper.stdin and keeper.stdout and keeper.stderr
        if not keeper.stdout.readline():
            raise PermissionError(keeper.stderr.read().decode().strip())
        yield Room(folder, keeper.pid)
        keeper.stdin.close()


@pytest.fixture(scope="module")
def mounts() -> None:
    try:
        with mounts_of_its_own(Path.cwd()) as room:
            found = room.sh("mount -t tmpfs none /mnt")
    except FileNotFoundError:
        pytest.skip("needs unshare and nsenter, to mount a disk of its own")
    except PermissionError as error:
        pytest.skip(f"cannot mount a disk of its own: {error}")
    if found.code:
        pytest.skip(f"cannot mount a disk of its own: {found.err.strip()}")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    """Hashes of all weights, of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "study.yaml").write_text(STUDY)
    said = Room(folder).throughline(*TRAIN, "--out", "run")
    assert said.code == 0, said.err
    return hashes_of(RunDir(folder / "run"))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "disk").mkdir()
    return tmp_path


@pytest.fixture
def room(mounts, folder) -> Iterator[Room]:
    """The folder, with mounts of its own."""
    with mounts_of_its_own(folder) as opened:
        yield opened


@pytest.mark.slow("faults")
def test_a_full_disk_is_said_and_nothing_finished_is_lost(room, folder, expected):
    """Room for the first model's dictionary, not for the second's checkpoints."""
    assert room.sh("mount -t tmpfs -o size=3m none disk").code == 0
    full = room.throughline(*TRAIN, "--out", "disk/run")
    assert room.sh("cp -r disk/run full").code == 0
    status = room.throughline("status", "disk/run")
    assert room.sh("mount -o remount,size=100m disk").code == 0
    resumed = room.throughline(*TRAIN, "--out", "disk/run", "--resume")
    assert room.sh("cp -r disk/run resumed").code == 0
    said = (full, status, resumed)
    assert [each.code for each in said] == [1, 0, 0], said
    errors = "".join(each.err for each in said)
    assert len(re.findall(r"throughline: disk/run/.*: No space left on device\n", errors)) == 1
    assert "Traceback" not in errors
    assert RunDir(folder / "full").trained_layers("zoo/gpt2") == [0]
    assert RunDir(folder / "full").trained_layers("zoo/pythia") == []
    assert "1 of 4 layers trained" in status.out
    assert hashes_of(RunDir(folder / "resumed")) == expected


def test_a_folder_that_cannot_be_written_is_said(room):
    assert room.sh("mount -t tmpfs -o ro none disk").code == 0
    said = room.throughline(*TRAIN, "--out", "disk/run")
    assert said == (2, "", "throughline: disk/run: Read-only file system\n")


@pytest.mark.slow("faults")
def test_a_run_that_can_only_be_read_is_read_and_kept(room, folder):
    small = STUDY.replace(", {path: zoo/pythia, layers: [0, 1, 2]}", "")
    assert small != STUDY
    (folder / "study.yaml").write_text(small)
    trained = room.throughline(*TRAIN, "--out", "disk/run", "--set", "training.tokens=20000")
    assert room.sh("cp -r disk/run before; mount --bind disk disk; mount -o remount,bind,ro disk").code == 0
    resumed = room.throughline(*TRAIN, "--out", "disk/run", "--resume")
    status = room.throughline("status", "disk/run")
    evaluated = room.throughline("evaluate", "disk/run")
    kept = room.sh("diff -r disk/run before")
    said = (trained, resumed, status, evaluated, kept)
    assert [each.code for each in said] == [0, 2, 0, 2, 0], said
    errors = [line for each in said for line in each.err.splitlines() if line.startswith("throughline: ")]
    assert [error.rpartition(": ")[2] for error in errors] == ["Read-only file system"] * 2
    assert not any("Traceback" in each.err for each in said)
    assert "1 of 1 layers trained" in status.out


@pytest.mark.slow("faults")
def test_a_checkpoint_cut_short_while_the_driver_was_down_is_said(folder, expected):
    driver = commands.start(
        *TRAIN, "--out", "run", cwd=folder, env=os.environ | ENVIRONMENT, stdout=None, stderr=DEVNULL
    )
    while not (found := list(folder.glob("run/models/zoo-pythia/checkpoints/*/state.safetensors"))):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    os.truncate(found[0], int(0.6 * found[0].stat().st_size))
    said = Room(folder).throughline(*TRAIN, "--out", "run", "--resume")
    assert said.code == 0, said.err
    assert re.search(r"checkpoint .*state\.safetensors is damaged \(.*\); training begins anew\n", said.err)
    assert "zoo/gpt2: step" not in said.err  # it was finished, and is not trained again
    assert hashes_of(RunDir(folder / "run")) == expected
