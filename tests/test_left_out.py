"""Which slow tests run, and the line that says what did not: in runs of pytest of their own, with workers and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from left_out import left_out

TESTS = Path(__file__).parent
FOLDER = {
    "conftest.py": 'pytest_plugins = ["left_out"]',
    "pytest.ini": "[pytest]\nmarkers = slow(area): takes long\naddopts = -q --strict-markers",
    "test_some.py": """
import pytest


def test_fast():
    pass


@pytest.mark.slow("cluster")
def test_of_a_cluster():
    pass


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow("page"))])
def test_of_a_page(scheme):
    pass


@pytest.mark.parametrize("number", [1, 2])
def test_of_peers(number):
    pytest.skip("not in /some/where; `make peers` installs them")
""",
}


@pytest.fixture
def run(tmp_path):
    """Lines that pytest prints of a small folder."""
    for name, text in FOLDER.items():
        (tmp_path / name).write_text(text)

    def lines(*arguments: str) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(TESTS), "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    return lines


ALONE, WORKERS = ("-p", "no:xdist"), ("-n", "2")
SLOW_ONES, OF_PEERS = "2 slow (make test-all)", "2 need the peers' libraries (make peers)"


@pytest.mark.parametrize(
    ("slow", "passed", "line", "workers"),
    [
        ("none", 2, f"not run: {SLOW_ONES}, {OF_PEERS}", WORKERS),
        ("page", 3, f"not run: {OF_PEERS}, 1 slow (make test-all)", ALONE),
        ("page,cluster", 4, f"not run: {OF_PEERS}", ALONE),
        ("all", 4, f"not run: {OF_PEERS}", WORKERS),
    ],
    ids=["none", "one area", "two areas", "all"],
)
def test_the_last_line_says_what_did_not_run(run, slow, passed, line, workers):
    *_, summary, last = run("--slow", slow, *workers)
    assert summary.startswith(f"{passed} passed, {6 - passed} skipped in ")
    assert last == line


def test_by_default_everything_runs_and_nothing_is_said(run):
    assert run("-k", "cluster or fast")[-1].startswith("2 passed, 4 deselected")


def test_other_reasons_are_given_as_they_are():
    assert (
        left_out(["slow: page", "no such\n  thing", "slow: faults"])
        == "not run: 2 slow (make test-all), 1 no such thing"
    )
    assert left_out([]) == ""
