"""Traces and comparisons as jobs: one queue, one thread that works, and results kept by what was asked.

1. a job's id is a digest of the request and of all that its result is made from, so the same request is the same job
2. it waits in a queue of bounded length; it can be cancelled while it waits, and while it runs at its next step
3. one thread has one job after another done by a process of its own (`workers`); nobody who reads waits for it
4. what happens is appended to the job's events, which any number of streams follow
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Thread
from typing import Any, NamedTuple, Protocol

from throughline.errors import ThroughlineError
from throughline.run_dir import digest_key
from throughline.serving.requests import CompareRequest, TraceRequest
from throughline.views.answers import JobAnswer, JobKind, JobPhase
from throughline.views.refusals import RefusedError

logger = logging.getLogger(__name__)
Tell = Callable[[str, int, int], None]  # what is done now, the number of that step, and how many there are
ENDED = ("done", "failed", "cancelled")
USUAL_SECONDS = 5.0  # a job takes, before any was done


class CancelledJobError(Exception):
    """Ends the work on a job that somebody cancelled."""


@dataclass(frozen=True)
class Limits:
    """How much is taken on."""

    queued: int = 32
    burst: int = 60  # new jobs at once, and so many
    per_minute: float = 120.0  # later
    kept: int = 64  # ended jobs with their results
    idle_seconds: float = 600.0  # after which models are let go


class Event(NamedTuple):
    """Something that happened to a job: its phase, or `progress`."""

    name: str
    data: dict[str, Any]


@dataclass
class Job:
    """A request, and what became of it."""

    id: str
    kind: JobKind
    request: TraceRequest | CompareRequest
    phase: JobPhase = "queued"
    created: float = field(default_factory=time.time)
    began: float | None = None
    seconds: float | None = None
    doing: str | None = None
    step: int = 0
    num_steps: int = 0
    error: str | None = None
    is_unwanted: bool = False  # cancelled while it ran: it ends at its next step
    result: bytes | None = None  # JSON
    events: list[Event] = field(default_factory=list)

    def note(self, name: str, **data: Any) -> None:
        """Append an event."""
        self.events.append(Event(name, data))


class Worker(Protocol):
    """Who does jobs."""

    def do(self, job: Job, tell: Tell) -> bytes:
        """The result as JSON; `tell` is told of each step, and what it raises ends the job."""
        ...

    def let_go(self) -> None:
        """Nothing is to do for a while, or ever: models go."""
        ...


class JobQueue:
    """The jobs of one server. Every method may be called from any thread."""

    def __init__(self, make_worker: Callable[[], Worker], limits: Limits, redact: Callable[[str], str] = str) -> None:
        """`make_worker` is called in the working thread at its first job; `redact` makes an error's words fit to be sent."""
        self._make_worker, self._limits, self._redact = make_worker, limits, redact
        self._changed = Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._stopping = False
        self._allowed, self._counted = float(limits.burst), time.monotonic()
        self._took: deque[float] = deque(maxlen=16)
        self._thread: Thread | None = None

    def add(self, kind: JobKind, request: TraceRequest | CompareRequest, made_from: str) -> tuple[JobAnswer, bool]:
        """The job of a request, and whether it is new; one that failed or was cancelled is tried anew.

        RefusedError 429 if the queue is full or too many came at once.
        """
        key = digest_key(kind, request.model_dump(mode="json"), made_from)
        with self._changed:
            known = self._jobs.get(key)
            if known is not None and known.phase not in ("failed", "cancelled") and not known.is_unwanted:
                self._jobs.move_to_end(key)
                return self._answer(known), False
            if len(self._waiting) >= self._limits.queued:
                usual = sum(self._took) / len(self._took) if self._took else USUAL_SECONDS
                raise RefusedError(429, f"{len(self._waiting)} jobs wait already; ask again later", 1 + int(usual))
            self._spend()
            job = Job(key, kind, request)
            job.note("queued")
            self._jobs[key] = job
            self._jobs.move_to_end(key)
            self._waiting.append(job)
            self._forget_oldest()
            if self._thread is None:
                self._thread = Thread(target=self._work, name="throughline-jobs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return self._answer(job), True

    def get(self, key: str) -> Job:
        """A job; RefusedError 404 if there is none, or no more."""
        with self._changed:
            if key not in self._jobs:
                raise RefusedError(404, "there is no such job, or it was long ago; ask for it again")
            return self._jobs[key]

    def answer(self, job: Job) -> JobAnswer:
        """Where a job is now."""
        with self._changed:
            return self._answer(job)

    def cancel(self, key: str) -> JobAnswer:
        """Take a job out of the queue, or end it at its next step if it runs; RefusedError 409 if it has ended."""
        job = self.get(key)
        with self._changed:
            if job.phase in ENDED:
                raise RefusedError(409, f"the job is {job.phase}; only one that waits or runs can be cancelled")
            if job.phase == "running":
                job.is_unwanted = True
                return self._answer(job)
            self._waiting.remove(job)
            job.phase = "cancelled"
            job.note("cancelled")
            return self._answer(job)

    def stop(self, wait_seconds: float = 10.0) -> None:
        """Take on nothing more, and wait a while for the job that runs."""
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(wait_seconds)

    # ---- with the lock held

    def _answer(self, job: Job) -> JobAnswer:
        seconds = job.seconds
        if job.phase == "running" and job.began is not None:
            seconds = time.time() - job.began
        return JobAnswer(
            id=job.id,
            kind=job.kind,
            phase=job.phase,
            position=self._waiting.index(job) if job.phase == "queued" and job in self._waiting else None,
            doing=job.doing,
            step=job.step,
            num_steps=job.num_steps,
            created=job.created,
            seconds=seconds,
            error=job.error,
        )

    def _spend(self) -> None:
        """A bucket of new jobs that fills again with time."""
        now, rate = time.monotonic(), self._limits.per_minute / 60
        self._allowed = min(float(self._limits.burst), self._allowed + rate * (now - self._counted))
        self._counted = now
        if self._allowed < 1:
            wait = 1 + int((1 - self._allowed) / rate)
            raise RefusedError(429, f"more than {self._limits.per_minute:g} new jobs a minute; ask again later", wait)
        self._allowed -= 1

    def _forget_oldest(self) -> None:
        ended = [key for key, job in self._jobs.items() if job.phase in ENDED]
        for key in ended[: max(0, len(ended) - self._limits.kept)]:
            del self._jobs[key]

    # ---- the thread

    def _work(self) -> None:
        worker: Worker | None = None
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    idle = not self._changed.wait(self._limits.idle_seconds if worker else None)
                    if idle and worker is not None and not self._waiting:
                        worker.let_go()
                        worker = None
                if self._stopping:
                    break
                job = self._waiting.popleft()
                job.phase, job.began = "running", time.time()
                job.note("running")
            try:
                worker = worker or self._make_worker()
                result = worker.do(job, partial(self._tell, job))
                self._end(job, "done", result=result)
            except CancelledJobError:
                self._end(job, "cancelled")
            except ThroughlineError as error:
                self._end(job, "failed", error=self._redact(str(error)))
            except Exception:  # the next job is none the worse
                logger.exception("job %s failed", job.id)
                self._end(job, "failed", error="the server failed at this job; its log says why")
        if worker is not None:
            worker.let_go()

    def _tell(self, job: Job, doing: str, step: int, num_steps: int) -> None:
        with self._changed:
            if job.is_unwanted or self._stopping:
                raise CancelledJobError
            job.doing, job.step, job.num_steps = doing, step, num_steps
            job.note("progress", doing=doing, step=step, num_steps=num_steps)

    def _end(self, job: Job, phase: JobPhase, result: bytes | None = None, error: str | None = None) -> None:
        with self._changed:
            job.seconds = time.time() - (job.began or job.created)
            job.phase, job.result, job.error = phase, result, error
            job.note(phase, **({"error": error} if error else {}))
            self._took.append(job.seconds)
            self._forget_oldest()
