"""What `compare` prints, within 80 columns: answers, then how much is shared, then when concepts appear, then chains."""

from textwrap import wrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from throughline.cli.render import console, shorten
from throughline.records import (
    EARLY,
    FEWEST_OF_INTERVAL,
    Chain,
    Comparison,
    ComparisonTotals,
    ConceptInModel,
    Estimate,
    SharedFeature,
    Standings,
    Trace,
)

WIDTH = 80
MOST_CONCEPTS = 16  # that one prompt lists
MOST_FEATURES = 4  # of each model
MOST_UNVALUED = 8  # concepts without values, where there are no others
FEW = (
    f"–: no interval, where n is less than {FEWEST_OF_INTERVAL}. An interval comes from drawing the n values again and again; "
    "so few of them often agree, and it would be too narrow."
)
STANDINGS = ("universal", "shared", "specific")


def comparison(found: Comparison) -> None:
    """Models side by side on one prompt."""
    out = console()
    out.print(Text(f'Input: "{found.prompt}"'), soft_wrap=True)
    _gate(out, found.forced)
    table = _table("model", "answer", "p", words=2)
    for model in found.models:
        right = {True: "  right", False: f"  WRONG, right is {found.expected}", None: ""}[found.correct[model]]
        table.add_row(Text(model), Text(f'"{found.answers[model]}"{right}'), f"{found.probabilities[model]:.2f}")
    out.print(table)
    _standings(out, found.models, found.standings, "features active on the prompt and its answer")
    _say_partner(out, found.threshold)
    _concepts(out, found)
    for model in found.models:
        out.print()
        _chain(out, found.traces[model])
        mine = [f for f in found.features if f.model == model]
        for feature in sorted(mine, key=lambda f: -abs(f.effect or 0))[:MOST_FEATURES]:
            _feature(out, found.traces[model], feature)


def totals(found: ComparisonTotals) -> None:
    """Models over many prompts."""
    out = console()
    out.print(f"{len(found.prompts)} prompts in {len(found.models)} models")
    _gate(out, found.forced)
    table = _table("model", "right", "95 %", "of", words=1)
    for model in found.models:
        right = found.right[model]
        table.add_row(Text(model), _percent(right.value), _interval(right), str(right.n))
    out.print(table)
    few = any(0 < found.right[model].n < FEWEST_OF_INTERVAL for model in found.models)
    if few:
        _say(out, FEW)
    _standings(out, found.models, found.standings, "active features, mean over prompts", few_said=few)
    _say_partner(out, found.threshold)
    shown = [c for c in found.concepts if c.valued] or found.concepts[:MOST_UNVALUED]
    if not shown:
        out.print("\nNo labelled feature is active on any of these prompts.")
        return
    out.print(
        f"\nConcepts by relative depth (0: first layer, 1: last); {len(found.concepts) - len(shown)} more in --json"
    )
    for concept in shown:
        out.print()
        _say(out, concept.sentence + ("" if concept.known else " in which some model has it") + ".")
        table = _table("  model", "there", f"< {EARLY}", "chance", "else", "birth", "death", words=1)
        for model, mine in concept.models.items():
            table.add_row(Text("  " + _short(model)), *_concept_cells(mine))
        out.print(table)
    out.print()
    _say(
        out,
        f"there: share of the n prompts on which it is present; < {EARLY}: before that relative depth; chance: the latter with the "
        "labels of each layer dealt out anew; else: the latter on prompts of which the concept is known not to be true; "
        "birth, death: first and last relative depth at which it is present, mean over prompts.",
    )


def _concept_cells(found: ConceptInModel) -> list[str]:
    depths = ["–" if d.value is None else f"{d.value:.2f} {_interval(d, '.2f')}" for d in (found.birth, found.death)]
    return [
        _percent(found.present.value),
        _percent(found.early.value),
        _percent(found.early_by_chance),
        _percent(found.elsewhere.value),
        *depths,
    ]


def _standings(
    out: Console, models: list[str], standings: dict[str, Standings], what: str, few_said: bool = False
) -> None:
    """Shares with interval, and the base rate, chance and ceiling under them."""
    out.print()
    _say(out, f"Share of {what}:")
    table = _table("model", "", *STANDINGS, "n", words=2)
    for model in models:
        mine = standings[model]
        cells = [f"{_percent(mine.active[s].value)} {_interval(mine.active[s])}" for s in STANDINGS]
        table.add_row(Text(_short(model)), "active", *cells, f"{mine.num_active:.0f}")
        table.add_row("", "all live", *(_percent(mine.live.get(s)) for s in STANDINGS), str(mine.num_live))
        table.add_row("", "by chance", *(_percent(mine.chance.get(s), 1) for s in STANDINGS), "")
        kind = f"≤ {_percent(mine.most_universal_by_kind, 1)}"
        table.add_row("", "by kind of token", kind, "", "", "")
        ends = f" [{mine.ceiling_min:.0%}, {mine.ceiling_max:.0%}]" if mine.ceiling_min is not None else ""
        table.add_row("", "other seed has", f"{_percent(mine.ceiling)}{ends}", "", "", "")
    out.print(table)
    shares = [share for model in models for share in standings[model].active.values()]
    few = any(share.low is None and share.n for share in shares)
    rare = ", ".join(f"{_short(m)} {standings[m].num_rare:.0f}" for m in models if standings[m].num_rare >= 1)
    bound = max(s.most_universal_by_chance for s in standings.values())
    twins = max(s.num_twins for s in standings.values())
    _say(
        out,
        "universal: with a partner in every other model; shared: in some; specific: in none. active: on the prompt or the answer, "
        "with the 95 % interval; all live: of all features that fire at all. by chance: active ones with the correlations of "
        f"unrelated tokens; the threshold lets at most {_percent(bound, 1)} be universal so. by kind of token: at most so many if "
        "only the kind of token were known. other seed has: share of the features of such layers that a dictionary of the same "
        "layer, trained from another seed, has too"
        + (f", mean of {twins} seeds, with the least and the most." if twins else ".")
        + (f" Too rare to be judged, so not counted: {rare}." if rare else ""),
    )
    if few and not few_said:
        _say(out, FEW)


def _say_partner(out: Console, threshold: str) -> None:
    _say(
        out,
        "A feature's partner in another model is the feature, of any layer, that correlates with it most, if the correlation is "
        f"above the {threshold}.",
    )


def _concepts(out: Console, found: Comparison) -> None:
    facts = [c for c in found.concepts if c.valued]
    shown = (facts or found.concepts)[:MOST_CONCEPTS]
    out.print()
    if not shown:
        out.print("No labelled feature is active on this prompt.")
        return
    _say(
        out,
        "When concepts are there, in relative depth (0: first layer, 1: last), birth to death; "
        f"{len(found.concepts) - len(shown)} more in --json:",
    )
    table = _table("concept", *(_short(m) for m in found.models), words=1)
    for concept in shown:
        lives = (concept.lives.get(m) for m in found.models)
        cells = ["–" if life is None else f"{life.birth:.2f}-{life.death:.2f}" for life in lives]
        table.add_row(Text(shorten(concept.name, 28)), *cells)
    out.print(table)


def _chain(out: Console, trace: Trace) -> None:
    """The chain with the largest effect on the answer."""
    chain = main_chain(trace)
    out.print(Text(trace.model))
    if chain is None:
        out.print("  no chain leads to the answer")
        return
    _say(out, "main chain: " + describe_chain(trace, chain), "  ", "    ")


def main_chain(trace: Trace) -> Chain | None:
    """The chain with the largest effect, measured if it was."""
    effects = [abs(c.predicted if c.measured is None else c.measured) for c in trace.chains]
    return trace.chains[effects.index(max(effects))] if effects else None


def describe_chain(trace: Trace, chain: Chain) -> str:
    """`operator = + (layers 0-1) → carry (2) → "4"; predicted +0.21, measured +0.21`."""
    steps = []
    for step in chain.steps:
        first, last = step.layers
        layers = f"layers {first}-{last}" if first != last else f"layer {first}"
        steps.append(f"#{step.features[0][2]} {step.label} ({layers})")
    measured = "" if chain.measured is None else f", measured {chain.measured:+.2f}"
    target = trace.targets[chain.target].text.strip() or trace.targets[chain.target].text
    return f"{' → '.join([*steps, repr(target)])}; predicted {chain.predicted:+.2f}{measured}"


def _feature(out: Console, trace: Trace, feature: SharedFeature) -> None:
    partners = ", ".join(f"{_short(m)} layer {p[0]} #{p[1]} r {p[2]:.2f}" for m, p in feature.partners.items())
    effect = "" if feature.effect is None else f"  if off: {feature.effect:+.2f}"
    token = repr(trace.tokens[feature.position][1])
    _say(
        out,
        f"layer {feature.layer} #{feature.feature} at {token}  {shorten(feature.label, 34)}{effect}  {feature.standing}"
        + (f": {partners}" if partners else ""),
        "  ",
        "    ",
    )


def _gate(out: Console, forced: bool) -> None:
    if forced:
        out.print("Dictionaries failed the quality gate; this was made with --force.")


def _table(*columns: str, words: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", no_wrap=True)
    return table


def _say(out: Console, text: str, first: str = "", rest: str = "") -> None:
    """A paragraph, wrapped at WIDTH, its first line and the others indented."""
    lines = wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    for line in lines:
        out.print(Text(line), soft_wrap=True)


def _short(model: str) -> str:
    """Its name without its owner, for a column."""
    return shorten(model.rpartition("/")[2], 10)


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _interval(found: Estimate, form: str = ".0%") -> str:
    """`[12%, 40%]`; a dash of too few values, and nothing of none."""
    if found.low is None:
        return "–" if found.n else ""
    return f"[{found.low:{form}}, {found.high:{form}}]"
