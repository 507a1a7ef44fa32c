"""The run folder: files that are whole or not there, steps that are redone when they must be, and names with dots."""

import json
import os
import time

import numpy as np
import polars as pl
import pytest

from synthetic_run import build_run, make_study_tree
from throughline.errors import DamagedFileError, InputError
from throughline.files import replacing
from throughline.records import FEATURE_COLUMNS, JobState, TransferInfo, TransferResult
from throughline.run_dir import RunDir, digest_key
from throughline.study import parse_study


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "run", parse_study(make_study_tree()))


def make_transfer(metric="matching", source="a", target="b", value=0.5) -> TransferResult:
    info = TransferInfo(
        metric=metric,
        source=source,
        target=target,
        source_layers=[0],
        target_layers=[0, 1],
        quantity="a share",
        null=None,
        ceiling=None,
        num_tokens=10,
        num_documents=2,
        coverage=1.0,
        seed=0,
    )
    return TransferResult(info, {"value": np.full((1, 2), value)})


def features_table(density=0.1) -> pl.DataFrame:
    blank = {"Int32": 0, "Int64": 0, "Float64": density}
    row = {name: blank.get(str(kind), []) for name, kind in FEATURE_COLUMNS.items()}
    return pl.DataFrame([row], schema=FEATURE_COLUMNS)


# ---- opening


def test_a_new_run_knows_its_study_and_where_it_was_made(run):
    opened = RunDir.open(run.root)
    assert opened.study() == parse_study(make_study_tree())
    info = opened.info()
    assert info.name == "synthetic"
    assert {"python", "torch", "throughline"} <= set(info.versions)
    assert info.hardware["cores"] == os.cpu_count()
    assert not info.forced


def test_creating_again_keeps_what_is_there(run):
    run.update_info(forced=True)
    again = RunDir.create(run.root, parse_study(make_study_tree() | {"name": "renamed"}))
    assert again.info().forced
    assert again.study().name == "renamed"


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RunDir.create(tmp_path / "run", parse_study(make_study_tree())).info().commit is None


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist; `throughline train"):
        RunDir.open(tmp_path / "none")
    with pytest.raises(InputError, match="is not a run folder"):
        RunDir.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError):
        RunDir.open(tmp_path / "file")


# ---- whole files


def test_a_failed_write_leaves_the_old_file_and_no_other(run):
    run.write_text("note.txt", "old")
    with pytest.raises(RuntimeError), replacing(run.root / "note.txt") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert run.read_text("note.txt") == "old"
    assert sorted(p.name for p in run.root.iterdir()) == ["note.txt", "run.json", "study.yaml"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(run):
    run.write_text("note.txt", "old")
    with replacing(run.root / "note.txt") as temporary:
        temporary.write_text("new")
        assert temporary.parent == run.root  # a rename within one folder is atomic
        assert run.read_text("note.txt") == "old"
    assert run.read_text("note.txt") == "new"


def test_half_written_files_of_a_killed_process_are_ignored(tmp_path):
    run = build_run(tmp_path / "run")
    models = [spec.name for spec in run.study().models]

    def everything():
        quality = {name: run.quality(name) for name in models}
        return quality, run.transfers(), run.traces(), run.comparisons()

    before = everything()
    for path in [p for p in run.root.rglob("*") if p.is_file()]:
        path.with_name(f".{path.name}.4711.tmp").write_bytes(path.read_bytes()[:7])
    assert everything() == before


def test_traces_of_another_version_are_left_out_and_named(tmp_path):
    run = build_run(tmp_path / "run")
    (kept, *_), (compared,) = run.traces(), run.comparisons()
    name = run.write_text("traces/old.json", json.dumps({"version": 1, "model": "m", "prediction_r": 0.9}))
    old = compared.model_dump() | {"prompt": "another", "traces": {"m": {"version": 1}}}
    other = run.write_text("traces/compare-old.json", json.dumps(old))
    assert run.traces()[0] == kept and len(run.traces()) == 3 and run.comparisons() == [compared]
    assert run.outdated_traces() == [name, other]
    run.write_text(name, '{"version": 2, "model"')  # cut short: not old but damaged, which is said
    with pytest.raises(DamagedFileError, match=r"old\.json"):
        run.traces()


# ---- steps


def do(run: RunDir, text="content", key="k") -> None:
    with run.step("train/a", key) as files:
        files.append(run.write_text("models/a/file.txt", text))


def test_a_step_is_done_for_its_key_only(run):
    assert not run.is_done("train/a", "k")
    do(run)
    assert run.is_done("train/a", "k")
    assert not run.is_done("train/a", "other")
    assert not run.is_done("train/b", "k")


def test_a_step_that_failed_is_not_done(run):
    with pytest.raises(RuntimeError), run.step("train/a", "k") as files:
        files.append(run.write_text("models/a/file.txt", "x"))
        raise RuntimeError
    assert not run.is_done("train/a", "k")


@pytest.mark.parametrize("damage", ["changed", "truncated", "removed"])
def test_a_damaged_file_is_named_and_its_step_done_again(run, damage):
    do(run)
    path = run.root / "models/a/file.txt"
    if damage == "removed":
        path.unlink()
    else:
        path.write_text({"changed": "kontent", "truncated": "cont"}[damage])
    said: list[str] = []
    assert not run.is_done("train/a", "k", said.append)
    assert len(said) == 1
    assert str(path) in said[0]
    assert "train/a is done again" in said[0]
    with pytest.raises(DamagedFileError, match=r"file.txt does not match its checksum; `throughline run .* --resume`"):
        run.check("train/a")
    do(run)
    assert run.is_done("train/a", "k", said.append)
    run.check("train/a")
    assert len(said) == 1


def test_a_damaged_table_or_matrix_is_never_read(run):
    with run.step("features/small", "k") as files:
        files.append(run.write_table("small", "features", features_table()))
    with run.step("transfer/matching/a/b", "k") as files:
        files += run.write_transfer(make_transfer())
    assert run.table("small", "features").equals(features_table())
    assert run.transfer("matching", "a", "b").arrays["value"].tolist() == [[0.5, 0.5]]
    run.write_table("small", "features", features_table(density=0.9))  # sound, but not what the step wrote
    with pytest.raises(DamagedFileError, match=r"features\.parquet does not match its checksum"):
        run.table("small", "features")
    (run.root / "transfer/matching/a__b.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DamagedFileError, match=r"a__b\.safetensors does not match its checksum"):
        run.transfer("matching", "a", "b")


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("study.yaml", "", lambda run: run.study()),
        ("study.yaml", "name: [", lambda run: run.study()),
        ("run.json", "{", lambda run: run.info()),
        ("run.json", '{"name": 5}', lambda run: run.info()),
        ("manifest/train,a.json", '{"key"', lambda run: run.manifest()),
        ("manifest/train,a.json", "[]", lambda run: run.manifest()),
        ("manifest/train,a.json", "{}", lambda run: run.is_done("train/a", "k")),
        ("progress/a,00-05.json", "", lambda run: run.jobs()),
        ("models/small/features.parquet", "PAR1", lambda run: run.table("small", "features")),
        ("transfer/matching/a__b.json", "{}", lambda run: run.transfers()),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(run, name, content, read):
    run.write_text(name, content)
    with pytest.raises(DamagedFileError) as caught:
        read(run)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value) and ": :" not in str(caught.value)
    assert "delete it" in str(caught.value) or "--resume` makes it again" in str(caught.value)


def test_a_damaged_run_json_is_made_anew_by_who_goes_on_with_the_run(run):
    study = run.study()
    run.write_text("run.json", "{")
    assert RunDir.create(run.root, study).info().name == study.name
    run.update_info(forced=True)
    assert RunDir.create(run.root, study).info().forced  # a sound one is kept


def test_what_a_step_wrote_and_is_missing_is_named(tmp_path):
    run = build_run(tmp_path / "run")
    with run.step("evaluate/small", "k") as files:
        files += [run.write_quality(q) for q in run.quality("small")]
    (run.layer_folder("small", 0) / "quality.json").unlink()
    with pytest.raises(
        DamagedFileError, match=r"layer_00/quality.json is missing; `throughline run STUDY --out .* makes"
    ):
        run.quality("small")


def test_files_and_empty_names_are_no_run_folders(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; give the folder of a run"):
        RunDir.open(tmp_path / "file")
    with pytest.raises(InputError, match="the name of a run folder is empty"):
        RunDir.open("")


def test_the_manifest_says_when_and_from_what(run):
    do(run)
    step = json.loads((run.root / "manifest/train,a.json").read_text())
    assert step["step"] == "train/a"
    assert step["key"] == "k"
    assert step["seconds"] >= 0
    assert set(step["files"]) == {"models/a/file.txt"}
    assert len(step["files"]["models/a/file.txt"]) == 64


def test_steps_that_are_done_at_once_share_the_seconds(run):
    with run.steps({"train/a/0": "k", "train/a/1": "k"}):
        time.sleep(0.1)
    assert 0.05 <= run.manifest()["train/a/0"].seconds == run.manifest()["train/a/1"].seconds < 0.1


def test_keys_tell_values_apart_and_nothing_else():
    assert digest_key({"a": 1, "b": [2]}) == digest_key({"b": [2], "a": 1})
    keys = [digest_key(*parts) for parts in ((1,), (2,), ("1",), (1, None), ([1],), ({"a": 1},), (1.5,), ())]
    assert len(set(keys)) == len(keys)


# ---- names and records


@pytest.mark.parametrize("model", ["zoo/gpt2", "pythia-1.4b", "gpt2.v1.5", "Qwen2.5-0.5B", "a__b"])
def test_names_with_dots_and_slashes_keep_their_files_apart(run, model):
    other = model.rpartition(".")[0] or "x"
    for source, value in ((model, 0.25), (other, 0.75)):
        names = run.write_transfer(make_transfer(source=source, target=model, value=value))
        assert all((run.root / name).is_file() for name in names)
    assert run.transfer("matching", model, model).arrays["value"][0, 0] == 0.25
    assert run.transfer("matching", other, model).arrays["value"][0, 0] == 0.75
    assert {(i.source, i.target) for i in run.transfers()} == {(model, model), (other, model)}


def test_two_names_joined_are_not_another_two(run):
    first = run.write_transfer(make_transfer(source="a__b", target="c"))
    second = run.write_transfer(make_transfer(source="a", target="b__c"))
    assert not set(first) & set(second)


def test_what_is_not_there_yet_names_its_command(run):
    with pytest.raises(InputError, match="small has no features yet; `throughline features "):
        run.table("small", "features")
    with pytest.raises(InputError, match="small has no labels yet; `throughline label "):
        run.table("small", "labels")
    with pytest.raises(InputError, match="no matching from a to b yet; `throughline transfer "):
        run.transfer("matching", "a", "b")


def test_layers_that_the_study_no_longer_has_are_left_out(tmp_path):
    run = build_run(tmp_path / "run")
    everything = run.quality("small")
    assert [q.layer for q in everything] == [0, 1, 2]
    with run.step("evaluate/small", "k") as files:
        files += [run.write_quality(q) for q in everything[:2]]
    assert [q.layer for q in run.quality("small")] == [0, 1]


def test_trained_and_imported_layers_are_those_of_finished_steps(run):
    assert run.trained_layers("small") == []
    keys = {"train/small/11": "k", "train/small/2": "imported k", "train/small/5": "imported k", "train/small/x/1": "k"}
    with run.steps(keys) as files:
        for layer in (11, 2):
            files[f"train/small/{layer}"].append(run.write_text(f"{run.layer_name('small', layer)}/cfg.json", "{}"))
    assert run.trained_layers("small") == [2, 5, 11]
    assert run.imported("small") == {2: "imported k"}  # the folder of layer 5 is not there
    assert run.is_done("train/small/2", "imported k")
    (run.layer_folder("small", 2) / "cfg.json").write_text("{ }")
    with pytest.raises(DamagedFileError, match="import it again with `throughline import`, or delete its folder"):
        run.is_done("train/small/2", "imported k")


def test_a_forgotten_step_is_not_done(run):
    do(run)
    run.forget("train/a")
    assert not run.is_done("train/a", "k")


def test_states_of_jobs_are_files_of_their_own(run):
    assert run.jobs() == []
    here = {"host": "h", "pid": 1, "device": "cpu", "at": 0.0}
    first, second = (JobState(model="a/b, c", layers=layers, **here) for layers in ([0, 1], [2]))
    run.note_job(first)
    run.note_job(second)
    run.note_job(first.model_copy(update={"step": 2}))
    assert run.jobs() == [first.model_copy(update={"step": 2}), second]
    run.forget_job("a/b, c", [0, 1])
    run.forget_job("a/b, c", [0, 1])
    assert run.jobs() == [second]


@pytest.mark.parametrize("name", ["..", "a/../b", "a b", "a,b", "ü", "a%2Cb"])
def test_a_step_of_any_name_is_one_file_of_its_own(run, name):
    with run.step(f"train/{name}/0", "k"):
        pass
    assert run.is_done(f"train/{name}/0", "k") and run.trained_layers(name) == [0]
    assert len(list((run.root / "manifest").iterdir())) == 1
    assert not run.is_done(f"train/{name.replace(',', '/')}/0", "k") or "," not in name
