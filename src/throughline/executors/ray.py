"""Jobs on Ray: on this machine, or on a cluster. Ray places them and says when a worker or a node is lost.

1. connect to the cluster, or start one here; nothing of it reaches the terminal
2. submit every job; Ray gives each the devices it asks for, a process of its own, and the first free node
3. a job whose worker died is submitted again and goes on from its last checkpoint, wherever it lands
4. a job that fails twice for the same reason of its own is noted as failed; the others go on
5. at the end, also after Ctrl-C, everything that was started here is shut down

What workers write lies under the storage root: dictionaries, checkpoints, and notes of where they are. The driver only reads these,
so it can be killed and started again.
"""

import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from throughline.errors import InputError, ThroughlineError, TrainingError
from throughline.jobs import Job, Report, train_job
from throughline.progress import JobNotes
from throughline.records import JobState
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import ExecutorSpec
from throughline.training import Progress

POLL_SECONDS = 1.0
SAME_REASON = 2  # times that a job may fail for it
MOST_FAILURES = 4  # of a job's own, whatever the reasons
MOST_LOSSES = 5  # of workers, one after another, without a step done in between: the job itself kills them
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def run_jobs(session: Session, jobs: Sequence[Job], report: Report) -> None:
    """Do every job. TrainingError names those that failed, when all others are done."""
    with _cluster(session.study.executor, session.run) as ray:
        driver = _Driver(ray, session, report)
        for job in jobs:
            driver.submit(job)
        driver.wait()
    if driver.failed:
        raise TrainingError("; ".join(f"{job.name}: {reason}" for job, reason in driver.failed))


class _Driver:
    """Jobs that Ray has, how often each was tried, and why it failed."""

    def __init__(self, ray: Any, session: Session, report: Report) -> None:
        self._ray, self._session, self._report = ray, session, report
        self._executor = session.study.executor
        self._resources = _resources(ray, self._executor)
        # a worker of its own for each job: what it held, memory of a device included, is free when it is done
        self._task = ray.remote(max_retries=0, max_calls=1)(_train)
        self._jobs: dict[Any, Job] = {}
        self._attempts: dict[str, int] = defaultdict(int)
        self._reasons: dict[str, list[str]] = defaultdict(list)
        self._losses: dict[str, list[int]] = defaultdict(list)  # steps at which workers were lost
        self._seen: dict[str, float] = {}
        self.failed: list[tuple[Job, str]] = []

    def submit(self, job: Job) -> None:
        """Hand a job to Ray, for the first time or again."""
        self._attempts[job.name] += 1
        attempt, root = self._attempts[job.name], self._session.run.storage.absolute()
        options = self._resources | {"name": job.name}
        reference = self._task.options(**options).remote(root, job.model, job.layers, self._resources, attempt)
        self._jobs[reference] = job

    def wait(self) -> None:
        """Until every job is done or has failed."""
        while self._jobs:
            done, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=POLL_SECONDS)
            self._tell()
            for reference in done:
                self._finish(self._jobs.pop(reference), reference)

    def _finish(self, job: Job, reference: Any) -> None:
        lost = self._ray.exceptions
        try:
            said, failure = self._ray.get(reference)
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.ObjectLostError, lost.RaySystemError) as error:
            self._lose(job, error)
            return
        except lost.OutOfMemoryError as error:
            self._fail(job, f"its node ran out of memory ({str(error).splitlines()[0]})")
            return
        for line in said:
            self._session.say(line)
        if failure:
            self._fail(job, failure)

    def _lose(self, job: Job, error: Exception) -> None:
        """A worker died: the job goes on elsewhere, unless it seems to kill its workers."""
        step = max((state.step for state in self._states(job)), default=0)
        self._losses[job.name].append(step)
        recent = self._losses[job.name][-MOST_LOSSES:]
        if len(recent) == MOST_LOSSES and len(set(recent)) == 1:
            self._give_up(job, f"its worker died {MOST_LOSSES} times at step {step}; does the job fit into memory?")
            return
        self._session.say(
            f"{job.name}: its worker was lost at step {step:,} ({type(error).__name__}); it goes on elsewhere"
        )
        self.submit(job)

    def _fail(self, job: Job, reason: str) -> None:
        """The job failed of its own: tried once more, in case that it was not its own after all."""
        reasons = self._reasons[job.name]
        reasons.append(reason)
        if reasons.count(reason) >= SAME_REASON or len(reasons) >= MOST_FAILURES:
            self._give_up(job, reason)
            return
        self._session.say(f"{job.name}: {reason}; it is tried once more")
        self.submit(job)

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


def _train(
    root: str, model: str, layers: list[int], resources: dict[str, float], attempt: int
) -> tuple[list[str], str | None]:
    """On a worker: train one job. What it had to say, and why it failed, if it did."""
    import ray
    import torch

    said: list[str] = []
    try:
        torch.set_num_threads(max(1, int(resources["num_cpus"])))
        gpus = ray.get_gpu_ids()
        session = Session(RunDir.open(root), "cuda" if gpus else "cpu", said.append)
        session.device_name = f"cuda:{','.join(map(str, gpus))}" if gpus else f"cpu of process {os.getpid()}"
        train_job(session, Job(model, layers), lambda progress: None, attempt)
    except ThroughlineError as error:
        return said, str(error)
    except OSError as error:
        return said, f"{error.filename or root}: {error.strerror or error}"
    except Exception as error:  # a fault of ours or of a library: the log has all of it
        traceback.print_exc()
        return said, f"{type(error).__name__}: {error}"
    return said, None


def _resources(ray: Any, executor: ExecutorSpec) -> dict[str, float]:
    """What each job asks Ray for; TrainingError if no node has it, since Ray would wait for one for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = executor.gpus if executor.gpus is not None else float(any(node.get("GPU") for node in nodes))
    wanted = {"num_cpus": float(executor.cpus or 1), "num_gpus": gpus}
    has = {"num_cpus": "CPU", "num_gpus": "GPU"}
    if not any(all(node.get(has[name], 0) >= amount for name, amount in wanted.items()) for node in nodes):
        largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        raise InputError(
            f"a job asks for {wanted['num_cpus']:g} cpus and {gpus:g} gpus, but no node has them; the largest of "
            f"{len(nodes)} has {largest.get('CPU', 0):g} and {largest.get('GPU', 0):g}; set executor.cpus or executor.gpus lower"
        )
    return wanted


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
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = f"the Ray cluster at {executor.address}" if executor.address else "Ray on this machine"
                raise InputError(f"{where} cannot be reached: {next(iter(str(error).splitlines()), '')}") from error
            yield ray
        finally:
            sys.stdout.flush()
            ray.shutdown()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
