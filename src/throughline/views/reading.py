"""What is read of a run. Names are looked up among those the run has, and never become paths."""

import time
from pathlib import PurePath
from typing import Any, NamedTuple

from throughline.progress import read_lines, read_status
from throughline.records import Analysis, Comparison, ComparisonTotals, LayerQuality, Trace
from throughline.run_dir import RunDir, digest_key
from throughline.study import Study
from throughline.views.answers import (
    ComparisonRow,
    ModelAnswer,
    Overview,
    QualityAnswer,
    StatusAnswer,
    StepAnswer,
    StudyAnswer,
    TraceRow,
    TrainingCurve,
)
from throughline.views.feature_index import FeatureIndex, load_index
from throughline.views.fresh import Fresh
from throughline.views.refusals import RefusedError, unknown_thing

PARTS = ("study", "steps", "quality", "tables", "transfer", "analysis", "traces", "journals")
MEASURES = ("loss", "l0", "fvu", "dead")
CURVE_POINTS = 200  # of a layer's training that are told, at most


class Traces(NamedTuple):
    """Traces, those of comparisons among them, and comparisons of a run by their ids; and comparisons over many prompts."""

    traces: dict[str, Trace]
    comparisons: dict[str, Comparison]
    totals: list[ComparisonTotals]


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
        self._training = Fresh(lambda: run.stamp("study", "journals"), lambda: _read_training(run))
        self._state = Fresh(lambda: run.stamp(*PARTS, "info"), lambda: time.monotonic_ns())
        self.transfers = Fresh(lambda: run.stamp("transfer"), run.transfers)

    @property
    def study(self) -> Study:
        """The run's study."""
        return self._study.get()

    @property
    def index(self) -> FeatureIndex:
        """The features of all models."""
        return self._index.get()

    def model(self, name: str) -> str:
        """`name`, if it is one of the run's models."""
        known = [spec.name for spec in self.study.models]
        if name not in known:
            raise unknown_thing("model", name, known)
        return name

    def fingerprint(self) -> str:
        """Changes with anything that a trace is made from."""
        return self._made_from.get()

    def state(self) -> int:
        """Changes with anything that is read here, but for where training is."""
        return self._state.get()

    def overview(self) -> Overview:
        """The run: facts, models, quality."""
        run, study, info, index = self.run, self.study, self.run.info(), self.index
        quality, traces = self._quality.get(), self._traces.get()
        models = []
        for spec in study.models:
            num_features, num_labelled = index.count(spec.name)
            layers = quality[spec.name]
            models.append(
                ModelAnswer(
                    name=spec.name,
                    path=_public(spec.path),
                    weights=spec.weights,
                    layers=[q.layer for q in layers],
                    d_model=layers[0].d_model if layers else None,
                    d_sae=sorted({q.d_sae for q in layers}),
                    architecture=sorted({q.architecture for q in layers}) or [study.dictionary_for(spec).architecture],
                    num_features=num_features,
                    num_labelled=num_labelled,
                )
            )
        return Overview(
            study=_describe_study(study),
            **info.model_dump(include={"created", "versions", "hardware", "commit", "forced", "random_weights"}),
            models=models,
            quality=[QualityAnswer(**q.model_dump(), passes=q.passed) for mine in quality.values() for q in mine],
            steps=[StepAnswer(name=n, started=s.started, seconds=s.seconds) for n, s in self._steps.get().items()],
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

    def totals(self) -> list[ComparisonTotals]:
        """Comparisons over many prompts."""
        return self._traces.get().totals

    def outdated_traces(self) -> list[str]:
        """Files of traces that another version made, which are left out."""
        return self.run.outdated_traces()

    def training(self) -> list[TrainingCurve]:
        """What training measured, layer by layer."""
        return self._training.get()

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


def trace_id(trace: Trace) -> str:
    """What a trace that is kept in a run is called."""
    return digest_key("trace", *trace.origin)


def _read_traces(run: RunDir) -> Traces:
    """Each model and prompt once; models in the study's order."""
    names = [spec.name for spec in run.study().models]
    comparisons = {digest_key("compare", c.models, c.prompt): c for c in run.comparisons()}
    found = {trace_id(trace): trace for comparison in comparisons.values() for trace in comparison.traces.values()}
    found |= {trace_id(trace): trace for trace in run.traces()}
    order = sorted(found.items(), key=lambda one: names.index(one[1].model) if one[1].model in names else len(names))
    return Traces(dict(order), comparisons, run.totals())


def _read_training(run: RunDir) -> list[TrainingCurve]:
    curves = []
    for spec in run.study().models:
        rows: dict[int, list[tuple[dict[str, Any], int]]] = {}  # of each layer, with its place in the block
        for path in run.journals(spec.name):
            for row in read_lines(path):
                for place, layer in enumerate(row["layers"]):
                    rows.setdefault(layer, []).append((row, place))
        for layer, mine in sorted(rows.items()):
            mine.sort(key=lambda one: one[0]["step"])
            chosen = mine[:: -(-len(mine) // CURVE_POINTS)]
            chosen += mine[-1:] if chosen[-1] is not mine[-1] else []
            measured = {name: [row[name][place] for row, place in chosen] for name in MEASURES}
            steps, tokens = ([row[name] for row, _ in chosen] for name in ("step", "tokens"))
            curves.append(TrainingCurve(model=spec.name, layer=layer, step=steps, tokens=tokens, **measured))
    return curves


def _read_quality(run: RunDir) -> dict[str, list[LayerQuality]]:
    return {spec.name: run.quality(spec.name) for spec in run.study().models}


def _describe_study(study: Study) -> StudyAnswer:
    return StudyAnswer(
        name=study.name,
        text=_public(study.data.path),
        config=study.data.config,
        context=study.data.context,
        heldout=study.data.heldout,
        tokens=study.training.tokens,
        epochs=study.training.epochs,
        seed=study.training.seed,
        bar=study.features.bar,
        gate=study.gate.model_dump(),
    )


def _public(path: str) -> str:
    """A hub id as it is; of a place on this machine the last part only, since pages are passed on."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
