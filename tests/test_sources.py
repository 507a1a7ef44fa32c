"""Activation sources: the same batches each time, from any of them on, in bounded memory; and what is wrong, in one line."""

import json
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from throughline.errors import DamagedFileError, InputError, TrainingError
from throughline.training import caching, sources
from throughline.training.caching import CachedSource
from throughline.training.sources import (
    ActivationSource,
    ArraySource,
    IteratorSource,
    OnDevice,
    ShardSource,
    open_source,
)

L, N, D = 2, 103, 6
EPOCHS = 3


def activations(layers: int = L, tokens: int = N, seed: int = 0) -> Tensor:
    return torch.randn(layers, tokens, D, generator=torch.Generator().manual_seed(seed))


X = activations()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Batches of 10 tokens where a source chooses, and cache files of two or three batches."""
    monkeypatch.setattr(sources, "BATCH_BYTES", 10 * L * D * 4)
    monkeypatch.setattr(caching, "SHARD_BYTES", 25 * L * D * 4)


def pieces() -> Iterator[Tensor]:
    yield from X.split(17, dim=1)


def write_shards(folder: Path) -> Path:
    folder.mkdir()
    np.save(folder / "a.npy", X[:, :31].numpy())
    save_file({"anything": X[:, 31:40].contiguous()}, folder / "b.safetensors")
    np.save(folder / "c.npy", X[:, 40:].numpy())
    (folder / "notes.txt").write_text("is no shard")
    return folder


def make(kind: str, folder: Path, epochs: int = EPOCHS) -> ActivationSource:
    if kind == "array":
        return ArraySource(X, epochs=epochs)
    if kind == "shards":
        return ShardSource(write_shards(folder / "shards"), epochs=epochs)
    if kind == "iterator":
        return IteratorSource(pieces, epochs=epochs)
    return CachedSource(IteratorSource(pieces), folder / "cache", num_tokens=N, epochs=epochs)


def whole(source: ActivationSource, start: int = 0) -> Tensor:
    return torch.cat(list(source.batches(start)), dim=1)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- every source


@pytest.mark.parametrize("kind", ["array", "shards", "iterator", "cached"])
def test_batches_are_the_same_again_from_anywhere(kind, tmp_path):
    source = make(kind, tmp_path)
    batches = list(source.batches())
    assert all(b.dtype == torch.float32 and b.shape[0] == L and b.shape[2] == D for b in batches)
    assert torch.equal(torch.cat(batches, dim=1), torch.cat([X] * EPOCHS, dim=1))
    per_epoch = len(batches) // EPOCHS
    for start in (0, 1, per_epoch - 1, per_epoch, per_epoch + 2, len(batches) - 1, len(batches), len(batches) + 5):
        again = list(source.batches(start))
        assert len(again) == max(0, len(batches) - start)
        assert all(torch.equal(a, b) for a, b in zip(again, batches[start:], strict=True))
    moved = OnDevice(source, "meta")
    assert all(batch.is_meta for batch in moved.batches(2)) and isinstance(moved, ActivationSource)


@pytest.mark.parametrize("kind", ["array", "shards", "iterator"])
@pytest.mark.parametrize("most", [1, 20, 35, N, 10 * N])
def test_the_first_tokens_only(kind, most, tmp_path):
    given = {"array": X, "shards": tmp_path / "shards", "iterator": pieces}[kind]
    if kind == "shards":
        write_shards(tmp_path / "shards")
    source = open_source(given, epochs=2, num_tokens=most)
    assert torch.equal(whole(source), torch.cat([X[:, :most]] * 2, dim=1))


# ---- arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_arrays_of_one_layer(dtype):
    array = X[0].numpy().astype(dtype)
    source = ArraySource(array)
    assert (source.num_layers, source.num_tokens, source.d_model) == (1, N, D)
    assert torch.equal(whole(source), torch.from_numpy(array).float()[None])


def test_torch_arrays_keep_no_gradient_and_no_dtype():
    source = ArraySource(X.clone().requires_grad_().bfloat16())
    assert not whole(source).requires_grad and torch.equal(whole(source), X.bfloat16().float())


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (
            np.zeros(3, np.float32),
            r"should have shape \[tokens, width\] or \[layers, tokens, width\], found shape \(3,\)",
        ),
        (np.zeros((1, 2, 3, 4)), r"found shape \(1, 2, 3, 4\)"),
        (np.zeros((2, 3), int), "should hold floating-point numbers, found int64"),
        (torch.zeros(2, 3, dtype=torch.int32), "should hold floating-point numbers, found torch.int32"),
        (np.zeros((0, 2, 3)), r"at least one layer and a width, found shape \(0, 2, 3\)"),
        (np.zeros((2, 0)), "at least one layer and a width"),
        (np.zeros((0, 4)), r"is empty, found shape \(0, 4\)"),
        (np.ma.masked_array(np.zeros((2, 4)), np.eye(2, 4)), "should have all of its numbers, found a masked array"),
        (torch.zeros(2, 4).to_sparse(), "should be a dense tensor, found layout torch.sparse_coo"),
        (torch.zeros(2, 4, device="meta"), "has a shape and no numbers, found a tensor on the device meta"),
    ],
)
def test_arrays_of_another_kind(array, expected):
    with pytest.raises(InputError, match=expected) as error:
        open_source(array)
    one_line(error)


def test_memory_stays_bounded(tmp_path):
    """A file of 40 MB read in batches of 1 MB."""
    np.save(tmp_path / "large.npy", np.zeros((100_000, 100), np.float32))
    sources.BATCH_BYTES = 2**20
    for source in (ShardSource(tmp_path), ArraySource(np.load(tmp_path / "large.npy", mmap_mode="r"))):
        tracemalloc.start()
        assert sum(batch.shape[1] for batch in source.batches()) == 100_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * 2**20


# ---- folders


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", ["ND", "LND"])
def test_safetensors_of_every_dtype(tmp_path, dtype, shape):
    x = (X[0] if shape == "ND" else X).to(dtype)
    save_file({"x": x.clone()}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors", str(tmp_path)):  # a file alone, too
        assert torch.equal(whole(ShardSource(path)), x.float().reshape(-1, N, D))


def spoil(folder: Path, how: str) -> str:
    """Damage the folder; returns the name of the bad file."""
    if how == "width":
        np.save(folder / "bb.npy", np.zeros((L, 4, D + 1), np.float32))
        return "bb.npy"
    if how == "layers":
        np.save(folder / "bb.npy", np.zeros((4, D), np.float32))
        return "bb.npy"
    if how == "truncated npy":
        (folder / "c.npy").write_bytes((folder / "c.npy").read_bytes()[:-50])
        return "c.npy"
    if how == "truncated safetensors":
        (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-50])
        return "b.safetensors"
    if how == "pickle":
        np.save(folder / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        return "c.npy"
    if how == "pickled text":
        (folder / "c.npy").write_bytes(pickle.dumps("some text"))
        return "c.npy"
    if how == "empty":
        (folder / "a.npy").write_bytes(b"")
        return "a.npy"
    if how == "two tensors":
        save_file({"x": X.clone(), "y": X.clone()}, folder / "b.safetensors")
        return "b.safetensors"
    save_file({"x": X.int()}, folder / "b.safetensors")
    return "b.safetensors"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("width", "has 2 layers of width 7, but a.npy has 2 of width 6; expected the same in all files"),
        ("layers", "has 1 layers of width 6, but a.npy has 2 of width 6"),
        ("truncated npy", "is damaged or no file of activations: .*; write it again"),
        ("truncated safetensors", "is damaged or no file of activations: "),
        ("pickle", r"is no array of numbers \(a pickled one can run code .*; write one of .*allow_pickle=False\)"),
        ("pickled text", r"is no array of numbers \(a pickled one can run code when read, so it is not read\)"),
        ("empty", "is damaged or no file of activations: "),
        ("two tensors", r"should hold one tensor, found 2 \(x, y\)"),
        ("integers", "should hold floating-point numbers, found I32"),
    ],
)
def test_a_bad_file_is_named(tmp_path, how, expected):
    folder = write_shards(tmp_path / "shards")
    bad = spoil(folder, how)
    with pytest.raises(InputError, match=expected) as error:
        ShardSource(folder)
    assert str(folder / bad) in one_line(error)


def test_folders_without_activations(tmp_path):
    with pytest.raises(InputError, match="nowhere do not exist; expected a folder of .npy or .safetensors files"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match="has no activations; expected .npy"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match="activations should be an array, a folder .*; found int"):
        open_source(3)


# ---- iterators


def test_a_bare_iterator_is_read_once():
    source = IteratorSource(iter(X[0].split(20)))
    first = next(source.batches())
    assert torch.equal(next(source.batches()), first)  # a look at the first piece uses nothing up
    assert torch.equal(whole(source), X[:1])
    for start, how in ((0, "a second time"), (2, "from batch 2 on")):
        with pytest.raises(InputError, match=f"cannot be read {how}, since it is used up; give a function") as error:
            whole(source, start)
        one_line(error)
    with pytest.raises(InputError, match="for 2 epochs"):
        IteratorSource(iter([X]), epochs=2)


def test_a_list_is_read_again():
    source = open_source([x.numpy() for x in X[1].split(40)], epochs=2)
    assert torch.equal(whole(source), torch.cat([X[1:], X[1:]], dim=1))


def test_iterators_of_something_else():
    with pytest.raises(InputError, match="the iterator of activations gave nothing"):
        open_source(iter([]))
    with pytest.raises(InputError, match=r"piece 0 of the activations should have shape .*, found str"):
        open_source(["text"])
    with pytest.raises(
        InputError, match="piece 2 of the activations has 1 layers of width 5, but piece 0 has 1 of width 6"
    ):
        whole(open_source([X[0], X[1], X[0, :, :5]]))


def test_functions_that_make_something_else():
    def needs(x):
        return iter([X])

    def pieces():
        yield X[0]

    for function, expected in (
        (needs, r"should need no argument, found needs\(x\)"),
        (lambda: None, "should return an iterator of arrays .*, found NoneType"),
        (lambda: X[0], "should return an iterator of arrays .*, found Tensor"),
    ):
        with pytest.raises(InputError, match=expected) as error:
            open_source(function)
        one_line(error)
    assert torch.equal(whole(open_source(pieces)), X[:1])


class Own:
    """A source of the user's."""

    def __init__(self, *batches: Any) -> None:
        self._batches = batches

    def batches(self, start: int = 0) -> Any:
        return iter(self._batches[start:])


class WithoutStart:
    def batches(self) -> Any:
        return iter([X])


class WithoutBatches:
    def batches(self, start: int = 0) -> Any:
        return None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Own(X[0]), r"batch 0 of the source of activations should be a tensor \[layers, tokens, width\], found shape"),
        (Own(X.numpy()), "batch 0 of the source of activations should be a tensor .*, found ndarray"),
        (
            Own(X, X[..., :3]),
            "batch 1 of the source of activations has 2 layers of width 3, but the ones before have 2 of",
        ),
        (Own(X, X[:1]), "batch 1 of the source of activations has 1 layers of width"),
        (Own(X.long()), "batch 0 of the source of activations should hold floating-point numbers, found torch.int64"),
        (WithoutStart(), r"should take the number of its first batch, found batches\(\)"),
        (WithoutBatches(), "should give an iterator of tensors, found NoneType"),
        (Own, "should be a source, found the class Own; give one made from it"),
    ],
)
def test_sources_that_are_not_what_they_say(source, expected):
    with pytest.raises(InputError, match=expected) as error:
        whole(open_source(source))
    one_line(error)


# ---- the cache


class Counting:
    """A source that remembers what was asked of it."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.made, self.starts, self.all = 0, [], batches

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        self.starts.append(start)
        for batch in self.all[start:]:
            self.made += 1
            yield batch


@pytest.fixture
def counting() -> Counting:
    return Counting(list(X.split(9, dim=1)))  # 12 batches, files of 3


def cached(source: ActivationSource, folder: Path, said: list[str] | None = None, **options) -> CachedSource:
    say = (lambda line: None) if said is None else said.append
    return CachedSource(source, folder / "cache", num_tokens=N, **{"epochs": 2, "say": say} | options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "cache").iterdir())}


def test_made_once_and_read_after(counting, tmp_path):
    said: list[str] = []
    assert torch.equal(whole(cached(counting, tmp_path, said)), torch.cat([X, X], dim=1))
    assert (counting.made, counting.starts) == (12, [0])
    assert said == [f"activations of {N} tokens are kept in {tmp_path / 'cache'}: 0.00 GB to write"]
    again = cached(Counting([]), tmp_path, said)  # nothing is asked of the source
    assert torch.equal(whole(again), torch.cat([X, X], dim=1)) and len(said) == 1
    assert list(files(tmp_path)) == ["index.json", *(f"shard_{i:05}.safetensors" for i in range(4))]


def test_nothing_is_written_before_the_size_is_said(counting, tmp_path):
    def say(line: str) -> None:
        assert "GB to write" in line and not (tmp_path / "cache").exists()

    batches = CachedSource(counting, tmp_path / "cache", num_tokens=N, say=say).batches()
    assert not (tmp_path / "cache").exists()
    assert torch.equal(next(batches), X[:, :9])


@pytest.mark.parametrize("taken", [1, 3, 4, 11, 12, 13])
@pytest.mark.parametrize("start", [0, 2, 7, 15])
def test_writing_goes_on_where_it_was_stopped(counting, tmp_path, taken, start):
    batches = cached(counting, tmp_path).batches()
    expected = [*counting.all, *counting.all]
    assert all(torch.equal(next(batches), expected[i]) for i in range(taken))
    batches.close()
    kept = json.loads((tmp_path / "cache" / "index.json").read_text())["shards"] if taken > 3 else []
    resumed = Counting(counting.all)
    found = list(cached(resumed, tmp_path).batches(start))
    assert all(torch.equal(a, b) for a, b in zip(found, expected[start:], strict=True))
    assert resumed.made == (
        0 if taken > 12 else 12 - (kept[-1]["stop"] if kept else 0)
    )  # what was kept is not made again


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
def test_a_damaged_file_is_named_and_made_again(counting, tmp_path, how):
    whole(cached(counting, tmp_path))
    before, path = files(tmp_path), tmp_path / "cache" / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data if how == "flipped" else data[:-20])
    said: list[str] = []
    again = Counting(counting.all)
    assert torch.equal(whole(cached(again, tmp_path, said)), torch.cat([X, X], dim=1))
    assert said == [f"{path} does not match its checksum; it is made again"]
    assert (again.starts, again.made) == ([3], 3) and files(tmp_path) == before
    other = Counting([batch + 1 for batch in counting.all])
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="comes out otherwise when made again; remove .*cache to write it anew"):
        whole(cached(other, tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"key": "", "shards": []}', '{"key": "", "complete": 3, "shards": []}']
)
def test_a_damaged_index_starts_anew(counting, tmp_path, content):
    whole(cached(counting, tmp_path))
    (tmp_path / "cache" / "index.json").write_text(content)
    said: list[str] = []
    assert torch.equal(whole(cached(counting, tmp_path, said)), torch.cat([X, X], dim=1))
    assert said[0].endswith("index.json is damaged; the activations are written anew")


def test_another_key_starts_anew(counting, tmp_path):
    whole(cached(counting, tmp_path, key="a"))
    said: list[str] = []
    other = Counting([batch + 1 for batch in counting.all])
    assert torch.equal(whole(cached(other, tmp_path, said, key="b")), torch.cat([X + 1, X + 1], dim=1))
    assert "holds activations of other settings; they are written anew" in said[0]


def test_a_disk_without_room(counting, tmp_path, monkeypatch):
    free = caching.SPARE_BYTES + 1000
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(
        TrainingError, match=r"need 0.00 GB in .*cache, where 0.00 GB are free: 0.00 GB are missing; make room"
    ) as e:
        whole(cached(counting, tmp_path))
    one_line(e)
    assert not list(tmp_path.glob("cache/*"))
    monkeypatch.undo()


def test_a_disk_that_becomes_full(counting, tmp_path, monkeypatch):
    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    source = cached(counting, tmp_path)
    batches = source.batches()
    for _ in range(5):
        next(batches)
    monkeypatch.setattr(caching, "save_file", fail)
    with pytest.raises(TrainingError, match="the disk of .*cache is full; make room"):
        list(batches)
    monkeypatch.setattr(caching, "save_file", save_file)
    assert list(files(tmp_path)) == ["index.json", "shard_00000.safetensors"]  # nothing half-written is left
    assert torch.equal(whole(source), torch.cat([X, X], dim=1))


def test_what_lies_in_a_file(counting, tmp_path):
    whole(cached(counting, tmp_path))
    tensors = load_file(tmp_path / "cache" / "shard_00001.safetensors")
    assert sorted(tensors) == ["0000003", "0000004", "0000005"]
    assert torch.equal(tensors["0000004"], counting.all[4])
