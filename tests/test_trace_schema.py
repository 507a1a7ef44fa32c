"""A trace survives its JSON, whatever of it is None, and the published schema holds for it and for nothing else."""

import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from synthetic_run import MODELS, make_trace
from throughline.records import Change, Steering, Trace

DOCS = Path(__file__).resolve().parents[1] / "docs"
VERIFIED = make_trace(MODELS[0])
STEERED = Steering(
    settings=["layer=1,feature=3,off"],
    answer="32",
    probability=0.01,
    scores=[-2.0, 5.1],
    changed=[Change(layer=2, position=7, feature=5, before=1.5, after=0.0, label="carry")],
)
TRACES: dict[str, Trace] = {
    "verified": VERIFIED,
    "not verified": make_trace(MODELS[0], verified=False),
    "set by hand": VERIFIED.model_copy(update={"steering": STEERED}),
    "nothing known": VERIFIED.model_copy(
        update={"expected": None, "correct": None, "against": None, "off_kind": "mean", "edges": [], "chains": []}
    ),
    "nothing to explain": VERIFIED.model_copy(
        update={
            "verification": VERIFIED.verification
            and VERIFIED.verification.model_copy(update={"faithfulness": [], "replacement": None, "completeness": None})
        }
    ),
}


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    published = json.loads((DOCS / "trace.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    return jsonschema.Draft202012Validator(published)


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_the_same_after_its_json_and_follows_the_schema(name: str, schema: jsonschema.Draft202012Validator):
    written = TRACES[name].model_dump_json()
    assert Trace.model_validate_json(written) == TRACES[name]
    schema.validate(json.loads(written))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"prediction_r": 0.9},
        {"targets": None},
        {"off_kind": "noise"},
        {"edges": [{"source": [0, 1], "target": [1, 1, 5], "predicted": 0.1}]},
    ],
)
def test_what_is_no_trace_is_refused_by_both(change: dict[str, Any], schema: jsonschema.Draft202012Validator):
    tree = json.loads(VERIFIED.model_dump_json()) | change
    assert not schema.is_valid(tree)
    with pytest.raises(ValidationError):
        Trace.model_validate_json(json.dumps(tree))


def test_the_published_schema_is_that_of_the_record():
    made = runpy.run_path(str(DOCS / "generate.py"))["render_all"]()
    assert (DOCS / "trace.schema.json").read_text() == made["trace.schema.json"], "run `make docs`"


def test_every_measure_of_a_trace_is_explained():
    text = (DOCS / "measures.md").read_text().partition("## Traces")[2].partition("## Comparison")[0]
    definitions = Trace.model_json_schema()["$defs"]
    fields = {
        field
        for name in ("Verification", "Agreement", "FaithfulnessPoint", "TraceEdge", "Chain")
        for field in definitions[name]["properties"]
    }
    told_elsewhere = {"what", "num", "source", "target"}  # words, counts and ends, not measures
    assert [
        field for field in sorted(fields - told_elsewhere) if f"`{field}`" not in text and f"{field}(n)" not in text
    ] == []
