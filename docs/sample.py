"""README's sample trace, made from a finished run of the demo.

    throughline demo --out runs/demo
    python docs/sample.py runs/demo --write    into README.md, with the record that it shows as docs/sample-trace.json
    python docs/sample.py runs/demo --check    exits with 1 if this run's trace does not have README's form

Digits, features, labels and the number of rows differ from machine to machine, so `--check` compares kinds of line and their order.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from throughline.cli.traced import trace as print_trace
from throughline.records import Trace
from throughline.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
README, RECORD = ROOT / "README.md", ROOT / "docs" / "sample-trace.json"
STUDY = ROOT / "src" / "throughline" / "presets" / "demo.yaml"
MODEL, PROMPT = "zoo/pythia", "What is 15 + 27?"
LAYERS, NUM_CHAINS = (0, 3), 1  # what README shows; the rest is left out
BEGIN, END = "<!-- sample: begin, made by docs/sample.py -->\n", "<!-- sample: end -->"
REMAKE = "make it again: throughline demo && python docs/sample.py runs/demo --write"

NUMBER = r"[+-]?\d[\d.,]*\*?|–"
KINDS = {  # of lines, by what they look like; any other line is its own kind, numbers and quoted text left out
    "feature": r"(Layer \d+ +| {9})#\d+ ",
    "chain": r"Chain \d+  #",
    "lead": r"  ('.*'|\".*\") against ",
    "wrong": r"The answer is wrong",
    "answer": r"Answer ",
}


def render(found: Trace) -> str:
    """What `throughline trace` prints of the layers and chains that README shows."""
    layers = [reading for reading in found.layers if reading.layer in LAYERS]
    shown = found.model_copy(update={"layers": layers, "chains": found.chains[:NUM_CHAINS]})
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_trace(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def form_of(text: str) -> list[str]:
    """The kinds of line of a printed trace in their order, rows of one kind taken together."""
    kinds, in_chain = [], False
    for line in text.splitlines():
        kind = next((name for name, looks in KINDS.items() if re.match(looks, line)), None)
        if in_chain and kind is None and not line.startswith(" "):
            continue  # a long chain goes on in the next line
        in_chain = kind == "chain"
        if re.match(r" {9}\d+ other paths? ", line):
            continue  # not every chain has any
        line = re.sub(r', answers ".*"$', "", line)  # said where switching off changes the answer
        masked = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)", "…", line)
        kinds.append(kind or " ".join(re.sub(NUMBER, "0", masked).split()))
    return [kind for kind, _ in groupby(kinds) if kind]


def read_sample() -> str:
    """The trace that README shows."""
    shown = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return shown.partition("```\n")[2].partition("```\n")[0]


def write_sample(found: Trace) -> None:
    """Into README, and the record beside it with what it depends on."""
    made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cores": os.cpu_count(), "study": digest_of_study()}
    RECORD.write_text(
        json.dumps({"made": made, "trace": found.model_dump(mode="json")}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    README.write_text(put_sample(README.read_text(encoding="utf-8"), found, made), encoding="utf-8")


def put_sample(page: str, found: Trace, made: dict) -> str:
    """README with this trace between the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "README.md has no marks for the sample"
    others = [str(reading.layer) for reading in found.layers if reading.layer not in LAYERS]
    words = (
        f"(`throughline demo`, layers {', '.join(others[:-1])} and {others[-1]} and all chains but the first left out; "
        f"{made['cores']} CPU cores, {made['date']}.\nOn another machine the last digits differ.)"
    )
    return f"{before}{begin}```\n{render(found)}```\n\n{words}\n{end}{after}"


def digest_of_study() -> str:
    """Of the demo's study file."""
    return hashlib.sha256(STUDY.read_bytes()).hexdigest()


def difference(shown: str, printed: str) -> str | None:
    """One line that says where two printed traces have another form; None if they have the same."""
    one, other = form_of(shown), form_of(printed)
    for a, b in zip([*one, "the end"], [*other, "the end"], strict=False):
        if a != b:
            return f"README's sample trace is stale: where it has {a!r} the demo prints {b!r}; {REMAKE}"
    return None


def main() -> None:
    """Print, write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    traces = [t for t in RunDir.open(options.run).traces() if (t.model, t.prompt) == (MODEL, PROMPT)]
    if not traces:
        sys.exit(f"{options.run} has no trace of {PROMPT!r} in {MODEL}; `throughline demo` makes it")
    if options.write:
        write_sample(traces[0])
    elif options.check:
        sys.exit(difference(read_sample(), render(traces[0])))
    else:
        print(render(traces[0]), end="")


if __name__ == "__main__":
    main()
