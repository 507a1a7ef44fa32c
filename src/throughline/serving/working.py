"""The process that traces: the only module of `serving` that needs torch, and it is run, never imported, by the server.

`python -m throughline.serving.working RUN [DEVICE]` reads one request a line and writes what becomes of it, both as JSON:

    <- {"kind": "trace", "request": {…}, "made_from": "…"}
    -> {"tell": ["switching features of layer 3 off", 5, 9]}        before each step; goes on when it reads "go", ends it at "stop"
    -> {"result": "…"}  or  {"refused": "a sentence"}  or  {"failed": "a traceback"}  or  {"stopped": true}

A process of its own, since the interpreter lock would make everybody who reads wait for whoever traces; it yields to the server
(nice), gives all of its memory back when it is ended, and takes nobody with it if it is killed. It ends when its input does.
"""

import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

from throughline import lean_imports, pipeline
from throughline.api import choose_device
from throughline.errors import ThroughlineError
from throughline.run_dir import RunDir
from throughline.serving.jobs import Tell
from throughline.serving.requests import CompareRequest, TraceRequest

NICENESS = 10


class _StoppedError(Exception):
    """Somebody cancelled the job."""


class Tracer:
    """Traces prompts with what one session has open, and opens another when the run has changed."""

    def __init__(self, run: RunDir, device: str | None) -> None:
        self._run, self._device = run, device
        self._session: Any = None  # its module imports torch
        self._made_from = ""

    def do(self, request: TraceRequest | CompareRequest, made_from: str, tell: Tell) -> str:
        """A trace or a comparison as JSON; ThroughlineError if the request cannot be met. What `tell` raises ends it.

        Dictionaries that failed the gate are traced with if the run's owner insisted on that before (`--force`).
        """
        session, force = self._current(made_from), self._run.info().forced
        if isinstance(request, TraceRequest):
            name = session.study.model(request.model).name
            self._open(session, [name], tell)
            options = pipeline.trace_options(
                session.study,
                request.off,
                request.against,
                request.linearization,
                request.settings,
                request.verify,
                request.chat,
                request.answer,
                request.rival,
            )
            return pipeline.trace(session, request.prompt, name, force, options, tell).model_dump_json()
        names = request.models or [spec.name for spec in session.study.models]
        self._open(session, names, tell)
        return pipeline.compare(session, request.prompt, names, force, tell=tell).model_dump_json()

    def _current(self, made_from: str) -> Any:
        from throughline.session import Session

        if self._session is None or made_from != self._made_from:
            self._session = None  # its memory goes before another's is taken
            self._session, self._made_from = Session(self._run, choose_device(self._device)), made_from
        return self._session

    def _open(self, session: Any, names: list[str], tell: Tell) -> None:
        session.require_gate(self._run.info().forced)  # before anything large is read
        for step, name in enumerate(names, 1):
            tell(f"opening {name}", step, len(names))
            session.model(name)
            session.dictionaries(name)


def answer(tracer: Tracer, asked: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """What becomes of one request."""
    kind = TraceRequest if asked["kind"] == "trace" else CompareRequest
    try:
        return {"result": tracer.do(kind.model_validate(asked["request"]), asked["made_from"], tell)}
    except _StoppedError:
        return {"stopped": True}
    except ThroughlineError as error:
        return {"refused": str(error)}
    except Exception:  # the next request is none the worse
        return {"failed": traceback.format_exc()}


def work(tracer: Tracer, requests: TextIO, answers: TextIO) -> None:
    """Answer until there are no more requests."""

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def tell(doing: str, step: int, num_steps: int) -> None:
        say({"tell": [doing, step, num_steps]})
        if requests.readline().strip() != "go":  # "stop", or the server is gone
            raise _StoppedError

    while line := requests.readline():
        say(answer(tracer, json.loads(line), tell))


def main() -> None:
    """Work on standard input and output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which then ends this
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    lean_imports.wanted = True
    lean_imports.leave_out_unused()
    place, *device = sys.argv[1:]
    work(Tracer(RunDir.open(place), device[0] if device else None), sys.stdin, answers)


if __name__ == "__main__":
    main()
