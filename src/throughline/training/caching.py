"""Activations kept on disk, so that what is costly to make is made once."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from throughline.errors import DamagedFileError, TrainingError
from throughline.files import replacing
from throughline.training.sources import ActivationSource

SHARD_BYTES = 2**28  # of a file, which is held in memory until it is written
SPARE_BYTES = 2**26  # left free on the disk
INDEX = "index.json"

Say = Callable[[str], None]


class CachedSource:
    """Another source's batches, written to `folder` as they are first read, and read from there afterwards, bit by bit the same.

    `source` is one epoch, of at most `num_tokens`; this one has `epochs` of them, on `device`. `key` says what the activations were
    made from: a folder of another key is written anew. Its size is said before anything is written. Writing goes on where it was
    stopped; a file that does not match its checksum is named and made again. TrainingError if the disk has not enough room.

        folder/shard_00000.safetensors   tensors `0000000`, `0000001`, …, a batch each
        folder/index.json                written after each shard: what they hold, and whether that is all
    """

    def __init__(
        self,
        source: ActivationSource,
        folder: str | Path,
        *,
        num_tokens: int,
        epochs: int = 1,
        key: str = "",
        device: str = "cpu",
        say: Say = lambda line: None,
    ) -> None:
        self._source, self._folder, self._key = source, Path(folder), key
        self._num_tokens, self._epochs, self._device, self._say = num_tokens, epochs, device, say
        self._checked: set[str] = set()
        self._announced = False

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it; once written, nothing is read to skip."""
        passed = 0  # batches of the epochs before
        for _ in range(self._epochs):
            index = self._index()
            if not (index["complete"] and start >= passed + _num_batches(index)):
                yield from self._epoch(index, max(0, start - passed))
                index = self._index()
            passed += _num_batches(index)

    def _epoch(self, index: dict[str, Any], start: int) -> Iterator[Tensor]:
        for shard in index["shards"]:
            if start < shard["stop"]:
                yield from self._read(shard, max(start, shard["start"]))
        if not index["complete"]:
            yield from self._write(index, start)

    def _read(self, shard: dict[str, Any], start: int) -> Iterator[Tensor]:
        path = self._folder / shard["name"]
        if shard["name"] not in self._checked:
            if _checksum(path) != shard["crc32"]:
                self._say(f"{path} does not match its checksum; it is made again")
                again = islice(self._source.batches(shard["start"]), shard["stop"] - shard["start"])
                self._save(path, shard["start"], [batch.cpu() for batch in again])
                if _checksum(path) != shard["crc32"]:
                    raise DamagedFileError(
                        f"{path} was damaged and comes out otherwise when made again; remove {self._folder} to write it anew"
                    )
            self._checked.add(shard["name"])
        with safe_open(path, "pt") as file:
            for number in range(start, shard["stop"]):
                yield file.get_tensor(_tensor_name(number)).to(self._device)

    def _write(self, index: dict[str, Any], start: int) -> Iterator[Tensor]:
        """Batches from the first that is not in the folder on, given out from `start` on, and kept."""
        number = written = _num_batches(index)
        held: list[Tensor] = []
        for batch in self._source.batches(written):
            if not self._announced:
                self._announce(batch, index)
                self._announced = True
            held.append(batch.cpu())
            if number >= start:
                yield batch.to(self._device)
            number += 1
            if sum(b.nbytes for b in held) >= SHARD_BYTES:
                self._keep(index, held, number)
                held = []
        if held:
            self._keep(index, held, number)
        index["complete"] = True
        self._write_index(index)

    def _announce(self, batch: Tensor, index: dict[str, Any]) -> None:
        per_token = batch.nbytes // batch.shape[1]
        needed = max(0, self._num_tokens - sum(shard["tokens"] for shard in index["shards"])) * per_token
        self._say(
            f"activations of {self._num_tokens:,} tokens are kept in {self._folder}: {needed / 1e9:.2f} GB to write"
        )
        self._require(needed)

    def _require(self, needed: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free - SPARE_BYTES
        if free < needed:
            raise TrainingError(
                f"the activations need {needed / 1e9:.2f} GB in {self._folder}, where {max(0, free) / 1e9:.2f} GB are free: "
                f"{(needed - free) / 1e9:.2f} GB are missing; make room, or train without keeping activations"
            )

    def _keep(self, index: dict[str, Any], held: list[Tensor], stop: int) -> None:
        name = f"shard_{len(index['shards']):05}.safetensors"
        start = stop - len(held)
        self._save(self._folder / name, start, held)
        described = {"name": name, "start": start, "stop": stop, "tokens": sum(batch.shape[1] for batch in held)}
        index["shards"].append(described | {"crc32": _checksum(self._folder / name)})
        self._checked.add(name)
        self._write_index(index)

    def _save(self, path: Path, start: int, batches: list[Tensor]) -> None:
        self._require(sum(batch.nbytes for batch in batches))
        tensors = {_tensor_name(start + i): batch.contiguous() for i, batch in enumerate(batches)}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise TrainingError(
                    f"the disk of {self._folder} is full; make room, or train without keeping activations"
                ) from error
            raise

    def _index(self) -> dict[str, Any]:
        """What the folder holds; nothing, if it has no index of this key that can be read."""
        nothing = {"key": self._key, "complete": False, "shards": []}
        path = self._folder / INDEX
        if not path.is_file():
            return nothing
        try:
            index = json.loads(path.read_text())
            key, _ = (
                index["key"],
                [(s["name"], s["start"], s["stop"], s["tokens"], s["crc32"]) for s in index["shards"]],
            )
            assert isinstance(index["complete"], bool)
        except (ValueError, KeyError, TypeError, AssertionError):
            self._say(f"{path} is damaged; the activations are written anew")
            return nothing
        if key != self._key:
            self._say(f"{self._folder} holds activations of other settings; they are written anew")
            return nothing
        return index

    def _write_index(self, index: dict[str, Any]) -> None:
        with replacing(self._folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1) + "\n")


def _num_batches(index: dict[str, Any]) -> int:
    return index["shards"][-1]["stop"] if index["shards"] else 0


def _tensor_name(number: int) -> str:
    return f"{number:07}"


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file, read a piece at a time; None if there is none."""
    if not path.is_file():
        return None
    found = 0
    with path.open("rb") as file:
        while piece := file.read(2**22):
            found = crc32(piece, found)
    return found
