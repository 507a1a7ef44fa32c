"""The steps of a run that others depend on: the name of each, and the key of what it was made from."""

from throughline.pipeline.keys import steps_of
from throughline.run_dir import digest_key
from throughline.session import Session
from throughline.study import ModelSpec


def train_steps(session: Session, spec: ModelSpec) -> dict[int, tuple[str, str]]:
    """Step and key of each wanted layer's dictionary. The key of an imported one is its import's."""
    return steps_of(session.study, spec, session.layers(spec), session.run.imported(spec.name))


def evaluate_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    """The step that measures the quality of a model's dictionaries, and its key."""
    study = session.study
    parts = (study.evaluation.model_dump(), study.gate.model_dump(), study.models[0].path)
    trained = [key for _, key in train_steps(session, spec).values()]
    return f"evaluate/{spec.name}", digest_key(trained, *parts)


def features_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    """The step that describes a model's features, and its key."""
    return f"features/{spec.name}", digest_key(evaluate_step(session, spec)[1], session.study.features.contexts)


def label_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    """The step that labels a model's features, and its key once a language model was asked, if the study wants one asked."""
    step, free = free_label_step(session, spec)
    features = session.study.features
    return step, digest_key(free, features.bar, features.asked.decisive) if features.asked else free


def free_label_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    """The same step before a language model is asked."""
    features = session.study.features
    return f"label/{spec.name}", digest_key(
        evaluate_step(session, spec)[1], [features.free_labelers, features.predicates]
    )


def is_done(session: Session, step: tuple[str, str]) -> bool:
    """True if the run has the step's result from the same settings, whole."""
    return session.run.is_done(*step, warn=session.say)
