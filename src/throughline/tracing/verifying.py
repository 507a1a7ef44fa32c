"""Predicted against measured: for the nodes that are shown, for the edges between them, and for random features as the control."""

from collections.abc import Mapping

import numpy as np
import torch

from throughline.records import Agreement, Verification
from throughline.stats import pearson
from throughline.tracing.baselines import Baseline
from throughline.tracing.faithfulness import RANDOM_DRAWS, measure_faithfulness
from throughline.tracing.graph import Graph, measure_scores
from throughline.tracing.showing import Shown
from throughline.tracing.texts import Subject

NOTICEABLE = 0.02  # of the answer score (nodes) or of the largest change (edges): smaller ones have no sign to speak of


def verify(subject: Subject, baseline: Baseline, graph: Graph, shown: Mapping[int, Shown], seed: int) -> Verification:
    """Predicted against measured of what is shown, and how faithful the most influential nodes are by themselves."""
    predicted, measured, random_predicted, random_measured = [], [], [], []
    for layer, mine in shown.items():
        assert mine.effects is not None
        effects, n = mine.effects.scores_NC.cpu().numpy(), len(mine.numbers)
        both = graph.layers[layer].predicted_NC[torch.cat([mine.numbers, mine.controls])].cpu().numpy()
        predicted.append(both[:n])
        random_predicted.append(both[n:])
        measured.append(effects[:n])
        random_measured.append(effects[n:])
    noticeable = NOTICEABLE * abs(float(np.mean(subject.scores)))
    within, across = _edges_of(graph, shown)
    by_chance = np.concatenate(random_measured).mean(1)
    points, num_candidates = measure_faithfulness(subject, baseline, seed)
    replacement, completeness = measure_scores(subject, graph)
    largest = [NOTICEABLE * float(np.abs(edges[1]).max(initial=0)) for edges in (within, across)]
    return Verification(
        nodes=agree("shown features", np.concatenate(predicted), np.concatenate(measured), noticeable, seed),
        controls=agree(
            "random features",
            np.concatenate(random_predicted),
            np.concatenate(random_measured),
            noticeable,
            seed,
        ),
        within=agree("edges within a position", within[0], within[1], largest[0], seed),
        across=agree("edges between positions", across[0], across[1], largest[1], seed),
        random_effect=float(np.abs(by_chance).mean()) if len(by_chance) else 0.0,
        num_random=len(by_chance),
        faithfulness=points,
        num_candidates=num_candidates,
        random_draws=RANDOM_DRAWS,
        replacement=replacement,
        completeness=completeness,
    )


def _edges_of(graph: Graph, shown: Mapping[int, Shown]) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured changes [2, E] of all pairs of a measured node that is kept and a kept feature of the next layer:
    within a position, and from one position to a later one."""
    within, across = [np.zeros((2, 0))], [np.zeros((2, 0))]
    for layer, boundary in graph.boundaries.items():
        mine, column = shown[layer], {int(n): i for i, n in enumerate(graph.layers[layer].kept_M)}
        assert mine.effects is not None
        rows = [i for i, n in enumerate(mine.numbers.tolist()) if n in column]
        columns = [column[int(mine.numbers[i])] for i in rows]
        sources, targets = graph.layers[layer].nodes.select(mine.numbers[rows]), graph.layers[boundary.to].kept
        steps = (sources.off_N - sources.own_N)[:, None]
        predicted = (steps * boundary.per_unit[:, columns].T).cpu().numpy()
        measured = mine.effects.linear_NM[rows].cpu().numpy()
        here, there = sources.positions_N.cpu().numpy()[:, None], targets.positions_N.cpu().numpy()[None]
        for mask, into in ((here == there, within), (here < there, across)):
            into.append(np.stack([predicted[mask], measured[mask]]))
    return np.concatenate(within, axis=1), np.concatenate(across, axis=1)


def agree(what: str, predicted: np.ndarray, measured: np.ndarray, noticeable: float, seed: int) -> Agreement:
    """Pearson, slope of measured on predicted through the origin, and agreement of signs where |measured| exceeds `noticeable`."""
    predicted, measured = (np.asarray(a, dtype=np.float64).ravel() for a in (predicted, measured))
    big = np.abs(measured) > noticeable
    squares = float(predicted @ predicted)
    shuffled = np.random.default_rng(seed).permutation(predicted)
    return Agreement(
        what=what,
        num=len(predicted),
        pearson=_known(pearson(predicted, measured)),
        slope=float(predicted @ measured) / squares if squares > 0 else None,
        sign=float((np.sign(predicted) == np.sign(measured))[big].mean()) if big.any() else None,
        num_signed=int(big.sum()),
        shuffled=_known(pearson(shuffled, measured)),
    )


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None
