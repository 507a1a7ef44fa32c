"""A disk that is full, a folder that cannot be written, a checkpoint that was cut short: real ones, with whole trainings."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from kill_cluster import ENVIRONMENT, hashes_of

from throughline.run_dir import RunDir

pytestmark = pytest.mark.xdist_group("faults")  # what it sets up takes long

STUDY = """
name: faults
models: [{path: zoo/gpt2, layers: [0]}, {path: zoo/pythia, layers: [0, 1, 2]}]
data: {path: zoo/arithmetic, context: 64}
dictionary: {expansion: 2, k: 8}
training: {tokens: 200000, batch_tokens: 256, checkpoint_minutes: 0}
"""
TRAIN = f"{sys.executable} -m throughline train study.yaml --device cpu"


class Said(NamedTuple):
    code: int
    out: str
    err: str


def sh(folder: Path, script: str, own_mounts: bool = False) -> Said:
    command = ["sh", "-c", script]
    done = subprocess.run(
        ["unshare", "-rm", *command] if own_mounts else command,
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def mounts() -> None:
    try:
        found = sh(Path.cwd(), "mount -t tmpfs none /mnt", own_mounts=True)
    except FileNotFoundError:
        pytest.skip("needs unshare, to mount a disk of its own")
    if found.code:
        pytest.skip(f"cannot mount a disk of its own: {found.err.strip()}")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    """Hashes of all weights, of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "study.yaml").write_text(STUDY)
    said = sh(folder, f"{TRAIN} --out run")
    assert said.code == 0, said.err
    return hashes_of(RunDir(folder / "run"))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "disk").mkdir()
    return tmp_path


@pytest.mark.slow("faults")
def test_a_full_disk_is_said_and_nothing_finished_is_lost(mounts, folder, expected):
    """Room for the first model's dictionary, not for the second's checkpoints."""
    said = sh(
        folder,
        f"""
        mount -t tmpfs -o size=3m none disk
        {TRAIN} --out disk/run; echo "code $?"; cp -r disk/run full
        {sys.executable} -m throughline status disk/run; echo "code $?"
        mount -o remount,size=100m disk
        {TRAIN} --out disk/run --resume; echo "code $?"; cp -r disk/run resumed
        """,
        own_mounts=True,
    )
    assert re.findall(r"code (\d)", said.out) == ["1", "0", "0"], said
    assert len(re.findall(r"throughline: disk/run/.*: No space left on device\n", said.err)) == 1
    assert "Traceback" not in said.err
    assert RunDir(folder / "full").trained_layers("zoo/gpt2") == [0]
    assert RunDir(folder / "full").trained_layers("zoo/pythia") == []
    assert "1 of 4 layers trained" in said.out
    assert hashes_of(RunDir(folder / "resumed")) == expected


def test_a_folder_that_cannot_be_written_is_said(mounts, folder):
    said = sh(
        folder,
        f"""
        mount -t tmpfs -o ro none disk
        {TRAIN} --out disk/run; echo "code $?"
        """,
        own_mounts=True,
    )
    assert said.out == "code 2\n"
    assert said.err == "throughline: disk/run: Read-only file system\n"


@pytest.mark.slow("faults")
def test_a_run_that_can_only_be_read_is_read_and_kept(mounts, folder, expected):
    said = sh(
        folder,
        f"""
        sed -i "/^models/c models: [{{path: zoo/gpt2, layers: [0]}}]" study.yaml
        {TRAIN} --out disk/run --set training.tokens=20000; echo "code $?"
        cp -r disk/run before
        mount --bind disk disk; mount -o remount,bind,ro disk
        {TRAIN} --out disk/run --resume; echo "code $?"
        {sys.executable} -m throughline status disk/run; echo "code $?"
        {sys.executable} -m throughline evaluate disk/run; echo "code $?"
        diff -r disk/run before; echo "code $?"
        """,
        own_mounts=True,
    )
    assert re.findall(r"code (\d)", said.out) == ["0", "2", "0", "2", "0"], said
    errors = [line for line in said.err.splitlines() if line.startswith("throughline: ")]
    assert [error.rpartition(": ")[2] for error in errors] == ["Read-only file system"] * 2
    assert "Traceback" not in said.err
    assert "1 of 1 layers trained" in said.out


def test_a_checkpoint_cut_short_while_the_driver_was_down_is_said(folder, expected):
    driver = subprocess.Popen(
        [*TRAIN.split(), "--out", "run"], cwd=folder, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while not (found := list(folder.glob("run/models/zoo-pythia/checkpoints/*/state.safetensors"))):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    os.truncate(found[0], int(0.6 * found[0].stat().st_size))
    said = sh(folder, f"{TRAIN} --out run --resume")
    assert said.code == 0, said.err
    assert re.search(r"checkpoint .*state\.safetensors is damaged \(.*\); training begins anew\n", said.err)
    assert "zoo/gpt2: step" not in said.err  # it was finished, and is not trained again
    assert hashes_of(RunDir(folder / "run")) == expected
