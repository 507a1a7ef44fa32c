"""Imports go downward only, and what must open without torch opens without torch."""

import ast
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from synthetic_run import MODELS, build_run
from trained import TWO_MODELS

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "throughline"

# From the bottom up; docs/architecture.md has the same table in words. A part may import its own layer's parts only where
# ALLOWED_BESIDE says so.
LAYERS = (
    {
        "errors",
        "registry",
        "study",
        "study_fields",
        "records",
        "files",
        "storage",
        "mirror",
        "claims",
        "run_dir",
        "progress",
        "zoo",
        "throughlines",
        "stats",
        "lean_imports",
        "circuit_tracer",
        "kernel_cache",
        "model_files",
        "gguf_models",
    },
    {"text", "tokens", "models", "dictionaries", "sinks"},
    {"harvesting", "codes", "splicing", "ablation", "pools"},
    {"training", "quality", "features", "labelers", "transfer", "tracing", "comparing", "analyzing", "zoo.training"},
    {
        "executors",
        "session",
        "asking",
        "journals",
        "jobs",
        "planning",
        "pipeline",
        "model_card",
        "interop",
        "activations",
        "early_checks",
        "api",
    },
    {"views", "figures", "report", "serving", "cli", "zoo.__main__"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
BESIDE_ALLOWED = {0, 2, 4, 5}  # the nouns do not know one another, nor do the verbs
# The report is the last stage of a run, and a server what a run is looked at with; api imports each inside the function of its
# name. Neither needs torch, but for the one module that traces.
EXCEPTIONS = {("api", "report"), ("api", "serving")}
TORCH_FREE = {
    "early_checks",
    "errors",
    "gguf_models",
    "model_files",
    "registry",
    "study",
    "records",
    "storage",
    "mirror",
    "run_dir",
    "progress",
    "kernel_cache",
    "text",
    "comparing",
    "throughlines",
    "circuit_tracer",
    "analyzing",
    "figures",
    "views",
    "report",
    "serving",
}
HEAVY = {"torch", "transformers", "datasets", "ray"}


def modules() -> dict[str, Path]:
    """Dotted names below the package and their files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or "__init__"] = path
    return found


def imports_of(source: str) -> set[str]:
    """Every module that a source imports, at its top or inside a function; not what only a type checker sees."""
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
            if node.module == "throughline":
                found |= {f"throughline.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str:
    """The part of the package a module belongs to: its folder, but the zoo's workshop is apart from its data."""
    return module if module in LEVEL else module.split(".")[0]


def violations(module: str, source: str) -> list[str]:
    """What is wrong with a module's imports, by the table above."""
    part, wrong = part_of(module), []
    for imported in imports_of(source):
        if not imported.startswith("throughline."):
            continue
        other = part_of(imported.removeprefix("throughline."))
        if other == part or other not in LEVEL or (part, other) in EXCEPTIONS:
            continue
        beside = LEVEL[other] == LEVEL[part] and LEVEL[part] in BESIDE_ALLOWED
        if LEVEL[other] > LEVEL[part] or (LEVEL[other] == LEVEL[part] and not beside):
            wrong.append(f"{module} imports {imported}")
    return wrong


def test_every_part_has_a_layer():
    parts = {part_of(name) for name in modules()} - {"__init__", "__main__"}
    assert parts == set(LEVEL)


@pytest.mark.parametrize("module", [m for m in modules() if part_of(m) in LEVEL])
def test_imports_go_downward(module):
    assert violations(module, modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("records", "from throughline.models import LanguageModel"),
        ("text", "from throughline.tokens import pack"),
        ("quality", "def f():\n    from throughline import pipeline"),
        ("transfer.matching", "import throughline.tracing.reading"),
        ("models.opening", "from throughline.codes import Codes"),
    ],
)
def test_the_rule_can_be_broken(module, source):
    assert len(violations(module, source)) == 1


def test_only_the_ray_executor_imports_ray():
    importers = {
        name for name, path in modules().items() if any(part_of(i) == "ray" for i in imports_of(path.read_text()))
    }
    assert importers <= {"executors.ray", "executors.ray_worker"}


@pytest.mark.parametrize("part", sorted(TORCH_FREE))
def test_no_torch_at_the_top_of_what_opens_without_it(part):
    for name, path in modules().items():
        if part_of(name) == part:
            tops = ast.Module(
                [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)], []
            )
            heavy = {part_of(i) for i in imports_of(ast.unparse(tops))} & HEAVY
            assert not heavy, f"{name} imports {heavy}"


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `code`."""
    check = f"{code}\nimport sys\nsys.stderr.write(' '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stderr.split())


HELP = "from throughline.cli import main\ntry:\n    main({!r})\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize(
    "code",
    [
        "import throughline",
        "import throughline.api",
        "from throughline import RunDir, Study, load_study, load_run, train",
        "import throughline.figures, throughline.report",
        "import throughline.serving.server",
        HELP.format(["--help"]),
        HELP.format(["train", "--help"]),
        HELP.format(["--version"]),
    ],
)
def test_neither_torch_nor_transformers_is_loaded(code):
    assert loaded_by(code) == set()


def test_that_test_can_fail():
    assert loaded_by("import torch, transformers") == {"torch", "transformers"}


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[Path, set[str]]:
    """A run whose report a fresh interpreter has written, and which of the heavy packages that has loaded."""
    place = tmp_path_factory.mktemp("reported") / "run"
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from synthetic_run import MODELS, build_run\n"
        "from throughline.report import write_report\n"
        f"assert write_report(build_run(Path({str(place)!r}), MODELS[2:])).stat().st_size > 1000"
    )
    return place, loaded_by(code)


def test_the_report_is_written_without_torch(reported):
    assert reported[1] == set()


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["report", "--quiet"]])
def test_what_reads_a_finished_run_loads_neither_torch_nor_transformers(command, reported):
    assert loaded_by(HELP.format([command[0], str(reported[0]), *command[1:]])) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "RUN", ""],
        ["trace", "RUN", "a prompt", "--model", "nobody"],
        ["trace", "RUN", "a prompt", "--graph", "nowhere/graph.json"],
        ["trace", "RUN", "a prompt", "--device", "gpu"],
        ["compare", "RUN", ""],
        ["compare", "RUN", "a prompt", "--model", "nobody"],
        ["export", "RUN", "--to", "saelens", "--out", "nowhere", "--model", "nobody"],
        ["import", "RUN", "nowhere", "--layer", "0", "--model", "nobody"],
        ["train", "STUDY", "--set", "models=[./nope]"],
        ["train", "STUDY", "--set", "models=[zoo/nope]"],
        ["train", "STUDY", "--set", "models=[{path: zoo/gpt2, layers: [4]}]"],
        ["train", "STUDY", "--set", "data.path=nowhere.jsonl"],
        ["train", "STUDY", "--set", "trace.prompts=['']"],
        ["train", "STUDY", "--device", "gpu"],
        ["plan", "STUDY", "--set", "models=[zoo/nope]"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_wrong_input_that_needs_no_model_is_refused_before_torch_is_loaded(arguments, reported, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(TWO_MODELS))
    places = {"RUN": str(reported[0]), "STUDY": str(study)}
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "train" else []
    command = [*(places.get(argument, argument) for argument in arguments), *out]
    refused = f"from throughline.cli import main\ntry:\n    main({command!r})\nexcept SystemExit as end:\n    assert end.code == 2"
    assert loaded_by(refused) & HEAVY == set()
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


ASK = """
import os, signal, time, urllib.error
from threading import Thread
from urllib.request import urlopen

def ask():
    try:
        for path in ("", "api/overview", "api/features?model=small&layer=0", "api/status"):
            while not answers(path):
                time.sleep(0.05)
    finally:
        os.kill(os.getpid(), signal.SIGINT)

def answers(path):
    try:
        return urlopen(f"http://127.0.0.1:{port}/{path}").status == 200
    except urllib.error.HTTPError:
        raise
    except OSError:  # it does not listen yet
        return False

asking = Thread(target=ask)
asking.start()
"""


def test_a_server_loads_neither_before_a_prompt_is_traced(tmp_path):
    run = build_run(tmp_path / "run", MODELS[2:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = HELP.format(["serve", str(run.root), "--port", str(port), "--quiet"])
    assert loaded_by(f"port = {port}\n{ASK}\n{serve}\nasking.join()") == set()


NOT_FOR_A_TRACE = {
    *(f"throughline.{part}" for part in ("training", "labelers", "transfer", "planning", "executors", "quality")),
    *("datasets", "numba", "ray", "torch._dynamo.symbolic_convert", "matplotlib"),
}


@pytest.mark.parametrize(
    ("command", "wanted"), [(["trace", "What is 15 + 27?", "--no-verify"], False), (["transfer"], True)]
)
def test_a_trace_loads_nothing_of_other_stages(trained, command, wanted):
    """As a process: the other command shows that what is looked for would be found."""
    run = shutil.copytree(trained(TWO_MODELS, "label"), Path(trained(TWO_MODELS, "label")).parent / f"run-{command[0]}")
    name, *rest = command
    model = ["--model", "zoo/pythia"] if name == "trace" else []
    arguments = ["throughline", name, str(run), *rest, *model, "--quiet"]
    code = (
        f"import sys\nsys.argv = {arguments!r}\nfrom throughline.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"sys.stdout.write(' '.join({NOT_FOR_A_TRACE!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout.split()) is wanted, done.stdout


def test_help_loads_no_tables_and_no_plots():
    code = HELP.format(["--help"])
    check = f"{code}\nimport sys\nassert not {{'polars', 'numpy', 'matplotlib', 'pydantic'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], capture_output=True, timeout=60, check=True)


def test_the_public_names_are_there():
    import throughline

    assert dir(throughline) == sorted(dir(throughline))
    for name in throughline.__all__:
        assert getattr(throughline, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = throughline.nothing


def test_the_version_is_the_package_s():
    import tomllib

    import throughline

    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    assert throughline.__version__ == project["version"]
