"""A small but complete run folder from made-up records, for tests of what reads one. Every number is a seeded draw."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from throughline.records import (
    EXAMPLE_COLUMNS,
    FEATURE_COLUMNS,
    LABEL_COLUMNS,
    TOKEN_KINDS,
    ActiveFeature,
    Agreement,
    Analysis,
    Chain,
    ChainStep,
    Comparison,
    ComparisonTotals,
    Concept,
    ConceptInModel,
    ConceptLife,
    ConceptTotals,
    Curve,
    Estimate,
    FaithfulnessPoint,
    Finding,
    Label,
    LayerQuality,
    LayerReading,
    Ribbon,
    SharedFeature,
    Standings,
    Target,
    Trace,
    TraceEdge,
    TransferInfo,
    TransferResult,
    Verification,
)
from throughline.report.bundle import render_page
from throughline.report.contents import collect
from throughline.run_dir import RunDir
from throughline.study import parse_study

HOSTILE = "</script><script>alert(1)</script>"
CONCEPTS = ("number, first operand", "number, second operand", "carry", "tens digit", "units digit", "equals sign")
PROMPT = "What is 15 + 27?"
PROMPT_TOKENS = ("What", " is", " 1", "5", " +", " 2", "7", "?")
PARTS = ("quality", "tables", "transfer", "traces", "comparisons", "analysis")


@dataclass(frozen=True)
class SyntheticModel:
    """Name and shape of a made-up model."""

    name: str
    num_layers: int
    d_model: int
    d_sae: int


MODELS = (
    SyntheticModel("zoo/tall", 6, 32, 64),
    SyntheticModel("zoo/wide", 4, 48, 96),
    SyntheticModel("small", 3, 16, 40),
)


def make_study_tree(models: tuple[SyntheticModel, ...] = MODELS) -> dict:
    """The study file's tree of such a run."""
    return {
        "name": "synthetic",
        "models": [{"name": m.name, "path": f"zoo/{m.name.rpartition('/')[2]}"} for m in models],
        "data": {"path": "zoo/arithmetic", "context": 32},
    }


def make_qualities(model: SyntheticModel, seed: int = 0) -> list[LayerQuality]:
    """One quality a layer; the last layer of the first model fails the gate."""
    rng = np.random.default_rng([seed, model.d_model])
    qualities = []
    for layer in range(model.num_layers):
        fvu, ce = 0.05 + 0.3 * rng.random(), 1.2
        gate = ["FVU 0.61 > 0.5"] if model == MODELS[0] and layer == model.num_layers - 1 else []
        fvu = 0.61 if gate else fvu
        qualities.append(
            LayerQuality(
                model=model.name,
                layer=layer,
                architecture="topk",
                d_model=model.d_model,
                d_sae=model.d_sae,
                num_tokens=50_000,
                fvu=fvu,
                fvu_by_position=[round(fvu * (1 + 0.05 * i), 4) for i in range(8)],
                fvu_within_kind=fvu * 1.3,
                explained_variance=1 - fvu,
                explained_variance_legacy=1 - fvu,
                l0=4 + rng.random(),
                dead=0.1 * rng.random(),
                dense=0.02,
                cossim=0.95,
                l2_ratio=0.98,
                relative_reconstruction_bias=1.01,
                num_spliced_tokens=20_000,
                ce_loss_without_sae=ce,
                ce_loss_with_sae=ce + 0.1 * fvu,
                ce_loss_with_ablation=6.0,
                ce_loss_with_mean_ablation=5.0,
                ce_loss_score=1 - 0.1 * fvu / 4.8,
                ce_loss_score_mean=1 - 0.1 * fvu / 3.8,
                delta_ce=0.1 * fvu,
                kl_div_with_sae=0.12 * fvu,
                num_answers=200 if model != MODELS[2] else 0,
                answers_kept=1 - fvu / 4 if model != MODELS[2] else None,
                gate=gate,
            )
        )
    return qualities


def make_tables(model: SyntheticModel, *, contexts: int = 3, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Features, examples and labels. Feature 5 of layer 0 has a hostile label, every feature 7 one below the bar."""
    rng = np.random.default_rng([seed, model.d_sae, 1])
    words = [*PROMPT_TOKENS, " 42", "\n", "<b>", "$", "é", "数"]
    features, examples, labels = [], [], []
    for layer in range(model.num_layers):
        for feature in range(model.d_sae):
            active, largest = int(rng.integers(0, 5000)), float(1 + 5 * rng.random())
            tokens = [str(t) for t in rng.choice(words, 5, replace=False)]
            kinds = [float(x) for x in rng.random(len(TOKEN_KINDS))]
            shown = tokens[:3]
            features.append(
                (
                    layer,
                    feature,
                    active / 50_000,
                    active,
                    50_000,
                    largest / 2,
                    largest,
                    tokens,
                    0.4,
                    shown,
                    shown,
                    kinds,
                )
            )
            for rank in range(contexts):
                stratum = "top" if rank < contexts - 1 else "0.50"
                values = np.where(rng.random(len(PROMPT_TOKENS)) < 0.3, rng.random(len(PROMPT_TOKENS)) * largest, 0.0)
                focus = int(values.argmax())
                values[focus] = largest / (1 + rank)
                line = list(PROMPT_TOKENS)
                examples.append(
                    (layer, feature, stratum, rank, float(values[focus]), rank, line, values.tolist(), focus)
                )
            text = HOSTILE if (layer, feature) == (0, 5) else CONCEPTS[feature % len(CONCEPTS)]
            f1 = 0.3 if feature == 7 else 0.75 + 0.2 * rng.random()
            if feature < 20:
                labels.append(
                    (
                        layer,
                        feature,
                        text,
                        "concepts",
                        "tokens",
                        f1,
                        0.9,
                        0.85,
                        0.2,
                        900,
                        50_000,
                        0.1,
                        0.4,
                        0.35,
                        None,
                        None,
                    )
                )
    return {
        name: pl.DataFrame(rows, schema=schema, orient="row")
        for name, rows, schema in (
            ("features", features, FEATURE_COLUMNS),
            ("examples", examples, EXAMPLE_COLUMNS),
            ("labels", labels, LABEL_COLUMNS),
        )
    }


def make_transfer(source: SyntheticModel, target: SyntheticModel, metric: str, seed: int = 0) -> TransferResult:
    """Arrays [source layer, target layer] that decay with the distance in relative depth; matching has all its own.

    Within a model the ceiling differs by source layer (matching), or by target layer and with a twin's beside it (reconstruction).
    """
    rng = np.random.default_rng([seed, source.d_sae, target.d_sae, len(metric)])
    shape = (source.num_layers, target.num_layers)
    depth = np.abs(np.linspace(0, 1, shape[0])[:, None] - np.linspace(0, 1, shape[1])[None, :])
    value = np.exp(-3 * depth) * (0.9 if source == target else 0.5) + 0.02 * rng.random(shape)
    arrays = {
        "value": value,
        "low": value - 0.03,
        "high": value + 0.03,
        "null": np.full(shape, 0.08) + 0.01 * rng.random(shape),
        "ceiling": np.repeat(np.linspace(0.95, 0.85, shape[0])[:, None], shape[1], axis=1),
    }
    if metric == "matching":
        full = (*shape, source.d_sae)
        arrays |= {
            "partner": rng.integers(0, target.d_sae, full),
            "correlation": rng.random(full).astype(np.float32),
            "threshold": np.full(shape, 0.2),
            "live": rng.random((shape[0], source.d_sae)) < 0.9,
            "chance": 0.3 * rng.random(full).astype(np.float32),
            "ceiling_correlation": np.full(shape, 0.7),
        }
        for name in ("correlation", "chance"):
            arrays[name][~np.broadcast_to(arrays["live"][:, None], full)] = np.nan
    else:
        arrays["ceiling"] = np.repeat(np.linspace(0.95, 0.85, shape[1])[None], shape[0], axis=0)
        arrays["twin_ceiling"] = arrays["ceiling"] - 0.02
    info = TransferInfo(
        metric=metric,
        source=source.name,
        target=target.name,
        source_layers=list(range(source.num_layers)),
        target_layers=list(range(target.num_layers)),
        quantity={
            "matching": "share of live features with a partner above the null",
            "reconstruction": "explained variance of the target layer through a ridge map",
        }[metric],
        null="activations shifted by one document",
        ceiling="another seed at the same layer" if source == target else None,
        num_tokens=50_000,
        num_documents=400,
        coverage=1.0 if source == target else 0.93,
        seed=seed,
    )
    if info.ceiling is None:
        del arrays["ceiling"]
        arrays.pop("ceiling_correlation", None)
        arrays.pop("twin_ceiling", None)
    return TransferResult(info, arrays)


def make_trace(
    model: SyntheticModel, prompt: str = PROMPT, *, correct: bool = True, verified: bool = True, seed: int = 0
) -> Trace:
    """Three features a layer, one in three without a label; edges between all that causality allows, and two chains.

    The second chain goes through feature 11 of the second layer, which is not shown. Without `verified` nothing is measured.
    """
    rng = np.random.default_rng([seed, model.d_model, len(prompt)])
    answer = "42" if correct else "41"
    pieces = [*PROMPT_TOKENS, *(" 4", answer[1], "<end>")]
    tokens, start = [], 0
    for number, piece in enumerate(pieces):
        tokens.append((number, piece, start, start + len(piece)))
        start += len(piece)
    layers = []
    for layer in range(model.num_layers):
        features = [_make_active(layer, number, answer, rng, verified) for number in (3, 5, 7)]
        error = float(rng.normal() / 5) if verified else None
        layers.append(
            LayerReading(layer=layer, features=features, num_active=4.5, num_nodes=12, fvu=0.12, error_effect=error)
        )
    last = len(PROMPT_TOKENS) - 1
    return Trace(
        model=model.name,
        prompt=prompt,
        tokens=tokens,
        num_prompt_tokens=len(PROMPT_TOKENS),
        answer=answer,
        answer_probability=0.98 if correct else 0.41,
        complete=True,
        expected="42",
        correct=correct,
        score=6.2,
        targets=[
            Target(position=last, text=" 4", against=" 3", probability=0.99, score=7.0),
            Target(position=last + 1, text=answer[1], against="3", probability=0.97, score=5.4),
        ],
        off_kind="counterfactual",
        off="its value in 'What is 15 + 24?' (carry: 1 becomes 0)",
        against="What is 15 + 24?",
        linearization="grouped",
        layers=layers,
        edges=_make_edges(layers, rng, verified),
        chains=[_make_chain(layers, i, answer, rng, verified) for i in range(2)],
        verification=_make_verification(model) if verified else None,
        forced=False,
        notes=[] if verified else ["nothing was measured"],
    )


def _make_active(layer: int, number: int, answer: str, rng: np.random.Generator, verified: bool) -> ActiveFeature:
    effects, predicted = rng.normal(size=2).tolist(), rng.normal(size=2).tolist()
    label = Label(
        text=HOSTILE if (layer, number) == (0, 5) else CONCEPTS[number % len(CONCEPTS)],
        source="concepts",
        f1=0.97,
        precision=0.96,
        recall=0.98,
        num_positive=900,
        base_f1=0.1,
        neuron_f1=0.5,
        untrained_f1=0.4,
    )
    return ActiveFeature(
        layer=layer,
        position=int(rng.integers(0, len(PROMPT_TOKENS))),
        feature=number,
        activation=float(0.2 + rng.random() * (1 + layer)),
        off_value=0.01,
        effect=float(np.mean(effects)) if verified else None,
        predicted_effect=float(np.mean(predicted)),
        effects=effects if verified else [],
        predicted_effects=predicted,
        answer_if_off=("43" if number == 3 else answer) if verified else None,
        label=None if number == 7 else label,
        top_tokens=[" 1", "5", "$"],
        lifetime=(layer, layer + 1) if number == 3 else None,
    )


def _make_edges(layers: list[LayerReading], rng: np.random.Generator, verified: bool) -> list[TraceEdge]:
    edges = []
    for below, above in pairwise(layers):
        for a in below.features:
            for b in above.features:
                predicted = float(rng.normal())
                if a.position <= b.position:
                    measured = predicted + 0.1 * float(rng.normal()) if verified else None
                    ends = (a.layer, a.position, a.feature), (b.layer, b.position, b.feature)
                    edges.append(
                        TraceEdge(
                            source=ends[0],
                            target=ends[1],
                            predicted=predicted,
                            measured=measured,
                            measured_activation=measured,
                        )
                    )
    return edges


def _make_chain(
    layers: list[LayerReading], number: int, answer: str, rng: np.random.Generator, verified: bool
) -> Chain:
    """Through the `number`-th feature of every layer, the first two layers in one step."""
    features = [layer.features[number] for layer in layers]
    places = [(f.layer, f.position, f.feature) for f in features]
    if number == 1:
        places[1] = (places[1][0], places[1][1], 11)
    rest = [
        ChainStep(features=[p], label=CONCEPTS[p[2] % len(CONCEPTS)], activation=f.activation, lifetime=None)
        for p, f in zip(places[2:], features[2:], strict=True)
    ]
    lifetime = (0, 1) if number == 0 else None
    label = HOSTILE if number == 1 else CONCEPTS[3]
    first = ChainStep(features=places[:2], label=label, activation=features[0].activation, lifetime=lifetime)
    predicted = float(rng.normal())
    return Chain(
        steps=[first, *rest],
        target=number,
        predicted=predicted,
        measured=predicted * 1.1 if verified else None,
        predicted_together=-3.9,
        measured_together=-4.5 if verified else None,
        answer_if_off=("32" if number == 0 else answer) if verified else None,
        num_alternatives=number,
    )


def _make_verification(model: SyntheticModel) -> Verification:
    def agreement(what: str, num: int, r: float | None) -> Agreement:
        return Agreement(what=what, num=num, pearson=r, slope=1.1, sign=0.95, num_signed=num // 2, shuffled=0.02)

    sizes = (0, 4, 16, 64, 200)
    return Verification(
        nodes=agreement("shown features", 6 * model.num_layers, 0.91),
        controls=agreement("random features", 6 * model.num_layers, 0.62),
        within=agreement("edges within a position", 40, 0.97),
        across=agreement("edges between positions", 2, None),
        random_effect=0.05,
        num_random=3 * model.num_layers,
        faithfulness=[
            FaithfulnessPoint(
                num=n,
                faithfulness=n / 200,
                completeness=1 - n / 200,
                answer_kept=n > 50,
                random=n / 400,
                random_kept=float(n == 200),
            )
            for n in sizes
        ],
        num_candidates=200,
        random_draws=3,
        replacement=0.83,
        completeness=0.88,
    )


def make_comparison(models: tuple[SyntheticModel, ...] = MODELS, prompt: str = PROMPT) -> Comparison:
    """The prompt in all models; the last model is wrong."""
    traces = {m.name: make_trace(m, prompt, correct=m != models[-1]) for m in models}
    features = []
    for model in models:
        others = [m.name for m in models if m != model]
        for number, reading in enumerate(f for layer in traces[model.name].layers for f in layer.features):
            partners: dict[str, tuple[int, int, float]] = dict.fromkeys(others[: number % 3], (1, 3, 0.62))
            standing = "universal" if len(partners) == len(others) else "shared" if partners else "specific"
            features.append(
                SharedFeature(
                    model=model.name,
                    layer=reading.layer,
                    position=reading.position,
                    feature=reading.feature,
                    activation=reading.activation,
                    effect=reading.effect or 0.0,
                    label=reading.label.text if reading.label else "",
                    partners=partners,
                    standing=standing,
                )
            )
    return Comparison(
        prompt=prompt,
        models=[m.name for m in models],
        expected="42",
        answers={name: trace.answer for name, trace in traces.items()},
        probabilities={name: trace.answer_probability for name, trace in traces.items()},
        correct={name: trace.correct for name, trace in traces.items()},
        features=features,
        standings={m.name: make_standings(80 + i) for i, m in enumerate(models)},
        active={m.name: {"universal": [(0, 3)], "shared": [(0, 5)], "specific": []} for m in models},
        concepts=_make_concepts(models),
        seed=0,
        threshold="Pearson r above the 99.9 % quantile of the shifted null",
        forced=False,
        traces=traces,
    )


def make_standings(n: int) -> Standings:
    """Half universal, three tenths shared."""
    active = {"universal": 0.5, "shared": 0.3, "specific": 0.2}
    return Standings(
        active={s: Estimate(value=x, low=x - 0.05, high=x + 0.05, n=n) for s, x in active.items()},  # pyright: ignore
        num_active=n,
        num_rare=3,
        live={"universal": 0.35, "shared": 0.25, "specific": 0.4},
        num_live=400,
        chance={"universal": 0.001, "shared": 0.004, "specific": 0.995},
        most_universal_by_chance=0.003,
        most_universal_by_kind=0.06,
        ceiling=0.81,
    )


def _make_concepts(models: tuple[SyntheticModel, ...]) -> list[Concept]:
    """The first is in all models, each further one in one model less; one that says which token stands there is last."""
    concepts = []
    for i, name in enumerate((*CONCEPTS, HOSTILE, "token ' 1'")):
        lives = {}
        for m in models[: max(1, len(models) - i)]:
            last = m.num_layers - 1
            birth = min(i, last)
            lives[m.name] = ConceptLife(layers=[birth, last], birth=birth / last, death=1.0)
        concepts.append(Concept(name=name, valued=not name.startswith("token"), lives=lives))
    return concepts


def make_totals(models: tuple[SyntheticModel, ...] = MODELS, num: int = 40) -> ComparisonTotals:
    """Forty prompts in all models; the last concept is absent in all but the first, and in most of its prompts."""

    def share(value: float | None, n: int = num) -> Estimate:
        spread = None if value is None else 0.04
        low, high = (None, None) if spread is None or value is None else (value - spread, value + spread)
        return Estimate(value=value, low=low, high=high, n=n)

    concepts = []
    for i, name in enumerate((*CONCEPTS, HOSTILE)):
        lives = {}
        for j, m in enumerate(models):
            there = i < len(CONCEPTS) or j == 0
            lives[m.name] = ConceptInModel(
                present=share((0.9 if i < len(CONCEPTS) else 0.3) if there else 0.0),
                early=share(0.6 if there else 0.0),
                early_by_chance=0.2,
                elsewhere=share(0.1, 12),
                birth=share(0.1 + 0.1 * i if there else None),
                death=share(0.8 if there else None),
            )
        sentence = f"{name} is present before relative depth 0.5 in {len(models)} of {len(models)} models, n = {num}"
        concepts.append(
            ConceptTotals(
                name=name,
                valued=True,
                known=i % 2 == 0,
                num_prompts=num,
                models=lives,
                early_in=[m.name for m in models],
                sentence=sentence,
            )
        )
    names = [m.name for m in models]
    return ComparisonTotals(
        prompts=[f"What is {i} + 27?" for i in range(num)],
        models=names,
        expected=[str(i + 27) for i in range(num)],
        answers={name: [str(i + 27) for i in range(num)] for name in names},
        probabilities={name: [0.9] * num for name in names},
        right={name: share(0.95) for name in names},
        standings={name: make_standings(num) for name in names},
        concepts=concepts,
        threshold="Pearson r above the 99.9 % quantile of the shifted null",
        seed=0,
        forced=True,
    )


def make_curves(models: tuple[SyntheticModel, ...] = MODELS, *, ceiling: bool = True, seed: int = 0) -> list[Curve]:
    """Divergence of every ordered pair, decay of two metrics and persistence of every model; the first model's first
    target has no ceiling in any case, and no value for its first layer."""
    rng = np.random.default_rng([seed, 2])
    curves = []

    def add(kind: str, metric: str, source: str, target: str, x: np.ndarray, value: np.ndarray, ceiled: bool) -> None:
        listed: list[float | None] = [float(y) for y in value]
        if kind == "divergence" and source == models[0].name and not ceiled:
            listed[0] = None
        spread = 0.02 + 0.02 * rng.random(len(x))
        top = np.clip(value + 0.25, 0, 0.97)
        curves.append(
            Curve(
                kind=kind,  # pyright: ignore[reportArgumentType]
                metric=metric,
                source=source,
                target=target,
                x=x.tolist(),
                value=listed,
                low=[None if y is None else y - d for y, d in zip(listed, spread, strict=True)],
                high=[None if y is None else y + d for y, d in zip(listed, spread, strict=True)],
                null=(0.06 + 0.02 * rng.random(len(x))).tolist(),
                ceiling=top.tolist() if ceiled else [],
                ceiling_low=(top - 0.03).tolist() if ceiled else [],
                ceiling_high=np.clip(top + 0.03, 0, 1).tolist() if ceiled else [],
                num=[100 + 10 * i for i in range(len(x))],
            )
        )

    for model in models:
        depth = np.linspace(0, 1, model.num_layers)
        steps = np.arange(1, model.num_layers)
        for other in (m for m in models if m != model):
            ceiled = ceiling and (model, other) != models[:2]
            value = 0.55 - 0.3 * depth + 0.08 * np.sin(6 * depth + other.d_sae) + 0.03 * rng.random(len(depth))
            add("divergence", "matching", model.name, other.name, depth, value, ceiled)
        if len(steps):
            near = np.exp(-steps / (2 + model.d_sae / 40))
            add("decay", "matching", model.name, model.name, steps, near, ceiling)
            add("decay", "reconstruction", model.name, model.name, steps, 1.1 * near - 0.4, False)
        ages = np.arange(1, model.num_layers + 1)
        alive = np.exp(-(ages - 1) / (1 + model.d_sae / 30))
        add("persistence", "matching", model.name, model.name, ages, alive, ceiling)
    return curves


def make_ribbon(model: SyntheticModel, seed: int = 0) -> Ribbon:
    """All features of the first layer are new; later ones fill up what has died, so that d_sae are alive everywhere."""
    rng = np.random.default_rng([seed, model.num_layers, 3])
    alive = np.zeros((model.num_layers, model.num_layers), int)
    for layer in range(model.num_layers):
        if layer:
            alive[:layer, layer] = rng.binomial(alive[:layer, layer - 1], 0.75)
        alive[layer, layer] = model.d_sae - alive[:layer, layer].sum()
    return Ribbon(model=model.name, layers=list(range(model.num_layers)), alive=alive.tolist())


def make_analysis(models: tuple[SyntheticModel, ...] = MODELS) -> Analysis:
    """Two findings, one of them nothing beyond the null, with all curves and ribbons."""
    return Analysis(
        num_tokens=50_000,
        seed=0,
        curves=make_curves(models),
        ribbons=[make_ribbon(model) for model in models],
        findings=[
            Finding(
                topic="decay with distance",
                sentence="zoo/tall: matched share falls from 0.91 to 0.12 over 5 layers.",
                beyond_null=True,
                numbers={"slope": -0.158, "low": -0.17, "high": -0.14},
            ),
            Finding(
                topic="hubs",
                sentence="No layer of zoo/wide stands out from the others.",
                beyond_null=False,
                numbers={"p": 0.4},
            ),
        ],
    )


def build_run(
    root: Path,
    models: tuple[SyntheticModel, ...] = MODELS,
    *,
    parts: tuple[str, ...] = PARTS,
    forced: bool = False,
    contexts: int = 3,
) -> RunDir:
    """The run folder at `root` with the `parts` asked for."""
    run = RunDir.create(root, parse_study(make_study_tree(models)))
    if forced:
        run.update_info(forced=True)
    with run.step("train", "key") as files:
        files.append("study.yaml")
    for model in models:
        if "quality" in parts:
            for quality in make_qualities(model):
                run.write_quality(quality)
        if "tables" in parts:
            for name, frame in make_tables(model, contexts=contexts).items():
                run.write_table(model.name, name, frame)
        if "transfer" in parts:
            for other in models:
                for metric in ("reconstruction", "matching"):
                    run.write_transfer(make_transfer(model, other, metric))
        if "traces" in parts:
            run.write_trace(make_trace(model, correct=model != models[-1]))
    if "comparisons" in parts and len(models) > 1:
        run.write_comparison(make_comparison(models))
    if "analysis" in parts:
        run.write_record("analysis.json", make_analysis(models))
    return run


def write_page(run: RunDir) -> Path:
    """The report's page without the figures beside it, which take longer."""
    path = run.report_folder() / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render_page(run.study().name, collect(run)).encode("utf-8", "backslashreplace"))
    return path
