"""Which slow tests a change asks for: the table is complete and current, and what is not known asks for all."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("slow_areas", ROOT / ".ci" / "slow_areas.py")
assert spec and spec.loader
slow_areas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow_areas)
AREAS, PATHS = slow_areas.TABLE["areas"], slow_areas.TABLE["paths"]


def test_areas_of_tests_and_of_the_table_are_the_same():
    marked = [slow_areas.areas_of(file) for file in sorted((ROOT / "tests").glob("test_*.py"))]
    assert set().union(*marked) == set(AREAS)
    assert {area for areas in PATHS.values() for area in areas} == set(AREAS)


def test_every_marker_is_seen_by_who_reads_the_files():
    for file in (ROOT / "tests").glob("test_*.py"):
        markers = file.read_text().count("pytest.mark" + ".slow")
        assert markers == len(re.findall(slow_areas.MARKER, file.read_text())), file


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_the_table_are_there(path):
    assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*"))


@pytest.mark.parametrize(
    ("changed", "areas"),
    [
        ([], "none"),
        (["docs/development.md", "README.md"], "none"),
        (["src/throughline/executors/ray.py"], "cluster,storage"),
        (["src/throughline/dictionaries/formats/saelens.py"], "peers"),
        (["src/throughline/training/kernels.py"], "cluster,faults,kernels,processes,ranks,storage"),
        (["src/throughline/views/answers.py", "docs/serving.md"], "page"),
        (["tests/test_faults.py"], "faults"),
        (["tests/test_storage.py", "tests/test_text.py"], "cluster,storage"),
        (["tests/test_deleted.py"], "none"),
        (["src/throughline/views/answers.py", "src/throughline/pipeline.py"], "all"),
        (["src/throughline/newly_made.py"], "all"),
        (["constraints.txt"], "all"),
        ([".ci/run"], "all"),
        (["tests/conftest.py"], "all"),
        (None, "all"),
    ],
)
def test_a_change_asks_for_the_areas_that_it_touches(changed, areas):
    assert slow_areas.choose(changed) == areas


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_what_changed_is_what_differs_from_the_commit_that_passed(tmp_path, monkeypatch):
    """Committed, not committed, new and renamed; a commit that is no ancestor, or one with changes beside it, tells nothing."""
    monkeypatch.setattr(slow_areas, "PASSED", tmp_path / "cache" / "ci" / "passed")
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("one", "two", "three", "four"):
        (root / name).write_text(name)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    assert slow_areas.changed_since_passed(root) is None
    slow_areas.note_passed(root)
    assert slow_areas.changed_since_passed(root) == []
    (root / "one").write_text("changed")
    git(root, "mv", "four", "five")
    git(root, "commit", "-qam", "second")
    (root / "two").write_text("changed")
    (root / "new").write_text("new")
    assert slow_areas.changed_since_passed(root) == ["five", "four", "one", "two", "new"]
    slow_areas.note_passed(root)
    assert len(slow_areas.changed_since_passed(root)) == 5
    git(root, "add", "-A")
    git(root, "commit", "-qm", "third")
    slow_areas.note_passed(root)
    assert slow_areas.changed_since_passed(root) == []
    git(root, "reset", "-q", "--hard", "HEAD~1")
    assert slow_areas.changed_since_passed(root) is None
