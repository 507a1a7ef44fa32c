"""The server of a run, as clients meet it: over real connections to a real server on this machine.

What is read comes from a made-up run; what is traced is a tiny run of two bundled models. One test starts the command itself.
"""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest

from synthetic_run import HOSTILE, MODELS, PROMPT, build_run, make_trace
from throughline import api
from throughline.cli import main
from throughline.errors import InputError
from throughline.records import Comparison, JobState, Trace
from throughline.run_dir import RunDir
from throughline.serving.access import Access, access_of
from throughline.serving.app import Serving
from throughline.serving.guarding import MOST_BODY_BYTES
from throughline.serving.jobs import Job, Limits
from throughline.serving.requests import MOST_PROMPT_CHARACTERS
from throughline.serving.server import bind, make_server, resolve
from throughline.views.feature_index import FeatureIndex, FeatureQuery, load_index
from trained import TWO_MODELS, change_study

one_tracing_server = pytest.mark.xdist_group("serving")
TOKEN = "a-token-of-some-length"
QUICK = {"features": 2, "answer_tokens": 2, "nodes": 6, "chains": 1}  # a trace that takes little


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)


class Client:
    """Asks one server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request; `_` in names of headers is `-`. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, sent = json.dumps(body).encode(), {"content-type": "application/json"} | sent
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Any:
        """The value at a path that is there."""
        answer = self.ask("GET", path, **headers)
        assert answer.status == 200, answer
        return answer.value

    def refused(self, status: int, method: str, path: str, body: Any = None, **headers: str) -> str:
        """The sentence with which a request is refused."""
        answer = self.ask(method, path, body, **headers)
        assert answer.status == status, answer
        assert b"Traceback" not in answer.body
        assert list(answer.value) == ["detail"]
        return answer.value["detail"]

    def events(self, path: str, **headers: str) -> Iterator[tuple[str, Any, int | None]]:
        """Name, data and number of each event until the stream ends."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("content-type", "").startswith("text/event-stream")
        fields: dict[str, str] = {}
        try:
            while line := answer.readline().decode():
                if line.strip():
                    name, _, value = line.strip().partition(": ")
                    fields[name] = value
                elif "event" in fields:
                    yield fields["event"], json.loads(fields["data"]), int(fields["id"]) if "id" in fields else None
                    fields = {}
        finally:
            connection.close()

    def finish(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job when it has ended."""
        for _ in self.events(f"/api/jobs/{job['id']}/events"):
            pass
        return self.get(f"/api/jobs/{job['id']}")


@contextmanager
def served(serving: Serving) -> Iterator[Client]:
    """A real server in a thread."""
    family, addresses = resolve("127.0.0.1")
    with bind(family, addresses[0], 0) as listening:
        server = make_server(serving)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until = time.monotonic() + 30
            while not server.started:
                assert time.monotonic() < until
                time.sleep(0.01)
            yield Client(listening.getsockname()[1])
        finally:
            serving.stop()
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> RunDir:
    """A run of made-up results; nothing can be traced in it."""
    run = build_run(tmp_path_factory.mktemp("served") / "run")
    chain = {
        "throughline": [0, 0],
        "layer": [0, 1],
        "feature": [5, 9],
        "birth": [0, 0],
        "death": [1, 1],
        "length": [2, 2],
    }
    run.write_table(MODELS[0].name, "throughlines", pl.DataFrame(chain))
    return run


@pytest.fixture(scope="module")
def client(made_up) -> Iterator[Client]:
    with served(Serving(made_up)) as one:
        yield one


@pytest.fixture(scope="module")
def tiny(trained, tmp_path_factory) -> RunDir:
    """A run in which prompts can be traced and compared, and none has been."""
    run = shutil.copytree(trained(TWO_MODELS, "transfer"), tmp_path_factory.mktemp("traced") / "run")
    change_study(run, trace=QUICK)
    return RunDir.open(run)


@pytest.fixture(scope="module")
def tracing(tiny) -> Iterator[Client]:
    with served(Serving(tiny, "cpu")) as one:
        yield one


class Waiting:
    """A worker that does each job when it is let; `failing` raises instead."""

    def __init__(self, failing: Exception | None = None) -> None:
        self.may, self.failing, self.let_go_of, self.done = threading.Event(), failing, 0, 0

    def do(self, job: Job, tell: Callable[[str, int, int], None]) -> bytes:
        tell("waiting", 1, 1)
        assert self.may.wait(30)
        if self.failing:
            raise self.failing
        self.done += 1
        return b"{}"

    def let_go(self) -> None:
        self.let_go_of += 1


@contextmanager
def waiting(run: RunDir, worker: Waiting, **limits: Any) -> Iterator[Client]:
    """A server of `run` whose jobs such a worker does."""
    serving = Serving(run, limits=Limits(**limits))
    serving.queue._make_worker = lambda: worker
    with served(serving) as one:
        try:
            yield one
        finally:
            worker.may.set()


def trace_of(number: int = 0) -> dict[str, str]:
    return {"prompt": f"What is {number} + 27?", "model": "small"}


# ---- reading


def test_the_page_comes_in_parts_and_its_policy_allows_no_inline_script(client, made_up):
    answer = client.ask("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "script-src 'self'" in policy
    page = answer.body.decode()
    assert re.findall(r"<script[^>]*>", page) == ['<script type="module" src="/page.js">']
    assert not re.search(r"<style|style=|\bon\w+=", page)
    for path, kind, part in (("/page.js", "text/javascript", b"/api/"), ("/page.css", "text/css", b"--page")):
        sent = client.ask("GET", path)
        assert sent.status == 200 and sent.headers["content-type"].startswith(kind) and part in sent.body
    assert not (made_up.report_folder() / "index.html").exists()  # reading writes nothing


def test_the_template_of_files_to_send_has_places_for_title_and_data(client):
    sent = client.ask("GET", "/page.html")
    assert sent.headers["content-type"].startswith("text/plain")  # nobody is to open it here
    template = sent.body.decode()
    assert template.count("{{title}}") == template.count("{{data}}") == 1 and "{{policy}}" not in template
    assert client.ask("GET", "/page.js").body.decode() in template


def test_every_answer_says_that_it_is_not_to_be_sniffed_framed_or_kept(client):
    for path in ("/", "/api/overview", "/nothing", "/favicon.ico"):
        headers = client.ask("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert client.ask("GET", "/favicon.ico").status == 204


def test_the_api_describes_itself(client):
    described = client.get("/api/openapi.json")
    assert {"/api/overview", "/api/features", "/api/feature", "/api/transfer", "/api/pairs", "/api/traces"} <= set(
        described["paths"]
    )
    for path, methods in described["paths"].items():
        for name, method in methods.items():
            assert method.get("description"), (path, name)
            answers = [a for code, a in method["responses"].items() if code.startswith("2")]
            assert all("content" in answer for answer in answers)
            typed = [content.get("schema") for a in answers for kind, content in a["content"].items() if "json" in kind]
            assert all(typed), (path, name)


def test_the_overview_has_models_quality_and_facts(client, made_up):
    found = client.get("/api/overview")
    assert [model["name"] for model in found["models"]] == [model.name for model in MODELS]
    assert [model["num_features"] for model in found["models"]] == [m.num_layers * m.d_sae for m in MODELS]
    assert found["models"][0]["num_labelled"] == 19 * 6  # one of twenty is below the bar
    assert sum(not quality["passes"] for quality in found["quality"]) == 1
    assert found["num_traces"] == 3
    assert found["has_analysis"]
    assert str(made_up.root) not in json.dumps(found)


def test_features_are_found_by_label_and_token_filtered_sorted_and_paged(client):
    total = sum(m.num_layers * m.d_sae for m in MODELS)
    assert client.get("/api/features?limit=1")["total"] == total
    carry = client.get("/api/features?q=CARRY&limit=200")
    assert carry["total"] == 39
    assert all(row["label"] == "carry" for row in carry["features"])
    scores = [row["f1"] for row in carry["features"]]
    assert scores == sorted(scores, reverse=True)
    pages = [client.get(f"/api/features?q=carry&limit=20&offset={n}")["features"] for n in (0, 20, 40)]
    assert [row for page in pages for row in page] == carry["features"]
    tokens = client.get("/api/features?q=%E6%95%B0&model=small&layer=1&sort=density&descending=false")
    assert tokens["total"] > 0
    assert all("数" in row["tokens"] and (row["model"], row["layer"]) == ("small", 1) for row in tokens["features"])
    densities = [row["density"] for row in tokens["features"]]
    assert densities == sorted(densities)
    dense = client.get("/api/features?min_density=0.05&max_density=0.06&limit=200")
    assert dense["total"] > 0
    assert all(0.05 <= row["density"] <= 0.06 for row in dense["features"])
    assert client.get("/api/features?labelled=true")["total"] == 19 * 13
    assert client.get("/api/features?min_f1=0.7")["total"] == 19 * 13
    assert client.get("/api/features?q=%3C%2Fscript%3E")["features"][0]["label"] == HOSTILE
    assert client.get("/api/features?q=nothing+has+this")["features"] == []
    assert client.get(f"/api/features?offset={total + 5}")["features"] == []
    unlabelled = client.get("/api/features?limit=200&sort=f1&descending=false")["features"]
    assert unlabelled[0]["label"] is not None  # what has no score comes last either way


def test_a_page_of_features_is_what_sorting_all_of_them_gives(made_up):
    index = load_index(made_up)
    rows = [row for row in index.frame.iter_rows(named=True) if "a" in row["search"]]
    for sort in ("density", "max", "num_active", "layer"):
        for descending in (True, False):
            found = index.find(FeatureQuery("A", sort=sort, descending=descending, offset=7, limit=9))
            wanted = sorted(rows, key=lambda r: r[sort], reverse=descending)[7:16]  # stable, as ours
            assert [(r.model, r.layer, r.feature) for r in found.rows] == [
                (r["model"], r["layer"], r["feature"]) for r in wanted
            ]
            assert found.total == len(rows)


def test_a_score_that_is_no_number_passes_for_none(made_up):
    name, bar = MODELS[2].name, 0.7
    labels = made_up.table(name, "labels").with_columns(f1=pl.lit(float("nan")))
    index = FeatureIndex({name: (made_up.table(name, "features"), labels)}, bar)
    assert index.find(FeatureQuery(min_f1=0.1)).total == 0
    assert index.count(name)[1] == 0


def test_one_feature_has_labels_contexts_partners_and_its_throughline(client, made_up):
    found = client.get("/api/feature?model=zoo/tall&layer=0&feature=5")
    assert found["labels"][0]["text"] == HOSTILE
    assert found["labels"][0]["reached"]
    assert found["labels"][0]["source"] == "concepts"
    assert [context["stratum"] for context in found["contexts"]] == ["top", "top", "0.50"]
    assert found["promoted"]
    assert found["throughline"]["features"][1] == {
        "model": "zoo/tall",
        "layer": 1,
        "feature": 9,
        "label": "tens digit",
        "tokens": found["throughline"]["features"][1]["tokens"],
    }
    partner = next(p for p in found["partners"] if (p["partner"]["model"], p["partner"]["layer"]) == ("small", 2))
    arrays = made_up.transfer("matching", "zoo/tall", "small").arrays
    assert partner["partner"]["feature"] == arrays["partner"][0, 2, 5]
    assert partner["correlation"] == pytest.approx(float(arrays["correlation"][0, 2, 5]))
    assert partner["above_chance"] == (partner["correlation"] > 0.2)
    assert client.get("/api/feature?model=small&layer=0&feature=30")["labels"] == []


def test_transfer_matrices_and_the_pairs_behind_a_cell(client, made_up):
    infos = client.get("/api/transfers")
    assert len(infos) == 18
    found = client.get("/api/transfer?metric=matching&source=zoo/tall&target=zoo/wide")
    arrays = made_up.transfer("matching", "zoo/tall", "zoo/wide").arrays
    assert found["matrices"]["value"] == arrays["value"].tolist()
    assert found["matrices"]["null"] == arrays["null"].tolist()
    assert "ceiling" not in found["matrices"]  # two models have none
    assert "ceiling" in client.get("/api/transfer?metric=matching&source=small&target=small")["matrices"]
    pairs = client.get("/api/pairs?source=zoo/tall&target=zoo/wide&source_layer=2&target_layer=3&limit=200")
    assert pairs["total"] == arrays["live"][2].sum()
    correlations = [pair["correlation"] for pair in pairs["pairs"]]
    assert correlations == sorted(correlations, reverse=True)
    assert pairs["num_above"] == sum(r > 0.2 for r in correlations)
    for pair in pairs["pairs"][:5]:
        assert arrays["partner"][2, 3, pair["source"]["feature"]] == pair["target"]["feature"]


def test_analysis_traces_and_comparisons_are_those_of_the_run(client, made_up):
    assert client.get("/api/analysis") == made_up.analysis().model_dump(mode="json")  # type: ignore[union-attr]
    listed = client.get("/api/traces")
    assert {row["model"] for row in listed} == {model.name for model in MODELS}
    whole = Trace.model_validate(client.get(f"/api/traces/{listed[0]['id']}"))
    assert whole in made_up.traces()
    compared = client.get("/api/comparisons")
    assert Comparison.model_validate(client.get(f"/api/comparisons/{compared[0]['id']}")) == made_up.comparisons()[0]


def test_training_is_told_as_curves(client, made_up, tmp_path):
    assert client.get("/api/training") == []
    run = RunDir.create(tmp_path / "run", made_up.study())
    path = run.journal(MODELS[0].name, [0, 1])
    path.parent.mkdir(parents=True)
    row = {"layers": [0, 1], "l0": [3, 4], "fvu": [0.5, 0.25], "dead": [0, 0.1]}
    lines = [row | {"step": step, "tokens": 64 * step, "loss": [1 / step, 2 / step]} for step in range(1, 502)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 502, "lay')  # a line that is being written
    with served(Serving(run)) as other:
        first, second = other.get("/api/training")
    assert (first["model"], first["layer"], second["layer"]) == (MODELS[0].name, 0, 1)
    assert first["step"][0] == 1 and first["step"][-1] == 501 and len(first["step"]) <= 202
    assert second["loss"][-1] == 2 / 501 and second["fvu"][0] == 0.25 and second["tokens"][-1] == 64 * 501


def test_what_is_not_there_is_said_in_a_sentence(client):
    for path in (
        "/api/feature?model=zoo/none&layer=0&feature=5",
        "/api/feature?model=small&layer=9&feature=5",
        "/api/features?model=none",
        "/api/transfer?metric=matching&source=small&target=none",
        "/api/pairs?source=small&target=small&source_layer=7&target_layer=0",
        "/api/traces/0000",
        "/api/comparisons/0000",
        "/api/jobs/0000",
        "/api/jobs/0000/events",
        "/api/jobs/0000/result",
        "/api",
        "/docs",
    ):
        assert client.refused(404, "GET", path)
    assert "limit" in client.refused(422, "GET", "/api/features?limit=100000")
    assert "sort" in client.refused(422, "GET", "/api/features?sort=__class__")
    client.refused(422, "GET", "/api/feature?model=small&layer=-1&feature=99999999999999999999")
    client.refused(405, "PUT", "/api/overview")


def test_a_run_without_results_says_what_makes_them(tmp_path):
    with served(Serving(build_run(tmp_path / "run", parts=()))) as client:
        assert client.get("/api/overview")["quality"] == []
        assert client.get("/api/features")["total"] == 0
        assert client.get("/api/transfers") == []
        assert "throughline report RUN" in client.refused(404, "GET", "/api/analysis")
        assert client.ask("GET", "/").status == 200


def test_what_the_run_gains_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("throughline.views.fresh.LOOK_SECONDS", 0.0)
    run = build_run(tmp_path / "run", parts=("quality", "tables"))
    with served(serving := Serving(run)) as client:
        assert client.get("/api/traces") == []
        with monkeypatch.context() as patched:
            patched.setattr(serving.reader, "traces", None)  # not asked for what was answered already
            assert client.get("/api/traces") == []
        run.write_trace(make_trace(MODELS[0], "What is 4321 + 1234?"))
        assert [row["prompt"] for row in client.get("/api/traces")] == ["What is 4321 + 1234?"]


def test_damage_is_told_without_where_the_run_lies(tmp_path):
    run = build_run(tmp_path / "run", parts=("quality",))
    (run.root / "analysis.json").write_text("{")
    with served(Serving(run)) as client:
        said = client.refused(500, "GET", "/api/analysis")
        assert "analysis.json is damaged" in said
        assert str(tmp_path) not in said


def test_a_bug_is_one_sentence_to_the_client_and_a_traceback_in_the_log(made_up, monkeypatch, caplog):
    serving = Serving(made_up)
    with served(serving) as client:
        monkeypatch.setattr(serving.reader, "_traces", None)
        assert client.refused(500, "GET", "/api/traces") == "the server failed at this request; its log says why"
        _await(lambda: "Traceback" in caplog.text)  # written after the answer
        assert client.get("/api/transfers")


def test_status_once_and_while_it_changes(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr("throughline.serving.events.STATUS_SECONDS", 0.2)
    run = build_run(tmp_path / "run", parts=())
    run.update_info(depths={model.name: model.num_layers for model in MODELS})
    with served(Serving(run)) as client:
        assert client.get("/api/status")["layers"]["waiting"] == 13
        events = client.events("/api/status/events")
        assert next(events)[1]["layers"]["running"] == 0
        state = JobState(model="small", layers=[0, 1], host="here", pid=1, device="cpu", at=time.time(), step=3)
        run.note_job(state)
        name, told, number = next(events)
        assert (name, told["layers"]["running"], number) == ("status", 2, 1)
        assert told["devices"][0]["step"] == 3
        events.close()


# ---- who may ask


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil.example:80",
        "",
        "127.0.0.2",
        "[::1",
        "a b",
    ],
)
def test_other_names_than_its_own_are_refused(client, host):
    assert "not called that" in client.refused(421, "GET", "/api/overview", Host=host)


def test_its_own_names_are_known_at_any_port(client):
    for host in ("localhost", f"127.0.0.1:{client.port}", "LOCALHOST:9000", "[::1]:80", "localhost."):
        assert client.get("/api/transfers", Host=host)


def test_two_hosts_or_none_are_refused(client):
    for head in ("GET /api/overview HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", "GET / HTTP/1.0\r\n"):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as plain:
            plain.sendall(f"{head}Connection: close\r\n\r\n".encode())
            assert plain.recv(4096).split(b"\r\n")[0].split()[1] in (b"400", b"421")


def test_pages_of_other_sites_may_change_nothing(client):
    own = f"http://127.0.0.1:{client.port}"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://evil.example/{own}", "file://"):
        assert "another site" in client.refused(403, "POST", "/api/traces", trace_of(), Origin=origin)
        client.refused(403, "DELETE", "/api/jobs/0000", Origin=origin)
    client.refused(403, "POST", "/api/traces", trace_of(), Sec_Fetch_Site="cross-site")
    client.refused(404, "DELETE", "/api/jobs/0000", Origin=own)
    assert "access-control-allow-origin" not in client.ask("GET", "/api/overview", Origin="http://evil.example").headers
    form = client.ask("POST", "/api/traces", json.dumps(trace_of()).encode(), Content_Type="text/plain")
    assert form.status in (415, 422)


@pytest.mark.parametrize(
    "path",
    [
        "/../study.yaml",
        "/%2e%2e/study.yaml",
        "/api/../../study.yaml",
        "/api/traces/..%2f..%2fstudy.yaml",
        "/api/traces/%252e%252e%252fstudy",
        "/api/traces/..",
        "/api/traces/a259%00",
        "/api/comparisons/..%5c..%5crun.json",
        "/api/jobs/..%2f..%2frun.json/result",
        "//etc/passwd",
        "/api/feature?model=../../zoo/tall&layer=0&feature=5",
        "/api/features?model=..%2F..%2F",
        "/api/transfer?metric=../matching&source=small&target=small",
        "/api/transfer?metric=matching&source=..%2Fsmall&target=small",
        "/api/pairs?source=%2e%2e%2f&target=small&source_layer=0&target_layer=0",
        "/study.yaml",
        "/report/index.html",
    ],
)
def test_paths_lead_nowhere_but_to_the_api(client, path):
    client.refused(404, "GET", path)


def test_large_bodies_are_refused_and_the_server_lives(client):
    limit = f"{MOST_BODY_BYTES // 1024} KiB"
    assert limit in client.refused(413, "POST", "/api/traces", b"x" * 2_000_000, Content_Type="application/json")
    assert limit in client.refused(413, "POST", "/api/traces", b"x" * (MOST_BODY_BYTES + 1))
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as plain:  # chunked: no length is told
        plain.sendall(b"POST /api/traces HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            plain.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        plain.sendall(b"0\r\n\r\n")
        assert b" 413 " in plain.recv(4096)
    assert client.get("/api/transfers")


def test_bodies_that_do_not_arrive_are_not_awaited(made_up, monkeypatch):
    monkeypatch.setattr("throughline.serving.guarding.BODY_SECONDS", 0.2)
    with (
        served(Serving(made_up)) as client,
        socket.create_connection(("127.0.0.1", client.port), timeout=20) as plain,
    ):
        plain.sendall(b"POST /api/traces HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in plain.recv(4096)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": "x" * (MOST_PROMPT_CHARACTERS + 1)}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"off": "on"}, "off"),
        ({"settings": ["x"] * 99}, "settings"),
        ({"settings": ["x" * 999]}, "settings"),
        ({"force": True}, "force"),
        ({"__class__": "x"}, "__class__"),
    ],
)
def test_requests_outside_their_limits_are_refused(client, changes, named):
    assert client.refused(422, "POST", "/api/traces", trace_of() | changes).startswith(named)


def test_requests_that_make_no_sense_are_refused(client):
    assert "several models" in client.refused(422, "POST", "/api/traces", {"prompt": PROMPT})
    assert "small" in client.refused(404, "POST", "/api/traces", {"prompt": PROMPT, "model": "../small"})
    client.refused(404, "POST", "/api/comparisons", {"prompt": PROMPT, "models": ["small", "none"]})
    client.refused(422, "POST", "/api/comparisons", {"prompt": PROMPT, "models": ["small"]})
    for body in (b"", b"{", b"[]", b"null"):
        client.refused(422, "POST", "/api/traces", body, Content_Type="application/json")
    for body in (b"\xff\xff", b"[" * 60_000):
        client.refused(400, "POST", "/api/traces", body, Content_Type="application/json")


def test_a_token_is_asked_of_all_but_the_icon(made_up, caplog, capfd):
    with served(Serving(made_up, access=Access(token=TOKEN))) as client:
        for path in ("/", "/api/overview", "/api/openapi.json", "/nothing"):
            assert "token" in client.refused(401, "GET", path)
        client.refused(401, "POST", "/api/traces", trace_of())
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer", "Bearer \xe9"):
            client.refused(401, "GET", "/api/overview", Authorization=wrong)
        for wrong in ("throughline=", f"throughline={TOKEN}", "throughline=\xe9", "=;;=", "other=1"):
            client.refused(401, "GET", "/api/overview", Cookie=wrong)
        assert client.get("/api/transfers", Authorization=f"Bearer {TOKEN}")
        client.refused(401, "GET", f"/api/overview?token={TOKEN}")  # the link is for people
        client.refused(401, "GET", "/?token=wrong")
        admitted = client.ask("GET", f"/?token={TOKEN}")
        assert (admitted.status, admitted.headers["location"]) == (303, "/")
        cookie, *marks = [part.strip() for part in admitted.headers["set-cookie"].split(";")]
        assert {"HttpOnly", "SameSite=Lax"} <= set(marks)
        assert TOKEN not in cookie
        assert client.ask("GET", "/", Cookie=f"a=b; {cookie}").status == 200
        assert client.ask("GET", "/favicon.ico").status == 204
        client.refused(403, "POST", "/api/traces", trace_of(), Cookie=cookie, Origin="http://evil.example")
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in repr(Access(token=TOKEN))


def test_which_names_a_server_has():
    assert access_of("127.0.0.1", ["127.0.0.1"], None).names == {"localhost", "127.0.0.1", "::1"}
    everywhere = access_of("0.0.0.0", ["0.0.0.0"], TOKEN)
    assert everywhere.knows_host(["192.168.0.7:8765"])
    assert everywhere.knows_host([socket.gethostname()])
    assert not everywhere.knows_host(["evil.example"])
    assert access_of("lab.example", ["192.0.2.1"], TOKEN).knows_host(["lab.example:8765"])


# ---- jobs


@one_tracing_server
def test_a_trace_is_queued_done_and_then_known(tracing, tiny):
    asked = {"prompt": PROMPT, "model": "zoo/pythia"}
    first = tracing.ask("POST", "/api/traces", asked)
    assert first.status == 202
    job = first.value
    told = list(tracing.events(f"/api/jobs/{job['id']}/events"))
    names = [name for name, *_ in told if name != "position"]
    assert names == ["queued", "running", *["progress"] * 6, "done"]
    steps = [(data["doing"], data["step"], data["num_steps"]) for name, data, _ in told if name == "progress"]
    assert steps[0] == ("opening zoo/pythia", 1, 1)
    assert [step for _, step, _ in steps[1:]] == [1, 2, 3, 4, 5] and {num for *_, num in steps[1:]} == {5}
    assert steps[3][0] == "switching features of layer 1 off"
    again = tracing.ask("POST", "/api/traces", asked)
    assert (again.status, again.value["id"], again.value["phase"]) == (200, job["id"], "done")
    found = Trace.model_validate(tracing.get(f"/api/jobs/{job['id']}/result"))
    assert found == api.trace(tiny, PROMPT, "zoo/pythia", device="cpu")
    later = list(tracing.events(f"/api/jobs/{job['id']}/events", Last_Event_Id="2"))
    assert [name for name, *_ in later] == names[3:]  # the events after number 2
    tracing.refused(409, "DELETE", f"/api/jobs/{job['id']}")


@one_tracing_server
def test_a_feature_switched_off_is_another_job(tracing):
    asked = {"prompt": PROMPT, "model": "zoo/pythia", "verify": False}
    plain = tracing.ask("POST", "/api/traces", asked).value
    features = [f for layer in _result(tracing, plain)["layers"] for f in layer["features"]]
    setting = f"layer={features[0]['layer']},feature={features[0]['feature']},off"
    steered = tracing.ask("POST", "/api/traces", asked | {"settings": [setting]}).value
    assert steered["id"] != plain["id"]
    assert _result(tracing, steered)["steering"]["settings"]


@one_tracing_server
def test_models_are_compared_by_a_job(tracing):
    job = tracing.ask("POST", "/api/comparisons", {"prompt": PROMPT}).value
    found = Comparison.model_validate(_result(tracing, job))
    assert found.models == ["zoo/pythia", "zoo/gpt2"]


@one_tracing_server
def test_a_job_that_cannot_be_done_says_why_and_may_be_asked_again(tracing):
    for changes, said in (
        ({"settings": ["layer=99,feature=1,off"]}, "layer"),
        ({"settings": ["what"]}, "what"),
        ({"prompt": "1 " * 200}, "tokens"),
    ):
        asked = {"prompt": PROMPT, "model": "zoo/pythia", "verify": False} | changes
        ended = tracing.finish(tracing.ask("POST", "/api/traces", asked).value)
        assert ended["phase"] == "failed"
        assert said in ended["error"]
        assert tracing.ask("POST", "/api/traces", asked).status == 202
    hostile = {"prompt": HOSTILE, "model": "zoo/pythia", "verify": False}
    ended = tracing.finish(tracing.ask("POST", "/api/traces", hostile).value)
    assert ended["phase"] in ("done", "failed")
    assert HOSTILE not in tracing.ask("GET", "/").body.decode()


def _result(client: Client, job: dict[str, Any]) -> Any:
    assert client.finish(job)["phase"] == "done"
    return client.get(f"/api/jobs/{job['id']}/result")


def find_tracing_process() -> int:
    """The process id of what this process started to trace."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"serving.working" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError("nothing traces")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found by what Linux tells of them")
@one_tracing_server
def test_a_tracing_process_that_is_killed_takes_its_job_alone(tracing):
    def ask(prompt: str) -> dict[str, Any]:
        return tracing.ask("POST", "/api/traces", {"prompt": prompt, "model": "zoo/gpt2"}).value

    assert tracing.finish(ask("What is 11 + 22?"))["phase"] == "done"
    os.kill(find_tracing_process(), signal.SIGKILL)  # while nothing is to do: nobody notices
    assert tracing.finish(ask("What is 12 + 22?"))["phase"] == "done"
    job, process = ask("What is 13 + 22?"), find_tracing_process()
    for name, *_ in tracing.events(f"/api/jobs/{job['id']}/events"):
        if name == "progress":
            os.kill(process, signal.SIGKILL)
            break
    ended = tracing.finish(job)
    assert ended["phase"] == "failed" and "the process that traces was ended" in ended["error"]
    assert tracing.get("/api/overview")
    assert tracing.finish(ask("What is 13 + 22?"))["phase"] == "done"


def test_jobs_wait_in_turn_and_one_that_waits_can_be_cancelled(made_up):
    worker = Waiting()
    with waiting(made_up, worker) as client:
        jobs = [client.ask("POST", "/api/traces", trace_of(n)).value for n in range(4)]
        _await(lambda: client.get(f"/api/jobs/{jobs[0]['id']}")["phase"] == "running")
        assert [client.get(f"/api/jobs/{job['id']}")["position"] for job in jobs] == [None, 0, 1, 2]
        events = client.events(f"/api/jobs/{jobs[2]['id']}/events")
        assert [next(events)[0], next(events)[1]["position"]] == ["queued", 1]
        assert client.ask("DELETE", f"/api/jobs/{jobs[1]['id']}").value["phase"] == "cancelled"
        assert next(events)[1]["position"] == 0
        assert client.get("/api/transfers")  # reading does not wait
        worker.may.set()
        assert [name for name, *_ in events] == ["running", "progress", "done"]
        assert client.finish(jobs[3])["phase"] == "done"
        assert client.finish(jobs[1])["phase"] == "cancelled"
        assert worker.done == 3
        assert client.ask("POST", "/api/traces", trace_of(1)).status == 202  # cancelled, so asked anew


def test_a_job_that_runs_ends_at_its_next_step_when_cancelled(made_up):
    began, go_on = threading.Event(), threading.Event()

    class Stepping(Waiting):
        def do(self, job: Job, tell: Callable[[str, int, int], None]) -> bytes:
            for step in range(1, 4):
                tell("stepping", step, 3)
                began.set()
                assert go_on.wait(30)
            self.done += 1
            return b"{}"

    worker = Stepping()
    with waiting(made_up, worker) as client:
        job = client.ask("POST", "/api/traces", trace_of()).value
        assert began.wait(30)
        assert client.ask("DELETE", f"/api/jobs/{job['id']}").value["phase"] == "running"
        again = client.ask("POST", "/api/traces", trace_of())  # asked for again meanwhile: a job of its own
        assert again.status == 202
        go_on.set()
        assert client.finish(again.value)["phase"] == "done"
        assert worker.done == 1
        assert "done" in client.refused(409, "DELETE", f"/api/jobs/{again.value['id']}")


def test_a_thousand_traces_are_too_many(made_up):
    worker = Waiting()
    with waiting(made_up, worker, burst=2000) as client:
        statuses, waits = [], []
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        for number in range(1000):
            connection.request(
                "POST", "/api/traces", json.dumps(trace_of(number)), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
            waits += [int(answer.getheader("retry-after", "0"))] if answer.status == 429 else []
        connection.close()
        assert set(statuses) == {202, 429}
        assert statuses.count(202) in (32, 33)  # those that wait, and the one that runs
        assert min(waits) >= 1
        assert client.get("/api/overview")
        assert client.ask("POST", "/api/traces", trace_of(0)).status == 200  # the first is known


def test_new_jobs_have_a_rate(made_up):
    worker = Waiting()
    worker.may.set()
    with waiting(made_up, worker, burst=3, per_minute=6) as client:
        answers = [client.ask("POST", "/api/traces", trace_of(n)) for n in range(5)]
        assert [answer.status for answer in answers] == [202, 202, 202, 429, 429]
        assert 1 <= int(answers[4].headers["retry-after"]) <= 11
        assert client.ask("POST", "/api/traces", trace_of(1)).status == 200


def test_a_bug_in_a_job_ends_that_job_alone(made_up, caplog):
    worker = Waiting(RuntimeError("secret"))
    worker.may.set()
    with waiting(made_up, worker) as client:
        ended = client.finish(client.ask("POST", "/api/traces", trace_of()).value)
        assert (ended["phase"], "secret" in ended["error"]) == ("failed", False)
        assert "secret" in caplog.text
        worker.failing = InputError(f"{made_up.place} is wrong")
        ended = client.finish(client.ask("POST", "/api/traces", trace_of(1)).value)
        assert ended["error"] == "RUN is wrong"
        worker.failing = None
        assert client.finish(client.ask("POST", "/api/traces", trace_of(2)).value)["phase"] == "done"


def test_models_are_let_go_when_nothing_is_to_do_and_old_results_are_forgotten(made_up):
    worker = Waiting()
    worker.may.set()
    with waiting(made_up, worker, idle_seconds=0.1, kept=2) as client:
        jobs = [client.ask("POST", "/api/traces", trace_of(n)).value for n in range(4)]
        client.finish(jobs[3])
        _await(lambda: worker.let_go_of == 1)
        assert client.refused(404, "GET", f"/api/jobs/{jobs[0]['id']}")
        assert client.get(f"/api/jobs/{jobs[3]['id']}/result") == {}
        assert client.finish(client.ask("POST", "/api/traces", trace_of(9)).value)["phase"] == "done"


def test_a_run_made_anew_is_not_answered_from_before(tmp_path, monkeypatch):
    monkeypatch.setattr("throughline.views.fresh.LOOK_SECONDS", 0.0)
    run = build_run(tmp_path / "run", parts=())
    worker = Waiting()
    worker.may.set()
    with waiting(run, worker) as client:
        before = client.finish(client.ask("POST", "/api/traces", trace_of()).value)
        with run.step("label/small", "another key") as files:
            files.append("study.yaml")
        after = client.ask("POST", "/api/traces", trace_of())
        assert (after.status, after.value["id"] == before["id"]) == (202, False)


def _await(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


# ---- the command


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """The one line of a command that refused its input."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    return run


def test_the_command_refuses_what_it_cannot_serve(refused, made_up, tmp_path):
    run = made_up.root
    assert "does not exist" in refused("serve", tmp_path / "none")
    assert "not a run folder" in refused("serve", tmp_path)
    for host in ("0.0.0.0", "::"):
        assert "it needs --token" in refused("serve", run, "--host", host)
    assert "16 characters" in refused("serve", run, "--host", "0.0.0.0", "--token", "short")
    assert "ASCII" in refused("serve", run, "--token", "a token that has spaces")
    assert "no address of this machine" in refused("serve", run, "--host", "192.0.2.1", "--token", TOKEN)
    assert "no name or address" in refused("serve", run, "--host", "no such host")
    assert "from 0 to 65535" in refused("serve", run, "--port", 70000)
    assert "device 'gpu' is unknown" in refused("serve", run, "--device", "gpu")
    with bind(socket.AF_INET, "127.0.0.1", 0) as taken:
        assert "is in use" in refused("serve", run, "--port", taken.getsockname()[1])


def test_the_command_serves_without_torch_says_where_and_ends_with_ctrl_c(made_up):
    # a fresh interpreter: what it imports is the point
    code = (
        "import sys\nfrom throughline.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    sys.stderr.write('torch' * ('torch' in sys.modules))"
    )
    environment = os.environ | {"THROUGHLINE_TOKEN": TOKEN, "PYTHONPATH": str(Path(api.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(made_up.root), "--host", "0.0.0.0", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr
        first = process.stderr.readline()
        port = re.search(r"http://0\.0\.0\.0:(\d+)/", first)
        assert port, first
        client = Client(int(port[1]))
        client.refused(401, "GET", "/api/overview")
        assert client.get("/api/overview", Authorization=f"Bearer {TOKEN}")["num_traces"] == 3
        stream = client.events("/api/status/events", Authorization=f"Bearer {TOKEN}")
        next(stream)  # an open stream does not keep the server from ending
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(20) == 0, rest
        stream.close()
    finally:
        process.kill()
        process.communicate()
    assert "nothing is encrypted" in " ".join(rest.split())
    assert "torch" not in rest
    assert "Traceback" not in rest
    assert TOKEN not in first + rest
