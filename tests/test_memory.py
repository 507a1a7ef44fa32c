"""Memory: what training needs, blocks of layers that fit, micro-batches when it runs out; and activations kept on disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import planted_layers
from throughline import jobs
from throughline.dictionaries import Dictionary, load_dictionary
from throughline.dictionaries.stack import Stack, StepLoss
from throughline.errors import TrainingError
from throughline.jobs import Job, train_job
from throughline.models import LanguageModel
from throughline.pipeline import train_models
from throughline.registry import ARCHITECTURES
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import DictionarySpec, TrainingSpec, parse_study
from throughline.training import Progress, chunks, engine, memory, train
from throughline.training.caching import CachedSource
from throughline.training.checkpoints import Checkpoints
from throughline.training.memory import free_bytes, measure_layer, split_blocks
from throughline.training.sources import ArraySource

# ---- how much, and in which blocks


@pytest.mark.parametrize("by_autograd", [False, True])
def test_bytes_of_a_layer_are_those_of_its_tensors(by_autograd):
    """Weights, two moments, the encoder and the last good state in bfloat16, the folded dictionary, the chunk; with autograd
    gradients and what a step holds."""
    D, F, C, N = 16, 96, 1000, 64
    samples_LND = planted_layers(N, 1, d_model=D)
    stack = Stack.initialize(samples_LND, F, [torch.Generator()], ARCHITECTURES.load("topk"))
    weights = sum(w.nbytes for w in stack.trained().values())
    rounded = (2 * stack.W_enc_LFD.numel() + stack.W_dec_LFD.numel()) * 2  # the encoder twice
    expected = 4 * weights + rounded + C * D * 4
    expected += weights + 4 * 4 * N * F if by_autograd else 0
    assert measure_layer(D, F, C, N, by_autograd).total == pytest.approx(expected, rel=0.02)
    assert measure_layer(D, F, C, N, by_autograd, 2).activations == C * D * 2
    with_twins = measure_layer(D, F, C, N, by_autograd, num_dictionaries=3)  # one after another where autograd trains
    assert with_twins.total == pytest.approx(expected + 2 * (4 * weights + rounded), rel=0.02)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5000))
def test_blocks(sizes, free):
    """All layers in order, each block fits, and no smaller number of even blocks would."""
    layers, usable = list(range(10, 10 + len(sizes))), int(memory.USABLE_SHARE * free)
    if max(sizes) > usable:
        too_large = next(layer for layer, size in zip(layers, sizes, strict=True) if size > usable)
        with pytest.raises(TrainingError, match=f"layer {too_large} needs .* GiB to train, found .* usable; set"):
            split_blocks(layers, sizes, free)
        return
    blocks = split_blocks(layers, sizes, free)
    assert [layer for block in blocks for layer in block] == layers and all(blocks)
    assert all(sum(sizes[layer - 10] for layer in block) <= usable for block in blocks)
    lengths = [len(block) for block in blocks]
    assert max(lengths) - min(lengths) <= 1
    if len(blocks) > 1:
        cuts = memory._evenly(len(sizes), len(blocks) - 1)
        assert any(sum(sizes[a:b]) > usable for a, b in cuts)


def test_free_memory_is_the_least_of_what_system_and_container_say(tmp_path, monkeypatch):
    assert 0 < free_bytes("cpu") < 2**50
    monkeypatch.setattr(memory, "_available", lambda: 5000)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_bytes("cpu") == 5000  # no container
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 400\nactive_file 7\n")
    assert free_bytes("cpu") == 3000 - 1500 + 400  # page cache can be had
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu") == 5000
    monkeypatch.setattr(memory, "_available", lambda: None)
    assert free_bytes("cpu") == 2**62


# ---- through jobs

STUDY: dict[str, Any] = {
    "name": "memory",
    "models": [{"path": "zoo/pythia", "layers": [0, 1, 3, 4, 5]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"d_sae": 48, "k": 6, "per_layer": {3: {"architecture": "batch_topk"}, 4: {"d_sae": 40}}},
    "training": {"tokens": 3000, "epochs": 2, "batch_tokens": 128, "precision": "float32"},
}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train STUDY with changes to its training; the dictionaries by layer, what was said, and the run."""
    monkeypatch.setattr(chunks, "MOST_TOKENS", 1024)
    number = 0

    def run(**changes: Any) -> tuple[dict[int, Dictionary], list[str], RunDir]:
        nonlocal number
        number += 1
        study = parse_study(STUDY | {"training": STUDY["training"] | changes})
        opened, said = RunDir.create(tmp_path / f"run_{number}", study), []
        train_models(Session(opened, "cpu", said.append), lambda progress: None)
        layers = study.models[0].layers
        return {n: load_dictionary(opened.layer_folder("zoo/pythia", n)) for n in layers}, said, opened  # type: ignore[union-attr]

    return run


def identical(a: dict[int, Dictionary], b: dict[int, Dictionary]) -> bool:
    assert a.keys() == b.keys()
    return all(
        torch.equal(getattr(one, name), getattr(b[layer], name))
        for layer, one in a.items()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    ) and all(torch.equal(t, b[layer].extra[n]) for layer, one in a.items() for n, t in one.extra.items())


@pytest.mark.parametrize("activation_cache", ["off", "on"])
def test_layers_that_do_not_fit_are_trained_block_by_block(trained, monkeypatch, activation_cache):
    """To the same bits; the log says so, and but for a journal of each block nothing else is left in the run."""
    expected, said, at_once = trained(activation_cache=activation_cache)
    assert not any("blocks" in line for line in said)
    # five layers of it need three blocks
    free = 2.3 * measure_layer(expected[0].W_enc.shape[0], 48, 1024, 128, False).total / memory.USABLE_SHARE
    monkeypatch.setattr(jobs, "free_bytes", lambda device: int(free))
    found, said, in_blocks = trained(activation_cache=activation_cache)
    line = "zoo/pythia: 5 layers do not fit into memory at once; trained in blocks 0-1, 3, 4-5"
    assert [one for one in said if "blocks" in one] == [line]
    assert identical(found, expected)
    blocks = {f"models/zoo-pythia/training_{block}.jsonl" for block in ("00-01", "03-03", "04-05")}
    assert files(in_blocks.root) - blocks == files(at_once.root) - {"models/zoo-pythia/training_00-05.jsonl"}
    assert files(in_blocks.root) > blocks


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_a_layer_too_large_for_the_memory_is_named(trained, monkeypatch):
    monkeypatch.setattr(jobs, "free_bytes", lambda device: 1000)
    with pytest.raises(
        TrainingError, match=r"layer 0 needs 0.0 GiB to train, found 0.0 usable; set dictionary.expansion"
    ):
        trained()


def test_activations_kept_on_disk_change_nothing(trained, monkeypatch):
    """The model runs in the first epoch alone; the file is announced, and removed when training is done."""
    runs, folders = 0, set()
    run = LanguageModel.run

    def counted(self, *args, **options):
        nonlocal runs
        runs += 1
        return run(self, *args, **options)

    batches = CachedSource.batches

    def watched(self, start=0):
        folders.add(self._folder)
        return batches(self, start)

    monkeypatch.setattr(LanguageModel, "run", counted)
    monkeypatch.setattr(CachedSource, "batches", watched)
    expected, said, without = trained(activation_cache="off")
    computed, runs = runs, 0
    assert not any("kept in" in line for line in said) and not folders
    found, said, kept = trained(activation_cache="on")
    assert identical(found, expected)
    assert computed / 2 <= runs <= computed / 2 + 2  # and the probe's batch
    [line] = [line for line in said if "kept in" in line]
    assert "activations of 3,000 tokens are kept in" in line and "GB to write" in line
    [folder] = folders
    assert folder.is_relative_to(kept.root) and files(kept.root) == files(without.root)


@pytest.mark.parametrize(("changes", "kept"), [({"epochs": 1, "activation_cache": "on"}, False), ({}, None)])
def test_whether_activations_are_kept(trained, changes, kept):
    """Not for one epoch; by default whichever is cheaper, with the same result."""
    expected, *_ = trained(**changes | {"activation_cache": "off"})
    found, said, _ = trained(**changes)
    assert identical(found, expected)
    assert kept is None or any("kept in" in line for line in said) == kept


def test_a_full_disk_keeps_no_activations(trained, monkeypatch):
    monkeypatch.setattr(jobs, "_cache_is_cheaper", lambda *_: True)
    _, said, _ = trained()
    assert any("kept in" in line for line in said)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "MOST_TOKENS", 1024)
    usage = jobs.shutil.disk_usage

    def nearly_full(path):
        return usage(path)._replace(free=1000)

    monkeypatch.setattr(jobs.shutil, "disk_usage", nearly_full)
    _, said, _ = trained()
    assert not any("kept in" in line for line in said)


def test_stopped_between_chunks_and_resumed_with_kept_activations(trained, monkeypatch, tmp_path):
    """An error in the second epoch; the next start goes on from the checkpoint and reads what was written."""
    expected, *_ = trained(activation_cache="off")
    save = Checkpoints.save
    saved = 0

    def failing(self, step, cursor, tensors):
        nonlocal saved
        save(self, step, cursor, tensors)
        saved += 1
        if saved == 4:
            raise TrainingError("stopped here")

    monkeypatch.setattr(Checkpoints, "save", failing)
    study = parse_study(STUDY | {"training": STUDY["training"] | {"activation_cache": "on", "checkpoint_minutes": 0}})
    run, said = RunDir.create(tmp_path / "stopped", study), []
    with pytest.raises(TrainingError, match="stopped here"):
        train_models(Session(run, "cpu"), lambda progress: None)
    assert [state.failed for state in run.jobs()] == ["stopped here"]
    (folder,) = (run.model_folder("zoo/pythia") / "checkpoints").iterdir()
    assert {path.name for path in folder.iterdir()} == {"claim.json", "state.safetensors", "activations"}
    train_models(Session(run, "cpu", said.append), lambda progress: None)
    assert any("going on from step" in line for line in said) and not any("kept in" in line for line in said)
    found = {layer: load_dictionary(run.layer_folder("zoo/pythia", layer)) for layer in expected}
    assert identical(found, expected)
    assert not folder.exists() and run.jobs() == []


def test_a_job_whose_worker_was_lost_trains_only_what_is_not_done_yet(trained):
    """A worker may be lost after its last block was saved, or between two blocks."""
    expected, _, run = trained()
    first = min(expected)
    run.forget(f"train/zoo/pythia/{first}")
    session, job = Session(run, "cpu"), Job("zoo/pythia", sorted(expected))
    reports: list[Progress] = []
    train_job(session, job, reports.append, attempt=2)
    assert {tuple(report.layers) for report in reports} == {(first,)}
    found = {layer: load_dictionary(run.layer_folder("zoo/pythia", layer)) for layer in expected}
    assert identical(found, expected)
    reports.clear()
    train_job(session, job, reports.append, attempt=3)
    assert not reports


@pytest.mark.parametrize(("num_bytes", "is_cheaper"), [(1e9, True), (3e9, False)])
def test_activations_computed_beside_one_another_are_timed_together(monkeypatch, tmp_path, num_bytes, is_cheaper):
    """Two threads make a batch of 100 tokens each in a second: 10 s for an epoch of 2,000; a disk reads 0.5 GB a second."""
    clock = 0.0

    class Text:
        def batches(self):
            nonlocal clock
            for i in range(20):
                clock += i % 2 == 0
                yield torch.zeros(1, 100, 4)

    monkeypatch.setattr(jobs, "threads_of", lambda device: 2)
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e12))
    session = Session(RunDir.create(tmp_path / "run", parse_study(STUDY)), "cpu")
    training = TrainingSpec(tokens=2000, epochs=2, batch_tokens=100)
    assert jobs._cache_is_cheaper(session, Text(), int(num_bytes), training) == is_cheaper  # type: ignore[arg-type]


# ---- micro-batches


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_batches_are_computed_in_parts_when_memory_runs_out(monkeypatch, architecture):
    """Down to what fits, said once for each halving, with nearly the same result; other layers are not concerned."""
    monkeypatch.setattr(engine, "DEAD_AFTER_SHARE", 1e9)
    x_LND = planted_layers(1280, 3, num_features=20, d_model=12)
    specs = dict.fromkeys(range(2), DictionarySpec(architecture=architecture, d_sae=48, k=3, l1=0.3))
    specs[2] = DictionarySpec(d_sae=48, k=3)

    def run() -> tuple[dict[int, Dictionary], list[str], float]:
        said, reports = [], []
        source, spec = ArraySource(x_LND), TrainingSpec(tokens=1280, batch_tokens=64)
        found = train(source, specs, spec, model="m", num_layers=3, say=said.append, report=reports.append).own
        return found, said, reports[-1].fvu

    expected, said, fvu = run()
    assert said == []
    module = ARCHITECTURES.load(architecture)
    loss, largest = module.loss, 0

    def limited(stack: Stack, part_LND: Tensor, *args: Any, **options: Any) -> StepLoss:
        nonlocal largest
        if part_LND.shape[1] > 20 and part_LND.shape[1] <= 64:
            raise torch.OutOfMemoryError("too much")
        largest = max(largest, part_LND.shape[1] if part_LND.shape[1] <= 64 else 0)
        return loss(stack, part_LND, *args, **options)

    monkeypatch.setattr(module, "loss", staticmethod(limited))
    found, said, in_parts = run()
    line = "memory ran out; each batch of 64 tokens is computed {} at a time from here"
    assert said == [line.format(32), line.format(16)] and largest == 16
    assert in_parts == pytest.approx(fvu, rel=0.05)
    for layer in (0, 1):
        for name in ("W_enc", "W_dec", "b_dec"):
            a, b = getattr(found[layer], name), getattr(expected[layer], name)
            assert (a - b).norm() < 0.02 * b.norm(), name
    assert torch.equal(found[2].W_enc, expected[2].W_enc)  # compiled: needs no parts


def test_memory_that_does_not_suffice_for_one_token(monkeypatch):
    module = ARCHITECTURES.load("gated")
    loss = module.loss

    def never(stack: Stack, part_LND: Tensor, *args: Any, **options: Any) -> StepLoss:
        if stack.W_enc_LFD.requires_grad:
            raise torch.OutOfMemoryError("too much")
        return loss(stack, part_LND, *args, **options)

    monkeypatch.setattr(module, "loss", staticmethod(never))
    said: list[str] = []
    spec = TrainingSpec(tokens=640, batch_tokens=64)
    with pytest.raises(torch.OutOfMemoryError):
        source = ArraySource(planted_layers(640, 1))
        train(
            source, {0: DictionarySpec(architecture="gated", d_sae=16)}, spec, model="m", num_layers=1, say=said.append
        )
    assert said[-1].endswith("is computed 1 at a time from here") and len(said) == 6
