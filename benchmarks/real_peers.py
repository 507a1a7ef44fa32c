"""Ours and the peers on a real language model, each judged by the referee; and how near to the floor of this machine ours is.

    python benchmarks/real_peers.py BENCH --scripts DIR --peer PYTHON --layers 5,11,17,23,29 --log FILE \
        --work ours sparsify saelens-topk sparsify@1e-3 saelens-topk@4e-3

BENCH is made by make_bench.py; DIR has peers.py and referee.py, which run under PYTHON. Each piece of work is trained and judged,
one after another; NAME@LR has another learning rate than its default. What is in the log is not done again. Without --work the log
is printed as rows of Markdown; `--write NAME` puts them between the marks of that name in docs/real-models.md.

The floor is the model's forward pass up to the last wanted layer and one encoder product a layer, both measured here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import rows_of
from pages import hardware_and_date, write_between

from throughline.harvesting import harvest, tokens_of_a_pass
from throughline.models import open_model
from throughline.study import ModelSpec

PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"
EXPANSION = 8
FLOOR_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--scripts", type=Path, required=True)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--work", nargs="*", default=[])
    parser.add_argument("--write", default="")
    asked = parser.parse_args()
    known = read(asked.log)
    for name in asked.work:
        key = f"{name} {asked.tokens}"
        if key not in known:
            found = measure_floor(asked) if name == "floor" else do(name, asked)
            with asked.log.open("a") as log:
                log.write(json.dumps({"key": key, "where": hardware_and_date()} | found) + "\n")
    lines = list(table(read(asked.log), asked))
    print("\n".join(lines))
    if asked.write:
        write_between(PAGE, asked.write, lines, asked.write)


def read(log: Path) -> dict[str, dict[str, Any]]:
    return {one["key"]: one for one in map(json.loads, log.read_text().splitlines())} if log.exists() else {}


def do(name: str, asked: Any) -> dict[str, Any]:
    """Train and judge; tokens/s and the referee's means and layers."""
    kind, _, lr = name.partition("@")
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "--bench",
            asked.bench,
            "--tokens",
            asked.tokens,
            "--layers",
            asked.layers,
            "--out",
            Path(folder) / "saes",
        ]
        rate = ["--lr", lr] if lr else []
        if kind == "ours":
            trained = last_line(
                sys.executable, Path(__file__).with_name("engine.py"), *common, "--batch", "auto", *rate
            )
        else:
            trained = last_line(asked.peer, asked.scripts / "peers.py", kind, *common, *rate)
        judged = run(
            asked.peer, asked.scripts / "referee.py", "--bench", asked.bench, "--saes", Path(folder) / "saes",
            "--layers", asked.layers, "--rows", asked.rows,
        )  # fmt: skip
    *layers, mean = judged
    return {"tokens_per_second": trained["tokens_per_second"], "layers": layers, **mean["mean"]}


def run(*command: Any) -> list[dict[str, Any]]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def last_line(*command: Any) -> dict[str, Any]:
    return run(*command)[-1]


def measure_floor(asked: Any) -> dict[str, Any]:
    """Tokens/s of the forward pass and of the encoder products, and of both."""
    layers = [int(layer) for layer in asked.layers.split(",")]
    model = open_model(ModelSpec(path=str(asked.bench / "model"), name="bench"))
    ids = np.load(asked.bench / "train.npy")[: FLOOR_TOKENS // 128]
    step = max(1, tokens_of_a_pass(model) // 128)

    def forward() -> None:
        rows = (rows_of(ids[start : start + step], set()) for start in range(0, len(ids), step))
        for _ in harvest(model, rows, layers[-1:], torch.get_num_threads(), dtype=None):
            pass

    x_ND, W_DF = torch.randn(1024, model.d_model), torch.randn(model.d_model, EXPANSION * model.d_model)

    def encode() -> None:
        for _ in range(FLOOR_TOKENS // 1024):
            x_ND @ W_DF

    seconds = {"forward": fastest(forward), "encoders": len(layers) * fastest(encode)}
    rates = {name: FLOOR_TOKENS / value for name, value in seconds.items()}
    return rates | {"tokens_per_second": FLOOR_TOKENS / sum(seconds.values())}


def fastest(work: Any) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def table(found: dict[str, dict[str, Any]], asked: Any) -> Any:
    layers = [int(layer) for layer in asked.layers.split(",")]
    where = sorted({one["where"] for one in found.values()})
    yield (
        f"`python benchmarks/real_peers.py {asked.bench.name} --layers {asked.layers} --tokens {asked.tokens}`, the referee on "
        f"{asked.rows} held-out rows; {' and '.join(where)}."
    )
    yield ""
    heads = [f"layer {n}: FVU, dead, CE recovered" for n in layers]
    yield f"| work | tokens/s | mean FVU | dead | CE recovered | {' | '.join(heads)} |"
    yield "|" + "---|" * (5 + len(layers))
    for key, one in found.items():
        name, tokens = key.split()
        if int(tokens) != asked.tokens:
            continue
        if name == "floor":
            yield (
                f"| floor: forward {one['forward']:.0f}, encoders {one['encoders']:.0f} | {one['tokens_per_second']:.0f} |"
                + " |" * (3 + len(layers))
            )
            continue
        cells = [f"{r['fvu']:.4f}, {r['dead']:.3f}, {r['ce_recovered']:.4f}" for r in one["layers"]]
        yield (
            f"| {name} | {one['tokens_per_second']:.0f} | {one['fvu']:.4f} | {one['dead']:.3f} | {one['ce_recovered']:.4f} | "
            f"{' | '.join(cells)} |"
        )


if __name__ == "__main__":
    main()
