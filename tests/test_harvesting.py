"""Activations of a text: the same from one thread and from several, in order, and from any batch on."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from builders import CONTEXT, random_documents, tiny_model, word_pieces
from throughline.harvesting import TextSource, harvest
from throughline.models import LanguageModel
from throughline.tokens import TokenRows, pack


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def model(request) -> LanguageModel:
    return tiny_model(request.param)


def rows(num_documents: int = 60) -> list[TokenRows]:
    """Batches of different sizes, so that the later are often done before the earlier."""
    pieces, found, first = word_pieces(random_documents(num_documents, 1)), [], 0
    for number in range(num_documents):
        size = (7, 1, 2, 5)[number % 4]
        found += list(pack(pieces[first : first + size], CONTEXT, 8))
        first += size
        if first >= num_documents:
            break
    return found


def num_hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) for m in model.hf.modules())


# ---- threads


@pytest.mark.parametrize("num_threads", [2, 5])
def test_several_threads_are_as_one(model, num_threads):
    """Each batch to the bit, in the order of the rows; torch's threads and the model are left as they were."""
    batches = rows()
    assert len({batch.num_tokens for batch in batches}) > 3
    verbosity, threads = hf_logging.get_verbosity(), torch.get_num_threads()
    expected = list(harvest(model, batches, [0, 2]))
    for _ in range(3):
        found = list(harvest(model, batches, [0, 2], num_threads))
        assert len(found) == len(expected)
        for (mine, x_LND), (theirs, y_LND) in zip(found, expected, strict=True):
            assert mine is theirs and torch.equal(x_LND, y_LND)
            assert x_LND.shape == (2, mine.num_tokens, 16) and not x_LND.requires_grad
    assert (hf_logging.get_verbosity(), torch.get_num_threads(), num_hooks(model)) == (verbosity, threads, 0)


def test_no_more_is_read_ahead_than_there_are_threads(model):
    taken = 0

    def counted() -> Iterator[TokenRows]:
        nonlocal taken
        for batch in rows():
            taken += 1
            yield batch

    harvested: Any = harvest(model, counted(), [1], 3)
    for given, _ in enumerate(harvested, 1):
        assert taken <= given + 3
        if given == 4:
            break
    harvested.close()
    assert taken <= 7 and num_hooks(model) == 0


def test_a_failure_in_a_thread_is_passed_on(model):
    with pytest.raises(Exception, match="has layers 0-2"):
        list(harvest(model, rows(), [7], 2))


def test_editing_leaves_other_threads_alone(model):
    """Threads share a model; one edits its stream at the same time as the others read theirs."""
    inputs = model.inputs(rows()[0].ids, rows()[0].positions, rows()[0].pieces)

    def read(edited: bool) -> torch.Tensor:
        with torch.no_grad():
            edits = {1: lambda x: x + 1} if edited else {}
            return model.run(inputs, capture=[1], edits=edits, logits=False).residuals[1]

    plain = read(False)
    barrier, inside = threading.Barrier(2), threading.Event()

    def beside() -> torch.Tensor:
        barrier.wait()
        inside.wait()
        return read(False)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(beside)
        with model.editing(1, torch.zeros_like):
            barrier.wait()
            inside.set()
            other = future.result()
            assert read(False).abs().max() == 0  # here it has an effect
    assert torch.equal(other, plain)
    with ThreadPoolExecutor(4) as pool:
        wanted = [bool(i % 2) for i in range(100)]
        for edited, found in zip(wanted, pool.map(read, wanted), strict=True):
            assert torch.equal(found, plain + 1 if edited else plain)
    assert num_hooks(model) == 0


# ---- text as a source of training


def source(model: LanguageModel, num_tokens: int, epochs: int, opened: list[int] | None = None) -> TextSource:
    def open_rows() -> list[TokenRows]:
        if opened is not None:
            opened.append(1)
        return rows()

    return TextSource(model, [0, 2], open_rows, num_tokens=num_tokens, epochs=epochs)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_tokens", [30, 200, 10_000])
def test_batches_from_any_on_are_those_of_a_whole_reading(monkeypatch, model, num_threads, num_tokens):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    epochs = 2
    whole = list(source(model, num_tokens, epochs).batches())
    available = sum(batch.num_tokens for batch in rows())
    assert sum(x.shape[1] for x in whole) == epochs * min(num_tokens, available)
    half = len(whole) // 2
    assert all(torch.equal(a, b) for a, b in zip(whole[:half], whole[half:], strict=True))  # the epochs are alike
    for start in (1, half - 1, half, half + 1, len(whole) - 1, len(whole), len(whole) + 3):
        rest = list(source(model, num_tokens, epochs).batches(start))
        assert len(rest) == max(0, len(whole) - start)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_what_is_skipped_is_not_computed(monkeypatch, model):
    runs = 0
    run = LanguageModel.run

    def counted(self, *args, **options):
        nonlocal runs
        runs += 1
        return run(self, *args, **options)

    monkeypatch.setattr(LanguageModel, "run", counted)
    num_batches = len(list(source(model, 10_000, 1).batches()))
    assert runs == num_batches
    runs = 0
    assert len(list(source(model, 10_000, 1).batches(num_batches - 2))) == runs == 2


# ---- another dtype


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_copy_in_bfloat16_keeps_its_buffers(family):
    """Rotary frequencies in bfloat16 would be another model; the one it was copied from is left alone."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    half = model.in_dtype(torch.bfloat16)
    assert model.in_dtype(torch.float32) is model
    assert {p.dtype for p in half.hf.parameters()} == {torch.bfloat16}
    mine, theirs = dict(model.hf.named_buffers()), dict(half.hf.named_buffers())
    assert mine.keys() == theirs.keys()
    assert any("inv_freq" in name for name in mine) == (family == "gpt_neox")
    for name, buffer in mine.items():
        assert theirs[name].dtype == buffer.dtype and torch.equal(theirs[name], buffer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf.state_dict().items())
    (_, expected), (_, found) = (next(harvest(m, rows(), [2])) for m in (model, half))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.03
