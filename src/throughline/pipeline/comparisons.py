"""One prompt, or many, in several models of a run."""

from collections.abc import Sequence

import polars as pl

from throughline import comparing
from throughline.comparing import Matches, compare_traces
from throughline.errors import InputError
from throughline.models import check_model, read_tokenizer
from throughline.pipeline.traces import require_current, trace
from throughline.records import Comparison, ComparisonTotals, PromptReading, best_labels
from throughline.session import Session
from throughline.tracing import Prompt, Tell, TraceOptions, check_prompt, check_prompts, read_prompts, tell_nobody
from throughline.zoo.texts import list_facts, solve


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
        require_current(session, name)
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
        check_prompts(name, read_tokenizer(spec, session.study.data.bos), check_model(spec)[1], prompts)


def _read_prompts(session: Session, name: str, prompts: list[str]) -> list[PromptReading]:
    most = session.study.trace.answer_tokens
    return read_prompts(session.model(name), session.dictionaries(name), prompts, most)


def _labels(session: Session, names: list[str]) -> dict[str, pl.DataFrame]:
    """Labels that reached the bar."""
    bar = session.study.features.bar
    return {name: best_labels(session.run.table(name, "labels"), bar) for name in names}
