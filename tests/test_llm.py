"""The labeler `llm` against a real server of a bundled model, and against every way in which a server fails.

The model that answers knows no language; its judgements are parities (`served_model.PARITY`), so scores must be chance's.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

import commands
from served_model import PARITY, Proxy, arithmetic_model, chat_reply, cut_off, respond, serve_models
from throughline import api
from throughline.asking import Asking
from throughline.cli import main
from throughline.errors import InputError
from throughline.labelers.llm_client import Answer, CallError, Endpoint, Request
from throughline.records import best_labels, reaches
from throughline.session import Session
from throughline.study import LlmSpec, load_study, parse_study

pytestmark = pytest.mark.xdist_group("llm")
LENIENT = {"max_l0_share": 1, "max_fvu": 10, "min_ce_recovered": -10, "max_dead": 1}
STUDY = {
    "name": "asked",
    "models": [{"path": "zoo/pythia", "layers": [0, 1]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"architecture": "topk", "d_sae": 64, "k": 8},
    "training": {"tokens": 6000, "batch_tokens": 64},
    "gate": LENIENT,
    "evaluation": {"tokens": 2000, "spliced_tokens": 600, "sample_tokens": 1500},
    "transfer": {"metrics": []},
}
REQUEST = Request("Add.", "1 + 1", 8)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Address of the server, and folders of a model with a chat template and of one without."""
    folder = tmp_path_factory.mktemp("served")
    chat = arithmetic_model(folder / "chat", PARITY)
    plain = arithmetic_model(folder / "plain", None)
    with serve_models(folder / "log") as base_url:
        yield base_url, str(chat), str(plain)


@pytest.fixture
def proxy(served):
    made = Proxy(served[0])
    yield made
    made.close()


@pytest.fixture(scope="session")
def labelled(trained) -> Path:
    """A run with labels of tokens alone, not to be changed."""
    return trained(STUDY, "label")


@pytest.fixture
def run(labelled, tmp_path) -> Path:
    return shutil.copytree(labelled, tmp_path / "run")


def asking(base_url: str, model: str, **changes: Any) -> dict[str, Any]:
    """Settings with which the parity model's judgements can be read: one number an answer."""
    small = {"features": 2, "judged": 6, "per_call": 1, "context": 8, "answer_tokens": 8, "concurrency": 1}
    return {"base_url": base_url, "model": model, "timeout_seconds": 20, "retries": 1} | small | changes


def ask(run: Path, llm: dict[str, Any], **options: Any) -> pl.DataFrame:
    """All labels of the model after asking."""
    options = {"labeler": "llm", "llm": llm, "approve": lambda cost: True} | options
    return api.label(run, device="cpu", **options)["zoo/pythia"]


def asked(labels: pl.DataFrame) -> pl.DataFrame:
    return labels.filter(pl.col("source") == "llm")


@pytest.fixture(scope="session")
def undisturbed(labelled, served, tmp_path_factory) -> pl.DataFrame:
    """All labels when nothing goes wrong."""
    return ask(shutil.copytree(labelled, tmp_path_factory.mktemp("undisturbed") / "run"), asking(served[0], served[1]))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- a real server


def test_labels_of_a_real_server(run, served, proxy):
    """Scores are honest (chance), every number has its n, what the others have words for is not asked, nothing is asked twice."""
    free = api.load_run(run).table("zoo/pythia", "labels")
    lines: list[str] = []
    labels = ask(run, asking(proxy.base_url, served[1], features=5, judged=10, concurrency=2), say=lines.append)
    assert labels.filter(pl.col("source") != "llm").equals(free)
    own, report = asked(labels), api.load_run(run).asked("zoo/pythia")
    assert report is not None and not report.failed and report.num_labelled == len(own) == 10
    assert own.join(best_labels(free, 0.7), on=["layer", "feature"]).is_empty()
    assert own["num_tokens"].is_between(15, 20).all() and (own["num_positive"] < own["num_tokens"]).all()
    assert set(own["label"]) <= {"0", "1"} and set(own["measure"]) == {"detection"}
    mean, spread = own["balanced_accuracy"].mean(), 4 * 0.5 / own["num_tokens"].sum() ** 0.5
    assert isinstance(mean, float) and abs(mean - 0.5) < spread
    shown = best_labels(labels, 0.7).filter(pl.col("source") == "llm")
    assert len(shown) == own.filter(reaches(0.7)).height <= 3  # whoever guesses gets there now and then
    assert len(proxy.asked) == report.num_calls == len(set(proxy.asked)) and report.prompt_tokens > 0
    [cost] = [line for line in lines if line.startswith("labels of 10 features by")]
    announced = int(cost.partition(" calls")[0].rpartition(" ")[2].replace(",", ""))
    # what two features ask in the same words is announced for both and asked once
    assert announced == report.num_calls + report.num_shared and report.num_stored == 0

    api.label(
        run, device="cpu", say=lines.append
    )  # the run's study knows; nothing is left to ask, so none has to approve
    again = ask(run, {"concurrency": 4, "base_url": proxy.base_url, "timeout_seconds": 5})
    assert again.equals(labels) and len(proxy.asked) == report.num_calls
    page = api.report(run).read_text()
    assert '"detection"' in page


def test_an_endpoint_and_the_same_model_in_this_process_agree(run, served, undisturbed):
    settings = asking(served[0], served[1])
    del settings["base_url"], settings["model"]
    here = ask(run, settings | {"path": served[1]}, approve=None)  # nothing leaves this machine
    assert len(asked(here)) == 4 and here.equals(undisturbed)


def test_a_model_without_a_chat_template(run, served):
    """Chat fails and says what to set; completions work."""
    with pytest.raises(InputError, match=r"answered no call.*features\.llm\.api: completions"):
        ask(run, asking(served[0], served[2], features=1))
    spec = LlmSpec(**asking(served[0], served[2], api="completions"))
    answer = Endpoint(spec).answer(Request("What is 20 + 10?", "What is 15 + 27?", 8))
    assert answer.text and answer.prompt_tokens > 10
    labels = ask(
        run, asking(served[0], served[2], api="completions", features=1)
    )  # it rambles, and that is no judgement
    report = api.load_run(run).asked("zoo/pythia")
    assert report is not None and not report.failed and len(report.unread) + len(asked(labels)) == 2


def test_the_most_influential_are_asked_about_first(run, tmp_path):
    """By the effects in the run's traces; without any, by activation, which is said once."""
    lines: list[str] = []
    free = api.load_run(run).table("zoo/pythia", "labels")
    labelled = {(row["layer"], row["feature"]) for row in best_labels(free, 0.7).iter_rows(named=True)}

    def candidates(order: str) -> list[list[int]]:
        session = Session(api.load_run(run), "cpu", lines.append)
        found = Asking(session, LlmSpec(base_url="http://x/v1", model="m", order=order))  # type: ignore[arg-type]
        return [found._candidates("zoo/pythia", layer, {f for at, f in labelled if at == layer}) for layer in (0, 1)]

    active = candidates("active")
    assert candidates("influential") == active
    assert lines == ["zoo/pythia has no traces yet, so its most active features are asked about"]
    trace = api.trace(run, "What is 15 + 27?", device="cpu")
    for layer, found in enumerate(candidates("influential")):
        effects = Counter()
        for shown in trace.layers[layer].features:
            effects[shown.feature] += abs(shown.effect)
        traced = [f for f, effect in effects.most_common() if (layer, f) not in labelled and effect > 0]
        assert found[: len(traced)] == traced and sorted(found) == sorted(active[layer])


# ---- everything that goes wrong


def faults(base: Proxy) -> dict[str, Any]:
    """What a server does to one request, by name."""
    return {
        "429": lambda h: respond(h, 429, b'{"error": {"message": "slow down"}}', Retry_After="1"),
        "500": lambda h: respond(h, 500, b"oops"),
        "503": lambda h: respond(h, 503, b"<html>busy</html>"),
        "slow": lambda h: base.stop.wait(4),
        "cut off": cut_off,
        "not JSON": lambda h: respond(h, 200, b'{"choices": ['),
        "HTML": lambda h: respond(h, 200, b"<html>welcome</html>", Content_Type="text/html"),
        "another JSON": lambda h: respond(h, 200, b'["hello"]'),
        "no choices": lambda h: respond(h, 200, b'{"id": "1", "choices": []}'),
        "no message": lambda h: respond(h, 200, b'{"id": "1", "choices": [{"index": 0}]}'),
        "text of numbers": lambda h: respond(h, 200, chat_reply(None).replace(b"null", b"[1]")),
    }


@pytest.mark.parametrize("name", sorted(faults(None)))  # type: ignore[arg-type]
def test_a_fault_that_passes_is_got_over(name, served, proxy):
    proxy.fault = lambda number, body: faults(proxy)[name] if number == 1 else None
    endpoint = Endpoint(LlmSpec(**asking(proxy.base_url, served[1], timeout_seconds=2)))
    began = time.monotonic()
    assert endpoint.answer(REQUEST).text.strip() in ("0", "1")
    assert len(proxy.asked) == 2 and (name != "429" or time.monotonic() - began >= 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("429", "slow down"), ("slow", "timed out"), ("cut off", "onnection"), ("no choices", "it has no choices")],
)
def test_a_fault_that_stays_is_named(name, reason, served, proxy):
    proxy.fault = lambda number, body: faults(proxy)[name]
    endpoint = Endpoint(LlmSpec(**asking(proxy.base_url, served[1], timeout_seconds=1)))
    with pytest.raises(CallError, match=reason) as failed:
        endpoint.answer(REQUEST)
    assert len(proxy.asked) == 2 and "\n" not in str(failed.value) and len(str(failed.value)) <= 200


def test_models_that_reason_take_other_settings(served, proxy):
    def fault(number, body):
        if "max_tokens" in body:
            return lambda h: respond(h, 400, b'{"error": {"message": "use max_completion_tokens instead"}}')
        if "temperature" in body:
            return lambda h: respond(h, 400, b'{"error": {"message": "temperature is not supported"}}')
        return None

    proxy.fault = fault
    endpoint = Endpoint(LlmSpec(**asking(proxy.base_url, served[1], retries=2)))
    assert endpoint.answer(REQUEST).text.strip() in ("0", "1") and len(proxy.asked) == 3
    endpoint.answer(Request("Add.", "2 + 2", 8))
    assert len(proxy.asked) == 4


def test_features_whose_calls_fail_are_named_and_asked_again(run, served, proxy, undisturbed, capsys):
    settings = asking(proxy.base_url, served[1], retries=0)
    proxy.fault = lambda number, body: faults(proxy)["500"] if number == 20 else None
    labels = ask(run, settings)
    report = api.load_run(run).asked("zoo/pythia")
    assert report is not None and len(report.failed) == 1 and "500" in next(iter(report.failed.values()))
    assert len(asked(labels)) == 3
    num_asked = len(proxy.asked)
    with pytest.raises(SystemExit) as ended:
        main(["label", str(run), "--yes", "--device", "cpu"])
    out, said = capsys.readouterr()
    assert not ended.value.code and "calls failed" not in out, said
    assert api.load_run(run).table("zoo/pythia", "labels").equals(undisturbed)
    assert len(proxy.asked) > num_asked and max(Counter(proxy.answered).values()) == 1


def test_chatter_is_no_judgement(run, served, proxy):
    """Every third judgement is chatter: it is kept, not asked again, and n says how many are left."""
    texts = iter(range(10**6))

    def fault(number, body):
        judging = body["messages"][-1]["content"].startswith("Label:")
        return (
            (lambda h: respond(h, 200, chat_reply("Well, that depends."))) if judging and next(texts) % 3 == 0 else None
        )

    proxy.fault = fault
    labels = asked(ask(run, asking(proxy.base_url, served[1])))
    assert len(labels) and (labels["num_tokens"] < 12).all() and (labels["num_tokens"] >= 6).all()
    num_asked = len(proxy.asked)
    assert asked(ask(run, {"timeout_seconds": 7})).equals(labels) and len(proxy.asked) == num_asked


def test_a_dead_endpoint_changes_nothing(run):
    before = snapshot(run)
    with pytest.raises(
        InputError, match=r"m at http://127\.0\.0\.1:9/v1 answered no call, so nothing was labelled.*again to go on"
    ):
        ask(run, asking("http://127.0.0.1:9/v1", "m", retries=0))
    after = snapshot(run)
    assert after.pop("models/zoo-pythia/llm_answers.jsonl") == b"" and after == before


def test_a_model_that_sees_too_little_says_so(run, served):
    """zoo/gpt2 sees 64 tokens."""
    settings = asking(served[0], served[1]) | {"base_url": None, "model": None, "path": "zoo/gpt2"}
    with pytest.raises(
        InputError, match=r"zoo/gpt2 answered no call.*the model sees 64; lower features\.llm\.examples"
    ):
        ask(run, settings)


@pytest.mark.slow("llm")
def test_a_killed_process_goes_on_without_asking_again(run, served, proxy, undisturbed, tmp_path):
    killed_at = 30
    command = ["label", run, "--yes", "--device", "cpu"]
    study = parse_study(
        STUDY | {"features": {"labelers": ["concepts", "tokens", "llm"], "llm": asking(proxy.base_url, served[1])}}
    )
    (run / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    proxy.fault = lambda number, body: (lambda h: proxy.stop.wait(30)) if number == killed_at else None
    with (tmp_path / "log").open("wb") as log:
        process = commands.start(*command, stdout=log, stderr=log, start_new_session=True)
        while len(proxy.asked) < killed_at and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    assert len(proxy.asked) == killed_at, (tmp_path / "log").read_text()
    answers = run / "models" / "zoo-pythia" / "llm_answers.jsonl"
    assert len(answers.read_text().splitlines()) == killed_at - 1
    with answers.open("a") as file:
        file.write('{"key": "half a li')  # as a crash of the machine could leave it
    lines: list[str] = []
    labels = api.label(run, device="cpu", say=lines.append, approve=lambda cost: True)["zoo/pythia"]
    times = Counter(proxy.asked)
    unanswered = proxy.asked[killed_at - 1]
    assert times.pop(unanswered) == 2 and set(times.values()) == {1}
    assert f"({killed_at - 1} more are answered already)" in " ".join(lines)
    assert labels.equals(undisturbed)


# ---- approval, keys and settings


def test_nothing_is_sent_without_a_yes(run, served, proxy, capsys):
    before = snapshot(run / "models" / "zoo-pythia")
    options = ["--labeler", "llm", "--endpoint", proxy.base_url, "--llm-model", served[1], "--features", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["label", str(run), *options, "--device", "cpu"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and not proxy.asked
    assert "labels of 4 features by" in err and "need a yes; run the same command with --yes to send them" in err
    after = snapshot(run / "models" / "zoo-pythia")
    assert after.pop("llm_answers.jsonl") == b"" and after == before
    assert "llm" not in api.load_run(run).study().features.labelers
    told: list[str] = []
    with pytest.raises(InputError, match="nothing was sent"):
        ask(
            run,
            asking(proxy.base_url, served[1], price_in=1, price_out=2),
            approve=lambda line: bool(told.append(line)),
        )
    assert len(told) == 1 and told[0].endswith("by price_in and price_out of features.llm") and not proxy.asked


def test_a_whole_run_is_refused_before_it_begins(tmp_path):
    llm = {"base_url": "http://nowhere/v1", "model": "m"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY | {"features": {"labelers": ["llm"], "llm": llm}}))
    with pytest.raises(InputError, match=r"features\.labelers has llm, which sends texts to http://nowhere/v1; --yes"):
        api.run(tmp_path / "s.yaml", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_key_is_sent_and_written_nowhere(run, served, proxy, monkeypatch):
    key = "sk-a-secret-of-mine"
    monkeypatch.setenv("MY_KEY", key)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-this-one")
    lines: list[str] = []
    settings = asking(proxy.base_url, served[1], key_variable="MY_KEY", features=1)
    ask(run, settings, say=lines.append)
    assert set(proxy.keys) == {f"Bearer {key}"}
    proxy.fault = lambda number, body: lambda h: respond(h, 401, f'{{"error": {{"message": "bad {key}"}}}}'.encode())
    with pytest.raises(CallError, match=r"bad \*\*\*"):
        Endpoint(LlmSpec(**settings)).answer(REQUEST)
    written = b"".join(snapshot(run).values()) + "\n".join(lines).encode()
    assert key.encode() not in written and b"sk-not" not in written
    proxy.keys.clear()
    proxy.fault = lambda number, body: None
    Endpoint(LlmSpec(**settings | {"key_variable": None})).answer(REQUEST)
    assert proxy.keys == ["Bearer none"]


@pytest.mark.parametrize(
    ("llm", "says"),
    [
        (None, "labeler llm needs to know whom to ask"),
        ({}, "either an endpoint (base_url and model) or a local model (path)"),
        ({"base_url": "http://x/v1"}, "give model beside base_url"),
        ({"base_url": "http://x/v1", "model": "m", "path": "p"}, "either an endpoint"),
        ({"base_url": "http://me:secret@x/v1", "model": "m"}, "without user, password"),
        ({"base_url": "http://x/v1?key=secret", "model": "m"}, "without user, password"),
        ({"base_url": "http://x/v1", "model": "m", "key_variable": "sk-secret"}, "the name of an environment variable"),
        ({"base_url": "http://x/v1", "model": "m", "feature": 3}, "did you mean features?"),
    ],
)
def test_wrong_settings(llm, says):
    with pytest.raises(InputError) as refused:
        parse_study(STUDY | {"features": {"labelers": ["llm"], "llm": llm}})
    assert says in str(refused.value) and "secret" not in str(refused.value)


def test_a_local_model_beside_the_study_file_is_found(tmp_path):
    (tmp_path / "judge").mkdir()
    features = {"labelers": ["llm"], "llm": {"path": "judge"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY | {"features": features}))
    llm = load_study(tmp_path / "s.yaml").features.llm
    assert llm is not None and llm.path == str(tmp_path / "judge")
    with pytest.raises(InputError, match=r"judge has no config\.json"):
        api.run(tmp_path / "s.yaml", tmp_path / "run", device="cpu")


def test_settings_that_change_no_result_keep_the_labels():
    spec = LlmSpec(base_url="http://x/v1", model="m")
    other = {"base_url": "http://y/v1", "retries": 9, "price_in": 3.0, "timeout_seconds": 1.0, "concurrency": 9}
    assert spec.model_copy(update=other).decisive == spec.decisive
    assert spec.model_copy(update={"judged": 9}).decisive != spec.decisive


def test_the_same_request_to_another_model_is_another():
    keys = {Request(i, q, n).key(m) for i in "ab" for q in "ab" for n in (1, 2) for m in "ab"}
    assert len(keys) == 16 and all(len(key) == 64 for key in keys)
    assert json.loads(json.dumps(Answer("x").__dict__)) == {"text": "x", "prompt_tokens": 0, "answer_tokens": 0}


def test_the_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'throughline\[llm\]'"):
        Endpoint(LlmSpec(base_url="http://x/v1", model="m"))
