"""A run at a URL that fsspec opens, worked on in a copy on this machine.

1. what the URL has is listed, at most every other second; the listing says what the run has and what is newer than the copy
2. what is read is fetched first, if the URL has another than the copy; what is written is put there before it is in the copy
3. a file takes its place at the URL whole: object stores do that of themselves, elsewhere it gets a temporary name first
4. who holds what (`Slot`) is read and written at the URL alone

Beside the copy, `.sent/` keeps for each file which version of the URL's it is, and what size and time the copy had then. A file
that has others now was changed here and not sent. Checkpoints and journals may be, when the network was lost, and are kept if the
URL has nothing newer; all else is fetched anew.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from threading import RLock
from typing import Any, TypeVar
from uuid import uuid4

from throughline.errors import InputError, ThroughlineError, TrainingError
from throughline.files import replacing
from throughline.storage import Slot, Storage, is_patient

T = TypeVar("T")

LISTED_SECONDS = 2.0  # for which a listing of the URL serves
LOOKED_SECONDS = 5.0  # between looks at a slot by those who look all the time
SETTLING_SECONDS = 1.0  # in which two who took a slot at the same moment have both written
PATIENCE_SECONDS = 60.0  # for which a lost network is awaited: as long as a silent process is taken to live
LONGEST_WAIT_SECONDS = 8.0
SENT = ".sent"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "obs", "tos", "memory"}
EXTRAS = {"s3": "s3", "s3a": "s3"}  # by protocol
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


class Mirror(Storage):
    """A URL, worked on in a copy in the user's cache."""

    is_remote = True

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        self._fs, self._base = _open_filesystem(url)
        name = re.sub(r"[^\w.-]", "-", url.rpartition("/")[2])
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.root = cache / "throughline" / "runs" / f"{name}-{sha256(url.encode()).hexdigest()[:12]}"
        self.place = url
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._puts_whole = bool(protocols & OBJECT_STORES)
        self._reached = False
        self._lock = RLock()  # beats come from threads
        self._listed: dict[str, str] = {}
        self._listed_at = -float("inf")

    def name(self, relative: str) -> str:
        """Where a file is, for people."""
        return f"{self.place}/{relative}"

    def absolute(self) -> str:
        """The URL."""
        return self.place

    def require_folder(self) -> None:
        """InputError if the URL is of a file."""
        if "" in self._list():
            raise InputError(f"{self.place} is a file; give a folder with --out")

    # ---- what there is

    def is_there(self) -> bool:
        """True if the URL has any file."""
        self.require_folder()
        return bool(self._list())

    def has(self, relative: str) -> bool:
        """True if the URL has such a file."""
        return relative in self._list()

    def has_folder(self, relative: str) -> bool:
        """True if the URL has files below that name."""
        return any(name.startswith(f"{relative}/") for name in self._list())

    def children(self, relative: str = "") -> list[str]:
        """Names of what the URL has in a folder, and of folders in the copy with files that were not sent."""
        prefix = f"{relative}/" if relative else ""
        found = {name[len(prefix) :].partition("/")[0] for name in self._list() if name.startswith(prefix)}
        folder = self.root / relative
        for path in folder.iterdir() if relative and folder.is_dir() else ():
            if path.is_dir() and any(self._is_unsent(f"{prefix}{path.name}/{file}") for file in _files_of(path)):
                found.add(path.name)
        return sorted(found)

    def glob(self, pattern: str) -> list[str]:
        """Names of the URL's files that match."""
        depth = pattern.count("/")
        return sorted(n for n in self._list() if n.count("/") == depth and PurePosixPath(n).match(pattern))

    def _list(self, fresh: bool = False) -> dict[str, str]:
        """Every file at the URL, and which version of it."""
        with self._lock:
            if fresh or time.monotonic() - self._listed_at > LISTED_SECONDS:
                self._listed = self._do(self._find)
                self._listed_at = time.monotonic()
            return dict(self._listed)

    def _find(self) -> dict[str, str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._base, detail=True)
        except FileNotFoundError:
            return {}
        files = {path.removeprefix(self._base).removeprefix("/"): info for path, info in found.items()}
        return {name: _version(info) for name, info in files.items() if not name.endswith((".tmp", "/"))}

    # ---- from the URL

    def fetch(self, relative: str, keep_unsent: bool = False, anew: bool = False) -> bool:
        """See that the copy of a file is the URL's; True if it was replaced."""
        version, path = self._list().get(relative), self.root / relative
        known, unsent = self._known(relative), self._is_unsent(relative)
        if version is None:
            if known and not unsent:  # it was there, and was taken away
                self._drop(relative)
            return False
        if not anew and path.is_file() and version == known and (keep_unsent or not unsent):
            return False
        try:
            with replacing(path) as temporary:
                self._do(lambda: self._fs.get_file(self._path(relative), str(temporary)))
        except FileNotFoundError:  # taken away since it was listed
            self._listed_at = -float("inf")
            return False
        self._note(relative, version)
        return True

    def fetch_folder(self, relative: str) -> None:
        """The same for all files right in a folder; those that were changed here and not sent are kept."""
        listed = {name for name in self._list(fresh=True) if name.rpartition("/")[0] == relative}
        for name in sorted(listed | {f"{relative}/{file}" for file in _files_of(self.root / relative)}):
            self.fetch(name, keep_unsent=True)

    # ---- to the URL

    @contextmanager
    def replacing(self, relative: str) -> Iterator[Path]:
        """A temporary name; what the block wrote there takes the place of the file, at the URL first."""
        with replacing(self.root / relative) as temporary:
            yield temporary
            version = self._put(temporary, relative)
        self._note(relative, version)

    def push(self, *relatives: str) -> None:
        """Send files of the copy."""
        for relative in relatives:
            if (self.root / relative).is_file():
                self._note(relative, self._put(self.root / relative, relative))

    def push_folder(self, relative: str, deep: bool = True) -> None:
        """Send all that is in a folder of the copy; without folders in it unless `deep`."""
        folder = self.root / relative
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp"]
        self.push(*(f"{relative}/{name}" for name in sorted(names if deep else _files_of(folder))))

    def remove(self, relative: str) -> None:
        """Take a file away, at the URL and in the copy."""
        self._remove(relative, recursive=False)
        self._drop(relative)

    def remove_folder(self, relative: str) -> None:
        """Take a folder away, at the URL and in the copy."""
        if any(name.startswith(f"{relative}/") for name in self._list(fresh=True)):
            self._remove(relative, recursive=True)
        for folder in (self.root, self.root / SENT):
            shutil.rmtree(folder / relative, ignore_errors=True)
        self._listed_at = -float("inf")

    def slot(self, relative: str) -> Slot:
        """A small text at the URL."""
        return UrlSlot(self, relative)

    def _put(self, source: Path, relative: str) -> str:
        """Put a file at the URL as a whole; returns which version it is."""
        self._replace(relative, lambda target: self._fs.put_file(str(source), target))
        version = self._do(lambda: self._version_of(relative))
        with self._lock:
            self._listed[relative] = version
        return version

    def _replace(self, relative: str, write: Callable[[str], None]) -> None:
        """What `write` writes under the name it is given takes the place of a file of the URL."""
        target = PurePosixPath(self._path(relative))
        try:
            if self._puts_whole:
                self._do(lambda: write(str(target)))
                return
            temporary = str(target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp"))
            self._do(lambda: self._fs.makedirs(str(target.parent), exist_ok=True))
            self._do(lambda: write(temporary))
            self._do(lambda: self._fs.mv(temporary, str(target)))
        except FileNotFoundError as error:  # the bucket
            raise InputError(f"{self.place} cannot be used: {_reason(error)}") from error

    def _version_of(self, relative: str) -> str:
        self._fs.invalidate_cache()
        return _version(self._fs.info(self._path(relative)))

    def _remove(self, relative: str, recursive: bool) -> None:
        with suppress(FileNotFoundError):
            self._do(lambda: self._fs.rm(self._path(relative), recursive=recursive))
        with self._lock:
            self._listed.pop(relative, None)

    def _path(self, relative: str) -> str:
        return f"{self._base}/{relative}"

    # ---- what the copy has of it

    def _known(self, relative: str) -> str:
        return self._sent(relative).get("version", "")

    def _is_unsent(self, relative: str) -> bool:
        """True if the copy has this file as the URL never had it."""
        path, sent = self.root / relative, self._sent(relative)
        return path.is_file() and _size_and_time(path) != sent.get("copy")

    def _sent(self, relative: str) -> dict[str, Any]:
        try:
            found = json.loads((self.root / SENT / relative).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _note(self, relative: str, version: str) -> None:
        """Remember that the copy of a file is this version of the URL's."""
        text = json.dumps({"version": version, "copy": _size_and_time(self.root / relative)})
        with replacing(self.root / SENT / relative) as temporary:
            temporary.write_text(text)

    def _drop(self, relative: str) -> None:
        for path in (self.root / relative, self.root / SENT / relative):
            path.unlink(missing_ok=True)

    # ---- the network

    def _do(self, call: Callable[[], T]) -> T:
        """Do something at the URL; a network that is lost in mid-work is awaited for a while.

        InputError for what the user has to mend, TrainingError for the rest. Missing and existing files are the caller's.
        """
        until = time.monotonic() + (PATIENCE_SECONDS if self._reached and is_patient.get() else 0.0)
        wait = 0.5
        while True:
            try:
                found = call()
            except (FileNotFoundError, FileExistsError, ThroughlineError):
                raise
            except (PermissionError, ValueError, TypeError, NotImplementedError, ImportError) as error:
                raise InputError(f"{self.place} cannot be used: {_reason(error)}") from error
            except Exception as error:  # of whatever library: none of them has one class for all that a network does
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # of the copy's disk
                    raise
                if not self._reached:
                    raise InputError(f"{self.place} cannot be reached: {_reason(error)}") from error
                if time.monotonic() + wait > until:
                    raise TrainingError(
                        f"{self.place} was lost ({_reason(error)}); what was not sent is in {self.root}, "
                        "and --resume goes on from there"
                    ) from error
            else:
                self._reached = True
                return found
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


class UrlSlot(Slot):
    """The same at a URL; nothing of it is in the copy."""

    seconds = LOOKED_SECONDS

    def __init__(self, mirror: Mirror, relative: str) -> None:
        super().__init__(mirror.root / relative)
        self._mirror, self._relative = mirror, relative

    def read(self) -> str:
        """What it says now."""
        try:
            return self._mirror._do(self._read).decode()
        except FileNotFoundError:
            return ""

    def write(self, text: str) -> None:
        """Replace it."""
        self._mirror._replace(self._relative, lambda path: self._mirror._fs.pipe_file(path, text.encode()))

    def create(self, text: str) -> bool:
        """Make it; False if another was there first. Stores that cannot tell just write: `settle` and read again."""
        mirror, path = self._mirror, self._mirror._path(self._relative)
        try:
            if not mirror._puts_whole:
                mirror._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            mirror._do(lambda: mirror._fs.pipe_file(path, text.encode(), mode="create"))
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise InputError(f"{mirror.place} cannot be used: {_reason(error)}") from error
        return True

    def settle(self) -> None:
        """Wait until whoever wrote at the same moment has written."""
        time.sleep(SETTLING_SECONDS)

    def remove(self) -> None:
        """Take it away."""
        self._mirror._remove(self._relative, recursive=False)

    def _read(self) -> bytes:
        self._mirror._fs.invalidate_cache()
        return self._mirror._fs.cat_file(self._mirror._path(self._relative))


def _open_filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and the path on it."""
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = f"pip install 'throughline[{extra}]'" if extra else _reason(error)
        raise InputError(f"{protocol}:// needs a library that is missing: {advice}") from error
    except ValueError as error:
        raise InputError(
            f"{url} cannot be opened ({_reason(error)}); expected a path, or a URL such as s3://bucket/run or gs://bucket/run"
        ) from error


def _version(info: dict[str, Any]) -> str:
    """Which version of a file this is, by whatever its store tells of it."""
    told = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    return f"{info.get('size')} {told.strip(chr(34))}"


def _size_and_time(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _files_of(folder: Path) -> list[str]:
    """Names of the files right in a folder that are not half written."""
    return [path.name for path in folder.glob("[!.]*") if path.is_file()]


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
