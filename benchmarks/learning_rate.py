"""Is `lr: auto` right? A sweep over a factor of ten around it, on activations of real models, of small ones and planted ones.

    python benchmarks/learning_rate.py --stories BENCH --real BENCH:5,17,29 BENCH:2,8,14 --log FILE [--only TEXT] [--write]

BENCH has `model` and `train.npy`, rows of tokens. For each work a dictionary of every layer is trained at each learning rate; what
counts is the mean FVU of the layers on held-out tokens, without attention sinks. What is in the log is not trained again; --only
does the works whose names have a text in them. `--write` puts the log's rows into docs/quality.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from engine import open_source
from pages import QUALITY, hardware_and_date, write_between
from planted_data import MEAN_L0, NUM_FEATURES, plant
from torch import Tensor

from throughline.harvesting import TextSource, tokens_of_a_pass
from throughline.models import open_model
from throughline.study import DictionarySpec, ModelSpec, Study, TrainingSpec, load_study
from throughline.text import read_documents
from throughline.tokens import TokenRows, stream_rows
from throughline.training import train
from throughline.training.engine import learning_rate
from throughline.training.sources import ArraySource

FACTORS = (0.316, 0.5, 0.7, 1.0, 1.4, 2.0, 3.16)
ARCHITECTURES = ("topk", "batch_topk", "jumprelu")
HELD_OUT = 20_000
REAL_TOKENS, STORIES_TOKENS, PLANTED_TOKENS = 65_536, 400_000, 1_000_000


class Work(NamedTuple):
    """What is trained, and what makes the activations of all its layers, the last of them held out."""

    name: str
    activations: Callable[[], Tensor]
    specs: Callable[[Tensor], dict[int, DictionarySpec]]
    training: TrainingSpec


def works(stories: Path | None, real: list[str]) -> Iterator[Work]:
    """Real models; stories at two sparsities; two models of the zoo as the demo has them; planted directions."""
    for architecture in ARCHITECTURES:
        every = partial(alike, architecture, 32)
        for place in real:
            bench, _, layers = place.rpartition(":")
            name = Path(bench).name.removeprefix("bench_")
            read = partial(real_activations, Path(bench), tuple(int(n) for n in layers.split(",")))
            yield Work(f"{name}, {architecture}", read, every, TrainingSpec(tokens=REAL_TOKENS))
            if architecture == "topk":
                large = TrainingSpec(tokens=REAL_TOKENS, epochs=6, batch_tokens=4096)
                yield Work(f"{name}, {architecture}, batches of 4,096, six epochs", read, every, large)
        if stories:
            read = partial(stories_activations, stories)
            training = TrainingSpec(tokens=STORIES_TOKENS, batch_tokens=128, passes=2)
            for k in (32, 8) if architecture == "topk" else (32,):
                yield Work(f"stories, {architecture}, k {k}", read, partial(alike, architecture, k), training)
        study = load_study(str(files("throughline") / "presets" / "demo.yaml"))
        for name in ("zoo/pythia", "zoo/gemma"):
            spec = study.model(name)
            yield Work(
                f"{name}, {architecture}, otherwise as in the demo",
                partial(zoo_activations, study, spec),
                partial(as_in, study, spec, architecture),
                study.training,
            )
        planted = DictionarySpec(architecture=architecture, d_sae=NUM_FEATURES, target_l0=MEAN_L0)
        training = TrainingSpec(tokens=PLANTED_TOKENS, batch_tokens=1024)
        yield Work(f"planted, plain, {architecture}", planted_activations, lambda _, spec=planted: {0: spec}, training)


def alike(architecture: str, k: int, x_LND: Tensor) -> dict[int, DictionarySpec]:
    spec = DictionarySpec(architecture=architecture, k=k, target_l0=None if architecture == "topk" else k)
    return dict.fromkeys(range(len(x_LND)), spec)


def as_in(study: Study, model: ModelSpec, architecture: str, x_LND: Tensor) -> dict[int, DictionarySpec]:
    every = study.dictionary_for(model)
    specs = {layer: every.at_layer(layer) for layer in range(len(x_LND))}
    if architecture == every.architecture:
        return specs
    return {
        layer: spec.model_copy(update={"architecture": architecture, "target_l0": spec.k})
        for layer, spec in specs.items()
    }


@lru_cache(maxsize=1)
def real_activations(bench: Path, layers: tuple[int, ...]) -> Tensor:
    """Of these layers, on the bench's first rows."""
    model = open_model(ModelSpec(path=str(bench / "model"), name=bench.name))
    ids = np.load(bench / "train.npy")
    ids = ids[: -(-(REAL_TOKENS + HELD_OUT) // (ids.shape[1] - 1))]  # each row begins with a BOS that is left out
    source = open_source(model, layers, ids, "float32", "cpu")
    return torch.cat(list(source.batches()), 1)[:, : REAL_TOKENS + HELD_OUT]


def planted_activations() -> Tensor:
    return plant("plain", PLANTED_TOKENS + HELD_OUT, 0).x_ND[None]


@lru_cache(maxsize=1)
def stories_activations(bench: Path) -> Tensor:
    """All layers of the bench's model on its training rows, shuffled so that the held-out ones are like the others."""
    model = open_model(ModelSpec(path=str(bench / "model"), name="stories"))
    ids = np.load(bench / "train.npy")
    ids = ids[: (STORIES_TOKENS + HELD_OUT) // ids.shape[1]]
    source = open_source(model, range(model.num_layers), ids, "auto", "cpu")
    return torch.cat(list(source.batches()), 1)


def zoo_activations(study: Study, spec: ModelSpec) -> Tensor:
    """All layers of one model of a study on its training text."""
    model = open_model(spec)
    context = min(study.data.context, model.context)

    def rows() -> Iterator[TokenRows]:
        documents = read_documents(study.data, "train", study.training.seed)
        return stream_rows(documents, model.tokenizer, context, max(1, tokens_of_a_pass(model) // context))

    tokens = study.training.tokens + HELD_OUT
    source = TextSource(model, range(model.num_layers), rows, num_tokens=tokens)
    return torch.cat(list(source.batches()), 1)


def fvu_of(x_LND: Tensor, specs: dict[int, DictionarySpec], training: TrainingSpec) -> tuple[float, float]:
    """Mean FVU and share of dead features of the layers, on held-out tokens; infinite if a layer was given up."""
    source = ArraySource(x_LND[:, :-HELD_OUT].clone(), epochs=training.epochs)
    trained = train(source, specs, training, model="", num_layers=len(specs))
    if trained.failed:
        return math.inf, 1.0
    missed, dead = [], []
    for layer, dictionary in trained.own.items():
        x_ND = x_LND[layer, -HELD_OUT:].float()
        x_ND = x_ND[~dictionary.is_sink(x_ND)]
        f_NF = dictionary.encode(x_ND)
        error_ND, centred_ND = x_ND - dictionary.decode(f_NF), x_ND - x_ND.mean(0)
        missed.append(float(error_ND.square().sum() / centred_ND.square().sum()))
        dead.append(float((f_NF <= 0).all(0).float().mean()))
    return float(np.mean(missed)), float(np.mean(dead))


def sweep(work: Work) -> dict[str, Any]:
    """A line of the log: FVU and dead at every factor."""
    x_LND = work.activations()
    specs = work.specs(x_LND)
    auto = learning_rate(work.training, max(spec.width(x_LND.shape[2]) for spec in specs.values()))
    found = {factor: fvu_of(x_LND, specs, work.training.model_copy(update={"lr": factor * auto})) for factor in FACTORS}
    steps = work.training.step_tokens, work.training.num_steps
    return {"work": work.name, "auto": auto, "steps": steps, "found": found, "where": hardware_and_date()}


def row(line: dict[str, Any]) -> str:
    found = {float(factor): pair for factor, pair in line["found"].items()}
    best, at_auto = min(fvu for fvu, _ in found.values()), found[1.0][0]
    cells = " | ".join(f"{fvu:.4f} ({dead:.3f})" for fvu, dead in found.values())
    batch, steps = line["steps"]
    return f"| {line['work']} | {steps:,} of {batch:,} | {line['auto']:.2g} | {cells} | {100 * (at_auto / best - 1):.1f} % |"


def main() -> None:
    """Sweep all works that are not in the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--real", nargs="*", default=[])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    lines = [json.loads(line) for line in a.log.read_text().splitlines()] if a.log.exists() else []
    for work in works(a.stories, a.real):
        if a.only in work.name and work.name not in {line["work"] for line in lines}:
            lines.append(sweep(work))
            print(row(lines[-1]), flush=True)
            with a.log.open("a") as log:
                log.write(json.dumps(lines[-1]) + "\n")
    if a.write:
        head = " | ".join(f"{factor:g}" for factor in FACTORS)
        table = [
            f"| work | steps | auto | {head} | auto over best |",
            "|---|---|---" + "|---" * (len(FACTORS) + 1) + "|",
        ]
        said = (
            "`python benchmarks/learning_rate.py --stories BENCH --real BENCH:5,17,29 BENCH:2,8,14 --log FILE --write`; "
            f"{' and '.join(sorted({line['where'] for line in lines}))}; seed 0; the last {HELD_OUT:,} tokens held out. Columns: "
            "`auto` times the factor; mean FVU of the layers (share of dead features)."
        )
        write_between(QUALITY, "learning_rate", [said, "", *table, *map(row, lines)], "Learning rates")


if __name__ == "__main__":
    sys.exit(main())
