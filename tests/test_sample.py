"""README's sample trace: what its record gives today, and what `docs/sample.py` calls stale."""

import json
import runpy
from pathlib import Path

import pytest

from throughline.records import Trace

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = runpy.run_path(str(ROOT / "docs" / "sample.py"))
SAVED = json.loads((ROOT / "docs" / "sample-trace.json").read_text(encoding="utf-8"))


def test_readme_shows_what_its_record_gives_today():
    found, page = Trace.model_validate(SAVED["trace"]), (ROOT / "README.md").read_text(encoding="utf-8")
    assert (found.model, found.prompt, found.verification is not None) == (SAMPLE["MODEL"], SAMPLE["PROMPT"], True)
    assert SAMPLE["read_sample"]() == SAMPLE["render"](found)
    assert SAMPLE["put_sample"](page, found, SAVED["made"]) == page


def test_the_record_is_of_the_demo_as_it_is_now():
    assert SAVED["made"]["study"] == SAMPLE["digest_of_study"](), SAMPLE["REMAKE"]


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        (lambda text: text.replace("0", "9").replace("#1", "#2"), False),  # digits and features
        (lambda text: "\n".join(line for line in text.splitlines() if "token ' '" not in line), False),  # fewer rows
        (lambda text: text.replace("Predicted against measured", "Measured"), True),  # a section
        (lambda text: text.replace("r shuffled", ""), True),  # a column
        (lambda text: "\n".join(line for line in text.splitlines() if not line.startswith("random features")), True),
        (lambda text: text.partition("Share of the lead")[0], True),
        (lambda text: text.replace("if off    measured", "if off    predicted"), True),  # the legend
    ],
)
def test_form_is_compared_not_numbers(changed, stale):
    shown = SAMPLE["read_sample"]()
    said = SAMPLE["difference"](shown, changed(shown))
    assert (said is not None) == stale
    assert said is None or ("python docs/sample.py runs/demo --write" in said and "\n" not in said)
