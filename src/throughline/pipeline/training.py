"""The stage that trains: dictionaries of every wanted layer of every model."""

from throughline.errors import ThroughlineError
from throughline.executors.local import run_jobs, threads
from throughline.jobs import Job, Report, train_job
from throughline.models import check_layers
from throughline.pipeline.steps import is_done, train_steps
from throughline.progress import JobNotes
from throughline.records import span
from throughline.session import Session
from throughline.study import ModelSpec


def train_models(session: Session, report: Report) -> None:
    """Dictionaries of every wanted layer of every model; layers that are trained from the same settings, or imported, are kept."""
    jobs = [job for spec in session.study.models if (job := pending_job(session, spec))]
    forget_ended_jobs(session)
    if not jobs:
        return
    if session.study.executor.kind == "ray":
        from throughline.executors import ray

        with session.timed("train"):
            ray.run_jobs(session, jobs, report)
        return
    with threads(session.study.executor.cpus):
        run_jobs(jobs, lambda job: train_noting_failure(session, job, report), name_of=lambda job: job.model)


def forget_ended_jobs(session: Session) -> None:
    """Remove notes of a training that is over: nobody else trains in this run now."""
    for state in session.run.jobs():
        session.run.forget_job(state.model, state.layers)


def pending_job(session: Session, spec: ModelSpec) -> Job | None:
    """The layers of a model that are still to be trained; InputError for a wanted layer that it has not."""
    require_layers(session, spec)
    steps = train_steps(session, spec)
    pending = [layer for layer, step in steps.items() if not is_done(session, step)]
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


def train_noting_failure(session: Session, job: Job, report: Report) -> None:
    """Do a job; a failure is kept for `throughline status` before it is passed on."""
    try:
        with session.timed("train"):
            train_job(session, job, report)
    except ThroughlineError as error:
        JobNotes(session.run, job.model, job.layers, session.device).note(failed=str(error))
        raise
