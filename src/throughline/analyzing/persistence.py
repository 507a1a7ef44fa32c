"""What throughlines say: how long features live, and which of them several models have."""

from collections.abc import Mapping

import numpy as np
import polars as pl

from throughline.analyzing.naming import most_frequent
from throughline.analyzing.shares import Share, describe_twins, finite
from throughline.records import Curve, Finding, TransferResult
from throughline.throughlines import measure_persistence


def describe_throughlines(result: TransferResult, table: pl.DataFrame) -> tuple[Finding, Curve]:
    """How long the throughlines of a model live, against what position alone and another seed would give."""
    info, lived = result.info, measure_persistence(result, table)
    chains = table.select("throughline", "length").unique("throughline")
    longer = Share.of(int((chains["length"] > 1).sum()), len(chains))
    depth = len(info.source_layers)
    whole = int((chains["length"] == depth).sum())
    half_life = lived.half_life
    beyond = bool(lived.low_D[1] > lived.null_D[1])
    ceiling = f", {lived.ceiling_D[1]:.0%} by another seed's dictionaries" if np.isfinite(lived.ceiling_D[1]) else ""
    ceiling += describe_twins(result, lived.ceiling_min_D[1], lived.ceiling_max_D[1]) if ceiling else ""
    gone = f"half are gone after {half_life:.1f} layers" if half_life is not None else "more than half live to the end"
    sentence = (
        f"{info.source}: {len(chains)} throughlines, of which {longer} live longer than one layer and {whole} through all {depth}; "
        f"{lived.share_D[1]:.0%} [{lived.low_D[1]:.0%}, {lived.high_D[1]:.0%}] of the features go on into the next layer "
        f"(at most {lived.null_D[1]:.0%} by kind of token alone{ceiling}), {gone}"
    )
    numbers: dict[str, float | int | str | None] = {
        "model": info.source,
        "throughlines": len(chains),
        "longer than one layer": longer.value,
        "through all layers": whole,
        "half-life": half_life,
    }
    numbers |= {f"alive after {d}": float(share) for d, share in enumerate(lived.share_D) if d > 0}
    curve = Curve(
        kind="persistence",
        metric=info.metric,
        source=info.source,
        target=info.target,
        x=[float(d) for d in range(depth)],
        value=finite(lived.share_D),
        low=finite(lived.low_D),
        high=finite(lived.high_D),
        null=finite(lived.null_D),
        ceiling=finite(lived.ceiling_D) if np.isfinite(lived.ceiling_D).any() else [],
        ceiling_min=finite(lived.ceiling_min_D) if result.num_twins else [],
        ceiling_max=finite(lived.ceiling_max_D) if result.num_twins else [],
        num_twins=result.num_twins,
        num=[int(n) for n in lived.num_D],
    )
    words = sentence + ("." if beyond else "; nothing beyond the null.")
    return Finding(topic="throughlines", sentence=words, beyond_null=beyond, numbers=numbers), curve


def describe_families(lines: Mapping[str, pl.DataFrame], labels: Mapping[str, pl.DataFrame]) -> list[Finding]:
    """How many throughlines of all models belong together, and what those that all models have are about."""
    given = {model: table for model, table in lines.items() if len(table)}
    if len(given) < 2:
        return []
    rows = pl.concat([table.with_columns(pl.lit(model).alias("model")) for model, table in given.items()])
    families = rows.drop_nulls("family").group_by("family").agg(pl.col("model").n_unique().alias("models"))
    everywhere = families.filter(pl.col("models") == len(given))
    members = rows.join(everywhere, on="family", how="semi")
    share = Share.of(members.n_unique(["model", "throughline"]), rows.n_unique(["model", "throughline"]))
    lengths = [
        part.unique(["model", "throughline"])["length"].mean()
        for part in (members, rows.join(members, on=["model", "throughline"], how="anti"))
    ]
    told = _labels(members, labels)
    several = f"all {len(given)} models" if len(given) > 2 else "both models"
    sentence = (
        f"{share} of the {share.n} throughlines of all models belong to {len(everywhere)} families that {several} have"
        + (
            f"; these live {lengths[0]:.1f} layers on average, the others {lengths[1]:.1f}"
            if None not in lengths
            else ""
        )
        + told
    )
    return [
        Finding(
            topic="throughlines of all models",
            sentence=sentence + ("." if len(everywhere) else "; nothing is carried through all of them."),
            beyond_null=len(everywhere) > 0,
            numbers={
                "families": len(families),
                "families of all models": len(everywhere),
                "share of throughlines": share.value,
                "n": share.n,
            },
        )
    ]


def _labels(members: pl.DataFrame, labels: Mapping[str, pl.DataFrame]) -> str:
    """The most frequent labels, counted once for each family."""
    known = [
        table.select(pl.col("layer", "feature").cast(pl.Int64), "label").with_columns(pl.lit(model).alias("model"))
        for model, table in labels.items()
    ]
    if not known or not len(members):
        return ""
    joined = members.with_columns(pl.col("layer", "feature").cast(pl.Int64)).join(
        pl.concat(known), on=["model", "layer", "feature"]
    )
    text = most_frequent(joined.unique(["family", "label"]))
    return f", and are most often about {text}" if text else ""
