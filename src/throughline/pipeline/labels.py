"""The stage that labels: every feature that fires, by the study's labelers."""

import inspect
from contextlib import ExitStack
from typing import Any

import polars as pl
import torch

from throughline.asking import Approve, Asking, refuse
from throughline.codes import Codes, encode_csr
from throughline.dictionaries import untrained_like
from throughline.labelers import LayerText
from throughline.pipeline.steps import free_label_step, is_done, label_step
from throughline.records import COVERAGE_COLUMNS, FAMILY_COLUMNS, LABEL_COLUMNS, complete_labels
from throughline.registry import LABELERS
from throughline.session import Session
from throughline.study import ASKING, ModelSpec, dump_study


def label_models(session: Session, approve: Approve = refuse) -> None:
    """Labels of every feature that fires, by the study's labelers. A language model is asked last, about what the others have no
    words for, once `approve` has heard what that costs; calls that failed before are made again."""
    pending = [spec for spec in session.study.models if not _is_labelled(session, spec)]
    for spec in pending:
        label_model(session, spec)
    if pending and session.study.features.asked is not None:
        _ask_for_labels(session, pending, Asking(session, session.study.features.asked), approve)


def label_model(session: Session, spec: ModelSpec) -> None:
    """Labels of one model by the labelers that ask nobody."""
    if is_done(session, free_label_step(session, spec)) or is_done(session, label_step(session, spec)):
        return
    session.say(f"labelling the features of {spec.name}")
    with session.timed("label"), session.run.step(*free_label_step(session, spec)) as files:
        for name, table in _label(session, spec.name).items():
            files.append(session.run.write_table(spec.name, name, table))


def _ask_for_labels(session: Session, pending: list[ModelSpec], asking: Asking, approve: Approve) -> None:
    with ExitStack() as stack:
        tables = {spec.name: session.run.table(spec.name, "labels") for spec in pending}
        free = {name: table.filter(pl.col("source") != ASKING) for name, table in tables.items()}
        beside = {n: {t: session.run.table(n, t) for t in ("coverage", "families")} for n in tables}  # of the same step
        prepared = [stack.enter_context(asking.prepared(spec.name, free[spec.name])) for spec in pending]
        asking.require_approval([p.labeler.estimate(p.cases) for p in prepared], approve)
        for spec, ready in zip(pending, prepared, strict=True):
            session.say(f"asking about {len(ready.cases):,} features of {spec.name}")
            with session.timed("label"), session.run.step(*label_step(session, spec)) as files:
                labels, asked = asking.label(ready)
                session.run.write_text("study.yaml", dump_study(session.study))  # it may ask whom the run's did not
                table = pl.concat([free[spec.name], labels]).sort("layer", "feature", "source")
                files.append(session.run.write_table(spec.name, "labels", table))
                files.append(session.run.write_asked(asked))
                files += [session.run.write_table(spec.name, name, t) for name, t in beside[spec.name].items()]


def _is_labelled(session: Session, spec: ModelSpec) -> bool:
    """True if all labels are there and no call for one failed."""
    asked = session.run.asked(spec.name) if session.study.features.asked else None
    return is_done(session, label_step(session, spec)) and not (asked and asked.failed)


def _label(session: Session, name: str) -> dict[str, pl.DataFrame]:
    """Labels, and what they cover by the labelers that measure it (those with a method `cover`)."""
    labelers = [_open_labeler(session, labeler) for labeler in session.study.features.free_labelers]
    tables: dict[str, list[pl.DataFrame]] = {
        "labels": [pl.DataFrame(schema=LABEL_COLUMNS)],
        "coverage": [pl.DataFrame(schema=COVERAGE_COLUMNS)],
        "families": [pl.DataFrame(schema=FAMILY_COLUMNS)],
    }
    for column, layer in enumerate(session.dictionaries(name)):
        texts = [
            _layer_text(session, name, layer, column, codes)
            for codes in (session.selection(name), session.sample(name))
        ]
        for labeler in labelers:
            tables["labels"].append(complete_labels(labeler.label(*texts)))
            if hasattr(labeler, "cover"):
                coverage, families = labeler.cover(*texts)
                tables["coverage"].append(coverage)
                tables["families"].append(families)
    labels, *others = (pl.concat(parts) for parts in tables.values())
    return dict(zip(tables, (labels.sort("layer", "feature", "source"), *others), strict=True))


def _open_labeler(session: Session, labeler: str) -> Any:
    """A labeler with the settings of the study's `features` section that its constructor takes, by their names."""
    made = LABELERS.load(labeler)
    taken = inspect.signature(made).parameters
    return made(**{name: v for name, v in session.study.features.model_dump().items() if name in taken})


def _layer_text(session: Session, name: str, layer: int, column: int, codes: Codes) -> LayerText:
    residuals = session.selection(name).residual_LND
    assert residuals is not None and codes.residual_LND is not None
    generator = torch.Generator().manual_seed(session.study.training.seed + layer)
    mean_D = torch.from_numpy(residuals[column].mean(0)).to(session.device)
    untrained = untrained_like(session.dictionaries(name)[layer], mean_D, generator)
    x_ND = codes.residual_LND[column]
    return LayerText(
        codes, layer, codes.layers[layer], encode_csr(untrained, torch.from_numpy(x_ND).to(session.device)), x_ND
    )
