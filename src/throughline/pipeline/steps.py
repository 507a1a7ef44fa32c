"""The steps of a run that others depend on: the name of each, and the key of what it was made from."""

from throughline.pipeline.keys import steps_of
from throughline.run_dir import digest_key
from throughline.session import Session
from throughline.study import ModelSpec


def train_steps(session: Session, spec: ModelSpec) -> dict[int, tuple[str, str]]:
    """Step and key of each wanted layer's dictionary. The key of an imported one is its import's."""
    return steps_of(session.study, spec, session.layers(spec), session.run.imported(spec.name))


def _evaluate_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    study = session.study
    parts = (study.evaluation.model_dump(), study.gate.model_dump(), study.models[0].path)
    trained = [key for _, key in train_steps(session, spec).values()]
    return f"evaluate/{spec.name}", digest_key(trained, *parts)


def _features_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    return f"features/{spec.name}", digest_key(_evaluate_step(session, spec)[1], session.study.features.contexts)


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


def _is_done(session: Session, step: tuple[str, str]) -> bool:
    return session.run.is_done(*step, warn=session.say)
