"""Processes that are forked with everything imported: they do what `python -m throughline` does, and nothing is left of them."""

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

import commands
from commands import start

pytestmark = pytest.mark.xdist_group("commands")

STUDY: dict[str, Any] = {
    "name": "tiny",
    "models": [{"path": "zoo/pythia", "layers": [0]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"architecture": "topk", "d_sae": 64, "k": 8},
    "training": {"tokens": 80_000, "batch_tokens": 64, "checkpoint_minutes": 0},
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LONGEST_SECONDS = 120.0
Said = tuple[int, str, str]


# ---- five true processes, each as the forked one


def true(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """`python -m throughline`, as everybody starts it."""
    command = [sys.executable, "-m", "throughline", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | ONE_THREAD, text=True, **pipes, **options)


def forked(*arguments: object, **options: Any) -> commands.Command:
    """The same, from the server."""
    return start(*arguments, env=os.environ | ONE_THREAD, **options)


BOTH = (true, forked)


def said(process: Any) -> Said:
    out, err = process.communicate(timeout=LONGEST_SECONDS)
    return process.returncode, out, err


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "models").rglob("layer_00/*.safetensors")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study, and a run of it by either kind of process: `true` and `forked`."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    for begin in BOTH:
        arguments = ("train", "study.yaml", "--out", begin.__name__, "--device", "cpu", "--quiet")
        assert said(begin(*arguments, cwd=folder)) == (0, "", "")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["status", "true"], ["status", "nothing"], ["train", "study.yaml", "--out", "true"], ["trian"]],
)
def test_what_it_says_and_its_exit_code_are_those_of_a_true_process(folder, arguments):
    ended = [said(begin(*arguments, cwd=folder)) for begin in BOTH]
    assert ended[0] == ended[1]
    assert any(ended[0][1:])


def test_it_trains_the_same_bits(folder):
    assert len(weights(folder / "true")) == 2
    assert weights(folder / "true") == weights(folder / "forked")


@pytest.mark.parametrize("begin", [forked, pytest.param(true, marks=pytest.mark.slow("processes"))])
def test_a_training_that_is_killed_goes_on_to_the_same_bits(folder, tmp_path, begin):
    command = ("train", folder / "study.yaml", "--out", tmp_path / "run", "--device", "cpu", "--resume", "--quiet")
    process = begin(*command)
    while not list(tmp_path.rglob("state.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL == said(process)[0]
    assert not weights(tmp_path / "run")
    assert said(begin(*command)) == (0, "", "")
    assert weights(tmp_path / "run") == weights(folder / "true")


@pytest.mark.parametrize("begin", BOTH)
def test_a_server_says_where_it_is_and_ends_with_ctrl_c(folder, begin):
    process = begin("serve", folder / "true", "--port", "0", "--device", "cpu")
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())
        assert address, process.communicate()
        with urllib.request.urlopen(f"{address[0]}api/overview", timeout=LONGEST_SECONDS) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        code, out, err = said(process)
        assert (code, out) == (0, "") and "Traceback" not in err
    finally:
        process.kill()
        said(process)


# ---- a process of its own


def print_all(*arguments: str) -> None:
    """Process, session, folder and arguments, a line each."""
    print(os.getpid(), os.getsid(0), Path.cwd(), list(arguments), sep="\n")


def test_it_has_a_pid_a_session_and_a_folder(tmp_path):
    process = start("one", "two three", cwd=tmp_path, start_new_session=True, function=print_all)
    code, out, err = said(process)
    assert (code, err) == (0, "")
    assert out.splitlines() == [str(process.pid), str(process.pid), str(tmp_path), "['one', 'two three']"]
    assert process.pid not in (os.getpid(), commands.server_pid())
    _, out, _ = said(start(function=print_all))
    assert out.splitlines()[1:3] == [str(os.getsid(0)), str(Path.cwd())]


def print_environment() -> None:
    """Variables, as Python and as libraries in C see them; torch's threads."""
    import ctypes

    import torch

    get = ctypes.CDLL(None).getenv
    get.restype = ctypes.c_char_p
    print(sorted(os.environ), get(b"A_VARIABLE"), get(b"HOME"), torch.get_num_threads())


def test_it_has_an_environment_of_its_own(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    frozen = {name: value for name, value in os.environ.items() if name.startswith(commands.READ_AT_IMPORT)}
    given = frozen | {"A_VARIABLE": "here", "OMP_NUM_THREADS": "3"}
    code, out, err = said(start(env=given, function=print_environment))
    assert (code, err) == (0, "")
    assert out == f"{sorted(given)} b'here' None 3\n"


def test_variables_that_were_read_already_are_not_changed():
    with pytest.raises(ValueError, match="NUMBA_CACHE_DIR is read at import: .* must be a fresh one"):
        start("status", "run", env=os.environ | {"NUMBA_CACHE_DIR": "/elsewhere"})


def import_mine() -> None:
    """A module that is only on PYTHONPATH."""
    import a_module_of_mine  # pyright: ignore[reportMissingImports]

    print(a_module_of_mine.WORD)


def test_it_finds_modules_on_its_pythonpath(tmp_path):
    (tmp_path / "a_module_of_mine.py").write_text("WORD = 'found'")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert said(start(env=os.environ | {"PYTHONPATH": path}, function=import_mine)) == (0, "found\n", "")
    assert "No module named 'a_module_of_mine'" in said(start(function=import_mine))[2]


def print_constant() -> None:
    """One that another value was asked for."""
    from throughline.training import chunks

    print(chunks.MOST_TOKENS)


def test_constants_are_set_in_it_alone():
    from throughline.training import chunks

    process = start(function=print_constant, constants={"throughline.training.chunks.MOST_TOKENS": 7})
    assert said(process) == (0, "7\n", "")
    assert said(start(function=print_constant)) == (0, f"{chunks.MOST_TOKENS}\n", "")


# ---- how it ends


def fall(how: str) -> None:
    """End in one of several ways."""
    atexit.register(print, "at the end")
    threading.Timer(0.2, print, ["a thread"]).start()
    print("begun")
    if how == "raise":
        raise RuntimeError("no device of this kind")
    if how == "interrupt":
        raise KeyboardInterrupt
    sys.exit({"": None, "3": 3, "words": "words"}[how])


@pytest.mark.parametrize(
    ("how", "code", "err"),
    [
        ("", 0, ""),
        ("3", 3, ""),
        ("words", 1, "words\n"),
        ("raise", 1, "RuntimeError: no device of this kind\n"),
        ("interrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_it_ends_as_the_interpreter_does(how, code, err):
    process = start(how, function=fall)
    found = said(process)
    assert found[:2] == (code, "begun\na thread\nat the end\n")
    assert found[2].endswith(err) and ("Traceback" in found[2]) == (how in ("raise", "interrupt"))


def sleep() -> None:
    """Say that it runs, for as long as nobody ends it."""
    print("runs", flush=True)
    sys.stderr.write("still\n")
    time.sleep(LONGEST_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(number):
    process = start(function=sleep)
    assert process.stdout and process.stderr
    assert (process.stdout.readline(), process.stderr.readline()) == ("runs\n", "still\n")  # while it runs
    assert process.poll() is process.returncode is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert said(process)[0] == process.wait() == process.poll() == process.returncode == -number
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_ctrl_c_is_exit_code_130(folder, tmp_path):
    long = ("--set", "training.tokens=4_000_000", "--device", "cpu")
    process = start("train", folder / "study.yaml", "--out", tmp_path / "run", *long)
    while not list((tmp_path / "run").glob("progress/*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, _, err = said(process)
    assert (code, err.splitlines()[-1]) == (
        130,
        "throughline: stopped; train and run continue with --resume, demo with the same command",
    )


def write_much() -> None:
    """More than a pipe holds, on both streams."""
    print("o" * 10**6, end="")
    sys.stderr.write("e" * 10**6)


def test_all_that_it_says_is_captured(tmp_path):
    assert said(start(function=write_much)) == (0, "o" * 10**6, "e" * 10**6)
    done = commands.run(function=write_much)
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 10**6, 10**6)
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        assert said(start("", stdout=log, stderr=log, function=fall)) == (0, "", "")
    assert (tmp_path / "log").read_text() == "before\nbegun\na thread\nat the end\n"
    assert said(start(function=write_much, stdout=subprocess.DEVNULL)) == (0, "", "e" * 10**6)
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run(function=sleep, timeout=0.1)


# ---- the server


def print_loaded(*names: str) -> None:
    """Which of these modules were loaded before it began."""
    print(*sorted(set(names) & set(sys.modules)))


def test_the_server_has_imported_what_takes_long_and_started_no_thread():
    others = ("ray", "polars", "matplotlib")
    assert said(start(*commands.PRELOADED, *others, function=print_loaded))[1].split() == sorted(commands.PRELOADED)
    tasks = Path(f"/proc/{commands.server_pid()}/task")
    if tasks.exists():
        assert len(list(tasks.iterdir())) == 1


def sleep_for(seconds: str) -> None:
    """For so many seconds."""
    time.sleep(float(seconds))


def test_nothing_is_left_of_a_test_process_that_has_ended():
    code = (
        "import commands, test_commands; commands.PRELOADED[:] = []\n"
        "process = commands.start(30, function=test_commands.sleep_for)\n"
        "print(process.pid, commands.server_pid())"
    )
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and done.stderr == ""
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
