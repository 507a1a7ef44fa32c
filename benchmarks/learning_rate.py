"""Is `lr: auto` right? A sweep over a factor of ten around it, on real activations and on planted ones.

    python benchmarks/learning_rate.py --stories BENCH [--write]

BENCH is the stories bench (`model` and `train.npy`). For each work a dictionary of every layer is trained at each learning rate;
what counts is the mean FVU of the layers on held-out tokens. `--write` puts the table into docs/quality.md.
"""

import argparse
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

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
HELD_OUT = 20_000
STORIES_TOKENS, PLANTED_TOKENS = 400_000, 1_000_000


class Work(NamedTuple):
    """Activations of all layers, the last of them held out, and what is trained on them."""

    name: str
    x_LND: Tensor
    specs: dict[int, DictionarySpec]
    training: TrainingSpec


def works(stories: Path) -> Iterator[Work]:
    """Stories at two sparsities, two models of the zoo as the demo has them, planted directions at two architectures."""
    x_LND = stories_activations(stories)
    tokens = x_LND.shape[1] - HELD_OUT
    training = TrainingSpec(tokens=tokens, batch_tokens=128, passes=2)
    for k in (32, 8):
        yield Work(f"stories, k = {k}", x_LND, dict.fromkeys(range(len(x_LND)), DictionarySpec(k=k)), training)
    study = load_study(str(files("throughline") / "presets" / "demo.yaml"))
    for name in ("zoo/pythia", "zoo/gemma"):
        spec = study.model(name)
        x_LND = zoo_activations(study, spec)
        specs = {layer: study.dictionary_for(spec).at_layer(layer) for layer in range(len(x_LND))}
        yield Work(f"{name}, as in the demo", x_LND, specs, study.training)
    x_ND = plant("plain", PLANTED_TOKENS + HELD_OUT, 0).x_ND
    for architecture in ("topk", "batch_topk"):
        spec = DictionarySpec(architecture=architecture, d_sae=NUM_FEATURES, target_l0=MEAN_L0)
        training = TrainingSpec(tokens=PLANTED_TOKENS, batch_tokens=1024)
        yield Work(f"planted, plain, {architecture}", x_ND[None], {0: spec}, training)


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


def fvu_of(work: Work, lr: float) -> tuple[float, float]:
    """Mean FVU and share of dead features of the layers, on held-out tokens."""
    training = work.training.model_copy(update={"lr": lr})
    trained = train(
        ArraySource(work.x_LND[:, :-HELD_OUT]), work.specs, training, model=work.name, num_layers=len(work.specs)
    )
    missed, dead = [], []
    for layer, dictionary in trained.own.items():
        x_ND = work.x_LND[layer, -HELD_OUT:].float()
        f_NF = dictionary.encode(x_ND)
        error_ND, centred_ND = x_ND - dictionary.decode(f_NF), x_ND - x_ND.mean(0)
        missed.append(float(error_ND.square().sum() / centred_ND.square().sum()))
        dead.append(float((f_NF <= 0).all(0).float().mean()))
    return float(np.mean(missed)), float(np.mean(dead))


def sweep(work: Work) -> str:
    """One row of the table."""
    widths = {spec.width(work.x_LND.shape[2]) for spec in work.specs.values()}
    auto = learning_rate(work.training, max(widths))
    found = [fvu_of(work, factor * auto) for factor in FACTORS]
    best, at_auto = min(fvu for fvu, _ in found), found[FACTORS.index(1.0)]
    cells = " | ".join(f"{fvu:.4f} ({dead:.3f})" for fvu, dead in found)
    return f"| {work.name} | {auto:.2g} | {cells} | {100 * (at_auto[0] / best - 1):.1f} % |"


def main() -> None:
    """Sweep all works, print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    head = " | ".join(f"{factor:g}" for factor in FACTORS)
    table = [f"| work | auto | {head} | auto over best |", "|---|---" + "|---" * (len(FACTORS) + 1) + "|"]
    print("\n".join(table), flush=True)
    for work in works(a.stories):
        table.append(sweep(work))
        print(table[-1], flush=True)
    if a.write:
        said = (
            f"`python benchmarks/learning_rate.py --stories BENCH --write`; {hardware_and_date()}; seed 0; the last "
            f"{HELD_OUT:,} tokens held out. Columns: `auto` times the factor; mean FVU of the layers (share of dead features)."
        )
        write_between(QUALITY, "learning_rate", [said, "", *table], "Learning rates")


if __name__ == "__main__":
    sys.exit(main())
