"""Predicted peak memory of `throughline train` beside the measured one, a process for each model; prints a table.

    python benchmarks/plan_memory.py [zoo/gpt2 … gpt2-medium …] [--tokens 60000] [--text TEXT] [--device 24GB@cpu] [--batch 1024]

Of each model the largest block that the plan has for the device is trained; one of 1,024 GiB, unless named, takes all layers.
Models of the zoo train as the demo has them; those of full_size with random weights, 20 steps of TEXT (a .jsonl file of questions
and answers), as `full_size/training.py` has them. The peak is the process' own, on a CPU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from pages import PERFORMANCE, hardware_and_date, write_between

from throughline import api
from throughline.records import span
from throughline.study import Study, load_study

HERE = Path(__file__).parent
DEMO = HERE.parent / "src" / "throughline" / "presets" / "demo.yaml"
ZOO = ("zoo/gpt2", "zoo/phi", "zoo/pythia", "zoo/gemma")
GIB = 2**30


def study_of(model: str, tokens: int, text: str | None, batch: int) -> Study:
    """The study of one model."""
    if model in ZOO:
        study = load_study(DEMO, [f"training.tokens={tokens}"])
        return study.model_copy(update={"models": [study.model(model)]})
    if text is None:
        raise SystemExit(f"{model} needs --text")
    full_size = {
        "path": str(HERE / "full_size" / model),
        "weights": "random",
        "dtype": "bfloat16",
    }
    tree = {
        "name": model,
        "models": [full_size],
        "data": {"path": str(Path(text).resolve()), "text": "{question}\n{answer}"},
        "dictionary": {"architecture": "topk", "expansion": 8, "k": 32},
        "training": {"tokens": 20 * batch, "batch_tokens": batch, "checkpoint_minutes": 60},
    }
    return Study.model_validate(tree)


def peak_bytes() -> int:
    """Largest memory of this process so far; ru_maxrss counts bytes on macOS, and thousands of them elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(study: Path) -> int:
    """Peak memory of a process that trains `study` and does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--train", str(study), "--out", f"{folder}/run"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["peak"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=ZOO)
    parser.add_argument("--tokens", type=int, default=60_000, help="of the zoo's trainings")
    parser.add_argument("--text")
    parser.add_argument("--device", default="1024GiB@cpu", help="what the plan is for")
    parser.add_argument("--batch", type=int, default=1024, help="tokens of a step of the models of full_size")
    parser.add_argument("--predict", action="store_true", help="do not train")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--mark", default="plan memory", help="which table of that page")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.train:
        api.train(a.train, a.out, device="cpu")
        print(json.dumps({"peak": peak_bytes()}))
        return
    lines = [
        f"`python benchmarks/plan_memory.py {' '.join(a.models)} --device {a.device} --batch {a.batch}`; {hardware_and_date()}.",
        "",
        "| model | layers | predicted, GiB | measured, GiB | predicted / measured | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for model in a.models:
        study = study_of(model, a.tokens, a.text, a.batch)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "study.yaml"
            path.write_text(yaml.safe_dump(study.model_dump(mode="json")))
            job = max(api.plan(path, a.device).jobs, key=lambda job: len(job.layers))
            some = [spec.model_copy(update={"layers": job.layers}) for spec in study.models]
            path.write_text(yaml.safe_dump(study.model_copy(update={"models": some}).model_dump(mode="json")))
            started = time.monotonic()
            found = 0 if a.predict else measure(path)
            seconds = time.monotonic() - started
        measured = f"{found / GIB:.2f} | {job.total_bytes / found:.2f} | {seconds:.0f}" if found else "– | – | –"
        name = study.models[0].name
        lines.append(f"| {name} | {span(job.layers)} | {job.total_bytes / GIB:.2f} | {measured} |")
        print(lines[-1], {part: round(size / GIB, 2) for part, size in job.bytes.items()}, file=sys.stderr, flush=True)
    print("\n".join(lines))
    if a.write:
        write_between(PERFORMANCE, a.mark, lines, "Memory as planned and as measured")


if __name__ == "__main__":
    main()
