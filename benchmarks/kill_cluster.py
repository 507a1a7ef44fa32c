"""Kill workers, nodes and drivers of a training on a two-node Ray cluster on this machine; compare with the local executor.

    python benchmarks/kill_cluster.py worker node driver random [--kills 10] [--write]

Each scenario trains the bundled models with `throughline train` as a user would and ends when the training is complete. `worker`:
SIGKILL of a worker in mid-job. `node`: a node and all its processes are taken away in mid-job, and another joins later. `driver`:
SIGKILL of the driver, which is started again. `random`: so many kills at random moments, of a worker or of the driver. Printed for
each: what was killed at which step, from which steps jobs went on, whether any layer that had a checkpoint began again at the
first step, and whether all weights are those of the local executor, bit by bit. `--write` puts it into docs/scale.md.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pages import SCALE, hardware_and_date, write_between
from safetensors import SafetensorError, safe_open

from throughline.claims import BEAT_SECONDS
from throughline.records import JobState
from throughline.run_dir import RunDir

STUDY: dict[str, Any] = {
    "name": "cluster",
    "models": ["zoo/gpt2", "zoo/pythia", "zoo/phi", "zoo/gemma"],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"expansion": 2, "k": 8},
    "training": {"tokens": 300_000, "batch_tokens": 256, "checkpoint_minutes": 0},
    "executor": {"cpus": 1},
}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
LONGEST_SECONDS = 900.0
MID_JOB = 0.8  # the share of its steps before which a job is killed


class Nodes:
    """A Ray cluster of a head without devices and nodes of one core each, every one with processes of its own."""

    def __init__(self, num: int = 2) -> None:
        os.environ |= ENVIRONMENT | QUIET
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(num)]

    @property
    def address(self) -> str:
        """Where a driver finds it."""
        return self._cluster.address

    def remove(self, pid: int) -> None:
        """Take the node of this worker away, with everything that runs on it."""
        of = {node.all_processes["raylet"][0].process.pid: node for node in self._nodes}
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        node = of[parent]
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def add(self) -> None:
        """Another node joins."""
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def stop(self) -> None:
        """End all processes."""
        self._cluster.shutdown()


@contextmanager
def nodes(num: int = 2) -> Iterator[Nodes]:
    """A cluster for the time of the block."""
    cluster = Nodes(num)
    try:
        yield cluster
    finally:
        cluster.stop()


class Kept(NamedTuple):
    """A block's checkpoint, and when it was seen."""

    journal: Path
    at: float
    step: int

    def was_forgotten(self) -> bool:
        """True if the block was trained from an earlier step afterwards."""
        lines = self.journal.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return any(row["step"] < self.step for row in rows if row["at"] > self.at)


class Training:
    """`throughline train --resume` in a process of its own, started again as often as need be."""

    def __init__(self, study: dict[str, Any], folder: Path, address: str | None = None) -> None:
        executor = study["executor"] | ({"kind": "ray", "address": address} if address else {})
        folder.mkdir(parents=True)
        self.run, self.log = RunDir(folder / "run"), folder / "log.txt"
        self.kept: list[Kept] = []
        (folder / "study.yaml").write_text(yaml.safe_dump(study | {"executor": executor}))
        command = ["train", folder / "study.yaml", "--out", self.run.root, "--resume", "--device", "cpu"]
        self.command = [str(part) for part in command]

    def start(self) -> subprocess.Popen:
        """The driver."""
        with self.log.open("a") as log:
            arguments = [sys.executable, "-m", "throughline", *self.command]
            return subprocess.Popen(arguments, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        """What all drivers said."""
        return self.log.read_text() if self.log.exists() else ""

    def jobs(self) -> list[JobState]:
        """Jobs that run now, have a checkpoint to go on from, and enough to do that they do not end while they are killed."""
        states = self.run.jobs() if self.run.root.exists() else []
        return [s for s in states if self._checkpoint(s).exists() and 0 < s.step < MID_JOB * s.num_steps]

    def note_checkpoints(self) -> None:
        """Remember, before something is killed, from which step each block must go on at least."""
        for file in self.run.root.glob("models/*/checkpoints/layers_*/state.safetensors"):
            try:
                with safe_open(file, "pt") as opened:
                    step = json.loads(opened.metadata()["throughline"])["step"]
            except (FileNotFoundError, SafetensorError):  # replaced, or the block is done
                continue
            journal = file.parents[2] / f"training_{file.parent.name.removeprefix('layers_')}.jsonl"
            self.kept.append(Kept(journal, time.time(), step))

    def _checkpoint(self, state: JobState) -> Path:
        return self.run.checkpoint_folder(state.model, state.layers) / "state.safetensors"

    def wait_for_a_job(
        self, driver: subprocess.Popen, wanted: Callable[[JobState], bool] = lambda state: True
    ) -> JobState | None:
        """The first job that could go on from a checkpoint; None if the driver ended before there was one."""
        end = time.monotonic() + LONGEST_SECONDS
        while driver.poll() is None and time.monotonic() < end:
            try:
                found = [state for state in self.jobs() if wanted(state)]
            except FileNotFoundError:  # a job ended while its note was read
                continue
            if found:
                return found[0]
            time.sleep(0.02)
        return None


class Outcome(NamedTuple):
    """How a scenario ended."""

    exit_code: int
    said: str
    hashes: dict[str, str]
    trained: dict[str, list[int]]
    restarts: list[tuple[str, int]]  # jobs that went on, and from which step
    from_zero: list[str]  # blocks that had a checkpoint and began again at the first step


def hashes_of(run: RunDir) -> dict[str, str]:
    """Of every file of weights and probes."""
    files = sorted(run.root.rglob("layer_*/*.safetensors"))
    return {str(f.relative_to(run.root)): sha256(f.read_bytes()).hexdigest() for f in files}


def look_at(training: Training, exit_code: int) -> Outcome:
    """What a finished training left."""
    run = training.run
    trained = {spec.name: run.trained_layers(spec.name) for spec in run.study().models}
    restarts = [
        (name, int(step.replace(",", "")))
        for name, step in re.findall(r"(\S+): going on from step ([\d,]+)", training.said)
    ]
    from_zero = sorted({f"{k.journal.parent.name} {k.journal.stem}" for k in training.kept if k.was_forgotten()})
    return Outcome(exit_code, training.said, hashes_of(run), trained, restarts, from_zero)


def kill_worker(training: Training, cluster: Nodes) -> list[str]:
    """SIGKILL of a worker in mid-job."""
    driver = training.start()
    job = training.wait_for_a_job(driver)
    assert job, training.said
    training.note_checkpoints()
    os.kill(job.pid, signal.SIGKILL)
    driver.wait(LONGEST_SECONDS)
    return [f"worker of {job.model} at step {job.step}"]


def kill_node(training: Training, cluster: Nodes) -> list[str]:
    """A node goes in mid-job, another comes later."""
    driver = training.start()
    job = training.wait_for_a_job(driver)
    assert job, training.said
    os.kill(job.pid, signal.SIGSTOP)  # taking a node away takes seconds, in which the job could end
    training.note_checkpoints()
    cluster.remove(job.pid)
    time.sleep(5)
    cluster.add()
    driver.wait(LONGEST_SECONDS)
    return [f"a node, while {job.model} was at step {job.step}"]


def kill_driver(training: Training, cluster: Nodes) -> list[str]:
    """SIGKILL of the driver in mid-job; it is started again at once."""
    driver = training.start()
    job = training.wait_for_a_job(driver)
    assert job, training.said
    training.note_checkpoints()
    driver.kill()
    driver.wait()
    training.start().wait(LONGEST_SECONDS)
    return [f"driver, while {job.model} was at step {job.step}"]


def kill_at_random(training: Training, cluster: Nodes, kills: int, seed: int = 0) -> list[str]:
    """Workers and drivers in one training, until there have been so many kills; moments and victims at random."""
    rng, killed = random.Random(seed), []
    driver = training.start()
    while len(killed) < kills and driver.poll() is None:
        time.sleep(1 + 4 * rng.random())
        states = [state for state in training.run.jobs() if state.step and time.time() - state.at < 3 * BEAT_SECONDS]
        if not states:  # nothing is in mid-job
            continue
        training.note_checkpoints()
        victim = rng.choice(states)
        if rng.random() < 0.3:
            driver.kill()
            driver.wait()
            killed.append(f"driver, while {victim.model} was at step {victim.step}")
            driver = training.start()
            continue
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed.append(f"worker of {victim.model} at step {victim.step}")
    driver.wait(LONGEST_SECONDS)
    return killed


SCENARIOS: dict[str, Callable[..., list[str]]] = {"worker": kill_worker, "node": kill_node, "driver": kill_driver}


def main() -> None:
    """Run scenarios; exit code 1 if one ends otherwise than it should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenarios", nargs="+", choices=[*SCENARIOS, "random"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_cluster_"))
    local = Training(STUDY, folder / "local")
    assert local.start().wait() == 0, local.said
    expected, right = hashes_of(local.run), True
    lines = [
        f"`python benchmarks/kill_cluster.py {' '.join(options.scenarios)} --kills {options.kills} --write`; "
        f"{hardware_and_date()}; "
        f"{len(expected) // 2} dictionaries of the four bundled models, two nodes of one core each.",
        "",
        "| killed | jobs went on from step | began anew though there was a checkpoint | weights |",
        "|---|---|---|---|",
    ]
    with nodes() as cluster:
        for scenario in options.scenarios:
            training = Training(STUDY, folder / scenario, cluster.address)
            if scenario == "random":
                killed = kill_at_random(training, cluster, options.kills, options.seed)
            else:
                killed = SCENARIOS[scenario](training, cluster)
            found = look_at(training, 0)
            identical = found.hashes == expected
            right = right and identical and not found.from_zero
            went_on = ", ".join(f"{name} {step}" for name, step in found.restarts) or "none"
            weights = "identical" if identical else "DIFFERENT"
            lines.append(f"| {'; '.join(killed)} | {went_on} | {', '.join(found.from_zero) or 'none'} | {weights} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if options.write:
        write_between(SCALE, "kills", lines, "Killed on purpose")
    if right:
        shutil.rmtree(folder)
    else:
        raise SystemExit(f"kept: {folder}")


if __name__ == "__main__":
    main()
