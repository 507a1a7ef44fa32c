"""How fast a run of 98 layers with 16,384 features each is served: `python benchmarks/serving.py FOLDER`.

Makes that run of random content in FOLDER (again only what is not there; 2 GB), starts the server on it as a process of its own,
and prints the median and the 95th percentile of each request, alone and with several clients at once, and the server's memory;
then, in Chromium, how long the first view, a search and one step of zooming a map of 98 x 98 take; and the size of the report.
"""

import argparse
import http.client
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

from throughline.records import (
    EXAMPLE_COLUMNS,
    FEATURE_COLUMNS,
    LABEL_COLUMNS,
    LayerQuality,
    TransferInfo,
    TransferResult,
)
from throughline.report.bundle import render_page
from throughline.report.contents import collect
from throughline.run_dir import RunDir
from throughline.study import parse_study

LAYERS = {"first": 36, "second": 32, "third": 24, "fourth": 6}
FEATURES, WORDS = 16_384, 30_000
REQUESTS = {
    "overview": "/api/overview",
    "first page": "/api/features",
    "a word in labels": "/api/features?q=word77",
    "a letter": "/api/features?q=w&limit=100",
    "nothing": "/api/features?q=zzzz",
    "filters": "/api/features?q=word1&model=first&layer=7&min_density=0.01&labelled=true&sort=density",
    "one feature": "/api/feature?model=second&layer=20&feature=1234",
    "transfers": "/api/transfers",
    "a matrix": "/api/transfer?metric=matching&source=first&target=second",
    "a cell's pairs": "/api/pairs?source=first&target=second&source_layer=10&target_layer=9",
}


def make_run(folder: Path) -> RunDir:
    """A run with tables of features and labels, half of the features labelled."""
    models = [{"name": name, "path": "zoo/gpt2"} for name in LAYERS]
    run = RunDir.create(folder, parse_study({"name": "large", "models": models, "data": {"path": "zoo/arithmetic"}}))
    for seed, (name, layers) in enumerate(LAYERS.items()):
        if not run.has_table(name, "examples"):
            rng = np.random.default_rng(seed)
            for table, frame in make_tables(layers, rng).items():
                run.write_table(name, table, frame)
            for layer in range(layers):
                run.write_quality(make_quality(name, layer, rng))
    known = {(info.metric, info.source, info.target) for info in run.transfers()}
    for seed, (source, target) in enumerate(itertools.product(LAYERS, LAYERS)):
        if ("matching", source, target) not in known:
            run.write_transfer(make_transfer(source, target, np.random.default_rng(100 + seed)))
    return run


def make_quality(model: str, layer: int, rng: np.random.Generator) -> LayerQuality:
    """A quality that passes the gate."""
    fields = {name: float(rng.random()) for name, f in LayerQuality.model_fields.items() if f.annotation is float}
    counts = {name: 50_000 for name, f in LayerQuality.model_fields.items() if f.annotation is int}
    shape = {"layer": layer, "d_model": 2048, "d_sae": FEATURES}
    lists = {"fvu_by_position": [0.1] * 8, "gate": []}
    return LayerQuality(
        model=model,
        architecture="topk",
        answers_kept=0.99,
        **(fields | counts | shape | lists),  # pyright: ignore
    )


def make_transfer(source: str, target: str, rng: np.random.Generator) -> TransferResult:
    """Random matches of all features of every pair of layers."""
    shape = (LAYERS[source], LAYERS[target])
    arrays = {name: rng.random(shape) for name in ("value", "null", "threshold")}
    arrays |= {"low": arrays["value"] - 0.05, "high": arrays["value"] + 0.05, "null": 0.1 * arrays["null"]}
    partner = rng.integers(0, FEATURES, (*shape, FEATURES), dtype=np.int32)
    correlation = rng.random((*shape, FEATURES), dtype=np.float32)
    return TransferResult(
        TransferInfo(
            metric="matching",
            source=source,
            target=target,
            source_layers=list(range(shape[0])),
            target_layers=list(range(shape[1])),
            quantity="random numbers",
            null="random numbers",
            ceiling=None,
            num_tokens=100_000,
            num_documents=1000,
            coverage=1.0,
            seed=0,
        ),
        arrays | {"partner": partner, "correlation": correlation},
    )


def make_tables(num_layers: int, rng: np.random.Generator) -> dict[str, pl.DataFrame]:
    """Features and labels of one model."""
    num = num_layers * FEATURES
    words = pl.Series([f" word{i}" for i in range(WORDS)])

    def lists(length: int) -> pl.Series:
        drawn = words.gather(rng.integers(0, WORDS, num * length))
        return drawn.reshape((num, length)).arr.to_list()

    keys = {"layer": np.repeat(np.arange(num_layers), FEATURES), "feature": np.tile(np.arange(FEATURES), num_layers)}
    count = rng.integers(0, 50_000, num)
    numbers = {"density": count / 1e6, "num_active": count, "num_tokens": np.full(num, 1_000_000)}
    numbers |= {name: rng.random(num) for name in ("mean_active", "max", "top_token_share")}
    tokens = {"top_tokens": lists(5), "promoted": lists(5), "suppressed": lists(5)}
    roles = {"role_means": pl.Series(rng.random((num, 10))).arr.to_list()}
    features = pl.DataFrame(keys | numbers | tokens | roles).select(*FEATURE_COLUMNS).cast(FEATURE_COLUMNS)  # pyright: ignore
    labelled = rng.random(num) < 0.5
    some = {name: column[labelled] for name, column in keys.items()}
    said = pl.DataFrame({"word": words.gather(rng.integers(0, WORDS, int(labelled.sum())))})
    labels = pl.DataFrame(some).with_columns(
        label=said.select(pl.format("token {} before a number", "word")).to_series(),
        source=pl.lit("tokens"),
        measure=pl.lit("tokens"),
        **{name: pl.Series(rng.random(int(labelled.sum()))) for name in ("f1", "precision", "recall", "threshold")},
        **{name: pl.lit(0.1) for name in ("base_f1", "neuron_f1", "untrained_f1")},
        **{name: pl.lit(None) for name in ("balanced_accuracy", "fuzzing")},
        **{name: pl.lit(1000) for name in ("num_positive", "num_tokens")},
    )
    few = np.repeat(np.arange(num), 2)
    contexts = pl.DataFrame({key: column[few] for key, column in keys.items()}).with_columns(
        stratum=pl.lit("top"),
        rank=pl.lit(0),
        value=pl.Series(rng.random(2 * num)),
        document=pl.Series(rng.integers(0, 1000, 2 * num)),
        tokens=words.gather(rng.integers(0, WORDS, 2 * num * 12)).reshape((2 * num, 12)).arr.to_list(),
        values=pl.Series(rng.random((2 * num, 12))).arr.to_list(),
        focus=pl.lit(6),
    )
    examples = contexts.select(*EXAMPLE_COLUMNS).cast(EXAMPLE_COLUMNS)  # pyright: ignore
    return {"features": features, "examples": examples, "labels": labels.select(*LABEL_COLUMNS).cast(LABEL_COLUMNS)}  # pyright: ignore


def ask(connection: http.client.HTTPConnection, path: str) -> float:
    """Seconds of one request."""
    began = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    return time.perf_counter() - began


def measure(port: int, path: str, num_clients: int, num_requests: int) -> list[float]:
    """Seconds of each request of several clients at once, sorted."""

    def one(_: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        return [ask(connection, path) for _ in range(num_requests)]

    with ThreadPoolExecutor(num_clients) as pool:
        return sorted(seconds for mine in pool.map(one, range(num_clients)) for seconds in mine)


FRAMES = """async (steps) => {
  const map = document.querySelector('[role=application]'), box = map.getBoundingClientRect(), times = [];
  let before = performance.now();
  for (let i = 0; i < steps; i++) {
    const zoom = i < steps / 2 ? -40 : 40;
    const at = {clientX: box.x + box.width * (0.3 + 0.4 * i / steps), clientY: box.y + box.height / 2};
    map.dispatchEvent(new WheelEvent('wheel', {...at, deltaY: zoom, bubbles: true, cancelable: true}));
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    times.push(now - before);
    before = now;
  }
  return times;
}"""


def measure_browser(port: int) -> None:
    """First view, searches and zooming, as a browser sees them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        for name in ("first view", "first view again"):
            page.goto(f"http://127.0.0.1:{port}/#/overview")
            page.wait_for_selector("table tbody tr")
            shown = page.evaluate("performance.now()")
            loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            print(
                f"{name:18} table {shown - loaded:.0f} ms after the page was loaded, {shown:.0f} after it was asked for"
            )
            page.goto("about:blank")
        page.goto(f"http://127.0.0.1:{port}/#/features")
        for word in ("word77", "word123 ", "before a number", "zzz"):
            page.get_by_label("Label or token").fill(word)
            page.wait_for_timeout(1500)
            told = page.inner_text("p[role=status]")
            print(f"search {word!r:18} {told}")
        page.goto(f"http://127.0.0.1:{port}/#/transfer/matching")
        page.wait_for_selector("[role=application]")
        page.wait_for_timeout(2000)
        frames = np.array(page.evaluate(FRAMES, 120))
        p50, p95 = np.percentile(frames, (50, 95))
        print(f"zooming 98 x 98    a frame every {p50:.1f} ms, p95 {p95:.1f}, longest {frames.max():.1f}")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=10)
    options = parser.parse_args()
    run = make_run(options.folder)
    began = time.perf_counter()
    command = [sys.executable, "-m", "throughline", "serve", str(run.root), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        found = re.search(r":(\d+)/", process.stderr.readline())
        assert found
        port = int(found[1])
        measure(port, REQUESTS["overview"], 1, 1)
        print(f"ready after {time.perf_counter() - began:.1f} s; {sum(LAYERS.values()) * FEATURES:,} features")
        for name, path in REQUESTS.items():
            first = measure(port, path, 1, 1)[0]
            alone, together = measure(port, path, 1, 20), measure(port, path, options.clients, 10)
            p95 = [times[int(0.95 * len(times))] for times in (alone, together)]
            print(
                f"{name:18} first {1000 * first:6.1f} ms, then median {1000 * statistics.median(alone):6.1f}, "
                f"p95 {1000 * p95[0]:6.1f}; {options.clients} clients median {1000 * statistics.median(together):6.1f}, "
                f"p95 {1000 * p95[1]:6.1f}"
            )
        if shutil.which("chromium"):
            measure_browser(port)
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():
            print(re.search(r"VmRSS.*", status.read_text())[0], f"on {os.cpu_count()} cores")  # pyright: ignore
    finally:
        process.terminate()
        process.wait()
    began = time.perf_counter()
    page = render_page(run.study().name, collect(run))
    print(f"the report: {len(page.encode()) / 1e6:.1f} MB, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
