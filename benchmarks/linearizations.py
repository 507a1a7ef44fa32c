"""Which cheap prediction of a feature's effect holds, and why none holds everywhere: `python benchmarks/linearizations.py RUN ...`.

Prompts, targets, nodes and "off" are those of `tracing.py`; every active feature is set to its mean, one at a time. Predicted by

    plain, frozen, integrated     three of the linearisations that `trace` offers
    norms by halves               plain, but a norm's gradient is the mean of the true one and that with its divisor held still
    next block exactly            the change after one block as that block makes it, then the plain gradient (the last: the answer)
    grouped                       the fourth, and the default: for a layer's strongest nodes the mean gradient at the two Gauss
                                  points of their own ways to off, up to eight nodes in one copy of the text
    halfway                       the gradient where the feature is half off: one pass and its gradient for every node
    two points                    the mean gradient at the two Gauss points of that way

The first four cost a gradient for all nodes together; next block one block for each node; grouped at most 32 copies of the text
with their gradients for each layer; the last two more than the measurement.
Then the cause: the same effects when every feature goes only half and a quarter of its way.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pages import RESULTS, hardware_and_date, write_between
from torch import Tensor
from tracing import find_prompts, no_means, pearson, read

from throughline.models import LanguageModel
from throughline.models.structure import norm_follows
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.tracing.baselines import Baseline, find_baseline
from throughline.tracing.grouping import plan_copies, refine_effects
from throughline.tracing.interventions import Nodes, batch_copies, switch_off
from throughline.tracing.linearizing import Linearization, answer_gradients
from throughline.tracing.texts import Subject

GAUSS = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)
SHARES = (1.0, 0.5, 0.25)  # of each feature's way to off
ONE_GRADIENT: tuple[Linearization, ...] = ("plain", "frozen", "integrated")
CHEAP = (*ONE_GRADIENT, "norms by halves", "next block exactly", "grouped")
WAYS = (*CHEAP, "halfway", "two points")

Found = dict[str, list[np.ndarray]]  # by way or share, predicted over measured of each prompt


@contextmanager
def halved_norms(model: LanguageModel) -> Iterator[None]:
    """Inside, half of each norm's gradient is that of its divisor held still."""
    family = model.family

    def rule(module: torch.nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0]
        centred = x - x.mean(-1, keepdim=True) if family.centres else x
        held = family.scale_of_norm(module) * centred / centred.detach().square().mean(-1, keepdim=True).sqrt()
        mixed = (y + held) / 2
        return y.detach() + mixed - mixed.detach()

    with ExitStack() as stack:
        for module in [*model.structure.blocks.modules(), model.structure.final_norm]:
            if "norm" in type(module).__name__.lower() and norm_follows(module, family.centres, family.scale_of_norm):
                stack.callback(module.register_forward_hook(rule).remove)
        yield


def along(nodes: Nodes, steps_ND: Tensor, gradient_CTD: Tensor) -> np.ndarray:
    """Effects [N, C] of steps at the nodes' positions, by one gradient for all."""
    return torch.einsum("nd,cnd->nc", steps_ND, gradient_CTD[:, nodes.positions_N]).numpy()


def at_own_points(subject: Subject, nodes: Nodes, points: Sequence[float]) -> np.ndarray:
    """Effects by the mean gradient at these shares of each node's own way to off."""
    suffix, steps_ND, answer = subject.model.after(nodes.layer), nodes.steps(subject), subject.answer
    effects = []
    for chosen_B in batch_copies(subject, len(nodes)):
        rows_B = torch.arange(len(chosen_B))
        total = torch.zeros(len(chosen_B), len(answer.targets_C))
        for point in points:
            start = subject.clean.x[nodes.layer].repeat(len(chosen_B), 1, 1)
            start[rows_B, nodes.positions_N[chosen_B]] += point * steps_ND[chosen_B]
            start.requires_grad_()
            with torch.enable_grad():
                inputs = suffix.inputs(torch.tensor([answer.ids] * len(chosen_B)))
                logits = suffix.run(inputs, edits={nodes.layer: lambda _, s=start: s}, at=answer.read_P).logits
                assert logits is not None
                for c, score in enumerate(answer.scores(logits).sum(0)):
                    gradient_BTD = torch.autograd.grad(score, start, retain_graph=True)[0]
                    moved_BD = gradient_BTD[rows_B, nodes.positions_N[chosen_B]]
                    total[:, c] += (moved_BD * steps_ND[chosen_B]).sum(1) / len(points)
        effects.append(total)
    return torch.cat(effects).numpy()


@torch.no_grad()
def through_next_block(subject: Subject, nodes: Nodes, following: int, gradient_CTD: Tensor) -> np.ndarray:
    """Effects by the real change of the stream after the next traced layer, along the gradient there."""
    suffix, steps_ND = subject.model.after(nodes.layer), nodes.steps(subject)
    effects = []
    for chosen_B in batch_copies(subject, len(nodes)):
        start = subject.clean.x[nodes.layer].repeat(len(chosen_B), 1, 1)
        start[torch.arange(len(chosen_B)), nodes.positions_N[chosen_B]] += steps_ND[chosen_B]
        inputs = suffix.inputs(torch.tensor([subject.answer.ids] * len(chosen_B)))
        found = suffix.run(
            inputs, capture=[following], edits={nodes.layer: lambda _, s=start: s}, logits=False
        ).residuals
        effects.append(torch.einsum("btd,ctd->bc", found[following] - subject.clean.x[following], gradient_CTD))
    return torch.cat(effects).numpy()


def measure_prompt(subject: Subject) -> dict[str, list[np.ndarray]]:
    """By way and by share: for every traced layer, predicted over measured effects."""
    mean = find_baseline(subject, "mean", None, no_means)
    gradients = {how: answer_gradients(subject, mean, how) for how in ONE_GRADIENT}
    with halved_norms(subject.model):
        gradients["norms by halves"] = answer_gradients(subject, mean, "plain")
    found: dict[str, list[np.ndarray]] = {}
    for layer in subject.layers:
        nodes = nodes_of(subject, mean, layer)
        steps_ND, measured = nodes.steps(subject), switch_off(subject, nodes).scores_NC.numpy()
        predicted = {how: along(nodes, steps_ND, gradient[layer]) for how, gradient in gradients.items()}
        following = [other for other in subject.layers if other > layer][:1]
        predicted["next block exactly"] = (
            through_next_block(subject, nodes, following[0], gradients["plain"][following[0]])
            if following
            else measured
        )
        plain_NC = torch.from_numpy(predicted["plain"])
        predicted["grouped"] = refine_effects(subject, nodes, plain_NC, plan_copies(len(subject.answer.ids))).numpy()
        predicted["halfway"] = at_own_points(subject, nodes, (0.5,))
        predicted["two points"] = at_own_points(subject, nodes, GAUSS)
        pairs = {way: (values, measured) for way, values in predicted.items()}
        for share in SHARES:
            less = replace(nodes, off_N=nodes.own_N + share * (nodes.off_N - nodes.own_N))
            pairs[f"{share:g} of the way"] = (share * predicted["plain"], switch_off(subject, less).scores_NC.numpy())
        for way, pair in pairs.items():
            found.setdefault(way, []).append(np.stack([values.ravel() for values in pair]))
    return found


@torch.no_grad()
def nodes_of(subject: Subject, mean: Baseline, layer: int) -> Nodes:
    """The active features of a layer that the mean changes."""
    at = mean.nodes(subject, layer).nonzero(as_tuple=True)
    return Nodes(layer, *at, subject.clean.features[layer][at], mean.features[layer][at])


def measure_run(place: str, num_prompts: int) -> dict[str, dict[str, list[float]]]:
    """By model and way: r and slope of all nodes, and r by layer."""
    session, results = Session(RunDir.open(place), "cpu"), {}
    for spec in session.study.models:
        prompts = list(find_prompts(session.model(spec.name), "heldout", num_prompts))
        found = [measure_prompt(read(session, spec.name, prompt)) for prompt, _ in prompts]
        results[spec.name] = {way: summarize([one[way] for one in found]) for way in found[0]}
        sys.stderr.write(f"{place} {spec.name} {json.dumps(results[spec.name])}\n")
    return results


def summarize(prompts: list[list[np.ndarray]]) -> list[float]:
    """Pearson's r, the slope, and r of each layer."""
    layers = [np.concatenate([prompt[i] for prompt in prompts], axis=1) for i in range(len(prompts[0]))]
    pairs = np.concatenate(layers, axis=1)
    return [pearson(pairs), float(pairs[0] @ pairs[1] / (pairs[0] @ pairs[0])), *map(pearson, layers)]


def write_table(studies: dict[str, list[dict]], ways: Sequence[str], cell: Callable[[np.ndarray], str]) -> list[str]:
    """A row for each dictionary shape and model."""
    lines = [f"| dictionaries | model | {' | '.join(ways)} |", "|---|---|" + "---|" * len(ways)]
    for shape, seeds in studies.items():
        for model in seeds[0]:
            cells = [cell(np.array([seed[model][way] for seed in seeds])) for way in ways]
            lines.append(f"| {shape} | {model} | {' | '.join(cells)} |")
    return [*lines, ""]


def shape_of(place: str) -> str:
    """`288 features, 20 active`: what the study asks of most layers."""
    study = RunDir.open(place).study()
    return f"{study.name}: {study.dictionary.d_sae} features, {study.dictionary.k} active"


def main() -> None:
    """Print the tables; with --write, into docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="the numbers as JSON")
    parser.add_argument("--from", dest="source", type=Path, default=None, help="numbers of an earlier --out")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    studies: dict[str, list[dict]] = json.loads(options.source.read_text()) if options.source else {}
    for place in options.runs:
        studies.setdefault(shape_of(place), []).append(measure_run(place, options.prompts))
    if options.out:
        options.out.write_text(json.dumps(studies))
    seeds = min(len(found) for found in studies.values())
    lines = [
        f"`python benchmarks/linearizations.py RUNS --prompts {options.prompts} --write` on runs of these studies of `examples/`, "
        f"training.seed 0 to {seeds - 1}; {hardware_and_date()}. The prompts, nodes and effects "
        f"of the section before, the first {options.prompts} prompts of each model; r (slope), mean over seeds.",
        "",
        *write_table(studies, WAYS, lambda values: f"{values[:, 0].mean():.3f} ({values[:, 1].mean():.2f})"),
        "The first four take one gradient for all features, the fifth one block for each feature, grouped at most 32 copies of "
        "the text with their gradients for each layer, the last two more than measuring does. By layer, first to last, r of:",
        "",
        *write_table(
            studies, CHEAP[:1] + CHEAP[3:], lambda values: " ".join(f"{r:.2f}" for r in values[:, 2:].mean(0))
        ),
        "The plain gradient against steps that go only part of the way to off, r (slope). A prediction that falls short only "
        "because the score bends over large steps reaches 1 as they shrink:",
        "",
        *write_table(
            studies,
            [f"{share:g} of the way" for share in SHARES],
            lambda values: f"{values[:, 0].mean():.3f} ({values[:, 1].mean():.2f})",
        ),
    ]
    print("\n".join(lines))
    if options.write:
        write_between(RESULTS, "linearizations", lines, "Traces: other predictions, and why none holds everywhere")


if __name__ == "__main__":
    main()
