"""Who works on what: a file that says which process holds a run, or the layers of a job.

A run is held by one driver: a second one is refused while the first lives. A job's layers belong to whoever took them last: when
a worker is thought dead and its job given to another, the first one, should it still live, finds at its next write that the
claim is no longer its own and stops. Between looking and writing another may take it; both would then write the same bits, since
training is a function of study and seed, and each file takes its place at once.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from throughline.errors import HeldError, TrainingError
from throughline.files import replacing

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without a beat, after which a holder on another machine is taken to be gone


@dataclass(frozen=True)
class Claim:
    """This process's claim on the layers of a job."""

    path: Path
    token: str

    def check(self) -> None:
        """Raise TrainingError if another process has taken it since."""
        found = _read(self.path)
        if found.get("token") != self.token:
            raise TrainingError(f"{self.path.parent.name} was given to {_who(found)}; this process stops")


def take(path: Path) -> Claim:
    """A claim that outdoes all earlier ones."""
    return Claim(path, _write(path)["token"])


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold `what` alone: HeldError says who has it. Let go at the end; a process that was killed holds nothing."""
    found = _read(path)
    if _is_alive(found):
        raise HeldError(f"{what} is held by {_who(found)}; wait for it, or stop it")
    mine = _write(path)
    if _read(path).get("token") != mine["token"]:  # another came at the same moment
        raise HeldError(f"{what} is held by {_who(_read(path))}; wait for it, or stop it")
    with beating(lambda: _write(path, mine)):
        try:
            yield
        finally:
            if _read(path).get("token") == mine["token"]:
                path.unlink(missing_ok=True)


@contextmanager
def beating(beat: Callable[[], Any], seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """`beat` every few seconds from a thread, while the block runs; a beat that fails for want of a disk is left out."""
    over = Event()

    def run() -> None:
        while not over.wait(seconds):
            with suppress(OSError):
                beat()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _write(path: Path, claim: dict[str, Any] | None = None) -> dict[str, Any]:
    claim = claim or {
        "token": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(claim | {"beat": time.time()}))
    return claim


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(claim: dict[str, Any]) -> bool:
    """True if its process runs, where that can be seen; elsewhere, if it gave a sign lately."""
    if not claim:
        return False
    if claim.get("host") == socket.gethostname():
        return claim.get("born") is not None and _born(claim["pid"]) == claim["born"]
    return time.time() - claim.get("beat", 0) < SILENT_SECONDS


def _born(pid: int) -> str | None:
    """When a process of this machine was started; None if it is gone. A number is given to another process in time."""
    try:
        with Path(f"/proc/{pid}/stat").open() as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc").is_dir() else _answers(pid)
    return None if fields[0] == "Z" else fields[19]


def _answers(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "running"


def _who(claim: dict[str, Any]) -> str:
    return f"process {claim.get('pid', '?')} on {claim.get('host', '?')}" if claim else "nobody"
