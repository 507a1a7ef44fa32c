"""The stage that describes: statistics and contexts of every feature."""

from throughline.features import describe_features
from throughline.pipeline.steps import features_step, is_done
from throughline.session import Session
from throughline.study import ModelSpec


def describe_models(session: Session) -> None:
    """Statistics and contexts of every feature."""
    for spec in session.study.models:
        describe_model(session, spec)


def describe_model(session: Session, spec: ModelSpec) -> None:
    """Statistics and contexts of the features of one model."""
    step = features_step(session, spec)
    if is_done(session, step):
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
