"""The same prompts in several models: which active features have a counterpart in the others, and when each concept appears.

`standings` says which features are universal, shared or specific, `concepts` at which relative depth their labels speak.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import numpy as np
import polars as pl

from throughline.comparing.concepts import Facts, list_concepts, total_concepts
from throughline.comparing.standings import (
    STANDINGS,
    Counterparts,
    Matches,
    estimate,
    judge_prompt,
    judge_prompts,
    list_active,
)
from throughline.records import ActiveFeature, Comparison, ComparisonTotals, PromptReading, SharedFeature, Trace

__all__ = ["STANDINGS", "Matches", "compare_prompts", "compare_traces"]


def compare_traces(
    traces: dict[str, Trace],
    readings: dict[str, PromptReading],
    matches: Matches,
    labels: Mapping[str, pl.DataFrame],
    facts: AbstractSet[str] | None = None,
) -> Comparison:
    """One prompt side by side. `matches[a, b]` is the matching from a to b, for every pair; `labels` are those above the bar."""
    found = {model: Counterparts.of(model, matches) for model in traces}
    seed, first = _seed(matches), next(iter(traces.values()))
    return Comparison(
        prompt=first.prompt,
        models=list(traces),
        expected=first.expected,
        answers={m: t.answer for m, t in traces.items()},
        probabilities={m: t.answer_probability for m, t in traces.items()},
        correct={m: t.correct for m, t in traces.items()},
        standings={m: judge_prompt(found[m], readings[m], seed) for m in traces},
        active={m: list_active(found[m], readings[m]) for m in traces},
        features=[_place(m, found[m], f) for m, t in traces.items() for f in t.features],
        concepts=list_concepts(readings, dict(labels), facts),
        threshold=_describe_threshold(matches),
        seed=seed,
        forced=any(t.forced for t in traces.values()),
        traces=traces,
    )


def compare_prompts(
    readings: dict[str, list[PromptReading]],
    matches: Matches,
    labels: Mapping[str, pl.DataFrame],
    expected: list[str | None],
    facts: Facts,
    forced: bool,
) -> ComparisonTotals:
    """Many prompts in several models, in total. `readings[m]`, `expected` (right answers) and `facts` are by prompt."""
    seed, known = _seed(matches), [i for i, answer in enumerate(expected) if answer is not None]
    return ComparisonTotals(
        prompts=[reading.prompt for reading in next(iter(readings.values()))],
        models=list(readings),
        expected=expected,
        answers={m: [r.answer for r in mine] for m, mine in readings.items()},
        probabilities={m: [r.probability for r in mine] for m, mine in readings.items()},
        right={
            m: estimate(np.array([mine[i].answer == expected[i] for i in known]), seed) for m, mine in readings.items()
        },
        standings={m: judge_prompts(Counterparts.of(m, matches), mine, seed) for m, mine in readings.items()},
        concepts=total_concepts(readings, dict(labels), facts, seed),
        threshold=_describe_threshold(matches),
        seed=seed,
        forced=forced,
    )


def _seed(matches: Matches) -> int:
    return next(iter(matches.values())).info.seed


def _describe_threshold(matches: Matches) -> str:
    infos = [result.info for result in matches.values()]
    return f"{infos[0].details['threshold']}, over {min(i.num_tokens for i in infos):,} tokens or more"


def _place(model: str, found: Counterparts, feature: ActiveFeature) -> SharedFeature:
    return SharedFeature(
        model=model,
        layer=feature.layer,
        position=feature.position,
        feature=feature.feature,
        activation=feature.activation,
        effect=feature.effect,
        label=feature.label.text if feature.label else "unlabelled: " + ", ".join(map(repr, feature.top_tokens[:3])),
        partners=found.partners_of(feature.layer, feature.feature),
        standing=found.standing(feature.layer, feature.feature),
    )
