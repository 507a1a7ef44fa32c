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
    jobs = []
    for spec in session.study.models:
        require_layers(session, spec)  # a wrong layer is refused before anything is trained
        steps = train_steps(session, spec)
        pending = [layer for layer, step in steps.items() if not is_done(session, step)]
        imported = [layer for layer in session.run.imported(spec.name) if layer in steps]
        if imported:
            session.say(f"{spec.name}: imported, so not trained: layer{'s'[: len(imported) > 1]} {span(imported)}")
        jobs += [Job(spec.name, pending)] if pending else []
    for state in session.run.jobs():  # of a training that is over: nobody else trains in this run now
        session.run.forget_job(state.model, state.layers)
    if not jobs:
        return
    if session.study.executor.kind == "ray":
        from throughline.executors import ray

        ray.run_jobs(session, jobs, report)
        return
    with threads(session.study.executor.cpus):
        run_jobs(jobs, lambda job: _note_failure(session, job, report), name_of=lambda job: job.model)


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
        train_job(session, job, report)
    except ThroughlineError as error:
        JobNotes(session.run, job.model, job.layers, session.device).note(failed=str(error))
        raise
