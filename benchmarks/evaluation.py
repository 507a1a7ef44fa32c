"""How long evaluation takes beside training, and beside what it took at another commit, in turn; and whether the figures agree.

    git worktree add OLD COMMIT
    python benchmarks/evaluation.py FOLDER --text FILE.jsonl --layers 5,11,17,23,29 --sources OLD . --rounds 2

FOLDER is a Hugging Face model, or package:NAME. Dictionaries (topk, 8x, k 32) are trained on --train tokens by the first command of
all; then each source in turn, in a process of its own, evaluates them on --tokens held-out tokens, --spliced of them spliced. Every
text begins with BOS. Attention sinks are unknown to old commits, so for the comparison no token is one, and features are chosen by
their own size. Rows of Markdown; `--write NAME` puts them between the marks of that name in docs/performance.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import PERFORMANCE, hardware_and_date, write_between
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from throughline.dictionaries import Dictionary
from throughline.models import open_model
from throughline.quality import evaluate
from throughline.study import DataSpec, GateSpec, ModelSpec
from throughline.text import read_documents
from throughline.tokens import TokenRows, collect_rows, take_documents

CONTEXT = 128
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="")
    parser.add_argument("--template", default="{question}\n{answer}")
    parser.add_argument("--layers", default="5,11,17,23,29")
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--spliced", type=int, default=5_000)
    parser.add_argument("--sources", nargs="*", default=["."])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", default="")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        run_child(asked.model, Path(asked.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(asked, Path(folder))
    print("\n".join(lines))
    if asked.write:
        write_between(PERFORMANCE, asked.write, lines, "Evaluation beside training")


def measure(asked: Any, folder: Path) -> list[str]:
    layers = [int(n) for n in asked.layers.split(",")]
    seconds = prepare(asked, layers, folder)
    found: dict[str, list[dict]] = {source: [] for source in asked.sources}
    for _ in range(asked.rounds):
        for source in asked.sources:
            environment = os.environ | {"PYTHONPATH": str(Path(source).resolve() / "src")}
            command = [sys.executable, __file__, asked.model, "--child", str(folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found[source].append(json.loads(done.stdout.splitlines()[-1]))
    command = (
        f"python benchmarks/evaluation.py {Path(asked.model).name} --layers {asked.layers} --train {asked.train} "
        f"--tokens {asked.tokens} --spliced {asked.spliced} --rounds {asked.rounds}"
    )
    lines = [f"`{command}`; {hardware_and_date()}.", ""]
    lines += [
        "| source | seconds (median, all) | of training | peak GiB | largest difference of a figure |",
        "|---|---|---|---|---|",
    ]
    first = found[asked.sources[0]][0]["figures"]
    for source, rounds in found.items():
        times = [one["seconds"] for one in rounds]
        differences = compare(first, rounds[0]["figures"])
        name = "here" if Path(source).resolve() == Path.cwd() else Path(source).name
        each = ", ".join(f"{t:.0f}" for t in times)
        lines.append(
            f"| {name} | {statistics.median(times):.0f} ({each}) | {statistics.median(times) / seconds:.2f} | "
            f"{max(one['gib'] for one in rounds):.1f} | {differences} |"
        )
    lines += ["", f"Training these layers on {asked.train:,} tokens in the same run: {seconds:.0f} s."]
    return lines


def prepare(asked: Any, layers: list[int], folder: Path) -> float:
    """Train, and lay rows and dictionaries down; seconds of the training."""
    from throughline.harvesting import TextSource, tokens_of_a_pass
    from throughline.study import DictionarySpec, TrainingSpec
    from throughline.tokens import stream_rows
    from throughline.training import train

    model = open_model(ModelSpec(path=asked.model, name="model"), bos="always")
    data = DataSpec(path=asked.text, text=asked.template, context=CONTEXT)

    def rows() -> Any:
        num_rows = max(1, tokens_of_a_pass(model) // CONTEXT)
        return stream_rows(read_documents(data, "train", 0), model.tokenizer, CONTEXT, num_rows)

    training = TrainingSpec(tokens=asked.train)
    specs = {layer: DictionarySpec(architecture="topk", expansion=8, k=32) for layer in layers}
    source = TextSource(model, layers, rows, num_tokens=asked.train)
    begin = time.perf_counter()
    trained = train(source, specs, training, model="model", num_layers=model.num_layers).own
    seconds = time.perf_counter() - begin
    for layer, one in trained.items():
        weights = {name: getattr(one, name).contiguous().numpy() for name in WEIGHTS}
        save_arrays(weights, folder / f"layer_{layer}.safetensors", {"architecture": one.architecture})
    heldout = iter(read_documents(data, "heldout", 0))
    documents = take_documents(heldout, model.tokenizer, asked.tokens, CONTEXT)
    some = take_documents(iter(documents), model.tokenizer, asked.spliced, CONTEXT)
    for name, these in (("heldout", documents), ("spliced", some), ("rest", documents[len(some) :])):
        rows_of = collect_rows(these, model.tokenizer, CONTEXT)
        np.savez(folder / f"{name}.npz", **vars(rows_of))
    return seconds


def run_child(path: str, folder: Path) -> None:
    """Evaluate what lies in `folder` with the source at hand; prints figures and seconds."""
    import resource

    model = open_model(ModelSpec(path=path, name="model"))
    dictionaries = {}
    for file in sorted(folder.glob("layer_*.safetensors"), key=lambda file: int(file.stem.split("_")[1])):
        weights = {name: torch.from_numpy(array) for name, array in load_arrays(file).items()}
        dictionaries[int(file.stem.split("_")[1])] = Dictionary("topk", **weights, options={"k": 32})
    heldout, spliced, rest = (TokenRows(**np.load(folder / f"{name}.npz")) for name in ("heldout", "spliced", "rest"))
    if "rest" in signature(evaluate).parameters:
        texts = {"spliced": spliced, "rest": rest}
    else:
        texts = {"heldout": heldout, "spliced": spliced}  # older ones read what is spliced twice
    warm = {name: next(rows.batches(2)) for name, rows in texts.items()}
    evaluate(model, dictionaries, **warm, gate=GateSpec())  # loops are compiled
    begin = time.perf_counter()
    qualities = evaluate(model, dictionaries, **texts, gate=GateSpec())
    seconds = time.perf_counter() - begin
    figures = {quality.layer: quality.model_dump() for quality in qualities}
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "gib": gib, "figures": figures}))


def compare(a: dict, b: dict) -> str:
    """The largest relative difference of a number that both have, and which it is."""
    largest, where = 0.0, "none"
    for layer, mine in a.items():
        for name, value in mine.items():
            other = b[layer].get(name)
            if isinstance(value, float) and isinstance(other, float) and value != other:
                difference = abs(value - other) / max(abs(value), abs(other), 1e-9)
                if difference > largest:
                    largest, where = difference, f"{difference:.1e} ({name}, layer {layer}: {value:.6g}, {other:.6g})"
    return where


if __name__ == "__main__":
    main()
