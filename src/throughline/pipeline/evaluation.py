"""The stage that evaluates: quality of every dictionary on held-out text."""

from throughline.pipeline.steps import evaluate_step, is_done
from throughline.quality import evaluate
from throughline.records import LayerQuality
from throughline.session import Session
from throughline.study import ModelSpec
from throughline.tokens import take_documents


def evaluate_models(session: Session) -> list[LayerQuality]:
    """Quality of every dictionary on held-out text."""
    for spec in session.study.models:
        evaluate_model(session, spec)
    return [quality for spec in session.study.models for quality in session.run.quality(spec.name)]


def evaluate_model(session: Session, spec: ModelSpec) -> None:
    """Quality of the dictionaries of one model."""
    study, run, step = session.study, session.run, evaluate_step(session, spec)
    if is_done(session, step):
        return
    session.say(f"evaluating {spec.name}")
    with session.timed("evaluate"), run.step(*step) as files:
        first = take_documents(
            iter(session.heldout),
            session.model(spec.name).tokenizer,
            study.evaluation.spliced_tokens,
            session.context(spec.name),
        )
        qualities = evaluate(
            session.model(spec.name),
            session.dictionaries(spec.name),
            session.rows(spec.name, first),
            session.rows(spec.name, session.heldout[len(first) :]),
            study.gate,
            session.say,
        )
        files += [run.write_quality(quality) for quality in qualities]
