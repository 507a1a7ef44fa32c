"""When, in relative depth, each concept appears in a model and when it is gone.

    1. a concept is a family of labels: "carry" of "carry = 1" and "carry = 0", "sum of units" of "sum of units ≥ 10, addition"
    2. it is present in a layer if a feature with such a label (F1 above the bar) is active on the prompt or its answer, above
       the activation from which its label speaks
    3. relative depth: layer / last layer with a dictionary, as in the analysis; birth and death are the first and last of these
    4. over prompts: those of which the concept is true, where the texts tell, or else those in which any model has it
    5. chance: the labels of each layer are dealt out anew among its labelled features, DEALS times
    6. a model has a concept early if it is present before relative depth EARLY on most of these prompts, and the interval of
       that share is above chance, and above the share of prompts of which the concept is known not to be true

Presence says that the label speaks, not that its value is right, nor that the model uses it.
"""

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import polars as pl

from throughline.comparing.standings import estimate
from throughline.records import (
    EARLY,
    FEWEST_OF_INTERVAL,
    Concept,
    ConceptInModel,
    ConceptLife,
    ConceptTotals,
    PromptReading,
)

DEALS = 50
MOST = 0.5  # share of prompts from which a model is said to have a concept
_VALUE = re.compile(r"(.+?) (?:[=≥≤<] .|in \d|mod \d|has \d)")
_TEXT = re.compile(r"""(tokens?|two after|after|before) ['"]""")  # of the texts of tokens, which may hold anything
_PLACE = re.compile(r", (at|in|just) .*")

Facts = Sequence[AbstractSet[str] | None]  # by prompt: what is known to be true of it, by name; None: nothing is known


def family_of(label: str) -> str:
    """`carry` of `carry = 1`, with its place left out; a label without a value is its own family."""
    if _TEXT.match(label):
        return label
    found = _VALUE.match(label)
    return _PLACE.sub("", found[1] if found else label)


def families_of(labels: pl.DataFrame) -> list[str]:
    """The family of each row; the words of a language model are one of their own."""
    rows = labels.select("label", "source").iter_rows()
    return [label if source == "llm" else family_of(label) for label, source in rows]


@dataclass(frozen=True)
class Presence:
    """One model's labels on prompts.

    `speaks[l]` [P, G]: whether the label of each labelled feature of layer l speaks on each prompt; `families[l]` [G] index
    `names`.
    """

    layers: list[int]
    names: list[str]
    speaks: list[np.ndarray]
    families: list[np.ndarray]

    @classmethod
    def of(cls, readings: Sequence[PromptReading], labels: pl.DataFrame, names: list[str]) -> "Presence":
        """From a model's readings and its labels that reached the bar (columns layer, feature, label, threshold)."""
        number = {name: i for i, name in enumerate(names)}
        layers, speaks, families = list(readings[0].layers), [], []
        for layer in layers:
            mine = labels.filter(pl.col("layer") == layer)
            families.append(np.array([number[name] for name in families_of(mine)], dtype=np.int64))
            speaks.append(_speaks(readings, layer, mine["feature"].to_numpy(), mine["threshold"].to_numpy()))
        return cls(layers, names, speaks, families)

    @property
    def depths_L(self) -> np.ndarray:
        """Relative depth of each layer."""
        return np.array(self.layers) / max(1, *self.layers)

    def found(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """Where each family is present, [P, L, families]; with a generator, with the labels dealt out anew within each layer."""
        num_prompts = len(self.speaks[0])
        out = np.zeros((num_prompts, len(self.layers), len(self.names)), bool)
        for i, (speaks_PG, family_G) in enumerate(zip(self.speaks, self.families, strict=True)):
            if not len(family_G):
                continue
            order = np.argsort(family_G, kind="stable")
            there, starts = np.unique(family_G[order], return_index=True)
            if rng is not None:
                order = rng.permutation(len(order))
            out[:, i, there] = np.logical_or.reduceat(speaks_PG[:, order], starts, axis=1)
        return out


def _speaks(
    readings: Sequence[PromptReading], layer: int, feature_G: np.ndarray, threshold_G: np.ndarray
) -> np.ndarray:
    order = np.argsort(feature_G)
    out = np.zeros((len(readings), len(feature_G)), bool)
    for p, reading in enumerate(readings if len(feature_G) else []):
        codes = reading.layers[layer]
        at = np.minimum(np.searchsorted(feature_G, codes.features_A, sorter=order), len(order) - 1)
        label_A = order[at]
        says = (feature_G[label_A] == codes.features_A) & (codes.activations_A > threshold_G[label_A])
        out[p, label_A[says]] = True
    return out


def _valued(labels: dict[str, pl.DataFrame], facts: Facts) -> set[str]:
    """Families that have values, in the labels of any model or as facts of the texts."""
    each = [
        (f, label) for frame in labels.values() for f, label in zip(families_of(frame), frame["label"], strict=True)
    ]
    told = frozenset[str]().union(*(f for f in facts if f is not None))
    return {family for family, label in each if family in told or (family != label and _VALUE.match(label))}


def find_presence(
    readings: dict[str, list[PromptReading]], labels: dict[str, pl.DataFrame]
) -> tuple[list[str], dict[str, Presence]]:
    """All families of any model, and where each model has them."""
    names = sorted({name for frame in labels.values() for name in families_of(frame)})
    return names, {model: Presence.of(mine, labels[model], names) for model, mine in readings.items()}


def list_concepts(
    readings: dict[str, PromptReading], labels: dict[str, pl.DataFrame], facts: AbstractSet[str] | None
) -> list[Concept]:
    """The concepts of one prompt, those with values first, then by how many models have them and by birth."""
    valued = _valued(labels, [facts])
    names, by_model = find_presence({model: [reading] for model, reading in readings.items()}, labels)
    found = {model: presence.found()[0] for model, presence in by_model.items()}
    concepts = []
    for c, name in enumerate(names):
        lives = {m: _life(by_model[m], found[m][:, c]) for m in by_model if found[m][:, c].any()}
        if lives:
            concepts.append(Concept(name=name, valued=name in valued, lives=lives))
    return sorted(
        concepts,
        key=lambda c: (not c.valued, -len(c.lives), sum(x.birth for x in c.lives.values()) / len(c.lives), c.name),
    )


def _life(presence: Presence, there_L: np.ndarray) -> ConceptLife:
    depths = presence.depths_L[there_L]
    layers = [layer for layer, there in zip(presence.layers, there_L, strict=True) if there]
    return ConceptLife(layers=layers, birth=float(depths[0]), death=float(depths[-1]))


def total_concepts(
    readings: dict[str, list[PromptReading]], labels: dict[str, pl.DataFrame], facts: Facts, seed: int
) -> list[ConceptTotals]:
    """Every concept over all prompts, those with values first, then by how many models have it early."""
    names, by_model = find_presence(readings, labels)
    found = {model: presence.found() for model, presence in by_model.items()}
    by_chance = {m: _early_by_chance(presence, np.random.default_rng(seed)) for m, presence in by_model.items()}
    told = frozenset[str]().union(*(f for f in facts if f is not None))
    valued = _valued(labels, facts)
    anywhere_PC = np.logical_or.reduce([f.any(1) for f in found.values()])
    totals = []
    for c, name in enumerate(names):
        true_P = np.array([f is not None and name in f for f in facts]) if name in told else anywhere_PC[:, c]
        false_P = np.array([f is not None and name not in f for f in facts]) & (name in told)
        if not true_P.any():
            continue
        models = {
            m: _in_model(by_model[m].depths_L, found[m][:, :, c], by_chance[m][:, c], true_P, false_P, seed)
            for m in by_model
        }
        totals.append(_total(name, name in valued, name in told, int(true_P.sum()), models))
    return sorted(totals, key=lambda t: (not t.valued, -len(t.early_in), -t.num_prompts, _first_birth(t), t.name))


def _early_by_chance(presence: Presence, rng: np.random.Generator) -> np.ndarray:
    """How often each family would be present early on each prompt, [P, families]."""
    early_L = presence.depths_L < EARLY
    return np.mean([presence.found(rng)[:, early_L].any(1) for _ in range(DEALS)], axis=0)


def _in_model(
    depths_L: np.ndarray,
    there_PL: np.ndarray,
    early_by_chance_P: np.ndarray,
    true_P: np.ndarray,
    false_P: np.ndarray,
    seed: int,
) -> ConceptInModel:
    present_P = np.asarray(there_PL.any(1))
    early_P = np.asarray(there_PL[:, depths_L < EARLY].any(1))
    has = there_PL[present_P & true_P]
    births, deaths = depths_L[has.argmax(1)], depths_L[::-1][has[:, ::-1].argmax(1)]
    return ConceptInModel(
        present=estimate(present_P[true_P], seed),
        early=estimate(early_P[true_P], seed),
        early_by_chance=float(early_by_chance_P[true_P].mean()),
        elsewhere=estimate(early_P[false_P], seed),
        birth=estimate(births, seed),
        death=estimate(deaths, seed),
    )


def _total(name: str, valued: bool, known: bool, num_prompts: int, models: dict[str, ConceptInModel]) -> ConceptTotals:
    often = [model for model, found in models.items() if (found.early.value or 0) > MOST]
    early_in = [model for model in often if _is_beyond(models[model])]
    sentence = f"{name} is present before relative depth {EARLY} in {len(early_in)} of {len(models)} models"
    if len(early_in) < len(often):
        others = ", ".join(model for model in often if model not in early_in)
        few = f"on most prompts, but fewer than {FEWEST_OF_INTERVAL} do not tell that from chance"
        reason = few if num_prompts < FEWEST_OF_INTERVAL else "no more than by chance, or than where it is not true"
        sentence += f" ({others}: {reason})"
    return ConceptTotals(
        name=name,
        valued=valued,
        known=known,
        num_prompts=num_prompts,
        models=models,
        early_in=early_in,
        sentence=f"{sentence}, n = {num_prompts}",
    )


def _is_beyond(found: ConceptInModel) -> bool:
    null = max(found.early_by_chance, found.elsewhere.value or 0.0)
    return found.early.low is not None and found.early.low > null


def _first_birth(total: ConceptTotals) -> float:
    return min((m.birth.value for m in total.models.values() if m.birth.value is not None), default=2.0)
