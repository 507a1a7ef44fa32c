"""Who holds a run, and who owns the layers of a job: with real processes."""

import json
import os
import signal
import time

import pytest
from kill_cluster import ENVIRONMENT

from commands import Command, start
from throughline import claims
from throughline.claims import hold, take
from throughline.errors import HeldError, TrainingError
from throughline.storage import Slot

STUDY = """
name: held
models: [zoo/gpt2]
data: {path: zoo/arithmetic, context: 64}
dictionary: {expansion: 2, k: 8}
training: {tokens: 4000000, batch_tokens: 128}
"""


def train(folder, *more) -> Command:
    return start("train", folder / "study.yaml", "--out", folder / "run", *more, env=os.environ | ENVIRONMENT)


@pytest.fixture
def first(tmp_path):
    """A training that holds its run."""
    (tmp_path / "study.yaml").write_text(STUDY)
    process = train(tmp_path)
    while not list((tmp_path / "run" / "progress").glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


def test_a_second_driver_says_who_holds_the_run_and_ends(first, tmp_path):
    second = train(tmp_path, "--resume")
    out, err = second.communicate()
    assert (second.returncode, out) == (1, "")
    assert err.startswith(f"throughline: run {tmp_path / 'run'} is held by process {first.pid} on ")
    assert err.count("\n") == 1
    assert first.poll() is None


def test_a_run_is_free_when_its_driver_was_killed(first, tmp_path):
    first.kill()
    first.wait()
    assert json.loads((tmp_path / "run" / "driver.json").read_text())["pid"] == first.pid
    with hold(Slot(tmp_path / "run" / "driver.json"), "it"):
        pass
    assert not (tmp_path / "run" / "driver.json").exists()


def test_a_run_is_free_after_an_interruption(first, tmp_path):
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130
    assert not (tmp_path / "run" / "driver.json").exists()


@pytest.mark.parametrize(("silent", "free"), [(0, False), (claims.SILENT_SECONDS + 1, True)])
def test_a_holder_on_another_machine_is_believed_while_it_gives_signs(tmp_path, silent, free):
    path = tmp_path / "driver.json"
    there = {"token": "t", "host": "elsewhere", "pid": 7, "born": "1", "beat": time.time() - silent}
    path.write_text(json.dumps(there))
    if free:
        with hold(Slot(path), "it"):
            return
    with (
        pytest.raises(HeldError, match="it is held by process 7 on elsewhere; wait for it, or stop it"),
        hold(Slot(path), "it"),
    ):
        raise AssertionError


def test_layers_belong_to_whom_took_them_last(tmp_path):
    earlier = take(Slot(tmp_path / "layers_00-05" / "claim.json"))
    earlier.check()
    later = take(Slot(tmp_path / "layers_00-05" / "claim.json"))
    later.check()
    with pytest.raises(TrainingError, match=f"layers_00-05 was given to process {os.getpid()} on"):
        earlier.check()
