"""Do matched predecessors cause their successors? What `flow` measured, against matching and against chance."""

import numpy as np

from throughline.analyzing.shares import Share
from throughline.records import Finding, TransferResult

WORDS = {
    "matched": "its best match by correlation",
    "cosine": "its nearest by decoder row",
    "cause": "the strongest cause by gradient",
    "random": "any active feature",
}


def compare_causes(result: TransferResult) -> list[Finding]:
    """For features of all layers but the first, what switching off one feature of the layer before takes from them."""
    info, arrays = result.info, result.arrays
    steps = [(i, i + 1) for i in range(len(info.source_layers) - 1)]
    shares, drops = {}, {}
    for kind in WORDS:
        measured = np.concatenate([arrays[f"{kind}_measured"][i, j] for i, j in steps])
        known = measured[np.isfinite(measured)]
        shares[kind] = Share.of(int((known > 0.5).sum()), len(known))
        drops[kind] = float(known.mean()) if len(known) else float("nan")
    if not shares["matched"].n:
        return []
    beyond = shares["matched"].low > shares["random"].high
    told = "; ".join(f"{WORDS[kind]}: {shares[kind]}" for kind in ("cosine", "cause", "random"))
    sentence = (
        f"{info.source}: switching off the feature of the layer before that matches a feature best takes more than half of its "
        f"activation in {shares['matched']} of {shares['matched'].n} cases ({drops['matched']:.0%} on average); {told}"
    )
    numbers: dict[str, float | int | str | None] = {"model": info.source, "n": shares["matched"].n}
    for kind, share in shares.items():
        numbers |= {kind: share.value, f"{kind}: mean drop": drops[kind]}
    words = sentence + ("." if beyond else "; matched predecessors cause no more than any active feature.")
    return [Finding(topic="causes", sentence=words, beyond_null=beyond, numbers=numbers)]
