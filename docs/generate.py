"""Writes the parts of docs/ that are made from the code: `make docs`. Tests compare them with what lies here.

cli.md              the help of every command
study.md            its tables; what stands between them is written by hand
trace.schema.json   JSON Schema of `throughline trace --json`
../web/openapi.json what the page asks of a server, and what a page without one holds; its types are made from it
"""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
INTRODUCTION = """# Commands

Written by `make docs` from the commands themselves.

Results go to standard output, news of the work to standard error. Exit codes: 0 done; 1 a gate or a job failed; 2 the input
is wrong, said in one line; 130 stopped by Ctrl-C. Every command is a Python function of the same name in `throughline.api`.
"""


def render_all() -> dict[str, str]:
    """File names and contents."""
    from throughline.records import Trace

    page = "../web/openapi.json"
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Trace.model_json_schema()
    as_json = {"trace.schema.json": schema, page: describe_page()}
    return {"cli.md": describe_commands(), "study.md": describe_study()} | {
        name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in as_json.items()
    }


def describe_page() -> dict[str, Any]:
    """The server's API, with `PageData` among its types."""
    from pydantic.json_schema import models_json_schema

    from throughline.report.contents import PageData
    from throughline.serving.app import describe_api

    described = describe_api()
    _, data = models_json_schema([(PageData, "serialization")], ref_template="#/components/schemas/{model}")
    described["components"]["schemas"] = data["$defs"] | described["components"]["schemas"]
    return described


def describe_study() -> str:
    """The page as it is, with tables of the fields as they are now."""
    from throughline.study_fields import sections, write_table

    page = (FOLDER / "study.md").read_text(encoding="utf-8")
    for name, section in sections().items():
        before, mark, rest = page.partition(
            f"<!-- {name}: begin, made by `make docs` from src/throughline/study.py -->\n"
        )
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        assert mark and end, f"docs/study.md has no place for the table {name}"
        page = before + mark + "\n".join(write_table(section)) + "\n" + end + after
    return page


def describe_commands() -> str:
    """The help of the program and of each command, as Markdown."""
    from throughline.cli.commands import app

    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    parts = [INTRODUCTION, _block(help_of())]
    parts += [f"## {name}\n\n{_block(help_of(name))}" for name in names]
    return "\n".join(parts)


def help_of(*command: str) -> str:
    """What `throughline COMMAND --help` prints on a terminal of 80 columns."""
    from throughline.cli import main

    written, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip().splitlines())


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    for name, content in render_all().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        print(f"written: {name}")
