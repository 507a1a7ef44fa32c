"""The one-file page: complete, closed to the network and to what data could smuggle in, and usable in a browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
)
from throughline.report import feature_tables, write_report
from throughline.report.contents import compact
from throughline.report.page import render_page
from throughline.run_dir import RunDir

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
SECTIONS = ["overview", "quality", "transfer", "analysis", "features", "trace", "compare"]


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
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_run(tmp_path_factory.mktemp("complete") / "run", forced=True))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_run(tmp_path_factory.mktemp("bare") / "run", parts=("quality",)))


# ---- the file


def test_page_is_one_file_that_refers_to_nothing_outside(complete: Path):
    page = _Page(complete)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            assert not re.match(r"\s*(\w+:)?//", attributes.get(name) or ""), (tag, attributes)
        assert tag != "link" or attributes["href"] == "data:,"
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';")
    assert "url(" not in complete.read_text(encoding="utf-8").partition("</style>")[0]


def test_hostile_label_stays_text(complete: Path):
    raw = complete.read_text(encoding="utf-8")
    page = _Page(complete)
    assert len(page.scripts) == 2 and raw.count("</script>") == 2
    assert "alert(1)" in raw and HOSTILE not in raw
    assert HOSTILE in page.data["strings"]
    assert "innerHTML" not in page.scripts[1]


def test_page_holds_the_records_numbers_to_four_digits(complete: Path):
    data = _Page(complete).data
    quality = make_qualities(MODELS[0])[2]
    row = list(zip(data["quality"]["model"], data["quality"]["layer"], strict=True)).index((MODELS[0].name, 2))
    assert data["quality"]["fvu"][row] == float(f"{quality.fvu:.4g}")
    assert data["quality"]["gate"][5] == ["FVU 0.61 > 0.5"]
    expected = make_transfer(MODELS[0], MODELS[1], "matching")
    found = next(
        r
        for r in data["transfer"]["results"]
        if (r["metric"], r["source"], r["target"]) == ("matching", MODELS[0].name, MODELS[1].name)
    )
    np.testing.assert_allclose(found["value"], expected.arrays["value"], rtol=1e-3)
    assert "ceiling" not in found and set(found["others"]) == {"threshold"}  # arrays by feature stay in the run
    features = make_tables(MODELS[1])["features"]
    table = data["features"]["models"][MODELS[1].name]
    assert len(table["feature"]) == features.height and data["features"]["num_left_out"] == 0
    assert table["num_active"] == features["num_active"].to_list() and table["num_tokens"] == 50_000
    assert [data["strings"][n] for n in table["top_tokens"][7]] == features["top_tokens"][7].to_list()


def test_examples_keep_their_tokens_and_shades(complete: Path):
    data = _Page(complete).data
    examples = make_tables(MODELS[0])["examples"]
    assert data["features"]["num_examples_left_out"] == 0
    packed = data["features"]["models"][MODELS[0].name]["examples"]
    own = [i for i, row in enumerate(packed["row"]) if row == 3]
    expected = examples.filter((examples["layer"] == 0) & (examples["feature"] == 3))
    assert own[0] == packed["row"].index(3) and len(own) == expected.height
    assert sorted(packed["value"][i] for i in own) == pytest.approx(sorted(expected["value"]), rel=1e-3)
    first = own[0]
    tokens = [data["strings"][int(n, 36)] for n in packed["contexts"][packed["context"][first]].split()]
    assert tokens == expected["tokens"][0].to_list()
    shades, values = packed["shades"][first], expected["values"][0].to_list()
    assert [shade == "0" for shade in shades] == [value == 0 for value in values]
    assert shades[packed["focus"][first]] == "9"


def test_figures_lie_beside_the_page(complete: Path):
    names = {path.name for path in (complete.parent / "figures").iterdir()}
    assert {"quality.png", "quality.svg", "quality.pdf", "all-models-matching.svg"} <= names
    for name in ("divergence", "decay", "persistence", "best-matches", "ribbon-zoo-tall", "ribbon-small"):
        assert {f"{name}.{kind}" for kind in ("png", "svg", "pdf")} <= names
    assert "transfer-reconstruction-zoo-tall__small.png" in names
    assert sum(name.startswith("trace-") and name.endswith(".png") for name in names) == len(MODELS)


def test_page_carries_the_pictures_of_the_analysis_as_they_are_saved(complete: Path, bare: Path):
    page = _Page(complete)
    shown = {figure["name"]: figure for figure in page.data["figures"]}
    ribbons = [f"ribbon-{name}" for name in ("zoo-tall", "zoo-wide", "small")]
    assert list(shown) == ["divergence", "decay", "persistence", *ribbons, "best-matches"]
    for name, figure in shown.items():
        assert figure["svg"] == (complete.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert "curves" not in page.data["analysis"]  # they lie in the run; the page shows the pictures
    assert not any(tag == "img" for tag, _ in page.elements)  # the script makes them
    assert _Page(bare).data["figures"] == []


def test_report_written_again_is_the_same(bare: Path):
    before = bare.read_bytes()
    assert write_report(RunDir.open(bare.parents[1])).read_bytes() == before


def test_missing_results_name_the_command_that_makes_them(bare: Path):
    data = _Page(bare).data
    assert data["analysis"] is None and data["traces"] == [] and data["features"]["models"] == {}
    script = _Page(bare).scripts[1]
    for command in ("evaluate", "transfer", "report", "features", "label", "trace", "compare"):
        assert f"`{command} ${{RUN}}" in script


def test_an_empty_run_and_awkward_text_make_a_page(tmp_path: Path):
    run = build_run(tmp_path / "run", parts=())
    trace = make_trace(MODELS[0], prompt="{{data}} {{js}} \u2028 \\u003c & é 数")
    run.write_trace(trace)
    page = _Page(write_report(run))
    assert page.data["traces"][0]["prompt"] == trace.prompt
    assert page.data["quality"] is None


def test_half_a_character_and_what_is_not_finite_survive(tmp_path: Path):
    values = compact({"a": [float("nan"), float("inf"), 0.123456, 2.0, 7], "b": ("\udce9", None, True)})
    assert values == {"a": [None, "inf", 0.1235, 2, 7], "b": ["\udce9", None, True]}
    page = render_page({"study": {"name": "<x>"}, "text": "\udce9</script>"})
    path = tmp_path / "page.html"
    path.write_bytes(page.encode("utf-8", "backslashreplace"))
    assert _Page(path).data["text"] == "\udce9</script>"
    assert "<title>&lt;x&gt; · throughline</title>" in page


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
    assert _Page(page).data["features"]["num_features"] == 12_000
    monkeypatch.setattr(feature_tables, "EXAMPLE_BYTES", 300_000)
    monkeypatch.setattr(feature_tables, "MAX_FEATURES", 2400)
    run.write_trace(make_trace(models[0]))
    features = _Page(write_report(run)).data["features"]
    assert features["num_features"] == 2400 and features["num_left_out"] == 12_000 - 2400
    assert 0 < features["num_examples_left_out"] < 2400 * 6
    assert features["num_examples"] % 2400 == 0  # every feature keeps as many
    table = features["models"]["model-0"]
    assert {3, 5, 7} <= {f for f, layer in zip(table["feature"], table["layer"], strict=True) if layer == 0}


def test_report_needs_no_torch(tmp_path: Path):
    build_run(tmp_path / "run", MODELS[2:], parts=("quality", "tables"))
    code = "import sys, throughline.report as r; from throughline.run_dir import RunDir\n"
    code += f"r.write_report(RunDir.open({str(tmp_path / 'run')!r}))\n"
    code += "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; the tests above parse the page without one")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


class _Tab:
    """A page opened from disk, with everything it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, fragment: str = "", **options: Any):
        self.page = browser.new_page(viewport={"width": 1280, "height": 720}, **options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + fragment)
        self.home = path.as_uri() + fragment

    def close(self) -> None:
        """Leave, requiring that nothing went wrong and nothing but the file (and its empty icon) was asked for."""
        self.page.close()
        assert not self.complaints
        asked = {url.partition("#")[0] for url in self.requests if not url.startswith("data:")}
        assert asked == {self.home.partition("#")[0]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_sections_show_without_errors_requests_or_sideways_scrolling(browser: Any, complete: Path, scheme: str):
    tab = _Tab(browser, complete, color_scheme=scheme)
    assert tab.page.eval_on_selector_all("main > section", "all => all.map(x => x.id)") == SECTIONS
    assert tab.page.eval_on_selector_all("#nav a", "all => all.map(x => x.hash)") == ["#" + s for s in SECTIONS]
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert "quality gate was overridden" in tab.page.inner_text("#overview")
    assert "1 of 13 layers fail the gate: zoo/tall layer 5 (FVU 0.61 > 0.5)" in tab.page.inner_text("#quality")
    assert "nothing beyond the null" in tab.page.inner_text("#analysis")
    tab.close()


def test_a_bare_run_says_what_to_type(browser: Any, bare: Path):
    tab = _Tab(browser, bare)
    for section, command in (
        ("transfer", "transfer RUN"),
        ("features", "features RUN"),
        ("trace", 'trace RUN "PROMPT"'),
    ):
        assert f"throughline {command}" in tab.page.inner_text("#" + section)
    assert "overridden" not in tab.page.inner_text("body")
    tab.close()


def test_quality_sorts_by_a_column(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    header = tab.page.get_by_role("button", name="FVU", exact=True)
    assert "variance unexplained" in header.get_attribute("title")
    header.click()
    header.click()
    assert tab.page.inner_text("#quality tbody tr:first-child td:nth-child(3)") == "0.610"
    assert tab.page.locator("#quality th[aria-sort=descending]").count() == 1
    tab.close()


def test_heat_map_cells_give_their_numbers_to_pointer_click_and_keys(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    tab.page.select_option("#transfer-metric", "matching")
    tab.page.select_option("#transfer-target", "zoo/wide")
    arrays = make_transfer(MODELS[0], MODELS[1], "matching").arrays
    cell = tab.page.locator("#transfer-pair svg").first.locator("[data-r='2'][data-c='1']")
    cell.hover()
    tip = tab.page.inner_text("#tip")
    assert "zoo/tall layer 2 → zoo/wide layer 1" in tip and "n = 50,000 tokens" in tip and "no ceiling" in tip
    for name, words in (("value", "value "), ("null", "null "), ("low", "95 % interval ")):
        assert f"{words}{arrays[name][2, 1]:.4g}" in tip
    cell.click()
    line = tab.page.locator("#transfer-pair .reading-line")
    assert f"value {arrays['value'][2, 1]:.4g}" in line.inner_text()
    tab.page.locator("#transfer-pair svg").first.press("ArrowRight")
    assert f"value {arrays['value'][2, 2]:.4g}" in line.inner_text()
    size = sum(model.num_layers for model in MODELS)
    assert tab.page.locator("#transfer-all rect.cell").count() == size**2
    assert "mean null" in tab.page.inner_text("#transfer-pair")
    tab.close()


def test_pictures_stand_with_the_findings_on_the_same_thing(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    pictures = tab.page.locator("#analysis img")
    assert pictures.count() == 7
    assert all(
        pictures.nth(i).evaluate("image => image.decode().then(() => image.naturalWidth)") > 400 for i in range(7)
    )
    before = "image => image.closest('figure').previousElementSibling.textContent"
    assert "falls from 0.91 to 0.12" in tab.page.locator("img[data-name=decay]").evaluate(before)
    assert "against the distance" in tab.page.locator("img[data-name=decay]").get_attribute("alt")
    assert "figures/decay.svg" in tab.page.inner_text("#analysis")
    tab.close()


def test_search_finds_features_by_label_token_and_number(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    rows = tab.page.locator("#feature-list .row")
    assert rows.count() == 200 and "688 are not" in tab.page.inner_text("#feature-count")
    tab.page.fill("#feature-search", "Tens Dig")
    assert rows.count() > 10
    assert all("tens digit" in text for text in rows.all_inner_texts())
    tab.page.fill("#feature-search", "#7")
    assert all("#7 ·" in text and "unlabelled" in text for text in rows.all_inner_texts())  # its label is below the bar
    assert rows.count() == sum(model.num_layers for model in MODELS)
    tab.page.select_option("#feature-model", "zoo/wide")
    tab.page.select_option("#feature-layer", "2")
    assert rows.count() == 1
    tab.page.fill("#feature-search", "no such thing")
    assert rows.count() == 0 and "0 features found" in tab.page.inner_text("#feature-count")
    tab.close()


def test_a_features_address_opens_it_and_its_row_does_so_by_keyboard(browser: Any, complete: Path):
    tab = _Tab(browser, complete, "#feature/zoo%2Ftall/0/5")
    detail = tab.page.inner_text("#feature-detail")
    assert HOSTILE in detail and "best neuron's F1 0.40" in detail and "900 of 50,000 tokens" in detail
    assert tab.page.locator("#feature-detail .context").count() == 3
    assert tab.page.locator("#feature-detail .context .at").first.inner_text().strip() == "What"
    tab.page.fill("#feature-search", "#7")
    row = tab.page.locator("#feature-list .row").first
    row.focus()
    row.press("Enter")
    tab.page.wait_for_function("document.getElementById('feature-detail').textContent.includes('below the bar')")
    tab.page.evaluate("location.hash = '#feature/zoo/wide/3/2'")  # the slash need not be encoded
    tab.page.wait_for_function("document.getElementById('feature-detail').textContent.includes('zoo/wide, layer 3')")
    tab.page.evaluate("location.hash = '#feature/zoo%2Fwide/3/2000'")
    tab.page.wait_for_function("document.getElementById('feature-detail').textContent.includes('not on this page')")
    tab.close()


def test_trace_draws_a_circle_per_feature_that_leads_to_it(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    trace = make_trace(MODELS[0])
    circles = tab.page.locator("#trace-picture .dot")
    assert circles.count() == sum(len(layer.features) for layer in trace.layers)
    assert tab.page.locator("#trace-view .reading a").count() == circles.count()
    feature = trace.layers[1].features[0]
    dot = tab.page.locator(f"#trace-picture [data-key='1/{feature.position}/{feature.feature}']")
    dot.hover()
    tip = tab.page.inner_text("#tip")
    assert f"measured {feature.effect:+.2f}, predicted {feature.predicted_effect:+.2f}" in tip
    assert "the answer becomes “43”" in tip and "its throughline: layers 1-2" in tip
    dot.click()
    tab.page.wait_for_function("location.hash === '#feature/zoo%2Ftall/1/3'")
    assert "zoo/tall, layer 1, feature #3" in tab.page.inner_text("#feature-detail")
    tab.page.select_option("#trace-choice", "2")
    wrong = tab.page.locator("#trace-view .answer")
    assert "wrong" in wrong.get_attribute("class") and "expected “42”" in wrong.inner_text()
    assert circles.count() == 3 * MODELS[2].num_layers
    tab.close()


def _place(place: tuple[int, int, int]) -> str:
    return "/".join(map(str, place))


def test_trace_draws_the_strongest_edges_and_says_what_they_are(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    trace = make_trace(MODELS[0])
    groups = tab.page.locator("#trace-picture .edge-group")
    drawn = groups.evaluate_all("all => all.map(g => [g.dataset.source, g.dataset.target])")
    expected = []
    for layer in trace.layers[:-1]:
        edges = sorted((e for e in trace.edges if e.source[0] == layer.layer), key=lambda e: -abs(e.measured or 0))
        expected += [[_place(e.source), _place(e.target)] for e in edges[:6]]
    last = trace.layers[-1].features
    assert [pair for pair in drawn if not pair[1].startswith("target")] == expected
    assert len(drawn) == len(expected) + len(last) * len(trace.targets)
    widths = tab.page.locator("#trace-picture .edge").evaluate_all(
        "all => all.map(p => +p.getAttribute('stroke-width'))"
    )
    assert max(widths) == 3.4 == widths[0] and min(widths) < 2  # the strongest of each boundary comes first
    edge = next(e for e in trace.edges if [_place(e.source), _place(e.target)] == expected[0])
    assert edge.measured is not None
    groups.first.locator(".near").dispatch_event("pointermove", {"clientX": 300, "clientY": 300})
    tip = tab.page.inner_text("#tip")
    assert f"measured {edge.measured:+.2f}, predicted {edge.predicted:+.2f}" in tip
    assert f"layer 0 #{edge.source[2]}" in tip and "pre-activation" in tip
    tab.close()


def test_a_chain_of_the_list_lights_its_path_by_pointer_and_by_keyboard(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    trace = make_trace(MODELS[0])
    rows = tab.page.locator("#trace-view .chains li")
    assert rows.count() == len(trace.chains)
    assert HOSTILE in rows.nth(1).inner_text() and "layers 0-1" in rows.nth(0).inner_text()
    assert "all off: measured -4.50, predicted -3.90, the answer becomes “32”" in rows.nth(0).inner_text()
    lit = "all => all.filter(x => x.classList.contains('lit')).map(x => x.dataset.key)"
    for number, act in enumerate((lambda: rows.nth(0).hover(), lambda: rows.nth(1).focus())):
        act()
        tab.page.wait_for_function(f"document.querySelector('.chain.lit')?.dataset.chain === '{number}'")
        places = [place for step in trace.chains[number].steps for place in step.features]
        found = tab.page.locator("#trace-picture [data-key]").evaluate_all(lit)
        assert sorted(found) == sorted(map(_place, places))  # with the ring of the feature that is not shown
    tab.page.mouse.move(0, 0)
    tab.page.focus("#trace-choice")
    assert tab.page.locator("#trace-picture .lit").count() == 0
    tab.close()


def test_trace_shows_what_was_verified_and_what_was_not(browser: Any, complete: Path, tmp_path: Path):
    tab = _Tab(browser, complete)
    words = " ".join(tab.page.inner_text("#trace-verification").split())
    for expected in (
        "shown features 36 0.91 0.02 1.10 95 % of 18",
        "edges between positions 2 – 0.02",
        "by 0.05 logits (mean of 18)",
        "83 % reaches",
        "64 0.32 0.16 0.68 yes 0 %",
        "0 0.00 0.00 1.00 no 0 %",
        "200 (all) 1.00 0.50",
    ):
        assert expected in words
    tab.close()
    run = build_run(tmp_path / "run", MODELS[:1], parts=())
    run.write_trace(make_trace(MODELS[0], verified=False))
    run.write_text("traces/old.json", '{"version": 1}')
    tab = _Tab(browser, write_report(run))
    words = tab.page.inner_text("#trace")
    assert "Not verified (--no-verify)" in words and "1 file of another version is left out (traces/old.json)" in words
    tab.page.locator("#trace-picture .dot").first.hover()
    assert "not measured" in tab.page.inner_text("#tip")
    tab.close()


def test_compare_shows_shares_beside_the_base_rate_and_opens_traces(browser: Any, complete: Path):
    tab = _Tab(browser, complete)
    words = tab.page.inner_text("#compare")
    assert "50 % / 35 %" in words and "“41” (wrong)" in words and "99.9 % quantile" in words
    tab.page.get_by_role("button", name="trace").nth(1).click()
    assert tab.page.input_value("#trace-choice") == "1"
    assert tab.page.locator("#compare a[href^='#feature/']").count() > 0
    tab.close()
