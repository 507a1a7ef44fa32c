"""Where training's activations come from: an array, a folder of shards, an iterator; `caching` keeps a copy of any of them.

A source gives the same batches again each time it is read, so that training can be continued from any of them. How many
tokens a batch has is the source's choice; the epochs follow one another, and no batch has tokens of two.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from throughline.errors import InputError

BATCH_BYTES = 2**24  # of a batch that a source cuts from something larger
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENDINGS = (".npy", ".safetensors")

Piece: TypeAlias = "np.ndarray | Tensor"


@runtime_checkable
class ActivationSource(Protocol):
    """Activations of L layers of one width, the same again each time they are read."""

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """Batches from number `start` on (counted over all epochs); the ones before are skipped as cheaply as can be."""
        ...


# ---- one array


class ArraySource:
    """An array [N, D] (one layer) or [L, N, D], read `epochs` times; float32 batches.

    `num_tokens` takes the first so many of its N. A memory-mapped array is read as it is needed.
    """

    def __init__(self, array: np.ndarray | Tensor, *, epochs: int = 1, num_tokens: int | None = None) -> None:
        self._array, self._epochs = array, epochs
        self.num_layers, available, self.d_model = _shape_of(array, "the array of activations")
        self.num_tokens = _fewer(available, num_tokens)

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it; nothing is read to skip."""
        spans = list(_spans(self.num_tokens, self.num_layers * self.d_model))
        for number in range(start, self._epochs * len(spans)):
            first, stop = spans[number % len(spans)]
            yield _as_batch(self._array[..., first:stop, :])


def _spans(num_tokens: int, numbers_per_token: int) -> Iterator[tuple[int, int]]:
    """First token and the one after the last of each batch."""
    size = max(1, BATCH_BYTES // (4 * numbers_per_token))
    for first in range(0, num_tokens, size):
        yield first, min(first + size, num_tokens)


def _fewer(available: int, wanted: int | None) -> int:
    return available if wanted is None else min(available, wanted)


def _shape_of(piece: Any, what: str) -> tuple[int, int, int]:
    """L, N and D; InputError unless it is an array of floats [N, D] or [L, N, D]."""
    wanted = f"{what} should have shape [tokens, width] or [layers, tokens, width]"
    if not isinstance(piece, np.ndarray | Tensor):
        raise InputError(f"{wanted}, found {type(piece).__name__}")
    shape = tuple(piece.shape)
    if len(shape) not in (2, 3):
        raise InputError(f"{wanted}, found shape {shape}")
    known = piece.dtype in (*DTYPES, torch.float64) if isinstance(piece, Tensor) else piece.dtype.kind == "f"
    if not known:
        raise InputError(f"{what} should hold floating-point numbers, found {piece.dtype}")
    L, N, D = shape if len(shape) == 3 else (1, *shape)
    if not L or not D:
        raise InputError(f"{what} should have at least one layer and a width, found shape {shape}")
    return L, N, D


def _as_batch(piece: Piece) -> Tensor:
    """[L, n, D], bfloat16 if the piece is, else float32; a copy where it is a view of a file."""
    tensor = piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece, dtype=np.float32))
    tensor = tensor.detach() if tensor.dtype == torch.bfloat16 else tensor.detach().float()
    return tensor[None] if tensor.ndim == 2 else tensor


# ---- a folder of files


@dataclass(frozen=True)
class _Shard:
    """One file of activations, opened again for each batch, so that no more than a batch is in memory."""

    path: Path
    num_layers: int
    num_tokens: int
    d_model: int

    def read(self, first: int, stop: int) -> Tensor:
        """Tokens `first` to `stop` as [L, n, D] float32."""
        with _naming(self.path):
            if self.path.suffix == ".npy":
                return _as_batch(np.load(self.path, mmap_mode="r", allow_pickle=False)[..., first:stop, :])
            with safe_open(self.path, "pt") as file:
                lazy = file.get_slice(_only_tensor(file, self.path))
                two_axes = len(lazy.get_shape()) == 2
                return _as_batch(lazy[first:stop] if two_axes else lazy[:, first:stop])


class ShardSource:
    """A folder of `.npy` and `.safetensors` files (or one of them), each [N, D] or [L, N, D], in the order of their names,
    read `epochs` times.

    Numbers may be float16, bfloat16 or float32; batches are float32. A safetensors file has one tensor. Only the headers
    are read at first; InputError names the first file that is damaged or does not fit the others.
    """

    def __init__(self, folder: str | Path, *, epochs: int = 1, num_tokens: int | None = None) -> None:
        folder = Path(folder).expanduser()
        if not folder.exists():
            raise InputError(f"activations {folder} do not exist; expected a folder of .npy or .safetensors files")
        found = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        files = [file for file in found if file.suffix in ENDINGS and not file.name.startswith(".")]
        if not files:
            raise InputError(f"{folder} has no activations; expected .npy or .safetensors files")
        self._shards, self._epochs = [_describe_shard(file) for file in files], epochs
        first = self._shards[0]
        for shard in self._shards:
            if (shard.num_layers, shard.d_model) != (first.num_layers, first.d_model):
                raise InputError(
                    f"{shard.path} has {shard.num_layers} layers of width {shard.d_model}, but {first.path.name} has "
                    f"{first.num_layers} of width {first.d_model}; expected the same in all files of the folder"
                )
        self.num_layers, self.d_model = first.num_layers, first.d_model
        self.num_tokens = _fewer(sum(shard.num_tokens for shard in self._shards), num_tokens)

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it; nothing is read to skip."""
        spans, left = [], self.num_tokens
        for shard in self._shards:
            mine = min(shard.num_tokens, left)
            spans += [(shard, *span) for span in _spans(mine, self.num_layers * self.d_model)]
            left -= mine
        for number in range(start, self._epochs * len(spans)):
            shard, first, stop = spans[number % len(spans)]
            yield shard.read(first, stop)


def _describe_shard(path: Path) -> _Shard:
    """Shape of a file from its header; InputError if it cannot be read or holds something else."""
    with _naming(path):
        if path.suffix == ".npy":
            return _Shard(path, *_shape_of(np.load(path, mmap_mode="r", allow_pickle=False), str(path)))
        with safe_open(path, "pt") as file:
            lazy = file.get_slice(_only_tensor(file, path))
            like = torch.empty(lazy.get_shape(), dtype=_torch_dtype(lazy.get_dtype(), path), device="meta")
            return _Shard(path, *_shape_of(like, str(path)))


def _only_tensor(file: Any, path: Path) -> str:
    names = list(file.keys())
    if len(names) != 1:
        raise InputError(
            f"{path} should hold one tensor, found {len(names)} ({', '.join(names[:4])}); keep one in each file"
        )
    return names[0]


def _torch_dtype(name: str, path: Path) -> torch.dtype:
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    if name not in known:
        raise InputError(f"{path} should hold floating-point numbers, found {name}")
    return known[name]


class _naming:
    """Inside, whatever reading a file raises becomes an InputError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, SafetensorError | ValueError | EOFError | OSError | TypeError | KeyError):
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"{self._path} is damaged or no file of activations: {reason}; write it again") from error


# ---- an iterator


class IteratorSource:
    """Pieces [n, D] or [L, n, D] from an iterable, or from a function that starts it anew; float32 batches.

    A bare iterator (a generator) can be read once: it gives its first piece as often as asked, but InputError if it is read
    from the beginning again after that, from a later start, or for several `epochs`. `num_tokens` are those of an epoch.
    """

    def __init__(
        self,
        pieces: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        epochs: int = 1,
        num_tokens: int | None = None,
    ) -> None:
        self._pieces, self._epochs, self.num_tokens = pieces, epochs, num_tokens
        self._once = pieces if isinstance(pieces, Iterator) else None
        self._first: list[Piece] = []
        self._used = False
        if self._once is not None and epochs > 1:
            raise self._cannot(f"for {epochs} epochs")
        head = next(iter(self._epoch()), None)
        if head is None:
            raise InputError("the iterator of activations gave nothing; expected pieces [tokens, width]")
        self.num_layers, _, self.d_model = _shape_of(head, "piece 0 of the activations")

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it; the pieces before are made and thrown away."""
        if start and self._once is not None:
            raise self._cannot(f"from batch {start} on")
        return islice(self._all_batches(), start, None)

    def _all_batches(self) -> Iterator[Tensor]:
        for _ in range(self._epochs):
            left = self.num_tokens
            for number, piece in enumerate(self._epoch()):
                found = _shape_of(piece, f"piece {number} of the activations")
                if (found[0], found[2]) != (self.num_layers, self.d_model):
                    raise InputError(
                        f"piece {number} of the activations has {found[0]} layers of width {found[2]}, "
                        f"but piece 0 has {self.num_layers} of width {self.d_model}"
                    )
                batch = _as_batch(piece)[:, :left]
                if batch.shape[1]:
                    yield batch
                left = None if left is None else left - batch.shape[1]
                if left == 0:
                    break

    def _epoch(self) -> Iterator[Piece]:
        if self._once is None:
            yield from self._pieces() if callable(self._pieces) else self._pieces
            return
        if not self._first:
            self._first = list(islice(self._once, 1))
        yield from self._first
        if self._used:
            raise self._cannot("a second time")
        self._used = True
        yield from self._once

    def _cannot(self, how: str) -> InputError:
        return InputError(
            f"an iterator of activations cannot be read {how}, since it is used up; give a function that makes a fresh one"
        )


# ---- whatever the user has


class OnDevice:
    """Another source's batches on a device."""

    def __init__(self, source: ActivationSource, device: str) -> None:
        self._source, self._device = source, device

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it."""
        return (batch.to(self._device) for batch in self._source.batches(start))


def open_source(activations: Any, *, epochs: int = 1, num_tokens: int | None = None) -> ActivationSource:
    """The source of an array, a file or folder of files, an iterable or a function that makes one.

    A source of the user's own is taken as it is, with the epochs it has. InputError if it is none of these.
    """
    options: dict[str, Any] = {"epochs": epochs, "num_tokens": num_tokens}
    if isinstance(activations, ActivationSource):
        return activations
    if isinstance(activations, np.ndarray | Tensor):
        return ArraySource(activations, **options)
    if isinstance(activations, str | Path):
        return ShardSource(activations, **options)
    if isinstance(activations, Iterable) or callable(activations):
        pieces: Any = activations
        return IteratorSource(pieces, **options)
    raise InputError(
        "activations should be an array, a folder of .npy or .safetensors files, an iterator of arrays or a function that "
        f"makes one; found {type(activations).__name__}"
    )
