"""The stage that relates: every metric for every ordered pair of models it can relate."""

import inspect
from typing import Any

from throughline.codes import Codes
from throughline.dictionaries import Dictionary
from throughline.models import LanguageModel
from throughline.pipeline.steps import evaluate_step, is_done
from throughline.records import TransferInfo
from throughline.registry import METRICS
from throughline.run_dir import RunDir, digest_key
from throughline.session import Session
from throughline.study import ModelSpec, Study

BYTES_OF_A_CODE = 8  # a value and the number of its feature
WORK = 1.0  # what matching holds of the largest model beside its codes, as a share of them
BASE_GIB = 0.5  # libraries and small models


def transfer_models(session: Session, metrics: list[str] | None = None) -> list[TransferInfo]:
    """Every metric for every ordered pair of models it can relate, each model with itself included."""
    study, run = session.study, session.run
    announced = False
    for name in metrics or study.transfer.metrics:
        metric = METRICS.load(name)(**_metric_options(session, name))
        for i, source in enumerate(study.models):
            for target in study.models[i:] if metric.both_ways else study.models:
                if source.name != target.name and not metric.across_models:
                    continue
                steps = [_transfer_step(session, name, source, target)]
                if metric.both_ways and source.name != target.name:
                    steps.append(_transfer_step(session, name, target, source))
                if all(is_done(session, step) for step in steps):
                    continue
                if not announced:
                    session.say(
                        f"transfer needs about {transfer_gib(run, study):.1f} GiB of memory, and that of the models"
                    )
                    announced = True
                session.say(_describe(metric, source, target))
                with session.timed("transfer"), run.steps(dict(steps)) as files:
                    results = metric.compute(
                        _Side(session, source.name),
                        _Side(session, target.name),
                        seed=study.training.seed,
                        min_count=study.transfer.min_count,
                    )
                    for (step, _), result in zip(steps, results, strict=True):
                        files[step] += run.write_transfer(result)
    return run.transfers()


def _describe(metric: Any, source: ModelSpec, target: ModelSpec) -> str:
    """What is being done, for a line of news."""
    if source.name == target.name:
        between = f"between the layers of {source.name}"
    elif metric.both_ways:
        between = f"between {source.name} and {target.name}, both ways"
    else:
        between = f"from {source.name} to {target.name}"
    return f"transfer: computing {metric.name} {between}"


def transfer_gib(run: RunDir, study: Study) -> float:
    """Memory that the metrics are expected to need at most: all models' codes of the held-out text, their twins' too,
    and work on the largest."""
    codes = []
    for spec in study.models:
        active = sum(quality.l0 * quality.num_tokens for quality in run.quality(spec.name))
        codes.append(BYTES_OF_A_CODE * active * (1 + study.training.ceiling_seeds) / 2**30)
    return BASE_GIB + sum(codes) + WORK * max(codes, default=0.0)


def _metric_options(session: Session, metric: str) -> dict[str, Any]:
    """The settings of the study's `transfer` section that a metric's constructor takes, by their names."""
    taken = inspect.signature(METRICS.load(metric)).parameters
    return {name: value for name, value in session.study.transfer.model_dump().items() if name in taken}


def _transfer_step(session: Session, metric: str, source: ModelSpec, target: ModelSpec) -> tuple[str, str]:
    keys = [evaluate_step(session, spec)[1] for spec in (source, target)]
    several = ["mean over twins"] if session.study.training.ceiling_seeds > 1 else []  # once the first alone was read
    key = digest_key(
        *keys, session.study.transfer.min_count, metric, *_metric_options(session, metric).items(), *several
    )
    return f"transfer/{METRICS.load(metric).name}/{source.name}/{target.name}", key


class _Side:
    """A model of the run as metrics see it (`transfer.Side`)."""

    def __init__(self, session: Session, model: str) -> None:
        self._session, self.model = session, model

    @property
    def dictionaries(self) -> dict[int, Dictionary]:
        return self._session.dictionaries(self.model)

    @property
    def twins(self) -> list[dict[int, Dictionary]]:
        return self._session.twins(self.model)

    @property
    def codes(self) -> Codes:
        return self._session.evaluation(self.model)

    @property
    def twin_codes(self) -> list[Codes]:
        return self._session.twin_evaluation(self.model)

    @property
    def sample(self) -> Codes:
        return self._session.sample(self.model)

    @property
    def fit(self) -> Codes:
        return self._session.selection(self.model)

    @property
    def language_model(self) -> LanguageModel:
        return self._session.model(self.model)
