"""What of torch and transformers a process needs whose models each run on one device, and nothing of the rest.

transformers imports, for any model, all that some model or some way of running one may need. In a process of ours
(a command, a server's worker, a model process, a worker of Ray that trains on one device) three things are done before that:

    1. its probes for accelerate, scipy and torch.distributed are asked while these are hidden, and keep their answer: a model on
       one device is run as where they are not installed
    2. torch's compiler, `torch._dynamo`, is loaded with the first thing that is asked of it, which is nothing until a model is
       compiled; marks that functions are given for it are kept until then
    3. what each of its 3,000 files of models exports is read once, not twice

None of them changes what a forward pass computes. A plug-in that such a process loads finds torch's compiler and accelerate as
ever, but is told by transformers that accelerate and torch.distributed are missing. Where another version of either library has
none of it, nothing is done.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
NEEDED_OF_COMPILER = (
    "torch._dynamo._trace_wrapped_higher_order_op"  # by transformers' masks; imports nothing else of it
)
wanted = False  # set by what starts such a process
UNUSED = {"accelerate": "is_accelerate_available", "scipy": "is_scipy_available"}  # and transformers' probes for them


def leave_out_unused() -> None:
    """Do all three if it is wanted, unless transformers' models were imported before: then it is too late."""
    if not wanted or "transformers.modeling_utils" in sys.modules:
        return
    import torch

    if COMPILER not in sys.modules:
        _defer_compiler(torch)
    probes: Any = importlib.import_module("transformers.utils.import_utils")
    for package, probe in UNUSED.items():
        if package not in sys.modules:
            with _hidden(package):
                _ask_anew(getattr(probes, probe, None))
    known = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        _ask_anew(getattr(probes, "is_torch_distributed_available", None))
    finally:
        torch.distributed.is_available = known
    _read_exports_once(probes)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Python's own way of saying that a package cannot be imported."""
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]


def _ask_anew(probe: Any) -> None:
    """Ask a probe that keeps its answer; one that keeps none is left alone."""
    if hasattr(probe, "cache_clear"):
        probe.cache_clear()
        probe()


def _read_exports_once(probes: Any) -> None:
    """Import `transformers.models` with what importing `transformers` found in its folder: the same names without `models.`."""
    transformers = sys.modules["transformers"]
    define = getattr(probes, "define_import_structure", None)
    if define is None or transformers.__file__ is None or "transformers.models" in sys.modules:
        return
    folder = Path(transformers.__file__).parent / "models"
    known = define(folder, prefix="models")  # kept by its cache

    def define_known(path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != folder / "__init__.py":
            return define(path, prefix)
        return {
            needed: {name[7:]: exported for name, exported in modules.items() if name.startswith("models.")}
            for needed, modules in known.items()
        }

    probes.define_import_structure = define_known
    try:
        importlib.import_module("transformers.models")
    finally:
        probes.define_import_structure = define


# ---- the compiler


class _LatePackage(ModuleType):
    """`torch._dynamo` before it is loaded. Whatever is asked of it loads it, a module of its own too, but for `_MARKS`."""

    def __getattr__(self, name: str) -> Any:
        if name in _MARKS and not _compiler.began:
            return _MARKS[name]
        if name.startswith("__") and name != "__path__":  # what Python asks of every module
            raise AttributeError(name)
        _compiler.load(self)
        if name not in self.__dict__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self.__dict__[name]


class _Compiler:
    """Whether the compiler is loaded, and the functions it has to be told of when it is."""

    def __init__(self) -> None:
        self.began, self._lock, self._allowed = False, RLock(), list[Callable[..., Any]]()

    def load(self, package: ModuleType) -> None:
        """Run the package's own code; other threads wait for it."""
        with self._lock:
            if self.began:
                return
            spec = package.__spec__
            assert spec is not None and spec.loader is not None and spec.submodule_search_locations is not None
            self.began, package.__path__ = True, list(spec.submodule_search_locations)
            try:
                spec.loader.exec_module(package)
            except BaseException:
                self.began = False
                del package.__path__
                raise
            for function in self._allowed:
                package.allow_in_graph(function)

    def allow_in_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Kept for when there are graphs."""
        self._allowed.append(function)
        return function

    def assume_constant_result(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The mark that the compiler looks for."""
        function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
        return function

    def disable(
        self, function: Any = None, recursive: bool = True, *, reason: Any = None, wrapping: bool = True
    ) -> Any:
        """The function itself until there is a compiler; from then on as the compiler has it."""
        if function is None:
            return lambda function: self.disable(function, recursive, reason=reason, wrapping=wrapping)
        disabled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if not self.began:
                return function(*args, **options)
            if not disabled:
                dynamo: Any = sys.modules[COMPILER]
                disabled.append(dynamo.disable(function, recursive, reason=reason, wrapping=wrapping))
            return disabled[0](*args, **options)

        return call


_compiler = _Compiler()
_MARKS: dict[str, Callable[..., Any]] = {
    "allow_in_graph": _compiler.allow_in_graph,
    "assume_constant_result": _compiler.assume_constant_result,
    "disable": _compiler.disable,
}


def _defer_compiler(torch: Any) -> None:
    spec = find_spec(COMPILER)
    if spec is None:
        return
    package = module_from_spec(spec)
    package.__class__ = _LatePackage
    sys.modules[COMPILER] = torch._dynamo = package
    with suppress(ImportError):  # a version that has no such module needs none
        importlib.import_module(NEEDED_OF_COMPILER)
    if not _compiler.began:
        del package.__path__  # so that a module of the package loads the package first, as it always does
