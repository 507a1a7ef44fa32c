"""Where a run lies: a folder, worked on in place, or a URL (`mirror.py`). Names of files are relative to it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from throughline.errors import InputError
from throughline.files import replacing

is_patient: ContextVar[bool] = ContextVar("is_patient", default=True)


@contextmanager
def hurried() -> Iterator[None]:
    """Await no lost network in the block: for what is done again soon anyway."""
    before = is_patient.set(False)
    try:
        yield
    finally:
        is_patient.reset(before)


def open_storage(root: str | Path) -> "Storage":
    """The storage at a path or URL; nothing is read yet. InputError if nothing that is installed opens such a URL."""
    text = str(root)
    if not text.strip():
        raise InputError(f"the name of a run folder is empty, found {text!r}; give a folder or a URL")
    if isinstance(root, Path) and re.match(r"(file|memory|s3|gs|gcs|abfs|az):/", text):
        raise InputError(f"a URL is given as a string; pathlib has made {text} of it")
    if "://" not in text:
        return Storage(Path(root))
    from throughline.mirror import Mirror

    return Mirror(text)


class Slot:
    """A small text that several processes read and replace: a file, as a whole."""

    seconds = 0.0  # between looks by those who look all the time

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str:
        """What it says; nothing if it is not there."""
        try:
            return self.path.read_text()
        except OSError:
            return ""

    def write(self, text: str) -> None:
        """Replace it."""
        with replacing(self.path) as temporary:
            temporary.write_text(text)

    def create(self, text: str) -> bool:
        """Make it; False if another was there first, where that can be told at once."""
        self.write(text)
        return True

    def settle(self) -> None:
        """Wait until whoever wrote at the same moment has written."""

    def remove(self) -> None:
        """Take it away."""
        self.path.unlink(missing_ok=True)


class Storage:
    """A folder, worked on in place."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)  # as the user knows it, and as another process opens it

    def name(self, relative: str) -> str:
        """Where a file is, for people."""
        return str(self.root / relative)

    def absolute(self) -> str:
        """The same place for a process that runs in another folder."""
        return str(self.root.resolve())

    def require_folder(self) -> None:
        """InputError if there is something else than a folder."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.place} is a file; give a folder with --out")

    def is_there(self) -> bool:
        """True if there is a folder, whatever it has."""
        return self.root.is_dir()

    def has(self, relative: str) -> bool:
        """True if there is such a file."""
        return (self.root / relative).exists()

    def has_folder(self, relative: str) -> bool:
        """True if there is such a folder."""
        return (self.root / relative).is_dir()

    def children(self, relative: str = "") -> list[str]:
        """Names of what a folder has, sorted; none if there is no such folder."""
        folder = self.root / relative
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def glob(self, pattern: str) -> list[str]:
        """Names of the files that match, sorted."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def fetch(self, relative: str, keep_unsent: bool = False, anew: bool = False) -> bool:
        """See that the copy of a file is the latest; True if it was replaced. `anew` fetches even what seems to be the same."""
        return False

    def fetch_folder(self, relative: str) -> None:
        """The same for all files right in a folder; those that were changed here and not sent are kept."""

    @contextmanager
    def replacing(self, relative: str) -> Iterator[Path]:
        """A temporary name; what the block wrote there takes the place of the file."""
        with replacing(self.root / relative) as temporary:
            yield temporary

    def push(self, *relatives: str) -> None:
        """Send files that were written by others than `replacing`."""

    def push_folder(self, relative: str, deep: bool = True) -> None:
        """The same for all that is in a folder; without folders in it unless `deep`."""

    def remove(self, relative: str) -> None:
        """Take a file away, if it is there."""
        (self.root / relative).unlink(missing_ok=True)

    def remove_folder(self, relative: str) -> None:
        """Take a folder away with all that is in it."""
        shutil.rmtree(self.root / relative, ignore_errors=True)

    def slot(self, relative: str) -> Slot:
        """A small text that several processes read and replace."""
        return Slot(self.root / relative)
