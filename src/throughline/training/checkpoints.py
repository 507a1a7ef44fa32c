"""The state of a training on disk: one file, replaced whole, so that a half-written one is never seen.

It holds every tensor of every group and, in its header, the step, the cursor of the next chunk and the key of what is trained.
Random numbers need no state: their generators are made from seed, layer, step and chunk.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from throughline.files import replacing
from throughline.training.chunks import Cursor

SAVING_SHARE = 0.02  # of the time may go into checkpoints, however often they are asked for
FILE = "state.safetensors"
FORM = 2  # of what it holds: 2 has the limits of attention sinks


class Checkpoint(NamedTuple):
    """After `step` steps; the next chunk begins at `cursor`."""

    step: int
    cursor: Cursor
    tensors: dict[str, Tensor]


class Checkpoints:
    """Where one training is saved, and how often: every `minutes`, or more rarely if saving is slow; 0 is after each chunk."""

    def __init__(
        self,
        folder: Path,
        key: str,
        minutes: float,
        say: Callable[[str], None] = lambda line: None,
        check: Callable[[], None] = lambda: None,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is asked before each checkpoint takes its place, and raises if it may not; `saved` is called when it has."""
        self._check, self._saved = check, saved
        self._path, self._key, self._minutes, self._say = folder / FILE, key, minutes, say
        self._last, self._cost = time.monotonic(), 0.0

    def load(self) -> Checkpoint | None:
        """The latest checkpoint, if there is one of this training; a damaged one is named and left out of account."""
        for half_written in self._path.parent.glob(f".{FILE}.*"):  # by a process that was killed
            half_written.unlink(missing_ok=True)
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, "pt") as file:
                header = json.loads((file.metadata() or {})["throughline"])
                # copied: products of numbers that do not begin at a multiple of 64 bytes may differ in their last bits
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            self._say(
                f"checkpoint {self._path} is damaged ({next(iter(str(error).splitlines()), '')}); training begins anew"
            )
            return None
        if header.get("form") != FORM:
            self._say(f"checkpoint {self._path} is of another version; training begins anew")
            return None
        if header["key"] != self._key:
            self._say(f"checkpoint {self._path} is of other settings; training begins anew")
            return None
        if header["digest"] != _digest(tensors):
            self._say(f"checkpoint {self._path} does not match its checksum; training begins anew")
            return None
        return Checkpoint(header["step"], Cursor(*header["cursor"]), tensors)

    def is_due(self) -> bool:
        """True when the last one is old enough."""
        wait = 60 * self._minutes
        return time.monotonic() - self._last >= max(wait, self._cost / SAVING_SHARE if wait else 0.0)

    def save(self, step: int, cursor: Cursor, tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint."""
        started = time.monotonic()
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        header = {"form": FORM, "key": self._key, "step": step, "cursor": list(cursor), "digest": _digest(tensors)}
        with replacing(self._path) as temporary:
            save_file(tensors, temporary, metadata={"throughline": json.dumps(header)})
            self._check()
        self._saved()
        self._last = time.monotonic()
        self._cost = self._last - started

    def remove(self) -> None:
        """Training is done."""
        self._path.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes and a sample of bytes: the file's own structure shows a truncation, this a mix-up."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1)
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].numpy().tobytes())
    return digest.hexdigest()
