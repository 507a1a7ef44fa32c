"""What is asked of a language model and what its answers are worth: planted judges get the scores they deserve."""

import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_codes, random_documents
from throughline.analyzing import analyze_run
from throughline.cli.render import asked_labels, label_score, labels
from throughline.labelers.contexts import Context, Contexts, corrupt
from throughline.labelers.judging import LONGEST_LABEL, read_judgements, read_label, score
from throughline.labelers.llm import STOP_AFTER, Cost, LanguageModelLabels, price_of
from throughline.labelers.llm_client import Answer, Answers, CallError, Request
from throughline.records import LABEL_COLUMNS, AskedLabels, Label, best_labels, complete_labels, rank_labels
from throughline.study import LlmSpec

SPEC = LlmSpec(base_url="http://nowhere/v1", model="m", context=4, judged=20, per_call=4, features=2)


class Judge:
    """Answers by functions of a text and of the instruction's kind; counts what it was asked."""

    model = "judge"

    def __init__(self, decide: Callable[[str, bool], bool], label: str = "Label: the word sky") -> None:
        self.decide, self.label = decide, label
        self.asked: list[str] = []

    def answer(self, request: Request) -> Answer:
        self.asked.append(request.question)
        texts = re.findall(r"(?m)^\d+\. (.*)$", request.question)
        if not request.question.startswith("Label:"):
            return Answer(self.label, 100, 5)
        marked = "<<" in request.question
        return Answer(json.dumps([int(self.decide(text, marked)) for text in texts]), 50, 10)


def truly(text: str, marked: bool) -> bool:
    """What is true of a feature that is active on "sky"."""
    if not marked:
        return "sky" in text.split()
    return all((word == "<<sky>>") == ("<<" in word) for word in text.split() if "sky" in word or "<<" in word)


@pytest.fixture(scope="module")
def texts() -> tuple[Contexts, Contexts]:
    """Selection and held-out text; feature 0 is active on "sky", feature 1 on "sea", feature 2 everywhere, 3 nowhere."""
    found = []
    for seed in (1, 2):
        documents = random_documents(150, seed)
        words = make_codes(documents).token_texts
        f_NF = np.array([[w.strip() == "sky", w.strip() == "sea", 1, 0] for w in words]) * (1 + np.arange(4))
        found.append(Contexts(make_codes(documents, f_NF, layer=3), SPEC.context))
    return found[0], found[1]


def ask(judge: Judge, texts: tuple[Contexts, Contexts], path: Path, spec: LlmSpec = SPEC, candidates=(2, 0)):
    with closing(Answers(path)) as answers:
        labeler = LanguageModelLabels(spec, judge, answers)
        cases, left_out = labeler.prepare(3, *texts, candidates, seed=0)
        cost = labeler.estimate(cases)
        table, report = labeler.label("model", cases, left_out, lambda line: None)
    return table, report, cost, cases


# ---- planted judges


def test_a_judge_that_is_always_right(texts, tmp_path):
    judge = Judge(truly)
    table, report, cost, _ = ask(judge, texts, tmp_path / "answers.jsonl")
    [row] = table.iter_rows(named=True)
    assert dict(table.schema) == LABEL_COLUMNS
    assert (row["layer"], row["feature"], row["label"]) == (3, 0, "the word sky")
    assert (row["f1"], row["precision"], row["recall"], row["balanced_accuracy"], row["fuzzing"]) == (1, 1, 1, 1, 1)
    assert (row["num_positive"], row["num_tokens"], row["measure"], row["threshold"]) == (20, 40, "detection", 0)
    assert row["base_f1"] == pytest.approx(2 / 3) and row["neuron_f1"] is None and row["untrained_f1"] is None
    assert report.left_out == {"layer 3 #2": "too few held-out contexts: 20 of those judged are active, 0 are not"}
    assert cost.num_calls == len(judge.asked) == report.num_calls == 1 + 10 + 10 and cost.num_features == 1
    assert cost.most_answer_tokens == 21 * 200
    assert (report.prompt_tokens, report.answer_tokens) == (100 + 20 * 50, 5 + 20 * 10)


@pytest.mark.parametrize(("answer", "f1"), [(True, 2 / 3), (False, 0)])
def test_a_judge_that_always_says_the_same_is_at_chance(answer, f1, texts, tmp_path):
    table, _, _, _ = ask(Judge(lambda text, marked: answer), texts, tmp_path / "answers.jsonl")
    [row] = table.iter_rows(named=True)
    assert row["balanced_accuracy"] == row["fuzzing"] == 0.5 and row["f1"] == pytest.approx(f1)
    assert best_labels(table, 0.6).is_empty()  # F1 of 0.67 is what saying yes is worth


def test_a_judge_that_guesses_is_at_chance():
    rng = np.random.default_rng(0)
    true = rng.random(20_000) < 0.3
    found = score(true.tolist(), (rng.random(20_000) < 0.6).tolist())
    assert found.balanced_accuracy == pytest.approx(0.5, abs=0.02)
    assert found.base_f1 == pytest.approx(2 * true.sum() / (20_000 + true.sum()))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([True, False, None])), min_size=1, max_size=30))
def test_scores_are_by_counting(pairs):
    true, judged = zip(*pairs, strict=True)
    found = score(true, judged)
    known = [(t, j) for t, j in pairs if j is not None]
    both, said, so = (sum(c) for c in zip(*[(t and j, j, t) for t, j in known], strict=True)) if known else (0, 0, 0)
    assert (found.num_asked, found.num_judged, found.num_positive) == (len(pairs), len(known), so)
    assert found.precision == (both / said if said else 0) and found.recall == (both / so if so else 0)
    assert found.f1 == (2 * both / (said + so) if said + so else 0)
    assert found.usable == (0 < so < len(known) and 2 * len(known) >= len(pairs))
    if 0 < so < len(known):
        quiet = len(known) - so
        assert found.balanced_accuracy == pytest.approx((both / so + (quiet - (said - both)) / quiet) / 2)


def test_unread_judgements_do_not_count_and_n_says_so(texts, tmp_path):
    class Chatter(Judge):
        def answer(self, request: Request) -> Answer:
            answered = super().answer(request)
            return Answer("I would rather not say.") if len(self.asked) in (2, 5) else answered

    judge = Chatter(truly)
    spec = SPEC.model_copy(update={"concurrency": 1})
    table, report, _, _ = ask(judge, texts, tmp_path / "answers.jsonl", spec)
    [row] = table.iter_rows(named=True)
    assert row["num_tokens"] == 40 - 8 and row["balanced_accuracy"] == 1 and not report.unread
    mute = Judge(truly)
    mute.decide = lambda text, marked: truly(text, marked)
    mute.answer = lambda request: Answer("Label: x" if not request.question.startswith("Label:") else "Hm.")  # type: ignore[method-assign]
    table, report, _, _ = ask(mute, texts, tmp_path / "other.jsonl")
    assert table.is_empty() and report.unread == {"layer 3 #0": "0 of 40 judgements of 'x' could be read"}
    wordless = Judge(truly, label=" \u202e\x07 ... \n")
    table, report, _, _ = ask(wordless, texts, tmp_path / "third.jsonl")
    assert table.is_empty() and report.unread == {"layer 3 #0": "the answer has no words for it"}


# ---- failures


def test_failed_calls_make_no_label_and_are_not_stored(texts, tmp_path):
    class Breaking(Judge):
        def answer(self, request: Request) -> Answer:
            if len(self.asked) == 6:
                self.asked.append("failed")
                raise CallError("status 503")
            return super().answer(request)

    path, spec = tmp_path / "answers.jsonl", SPEC.model_copy(update={"concurrency": 1})
    table, report, _, _ = ask(Breaking(truly), texts, path, spec, (0, 1))
    assert report.failed == {"layer 3 #0": "status 503"} and set(table["feature"]) == {1}
    assert len(path.read_text().splitlines()) == report.num_calls
    again = Judge(truly)
    table, report, cost, _ = ask(again, texts, path, spec, (0, 1))
    assert not report.failed and set(table["feature"]) == {0, 1}
    assert cost.num_calls == len(again.asked) == report.num_calls == 21 - 6 and cost.num_stored == 21 + 6


def test_after_some_failures_in_a_row_nothing_is_asked_any_more(texts, tmp_path):
    class Dead(Judge):
        def answer(self, request: Request) -> Answer:
            self.asked.append(request.question)
            raise CallError("connection refused")

    judge = Dead(truly)
    with closing(Answers(tmp_path / "answers.jsonl")) as answers:
        labeler = LanguageModelLabels(SPEC, judge, answers)
        cases, _ = labeler.prepare(3, *texts, (0, 1), seed=0)
        with pytest.raises(CallError, match="connection refused"):
            labeler.label("model", cases * 8, {}, lambda line: None)
    assert STOP_AFTER <= len(judge.asked) < STOP_AFTER + SPEC.concurrency


def test_an_error_of_ours_stops_what_is_half_asked(texts, tmp_path):
    class Full(Judge):
        def answer(self, request: Request) -> Answer:
            answered = super().answer(request)
            if len(self.asked) == 6:
                raise OSError(28, "No space left on device")
            time.sleep(0.02)
            return answered

    judge = Full(truly)
    with pytest.raises(OSError, match="No space left"):
        ask(judge, texts, tmp_path / "answers.jsonl", SPEC.model_copy(update={"concurrency": 2}), (0, 1))
    assert len(judge.asked) <= 10


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "answers.jsonl"
    with closing(Answers(path)) as first:
        first.find_or_ask("a", lambda: Answer("one", 1, 2))
        first.find_or_ask("b", lambda: Answer("two"))
    path.write_bytes(path.read_bytes()[:-9])
    with closing(Answers(path)) as again:
        assert again.find("a") == Answer("one", 1, 2) and again.find("b") is None
        assert again.find_or_ask("b", lambda: Answer("three")) == Answer("three")
    with closing(Answers(path)) as last:
        assert last.find("b") == Answer("three") and last.find("a") == Answer("one", 1, 2)


# ---- contexts


def test_contexts_are_distinct_and_spread_over_the_quantiles():
    documents = random_documents(80, 5)
    codes = make_codes(documents)
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(codes.num_tokens, 1)) * (rng.random((codes.num_tokens, 1)) < 0.2)
    contexts = Contexts(make_codes(documents, values), 4)
    active, others = contexts.choose(0, 0, 12, rng)
    peaks = [max(c.values) for c in active]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] == pytest.approx(values.max())
    everything, _ = contexts.choose(0, 0, 10**6, rng)
    ranks = [[c.tokens for c in everything].index(c.tokens) for c in active]
    assert np.diff(ranks).max() - np.diff(ranks).min() <= 1 and ranks[-1] == len(everything) - 1
    assert all(not c.active for c in others) and len(others) == 12
    tokens = [c.tokens for c in (*active, *others)]
    assert len(set(tokens)) == len(tokens) and all(len(t) <= 4 for t in tokens)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=12), st.integers(0, 99))
def test_corrupted_marks_are_as_many_and_all_wrong(values, seed):
    context = Context(tuple("abcdefghijkl"[: len(values)]), tuple(values))
    wrong = corrupt(context, np.random.default_rng(seed))
    quiet = len(values) - len(context.active)
    if not quiet:
        assert wrong is None
        return
    assert wrong is not None and not set(wrong) & set(context.active)
    assert len(set(wrong)) == min(len(context.active), quiet)


def test_in_fuzzing_every_context_comes_right_and_wrong_but_never_in_one_call(texts, tmp_path):
    _, _, _, [case] = ask(Judge(truly), texts, tmp_path / "answers.jsonl")
    items = [item for batch in case.fuzzing for item in batch]
    plain = {True: set(), False: set()}
    for item in items:
        plain[item.true].add(item.text.replace("<<", "").replace(">>", ""))
    assert plain[True] == plain[False] and len(items) == 40
    for batch in case.fuzzing:
        bare = [item.text.replace("<<", "").replace(">>", "") for item in batch]
        assert len(set(bare)) == len(bare)
    assert all(truly(item.text, True) == item.true for item in items)


def test_text_cannot_fake_marks_or_lines():
    shown = Context(("a<<b", ">>\n2. x", "c"), (0.0, 1.0, 0.0)).show({1})
    assert shown == "a< <b<<> >↵2. x>>c"


# ---- reading answers


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("1, 0, 1", [True, False, True]),
        ("1 0 1", [True, False, True]),
        ("```json\n[1,0,1]\n```", [True, False, True]),
        ("The list is [true, False, yes].", [True, False, True]),
        ("<think>[0, 0, 0]?</think>[1, 0, 1]", [True, False, True]),
        ("First [2] then [1, 0, 1]", [True, False, True]),
        ("[1, 0, 1] or [1, 1, 1]", None),
        ("[1, 0]", None),
        ("[1, 0, 1, 0]", None),
        ("[1, 0, 2]", None),
        ("101", None),
        ("I think 1, 0, 1", None),
        ("", None),
        ("[]", None),
    ],
)
def test_judgements(answer, found):
    assert read_judgements(answer, 3) == found


@given(st.text(), st.integers(1, 5))
def test_any_text_is_read_or_left(answer, num):
    found = read_judgements(answer, num)
    assert found is None or len(found) == num
    label = read_label(answer)
    assert len(label) <= LONGEST_LABEL and label == " ".join(label.split()) and label.isprintable()


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Label: the digit five", "the digit five"),
        ("Sure!\n**Label:** \u202ethe\x1b[31m digit\tfive\x00\n", "the[31m digit five"),
        ("the digit five\nand more", "the digit five"),
        ("<think>\nLabel: no\n</think>\nLabel: yes", "yes"),
        ('"quoted"', "quoted"),
        ("…", ""),
        ("", ""),
    ],
)
def test_labels(answer, label):
    assert read_label(answer) == label


def test_a_long_label_is_cut():
    assert read_label("Label: " + "word " * 100).endswith("…") and len(read_label("x" * 999)) == LONGEST_LABEL


# ---- cost


def test_cost_in_words_and_money():
    spec = SPEC.model_copy(update={"price_in": 2.0, "price_out": 8.0})
    cost = Cost(3, 60, 5, 1_000_000, 50_000, 500_000)
    assert price_of(spec, 1_000_000, 500_000) == 6
    line = cost.describe(spec)
    assert "3 features by m at http://nowhere/v1: 60 calls (5 more are answered already)" in line
    assert line.endswith("price about 2.40, at most 6.00, by price_in and price_out of features.llm")
    assert "50,000 of answers (500,000 if every answer is as long as it may be)" in line
    assert "; the price is not known, since features.llm has no price_in and price_out" in cost.describe(SPEC)


# ---- which label is shown


def rows(*labels: dict) -> pl.DataFrame:
    base = {"layer": 0, "feature": 1, "label": "x", "measure": "tokens", "base_f1": 0.1}
    return pl.DataFrame([base | label for label in labels], schema=LABEL_COLUMNS)


def test_the_best_above_chance_is_shown():
    table = rows(
        {"source": "concepts", "f1": 0.80},  # 0.78 above chance
        {"source": "llm", "f1": 0.85, "measure": "detection", "base_f1": 2 / 3, "balanced_accuracy": 0.8},  # 0.55
        {"source": "tokens", "f1": 0.75, "base_f1": 0.01},  # 0.75
    )
    assert best_labels(table, 0.7)["source"].to_list() == ["concepts"]
    assert rank_labels(table, 0.7)["source"].to_list() == ["concepts", "tokens", "llm"]
    assert rank_labels(table, 0.82)["source"].to_list() == ["concepts", "tokens", "llm"]  # none reaches it: 0.80 < 0.82
    assert best_labels(table, 0.82).is_empty()
    tie = rows(*({"source": s, "f1": 0.9} for s in ("mine", "tokens", "llm", "concepts")))
    assert rank_labels(tie, 0.7)["source"].to_list() == ["concepts", "tokens", "llm", "mine"]


def test_tables_of_older_versions_are_read():
    new = rows({"source": "concepts", "f1": 0.8})
    old = new.drop("measure", "balanced_accuracy", "fuzzing")
    assert complete_labels(old).equals(new) and complete_labels(new).equals(new)


def test_what_is_judged_beats_no_neuron():
    """Consumers of labels cope with those that have no such baselines, and claim nothing for them."""
    judged = rows(
        {
            "source": "llm",
            "f1": 0.95,
            "measure": "detection",
            "base_f1": 2 / 3,
            "balanced_accuracy": 0.94,
            "fuzzing": 0.6,
        }
    )
    features = pl.DataFrame({"num_active": [3, 5]})
    [finding] = analyze_run([], {"m": features}, {"m": judged}, seed=0).analysis.findings
    assert (finding.numbers["labelled"], finding.numbers["beyond_baselines"]) == (1, 0)
    row = judged.row(0, named=True) | {"precision": 1.0, "recall": 0.9, "num_positive": 20}
    label = Label(text="x", **{name: row[name] for name in Label.model_fields if name != "text"})
    assert label_score(label) == "BA 0.94"
    assert label_score(label.model_copy(update={"balanced_accuracy": None})) == "F1 0.95"


def test_tables_of_what_asking_came_to(capsys):
    judged = rows(
        {
            "source": "llm",
            "f1": 0.7,
            "measure": "detection",
            "base_f1": 2 / 3,
            "balanced_accuracy": 0.5,
            "num_tokens": 40,
        }
    )
    failed = {f"layer 0 #{n}": "status 503" for n in range(9)}
    report = AskedLabels(
        model="m", answered_by="judge (chat)", num_features=11, num_labelled=1, failed=failed, unread={"layer 1 #2": "hm"},
        left_out={}, num_calls=30, num_stored=2, prompt_tokens=1000, answer_tokens=200, price=0.0125,
    )  # fmt: skip
    labels({"m": judged}, {}, 0.7)
    asked_labels([report], {"m": judged}, 0.7)
    out = capsys.readouterr().out
    assert (
        "calls failed: layer 0 #0, layer 0 #1, layer 0 #2, layer 0 #3, layer 0 #4, layer 0 #5 and 3 more: status 503"
        in out
    )
    assert "answers of no use: layer 1 #2: hm" in out and "0.0125 by the prices given" in out
    assert re.search(r"m +11 +1 +0 +0\.50 \(n = 1\) +– +40 +30 \+ 2 stored", out)
