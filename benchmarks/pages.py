"""Put what a benchmark found between its marks in a page of docs/."""

import os
from datetime import UTC, datetime
from pathlib import Path

QUALITY, PERFORMANCE, SCALE, RESULTS = (
    Path(__file__).parents[1] / "docs" / f"{name}.md" for name in ("quality", "performance", "scale", "results")
)


def write_between(path: Path, mark: str, lines: list[str], heading: str) -> None:
    """Replace what stands between `<!-- mark: begin -->` and `<!-- mark: end -->`; a section is added if there is none."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    page = path.read_text() if path.is_file() else f"# {path.stem.capitalize()}\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n## {heading}\n\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    path.write_text("\n".join([before + begin, *lines, end]) + rest.partition(end)[2])


def hardware_and_date() -> str:
    """`2 cores with AVX2, no GPU; 2026-11-23`."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores with {vectors}, {gpu}; {datetime.now(UTC):%Y-%m-%d}"
