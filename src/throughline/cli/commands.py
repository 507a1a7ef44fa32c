"""The commands: each parses, calls the function of the same name in `throughline.api`, and prints what it returns."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from throughline.cli import render
from throughline.cli.live import Live

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Follow a language model's reasoning through every layer.",
)

Study = Annotated[Path, typer.Argument(help="the study file", show_default=False)]
Run = Annotated[Path, typer.Argument(help="the run folder", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="the prompt, in quotes", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="run folder; default runs/<name of the study>", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="change a setting: a.b=value", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="continue an existing run, or start it")]
Force = Annotated[bool, typer.Option("--force", help="go on though dictionaries failed the quality gate")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda[:n] or mps; default the best there is", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(version_of("throughline"))
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
    short: Annotated[bool, typer.Option("--short", help="two models and less text, for a quick check")] = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """The whole pipeline on the four bundled models, offline; prints a trace and where the report is."""
    from throughline import api

    with Live(quiet) as live:
        finished = api.demo(out, short=short, device=device, say=live.say, progress=live.progress)
    if not quiet:
        render.finished(finished, model="zoo/pythia")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="where to write it")] = Path("study.yaml"),
    preset: Annotated[str, typer.Option(help="commented, or seed98: the study of 98 dictionaries")] = "commented",
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
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train, evaluate, describe, label, relate, trace and report; what is done is skipped."""
    from throughline import api

    with Live(quiet) as live:
        finished = api.run(study, out, settings, resume, force, device, live.say, live.progress)
    if not quiet:
        render.finished(finished)


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

    with Live(quiet) as live:
        made = api.train(study, out, settings, resume, device, live.say, live.progress)
    if not quiet:
        typer.echo(f"trained; evaluate with: throughline evaluate {made.root}")


@app.command()
def status(run: Run, as_json: AsJson = False) -> None:
    """What is done, running, waiting or failed, by model and layer."""
    from throughline import api

    found = api.status(run)
    _print(found, as_json, render.status)


@app.command()
def evaluate(run: Run, device: Device = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Quality of every dictionary on held-out text; exits with 1 if one fails the gate."""
    from throughline import api

    with Live(quiet or as_json) as live:
        qualities = api.evaluate(run, device, live.say)
    if not quiet:
        _print([q.model_dump() for q in qualities] if as_json else qualities, as_json, render.qualities)
    if any(not q.passed for q in qualities):
        raise typer.Exit(1)


@app.command()
def features(
    run: Run, force: Force = False, device: Device = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Statistics and contexts of every feature."""
    from throughline import api

    with Live(quiet or as_json) as live:
        tables = api.features(run, force, device, live.say)
    if not quiet:
        _print({k: t.to_dicts() for k, t in tables.items()} if as_json else tables, as_json, render.features)


@app.command()
def label(run: Run, force: Force = False, device: Device = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Label features, with held-out scores and coverage."""
    from throughline import api

    with Live(quiet or as_json) as live:
        tables = api.label(run, force, device, live.say)
    if not quiet:
        bar = api.load(run).study().features.bar
        _print(
            {k: t.to_dicts() for k, t in tables.items()} if as_json else tables,
            as_json,
            lambda t: render.coverage(t, bar),
        )


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
    """How dictionaries and features carry over between layers and models."""
    from throughline import api

    with Live(quiet or as_json) as live:
        infos = api.transfer(run, metric, force, device, live.say)
    if not quiet:
        opened = api.load(run)
        results = [opened.transfer(i.metric, i.source, i.target) for i in infos]
        _print([i.model_dump() for i in infos] if as_json else results, as_json, render.transfers)


@app.command()
def report(run: Run) -> None:
    """Figures, analysis and the one-file page."""
    from throughline import api

    typer.echo(f"report: {api.report(run)}")


@app.command()
def trace(
    run: Run,
    prompt: Prompt,
    model: Annotated[str | None, typer.Option(help="which model of the run", show_default=False)] = None,
    force: Force = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Follow a prompt through every layer: features, their effects when off, the answer."""
    from throughline import api

    found = api.trace(run, prompt, model, force, device)
    _print(found.model_dump() if as_json else found, as_json, render.trace)


@app.command()
def compare(
    run: Run,
    prompt: Prompt,
    models: Annotated[list[str] | None, typer.Option("--model", help="which models", show_default=False)] = None,
    force: Force = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The same prompt in several models: what is shared, what is specific."""
    from throughline import api

    found = api.compare(run, prompt, models, force, device)
    _print(found.model_dump() if as_json else found, as_json, render.comparison)


def _print(value: Any, as_json: bool, show: Any) -> None:
    if as_json:
        json.dump(value, sys.stdout, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        show(value)
