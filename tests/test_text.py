"""Text to documents: every kind of source, the template, the split, and what is said when something is wrong."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from throughline.errors import InputError
from throughline.records import Document
from throughline.study import DataSpec
from throughline.text import announce_hub, is_heldout, measure_text, read_documents

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}, né {i} 🙂"} for i in range(60)]


def spec(path: object, **settings: Any) -> DataSpec:
    return DataSpec(path=str(path), **settings)


def both(data: DataSpec) -> list[Document]:
    return [*read_documents(data, "train"), *read_documents(data, "heldout")]


def message(data: DataSpec, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        list(read_documents(data, split))
    text = str(caught.value)
    assert "\n" not in text
    return text


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        pl.DataFrame(rows).write_parquet(path)
    return path


def in_order(documents: list[Document], data: DataSpec) -> list[str]:
    """The texts of both splits as they stood in the file."""
    number = {d.text: i for i, d in enumerate(documents)}
    assert len(number) == len(documents)
    heldout = {d.text for d in read_documents(data, "heldout")}
    train, held = (iter([d.text for d in documents if (d.text in heldout) == h]) for h in (False, True))
    return [next(held if is_heldout(i, data.heldout) else train) for i in range(len(documents))]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_table_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    data = spec(write_rows(tmp_path / f"rows{suffix}", ROWS), text="{question}\n{answer}")
    documents = both(data)
    assert in_order(documents, data) == [f"{r['question']}\n{r['answer']}" for r in ROWS]
    for document in documents:
        assert document.answer_start is not None
        question, answer = document.text[: document.answer_start], document.text[document.answer_start :]
        assert question.endswith("?")
        assert answer.startswith("\n")


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufefffirst\n  second line\n\n \t\n\nthird\r\nfourth\n\n".encode())
    assert [d.text for d in read_documents(spec(file), "train")] == ["first\n  second line", "third\nfourth"]


def test_a_text_file_without_blank_lines_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert [d.text for d in read_documents(spec(file), "train")] == ["one\ntwo"]
    said = message(spec(file), "heldout")
    assert "no documents for the heldout split: it has 1 in all" in said
    assert "blank lines" in said


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    write_rows(tmp_path / "a.jsonl", [{"text": "a1"}, {"text": " "}, {"text": None}])
    (tmp_path / "notes.md").write_text("not text of the study")
    assert [d.text for d in read_documents(spec(tmp_path, heldout=0.01), "train")] == ["a1", "b1", "b2"]
    (tmp_path / "c.csv").write_text("text\nc\n")
    assert "should hold files of one kind, found .csv and .jsonl" in message(spec(tmp_path))


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    assert f"folder {tmp_path} holds no .txt .jsonl .csv .parquet file" in message(spec(tmp_path))


def test_the_answer_begins_before_its_whitespace(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So.", "nested": {"a": ["x"]}}])
    written = {
        "{question} \n {answer}!": ("Why? \n So.!", 4),
        "{answer}": ("So.", 0),
        "{question}": ("Why?", None),
        "{nested[a][0]}:{answer:>5}{{}}": ("x:  So.{}", 2),
    }
    for template, expected in written.items():
        (document,) = read_documents(spec(file, text=template), "train")
        assert (document.text, document.answer_start) == expected


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.9])
def test_the_split_is_disjoint_complete_and_of_the_asked_share(tmp_path: Path, share: float) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(3000)])
    train, heldout = ([d.text for d in read_documents(spec(file, heldout=share), s)] for s in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(f"document {i}" for i in range(3000))
    assert abs(len(heldout) / 3000 - share) < 0.005
    assert [d.text for d in read_documents(spec(file, heldout=share), "heldout", seed=7)] == heldout


def test_every_stretch_has_its_share_held_out() -> None:
    for start in range(0, 5000, 100):
        assert 7 <= sum(is_heldout(i, 0.1) for i in range(start, start + 100)) <= 13
    assert not is_heldout(0, 0.1)


def test_the_zoo_brings_its_own_split() -> None:
    train, heldout = (islice(read_documents(spec("zoo/arithmetic"), s, seed=3), 50) for s in ("train", "heldout"))
    assert not {d.text for d in train} & {d.text for d in heldout}
    again = [d.text for d in islice(read_documents(spec("zoo/arithmetic"), "train", seed=4), 50)]
    assert again != [d.text for d in islice(read_documents(spec("zoo/arithmetic"), "train", seed=3), 50)]
    assert "zoo/arithmetic" in message(spec("zoo/poetry"))


def test_gsm8k_is_read_through_its_template() -> None:
    if not GSM8K.exists():
        pytest.skip("the shared data is not beside this checkout; the generated tables above cover the same law")
    documents = list(read_documents(spec(GSM8K, text="{question}\n{answer}"), "heldout"))
    assert abs(len(documents) / 7473 - 0.1) < 0.005
    assert all(d.answer_start and d.text[d.answer_start] in "\n " for d in documents)


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.csv", "gone.parquet", "./gone", "~/gone-from-home"])
def test_a_missing_file_is_not_taken_for_a_hub_id(name: str) -> None:
    assert f"data.path {name} does not exist" in message(spec(name))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert "should be one of .txt .jsonl .csv .parquet, found .json" in message(spec(tmp_path / "a.json"))


def test_a_missing_field_names_those_there_are(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        file = write_rows(tmp_path / f"a{suffix}", ROWS)
        said = message(spec(file, text="{question} {solution}"))
        assert str(file) in said
        assert "has no field 'solution'" in said
        assert "its fields are question, answer" in said


@pytest.mark.parametrize(
    ("template", "said"),
    [("{text", "is not a format string"), ("text", "names no field"), ("{text:d}", "cannot write field 'text'")],
)
def test_a_bad_template_is_refused(tmp_path: Path, template: str, said: str) -> None:
    assert said in message(spec(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), text=template))


def test_malformed_json_is_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": \n')
    assert f"{file}:3 is not JSON" in message(spec(file))
    file.write_text('{"text": "a"}\n[1]\n')
    assert f"{file}:2 should be an object of fields, found list" in message(spec(file))
    file.write_text('{"text": "\\ud83d"}\n')
    assert f"{file}:1 holds half a surrogate pair" in message(spec(file))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b'text\n{"text": "caf\xe9"}\n' if suffix != ".jsonl" else b'{"text": "caf\xe9"}\n')
    assert f"{file} should be UTF-8, found byte 0xe9" in message(spec(file))


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not a table at all")
    assert "a.parquet is not Parquet" in message(spec(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text("text\na,b,c\n")
    assert "a.csv is not CSV" in message(spec(tmp_path / "a.csv"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_an_empty_file_has_no_documents(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(file)
    else:
        file.write_text("\n \n")
    assert f"{file} has no documents" in message(spec(file))


def test_an_unknown_split_is_refused() -> None:
    assert "split 'test' asked of zoo/arithmetic, which has train and heldout" in message(
        spec("zoo/arithmetic"), "test"
    )


class Hub:
    """Stands for the `datasets` module."""

    def __init__(self, rows: list[dict], error: Exception | None = None) -> None:
        self.rows, self.error, self.asked = rows, error, ()

    def load_dataset(self, path: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict]:
        self.asked = (path, config, split, streaming)
        if self.error:
            raise self.error
        return iter(self.rows)


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ROWS)
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    data = spec("openai/gsm8k", config="main", split="test", text="{question}")
    assert len(both(data)) == len(ROWS)
    assert hub.asked == ("openai/gsm8k", "main", "test", True)
    said = message(spec("openai/gsm8k", text="{text}"))
    assert "hub dataset 'openai/gsm8k', split 'train', row 1, has no field 'text'" in said


def test_hub_failures_say_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub([], ConnectionError("no\nroute")))  # type: ignore[arg-type]
    said = message(spec("nobody/nothing", config="c"))
    assert "hub dataset 'nobody/nothing', config 'c', split 'train' cannot be read: no route" in said
    assert "offline the text must be a local file or folder (.txt .jsonl .csv .parquet)" in said


def test_only_a_hub_dataset_is_announced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    said: list[str] = []
    for path in ("zoo/arithmetic", tmp_path, tmp_path / "a.jsonl", "none.txt", "./none"):
        announce_hub(spec(path), said.append)
    assert not said
    announce_hub(spec("openai/gsm8k"), said.append)
    assert said == ["reading openai/gsm8k from the Hugging Face hub"]


def test_local_text_is_measured_and_endless_text_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert measure_text(DataSpec(path=str(tmp_path / "a.jsonl"))) == 16
    assert measure_text(DataSpec(path=str(tmp_path))) == 16
    assert measure_text(DataSpec(path="zoo/arithmetic")) is None
    assert measure_text(DataSpec(path="nobody/nothing")) is None
