"""What the seconds of one training on a CPU go to.

    python benchmarks/parts.py --bench BENCH [--tokens 65536] [--architecture topk] [--write]

Timers stand around the parts of a compiled step and around harvest and setting out; their own cost is some microseconds a
call. Parts of a step run on several threads beside each other: their sums are divided by the number of threads. `--write`
puts the table into docs/performance.md.
"""

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine import load_compiled, open_source
from pages import PERFORMANCE, write_between

from throughline.models import open_model
from throughline.study import DictionarySpec, ModelSpec, TrainingSpec
from throughline.training import compiled, engine

WHOLE = {
    "_make_groups": "setting out: mean, scale, first encoder",
    "read_chunks": "harvest: forward pass and copies",
    "_fold": "folding mean and scale into the weights",
}
OF_A_STEP = {
    "gather": "gathering a batch, centred and scaled",
    "mm": "encoder product",
    "select_topk": "selection",
    "select_above": "selection",
    "decode": "decoding, error and slopes",
    "transpose": "codes ordered by feature",
    "update": "gradients, Adam, unit rows",
    "update_bias": "decoder bias",
    "_auxiliary": "AuxK",
    "_after_step": "resampling and thresholds",
}


class Timers:
    """Seconds by function, from any thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = Lock()

    def timed(self, name: str, function: Callable) -> Callable:
        """The same function, timed."""

        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.add(name, time.perf_counter() - started)

        return call

    def each(self, name: str, function: Callable) -> Callable:
        """The same generator function, its steps timed."""

        def call(*arguments: Any) -> Iterator:
            items = function(*arguments)
            while (item := self.timed(name, next)(items, None)) is not None:
                yield item

        return call

    def add(self, name: str, seconds: float) -> None:
        """To what this function took."""
        with self._lock:
            self.seconds[name] += seconds

    def by_part(self, num_threads: int) -> dict[str, float]:
        """Seconds of the whole that each part accounts for, the longest first."""
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in self.seconds.items():
            parts[WHOLE.get(name) or OF_A_STEP[name]] += seconds / (1 if name in WHOLE else num_threads)
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


def put_timers(timers: Timers) -> None:
    """Around the engine's parts, for the rest of this process."""
    loops = {name: getattr(compiled.kernels, name) for name in dir(compiled.kernels)}
    loops |= {name: timers.timed(name, loop) for name, loop in loops.items() if name in OF_A_STEP}
    compiled.kernels = SimpleNamespace(**loops)  # pyright: ignore[reportAttributeAccessIssue]
    timed_torch = {name: getattr(torch, name) for name in dir(torch)} | {"mm": timers.timed("mm", torch.mm)}
    compiled.torch = SimpleNamespace(**timed_torch)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("_auxiliary", "_after_step"):
        setattr(compiled.CompiledLayer, name, timers.timed(name, getattr(compiled.CompiledLayer, name)))
    for name in ("_make_groups", "_fold"):
        setattr(engine, name, timers.timed(name, getattr(engine, name)))
    engine.read_chunks = timers.each("read_chunks", engine.read_chunks)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bench", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--architecture", default="topk", choices=["topk", "relu"])
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    model = open_model(ModelSpec(path=str(a.bench / "model"), name="bench"))
    ids = np.load(a.bench / "train.npy")
    ids = np.tile(ids, (-(-a.tokens // ids.size), 1))[: a.tokens // ids.shape[1]]
    layers = range(model.num_layers)
    source = open_source(model, layers, ids, "auto", "cpu")
    dictionary = DictionarySpec(architecture=a.architecture, k=32)
    training = TrainingSpec(tokens=ids.size, batch_tokens=a.batch)
    load_compiled(dictionary, training, next(source.batches())[:, :16])
    timers = Timers()
    put_timers(timers)
    started = time.perf_counter()
    engine.train(source, dict.fromkeys(layers, dictionary), training, model="bench", num_layers=model.num_layers)
    seconds = time.perf_counter() - started
    parts = timers.by_part(min(torch.get_num_threads(), len(layers)))
    parts["everything else, waiting included"] = seconds - sum(parts.values())
    lines = [
        f"`benchmarks/parts.py`, `{a.bench.name}`, {a.architecture}, {ids.size:,} tokens, batch {a.batch:,}: {seconds:.1f} s on "
        f"{torch.get_num_threads()} threads; {platform.machine()}, {date.today()}, one run.",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
        *(f"| {part} | {spent:.2f} | {spent / seconds:.0%} |" for part, spent in parts.items()),
    ]
    print("\n".join(lines))
    if a.write:
        write_between(PERFORMANCE, f"parts {a.architecture}", lines, "What the seconds go to")


if __name__ == "__main__":
    main()
