"""Which slow tests run, and a last line that says what did not run, why, and what to type to have it run.

--slow all              every test (the default, so that a test that is asked for by name runs)
--slow none             no test that is marked `slow`
--slow cluster,page     the slow tests of these areas only
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

# What the reason of a skipped test contains, what that is called, and what to type; the first that fits counts.
REASONS = (
    (r"^slow: ", "slow", "make test-all"),
    (r"make peers", "need the peers' libraries", "make peers"),
    (r"make s3", "need an S3 server", "make s3"),
    (r"no chromium", "need Chromium", "apt-get install chromium"),
    (r"make page", "need axe-core", "make page"),
    (r"shared data", "need the shared data", "lay it beside the checkout as ../shared"),
    (r"mount a disk", "need a disk of their own", "run as root on Linux"),
    (r"trained the plain way anyhow", "are of one way of training only", ""),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", default="all", help="areas of slow tests to run, by commas; or all, or none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests that were not asked for are skipped rather than left out, so that they are counted, by every worker alike."""
    wanted = set(config.getoption("slow").split(","))
    for item in items:
        areas = {area for mark in item.iter_markers("slow") for area in mark.args}
        if areas and "all" not in wanted and not areas & wanted:
            item.add_marker(pytest.mark.skip(reason=f"slow: {', '.join(sorted(areas))}"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """The line comes after pytest's summary, which its own part of this hook prints."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker
        return
    skipped = [report.longrepr[2] for report in reporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    if line := left_out(reason.removeprefix("Skipped: ") for reason in skipped):
        reporter.ensure_newline()
        reporter.write_line(line)


def left_out(reasons: Iterable[str]) -> str:
    """One line with counts by reason; empty if everything ran. Reasons that REASONS does not know are given as they are."""
    counts = Counter(map(_named, reasons))
    parts = [f"{count} {name}" for name, count in counts.most_common()]
    return f"not run: {', '.join(parts)}" if parts else ""


def _named(reason: str) -> str:
    for pattern, name, command in REASONS:
        if re.search(pattern, reason):
            return f"{name} ({command})" if command else name
    return " ".join(reason.split())
