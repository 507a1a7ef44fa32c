"""The stages of a run in order, each skipped when it was done from the same settings.

    train -> evaluate (and gate) -> features -> label -> transfer -> analyze -> trace and compare -> report

A stage's key is made of every setting that its result depends on, and of the key of the stage before it; so a changed
setting redoes exactly what it touches.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import polars as pl
import torch

from throughline import comparing
from throughline.asking import Approve, Asking, check_asked, refuse
from throughline.codes import Codes, encode_csr
from throughline.comparing import Matches, compare_traces
from throughline.dictionaries import Dictionary, untrained_like
from throughline.errors import InputError, ThroughlineError
from throughline.executors import processes
from throughline.executors.local import raise_failures, run_jobs, threads
from throughline.features import describe_features
from throughline.jobs import Job, Report, train_job, train_steps
from throughline.journals import check_extras
from throughline.labelers import LayerText
from throughline.models import LanguageModel, check_layers, check_model, read_tokenizer
from throughline.progress import JobNotes
from throughline.quality import evaluate
from throughline.records import (
    COVERAGE_COLUMNS,
    FAMILY_COLUMNS,
    LABEL_COLUMNS,
    Comparison,
    ComparisonTotals,
    LayerQuality,
    PromptReading,
    Trace,
    TransferInfo,
    best_labels,
    complete_labels,
    span,
)
from throughline.registry import LABELERS, METRICS, unknown
from throughline.run_dir import RunDir, digest_key
from throughline.session import Session
from throughline.study import ASKING, ModelSpec, Study, dump_study
from throughline.text import read_documents
from throughline.throughlines import find_throughlines
from throughline.tokens import encode_prompt, take_documents
from throughline.tracing import (
    Prompt,
    Tell,
    TraceInputs,
    TraceOptions,
    check_prompt,
    check_prompts,
    read_prompts,
    tell_nobody,
    trace_prompt,
)
from throughline.tracing.baselines import OFF_KINDS
from throughline.tracing.linearizing import LINEARIZATIONS
from throughline.tracing.steering import parse_setting
from throughline.zoo.texts import list_facts, solve

# ---- train


def check_study(study: Study) -> dict[str, int]:
    """Refuse, before anything is written, what would fail later: a model, layer, text or library that is not there, a prompt
    too long. Returns the depth of each model whose configuration tells it."""
    check_extras(study)
    check_asked(study)
    depths = {}
    for spec in study.models:
        depth, context, _ = check_model(spec)
        depths |= {spec.name: depth} if depth else {}
        for prompt in study.trace.prompts:
            _check_prompt(spec, prompt, context)
    for split in ("train", "heldout"):
        next(read_documents(study.data, split, study.training.seed))
    return depths


def _check_prompt(spec: ModelSpec, prompt: str, context: int | None) -> None:
    check_prompt(prompt)
    num_tokens = len(encode_prompt(read_tokenizer(spec), prompt))
    if context is not None and num_tokens >= context:
        raise InputError(
            f"trace.prompts: {prompt[:40]!r}… has {num_tokens} tokens; {spec.name} sees {context} and needs at least one "
            "for the answer"
        )


def train_models(session: Session, report: Report) -> None:
    """Dictionaries of every wanted layer of every model; layers that are trained from the same settings, or imported, are kept."""
    jobs = [job for spec in session.study.models if (job := _pending_job(session, spec))]
    _forget_ended_jobs(session)
    if not jobs:
        return
    if session.study.executor.kind == "ray":
        from throughline.executors import ray

        with session.timed("train"):
            ray.run_jobs(session, jobs, report)
        return
    with threads(session.study.executor.cpus):
        run_jobs(jobs, lambda job: _note_failure(session, job, report), name_of=lambda job: job.model)


def _forget_ended_jobs(session: Session) -> None:
    """Notes of a training that is over: nobody else trains in this run now."""
    for state in session.run.jobs():
        session.run.forget_job(state.model, state.layers)


def _pending_job(session: Session, spec: ModelSpec) -> Job | None:
    """The layers of a model that are still to be trained. A layer that it has not is refused."""
    require_layers(session, spec)
    steps = train_steps(session, spec)
    pending = [layer for layer, step in steps.items() if not _is_done(session, step)]
    imported = [layer for layer in session.run.imported(spec.name) if layer in steps]
    if imported:
        session.say(f"{spec.name}: imported, so not trained: layer{'s'[: len(imported) > 1]} {span(imported)}")
    return Job(spec.name, pending) if pending else None


def require_layers(session: Session, spec: ModelSpec) -> None:
    """InputError for a wanted layer that the model has not; the run remembers how deep the model is."""
    depths = session.run.info().depths
    if spec.name not in depths:
        depths = depths | {spec.name: session.model(spec.name).num_layers}
        session.run.update_info(depths=depths)
    check_layers(spec.name, spec.layers, depths[spec.name])


def _note_failure(session: Session, job: Job, report: Report) -> None:
    """Train; a failure is kept for `throughline status` before it is passed on."""
    try:
        with session.timed("train"):
            train_job(session, job, report)
    except ThroughlineError as error:
        JobNotes(session.run, job.model, job.layers, session.device).note(failed=str(error))
        raise


# ---- models side by side


STAGES_OF_A_MODEL = ("train", "evaluate", "features", "label")


def advance_models(
    session: Session,
    report: Report,
    stages: Sequence[str] = STAGES_OF_A_MODEL,
    *,
    force: bool = False,
    first: str | None = None,
    on_trace: Callable[[Trace], None] | None = None,
) -> None:
    """Take all models through `stages`, side by side, where that is faster (`processes.divide_cores`); otherwise do nothing.

    What is left undone (a model that fails the gate, a process that was killed, labels that a language model is asked for) is for
    the stages themselves, which come next. `on_trace` is given a trace of the study's first prompt in the model `first`, which
    is begun with, as soon as that has labels. Raises what failed, as `train_models` does.
    """
    study = session.study
    widths = {spec.name: check_model(spec).width for spec in study.models}
    division = processes.divide_cores(session, widths)
    pending = [spec for spec in study.models if _is_pending(session, spec, stages)] if division else []
    if not division or not pending:
        return
    _forget_ended_jobs(session)
    # the longest first, so that no process is left with a long one at the end
    pending.sort(key=lambda spec: (spec.name != first, -_cost(session, spec, widths[spec.name] or 1)))
    prompt = next(iter(study.trace.prompts), None)
    names = [spec.name for spec in pending]
    raise_failures(
        processes.advance_models(session, division, names, stages, report, force=force, look=prompt, on_trace=on_trace)
    )


def advance_model(session: Session, name: str, stages: Sequence[str], report: Report, *, force: bool) -> bool:
    """Take one model through `stages`; False if its dictionaries fail the gate, which ends it, unless `force`."""
    spec = session.study.model(name)
    if "train" in stages:
        job = _pending_job(session, spec)
        if job:
            _note_failure(session, job, report)
    if "evaluate" in stages:
        _evaluate_model(session, spec)
        if not force and not all(quality.passed for quality in session.run.quality(name)):
            return False
    if "features" in stages:
        _describe_model(session, spec)
    if "label" in stages:
        _label_model(session, spec)
    return True


def _is_pending(session: Session, spec: ModelSpec, stages: Sequence[str]) -> bool:
    steps = list(train_steps(session, spec).values())
    later = {"evaluate": _evaluate_step, "features": _features_step, "label": _free_label_step}
    steps += [step_of(session, spec) for stage, step_of in later.items() if stage in stages]
    return not all(_is_done(session, step) for step in steps)


def _cost(session: Session, spec: ModelSpec, d_model: int) -> int:
    """What the training of a model takes, in no particular unit."""
    dictionary = session.study.dictionary_for(spec)
    return sum(d_model * dictionary.at_layer(layer).width(d_model) for layer in session.layers(spec))


# ---- evaluate, features, label


def evaluate_models(session: Session) -> list[LayerQuality]:
    """Quality of every dictionary on held-out text."""
    for spec in session.study.models:
        _evaluate_model(session, spec)
    return [quality for spec in session.study.models for quality in session.run.quality(spec.name)]


def _evaluate_model(session: Session, spec: ModelSpec) -> None:
    study, run, step = session.study, session.run, _evaluate_step(session, spec)
    if _is_done(session, step):
        return
    session.say(f"evaluating {spec.name}")
    with session.timed("evaluate"), run.step(*step) as files:
        spliced = take_documents(
            iter(session.heldout),
            session.model(spec.name).tokenizer,
            study.evaluation.spliced_tokens,
            session.context(spec.name),
        )
        qualities = evaluate(
            session.model(spec.name),
            session.dictionaries(spec.name),
            session.rows(spec.name, session.heldout),
            session.rows(spec.name, spliced),
            study.gate,
        )
        files += [run.write_quality(quality) for quality in qualities]


def _evaluate_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    study = session.study
    parts = (study.evaluation.model_dump(), study.gate.model_dump(), study.models[0].path)
    trained = [key for _, key in train_steps(session, spec).values()]
    return f"evaluate/{spec.name}", digest_key(trained, *parts)


def describe_models(session: Session) -> None:
    """Statistics and contexts of every feature."""
    for spec in session.study.models:
        _describe_model(session, spec)


def _describe_model(session: Session, spec: ModelSpec) -> None:
    step = _features_step(session, spec)
    if _is_done(session, step):
        return
    session.say(f"describing the features of {spec.name}")
    with session.timed("features"), session.run.step(*step) as files:
        features, examples = describe_features(
            session.model(spec.name),
            session.dictionaries(spec.name),
            session.evaluation(spec.name),
            session.study.features.contexts,
        )
        files.append(session.run.write_table(spec.name, "features", features))
        files.append(session.run.write_table(spec.name, "examples", examples))


def _features_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    return f"features/{spec.name}", digest_key(_evaluate_step(session, spec)[1], session.study.features.contexts)


def label_models(session: Session, approve: Approve = refuse) -> None:
    """Labels of every feature that fires, by the study's labelers. A language model is asked last, about what the others have no
    words for, once `approve` has heard what that costs; calls that failed before are made again."""
    pending = [spec for spec in session.study.models if not _is_labelled(session, spec)]
    for spec in pending:
        _label_model(session, spec)
    if pending and session.study.features.asked is not None:
        _ask_for_labels(session, pending, Asking(session, session.study.features.asked), approve)


def _label_model(session: Session, spec: ModelSpec) -> None:
    """Labels by the labelers that ask nobody."""
    if _is_done(session, _free_label_step(session, spec)) or _is_done(session, _label_step(session, spec)):
        return
    session.say(f"labelling the features of {spec.name}")
    with session.timed("label"), session.run.step(*_free_label_step(session, spec)) as files:
        for name, table in _label(session, spec.name).items():
            files.append(session.run.write_table(spec.name, name, table))


def _ask_for_labels(session: Session, pending: list[ModelSpec], asking: Asking, approve: Approve) -> None:
    with ExitStack() as stack:
        tables = {spec.name: session.run.table(spec.name, "labels") for spec in pending}
        free = {name: table.filter(pl.col("source") != ASKING) for name, table in tables.items()}
        beside = {n: {t: session.run.table(n, t) for t in ("coverage", "families")} for n in tables}  # of the same step
        prepared = [stack.enter_context(asking.prepared(spec.name, free[spec.name])) for spec in pending]
        asking.require_approval([p.labeler.estimate(p.cases) for p in prepared], approve)
        for spec, ready in zip(pending, prepared, strict=True):
            session.say(f"asking about {len(ready.cases):,} features of {spec.name}")
            with session.timed("label"), session.run.step(*_label_step(session, spec)) as files:
                labels, asked = asking.label(ready)
                session.run.write_text("study.yaml", dump_study(session.study))  # it may ask whom the run's did not
                table = pl.concat([free[spec.name], labels]).sort("layer", "feature", "source")
                files.append(session.run.write_table(spec.name, "labels", table))
                files.append(session.run.write_asked(asked))
                files += [session.run.write_table(spec.name, name, t) for name, t in beside[spec.name].items()]


def _is_labelled(session: Session, spec: ModelSpec) -> bool:
    """True if all labels are there and no call for one failed."""
    asked = session.run.asked(spec.name) if session.study.features.asked else None
    return _is_done(session, _label_step(session, spec)) and not (asked and asked.failed)


def _label_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    step, free = _free_label_step(session, spec)
    features = session.study.features
    return step, digest_key(free, features.bar, features.asked.decisive) if features.asked else free


def _free_label_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    """The same step before a language model is asked."""
    features = session.study.features
    return f"label/{spec.name}", digest_key(
        _evaluate_step(session, spec)[1], [features.free_labelers, features.predicates]
    )


def _label(session: Session, name: str) -> dict[str, pl.DataFrame]:
    """Labels, and what they cover by the labelers that measure it (those with a method `cover`)."""
    labelers = [_open_labeler(session, labeler) for labeler in session.study.features.free_labelers]
    tables: dict[str, list[pl.DataFrame]] = {
        "labels": [pl.DataFrame(schema=LABEL_COLUMNS)],
        "coverage": [pl.DataFrame(schema=COVERAGE_COLUMNS)],
        "families": [pl.DataFrame(schema=FAMILY_COLUMNS)],
    }
    for column, layer in enumerate(session.dictionaries(name)):
        texts = [
            _layer_text(session, name, layer, column, codes)
            for codes in (session.selection(name), session.sample(name))
        ]
        for labeler in labelers:
            tables["labels"].append(complete_labels(labeler.label(*texts)))
            if hasattr(labeler, "cover"):
                coverage, families = labeler.cover(*texts)
                tables["coverage"].append(coverage)
                tables["families"].append(families)
    labels, *others = (pl.concat(parts) for parts in tables.values())
    return dict(zip(tables, (labels.sort("layer", "feature", "source"), *others), strict=True))


def _open_labeler(session: Session, labeler: str) -> Any:
    """A labeler with the settings of the study's `features` section that its constructor takes, by their names."""
    made = LABELERS.load(labeler)
    taken = inspect.signature(made).parameters
    return made(**{name: v for name, v in session.study.features.model_dump().items() if name in taken})


def _layer_text(session: Session, name: str, layer: int, column: int, codes: Codes) -> LayerText:
    residuals = session.selection(name).residual_LND
    assert residuals is not None and codes.residual_LND is not None
    generator = torch.Generator().manual_seed(session.study.training.seed + layer)
    mean_D = torch.from_numpy(residuals[column].mean(0)).to(session.device)
    untrained = untrained_like(session.dictionaries(name)[layer], mean_D, generator)
    x_ND = codes.residual_LND[column]
    return LayerText(
        codes, layer, codes.layers[layer], encode_csr(untrained, torch.from_numpy(x_ND).to(session.device)), x_ND
    )


# ---- transfer


BYTES_OF_A_CODE = 8  # a value and the number of its feature
WORK = 1.0  # what matching holds of the largest model beside its codes, as a share of them
BASE_GIB = 0.5  # libraries and small models


def transfer_models(session: Session, metrics: list[str] | None = None) -> list[TransferInfo]:
    """Every metric for every ordered pair of models it can relate, each model with itself included."""
    study, run = session.study, session.run
    announced = False
    for name in metrics or study.transfer.metrics:
        metric = METRICS.load(name)(**_metric_options(session, name))
        for i, source in enumerate(study.models):
            for target in study.models[i:] if metric.both_ways else study.models:
                if source.name != target.name and not metric.across_models:
                    continue
                steps = [_transfer_step(session, name, source, target)]
                if metric.both_ways and source.name != target.name:
                    steps.append(_transfer_step(session, name, target, source))
                if all(_is_done(session, step) for step in steps):
                    continue
                if not announced:
                    session.say(f"transfer: about {transfer_gib(run, study):.1f} GiB of memory, beside the models")
                    announced = True
                session.say(f"{metric.name}: {source.name} {'and' if metric.both_ways else 'to'} {target.name}")
                with session.timed("transfer"):
                    results = metric.compute(
                        _Side(session, source.name),
                        _Side(session, target.name),
                        seed=study.training.seed,
                        min_count=study.transfer.min_count,
                    )
                    for step, result in zip(steps, results, strict=True):
                        with run.step(*step) as files:
                            files += run.write_transfer(result)
    return run.transfers()


def transfer_gib(run: RunDir, study: Study) -> float:
    """Memory that the metrics are expected to need at most: all models' codes of the held-out text, their twins' too,
    and work on the largest."""
    codes = []
    for spec in study.models:
        active = sum(quality.l0 * quality.num_tokens for quality in run.quality(spec.name))
        codes.append(BYTES_OF_A_CODE * active * (1 + study.training.ceiling_seeds) / 2**30)
    return BASE_GIB + sum(codes) + WORK * max(codes, default=0.0)


def _metric_options(session: Session, metric: str) -> dict[str, Any]:
    """The settings of the study's `transfer` section that a metric's constructor takes, by their names."""
    taken = inspect.signature(METRICS.load(metric)).parameters
    return {name: value for name, value in session.study.transfer.model_dump().items() if name in taken}


def _transfer_step(session: Session, metric: str, source: ModelSpec, target: ModelSpec) -> tuple[str, str]:
    keys = [_evaluate_step(session, spec)[1] for spec in (source, target)]
    several = ["mean over twins"] if session.study.training.ceiling_seeds > 1 else []  # once the first alone was read
    key = digest_key(
        *keys, session.study.transfer.min_count, metric, *_metric_options(session, metric).items(), *several
    )
    return f"transfer/{METRICS.load(metric).name}/{source.name}/{target.name}", key


class _Side:
    """A model of the run as metrics see it (`transfer.Side`)."""

    def __init__(self, session: Session, model: str) -> None:
        self._session, self.model = session, model

    @property
    def dictionaries(self) -> dict[int, Dictionary]:
        return self._session.dictionaries(self.model)

    @property
    def twins(self) -> list[dict[int, Dictionary]]:
        return self._session.twins(self.model)

    @property
    def codes(self) -> Codes:
        return self._session.evaluation(self.model)

    @property
    def twin_codes(self) -> list[Codes]:
        return self._session.twin_evaluation(self.model)

    @property
    def sample(self) -> Codes:
        return self._session.sample(self.model)

    @property
    def fit(self) -> Codes:
        return self._session.selection(self.model)

    @property
    def language_model(self) -> LanguageModel:
        return self._session.model(self.model)


# ---- trace and compare


def trace(
    session: Session,
    prompt: str,
    model: str | None,
    force: bool = False,
    options: TraceOptions | None = None,
    tell: Tell = tell_nobody,
) -> Trace:
    """One prompt in one model; saved in the run. `tell` is told of its steps."""
    check_prompt(prompt)
    name = session.study.model(model).name
    session.require_gate(force)
    found = look(session, prompt, name, options, tell)
    if (
        found.verification is not None and found.steering is None
    ):  # a quick look, or a world changed by hand, is no record
        session.run.write_trace(found)
    return found


def look(
    session: Session, prompt: str, name: str, options: TraceOptions | None = None, tell: Tell = tell_nobody
) -> Trace:
    """One prompt in one model, whatever its gate says; not saved."""
    features = session.run.table(name, "features")
    _require_current(session, name)
    labels = best_labels(session.run.table(name, "labels"), session.study.features.bar)
    return trace_prompt(
        TraceInputs(
            session.model(name),
            session.dictionaries(name),
            features,
            labels,
            _throughlines(session, name),
            seed=session.study.training.seed,
            forced=session.run.info().forced,
        ),
        prompt,
        options or trace_options(session.study),
        expected=solve(prompt),
        tell=tell,
    )


def trace_options(
    study: Study,
    off: str | None = None,
    against: str | None = None,
    linearization: str = "grouped",
    settings: Sequence[str] = (),
    verify: bool = True,
) -> TraceOptions:
    """The study's way of tracing, and what was asked for beside; InputError for names that there are not."""
    for name, found, known in (("off", off, OFF_KINDS), ("linearization", linearization, LINEARIZATIONS)):
        if found is not None and found not in known:
            raise InputError(unknown(name, found, list(known)))
    return TraceOptions(
        num_features=study.trace.features,
        most_answer_tokens=study.trace.answer_tokens,
        off=off,  # pyright: ignore[reportArgumentType]  checked above
        against=against,
        linearization=linearization,  # pyright: ignore[reportArgumentType]
        share=study.trace.share,
        most_nodes=study.trace.nodes,
        num_chains=study.trace.chains,
        verify=verify,
        settings=tuple(parse_setting(text) for text in settings),
    )


def _throughlines(session: Session, name: str) -> pl.DataFrame | None:
    """Which features go on from layer to layer; None where matching has not been run."""
    done = {(info.metric, info.source, info.target) for info in session.run.transfers()}
    return find_throughlines(session.run.transfer("matching", name, name)) if ("matching", name, name) in done else None


def compare(
    session: Session,
    prompt: str,
    models: list[str] | None = None,
    force: bool = False,
    options: TraceOptions | None = None,
    tell: Tell = tell_nobody,
) -> Comparison:
    """One prompt in several models, side by side; saved in the run with the traces it was made from."""
    check_prompt(prompt)
    names, matches = _to_compare(session, models)
    _check_prompts(session, names, [Prompt("the prompt", prompt)])
    traces = {
        name: trace(
            session, prompt, name, force, options, lambda doing, *steps, name=name: tell(f"{doing} in {name}", *steps)
        )
        for name in names
    }
    readings = {name: _read_prompts(session, name, [prompt])[0] for name in names}
    comparison = compare_traces(traces, readings, matches, _labels(session, names), list_facts(prompt))
    session.run.write_comparison(comparison)
    return comparison


def compare_prompts(
    session: Session, prompts: Sequence[Prompt], models: list[str] | None = None, force: bool = False
) -> ComparisonTotals:
    """Many prompts in several models, in total; saved in the run."""
    names, matches = _to_compare(session, models)
    _check_prompts(session, names, prompts)
    session.require_gate(force)
    for name in names:
        _require_current(session, name)
    texts, readings = [prompt.text for prompt in prompts], {}
    for name in names:
        session.say(f"reading {len(texts)} prompts in {name}")
        readings[name] = _read_prompts(session, name, texts)
    totals = comparing.compare_prompts(
        readings,
        matches,
        _labels(session, names),
        expected=[solve(text) for text in texts],
        facts=[list_facts(text) for text in texts],
        forced=session.run.info().forced,
    )
    session.run.write_totals(totals)
    return totals


def _to_compare(session: Session, models: list[str] | None) -> tuple[list[str], Matches]:
    """The models, each once, and how their features match; InputError for fewer than two, or if they were not matched."""
    asked = models or [spec.name for spec in session.study.models]
    names = list(dict.fromkeys(session.study.model(name).name for name in asked))
    if len(names) < 2:
        raise InputError(f"compare needs two models or more, found {', '.join(names)}")
    return names, {(a, b): session.run.transfer("matching", a, b) for a in names for b in names if a != b}


def _check_prompts(session: Session, names: list[str], prompts: Sequence[Prompt]) -> None:
    """Refuse, before any model is opened, what one of them cannot read."""
    for name in names:
        spec = session.study.model(name)
        check_prompts(name, read_tokenizer(spec), check_model(spec)[1], prompts)


def _read_prompts(session: Session, name: str, prompts: list[str]) -> list[PromptReading]:
    most = session.study.trace.answer_tokens
    return read_prompts(session.model(name), session.dictionaries(name), prompts, most)


def _labels(session: Session, names: list[str]) -> dict[str, pl.DataFrame]:
    """Labels that reached the bar."""
    bar = session.study.features.bar
    return {name: best_labels(session.run.table(name, "labels"), bar) for name in names}


def _require_current(session: Session, name: str) -> None:
    """Refuse tables that were made from other settings than the run's study has now."""
    spec, manifest = session.study.model(name), session.run.manifest()
    steps = (*train_steps(session, spec).values(), _features_step(session, spec), _label_step(session, spec))
    for step, key in steps:
        if step in manifest and manifest[step].key != key:
            raise InputError(
                f"{step} of this run was made from other settings than its study has now; "
                f"`throughline run STUDY --out {session.run.place} --resume` makes it again"
            )


def trace_prompts(session: Session, force: bool) -> None:
    """The study's own prompts, traced in every model and compared where there are several."""
    known = {(t.model, t.prompt) for t in session.run.traces()}
    names = [spec.name for spec in session.study.models]
    for prompt in session.study.trace.prompts:
        step = _trace_step(session, prompt)
        if all((name, prompt) in known for name in names) and _is_done(session, step):
            continue
        session.say(f"tracing {prompt!r}")
        # a user's own trace of the prompt may replace the files later, so none is noted
        with session.timed("trace"), session.run.step(*step):
            if len(names) > 1 and "matching" in session.study.transfer.metrics:
                compare(session, prompt, force=force)
            else:
                for name in names:
                    trace(session, prompt, name, force)


def _trace_step(session: Session, prompt: str) -> tuple[str, str]:
    study, models = session.study, session.study.models
    made_from = [step(session, spec)[1] for spec in models for step in (_features_step, _label_step)]
    settings = [study.features.bar, study.trace.features, study.trace.answer_tokens, study.transfer.model_dump()]
    return f"trace/{digest_key(prompt)}", digest_key(made_from, settings, session.run.info().forced)


def _is_done(session: Session, step: tuple[str, str]) -> bool:
    return session.run.is_done(*step, warn=session.say)
