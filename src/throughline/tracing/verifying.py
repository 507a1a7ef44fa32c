"""Predicted against measured: for the nodes that are shown, for the edges between them, and for random features as the control."""

from collections.abc import Mapping

import numpy as np
import torch

from throughline.records import Agreement
from throughline.tracing.interventions import Effects, Nodes

FEWEST = 3  # pairs of numbers from which a correlation is taken
NOTICEABLE = (
    0.02  # of the answer score (nodes) or of the largest change (edges): smaller ones have no sign worth speaking of
)


def agree(what: str, predicted: np.ndarray, measured: np.ndarray, noticeable: float, seed: int) -> Agreement:
    """Pearson, slope of measured on predicted through the origin, and agreement of signs where |measured| exceeds `noticeable`."""
    predicted, measured = (np.asarray(a, dtype=np.float64).ravel() for a in (predicted, measured))
    big = np.abs(measured) > noticeable
    squares = float(predicted @ predicted)
    shuffled = np.random.default_rng(seed).permutation(predicted)
    return Agreement(
        what=what,
        num=len(predicted),
        pearson=pearson(predicted, measured),
        slope=float(predicted @ measured) / squares if squares > 0 else None,
        sign=float((np.sign(predicted) == np.sign(measured))[big].mean()) if big.any() else None,
        num_signed=int(big.sum()),
        shuffled=pearson(shuffled, measured),
    )


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r; None of fewer than FEWEST pairs, or where one side is constant."""
    if len(a) < FEWEST or np.std(a) == 0 or np.std(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def draw_controls(nodes: Nodes, shown: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """For each node shown a random other one of the layer, at its position if there is one not shown; numbers in `nodes`."""
    taken = set(shown.tolist())
    picks = []
    for node in shown.tolist():
        same = (nodes.positions_N == nodes.positions_N[node]).nonzero()[:, 0].tolist()
        free = [i for i in same if i not in taken] or [i for i in range(len(nodes)) if i not in taken]
        if free:
            picks.append(int(rng.choice(free)))
            taken.add(picks[-1])
    return torch.tensor(picks, dtype=torch.long, device=nodes.features_N.device)


def split_edges(
    sources: Mapping[int, Nodes],
    targets: Mapping[int, Nodes],
    predicted: Mapping[int, np.ndarray],
    effects: Mapping[int, Effects],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predicted and measured changes of all pairs (shown node, kept feature of the next layer), [2, E]: within a position,
    and from one position to a later one."""
    within, across = [], []
    for layer, prediction in predicted.items():
        measured = effects[layer].linear_NM.cpu().numpy()
        here, there = (n.positions_N.cpu().numpy() for n in (sources[layer], targets[layer]))
        same = here[:, None] == there[None]
        later = here[:, None] < there[None]
        for mask, into in ((same, within), (later, across)):
            into.append(np.stack([prediction[mask], measured[mask]]))
    return within, across
