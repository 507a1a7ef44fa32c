"""Checkpoints: training goes on from any of them to the same bits; what is damaged is named; a real process may be killed."""

import json
import os
import random
import shutil
import signal
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import planted_layers
from commands import Command
from commands import start as start_command
from throughline.dictionaries import Dictionary
from throughline.study import DictionarySpec, TrainingSpec
from throughline.training import checkpoints as module
from throughline.training import chunks, compiled, train
from throughline.training.checkpoints import Checkpoints
from throughline.training.chunks import Cursor
from throughline.training.sources import ArraySource

N, TOKENS = 64, 1300
SPECS = {
    name: DictionarySpec(architecture=name, d_sae=48, k=3, l1=0.3)
    for name in ("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated")
}
TRAINING = TrainingSpec(tokens=TOKENS, epochs=2, batch_tokens=N, lr=0.01)
NUM_STEPS = 2 * TOKENS // N
KEY = "a-key"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Six chunks, none of which ends with the source's batches."""
    monkeypatch.setattr(chunks, "MOST_TOKENS", 448)


def run(
    specs: dict[int, DictionarySpec],
    checkpoints: Checkpoints | None,
    said: list[str] | None = None,
    ceiling_seeds: int = 0,
) -> dict:
    """The dictionaries by layer, and by layer and number their twins."""
    x_LND = planted_layers(TOKENS, len(specs), num_features=20, d_model=12)
    heard = (said if said is not None else []).append
    source = ArraySource(x_LND, epochs=2)
    spec = TRAINING.model_copy(update={"ceiling_seeds": ceiling_seeds})
    trained = train(source, specs, spec, model="planted", num_layers=len(specs), say=heard, checkpoints=checkpoints)
    twins = {(layer, i): one for i, found in enumerate(trained.twins) for layer, one in found.items()}
    return trained.own | twins


def weights(one: Dictionary) -> dict[str, Tensor]:
    return {name: getattr(one, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | one.extra


def identical(found: dict[int, Dictionary], expected: dict[int, Dictionary]) -> bool:
    return all(
        torch.equal(tensor, weights(expected[layer])[name]) and one.metadata == expected[layer].metadata
        for layer, one in found.items()
        for name, tensor in weights(one).items()
    )


class Keeping(Checkpoints):
    """Saves after each chunk, and keeps a copy of every state."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "now", KEY, 0)
        self.folder, self.kept = folder, []

    def save(self, step: int, cursor: Cursor, tensors: dict[str, Tensor]) -> None:
        super().save(step, cursor, tensors)
        self.kept.append(shutil.copytree(self.folder / "now", self.folder / f"step_{step}"))


# ---- the same bits


@pytest.mark.parametrize("way", ["compiled", "plain"])
@pytest.mark.parametrize("name", [*SPECS, "all"])
def test_training_goes_on_from_every_chunk_to_the_same_bits(monkeypatch, tmp_path, way, name):
    """In both epochs. AuxK, resampling, the controller of L0 and running thresholds are at work."""
    specs = dict(enumerate(SPECS.values())) if name == "all" else {0: SPECS[name], 1: SPECS[name]}
    specs = {i: s.model_copy(update={"target_l0": 4.0} if s.architecture == "relu" else {}) for i, s in specs.items()}
    if way == "plain":
        if name not in (*compiled.ARCHITECTURES, "all"):
            pytest.skip(f"{name} is trained the plain way anyhow")
        monkeypatch.setattr(compiled, "ARCHITECTURES", ())
    keeping = Keeping(tmp_path)
    expected = run(specs, keeping)
    assert identical(run(specs, None), expected)  # saving changes nothing
    assert len(keeping.kept) == 5
    for folder in keeping.kept:
        said: list[str] = []
        found = run(specs, Checkpoints(folder, KEY, 1e9), said)
        step = int(folder.name.partition("_")[2])
        assert said == [f"planted: going on from step {step} of {NUM_STEPS}"]
        assert identical(found, expected), folder.name


@pytest.mark.parametrize("way", ["compiled", "plain"])
def test_training_with_twins_goes_on_to_the_same_bits(monkeypatch, tmp_path, way):
    """Two twins of layers of several shapes, in both ways of training and mixed; own dictionaries as without twins."""
    specs = {0: SPECS["topk"], 1: SPECS["relu"], 2: SPECS["gated"], 3: SPECS["topk"]}
    if way == "plain":
        monkeypatch.setattr(compiled, "ARCHITECTURES", ())
    keeping = Keeping(tmp_path)
    expected = run(specs, keeping, ceiling_seeds=2)
    assert len(expected) == 12 and len(keeping.kept) == 5
    assert identical(run(specs, None), expected)
    for folder in keeping.kept[1::2]:
        found = run(specs, Checkpoints(folder, KEY, 1e9), ceiling_seeds=2)
        assert found.keys() == expected.keys() and identical(found, expected), folder.name


def test_training_goes_on_twice(tmp_path):
    """From a checkpoint that a resumed training wrote."""
    specs = {0: SPECS["topk"], 1: SPECS["gated"]}
    first = Keeping(tmp_path / "first")
    expected = run(specs, first)
    second = Keeping(tmp_path / "second")
    shutil.copytree(first.kept[1], second.folder / "now")
    assert identical(run(specs, second), expected)
    assert len(second.kept) == 3
    assert identical(run(specs, Checkpoints(second.kept[0], KEY, 1e9)), expected)
    for a, b in zip(first.kept[2:], second.kept, strict=True):
        assert (a / module.FILE).read_bytes() == (b / module.FILE).read_bytes()


def test_a_checkpoint_holds_everything(tmp_path):
    """Weights, moments, counters, scale, penalty, thresholds, limits of sinks; step and cursor in its header. No random numbers."""
    keeping = Keeping(tmp_path)
    run({0: SPECS["batch_topk"], 1: SPECS["batch_topk"]}, keeping)
    path = keeping.kept[2] / module.FILE
    names = {name.partition("/")[2] for name in load_file(path)}
    trained = {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert names == trained | {f"{n}.{m}" for n in trained for m in "mv"} | {
        *("threshold", "num_batches", "target_l0", "penalty", "log_l0", "mean", "scale", "idle"),
        *("norm", "left_out", "slowed", "setbacks"),  # of sinks, and of a training that went wrong
    }
    found = Checkpoints(keeping.kept[2], KEY, 1).load()
    assert found is not None and (found.step, found.cursor) == (21, Cursor(3, 1, 44))
    assert found.cursor.batch * TOKENS + found.cursor.used == 21 * N  # the array is one batch an epoch


# ---- damage


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict[int, Dictionary]]:
    """A checkpoint in the middle of a training, and what the training gives."""
    keeping = Keeping(tmp_path)
    expected = run({0: SPECS["topk"]}, keeping)
    return keeping.kept[2], expected


def begins_anew(folder: Path, expected: dict[int, Dictionary], because: str, key: str = KEY) -> None:
    said: list[str] = []
    kept = Checkpoints(folder, key, 1e9, said.append)
    assert identical(run({0: SPECS["topk"]}, kept, said), expected)
    assert len(said) == 1 and str(folder / module.FILE) in said[0] and because in said[0]
    assert said[0].endswith("training begins anew") and "\n" not in said[0]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(saved, share):
    folder, expected = saved
    path = folder / module.FILE
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    begins_anew(folder, expected, "is damaged")


@pytest.mark.parametrize("content", [b"nonsense " * 100, b"\0" * 5000])
def test_a_file_that_is_no_checkpoint_is_named(saved, content):
    folder, expected = saved
    (folder / module.FILE).write_bytes(content)
    begins_anew(folder, expected, "is damaged")


def test_tensors_without_a_header_are_named(saved):
    folder, expected = saved
    save_file({"0/W_enc": torch.zeros(3)}, folder / module.FILE)
    begins_anew(folder, expected, "is damaged")


def test_a_checkpoint_of_other_settings_is_named(saved):
    folder, expected = saved
    begins_anew(folder, expected, "is of other settings", key="another-key")


@pytest.mark.parametrize("change", ["swapped", "other numbers", "one missing"])
def test_a_mix_up_is_named(saved, change):
    folder, expected = saved
    path = folder / module.FILE
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if change == "swapped":
        tensors["0/W_enc.m"], tensors["0/W_dec.m"] = tensors["0/W_dec.m"], tensors["0/W_enc.m"]
    elif change == "other numbers":
        tensors["0/W_enc"] += 1
    else:
        del tensors["0/idle"]
    save_file(tensors, path, metadata=header)
    begins_anew(folder, expected, "does not match its checksum")


def test_a_checkpoint_is_replaced_whole_or_not_at_all(saved, monkeypatch):
    """Writing fails half-way: the one before stands, and nothing is left of the new one."""
    folder, expected = saved
    before = (folder / module.FILE).read_bytes()

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", half)
        with pytest.raises(OSError, match="No space"):
            Checkpoints(folder, KEY, 0).save(1, Cursor(), {})
    assert [path.name for path in folder.iterdir()] == [module.FILE]
    (folder / f".{module.FILE}.123.tmp").write_bytes(b"what a kill left")
    assert identical(run({0: SPECS["topk"]}, Checkpoints(folder, KEY, 1e9)), expected)
    assert [path.name for path in folder.iterdir()] == [module.FILE]


def test_no_checkpoint_is_no_word(tmp_path):
    said: list[str] = []
    assert Checkpoints(tmp_path / "none", KEY, 5, said.append).load() is None
    Checkpoints(tmp_path / "none", KEY, 5).remove()
    assert said == [] and not (tmp_path / "none").exists()


# ---- how often


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """Every five minutes; if saving takes 20 s, every 1000 s, which is 2 %; with 0 minutes always."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    kept = Checkpoints(tmp_path, KEY, 5)
    always = Checkpoints(tmp_path / "always", KEY, 0)
    assert always.is_due() and not kept.is_due()
    now = 299.0
    assert not kept.is_due()
    now = 301.0
    assert kept.is_due()

    def slowly(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal now
        now += 20
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", slowly)
    for one in (kept, always):
        one.save(1, Cursor(), {"0/x": torch.zeros(3)})
    saved_at = 321.0
    now = saved_at + 999
    assert not kept.is_due() and always.is_due()
    now = saved_at + 1001
    assert kept.is_due()


# ---- real processes, really killed

STUDY = {
    "name": "killed",
    "models": [{"path": "zoo/pythia", "layers": [1, 4]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"d_sae": 48, "k": 6, "per_layer": {4: {"architecture": "gated", "l1": 0.5}}},
    "training": {"tokens": 14_000, "epochs": 2, "batch_tokens": 128, "checkpoint_minutes": 0, "ceiling_seeds": 1},
}
# Smaller chunks, so that a short training has many checkpoints; benchmarks/kill_resume.py has the usual ones.
CHUNKS = {"throughline.training.chunks.MOST_TOKENS": 2048}


def start(folder: Path, out: str) -> Command:
    arguments = ["train", folder / "study.yaml", "--out", folder / out, "--device", "cpu", "--resume", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return start_command(*arguments, env=environment, stdout=None, stderr=None, constants=CHUNKS)


def hashes(run_folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run_folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_folder.rglob("*.safetensors"))
    }


def wait_for_a_checkpoint(process: Command, state: Path, seconds: float = 60) -> None:
    """Until the process has written one of its own."""
    before = state.stat().st_mtime_ns if state.exists() else None
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            if state.stat().st_mtime_ns != before:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.01)


@pytest.mark.slow("faults")
def test_a_training_that_is_killed_again_and_again_gives_the_same_files(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    undisturbed = start(tmp_path, "undisturbed")
    rng, kills, steps = random.Random(0), 0, []
    state = tmp_path / "killed" / "models" / "zoo-pythia" / "checkpoints" / "layers_01-04" / module.FILE
    while kills < 3:
        process = start(tmp_path, "killed")
        wait_for_a_checkpoint(process, state)
        time.sleep(0.3 * rng.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        kills += 1
        steps.append(_step_of(state))
    assert steps == sorted(set(steps))  # each went on from where the one before was killed
    assert start(tmp_path, "killed").wait() == 0
    assert undisturbed.wait() == 0
    expected = hashes(tmp_path / "undisturbed")
    assert len(expected) == 8  # weights and probe of two layers and of their twins; no checkpoint is left
    assert hashes(tmp_path / "killed") == expected
    assert not state.parent.exists()


def _step_of(state: Path) -> int:
    with safe_open(state, "pt") as file:
        header: dict[str, Any] = json.loads((file.metadata() or {})["throughline"])
    return header["step"]
