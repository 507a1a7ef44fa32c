"""Where training's activations come from: an array, a folder of shards, an iterator; `caching` keeps a copy of any of them.

A source gives the same batches again each time it is read, so that training can be continued from any of them. How many
tokens a batch has is the source's choice; the epochs follow one another, and no batch has tokens of two.
"""

import inspect
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


def _shape_of(piece: Any, what: str, needs_numbers: bool = True) -> tuple[int, int, int]:
    """L, N and D; InputError unless it is an array of floats [N, D] or [L, N, D] that has its numbers, if those are needed."""
    wanted = f"{what} should have shape [tokens, width] or [layers, tokens, width]"
    if not isinstance(piece, np.ndarray | Tensor):
        raise InputError(f"{wanted}, found {type(piece).__name__}")
    if isinstance(piece, np.ma.MaskedArray):
        raise InputError(
            f"{what} should have all of its numbers, found a masked array; give one without a mask (.filled(…))"
        )
    if isinstance(piece, Tensor) and (piece.layout != torch.strided or piece.is_nested):
        found = "a nested tensor" if piece.is_nested else f"layout {piece.layout}"
        raise InputError(f"{what} should be a dense tensor, found {found}; give one that .to_dense() or padding makes")
    shape = tuple(piece.shape)
    if len(shape) not in (2, 3):
        raise InputError(f"{wanted}, found shape {shape}")
    known = piece.dtype in (*DTYPES, torch.float64) if isinstance(piece, Tensor) else piece.dtype.kind == "f"
    if not known:
        raise InputError(f"{what} should hold floating-point numbers, found {piece.dtype}")
    if needs_numbers and isinstance(piece, Tensor) and piece.is_meta:
        raise InputError(f"{what} has a shape and no numbers, found a tensor on the device meta; give one with numbers")
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
        available = sum(shard.num_tokens for shard in self._shards)
        if not available:
            raise InputError(f"the activations in {folder} are empty; write one row or more")
        self.num_tokens = _fewer(available, num_tokens)

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
            return _Shard(path, *_shape_of(like, str(path), needs_numbers=False))


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
            # numpy takes whatever is no array of its own for a pickle, and advises to read it in a way that runs its code
            if "allow_pickle" in reason or "Python objects" in reason:
                raise InputError(
                    f"{self._path} is no array of numbers (a pickled one can run code when read, so it is not read); write one of "
                    "floating-point numbers with numpy.save(…, allow_pickle=False)"
                ) from None
            raise InputError(f"{self._path} is damaged or no file of activations: {reason}; write it again") from error


# ---- an iterator


class IteratorSource:
    """Pieces [n, D] or [L, n, D] from an iterable, or from a function that starts it anew; float32 batches.

    A bare iterator (a generator) can be read once: it gives its first piece as often as asked, but InputError if it is read
    from the beginning again after that, from a later start, or for several `epochs`. `num_tokens` are those of an epoch;
    `ended_after` says how many there were in one that had fewer.
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
        self.ended_after: int | None = None
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
            if left and self.num_tokens:
                self.ended_after = self.num_tokens - left

    def _epoch(self) -> Iterator[Piece]:
        if self._once is None:
            yield from _call(self._pieces) if callable(self._pieces) else self._pieces
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


def _call(make_pieces: Callable[[], Any]) -> Iterable[Any]:
    """What the user's function returns; InputError unless it can be called without arguments and gives an iterable of pieces."""
    _require_call(make_pieces, "the function that makes activations should need no argument")
    pieces = make_pieces()
    if isinstance(pieces, np.ndarray | Tensor) or not isinstance(pieces, Iterable):
        raise InputError(
            "the function that makes activations should return an iterator of arrays [tokens, width], found "
            f"{type(pieces).__name__}; write it with yield, or give an array itself"
        )
    return pieces


def _require_call(function: Callable[..., Any], sentence: str, *args: Any) -> None:
    """InputError with `sentence` if a function does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of something built in, which does not say
        return
    try:
        signature.bind(*args)
    except TypeError:
        raise InputError(
            f"{sentence}, found {getattr(function, '__name__', type(function).__name__)}{signature}"
        ) from None


# ---- whatever the user has


class CheckedSource:
    """A source of the user's own, each of whose batches is looked at: InputError if it is not what the protocol has."""

    def __init__(self, source: ActivationSource) -> None:
        if isinstance(source, type):
            raise InputError(
                f"activations should be a source, found the class {source.__name__}; give one made from it"
            )
        _require_call(source.batches, "batches of a source of activations should take the number of its first batch", 0)
        self._source = source
        self.num_tokens = getattr(source, "num_tokens", None)

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "L n D"]]:
        """As the protocol has it."""
        batches = self._source.batches(start)
        if not isinstance(batches, Iterable):
            raise InputError(
                f"batches of a source of activations should give an iterator of tensors, found {type(batches).__name__}"
            )
        first: tuple[int, int] | None = None
        for number, batch in enumerate(batches, start):
            what = f"batch {number} of the source of activations"
            if not isinstance(batch, Tensor) or batch.ndim != 3:
                found = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
                raise InputError(f"{what} should be a tensor [layers, tokens, width], found {found}")
            L, _, D = _shape_of(batch, what)
            if first and first != (L, D):
                raise InputError(
                    f"{what} has {L} layers of width {D}, but the ones before have {first[0]} of width {first[1]}"
                )
            first = L, D
            yield batch


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
        return CheckedSource(activations)
    if isinstance(activations, np.ndarray | Tensor):
        if not _shape_of(activations, "the array of activations")[1]:
            raise InputError(
                f"the array of activations is empty, found shape {tuple(activations.shape)}; give one row or more"
            )
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
