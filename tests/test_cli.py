"""The command line: what each command prints, what it says of wrong input, and what it leaves behind.

One tiny run serves all tests.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from throughline import api
from throughline.cli import main, traced
from throughline.cli.render import stage_seconds
from throughline.errors import GateError, InputError
from throughline.records import FaithfulnessPoint, JobState
from throughline.run_dir import RunDir
from throughline.session import Session
from throughline.study import load_study, parse_study
from throughline.tokens import encode_prompt
from throughline.tracing import read_prompts
from throughline.tracing.answer import find_answer, spell
from throughline.tracing.texts import find_subject
from trained import TWO_MODELS

ROOT = Path(__file__).resolve().parents[1]
STUDY = TWO_MODELS
PROMPT = STUDY["trace"]["prompts"][0]
COMMANDS = (
    "demo init run plan train status evaluate features label transfer report serve trace compare import export".split()  # noqa: SIM905
)
FUNCTIONS = {"import": "import_sae", "export": "export_sae"}  # import is a word of Python's own
LONG_PROMPT = "What is " + "1 " * 90


@pytest.fixture(scope="session")
def tiny(trained) -> Path:
    """A whole run of STUDY, not to be changed; its study file lies beside it."""
    return trained(STUDY, "run")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return shutil.copytree(tiny, tmp_path / "run")


@pytest.fixture
def say(capsys):
    """Run a command here; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err  # type: ignore[return-value]

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a command that refused its input."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("throughline: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert len(err) < 400
    return err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written_study(folder: Path, **changes) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    return path


# ---- plan


def test_a_plan_writes_nothing_and_tells_what_is_done(say, tiny, tmp_path):
    study, before = tiny.parent / "study.yaml", snapshot(tiny.parent)
    code, out, _ = say("plan", study, "--devices", "1x24GiB", "--out", tiny, "--json")
    made = json.loads(out)
    assert code == 0 and made["jobs"] == [] and [m["done"] for m in made["models"]] == [[0, 1], [0, 1]]
    changed = ["--set", "training.seed=1", "--out", tiny]
    code, out, _ = say("plan", study, "--devices", "1x24GiB,1x16GiB", *changed)
    assert code == 0 and "layers 0-1 were made from other settings" in out and "0:00:0" in out
    assert "training ends after 0:00:0" in out and "lower bound 0:00:0" in out and "0.0 GiB" not in out
    assert "evaluation, features, labels, transfer, traces and the report are not counted" in out
    assert snapshot(tiny.parent) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--devices", "3x48"],
            "--devices: expected COUNTxMEMORYGiB[@CARD], several with commas, such as 3x48GiB,1x24GiB",
        ),
        (["--devices", "1x0.5GiB"], "GiB at most; a device of 1 GiB would do"),
        (["--devices", "1x24GiB", "--out", "nowhere"], "nowhere does not exist"),
        (["--devices", "1x24GiB", "--set", "data.path=none.jsonl"], "data.path none.jsonl does not exist"),
        (["--devices", "1x24GiB", "--set", "models=[{path: zoo/gpt2, layers: [7]}]"], "layer 7 asked of zoo/gpt2"),
    ],
)
def test_plans_that_are_refused(say, tiny, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(say("plan", tiny.parent / "study.yaml", *arguments))
    assert list(tmp_path.iterdir()) == []


# ---- wrong input of train and run: one line, exit code 2, nothing written


@pytest.mark.parametrize("command", ["train", "run"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainng": {}}, "unknown key trainng; did you mean training?"),
        ({"dictionary": {"kk": 8}}, "unknown key dictionary.kk; did you mean k?"),
        ({"training": {"tokens": "many"}}, "training.tokens: input should be a valid integer, found 'many'"),
        ({"models": [{"path": "zoo/pythia", "layers": [0, 6]}]}, "layer 6 asked of zoo/pythia, which has layers 0-5"),
        (
            {"models": [{"path": "zoo/pythia", "layers": []}]},
            "models.0.layers: input should be 'all' or list should have",
        ),
        ({"dictionary": {"k": 3000}}, "layer 0, d_model 96: k 3000 is more than the 768 features; lower k, or raise"),
        (
            {"dictionary": {"per_layer": {7: {"k": 3}}}},
            "dictionary: per_layer has layer 7, but there are layers 0-",
        ),
        (
            {"models": [{"path": "zoo/pythia", "dictionary": {"per_layer": {6: {"k": 3}}}}]},
            "dictionary of zoo/pythia: per_layer has layer 6, but there are layers 0-5",
        ),
        ({"dictionary": {"expansion": 0.001}}, "a dictionary has 1 to 16,777,216 features, found 0; change expansion"),
        ({"dictionary": {"expansion": 1e7}}, "a dictionary has 1 to 16,777,216 features, found 960,000,000"),
        ({"models": ["zoo/pythja"]}, "zoo model 'zoo/pythja' is unknown; did you mean 'zoo/pythia'?"),
        ({"models": ["weightless"]}, "weightless has config.json but no weights"),
        ({"models": ["./nowhere"]}, "model folder nowhere does not exist"),
        ({"models": ["someone/some-model"]}, "model someone/some-model cannot be opened"),
        ({"data": {"path": "none.jsonl"}}, "data.path none.jsonl does not exist"),
        ({"data": {"path": "empty.jsonl"}}, "empty.jsonl has no documents"),
        ({"data": {"path": "empty.txt"}}, "empty.txt has no documents"),
        ({"data": {"path": "empty.csv"}}, "empty.csv has no documents"),
        ({"data": {"path": "someone/some-data"}}, "hub dataset 'someone/some-data'"),
        ({"trace": {"prompts": [""]}}, "the prompt is empty"),
        ({"trace": {"prompts": [LONG_PROMPT]}}, "zoo/pythia sees 64 and needs at least one for the answer"),
    ],
)
def test_a_study_that_cannot_work_is_refused_before_anything_is_written(
    say, tmp_path, monkeypatch, command, changes, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weightless").mkdir()
    zoo = ROOT / "src" / "throughline" / "zoo" / "pythia"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo / name, tmp_path / "weightless")
    for name in ("empty.jsonl", "empty.txt", "empty.csv"):
        (tmp_path / name).touch()
    study = written_study(tmp_path, **changes)
    before = snapshot(tmp_path)
    code, out, err = say(command, study, "--out", tmp_path / "out")
    announced = "reading someone/some-data from the Hugging Face hub\n"  # what may take long is said first
    assert (announced in err) == ("some-data" in expected)
    assert expected in refused((code, out, err.removeprefix(announced)))
    assert not (tmp_path / "out").exists()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "training.tokens=lots"], "training.tokens: input should be a valid integer"),
        (["--set", "tokens"], "--set expects a.b=value, found 'tokens'"),
        (["--device", "gpu"], "device 'gpu' is unknown; expected cpu, cuda"),
        (["--device", "cuda:99"], "device cuda:99 is not there"),
    ],
)
def test_wrong_options_of_train(say, tmp_path, arguments, expected):
    study = written_study(tmp_path)
    assert expected in refused(say("train", study, "--out", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_there(say, tmp_path):
    assert "does not exist; `throughline init` writes one" in refused(say("train", tmp_path / "none.yaml"))


def test_an_existing_run_is_not_touched_without_resume(say, tiny):
    before = snapshot(tiny)
    for command in ("train", "run"):
        message = refused(say(command, tiny.parent / "study.yaml", "--out", tiny))
        assert "holds a run already; continue it with --resume, or give another with --out" in message
    assert snapshot(tiny) == before


def test_another_study_does_not_take_the_place_of_one(say, tiny, tmp_path):
    before = snapshot(tiny)
    other = written_study(tmp_path, name="other")
    for command in ("train", "run"):
        message = refused(say(command, other, "--out", tiny, "--resume"))
        assert "holds the run of study 'tiny' (zoo/pythia, zoo/gpt2)" in message
    assert "holds the run of study 'tiny'" in refused(say("demo", "--out", tiny))
    assert snapshot(tiny) == before


def test_the_demo_and_its_short_form_do_not_replace_each_other(say, tmp_path):
    demo = load_study(Path(api.__file__).parent / "presets" / "demo.yaml")
    RunDir.create(tmp_path / "run", demo)
    before = snapshot(tmp_path)
    message = refused(say("demo", "--short", "--out", tmp_path / "run"))
    assert "zoo/gemma), with other settings in models, training, evaluation; give another folder with --out" in message
    assert snapshot(tmp_path) == before
    assert api.place_of_demo(None, short=False) != api.place_of_demo(None, short=True)


def test_other_folders_and_files_are_never_written_into(say, tmp_path):
    study = written_study(tmp_path)
    assert "is not empty and not a run folder" in refused(say("train", study, "--out", tmp_path, "--resume"))
    assert "is a file; give a folder with --out" in refused(say("train", study, "--out", study))
    assert snapshot(tmp_path) == {"study.yaml": study.read_bytes()}


def test_a_real_process_behaves_alike(tmp_path):  # a fresh one: nothing heavy is imported
    study = written_study(tmp_path, trainng={})
    command = [sys.executable, "-m", "throughline", "train", str(study), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    refused((done.returncode, done.stdout, done.stderr))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="streams are closed by a shell")
@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        ("--version", ">&-", 1),
        ("--help", ">&-", 1),
        ("status {run}", ">&-", 1),
        ("status {run} --json", ">&-", 1),
        ("status nowhere", ">&-", 2),
        ("status nowhere", "2>&-", 2),
        ("--version", "<&-", 0),
        ("--version", "2>&-", 0),
    ],
)
def test_streams_that_are_closed(tiny, arguments, closed, code):
    command = f"{sys.executable} -m throughline {arguments.format(run=tiny)} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if code == 2 and closed == ">&-" else 0)


# ---- wrong input of commands on a run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trace", PROMPT], "this run has 2 models; say which with --model (zoo/pythia, zoo/gpt2)"),
        (["trace", PROMPT, "--model", "pythja"], "this run has no model 'pythja'; it has zoo/pythia, zoo/gpt2"),
        (["trace", "", "--model", "zoo/pythia"], "the prompt is empty"),
        (["trace", "  \n", "--model", "zoo/pythia"], "the prompt is empty"),
        (["trace", LONG_PROMPT, "--model", "zoo/pythia"], "zoo/pythia sees 64 and needs at least one for the answer"),
        (["trace", PROMPT, "--model", "zoo/gpt2", "--device", "tpu"], "device 'tpu' is unknown"),
        (["compare", "", "--model", "zoo/gpt2", "--model", "zoo/pythia"], "the prompt is empty"),
        (["compare", LONG_PROMPT], "needs at least one for the answer"),
        (["compare", PROMPT, "--model", "zoo/gpt2"], "compare needs two models or more, found zoo/gpt2"),
        (
            ["compare", PROMPT, "--model", "zoo/gpt2", "--model", "phi"],
            "this run has no model 'phi'; it has zoo/pythia, zoo/gpt2",
        ),
        (["transfer", "--metric", "machting"], "metric 'machting' is unknown; did you mean 'matching'?"),
        (["transfer", "--metric", "no.module:Metric"], "metric 'no.module:Metric' cannot be loaded"),
    ],
)
def test_wrong_arguments_change_nothing(say, tiny, arguments, expected):
    before = snapshot(tiny)
    command, *rest = arguments
    assert expected in refused(say(command, tiny, *rest))
    assert snapshot(tiny) == before


@pytest.mark.parametrize(
    "command", ["status", "evaluate", "features", "label", "transfer", "report", "serve", "trace", "compare"]
)
def test_a_folder_that_is_no_run(say, tmp_path, command):
    prompt = [PROMPT] if command in ("trace", "compare") else []
    assert "is not a run folder (it has no study.yaml and run.json)" in refused(say(command, tmp_path, *prompt))
    assert "does not exist" in refused(say(command, tmp_path / "none", *prompt))
    assert "the name of a run folder is empty" in refused(say(command, "", *prompt))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "report", "serve"])
@pytest.mark.parametrize(("name", "found"), [("study.yaml", ""), ("run.json", "{")])
def test_a_run_whose_study_or_description_is_damaged(say, copy, command, name, found):
    (copy / name).write_text(found)
    code, out, err = say(command, copy)
    assert (code, out) == (1, "") and "Traceback" not in err
    assert f"{name} is damaged" in err and "`throughline run STUDY --out" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "features", "label", "transfer", "trace", "compare"])
def test_a_run_without_dictionaries_names_what_makes_them(say, tmp_path, command):
    run = RunDir.create(tmp_path / "run", parse_study(STUDY))
    prompt = {"trace": [PROMPT, "--model", "zoo/gpt2"], "compare": [PROMPT]}.get(command, [])
    assert re.search(r"`throughline (train|features|transfer) ", refused(say(command, run.root, *prompt)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "seed99"], "preset 'seed99' is unknown; did you mean 'seed98'?"),
        (["no/such/folder.yaml"], "no/such/folder.yaml: No such file or directory"),
    ],
)
def test_wrong_arguments_of_init(say, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(say("init", *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["xyzzy"], "No such command 'xyzzy'; see throughline --help"),
        (["trase"], "No such command 'trase'. Did you mean 'trace', "),
        (["trace"], "Missing argument 'run'; see throughline trace --help"),
        (["trace", "a", "b", "--bad"], "No such option: --bad; see throughline trace --help"),
        (["status", "a", "b"], "unexpected extra argument"),
        (["train", "a", "--out"], "see throughline train --help"),
        (["--bad"], "No such option: --bad; see throughline --help"),
    ],
)
def test_wrong_usage_is_one_line_too(say, arguments, expected):
    assert expected in refused(say(*arguments))


# ---- what goes wrong later


def test_tables_of_other_settings_are_not_traced(say, copy):
    study = yaml.safe_load((copy / "study.yaml").read_text())
    study["dictionary"]["k"] = 4
    (copy / "study.yaml").write_text(yaml.safe_dump(study))
    message = refused(say("trace", copy, PROMPT, "--model", "zoo/gpt2"))
    assert "was made from other settings than its study has now" in message


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("models/zoo-gpt2/features.parquet", ["trace", PROMPT, "--model", "zoo/gpt2"]),
        ("models/zoo-gpt2/labels.parquet", ["trace", PROMPT, "--model", "zoo/gpt2"]),
        ("models/zoo-gpt2/layer_01/sae_weights.safetensors", ["trace", PROMPT, "--model", "zoo/gpt2"]),
        ("transfer/matching/zoo-gpt2__zoo-pythia.safetensors", ["compare", PROMPT]),
        ("manifest/train,zoo,gpt2,0.json", ["status"]),
        ("run.json", ["status"]),
    ],
)
def test_a_damaged_file_is_named_in_one_line_with_exit_code_1(say, copy, name, command):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-40])
    code, out, err = say(command[0], copy, *command[1:])
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert Path(name).name in err


def test_a_damaged_file_is_made_again_by_a_run_with_resume(say, copy, tiny):
    path = copy / "models/zoo-gpt2/labels.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:-40])
    code, _, err = say("run", tiny.parent / "study.yaml", "--out", copy, "--resume")
    assert code == 0, err
    assert "labels.parquet does not match its checksum; label/zoo/gpt2 is done again" in err
    assert path.read_bytes() == good


def test_the_gate_stops_with_the_figures(say, copy, tiny):
    strict = ["--resume", "--set", "gate.max_fvu=0.001"]
    code, out, err = say("run", tiny.parent / "study.yaml", "--out", copy, *strict)
    assert code == 1
    assert err.splitlines()[-1].startswith("throughline: quality gate failed: zoo/pythia layer 0 (FVU 0.")
    assert "--force" in err
    assert out.count("> 0.001") == 4  # the table says it of every layer
    for command in (
        ["features"],
        ["label"],
        ["transfer"],
        ["trace", PROMPT, "--model", "zoo/gpt2"],
        ["compare", PROMPT],
    ):
        code, out, err = say(command[0], copy, *command[1:])
        assert (code, out, err.count("\n")) == (1, "", 1), command
    code, out, _ = say("evaluate", copy)
    assert code == 1
    assert "FVU 0." in out
    with pytest.raises(GateError):
        api.features(copy)


def test_a_forced_run_says_so_everywhere(say, copy, tiny):
    strict = ["--resume", "--set", "gate.max_fvu=0.001", "--force"]
    code, out, err = say("run", tiny.parent / "study.yaml", "--out", copy, *strict)
    assert code == 0, err
    assert err.count("4 dictionaries failed the quality gate; every output says so") == 1
    assert "made with --force" in out
    assert "gate overridden" in say("status", copy)[1]
    assert all(trace.forced for trace in RunDir.open(copy).traces())
    assert json.loads(say("trace", copy, PROMPT, "--model", "zoo/gpt2", "--force", "--json")[1])["forced"]


def test_interruption_is_one_line(say, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", interrupted)
    code, out, err = say("train", written_study(tmp_path))
    assert (code, out, err) == (
        130,
        "",
        "throughline: stopped; train and run continue with --resume, demo with the same command\n",
    )


def test_a_full_disk_is_one_line(say, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "runs/tiny/manifest/train,a,0.json")

    monkeypatch.setattr(api, "train", full)
    code, out, err = say("train", written_study(tmp_path))
    assert (code, out, err) == (1, "", "throughline: runs/tiny/manifest/train,a,0.json: No space left on device\n")


# ---- what commands print


def test_the_whole_run_has_everything(tiny):
    run = RunDir.open(tiny)
    assert len(run.traces()) == 2
    assert len(run.comparisons()) == 1
    assert (tiny / "report" / "index.html").stat().st_size > 10_000
    assert len(run.transfers()) == 8  # of two metrics, each of two models with itself and with the other
    assert run.analysis() is not None


def test_what_is_done_is_skipped(say, copy, tiny):
    before = snapshot(copy)
    code, out, err = say("run", tiny.parent / "study.yaml", "--out", copy, "--resume")
    assert code == 0, err
    assert "evaluating" not in err
    assert "tracing" not in err
    assert "report: " in out
    changed = {name for name, content in snapshot(copy).items() if before[name] != content}
    assert not {name for name in changed if name.startswith(("models", "transfer", "traces", "manifest"))}


def test_training_alone_says_how_to_go_on(say, tmp_path):
    study = written_study(tmp_path, models=[STUDY["models"][1]])
    code, out, err = say("train", study, "--out", tmp_path / "run")
    assert (code, out) == (0, f"trained; evaluate with: throughline evaluate {tmp_path / 'run'}\n")
    assert re.search(r"zoo/gpt2: step 93/93, 2 layers, FVU 0\.\d+, L0 8\.0, .* tokens/s, 0:00 left", err)
    assert say("train", study, "--out", tmp_path / "quiet", "--quiet") == (0, "", "")
    state = json.loads(say("status", tmp_path / "run", "--json")[1])["models"]["zoo/gpt2"]
    assert (state["state"], state["steps"]["evaluate"]) == ("done", False)
    assert "waiting" in say("status", tmp_path / "run")[1]


@pytest.mark.parametrize("command", ["evaluate", "features", "label", "transfer", "status"])
def test_tables_and_their_json(say, tiny, command):
    code, out, err = say(command, tiny)
    assert (code, err) == (0, "")
    assert "zoo/pythia" in out
    assert all(len(line.rstrip()) <= 118 for line in out.splitlines())
    code, out, err = say(command, tiny, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out, parse_constant=pytest.fail)
    assert "\x1b" not in out


def test_json_says_what_the_table_says(say, tiny):
    qualities = json.loads(say("evaluate", tiny, "--json")[1])
    assert [(q["model"], q["layer"]) for q in qualities] == [(m, i) for m in ("zoo/pythia", "zoo/gpt2") for i in (0, 1)]
    table = say("evaluate", tiny)[1]
    assert all(f"{q['fvu']:.4f}" in table for q in qualities)
    assert f"zoo/pythia: {qualities[0]['num_tokens']:,} held-out tokens" in table
    features = json.loads(say("features", tiny, "--json")[1])
    assert [len(rows) for rows in features.values()] == [128, 128]
    transfers = json.loads(say("transfer", tiny, "--metric", "matching", "--json")[1])
    assert {"value", "null", "low", "high"} <= set(transfers[0]["arrays"])


@pytest.mark.parametrize("command", ["evaluate", "features", "label", "transfer"])
def test_quiet_prints_nothing_but_json(say, tiny, command):
    assert say(command, tiny, "--quiet") == (0, "", "")
    assert json.loads(say(command, tiny, "--quiet", "--json")[1])


def test_the_report_says_where_it_is(say, copy):
    page = copy / "report" / "index.html"
    page.unlink()
    assert say("report", copy) == (0, f"report: {page}\n", "")
    assert page.exists()


def test_a_finished_step_has_the_seconds_of_its_work(tiny):
    run = RunDir.open(tiny)
    for stage in ("transfer", "features"):
        of_steps = sum(step.seconds for name, step in run.manifest().items() if name.startswith(f"{stage}/"))
        assert of_steps == pytest.approx(run.info().seconds[stage], rel=0.1)


@pytest.mark.parametrize(
    ("overlap", "line"),
    [
        (None, "train 96 s · report 31 s · other 4 s (start, imports); 131 s by the clock"),
        (
            40.0,
            "train 96 s · report 31 s · other 44 s (start, imports); 131 s by the clock; a stage's seconds are summed",
        ),
    ],
)
def test_the_seconds_of_the_last_line_add_up(overlap, line):
    said = stage_seconds({"train": 96.0, "report": 31.0}, 131.0, overlap)
    assert said.startswith(line) and ("side by side" in said) == (overlap is not None)


def test_a_trace_in_words(say, copy):
    code, out, err = say("trace", copy, PROMPT, "--model", "zoo/pythia")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f'Input: "{PROMPT}"')
    assert lines[0].endswith("model zoo/pythia")
    assert lines[1].startswith('Answer "42" (right)  p = ')
    assert sum(line.startswith("Layer ") for line in lines) == 2
    shown = [x for x in lines[4 : next(i for i, x in enumerate(lines) if x.startswith("Chain 1"))] if "#" in x]
    effect = r"#\d+ +'.*' .* \d\.\d\d .* if off +[+-]\d+\.\d\d \(predicted [+-]\d+\.\d\d\)"
    assert shown and all(re.search(effect, x) for x in shown)
    assert "What is 15 + 24?" in out and "carry: 1 becomes 0" in out  # what "off" is
    assert "a random feature, switched off" in out and "replacement" in out
    for explained in (
        "features of largest predicted effect",
        "of the lead of the token that it ends in",
        "features × tokens",
    ):
        assert explained in out
    assert re.search(r"all of it off: predicted [+-]\d+\.\d\d, measured [+-]\d+\.\d\d", out)


def test_a_printed_trace_marks_every_set_of_nodes_with_which_the_answer_changes(tiny, capsys):
    found = next(t for t in RunDir.open(tiny).traces() if t.verification)
    assert found.verification
    points = [
        FaithfulnessPoint(num=n, faithfulness=0.5, completeness=0.25, random=0.75, random_kept=share, answer_kept=kept)
        for n, share, kept in ((0, 0.0, False), (4, 0.0, True), (16, 0.2, False))
    ]
    checked = found.verification.model_copy(update={"faithfulness": points})
    traced.trace(found.model_copy(update={"verification": checked}))
    out = capsys.readouterr().out
    assert re.search(r"most influential +0\.50\* +0\.50 +0\.50\*", out)
    assert re.search(r"random +0\.75\* +0\.75\* +0\.75 *\n", out)
    assert re.search(r"all but these +0\.25 +0\.25 +0\.25 *\n\* the answer changes", out)


def test_a_quick_look_says_that_nothing_was_measured(say, copy):
    before = sorted((copy / "traces").iterdir())
    code, out, _ = say("trace", copy, "What is 15 + 28?", "--model", "zoo/pythia", "--no-verify", "--off", "mean")
    assert (
        code == 0
        and "--no-verify" in out
        and "measured in the real" not in out
        and "if off" not in out.split("Chain 1")[0]
    )
    assert "mean at the same position" in out and sorted((copy / "traces").iterdir()) == before


def test_a_feature_is_set_by_hand(say, copy):
    found = json.loads(say("trace", copy, PROMPT, "--model", "zoo/pythia", "--json")[1])
    feature = max((f for layer in found["layers"] for f in layer["features"]), key=lambda f: f["activation"])
    setting = f"layer={feature['layer']},feature={feature['feature']},position={feature['position']}"
    steered = json.loads(say("trace", copy, PROMPT, "--model", "zoo/pythia", "--json", "--set", f"{setting},off")[1])
    scores = [target["score"] + e for target, e in zip(found["targets"], feature["effects"], strict=True)]
    assert steered["steering"]["scores"] == pytest.approx(scores, abs=1e-3)  # as switching it off was measured to do
    same = json.loads(say("trace", copy, PROMPT, "--model", "zoo/pythia", "--json", "--set", f"{setting},x1")[1])
    assert same["steering"]["scores"] == pytest.approx([t["score"] for t in found["targets"]], abs=1e-4)
    assert same["steering"]["changed"] == [] and same["steering"]["answer"] == found["answer"]
    out = say("trace", copy, PROMPT, "--model", "zoo/pythia", "--set", f"{setting},x3")[1]
    assert f"Set by hand: {setting},x3" in out and "probability of the undisturbed answer" in out


def test_a_graph_that_cannot_be_written_is_refused_first(say, tiny, tmp_path):
    for graph, expected in (
        (tmp_path / "none" / "x.json", "there is no folder"),
        (tmp_path, "is a folder; give the name"),
    ):
        assert expected in refused(say("trace", tiny, PROMPT, "--model", "zoo/pythia", "--graph", graph))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--off", "none"], "expected one of mean, counterfactual, zero"),
        (["--linearization", "curved"], "expected one of grouped, plain, frozen, integrated"),
        (["--set", "layer=0,feature=1"], "expected layer=4,feature=237,off"),
        (["--set", "layer=99,feature=1,off"], "layer 99 has no dictionary; there are"),
        (["--set", "layer=0,feature=99999,off"], "has features 0-"),
        (["--set", "layer=0,feature=1,position=99,off"], "has positions 0-"),
        (["--against", "What is 15 + 4?"], "give one of as many tokens"),
        (["--graph", "/nowhere/graph.json"], "cannot be written: there is no folder /nowhere; make it first"),
    ],
)
def test_a_trace_refuses_what_it_cannot_do(say, copy, options, words):
    assert words in refused(say("trace", copy, PROMPT, "--model", "zoo/pythia", *options))


def test_a_graph_is_written_for_circuit_tracers_viewer(say, copy, tmp_path):
    path = tmp_path / "graph.json"
    assert say("trace", copy, PROMPT, "--model", "zoo/pythia", "--graph", path, "--quiet")[0] == 0
    assert {"metadata", "nodes", "links"} <= json.loads(path.read_text()).keys()


def test_a_wrong_answer_is_said_first(say, copy):
    prompt = "What is 99 + 99 + 99?"
    code, out, _ = say("trace", copy, prompt, "--model", "zoo/pythia")
    found = next(t for t in RunDir.open(copy).traces() if t.prompt == prompt)
    assert code == 0, err
    if found.correct is False:
        assert out.splitlines()[1].startswith("The answer is wrong: ")


def test_text_from_a_prompt_is_never_markup(say, copy):
    code, out, _ = say("trace", copy, "[bold red]What[/bold red] :smile: is 15 + 27?", "--model", "zoo/pythia")
    assert code == 0, err
    assert "[bold red]What[/bold red] :smile:" in out


def test_a_trace_as_json_follows_its_schema(say, copy):
    code, out, err = say("trace", copy, PROMPT, "--model", "zoo/gpt2", "--json")
    assert (code, err) == (0, "")
    schema = json.loads((ROOT / "docs" / "trace.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    found = json.loads(out)
    validator.validate(found)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(found | {"answer": 5})
    for path in (copy / "traces").glob("*.json"):
        if not path.name.startswith(("compare-", "totals-")):
            validator.validate(json.loads(path.read_text()))


def test_a_comparison(say, copy):
    code, out, err = say("compare", copy, PROMPT)
    assert (code, err) == (0, "")
    assert out.count('"42"') == 2
    assert "above the 99.9%" in " ".join(out.split())
    found = json.loads(say("compare", copy, PROMPT, "--json")[1])
    assert found["models"] == ["zoo/pythia", "zoo/gpt2"]
    for name, mine in found["standings"].items():
        assert sum(share["value"] for share in mine["active"].values()) == pytest.approx(1)
        assert mine["num_active"] == sum(map(len, found["active"][name].values()))


PROMPTS = ("What is 15 + 27?", "Is 45 larger than 71?", "Add 34 and 13.", "Who is there", "What is 15 + 27?")


def prompts_file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_comparison_of_many_prompts(say, copy, tmp_path):
    file = prompts_file(tmp_path, *PROMPTS[:2], "", *PROMPTS[2:])
    code, out, err = say("compare", copy, "--prompts", file)
    assert code == 0 and "reading 5 prompts in zoo/gpt2" in err
    assert out.splitlines()[0] == "5 prompts in 2 models"
    assert "[" not in out and out.count("no interval, where n is less than 10") == 1
    assert max(map(len, out.splitlines())) <= 80
    code, out, err = say("compare", copy, "--prompts", file, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["prompts"] == list(PROMPTS) and found["expected"] == ["42", "no", "47", None, "42"]
    assert found["right"]["zoo/gpt2"]["n"] == 4
    run = RunDir.open(copy)
    assert [totals.prompts for totals in run.totals()] == [list(PROMPTS)]
    assert {trace.prompt for trace in run.traces()} == {PROMPT}  # totals are no traces
    assert api.compare_prompts(copy, PROMPTS, device="cpu") == run.totals()[0] == api.compare_prompts(copy, file)


def test_many_prompts_are_read_as_each_alone_is_and_as_a_trace_reads_it(copy):
    """The oracle is `find_answer` and the split of a trace, one prompt at a time."""
    session = Session(RunDir.open(copy))
    for name in ("zoo/pythia", "zoo/gpt2"):
        model, dictionaries = session.model(name), session.dictionaries(name)
        for prompt, reading in zip(PROMPTS, read_prompts(model, dictionaries, PROMPTS, 4), strict=True):
            tokens = encode_prompt(model.tokenizer, prompt)
            answer = find_answer(model, [t.id for t in tokens], 4)
            subject = find_subject(model, dictionaries, prompt, tokens, answer)
            assert reading.answer == spell(model, answer.prompt_ids, answer.answer_ids).strip()
            assert reading.probability == pytest.approx(answer.probability, rel=1e-4)
            assert reading.complete == answer.complete
            for layer, codes in reading.layers.items():
                features = subject.clean.features[layer] * subject.kept_T[:, None]
                dense = np.zeros(features.shape, np.float32)
                dense[codes.positions_A, codes.features_A] = codes.activations_A
                assert dense == pytest.approx(features.numpy(), rel=1e-3, abs=1e-3)


def test_totals_of_one_prompt_are_its_comparison(copy):
    one, many = api.compare(copy, PROMPT), api.compare_prompts(copy, [PROMPT])
    for name in one.models:
        assert many.answers[name] == [one.answers[name]]
        mine, total = one.standings[name], many.standings[name]
        assert [e.value for e in total.active.values()] == pytest.approx([e.value for e in mine.active.values()])
        assert (total.live, total.chance, total.ceiling) == (mine.live, mine.chance, mine.ceiling)
    there = {c.name: {m for m, x in c.models.items() if x.present.value} for c in many.concepts if not c.known}
    assert there.items() <= {c.name: set(c.lives) for c in one.concepts}.items()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "prompts.txt has no prompts; write one a line"),
        (["", "  "], "prompts.txt has no prompts; write one a line"),
        ([PROMPT, "", LONG_PROMPT], "line 3 of "),
        ([PROMPT, LONG_PROMPT], "zoo/pythia sees 64 and needs at least one for the answer; shorten it or take it out"),
    ],
)
def test_wrong_files_of_prompts_change_nothing(say, tiny, tmp_path, lines, expected):
    before = snapshot(tiny)
    assert expected in refused(say("compare", tiny, "--prompts", prompts_file(tmp_path, *lines)))
    assert snapshot(tiny) == before


def test_a_comparison_needs_one_of_prompt_and_file(say, tiny, tmp_path):
    file = prompts_file(tmp_path, PROMPT)
    assert "expects a prompt or a file of prompts, found both; type: throughline compare" in refused(
        say("compare", tiny, PROMPT, "--prompts", file)
    )
    assert "found neither" in refused(say("compare", tiny))
    assert "none.txt cannot be read; give a text file" in refused(
        say("compare", tiny, "--prompts", tmp_path / "none.txt")
    )
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "bytes is not UTF-8 text" in refused(say("compare", tiny, "--prompts", tmp_path / "bytes"))
    assert "compare needs two models or more" in refused(say("compare", tiny, "--prompts", file, "--model", "zoo/gpt2"))
    with pytest.raises(InputError, match="there are no prompts"):
        api.compare_prompts(tiny, [])


def test_init_writes_studies_that_can_be_read(say, tmp_path):
    for preset in api.PRESETS:
        path = tmp_path / f"{preset}.yaml"
        code, out, _ = say("init", path, "--preset", preset)
        assert (code, out) == (0, f"{path} written; start it with: throughline run {path}\n")
        assert "exists; give another name" in refused(say("init", path))


# ---- status


def strip_steps(run: Path, *names: str) -> None:
    for file in (run / "manifest").iterdir():
        if any(name in json.loads(file.read_text())["step"] for name in names):
            file.unlink()


@pytest.mark.parametrize(
    ("age", "more", "state"),
    [
        (1, {}, "running"),
        (3600, {}, "stopped"),
        (3600, {"failed": "layer 1: the loss is nan"}, "failed"),
        (None, {}, "waiting"),
    ],
)
def test_the_status_of_a_run_half_done(say, copy, age, more, state):
    strip_steps(copy, "zoo/gpt2")
    if age is not None:
        state_of = {"host": "here", "pid": 1, "device": "cpu", "at": time.time() - age, "step": 7, "num_steps": 93}
        measured = {"fvu": [0.1, 0.2], "l0": [8, 8], "dead": [0, 0], "tokens_per_second": 5000.0, "eta_seconds": 12.0}
        RunDir(copy).note_job(JobState(model="zoo/gpt2", layers=[0, 1], **state_of, **measured, **more))
    found = json.loads(say("status", copy, "--json")[1])["models"]
    assert found["zoo/pythia"]["state"] == "done"
    assert found["zoo/pythia"]["layers"]["0"] == {"state": "done", "gate": []}
    assert found["zoo/gpt2"]["state"] == state
    assert found["zoo/gpt2"]["layers"]["1"]["state"] == state
    shown = say("status", copy)[1]
    sign = {"running": ">>", "stopped": "!!", "failed": "xx", "waiting": ".."}[state]
    assert re.search(rf"zoo/gpt2 +{re.escape(sign)} +{state}", shown)
    assert f"2 of 4 layers trained, 2 {state}" in shown and "# = done" in shown and f"{sign[0]} = {state}" in shown
    shown = re.sub(" +", " ", shown)
    expected = {
        "running": "cpu zoo/gpt2 0-1 7/93 0.1500 8.0 0% 5,000 0:12",
        "stopped": "zoo/gpt2 layers 0-1 stopped at step 7/93; --resume goes on from its last checkpoint",
        "failed": "zoo/gpt2 layers 0-1 failed: layer 1: the loss is nan",
        "waiting": "",
    }
    assert expected[state] in shown
    assert ("about 0:12 left, until" in shown) == (state == "running")


def test_a_failed_training_is_remembered(say, tmp_path):
    lines = "\n".join(json.dumps({"text": f"story {i} has a few words only"}) for i in range(20))
    (tmp_path / "few.jsonl").write_text(lines)
    study = written_study(tmp_path, data={"path": "few.jsonl"}, models=["zoo/gpt2"])
    code, out, err = say("train", study, "--out", tmp_path / "run", "--set", "training.batch_tokens=2048")
    assert (code, out) == (1, "")
    assert "less than one batch" in err.splitlines()[-1]
    state = json.loads(say("status", tmp_path / "run", "--json")[1])["models"]["zoo/gpt2"]
    assert state["state"] == "failed"
    assert "less than one batch" in state["jobs"][0]["failed"]


# ---- help


def test_version_and_help(say):
    import throughline

    assert say("--version") == (0, f"{throughline.__version__}\n", "")
    code, out, err = say("--help")
    assert (code, err) == (0, "")
    assert all(f"  {command} " in out for command in COMMANDS)
    assert say()[:2] == (0, out)


def test_no_sentence_of_the_help_is_cut_short(say):
    assert "..." not in say("--help")[1].replace("[ARGS]...", "")


@pytest.mark.parametrize("name", ["cli.md", "study.md", "trace.schema.json"])
def test_generated_documents_are_current(name):
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))["render_all"]()
    assert (ROOT / "docs" / name).read_text() == made[name], "run `make docs`"


def test_every_command_is_a_function():
    for command in COMMANDS:
        assert callable(getattr(api, FUNCTIONS.get(command, command)))
    with pytest.raises(InputError):
        api.choose_device("gpu")
