"""`njit` for compiled functions that are kept on disk by what they were compiled from.

numba keeps compiled functions beside their source file, or under that file's path, and takes them for current as long as this one
file is unchanged. So a fresh checkout, a new environment and a package that cannot be written compile everything again, for about
a minute; and a function into which another file's code was inlined is not compiled again when that file changes. Here all lie in

    $XDG_CACHE_HOME/throughline/kernels/<source>-<digest>        (~/.cache by default)

where the digest is that of everything code depends on: its source file and those that are inlined, the versions of numba, llvmlite,
numpy and Python, numba's settings, and the processor with its features. A folder may be deleted at any time. Where
`NUMBA_CACHE_DIR` is set, or the folder cannot be written or is open to others, numba keeps compiled functions in its own way.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy
from numba.core import caching, config
from numba.core.dispatcher import Dispatcher

SETTINGS: Any = config  # pyright does not see what numba reads from the environment
PACKAGE = Path(__file__).parent
INLINED = ("training/lanes.py", "transfer/prefetching.py")  # into other files' functions; a test compares
MOST_FOLDERS = 4  # of one source, of some MB each; those beyond that were used longest ago and are deleted


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit`; what it compiles is kept."""

    def compile_when_called(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**options)(function)
        if isinstance(compiled, Dispatcher):  # a plain function if NUMBA_DISABLE_JIT is set
            _keep(compiled)
        return compiled

    return compile_when_called


def _keep(compiled: Any) -> None:
    if kernels_folder(compiled.py_func.__code__.co_filename) is not None:
        compiled._cache = _KernelCache(compiled.py_func)
        return
    with suppress(RuntimeError):  # numba found no folder that can be written: each process compiles for itself
        compiled.enable_caching()


@cache
def kernels_folder(source: str) -> Path | None:
    """Where this process keeps a file's compiled functions; None if it leaves that to numba."""
    if SETTINGS.CACHE_DIR or getattr(SETTINGS, "CACHE_LOCATOR_CLASSES", ""):
        return None
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "throughline" / "kernels"
        folder = root / f"{Path(source).stem}-{digest(source)}"
        is_new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_ours_alone(folder):
            return None
        os.utime(folder)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    if is_new:
        _delete_oldest(root.glob(f"{Path(source).stem}-*"))
    return folder


def digest(source: str) -> str:
    """Of everything that a file's compiled functions depend on."""
    parts = [path.read_bytes() for path in (Path(source), *(PACKAGE / name for name in INLINED))]
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    features = sorted(name for name, has in llvm.get_host_cpu_features().items() if has)
    versions = (numba.__version__, llvmlite.__version__, numpy.__version__, sys.version)
    parts.append(repr((versions, settings, llvm.get_host_cpu_name(), features)).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _is_ours_alone(folder: Path) -> bool:
    """True if this user can write here and nobody else can: compiled code is run as it is."""
    status = folder.stat()
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _delete_oldest(folders: Iterable[Path]) -> None:
    """Leave the folders that were used last. A process that still has one of the others compiles what it lacks."""
    with suppress(OSError):
        by_use = sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in by_use[MOST_FOLDERS:]:
            shutil.rmtree(folder, ignore_errors=True)


class _Locator(caching._CacheLocator):
    """Where a function of this package is kept."""

    def __init__(self, function: Callable[..., Any], source: str) -> None:
        self._line, self._py_file = function.__code__.co_firstlineno, source

    @classmethod
    def from_function(cls, function: Any, source: str) -> "_Locator":
        return cls(function, source)

    def get_cache_path(self) -> str:
        return str(kernels_folder(self._py_file))

    def get_source_stamp(self) -> str:
        return ""  # the folder's name says it

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]


class _Files(caching.IndexDataCacheFile):
    """A file for each signature, named by its digest.

    numba numbers the files of a function and writes the numbers into an index: two processes that compile for two signatures
    at once may give both the same number, and one then finds the other's code.
    """

    def load(self, key: Any) -> Any:
        try:
            saved_key, data = self._load_data(self._name(key))
        except Exception:  # not there, or cut short when the machine stopped; unpickling that may raise anything
            return None
        return data if saved_key == key else None

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self._name(key), (key, data))

    def flush(self) -> None:
        for path in Path(self._cache_path).glob(self._index_name.removesuffix(".nbi") + ".*.nbc"):
            path.unlink(missing_ok=True)

    def _name(self, key: Any) -> str:
        found = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return self._index_name.removesuffix(".nbi") + f".{found}.nbc"


class _KernelCache(caching.FunctionCache):
    _impl_class = _Implementation

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        name = self._impl.filename_base
        self._cache_file = _Files(cache_path=self._cache_path, filename_base=name, source_stamp="")

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        """A disk that is full, or a folder that was deleted, costs compiling again and nothing else."""
        with suppress(OSError):
            yield
