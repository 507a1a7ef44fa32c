"""Compiled functions are kept by content: found from every checkout, never used once a source has changed, and never in the way."""

import ast
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from numba.core.dispatcher import Dispatcher

from throughline import kernel_cache

SOURCE = """
from throughline.kernel_cache import njit


@njit(nogil=True)
def add(a, b):
    return a + b
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of kept functions, instead of the user's."""
    monkeypatch.setattr(kernel_cache.SETTINGS, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel_cache.kernels_folder.cache_clear()
    yield tmp_path / "cache" / "throughline" / "kernels"
    kernel_cache.kernels_folder.cache_clear()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Write and import `small.py` in a folder of its own, as a new process of another checkout would."""

    def load(name: str, source: str = SOURCE) -> ModuleType:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "small.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / name)
        monkeypatch.delitem(sys.modules, "small", raising=False)
        kernel_cache.kernels_folder.cache_clear()
        return importlib.import_module("small")

    return load


def was_found(function: Dispatcher) -> bool:
    """True if every signature that was called came from disk."""
    return bool(function.stats.cache_hits) and not function.stats.cache_misses


def test_another_checkout_finds_what_the_first_compiled(root, checkout):
    first = checkout("first").add
    assert first(1, 2) == 3 and not was_found(first)
    second = checkout("second").add
    assert second(1, 2) == 3 and was_found(second)
    assert not list(root.parents[2].rglob("__pycache__/*.nb?"))


def test_each_signature_has_its_file(root, checkout):
    """So that two processes that compile at once cannot take each other's name."""
    add = checkout("first").add
    assert (add(1, 2), add(1.5, 2)) == (3, 3.5)
    assert len(list(root.rglob("*.nbc"))) == 2
    again = checkout("second").add
    assert (again(1.5, 2), again(1, 2)) == (3.5, 3) and was_found(again)


def test_a_changed_source_is_compiled(root, checkout):
    assert checkout("first").add(1, 2) == 3
    changed = checkout("first", SOURCE.replace("a + b", "a - b")).add
    assert changed(1, 2) == -1 and not was_found(changed)
    assert len(list(root.iterdir())) == 2


def test_a_changed_file_that_is_inlined_compiles_all(root, checkout, tmp_path, monkeypatch):
    inlined = tmp_path / "lanes.py"
    monkeypatch.setattr(kernel_cache, "INLINED", (str(inlined),))
    for text, known in (("one", False), ("one", True), ("two", False)):
        inlined.write_text(text)
        add = checkout("first").add
        assert add(1, 2) == 3 and was_found(add) == known


@pytest.mark.parametrize("setting", ["NUMBA_OPT", "NUMBA_BOUNDSCHECK"])
def test_settings_of_numba_and_the_processor_are_told_apart(monkeypatch, setting):
    before = kernel_cache.digest(__file__)
    monkeypatch.setenv(setting, "1")
    other = kernel_cache.digest(__file__)
    monkeypatch.setattr(kernel_cache.llvm, "get_host_cpu_name", lambda: "another")
    assert len({before, other, kernel_cache.digest(__file__)}) == 3


def test_a_file_cut_short_is_compiled_again(root, checkout):
    checkout("first").add(1, 2)
    (file,) = root.rglob("*.nbc")
    for size in (0, file.stat().st_size // 2):
        os.truncate(file, size)
        for is_whole in (False, True):
            add = checkout("first").add
            assert add(1, 2) == 3 and was_found(add) == is_whole


def test_a_folder_that_is_deleted_or_a_full_disk_costs_compiling_alone(root, checkout, monkeypatch):
    add = checkout("first").add
    for folder in root.iterdir():
        folder.rmdir()
    assert add(1, 2) == 3

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache._Files, "_save_data", full)
    assert add(1.5, 2) == 3.5


def test_where_no_folder_can_be_made_numba_keeps_them_its_own_way(root, checkout, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    add = checkout("first").add
    assert add(1, 2) == 3
    assert list((tmp_path / "first" / "__pycache__").glob("small.add-*.nbc"))
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])  # as if no folder at all could be written
    assert checkout("second").add(1, 2) == 3


def test_a_folder_that_others_may_write_is_not_used(root, checkout, tmp_path):
    checkout("first")
    (folder,) = root.iterdir()
    folder.chmod(0o777)
    assert checkout("first").add(1, 2) == 3
    assert list(folder.iterdir()) == []


def test_the_user_s_own_folder_goes_first(root, checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache.SETTINGS, "CACHE_DIR", str(tmp_path / "own"))
    assert checkout("first").add(1, 2) == 3
    assert not root.exists() and list((tmp_path / "own").rglob("small.add-*.nbc"))


def test_those_used_longest_ago_are_deleted(root, checkout):
    names = []
    for number in range(kernel_cache.MOST_FOLDERS + 2):
        checkout("first", f"{SOURCE}\n# {number}\n")
        names.append(kernel_cache.kernels_folder(sys.modules["small"].__file__))
        os.utime(names[-1], (number, number))
    (root / "other-0").mkdir()
    checkout("first", f"{SOURCE}\n# 2\n")  # is used again
    checkout("first", f"{SOURCE}\n# the last\n")
    left = {folder for folder in names if folder.is_dir()}
    assert left == {names[2], *names[-2:]} and (root / "other-0").is_dir()


def compiled_modules() -> list[str]:
    """Modules of the package with compiled functions."""
    files = sorted(kernel_cache.PACKAGE.rglob("*.py"))
    names = [".".join(("throughline", *f.relative_to(kernel_cache.PACKAGE).with_suffix("").parts)) for f in files]
    return [n for n, f in zip(names, files, strict=True) if "kernel_cache import njit" in f.read_text()]


def test_there_are_compiled_modules():
    assert {"throughline.training.kernels", "throughline.training.lanes"} < set(compiled_modules())


def test_nobody_uses_numba_s_own():
    for file in kernel_cache.PACKAGE.rglob("*.py"):
        assert "from numba import njit" not in file.read_text() and "numba.jit" not in file.read_text(), file


@pytest.mark.parametrize("name", compiled_modules())
def test_what_is_inlined_from_other_files_counts(name):
    """Names that a compiled function has from elsewhere in the package are those of files that are in every digest."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("throughline")
        for alias in node.names
    }
    functions = [f for f in vars(module).values() if isinstance(f, Dispatcher) and f.py_func.__module__ == name]
    assert functions
    used = {n for f in functions for n in f.py_func.__code__.co_names} & set(imported)
    files = {imported[n].removeprefix("throughline.").replace(".", "/") + ".py" for n in used}
    assert files <= set(kernel_cache.INLINED)
