"""How one pair of layers' matching and reconstruction grow with features, tokens and width, and what 98 layers would cost.

    python benchmarks/transfer_growth.py [--write]

Codes are drawn: K active features a token out of F, some often and most seldom; only how many there are matters to the time. One
thread matches two layers; a machine matches as many pairs at once as it has cores. The estimate is for the reference study
(GPT2-medium, Gemma-2B, Phi-2, Pythia-1.4B; 98 layers, 16,384 features, 200,000 tokens) on the cores of this machine.
"""

import argparse
import os
import time

import numpy as np
import scipy.sparse as sp
import torch
from pages import PERFORMANCE, hardware_and_date, write_between

from throughline.dictionaries import Dictionary
from throughline.transfer import matching
from throughline.transfer.cooccurrence import SourceFeatures, live_features
from throughline.transfer.maps import FitTokens, LayerMoments, carry, fit_layers

K, MIN_COUNT, DOCUMENT = 32, 30, 100
MODELS = {"gpt2-medium": (24, 1024), "gemma-2b": (18, 2048), "phi-2": (32, 2560), "pythia-1.4b": (24, 2048)}
FEATURES, TOKENS = 16_384, 200_000


def draw_codes(num_tokens: int, num_features: int, seed: int) -> sp.csr_array:
    """K features a token, drawn with probabilities that fall as 1 / rank."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, num_features + 1)
    drawn = rng.choice(num_features, (num_tokens, 2 * K), p=weight / weight.sum())
    rows = [np.unique(row)[:K] for row in drawn]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    values = rng.exponential(size=starts[-1]).astype(np.float32)
    return sp.csr_array((values, np.concatenate(rows).astype(np.int32), starts), shape=(num_tokens, num_features))


def draw_dictionary(width: int, num_features: int, seed: int) -> Dictionary:
    """Random directions."""
    rows = torch.randn(num_features, width, generator=torch.Generator().manual_seed(seed))
    rows = rows / rows.norm(dim=1, keepdim=True)
    zeros = torch.zeros(num_features), torch.zeros(width)
    return Dictionary("topk", rows.T.contiguous(), zeros[0], rows, zeros[1], options={"k": K})


def match_seconds(num_features: int, num_tokens: int, width: int | None) -> tuple[float, int]:
    """Both directions of a pair of layers, of one model if `width` is given; and how many features fire often enough."""
    codes = [draw_codes(num_tokens, num_features, seed) for seed in (0, 1)]
    meeting = _Meeting(num_tokens)
    source = matching._Source.of(SourceFeatures.of(codes[0], meeting.source_N, MIN_COUNT), meeting, 1)
    live = live_features(codes[1], meeting.target_N, MIN_COUNT)
    target = matching._Target.of(codes[1], live, meeting, 1)
    decoders = (draw_dictionary(width, num_features, 0), draw_dictionary(width, num_features, 1)) if width else None
    started = time.perf_counter()
    matching._match_layers(source, target, decoders, 1, MIN_COUNT)
    return time.perf_counter() - started, len(live)


class _Meeting(matching._Meeting):
    """Tokens in documents of one length, each with itself, and with the one a document further on."""

    def __init__(self, num_tokens: int) -> None:
        self.source_N = self.target_N = np.arange(num_tokens)
        self.shifted = [(self.target_N + DOCUMENT) % num_tokens]
        self.roles_N, self.cuts = self.source_N % 10, np.array([num_tokens])


def reconstruction_seconds(width: int) -> float:
    """Maps of a pair of layers, and a dictionary through all four, in both directions, on as many tokens as the metric takes."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5000 + 3072, width, generator=generator) @ torch.randn(width, width, generator=generator)
    other = mixed @ torch.randn(width, width, generator=generator)
    place = np.arange(5000)
    layers = [LayerMoments.of(FitTokens(x.numpy(), place, 4400, torch.device("cpu"))) for x in (mixed, other)]
    dictionary, x_ND = draw_dictionary(width, 8 * width, 0), mixed[5000:]
    started = time.perf_counter()
    fit = fit_layers(layers[0], layers[1])
    for name in fit.maps:
        carried = carry(dictionary, fit.maps_for(name, dictionary))
        carried.decode(carried.encode(x_ND))
        floor = carry(dictionary, fit.maps_for(name, dictionary))
        floor.decode(floor.encode(x_ND[:512]))
    return 2 * (time.perf_counter() - started)


def main() -> None:
    """Print the table and the estimate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    match_seconds(256, 2000, 16)  # compiles
    rows = []
    for num_features, num_tokens in ((4096, 50_000), (8192, 50_000), (16_384, 50_000), (16_384, 100_000)):
        rows.append((num_features, num_tokens, *match_seconds(num_features, num_tokens, None)))
    wide = match_seconds(FEATURES, 50_000, 1024)[0] - rows[2][2]
    carried = {width: reconstruction_seconds(width) for width in (256, 512, 1024)}
    by_tokens = (rows[3][2] - rows[2][2]) / 50_000
    pair = rows[2][2] + by_tokens * (TOKENS - 50_000)
    sizes = list(MODELS.values())
    within = sum(depth * (depth + 1) // 2 for depth, _ in sizes)
    across = sum(a * b for i, (a, _) in enumerate(sizes) for b, _ in sizes[i + 1 :])
    cosines = sum(depth * (depth + 1) / 2 * wide * width / 1024 for depth, width in sizes)
    widths = [width for depth, width in sizes for _ in range(depth)]
    growth = np.log2(carried[1024] / carried[512])
    maps = sum(carried[1024] * (max(a, b) / 1024) ** growth for i, a in enumerate(widths) for b in widths[i:])
    cores = os.cpu_count() or 1
    hours = {"matching": ((within + across) * pair + cosines) / cores / 3600, "reconstruction": maps / cores / 3600}
    lines = [f"`python benchmarks/transfer_growth.py --write`; one thread; {hardware_and_date()}.", ""]
    lines += ["| one pair of layers, both directions | seconds |", "|---|---|"]
    lines += [f"| matching, {f:,} features ({live:,} live), k {K}, {n:,} tokens | {s:.2f} |" for f, n, s, live in rows]
    lines += [f"| decoder rows of {FEATURES:,} features compared, width 1,024 | {wide:.2f} |"]
    lines += [f"| reconstruction, width {w:,}, {8 * w:,} features | {s:.2f} |" for w, s in carried.items()]
    told = {name: f"{h:.1f} h" for name, h in hours.items()}
    lines += [
        "",
        f"From these, the reference study (98 layers, {within + across:,} pairs, {FEATURES:,} features, {TOKENS:,} tokens),",
        f"{cores} cores:",
        f"matching {told['matching']} ({pair:.2f} s a pair and thread; {cosines / cores / 3600:.1f} h of it decoder rows),",
        f"reconstruction {told['reconstruction']} (grows with width to the power {growth:.1f}); reading comes before it.",
    ]
    print("\n".join(lines))
    if options.write:
        write_between(PERFORMANCE, "transfer growth", lines, "Transfer")


if __name__ == "__main__":
    main()
