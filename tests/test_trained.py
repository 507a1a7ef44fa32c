"""What tests share is made once by several processes, or fails in all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from trained import TWO_MODELS, change_study, make_once

CODE = """
import sys, time
from pathlib import Path
from trained import make_once

def make(folder):
    with Path("made").open("a") as file:
        file.write("once")
    (folder / "first").touch()
    {then}
    (folder / "last").touch()

print(sorted(path.name for path in make_once(Path("shared"), "it", make).iterdir()))
"""


def start(folder: Path, then: str) -> subprocess.Popen:
    """A process that wants the folder, which takes this to make."""
    command = [sys.executable, "-c", CODE.format(then=then)]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_the_first_process_makes_it_and_others_wait(tmp_path):
    for process in [start(tmp_path, "time.sleep(0.5)") for _ in range(3)]:
        assert process.communicate(timeout=60) == ("['first', 'last']\n", "")
    assert (tmp_path / "made").read_text() == "once"


def test_what_fails_in_one_process_fails_in_all_without_another_try(tmp_path):
    said = [p.communicate(timeout=60)[1] for p in [start(tmp_path, "raise ValueError('no room')") for _ in range(3)]]
    assert all("ValueError: no room" in text for text in said)
    assert sum("RuntimeError: it could not be made" in text for text in said) == 2
    assert (tmp_path / "made").read_text() == "once" and not (tmp_path / "shared" / "it").exists()


def test_what_a_killed_process_had_begun_is_made_anew(tmp_path):
    first = start(tmp_path, "print('begun', flush=True); time.sleep(60)")
    assert first.stdout is not None and first.stdout.readline() == "begun\n"
    first.kill()
    first.communicate()
    assert start(tmp_path, "pass").communicate(timeout=60) == ("['first', 'last']\n", "")


def test_each_test_that_asks_has_the_same_copy_and_not_the_shared_one(made_once, tmp_path_factory):
    copies = {made_once("a word", lambda folder: (folder / "word").write_text("said")) for _ in range(2)}
    (copy,) = copies
    assert (copy / "word").read_text() == "said" and copy.is_relative_to(tmp_path_factory.getbasetemp() / "copies")


def test_a_run_of_a_study_goes_on_from_stage_to_stage(trained):
    run, evaluated = trained(TWO_MODELS), trained(TWO_MODELS, "evaluate")
    names = ["models/zoo-gpt2/layer_01/sae_weights.safetensors", "models/zoo-gpt2/layer_01/quality.json"]
    assert [(run / name).exists() for name in names] == [True, False]
    assert (evaluated / names[1]).exists() and (run / names[0]).read_bytes() == (evaluated / names[0]).read_bytes()
    assert (run / names[0]).stat().st_mtime_ns == (evaluated / names[0]).stat().st_mtime_ns  # not trained twice


def test_a_study_may_be_changed(trained, tmp_path):
    (tmp_path / "study.yaml").write_text("trace: {features: 3, nodes: 4}\nname: x\n")
    change_study(tmp_path, trace={"features": 2})
    assert (tmp_path / "study.yaml").read_text() == "name: x\ntrace:\n  features: 2\n  nodes: 4\n"
    with pytest.raises(KeyError):
        change_study(tmp_path, traces={"features": 2})


def test_a_name_is_asked_for_once(tmp_path):
    made: list[Path] = []
    assert make_once(tmp_path / "shared", "x", made.append) == make_once(tmp_path / "shared", "x", made.append)
    assert len(made) == 1
