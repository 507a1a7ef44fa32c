"""Arrays are checked against their shape annotations while tests run, by jaxtyping with beartype.

Importing this module installs an import hook for those of our modules that import jaxtyping: every function, dataclass and named
tuple in them that has an annotation with a shape is decorated by `jaxtyped`. The hook is not jaxtyping's own, which

- also wraps what has no shape: that costs time at every call, numba cannot compile a function that is wrapped, and asking whether
  a value keeps to a protocol computes its properties;
- leaves named tuples out;
- reads torch and whatever else our modules import from another cache, so every process that may not write one compiles all of it.

Annotations without a shape are left to pyright. `conftest.py` imports this module before anything of ours.
"""

import ast
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "throughline"
NAME = "check_shapes_of"  # what `check` is called in the modules


def annotated_modules() -> list[str]:
    """Names of our modules that import jaxtyping."""
    spec = find_spec(PACKAGE)
    assert spec and spec.origin
    root = Path(spec.origin).parent
    files = [path for path in sorted(root.rglob("*.py")) if "from jaxtyping import" in path.read_text(encoding="utf-8")]
    return [".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)) for path in files]


def has_shape(hint: Any) -> bool:
    """Whether an annotation is an array's with a shape, or has one inside."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(has_shape(part) for part in get_args(hint))


def check(what: Any) -> Any:
    """A function or class as it is, but that shapes in its annotations are checked: in each call, of each new instance."""
    hints = what.__annotations__.values()
    in_strings = [hint for hint in hints if isinstance(hint, str) and re.search(r"(Float|Int|Bool)\d*\[", hint)]
    assert not in_strings, f"{what.__module__}.{what.__qualname__}: a shape in a string is not checked: {in_strings}"
    if not any(has_shape(hint) for hint in hints):
        return what
    if not isinstance(what, type):
        return jaxtyped(what, typechecker=_check_shapes)
    if is_dataclass(what):
        return jaxtyped(what, typechecker=_check_shapes)
    if hasattr(what, "_fields"):
        what.__new__ = staticmethod(jaxtyped(what.__new__, typechecker=_check_shapes))
    return what


def _check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with beartype's checks of those of its annotations that have a shape."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    return beartype(function)


class _Decorating(ast.NodeTransformer):
    """Puts `check` below a function's other decorators, which get what it makes, and above a class's, which make it a dataclass."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_name_of_check(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, _name_of_check(node))
        return self.generic_visit(node)


def _name_of_check(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.Name(NAME, ast.Load()), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew each time: Python's own cache holds the module as it is."""
        tree = ast.parse(self.get_data(self.path), self.path)
        return compile(ast.fix_missing_locations(_Decorating().visit(tree)), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[NAME] = check
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, modules: list[str]) -> None:
        self._modules = frozenset(modules)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.origin:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


_modules = annotated_modules()
_late = sorted({*_modules} & {*sys.modules})
assert not _late, f"imported before their shapes could be checked: {', '.join(_late)}"
sys.meta_path.insert(0, _Finder(_modules))
