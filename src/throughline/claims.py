"""Who works on what: a file that says which process holds a run, or the layers of a job.

A run is held by one driver: a second one is refused while the first lives. A job's layers belong to whoever took them last: when
a worker is thought dead and its job given to another, the first one, should it still live, finds at its next write that the
claim is no longer its own and stops. Between looking and writing another may take it; both would then write the same bits, since
training is a function of study and seed, and each file takes its place at once.

Claims lie where the run does, at its URL if it has one (`storage.Slot`), so that processes which share nothing else see them.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from throughline.errors import HeldError, ThroughlineError, TrainingError
from throughline.storage import Slot, hurried

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without a beat, after which a holder on another machine is taken to be gone


class Claim:
    """This process's claim on the layers of a job."""

    def __init__(self, slot: Slot, token: str) -> None:
        self._slot, self._token, self._looked = slot, token, time.monotonic()

    def check(self) -> None:
        """Raise TrainingError if another process has taken it since."""
        found = _read(self._slot)
        if found.get("token") != self._token:
            raise TrainingError(f"{self._slot.path.parent.name} was given to {_who(found)}; this process stops")
        self._looked = time.monotonic()

    def glance(self) -> None:
        """The same for who asks all the time: where looking takes long, every few seconds."""
        if time.monotonic() - self._looked >= self._slot.seconds:
            self.check()


def take(slot: Slot) -> Claim:
    """A claim that outdoes all earlier ones."""
    mine = _new_claim()
    _write(slot, mine)
    return Claim(slot, mine["token"])


@contextmanager
def hold(slot: Slot, what: str) -> Iterator[None]:
    """Hold `what` alone: HeldError says who has it. Let go at the end; a process that was killed holds nothing."""
    found, mine = _read(slot), _new_claim()
    if _is_alive(found):
        raise HeldError(f"{what} is held by {_who(found)}; wait for it, or stop it")
    if found:
        _write(slot, mine)
    elif not slot.create(_text_of(mine)):
        raise HeldError(f"{what} is held by {_who(_read(slot))}; wait for it, or stop it")
    slot.settle()
    found = _read(slot)
    if found.get("token") != mine["token"]:  # another came at the same moment
        raise HeldError(f"{what} is held by {_who(found)}; wait for it, or stop it")
    with beating(lambda: _renew(slot, mine)):
        try:
            yield
        finally:
            with suppress(ThroughlineError), hurried():  # if the network is lost, the claim ends with this process
                if _read(slot).get("token") == mine["token"]:
                    slot.remove()


@contextmanager
def beating(beat: Callable[[], Any], seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """`beat` every few seconds from a thread, while the block runs; a beat that fails for want of a disk or network is left out."""
    over = Event()

    def run() -> None:
        while not over.wait(seconds):
            with suppress(OSError, ThroughlineError), hurried():
                beat()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _new_claim() -> dict[str, Any]:
    return {
        "token": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
    }


def _text_of(claim: dict[str, Any]) -> str:
    return json.dumps(claim | {"beat": time.time()})


def _write(slot: Slot, claim: dict[str, Any]) -> None:
    slot.write(_text_of(claim))


def _renew(slot: Slot, mine: dict[str, Any]) -> None:
    """A sign of life; none over the claim of another, who took this process to be gone."""
    if _read(slot).get("token") == mine["token"]:
        _write(slot, mine)


def _read(slot: Slot) -> dict[str, Any]:
    try:
        found = json.loads(slot.read())
    except ValueError:
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
