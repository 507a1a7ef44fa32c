"""The study's fields in words, made from their descriptions in `study.py`: a commented study file, and tables for docs/study.md."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from throughline.study import LlmSpec, ModelSpec, Section, Study

INTRODUCTION = """\
# A throughline study: what to do. Start it with   throughline run THIS_FILE
# What begins with # is not set: it shows the default, or an example where there is none. docs/study.md says more of each field.
"""
COLUMN = 42  # where comments begin, but for lines that are longer
HEAD = ["| field | default | meaning |", "|---|---|---|"]


def sections() -> dict[str, type[Section]]:
    """The tables of docs/study.md, by the name that each has there."""
    within = {name: field.annotation for name, field in Study.model_fields.items() if _is_section(field)}
    return {"study": Study, "models": ModelSpec, **within, "features.llm": LlmSpec}  # pyright: ignore[reportReturnType]


def write_table(section: type[Section]) -> list[str]:
    """Field, default and meaning, as lines of a Markdown table. Fields that are sections have tables of their own."""
    return HEAD + [
        f"| `{name}` | {_show_default(field)} | {(field.description or '').removesuffix('.')} |"
        for name, field in section.model_fields.items()
        if not _is_section(field)
    ]


def write_study(tree: Mapping[str, Any]) -> str:
    """A study file with these values and a comment to every field; fields that `tree` has not are commented out."""
    parts = [INTRODUCTION.rstrip()]
    for name, field in Study.model_fields.items():
        if name == "models":
            models = [spec if isinstance(spec, Mapping) else {"path": spec} for spec in tree[name]]
            items = [line for spec in models for line in _write_item(spec)]
            parts.append("\n".join([_beside("models:", field.description), *items]))
        elif _is_section(field):
            section: Any = field.annotation
            given = tree.get(name, {})
            parts.append("\n".join([_beside(f"{name}:", section.__doc__), *_write_fields(section, given, "  ")]))
        else:
            parts.append("\n".join(_write_fields(Study, tree, "", [name])))
    return "\n\n".join(parts) + "\n"


def _write_item(spec: Mapping[str, Any]) -> list[str]:
    first, *others = _write_fields(ModelSpec, spec, "    ")
    return [f"  - {first.removeprefix('    ')}", *others]


def _write_fields(
    section: type[Section], given: Mapping[str, Any], indent: str, names: list[str] | None = None
) -> list[str]:
    lines = []
    for name in names or section.model_fields:
        field = section.model_fields[name]
        shown = given[name] if name in given else _example(field)
        lines.append(_beside(f"{indent}{'' if name in given else '# '}{name}: {_as_yaml(shown)}", field.description))
    return lines


def _beside(start: str, description: str | None) -> str:
    """A line and, as its comment, the first sentence of a description."""
    [sentence, *_] = re.split(r"(?<=\.)\s", " ".join((description or "").split()), maxsplit=1)
    comment = sentence.removesuffix(".").replace("`", "")
    first = comment[:1].lower() if re.match(r"A |[A-Z][a-z]", comment) else comment[:1]
    return f"{start.ljust(COLUMN - 2)}  # {first}{comment[1:]}"


def _example(field: FieldInfo) -> Any:
    """The default; an example where the default is none or empty."""
    return field.examples[0] if field.examples else field.get_default(call_default_factory=True)


def _show_default(field: FieldInfo) -> str:
    if field.is_required() or field.default == "":
        return ""
    if field.default is None or field.default in ({}, []):
        return "none"
    if isinstance(field.default, str):
        return f"`{field.default}`"
    return (
        f"`{_as_yaml(field.default)}`"
        if isinstance(field.default, list)
        else str(yaml.safe_dump(field.default)).split()[0]
    )


def _as_yaml(value: Any) -> str:
    """On one line; `200_000` for 200000."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if value >= 10_000 else str(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .removesuffix("\n...\n")
        .rstrip("\n")
    )


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)
