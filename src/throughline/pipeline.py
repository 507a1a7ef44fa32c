"""The stages of a run in order, each skipped when it was done from the same settings.

    train -> evaluate (and gate) -> features -> label -> transfer -> analyze -> trace and compare -> report

A stage's key is made of every setting that its result depends on, and of the key of the stage before it; so a changed
setting redoes exactly what it touches.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import polars as pl
import torch
from torch import Tensor

from throughline.codes import Codes, encode_csr
from throughline.comparing import compare_traces
from throughline.dictionaries import save_dictionary, untrained_like
from throughline.errors import InputError, ThroughlineError
from throughline.executors.local import run_jobs
from throughline.features import describe_features
from throughline.harvesting import harvest
from throughline.labelers import LayerText
from throughline.models import check_model
from throughline.quality import evaluate
from throughline.records import Comparison, LayerQuality, Trace, TransferInfo, best_labels
from throughline.registry import LABELERS, METRICS
from throughline.run_dir import digest_key
from throughline.session import Session
from throughline.study import ModelSpec, Study
from throughline.text import measure_text, read_documents
from throughline.tokens import encode_prompt, open_tokenizer, stream_rows, take_documents
from throughline.tracing import TraceInputs, check_prompt, trace_prompt
from throughline.training import Progress, train
from throughline.transfer import Side
from throughline.zoo.texts import solve

HARVEST_TOKENS = 2048
PROBE_TOKENS = 16
MOST_BYTES_PER_TOKEN = 12  # a longer file has tokens enough; a shorter one is counted first
Report = Callable[[Progress], None]


# ---- train


def check_study(study: Study) -> None:
    """Refuse, before anything is written, what would fail later: a model, layer or text that is not there, a prompt too long."""
    for spec in study.models:
        context = check_model(spec)
        for prompt in study.trace.prompts:
            _check_prompt(spec, prompt, context)
    for split in ("train", "heldout"):
        next(read_documents(study.data, split, study.training.seed))


def _check_prompt(spec: ModelSpec, prompt: str, context: int | None) -> None:
    check_prompt(prompt)
    num_tokens = len(encode_prompt(open_tokenizer(spec.path, spec.revision), prompt))
    if context is not None and num_tokens >= context:
        raise InputError(
            f"trace.prompts: {prompt[:40]!r}… has {num_tokens} tokens; {spec.name} sees {context} and needs at least one "
            "for the answer"
        )


def train_models(session: Session, report: Report) -> None:
    """Dictionaries of every wanted layer of every model; models already trained from the same settings are skipped."""
    pending = [spec for spec in session.study.models if not _is_done(session, _train_step(session, spec))]
    for spec in session.study.models:
        session.layers(spec)  # a wrong layer is refused before anything is trained
        if session.context(spec.name) < session.study.data.context and spec in pending:
            session.say(f"data.context {session.study.data.context} is {session.context(spec.name)} for {spec.name}")
    run_jobs(pending, lambda spec: _note_failure(session, spec, report), name_of=lambda spec: spec.name)


def _note_failure(session: Session, spec: ModelSpec, report: Report) -> None:
    """Train; a failure is kept for `throughline status` before it is passed on."""
    try:
        _train_model(session, spec, report)
    except ThroughlineError as error:
        _note_progress(session, spec.name, {"failed": str(error)})
        raise


def _train_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    study = session.study
    training = study.training.model_dump()
    parts = (spec.model_dump(), study.data.model_dump(), study.dictionary_for(spec).model_dump(), training)
    return f"train/{spec.name}", digest_key(*parts)


def _train_model(session: Session, spec: ModelSpec, report: Report) -> None:
    run, study, model = session.run, session.study, session.model(spec.name)
    layers = session.layers(spec)
    specs = {layer: study.dictionary_for(spec).at_layer(layer) for layer in layers}
    with run.step(*_train_step(session, spec)) as files:
        training = study.training.model_copy(update={"tokens": _tokens_of_an_epoch(session, spec.name)})
        source = activations(session, spec.name, layers)
        first = next(source, None)
        if first is None:
            raise InputError(f"{study.data.path} gave no tokens to train on")
        keep_progress = _progress_keeper(session, report)
        dictionaries = train(
            _prepend(first, source),
            specs,
            training,
            model=spec.name,
            num_layers=model.num_layers,
            report=keep_progress,
        )
        for column, layer in enumerate(layers):
            dictionary = dictionaries[layer]
            dictionary.metadata.update(_saelens_metadata(session, spec, layer))
            names = save_dictionary(dictionary, run.layer_folder(spec.name, layer), first[column, :PROBE_TOKENS])
            files += [f"{run.layer_name(spec.name, layer)}/{name}" for name in names]


def _tokens_of_an_epoch(session: Session, name: str) -> int:
    """The study's tokens, or as many as its text has: the learning rate has to know when training ends."""
    study, wanted = session.study, session.study.training.tokens
    size = measure_text(study.data)
    if size is None or size > MOST_BYTES_PER_TOKEN * wanted:
        return wanted
    documents, context = read_documents(study.data, "train", study.training.seed), session.context(name)
    tokenizer, keep = session.model(name).tokenizer, study.data.keep_special_tokens
    count = 0
    for rows in stream_rows(documents, tokenizer, context, max(1, HARVEST_TOKENS // context), keep):
        count += rows.num_tokens
        if count >= wanted:
            return wanted
    session.say(f"{name}: the text has {count:,} tokens to train on, less than the {wanted:,} asked for")
    return count


def activations(session: Session, name: str, layers: list[int]) -> Iterator[Tensor]:
    """The study's training activations, [L, n, D] at a time: `tokens` of each epoch, the epochs one after another."""
    study, model = session.study, session.model(name)
    context = session.context(name)
    for _ in range(study.training.epochs):
        left = study.training.tokens
        documents = read_documents(study.data, "train", study.training.seed)
        batches = stream_rows(
            documents,
            model.tokenizer,
            context,
            max(1, HARVEST_TOKENS // context),
            study.data.keep_special_tokens,
        )
        for _, x_LND in harvest(model, batches, layers):
            yield x_LND[:, :left]
            left -= x_LND.shape[1]
            if left <= 0:
                break


def _prepend(first: Tensor, rest: Iterable[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _progress_keeper(session: Session, report: Report) -> Report:
    """Report a training's progress, and keep the latest of each model for `throughline status`."""

    def keep(progress: Progress) -> None:
        _note_progress(session, progress.model, asdict(progress))
        report(progress)

    return keep


def _note_progress(session: Session, model: str, where: dict[str, Any]) -> None:
    path = session.run.progress_path().name
    known = session.run.read_json(path) if session.run.exists(path) else {}
    session.run.write_json(path, known | {model: where | {"at": time.time()}})


def _saelens_metadata(session: Session, spec: ModelSpec, layer: int) -> dict[str, Any]:
    """What SAELens needs to know of where a dictionary belongs."""
    model, data = session.model(spec.name), session.study.data
    return {
        "model_name": spec.path if not spec.path.startswith("/") else spec.name,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": model.module_path(layer),
        "hf_hook_name": model.module_path(layer),
        "hook_head_index": None,
        "context_size": session.context(spec.name),
        "dataset_path": data.path if not data.path.startswith("/") else data.path.rpartition("/")[2],
        "prepend_bos": model.tokenizer.bos_token_id is not None,
        "exclude_special_tokens": not data.keep_special_tokens,
    }


# ---- evaluate, features, label


def evaluate_models(session: Session) -> list[LayerQuality]:
    """Quality of every dictionary on held-out text."""
    study, run = session.study, session.run
    for spec in study.models:
        step = _evaluate_step(session, spec)
        if _is_done(session, step):
            continue
        session.say(f"evaluating {spec.name}")
        with run.step(*step) as files:
            spliced = take_documents(
                iter(session.heldout),
                session.model(spec.name).tokenizer,
                study.evaluation.spliced_tokens,
                session.context(spec.name),
            )
            qualities = evaluate(
                session.model(spec.name),
                session.dictionaries(spec.name),
                session.rows(spec.name, session.heldout),
                session.rows(spec.name, spliced),
                study.gate,
            )
            files += [run.write_quality(quality) for quality in qualities]
    return [quality for spec in study.models for quality in run.quality(spec.name)]


def _evaluate_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    study = session.study
    parts = (study.evaluation.model_dump(), study.gate.model_dump(), study.models[0].path)
    return f"evaluate/{spec.name}", digest_key(_train_step(session, spec)[1], *parts)


def describe_models(session: Session) -> None:
    """Statistics and contexts of every feature."""
    for spec in session.study.models:
        step = _features_step(session, spec)
        if _is_done(session, step):
            continue
        session.say(f"describing the features of {spec.name}")
        with session.run.step(*step) as files:
            features, examples = describe_features(
                session.model(spec.name),
                session.dictionaries(spec.name),
                session.evaluation(spec.name),
                session.study.features.contexts,
            )
            files.append(session.run.write_table(spec.name, "features", features))
            files.append(session.run.write_table(spec.name, "examples", examples))


def _features_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    return f"features/{spec.name}", digest_key(_evaluate_step(session, spec)[1], session.study.features.contexts)


def label_models(session: Session) -> None:
    """Labels of every feature that fires, by the study's labelers."""
    for spec in session.study.models:
        step = _label_step(session, spec)
        if _is_done(session, step):
            continue
        session.say(f"labelling the features of {spec.name}")
        with session.run.step(*step) as files:
            files.append(session.run.write_table(spec.name, "labels", _label(session, spec.name)))


def _label_step(session: Session, spec: ModelSpec) -> tuple[str, str]:
    return f"label/{spec.name}", digest_key(_evaluate_step(session, spec)[1], session.study.features.labelers)


def _label(session: Session, name: str) -> pl.DataFrame:
    labelers = [LABELERS.load(labeler)() for labeler in session.study.features.labelers]
    tables = []
    for column, layer in enumerate(session.dictionaries(name)):
        texts = [
            _layer_text(session, name, layer, column, codes)
            for codes in (session.selection(name), session.sample(name))
        ]
        tables += [labeler.label(*texts) for labeler in labelers]
    return pl.concat(tables).sort("layer", "feature", "source")


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


# ---- transfer


def transfer_models(session: Session, metrics: list[str] | None = None) -> list[TransferInfo]:
    """Every metric for every ordered pair of models it can relate, each model with itself included."""
    study, run = session.study, session.run
    for name in metrics or study.transfer.metrics:
        metric = METRICS.load(name)()
        for source in study.models:
            for target in study.models:
                if source.name != target.name and not metric.across_models:
                    continue
                step = (
                    f"transfer/{metric.name}/{source.name}/{target.name}",
                    digest_key(
                        _evaluate_step(session, source)[1],
                        _evaluate_step(session, target)[1],
                        study.transfer.min_count,
                        name,
                    ),
                )
                if _is_done(session, step):
                    continue
                session.say(f"{metric.name}: {source.name} to {target.name}")
                with run.step(*step) as files:
                    result = metric.compute(
                        _side(session, source.name),
                        _side(session, target.name),
                        seed=study.training.seed,
                        min_count=study.transfer.min_count,
                    )
                    files += run.write_transfer(result)
    return run.transfers()


def _side(session: Session, name: str) -> Side:
    return Side(name, session.dictionaries(name), session.evaluation(name), session.sample(name))


# ---- trace and compare


def trace(session: Session, prompt: str, model: str | None, force: bool = False) -> Trace:
    """One prompt in one model; saved in the run."""
    check_prompt(prompt)
    name = session.study.model(model).name
    session.require_gate(force)
    features = session.run.table(name, "features")
    _require_current(session, name)
    labels = best_labels(session.run.table(name, "labels"), session.study.features.bar)
    opened = session.model(name)
    found = trace_prompt(
        TraceInputs(
            opened,
            session.dictionaries(name),
            features,
            labels,
            seed=session.study.training.seed,
            forced=session.run.info().forced,
        ),
        prompt,
        num_features=session.study.trace.features,
        most_answer_tokens=session.study.trace.answer_tokens,
        expected=solve(prompt),
    )
    session.run.write_trace(found)
    return found


def compare(session: Session, prompt: str, models: list[str] | None = None, force: bool = False) -> Comparison:
    """One prompt in several models, side by side; saved in the run with the traces it was made from."""
    asked = models or [spec.name for spec in session.study.models]
    names = list(dict.fromkeys(session.study.model(name).name for name in asked))
    if len(names) < 2:
        raise InputError(f"compare needs two models or more, found {', '.join(names)}")
    matches = {(a, b): session.run.transfer("matching", a, b) for a in names for b in names if a != b}
    comparison = compare_traces({name: trace(session, prompt, name, force) for name in names}, matches)
    session.run.write_comparison(comparison)
    return comparison


def _require_current(session: Session, name: str) -> None:
    """Refuse tables that were made from other settings than the run's study has now."""
    spec, manifest = session.study.model(name), session.run.manifest()
    for step, key in (_train_step(session, spec), _features_step(session, spec), _label_step(session, spec)):
        if step in manifest and manifest[step].key != key:
            raise InputError(
                f"{step} of this run was made from other settings than its study has now; "
                f"`throughline run STUDY --out {session.run.root} --resume` makes it again"
            )


def trace_prompts(session: Session, force: bool) -> None:
    """The study's own prompts, traced in every model and compared where there are several."""
    known = {(t.model, t.prompt) for t in session.run.traces()}
    for prompt in session.study.trace.prompts:
        names = [spec.name for spec in session.study.models]
        if all((name, prompt) in known for name in names) and not _is_stale(session):
            continue
        session.say(f"tracing {prompt!r}")
        if len(names) > 1 and "matching" in session.study.transfer.metrics:
            compare(session, prompt, force=force)
        else:
            for name in names:
                trace(session, prompt, name, force)


def _is_stale(session: Session) -> bool:
    """True if labels or matrices were made after the traces."""
    made = [session.run.root / f"traces/{f.name}" for f in (session.run.root / "traces").glob("*.json")]
    manifest = session.run.root / "manifest.json"
    return not made or min(f.stat().st_mtime for f in made) < manifest.stat().st_mtime


def _is_done(session: Session, step: tuple[str, str]) -> bool:
    return session.run.is_done(*step, warn=session.say)
