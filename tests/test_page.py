"""The page in a real browser, in both homes: the report opened from its file, and the server's.

One run of the demo's kind (all four bundled models, little text) serves all tests. Its answers come from the API, so what the page
shows is held against what the server says.
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

import commands
from browsing import OF_COLORS, Tab, open_browser, tab
from synthetic_run import HOSTILE, MODELS, build_run, make_trace, write_page
from test_serving import Client, served
from throughline import api
from throughline.run_dir import RunDir
from throughline.serving.app import Serving

pytestmark = pytest.mark.xdist_group("page")

HOMES = ("report", "served")
PROMPT = "What is 15 + 27?"
# those whose transfer is looked at have three
LAYERS = {"gpt2": [0, 1, 2], "phi": [0], "pythia": [0, 1, 2], "gemma": [0]}
SETTINGS = (
    f"models=[{', '.join(f'{{path: zoo/{name}, layers: {layers}}}' for name, layers in LAYERS.items())}]",
    "training.tokens=60000",
    "evaluation.tokens=10000",
    "evaluation.sample_tokens=4000",
    "evaluation.spliced_tokens=2000",
    "transfer.metrics=[matching]",
)
TRACED = "zoo/pythia"


class Homes(NamedTuple):
    """The two addresses of one run's page, the run, and who asks its server."""

    report: str
    served: str
    run: RunDir
    client: Client


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of the demo's study with less text, everything but its figures made; or a copy of one that lies at THROUGHLINE_DEMO."""
    preset = Path(api.__file__).parent / "presets" / "demo.yaml"
    folder = tmp_path_factory.mktemp("page") / "run"
    if made := os.environ.get("THROUGHLINE_DEMO"):
        shutil.copytree(made, folder)
        write_page(RunDir.open(folder))
        return RunDir.open(folder)
    run = api.train(preset, folder, list(SETTINGS), device="cpu")
    for make in (api.evaluate, api.features, api.label, api.transfer):
        make(run, device="cpu")
    api.compare(run, PROMPT, device="cpu")
    write_page(run)
    return run


@pytest.fixture(scope="module")
def homes(demo: RunDir) -> Iterator[Homes]:
    page = demo.report_folder() / "index.html"
    with served(Serving(demo, "cpu")) as client:
        yield Homes(page.as_uri(), f"http://127.0.0.1:{client.port}/", demo, client)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def addresses(client: Client) -> list[str]:
    """Every view, and one thing of each."""
    trace = next(row for row in client.get("/api/traces") if row["model"] == TRACED)
    comparison = client.get("/api/comparisons")[0]
    feature = client.get("/api/features?labelled=true&limit=1")["features"][0]
    name = f"{quote(feature['model'], safe='')}/{feature['layer']}/{feature['feature']}"
    return [
        "overview",
        "features?q=sum",
        f"feature/{name}",
        "transfer",
        f"transfer/matching/{quote('zoo/gpt2', safe='')}/{quote('zoo/pythia', safe='')}?cell=1,2",
        "trace",
        f"trace/{trace['id']}",
        "compare",
        f"compare/{comparison['id']}",
        "training",
    ]


# ---- every view


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow("page"))])
@pytest.mark.parametrize("home", HOMES)
def test_every_view_opens_fits_and_is_accessible(browser, homes, home, scheme):
    """In one tab, which goes from view to view. A dark page differs from a light one in its colours alone."""
    with tab(browser, getattr(homes, home), scheme=scheme) as here:
        for address in addresses(homes.client):
            page = here.open(address)
            here.require_fit()
            assert page.locator("main [role=alert]").count() == 0, page.inner_text("main")[:500]
            assert page.locator("nav[aria-label=Views] [aria-current=page]").count() == 1
            here.require_accessible(OF_COLORS if scheme == "dark" else ())


WRONG = {
    "label": '<input id="unnamed">',
    "button-name": "<button></button>",
    "image-alt": "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
    "aria-required-attr": '<div role="checkbox">no state</div>',
    "color-contrast": '<p style="color: light-dark(#000, #333)">hard to read in the dark</p>',
    "link-in-text-block": '<p>Words before <a href="#x" style="color: light-dark(#06d, #eee)">this link</a> and after.</p>',
}


@pytest.mark.parametrize("rule", WRONG)
def test_what_is_inaccessible_is_found(browser, tmp_path, rule):
    """A fault of each kind: all in the light scheme but for those of colours, which are there in the dark alone."""
    style = "<style>:root {color-scheme: light dark; background: light-dark(#fff, #111); color: light-dark(#000, #fff)}"
    style += "a {text-decoration: none}</style>"
    (tmp_path / "page.html").write_text(f"<!doctype html><html lang=en><title>t</title>{style}<main><h1>Faulty</h1>")
    for scheme, rules in (("light", ()), ("dark", OF_COLORS)):
        here = Tab(browser, (tmp_path / "page.html").as_uri(), scheme=scheme)
        page = here.open()
        here.require_accessible(rules)
        page.evaluate("fault => document.querySelector('main').insertAdjacentHTML('beforeend', fault)", WRONG[rule])
        if (rule in OF_COLORS) == (scheme == "dark"):
            with pytest.raises(AssertionError, match=f"{rule}: "):
                here.require_accessible(rules)
        else:
            here.require_accessible(rules)
        page.close()


@pytest.mark.parametrize("home", HOMES)
def test_what_is_not_there_is_said(browser, homes, home):
    with tab(browser, getattr(homes, home)) as here:
        page = here.open("nowhere")
        assert "no such view" in page.inner_text("main")
    for address in ("trace/0123456789ab", "feature/zoo%2Fgpt2/0/99999", "compare/0123456789ab"):
        here = Tab(browser, getattr(homes, home))
        page = here.page
        page.goto(f"{here.home}#/{address}")
        page.wait_for_selector("main [role=alert]")
        said = page.inner_text("main")
        page.close()
        assert re.search(r"no |not ", said), said
        # the browser itself tells of an address without an answer, and nothing else may be wrong
        assert all("404" in words for words in here.complaints), here.complaints


@pytest.mark.parametrize("home", HOMES)
def test_the_overview_tells_the_api_s_numbers(browser, homes, home):
    told = homes.client.get("/api/overview")
    with tab(browser, getattr(homes, home)) as here:
        page = here.open("overview")
        rows = page.locator("table", has_text="Quality by layer").locator("tbody tr")
        assert rows.count() == len(told["quality"])
        first = rows.first.inner_text()
        assert told["quality"][0]["model"] in first and f"{told['quality'][0]['fvu']:.3g}"[:5] in first
        page.get_by_role("button", name="FVU", exact=True).click()
        page.wait_for_selector("th[aria-sort=descending]")
        worst = max(told["quality"], key=lambda quality: quality["fvu"])
        assert rows.first.inner_text().split()[:2] == [worst["model"], str(worst["layer"])]


@pytest.mark.parametrize("home", HOMES)
def test_search_finds_a_feature_by_label_and_by_token(browser, homes, home):
    wanted = homes.client.get("/api/features?q=sum&labelled=true&limit=3")
    with tab(browser, getattr(homes, home)) as here:
        page = here.open("features")
        page.keyboard.press("/")
        page.keyboard.type("sum")
        page.get_by_label("Labelled").select_option("yes")
        here.until_text(f"{wanted['total']:,} features")
        row = wanted["features"][0]
        link = page.get_by_role("link", name=f"#{row['feature']} {row['label']}").first
        link.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("h2:has-text('Contexts')")
        found = homes.client.get(
            f"/api/feature?model={quote(row['model'])}&layer={row['layer']}&feature={row['feature']}"
        )
        assert row["label"] in page.inner_text("h1")
        text = page.inner_text("main")
        assert f"held-out F1 {found['labels'][0]['f1']:.2f}" in text
        above = [p["partner"] for p in found["partners"] if p["above_chance"]]
        for partner in above[:1]:
            assert f"#{partner['feature']}" in text
        page.go_back()
        page.wait_for_selector("input[type=search]")
        assert page.input_value("input[type=search]") == "sum"


@pytest.mark.parametrize("home", HOMES)
def test_a_cell_of_the_heat_map_opens_its_pairs(browser, homes, home):
    pair = f"source={quote('zoo/gpt2')}&target={quote('zoo/pythia')}"
    with tab(browser, getattr(homes, home)) as here:
        page = here.open("transfer/matching/zoo%2Fgpt2/zoo%2Fpythia")
        heat = page.locator("[role=application]").first
        heat.focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        here.until("location.hash.includes('cell=')")
        row, column = map(int, re.search(r"cell=(\d+)(?:,|%2C)(\d+)", page.url).groups())  # pyright: ignore
        told = homes.client.get(f"/api/pairs?{pair}&source_layer={row}&target_layer={column}&limit=5")
        first = told["pairs"][0]
        text = here.until_text("source features? ha(s|ve) a best partner here")
        assert re.search(rf"\b{first['source']['feature']}\b", text)
        assert f"{told['total']:,}" in text and f"{told['num_above']:,}" in text
        # the page shows three digits, of the four that a report keeps
        correlation = float(f"{first['correlation']:.4g}") if home == "report" else first["correlation"]
        assert f"{correlation:.3f}" in text


@pytest.mark.parametrize("home", HOMES)
def test_compare_shows_four_models_side_by_side(browser, homes, home):
    listed = homes.client.get("/api/comparisons")[0]
    found = homes.client.get(f"/api/comparisons/{listed['id']}")
    with tab(browser, getattr(homes, home)) as here:
        page = here.open(f"compare/{listed['id']}")
        text = page.inner_text("main")
        assert len(found["models"]) == 4
        for model in found["models"]:
            assert model in text
            share = found["standings"][model]["active"]["universal"]["value"]
            assert f"{100 * share:.1f}" in text or f"{100 * share:.0f} %" in text
        here.require_fit()


@pytest.mark.parametrize("home", HOMES)
def test_a_chain_lights_and_a_node_tells_what_was_predicted_and_measured(browser, homes, home):
    row = next(row for row in homes.client.get("/api/traces") if row["model"] == TRACED)
    trace = homes.client.get(f"/api/traces/{row['id']}")
    with tab(browser, getattr(homes, home)) as here:
        page = here.open(f"trace/{row['id']}")
        assert page.locator("path.chain").count() == 0
        page.get_by_role("button", name=re.compile("^Chain 1 ")).focus()
        page.wait_for_selector("path.chain", state="attached")
        node = page.locator("[data-node]").first
        node.focus()
        place = [int(n) for n in node.get_attribute("data-node").split(",")]
        page.keyboard.press("Enter")
        feature = next(
            f
            for layer in trace["layers"]
            for f in layer["features"]
            if [f["layer"], f["position"], f["feature"]] == place
        )
        panel = page.locator("main")
        for number in (feature["effect"], feature["predicted_effect"]):
            assert f"{number:+.2f}".replace("-", "−") in panel.inner_text()
        before = page.evaluate("document.activeElement.dataset.node")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.dataset.node") != before


@pytest.mark.parametrize("home", HOMES)
def test_by_keyboard_alone_from_the_top_to_a_feature(browser, homes, home):
    with tab(browser, getattr(homes, home)) as here:
        page = here.open("overview")
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent.trim()") == "Features":
                break
        page.keyboard.press("Enter")
        page.wait_for_selector("input[type=search]")
        assert page.evaluate("document.activeElement.id") == "main"  # where reading goes on
        outline = None
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('td a[href*=\"#/feature/\"]')"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                break
        assert outline not in (None, "none")  # one sees where one is
        page.keyboard.press("Enter")
        page.wait_for_selector("h2:has-text('Contexts')")


def test_light_and_dark_are_chosen_and_kept(browser, homes):
    with tab(browser, homes.served) as here:
        page = here.open("overview")
        background = lambda: page.evaluate("getComputedStyle(document.documentElement).backgroundColor")  # noqa: E731
        light = background()
        page.get_by_label("Look").select_option("dark")
        dark = background()
        page.reload()
        here.settle()
        assert light != dark == background()


# ---- files that the page gives away


def download(here: Tab, button: Any) -> tuple[str, bytes]:
    with here.page.expect_download() as waited:
        button.click()
    return waited.value.suggested_filename, Path(waited.value.path()).read_bytes()


@pytest.mark.parametrize("home", HOMES)
def test_figures_and_tables_are_saved(browser, homes, home):
    with tab(browser, getattr(homes, home)) as here:
        page = here.open("overview")
        name, svg = download(here, page.get_by_role("button", name="Save FVU by layer as svg"))
        assert name == "fvu.svg" and svg.startswith(b"<svg") and b"zoo" not in svg[:0] and svg.count(b"<path") >= 4
        name, png = download(here, page.get_by_role("button", name="Save FVU by layer as png"))
        assert png.startswith(b"\x89PNG") and len(png) > 5000
        name, table = download(here, page.get_by_role("button", name="Save Quality by layer as csv"))
        lines = table.decode().split("\r\n")
        assert lines[0].startswith("model,layer,") and len(lines) == 1 + len(
            homes.client.get("/api/overview")["quality"]
        )
        page = here.open("features?labelled=yes")
        _, table = download(here, page.get_by_role("button", name="Save Features as csv"))
        total = homes.client.get("/api/features?labelled=true&limit=1")["total"]
        assert len(table.decode().split("\r\n")) == 1 + total > 51  # all of them, not the page shown
        page = here.open("transfer/matching/zoo%2Fgpt2/zoo%2Fpythia")
        _, svg = download(here, page.get_by_role("button", name=re.compile(r"^Save .* as svg$")).first)
        assert svg.count(b"<rect") >= 4 * 6


@pytest.mark.parametrize("home", HOMES)
def test_a_trace_is_sent_as_one_file(browser, homes, home, tmp_path):
    row = next(row for row in homes.client.get("/api/traces") if row["model"] == TRACED)
    with tab(browser, getattr(homes, home)) as here:
        page = here.open(f"trace/{row['id']}")
        _, record = download(here, page.get_by_role("button", name="JSON"))
        assert json.loads(record)["prompt"] == PROMPT
        name, content = download(here, page.get_by_role("button", name="one file to send"))
        nodes = page.locator("[data-node]").count()
    assert name.endswith(".html") and len(content) < 1_000_000
    sent = tmp_path / "sent.html"
    sent.write_bytes(content)
    with tab(browser, sent.as_uri()) as here:
        here.open(f"trace/{row['id']}")
        assert here.page.locator("[data-node]").count() == nodes > 0


# ---- live


def test_a_prompt_is_traced_and_a_feature_switched_off(browser, homes):
    with tab(browser, homes.served) as here:
        page = here.open("trace")
        page.get_by_label("Model").first.select_option(TRACED)
        page.get_by_label("Prompt").first.fill("What is 23 + 48?")
        page.get_by_role("button", name="Trace", exact=True).click()
        page.wait_for_selector("[data-node]", timeout=120_000)
        assert "71" in page.inner_text("main")
        page.locator("[data-node]").last.click()
        with page.expect_response(lambda r: r.url.endswith("/api/traces") and r.request.method == "POST") as asked:
            page.get_by_role("button", name="switch off").click()
        job = asked.value.json()["id"]
        ended = homes.client.finish({"id": job})
        assert ended["phase"] == "done", ended
        told = homes.client.get(f"/api/jobs/{job}/result")["steering"]
        text = here.until_text(f"{told['probability']:.2f}")
        assert told["answer"] in text and "undo" in text
        undisturbed = homes.client.get(f"/api/jobs/{job}/result")["answer_probability"]
        assert f"{undisturbed:.2f}" in text
        here.require_fit()
        here.require_accessible()


def test_prompts_of_all_kinds_are_traced_or_refused_in_words(browser, homes):
    with tab(browser, homes.served) as here:
        for prompt in ("שלום 15 😀 + 27?", "<img src=x onerror=alert(1)>"):
            page = here.open("trace")
            page.get_by_label("Model").first.select_option("zoo/gpt2")
            page.get_by_label("Prompt").first.fill(prompt)
            page.get_by_role("button", name="Trace", exact=True).click()
            page.wait_for_selector("[data-node], main [role=alert]", timeout=120_000)
            assert prompt in page.inner_text("main")
            here.require_fit()
    here = Tab(browser, homes.served)
    page = here.open("trace")
    page.get_by_label("Model").first.select_option("zoo/gpt2")
    page.get_by_label("Prompt").first.fill("1 " * 300)
    page.get_by_role("button", name="Trace", exact=True).click()
    page.wait_for_selector("main [role=alert]", timeout=120_000)
    assert "tokens" in page.inner_text("main [role=alert]")
    page.close()


def test_models_are_compared_live(browser, homes):
    with tab(browser, homes.served) as here:
        page = here.open("compare")
        page.get_by_label("Prompt").first.fill("What is 31 + 45?")
        page.get_by_role("button", name="Compare", exact=True).click()
        here.until("location.hash.startsWith('#/compare/job/')")
        text = here.until_text("[Uu]niversal", seconds=180)
        assert all(model in text for model in ("zoo/gpt2", "zoo/phi", "zoo/pythia", "zoo/gemma"))


@pytest.mark.slow("page")
def test_training_is_watched_while_another_process_trains(browser, homes, tmp_path):
    preset = Path(api.__file__).parent / "presets" / "demo.yaml"
    command = ["train", preset, "--out", tmp_path / "run", "--quiet"]
    command += ["--set", "models=[{path: zoo/pythia, layers: [0, 1, 2]}]", "--set", "training.tokens=40000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with commands.start(*command, stdout=None, env=environment) as process:
        try:
            until = time.monotonic() + 120
            while not (tmp_path / "run" / "run.json").is_file():
                assert time.monotonic() < until and process.poll() is None, process.stderr.read()  # pyright: ignore
                time.sleep(0.1)
            with (
                served(Serving(RunDir.open(tmp_path / "run"), "cpu")) as client,
                tab(browser, f"http://127.0.0.1:{client.port}/") as here,
            ):
                page = here.open("training")
                states: set[str] = set()
                while "done" not in states and time.monotonic() < until:
                    states |= set(
                        page.evaluate("[...document.querySelectorAll('[data-place]')].map((e) => e.classList[0])")
                    )
                    time.sleep(0.2)
                assert {"running", "done"} <= states, states  # seen without loading the page again
                here.until("[...document.querySelectorAll('[data-place].done')].length === 3", seconds=60)
                # a quick training has one point and no line
                page.wait_for_selector("figure svg circle", timeout=30_000)
                assert len(client.get("/api/training")) == 3
                here.require_accessible()
        finally:
            process.kill()


def start(run: Path, port: int = 0) -> tuple[commands.Command, int]:
    """The command itself, and where it listens."""
    process = commands.start("serve", run, "--port", port, "--device", "cpu", stdout=None)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r":(\d+)/", line)
    assert found, line
    return process, int(found[1])


def end(process: commands.Command) -> None:
    """Kill it, whatever it does, and let its pipe go."""
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.slow("page")
def test_a_server_killed_during_a_trace_and_started_again(browser, homes):
    folder = homes.run.root
    before = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    process, port = start(folder)
    try:
        here = Tab(browser, f"http://127.0.0.1:{port}/")
        page = here.open("trace")
        page.get_by_label("Model").first.select_option(TRACED)
        page.get_by_label("Prompt").first.fill("What is 64 + 29?")
        page.get_by_role("button", name="Trace", exact=True).click()
        here.until("location.hash.startsWith('#/trace/job/')")
        client = Client(port)
        job = page.evaluate("location.hash").rpartition("/")[2].partition("?")[0]
        while client.get(f"/api/jobs/{job}")["phase"] == "queued":
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        end(process)
        here.until_text("connection|does not answer")
        process, _ = start(folder, port)
        here.until_text("started again", seconds=60)
        page.get_by_role("button", name=re.compile("ask again", re.IGNORECASE)).first.click()
        page.wait_for_selector("[data-node]", timeout=120_000)
        assert "93" in page.inner_text("main")
        page.close()
    finally:
        end(process)
    run = RunDir.open(folder)
    for step in run.manifest():
        run.check(step)  # every file is what it was when its step was done
    for trace in run.traces():
        assert trace.layers
    after = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert before <= after


def test_a_browser_comes_in_with_the_token_and_not_without(browser, homes):
    from throughline.serving.access import Access

    token = "a-token-of-some-length"
    with served(Serving(homes.run, "cpu", Access(token=token))) as client:
        page = browser.new_page()
        answer = page.goto(f"http://127.0.0.1:{client.port}/")
        assert answer.status == 401
        page.goto(f"http://127.0.0.1:{client.port}/?token={token}")
        page.wait_for_selector("main h1")
        assert token not in page.url
        page.close()


# ---- what data could smuggle in


@pytest.mark.parametrize("home", HOMES)
def test_markup_in_labels_prompts_and_tokens_stays_text(browser, tmp_path, home):
    run = build_run(tmp_path / "run", forced=True)
    run.write_trace(make_trace(MODELS[0], prompt=f"{HOSTILE}<img src=x onerror=alert(2)>"))
    page_file = write_page(run)
    with served(Serving(run, "cpu")) as client:
        address = {"report": page_file.as_uri(), "served": f"http://127.0.0.1:{client.port}/"}[home]
        with tab(browser, address) as here:
            page = here.open("overview")
            assert "failed the quality gate" in page.inner_text("main")
            page = here.open("features?q=script")
            page.wait_for_selector("table")
            assert HOSTILE in page.inner_text("main")
            for row in client.get("/api/traces"):
                page = here.open(f"trace/{row['id']}")
                assert page.locator("main img, main script").count() == 0
            assert page.evaluate("window.smuggled") is None


def test_the_server_s_policy_stops_a_script_that_got_into_the_page(browser, homes):
    here = Tab(browser, homes.served)
    page = here.open("overview")
    ran = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.smuggled = 1';"
        " document.body.append(s); return window.smuggled === 1; }"
    )
    page.close()
    assert not ran and all("Content Security Policy" in words for words in here.complaints) and here.complaints
