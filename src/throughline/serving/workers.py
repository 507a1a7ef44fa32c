"""The server's side of the process that traces (`working`)."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from throughline.errors import ThroughlineError
from throughline.serving.jobs import CancelledJobError, Job, Tell

logger = logging.getLogger(__name__)
END_SECONDS = 5.0  # that the process gets to end by itself
GONE = "the process that traces was ended (out of memory, or killed); the next prompt starts another"


class TracingProcess:
    """A process that does one job after another. It is started by its first job, and again by the one after it was lost."""

    def __init__(self, place: str, device: str | None, fingerprint: Callable[[], str]) -> None:
        """`place` is that of the run; `fingerprint()` is another when the run was made anew."""
        self._command = [sys.executable, "-m", "throughline.serving.working", place, *([device] if device else [])]
        self._fingerprint = fingerprint
        self._process: subprocess.Popen[str] | None = None

    def do(self, job: Job, tell: Tell) -> bytes:
        """The result as JSON; ThroughlineError if the request cannot be met, or if the process is lost."""
        was_there = self._process is not None
        asked = {"kind": job.kind, "request": job.request.model_dump(mode="json"), "made_from": self._fingerprint()}
        try:
            found = self._ask(json.dumps(asked))
        except ThroughlineError:
            if not was_there:
                raise
            found = self._ask(json.dumps(asked))  # it was lost while nothing was to do: another is started
        while "tell" in found:
            try:
                tell(*found["tell"])
            except CancelledJobError:
                self._ask("stop")
                raise
            found = self._ask("go")
        if "refused" in found:
            raise ThroughlineError(found["refused"])
        if "failed" in found:
            logger.error("job %s failed\n%s", job.id, found["failed"])
            raise ThroughlineError("the server failed at this job; its log says why")
        return found["result"].encode()

    def let_go(self) -> None:
        """End the process: all that it held is given back."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin and process.stdout
        try:
            process.stdin.close()
            process.wait(END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        finally:
            process.stdout.close()

    def _ask(self, line: str) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self.let_go()
            raise ThroughlineError(GONE)
        return json.loads(answer)
