"""Models taken through their stages side by side, before the stages themselves finish what is left."""

from collections.abc import Callable, Sequence

from throughline.executors import processes
from throughline.executors.local import raise_failures
from throughline.jobs import Report
from throughline.models import check_model
from throughline.pipeline.evaluation import evaluate_model
from throughline.pipeline.features import describe_model
from throughline.pipeline.labels import label_model
from throughline.pipeline.steps import evaluate_step, features_step, free_label_step, is_done, train_steps
from throughline.pipeline.training import forget_ended_jobs, pending_job, train_noting_failure
from throughline.records import Trace
from throughline.session import Session
from throughline.study import ModelSpec

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

    What is left undone (a model that fails the gate, labels that a language model is asked for) is for the stages themselves,
    which come next. `on_trace` is given a trace of the study's first prompt in the model `first`, which is begun with, as soon as
    that has labels. Raises what failed, as `train_models` does.
    """
    study = session.study
    widths = {spec.name: check_model(spec).width for spec in study.models}
    division = processes.divide_cores(session, widths)
    pending = [spec for spec in study.models if _is_pending(session, spec, stages)] if division else []
    if not division or not pending:
        return
    forget_ended_jobs(session)
    # the longest first, so that no process is left with a long one at the end
    pending.sort(key=lambda spec: (spec.name != first, -_cost(session, spec, widths[spec.name] or 1)))
    prompt = next(iter(study.trace.prompts), None)
    names = [spec.name for spec in pending]
    with session.side_by_side():
        failures = processes.advance_models(
            session, division, names, stages, report, force=force, look=prompt, on_trace=on_trace
        )
    raise_failures(failures)


def advance_model(session: Session, name: str, stages: Sequence[str], report: Report, *, force: bool) -> bool:
    """Take one model through `stages`; False if its dictionaries fail the gate, which ends it, unless `force`."""
    spec = session.study.model(name)
    if "train" in stages:
        job = pending_job(session, spec)
        if job:
            train_noting_failure(session, job, report)
    if "evaluate" in stages:
        evaluate_model(session, spec)
        if not force and not all(quality.passed for quality in session.run.quality(name)):
            return False
    if "features" in stages:
        describe_model(session, spec)
    if "label" in stages:
        label_model(session, spec)
    return True


def _is_pending(session: Session, spec: ModelSpec, stages: Sequence[str]) -> bool:
    steps = list(train_steps(session, spec).values())
    later = {"evaluate": evaluate_step, "features": features_step, "label": free_label_step}
    steps += [step_of(session, spec) for stage, step_of in later.items() if stage in stages]
    return not all(is_done(session, step) for step in steps)


def _cost(session: Session, spec: ModelSpec, d_model: int) -> int:
    """What the training of a model takes, in no particular unit."""
    dictionary = session.study.dictionary_for(spec)
    return sum(d_model * dictionary.at_layer(layer).width(d_model) for layer in session.layers(spec))
