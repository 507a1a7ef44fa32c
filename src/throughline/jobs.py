"""One job of training: layers of one model on one device, from the study's text to dictionaries in the run folder.

1. split the layers into blocks whose training state fits into memory; a block that was begun stays as it is
2. for each block: open the text as activations (kept on disk if they are read again and that is cheaper)
3. train, from the latest checkpoint if there is one
4. save every layer's dictionary, and its twins if the study wants them, and note it as done
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from throughline.claims import Claim
from throughline.dictionaries import save_dictionary
from throughline.errors import InputError, TrainingError
from throughline.harvesting import TextSource, tokens_of_a_pass
from throughline.journals import Journal, open_journals
from throughline.models.bos import adds_bos, bos_token
from throughline.pipeline.steps import is_done, train_steps
from throughline.pools import threads_of
from throughline.progress import JobNotes
from throughline.records import span
from throughline.registry import ARCHITECTURES
from throughline.run_dir import digest_key
from throughline.session import Session
from throughline.study import DictionarySpec, ModelSpec, Study, TrainingSpec
from throughline.text import measure_text, read_documents
from throughline.tokens import TokenRows, stream_rows
from throughline.training import Progress, compiled, train
from throughline.training.caching import CachedSource
from throughline.training.checkpoints import Checkpoints
from throughline.training.chunks import chunk_tokens
from throughline.training.memory import free_bytes, measure_layer, split_blocks
from throughline.training.precision import harvests_in_bfloat16
from throughline.training.ranks import ALONE, Ranks
from throughline.training.sources import ActivationSource

PROBE_TOKENS = 16
MOST_BYTES_PER_TOKEN = 12  # a longer file has tokens enough; a shorter one is counted first
TOKENS_COUNTED_AT_ONCE = 4096
DISK_BYTES_PER_SECOND = 5e8  # written once and read: what a cache costs, cautiously
Report = Callable[[Progress], None]


class Job(NamedTuple):
    """Layers of one model, to be trained together on one device."""

    model: str
    layers: list[int]

    @property
    def name(self) -> str:
        """`zoo/pythia layers 0-5`."""
        return f"{self.model} layer{'s'[: len(self.layers) > 1]} {span(self.layers)}"


def train_job(session: Session, job: Job, report: Report, attempt: int = 1, ranks: Ranks = ALONE) -> None:
    """A job's dictionaries and their twins, saved in the run, block by block if they do not fit into memory together.

    Layers that an earlier attempt finished before its worker was lost are kept. Of several `ranks`, which all do the same job, the
    first alone writes.
    """
    study, spec = session.study, session.study.model(job.model)
    layers = ranks.gather_objects(_unfinished(session, spec, job.layers))[0]
    if not layers:
        return
    num_tokens = _tokens_of_an_epoch(session, spec.name)
    if not num_tokens:
        raise InputError(f"{study.data.path} gave no tokens to train on")
    training = study.training.model_copy(update={"tokens": num_tokens})
    if session.context(spec.name) < study.data.context:
        session.say(
            f"{spec.name} takes {session.context(spec.name)} tokens at once, fewer than data.context {study.data.context}"
        )
    session.say(f"{spec.name}: {_said_of_bos(session, spec)}")
    wanted = [study.dictionary_for(spec).at_layer(layer) for layer in layers]
    for architecture, name in sorted({(one.architecture, name) for one in wanted for name in one.ignored}):
        session.say(f"{spec.name}: {architecture} does not read dictionary.{name}")
    by_autograd = ranks.size > 1
    blocks, begun = ranks.gather_objects(_blocks(session, spec, layers, training, by_autograd))[0]  # of one mind
    if len(blocks) > 1:
        spans = ", ".join(span(block) for block in blocks)
        reason = "go on as they were begun" if begun else "do not fit into memory at once"
        session.say(f"{spec.name}: {len(layers)} layers {reason}; trained in blocks {spans}")
    failures: list[str] = []
    for block in blocks:
        if ranks.rank == 0:
            failures += _train_block(session, spec, block, training, report, attempt, ranks)
        else:
            _help(session, spec, block, training, ranks)
    if failures:
        raise TrainingError("; ".join(failures))


def _unfinished(session: Session, spec: ModelSpec, layers: Sequence[int]) -> list[int]:
    """Those of a job's layers whose dictionaries are not in the run yet."""
    steps = train_steps(session, spec)
    return [layer for layer in layers if not is_done(session, steps[layer])]


def _train_block(
    session: Session,
    spec: ModelSpec,
    layers: list[int],
    training: TrainingSpec,
    report: Report,
    attempt: int,
    ranks: Ranks,
) -> list[str]:
    """Train a block of layers; a sentence for each that was given up."""
    run, study, model = session.run, session.study, session.model(spec.name)
    steps = train_steps(session, spec)
    folder = run.checkpoint_folder(spec.name, layers)
    key = digest_key(*(steps[layer][1] for layer in layers))
    claim = run.take(spec.name, layers)
    sent = partial(run.push_checkpoint, spec.name, layers)
    checkpoints = Checkpoints(folder, key, study.training.checkpoint_minutes, session.say, claim.check, sent)
    notes = JobNotes(run, spec.name, layers, session.device_name, attempt)
    with (
        notes.kept_fresh(),
        run.steps(dict(steps[layer] for layer in layers), claim.check) as files,
        open_journals(run, study, spec.name, layers, training.step_tokens) as journals,
    ):
        source = _activations(session, spec, layers, training, keep=ranks.size == 1)
        probe = next(source.batches(), torch.empty(len(layers), 0, model.d_model))[:, :PROBE_TOKENS].clone()
        trained = train(
            source,
            _specs(session, spec, layers),
            training,
            model=spec.name,
            num_layers=model.num_layers,
            report=partial(_keep_progress, notes, claim, journals, report),
            say=session.say,
            checkpoints=checkpoints,
            ranks=ranks,
        )
        claim.check()
        for column, layer in enumerate(layers):
            run.remove_twins(spec.name, layer)  # of an earlier training
            if layer in trained.failed:
                del files[steps[layer][0]]
                continue
            for twin, dictionaries in enumerate((trained.own, *trained.twins)):
                dictionary = dictionaries[layer]
                dictionary.metadata.update(place_of(session, spec, layer) | _training_facts(session, spec))
                names = save_dictionary(dictionary, run.layer_folder(spec.name, layer, twin), probe[column])
                files[steps[layer][0]] += [f"{run.layer_name(spec.name, layer, twin)}/{name}" for name in names]
    run.remove_checkpoint(spec.name, layers)
    run.forget_job(spec.name, layers)
    return list(trained.failed.values())


def _help(session: Session, spec: ModelSpec, layers: list[int], training: TrainingSpec, ranks: Ranks) -> None:
    """What a rank other than the first does of a block: its share of the arithmetic."""
    source = _activations(session, spec, layers, training, keep=False)
    depth = session.model(spec.name).num_layers
    train(source, _specs(session, spec, layers), training, model=spec.name, num_layers=depth, ranks=ranks)


def _specs(session: Session, spec: ModelSpec, layers: Sequence[int]) -> dict[int, DictionarySpec]:
    return {layer: session.study.dictionary_for(spec).at_layer(layer) for layer in layers}


def divide_begun(session: Session, model: str, layers: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Blocks among these layers whose training was begun, and the layers of none: only as they are can blocks go on from their
    checkpoints.
    """
    blocks, left = [], set(layers)
    for first, last in session.run.begun(model):
        block = [layer for layer in layers if first <= layer <= last]
        if block and (block[0], block[-1]) == (first, last) and left.issuperset(block):
            blocks.append(block)
            left -= set(block)
    return blocks, sorted(left)


def _blocks(
    session: Session, spec: ModelSpec, layers: list[int], training: TrainingSpec, by_autograd: bool
) -> tuple[list[list[int]], bool]:
    """The layers in blocks that fit into the memory that is free, after those that were begun; and whether any was."""
    begun, left = divide_begun(session, spec.name, layers)
    return begun + (_split(session, spec, left, training, by_autograd) if left else []), bool(begun)


def _split(
    session: Session, spec: ModelSpec, layers: list[int], training: TrainingSpec, by_autograd: bool
) -> list[list[int]]:
    """The layers in blocks that fit into the memory that is free."""
    model, study = session.model(spec.name), session.study
    total = training.tokens * training.epochs
    tokens = chunk_tokens(model.d_model, training.step_tokens, total, model.num_layers)
    rounded = (
        harvests_in_bfloat16(training.precision, session.device, model.d_model) or model.hf.dtype == torch.bfloat16
    )
    sizes = []
    for layer in layers:
        wanted = study.dictionary_for(spec).at_layer(layer)
        fast = not by_autograd and compiled.can_train(ARCHITECTURES.load(wanted.architecture).name, session.device)
        width = wanted.width(model.d_model)
        sizes.append(
            measure_layer(
                model.d_model,
                width,
                tokens,
                training.step_tokens,
                by_autograd=not fast,
                bytes_per_number=2 if rounded else 4,
                num_dictionaries=1 + training.ceiling_seeds,
            ).total
        )
    return split_blocks(layers, sizes, free_bytes(session.device))


# ---- activations


def _activations(
    session: Session, spec: ModelSpec, layers: Sequence[int], training: TrainingSpec, keep: bool
) -> ActivationSource:
    """The study's text as these layers' activations; if `keep`, on disk where they are read again and that is cheaper."""
    model, wanted = session.model(spec.name), training.activation_cache
    if harvests_in_bfloat16(training.precision, session.device, model.d_model):
        model = model.in_dtype(torch.bfloat16)
    rows = partial(_open_rows, session, spec.name)
    text = partial(TextSource, model, layers, rows, num_tokens=training.tokens)
    bytes_on_disk = model.hf.dtype.itemsize * training.tokens * len(layers) * model.d_model
    folder = session.run.checkpoint_folder(spec.name, layers) / "activations"
    if not keep or wanted == "off" or training.epochs == 1:
        return text(epochs=training.epochs)
    if wanted == "auto" and not _cache_is_cheaper(session, text(), bytes_on_disk, training):
        return text(epochs=training.epochs)
    return CachedSource(
        text(),
        folder,
        num_tokens=training.tokens,
        epochs=training.epochs,
        key=digest_key(*(train_steps(session, spec)[layer][1] for layer in layers)),
        device=session.device,
        say=session.say,
    )


def _cache_is_cheaper(session: Session, text: TextSource, bytes_on_disk: int, training: TrainingSpec) -> bool:
    """True if reading activations from disk takes less time than computing them, and they take no more than half of its room.

    A look at the first batches decides; either way gives the same activations.
    """
    if 2 * bytes_on_disk > shutil.disk_usage(session.run.root).free:
        return False
    next(text.batches(), None)  # the first of a process is slow
    started = time.perf_counter()
    batches = list(islice(text.batches(), threads_of(torch.device(session.device))))  # computed beside one another
    num_tokens = sum(x_LND.shape[1] for x_LND in batches)
    if not num_tokens:
        return False
    passes = training.epochs - 1
    computing = passes * (time.perf_counter() - started) * training.tokens / num_tokens
    return (1 + passes) * bytes_on_disk / DISK_BYTES_PER_SECOND < computing


def _open_rows(session: Session, name: str) -> Iterable[TokenRows]:
    """The training text as a model's tokens, a forward pass at a time."""
    model, context = session.model(name), session.context(name)
    return _rows_of(session.study, model.tokenizer, context, tokens_of_a_pass(model))


def _rows_of(study: Study, tokenizer: Any, context: int, num_tokens: int) -> Iterable[TokenRows]:
    documents = read_documents(study.data, "train", study.training.seed)
    return stream_rows(documents, tokenizer, context, max(1, num_tokens // context), study.data.keep_special_tokens)


def _tokens_of_an_epoch(session: Session, name: str) -> int:
    """The study's tokens, or as many as its text has: the learning rate has to know when training ends."""
    wanted = session.study.training.tokens
    count = count_tokens(session.study, session.model(name).tokenizer, session.context(name))
    if count < wanted:
        session.say(f"{name}: the text has {count:,} tokens to train on, less than the {wanted:,} asked for")
    return count


def count_tokens(study: Study, tokenizer: Any, context: int) -> int:
    """Tokens of an epoch: the study's, or as many as its text has if those are fewer."""
    wanted, size, count = study.training.tokens, measure_text(study.data), 0
    if size is None or size > MOST_BYTES_PER_TOKEN * wanted:
        return wanted
    for rows in _rows_of(study, tokenizer, context, TOKENS_COUNTED_AT_ONCE):
        count += rows.num_tokens
        if count >= wanted:
            return wanted
    return count


# ---- what is kept of it


def _keep_progress(
    notes: JobNotes, claim: Claim, journals: Sequence[Journal], report: Report, progress: Progress
) -> None:
    """Report a training's progress, write it down, and keep the latest for `throughline status`."""
    claim.glance()
    notes.note(**{name: value for name, value in asdict(progress).items() if name not in ("model", "layers")})
    for journal in journals:
        journal.write(progress)
    report(progress)


def place_of(session: Session, spec: ModelSpec, layer: int) -> dict[str, Any]:
    """Where a dictionary belongs, in SAELens' words."""
    path = session.model(spec.name).module_path(layer)
    return {
        "model_name": spec.path if spec.weights == "trained" and not spec.path.startswith("/") else spec.name,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": path,
        "hf_hook_name": path,
        "hook_head_index": None,
        "layer": layer,
    }


def _said_of_bos(session: Session, spec: ModelSpec) -> str:
    tokenizer, wanted = session.model(spec.name).tokenizer, session.study.data.bos
    begins = f"each text begins with {bos_token(tokenizer)}" if adds_bos(tokenizer) else "texts begin without BOS"
    return begins + (", as the tokenizer has it" if wanted == "auto" else "")


def _training_facts(session: Session, spec: ModelSpec) -> dict[str, Any]:
    """What it was trained on, in SAELens' words."""
    data = session.study.data
    return {
        "context_size": session.context(spec.name),
        "dataset_path": data.path if not data.path.startswith("/") else data.path.rpartition("/")[2],
        "prepend_bos": adds_bos(session.model(spec.name).tokenizer),
        "exclude_special_tokens": not data.keep_special_tokens,
    }
