"""Put what a benchmark found between its marks in docs/quality.md."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"


def write_between(mark: str, lines: list[str], heading: str) -> None:
    """Replace what stands between `<!-- mark: begin -->` and `<!-- mark: end -->`; a section is added if there is none."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    page = PAGE.read_text() if PAGE.is_file() else "# Quality\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n## {heading}\n\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    PAGE.write_text("\n".join([before + begin, *lines, end]) + rest.partition(end)[2])
