"""What the layers of real language models ask of training: how long their tokens are, and what becomes of dictionaries of them.

    python benchmarks/real_models.py norms FOLDER --text FILE.jsonl
    python benchmarks/real_models.py train FOLDER --text FILE.jsonl --layers 5,17,29 --settings power=0 power=0.5 power=1

FOLDER is a Hugging Face model, or package:NAME. `norms` prints a line a layer: median, quantiles, the widest band without a token
above a quarter of the tokens, and how many are sinks. `train` makes the activations once and trains on them again and again, with
`lr`, `batch`, `expansion`, `k`, `architecture`, `power` (of the spread by which a coordinate is scaled), `beta` (Adam's first) and
`start` (`whitened` or `data`); it prints FVU, FVU of the mean coordinate, dead features and what splicing costs (nats a token), on
held-out tokens.
Every text begins with BOS (data.bos: always), which counts nowhere. Rows of Markdown; `--write NAME` puts them between the marks of
that name in docs/real-models.md, with `--heading` if they are new.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import hardware_and_date, write_between
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from throughline.dictionaries import Dictionary
from throughline.dictionaries import stack as stacks
from throughline.harvesting import harvest, tokens_of_a_pass
from throughline.models import LanguageModel, open_model
from throughline.sinks import LEAST, MOST_SHARE, find_sink_norm
from throughline.study import DataSpec, DictionarySpec, ModelSpec, TrainingSpec
from throughline.text import read_documents
from throughline.tokens import TokenRows, stream_rows
from throughline.training import compiled, engine, group, plain, train
from throughline.training.engine import learning_rate
from throughline.training.sources import ArraySource

PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"
CONTEXT = 128
SPLICED_ROWS = 16
STARTS = {"whitened": stacks.whiten, "data": lambda rows_AD, _: normalize(rows_AD)}  # what first directions are made of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["norms", "train"])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--template", default="{question}\n{answer}")
    parser.add_argument("--bos", default="always")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--layers", default="")
    parser.add_argument("--settings", nargs="*", default=[""])
    parser.add_argument("--write", default="")
    parser.add_argument("--heading", default="")
    asked = parser.parse_args()
    model = open_model(ModelSpec(path=asked.model, name=Path(asked.model).name.removeprefix("package:")), bos=asked.bos)
    layers = [int(n) for n in asked.layers.split(",")] if asked.layers else list(range(model.num_layers))
    rows = read_rows(model, DataSpec(path=asked.text, text=asked.template, context=CONTEXT))
    lines = list(
        norms(model, layers, rows, asked.tokens) if asked.what == "norms" else sweep(model, layers, rows, asked)
    )
    command = f"python benchmarks/real_models.py {asked.what} {model.name} --bos {asked.bos} --tokens {asked.tokens}"
    lines = [f"`{command}`; {hardware_and_date()}.", "", *lines]
    print("\n".join(lines))
    if asked.write:
        write_between(PAGE, asked.write, lines, asked.heading or asked.write)


def read_rows(model: LanguageModel, data: DataSpec) -> Iterator[TokenRows]:
    documents = read_documents(data, "train", 0)
    return stream_rows(documents, model.tokenizer, CONTEXT, max(1, tokens_of_a_pass(model) // CONTEXT))


def collect(model: LanguageModel, layers: list[int], rows: Iterator[TokenRows], num_tokens: int) -> Tensor:
    """Activations [L, N, D] of the first tokens that count."""
    parts, count = [], 0
    for _, x_LND in harvest(model, rows, layers, torch.get_num_threads()):
        parts.append(x_LND)
        count += x_LND.shape[1]
        if count >= num_tokens:
            break
    return torch.cat(parts, 1)[:, :num_tokens]


# ---- norms


def norms(model: LanguageModel, layers: list[int], rows: Iterator[TokenRows], num_tokens: int) -> Iterator[str]:
    yield "| layer | median | 90 % | 99 % | longest ordinary | limit | sinks | of | shortest sink | their variance | widest band |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    x_LND = collect(model, layers, rows, num_tokens)
    for layer, x_ND in zip(layers, x_LND, strict=True):
        norm_N, limit = x_ND.norm(dim=1), find_sink_norm(x_ND)
        median = norm_N.median()
        ordinary, sinks = (norm_N[norm_N <= limit] / median), (norm_N[norm_N > limit] / median)
        variance_N = (x_ND - x_ND.mean(0)).square().sum(1)
        share = float(variance_N[norm_N > limit].sum() / variance_N.sum())
        sorted_N = (norm_N / median).sort().values[math.floor((1 - MOST_SHARE) * len(norm_N)) :]
        bands = torch.where(sorted_N[1:] >= LEAST, sorted_N[1:] / sorted_N[:-1], 1.0)
        quantiles = torch.quantile(ordinary[:1_000_000], torch.tensor([0.9, 0.99])).tolist()
        yield (
            f"| {layer} | {median:.4g} | {quantiles[0]:.2f} | {quantiles[1]:.2f} | {ordinary.max():.2f} | {limit / median:.2f} | "
            f"{len(sinks)} | {len(norm_N):,} | {f'{sinks.min():.2f}' if len(sinks) else '–'} | {share:.1%} | {bands.max():.2f} |"
        )


# ---- training


def sweep(model: LanguageModel, layers: list[int], rows: Iterator[TokenRows], asked: Any) -> Iterator[str]:
    num_held = 8192
    x_LND = collect(model, layers, rows, asked.tokens + num_held)
    train_LND, held_LND = x_LND[:, : asked.tokens], x_LND[:, asked.tokens :]
    spliced = next(rows).select(slice(SPLICED_ROWS))
    yield f"| setting | lr | steps | seconds | {' | '.join(f'layer {layer}' for layer in layers)} | mean |"
    yield "|" + "---|" * (5 + len(layers))
    for setting in asked.settings:
        chosen = {"batch": "auto", "lr": "auto", "expansion": "8", "k": "32", "architecture": "topk"}
        chosen |= dict(part.split("=") for part in setting.split(",") if part)
        with_settings(chosen)
        batch, lr = (chosen[n] if chosen[n] == "auto" else float(chosen[n]) for n in ("batch", "lr"))
        training = TrainingSpec(tokens=asked.tokens, batch_tokens=batch if batch == "auto" else int(batch), lr=lr)
        spec = DictionarySpec(
            architecture=chosen["architecture"], expansion=float(chosen["expansion"]), k=int(chosen["k"])
        )
        started = time.perf_counter()
        found = train(
            ArraySource(train_LND.clone()),
            dict.fromkeys(layers, spec),
            training,
            model=model.name,
            num_layers=model.num_layers,
        )
        seconds = time.perf_counter() - started
        cells, costs = [], splice(model, found.own, spliced)
        sums = torch.zeros(4)
        for i, layer in enumerate(layers):
            if layer in found.failed:
                cells.append("given up")
                continue
            measured = (*judge(found.own[layer], held_LND[i]), costs[layer])
            sums += torch.tensor(measured)
            cells.append("{:.3f}, {:.2f}, {:.0%}, {:+.2f}".format(*measured))
        mean = "{:.3f}, {:.2f}, {:.0%}, {:+.2f}".format(*(sums / max(1, len(found.own))).tolist())
        rate = learning_rate(training, spec.width(model.d_model))
        yield (
            f"| {setting or 'as it is'} | {rate:.1e} | {training.num_steps} | {seconds:.0f} | {' | '.join(cells)} | {mean} |"
        )


def with_settings(chosen: dict[str, str]) -> None:
    engine.SPREAD_POWER = float(chosen.get("power", 0.5))
    for module in (group, compiled, plain):
        module.BETAS = float(chosen.get("beta", 0.9)), 0.99
    stacks.whiten = STARTS[chosen.get("start", "whitened")]


@torch.no_grad()
def judge(one: Dictionary, x_ND: Tensor) -> tuple[float, float, float]:
    """FVU, FVU of the mean coordinate, share of dead features, sinks left out."""
    x_ND = x_ND[~one.is_sink(x_ND)]
    f_NF = one.encode(x_ND)
    error_D = (x_ND - one.decode(f_NF)).square().sum(0)
    variance_D = (x_ND - x_ND.mean(0)).square().sum(0)
    return (
        float(error_D.sum() / variance_D.sum()),
        float((error_D / variance_D).mean()),
        float((f_NF == 0).all(0).float().mean()),
    )


@torch.no_grad()
def splice(model: LanguageModel, dictionaries: dict[int, Dictionary], rows: TokenRows) -> dict[int, float]:
    """By layer what the dictionary in the stream's place costs, nats a token."""
    total, count = dict.fromkeys((-1, *dictionaries), 0.0), 0
    for part in rows.batches(4):
        inputs = model.inputs(part.ids, part.positions, part.pieces)
        clean = model.run(inputs, capture=list(dictionaries))
        predicted = torch.from_numpy((part.pieces[:, 1:] == part.pieces[:, :-1]) & part.keep[:, 1:])
        targets = torch.from_numpy(part.ids[:, 1:])[predicted]
        count += len(targets)
        for layer in total:
            logits = clean.logits
            if layer >= 0:
                x_BTD = clean.residuals[layer].clone()
                keep = torch.from_numpy(part.keep)
                x_BTD[keep] = dictionaries[layer].reconstruct(x_BTD[keep])
                logits = model.after(layer).run(inputs, edits={layer: lambda _, x=x_BTD: x}).logits
            assert logits is not None
            total[layer] += float(cross_entropy(logits[:, :-1][predicted].float(), targets, reduction="sum"))
    return {layer: (total[layer] - total[-1]) / count for layer in dictionaries}


if __name__ == "__main__":
    main()
