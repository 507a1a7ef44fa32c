"""A process that takes models through their stages; run, never imported, by `processes`.

`python -m throughline.executors.model_process RUN DEVICE THREADS` reads one request a line and writes what becomes of it, as JSON:

    <- {"model": "zoo/phi", "stages": ["train", …], "force": false, "look": "What is 15 + 27?"}
    -> {"say": "a line"}   {"progress": {…}}   {"trace": {…}}   {"failed": ["GateError", "a sentence"], "model": "zoo/phi"}
    -> {"done": "zoo/phi", "seconds": {"train": 12.3, …}}
    <- {"end": true}

It ends at once when its input does: whoever started it is gone, and another may go on with the run.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TextIO

from throughline import lean_imports, pipeline
from throughline.errors import ThroughlineError
from throughline.run_dir import RunDir

if TYPE_CHECKING:
    from throughline.session import Session
    from throughline.training import Progress


class _Answers:
    """What is written, a line at a time, from any thread."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, Lock()

    def write(self, **message: Any) -> None:
        with self._lock, suppress(BrokenPipeError):
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()


def _advance(session: "Session", request: Mapping[str, Any], answers: _Answers) -> None:
    """One model through the stages asked for."""
    name = request["model"]

    def report(progress: "Progress") -> None:
        answers.write(progress=asdict(progress))

    try:
        is_through = pipeline.advance_model(session, name, request["stages"], report, force=request["force"])
        if is_through and request["look"]:
            answers.write(trace=pipeline.look(session, request["look"], name).model_dump(mode="json"))
    except ThroughlineError as error:
        answers.write(failed=[type(error).__name__, str(error)], model=name)
    except Exception as error:
        answers.write(failed=["ThroughlineError", f"{type(error).__name__}: {error}"], model=name)
        traceback.print_exc()
    finally:
        session.let_go(name)
    answers.write(done=name, seconds=session.take_seconds())


def _requests(file: TextIO) -> Iterator[Mapping[str, Any]]:
    """Requests until the end is asked for. Where the input ends without it, so does this process, whatever it is doing."""
    read: SimpleQueue[Mapping[str, Any]] = SimpleQueue()

    def listen() -> None:
        for line in file:
            read.put(json.loads(line))
        os._exit(1)

    Thread(target=listen, daemon=True).start()
    while not (request := read.get()).get("end"):
        yield request


def main() -> None:
    """Work on standard input and output."""
    answers = _Answers(os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its starter's, which then ends this
    place, device, threads = sys.argv[1:]
    lean_imports.wanted = True
    lean_imports.leave_out_unused()
    import torch

    from throughline.session import Session

    torch.set_num_threads(int(threads))
    session = Session(RunDir.open(place), device, lambda line: answers.write(say=line))
    for request in _requests(sys.stdin):
        _advance(session, request, answers)


if __name__ == "__main__":
    main()
