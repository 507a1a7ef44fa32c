"""Jobs on Ray: on this machine, or on a cluster. Ray places them and says when a worker or a node is lost.

1. connect to the cluster, or start one here; nothing of it reaches the terminal
2. measure a device of each kind, and divide the layers into blocks for them as the planner does
3. submit every block; Ray gives each the devices it asks for, processes of its own, and the first free node that will do
4. a job whose worker died is submitted again and goes on from its last checkpoint, wherever it lands
5. a job that fails twice for the same reason of its own is noted as failed; the others go on
6. at the end, also after Ctrl-C, everything that was started here is shut down

What workers write lies under the storage root: dictionaries, checkpoints, and notes of where they are. The driver only reads these,
so it can be killed and started again. What runs on them is `ray_worker`.
"""

import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from throughline.errors import InputError, TrainingError
from throughline.executors import ray_worker
from throughline.executors.placing import Node, PlacedJob, Wanted, place_jobs, size_of_teams, teams, wanted_of
from throughline.jobs import Job, Report
from throughline.progress import JobNotes
from throughline.records import JobState, PlannedDevice
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import ExecutorSpec
from throughline.training import Progress

POLL_SECONDS = 1.0
KNOCK_SECONDS = 10.0
SAME_REASON = 2  # times that a job may fail for it
MOST_FAILURES = 4  # of a job's own, whatever the reasons
MOST_LOSSES = 5  # of workers, one after another, without a step done in between: the job itself kills them
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
CARD = "accelerator_type:"  # how the resource begins that names a node's GPUs


def run_jobs(session: Session, jobs: Sequence[Job], report: Report) -> None:
    """Do every job. TrainingError names those that failed, when all others are done; InputError if the cluster has no room."""
    with _cluster(session.study.executor, session.run) as ray:
        nodes = _nodes(ray)
        wanted = wanted_of(session.study.executor, nodes)
        size = size_of_teams(session.study.executor, wanted, nodes, sum(len(job.layers) for job in jobs))
        kinds = {node.kind: node for node in nodes if wanted.slots(node)}
        session.say(f"measuring a device of {' and of '.join(kinds)}")
        measured = {kind: _measure(ray, session, wanted, [n for n in nodes if n.kind == kind]) for kind in kinds}
        devices = teams(nodes, wanted, size, measured)
        placed = place_jobs(session, jobs, devices, {kind: node.card for kind, node in kinds.items()})
        each = f", {size} devices each" if size > 1 else ""
        session.say(f"{len(placed)} jobs{each}, room for {len(devices)} at once on {len(nodes)} nodes")
        driver = _Driver(ray, session, wanted, size, report)
        for job in placed:
            driver.submit(job)
        driver.wait()
    if driver.failed:
        raise TrainingError("; ".join(f"{job.name}: {reason}" for job, reason in driver.failed))


class _Driver:
    """Jobs that Ray has, how often each was tried, and why it failed."""

    def __init__(self, ray: Any, session: Session, wanted: Wanted, size: int, report: Report) -> None:
        self._ray, self._session, self._report = ray, session, report
        self._wanted, self._size = wanted, size
        # a worker of its own for each job: what it held, memory of a device included, is free when it is done
        self._task = ray.remote(max_retries=0, max_calls=1)(
            ray_worker.train if size == 1 else ray_worker.train_together
        )
        self._jobs: dict[Any, PlacedJob] = {}
        self._attempts: dict[str, int] = defaultdict(int)
        self._reasons: dict[str, list[str]] = defaultdict(list)
        self._losses: dict[str, list[int]] = defaultdict(list)  # steps at which workers were lost
        self._seen: dict[str, float] = {}
        self.failed: list[tuple[Job, str]] = []

    def submit(self, placed: PlacedJob) -> None:
        """Hand a job to Ray, for the first time or again."""
        job, root = placed.job, self._session.run.storage.absolute()
        self._attempts[job.name] += 1
        given = (root, job.model, job.layers, self._attempts[job.name], self._wanted.cpus)
        options: dict[str, Any] = {"name": job.name, "num_cpus": 0}
        if self._size == 1:
            options |= {"num_cpus": self._wanted.cpus, "num_gpus": self._wanted.gpus, "accelerator_type": placed.card}
            options |= {"memory": placed.memory_bytes} if placed.memory_bytes else {}
            reference = self._task.options(**options).remote(*given)
        else:
            reference = self._task.options(**options).remote(*given, self._wanted.gpus, self._size, placed.card)
        self._jobs[reference] = placed

    def wait(self) -> None:
        """Until every job is done or has failed."""
        while self._jobs:
            done, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=POLL_SECONDS)
            self._tell()
            for reference in done:
                self._finish(self._jobs.pop(reference), reference)

    def _finish(self, placed: PlacedJob, reference: Any) -> None:
        lost = self._ray.exceptions
        try:
            said, failure = self._ray.get(reference)
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.ObjectLostError, lost.RaySystemError) as error:
            self._lose(placed, type(error).__name__)
            return
        except lost.OutOfMemoryError as error:
            self._fail(placed, f"its node ran out of memory ({str(error).splitlines()[0]})")
            return
        for line in said:
            self._session.say(line)
        if isinstance(failure, ray_worker.Lost):
            self._lose(placed, failure)
        elif failure:
            self._fail(placed, failure)

    def _lose(self, placed: PlacedJob, how: str) -> None:
        """A worker died: the job goes on elsewhere, unless it seems to kill its workers."""
        job = placed.job
        step = max((state.step for state in self._states(job)), default=0)
        self._losses[job.name].append(step)
        recent = self._losses[job.name][-MOST_LOSSES:]
        if len(recent) == MOST_LOSSES and len(set(recent)) == 1:
            self._give_up(job, f"its worker died {MOST_LOSSES} times at step {step}; does the job fit into memory?")
            return
        self._session.say(f"{job.name}: its worker was lost at step {step:,} ({how}); it goes on elsewhere")
        self.submit(placed)

    def _fail(self, placed: PlacedJob, reason: str) -> None:
        """The job failed of its own: tried once more, in case that it was not its own after all."""
        job = placed.job
        reasons = self._reasons[job.name]
        reasons.append(reason)
        if reasons.count(reason) >= SAME_REASON or len(reasons) >= MOST_FAILURES:
            self._give_up(job, reason)
            return
        self._session.say(f"{job.name}: {reason}; it is tried once more")
        self.submit(placed)

    def _give_up(self, job: Job, reason: str) -> None:
        self.failed.append((job, reason))
        for state in self._states(job):
            self._session.run.forget_job(state.model, state.layers)
        JobNotes(self._session.run, job.model, job.layers, "", self._attempts[job.name]).note(failed=reason)
        self._session.say(f"{job.name} failed: {reason}")

    def _states(self, job: Job) -> list[JobState]:
        layers = set(job.layers)
        return [s for s in self._session.run.jobs() if s.model == job.model and layers.issuperset(s.layers)]

    def _tell(self) -> None:
        """Report what workers have noted since the last look."""
        for state in self._session.run.jobs():
            key = f"{state.model} {state.layers}"
            if state.fvu and not state.failed and self._seen.get(key) != state.at:
                self._seen[key] = state.at
                measured = state.model_dump(include=set(Progress.__dataclass_fields__))
                self._report(Progress(**measured))


# ---- the cluster


def _nodes(ray: Any) -> list[Node]:
    """The machines that the cluster has now."""
    nodes = []
    for found in ray.nodes():
        has = found["Resources"]
        card = next((name.removeprefix(CARD) for name in has if name.startswith(CARD)), None)
        if found["Alive"]:
            nodes.append(Node(found["NodeID"], has.get("CPU", 0), has.get("GPU", 0), int(has.get("memory", 0)), card))
    return nodes


def _measure(ray: Any, session: Session, wanted: Wanted, alike: Sequence[Node]) -> PlannedDevice:
    """A device of nodes that are alike: memory and rates. TrainingError if all of them are lost meanwhile."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_calls=1)(ray_worker.measure)
    for node in alike:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        options = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "scheduling_strategy": there}
        try:
            return ray.get(task.options(**options).remote(session.study.training.precision, wanted.cpus))
        except ray.exceptions.RayError:
            continue
    raise TrainingError(f"no node of {len(alike)} with {alike[0].kind} answers")


@contextmanager
def _cluster(executor: ExecutorSpec, run: RunDir) -> Iterator[Any]:
    """Ray, connected to a cluster or to one started here, and shut down at the end.

    Its own messages, which it prints whenever a worker dies, go to the run's ray.log.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "executor.kind ray needs a library that is missing: pip install 'throughline[cluster]'"
        ) from error
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # the paths of its sockets may have 107 characters, so its folder must be short
    folder = None if executor.address else tempfile.mkdtemp(prefix="tl-", dir="/tmp" if Path("/tmp").is_dir() else None)
    options: dict[str, Any] = (
        {"include_dashboard": False, "_temp_dir": folder} if folder else {"address": executor.address}
    )
    with (run.root / "ray.log").open("a") as log, redirect_stdout(log):
        try:
            _knock(executor.address)
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _unreachable(executor.address, error) from error
            yield ray
        finally:
            sys.stdout.flush()
            ray.shutdown()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


def _knock(address: str | None) -> None:
    """InputError if nobody listens at HOST:PORT; Ray itself tries for minutes, and says so on the terminal."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address or "")
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), KNOCK_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> InputError:
    where = f"the Ray cluster at {address}" if address else "Ray on this machine"
    return InputError(f"{where} cannot be reached: {next(iter(str(error).splitlines()), '')}")
