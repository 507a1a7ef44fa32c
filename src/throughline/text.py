"""Text to documents: files, hub datasets and the zoo's generator, each split into training and held-out documents.

The split of files and hub datasets is by number alone. Document i (counting from 0, empty ones left out) is held out if the
fractional part of (i + 1) / golden ratio, in 64-bit integers, is below `data.heldout`: the same for every seed, the right
share of every long stretch, and never the same neighbours together (Knuth, The Art of Computer Programming 3, 6.4).
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any

from throughline.errors import InputError
from throughline.records import Document
from throughline.study import DataSpec
from throughline.zoo.texts import sample_problems

SPLITS = ("train", "heldout")
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
BATCH_ROWS = 1024  # of a parquet file, in memory at once

Row = tuple[str, dict[str, Any]]  # where it stands, for error messages, and its fields
Template = list[tuple[str, str | None, str | None, str | None]]  # as string.Formatter.parse gives it


def read_documents(data: DataSpec, split: str, seed: int = 0) -> Iterator[Document]:
    """Documents of one split ("train" or "heldout") in their order; endless for zoo/arithmetic, which alone heeds `seed`.

    `data.text` makes a row into a text; null fields count as empty, empty texts are skipped. `answer_start` is where the field
    `answer` begins, before any whitespace in front of it. Raises InputError for an unknown split or path, a bad template, a
    missing field, a damaged file, and, once read to the end, for a split without documents.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} asked of {data.path}, which has {' and '.join(SPLITS)}")
    if data.path == "zoo/arithmetic":
        return sample_problems(split, seed)
    if data.path.startswith("zoo/"):
        raise InputError(f"data.path {data.path!r} is unknown; the zoo's only text is zoo/arithmetic")
    return _split(_compose(_rows(data), _parse(data.text)), data, split)


def is_hub_dataset(data: DataSpec) -> bool:
    """True if the text is fetched from the Hugging Face hub: the path is neither the zoo's nor there, nor looks like a file."""
    path = Path(data.path).expanduser()
    return not (data.path.startswith("zoo/") or path.exists() or _must_be_local(data.path))


def announce_hub(data: DataSpec, say: Callable[[str], None]) -> None:
    """Say that a hub dataset is about to be read: the network can let one wait for minutes."""
    if is_hub_dataset(data):
        say(f"reading {data.path} from the Hugging Face hub")


def check_prompt(prompt: str) -> None:
    """InputError if a prompt has no text."""
    if not prompt.strip():
        raise InputError('the prompt is empty; give one in quotes, such as "What is 15 + 27?"')


def measure_text(data: DataSpec) -> int | None:
    """Bytes of a local source; None for a hub dataset or the bundled generator, which does not end."""
    path = Path(data.path).expanduser()
    if not path.exists():
        return None
    return sum(file.stat().st_size for file in (_files_in(path) if path.is_dir() else [path]))


def is_heldout(number: int, share: float) -> bool:
    """True if document `number` of a file or hub dataset belongs to the held-out share."""
    return (number + 1) * GOLDEN % 2**64 < share * 2**64


def _split(documents: Iterator[Document], data: DataSpec, split: str) -> Iterator[Document]:
    number, found = -1, False
    for number, document in enumerate(documents):
        if is_heldout(number, data.heldout) == (split == "heldout"):
            found = True
            yield document
    if number < 0:
        raise InputError(f"{data.path} has no documents: no text in it that is not empty")
    if not found:
        advice = "separate documents by blank lines or give more text" if _is_text_file(data.path) else "give more text"
        raise InputError(
            f"{data.path} has no documents for the {split} split: it has {number + 1} in all and data.heldout is "
            f"{data.heldout}; {advice}, or change data.heldout"
        )


def _is_text_file(path: str) -> bool:
    return path.lower().endswith(".txt")


def _compose(rows: Iterator[Row], template: Template) -> Iterator[Document]:
    for where, row in rows:
        document = _write(template, row, where)
        if document.text.strip():
            yield document


def _parse(template: str) -> Template:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"data.text {template!r} is not a format string: {error}") from None
    if all(name is None for _, name, _, _ in parts):
        raise InputError(f'data.text {template!r} names no field; write fields in braces, such as "{{text}}"')
    return parts


def _write(template: Template, row: dict[str, Any], where: str) -> Document:
    formatter, text, answer_start = Formatter(), "", None
    for literal, name, spec, conversion in template:
        text += literal
        if name is None:
            continue
        try:
            value = formatter.get_field(name, (), row)[0]
            value = "" if value is None else formatter.convert_field(value, conversion)
            written = format(value, spec or "")
        except (KeyError, IndexError, AttributeError, TypeError):
            raise InputError(f"{where} has no field {name!r} (data.text); its fields are {', '.join(row)}") from None
        except ValueError as error:
            raise InputError(f"{where}: data.text cannot write field {name!r}: {error}") from None
        if name == "answer" and written and answer_start is None:
            answer_start = len(text.rstrip())
        text += written
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where} holds half a surrogate pair, which no text has; repair or leave out that row")
    return Document(text=text, answer_start=answer_start)


def _rows(data: DataSpec) -> Iterator[Row]:
    """Rows of whatever `data.path` names. Files are looked for at once, hub datasets when the first row is asked for."""
    path = Path(data.path).expanduser()
    if path.is_dir():
        return _read_files(_files_in(path), data)
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path} should be one of {' '.join(SUFFIXES)}, found {path.suffix or 'no suffix'}")
        return _read_files([path], data)
    if _must_be_local(data.path):
        raise InputError(
            f"data.path {data.path} does not exist; expected a {' '.join(SUFFIXES)} file, a folder or a hub id"
        )
    return _read_hub(data)


def _must_be_local(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES or path.startswith((".", "/", "~"))


def _files_in(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    kinds = sorted({p.suffix.lower() for p in files})
    if not files:
        raise InputError(f"folder {folder} holds no {' '.join(SUFFIXES)} file")
    if len(kinds) > 1:
        raise InputError(f"folder {folder} should hold files of one kind, found {' and '.join(kinds)}; name one file")
    return files


def _read_files(files: list[Path], data: DataSpec) -> Iterator[Row]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    for file in files:
        try:
            yield from readers[file.suffix.lower()](file, data)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} should be UTF-8, found byte 0x{error.object[error.start]:02x}; convert it"
            ) from None
        except OSError as error:
            raise InputError(f"{file} cannot be read: {_one_line(error)}") from None


def _read_txt(file: Path, data: DataSpec) -> Iterator[Row]:
    lines: list[str] = []
    with file.open(encoding="utf-8-sig") as source:
        for number, line in enumerate(source, start=1):
            if line.strip():
                lines.append(line)
            elif lines:
                yield f"{file}:{number - len(lines)}", {"text": "".join(lines).rstrip("\n")}
                lines = []
    if lines:
        yield f"{file}", {"text": "".join(lines).rstrip("\n")}


def _read_jsonl(file: Path, data: DataSpec) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as source:
        for number, line in enumerate(source, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}:{number} is not JSON: {getattr(error, 'msg', error)}") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}:{number} should be an object of fields, found {type(row).__name__}")
            yield f"{file}:{number}", row


def _read_csv(file: Path, data: DataSpec) -> Iterator[Row]:
    """Every field as text, the whole file at once."""
    import polars as pl

    content = file.read_bytes()
    content.decode("utf-8")  # polars would not say which byte is wrong
    if not content.strip():
        return
    try:
        table = pl.read_csv(content, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{file} is not CSV: {_one_line(error)}") from None
    for number, row in enumerate(table.iter_rows(named=True), start=1):
        yield f"{file} row {number}", row


def _read_parquet(file: Path, data: DataSpec) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            wanted = [name for _, name, _, _ in _parse(data.text) if name]
            columns = wanted if set(wanted) <= set(table.schema_arrow.names) else None
            batches = table.iter_batches(BATCH_ROWS, columns=columns)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"{file} row {number}", row
    except pa.ArrowException as error:
        raise InputError(f"{file} is not Parquet: {_one_line(error)}") from None


def _read_hub(data: DataSpec) -> Iterator[Row]:
    import datasets

    asked = (
        f"hub dataset {data.path!r}" + (f", config {data.config!r}" if data.config else "") + f", split {data.split!r}"
    )
    try:
        with _without_retry_messages():
            rows = datasets.load_dataset(data.path, data.config, split=data.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{asked}, row {number},", dict(row)
    except InputError:
        raise
    except Exception as error:  # the hub's client raises many kinds, some of them its dependencies'
        raise InputError(
            f"{asked} cannot be read: {_one_line(error)}; check the name and the connection; "
            f"offline the text must be a local file or folder ({' '.join(SUFFIXES)})"
        ) from None


@contextmanager
def _without_retry_messages() -> Iterator[None]:
    """The hub's client announces every try of a connection that fails; what matters is how it ends."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        client.setLevel(level)


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:200] + "…"
