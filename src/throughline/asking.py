"""Labels that a language model gives, as a stage of a run: about which features it is asked, at what cost, and what came of it.

RUN/models/<model>/llm_answers.jsonl    every answer as it comes, so that nothing is asked twice
RUN/models/<model>/llm.json             what asking came to: counts, tokens, every feature without a label and why
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import polars as pl

from throughline.errors import InputError
from throughline.labelers.contexts import Contexts
from throughline.labelers.llm import Case, Cost, LanguageModelLabels
from throughline.labelers.llm_client import Answerer, Answers, CallError, Endpoint, LocalModel
from throughline.models import check_model
from throughline.records import AskedLabels, best_labels
from throughline.session import Session
from throughline.study import LlmSpec, ModelSpec, Study

Approve = Callable[[str], bool]  # is told what asking costs; True if it may begin


def refuse(cost: str) -> bool:
    """Ask nothing."""
    return False


def check_asked(study: Study) -> None:
    """InputError if the study asks a language model for labels and the library, or the local model, is not there."""
    asked = study.features.asked
    if asked and asked.base_url and find_spec("openai") is None:
        raise InputError("the labeler llm needs a library that is missing: pip install 'throughline[llm]'")
    if asked and asked.path:
        check_model(ModelSpec(path=asked.path))


@dataclass(frozen=True)
class Prepared:
    """What is asked about one model's features."""

    model: str
    labeler: LanguageModelLabels
    cases: list[Case]
    left_out: dict[str, str]


class Asking:
    """Whom a study asks, and what of each model."""

    def __init__(self, session: Session, spec: LlmSpec) -> None:
        self._session, self._spec = session, spec
        self._answerer: Answerer = Endpoint(spec) if spec.base_url else LocalModel(spec.path or "", session.device)
        self._said = False

    @contextmanager
    def prepared(self, model: str, labels: pl.DataFrame) -> Iterator[Prepared]:
        """The cases of a model, of features that have no label among `labels`; answers are stored while the block runs."""
        session, answers = self._session, Answers(self._session.run.answers(model))
        try:
            labeler = LanguageModelLabels(self._spec, self._answerer, answers)
            texts = (session.selection(model), session.sample(model))
            selection, heldout = (Contexts(codes, self._spec.context) for codes in texts)
            known = best_labels(labels, session.study.features.bar)
            cases, left_out = [], {}
            for layer in session.dictionaries(model):
                candidates = self._candidates(model, layer, set(known.filter(pl.col("layer") == layer)["feature"]))
                more, other = labeler.prepare(layer, selection, heldout, candidates, session.study.training.seed)
                cases, left_out = cases + more, left_out | other
            yield Prepared(model, labeler, cases, left_out)
        finally:
            answers.close()
            session.run.push_answers(model)

    def _candidates(self, model: str, layer: int, labelled: set[int]) -> list[int]:
        """Live features without a label, in the order in which they are asked about."""
        sums = np.asarray(self._session.selection(model).columns[layer].sum(axis=0)).ravel()
        effects = np.zeros(len(sums))
        if self._spec.order == "influential":
            traces = [t for t in self._session.run.traces() if t.model == model]
            if not traces and not self._said:
                self._said = True
                self._session.say(f"{model} has no traces yet, so its most active features are asked about")
            for reading in (r for t in traces for r in t.layers if r.layer == layer):
                for shown in reading.features:
                    effects[shown.feature] += abs(shown.predicted_effect if shown.effect is None else shown.effect)
        order = np.lexsort((np.arange(len(sums)), -sums, -effects))
        return [int(feature) for feature in order if sums[feature] > 0 and int(feature) not in labelled]

    def require_approval(self, costs: list[Cost], approve: Approve) -> None:
        """Say what asking costs. InputError if it is an endpoint's, something is left to ask, and it is not approved."""
        cost = sum(costs, Cost())
        line = cost.describe(self._spec)
        self._session.say(line)
        if self._spec.base_url and cost.num_calls and not approve(line):
            raise InputError(
                f"nothing was sent: {cost.num_calls:,} calls to {self._spec.base_url} need a yes; "
                "run the same command with --yes to send them"
            )

    def label(self, prepared: Prepared) -> tuple[pl.DataFrame, AskedLabels]:
        """The labels, and what asking came to. InputError if not one call was answered."""
        spec = self._spec
        try:
            return prepared.labeler.label(prepared.model, prepared.cases, prepared.left_out, self._session.say)
        except CallError as error:
            where = f"{spec.model} at {spec.base_url}" if spec.base_url else f"{spec.path}"
            key = f", and is its key in {spec.key_variable}" if spec.key_variable else ""
            advice = f". Is it running{key}? Run the same command again to go on" if spec.base_url else ""
            raise InputError(f"{where} answered no call, so nothing was labelled: {error}{advice}") from None
