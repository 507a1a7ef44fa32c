"""Models side by side on the cores of this machine: each goes through its stages in a process of its own.

Products of narrow models are too small to be divided between cores, and much around them (the interpreter, tables, the search for
labels) runs on one core. So each process takes a model, with an equal share of the threads, and then the next one that waits.
What processes make lies in the run folder: if one is killed, another goes on with its model from the checkpoint.
"""

import json
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, TypeAlias

import throughline.errors as errors
from throughline.errors import ThroughlineError, TrainingError
from throughline.records import Trace
from throughline.session import Session
from throughline.training import Progress

NARROW = 256  # d_model below which one core is enough for a product
LOOK_SECONDS = 0.2  # between looks at whether Ctrl-C was pressed
END_SECONDS = 5.0  # that a process gets to end by itself
MOST_LOSSES = 3  # of processes with one model, which then seems to be what kills them
MODEL_PROCESS = "throughline.executors.model_process"
# Each of these libraries would start a thread per core, and threads that wait spin, which takes the cores from other processes.
THREAD_COUNT_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
Message = Mapping[str, Any]
_Event: TypeAlias = "tuple[_Process, Message]"


class SideBySide(NamedTuple):
    """How many processes a study's models are divided among, and the threads of each."""

    processes: int
    threads: int


def divide_cores(session: Session, widths: Mapping[str, int | None]) -> SideBySide | None:
    """How the study's models share the cores; None if they are to go one after another.

    `widths` is d_model of every model. It depends on the study and the machine alone, not on what is left to do, so that a
    training that goes on has the threads with which it began.
    """
    executor, cores = session.study.executor, session.num_threads
    if executor.kind != "local" or session.device != "cpu" or session.run.storage.is_remote:
        return None
    wanted = executor.processes
    if wanted is None:
        narrow = all(width is not None and width < NARROW for width in widths.values())
        wanted = cores if narrow else 1
    processes = min(wanted, cores, len(widths))
    return SideBySide(processes, cores // processes) if processes > 1 else None


def advance_models(
    session: Session,
    division: SideBySide,
    models: Sequence[str],
    stages: Sequence[str],
    report: Callable[[Progress], None],
    *,
    force: bool = False,
    look: str | None = None,
    on_trace: Callable[[Trace], None] | None = None,
) -> list[tuple[str, ThroughlineError]]:
    """Take `models` through `stages`, in this order; returns what failed, by model.

    A model whose dictionaries fail the gate goes no further, unless `force`. `on_trace` is given a trace of the prompt `look` in
    the first model, as soon as that has labels. A model whose process is lost goes on in another.
    """
    waiting, failures, losses = deque(models), [], Counter[str]()
    events: SimpleQueue[_Event] = SimpleQueue()
    processes = [_Process(session, division.threads, events) for _ in range(min(division.processes, len(waiting)))]

    def give(process: _Process) -> bool:
        if not waiting:
            process.end()
            return False
        model = waiting.popleft()
        traced = look if on_trace and model == models[0] else None
        process.do({"model": model, "stages": list(stages), "force": force, "look": traced})
        return True

    try:
        busy = sum(give(process) for process in processes)
        while busy:
            process, message = _next_of(events)
            if "say" in message:
                session.say(message["say"])
            elif "progress" in message:
                report(Progress(**message["progress"]))
            elif "trace" in message and on_trace:
                on_trace(Trace.model_validate(message["trace"]))
            elif "failed" in message:
                failures.append((message["model"], _error_of(*message["failed"])))
            elif "done" in message:
                session.add_seconds(message["seconds"])
                busy -= not give(process)
            elif "lost" in message:
                model, ended = process.model, "its process was ended (out of memory, or killed)"
                losses[model] += 1
                if losses[model] < MOST_LOSSES:
                    session.say(f"{model}: {ended}; another goes on from its last checkpoint")
                    waiting.appendleft(model)
                else:
                    advice = "with executor.processes 1 it has all memory to itself"
                    failures.append((model, TrainingError(f"{ended} {MOST_LOSSES} times; {advice}")))
                process.kill()
                processes.remove(process)
                if waiting:
                    processes.append(_Process(session, division.threads, events))
                    give(processes[-1])
                else:
                    busy -= 1
    finally:
        for process in processes:
            process.kill()
    return sorted(failures, key=lambda failure: models.index(failure[0]))


class _Process:
    """A process that takes one model after another; what it says is put into `events`."""

    def __init__(self, session: Session, threads: int, events: "SimpleQueue[_Event]") -> None:
        command = [sys.executable, "-m", MODEL_PROCESS]
        command += [session.run.place, session.device, str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | dict.fromkeys(THREAD_COUNT_VARIABLES, str(threads)),
        )
        self.model = ""
        self._events, self._ended = events, False
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    def do(self, request: Message) -> None:
        """Begin with a model."""
        self.model = request["model"]
        self._write(request)

    def end(self) -> None:
        """There is nothing more to do."""
        self._ended = True
        self._write({"end": True})

    def kill(self) -> None:
        """Take it away, whatever it does; one that was told to end may do so first."""
        try:
            self._process.wait(END_SECONDS if self._ended else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def _write(self, request: Message) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone: the listener says so
            pass

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._events.put((self, json.loads(line)))
        if not self._ended:
            self._events.put((self, {"lost": True}))


def _next_of(events: "SimpleQueue[_Event]") -> "_Event":
    """What comes next. Polars has the system restart calls that Ctrl-C interrupts, so that one that waits on would not notice."""
    while True:
        try:
            return events.get(timeout=LOOK_SECONDS)
        except Empty:
            continue


def _error_of(kind: str, sentence: str) -> ThroughlineError:
    """The error as it was raised in the process."""
    found = getattr(errors, kind, ThroughlineError)
    return found(sentence)
