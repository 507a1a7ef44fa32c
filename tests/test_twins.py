"""Twins in a run: where they lie, that steps and checksums cover them, who reads them, and that a study without has none."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from builders import random_dictionary
from throughline import api, jobs
from throughline import codes as codes_module
from throughline.codes import encode_text
from throughline.dictionaries import load_dictionary
from throughline.dictionaries.formats import write_foreign
from throughline.errors import InputError
from throughline.pipeline import evaluate_models, train_models, transfer_models
from throughline.pipeline.keys import steps_of
from throughline.pipeline.transfer import BASE_GIB, _Side, transfer_gib
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import load_study, parse_study
from throughline.training import chunks

MODEL = "zoo/pythia"
STUDY: dict[str, Any] = {
    "name": "twins",
    "models": [{"path": MODEL, "layers": [1, 4]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"d_sae": 48, "k": 6, "per_layer": {4: {"architecture": "gated", "l1": 0.5}}},
    "training": {"tokens": 6000, "batch_tokens": 128, "precision": "float32"},
    "evaluation": {"tokens": 2000, "sample_tokens": 1000, "spliced_tokens": 500},
    "transfer": {"min_count": 3},
}
KEYS = {1: "380a765ba0e6bbfc", 4: "2a48a4f824141b04"}  # of a study that knew no twins
WITH_ONE, WITH_TWO = ["training.ceiling_seeds=1"], ["training.ceiling_seeds=2"]
DICTIONARY = {"cfg.json", "sae_weights.safetensors", "probe.safetensors"}


@pytest.fixture(scope="module")
def folder(made_once) -> Path:
    """The study's file, a run without twins and one with one of each layer."""

    def make(folder: Path) -> None:
        (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
        api.train(folder / "study.yaml", folder / "without", device="cpu")
        api.train(folder / "study.yaml", folder / "with", WITH_ONE, device="cpu")

    return made_once("twins", make)


def weights_of(run: RunDir, layer: int, twin: int = 0) -> bytes:
    return (run.layer_folder(MODEL, layer, twin) / "sae_weights.safetensors").read_bytes()


# ---- what is written


def test_a_twin_lies_in_a_folder_of_its_own_below_its_layer(folder):
    run = RunDir.open(folder / "with")
    for layer in (1, 4):
        place = folder / "with" / "models" / "zoo-pythia" / f"layer_{layer:02d}"
        assert run.layer_folder(MODEL, layer, 1) == place / "seed_1"
        assert {path.name for path in (place / "seed_1").iterdir()} == DICTIONARY
        assert {path.name for path in place.iterdir()} == DICTIONARY | {"seed_1"}
        noted = run.manifest()[f"train/{MODEL}/{layer}"].files
        expected = {run.layer_name(MODEL, layer, twin) + f"/{name}" for twin in (0, 1) for name in DICTIONARY}
        assert set(noted) == expected
        own, twin = load_dictionary(place), load_dictionary(place / "seed_1")
        assert twin.metadata == own.metadata | {"ceiling_seed": 1}
        assert (twin.d_sae, twin.architecture, twin.options) == (own.d_sae, own.architecture, own.options)
        assert not torch.allclose(twin.W_dec, own.W_dec)
        inputs = [load_file(path / "probe.safetensors")["inputs"] for path in (place, place / "seed_1")]
        assert torch.equal(*inputs)


def test_own_dictionaries_are_those_of_a_run_without_twins(folder):
    without, with_one = (RunDir.open(folder / name) for name in ("without", "with"))
    for layer in (1, 4):
        assert weights_of(without, layer) == weights_of(with_one, layer)
        configs = [(run.layer_folder(MODEL, layer) / "cfg.json").read_bytes() for run in (without, with_one)]
        assert configs[0] == configs[1]


def test_progress_is_of_own_dictionaries_alone(folder):
    lines = RunDir.open(folder / "with").journal(MODEL, [1, 4]).read_text().splitlines()
    assert json.loads(lines[-1])["layers"] == [1, 4]
    status = api.status(folder / "with")
    assert status["layers"]["done"] == 2 and list(status["models"][MODEL]["layers"]) == [1, 4]


def test_keys_of_studies_without_twins_are_as_they_were():
    def keys(**training: Any) -> dict[int, str]:
        study = parse_study(STUDY | {"training": STUDY["training"] | training})
        return {layer: key for layer, (_, key) in steps_of(study, study.models[0], [1, 4], {}).items()}

    assert keys() == keys(ceiling_seeds=0) == KEYS
    one, two = keys(ceiling_seeds=1), keys(ceiling_seeds=2)
    assert all(len({KEYS[layer], one[layer], two[layer]}) == 3 for layer in KEYS)


def test_the_number_of_twins_may_change(tmp_path, folder):
    """Layers are then trained again, to the same bits, and twins that the study does not want go."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"models": [{"path": MODEL, "layers": [1]}]}))
    expected, found = weights_of(RunDir.open(folder / "without"), 1), {}
    for settings, wanted in ((WITH_TWO, {1, 2}), (WITH_ONE, {1}), ([], set())):
        run = api.train(tmp_path / "study.yaml", tmp_path / "run", settings, resume=True, device="cpu")
        assert weights_of(run, 1) == expected
        assert {n for n in (1, 2, 3) if run.layer_folder(MODEL, 1, n).exists()} == wanted
        assert {n for n in (1, 2, 3) if run.layers_with_twin(MODEL, n) == [1]} == wanted
        for twin in wanted:
            assert found.setdefault(twin, weights_of(run, 1, twin)) == weights_of(run, 1, twin)
    assert len({expected, *found.values()}) == 3


def test_a_damaged_twin_is_named_and_made_again(folder, tmp_path):
    run, said = RunDir.open(shutil.copytree(folder / "with", tmp_path / "run")), []
    before = weights_of(run, 4, 1)
    (run.layer_folder(MODEL, 4, 1) / "sae_weights.safetensors").write_bytes(before[:-1])
    train_models(Session(run, "cpu", said.append), lambda progress: None)
    assert any("layer_04/seed_1/sae_weights.safetensors does not match its checksum" in line for line in said)
    assert weights_of(run, 4, 1) == before


def test_layers_that_do_not_fit_with_their_twins_are_trained_one_by_one(folder, tmp_path, monkeypatch):
    """To the same bits. Memory holds both layers, or one of them with its twins."""
    monkeypatch.setattr(chunks, "MOST_TOKENS", 1024)
    monkeypatch.setattr(jobs, "free_bytes", lambda device: 2_400_000)
    found = {}
    for count in (0, 3):
        study = load_study(folder / "study.yaml", [f"training.ceiling_seeds={count}"])
        run, said = RunDir.create(tmp_path / str(count), study), []
        train_models(Session(run, "cpu", said.append), lambda progress: None)
        assert any("do not fit into memory at once; trained in blocks 1, 4" in line for line in said) == (count == 3)
        found[count] = [weights_of(run, layer) for layer in (1, 4)]
    assert found[0] == found[3]


# ---- what reads them


def test_a_session_reads_twins_and_their_codes_in_one_pass(folder, monkeypatch):
    opened = Session(RunDir.open(folder / "with"))
    read = codes_module.encode_text_with
    passes = 0

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return read(*given)

    monkeypatch.setattr(codes_module, "encode_text_with", counted)
    side = _Side(opened, MODEL)
    own, [twins] = side.dictionaries, side.twins
    assert list(own) == list(twins) == [1, 4]
    codes, [by_twins] = side.codes, side.twin_codes
    assert passes == 1
    assert by_twins.rows is codes.rows and by_twins.residual_LND is None
    rows, documents = opened.rows(MODEL, opened.heldout), opened.heldout
    for given, found in ((own, codes), (twins, by_twins)):
        expected = encode_text(opened.model(MODEL), given, rows, documents)
        assert list(found.layers) == [1, 4]
        for layer in found.layers:
            assert (found.layers[layer] != expected.layers[layer]).nnz == 0
        assert np.array_equal(found.ids_N, expected.ids_N)
    assert opened.twin_evaluation(MODEL)[0] is by_twins
    assert all(layer in opened.twins(MODEL)[0] for layer in (1, 4))


def test_a_session_reads_all_twins_and_memory_counts_them(folder, tmp_path, monkeypatch):
    """Of two seeds, in one pass; transfer's ceilings are of both, and its estimate of memory holds the codes of both."""
    study = load_study(folder / "study.yaml", [*WITH_TWO, "transfer.metrics=[matching]"])
    run = RunDir.create(tmp_path / "run", study)
    opened = Session(run, "cpu")
    train_models(opened, lambda progress: None)
    evaluate_models(opened)
    read, passes = codes_module.encode_text_with, []
    monkeypatch.setattr(
        codes_module, "encode_text_with", lambda sets, *given: passes.append(len(sets)) or read(sets, *given)
    )
    side = _Side(opened, MODEL)
    assert [list(twins) for twins in side.twins] == [[1, 4]] * 2
    assert not torch.equal(side.twins[0][1].W_dec, side.twins[1][1].W_dec)
    for twins, codes in zip(side.twins, side.twin_codes, strict=True):
        expected = encode_text(opened.model(MODEL), twins, side.codes.rows, opened.heldout)
        assert all((codes.layers[n] != expected.layers[n]).nnz == 0 for n in (1, 4))
    assert passes == [3, 1, 1]  # the last two are those of this test
    transfer_models(opened)
    result = run.transfer("matching", MODEL, MODEL)
    assert result.info.ceiling is not None and result.info.ceiling.endswith("mean over 2 seeds")
    assert (result.arrays["num_twins"] == 2).all()
    gib = {n: transfer_gib(run, load_study(folder / "study.yaml", [f"training.ceiling_seeds={n}"])) for n in range(4)}
    own = gib[0] - BASE_GIB
    assert own > 0 and all(gib[n] - BASE_GIB == pytest.approx((1 + n) * own) for n in gib)


def test_a_study_without_twins_has_none(folder):
    side = _Side(Session(RunDir.open(folder / "without")), MODEL)
    assert side.twins == [] and side.twin_codes == []


def test_an_imported_layer_has_no_twin(folder, tmp_path):
    run = RunDir.open(shutil.copytree(folder / "with", tmp_path / "run"))
    write_foreign(random_dictionary(96, 48, 6), tmp_path / "foreign", "saelens")
    (tmp_path / "foreign" / "cfg.json").write_text(
        json.dumps(json.loads((tmp_path / "foreign" / "cfg.json").read_text()) | {"metadata": {}})
    )
    api.import_sae(tmp_path / "run", tmp_path / "foreign", 4, device="cpu")
    assert not run.layer_folder(MODEL, 4, 1).exists()
    opened = Session(RunDir.open(tmp_path / "run"))
    assert list(opened.dictionaries(MODEL)) == [1, 4] and [list(twins) for twins in opened.twins(MODEL)] == [[1]]
    [by_twins] = opened.twin_evaluation(MODEL)
    assert list(by_twins.layers) == [1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("4", "input should be less than or equal to 3, found 4"),
        ("-1", "input should be greater than or equal to 0, found -1"),
        ("0.5", "input should be a valid integer, got a number with a fractional part, found 0.5"),
        ("one", "input should be a valid integer, found 'one'"),
    ],
)
def test_a_wrong_number_is_refused_in_one_line(folder, value, said):
    with pytest.raises(InputError) as refused:
        load_study(folder / "study.yaml", [f"training.ceiling_seeds={value}"])
    assert str(refused.value).endswith(f"training.ceiling_seeds: {said}") and "\n" not in str(refused.value)
