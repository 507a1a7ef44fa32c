"""`throughline transfer` as a process of its own: killed and resumed, and with a metric that is somebody else's."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml
from kill_cluster import ENVIRONMENT

import commands
from throughline import api
from throughline.run_dir import RunDir
from trained import TWO_MODELS, change_study

METRICS = ["matching", "reconstruction", "similarity"]
MINE = '''
"""How much more often the target's features fire than the source's."""

import numpy as np

from throughline.records import TransferInfo, TransferResult


class Mine:
    name = "firing"
    across_models = True
    both_ways = False

    def compute(self, source, target, *, seed, min_count):
        on = [np.array([matrix.nnz / side.codes.num_tokens for matrix in side.codes.layers.values()]) for side in (source, target)]
        value = on[1][None] / on[0][:, None]
        info = TransferInfo(
            metric=self.name, source=source.model, target=target.model,
            source_layers=list(source.dictionaries), target_layers=list(target.dictionaries),
            quantity="L0 of the target over that of the source", null=None, ceiling=None,
            num_tokens=source.codes.num_tokens, num_documents=len(source.codes.documents), coverage=1.0, seed=seed,
        )
        return [TransferResult(info, {"value": value, "low": value, "high": value, "mine": value.astype(np.float32)})]


number = 5


class Nameless:
    def compute(self, source, target, *, seed, min_count):
        return []
'''


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> Path:
    """A run whose study wants METRICS, trained and evaluated, not to be changed."""
    run = shutil.copytree(trained(TWO_MODELS, "evaluate"), tmp_path_factory.mktemp("evaluated") / "run")
    change_study(run, transfer={"metrics": METRICS})
    return run


@pytest.fixture
def run(evaluated, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return shutil.copytree(evaluated, tmp_path / "run")


def command(run: Path, *arguments: str) -> list[str]:
    return ["transfer", str(run), "--device", "cpu", *arguments]


def transfer(run: Path, *arguments: str, modules: Path | None = None) -> CompletedProcess[str]:
    """What the command says; it finds other modules in `modules`."""
    found = [os.environ.get("PYTHONPATH", ""), str(modules or "")]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    return commands.run(*command(run, *arguments), env=environment, timeout=120)


def transfers(run: Path) -> dict[str, bytes]:
    """All files, but for those that a killed process had only begun: they have other names, and nobody reads them."""
    files = [path for path in (run / "transfer").rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# ---- killed and resumed


def kill_when(run: Path, pattern: str) -> dict[Path, int]:
    """Start a transfer and kill it once there is such a file; the transfer steps noted by then, and when that was."""
    process = commands.start(*command(run, "--quiet"), env=os.environ | ENVIRONMENT, stdout=None, stderr=None)
    while not list(run.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return {path: path.stat().st_mtime_ns for path in run.glob("manifest/transfer,*.json")}


def test_a_transfer_that_was_killed_goes_on_to_the_same_bytes(evaluated, run, tmp_path):
    """Killed twice: when the first arrays are there and nothing says so yet, and when one metric is noted as done."""
    whole = shutil.copytree(evaluated, tmp_path / "whole")
    assert len(api.transfer(whole, device="cpu")) == 12  # three metrics, four pairs of models
    expected = transfers(whole)
    assert len(expected) == 2 * 12  # arrays, and what they mean
    kill_when(run, "transfer/matching/*.safetensors")
    before = kill_when(run, "manifest/transfer,matching,zoo,gpt2,zoo,gpt2.json")
    assert 4 <= len(before) < 12
    again = transfer(run)
    assert (again.returncode, again.stderr.count("Traceback")) == (0, 0), again.stderr
    assert "zoo/pythia" in again.stdout
    assert transfers(run) == expected
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()), "what was noted as done is not done again"
    assert RunDir.open(run).manifest().keys() == RunDir.open(whole).manifest().keys()


# ---- a metric of one's own


@pytest.fixture
def modules(tmp_path) -> Path:
    """A folder with a package outside throughline, and with modules that cannot be imported."""
    folder = tmp_path / "elsewhere"
    (folder / "mypkg").mkdir(parents=True)
    (folder / "mypkg" / "__init__.py").write_text(MINE)
    (folder / "unfinished.py").write_text("class Mine(\n")
    (folder / "failing.py").write_text("raise RuntimeError('no device\\nof this kind')\n")
    return folder


def test_a_metric_of_ones_own_is_one_file(run, modules):
    done = transfer(run, "--metric", "mypkg:Mine", "--json", modules=modules)
    assert (done.returncode, done.stderr) == (0, "")
    shown = {(r["source"], r["target"]): r for r in json.loads(done.stdout)}
    names = [model["path"] for model in TWO_MODELS["models"]]
    assert set(shown) == {(a, b) for a in names for b in names}
    for (source, target), result in shown.items():
        read = RunDir.open(run).transfer("firing", source, target)
        assert (read.info.metric, read.info.source_layers, read.info.num_tokens) == (
            "firing",
            [0, 1],
            result["num_tokens"],
        )
        assert read.arrays["mine"].dtype == np.float32
        np.testing.assert_array_equal(read.arrays["value"], result["arrays"]["value"])
        np.testing.assert_array_equal(read.arrays["mine"], np.array(result["arrays"]["mine"], np.float32))
        assert read.arrays["value"] == pytest.approx(1, abs=0.2)  # k features on every token


def test_a_study_may_name_it(run, modules, monkeypatch, capsys):
    from throughline.cli import main

    monkeypatch.syspath_prepend(modules)
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["transfer"]["metrics"] = ["mypkg:Mine"]
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(SystemExit) as ended:
        main(["transfer", str(run), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    assert "firing" in out
    assert {info.metric for info in RunDir.open(run).transfers()} == {"firing"}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (
            "mypkg:Yours",
            "metric 'mypkg:Yours' cannot be loaded from mypkg:Yours: module 'mypkg' has no attribute 'Yours'",
        ),
        ("mypkg", "metric 'mypkg' is unknown; expected one of reconstruction, matching, flow, similarity"),
        ("mypkgs:Mine", "metric 'mypkgs:Mine' cannot be loaded from mypkgs:Mine: No module named 'mypkgs'"),
        ("mypkg:", "module 'mypkg' has no attribute ''"),
        (":Mine", "metric ':Mine' cannot be loaded from :Mine: ValueError: Empty module name"),
        (".mypkg:Mine", "metric '.mypkg:Mine' cannot be loaded from .mypkg:Mine: TypeError: "),
        ("mypkg:number", "mypkg:number is no metric: it has no name, across_models, both_ways, compute"),
        ("mypkg:Nameless", "mypkg:Nameless is no metric: it has no name, across_models, both_ways"),
        ("unfinished:Mine", "metric 'unfinished:Mine' cannot be loaded from unfinished:Mine: SyntaxError: "),
        ("failing:Mine", "RuntimeError: no device of this kind"),
    ],
)
def test_what_is_no_metric_is_one_line(run, modules, monkeypatch, capsys, metric, expected):
    from throughline.cli import main

    monkeypatch.syspath_prepend(modules)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as ended:
        main(["transfer", str(run), "--metric", metric])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("throughline: ")
    assert err.count("\n") == 1
    assert expected in err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert not (run / "transfer").exists()


def test_a_process_refuses_it_in_one_line_too(run, modules):
    done = transfer(run, "--metric", "mypkg:number", modules=modules)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "throughline: mypkg:number is no metric: it has no name, across_models, both_ways, compute\n"
