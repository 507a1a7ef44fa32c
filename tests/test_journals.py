"""What a training wrote down, read back by the libraries that it was written for."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import throughline
from throughline import journals
from throughline.errors import InputError
from throughline.journals import JsonLines, check_extras
from throughline.progress import read_lines
from throughline.run_dir import RunDir
from throughline.study import load_study
from throughline.training import Progress


def progress(step: int, loss: float = 0.5) -> Progress:
    return Progress("m", [0, 3], step, 10, 100.0, 1.0, [loss, 0.25], [8.0, 8.0], [0.5, 0.4], [0.0, 0.1])


def study_file(folder: Path, shared: Path, logging: str) -> Path:
    stories = shared / "stories260K"
    file = folder / "study.yaml"
    file.write_text(
        f"""
name: written-down
models: [{{name: s, path: {stories}, layers: [1, 3]}}]
data: {{path: {stories / "samples.jsonl"}, context: 64}}
dictionary: {{d_sae: 96, k: 4}}
training: {{tokens: 6000, batch_tokens: 64}}
logging: {logging}
""".replace("name: written-down", "name: written-down")
    )
    return file


def test_json_lines_are_always_written(shared, tmp_path):
    throughline.train(study_file(tmp_path, shared, "{}"), tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "models" / "s" / "training_01-03.jsonl")
    last = rows[-1]
    assert last["step"] == last["num_steps"] == 6000 // 64
    assert last["tokens"] == 64 * last["step"] and last["layers"] == [1, 3]
    assert all(0 < value < 1 for value in last["fvu"]) and last["l0"] == [4.0, 4.0]
    assert not (tmp_path / "run" / "tensorboard").exists() and not (tmp_path / "run" / "wandb").exists()


def test_a_line_cut_short_is_left_out_and_a_step_counts_once(tmp_path):
    """As after a kill: the run goes on from a checkpoint before the last lines."""
    path = tmp_path / "m" / "training.jsonl"
    first = JsonLines(path, 64)
    for step in (1, 2, 3):
        first.write(progress(step))
    first.close()
    path.write_text(path.read_text()[:-30])
    again = JsonLines(path, 64)
    again.write(progress(2, loss=0.125))
    again.write(progress(4))
    again.close()
    assert [row["step"] for row in read_lines(path)] == [1, 2, 4]
    assert read_lines(path)[1]["loss"][0] == 0.125
    assert read_lines(tmp_path / "nothing.jsonl") == []


def test_tensorboard_reads_what_was_written(shared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    throughline.train(study_file(tmp_path, shared, "{tensorboard: true}"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "s")).Reload()
    assert {f"layer_{layer}/{name}" for layer in ("01", "03") for name in journals.MEASURES} <= set(
        events.Tags()["scalars"]
    )
    last = read_lines(tmp_path / "run" / "models" / "s" / "training_01-03.jsonl")[-1]
    found = events.Scalars("layer_03/fvu")[-1]
    assert found.step == last["step"] and found.value == pytest.approx(last["fvu"][1], rel=1e-6)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # the end of a block holds no header
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_keeps_what_was_written(shared, tmp_path, monkeypatch, capfd):
    """The real library, offline. Nothing is printed."""
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # of another test; wandb would advertise something for it
    throughline.train(study_file(tmp_path, shared, "{wandb: my-project}"), tmp_path / "run")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    rows, project = [], ""
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        project = record.run.project or project
        if record.HasField("history"):
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item})
    last = read_lines(tmp_path / "run" / "models" / "s" / "training_01-03.jsonl")[-1]
    assert project == "my-project"
    assert rows[-1]["step"] == last["step"] and rows[-1]["layer_03/fvu"] == pytest.approx(last["fvu"][1])
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


@pytest.mark.parametrize(("name", "logging"), [("tensorboard", "{tensorboard: true}"), ("wandb", "{wandb: p}")])
def test_a_missing_library_is_said_before_anything_is_written(shared, tmp_path, monkeypatch, name, logging):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(journals, "find_spec", lambda wanted: None if wanted == name else object())
    file = study_file(tmp_path, shared, logging)
    with pytest.raises(InputError, match=rf"logging\.{name} .* pip install 'throughline\[{name}\]'"):
        check_extras(load_study(file))
    with pytest.raises(InputError, match="pip install"):
        throughline.train(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_journals_are_closed_when_training_fails(shared, tmp_path, monkeypatch):
    closed, close = [], journals.JsonLines.close
    monkeypatch.setattr(journals.JsonLines, "close", lambda self: (closed.append(self), close(self)))
    study = load_study(study_file(tmp_path, shared, "{}"))
    run = RunDir(tmp_path)
    with pytest.raises(ZeroDivisionError), journals.open_journals(run, study, "s", [0, 1], 64):
        raise ZeroDivisionError
    assert len(closed) == 1
