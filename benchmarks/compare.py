"""Ours and the peers in turn on the same work; ratios, the arithmetic floor of this machine and the share of it reached.

    python benchmarks/compare.py --mid BENCH --stories BENCH --peer PYTHON --script peers.py [--rounds 2] [--curves] [--write]

BENCH folders are made by make_bench.py, `--script` is the file that trains with SAELens and sparsify under `--peer`. All of it is
run one after another, a round at a time, so that a slow minute of the machine meets everybody; the median counts. The floor is one
dense encoder product a layer and the model's forward pass at the speed of this machine's bfloat16 products; the rest is sparse.
`--curves` adds how cost grows with tokens, layers, width and k; `--write` puts the tables into docs/performance.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from pages import PERFORMANCE, write_between

from throughline.models import open_model
from throughline.study import ModelSpec

OURS = Path(__file__).with_name("engine.py")
EXPANSION = 8


class Work(NamedTuple):
    """What is trained, by us and by whom else."""

    name: str
    bench: str
    tokens: int
    ours: tuple[str, ...]
    peers: dict[str, tuple[str, ...]]
    wanted: float  # times the fastest peer
    passes: int = 1


TOPK = {"sparsify": (), "saelens-topk": ()}
STORIES = ("--batch", "128", "--passes", "2")
WORKS = (
    Work("mid, TopK, k = 32", "mid", 65_536, (), TOPK, 4),
    Work("mid, ReLU + L1", "mid", 65_536, ("--architecture", "relu"), {"saelens-l1": ()}, 3),
    Work("stories, TopK, k = 32, batch 128, two passes", "stories", 400_000, STORIES, TOPK, 2, 2),
    Work("stories, TopK, k = 8, batch 128, two passes", "stories", 400_000, (*STORIES, "--k", "8"), TOPK, 2, 2),
)
CURVES = {
    "tokens": ("--tokens", (16_384, 32_768, 65_536, 131_072)),
    "layers": ("--layers", (1, 2, 4, 6)),
    "d_sae / d_model": ("--expansion", (2, 4, 8, 16, 32)),
    "k": ("--k", (8, 16, 32, 64, 128)),
}


def run(command: list[str]) -> dict:
    """The JSON line that a training ends with."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def train_ours(bench: str, tokens: int, options: tuple[str, ...], out: str) -> dict:
    """One training of this project's."""
    return run([sys.executable, str(OURS), "--bench", bench, "--tokens", str(tokens), "--out", out, *options])


def product_speed(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP a second of products 2048 x 256 x 2048 on all cores, a thread each."""

    def multiply() -> float:
        torch.set_num_threads(1)
        x, w, out = (torch.randn(n, m).to(dtype) for n, m in ((2048, 256), (256, 2048), (2048, 2048)))
        torch.mm(x, w, out=out)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            torch.mm(x, w, out=out)
            count += 1
        return 2 * 2048 * 256 * 2048 * count / (time.perf_counter() - started)

    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(lambda _: multiply(), range(cores)))


def operations_a_token(bench: str, passes: int) -> float:
    """Of the model's blocks, two for each weight of a product, and of the encoders of all layers."""
    model = open_model(ModelSpec(path=str(Path(bench) / "model"), name="bench"))
    blocks = sum(p.numel() for n, p in model.hf.named_parameters() if model.structure.blocks_path in n and p.ndim == 2)
    encoders = model.num_layers * EXPANSION * model.d_model**2
    return 2 * (blocks + passes * encoders)


def compare(work: Work, bench: str, peer: str, script: str, rounds: int, speed: float) -> str:
    """One row of the table."""
    found: dict[str, list[float]] = {name: [] for name in ("ours", *work.peers)}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(rounds):
            for name, options in work.peers.items():
                command = [peer, script, name, "--bench", bench, "--tokens", str(work.tokens), "--out", f"{out}/{name}"]
                found[name].append(run([*command, *options])["tokens_per_second"])
            found["ours"].append(train_ours(bench, work.tokens, work.ours, f"{out}/ours")["tokens_per_second"])
    median = {name: statistics.median(values) for name, values in found.items()}
    fastest = max(work.peers, key=lambda name: median[name])
    floor = speed / operations_a_token(bench, work.passes)
    peers = "; ".join(f"{name} {median[name]:,.0f}" for name in work.peers)
    ratio = median["ours"] / median[fastest]
    ours = f"{median['ours']:,.0f} ({min(found['ours']):,.0f} to {max(found['ours']):,.0f})"
    return f"| {work.name} | {ours} | {peers} | {ratio:.1f} ({work.wanted:g}) | {floor:,.0f} | {median['ours'] / floor:.0%} |"


def curve(name: str, bench: str) -> str:
    """One row: seconds for each value of one dimension of the work, the others as in `mid, TopK`."""
    option, values = CURVES[name]
    cells = []
    with tempfile.TemporaryDirectory() as out:
        for value in values:
            tokens, options = (value, ()) if option == "--tokens" else (65_536, (option, str(value)))
            cells.append(f"{value:,}: {train_ours(bench, tokens, options, out)['seconds']:.1f}")
    return f"| {name} | {' · '.join(cells)} |"


def main() -> None:
    """Run everything, print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mid", required=True)
    parser.add_argument("--stories", required=True)
    parser.add_argument("--peer", required=True, help="interpreter of an environment with sae-lens and sparsify")
    parser.add_argument("--script", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    half, single = product_speed(torch.bfloat16), product_speed(torch.float32)
    cores = torch.get_num_threads()
    said = (
        f"`make bench`; {platform.machine()}, {cores} cores, no GPU; {time.strftime('%Y-%m-%d')}; n = {a.rounds} rounds, "
        f"medians (range), seed 0; products of {half / 1e9:.0f} GFLOP/s in bfloat16 and {single / 1e9:.0f} in float32."
    )
    table = [
        said,
        "",
        "| work | ours, tokens/s | peers, tokens/s | times the fastest (wanted) | floor, tokens/s | share of it |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    for work in WORKS:
        table.append(compare(work, getattr(a, work.bench), a.peer, a.script, a.rounds, half))
        print(table[-1], flush=True)
    curves = ["| grows | value: seconds |", "|---|---|"]
    for name in CURVES if a.curves else ():
        curves.append(curve(name, a.mid))
        print(curves[-1], flush=True)
    if a.write:
        write_between(PERFORMANCE, "bench", table, "Ours and the peers")
        if a.curves:
            head = "`mid`, TopK, 65,536 tokens, 6 layers, 8 x, k = 32, batch 2,048 but for what the row changes; one run each."
            write_between(PERFORMANCE, "curves", [head, "", *curves], "How cost grows")


if __name__ == "__main__":
    sys.exit(main())
