"""The stage that traces: the study's own prompts, in every model, compared where there are several."""

from throughline.pipeline.comparisons import compare
from throughline.pipeline.steps import features_step, is_done, label_step
from throughline.pipeline.traces import trace
from throughline.run_dir import digest_key
from throughline.session import Session


def trace_prompts(session: Session, force: bool) -> None:
    """The study's own prompts, traced in every model and compared where there are several."""
    known = {(t.model, t.prompt) for t in session.run.traces()}
    names = [spec.name for spec in session.study.models]
    for prompt in session.study.trace.prompts:
        step = _trace_step(session, prompt)
        if all((name, prompt) in known for name in names) and is_done(session, step):
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
    made_from = [step(session, spec)[1] for spec in models for step in (features_step, label_step)]
    settings = [study.features.bar, study.trace.features, study.trace.answer_tokens, study.transfer.model_dump()]
    return f"trace/{digest_key(prompt)}", digest_key(made_from, settings, session.run.info().forced)
