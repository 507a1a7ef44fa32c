"""One prompt traced in one model of a run."""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from throughline.errors import InputError
from throughline.pipeline.steps import features_step, label_step, train_steps
from throughline.records import Trace, best_labels
from throughline.registry import unknown
from throughline.session import Session
from throughline.study import Study
from throughline.throughlines import find_throughlines
from throughline.tracing import Tell, TraceInputs, TraceOptions, check_prompt, tell_nobody, trace_prompt
from throughline.tracing.baselines import OFF_KINDS
from throughline.tracing.linearizing import LINEARIZATIONS
from throughline.tracing.steering import parse_setting
from throughline.zoo.texts import solve


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
    require_current(session, name)
    expected = solve(prompt)
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
        replace(options or trace_options(session.study), whole=expected is not None),
        expected=expected,
        tell=tell,
    )


def trace_options(
    study: Study,
    off: str | None = None,
    against: str | None = None,
    linearization: str = "grouped",
    settings: Sequence[str] = (),
    verify: bool = True,
    chat: bool = False,
    answer: str | None = None,
    rival: str | None = None,
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
        chat=chat,
        answer=answer,
        rival=rival,
    )


def _throughlines(session: Session, name: str) -> pl.DataFrame | None:
    """Which features go on from layer to layer; None where matching has not been run."""
    done = {(info.metric, info.source, info.target) for info in session.run.transfers()}
    return find_throughlines(session.run.transfer("matching", name, name)) if ("matching", name, name) in done else None


def require_current(session: Session, name: str) -> None:
    """Refuse tables that were made from other settings than the run's study has now."""
    spec, manifest = session.study.model(name), session.run.manifest()
    steps = (*train_steps(session, spec).values(), features_step(session, spec), label_step(session, spec))
    for step, key in steps:
        if step in manifest and manifest[step].key != key:
            raise InputError(
                f"{step} of this run was made from other settings than its study has now; "
                f"`throughline run STUDY --out {session.run.place} --resume` makes it again"
            )
