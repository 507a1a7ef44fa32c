"""Every command as a Python function of the same name and arguments.

Functions that compute take a run (its folder, or its URL as a string) or a study file to start from, a device, and `say`, which
receives a line of news now and then. They return records; nothing is printed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import polars as pl
import yaml

from throughline.early_checks import check_asked_prompt, check_device_name, check_study_early
from throughline.errors import InputError
from throughline.lean_imports import leave_out_unused
from throughline.model_files import check_files
from throughline.records import Analysis, Comparison, ComparisonTotals, LayerQuality, Plan, Trace, TransferInfo
from throughline.registry import METRICS, unknown
from throughline.run_dir import DRIVER, RunDir
from throughline.study import DictionarySpec, Study, TrainingSpec, dump_study, load_study, parse_study
from throughline.study_fields import write_study

if TYPE_CHECKING:
    import torch

    from throughline.asking import Approve
    from throughline.dictionaries import Dictionary
    from throughline.interop import ImportedDictionary

Say = Callable[[str], None]
PRESETS = ("commented", "seed98", "seed98-modern")


def ignore(progress: Any) -> None:
    """Pay progress no attention."""


def silent(line: str) -> None:
    """Say nothing."""


def best_device() -> str:
    """cuda, mps or cpu: the best there is. Asked only by commands that compute."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(wanted: "str | torch.device | None") -> str:
    """The wanted device by its name, or the best there is; InputError for one that this machine has not."""
    if wanted is None:
        return best_device()
    if not isinstance(wanted, str):
        import torch

        wanted = str(wanted) if isinstance(wanted, torch.device) else repr(wanted)
    check_device_name(wanted)
    import torch

    kind, _, number = wanted.partition(":")
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[kind]
    if int(number or 0) >= there:
        raise InputError(f"device {wanted} is not there; this machine has {there or 'no'} {kind}; try --device cpu")
    return wanted


def load_run(run: str | Path) -> RunDir:
    """A run folder, opened for reading; InputError if it is none."""
    return RunDir.open(run)


def init(path: str | Path = "study.yaml", preset: str = "commented") -> Path:
    """Write a study file to start from; InputError if `path` exists."""
    if preset not in PRESETS:
        raise InputError(unknown("preset", preset, list(PRESETS)))
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists; give another name")
    shipped = files("throughline") / "presets" / f"{preset}.yaml"
    text = shipped.read_text(encoding="utf-8")
    path.write_text(write_study(yaml.safe_load(text)) if preset == "commented" else text, encoding="utf-8")
    return path


def plan(
    study: str | Path,
    devices: str | None = None,
    settings: list[str] | None = None,
    out: str | Path | None = None,
    say: Say = silent,
) -> Plan:
    """What the training of a study takes and which device does what of it; nothing is written.

    `devices` such as 3x48GiB,1x24GiB@l4 (their rates are assumed); without, those of this machine, measured for a few seconds.
    `out` is an existing run: layers that it has from the same settings are skipped. InputError if something fits on no device.
    """
    loaded = load_study(study, settings)
    from throughline.planning.devices import parse_devices

    named = None if devices is None else parse_devices(devices)
    run = None if out is None else RunDir.open(out)
    for spec in loaded.models:
        check_files(spec)
    leave_out_unused()
    from throughline.planning.calibration import find_devices
    from throughline.planning.studies import count_models, place_models
    from throughline.text import announce_hub

    announce_hub(loaded.data, say)
    counted = count_models(loaded, run.manifest(), run.imported) if run else count_models(loaded, {})
    if named is None:
        say("measuring this machine")
        named = find_devices(loaded.training.precision)
    return place_models(loaded, counted, named)


@overload
def train(
    study: str | Path,
    out: str | Path | None = None,
    settings: list[str] | None = None,
    resume: bool = False,
    device: str | None = None,
    say: Say = silent,
    progress: Callable[[Any], None] = ignore,
) -> RunDir: ...


@overload
def train(
    *,
    activations: Any,
    out: str | Path | None = None,
    dictionary: DictionarySpec | dict[str, Any] | None = None,
    training: TrainingSpec | dict[str, Any] | None = None,
    layers: list[str] | None = None,
    name: str = "activations",
    resume: bool = False,
    device: "str | torch.device | None" = None,
    say: Say = silent,
    progress: Callable[[Any], None] = ignore,
) -> "dict[str, Dictionary]": ...


def train(
    study: str | Path | None = None,
    out: str | Path | None = None,
    settings: list[str] | None = None,
    resume: bool = False,
    device: "str | torch.device | None" = None,
    say: Say = silent,
    progress: Callable[[Any], None] = ignore,
    *,
    activations: Any = None,
    dictionary: DictionarySpec | dict[str, Any] | None = None,
    training: TrainingSpec | dict[str, Any] | None = None,
    layers: list[str] | None = None,
    name: str = "activations",
) -> "RunDir | dict[str, Dictionary]":
    """Train the dictionaries of a study; returns the run. InputError if `out` has a run already, unless `resume`.

    Or of `activations`, without a language model; returns the dictionaries by layer. `activations`: an array [N, D] (one
    layer) or [L, N, D], a folder of .npy or .safetensors files of such arrays, an iterator of them, a function that makes
    one (needed for several epochs), or an ActivationSource. `dictionary` and `training` are those of a study file;
    `training.tokens` is the length of the array unless given. `layers` names the L layers. With `out` each layer's
    dictionary is saved in a folder of its name there, as SAELens saves it; a training that was stopped goes on with `resume`,
    to the same bits, if the activations are the same.
    """
    if activations is not None:
        if study is not None or settings:
            raise InputError(
                "train takes a study or activations, found both; settings are given as dictionary and training"
            )
        from throughline.activations import train_on_activations

        return train_on_activations(
            activations,
            out,
            dictionary=dictionary,
            training=training,
            layers=layers,
            name=name,
            resume=resume,
            device=choose_device(device),
            say=say,
            report=progress,
        )
    if study is None:
        raise InputError("train needs a study file, or activations=…")
    if dictionary or training or layers:
        raise InputError(
            "dictionary, training and layers go with activations; a study file has its own (change it with settings)"
        )
    with _begin(load_study(study, settings), out, resume, device, say) as session:
        from throughline.pipeline import advance_models, train_models

        with session.noting_seconds():
            advance_models(session, progress, ["train"])
            train_models(session, progress)
        return session.run


def evaluate(run: str | Path | RunDir, device: str | None = None, say: Say = silent) -> list[LayerQuality]:
    """Quality of every layer's dictionary on held-out text."""
    with _session(run, device, say) as session:
        from throughline.pipeline import evaluate_models

        _require_trained(session)
        with session.noting_seconds():
            return evaluate_models(session)


def features(
    run: str | Path | RunDir, force: bool = False, device: str | None = None, say: Say = silent
) -> dict[str, pl.DataFrame]:
    """Statistics of every feature, by model (FEATURE_COLUMNS). GateError if a dictionary failed the gate, unless `force`."""
    with _session(run, device, say) as session:
        from throughline.pipeline import describe_models

        _require_evaluated(session, force)
        with session.noting_seconds():
            describe_models(session)
        return {spec.name: session.run.table(spec.name, "features") for spec in session.study.models}


def label(
    run: str | Path | RunDir,
    force: bool = False,
    device: str | None = None,
    say: Say = silent,
    *,
    labeler: str | None = None,
    llm: dict[str, Any] | None = None,
    approve: "Approve | None" = None,
) -> dict[str, pl.DataFrame]:
    """Labels of every feature with their scores, by model (LABEL_COLUMNS).

    `labeler` is added to the study's, and `llm` changes settings of its `features.llm`; the run's study keeps both. An endpoint
    is asked only if `approve`, which is told what that costs, returns True.
    """
    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    study = _with_labeler(opened.study(), labeler, llm)
    with opened.held() if study.features.asked else nullcontext(), _session(opened, device, say) as session:
        from throughline.asking import check_asked, refuse
        from throughline.pipeline import label_models

        check_asked(study)
        _require_evaluated(session, force)
        session.study = study
        with session.noting_seconds():
            label_models(session, approve or refuse)
        if study != opened.study():
            opened.write_text("study.yaml", dump_study(study))
        return {spec.name: session.run.table(spec.name, "labels") for spec in session.study.models}


def _with_labeler(study: Study, labeler: str | None, llm: dict[str, Any] | None) -> Study:
    tree = study.model_dump(mode="json")
    features = tree["features"]
    if labeler and labeler not in features["labelers"]:
        features["labelers"] = [*features["labelers"], labeler]
    if llm:
        other = {"path": "base_url", "base_url": "path"}  # one takes the place of the other
        cleared = {other[name]: None for name in llm if name in other}
        features["llm"] = (features["llm"] or {}) | cleared | llm
    return parse_study(tree, "label")


def coverage(run: str | Path) -> dict[str, tuple[pl.DataFrame, pl.DataFrame]]:
    """By model: how many features have a good label (COVERAGE_COLUMNS), and the best of each family (FAMILY_COLUMNS).

    Raises InputError if the run has no labels yet.
    """
    opened = load_run(run)
    return {
        spec.name: (opened.table(spec.name, "coverage"), opened.table(spec.name, "families"))
        for spec in opened.study().models
    }


def transfer(
    run: str | Path | RunDir,
    metric: str | None = None,
    force: bool = False,
    device: str | None = None,
    say: Say = silent,
) -> list[TransferInfo]:
    """Transfer matrices of the study's metrics, or of one. InputError, before anything is computed, if there is no such metric."""
    if metric:
        METRICS.load(metric)
    with _session(run, device, say) as session:
        from throughline.pipeline import transfer_models

        _require_evaluated(session, force)
        with session.noting_seconds():
            return transfer_models(session, [metric] if metric else None)


def report(run: str | Path | RunDir) -> Path:
    """Figures, analysis and the one-file page; returns the page. Needs no torch."""
    from throughline.report import write_report

    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    _analyze(opened)
    return write_report(opened)


def trace(
    run: str | Path | RunDir,
    prompt: str,
    model: str | None = None,
    off: str | None = None,
    against: str | None = None,
    linearization: str = "grouped",
    settings: list[str] | None = None,
    verify: bool = True,
    force: bool = False,
    device: str | None = None,
    say: Say = silent,
    *,
    chat: bool = False,
    answer: str | None = None,
    rival: str | None = None,
) -> Trace:
    """One prompt followed through every layer of a model.

    `off` is mean, counterfactual or zero (None: a counterfactual where one can be made, or else the mean), `against` a
    counterfactual prompt, `linearization` grouped, plain, frozen or integrated, `settings` features set by hand such
    as "layer=4,feature=237,off" or "layer=4,feature=237,x2". With `chat` the prompt is put into the model's chat template.
    `answer` is the answer to explain, whether the model gives it or not, and `rival` what it is held against. Without either
    the whole answer is explained where the prompt is a task that is known, and otherwise the next token.
    """
    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    check_asked_prompt(opened, prompt, [model])
    with _session(opened, device, say) as session:
        from throughline import pipeline

        options = pipeline.trace_options(
            session.study, off, against, linearization, settings or [], verify, chat, answer, rival
        )
        return pipeline.trace(session, prompt, model, force, options)


def compare(
    run: str | Path | RunDir,
    prompt: str,
    models: list[str] | None = None,
    force: bool = False,
    device: str | None = None,
    say: Say = silent,
) -> Comparison:
    """One prompt in several models (all of the run, unless named)."""
    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    check_asked_prompt(opened, prompt, models or [])
    with _session(opened, device, say) as session:
        from throughline import pipeline

        return pipeline.compare(session, prompt, models, force)


def compare_prompts(
    run: str | Path | RunDir,
    prompts: str | Path | Sequence[str],
    models: list[str] | None = None,
    force: bool = False,
    device: str | None = None,
    say: Say = silent,
) -> ComparisonTotals:
    """Many prompts in several models, in total: `throughline compare --prompts`.

    `prompts` is a list of prompts, or the name of a text file with one a line. Prompts are read, not traced, which takes
    milliseconds a prompt.
    """
    with _session(run, device, say) as session:
        from throughline import pipeline
        from throughline.tracing import Prompt, list_prompts

        if isinstance(prompts, str | Path):
            listed = list_prompts(Path(prompts))
        else:
            listed = [Prompt(f"prompt {i}", text) for i, text in enumerate(prompts, 1)]
        if not listed:
            raise InputError('there are no prompts; give a list of one or more, such as ["What is 15 + 27?"]')
        return pipeline.compare_prompts(session, listed, models, force)


def import_sae(
    run: str | Path,
    path: str | Path,
    layer: int,
    model: str | None = None,
    from_: str = "auto",
    study: str | Path | None = None,
    device: str | None = None,
    say: Say = silent,
) -> "ImportedDictionary":
    """Put a dictionary trained elsewhere into a run at its layer; with `study`, the run is made if it is not there yet.

    `from_` is saelens, sparsify, gemma-scope or dictionary-learning; auto tells it from the files. The layer counts as trained.
    """
    (RunDir.open(run).study() if study is None else load_study(study)).model(model)  # refused before torch is imported
    working = (
        _go_on(run, device, say)
        if study is None
        else _begin(load_study(study), run, True, device, say, same_study=True)
    )
    with working as session:
        from throughline.interop import import_dictionary

        return import_dictionary(session, Path(path), model, layer, from_)


def export_sae(
    run: str | Path | RunDir,
    to: str,
    out: str | Path,
    model: str | None = None,
    layers: list[int] | None = None,
    hub_layout: bool = False,
) -> list[Path]:
    """Write a run's dictionaries in another project's format; returns their folders.

    `hub_layout` (saelens): a folder by hook and a model card with their quality, ready to upload.
    """
    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    if model is not None:
        opened.study().model(model)  # refused before torch is imported
    from throughline.interop import export_dictionaries

    return export_dictionaries(opened, to, Path(out), model, layers, hub_layout)


@dataclass(frozen=True)
class Finished:
    """What `run` made."""

    run: RunDir
    page: Path
    traces: list[Trace]
    comparisons: list[Comparison]
    seconds: dict[str, float]  # of each stage this time; models that went side by side are summed
    total_seconds: float  # by the clock
    overlap_seconds: float | None = None  # that models side by side spent at once; None if they went one after another


def run(
    study: str | Path,
    out: str | Path | None = None,
    settings: list[str] | None = None,
    resume: bool = False,
    force: bool = False,
    device: str | None = None,
    say: Say = silent,
    progress: Callable[[Any], None] = ignore,
    approve: "Approve | None" = None,
    first: str | None = None,
    on_trace: Callable[[Trace], None] | None = None,
    same_study: bool = False,
) -> Finished:
    """Train, evaluate, describe, label, relate, trace and report; what is done from the same settings is skipped.

    `resume` goes on with a run that is there, also from changed settings; with `same_study` InputError if they changed.
    A study whose labels an endpoint is asked for needs `approve`, which is told what that costs and returns True or False.
    Where models go side by side, `on_trace` is given a trace of the study's first prompt, if it has one, in the model `first` as
    soon as that has labels.
    """
    started = time.perf_counter()
    loaded = load_study(study, settings)
    asked = loaded.features.asked
    if asked and asked.base_url and approve is None:  # hours before the question would come
        raise InputError(f"features.labelers has llm, which sends texts to {asked.base_url}; --yes lets it")
    working = _begin(loaded, out, resume, device, say, same_study=same_study)
    with working as session, session.noting_seconds() as spent:
        from throughline import pipeline

        say(f"{loaded.name}: {', '.join(spec.name for spec in loaded.models)}; into {place_of(loaded, out)}")
        pipeline.advance_models(session, progress, force=force, first=first, on_trace=on_trace)
        pipeline.train_models(session, progress)
        pipeline.evaluate_models(session)
        session.require_gate(force)
        pipeline.describe_models(session)
        pipeline.label_models(session, *([approve] if approve else []))
        pipeline.transfer_models(session)
        pipeline.trace_prompts(session, force)
        say("writing the report")
        with session.timed("report"):
            page = report(session.run)
    done = session.run
    total = time.perf_counter() - started
    return Finished(done, page, done.traces(), done.comparisons(), spent, total, session.overlap_seconds)


def demo(
    out: str | Path | None = None,
    short: bool = False,
    device: str | None = None,
    say: Say = silent,
    progress: Callable[[Any], None] = ignore,
    on_trace: Callable[[Trace], None] | None = None,
) -> Finished:
    """The whole road on the four bundled models, offline. `short` takes two models and half of the text.

    Goes on with a demo that was stopped; InputError if another run lies at `out` (None: `place_of_demo`).
    """
    preset = str(files("throughline") / "presets" / "demo.yaml")
    settings: list[str] = list(SHORT_DEMO) if short else []
    return run(
        preset,
        place_of_demo(out, short),
        settings,
        resume=True,
        same_study=True,
        device=device,
        say=say,
        progress=progress,
        first=DEMO_TRACED,
        on_trace=on_trace,
    )


def place_of_demo(out: str | Path | None, short: bool) -> str | Path:
    """Where the demo's run lies: `out`, or runs/demo, or runs/demo-short."""
    return out or ("runs/demo-short" if short else "runs/demo")


DEMO_TRACED = "zoo/pythia"  # whose trace the demo prints


SHORT_DEMO = (
    "models=[zoo/pythia, zoo/gpt2]",
    "training.tokens=60000",
    "evaluation.tokens=10000",
    "evaluation.sample_tokens=5000",
    "evaluation.spliced_tokens=3000",
)


def status(run: str | Path | RunDir) -> dict[str, Any]:
    """What is done, running, waiting, stopped or failed (`progress.read_status`)."""
    from throughline.progress import read_status

    return read_status(run if isinstance(run, RunDir) else RunDir.open(run))


def serve(
    run: str | Path | RunDir,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    device: str | None = None,
    say: Say = silent,
) -> None:
    """A run in a browser, and prompts traced there, until Ctrl-C. Reading it needs no torch.

    A `host` that other machines reach needs a `token`. Port 0 takes a free one; `say` is told which.
    """
    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    opened.study()  # damaged, they are named now and not in the browser
    opened.info()
    if device is not None:
        choose_device(device)  # now, not with the first trace
    from throughline.serving.server import serve as serve_run

    serve_run(opened, host, port, token, device, say)


def place_of(study: Study, out: str | Path | None) -> str | Path:
    """Where a study's run lies: `out`, or runs/<name>."""
    return Path("runs") / study.name if out is None else out


@contextmanager
def _begin(
    study: Study,
    out: str | Path | None,
    resume: bool,
    device: "str | torch.device | None",
    say: Say,
    *,
    same_study: bool = False,
) -> Iterator[Any]:
    """A session of the study's run, held while the block runs; nothing is written before all that can be checked is right.

    A run that is there takes the settings of `study` in place of its own, unless that is another study, or `same_study`.
    """
    place = place_of(study, out)
    storage = RunDir(place).storage
    storage.require_folder()
    if any(name != DRIVER for name in storage.children()):
        if not storage.has("run.json"):
            raise InputError(f"{place} is not empty and not a run folder; give another with --out")
        if not resume:
            raise InputError(f"{place} holds a run already; continue it with --resume, or give another with --out")
        if storage.has("study.yaml"):  # not yet where the run was stopped at once
            _refuse_another_study(RunDir(place), study, same_study)
    check_device_name(device)
    check_study_early(study)
    leave_out_unused()
    from throughline.pipeline import check_study
    from throughline.session import Session

    chosen = choose_device(device)
    depths = check_study(study, say)
    with RunDir(place).held():
        run = RunDir.create(place, study)
        run.update_info(random_weights=[spec.name for spec in study.models if spec.weights == "random"], depths=depths)
        yield Session(run, chosen, say)


def _refuse_another_study(run: RunDir, wanted: Study, same_settings: bool) -> None:
    """InputError if a run is of a study of another name, or with `same_settings` of one that differs in anything."""
    # as plain values: the run may be of a version that had other fields
    there, new = (yaml.safe_load(text) for text in (run.read_text("study.yaml"), dump_study(wanted)))
    if there == new or (there.get("name") == wanted.name and not same_settings):
        return
    parts = [name for name in new if name != "name" and there.get(name) != new[name]]
    models = ", ".join(spec["name"] or spec["path"] for spec in there.get("models", []))
    differs = f", with other settings in {', '.join(parts)}" if parts else ""
    raise InputError(
        f"{run.place} holds the run of study {there.get('name')!r} ({models}){differs}; "
        "give another folder with --out, or remove this one"
    )


@contextmanager
def _session(run: str | Path | RunDir, device: str | None, say: Say) -> Iterator[Any]:
    opened = run if isinstance(run, RunDir) else RunDir.open(run)
    check_device_name(device)
    leave_out_unused()
    from throughline.session import Session

    yield Session(opened, choose_device(device), say)


@contextmanager
def _go_on(run: str | Path, device: str | None, say: Say) -> Iterator[Any]:
    """A session of a run that is there, held while the block runs."""
    opened = RunDir.open(run)
    with opened.held(), _session(opened, device, say) as session:
        yield session


def _require_trained(session: Any) -> None:
    missing = []
    for spec in session.study.models:
        wanted, trained = session.layers(spec), session.run.trained_layers(spec.name)
        left = [str(layer) for layer in wanted if layer not in trained]
        if left:
            missing.append(spec.name if len(left) == len(wanted) else f"{spec.name} (layers {', '.join(left)})")
    if missing:
        raise InputError(
            f"{', '.join(missing)} not trained yet; `throughline train STUDY --out {session.run.place} --resume` does it"
        )


def _require_evaluated(session: Any, force: bool) -> None:
    from throughline.pipeline import evaluate_models

    _require_trained(session)
    evaluate_models(session)
    session.require_gate(force)


def _analyze(run: RunDir) -> Analysis | None:
    from throughline.analyzing import analyze_run, write_markdown
    from throughline.records import best_labels

    study = run.study()
    names = [spec.name for spec in study.models]
    if not all(run.has_table(name, "labels") for name in names):
        return None
    labels = {name: best_labels(run.table(name, "labels"), study.features.bar) for name in names}
    tables = {name: run.table(name, "features") for name in names}
    results = [run.transfer(info.metric, info.source, info.target) for info in run.transfers()]
    analysis, throughlines = analyze_run(results, tables, labels, seed=study.training.seed)
    for name, table in throughlines.items():
        run.write_table(name, "throughlines", table)
    run.write_record("analysis.json", analysis)
    run.write_text("analysis.md", write_markdown(analysis, study.name))
    return analysis
