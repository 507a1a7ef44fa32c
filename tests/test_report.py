"""The one-file page: complete, closed to the network and to what data could smuggle in. `test_page.py` opens it in a browser."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthetic_run import (
    HOSTILE,
    MODELS,
    SyntheticModel,
    build_run,
    make_qualities,
    make_tables,
    make_trace,
    make_transfer,
    write_page,
)
from throughline.figures.style import save_figure
from throughline.report import drawings, packing, write_report
from throughline.report.bundle import render_page, render_shell
from throughline.report.contents import PageData, collect, compact
from throughline.run_dir import RunDir
from throughline.views.reading import RunReader
from throughline.views.relations import Relations
from trained import MadeOnce

ILLUSTRATED, PAGE = MODELS[::2], "run/report/index.html"


class _Page(HTMLParser):
    """What a parser makes of the page: elements with their attributes, and the text of the script elements."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def complete(made_once: MadeOnce) -> Path:
    """The page of a run that has everything, without figures beside it."""
    return made_once("complete", lambda folder: write_page(build_run(folder / "run", forced=True))) / PAGE


@pytest.fixture(scope="module")
def illustrated(made_once: MadeOnce) -> Path:
    """The whole report of two of its models."""
    return made_once("illustrated", lambda folder: write_report(build_run(folder / "run", ILLUSTRATED))) / PAGE


@pytest.fixture(scope="module")
def bare(made_once: MadeOnce) -> Path:
    """The report of a run that has nothing but quality."""
    return made_once("bare", lambda folder: write_report(build_run(folder / "run", parts=("quality",)))) / PAGE


# ---- the file


def test_page_is_one_file_that_refers_to_nothing_outside(complete: Path):
    page = _Page(complete)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            assert not re.match(r"\s*(\w+:)?//", attributes.get(name) or ""), (tag, attributes)
        assert tag != "link" or attributes["href"] == "data:,"
    assert "url(" not in complete.read_text(encoding="utf-8").rpartition("<style")[2]


def test_only_the_pages_own_script_and_style_may_run(complete: Path):
    page = _Page(complete)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy
    raw = complete.read_bytes().decode()
    for kind, tag in (("script", '<script type="module"'), ("style", "<style")):
        begin = raw.index(tag) if kind == "script" else raw.rindex(tag)
        text = raw[begin:].partition(">")[2].partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_hostile_label_stays_text(complete: Path):
    raw = complete.read_text(encoding="utf-8")
    page = _Page(complete)
    assert len(page.scripts) == 2 and raw.count("</script>") == 2
    assert "alert(1)" in raw and HOSTILE not in raw
    assert HOSTILE in page.data["features"]["strings"]


def test_page_holds_the_records_numbers_to_four_digits(complete: Path):
    data = _Page(complete).data
    quality = make_qualities(MODELS[0])[2]
    rows = {(row["model"], row["layer"]): row for row in data["overview"]["quality"]}
    assert rows[MODELS[0].name, 2]["fvu"] == float(f"{quality.fvu:.4g}")
    assert rows[MODELS[0].name, 5]["gate"] == ["FVU 0.61 > 0.5"]
    expected = make_transfer(MODELS[0], MODELS[1], "matching")
    found = next(
        r
        for r in data["transfers"]
        if (r["info"]["metric"], r["info"]["source"], r["info"]["target"])
        == ("matching", MODELS[0].name, MODELS[1].name)
    )
    np.testing.assert_allclose(found["matrices"]["value"], expected.arrays["value"], rtol=1e-3)
    assert (
        "ceiling" not in found["matrices"] and "partner" not in found["matrices"]
    )  # arrays by feature stay in the run
    features = make_tables(MODELS[1])["features"]
    table = data["features"]["models"][MODELS[1].name]
    assert len(table["feature"]) == features.height and data["features"]["num_left_out"] == 0
    assert table["num_active"] == features["num_active"].to_list() and set(table["num_tokens"]) == {50_000}
    strings = data["features"]["strings"]
    assert [strings[n] for n in table["top_tokens"][7]] == features["top_tokens"][7].to_list()


def test_page_data_are_of_the_described_types(complete: Path):
    data = _Page(complete).data
    assert compact(PageData.model_validate(data).model_dump()) == data


def test_contexts_keep_their_tokens_and_shades(complete: Path):
    data = _Page(complete).data
    examples = make_tables(MODELS[0])["examples"]
    assert data["features"]["num_contexts_left_out"] == 0
    packed = data["features"]["models"][MODELS[0].name]["contexts"]
    own = [i for i, row in enumerate(packed["row"]) if row == 3]
    expected = examples.filter((examples["layer"] == 0) & (examples["feature"] == 3))
    assert own[0] == packed["row"].index(3) and len(own) == expected.height
    assert sorted(packed["value"][i] for i in own) == pytest.approx(sorted(expected["value"]), rel=1e-3)
    first = own[0]
    tokens = [data["features"]["strings"][int(n, 36)] for n in packed["texts"][packed["text"][first]].split()]
    assert tokens == expected["tokens"][0].to_list()
    shades, values = packed["shades"][first], expected["values"][0].to_list()
    assert [shade == "0" for shade in shades] == [value == 0 for value in values]
    assert shades[packed["focus"][first]] == "9"


def test_pairs_and_partners_are_those_of_the_server(complete: Path):
    data, run = _Page(complete).data, RunDir.open(complete.parents[1])
    relations = Relations(RunReader(run))
    source, target = MODELS[0].name, MODELS[1].name
    cells = next(r for r in data["pairs"]["results"] if (r["source"], r["target"]) == (source, target))
    told = relations.pairs(source, target, 2, 1, 0, 200)
    assert (cells["total"][2][1], cells["above"][2][1]) == (told.total, told.num_above)
    first = told.pairs[: data["pairs"]["most"]]
    assert cells["sources"][2][1] == [pair.source.feature for pair in first]
    assert cells["targets"][2][1] == [pair.target.feature for pair in first]
    packed = data["features"]["models"][source]["partners"]
    names, row = data["features"]["names"], 2 * MODELS[0].d_sae + 5  # layer 2, feature 5
    mine = [i for i, r in enumerate(packed["row"]) if r == row]
    found = {(names[packed["model"][i]], packed["layer"][i], packed["feature"][i]) for i in mine}
    partners = [p.partner for p in relations.feature(source, 2, 5).partners if p.above_chance]
    assert found and found == {(p.model, p.layer, p.feature) for p in partners}


def test_figures_lie_beside_the_page(illustrated: Path):
    whole = illustrated.read_bytes()
    names = {path.name for path in (illustrated.parent / "figures").iterdir()}
    assert {"quality.png", "quality.svg", "quality.pdf", "all-models-matching.svg"} <= names
    for name in ("divergence", "decay", "persistence", "best-matches", "ribbon-zoo-tall", "ribbon-small"):
        assert {f"{name}.{kind}" for kind in ("png", "svg", "pdf")} <= names
    assert "transfer-reconstruction-zoo-tall__small.png" in names
    assert sum(name.startswith("trace-") and name.endswith(".png") for name in names) == len(ILLUSTRATED)
    alone = write_page(RunDir.open(illustrated.parents[1]))  # as the other tests have it
    assert alone == illustrated and alone.read_bytes() == whole


def test_report_written_again_is_the_same(bare: Path):
    before = bare.read_bytes()
    assert write_report(RunDir.open(bare.parents[1])).read_bytes() == before


def test_figures_are_drawn_again_when_what_they_show_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = build_run(tmp_path / "run", MODELS[:1], parts=("quality",))
    saved: list[str] = []

    def note(figure: Any, stem: Path) -> list[Path]:
        saved.append(stem.name)
        return save_figure(figure, stem)

    def drawn() -> list[str]:
        saved.clear()
        write_report(run)
        return saved

    monkeypatch.setattr(drawings, "save_figure", note)
    folder = run.report_folder() / "figures"
    assert drawn() == ["quality"] and drawn() == []
    picture = folder / "quality.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-9])
    assert drawn() == ["quality"] and picture.read_bytes() == whole
    (folder / "quality.pdf").unlink()
    assert drawn() == ["quality"] and drawn() == []
    (folder / drawings.DRAWN).write_text("[1")
    assert drawn() == ["quality"] and drawn() == []
    run.write_trace(make_trace(MODELS[0]))
    assert [name.partition("-")[0] for name in drawn()] == ["trace"]
    run.write_quality(run.quality(MODELS[0].name)[0].model_copy(update={"fvu": 0.123}))
    assert drawn() == ["quality"] and picture.read_bytes() != whole


def test_a_bare_run_has_a_page(bare: Path):
    data = _Page(bare).data
    assert data["analysis"] is None and data["traces"] == [] and data["features"]["models"] == {}


def test_an_empty_run_and_awkward_text_make_a_page(tmp_path: Path):
    run = build_run(tmp_path / "run", parts=())
    trace = make_trace(MODELS[0], prompt="{{data}} {{title}} \u2028 \\u003c & é 数")
    run.write_trace(trace)
    page = _Page(write_report(run))
    assert page.data["traces"][0]["trace"]["prompt"] == trace.prompt
    assert page.data["overview"]["quality"] == []


def test_half_a_character_and_what_is_not_finite_survive(tmp_path: Path):
    values = compact({"a": [float("nan"), float("inf"), 0.123456, 2.0, 7], "b": ("\udce9", None, True)})
    assert values == {"a": [None, None, 0.1235, 2, 7], "b": ["\udce9", None, True]}
    page = render_page("<x>", {"text": "\udce9</script>"})
    path = tmp_path / "page.html"
    path.write_bytes(page.encode("utf-8", "backslashreplace"))
    assert _Page(path).data["text"] == "\udce9</script>"
    assert "<title>&lt;x&gt; · throughline</title>" in page
    assert "<title>&lt;x&gt; · throughline</title>" in render_shell("<x>")


def test_local_paths_stay_at_home(tmp_path: Path):
    run = build_run(tmp_path / "run", parts=("quality",))
    study = run.study()
    data = study.data.model_copy(update={"path": "/home/someone/texts/sums.jsonl"})
    model = study.models[0].model_copy(update={"path": "/home/someone/models/mine"})
    changed = study.model_copy(update={"data": data, "models": [model, *study.models[1:]]})
    raw = write_report(RunDir.create(run.root, changed)).read_text(encoding="utf-8")
    assert "someone" not in raw and "sums.jsonl" in raw


def test_a_large_run_stays_small_and_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    models = tuple(SyntheticModel(f"model-{i}", 6, 16, 500) for i in range(4))
    run = build_run(tmp_path / "run", models, parts=("tables",), contexts=6)
    page = write_report(run)
    assert page.stat().st_size < 8_000_000
    assert _count(_Page(page).data["features"], "feature") == 12_000
    monkeypatch.setattr(packing, "CONTEXT_BYTES", 300_000)
    monkeypatch.setattr(packing, "MAX_FEATURES", 2400)
    run.write_trace(make_trace(models[0]))
    features = collect(run)["features"]
    assert _count(features, "feature") == 2400 and features["num_left_out"] == 12_000 - 2400
    assert 0 < features["num_contexts_left_out"] < 2400 * 6
    assert _count({"models": {n: m["contexts"] for n, m in features["models"].items()}}, "row") % 2400 == 0
    table = features["models"]["model-0"]
    assert {3, 5, 7} <= {f for f, layer in zip(table["feature"], table["layer"], strict=True) if layer == 0}


def test_partners_end_at_their_budget_every_features_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = build_run(tmp_path / "run", parts=("tables", "transfer"))
    whole = collect(run)["features"]
    monkeypatch.setattr(packing, "MAX_PARTNERS", 300)
    cut = collect(run)["features"]
    assert whole["num_partners_left_out"] == 0
    kept = sum(len(model["partners"]["row"]) for model in cut["models"].values())
    total = sum(len(model["partners"]["row"]) for model in whole["models"].values())
    assert (kept, cut["num_partners_left_out"]) == (300, total - 300)
    for name, model in cut["models"].items():
        everything = whole["models"][name]["partners"]
        best = {
            row: max(r for other, r in zip(everything["row"], everything["correlation"], strict=True) if other == row)
            for row in set(model["partners"]["row"])
        }
        found: dict[int, float] = {}
        for row, r in zip(model["partners"]["row"], model["partners"]["correlation"], strict=True):
            found.setdefault(row, r)
        assert found == best


def _count(features: dict[str, Any], column: str) -> int:
    return sum(len(model[column]) for model in features["models"].values())


def test_report_needs_no_torch(tmp_path: Path):
    build_run(tmp_path / "run", MODELS[2:], parts=("quality", "tables"))
    code = "import sys, throughline.report as r; from throughline.run_dir import RunDir\n"
    code += f"r.write_report(RunDir.open({str(tmp_path / 'run')!r}))\n"
    code += "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_drawn_by_several_processes_are_those_of_one(tmp_path, monkeypatch):
    """Also where a process cannot draw its share: then this one does."""
    monkeypatch.setattr(drawings, "FIGURES_A_PROCESS", 1)
    known, drawn = drawings.DRAWING_PROCESS, {}
    for name, cores, module in (("one", 1, known), ("three", 3, known), ("lost", 2, "throughline.no_such_module")):
        run = build_run(tmp_path / name, models=MODELS[2:], parts=("quality", "transfer"))
        monkeypatch.setattr(drawings.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(drawings, "DRAWING_PROCESS", module)
        drawings.write_figures(run)
        files = sorted((run.report_folder() / "figures").iterdir())
        drawn[name] = {file.name: file.read_bytes() for file in files}
    assert len(drawn["one"]) > 9
    assert drawn["one"] == drawn["three"] == drawn["lost"]
