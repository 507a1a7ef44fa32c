"""Seconds and memory of the transfer metrics on the bundled models, every layer with every other; and how they grow.

    python benchmarks/transfer.py RUN [--tokens 200000 400000] [--metrics reconstruction matching] [--write]

RUN is a run of the bundled models that has been trained and evaluated (`throughline demo`). Each measure is a process of its own
that works on a copy of it, with `evaluation.tokens` as given, computes every metric for every pair of models, and prints how long
each took and the process' peak memory. `reading` is the text through the models and their dictionaries. `--write` puts the table
into docs/performance.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from pages import PERFORMANCE, hardware_and_date, write_between
from plan_memory import peak_bytes

GIB = 2**30


def measure(run: Path, metrics: list[str]) -> dict[str, float]:
    """Seconds of reading and of each metric, and peak memory, of this process."""
    from throughline import pipeline
    from throughline.run_dir import RunDir
    from throughline.session import Session

    session = Session(RunDir.open(str(run)))
    started = time.perf_counter()
    for spec in session.study.models:
        for read in (session.evaluation, session.sample, session.selection):
            read(spec.name)
    seconds = {"reading": time.perf_counter() - started}
    for metric in metrics:
        started = time.perf_counter()
        pipeline.transfer_models(session, [metric])
        seconds[metric] = time.perf_counter() - started
    return seconds | {"GiB": peak_bytes() / GIB}


def copy_of(run: Path, folder: Path, tokens: int, min_count: int) -> Path:
    """The run without its transfer results, to be evaluated on so many tokens."""
    copy = folder / f"{tokens}"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("transfer", "traces", "report"))
    study = yaml.safe_load((copy / "study.yaml").read_text())
    study["evaluation"]["tokens"] = tokens
    study["transfer"]["min_count"] = min_count
    (copy / "study.yaml").write_text(yaml.safe_dump(study))
    return copy


def main() -> None:
    """Print a row for each number of tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[200_000, 400_000])
    parser.add_argument("--metrics", nargs="+", default=["reconstruction", "matching", "similarity", "flow"])
    parser.add_argument("--min-count", type=int, default=30)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.run, options.metrics)))
        return
    rows, folder = [], Path(tempfile.mkdtemp(prefix="transfer_"))
    for tokens in options.tokens:
        copy = copy_of(options.run, folder, tokens, options.min_count)
        command = [sys.executable, __file__, str(copy), "--measure", "--metrics", *options.metrics]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append((tokens, json.loads(done.stdout.splitlines()[-1])))
        print(rows[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    names = ["reading", *options.metrics]
    lines = [
        f"`python benchmarks/transfer.py RUN --tokens {' '.join(map(str, options.tokens))} --write`, RUN of `throughline demo`; "
        f"{hardware_and_date()}. Seconds.",
        "",
        f"| held-out tokens | {' | '.join(names)} | together | peak memory |",
        "|" + "---|" * (len(names) + 3),
    ]
    for tokens, row in rows:
        seconds = [row[name] for name in names]
        cells = [f"{s:.1f}" for s in [*seconds, sum(seconds)]]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} | {row['GiB']:.2f} GiB |")
    print("\n".join(lines))
    if options.write:
        write_between(PERFORMANCE, "transfer", lines, "Transfer")


if __name__ == "__main__":
    main()
