"""What commands print: tables and the text reading of a trace. Colour only on a terminal; text from data is never markup."""

import time
from datetime import datetime
from statistics import mean
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from throughline.records import (
    AskedLabels,
    Label,
    LayerQuality,
    Plan,
    TransferResult,
    best_labels,
    best_of_families,
    describe_bytes,
    reaches,
    span,
)

PLAIN_WIDTH = 118
MOST_JOBS = 40  # that a plan lists one by one
MOST_NAMED = 6  # features that have no label for the same reason


def console() -> Console:
    """Standard output; of a readable width where it is no terminal."""
    found = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH)


def _table(*columns: str, words: int = 1) -> Table:
    """A table without lines: the first `words` columns are words, the others numbers, set to the right."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words or column == "gate" else "right")
    return table


def finished(done: Any, model: str | None = None) -> None:
    """What a whole run made: quality, a trace, and where the page is."""
    out = console()
    models = [spec.name for spec in done.run.study().models]
    qualities([q for name in models for q in done.run.quality(name)])
    wanted = model if model in models else models[0]
    chosen = next((t for t in done.traces if t.model == wanted), None)
    if chosen:
        out.print()
        from throughline.cli.traced import trace

        trace(chosen)
    out.print()
    out.print(f"report: {done.page}", soft_wrap=True)
    out.print(stage_seconds(done.seconds, done.total_seconds, done.overlap_seconds), soft_wrap=True)


def stage_seconds(seconds: dict[str, float], total: float, overlap: float | None) -> str:
    """`train 96 s · evaluate 31 s · other 4 s (start, imports); 131 s by the clock`: what is in no stage is `other`.

    `overlap` is by how much the stages add up to more since models went side by side; None if they went one after another.
    """
    other = max(0.0, total - sum(seconds.values()) + (overlap or 0.0))
    spent = " · ".join(f"{stage} {value:.0f} s" for stage, value in [*seconds.items(), ("other", other)])
    beside = "" if overlap is None else "; a stage's seconds are summed over models that went side by side"
    return f"{spent} (start, imports); {total:.0f} s by the clock{beside}"


SINKS_LEFT_OUT = (
    "Sinks: tokens whose activations are out of all proportion. They are left out of every figure but the FVU with sinks, and stay "
    "as they are where a dictionary is spliced in."
)


def qualities(rows: list[LayerQuality]) -> None:
    """Quality by model and layer, with the gate."""
    with_sinks = any(q.num_sinks for q in rows)
    beside = ("with sinks", "sinks") if with_sinks else ()
    table = _table(
        *(
            "model",
            "layer",
            "FVU",
            "per coordinate",
            *beside,
            "L0",
            "dead",
            "ΔCE",
            "CE recovered",
            "KL",
            "answers kept",
            "gate",
        )
    )
    for q in rows:
        kept = "–" if q.answers_kept is None else f"{q.answers_kept:.1%}"
        table.add_row(
            q.model,
            str(q.layer),
            f"{q.fvu:.4f}",
            _or_dash(q.fvu_coordinate, ".4f"),
            *((_or_dash(q.fvu_with_sinks, ".4f"), f"{q.num_sinks:,}") if with_sinks else ()),
            f"{q.l0:.1f}",
            f"{q.dead:.1%}",
            f"{q.delta_ce:+.3f}",
            f"{q.ce_loss_score:.3f}",
            f"{q.kl_div_with_sae:.3f}",
            kept,
            "pass" if q.passed else "; ".join(q.gate),
        )
    console().print(table)
    texts = {
        q.model: f"{q.model}: {q.num_tokens + q.num_sinks:,} held-out tokens, spliced in on {q.num_spliced_tokens:,}"
        + (f", {q.num_answers} answers" if q.answers_kept is not None else "")
        for q in rows
    }
    notes = [SINKS_LEFT_OUT] if with_sinks else []
    notes += [
        f"{q.model} layer {q.layer}: training went wrong {q.setbacks} time{'s'[: q.setbacks > 1]} and went on from the last good "
        f"state, {4**q.setbacks} times slower"
        for q in rows
        if q.setbacks
    ]
    for line in (*texts.values(), *notes):
        console().print(line, soft_wrap=True)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def features(tables: dict[str, pl.DataFrame]) -> None:
    """How many features live, how dense they are, by model and layer."""
    table = _table("model", "layer", "features", "live", "median density", "dense (> 10 %)")
    for model, frame in tables.items():
        for (layer,), part in frame.group_by(["layer"], maintain_order=True):
            live = part.filter(pl.col("num_active") > 0)
            density = live["density"].median() if len(live) else 0.0
            dense = int((part["density"] > 0.1).sum())
            table.add_row(model, str(layer), str(len(part)), str(len(live)), f"{density:.4f}", str(dense))
    console().print(table)


def labels(tables: dict[str, pl.DataFrame], covered: dict[str, tuple[pl.DataFrame, pl.DataFrame]], bar: float) -> None:
    """How many labelled features reach the bar; coverage beside the untrained dictionary's; the best of each family."""
    columns = ("model", "layer", "labelled", f"F1 ≥ {bar}", "F1 ≥ 0.9", "beat neuron and untrained")
    table = _table(*columns)
    for model, frame in tables.items():
        for (layer,), part in frame.group_by(["layer"], maintain_order=True):
            best = best_labels(part, 0.0)
            baseline = pl.max_horizontal("neuron_f1", "untrained_f1")
            table.add_row(
                model,
                str(layer),
                str(len(best)),
                str(best.filter(reaches(bar)).height),
                str(best.filter(reaches(0.9)).height),
                str(best.filter(reaches(bar) & (pl.col("f1") > baseline)).height),  # null without these baselines
            )
    out = console()
    out.print(table)
    if any(len(coverage) for coverage, _ in covered.values()):
        out.print()
        out.print(_coverage(covered))
        out.print(
            'share of live features whose label from `concepts` has a held-out F1 above 0.7 or 0.9; "untrained": the same'
        )
        out.print('of random directions, labelled in the same way; "labels": different ones above 0.7')
        out.print()
        out.print(_families(covered))


def _coverage(covered: dict[str, tuple[pl.DataFrame, pl.DataFrame]]) -> Table:
    table = _table("model", "layer", "live", "> 0.7", "untrained", "ratio", "> 0.9", "untrained", "labels", "untrained")
    for model, (coverage, _) in covered.items():
        trained, untrained = (coverage.filter(pl.col("dictionary") == d) for d in ("trained", "untrained"))
        for ours, theirs in zip(trained.iter_rows(named=True), untrained.iter_rows(named=True), strict=True):
            table.add_row(
                model,
                str(ours["layer"]),
                str(ours["num_live"]),
                f"{ours['over_07']:.1%}",
                f"{theirs['over_07']:.1%}",
                f"{ours['over_07'] / theirs['over_07']:.2f}" if theirs["over_07"] else "–",
                f"{ours['over_09']:.1%}",
                f"{theirs['over_09']:.1%}",
                str(ours["num_labels"]),
                str(theirs["num_labels"]),
            )
    return table


def _families(covered: dict[str, tuple[pl.DataFrame, pl.DataFrame]]) -> Table:
    table = _table("model", "family", "best label", "layer", "feature", "F1", "neuron", "untrained", "n", words=3)
    for model, (_, families) in covered.items():
        for row in best_of_families(families).iter_rows(named=True):
            table.add_row(
                model,
                row["family"],
                shorten(row["label"], 44),
                str(row["layer"]),
                f"#{row['feature']}",
                *(f"{row[name]:.2f}" for name in ("f1", "neuron_f1", "untrained_f1")),
                str(row["num_positive"]),
            )
    return table


def asked_labels(reports: list[AskedLabels], tables: dict[str, pl.DataFrame], bar: float) -> None:
    """What asking a language model came to, by model: scores with n, and features without a label by the reason."""
    table = _table("model", "asked", "labelled", f"≥ {bar}", "detection BA", "fuzzing BA", "contexts judged", "calls")
    for asked in reports:
        own = tables[asked.model].filter(pl.col("measure") == "detection")
        table.add_row(
            asked.model,
            str(asked.num_features),
            str(asked.num_labelled),
            str(own.filter(reaches(bar)).height),
            _mean_and_number(own["balanced_accuracy"]),
            _mean_and_number(own["fuzzing"]),
            f"{own['num_tokens'].sum():,}",
            f"{asked.num_calls:,} + {asked.num_stored:,} stored",
        )
    out = console()
    out.print(table)
    out.print("BA: balanced accuracy, mean over n labels; 0.5 is chance")
    for asked in reports:
        tokens = f"{asked.prompt_tokens:,} tokens of prompts, {asked.answer_tokens:,} of answers"
        price = "" if asked.price is None else f", {asked.price:.4f} by the prices given"
        out.print(f"{asked.model}: {tokens}, as {asked.answered_by} counts them{price}", soft_wrap=True)
        for what, reasons in (
            ("calls failed", asked.failed),
            ("answers of no use", asked.unread),
            ("not asked", asked.left_out),
        ):
            _reasons(out, what, reasons)


def _reasons(out: Console, what: str, reasons: dict[str, str]) -> None:
    """Features without a label, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        listed = ", ".join(names[:MOST_NAMED]) + (
            f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        )
        out.print(f"  {what}: {listed}: {reason}", soft_wrap=True)


def _mean_and_number(scores: pl.Series) -> str:
    known = [score for score in scores.to_list() if score is not None]
    return f"{mean(known):.2f} (n = {len(known)})" if known else "–"


def transfers(results: list[TransferResult]) -> None:
    """Each pair of models in a row: mean over layer pairs, null, ceiling and n."""
    table = _table("metric", "from", "to", "mean", "null", "ceiling", "tokens", "coverage", words=3)
    for result in results:
        value = result.arrays["value"]
        off = ~_diagonal(result)
        table.add_row(
            result.info.metric,
            result.info.source,
            result.info.target,
            _mean(value[off]),
            _mean(result.arrays["null"][off]) if "null" in result.arrays else "–",
            _ceiling(result, off),
            f"{result.info.num_tokens:,}",
            f"{result.info.coverage:.0%}",
        )
    console().print(table)
    console().print("mean over pairs of different layers; `throughline report` draws the matrices")


def _ceiling(result: TransferResult, off: np.ndarray) -> str:
    """The mean ceiling of the cells `off`; `0.72 (0.70 to 0.75, 3 seeds)` where it is of several seeds."""
    each = [
        _mean(result.arrays[name][off]) for name in ("ceiling", "ceiling_min", "ceiling_max") if name in result.arrays
    ]
    several = f" ({each[1]} to {each[2]}, {result.num_twins} seeds)" if len(each) > 1 else ""
    return each[0] + several if each else "–"


def status(found: dict[str, Any]) -> None:
    """Where a run is."""
    console().print(status_view(found))


def status_view(found: dict[str, Any]) -> Group:
    """How many layers are done, what each device does now, and the grid of models and layers with what they wait for."""
    parts: list[Any] = [
        Text(f"{found['name']}  ({found['folder']})" + ("  gate overridden" if found["forced"] else ""))
    ]
    parts.append(Text(_overall(found)))
    if found["devices"]:
        parts += [Text(), _devices(found["devices"])]
    table = _table("model", "layers", "train", "gate", "features", "label", words=6)
    for name, model in found["models"].items():
        done = ["done" if model["steps"][s] else "waiting" for s in ("features", "label")]
        table.add_row(name, _grid_row(model["layers"]), model["state"], _gate_of(model), *done)
    signs = {layer["state"] for model in found["models"].values() for layer in model["layers"].values()}
    legend = "  ".join(f"{SIGNS[state]} = {state}" for state in SIGNS if state in signs)
    parts += [Text(), table, Text(legend)] if legend else [Text(), table]
    for model in found["models"].values():
        parts += [Text(line) for line in map(_halted, model["jobs"]) if line]
        parts += [Text(f"{job['model']} {event}") for job in model["jobs"] for event in job["events"]]
    return Group(*parts)


def _overall(found: dict[str, Any]) -> str:
    counts, left = found["layers"], found["eta_seconds"]
    total, done = sum(counts.values()), counts["done"] + counts["imported"]
    others = [f"{counts[state]} {state}" for state in ("running", "waiting", "stopped", "failed") if counts[state]]
    end = ""
    if left is not None:
        end = f"; about {duration(left)} left, until {datetime.fromtimestamp(time.time() + left):%H:%M}"
    return ", ".join([f"{done} of {total} layers trained", *others]) + end


def _devices(jobs: list[dict[str, Any]]) -> Table:
    table = _table("device", "model", "layers", "step", "FVU", "L0", "dead", "tokens/s", "left", words=3)
    several = len({job["host"] for job in jobs}) > 1
    for job in jobs:
        place = f"{job['host']} {job['device']}" if several else job["device"]
        begun = bool(job["fvu"])
        numbers = (
            [f"{mean(job['fvu']):.4f}", f"{mean(job['l0']):.1f}", f"{max(job['dead']):.0%}"] if begun else [""] * 3
        )
        speed = [f"{job['tokens_per_second']:,.0f}", duration(job["eta_seconds"] or 0.0)] if begun else [""] * 2
        step = f"{job['step']}/{job['num_steps']}" if begun else "starting"
        table.add_row(place, job["model"], span(job["layers"]), step, *numbers, *speed)
    return table


SIGNS = {"done": "#", "imported": "i", "running": ">", "stopped": "!", "waiting": ".", "failed": "x"}


def _grid_row(layers: dict[int, dict[str, Any]]) -> str:
    """A sign a layer, from the first to the last."""
    return "".join(SIGNS[layer["state"]] for layer in layers.values()) or "not looked at yet"


def _halted(job: dict[str, Any]) -> str:
    """Why a job does not run."""
    name = f"{job['model']} layers {span(job['layers'])}"
    if job["state"] == "failed":
        return f"{name} failed: {job['failed']}"
    if job["state"] == "stopped":
        return f"{name} stopped at step {job['step']}/{job['num_steps']}; --resume goes on from its last checkpoint"
    return ""


def plan(made: Plan) -> None:
    """The jobs of training in the order in which they start, or where they are many a line a device; totals; assumptions."""
    out = console()
    for model in made.models:
        said = [
            f"{model.model}: {len(model.pending)} of {model.num_layers} layers to train, {model.tokens:,} tokens an epoch"
        ]
        said += [f"layers {span(model.done)} are done and skipped"] if model.done else []
        said += [f"layers {span(model.invalidated)} were made from other settings"] if model.invalidated else []
        out.print(Text("; ".join([*said, f"activations {model.activations}"])), soft_wrap=True)
    if not made.jobs:
        out.print("nothing to train")
        return
    out.print(_table_of_jobs(made) if len(made.jobs) <= MOST_JOBS else _table_of_devices(made))
    out.print(
        f"training ends after {_clock(made.makespan_seconds)} (h:mm:ss) and takes {made.flops:.3g} FLOP; "
        "evaluation, features, labels, transfer, traces and the report are not counted",
        soft_wrap=True,
    )
    out.print(
        f"lower bound {_clock(made.lower_bound_seconds)}: however layers are divided among these devices, none can end sooner; "
        f"on one of the fastest of them alone {_clock(made.work_seconds)}",
        soft_wrap=True,
    )
    disk = ", ".join(f"{name} {describe_bytes(size)}" for name, size in made.disk_bytes.items())
    out.print(f"disk: {disk}", soft_wrap=True)
    for line in made.assumptions:
        explain(out, "assumed", line)


def explain(out: Console, word: str, meaning: str) -> None:
    """A word of the output and what it means, the meaning wrapped beside it."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=9, no_wrap=True)
    grid.add_column()
    grid.add_row(word, Text(meaning))
    out.print(grid)


def _table_of_jobs(made: Plan) -> Table:
    table = _table("model", "layers", "device", "memory", "disk", "FLOP", "starts", "takes", words=3)
    for job in made.jobs:
        table.add_row(
            Text(job.model),
            span(job.layers),
            Text(job.device),
            describe_bytes(job.total_bytes),
            describe_bytes(sum(job.disk_bytes.values())),
            f"{job.flops:.2g}",
            _clock(job.start_second),
            _clock(job.seconds),
        )
    return table


def _table_of_devices(made: Plan) -> Table:
    table = _table("device", "jobs", "ends", "memory", words=2)
    for device in made.devices:
        mine = [job for job in made.jobs if job.device == device.name]
        table.add_row(
            Text(device.name),
            Text("; ".join(f"{job.model} {span(job.layers)}" for job in mine) or "none"),
            _clock(max((job.start_second + job.seconds for job in mine), default=0)),
            describe_bytes(max((job.total_bytes for job in mine), default=0)),
        )
    return table


def _clock(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _gate_of(model: dict[str, Any]) -> str:
    gates = {layer: layer_state["gate"] for layer, layer_state in model["layers"].items()}
    if not gates or None in gates.values():
        return "waiting"
    failed = [layer for layer, conditions in gates.items() if conditions]
    return f"failed by layers {span(failed)}" if failed else "passed by all"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def label_score(label: Label) -> str:
    """`F1 0.97`, or the balanced accuracy of detection, `BA 0.83`."""
    return f"F1 {label.f1:.2f}" if label.balanced_accuracy is None else f"BA {label.balanced_accuracy:.2f}"


def shorten(words: str, most: int) -> str:
    """Words cut to at most `most` characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def _diagonal(result: TransferResult) -> Any:
    import numpy as np

    info = result.info
    same = np.equal.outer(np.array(info.source_layers), np.array(info.target_layers))
    return same & (info.source == info.target)


def _mean(values: Any) -> str:
    import numpy as np

    return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else "–"
