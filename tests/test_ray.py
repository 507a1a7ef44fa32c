"""Jobs on a real Ray cluster of two nodes on this machine: what is killed goes on, to the same bits."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kill_cluster
import pytest
import torch
from kill_cluster import (
    ENVIRONMENT,
    Outcome,
    hashes_of,
    kill_node,
    look_at,
    nodes,
)

import commands
from builders import tiny_model
from throughline.dictionaries import Dictionary, load_dictionary

STUDY: dict[str, Any] = {
    "name": "cluster",
    "models": [{"path": "zoo/gpt2", "layers": [0, 1, 2]}, {"path": "zoo/pythia", "layers": [0, 1]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"expansion": 2, "k": 8},
    "training": {"tokens": 100_000, "batch_tokens": 256, "checkpoint_minutes": 0},
    "executor": {"cpus": 1},
}
SHORT: dict[str, Any] = STUDY | {
    "models": [{"path": "zoo/gpt2", "layers": [0, 2]}],
    # a seed by which no pre-activation of two devices falls on the other side of a limit than that of one
    "training": {"tokens": 5120, "batch_tokens": 128, "precision": "float32", "lr": 0.003, "seed": 1},
}
pytestmark = pytest.mark.xdist_group("ray")


class Training(kill_cluster.Training):
    """A training whose drivers begin with everything imported."""

    def start(self) -> commands.Command:
        """The driver."""
        with self.log.open("a") as log:
            return commands.start(*self.command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def cluster():
    with nodes() as two:
        yield two


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    """Hashes of all weights of STUDY, as the local executor makes them."""
    local = Training(STUDY, tmp_path_factory.mktemp("local") / "training")
    assert local.start().wait() == 0, local.said
    return hashes_of(local.run)


def as_it_should(found: Outcome, expected: dict[str, str]) -> None:
    assert found.hashes == expected, found.said
    assert found.trained == {"zoo/gpt2": [0, 1, 2], "zoo/pythia": [0, 1]}
    assert not found.from_zero  # of blocks that had a checkpoint
    assert found.restarts, found.said


@pytest.mark.slow("cluster")
def test_a_worker_and_then_the_driver_are_killed(cluster, expected, tmp_path):
    training = Training(STUDY, tmp_path / "training", cluster.address)
    driver = training.start()
    victim = training.wait_for_a_job(driver)
    assert victim, training.said
    training.note_checkpoints()
    os.kill(victim.pid, signal.SIGKILL)
    assert training.wait_for_a_job(driver, lambda job: job.attempt == 2 or job.model != victim.model), training.said
    training.note_checkpoints()
    driver.kill()
    driver.wait()
    assert training.start().wait() == 0
    found = look_at(training, 0)
    as_it_should(found, expected)
    assert re.search(rf"{victim.model} layers? .*: its worker was lost at step", found.said)
    assert found.said.count("measuring a device") == 2
    assert not list((training.run.root / "progress").iterdir())
    assert not (training.run.root / "driver.json").exists()


@pytest.mark.slow("cluster")
def test_a_node_is_taken_away(cluster, expected, tmp_path):
    training = Training(STUDY, tmp_path / "training", cluster.address)
    kill_node(training, cluster)
    as_it_should(look_at(training, 0), expected)


def dictionaries(training: Training) -> list[Dictionary]:
    assert training.start().wait() == 0, training.said
    return [load_dictionary(training.run.layer_folder("zoo/gpt2", layer)) for layer in (0, 2)]


@pytest.mark.slow("cluster")
def test_two_devices_train_one_block_as_one_does_and_nothing_of_ray_reaches_the_terminal(cluster, tmp_path):
    together = Training(SHORT | {"executor": {"cpus": 1, "devices": 2}}, tmp_path / "two", cluster.address)
    alone = Training(SHORT, tmp_path / "one")
    for found, wanted in zip(dictionaries(together), dictionaries(alone), strict=True):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            a, b = getattr(found, name), getattr(wanted, name)
            assert (a - b).abs().max() <= 5e-3 * b.abs().max(), name
    lines = together.said.splitlines()
    assert lines[0].startswith("measuring a device of 1 cpus, about ")
    assert lines[1] == "1 jobs, 2 devices each, room for 1 at once on 3 nodes"
    assert all(
        line.startswith(("zoo/gpt2: step", "zoo/gpt2: texts begin", "trained; evaluate")) for line in lines[2:]
    ), together.said


@pytest.mark.slow("cluster")
def test_a_job_that_fails_twice_for_one_reason_is_failed_and_the_others_are_done(cluster, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        next(model.hf.parameters()).fill_(torch.nan)
    model.hf.save_pretrained(tmp_path / "broken")
    model.tokenizer.save_pretrained(tmp_path / "broken")
    models = [{"path": str(tmp_path / "broken"), "name": "broken"}, *SHORT["models"]]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "red blue 7 + 42 = sun"}) for _ in range(3000)))
    data = {"path": str(tmp_path / "text.jsonl"), "context": 16}
    training = Training(SHORT | {"models": models, "data": data}, tmp_path / "training", cluster.address)
    assert training.start().wait() == 1, training.said
    assert training.run.trained_layers("zoo/gpt2") == [0, 2]
    assert "it is tried once more" in training.said
    assert training.said.splitlines()[-1].startswith("throughline: broken layers 0-2: ")
    status = commands.run("status", training.run.root)
    assert status.returncode == 0, status.stderr
    assert "broken layers 0-2 failed: " in status.stdout


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ({"cpus": 64}, "a job asks for 64 cpus and 0 gpus, but no node has them"),
        ({"gpus": 1}, "a job asks for 1 cpus and 1 gpus, but no node has them"),
        ({"devices": 9}, "executor.devices is 9, but there are "),
    ],
)
def test_what_no_node_has_is_refused(cluster, tmp_path, executor, message):
    training = Training(SHORT | {"executor": executor}, tmp_path / "training", cluster.address)
    assert training.start().wait() == 2
    assert training.said.splitlines()[-1].startswith(f"throughline: {message}")


def test_a_cluster_that_is_not_there(tmp_path):
    training = Training(SHORT, tmp_path / "training", "127.0.0.1:1")
    assert training.start().wait() == 2
    assert training.said.startswith("throughline: the Ray cluster at 127.0.0.1:1 cannot be reached")
    assert training.said.count("\n") == 1


@pytest.mark.slow("cluster")
def test_a_cluster_on_this_machine_is_gone_at_the_end_and_after_an_interruption(tmp_path):
    training = Training(STUDY | {"executor": {"cpus": 1, "kind": "ray"}}, tmp_path / "training")
    driver = training.start()
    training.wait_for_a_job(driver)
    driver.send_signal(2)
    assert driver.wait() == 130
    assert (
        training.said.splitlines()[-1]
        == "throughline: stopped; train and run continue with --resume, demo with the same command"
    )
    assert not processes_of(training.run.root)


def processes_of(run: Path) -> list[str]:
    """Command lines of Ray's processes that this test's driver started; given a moment to end."""
    log = (run / "ray.log").read_text() if (run / "ray.log").exists() else ""
    for _ in range(50):
        left = [line for line in all_processes() if "ray::" in line and str(run) in line]
        if not left:
            return []
        time.sleep(0.1)
    return [*left, log]


def all_processes() -> list[str]:
    ps = shutil.which("ps")
    return subprocess.run([ps, "axww"], capture_output=True, text=True, check=True).stdout.splitlines() if ps else []
