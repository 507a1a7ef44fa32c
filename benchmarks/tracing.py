"""How well predictions of traces hold, over prompts and seeds: `python benchmarks/tracing.py RUN [RUN ...] [--prompts 50]`.

RUNs of one study with several seeds (`--set training.seed=1`) are one section. Prompts: "What is a + b?" with held-out pairs of
operands, a carry, a sum below 100, answered correctly by the model; the same for every seed.

    nodes         every active feature at every position of every layer is set to its mean at the same position of 200 other
                  problems, one at a time; change of each target's score, measured, against what grouped gradients predict (the
                  default of `trace`) and against plain gradient times change
    edges         the same features, those that the graph keeps; change of the next layer's kept features before selection
    faithfulness  against the no-carry counterfactual, features recomputed, errors the counterfactual's
    carry         features that tell carry from no carry at one place are set to their means without carry; does the model then
                  say the sum less ten? Place and features are chosen on training problems
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pages import RESULTS, hardware_and_date, write_between
from scipy.stats import rankdata

from throughline.models import LanguageModel
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.tokens import encode_prompt
from throughline.tracing.answer import find_answer, spell
from throughline.tracing.baselines import find_baseline
from throughline.tracing.faithfulness import SHARE_ACTIVE, measure_faithfulness
from throughline.tracing.graph import build_graph
from throughline.tracing.interventions import switch_off
from throughline.tracing.texts import Subject, find_subject
from throughline.zoo.texts import pose_problem, sample_problems

TEMPLATE = "plus sign"
NOTICEABLE = 0.02  # of the answer score


class Pairs(NamedTuple):
    """Predicted and measured effects of one prompt's nodes of one layer on every target, and the smallest that has a sign."""

    grouped: np.ndarray
    plain: np.ndarray
    measured: np.ndarray
    noticeable: float


def find_prompts(model: LanguageModel, split: str, num: int, seed: int = 5) -> Iterator[tuple[str, str]]:
    """Different problems with a carry and a sum below 100 that the model solves, with their answers."""
    seen: set[str] = set()
    for document in sample_problems(split, seed, TEMPLATE):
        prompt, answer = document.text[: document.answer_start], document.text[document.answer_start :].strip()
        facts = {fact.name: fact.value for fact in document.facts}
        if prompt in seen or int(answer) >= 100 or facts["carry"] != 1:
            continue
        seen.add(prompt)
        if _says(model, prompt) == answer:
            yield prompt, answer
            num -= 1
            if not num:
                return


def _says(model: LanguageModel, prompt: str) -> str:
    ids = [token.id for token in encode_prompt(model.tokenizer, prompt)]
    return spell(model, ids, model.generate(ids, 8)).strip()


def read(session: Session, name: str, prompt: str) -> Subject:
    """The subject of a trace of `prompt`."""
    model = session.model(name)
    tokens = encode_prompt(model.tokenizer, prompt)
    return find_subject(
        model, session.dictionaries(name), prompt, tokens, find_answer(model, [t.id for t in tokens], 8)
    )


def no_means(layer: int) -> np.ndarray:
    """These prompts are of the generator's forms, so means by role are never asked for."""
    raise AssertionError(layer)


def measure_prompt(subject: Subject) -> dict[str, Any]:
    """Nodes, edges and faithfulness of one prompt."""
    mean = find_baseline(subject, "mean", None, no_means)
    graph = build_graph(subject, mean, "grouped", 0.8, 24)
    noticeable = NOTICEABLE * abs(float(np.mean(subject.scores)))
    nodes, within, across = {}, [], []
    for layer, mine in graph.layers.items():
        after = [other for other in graph.layers if other > layer][:1]
        effects = switch_off(subject, mine.nodes, graph.layers[after[0]].kept if after else None)
        plain_NC = (mine.nodes.off_N - mine.nodes.own_N)[:, None] * mine.per_unit_NC
        measured = effects.scores_NC.numpy()
        nodes[layer] = Pairs(mine.predicted_NC.numpy(), plain_NC.numpy(), measured, noticeable)
        if after:
            kept, above = mine.kept_M, graph.layers[after[0]].kept
            steps = (mine.nodes.off_N - mine.nodes.own_N)[kept][:, None]
            predicted = (steps * graph.boundaries[layer].per_unit.T).numpy()
            linear, gated = (t[kept].numpy() for t in (effects.linear_NM, effects.activation_NM))
            here, there = mine.nodes.positions_N[kept].numpy()[:, None], above.positions_N.numpy()[None]
            for mask, into in ((here == there, within), (here < there, across)):
                into.append(np.stack([predicted[mask], linear[mask], gated[mask]]))
    return {
        "nodes": nodes,
        "within": np.concatenate(within, axis=1),
        "across": np.concatenate(across, axis=1),
        "faithfulness": measure_set(subject),
    }


def measure_set(subject: Subject) -> dict[str, float]:
    """Faithfulness of 64 nodes and of a fifth of the active ones, against the counterfactual."""
    against = find_baseline(subject, "counterfactual", None, no_means)
    assert against.others_C is not None
    points, _ = measure_faithfulness(subject.held_against(against.others_C), against, seed=0)
    active = sum(int((subject.clean.features[layer][subject.kept_T] > 0).sum()) for layer in subject.layers)
    by_size = {p.num: p for p in points}
    found = {"none": by_size[0].faithfulness, "none_kept": by_size[0].answer_kept, "active": active}
    for word, size in (("64", 64), ("fifth", int(SHARE_ACTIVE * active))):
        point = by_size.get(size, points[-1])
        found |= {word: point.faithfulness, f"{word}_kept": point.answer_kept, f"{word}_random": point.random}
        found |= {f"{word}_without": point.completeness}
    return found


# ---- carry

OFFSETS = (-2, -1, 0, 1)  # places that carry may be told at, from the prompt's last token; 1 is the answer's first
TELLS = 0.7  # AUROC, or 1 minus it, from which a feature tells carry
RANDOM_DRAWS = 5

Values = dict[tuple[int, int], torch.Tensor]  # by layer and offset


class Additions(NamedTuple):
    """Problems as tokens, answers included, all as long; `plain` are the same with units that do not carry, and the same answer."""

    rows: list[list[int]]
    plain: list[list[int]]
    num_prompt: int


class Swap(NamedTuple):
    """Features by layer and offset, and the values they are set to, [F] or by problem [N, F]."""

    features: Values
    values: Values


def swap_carry(session: Session, name: str, prompts: list[tuple[str, str]]) -> dict[str, Any]:
    """How often the model then says the sum less ten: by a pair of features, by sets, by random ones, by the whole stream.

    What tells carry, and the best layer and place, are chosen on training problems.
    """
    model, dictionaries = session.model(name), session.dictionaries(name)
    train = list(find_prompts(model, "train", 400, seed=11))
    chosen, test = _additions(model, train), _additions(model, prompts)
    carry, plain = (_features(session, name, rows, chosen.num_prompt) for rows in (chosen.rows, chosen.plain))
    area = {at: _auroc(carry[at], plain[at]) for at in carry}
    means = {at: plain[at].mean(0) for at in plain}
    every = Swap({at: ((area[at] >= TELLS) | (area[at] <= 1 - TELLS)).nonzero()[:, 0] for at in area}, means)
    counterparts = _features(session, name, test.plain, test.num_prompt)
    pairs = {at: Swap({at: torch.stack([area[at].argmax(), area[at].argmin()])}, means) for at in area}
    few = Additions(chosen.rows[:100], chosen.plain[:100], chosen.num_prompt)
    pair = max(pairs.values(), key=lambda swap: _success(session, name, few, swap))
    layers = {
        layer: Swap({at: f for at, f in every.features.items() if at[0] == layer}, means) for layer in dictionaries
    }
    layer = max(layers.values(), key=lambda swap: _success(session, name, few, swap))
    streams = {at: _patch(session, name, few, at) for at in area}
    best = max(streams, key=lambda at: streams[at])
    found: dict[str, Any] = {
        "n": len(test.rows),
        "residual": _patch(session, name, test, best),
        "residual site": str(best),
    }
    for way, swap in (("pair", pair), ("layer set", layer), ("set", every)):
        found[way] = _success(session, name, test, swap)
        found[f"{way} counterparts"] = _success(session, name, test, Swap(swap.features, counterparts))
        found[f"{way} random"] = float(
            np.mean(
                [_success(session, name, test, _draw_like(swap, carry, counterparts, i)) for i in range(RANDOM_DRAWS)]
            )
        )
        found[f"{way} size"] = sum(len(f) for f in swap.features.values())
        found[f"{way} sites"] = str(sorted({at if way == "pair" else at[0] for at in swap.features}))
    return found


def _additions(model: LanguageModel, prompts: list[tuple[str, str]]) -> Additions:
    rows, plain = [], []
    for prompt, answer in prompts:
        a, b = (int(word.rstrip("?")) for word in prompt.split() if word.rstrip("?").isdigit())
        other = pose_problem(TEMPLATE, a, b - b % 10 + 9 - a % 10)
        pair = [_ids(model, text, answer) for text in (prompt, other.text[: other.answer_start])]
        if len(pair[0]) == len(pair[1]) == len(rows[0] if rows else pair[0]):
            rows.append(pair[0])
            plain.append(pair[1])
    return Additions(rows, plain, len(encode_prompt(model.tokenizer, prompts[0][0])))


def _ids(model: LanguageModel, prompt: str, answer: str) -> list[int]:
    return [token.id for token in encode_prompt(model.tokenizer, f"{prompt} {answer}")]


@torch.no_grad()
def _features(session: Session, name: str, rows: list[list[int]], num_prompt: int) -> Values:
    """Features [N, F] at every layer and offset."""
    model, dictionaries = session.model(name), session.dictionaries(name)
    found = model.run(model.inputs(torch.tensor(rows)), capture=dictionaries, logits=False).residuals
    offsets = [offset for offset in OFFSETS if num_prompt - 1 + offset < len(rows[0])]
    return {
        (layer, offset): dictionary.encode(found[layer][:, num_prompt - 1 + offset].float())
        for layer, dictionary in dictionaries.items()
        for offset in offsets
    }


def _auroc(one_NF: torch.Tensor, other_NF: torch.Tensor) -> torch.Tensor:
    """How well each feature's size tells the first rows from the others."""
    ranks = torch.from_numpy(rankdata(torch.cat([one_NF, other_NF]).numpy(), axis=0)).float()
    n, m = len(one_NF), len(other_NF)
    return (ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)


def _draw_like(swap: Swap, carry: Values, counterparts: Values, seed: int) -> Swap:
    """As many other features at the same places, drawn in proportion to how often they are active."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for at, features in swap.features.items():
        density_F = (carry[at] > 0).float().mean(0)
        density_F[features] = 0
        num = min(len(features), int((density_F > 0).sum()))
        drawn[at] = torch.multinomial(density_F, num, generator=generator) if num else features[:0]
    return Swap(drawn, counterparts)


@torch.no_grad()
def _success(session: Session, name: str, problems: Additions, swap: Swap) -> float:
    model, dictionaries = session.model(name), session.dictionaries(name)

    def edit_of(layer: int) -> Any:
        dictionary = dictionaries[layer]

        def edit(x_BTD: torch.Tensor) -> torch.Tensor:
            out = x_BTD.clone()
            for (mine, offset), features in swap.features.items():
                if mine == layer and len(features):
                    at = problems.num_prompt - 1 + offset
                    f_BF = dictionary.encode(x_BTD[:, at].float())
                    new_BF = swap.values[mine, offset].expand_as(f_BF)
                    out[:, at] += (new_BF - f_BF)[:, features] @ dictionary.W_dec[features]
            return out

        return edit

    return _share_less_ten(model, problems, {layer: edit_of(layer) for layer in {at[0] for at in swap.features}})


@torch.no_grad()
def _patch(session: Session, name: str, problems: Additions, site: tuple[int, int]) -> float:
    """The whole stream at one place taken from the problem that does not carry."""
    model, position = session.model(name), problems.num_prompt - 1 + site[1]
    inputs = model.inputs(torch.tensor(problems.plain))
    x_BTD = model.run(inputs, capture=[site[0]], logits=False).residuals[site[0]]

    def edit(own_BTD: torch.Tensor) -> torch.Tensor:
        out = own_BTD.clone()
        out[:, position] = x_BTD[:, position]
        return out

    return _share_less_ten(model, problems, {site[0]: edit})


@torch.no_grad()
def _share_less_ten(model: LanguageModel, problems: Additions, edits: Any) -> float:
    """How often the first token that is not white space is that of the sum less ten."""
    rows, first = problems.rows, problems.num_prompt
    logits = model.run(model.inputs(torch.tensor(rows)), edits=edits).logits
    assert logits is not None
    hits = []
    for ids, logits_TV in zip(rows, logits, strict=True):
        place = next(i for i in range(first, len(ids)) if model.tokenizer.decode([ids[i]]).strip())
        less = int(model.tokenizer.decode(ids[first:]).strip()) - 10
        wanted = _ids(model, model.tokenizer.decode(ids[:first], skip_special_tokens=True), str(less))
        hits.append(len(wanted) == len(ids) and int(logits_TV[place - 1].argmax()) == wanted[place])
    return float(np.mean(hits))


# ---- summaries


def pearson(pairs: np.ndarray) -> float:
    """Pearson's r of two rows."""
    return float(np.corrcoef(pairs[0], pairs[1])[0, 1])


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One model and seed: numbers over its prompts."""
    within, across = (np.concatenate([f[key] for f in found], axis=1) for key in ("within", "across"))
    sets = [f["faithfulness"] for f in found]
    return {
        **{f"{way} {key}": value for way in WAYS for key, value in summarize_nodes(found, way).items()},
        "nodes n": sum(pairs.measured.size for f in found for pairs in f["nodes"].values()),
        "within r": pearson(within[:2]),
        "across r": pearson(across[:2]),
        "across gated r": pearson(across[::2]),
        "across n": int(across.shape[1]),
        **{f"set {key}": float(np.mean([s[key] for s in sets])) for key in sets[0]},
    }


def summarize_nodes(found: list[dict[str, Any]], way: str) -> dict[str, Any]:
    """Effects as predicted by `way` against those measured."""

    def flat(which: list[dict[str, Any]], layer: int | None = None) -> np.ndarray:
        parts = [p for f in which for key, p in f["nodes"].items() if layer in (None, key)]
        return np.stack([np.concatenate([getattr(p, name).ravel() for p in parts]) for name in (way, "measured")])

    everything, layers = flat(found), [flat(found, layer) for layer in found[0]["nodes"]]
    signed = [
        (getattr(p, way), p.measured, np.abs(p.measured) > p.noticeable) for f in found for p in f["nodes"].values()
    ]
    shuffled = np.random.default_rng(0).permutation(everything[0])
    return {
        "r": pearson(everything),
        "slope": slope(everything),
        "sign": float(np.concatenate([(np.sign(a) == np.sign(b))[big] for a, b, big in signed]).mean()),
        "r median prompt": float(np.median([pearson(flat([f])) for f in found])),
        "r shuffled": pearson(np.stack([shuffled, everything[1]])),
        "r by layer": [pearson(pairs) for pairs in layers],
        "slope by layer": [slope(pairs) for pairs in layers],
    }


def slope(pairs: np.ndarray) -> float:
    """Of the second row on the first, through the origin."""
    return float(pairs[0] @ pairs[1] / (pairs[0] @ pairs[0]))


WAYS = ("grouped", "plain")
NODES = tuple(
    (f"{way} {key}", f"{words}{of}")
    for key, words in (
        ("r", "Pearson, all nodes"),
        ("r median prompt", "Pearson, median prompt"),
        ("slope", "slope"),
        ("sign", "sign"),
        ("r shuffled", "r shuffled (null)"),
    )
    for way, of in zip(WAYS, ("", ", plain"), strict=True)
)
EDGES = (
    ("within r", "edges within a position"),
    ("across r", "edges between positions"),
    ("across gated r", "the same after selection"),
)
SETS = (
    ("set 64", "64 nodes"),
    ("set 64_kept", "answers"),
    ("set fifth", "a fifth of the active"),
    ("set fifth_kept", "answers"),
    ("set none", "none"),
    ("set 64_random", "64 at random"),
    ("set fifth_random", "a fifth at random"),
    ("set fifth_without", "all but the fifth"),
    ("set active", "active"),
)
SWAPS = (
    *((f"carry {way}{kind}", f"{way}{words}") for way in ("pair", "layer set", "set")
      for kind, words in (("", ""), (" counterparts", ", values of the other prompt"), (" random", ", random features"))),
    ("carry set size", "features in the set"),
    ("carry residual", "whole stream"),
)  # fmt: skip


def write_table(results: dict[str, list[dict[str, Any]]], rows: tuple[tuple[str, str], ...]) -> list[str]:
    """Mean over seeds, and their range, a row for each model."""
    lines = [f"| model | {' | '.join(words for _, words in rows)} |", "|---|" + "---|" * len(rows)]
    for model, seeds in results.items():
        cells = []
        for key, _ in rows:
            values = [numbers[key] for numbers in seeds]
            exact = ".0f" if max(values) > 20 else ".2f"
            spread = (
                f" ({min(values):{exact}}–{max(values):{exact}})" if len(values) > 1 and key != "carry set size" else ""
            )
            cells.append(f"{np.mean(values):{exact}}{spread}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return [*lines, ""]


def write_results(study: str, results: dict[str, list[dict[str, Any]]], num_prompts: int) -> list[str]:
    """A section of docs/results.md."""
    seeds = len(next(iter(results.values())))
    effects = ", ".join(f"{model} {np.mean([n['nodes n'] for n in found]):,.0f}" for model, found in results.items())
    edges = ", ".join(f"{model} {np.mean([n['across n'] for n in found]):,.0f}" for model, found in results.items())
    layers = [
        f"- {model}, {way}: " + ", ".join(f"{r:.2f}" for r in np.mean([n[f"{way} r by layer"] for n in found], axis=0))
        + "; slopes " + ", ".join(f"{r:.2f}" for r in np.mean([n[f"{way} slope by layer"] for n in found], axis=0))
        for model, found in results.items() for way in WAYS
    ]  # fmt: skip
    return [
        f"`python benchmarks/tracing.py RUNS --prompts {num_prompts} --write` on runs of `examples/{study}.yaml` with "
        f"training.seed 0 to {seeds - 1}; {hardware_and_date()}. {num_prompts} held-out additions with a carry and a sum below 100 "
        f"that the model answers correctly; mean over {seeds} seeds (range).",
        "",
        "Predicted by grouped gradients, the default of `trace`, and by the plain gradient, against measured: every active feature "
        "set to its mean at the same position of other problems, one at a time (effects on answer tokens, by seed: "
        f"{effects}). Wanted of the first: r at least 0.95, slope 0.9 to 1.15, signs at least 0.98.",
        "",
        *write_table(results, NODES),
        f"Edges, by the plain gradient, to kept features of the next layer (between positions: {edges}), Pearson:",
        "",
        *write_table(results, EDGES),
        "Pearson by layer, first to last:",
        "",
        *layers,
        "",
        "Faithfulness against the no-carry counterfactual, kept features recomputed, errors the counterfactual's: share of the "
        "lead that n nodes keep by themselves, and share of answers kept.",
        "",
        *write_table(results, SETS),
        "Carry: share of problems after which the first digit of the answer is that of the sum less ten, when features that tell "
        f"carry (AUROC ≥ {TELLS} or ≤ {1 - TELLS:.1f} on training problems) are set to their means without carry. The set is all "
        "of them in all layers, at the last two digits' places and the two after them; the layer set is the best layer's; layer "
        "and pair are chosen on training problems.",
        "",
        *write_table(results, SWAPS),
    ]


def main() -> None:
    """Measure every run given and print tables; with --write, into docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--models", default=None)
    parser.add_argument("--out", type=Path, default=None, help="the numbers as JSON")
    parser.add_argument("--from", dest="source", type=Path, default=None, help="numbers of an earlier --out")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    studies = json.loads(options.source.read_text()) if options.source else measure_runs(options)
    if options.out:
        options.out.write_text(json.dumps(studies))
    for study, results in studies.items():
        lines = write_results(study, results, options.prompts)
        print("\n".join(lines))
        if options.write:
            write_between(
                RESULTS, f"tracing {study}", lines, f"Traces of {study}: what is predicted and what is measured"
            )


def measure_runs(options: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By study and model, the numbers of each run."""
    studies: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for place in options.runs:
        session = Session(RunDir.open(place), "cpu")
        results = studies.setdefault(session.study.name, {})
        for spec in session.study.models:
            if options.models and spec.name not in options.models.split(","):
                continue
            prompts = list(find_prompts(session.model(spec.name), "heldout", options.prompts))
            found = [measure_prompt(read(session, spec.name, prompt)) for prompt, _ in prompts]
            numbers = summarize(found) | {f"carry {k}": v for k, v in swap_carry(session, spec.name, prompts).items()}
            results.setdefault(spec.name, []).append(numbers)
            sys.stderr.write(f"{place} {spec.name} n={len(prompts)}\n" + json.dumps(numbers, default=float) + "\n")
    return studies


if __name__ == "__main__":
    main()
