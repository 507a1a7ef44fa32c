"""Print the areas of slow tests that what changed since `.ci/run` last passed asks for: `all`, `none`, or names by commas.

python .ci/slow_areas.py                    what changed is what git says; everything, if that commit is not known
python .ci/slow_areas.py --passed           note that this commit has passed, if nothing is changed beside it
python .ci/slow_areas.py PATH...            of these paths
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

MARKER = r'pytest\.mark\.slow\("(\w+)"\)'
ROOT = Path(__file__).resolve().parents[1]
TABLE = tomllib.loads((ROOT / ".ci" / "slow.toml").read_text())
PASSED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "throughline" / "ci" / "passed"


def choose(changed: Iterable[str] | None, root: Path = ROOT) -> str:
    """Areas by commas, `none` or `all`; `changed` None: it is not known what changed."""
    if changed is None:
        return "all"
    areas: set[str] = set()
    for path in changed:
        entry = max((p for p in TABLE["paths"] if path.startswith(p)), key=len, default=None)
        if entry is None:
            return "all"
        areas |= {*TABLE["paths"][entry], *areas_of(root / path)}
    return ",".join(sorted(areas)) or "none"


def areas_of(file: Path) -> set[str]:
    """Areas of the slow tests in a test file; none of another file, or of one that is gone."""
    if not (file.name.startswith("test_") and file.is_file()):
        return set()
    return set(re.findall(MARKER, file.read_text()))


def changed_since_passed(root: Path = ROOT) -> list[str] | None:
    """Paths that differ from the commit that passed last, committed or not; None if that is not known or no ancestor."""
    if not PASSED.is_file():
        return None
    commit = PASSED.read_text().strip()
    if _git(root, "merge-base", "--is-ancestor", commit, "HEAD") is None:
        return None
    differing = _git(root, "diff", "--name-only", "--no-renames", commit)
    new = _git(root, "ls-files", "--others", "--exclude-standard")
    return None if differing is None or new is None else [*differing.splitlines(), *new.splitlines()]


def note_passed(root: Path = ROOT) -> None:
    """Keep which commit has passed; a commit with changes beside it has not."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit and _git(root, "status", "--porcelain") == "":
        PASSED.parent.mkdir(parents=True, exist_ok=True)
        PASSED.write_text(commit)


def _git(root: Path, *arguments: str) -> str | None:
    """What git answers; None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    if sys.argv[1:] == ["--passed"]:
        note_passed()
    else:
        print(choose(sys.argv[1:] or changed_since_passed()))
