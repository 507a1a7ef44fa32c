"""What is read of a run, as the API answers it. Names are looked up among those the run has, and never become paths."""

from typing import Any, NamedTuple

from throughline.progress import read_status
from throughline.records import Analysis, Comparison, LayerQuality, Trace
from throughline.report.contents import describe_model, describe_study
from throughline.report.page import load_page
from throughline.run_dir import RunDir, digest_key
from throughline.serving.answers import ComparisonRow, ModelAnswer, Overview, QualityAnswer, StatusAnswer, TraceRow
from throughline.serving.errors import RefusedError, unknown_thing
from throughline.serving.feature_index import FeatureIndex, load_index
from throughline.serving.fresh import Fresh
from throughline.study import Study


class Traces(NamedTuple):
    """Traces and comparisons of a run by their ids."""

    traces: dict[str, Trace]
    comparisons: dict[str, Comparison]


class RunReader:
    """A run, each part of it read once and again only when it changes."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._study = Fresh(lambda: run.stamp("study"), run.study)
        self._made_from = Fresh(lambda: run.stamp("study", "steps"), lambda: _digest_steps(run))
        self._index = Fresh(lambda: run.stamp("study", "tables"), lambda: load_index(run))
        self._traces = Fresh(lambda: run.stamp("traces"), lambda: _read_traces(run))
        self._quality = Fresh(lambda: run.stamp("study", "steps", "quality"), lambda: _read_quality(run))
        self._steps = Fresh(lambda: run.stamp("steps"), run.manifest)
        self._page = Fresh(
            lambda: run.stamp("study", "quality", "tables", "transfer", "analysis", "traces"), lambda: load_page(run)
        )
        self.transfers = Fresh(lambda: run.stamp("transfer"), run.transfers)

    @property
    def study(self) -> Study:
        """The run's study."""
        return self._study.get()

    @property
    def index(self) -> FeatureIndex:
        """The features of all models."""
        return self._index.get()

    @property
    def page(self) -> str:
        """The report."""
        return self._page.get()

    def model(self, name: str) -> str:
        """`name`, if it is one of the run's models."""
        known = [spec.name for spec in self.study.models]
        if name not in known:
            raise unknown_thing("model", name, known)
        return name

    def fingerprint(self) -> str:
        """Changes with anything that a trace is made from."""
        return self._made_from.get()

    def overview(self) -> Overview:
        """The run: facts, models, quality."""
        run, study, info, index = self.run, self.study, self.run.info(), self.index
        quality, traces = self._quality.get(), self._traces.get()
        models = []
        for spec in study.models:
            num_features, num_labelled = index.count(spec.name)
            described = describe_model(study, spec.name, quality[spec.name])
            models.append(ModelAnswer(**described, num_features=num_features, num_labelled=num_labelled))
        return Overview(
            study=describe_study(study),
            **info.model_dump(include={"created", "versions", "hardware", "commit", "forced", "random_weights"}),
            models=models,
            quality=[QualityAnswer(**q.model_dump(), passes=q.passed) for mine in quality.values() for q in mine],
            steps=[{"name": n, "started": s.started, "seconds": s.seconds} for n, s in self._steps.get().items()],
            num_transfers=len(self.transfers.get()),
            num_traces=len(traces.traces),
            num_comparisons=len(traces.comparisons),
            has_analysis=run.exists("analysis.json"),
        )

    def analysis(self) -> Analysis:
        """Findings, curves and ribbons."""
        found = self.run.analysis()
        if found is None:
            raise RefusedError(404, "the run has no analysis yet; `throughline report RUN` makes it")
        return found

    def traces(self) -> list[TraceRow]:
        """What traces there are."""
        return [
            TraceRow(
                id=key,
                model=trace.model,
                prompt=trace.prompt,
                answer=trace.answer,
                probability=trace.answer_probability,
                correct=trace.correct,
            )
            for key, trace in self._traces.get().traces.items()
        ]

    def trace(self, key: str) -> Trace:
        """One of them."""
        return _one("trace", key, self._traces.get().traces)

    def comparisons(self) -> list[ComparisonRow]:
        """What comparisons there are."""
        return [
            ComparisonRow(id=key, models=found.models, prompt=found.prompt, answers=found.answers)
            for key, found in self._traces.get().comparisons.items()
        ]

    def comparison(self, key: str) -> Comparison:
        """One of them."""
        return _one("comparison", key, self._traces.get().comparisons)

    def status(self) -> StatusAnswer:
        """Where training is, now."""
        status = read_status(self.run)
        for model in status["models"].values():  # numbers of layers as JSON has them
            model["layers"] = {str(layer): state for layer, state in model["layers"].items()}
        return StatusAnswer(**{name: status[name] for name in StatusAnswer.model_fields})


def _one(kind: str, key: str, known: dict[str, Any]) -> Any:
    if key not in known:
        raise unknown_thing(kind, key, list(known))
    return known[key]


def _digest_steps(run: RunDir) -> str:
    steps = {name: step.files for name, step in run.manifest().items() if not name.startswith("trace/")}
    return digest_key(run.study().model_dump(mode="json"), steps)


def _read_traces(run: RunDir) -> Traces:
    comparisons = {digest_key("compare", c.models, c.prompt): c for c in run.comparisons()}
    traces = {digest_key("trace", t.model, t.prompt): t for t in run.traces()}
    return Traces(traces, comparisons)


def _read_quality(run: RunDir) -> dict[str, list[LayerQuality]]:
    return {spec.name: run.quality(spec.name) for spec in run.study().models}
