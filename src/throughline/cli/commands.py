"""The commands: each parses, calls the function of the same name in `throughline.api`, and prints what it returns."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Follow a language model's reasoning through every layer.",
)

Study = Annotated[Path, typer.Argument(help="the study file", show_default=False)]
Run = Annotated[str, typer.Argument(help="the run: a folder, or a URL such as s3://bucket/run", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="the prompt, in quotes", show_default=False)]
Out = Annotated[
    str | None, typer.Option(help="run folder, or a URL; default runs/<name of the study>", show_default=False)
]
Set = Annotated[list[str] | None, typer.Option("--set", help="change a setting: a.b=value", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run if there is one, or start it")]
Force = Annotated[bool, typer.Option("--force", help="continue even if dictionaries failed the quality gate")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda[:n] or mps; default the best there is", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]
Yes = Annotated[
    bool, typer.Option("--yes", help="send calls for labels to an endpoint without asking first, whatever they cost")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


# as in throughline.dictionaries.formats, which needs torch; a test compares them
FORMAT_NAMES = ("saelens", "sparsify", "gemma-scope", "dictionary-learning")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        from throughline import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[
        str | None,
        typer.Option(help="run folder, or a URL; default runs/demo, with --short runs/demo-short", show_default=False),
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="two models and less text, for a quick check")] = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """All of it on the four bundled models, offline; prints a trace."""
    from throughline import api
    from throughline.cli import live, render

    place = api.place_of_demo(out, short)
    with live.Live(quiet, place) as news, _figures_of_the_gate(place, quiet):
        finished = api.demo(
            place, short=short, device=device, say=news.say, progress=news.progress, on_trace=news.first_trace
        )
    if not quiet:
        render.finished(finished, model=api.DEMO_TRACED)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="where to write it")] = Path("study.yaml"),
    preset: Annotated[
        str,
        typer.Option(
            help="commented; seed98: a study of 98 dictionaries; seed98-modern: the same models with newer settings"
        ),
    ] = "commented",
) -> None:
    """Write a study file to start from."""
    from throughline import api

    written = api.init(path, preset)
    typer.echo(f"{written} written; start it with: throughline run {written}")


@app.command()
def run(
    study: Study,
    out: Out = None,
    settings: Set = None,
    resume: Resume = False,
    force: Force = False,
    yes: Yes = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train, evaluate, label, relate, trace and report."""
    from throughline import api
    from throughline.cli import live, render

    place = _default_place(study, settings) if out is None else out
    with live.Live(quiet, place) as news, _figures_of_the_gate(place, quiet):
        finished = api.run(study, out, settings, resume, force, device, news.say, news.progress, approve=_approval(yes))
    if not quiet:
        render.finished(finished)


@app.command()
def plan(
    study: Study,
    devices: Annotated[
        str | None,
        typer.Option(
            help="devices to plan for, such as 3x48GiB,1x24GiB@l4; default this machine's, measured", show_default=False
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="an existing run; layers that it has are skipped", show_default=False)
    ] = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What training takes: jobs, memory, disk and time."""
    from throughline import api
    from throughline.cli import live, render

    with live.Live(quiet or as_json) as news:
        made = api.plan(study, devices, settings, out, news.say)
    _print(as_json, made.model_dump(), lambda: render.plan(made), quiet)


@app.command()
def train(
    study: Study,
    out: Out = None,
    settings: Set = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train dictionaries on every wanted layer of every model."""
    from throughline import api
    from throughline.cli import live

    with live.Live(quiet, _default_place(study, settings) if out is None else out) as news:
        made = api.train(study, out, settings, resume, device, news.say, news.progress)
    if not quiet:
        typer.echo(f"trained; evaluate with: throughline evaluate {made.place}")


@app.command()
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="look again every 2 seconds until nothing runs")] = False,
    as_json: AsJson = False,
) -> None:
    """What each device does, and the state of every layer."""
    from throughline import api
    from throughline.cli import live, render

    if watch:
        live.watch(lambda: api.status(run), as_json)
        return
    found = api.status(run)
    _print(as_json, found, lambda: render.status(found))


@app.command()
def evaluate(run: Run, device: Device = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Quality by layer; exits with 1 if one fails the gate."""
    from throughline import api
    from throughline.cli import live, render

    with live.Live(quiet or as_json) as news:
        qualities = api.evaluate(run, device, news.say)
    _print(as_json, [q.model_dump() for q in qualities], lambda: render.qualities(qualities), quiet)
    if any(not q.passed for q in qualities):
        raise typer.Exit(1)


@app.command()
def features(
    run: Run, force: Force = False, device: Device = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Statistics and contexts of every feature."""
    from throughline import api
    from throughline.cli import live, render

    with live.Live(quiet or as_json) as news:
        tables = api.features(run, force, device, news.say)
    _print(as_json, {k: t.to_dicts() for k, t in tables.items()}, lambda: render.features(tables), quiet)


@app.command()
def label(
    run: Run,
    labeler: Annotated[
        str | None, typer.Option(help="add a labeler to the study's: llm asks a language model", show_default=False)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="llm: an OpenAI-compatible URL such as http://localhost:8000/v1", show_default=False),
    ] = None,
    llm_model: Annotated[str | None, typer.Option(help="llm: the model's name there", show_default=False)] = None,
    llm_path: Annotated[
        str | None, typer.Option(help="llm: a local model in place of an endpoint", show_default=False)
    ] = None,
    features: Annotated[
        int | None, typer.Option(help="llm: ask about this many features of each layer", show_default=False)
    ] = None,
    yes: Yes = False,
    force: Force = False,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Label features, with held-out scores and coverage."""
    from throughline import api
    from throughline.cli import live, render

    named = {"base_url": endpoint, "model": llm_model, "path": llm_path, "features": features}
    llm = {name: value for name, value in named.items() if value is not None}
    with live.Live(quiet or as_json) as news:
        tables = api.label(run, force, device, news.say, labeler=labeler, llm=llm, approve=_approval(yes))
    opened, covered = api.load_run(run), api.coverage(run)
    study = opened.study()
    asked = [opened.asked(name) for name in tables] if study.features.asked else []
    reports = [report for report in asked if report]

    def show() -> None:
        render.labels(tables, covered, study.features.bar)
        if reports:
            render.asked_labels(reports, tables, study.features.bar)

    found = {
        model: {
            "labels": labels.to_dicts(),
            "coverage": covered[model][0].to_dicts(),
            "families": covered[model][1].to_dicts(),
        }
        for model, labels in tables.items()
    }
    _print(as_json, found, show, quiet)
    if failed := sum(len(report.failed) for report in reports):
        typer.echo(
            f"{failed} features have no label because calls failed; run the same command again to ask again", err=True
        )
        raise typer.Exit(1)


@app.command()
def transfer(
    run: Run,
    metric: Annotated[
        str | None, typer.Option(help="one metric, or mypackage.module:Metric", show_default=False)
    ] = None,
    force: Force = False,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """How features carry over between layers and models."""
    from throughline import api
    from throughline.cli import live, render

    with live.Live(quiet or as_json) as news:
        infos = api.transfer(run, metric, force, device, news.say)
    opened = api.load_run(run)
    results = [opened.transfer(i.metric, i.source, i.target) for i in infos]
    _print(as_json, [_plain_transfer(r) for r in results], lambda: render.transfers(results), quiet)


@app.command()
def report(run: Run, quiet: Quiet = False) -> None:
    """Figures, analysis and the one-file page."""
    from throughline import api

    page = api.report(run)
    if not quiet:
        typer.echo(f"report: {page}")


@app.command()
def serve(
    run: Run,
    host: Annotated[
        str, typer.Option(help="the address to listen at; an address that other machines reach needs --token")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="THROUGHLINE_TOKEN",
            help="a secret that every request must carry; set the variable instead, since other users can see the command line",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """The run in a browser, and prompts traced there."""
    from throughline import api
    from throughline.cli import live

    with live.Live(quiet) as news:
        api.serve(run, host, port, token, device, news.say)


@app.command()
def trace(
    run: Run,
    prompt: Prompt,
    model: Annotated[
        str | None, typer.Option(help="a model of the run; needed if it has several", show_default=False)
    ] = None,
    off: Annotated[
        str | None,
        typer.Option(
            help="what off is: mean, counterfactual or zero; default counterfactual if one can be made, else mean"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="the counterfactual prompt; it needs as many tokens as the prompt", show_default=False),
    ] = None,
    linearization: Annotated[str, typer.Option(help="grouped, plain, frozen or integrated")] = "grouped",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="set a feature: layer=4,feature=237,off (or x2, or =1.5)", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    answer: Annotated[
        str | None,
        typer.Option(help="the answer to explain, whether the model gives it or not", show_default=False),
    ] = None,
    rival: Annotated[
        str | None,
        typer.Option(help="what the answer is held against: what speaks for it and not for this?", show_default=False),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="a quick look: predictions only")] = False,
    graph: Annotated[
        Path | None, typer.Option(help="write circuit-tracer's graph JSON to this file too", show_default=False)
    ] = None,
    force: Force = False,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Follow a prompt through every layer of a model."""
    from throughline import api
    from throughline.cli import live, traced

    if graph is not None:
        _require_writable(graph)
    with live.Live(quiet or as_json) as news:
        found = api.trace(
            run,
            prompt,
            model,
            off,
            against,
            linearization,
            set_,
            not no_verify,
            force,
            device,
            news.say,
            chat=chat,
            answer=answer,
            rival=rival,
        )
    if graph is not None:
        _write_graph(graph, found)
    _print(as_json, found.model_dump(), lambda: traced.trace(found), quiet)


def _require_writable(graph: Path) -> None:
    """InputError, before anything is traced, if the file cannot be made."""
    from throughline.errors import InputError

    if graph.is_dir():
        raise InputError(f"--graph {graph} is a folder; give the name of a file")
    if not graph.parent.is_dir():
        raise InputError(f"--graph {graph} cannot be written: there is no folder {graph.parent}; make it first")


def _write_graph(path: Path, found: Any) -> None:
    from throughline.circuit_tracer import write_circuit_tracer
    from throughline.errors import InputError

    try:
        path.write_text(json.dumps(write_circuit_tracer(found), ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--graph {path} cannot be written: {error.strerror}") from None


@app.command()
def compare(
    run: Run,
    prompt: Annotated[str | None, typer.Argument(help="the prompt, in quotes", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="a text file of prompts, one a line: totals over them, without traces", show_default=False),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="a model of the run; give the option twice or more; default all", show_default=False
        ),
    ] = None,
    force: Force = False,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """One prompt, or a file of prompts, in several models."""
    from throughline import api
    from throughline.cli import compared, live
    from throughline.errors import InputError

    if (prompt is None) == (prompts is None):
        given = "neither" if prompt is None else "both"
        raise InputError(
            f'compare expects a prompt or a file of prompts, found {given}; type: throughline compare {run} "What is 15 + 27?", '
            f"or: throughline compare {run} --prompts FILE"
        )
    with live.Live(quiet or as_json) as news:
        if prompt is not None:
            one = api.compare(run, prompt, models, force, device, news.say)
            made, show = one.model_dump(), lambda: compared.comparison(one)
        else:
            assert prompts is not None
            many = api.compare_prompts(run, prompts, models, force, device, news.say)
            made, show = many.model_dump(), lambda: compared.totals(many)
    _print(as_json, made, show, quiet)


@app.command(name="import")
def import_sae(
    run: Run,
    path: Annotated[Path, typer.Argument(help="the folder of one dictionary", show_default=False)],
    layer: Annotated[int, typer.Option(help="the layer it is of", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="a model of the run; needed if it has several", show_default=False)
    ] = None,
    from_: Annotated[str, typer.Option("--from", help=f"auto, {', '.join(FORMAT_NAMES)}")] = "auto",
    study: Annotated[
        Path | None, typer.Option(help="make the run from this study file if there is none", show_default=False)
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Put a dictionary trained elsewhere into a run."""
    from throughline import api
    from throughline.cli import live

    with live.Live(quiet) as news:
        made = api.import_sae(run, path, layer, model, from_, study, device, news.say)
    if not quiet:
        typer.echo(
            f"{made.model} layer {made.layer}: {made.architecture} of {made.d_sae:,} features from {made.format}; "
            f"FVU {made.fvu:.4f}, L0 {made.l0:.1f} on {made.num_tokens:,} held-out tokens"
        )


@app.command(name="export")
def export_sae(
    run: Run,
    to: Annotated[str, typer.Option(help=", ".join(FORMAT_NAMES), show_default=False)],
    out: Annotated[Path, typer.Option(help="a new folder", show_default=False)],
    model: Annotated[str | None, typer.Option(help="one model; default all", show_default=False)] = None,
    layers: Annotated[str | None, typer.Option(help="such as 0-3,6; default all", show_default=False)] = None,
    hub_layout: Annotated[
        bool, typer.Option("--hub-layout", help="saelens: folders by hook and a model card, ready to upload")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's dictionaries in another project's format."""
    from throughline import api

    written = api.export_sae(run, to, out, model, parse_layers(layers), hub_layout)
    if not quiet:
        typer.echo(f"{len(written)} dictionaries in {out}")


def parse_layers(text: str | None) -> list[int] | None:
    """`0-3,6` as 0, 1, 2, 3 and 6; InputError for anything else."""
    if text is None:
        return None
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    if any(part is None for part in parts):
        from throughline.errors import InputError

        raise InputError(f"--layers expects numbers and spans such as 0-3,6, found {text!r}")
    return sorted({i for part in parts if part for i in range(int(part[1]), int(part[2] or part[1]) + 1)})


def _print(as_json: bool, value: Any, show: Callable[[], None], quiet: bool = False) -> None:
    """The result as JSON, or shown unless quiet."""
    if as_json:
        json.dump(_finite(value), sys.stdout, ensure_ascii=False, allow_nan=False)
        sys.stdout.write("\n")
    elif not quiet:
        show()


def _approval(yes: bool) -> Callable[[str], bool] | None:
    """Whether calls that may cost money are made: as --yes says, or as is answered on a terminal; None where nobody can answer."""
    if yes:
        return lambda cost: True
    return (lambda cost: typer.confirm("send them?", err=True)) if sys.stdin.isatty() else None


def _finite(value: Any) -> Any:
    """Plain values with null in place of NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _plain_transfer(result: Any) -> dict[str, Any]:
    """What a transfer result is, and its matrices by layer pair."""
    matrices = {name: array.tolist() for name, array in result.arrays.items() if array.ndim == 2 and name != "live"}
    return result.info.model_dump() | {"arrays": matrices}


def _default_place(study: Path, settings: list[str] | None) -> str | Path:
    from throughline.api import place_of
    from throughline.study import load_study

    return place_of(load_study(study, settings), None)


@contextmanager
def _figures_of_the_gate(place: str | Path, quiet: bool) -> Iterator[None]:
    """Shows the quality of all dictionaries if the gate stops the command inside."""
    from throughline.errors import GateError

    try:
        yield
    except GateError:
        if not quiet:
            from throughline import api
            from throughline.cli import render

            run = api.load_run(place)
            render.qualities([quality for spec in run.study().models for quality in run.quality(spec.name)])
        raise
