"""Labels by a language model, each with the scores of detection and fuzzing on held-out contexts.

1. For every feature that is asked about, contexts of the selection text make the question for a label, held-out contexts those
   for judgements (`prepare`). Nothing is asked, so what all of it will cost is known first (`estimate`).
2. The model gives a label, then judges the held-out contexts by it without seeing the others (`label`). Answers are stored as
   they come (`llm_client.Answers`).
3. A feature whose calls failed has no label, nor has one with fewer than half of its judgements readable; both are named.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import polars as pl

from throughline.labelers.contexts import Context, Contexts, corrupt
from throughline.labelers.judging import (
    DETECT,
    FUZZ,
    LONGEST_LABEL,
    Item,
    Scores,
    ask_judgement,
    ask_label,
    read_judgements,
    read_label,
    score,
)
from throughline.labelers.llm_client import Answer, Answerer, Answers, CallError, Request
from throughline.records import LABEL_COLUMNS, AskedLabels
from throughline.study import LlmSpec

FEWEST = 5  # held-out contexts of either kind, without which a feature is not asked about
STOP_AFTER = 5  # failed calls in a row; then no more are made
CHARACTERS_PER_TOKEN = 3.5  # of prompts, for estimates
TOKENS_OF_A_LABEL, TOKENS_OF_A_JUDGEMENT = 20, 3
SAID_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Case:
    """A feature and all that is asked about it: texts for its label, and batches of items to judge."""

    layer: int
    feature: int
    examples: tuple[str, ...]
    detection: tuple[tuple[Item, ...], ...]
    fuzzing: tuple[tuple[Item, ...], ...]

    @property
    def name(self) -> str:
        """`layer 3 #45`."""
        return f"layer {self.layer} #{self.feature}"

    @property
    def judged(self) -> list[tuple[str, tuple[Item, ...]]]:
        """All batches with their instruction."""
        return [(DETECT, batch) for batch in self.detection] + [(FUZZ, batch) for batch in self.fuzzing]


@dataclass(frozen=True)
class Cost:
    """What is left to ask: calls, and tokens as they are estimated from characters."""

    num_features: int = 0
    num_calls: int = 0
    num_stored: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0  # as expected
    most_answer_tokens: int = 0  # if every answer is as long as it may be

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def describe(self, spec: LlmSpec) -> str:
        """One line, with money where the study gives prices."""
        stored = f" ({self.num_stored:,} more are answered already)" if self.num_stored else ""
        line = (
            f"labels of {self.num_features:,} features by {spec.model or spec.path} at {spec.base_url or 'this machine'}: "
            f"{self.num_calls:,} calls{stored}, about {self.prompt_tokens:,} tokens of prompts and {self.answer_tokens:,} of "
            f"answers ({self.most_answer_tokens:,} if every answer is as long as it may be)"
        )
        expected = price_of(spec, self.prompt_tokens, self.answer_tokens)
        most = price_of(spec, self.prompt_tokens, self.most_answer_tokens)
        if expected is None:
            unknown = "; the price is not known, since features.llm has no price_in and price_out (per million tokens)"
            return line + (unknown if spec.base_url else "")
        return f"{line}; price about {expected:.2f}, at most {most:.2f}, by price_in and price_out of features.llm"


def price_of(spec: LlmSpec, prompt_tokens: int, answer_tokens: int) -> float | None:
    """In the currency of the prices; None without both of them."""
    if spec.price_in is None or spec.price_out is None:
        return None
    return (prompt_tokens * spec.price_in + answer_tokens * spec.price_out) / 1e6


@dataclass
class _Tally:
    """What was asked so far, by all threads."""

    answers: dict[str, Answer] = field(default_factory=dict)  # by question
    new: set[str] = field(default_factory=set)  # the questions sent now
    num_shared: int = 0
    failed_in_a_row: int = 0
    reason: str = ""
    stopped: bool = False
    lock: Lock = field(default_factory=Lock)

    def add(self, key: str, answer: Answer, new: bool) -> None:
        """Counts a question of two features once, whichever of them comes first."""
        with self.lock:
            self.failed_in_a_row = 0 if new else self.failed_in_a_row
            self.num_shared += key in self.answers
            self.answers[key] = answer
            if new:
                self.new.add(key)

    @property
    def num_calls(self) -> int:
        """Made now."""
        return len(self.new)


class _NoLabel(Exception):
    """The answers about a feature cannot be used."""


class LanguageModelLabels:
    """The labeler `llm`. Unlike the others it prepares all layers before it asks, so that cost is known first."""

    name = "llm"

    def __init__(self, spec: LlmSpec, answerer: Answerer, answers: Answers) -> None:
        self._spec, self._answerer, self._answers = spec, answerer, answers

    def prepare(
        self, layer: int, selection: Contexts, heldout: Contexts, candidates: Iterable[int], seed: int
    ) -> tuple[list[Case], dict[str, str]]:
        """Cases of the first candidates that have enough contexts, as many as the study asks about; why others are left out."""
        cases, left_out = [], {}
        for feature in candidates:
            if len(cases) == self._spec.features:
                break
            rng = np.random.default_rng([seed, layer, feature])
            examples, _ = selection.choose(layer, feature, self._spec.examples, rng)
            active, others = heldout.choose(layer, feature, self._spec.judged, rng)
            if not examples or min(len(active), len(others)) < min(FEWEST, self._spec.judged):
                left_out[f"layer {layer} #{feature}"] = (
                    f"too few held-out contexts: {len(active)} of those judged are active, {len(others)} are not"
                )
                continue
            cases.append(self._make_case(layer, feature, examples, active, others, rng))
        return cases, left_out

    def _make_case(
        self,
        layer: int,
        feature: int,
        examples: Sequence[Context],
        active: Sequence[Context],
        others: Sequence[Context],
        rng: np.random.Generator,
    ) -> Case:
        detection = [Item(c.show(), True) for c in active] + [Item(c.show(), False) for c in others]
        rounds: tuple[list[Item], list[Item]] = ([], [])  # a text's two versions never stand in one call
        for number, context in enumerate(active):
            wrong = corrupt(context, rng)
            if wrong is not None:
                rounds[number % 2].append(Item(context.show(context.active), True))
                rounds[1 - number % 2].append(Item(context.show(wrong), False))
        shown = tuple(context.show(context.active) for context in examples)
        fuzzing = (*self._batches(rounds[0], rng), *self._batches(rounds[1], rng))
        return Case(layer, feature, shown, self._batches(detection, rng), fuzzing)

    def _batches(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[tuple[Item, ...], ...]:
        shuffled = [items[i] for i in rng.permutation(len(items))]
        return tuple(tuple(shuffled[i : i + self._spec.per_call]) for i in range(0, len(shuffled), self._spec.per_call))

    def estimate(self, cases: Sequence[Case]) -> Cost:
        """What asking about these takes; what is stored already is counted apart, and a question of two features once."""
        cost, counted = Cost(num_features=len(cases)), set[str]()
        for case in cases:
            explain = self._request(*ask_label(case.examples))
            stored = self._answers.find(explain.key(self._answerer.model))
            label = read_label(stored.text) if stored else "x" * (LONGEST_LABEL // 2)
            requests = [(explain, TOKENS_OF_A_LABEL)]
            for instruction, batch in case.judged if label else ():
                request = self._request(*ask_judgement(instruction, label, batch))
                requests.append((request, TOKENS_OF_A_JUDGEMENT * len(batch)))
            for number, (request, answer_tokens) in enumerate(requests):
                key = request.key(self._answerer.model)
                if number and not stored:  # features whose labels are not known yet will ask with their own
                    key += case.name
                if key not in counted:
                    counted.add(key)
                    cost += self._cost_of(request, answer_tokens)
        return cost

    def _cost_of(self, request: Request, answer_tokens: int) -> Cost:
        if self._answers.find(request.key(self._answerer.model)):
            return Cost(num_stored=1)
        prompt_tokens = round(len(request.text) / CHARACTERS_PER_TOKEN)
        most = request.answer_tokens
        return Cost(0, 1, 0, prompt_tokens, min(answer_tokens, most), most)

    def _request(self, instruction: str, question: str) -> Request:
        return Request(instruction, question, self._spec.answer_tokens)

    def label(
        self, model: str, cases: Sequence[Case], left_out: dict[str, str], say: Callable[[str], None]
    ) -> tuple[pl.DataFrame, AskedLabels]:
        """Labels of the cases (LABEL_COLUMNS) and what asking came to. CallError if not one call was answered."""
        tally, rows, failed, unread = _Tally(), {}, {}, {}
        said, pool = time.monotonic(), ThreadPoolExecutor(self._spec.concurrency if self._spec.base_url else 1)
        try:
            asked = {pool.submit(self._ask_about, case, tally): case for case in cases}
            for number, done in enumerate(as_completed(asked), 1):
                case = asked[done]
                try:
                    rows[case.name] = done.result()
                except CallError as error:
                    failed[case.name] = str(error)
                except _NoLabel as error:
                    unread[case.name] = str(error)
                if time.monotonic() - said >= SAID_EVERY_SECONDS:
                    said = time.monotonic()
                    say(
                        f"{model}: {number} of {len(cases)} features: {len(rows)} labelled, {len(failed)} failed, "
                        f"{len(unread)} with answers of no use; {tally.num_calls:,} calls answered"
                    )
        finally:
            tally.stopped = (
                True  # where an error or Ctrl-C ends it, features that are half asked about make no further call
            )
            pool.shutdown(cancel_futures=True)
        if failed and not tally.answers:
            raise CallError(tally.reason)
        prompt_tokens = sum(answer.prompt_tokens for answer in tally.answers.values())
        answer_tokens = sum(answer.answer_tokens for answer in tally.answers.values())
        report = AskedLabels(
            model=model,
            answered_by=self._answerer.model,
            num_features=len(cases),
            num_labelled=len(rows),
            failed=_in_order(failed, cases),
            unread=_in_order(unread, cases),
            left_out=left_out,
            num_calls=tally.num_calls,
            num_stored=len(tally.answers) - tally.num_calls,
            num_shared=tally.num_shared,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            price=price_of(self._spec, prompt_tokens, answer_tokens),
        )
        ordered = [rows[case.name] for case in cases if case.name in rows]
        return pl.DataFrame(ordered, schema=LABEL_COLUMNS, orient="row"), report

    def _ask_about(self, case: Case, tally: _Tally) -> dict[str, str | int | float | None]:
        """The row of a feature. CallError if a call fails, _NoLabel if the answers are of no use."""
        label = read_label(self._ask(ask_label(case.examples), tally))
        if not label:
            raise _NoLabel("the answer has no words for it")
        detection = self._judge(DETECT, label, case.detection, tally)
        if not detection.usable:
            raise _NoLabel(f"{detection.num_judged} of {detection.num_asked} judgements of {label!r} could be read")
        fuzzing = self._judge(FUZZ, label, case.fuzzing, tally)
        return {
            "layer": case.layer,
            "feature": case.feature,
            "label": label,
            "source": self.name,
            "measure": "detection",
            "f1": detection.f1,
            "precision": detection.precision,
            "recall": detection.recall,
            "threshold": 0.0,
            "num_positive": detection.num_positive,
            "num_tokens": detection.num_judged,
            "base_f1": detection.base_f1,
            "balanced_accuracy": detection.balanced_accuracy,
            "fuzzing": fuzzing.balanced_accuracy if fuzzing.usable else None,
        }

    def _judge(self, instruction: str, label: str, batches: Iterable[tuple[Item, ...]], tally: _Tally) -> Scores:
        true: list[bool] = []
        judged: list[bool | None] = []
        for batch in batches:
            answer = self._ask(ask_judgement(instruction, label, batch), tally)
            true += [item.true for item in batch]
            judged += read_judgements(answer, len(batch)) or [None] * len(batch)
        return score(true, judged)

    def _ask(self, asked: tuple[str, str], tally: _Tally) -> str:
        """The text of the stored answer, or of a new one. After STOP_AFTER failures in a row nothing is asked any more."""
        request, new = self._request(*asked), False
        key = request.key(self._answerer.model)

        def call() -> Answer:
            nonlocal new
            if tally.stopped:
                raise CallError("stopped")
            if tally.failed_in_a_row >= STOP_AFTER:
                raise CallError(f"not asked, for {STOP_AFTER} calls before it failed: {tally.reason}")
            new = True
            return self._answerer.answer(request)

        try:
            answer = self._answers.find_or_ask(key, call)
        except CallError as error:
            with tally.lock:
                tally.failed_in_a_row += new
                tally.reason = str(error) if new else tally.reason
            raise
        tally.add(key, answer, new)
        return answer.text


def _in_order(reasons: dict[str, str], cases: Sequence[Case]) -> dict[str, str]:
    """By layer and feature, whichever came first."""
    return {case.name: reasons[case.name] for case in cases if case.name in reasons}
