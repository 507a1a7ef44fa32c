"""Screenshots of every view of a run's page, light and dark, into docs/page/: `python docs/screenshots.py runs/demo`.

The report is opened from its file and the live views from a server, in Chromium at 1,280 x 720. Pictures have few colours, so that
they stay small.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = Path(__file__).parent / "page"
COLORS = 200


@contextmanager
def serving(run: Path) -> Iterator[str]:
    """The address of a server of the run."""
    command = [sys.executable, "-m", "throughline", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://\S+/", process.stderr.readline())
            assert found
            yield found[0]
        finally:
            process.terminate()


def find_views(run: Path) -> dict[str, str]:
    """Addresses by the name of their picture."""
    from throughline.run_dir import RunDir
    from throughline.views.reading import RunReader

    reader = RunReader(RunDir.open(run))
    trace = next(row for row in reader.traces() if row.model == "zoo/pythia")
    comparison = reader.comparisons()[0]
    feature = reader.trace(trace.id).layers[3].features[0]
    place = f"{quote(trace.model, safe='')}/{feature.layer}/{feature.feature}"
    return {
        "overview": "overview",
        "features": "features?q=sum&labelled=yes",
        "feature": f"feature/{place}",
        "transfer": "transfer/matching/zoo%2Fpythia/zoo%2Fgemma?cell=2,3",
        "transfer-all": "transfer/matching",
        "trace": f"trace/{trace.id}",
        "compare": f"compare/{comparison.id}",
        "training": "training",
    }


def save(page: Any, name: str) -> None:
    """The picture with few colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLORS)
    picture.save(FOLDER / f"{name}.png", optimize=True)


def main() -> None:
    """Take them all."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    report = (options.run / "report" / "index.html").resolve().as_uri()
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with serving(options.run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1280, "height": 720}, color_scheme=scheme)
            for name, view in find_views(options.run).items():
                page.goto(f"{report}#/{view}")
                page.wait_for_selector("main h1")
                page.wait_for_timeout(1500)
                save(page, f"{name}-{scheme}")
            page.goto(f"{address}#/trace")
            page.get_by_label("Model").first.select_option("zoo/pythia")
            page.get_by_label("Prompt").first.fill("What is 15 + 27?")
            page.get_by_role("button", name="Trace", exact=True).click()
            page.wait_for_selector("[data-node]", timeout=120_000)
            page.locator('[data-node^="3,"]').last.click()
            page.get_by_role("button", name="switch off").click()
            page.wait_for_timeout(6000)
            save(page, f"trace-live-{scheme}")
            page.close()


if __name__ == "__main__":
    main()
